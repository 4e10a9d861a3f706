"""The methods without an encoder, through the same loop as the one with it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pictures

from datencoder_jax import api, tuning
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates, Variables

CONFIG = TuningConfig(draws=4, views=4)
STEPS = 20
RATES = {"lora": LearningRates(0.0, 0.05), "textual_inversion": LearningRates(0.05, 0.0)}


@pytest.fixture(scope="module")
def blind(pipeline):
    """The base model alone, as nearly all are."""
    return replace(pipeline, encoder=None, base=replace(pipeline.base, vision=None))


def personalize(pipeline, method, **changes):
    options = {"method": method, "steps": STEPS, "word": "robot", "config": CONFIG, "quiet": True}
    return api.personalize(pipeline, pictures(2), **options | {"learning_rates": RATES.get(method)} | changes)


@pytest.fixture(scope="module")
def tuned(blind):
    return {method: personalize(blind, method) for method in RATES}


def rows(pipeline, *words):
    return np.asarray(pipeline.base.table)[[pipeline.tokenizer.word_id(word) for word in words]]


def spy_on_tuning(monkeypatch):
    """Lists that take the states and problems that `personalize` would tune."""
    states, problems = [], []

    def spy(state, problem, *, steps, **_):
        states.append(state)
        problems.append(problem)
        return state, jnp.zeros(steps)

    spy.seconds = 0.0
    monkeypatch.setattr(tuning, "tune", spy)
    return states, problems


# --- what is tuned


def test_lora_keeps_the_word_and_learns_offsets(blind, tuned):
    concept = tuned["lora"].concept
    np.testing.assert_array_equal(concept.embeddings, rows(blind, "robot"))
    shapes = attention_shapes(blind.base.unet)
    assert {path: (len(o.down), o.up.shape[1]) for path, o in concept.offsets.items()} == shapes
    assert all(np.abs(offset.up).min() > 0 for offset in concept.offsets.values())
    assert (concept.blend, concept.nearest_word, concept.metadata["rank"]) == (1.0, "robot", "4")


def test_textual_inversion_moves_the_embeddings_alone(blind, tuned):
    concept = tuned["textual_inversion"].concept
    assert concept.offsets == {} and concept.metadata["rank"] == ""
    assert np.abs(concept.embeddings - rows(blind, "robot")).min() > 1e-3
    assert tuned["textual_inversion"].report["method"] == concept.metadata["method"] == "textual_inversion"


@pytest.mark.parametrize("method", RATES)
def test_no_steps_are_the_start(blind, method):
    start = personalize(blind, method, steps=0).concept
    np.testing.assert_array_equal(start.embeddings, rows(blind, "robot"))
    assert bool(start.offsets) == (method == "lora")
    assert personalize(blind, method, steps=0).report["trained"] == 0
    for offset in start.offsets.values():  # the product is zero, and has a gradient
        assert not offset.up.any() and np.abs(offset.down).min() > 0
        np.testing.assert_allclose(offset.down.std(), len(offset.down) ** -0.5, rtol=0.5)


def test_the_start_is_drawn_from_the_seed(blind):
    downs = [
        next(iter(personalize(blind, "lora", steps=0, seed=seed).concept.offsets.values())).down for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(downs[0], downs[1])
    assert not np.array_equal(downs[0], downs[2])


def test_several_tokens_are_several_vectors(blind):
    concept = personalize(blind, "lora", steps=0, word="red robot", rank=3).concept
    np.testing.assert_array_equal(concept.embeddings, rows(blind, "red", "robot"))
    assert concept.nearest_word == "robot"  # the class word comes last
    assert {offset.down.shape[1] for offset in concept.offsets.values()} == {3}
    assert len(personalize(blind, "lora", steps=0, word=None).concept.embeddings) == len(
        blind.tokenizer.word_ids("sks")
    )


@pytest.mark.parametrize("method", RATES)
def test_the_loss_falls(blind, tuned, method):
    """Over draws that are the same before and after; the rates are too small to move anything."""
    still = LearningRates(*(1e-12 * (rate > 0) for rate in RATES[method]))
    concept = tuned[method].concept
    variables = Variables(jnp.asarray(concept.embeddings), concept.offsets)
    before, after = (
        np.array(personalize(blind, method, learning_rates=still, initial=initial).report["losses"])
        for initial in (None, variables)
    )
    assert before[0] == tuned[method].report["losses"][0]
    assert np.mean(after < before) > 0.8  # one vector cannot do much in this model, but it does so in most steps
    assert after.mean() < (0.9 if method == "lora" else 0.999) * before.mean()


# --- the loop


def test_text_that_is_not_tuned_is_no_argument_of_the_program(blind, monkeypatch):
    _, problems = spy_on_tuning(monkeypatch)
    for method in RATES:
        personalize(blind, method)
    lora, inversion = problems
    for problem in problems:
        assert problem.hard is None and not problem.base.vae.params
        assert problem.base.unet.params.keys() == blind.base.unet.params.keys()
    assert not lora.base.text.params and lora.soft is not None
    assert inversion.base.text.params.keys() == blind.base.text.params.keys() and inversion.soft is None


def test_text_read_in_advance_is_text_read_at_every_step(blind, tuned, monkeypatch):
    run = tuning.tune
    states, problems = spy_on_tuning(monkeypatch)
    personalize(blind, "lora")
    reading = problems[0]._replace(base=blind.base.only("unet", "text"), soft=None)
    state, losses = run(states[0], reading, steps=STEPS, config=CONFIG, quiet=True)
    np.testing.assert_allclose(losses, tuned["lora"].report["losses"], rtol=1e-6)
    np.testing.assert_array_equal(state.variables.embeddings, tuned["lora"].concept.embeddings)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        state.variables.offsets,
        tuned["lora"].concept.offsets,
    )


@pytest.mark.parametrize(("options", "word"), [({}, "robot"), ({"hard_word": "fish"}, "fish")])
def test_two_paths_read_the_hard_word(blind, monkeypatch, options, word):
    _, problems = spy_on_tuning(monkeypatch)
    concept = personalize(blind, "lora", blend=0.5, **options).concept
    assert (concept.blend, concept.nearest_word) == (0.5, word)
    assert problems[0].blend == 0.5
    ids = blind.tokenizer.encode([f"a photo of a {word}"])
    wanted = jax.jit(lambda base, ids: base.condition(ids))(blind.base, ids)
    np.testing.assert_allclose(problems[0].hard.context, wanted.context, atol=1e-6)


def test_the_blend_is_one_where_no_encoder_was_asked(pipeline):
    assert pipeline.encoder.config.blend == 0.5
    assert personalize(pipeline, "lora", steps=0).concept.blend == 1.0


def test_methods_have_their_own_steps_and_rates(blind, monkeypatch):
    _, problems = spy_on_tuning(monkeypatch)
    for method, steps in (("lora", 200), ("textual_inversion", 1000)):
        concept = personalize(blind, method, steps=None, learning_rates=None).concept
        assert concept.metadata["steps"] == str(steps)
        tuned_parts = [bool(rate > 0) for rate in problems[-1].rates[:2]]
        assert tuned_parts == [method == "textual_inversion", method == "lora"]


# --- misuse


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magic", {}, "'magic' is not known; choose one of: datencoder, lora, textual_inversion, dreambooth"),
        ("lora", {"word": " "}, "' ' is no word of this model's vocabulary; .*--word"),
        ("lora", {"word": ""}, "'' is no word of this model's vocabulary; .*--word"),
        ("lora", {"rank": 0}, "rank must be 1 or more, not 0"),
        ("datencoder", {"rank": 4, "word": None}, "datencoder takes no rank"),
        ("textual_inversion", {"rank": 4}, "textual_inversion takes no rank"),
        ("lora", {"steps": -1}, "steps must be 0 or more"),
        ("lora", {"blend": 1.5}, "blend must lie between 0 and 1"),
        ("datencoder", {"word": "robot"}, "datencoder takes no word"),
        ("datencoder", {"word": None}, r"no tuning-encoder for tiny: .*--encoder .*--method \(lora or textual_inv"),
    ],
)
def test_misuse_is_one_sentence(blind, method, options, message):
    with pytest.raises(UserError, match=message) as info:
        personalize(blind, method, **options)
    assert "\n" not in str(info.value)


def test_more_words_than_the_prompt_holds_are_refused(pipeline):
    with pytest.raises(UserError, match="tokens long"):
        personalize(pipeline, method="lora", word="robot " * 60, steps=1)


def test_a_word_that_means_nothing_is_refused(pipeline):
    table = pipeline.base.table.at[pipeline.tokenizer.word_id("robot")].set(0.0)
    text = pipeline.base.text.with_params(pipeline.base.text.params | {TOKEN_TABLE: table})
    with pytest.raises(UserError, match="'robot' means nothing to this model"):
        personalize(replace(pipeline, base=replace(pipeline.base, text=text)), method="lora", steps=0)
