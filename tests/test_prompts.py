"""Prompts to token ids: the placeholder, the hard prompt, what is cut, and which words may be a concept's neighbour."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

import datencoder_jax
from datencoder_jax.cli import main
from datencoder_jax.drawing import generate
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import PromptTokenizer, check_prompts, placeholder, put_words
from datencoder_jax.toyworld.tokenizer import END, MAX_LENGTH, START, build, write_tokenizer

VOCABULARY = build()[0]
CONCEPT = len(VOCABULARY)
"""The id of the concept's first vector."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PromptTokenizer(folder, len(VOCABULARY), MAX_LENGTH)


def inside(ids):
    """The ids of one prompt between the start and the first end; the rest is padding."""
    ids = [int(i) for i in ids]
    assert ids[0] == VOCABULARY[START]
    end = ids.index(VOCABULARY[END])
    assert set(ids[end:]) == {VOCABULARY[END]}
    return ids[1:end]


def words(text):
    return [CONCEPT if word == "*" else VOCABULARY[f"{word}</w>"] for word in text.split()]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of S*", "a photo of *"),
        ("S* on the beach", "* on the beach"),
        ("S*", "*"),
        ("a photo of a S* at night", "a photo of a * at night"),
        ("S* and S*", "* and *"),
        ("S*S*", "* *"),
        ("a photo of S*, at night", "a photo of * , at night"),
        ("S*'s house", "* 's house"),
        ("(S*)", "( * )"),
        ("a photo of s*", None),
        ("a photo of a robot", "a photo of a robot"),
    ],
)
def test_the_placeholder_becomes_the_id_past_the_vocabulary(tokenizer, prompt, expected):
    found = inside(tokenizer.encode([prompt], {"S*": 1})[0])
    if expected is None:  # another case is another word
        assert CONCEPT not in found
        return
    pieces = []
    for word in expected.split():
        pieces += [CONCEPT] if word == "*" else inside(tokenizer.encode([word])[0])
    assert found == pieces


def test_encoded_prompts_are_padded_rows_of_int32(tokenizer):
    ids = tokenizer.encode(["a photo of S*", ""], {"S*": 1})
    assert ids.dtype == np.int32 and ids.shape == (2, MAX_LENGTH)
    assert inside(ids[1]) == []
    assert inside(ids[0]) == words("a photo of *")


def test_words_around_the_placeholder_are_those_of_the_prompt_without_it(tokenizer):
    around = inside(tokenizer.encode(["a red S* under water"], {"S*": 1})[0])
    assert [i for i in around if i != CONCEPT] == words("a red under water")


def test_a_placeholder_may_stand_for_several_vectors(tokenizer):
    ids = inside(tokenizer.encode(["S* and S*"], {"S*": 3})[0])
    assert ids == [CONCEPT, CONCEPT + 1, CONCEPT + 2, *words("and"), CONCEPT, CONCEPT + 1, CONCEPT + 2]


@pytest.mark.parametrize("token", ["S*", "<my cat>", "sks", "$1.", "ö"])
def test_any_text_may_be_the_placeholder(tokenizer, token):
    assert inside(tokenizer.encode([f"a photo of {token} at night"], {token: 1})[0]) == words("a photo of * at night")


@pytest.mark.parametrize(
    ("token", "prompt", "expected"),
    [
        ("s", "s in the snow", "* in the snow"),
        ("sks", "masks and sks", "masks and *"),
        ("sks", "sks's house", "*'s house"),
        ("ö", "snö ö", "snö *"),
    ],
)
def test_a_placeholder_inside_a_word_is_none(tokenizer, token, prompt, expected):
    def ids(text):
        return inside(tokenizer.encode([text])[0])

    before, after = expected.split("*")
    assert inside(tokenizer.encode([prompt], {token: 1})[0]) == [*ids(before), CONCEPT, *ids(after)]
    np.testing.assert_array_equal(
        tokenizer.encode([prompt], words={token: "robot"}), tokenizer.encode([expected.replace("*", "robot")])
    )


