"""The devices that a plan is for: a TPU slice or GPUs that need not be present, or this machine's own."""

import math
import os
import re
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import jax

from datencoder_jax.errors import UserError
from datencoder_jax.runtime.availability import explain_no_device, has_module
from datencoder_jax.runtime.hardware import GPUS, Chip, describe_gpu, find_chip
from datencoder_jax.runtime.target import Target, gpu_memory_fraction


@dataclass(frozen=True)
class Machine:
    """What programs are compiled for.

    Attributes:
        name: as a person calls it.
        devices: JAX's.
        chip: the peaks of each; None where they are not known.
        memory: bytes of each that JAX may use; None where that is not known.
        present: whether the devices are this machine's own.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    memory: int | None
    present: bool = True

    @property
    def target(self) -> Target:
        """What each of the devices is."""
        return Target.of(self.devices[0])

    @property
    def target_with_memory(self) -> Target:
        """As `target`, with the memory that a device that is not present is known to have."""
        return self.target if self.present else replace(self.target, memory=self.chip and self.chip.hbm)

    def compiler_options(self) -> dict[str, Any]:
        """XLA's options for compiling without running.

        On CPUs no machine code is optimized: memory is laid out before. For GPUs that are not present nothing is tuned
        by timing, for which XLA would run kernels; a GPU that is present is compiled for as it is used.
        """
        options: dict[str, Any] = dict(self.target.compiler_options())
        if self.target.platform == "cpu":
            return options | {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        if self.target.platform == "cuda" and not self.present:
            return options | {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
        return options


def find_machine(topology: str | None) -> Machine:
    """The machine of this name, or this one where none is given.

    Args:
        topology: a TPU slice such as "v5e:4x4", a GPU of `hardware.GPUS` such as "H100", or several of one host such as
            "8xH100".

    Raises:
        UserError: there is no such slice or GPU, or the compiler for it is not installed.
    """
    if topology is None:
        try:
            devices = jax.devices()
        except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names one that is not there
            raise UserError(explain_no_device(error)) from error
        chip = find_chip(devices[0])
        return Machine(_describe_devices(devices), devices, chip, _memory_of_device(devices, chip))
    is_gpu = ":" not in topology
    devices = _gpu_devices(topology) if is_gpu else _tpu_devices(topology)
    chip = find_chip(devices[0])
    memory = chip and math.floor(chip.hbm * (gpu_memory_fraction() if is_gpu else 1.0))
    return Machine(f"{topology}, {_describe_devices(devices)}", devices, chip, memory, present=False)


def _describe_devices(devices: list) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"


_GPU_PACKAGES = {
    "jax-cuda12-plugin": "jax_cuda12_plugin",
    "jax-cuda12-pjrt": "jax_plugins.xla_cuda12",
    "nvidia-cudnn-cu12": "nvidia.cudnn",
    "nvidia-cuda-nvcc-cu12": "nvidia.cuda_nvcc",
}
"""The packages of the extra `plan-gpu`, and a module of each."""


def _gpu_devices(topology: str) -> list:
    names = {name.lower(): name for name in GPUS}
    match = re.fullmatch(r"(?:(\d+)x)?(\w+)", topology)
    count, name = (int(match[1] or 1), names.get(match[2].lower())) if match else (0, None)
    if name is None or not 1 <= count <= 8:
        raise UserError(
            f"there is no topology {topology!r}; name a GPU ({', '.join(GPUS)}), up to eight of one host such as "
            "8xH100, or a TPU slice such as v5e:4x4"
        )
    _check_gpu_compiler()
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=describe_gpu(name)
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"the compiler for GPUs does not start ({reason}); reinstall {_GPU_EXTRA}") from error
    return description.devices


_GPU_EXTRA = 'pip install "datencoder_jax[plan-gpu]"'


def _check_gpu_compiler() -> None:
    """Raises `UserError` where a package of the compiler for GPUs is missing, or is of another version than jaxlib."""
    missing = [package for package, module in _GPU_PACKAGES.items() if not has_module(module)]
    if missing:
        raise UserError(f"the compiler for GPUs is not installed ({', '.join(missing)}): {_GPU_EXTRA}")
    plugin, jaxlib = metadata.version("jax-cuda12-plugin"), metadata.version("jaxlib")
    if plugin.split(".")[:3] != jaxlib.split(".")[:3]:
        raise UserError(
            f"jax-cuda12-plugin {plugin} does not belong to jaxlib {jaxlib}: pip install jax-cuda12-plugin=={jaxlib} "
            f"jax-cuda12-pjrt=={jaxlib}"
        )


def _tpu_devices(topology: str) -> list:
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            'the compiler for TPUs, libtpu, is not installed: pip install "datencoder_jax[plan]"'
        ) from error
    from jax.experimental import topologies

    kind, _, sides = topology.partition(":")
    options: dict[str, Any] = {}
    if kind == "v4":  # whose chips are one device each only if asked to be
        options["chip_config_name"] = "megacore"
    if set(sides.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        said = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UserError(
            f"there is no TPU slice {topology} ({said}); try v5e:4x4, v6e:8x8 or v5p:4x4x4, or a GPU such as H100"
        ) from error


def _memory_of_device(devices: list, chip: Chip | None) -> int | None:
    """Bytes that each device may use; those of a CPU share the machine's."""
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    if devices[0].platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return chip and chip.hbm
