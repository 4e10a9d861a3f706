"""DreamBooth and Custom Diffusion: whole matrices, what is tuned of them, and their size."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from method_helpers import check_round_trip, check_single_steps, draw, personalize, predict, rows, run

from datencoder_jax.api import PriorOptions
from datencoder_jax.composition import compose
from datencoder_jax.models.edits import as_low_rank, ready
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.typing import Dense, LearningRates

PROJECTIONS = {
    "dreambooth": [f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")],
    "custom_diffusion": ["attn2.to_k", "attn2.to_v"],
}

RATES = {"dreambooth": LearningRates(0.0, 3e-2), "custom_diffusion": LearningRates(1e-2, 3e-2)}


@pytest.fixture(scope="module", params=PROJECTIONS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def tuned(pipeline, method):
    return run(pipeline, method, learning_rates=RATES[method])


def shapes_of(pipeline, method):
    shapes = attention_shapes(pipeline.base.unet)
    return {path: shape for path, shape in shapes.items() if path.split("blocks.0.")[-1] in PROJECTIONS[method]}


# --- what is tuned


def test_the_start_changes_nothing(pipeline, method, tuned):
    shapes = shapes_of(pipeline, method)
    assert {path: edit.weight.shape for path, edit in tuned.start.offsets.items()} == shapes
    assert len(shapes) == {"dreambooth": 8, "custom_diffusion": 2}[method] * 4  # down, mid and two up
    assert all(isinstance(edit, Dense) and not edit.weight.any() for edit in tuned.start.offsets.values())


def test_the_modifier_stands_for_no_word(pipeline, tuned):
    """The mean of the words' directions, of their mean length, before the class word; in float64."""
    base = pipeline.base
    table = np.asarray(base.table, np.float64)[np.asarray(base.words)]
    lengths = np.linalg.norm(table, axis=1)
    mean = (table / lengths[:, None]).mean(axis=0)
    modifier, word = np.asarray(tuned.start.embeddings)
    np.testing.assert_allclose(modifier, mean / np.linalg.norm(mean) * lengths.mean(), rtol=1e-4)
    np.testing.assert_array_equal([word], rows(pipeline, "robot"))


def test_a_class_of_several_tokens_is_one_word(pipeline, method):
    """It gets a modifier before it, which alone is tuned, and the hard path and the prior have it as a whole."""
    pieces = pipeline.tokenizer.word_ids("robotfish")
    assert len(pieces) > 1
    made = run(pipeline, method, word="robotfish", prior=PriorOptions(pictures=1), learning_rates=RATES[method])
    start, concept = np.asarray(made.start.embeddings), made.concept
    np.testing.assert_array_equal(start[1:], np.asarray(pipeline.base.table)[pieces])
    np.testing.assert_array_equal(concept.embeddings[1:], start[1:])
    moved = bool(RATES[method].embeddings)
    assert (np.abs(concept.embeddings[0] - start[0]) > 1e-4).all() == moved and concept.nearest_word == "robotfish"
    wanted = pipeline.base.condition(pipeline.tokenizer.encode(["a photo of a robotfish"]))
    np.testing.assert_allclose(made.problem.prior.prompt.context, wanted.context, atol=1e-6)


def test_a_rare_word_of_several_tokens_is_tuned_as_a_whole(pipeline, method):
    made = run(pipeline, method, word="robotfish robot", learning_rates=RATES[method])
    moved = (np.abs(made.concept.embeddings - made.start.embeddings) > 1e-4).all(axis=1)
    pieces = len(pipeline.tokenizer.word_ids("robotfish"))
    assert moved.tolist() == [bool(RATES[method].embeddings)] * pieces + [False]


def test_words_of_ones_own_are_taken_as_they_are(pipeline, method):
    start = personalize(pipeline, method, steps=0, word="red robot").concept
    np.testing.assert_array_equal(start.embeddings, rows(pipeline, "red", "robot"))
    assert start.nearest_word == "robot"


def test_the_gradient_reaches_what_is_tuned_and_nothing_else(pipeline, method, tuned):
    concept, (modifier, word) = tuned.concept, np.asarray(tuned.start.embeddings)
    moves = method == "custom_diffusion"
    assert np.array_equal(concept.embeddings[0], modifier) != moves
    if moves:
        assert np.abs(concept.embeddings[0] - modifier).min() > 1e-4
    np.testing.assert_array_equal(concept.embeddings[1], word)
    assert concept.offsets.keys() == shapes_of(pipeline, method).keys()
    assert all((np.abs(edit.weight) > 1e-4).mean() > 0.9 for edit in concept.offsets.values())
    numbers = sum(np.size(edit.weight) for edit in concept.offsets.values())
    assert tuned.made.report["trained"] == numbers + 12 * moves
    assert concept.blend == 1.0 and concept.metadata["rank"] == ""


def test_one_program_is_single_steps(tuned):
    check_single_steps(tuned)


# --- what it does


def test_a_dense_edit_is_a_change_of_the_weights(pipeline, tuned):
    """`x W + x D` against `x (W + D)`, which NumPy added in float64."""
    unet, offsets = pipeline.base.unet, tuned.concept.offsets
    changed = dict(unet.params)
    for path, edit in offsets.items():
        total = np.asarray(changed[f"{path}.weight"], np.float64) + np.asarray(edit.weight, np.float64)
        changed[f"{path}.weight"] = total.astype(np.float32)
    found = jax.jit(lambda unet, o: predict(unet, unet.params, ready(o, unet.params), pipeline))(unet, offsets)
    wanted = jax.jit(lambda unet, params: predict(unet, params, None, pipeline))(unet, changed)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    plain = jax.jit(lambda unet, params: predict(unet, params, None, pipeline))(unet, unet.params)
    assert np.abs(found - plain).max() > 1e-2


def test_low_rank_factors_are_exact(pipeline, tuned):
    factors = as_low_rank(tuned.concept.offsets, pipeline.base.unet.params)
    for path, edit in tuned.concept.offsets.items():
        down, up = (np.asarray(x, np.float64) for x in factors[path])
        np.testing.assert_allclose(down @ up, edit.weight, rtol=0, atol=1e-6)


def test_a_file_holds_every_bit(pipeline, tuned, tmp_path):
    check_round_trip(pipeline, tuned.concept, tmp_path / "c.safetensors")


def test_two_concepts_add_up(pipeline, method, tuned):
    other = replace(tuned.concept, token="T*")
    joined = compose([tuned.concept, other], [1.0, 0.5]).variables
    for path, edit in tuned.concept.offsets.items():
        np.testing.assert_allclose(joined.offsets[path].weight, 1.5 * np.asarray(edit.weight), rtol=1e-6)
    if method == "custom_diffusion":
        assert draw(pipeline, [tuned.concept, other], ["a S* and a T*"]).shape == (1, 1, 16, 16, 3)


# --- how large it is


def test_sizes_on_stable_diffusion():
    """In bytes of float32; the paper says 75 MB of Custom Diffusion."""
    shapes = attention_shapes(stable_diffusion("1.5", "float32").unet)
    size = {
        name: sum(4 * inputs * outputs for path, (inputs, outputs) in shapes.items() if path.endswith(tuple(ends)))
        for name, ends in PROJECTIONS.items()
    }
    assert size == {"dreambooth": 374_046_720, "custom_diffusion": 76_677_120}
