"""Every implementation of attention that the device can run, against XLA's in float32.

For random `q`, `k`, `v` and a random gradient of the output, the deviation of an output or gradient `y` is

    max |y - y*| / max |y*|                                                                         (1)

where `y*` is "xla" on the same values in float32, with matrix products at the highest precision. Inputs in bfloat16 are
rounded before, so that (1) is the implementation's own error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.check.part import Comparison, Outcome, print_progress
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.runtime.target import Target, current_target

TOLERANCES = {"bfloat16": 1e-2, "float32": 1e-5}
"""The largest deviation (1) that passes, by type."""


class Shape(NamedTuple):
    """Sizes of one attention."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (Shape(4096, 77, 8, 40), Shape(4096, 4096, 8, 40), Shape(1024, 1024, 10, 64), Shape(257, 257, 16, 80))
"""Cross- and self-attention of Stable Diffusion 1.5's UNet, self-attention of XL's, and OpenCLIP's ViT-H/14."""
QUICK_SHAPES = (Shape(1024, 77, 8, 40), Shape(1024, 1024, 10, 64), Shape(257, 257, 16, 80))
CPU_SHAPES = (Shape(256, 77, 2, 40), Shape(1280, 128, 1, 40), Shape(129, 129, 2, 80))


def choose_shapes(target: Target, quick: bool) -> tuple[Shape, ...]:
    """The shapes that are checked on a device."""
    if target.platform == "cpu":
        return CPU_SHAPES
    return QUICK_SHAPES if quick else SHAPES


def list_implementations(target: Target) -> dict[str, tuple[str, ...]]:
    """The implementations that a device can run, each with the types that are checked."""
    types = {"xla": ("bfloat16",), "blocks": ("bfloat16", "float32")}
    if target.is_ampere_or_newer:
        types["cudnn"] = ("bfloat16",)
    if target.platform == "cpu":
        types["heads"] = ("float32",)
    if target.platform == "tpu":
        types["flash"] = ("bfloat16",)
    return types


def check_attention(shapes: tuple[Shape, ...]) -> Outcome:
    """Compares forward and backward passes at these shapes."""
    comparisons: list[Comparison] = []
    implementations = list_implementations(current_target())
    for shape in shapes:
        for dtype in TOLERANCES:
            arrays = _random_arrays(shape, dtype)
            references = _run("xla", tuple(x.astype(jnp.float32) for x in arrays))
            for implementation in (name for name, types in implementations.items() if dtype in types):
                print_progress(f"attention {implementation} in {dtype}, {shape}")
                label = f"{implementation} {dtype} {shape}"
                comparisons += _compare(label, _run(implementation, arrays), references, TOLERANCES[dtype])
    largest: dict[str, float] = {}
    for comparison in comparisons:
        key = " ".join(comparison.name.split()[:2])
        largest[key] = float(np.maximum(largest.get(key, 0.0), comparison.deviation))  # which keeps NaN
    values = {"shapes": [str(shape) for shape in shapes]}
    return Outcome(values | {"largest_deviation": _without_nan(largest)}, comparisons)


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: number if np.isfinite(number) else None for name, number in numbers.items()}


def _compare(label: str, results: tuple, references: tuple, tolerance: float) -> list[Comparison]:
    """The comparisons of output and gradients."""
    names = ("output", "dq", "dk", "dv")
    return [
        Comparison(f"{label} {name}", relative_deviation(result, reference), tolerance)
        for name, result, reference in zip(names, results, references, strict=True)
    ]


def relative_deviation(values: Any, references: Any) -> float:
    """Equation (1)."""
    values, references = np.asarray(values, np.float32), np.asarray(references, np.float32)
    return float(np.abs(values - references).max() / np.abs(references).max())


def _random_arrays(shape: Shape, dtype: str) -> tuple[jax.Array, ...]:
    """`q`, `k`, `v` and the output's gradient, of one sample."""
    rng = np.random.default_rng(0)
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    sizes = [(1, length, shape.heads, shape.head_dim) for length in lengths]
    return tuple(jnp.asarray(rng.standard_normal(size, dtype=np.float32), dtype) for size in sizes)


def _run(implementation: str, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Output and gradients with respect to `q`, `k` and `v`; in float32 at the highest precision."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, implementation=implementation), q, k, v)
        return (out, *pull(d_out))

    with jax.default_matmul_precision("highest" if arrays[0].dtype == jnp.float32 else "default"):
        return jax.jit(run)(*arrays)
