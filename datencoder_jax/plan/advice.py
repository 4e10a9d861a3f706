"""What to change in a recipe whose training step does not fit: the settings that save most, by estimate.

A step's memory is its arguments, which `mesh.fsdp` divides, and its temporaries, which are near enough in proportion
to the rows a chip takes at a time. What recomputing saves is about what it saves in tuning Stable Diffusion 1.5.
"""

from dataclasses import dataclass
from typing import Any

from datencoder_jax.plan.measure import Result

_RECOMPUTED = 0.7
"""Share of the temporaries that `remat` saves."""


@dataclass(frozen=True)
class Knob:
    """A change to a recipe.

    Attributes:
        setting: as for `--set`.
        why: what it does.
        saves: bytes of a chip's memory, an estimate.
    """

    setting: str
    why: str
    saves: int


def knobs(config: Any, result: Result) -> list[Knob]:
    """The two changes that save most, the best first; those that change what is learned come last."""
    room, parts = result.room, result.program.parts or {}
    weights = parts.get("state", 0) + parts.get("frozen", 0)
    missing = room.total - (room.available or room.total)
    rows = config.batch_size // (config.accumulate * result.program.devices)
    found, changing = [], []
    if not config.remat:
        found.append(Knob("remat=true", "recomputes instead of keeping", int(_RECOMPUTED * room.temporaries)))
    if config.dtype == "float32":
        saves = (parts.get("frozen", 0) + room.temporaries) // 2
        found.append(Knob("dtype=bfloat16", "halves the frozen weights and what is computed from them", saves))
    if times := _enough(room.temporaries, missing, rows):
        setting = f"accumulate={config.accumulate * times}"
        found.append(
            Knob(setting, f"takes {rows // times} rows a chip at a time, not {rows}", _saved(room.temporaries, times))
        )
    fsdp = max(config.mesh.fsdp, 1)
    if times := _enough(weights, missing, result.program.devices // fsdp):
        setting = f"mesh.fsdp={fsdp * times}"
        found.append(Knob(setting, f"keeps 1/{fsdp * times} of the weights on a chip", _saved(weights, times)))
    if config.resolution >= 512:
        changing.append(
            Knob(f"resolution={config.resolution // 2}", "a quarter of the pixels", _saved(room.temporaries, 4))
        )
    ranked = sorted(found, key=lambda knob: -knob.saves)
    return (ranked + changing)[:2]


def _enough(size: int, missing: int, most: int) -> int | None:
    """The smallest power of two, at most `most`, by which to divide `size` so that `missing` bytes are saved."""
    times = None
    for exponent in range(1, 31):
        if 2**exponent > most or most % 2**exponent:
            break
        times = 2**exponent
        if _saved(size, times) >= missing:
            break
    return times


def _saved(size: int, times: int) -> int:
    return size - size // times
