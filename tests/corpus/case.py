"""Cases of bad input: how the input is made, what uses it, and what comes of that."""

import logging
import os
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from datencoder_jax.errors import UserError
from datencoder_jax.printable import is_printable

REFUSED, USED, FAILED = "refused", "used", "failed"
LIMIT = 20.0
"""Seconds after which a case counts as one that hangs."""

_LEFTOVERS = re.compile(r"(^|/)\.(tmp-|datencoder\.lock)")


class Case(NamedTuple):
    """One bad input.

    Attributes:
        kind: what it is an input to, the heading on the page.
        name: a description in a few plain words.
        make: writes the input into a folder, which is also the working folder, and returns the arguments of `run`.
        run: reads or uses it.
        expected: "refused" or "used".
    """

    kind: str
    name: str
    make: Callable[[Path], Any]
    run: Callable[..., Any]
    expected: str


class Outcome(NamedTuple):
    """What came of a case.

    Attributes:
        verdict: "refused", "used" or "failed".
        sentence: the refusal or the warnings, without what depends on the machine; "" where nothing was said.
        fault: what is wrong with how it ended, such as a traceback; "" where nothing is.
        written: files and folders that are new or changed afterwards.
    """

    verdict: str
    sentence: str
    fault: str
    written: list[str]


class Kind:
    """The cases of one kind.

    Args:
        title: the heading on the page.
        text: one sentence on what uses the inputs.
        run: what uses them, where a case names nothing else.
    """

    def __init__(self, title: str, text: str, run: Callable[..., Any]):
        self.title, self.text, self.run = title, text, run
        self.cases: list[Case] = []

    def refused(self, name: str, make: Callable[[Path], Any], run: Callable[..., Any] | None = None) -> None:
        """Adds an input that is to be refused."""
        self.cases.append(Case(self.title, name, make, run or self.run, REFUSED))

    def used(self, name: str, make: Callable[[Path], Any], run: Callable[..., Any] | None = None) -> None:
        """Adds an input that is to be used as it is meant."""
        self.cases.append(Case(self.title, name, make, run or self.run, USED))


class _TimeIsUp(BaseException):
    """Nothing that catches `Exception` stops this one."""


def run_case(case: Case, folder: Path) -> Outcome:
    """Makes the input of a case in an empty folder, uses it, and says what came of it."""
    with _in_folder(folder), _recorded_logs() as logs, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        arguments = case.make(folder)
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        before = _content(folder)
        verdict, sentence, fault = _use(case.run, arguments, folder)
        after = _content(folder)
    written = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if verdict == USED:
        said = [str(warning.message) for warning in caught] + logs
        sentence = " ".join(_without_machine(text, folder) for text in dict.fromkeys(said))
        written = [name for name in written if _LEFTOVERS.search(name) and name in after]
    if not is_printable(sentence):
        fault = f"the sentence is not one printable line: {sentence!r}"
    return Outcome(FAILED if fault else verdict, sentence, fault, written)


def _use(run: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> tuple[str, str, str]:
    """Verdict, sentence and fault."""
    try:
        with _limited():
            run(*arguments)
    except UserError as error:
        sentence = _without_machine(_without_foreign_words(error), folder)
        return REFUSED, sentence, "" if sentence else "the sentence is empty"
    except _TimeIsUp:
        return FAILED, "", f"it hangs: {LIMIT:g} seconds were not enough"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return FAILED, "", "".join(traceback.format_exception(error))
    return USED, "", ""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Within it the folder is the working folder, and caches are beside it."""
    cache, back = folder.with_name(f"{folder.name}-cache"), Path.cwd()
    variables = {"DATENCODER_CACHE": str(cache), "HOME": str(folder), "TMPDIR": str(folder.parent)}
    with mock.patch.dict(os.environ, variables):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(back)


@contextmanager
def _recorded_logs() -> Iterator[list[str]]:
    """The warnings that are logged within it; the command line then leaves logging as it is."""
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.partition(".")[0] in ("root", "datencoder_jax"):
                messages.append(record.getMessage())

    recorder, root = Recorder(logging.WARNING), logging.getLogger()
    root.addHandler(recorder)
    try:
        yield messages
    finally:
        root.removeHandler(recorder)


def _content(folder: Path) -> dict[str, Any]:
    """What is in a folder, by name: the content of files, and where links lead."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(parent, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = os.readlink(path)
            else:
                found[key] = Path(path).read_bytes() if os.path.isfile(path) else "folder or device"
    return found


def _without_machine(text: str, folder: Path) -> str:
    """A sentence without the temporary folder and random names."""
    text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), ".")
    text = text.replace(str(Path(__file__).parents[2]), "").replace(str(folder.parent), "/tmp")
    # Python before 3.12 puts the choices of an option in quotation marks.
    text = re.sub(r"\(choose from [^)]*\)", lambda match: match[0].replace("'", ""), text)
    return re.sub(r"\.tmp-[0-9a-f]+-", ".tmp-", text)


def _without_foreign_words(error: BaseException) -> str:
    """A sentence with … in the place of what another library or Python says, which changes with their versions."""
    sentence, cause = str(error), error.__cause__
    while cause is not None:
        if not isinstance(cause, UserError) and not getattr(cause, "strerror", None):
            said = _text(cause)
            first = (said.strip().splitlines() or [""])[0]
            texts = [repr(cause), " ".join(said.split()), first, str(getattr(cause, "msg", ""))]
            texts += [text.partition(": ")[2] for text in texts]
            texts += [text[:1].lower() + text[1:] for text in texts]
            for text in sorted({text.rstrip(".: ") for text in texts}, key=len, reverse=True):
                if len(text) > 3 and text in sentence:
                    sentence = sentence.replace(text, "…")
                    break
        cause = cause.__cause__
    return sentence


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a case has an error that fails to say anything
        return ""
