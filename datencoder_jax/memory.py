"""Settings by the memory of the device: what is given up, in what order, so that a model fits.

A program needs its weights, and room to work. Room is made by fewer draws per tuning step, by computing the UNet's
inner states again for the gradient instead of keeping them (`remat`), and by fewer pictures at a time. Fewer weights
are there at once when every network stays with the host and visits the device while it is needed (`in_parts`).
`docs/memory.md` has what each setting takes.
"""

from dataclasses import dataclass, replace

from datencoder_jax.runtime.target import Target


@dataclass(frozen=True)
class Memory:
    """What a device's memory allows.

    Attributes:
        draws: samples per tuning step.
        remat: recompute instead of keeping.
        scan_layers: tuning runs the UNet's repeated transformer blocks as a loop over a copy of their weights (4.4 GB
            of XL in half precision, nothing of the other models), which compiles several times faster.
        in_parts: networks stay with the host and visit the device.
        batch: pictures sampled at a time.
    """

    draws: int = 8
    remat: bool = False
    scan_layers: bool = True
    in_parts: bool = False
    batch: int = 16


PRESETS = {
    8: Memory(draws=1, remat=True, scan_layers=False, in_parts=True, batch=1),
    16: Memory(draws=4, remat=True, scan_layers=False, in_parts=True, batch=2),
    24: Memory(draws=8, remat=True, scan_layers=False, batch=4),
}
"""By GB of the device's memory."""

_ENOUGH = 36e9
"""Bytes of a device from which on nothing is saved."""


def choose(large: bool, target: Target) -> Memory:
    """The settings for a device where none are asked for.

    Args:
        large: whether the model is one of Stable Diffusion's size; a small one needs no settings.
        target: the device; one whose memory is not known is taken to have enough.
    """
    if not large:
        return Memory()
    if target.platform == "cpu":
        return Memory(draws=4, remat=True, scan_layers=False, batch=1)
    return of(_ENOUGH if target.memory is None else target.memory)


def of(total: float) -> Memory:
    """The settings for a device with so many bytes of memory."""
    if total >= _ENOUGH:
        return Memory()
    # A device of 16 GB has a little less.
    return PRESETS[max((size for size in PRESETS if size * 1e9 <= 1.1 * total), default=min(PRESETS))]


def for_xl(settings: Memory) -> Memory:
    """The settings with which XL is tuned where none are asked for: its pictures have four times the pixels.

    What the gradient keeps of eight of them at 1024 pixels is 160 GB, and 5 GB where it is computed again (counted from
    the shapes).
    """
    return replace(settings, remat=True, batch=min(settings.batch, PRESETS[24].batch))
