"""`python -m datencoder_jax` is `datencoder`."""

import sys

from datencoder_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
