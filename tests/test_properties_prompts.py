"""Properties of prompts: ids are those of CLIP's own tokenizer, and a placeholder is there in full or refused."""

import warnings
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

import datencoder_jax
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import PromptTokenizer, check_prompts, placeholder, put_words

LENGTH = 77
VOCABULARY = 49408
SURROGATE = "\udce9"
"""Half of a surrogate pair: Python's stand-in for a byte of the command line that is no UTF-8."""

words = st.sampled_from(
    ["a", "cat", "S*", "sks", "((red:1.2))", "[cat]", "<|endoftext|>", "<|startoftext|>", "it's", "猫"]
)
texts = st.lists(words | st.text(max_size=8), max_size=40).map(" ".join)
"""Texts that Unicode can encode, of up to about 150 tokens."""

wild_texts = texts | st.text(st.characters(exclude_categories=()))
"""Texts with halves of surrogate pairs too."""

tokens = st.sampled_from(["S*", "sks", "<my-cat>", "猫", "V1", "*"]) | st.text(min_size=1, max_size=4).filter(
    lambda token: token.split() == [token]
)
placeholders = st.dictionaries(tokens, st.integers(1, 80), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def folder():
    return Path(datencoder_jax.__file__).parent / "assets" / "clip_tokenizer"


@pytest.fixture(scope="module")
def oracle(folder):
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PromptTokenizer(folder, VOCABULARY, LENGTH)


def encode(tokenizer, prompt, counts=None, **options):
    """The ids of one prompt; that a long one is cut is no concern here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the prompt .* is longer than", UserWarning)
        return tokenizer.encode([prompt], counts, **options)[0].tolist()


@given(texts)
@example("<|endoftext|> a")
@example("\x00")
def test_ids_are_those_of_the_tokenizer_of_transformers(tokenizer, oracle, text):
    theirs = oracle(text, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert encode(tokenizer, text) == theirs


@given(st.lists(texts, min_size=2, max_size=4), tokens, st.integers(1, 40))
def test_the_vectors_of_a_placeholder_stand_between_the_ids_of_the_text_around_it(
    tokenizer, oracle, parts, token, count
):
    assume(not any(token in part for part in parts))
    vectors = list(range(VOCABULARY, VOCABULARY + count))
    ids = [oracle(part, add_special_tokens=False)["input_ids"] for part in parts]
    wanted = [*ids[0], *(i for part in ids[1:] for i in [*vectors, *part])]
    prompt = f" {token} ".join(parts)
    if len(ids[0]) + count > LENGTH - 2:
        with pytest.raises(UserError, match="does not fit"):
            encode(tokenizer, prompt, {token: count})
        return
    row = encode(tokenizer, prompt, {token: count})
    room = wanted[: LENGTH - 2]
    assert row[: len(room) + 2] == [oracle.bos_token_id, *room, oracle.eos_token_id]
    assert set(row[len(room) + 2 :]) <= {oracle.pad_token_id}


@given(wild_texts, placeholders)
@example(SURROGATE, {"S*": 1})
@example(f"a photo of a S* {SURROGATE}", {"S*": 1})
def test_all_vectors_of_every_placeholder_are_there_or_the_prompt_is_refused(tokenizer, prompt, counts):
    contained = {token for token in counts if placeholder(token).search(prompt)}
    try:
        check_prompts([prompt], list(counts))
        row = encode(tokenizer, prompt, counts)
    except UserError:
        return
    assert contained and len(row) == LENGTH
    first, read = VOCABULARY, set()
    for token, count in counts.items():
        vectors = range(first, first + count)
        if present := set(vectors) & set(row):
            assert present == set(vectors)
            read.add(token)
        first += count
    # One placeholder may stand inside another: the longer one is read there.
    assert read and all(token in read or any(token in other for other in read) for token in contained)


@given(wild_texts, st.dictionaries(tokens, words, min_size=1, max_size=3))
@example(SURROGATE, {"S*": "cat"})
def test_a_hard_prompt_is_encoded_as_the_text_with_the_words(tokenizer, prompt, nearest):
    hard = put_words(prompt, nearest)
    try:
        row = encode(tokenizer, prompt, words=nearest)
    except UserError:
        assert SURROGATE in ascii(hard) or any("\ud800" <= character <= "\udfff" for character in hard)
        return
    assert row == encode(tokenizer, hard) and max(row) < VOCABULARY


@given(wild_texts)
@example(SURROGATE)
@example("")
def test_a_word_of_any_text_is_its_ids_or_refused(tokenizer, oracle, text):
    for read in (tokenizer.word_ids, lambda word: [tokenizer.word_id(word)]):
        try:
            ids = read(text)
        except UserError:
            continue
        theirs = oracle(text, add_special_tokens=False)["input_ids"]
        assert ids and ids == [i for i in theirs if i in ids]
