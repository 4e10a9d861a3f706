"""The device that programs are compiled for, and what follows from it.

Which implementation of attention a program contains, what type it computes in, how it is compiled and what a device's
memory allows are decided by a `Target`: the device that a program is *lowered for*, not the one that this process runs
on. A plan made on a CPU therefore compiles for a GPU exactly what runs on the GPU.

Code that depends on the device asks `current_target()` while it is traced. By default that is the device that JAX puts
new arrays on; `lowering_for(target)` sets another one around `jit(...).lower(...)`. JAX's caches of traces know the
setting, so a function that was traced for one target is traced again for another.

Programs that share a batch over a mesh are traced in `sharing_batch(mesh)`: kernels that XLA cannot partition then run
on each device's own rows.

Programs that are compiled in `deterministic_operations()` compute the same bits in every run on one kind of GPU.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh

AMPERE = (8, 0)
"""The compute capability of the first NVIDIA GPUs with bfloat16 units."""

DETERMINISTIC_GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
}
"""XLA's options for programs that compute the same bits in every run on a GPU.

Both exclude operations whose sums depend on the order in which threads arrive (scatters and the gradient of cuDNN's
attention are among them), and kernels are no longer chosen by timing them, which chooses others from one compilation to
the next. As a flag the first sets the second; as an option of one program it does not.
"""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Target:
    """A device, as far as programs depend on it.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu".
        compute_capability: of an NVIDIA GPU, such as (9, 0) for Hopper; None for other devices.
        memory: bytes of the device's memory; None if unknown, and for CPUs, whose memory is the machine's.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None
    memory: int | None = None

    @classmethod
    def of(cls, device: Any) -> "Target":
        """The target that a JAX device is, whether it is present or part of a compile-only topology."""
        return _target_of(device)

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU, of NVIDIA or AMD."""
        return self.platform in ("cuda", "rocm")

    @property
    def is_ampere_or_newer(self) -> bool:
        """Whether this is an NVIDIA GPU with bfloat16 units, which cuDNN's fused attention needs too."""
        return self.compute_capability is not None and self.compute_capability >= AMPERE

    def compute_dtype(self, stored: str) -> str:
        """The type of computations with weights stored as `stored`, both names such as "bfloat16".

        CPUs compute in float32 whatever they store, which is faster there. So does an NVIDIA GPU older than Ampere
        (such as a T4) with bfloat16, for which it has no units. Other devices compute in the type they store.
        """
        lacks_bfloat16 = self.compute_capability is not None and not self.is_ampere_or_newer
        if self.platform == "cpu" or (stored == "bfloat16" and lacks_bfloat16):
            return "float32"
        return stored

    def compiler_options(self) -> dict[str, str | bool]:
        """XLA's options for every program on this target.

        On CPUs XLA orders operations for concurrency by default, which computes early what `jax.checkpoint` puts off,
        and keeps it: a small UNet's gradient took 77 MB that way, with and without `remat`, and takes 12 MB with both.

        For GPUs those of `deterministic_operations` are among them within it.
        """
        if self.platform == "cpu":
            return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        if self.is_gpu and is_deterministic():
            return dict(DETERMINISTIC_GPU_OPTIONS)
        return {}


@functools.cache
def _target_of(device: Any) -> Target:
    capability = _compute_capability(device)
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if capability is None else "cuda"
    memory = None if platform == "cpu" else _memory_bytes(device, platform)
    return Target(platform, capability, memory)


def _compute_capability(device: Any) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for AMD's, which say "gfx90a" there, and for other devices."""
    try:
        major, _, minor = str(device.compute_capability).partition(".")
        return int(major), int(minor or 0)
    except (AttributeError, ValueError):
        return None


def _memory_bytes(device: Any, platform: str) -> int | None:
    """Bytes of a device's memory: JAX's limit on it, divided by the share of a GPU's memory that JAX takes."""
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):  # compile-only devices have none
        limit = None
    if not limit:
        return None
    return math.floor(limit / (gpu_memory_fraction() if platform in ("cuda", "rocm") else 1.0))


def gpu_memory_fraction() -> float:
    """The share of a GPU's memory that JAX allocates: three quarters, unless the environment says otherwise."""
    settings = (os.environ.get(f"XLA_{name}_MEM_FRACTION") for name in ("CLIENT", "PYTHON_CLIENT"))
    return float(next(filter(None, settings), 0.75))


_target_context = jax.make_user_context(None)
_mesh_context = jax.make_user_context(None)
_determinism_context = jax.make_user_context(False)


def lowering_for(target: Target) -> Any:
    """A context manager in which functions are traced for `target`."""
    return _target_context(target)


def current_target() -> Target:
    """The target that functions are being traced for: that of `lowering_for`, or else JAX's default device."""
    return _target_context.value or Target.of(_default_device())


def sharing_batch(mesh: Mesh | None) -> Any:
    """A context manager in which functions are traced for batches whose rows are split over all axes of `mesh`."""
    return _mesh_context(mesh)


def batch_mesh() -> Mesh | None:
    """The mesh of `sharing_batch`; None outside of it, where a batch is on one device."""
    return _mesh_context.value


def deterministic_operations(enabled: bool = True) -> Any:
    """A context manager in which programs for GPUs are compiled from operations that give the same bits in every run.

    Programs for other devices are compiled as ever. On a GPU such programs are slower. Within an outer context that is
    enabled, an inner one is enabled too.
    """
    return _determinism_context(enabled or is_deterministic())


def is_deterministic() -> bool:
    """Whether programs are being compiled in `deterministic_operations`."""
    return _determinism_context.value


def determinism_options() -> dict[str, str | bool]:
    """XLA's options that `deterministic_operations` adds for the current target; none outside of it."""
    return dict(DETERMINISTIC_GPU_OPTIONS) if is_deterministic() and current_target().is_gpu else {}


def accept_deterministic(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has a function run in `deterministic_operations` where its keyword argument `deterministic` is true."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with deterministic_operations(bool(kwargs.get("deterministic", False))):
            return function(*args, **kwargs)

    return call


def _default_device() -> Any:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device or jax.local_devices()[0]
