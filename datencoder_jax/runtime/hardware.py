"""Peaks of accelerators, which utilization and plans are measured against, and descriptions of GPUs for XLA.

Sources: Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), NVIDIA's data sheets and
architecture white papers (A100, H100 and H200 in their SXM form). Rates are published in powers of ten. Memory is
published as "GB" and is in fact counted in GiB; a program gets a little less (15.75 GiB on a v5e, 79.1 on an H100).
"""

import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """One accelerator, or for TPUs one chip with all its cores.

    Attributes:
        name: as in a topology, such as "v5e".
        flops: dense bfloat16 operations per second, accumulated in float32; float32 ones where it has no bfloat16.
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
        # 197 TFLOPs, 16 GB (15.75 GiB for programs), 819 GBps, 400 GBps bidirectional (once 1600 Gbps), 4 ports.
        Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 200e9, 4),
        # 459 TFLOPs, 95 GB, 2765 GBps, 4800 Gbps each way, 3D torus.
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 6),
        # 918 TFLOPs, 32 GB, 1638 GBps, 800 GBps bidirectional, 4 ports.
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, 4),
        # 312 TFLOPS without sparsity, 80 GB HBM2e at 2039 GB/s, NVLink 3 at 600 GB/s both ways.
        Chip("A100", 312e12, int(79.1 * _GIB), 2039e9, 300e9, 1),
        # 1979 TFLOPS with sparsity, hence 989 without; 80 GB HBM3 at 3.35 TB/s, NVLink 4 at 900 GB/s both ways.
        Chip("H100", 989e12, int(79.1 * _GIB), 3350e9, 450e9, 1),
        # The H100's arithmetic; 141 GB HBM3e at 4.8 TB/s, NVLink 4 at 900 GB/s both ways.
        Chip("H200", 989e12, int(139.8 * _GIB), 4800e9, 450e9, 1),
        # 242 TFLOPS with sparsity; 24 GB GDDR6 at 300 GB/s, PCIe 4.0 x16 at 64 GB/s both ways.
        Chip("L4", 121e12, int(22.0 * _GIB), 300e9, 32e9, 1),
        # 165.2 TFLOPS in bfloat16 with float32 accumulation; 24 GB GDDR6X at 1008 GB/s, PCIe 4.0 x16.
        Chip("RTX4090", 165.2e12, int(23.5 * _GIB), 1008e9, 32e9, 1),
        # 8.1 TFLOPS in float32, which it computes in (its tensor cores have float16 alone); 16 GB at 320 GB/s, PCIe 3.
        Chip("T4", 8.1e12, int(14.7 * _GIB), 320e9, 16e9, 1),
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
    "NVIDIA L4": "L4",
    "RTX 4090": "RTX4090",
    "Tesla T4": "T4",
}


def find_chip(device: Any) -> Chip | None:
    """The chip that a JAX device is (or is a part of); None where its peaks are not known."""
    # An L40 is no L4, a GH200 no H200, and a laptop's GPU is a smaller one.
    kinds = (name for kind, name in _KINDS.items() if re.search(rf"\b{kind}(?!\d)(?! Laptop)", device.device_kind))
    return next((CHIPS[name] for name in kinds), None)


class GPU(NamedTuple):
    """What XLA is told of an NVIDIA GPU that is not present.

    Attributes:
        kind: the name that the driver gives it, JAX's `device_kind`.
        compute_capability: major and minor.
        cores: streaming multiprocessors.
        lanes: float32 units of each.
        threads: that each keeps in flight.
        shared_memory: bytes of each.
        l2_cache: bytes.
        clock: GHz at most.
    """

    kind: str
    compute_capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_memory: int
    l2_cache: int
    clock: float


_KIB, _MIB = 2**10, 2**20
GPUS = {
    "H100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98),
    "H200": GPU("NVIDIA H200", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98),
    "A100": GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 1.41),
    "L4": GPU("NVIDIA L4", (8, 9), 58, 128, 1536, 100 * _KIB, 48 * _MIB, 2.04),
    "RTX4090": GPU("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100 * _KIB, 72 * _MIB, 2.52),
    "T4": GPU("Tesla T4", (7, 5), 40, 64, 1024, 64 * _KIB, 4 * _MIB, 1.59),
}
"""Descriptions of NVIDIA GPUs, by the names that `CHIPS` has."""


def describe_gpu(name: str) -> str:
    """A GPU of `GPUS` in the text form of XLA's `GpuTargetConfigProto`, which `topologies.get_topology_desc` takes."""
    gpu, chip = GPUS[name], CHIPS[name]
    major, minor = gpu.compute_capability
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * _KIB,
        "shared_memory_per_core": gpu.shared_memory,
        # One KiB of each core's shared memory is the system's; Turing reserves none.
        "shared_memory_per_block_optin": gpu.shared_memory - (_KIB if gpu.compute_capability >= (8, 0) else 0),
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": chip.hbm,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in numbers.items())
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    rest = f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 8 }}\ndevice_description_str: "{gpu.kind}"'
    return f"gpu_device_info {{\n{lines}\n{capability}\n}}\n{rest}\n"
