"""The command line, `datencoder COMMAND`: a thin skin over the Python API.

Here is what happens on errors. The options are in `commands/options.py`, and the commands themselves in `commands/`,
imported only when one is run, so that help texts come at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from types import FrameType
from typing import Any, NoReturn

from datencoder_jax.commands.console import prepare_streams
from datencoder_jax.commands.examples import EXAMPLES
from datencoder_jax.commands.options import add_commands
from datencoder_jax.errors import UserError, exit_status
from datencoder_jax.printable import escape_hidden

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for a mistake in the input, 130 when interrupted, or 1."""
    prepare_streams()
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error), exit_status(error))
    except BrokenPipeError:  # whoever read the output (`head`, a pager) has left
        _discard_output()
        return 1
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # the output itself is what could not be written
            _discard_output()
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}.", exit_status(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return _INTERRUPTED
    except (MemoryError, RuntimeError, AssertionError) as error:
        if _has_no_device():
            from datencoder_jax.runtime.availability import explain_no_device

            return _fail(explain_no_device(error))
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(
            "The memory does not suffice; try --memory 8, a lower --resolution, a smaller --num or another device."
        )


def _has_no_device() -> bool:
    """Whether JAX, where it is in use, finds no device to compute on."""
    if (jax := sys.modules.get("jax")) is None:
        return False
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return True
    return False


def run_and_exit() -> NoReturn:
    """The installed command: `main`, after which nobody waits for programs that still compile in the background.

    After Ctrl-C the process ends at once: what an interrupted import leaves half-made may bring Python's own end down.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _show_unraisable
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL, None):
        signal.signal(signal.SIGINT, _interrupt)
    try:
        status = main()
    except Exception as error:
        if not _comes_from_interrupt(error):
            raise
        print("\ninterrupted", file=sys.stderr)
        status = _INTERRUPTED
    sys.unraisablehook = hook
    compilation = sys.modules.get("datencoder_jax.compilation")
    is_compiling = compilation is not None and compilation.is_compiling()
    if is_compiling or (status == _INTERRUPTED and not _is_one_of_several()):
        _leave(status)
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises `KeyboardInterrupt`, but while a module is imported: native ones end in a segmentation fault by it."""
    importing = frame
    while importing is not None and not importing.f_code.co_filename.startswith("<frozen importlib"):
        importing = importing.f_back
    if importing is None:
        signal.default_int_handler(number, frame)
    print("\ninterrupted", file=sys.stderr)
    if (folders := sys.modules.get("datencoder_jax.commands.output_folder")) is not None:
        folders.abandon_folders()
    _leave(_INTERRUPTED)


def _show_unraisable(args: Any) -> None:
    """Ends the process where Ctrl-C came in a callback that cannot raise it, such as one of Python's importer."""
    if issubclass(args.exc_type, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        _leave(_INTERRUPTED)
    sys.__unraisablehook__(args)


def _comes_from_interrupt(error: BaseException | None) -> bool:
    """Whether an error is what Ctrl-C led to; libraries that are being imported make an error of their own of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _leave(status: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _is_one_of_several() -> bool:
    """Whether this process trains with others, who are told at its end."""
    jax = sys.modules.get("jax")
    return jax is not None and hasattr(jax, "distributed") and jax.distributed.is_initialized()


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what there is to say
        return stop.code if isinstance(stop.code, int) else 2
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            args.run(args)
        except SystemExit as stop:  # training that was asked to stop, and said so
            return stop.code if isinstance(stop.code, int) else 2
    return 0


def _discard_output() -> None:
    """Sends what is still to be written to stdout nowhere, so that the interpreter does not fail on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.run(args)` runs the chosen one."""
    parser = _Parser(
        prog="datencoder",
        description="Personalized text-to-image diffusion: one picture of a thing in, pictures of that thing out.",
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Help with examples under it; misuse is one sentence without the usage lines."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(
            prog=prog,
            epilog=f"examples:\n{EXAMPLES[prog.split()[-1]]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message.rstrip('.')} (see `{self.prog} --help`)."))


class _Version(argparse.Action):
    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"datencoder {metadata.version('datencoder_jax')}")
        parser.exit()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(sentence: str, status: int = 2) -> int:
    print(f"error: {escape_hidden(sentence)}", file=sys.stderr)
    return status
