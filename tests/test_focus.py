"""Where a concept is in its pictures, and tuning that looks there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pictures

from datencoder_jax import api, tuning
from datencoder_jax.diffusion.schedule import alphas_cumprod
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation import suite
from datencoder_jax.methods import METHODS, focus
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.world import Context, Instance
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates

CONFIG = TuningConfig(draws=4, views=4)


def prompts(pipeline, *texts):
    read = jax.jit(lambda base, ids: base.condition(ids))
    return [read(pipeline.base, jnp.asarray(pipeline.tokenizer.encode([text]))) for text in texts]


def test_weights_are_as_written():
    found = np.random.default_rng(0).uniform(size=(3, 5, 4))
    mask = np.clip((found - 0.25) / (0.6 - 0.25), 0, 1)
    expected = 0.1 + 0.9 * mask
    expected /= expected.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(focus.weights(jnp.asarray(found, jnp.float32), 0.1), expected, rtol=1e-5)
    assert np.isfinite(np.asarray(focus.weights(jnp.zeros((1, 2, 2)), 0.0))).all()


def test_differences_are_as_written(pipeline):
    base, (word, empty) = pipeline.base, prompts(pipeline, "a photo of a robot", "")
    latents = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    found = jax.jit(focus.differences)(base, latents, word, empty, jax.random.key(1))
    noises = np.asarray(jax.random.normal(jax.random.key(1), (4, 8, 8, 4)), np.float64)
    alphas, unet = alphas_cumprod(base.schedule), jax.jit(lambda base, *args: base.denoise(*args))
    expected = np.zeros((2, 8, 8))
    for j, noise in enumerate(noises):
        t = int((0.3, 0.45, 0.6, 0.75)[j] * base.schedule.num_train_timesteps)
        noisy = np.sqrt(alphas[t]) * np.asarray(latents, np.float64) + np.sqrt(1 - alphas[t]) * noise
        for k in range(2):
            row = jnp.asarray(noisy[k : k + 1], jnp.float32)
            told, plain = (np.asarray(unet(base, row, jnp.array([t]), prompt), np.float64) for prompt in (word, empty))
            expected[k] += np.abs(told - plain)[0].mean(axis=-1) / len(noises)
    np.testing.assert_allclose(found, expected / expected.max(axis=(1, 2), keepdims=True), atol=2e-4)


def test_the_embedded_model_finds_its_things():
    """The middle of the picture, where the thing is, counts for more than its border."""
    world = api.load("toyworld")
    first = Instance.from_id(1_200_001)
    picture = render_batch([first.id], [Context("night")], [3])
    scene = suite.make_bench([first]).size
    word, empty = prompts(world, f"a photo of a {first.cls}", "")
    pixels = jnp.asarray(picture).astype(jnp.float32) / 127.5 - 1
    latents = jax.jit(lambda base, x: base.vae.bind().to_latents(x))(world.base, pixels)
    found = jax.jit(focus.differences)(world.base, latents, word, empty, jax.random.key(0))[0]
    weights = np.asarray(focus.weights(found[None], 0.1))[0]
    border = np.ones(weights.shape, bool)
    border[1:-1, 1:-1] = False
    assert scene == 32 and weights[2:6, 2:6].mean() > 3 * weights[border].mean()


def test_views_are_weighted_where_they_show_the_concept(pipeline, monkeypatch):
    """A view's weights are cropped and mirrored as its picture is."""
    base, (word, empty) = pipeline.base, prompts(pipeline, "a photo of a robot", "")
    images = jnp.asarray(np.stack(pictures(1))).astype(jnp.float32) / 127.5 - 1
    side, key = images.shape[1], jax.random.key(4)
    ramp = jnp.broadcast_to(jnp.linspace(0.3, 0.55, side // 2), (1, side // 2, side // 2))
    monkeypatch.setattr(tuning, "differences", lambda *_, **__: ramp)
    config = TuningConfig(draws=4, views=6, crop=1.0)
    latents = jnp.zeros((6, side // 2, side // 2, 4))
    found = tuning.focus_views(base, latents, word, empty, key, key, jnp.float32(0.0), pictures=1, config=config)
    mirrored = np.asarray(tuning.views_of(images, key, config) != images[:1]).any(axis=(1, 2, 3))
    assert mirrored.any() and not mirrored.all() and not mirrored[0]
    rising = np.asarray(found[:, :, -1] > found[:, :, 0]).all(axis=1)
    np.testing.assert_array_equal(rising, ~mirrored)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 1.0, rtol=1e-5)


def test_errors_count_by_their_weight(pipeline):
    """A floor of 1 weights all pixels alike, as no focus does; a lower one does not."""
    calls = []
    options = {"steps": 2, "config": CONFIG, "learning_rates": LearningRates(1e-2, 1e-2), "quiet": True}
    for floor in (0.0, 0.2, 1.0):
        made = api.personalize(pipeline, pictures(1), options={"focus": floor}, **options)
        calls.append(made.report["losses"])
    off, some, everywhere = calls
    np.testing.assert_allclose(everywhere, off, rtol=1e-4)  # a floor of 1 is no focus at all
    assert not np.allclose(some, off, rtol=1e-4)


def test_every_method_takes_the_option_and_the_encoder_has_it(pipeline):
    assert METHODS["datencoder"].focus and METHODS["lora"].focus is None
    assert all("focus" in method.choices for method in METHODS.values())
    with pytest.raises(UserError, match="focus of lora is 2, not a number from 0"):
        api.personalize(pipeline, pictures(1), method="lora", word="robot", options={"focus": 2.0})