def test_the_hard_prompt_is_the_prompt_with_the_word(tokenizer):
    soft = ["a photo of S*", "S*, and S*'s house"]
    hard = tokenizer.encode(soft, words={"S*": "robot"})
    np.testing.assert_array_equal(hard, tokenizer.encode(["a photo of robot", "robot, and robot's house"]))
    assert hard.max() < CONCEPT


def test_what_does_not_fit_is_cut_and_named(tokenizer):
    room = MAX_LENGTH - 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = tokenizer.encode(["red " * room + "robot on the beach"], {"S*": 1})
    assert len(caught) == 1 and "cut: 'robot on the beach'" in str(caught[0].message)
    assert inside(ids[0]) == words("red " * room)
    with pytest.warns(UserWarning, match=r"cut: 'a S\* on the beach'"):
        tokenizer.encode(["S* " + "red " * (room - 1) + "a S* on the beach"], {"S*": 1})


def test_a_prompt_whose_placeholder_is_cut_off_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"placeholder 'S\*' does not fit"):
        tokenizer.encode(["red " * (MAX_LENGTH - 2) + "S* on the beach"], {"S*": 1})


def test_a_prompt_that_just_fits_is_not_cut(tokenizer):
    exact = "red " * (MAX_LENGTH - 3) + "S*"
    ids = tokenizer.encode([exact], {"S*": 1})[0]
    assert inside(ids)[-1] == CONCEPT and ids[-1] == VOCABULARY[END]


def test_long_prompts_leave_no_other_trace(tmp_path, caplog):
    write_tokenizer(tmp_path)
    new = PromptTokenizer(tmp_path, len(VOCABULARY), MAX_LENGTH)
    with pytest.warns(UserWarning, match="longer than"):
        new.encode(["red " * 100])
    assert not caplog.records


def test_neighbours_are_whole_words_of_three_letters_or_more(tokenizer):
    chosen = {tokenizer.word(i) for i in np.flatnonzero(tokenizer.whole_words)}
    assert {"robot", "photo", "the", "beach"} <= chosen
    assert all(len(word) > 2 and word.isascii() and word.isalpha() for word in chosen)
    assert not chosen & {"a", "of", "an"}
    assert len(tokenizer.whole_words) == CONCEPT
    # Special tokens, single bytes and beginnings of words are no words.
    allowed = {text for text, index in VOCABULARY.items() if tokenizer.whole_words[index]}
    assert all(text.endswith("</w>") for text in allowed) and START not in allowed and END not in allowed


