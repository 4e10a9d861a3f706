"""The versions of the software and the device that numbers belong to."""

import os
import platform
from importlib import metadata
from typing import Any

import jax

from datencoder_jax.check.part import Outcome
from datencoder_jax.runtime.availability import explain_unused_gpu, nvidia_driver
from datencoder_jax.runtime.hardware import find_chip
from datencoder_jax.runtime.target import current_target

_PACKAGES = ("datencoder_jax", "jax", "jaxlib", "flax", "numpy")
_ACCELERATOR_PACKAGES = (
    "jax-cuda12-plugin",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cublas-cu12",
    "libtpu",
)
"""Listed where they are installed."""


def read_versions() -> Outcome:
    """Versions, and the device with its memory and its peaks."""
    device, target = jax.devices()[0], current_target()
    chip, capability = find_chip(device), target.compute_capability
    installed = {name: _version(name) for name in _ACCELERATOR_PACKAGES}
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "accelerator_packages": {name: version for name, version in installed.items() if version is not None},
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": target.platform,
        "platform_version": " ".join(str(device.client.platform_version).split()),
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
        "driver": nvidia_driver(),
        "memory_bytes": target.memory,
        "cores": os.cpu_count(),
        "chip": chip and chip.name,
        "peak_flops": chip and chip.flops,
        "jax_platforms": os.environ.get("JAX_PLATFORMS", ""),
        "note": explain_unused_gpu(device.platform),
    }
    return Outcome(values)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
