"""`python -m datencoder_jax` is `datencoder`."""

from datencoder_jax.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
