"""Numbers that overflow are told, not drawn: in pictures, at the start of tuning and while it runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIDE, pictures

from datencoder_jax import api, sampling, tuning
from datencoder_jax.errors import UserError
from datencoder_jax.memory import PRESETS
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates, Variables

PROMPTS = ["a photo of a robot", "a red robot"]
CONFIG = TuningConfig(draws=2, views=2)


def generate(pipeline, **changes):
    options = {"num": 1, "sampling_steps": 3, "quiet": True}
    return api.generate(pipeline, PROMPTS, **options | changes).images


def personalize(pipeline, **changes):
    options = {"method": "lora", "word": "robot", "config": CONFIG, "steps": 3, "quiet": True}
    return api.personalize(pipeline, pictures(1), **options | changes)


def told(match, call, *args, **options):
    with pytest.raises(UserError, match=match) as info:
        call(*args, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def scaled(pipeline, network, name, factor):
    """The pipeline with one of its parameters multiplied."""
    model = getattr(pipeline.base, network)
    params = model.params | {name: model.params[name] * np.float32(factor)}
    return replace(pipeline, base=replace(pipeline.base, **{network: model.with_params(params)}))


# --- pictures


@pytest.mark.parametrize("settings", [None, PRESETS[8]], ids=["one program", "in parts"])
@pytest.mark.parametrize(("network", "name"), [("unet", "conv_out.weight"), ("vae", "decoder.conv_in.weight")])
def test_pictures_that_are_not_finite_are_told(pipeline, settings, network, name):
    pipeline = replace(pipeline, memory=replace(settings or pipeline.memory, batch=2))
    assert generate(pipeline).std() > 5
    said = told(r"some pictures are not finite", generate, scaled(pipeline, network, name, 1e38))
    assert "--lora" in said and "--dtype" not in said and "--learning-rates" not in said


def test_every_picture_is_told_of(pipeline):
    latents = jax.random.normal(jax.random.key(0), (3, SIDE // 2, SIDE // 2, 4)).at[1, 2, 3, 0].set(jnp.inf)
    drawn = jax.jit(sampling.decode_checked)(pipeline.base, latents)
    np.testing.assert_array_equal(drawn.finite, [True, False, True])
    np.testing.assert_array_equal(jax.jit(sampling.decode)(pipeline.base, latents)[::2], drawn.pictures[::2])


def test_the_way_out_is_the_runs_own(pipeline, monkeypatch):
    def draw(base, plan, request, variables, *, quiet):
        return sampling.Drawn(
            np.zeros((len(request.noise), SIDE, SIDE, 3), np.uint8), np.arange(len(request.noise)) < 1
        )

    draw.seconds = 0.0
    monkeypatch.setattr(sampling, "generate", draw)
    concept = personalize(pipeline, steps=0, token="robot").concept
    assert "or tune the concept with lower --learning-rates" in told("finite", generate, pipeline, concept=concept)
    half = replace(pipeline, base=replace(pipeline.base, vae=replace(pipeline.base.vae, dtype="float16")))
    assert "; load the model with --dtype bf16 or f32 in place of f16, or lower" in told("finite", generate, half)
    assert generate(pipeline, batch_size=1).shape == (2, 1, SIDE, SIDE, 3)


# --- tuning


@pytest.fixture
def calls(monkeypatch):
    """Tuning is one step per call, and the calls are counted."""
    made, program = [], tuning.tune

    def tune(*args, **options):
        made.append(options["steps"])
        return program(*args, **options)

    tune.seconds = 0.0
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning, "_FUSED", 1)
    return made


@pytest.mark.parametrize(
    ("rate", "steps", "step", "count"),
    [(1e30, 3, "1 of 3", 2), (np.inf, 1, "1 of 1", 1)],
    ids=["a loss", "the last step's variables"],
)
def test_tuning_that_diverges_is_told_at_once(pipeline, calls, rate, steps, step, count):
    told(
        rf"tuning diverged at step {step} .*lower the learning rates",
        personalize,
        pipeline,
        learning_rates=LearningRates(0.0, rate),
        steps=steps,
    )
    assert calls == [1] * count


def test_a_model_that_overflows_is_no_matter_of_rates(pipeline, calls):
    said = told("the first step's loss is not finite", personalize, scaled(pipeline, "unet", "conv_out.weight", 1e38))
    assert "rates" not in said and calls == [1]


def test_a_start_that_is_not_finite_is_told_before_tuning(pipeline, calls):
    start = Variables(jnp.full((1, 12), jnp.nan), {})
    told("what tuning starts from is not finite", personalize, pipeline, initial=start, steps=0)
    assert not calls
