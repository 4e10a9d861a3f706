"""The chips a plan is for: those of a TPU topology that need not be there, or this machine's."""

import os
from dataclasses import dataclass
from typing import Any

import jax

from datencoder_jax.errors import UserError
from datencoder_jax.runtime.hardware import Chip, find_chip


@dataclass(frozen=True)
class Machine:
    """What programs are compiled for.

    Attributes:
        name: as a person calls it.
        devices: JAX's.
        chip: the peaks of each; None where they are not known.
        memory: bytes of each; None where that is not known.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    memory: int | None


def find_machine(topology: str | None) -> Machine:
    """The TPU slice of this name, such as "v5e:4x4", or this machine where none is given.

    Raises:
        UserError: there is no such slice, or the compiler for it is not installed.
    """
    if topology is None:
        devices = jax.devices()
        chip = find_chip(devices[0])
        return Machine(_named(devices), devices, chip, _memory(devices, chip))
    devices = _tpu(topology)
    chip = find_chip(devices[0])
    return Machine(f"{topology}, {_named(devices)}", devices, chip, chip and chip.hbm)


def _named(devices: list) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"


def _tpu(topology: str) -> list:
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
        raise UserError(f"there is no TPU slice {topology} ({said}); try v5e:4x4, v6e:8x8 or v5p:4x4x4") from error


def _memory(devices: list, chip: Chip | None) -> int | None:
    """Bytes that each device may use; those of a CPU share the machine's."""
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    if devices[0].platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return chip and chip.hbm
