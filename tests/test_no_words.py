"""A vocabulary without whole words, as of other scripts or of characters: what does without them, and what says so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import personalize
from safetensors.numpy import save_file
from tiny import pictures

from datencoder_jax import api
from datencoder_jax.errors import UserError
from datencoder_jax.objectives.norm import mean_norm, norm_penalty
from datencoder_jax.training.encoder_stage import encoder_config
from datencoder_jax.typing import Variables

SENTENCE = "needs whole words, and this model's tokenizer has none of three letters from a to z or more"


@pytest.fixture(scope="module")
def wordless(pipeline):
    none = jnp.zeros_like(pipeline.base.words)
    base = replace(pipeline.base, words=none, word_norm=mean_norm(pipeline.base.table, none))
    return replace(pipeline, base=base, encoder=None)


def test_without_words_there_is_no_penalty(pipeline, wordless):
    assert wordless.base.word_norm == np.inf
    value, gradient = jax.value_and_grad(lambda v: norm_penalty(v, wordless.base.word_norm).sum())(jnp.ones((2, 3)))
    assert value == 0.0 and not gradient.any()
    table = np.asarray(pipeline.base.table, np.float64)[np.asarray(pipeline.base.words)]
    np.testing.assert_allclose(pipeline.base.word_norm, np.linalg.norm(table, axis=1).mean(), rtol=1e-6)


def test_tuning_does_without(wordless):
    made = personalize(wordless, "textual_inversion")
    assert np.isfinite(made.report["losses"]).all() and np.isfinite(made.concept.embeddings).all()
    assert made.report["nearest_words"] == [] and made.report["hard_word"] == "robot"


@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion", "disendiff", "perfusion"])
def test_what_needs_words_says_so(wordless, method):
    with pytest.raises(UserError, match=SENTENCE):
        personalize(wordless, method, steps=0)


def test_a_modifier_of_ones_own_needs_none(wordless):
    made = personalize(wordless, "custom_diffusion", steps=0, word="red robot")
    assert len(made.concept.embeddings) == 2


def test_encoders_and_starts_without_a_word_need_them(pipeline, wordless):
    with pytest.raises(UserError, match=SENTENCE):
        encoder_config(wordless, rank=2, width=8, depth=1, heads=2)
    initial = Variables(jnp.ones((1, 12)), {})
    options = {"method": "textual_inversion", "steps": 0, "initial": initial, "quiet": True}
    with pytest.raises(UserError, match=f"name a word with hard_word.*{SENTENCE}"):
        api.personalize(wordless, pictures(1), **options)
    assert api.personalize(wordless, pictures(1), hard_word="cat", **options).concept.nearest_word == "cat"


def test_an_embedding_of_another_program_reads_as_its_token(wordless, tmp_path):
    save_file({"emb_params": np.ones((1, 12), np.float32)}, tmp_path / "e.safetensors")
    assert api.import_embedding(wordless, tmp_path / "e.safetensors", "moody").nearest_word == "moody"
