"""The exceptions that a person is meant to read."""

import errno
import re

from datencoder_jax.printable import escape_hidden

_PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}


class UserError(Exception):
    """A mistake in the input, said in one sentence that names what is at fault and the way out.

    The command line prints the sentence alone and exits with status 2; in Python it is an ordinary exception. Names in
    it may come from files of strangers, so characters that cannot be seen are escaped.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(escape_hidden(str(sentence)))


class PassingError(UserError):
    """What no option is at fault for and may be over the next time: a machine that is late, storage that is away.

    The command line exits with status 1, after which launchers start a run again, from its last checkpoint.
    """


def is_passing(error: BaseException) -> bool:
    """Whether a failure may be over the next time: a `PassingError`, or storage or network that is away for a while.

    An error that says what another one led to is what that is. TensorStore tells the number of one in its text.
    """
    if isinstance(error, PassingError) or (isinstance(error, OSError) and error.errno in _PASSING):
        return True
    told = re.search(r"os_error_code='(\d+)'", str(error))
    if told and int(told[1]) in _PASSING:
        return True
    return error.__cause__ is not None and is_passing(error.__cause__)


def raise_if_passing(error: BaseException, place: object) -> None:
    """Raises a `PassingError` where storage is away for a while: what cannot be read then is not damaged.

    Args:
        place: what was being read.
    """
    if is_passing(error):
        while not isinstance(error, OSError) and error.__cause__ is not None:
            error = error.__cause__
        said = (getattr(error, "strerror", None) or str(error)).lower().rstrip(".")
        raise PassingError(f"{place} cannot be read now: {said}.") from error


def exit_status(error: BaseException) -> int:
    """Of the command line: 130 when interrupted, 2 for a mistake in the input, 1 for all else."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | OSError) and not is_passing(error) else 1
