"""The arithmetic and least traffic of a program, counted on its traced form: before any compiler.

A multiplication and an addition are two operations. Of a matrix product `[m, k] x [k, n]` there are `2 m k n`, of a
convolution two for every pair of a result and a weight that meet an input. Fused attention, which is one primitive, has
with `b` samples, `h` heads, `q` queries, `k` keys and head dimension `d` (Dao et al. 2022, arXiv 2205.14135)

    forward    4 b h q k d      scores, and their product with v                                     (1)
    backward  10 b h q k d      scores again, dp = do v', dv = p' do, dq = ds k, dk = ds' q          (2)

These three are what a program computes with. All else is fused into them at best, so that a program moves at least
what they read and write, every operand and every result once.

The body of a scan counts as often as it runs, of a condition the largest branch. A loop of unknown length counts once
and is marked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core


@dataclass
class Work:
    """Operations of a program on all its devices together.

    Attributes:
        products: of matrix products.
        convolutions: of convolutions.
        attention: of fused attention.
        bytes: that all of these read and write, operands and results.
        known: whether every loop has a known length.
    """

    products: float = 0.0
    convolutions: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    known: bool = True

    @property
    def total(self) -> float:
        return self.products + self.convolutions + self.attention

    def add(self, other: "Work", times: float = 1.0) -> None:
        self.products += times * other.products
        self.convolutions += times * other.convolutions
        self.attention += times * other.attention
        self.bytes += times * other.bytes
        self.known &= other.known


def count_work(jaxpr: Any) -> Work:
    """The operations of a jaxpr (`jax.stages.Traced.jaxpr`)."""
    work = Work()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        _add_equation(work, equation)
    return work


def _add_equation(work: Work, equation: Any) -> None:
    name, inputs = equation.primitive.name, [variable.aval for variable in equation.invars]
    if name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        work.products += 2.0 * equation.outvars[0].aval.size * math.prod(inputs[0].shape[axis] for axis in contracting)
    elif name == "conv_general_dilated":
        work.convolutions += _convolution(equation)
    elif name.startswith("dot_product_attention"):
        _, queries, heads, head_dim = inputs[0].shape  # [batch, queries, heads, head_dim]
        size = inputs[0].shape[0] * heads * queries * inputs[1].shape[1] * head_dim
        work.attention += (10.0 if "bwd" in name else 4.0) * size
    elif name == "pallas_call":
        work.attention += _flash_attention(equation)
    else:
        _add_inner(work, equation)
        return
    results = (variable.aval for variable in equation.outvars)
    work.bytes += sum(aval.size * aval.dtype.itemsize for aval in (*inputs, *results))


def _add_inner(work: Work, equation: Any) -> None:
    """Adds the work of the jaxprs that an equation runs."""
    inner = [count_work(jaxpr) for jaxpr in _inner_jaxprs(equation)]
    if not inner:
        return
    name = equation.primitive.name
    if name == "cond":
        work.add(max(inner, key=lambda branch: branch.total))
        return
    times = 1.0
    if name == "scan":
        times = equation.params["length"]
    elif name == "shard_map":
        times = equation.params["mesh"].size
    elif name == "while" and any(part.total for part in inner):
        work.known = False
    for part in inner:
        work.add(part, times)


def _inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters; of a function with a gradient of its own, the function's."""
    for value in equation.params.values():
        for jaxpr in value if isinstance(value, list | tuple) else (value,):
            if isinstance(jaxpr, core.Jaxpr | core.ClosedJaxpr):
                yield jaxpr


def _flash_attention(equation: Any) -> float:
    """Operations of one of the TPU kernels: forward, or one of the two halves of equation (2).

    Both halves compute the scores and `dp`; one of them then `dk` and `dv`, the other `dq`.
    """
    queries, keys = (variable.aval.shape for variable in equation.invars[:2])  # [batch, heads, length, head_dim]
    name = _kernel_name(equation)
    products = 4 if "dkv" in name else 3 if "dq" in name else 2
    return 2.0 * products * math.prod(queries) * keys[2]


def _convolution(equation: Any) -> float:
    """Operations of a convolution, without those on padding and on the zeros between dilated inputs."""
    numbers, params = equation.params["dimension_numbers"], equation.params
    left, right = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    taps = 1.0
    for axis in range(len(params["window_strides"])):
        taps *= meeting_pairs(
            left[numbers.lhs_spec[2 + axis]],
            right[numbers.rhs_spec[2 + axis]],
            out[numbers.out_spec[2 + axis]],
            params["padding"][axis][0],
            params["window_strides"][axis],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
    outputs, inputs = (right[axis] for axis in numbers.rhs_spec[:2])
    batch = left[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2.0 * batch * inputs * outputs * taps


def meeting_pairs(
    inputs: int, kernel: int, outputs: int, padding: int, stride: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of a result and a weight that meet an input along one axis of a convolution."""
    end = (inputs - 1) * input_dilation + 1
    pairs = 0
    for tap in range(kernel):
        # Positions first + o stride for results o, which count in [0, end) at multiples of the dilation.
        first = tap * kernel_dilation - padding
        if input_dilation == 1:
            low = max(0, -(first // stride))
            high = min(outputs - 1, (end - 1 - first) // stride)
            pairs += max(0, high - low + 1)
        else:
            positions = (first + o * stride for o in range(outputs))
            pairs += sum(0 <= position < end and position % input_dilation == 0 for position in positions)
    return pairs


def trace_work(traced: jax.stages.Traced) -> Work:
    """The operations of a traced program."""
    return count_work(traced.jaxpr)


def count_attention(jaxpr: Any) -> tuple[int, int]:
    """How many fused attentions a jaxpr has, forward and backward, each place counted once however often it runs."""
    forward = backward = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        kernel = _kernel_name(equation) if name == "pallas_call" else name
        if name == "pallas_call" or name.startswith("dot_product_attention"):
            is_backward = "bwd" in kernel
            forward += not is_backward
            # Of the TPU kernels' two for the gradient the one for queries counts.
            backward += is_backward and "dkv" not in kernel
        else:
            for inner in _inner_jaxprs(equation):
                counts = count_attention(inner)
                forward, backward = forward + counts[0], backward + counts[1]
    return forward, backward


def _kernel_name(equation: Any) -> str:
    """What names a Pallas kernel: a parameter, or the scope that it is called in."""
    names = (equation.params.get("name_and_src_info"), equation.params.get("name"), equation.source_info.name_stack)
    return " ".join(str(name) for name in names if name is not None)
