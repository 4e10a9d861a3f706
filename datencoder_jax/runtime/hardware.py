"""What chips can do at best: the peaks that utilization and plans are measured against.

Sources: Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), Nvidia's data sheets of
the A100, H100 and H200 in their SXM form. Rates are published in powers of ten. Memory is published as "GB" and is in
fact counted in GiB, which is how it stands here; a program gets a little less (15.75 GiB on a v5e).
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One accelerator, or for TPUs one chip with all its cores.

    Attributes:
        name: as in a topology, such as "v5e".
        flops: dense bfloat16 operations per second.
        hbm: bytes of its memory.
        hbm_bandwidth: bytes per second between it and that memory, reading and writing together.
        link_bandwidth: bytes per second one chip sends to its neighbours over all links together. Half of what is
            published as bidirectional; as much again is received at the same time.
        links: neighbours it is wired to: 4 in a 2D torus, 6 in a 3D one, 1 where a switch connects all to all.
    """

    name: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        # 275 TFLOPs, 32 GiB, 1200 GBps; 6 links of 50 GB/s each way (Jouppi et al. 2023, arXiv 2304.01433, table 4).
        Chip("v4", 275e12, 32 * _GIB, 1200e9, 300e9, 6),
        # 197 TFLOPs, 16 GB, 819 GBps, 400 GBps bidirectional (1600 Gbps in earlier versions of the page), 4 ports.
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, 4),
        # 459 TFLOPs, 95 GB, 2765 GBps, 4800 Gbps each way, 3D torus.
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 6),
        # 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps bidirectional, 4 ports.
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, 4),
        # 312 TFLOPS without sparsity, 80 GB HBM2e at 2039 GB/s, NVLink 3 at 600 GB/s both ways.
        Chip("A100", 312e12, 80 * _GIB, 2039e9, 300e9, 1),
        # 1979 TFLOPS with sparsity, hence 989 without; 80 GB HBM3 at 3.35 TB/s, NVLink 4 at 900 GB/s both ways.
        Chip("H100", 989e12, 80 * _GIB, 3350e9, 450e9, 1),
        # The H100's arithmetic; 141 GB HBM3e at 4.8 TB/s, NVLink 4 at 900 GB/s both ways.
        Chip("H200", 989e12, 141 * _GIB, 4800e9, 450e9, 1),
    )
}
# What JAX calls them; "TPU v5" alone is the v5p, so the longer names come first.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "A100-SXM4-80GB": "A100",
    "H100 80GB": "H100",
    "H200": "H200",
}


def find_chip(device: Any) -> Chip | None:
    """The chip that a JAX device is (or is a part of); None where its peaks are not known."""
    return next((CHIPS[name] for kind, name in _KINDS.items() if kind in device.device_kind), None)
