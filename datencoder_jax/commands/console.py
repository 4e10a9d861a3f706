"""The standard streams as they may be: missing, or of an encoding that lacks what is to be printed."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr safe to use; for before anything is opened or printed.

    Services and schedulers may start a process without them. The first files that are opened would then take their
    numbers, and whatever a library prints would go into those files; so the null device is opened in their place.
    Characters that a console's encoding lacks are printed as escapes.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        _open_if_closed(descriptor, mode)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and not _encodes_all(stream):
            stream.reconfigure(errors="backslashreplace")


def _open_if_closed(descriptor: int, mode: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, mode)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def _encodes_all(stream: io.TextIOWrapper) -> bool:
    """Whether a stream takes every text: all characters, and bytes that no text was read from."""
    try:
        "猫\udcff".encode(stream.encoding, stream.errors or "strict")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
