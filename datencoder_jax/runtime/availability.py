"""Why a device that is there is not used: the drivers and packages that JAX needs, in a sentence for people."""

import importlib.util
import os
import re
from pathlib import Path

OLDEST_DRIVER = 525
"""The first NVIDIA driver that CUDA 12 runs on."""

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"))
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_EXTRA = 'pip install "datencoder_jax[cuda]"'


def explain_unused_gpu(platform: str) -> str | None:
    """A sentence for a machine whose NVIDIA GPU is not used: the likely reason, and the way out.

    Args:
        platform: of the devices that JAX has.

    Returns:
        None where JAX has an accelerator, there is no sign of a GPU, or `JAX_PLATFORMS` says what is wanted.
    """
    has_gpu = _DRIVER_VERSION.exists() or any(path.exists() for path in _DEVICE_FILES)
    has_plugin = has_cuda_plugin()
    if platform != "cpu" or os.environ.get("JAX_PLATFORMS") or not (has_gpu or has_cuda_libraries()):
        return None
    accept = "or set JAX_PLATFORMS=cpu to accept the CPU"
    if not has_gpu:
        return (
            "JAX's package for CUDA is installed and JAX has the CPU alone, since there is no NVIDIA driver: install "
            f"one from {OLDEST_DRIVER} on, give the container its GPUs, {accept}"
        )
    if not has_plugin:
        return (
            "there is an NVIDIA GPU and JAX has the CPU alone, since JAX's package for CUDA is not installed: "
            f"{_EXTRA}, {accept}"
        )
    driver = nvidia_driver()
    if driver is not None and int(driver.split(".")[0]) < OLDEST_DRIVER:
        return (
            f"there is an NVIDIA GPU and JAX has the CPU alone, since its driver {driver} is older than "
            f"{OLDEST_DRIVER}, the first for CUDA 12: install a newer one, {accept}"
        )
    return (
        "there is an NVIDIA GPU and JAX has the CPU alone, since CUDA did not start, most often because the driver is "
        f"older than {OLDEST_DRIVER}, or because another version of JAX's package for CUDA is installed: {_EXTRA}, "
        f"{accept}"
    )


def explain_no_device(error: BaseException) -> str:
    """A sentence for JAX's failure to find a device at all, mostly one that `JAX_PLATFORMS` names."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if {"cuda", "gpu"} & set(platforms.split(",")) and not has_cuda_plugin():
        return (
            f"No device can be used: JAX_PLATFORMS is {platforms}, and JAX's package for CUDA is not installed: "
            f"{_EXTRA}."
        )
    reason = (str(error).strip().splitlines() or [f"JAX has no device for JAX_PLATFORMS={platforms}"])[0].rstrip(".")
    return f"No device can be used: {reason}."


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, such as "535.104.05"; None where it is not known."""
    try:
        match = re.search(r"Module.*?\s(\d{3}(?:\.\d+)+)\s", _DRIVER_VERSION.read_text("utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def has_cuda_libraries() -> bool:
    """Whether CUDA's libraries are installed to compute with; plans for GPUs do with the compiler alone."""
    return has_module("nvidia.cublas")


def has_cuda_plugin() -> bool:
    """Whether JAX's package for NVIDIA GPUs is installed."""
    return any(has_module(name) for name in _PLUGINS)


def has_module(name: str) -> bool:
    """Whether Python would find a module, which is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
