"""The one exception that a person is meant to read."""


class UserError(Exception):
    """A mistake in the input, said in one sentence that names what is at fault and the way out.

    The command line prints the sentence alone and exits with status 2; in Python it is an ordinary exception.
    """
