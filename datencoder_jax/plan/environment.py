"""What the compilers for absent devices need of the environment; this module does not import JAX."""

import os


def prepare_environment() -> None:
    """Sets what the compilers for absent devices need; called before JAX is imported for the first time.

    They take no device, ask no cloud where they run, and may be loaded beside another process's.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of drivers, of which there is none
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