def test_a_word_and_its_id(tokenizer):
    assert tokenizer.word(tokenizer.word_id("robot")) == "robot"
    for bad in ("robotrobot", "two words", ""):
        with pytest.raises(UserError, match="single token"):
            tokenizer.word_id(bad)


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([], [], "no prompt"),
        (["a robot", " \t"], [], "empty"),
        (["a photo of S*", "a robot"], ["S*"], r"'a robot' does not contain the placeholder 'S\*'"),
        (["a photo of s*"], ["S*"], "does not contain"),
        (["masks"], ["sks"], "does not contain"),
        ("a photo of S*", ["S*"], "list of texts"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(prompts, tokens, message):
    with pytest.raises(UserError, match=message) as info:
        check_prompts(prompts, tokens)
    assert "\n" not in str(info.value)


WITHOUT_BLANKS = [
    ("猫", "一只猫在海边", "一只 cat 在海边"),
    ("ねこ", "海辺のねこと犬", "海辺の cat と犬"),
    ("ネコ", "海辺のネコと犬", "海辺の cat と犬"),
    ("แมว", "ภาพแมวดำ", "ภาพ cat ดำ"),
    ("고양이", "해변의 고양이가 있다", "해변의 cat 가 있다"),
    ("sks", "一只sks在海边", "一只 cat 在海边"),
    ("猫", "a猫b", "a cat b"),
    ("S*", "一只S*在海边", "一只 cat 在海边"),
    ("猫1", "一只猫1在海边", "一只 cat 在海边"),
]
"""Token, prompt and the prompt with "cat" in the token's place."""


@pytest.mark.parametrize(("token", "prompt", "hard"), WITHOUT_BLANKS)
def test_placeholders_are_contained_in_scripts_without_blanks(tokenizer, token, prompt, hard):
    check_prompts([prompt], [token])
    assert put_words(prompt, {token: "cat"}) == hard
    assert inside(tokenizer.encode([prompt], {token: 1})[0]).count(CONCEPT) == 1
    np.testing.assert_array_equal(tokenizer.encode([prompt], words={token: "cat"}), tokenizer.encode([hard]))


@pytest.mark.parametrize(
    ("token", "prompt"), [("sks", "一只masks在海边"), ("猫1", "一只猫12"), ("кот", "котик"), ("sks", "sksé")]
)
def test_letters_of_scripts_with_blanks_still_hide_a_placeholder(token, prompt):
    with pytest.raises(UserError, match="does not contain"):
        check_prompts([prompt], [token])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_exported_pipeline_has_the_same_placeholders():
    import runpy

    package = Path(datencoder_jax.__file__).parent
    concept = runpy.run_path(str(package / "assets" / "diffusers" / "pipeline.py"))["Concept"]
    for token, prompt, hard in WITHOUT_BLANKS:
        assert concept(token, "cat", 0.5, None).in_words(prompt) == hard
        assert concept(token, "cat", 0.5, None).placeholder.pattern == placeholder(token).pattern


def test_good_prompts_pass():
    check_prompts(["a photo of S*", "S*'s house", "T* at home"], ["S*", "T*"])
    check_prompts(["a robot"])


KNOWN = ("a", "red", "robot", "on", "the", "beach")


@pytest.fixture
def known():
    mask = np.zeros(len(VOCABULARY), bool)
    mask[[VOCABULARY[f"{word}</w>"] for word in KNOWN]] = True
    return mask


def test_words_that_mean_nothing_are_found(tokenizer, known):
    def unknown(*texts, placeholders=()):
        return tokenizer.unknown_words(texts, known, placeholders)

    assert unknown("a unicorn on mars", "a Unicorn, a unicorn") == ["unicorn", "mars", "Unicorn"]
    assert unknown("A red robot, on the beach!", "") == []
    assert unknown("2 robots", "the robot's cat") == ["2", "robots", "robot's", "cat"]
    assert unknown("a S* on the <moon>", placeholders=("S*", "<moon>")) == []
    assert unknown("一只猫") == ["一只猫"]
    assert tokenizer.words_of(known) == sorted(KNOWN)


@pytest.mark.filterwarnings("always:.*was trained without some words:UserWarning")
def test_drawing_warns_of_them(pipeline, known, recwarn):
    mask = np.zeros(pipeline.tokenizer.vocab_size, bool)
    mask[[pipeline.tokenizer.word_id(word) for word in KNOWN]] = True
    chosen = dataclasses.replace(pipeline, known_tokens=mask)

    def draw(pipeline, prompt, **options):
        with pytest.raises(UserError, match="number of pictures"):
            generate(pipeline, [prompt], num=0, **options)
        return [str(warning.message) for warning in recwarn.list]

    assert draw(pipeline, "a unicorn on mars") == []
    assert draw(chosen, "a red robot") == draw(chosen, "a unicorn", quiet=True) == draw(chosen, "a S*") == []
    (sentence,) = draw(chosen, "a unicorn on mars", negative="a cat")
    assert "(unicorn, mars, cat)" in sentence and sentence.startswith(pipeline.name)


@pytest.mark.filterwarnings("always:.*was trained without some words:UserWarning")
def test_the_embedded_models_words_are_listed(capsys, tmp_path):
    assert main(["info", "--words"]) == 0
    words = capsys.readouterr().out.split()
    assert {"robot", "watercolor", "watercolour", "snow", "a"} <= set(words) and "cat" not in words and len(words) == 54
    argv = ["--num", "1", "--sampling-steps", "1", "--out", str(tmp_path / "o")]
    assert main(["generate", "--prompt", "a unicorn on mars", *argv]) == 0
    assert "warning: toyworld was trained without some words of the prompts (unicorn, mars)" in capsys.readouterr().err
    assert main(["generate", "--prompt", " ".join(words[:25]), *argv]) == 0
    assert "without some words" not in capsys.readouterr().err
    assert main(["info", "--words", "x.safetensors"]) == 2
