"""What every test runs under: eight fake CPU devices, strict types and shapes, no network, few threads."""

import gc
import os
from pathlib import Path

# Read when jax, torch and the Hugging Face libraries are first imported, so set before any of them is.
# Devices that meet in a collective are given ten minutes instead of 40 seconds: the machine may be busy. Programs are
# compiled with less optimisation, which takes a third less: compiling is most of what the tests do.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_backend_optimization_level=1"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
collect_ignore = [] if os.environ.get("DATENCODER_ACCELERATORS") else ["accelerators"]
for _offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_offline] = "1"
# A collective blocks a thread of the pool that all devices compute in, and a device may wait in several at once: with
# two threads per device they wait for each other until the process is aborted.
os.environ.setdefault("NPROC", "64")
for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "2")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from datencoder_jax.compilation import Program  # noqa: E402

# Programs that are traced are millions of objects that stay; looking through them for garbage took a fifth of the time.
gc.set_threshold(100_000, 50, 50)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what the tests do: their programs are kept, apart from the user's.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The tests of properties draw the same examples in every run, and many more with `--hypothesis-profile thorough`. No
# example has a deadline: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150)
settings.register_profile(
    "thorough", deadline=None, database=None, max_examples=2_000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_configure(config):
    # Two processes may write one entry at the same time; whoever finds it half-written compiles for itself.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")
    # Of a checkpoint that is damaged in several places TensorStore, whose threads read them all, tells the first; those
    # that come to their own later find nobody who waits, and the next test would be blamed.
    config.addinivalue_line(
        "filterwarnings",
        r"ignore:(?s)Exception ignored in. None\b.*Event loop is closed:pytest.PytestUnraisableExceptionWarning",
    )


_MAPPINGS = 20_000
"""Of memory, beyond which a process forgets its compiled programs. Linux allows it 65,530, every program takes some,
and a process that compiles when none are left ends with a segmentation fault, in a test that has done nothing."""


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """After a file of tests."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()
        for each in gc.get_objects():
            if type(each) is Program:  # isinstance asks objects that answer with warnings
                each._compiled.clear()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny base model with random weights, and a tuning-encoder for it."""
    from tiny import tiny_pipeline, write_tiny_base

    return tiny_pipeline(write_tiny_base(tmp_path_factory.mktemp("tiny")))
