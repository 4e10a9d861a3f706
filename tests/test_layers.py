"""The layers that the models share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from datencoder_jax.models.layers import conv1x1, conv3x3, same_conv
from datencoder_jax.models.unet import ResnetBlock2D
from datencoder_jax.runtime.target import Target, lowering_for


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 1)])
def test_a_convolutions_gradients_are_those_of_jax(size):
    x, kernel, weight = (
        jax.random.normal(jax.random.key(k), shape)
        for k, shape in enumerate([(2, 6, 5, 3), (*size, 3, 4), (2, 6, 5, 4)])
    )
    for argument in (0, 1):
        found, expected = (
            jax.grad(lambda x, k, conv=conv: (weight * conv(x, k)).sum(), argument)(x, kernel)
            for conv in (same_conv, plain)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 1)])
def test_a_convolution_of_few_positions_is_a_product_on_a_cpu(size):
    """As in the deepest levels of Stable Diffusion at 256 px; value and gradient are those of the convolution."""
    x, kernel = (
        jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate([(2, 4, 4, 256), (*size, 256, 3)])
    )
    loss = {
        conv: jax.value_and_grad(lambda x, k, conv=conv: (conv(x, k) ** 2).sum(), (0, 1)) for conv in (same_conv, plain)
    }
    for found, expected in zip(*(jax.tree.leaves(loss[conv](x, kernel)) for conv in (same_conv, plain)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    gradient = jax.grad(lambda x, k: same_conv(x, k).sum())
    assert "conv_general_dilated" not in str(jax.make_jaxpr(gradient)(x, kernel))
    with lowering_for(Target("cuda", (9, 0))):
        assert "conv_general_dilated" in str(jax.make_jaxpr(gradient)(x, kernel))


@pytest.mark.parametrize("make", [conv3x3, conv1x1])
def test_a_loop_on_a_cpu_reads_kernels_as_they_lie(make):
    """A kernel whose inputs and outputs are exchanged by name alone is read slowly there."""
    layer = make(4, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))

    @jax.jit
    def descend(x):
        return jax.lax.scan(lambda x, _: (x - jax.grad(lambda x: (layer(x) ** 2).sum())(x), None), x, length=3)[0]

    assert "01oi" not in descend.lower(jnp.ones((1, 6, 6, 4))).compile().as_text()


def test_a_gradient_computes_every_norm_twice():
    """Once on the way forward and once again on the way back, where it was not kept."""
    options = {"groups": 2, "epsilon": 1e-5, "act": "silu", "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    block = ResnetBlock2D(4, 4, None, **options)
    x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
    gradient = jax.make_jaxpr(jax.grad(lambda x: block(x).astype(jnp.float32).sum()))(x)
    assert str(gradient).count("rsqrt") == 4
