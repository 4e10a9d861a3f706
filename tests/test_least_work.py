"""The least work of a UNet, from its configuration, against what is traced."""

import jax
import jax.numpy as jnp
import pytest

from datencoder_jax.plan.least_work import least_work
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.plan.work import count_work


@pytest.mark.parametrize(("version", "side"), [("1.5", 32), ("2.1", 32), ("XL", 32)])
def test_a_forward_pass_does_what_it_must(version, side):
    """Borders apart: zero padding needs no products, which the formulas count and the tracer does not."""
    unet = stable_diffusion(version, "float32").unet
    width, batch = unet.config.cross_attention_dim, 2
    latents = jax.ShapeDtypeStruct((batch, side, side, 4), jnp.float32)
    t, context = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((1, 77, width), jnp.float32)
    from datencoder_jax.typing import Added

    pooled = unet.config.pooled_width
    added = pooled and Added(
        jax.ShapeDtypeStruct((batch, pooled), jnp.float32), jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    )
    traced = jax.jit(lambda unet, *args, added: unet(*args, added=added)).trace(
        unet, latents, t, context, added=added or None
    )
    counted, least = count_work(traced.jaxpr).total, least_work(unet.config, side).forward(batch)
    assert 0.9 * least < counted < 1.02 * least
