"""CLIP's vocabulary as it comes with the package: its ids are those of OpenCLIP's own tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import refuses
from open_clip_oracle import import_open_clip

import datencoder_jax
from datencoder_jax.prompts import PromptTokenizer

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ASSETS = Path(datencoder_jax.__file__).parent / "assets"
END = 49407
PROMPTS = [
    "a photo of a cat",
    "An Astronaut riding a horse, 4k; trending on artstation...",
    "it's the dog's 2nd ball (really) -- don't; we'll say they're I'm you've he'd",
    "naïve café, 日本語 текст 🙂",
    "supercalifragilisticexpialidocious 1234 5.6%",
    "   spaces\tand\nlines  ",
    "",
]


@pytest.mark.parametrize(("folder", "pad"), [("clip_tokenizer", END), ("open_clip_tokenizer", 0)])
def test_ids_are_those_of_open_clip(folder, pad):
    words = json.loads((ASSETS / folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(words.values()) == list(range(49408))
    ours = PromptTokenizer(ASSETS / folder, 49408, 77).encode(PROMPTS)
    theirs = np.asarray(import_open_clip().tokenizer.SimpleTokenizer()(PROMPTS))
    after = np.arange(77)[None] > theirs.argmax(axis=1)[:, None]
    np.testing.assert_array_equal(ours, np.where(after, pad, theirs))


def test_a_smaller_table_is_refused():
    refuses("more than the 300 tokens", PromptTokenizer, ASSETS / "clip_tokenizer", 300, 77)


def test_the_licence_goes_with_it():
    for folder in ("clip_tokenizer", "open_clip_tokenizer"):
        assert "Copyright (c) 2021 OpenAI" in (ASSETS / folder / "NOTICE").read_text(encoding="utf-8")
