"""Layers that the models share: sinusoidal timestep features, activations, convolutions as Stable Diffusion uses them.

The timestep features of dimension `d` at time `t` (Vaswani et al. 2017, as DDPM orders them) are, for
`i = 0 .. d/2 - 1` and `f_i = exp(-ln(10000) i / (d/2 - shift))`:

    phi(t) = [cos(t f_i), sin(t f_i)]      (`flip`; without it sines come first)            (1)

A convolution `y = conv(x, k)` of stride 1 that keeps the picture's size has the gradient, with `k'` the kernel turned
around in both directions and its inputs and outputs exchanged,

    dL/dx = conv(dL/dy, k')                                                                 (2)

and is itself a matrix product, with `patches(x)[p]` the neighbourhood of position `p`, flattened as `k` is:

    conv(x, k) = patches(x) k                                                               (3)
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from datencoder_jax.errors import UserError
from datencoder_jax.runtime.target import current_target


def timestep_features(t: jax.Array, dim: int, *, flip: bool = True, shift: float = 0.0) -> Float[Array, "batch dim"]:
    """Sinusoidal features (1) of timesteps `t [batch]`, in float32; `dim` is even."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, the approximation OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a Hugging Face configuration calls `name`."""
    if name not in _ACTIVATIONS:
        raise UserError(f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_FEW_POSITIONS = 512
"""Positions of all pictures of a batch up to which, with `_MANY_INPUTS`, (3) is faster on a CPU than its convolution:
two to three times at 8x8 with 1,280 channels, where reading the kernel takes most of the time."""
_MANY_INPUTS = 256


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _multiply_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as (3)."""
    (rows, columns, inputs, outputs), (_, height, width, _) = kernel.shape, x.shape
    padded = jnp.pad(x, [(0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)])
    patches = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(rows * columns * inputs, outputs)


def _is_product(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether the convolution of an array of this shape is computed as (3) on the target that it is traced for."""
    few = math.prod(x.shape[:-1]) <= _FEW_POSITIONS and kernel.shape[2] >= _MANY_INPUTS
    return few and current_target().platform == "cpu"


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return (_multiply_patches if _is_product(x, kernel) else _conv)(x, kernel)


@jax.custom_vjp
def same_conv(x: Float[Array, "batch h w i"], kernel: Float[Array, "a b i o"]) -> Float[Array, "batch h w o"]:
    """A convolution of stride 1 with zero padding that keeps the picture's size; `a` and `b` are odd.

    On CPUs it is (3) where that is faster, and its gradient is the transpose of that product; elsewhere on CPUs the
    gradient is (2) as written. JAX's own says the same as (2) with the kernel left as it is and its inputs and outputs
    named the other way round, which XLA's CPU compiler makes seven times slower within a loop, and tuning is one;
    other compilers need no exchanged copy of every kernel.
    """
    return _convolve(x, kernel)


def _forward(x: CustomVJPPrimal, kernel: CustomVJPPrimal) -> tuple[jax.Array, tuple]:
    """The convolution, and what the gradients that somebody asks for need: frozen kernels have none."""
    wants_dx: tuple | None = () if x.perturbed else None  # a pytree that says so by its structure
    return _convolve(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value, wants_dx)


def _gradient_of_input(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((*dy.shape[:3], kernel.shape[2]), dy.dtype)

    def transpose(convolve: Callable, dy: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: convolve(x, kernel), shape)(dy)[0]

    if _is_product(dy, kernel):
        return transpose(_multiply_patches, dy, kernel)
    return jax.lax.platform_dependent(
        dy,
        kernel,
        cpu=lambda dy, kernel: _conv(dy, kernel[::-1, ::-1].swapaxes(2, 3)),
        default=functools.partial(transpose, _conv),
    )


def _backward(kept: tuple, dy: Any) -> tuple[jax.Array | None, jax.Array | None]:
    x, kernel, wants_dx = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = _gradient_of_input(dy, kernel) if wants_dx is not None else None
    dkernel = None
    if x is not None:
        dkernel = jax.linear_transpose(lambda kernel: _conv(x, kernel), kernel)(dy)[0]
    return dx, dkernel


same_conv.defvjp(_forward, _backward, symbolic_zeros=True)


def _same_conv(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **defaults: Any) -> jax.Array:
    """As `nnx.Conv` calls it."""
    return same_conv(x, kernel)


_draws_nothing = contextvars.ContextVar("draws_nothing", default=False)


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Within it kernels of new modules are zeros, for those who want their shapes: tracing random draws takes longer
    than all else that constructs a network."""
    token = _draws_nothing.set(True)
    try:
        yield
    finally:
        _draws_nothing.reset(token)


def _init_kernel(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Flax's default, LeCun's normal distribution."""
    return jnp.zeros(shape, dtype) if _draws_nothing.get() else nnx.initializers.lecun_normal()(key, shape, dtype)


linear = functools.partial(nnx.Linear, kernel_init=_init_kernel)
"""A linear layer, as `nnx.Linear`."""
conv = functools.partial(nnx.Conv, kernel_init=_init_kernel)
"""A convolution, as `nnx.Conv`."""


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3x3 convolution with one pixel of zero padding."""
    own: dict[str, Any] = {"conv_general_dilated": _same_conv} if stride == 1 else {}
    return conv(inputs, outputs, (3, 3), strides=stride, padding=1, dtype=dtype, rngs=rngs, **own)


def conv1x1(inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A 1x1 convolution."""
    return conv(inputs, outputs, (1, 1), dtype=dtype, rngs=rngs, conv_general_dilated=_same_conv)


def recompute_in_gradient(function: Callable[[jax.Array], jax.Array], dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """A function of no products that the backward pass computes again from its input, if that is in half precision.

    Norms, activations and gates compute in float32 and would keep several arrays of twice the input's size each. Most
    of what a UNet's gradient takes in memory, and moves, is these. In float32 (on CPUs) time matters more.
    """
    return function if dtype == jnp.float32 else jax.checkpoint(function)


class GroupNorm(nnx.GroupNorm):
    """Group normalization in float32 with the two-pass variance, which parity needs; the output is of type `dtype`."""

    def __init__(self, channels: int, *, groups: int, epsilon: float, dtype, rngs: nnx.Rngs):
        super().__init__(channels, groups, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.output_dtype = dtype

    def __call__(self, x: jax.Array, activate: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """`x [batch, ..., channels]` -> the same shape, normalized and then, where a function is given, activated."""

        def normalize(x: jax.Array) -> jax.Array:
            normalized = nnx.GroupNorm.__call__(self, x).astype(self.output_dtype)
            return normalized if activate is None else activate(normalized)

        return recompute_in_gradient(normalize, self.output_dtype)(x)


class LayerNorm(nnx.LayerNorm):
    """Layer normalization in float32 with the two-pass variance; the output is of type `dtype`."""

    def __init__(self, width: int, *, epsilon: float, dtype, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.output_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., width]` -> the same shape."""
        normalize = functools.partial(nnx.LayerNorm.__call__, self)
        return recompute_in_gradient(lambda x: normalize(x).astype(self.output_dtype), self.output_dtype)(x)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """`[batch, h, w, c]` -> `[batch, 2h, 2w, c]`, each pixel repeated."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
