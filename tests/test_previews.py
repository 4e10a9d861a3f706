"""The images that pretraining shows while it runs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import allow_cudnn, with_fused_attention
from tiny import SIDE, in_half_precision

from datencoder_jax.encoder.reading import read_again
from datencoder_jax.models.batches import map_in_batches
from datencoder_jax.runtime.target import Target, lowering_for
from datencoder_jax.training.e4t import E4TFrozen, E4TTask
from datencoder_jax.training.tuning_encoder import Frozen, TuningEncoderTask
from datencoder_jax.typing import Reader

COUNT, KEY = 3, jax.random.key(0)


@pytest.fixture(scope="module")
def wide(pipeline):
    return with_fused_attention(pipeline)


@pytest.mark.parametrize("stage", ["encoder", "e4t"])
def test_previews_trace_for_a_gpu_through_cudnn(wide, stage, monkeypatch):
    """Each image has an embedding of its own, and all of them one empty prompt."""
    allow_cudnn(monkeypatch)
    base, tokenizer = in_half_precision(wide.base), wide.tokenizer
    images = jnp.zeros((COUNT, SIDE, SIDE, 3), jnp.uint8)
    ids = jnp.asarray(tokenizer.encode(["a photo of S*"] * COUNT, {"S*": 1}))
    empty = jnp.asarray(tokenizer.encode([""]))
    if stage == "e4t":
        task, word = SimpleNamespace(config=wide.domain.config), jnp.zeros((1, sum(base.widths)))
        draw, given = E4TTask._draw, (wide.domain.params, E4TFrozen(base, empty, ids[:1], word), images, ids, KEY)
    else:
        task, blend = SimpleNamespace(config=wide.encoder.config), jnp.float32(0.5)
        draw, given = TuningEncoderTask._draw, (wide.encoder, Frozen(base, empty, ids[:1]), images, ids, KEY, blend)
    with lowering_for(Target("cuda", (9, 0))):
        traced = jax.jit(lambda *given: draw(task, *given)).trace(*given)
    assert "dot_product_attention_fwd" in str(traced.jaxpr)
    assert traced.out_info.shape == images.shape


def test_every_latent_may_have_pictures_of_its_own(pipeline, wide):
    """What is predicted for one is what it would be alone."""
    base, encoder = wide.base, wide.encoder
    config, rng = base.vision.config, np.random.default_rng(0)
    seen = encoder.config
    patches = (config.image_size // config.patch_size) ** 2
    classes = rng.standard_normal((COUNT, 2, seen.vision_taps, config.hidden_size)).astype(np.float32)
    states = rng.standard_normal((COUNT, 2, seen.patch_taps * patches, config.hidden_size)).astype(np.float32)
    empty = base.condition(jnp.asarray(wide.tokenizer.encode([""])))
    latents = jax.random.normal(KEY, (COUNT, SIDE // 2, SIDE // 2, 4))
    read = jax.jit(
        lambda classes, patches, latents: read_again(
            Reader(encoder, classes, patches, empty.context, empty.pooled, jnp.ones(1)),
            jnp.zeros((1, sum(base.widths))),
            base.unet,
            latents,
            jnp.int32(400),
        )
    )
    together = read(classes, states, latents)
    for k in range(COUNT):
        alone = read(classes[k], states[k], latents[k : k + 1])[0]
        np.testing.assert_allclose(together[k], alone, rtol=2e-4, atol=2e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_batches_are_joined(size):
    """The function never sees more rows than are asked for, and every row once."""
    seen, rows = [], jnp.arange(10.0).reshape(5, 2)

    def double(batch):
        seen.append(len(batch))
        return {"twice": 2 * batch, "sum": batch.sum(axis=1)}

    found = map_in_batches(double, rows, size)
    np.testing.assert_array_equal(found["twice"], 2 * rows)
    np.testing.assert_array_equal(found["sum"], rows.sum(axis=1))
    assert max(seen) == min(size, 5)
