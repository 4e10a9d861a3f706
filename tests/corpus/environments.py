"""Bad environments: variables, folders that cannot be written, disks that are full."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from checkpoint_helpers import concept
from PIL import Image

from corpus import files
from corpus.case import Kind
from corpus.commands import argv, run
from corpus.files import content, nothing
from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.commands.output_folder import lock_folder
from datencoder_jax.data.reading import read_image
from datencoder_jax.data.writing import reserve_room, write_files
from datencoder_jax.errors import UserError
from datencoder_jax.training.logbook import Logbook

KIND = Kind(
    "Environments",
    "Variables, folders and disks as they may be, under `datencoder generate --prompt robot --num 1 --out out` where "
    "the input says nothing else.",
    lambda *arguments: run(*arguments),
)

GENERATE = ("generate", "--prompt", "robot", "--num", "1", "--out", "out")


def beside(make: files.Maker, *words: str) -> files.Maker:
    """The command line beside what another maker writes."""

    def make_both(where: Path) -> tuple[str, ...]:
        make(where)
        return argv(*(words or GENERATE))(where)

    return make_both


def failing(target: Any, name: str, number: int, where: Callable[[Any], bool] = lambda _: True) -> Callable[..., None]:
    """The command while a function of the system fails with an error number."""
    real = getattr(target, name)

    def fail(*args: Any, **options: Any) -> Any:
        if where((args, options)):
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    def use(*words: str) -> None:
        with mock.patch.object(target, name, fail):
            run(*words)

    return use


def with_variables(**variables: str | None) -> Callable[..., None]:
    """The command under other environment variables; None removes one."""

    def use(*words: str) -> None:
        removed = [name for name, value in variables.items() if value is None]
        with mock.patch.dict(os.environ, {name: value for name, value in variables.items() if value is not None}):
            for name in removed:
                os.environ.pop(name, None)
            run(*words)

    return use


@contextmanager
def _pictures_fail(number: int) -> Any:
    real = Image.Image.save

    def save(self: Image.Image, path: Any, *args: Any, **options: Any) -> None:
        real(self, path, *args, **options)
        if str(path).endswith("samples.png"):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(number, os.strerror(number))

    with mock.patch.object(Image.Image, "save", save):
        yield


def _full_while_drawing(*words: str) -> None:
    with _pictures_fail(errno.ENOSPC):
        run(*words)


def _full_while_saving(path: Path) -> None:
    with mock.patch.object(os, "fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        save_concept(path, concept())


def _locked(*words: str) -> None:
    with lock_folder(Path("out")):
        run(*words)


def _report(text: str) -> files.Maker:
    return beside(content("out/report.json", text))


# --- output folders
KIND.refused("an output folder that is a file", beside(content("out", "x")))
KIND.refused("an output folder that is a link to a disk that is away", beside(files.link("out", "/nonexistent/run")))
KIND.refused("an output folder that is a link to itself", beside(files.link("out", "out")))
KIND.refused("an output folder that is a pipe", beside(files.fifo("out")))
KIND.refused("an output folder below a file", argv(*GENERATE[:-1], "cat.png/out"))
KIND.refused("an output folder where none can be made", argv(*GENERATE[:-1], "/proc/nowhere"))
KIND.refused("an output folder that another run writes to", argv(*GENERATE), _locked)
KIND.refused("an output folder with a picture of somebody else", beside(content("out/samples.png", "mine")))
KIND.refused("an output folder with a report that is no JSON", _report("{"))
KIND.refused("an output folder with a report that is a list", _report("[1]"))
KIND.refused("an output folder with a report of personalize", _report('{"command": "personalize"}'))
KIND.refused("an output folder with a report whose command is a number", _report('{"command": 3}'))
KIND.refused("an output folder with a report nested 100,000 deep", _report("[" * 100_000))
KIND.refused("an output folder with a report that is not UTF-8", beside(content("out/report.json", b"\xff\xfe")))
KIND.refused("an output folder with a folder that is called as a picture", beside(content("out/samples.png/x", "mine")))
KIND.used("an output folder with a report of an earlier run", _report('{"command": "generate", "pictures": []}'))
KIND.used(
    "a report that lists files outside as its pictures",
    _report(json.dumps({"command": "generate", "pictures": ["../cat.png", "/etc/passwd", 3, None]})),
)
KIND.used("a report whose list of pictures is a number", _report('{"command": "generate", "pictures": 3}'))
KIND.used("an output folder with files of others", beside(content("out/notes.txt", "mine")))
KIND.used("a lock that a killed run left", beside(content("out/.datencoder.lock", "")))
KIND.used("half-written files that a killed run left", beside(content("out/.tmp-01234567-samples.png", "half")))

# --- disks
KIND.refused("a folder that may only be read", argv(*GENERATE), failing(tempfile, "TemporaryFile", errno.EROFS))
KIND.refused("a folder without permission", argv(*GENERATE), failing(tempfile, "TemporaryFile", errno.EACCES))
KIND.refused("a disk that is full at the start", argv(*GENERATE), failing(tempfile, "TemporaryFile", errno.ENOSPC))
KIND.refused("a quota that is used up", argv(*GENERATE), failing(tempfile, "TemporaryFile", errno.EDQUOT))
KIND.refused("a disk that is full when the pictures are written", argv(*GENERATE), _full_while_drawing)
KIND.refused("a quota that is used up when files are flushed", argv(*GENERATE), failing(os, "fsync", errno.EDQUOT))
KIND.refused("a disk that is full when files are flushed", argv(*GENERATE), failing(os, "fsync", errno.ENOSPC))
KIND.refused("a disk that is full when files get their names", argv(*GENERATE), failing(os, "replace", errno.ENOSPC))
KIND.refused("too many open files", argv(*GENERATE), failing(tempfile, "TemporaryFile", errno.EMFILE))
KIND.refused("a concept that is saved to a full disk", nothing(Path("concept.safetensors")), _full_while_saving)
KIND.refused(
    "a concept that is saved to a folder's name",
    lambda w: files.folder("a/b")(w).parent,
    lambda p: save_concept(p, concept()),
)
KIND.refused(
    "a concept that is saved below a file", lambda w: content("a", "x")(w) / "b", lambda p: save_concept(p, concept())
)
KIND.refused(
    "a concept that is saved under a name of 300 letters", nothing("n" * 300), lambda p: save_concept(p, concept())
)
KIND.refused(
    "a concept that is saved under a name with a zero byte", nothing("a\0b"), lambda p: save_concept(p, concept())
)
KIND.refused("a concept that is saved under an empty name", nothing(""), lambda p: save_concept(p, concept()))
KIND.refused(
    "a concept with values that are not numbers, saved",
    nothing("c"),
    lambda p: save_concept(p, concept(embeddings=np.full((2, 12), np.nan, "f4"))),
)
KIND.refused(
    "a concept with a token that cannot be printed, saved",
    nothing("c"),
    lambda p: save_concept(p, concept(token="a\nb")),
)
KIND.refused(
    "room for a file of a million terabytes", nothing(Path(".")), lambda p: reserve_room(p, 10**18).__enter__()
)
KIND.refused("files whose names have 300 letters", nothing(Path("out")), lambda p: write_files(p, {"n" * 300: {}}))
KIND.refused("a picture that may not be read", files.picture("cat.png"), lambda p: _not_permitted(p))
KIND.used(
    "a concept that is saved under a name of 255 letters", nothing("n" * 255), lambda p: save_concept(p, concept())
)
KIND.used(
    "a concept that is saved under a name of 85 letters of Chinese",
    nothing("猫" * 85),
    lambda p: save_concept(p, concept()),
)


def _not_permitted(path: Path) -> None:
    with mock.patch.object(Path, "open", side_effect=PermissionError(errno.EACCES, "Permission denied")):
        read_image(path)


# --- streams, consoles, devices
def in_process(*words: str, console: str | None = None, **variables: str) -> None:
    """Runs a command of its own process, on a console of this encoding, or without any streams where it is None.

    Raises:
        UserError: the sentence that it prints.
        AssertionError: it ends with another status than 0 and 2, or prints more.
    """
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": console or "utf-8"} | variables
    command = [sys.executable, "-m", "datencoder_jax", *words]
    if console is None:
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, timeout=100)
    lines = done.stderr.decode(console or "utf-8").splitlines()
    if done.returncode == 0:
        assert not lines, lines
        return
    assert done.returncode == 2, (done.returncode, lines)
    if console is not None:
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        raise UserError(lines[0].removeprefix("error: "))


def on_console(encoding: str | None, *words: str, **variables: str) -> Callable[..., None]:
    """A command on such a console."""
    return lambda *_: in_process(*words, console=encoding, **variables)


_FISH = ("toyworld", "--class", "fish", "--out")
KIND.used("no standard streams", argv(), on_console(None, *_FISH, "fish.png"))
KIND.used("a name in Chinese on a console of Windows", argv(), on_console("cp1252", *_FISH, "猫.png"))
KIND.refused("a missing name in Chinese on a console of Windows", argv(), on_console("cp1252", "info", "猫"))
KIND.refused("a missing name that is not UTF-8", argv(), on_console("utf-8", "info", os.fsdecode(b"caf\xe9")))
KIND.refused("a platform that JAX does not have", argv(), on_console("utf-8", *GENERATE, JAX_PLATFORMS="nonsense"))


def _resume(path: Path) -> None:
    with Logbook(path.parent, 1, 3) as log:
        log.metrics(2, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()] == [1, 2]


_LINE = b'{"step": 1, "loss": 2.0}\n'
for _name, _end in {
    "half a line": b'{"step": 2, "lo',
    "bytes that are no UTF-8": b'{"step": 2, "\xff\xfe',
    "zeros": bytes(512),
    "a later step": b'{"step": 2, "loss": 3.0}\n',
    "a step that is a text": b'{"step": "two"}\n',
    "a line nested 100,000 deep": b"[" * 100_000,
}.items():
    KIND.used(f"a log of training that ends in {_name}", content("work/metrics.jsonl", _LINE + _end), _resume)

# --- caches and variables
KIND.used("a cache folder that is a file", beside(content("cache", "x")), with_variables(DATENCODER_CACHE="cache"))
KIND.used("a cache folder below a file", beside(content("cache", "x")), with_variables(DATENCODER_CACHE="cache/deep"))
KIND.used(
    "a cache folder that is a link to itself",
    beside(files.link("cache", "cache")),
    with_variables(DATENCODER_CACHE="cache"),
)
KIND.used("a cache folder whose name has 300 letters", argv(*GENERATE), with_variables(DATENCODER_CACHE="n" * 300))
KIND.used("a cache folder where none can be made", argv(*GENERATE), with_variables(DATENCODER_CACHE="/proc/nowhere"))
KIND.used("an empty variable for the cache folder", argv(*GENERATE), with_variables(DATENCODER_CACHE=""))
KIND.used("no home", argv(*GENERATE), with_variables(HOME=None, XDG_CACHE_HOME=None, DATENCODER_CACHE=None))
KIND.used("a home that is not there", argv(*GENERATE), with_variables(HOME="/nonexistent", DATENCODER_CACHE=None))
KIND.used(
    "`datencoder info` without a home",
    argv("info"),
    with_variables(HOME=None, XDG_CACHE_HOME=None, DATENCODER_CACHE=None),
)
KIND.used(
    "`datencoder info` with a cache folder that is a file",
    beside(content("cache", "x"), "info"),
    with_variables(DATENCODER_CACHE="cache"),
)
KIND.used(
    "`datencoder info` with a cache folder whose name has 300 letters",
    argv("info"),
    with_variables(DATENCODER_CACHE="n" * 300),
)
KIND.used("a folder for temporary files that is not there", argv(*GENERATE), with_variables(TMPDIR="/nonexistent"))
KIND.used("a language that does not exist", argv(*GENERATE), with_variables(LANG="xx_XX", LC_ALL="xx_XX"))
KIND.used("a terminal of no width", argv(*GENERATE), with_variables(COLUMNS="0", LINES="0"))
KIND.used("a terminal whose width is a text", argv(*GENERATE), with_variables(COLUMNS="wide"))
