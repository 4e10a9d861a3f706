"""Prior preservation: its loss in float64, whom its gradient reaches, and that it keeps the class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import CONFIG, personalize, rows, run

from datencoder_jax import api, tuning
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.typing import LearningRates

PRIOR = api.PriorOptions(pictures=3, weight=0.5)
KEY = jax.random.key(4)
ABLE = ("lora", "dreambooth", "custom_diffusion", "para")


@pytest.fixture(scope="module")
def kept(pipeline):
    """A run of Custom Diffusion with prior preservation."""
    return run(pipeline, "custom_diffusion", prior=PRIOR)


@pytest.fixture(scope="module")
def graded(kept):
    """Loss and gradient at the end, for weights of the prior; and what the loss compares, of both parts."""
    compared = []

    def spy(prediction, target, **options):
        compared.append((prediction, target))
        return denoising_loss(prediction, target, **options)

    def loss(variables, problem):
        compared.clear()
        value = tuning.tune_loss(variables, problem, KEY, CONFIG)
        return value, compared[0]

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    variables = tuning.Variables(jnp.asarray(kept.concept.embeddings), dict(kept.concept.offsets))

    def grade(weight):
        prior = kept.problem.prior._replace(weight=jnp.float32(weight))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "denoising_loss", spy)
            return program(variables, kept.problem._replace(prior=prior))

    return {weight: grade(weight) for weight in (0.0, 0.5, 2.0)}


def test_the_model_draws_its_class_first(pipeline, kept):
    prior = kept.problem.prior
    assert prior.latents.shape == (3, 8, 8, pipeline.base.unet.config.in_channels) and prior.weight == 0.5
    assert np.unique(np.asarray(prior.latents), axis=0).shape[0] == 3
    ids = jnp.asarray(pipeline.tokenizer.encode(["a photo of a robot"]))
    wanted = jax.jit(lambda base, ids: base.condition(ids))(pipeline.base, ids)
    np.testing.assert_allclose(prior.prompt.context, wanted.context, rtol=0, atol=1e-6)
    assert kept.made.report["seconds"]["prior"] > 0


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_loss_is_the_sum_of_both_parts(pipeline, kept, graded, weight):
    (value, compared), _ = graded[weight]
    prediction, target = (np.asarray(x, np.float64) for x in compared)
    errors = ((prediction - target) ** 2).mean(axis=(1, 2, 3))
    own, prior = np.split(errors, 2)
    assert len(own) == len(prior) == CONFIG.draws
    vectors = np.asarray(kept.concept.embeddings, np.float64)
    penalty = ((vectors**2).sum(axis=1) / float(pipeline.base.word_norm) ** 2).mean()
    np.testing.assert_allclose(value, own.mean() + weight * prior.mean() + CONFIG.norm_weight * penalty, rtol=1e-5)


def test_the_gradient_of_the_prior_reaches_the_edits(graded):
    """It is linear in the weight, reaches every edit, and leaves the modifier alone: the class's prompt has none."""
    zero, half, two = (graded[weight][1] for weight in (0.0, 0.5, 2.0))
    for path in zero.offsets:
        of_prior = np.asarray(half.offsets[path].weight) - np.asarray(zero.offsets[path].weight)
        assert np.abs(of_prior).max() > 1e-5, path
        more = np.asarray(two.offsets[path].weight) - np.asarray(zero.offsets[path].weight)
        np.testing.assert_allclose(more, 4 * of_prior, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(two.embeddings, zero.embeddings, rtol=1e-4, atol=1e-6)


def test_it_keeps_the_class(pipeline):
    """Noise on what the model drew of its class is told better, under the class word, than by tuning without."""
    rates = LearningRates(0.0, 3e-2)
    kept, free = (
        run(pipeline, "dreambooth", steps=20, learning_rates=rates, prior=prior)
        for prior in (api.PriorOptions(pictures=4, weight=4.0), None)
    )
    prior, base = kept.problem.prior, pipeline.base

    def error(variables, key):
        t_key, noise_key = jax.random.split(key)
        clean = jnp.tile(prior.latents, (8, 1, 1, 1))
        t, noise = jax.random.randint(t_key, (32,), 0, 1000), jax.random.normal(noise_key, clean.shape)
        noisy = add_noise(clean, noise, jnp.asarray(alphas_cumprod(base.schedule))[t])
        prompt = jax.tree.map(lambda x: jnp.repeat(x, 32, axis=0), prior.prompt)
        prediction = base.denoise(noisy, t, prompt, offsets=base.edits(variables, prompt))
        return denoising_loss(prediction, noise).mean()

    measure = jax.jit(error)
    tuned = (tuning.Variables(jnp.zeros((2, 12)), dict(each.concept.offsets)) for each in (kept, free))
    with_prior, without = (float(measure(variables, KEY)) for variables in tuned)
    assert with_prior < 0.95 * without


@pytest.mark.parametrize("method", ["lora", "para"])
def test_the_class_is_not_told_both(pipeline, method):
    """With vectors that stay as they are, a class word alone would be told what is new and what is to stay."""
    kept = run(pipeline, method, prior=PRIOR, learning_rates=LearningRates(0.0, 1e-2))
    wanted = pipeline.tokenizer.encode(["a photo of a S*"], {"S*": 2})
    np.testing.assert_array_equal(kept.problem.soft_ids, wanted)
    assert np.abs(kept.problem.soft.context - kept.problem.prior.prompt.context).max() > 0.01
    own = run(pipeline, method, prior=PRIOR, word="red robot", learning_rates=LearningRates(0.0, 1e-2))
    np.testing.assert_array_equal(own.concept.embeddings, rows(pipeline, "red", "robot"))
    with pytest.raises(UserError, match="a prior is of a class; name it with --word, such as 'sks dog' or dog"):
        personalize(pipeline, method, prior=PRIOR, word=None)


def test_methods_without_it_say_so(pipeline):
    assert tuple(name for name, method in METHODS.items() if "prior" in method.options) == ABLE
    with pytest.raises(UserError, match=f"textual_inversion takes no prior; those that do are: {', '.join(ABLE)}"):
        personalize(pipeline, "textual_inversion", prior=PRIOR)


@pytest.mark.parametrize("options", [{"pictures": 0}, {"weight": 0.0}, {"weight": float("nan")}])
def test_bad_options_are_refused(options):
    with pytest.raises(UserError, match="needs pictures and a weight above 0"):
        api.PriorOptions(**options)
