"""`python -m datencoder_jax` is `datencoder`; what starts here is interrupted without Python's own trace.

Nothing but this file may be imported before `run_and_exit` listens to Ctrl-C: every import takes time.
"""

import os
import signal
from typing import Any, NoReturn


def run_and_exit() -> NoReturn:
    """The installed command: runs it and ends the process with its exit status."""
    # Where Ctrl-C is ignored, as in jobs that a shell has put into the background, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from datencoder_jax import cli

    cli.run_and_exit()


def _leave(*_: Any) -> NoReturn:
    """Ends the process at once: nothing has been begun, and imports that are cut short may end in anything."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


if __name__ == "__main__":
    run_and_exit()
