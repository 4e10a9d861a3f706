"""The noise levels of tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pictures

from datencoder_jax import api, tuning
from datencoder_jax.benchmark import units
from datencoder_jax.benchmark.entries import make_rows, parse_entries
from datencoder_jax.benchmark.suites import Setup
from datencoder_jax.diffusion.schedule import alphas_cumprod, stratified_timesteps
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates

CONFIG = TuningConfig(draws=2, views=2)


def problem_of(pipeline, monkeypatch, method, **options):
    """What tuning is given; other arguments as for `personalize`."""
    found, real = [], tuning.run

    def run(state, problem, **more):
        found.append(problem)
        return real(state, problem, **more)

    monkeypatch.setattr(tuning, "run", run)
    options |= {"config": CONFIG, "learning_rates": LearningRates(0.0, 1e-3), "quiet": True}
    api.personalize(pipeline, pictures(1), method=method, steps=1, **options)
    return found[0]


def test_timesteps_are_spread_between_two_levels():
    key, count = jax.random.key(3), 5
    place = np.asarray(jax.random.uniform(key, (count,)), np.float64)
    found = stratified_timesteps(key, count, 1000, jnp.array([0.3, 0.7]))
    np.testing.assert_allclose(found, 1000 * (0.3 + 0.4 * (np.arange(count) + place) / count), atol=1.0)
    whole = stratified_timesteps(key, count, 1000)
    np.testing.assert_array_equal(whole, stratified_timesteps(key, count, 1000, jnp.array([0.0, 1.0])))
    assert stratified_timesteps(key, 400, 1000, jnp.array([0.99, 1.0])).max() == 999


@pytest.mark.parametrize("levels", [None, (0.4, 0.45)])
def test_pictures_are_noised_to_them(pipeline, levels):
    latents = jax.random.normal(jax.random.key(0), (3, 4, 4, 4))
    asked = None if levels is None else jnp.array(levels)
    drawn = tuning._draw(pipeline.base, latents, jax.random.key(1), count=6, levels=asked, focus=None)
    low, high = levels or (0.0, 1.0)
    band = 1000 * (high - low) / 6
    assert (np.abs(np.asarray(drawn.t) - 1000 * low - band * (np.arange(6) + 0.5)) <= band / 2 + 1).all()
    # The tiny model predicts noise, so that the picture can be had again.
    alpha = alphas_cumprod(pipeline.base.schedule)[np.asarray(drawn.t)].reshape(-1, 1, 1, 1)
    clean = (drawn.noisy - np.sqrt(1 - alpha) * drawn.target) / np.sqrt(alpha)
    apart = np.abs(np.asarray(clean)[:, None] - np.asarray(latents)[None]).max(axis=(2, 3, 4))
    assert (apart.min(axis=1) < 1e-2).all()


def test_the_method_itself_keeps_to_the_middle(pipeline, monkeypatch):
    np.testing.assert_allclose(problem_of(pipeline, monkeypatch, "datencoder").levels, [0.4, 0.6])
    assert {name for name, method in METHODS.items() if method.levels != (0.0, 1.0)} == {"datencoder"}


def test_others_do_where_it_is_asked_for(pipeline, monkeypatch):
    assert problem_of(pipeline, monkeypatch, "lora", word="robot").levels is None
    asked = problem_of(pipeline, monkeypatch, "lora", word="robot", options={"lowest": 0.2, "highest": "0.5"})
    np.testing.assert_allclose(asked.levels, [0.2, 0.5])
    whole = problem_of(pipeline, monkeypatch, "datencoder", options={"lowest": 0, "highest": 1})
    assert whole.levels is None


def test_prior_pictures_are_noised_to_them_too(pipeline, monkeypatch):
    drawn, real = [], tuning._draw

    def draw(*args, **options):
        drawn.append(options["levels"])
        return real(*args, **options)

    monkeypatch.setattr(tuning, "_draw", draw)
    options = {"prior": api.PriorOptions(pictures=1), "word": "robot", "options": {"lowest": 0.2}}
    problem = problem_of(pipeline, monkeypatch, "lora", **options)
    drawn.clear()
    jax.eval_shape(lambda state: tuning.tune_step(problem, state, CONFIG), tuning.start(_variables(pipeline)))
    assert len(drawn) == 2 and all(levels is not None for levels in drawn)


def _variables(pipeline):
    concept = api.personalize(pipeline, pictures(1), method="lora", word="robot", steps=0, quiet=True).concept
    return tuning.Variables(jnp.asarray(concept.embeddings), jax.tree.map(jnp.asarray, concept.offsets))


def test_a_row_tells_its_levels(pipeline):
    texts = ["lora:lowest=0.4,highest=0.6", "lora"]
    told = [units.of_row(Setup("toyworld"), row) for row in make_rows(parse_entries(texts), (12,))]
    assert [(each["lowest"], each["highest"], each["focus"]) for each in told] == [(0.4, 0.6, 0.0), (0.0, 1.0, 0.0)]


@pytest.mark.parametrize("options", [{"lowest": 0.7}, {"highest": 1.5}, {"lowest": -0.1}])
def test_levels_that_are_none_are_told(pipeline, options):
    with pytest.raises(UserError, match=r"lowest and highest of datencoder are .* not two numbers from 0 to 1"):
        api.personalize(pipeline, pictures(1), options=options, quiet=True)
