"""The toy world: purity, identity, captions that hide it, and a tokenizer with one token per word."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from datencoder_jax.toyworld import captions, dataset, tokenizer
from datencoder_jax.toyworld.render import coverage, render
from datencoder_jax.toyworld.world import (
    ACCESSORIES,
    CLASSES,
    COLOURS,
    HELD_OUT,
    PATTERNS,
    SCENES,
    SPLITS,
    STYLES,
    TRIMS,
    Context,
    Draws,
    Instance,
    contrast,
    sample_context,
)

DESCRIBING = {*COLOURS, *captions.PATTERN_WORDS.values(), "plain", "stripes", "dots", "checks"} - {""}


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest channel difference per pixel, int `[H, W]`."""
    return np.abs(a.astype(int) - b.astype(int)).max(-1)


def all_contexts() -> list[Context]:
    return [Context(*words) for words in itertools.product(SCENES, STYLES, ACCESSORIES, (1, 2))]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [32, 64])
def test_render_is_pure(style, size):
    one = render(Instance.from_id(7), Context("forest", style, "hat"), 3, size)
    render(Instance.from_id(8), Context("night"), 4, size)
    again = render(Instance.from_id(7), Context("forest", style, "hat"), 3, size)
    assert one.shape == (size, size, 3) and one.dtype == np.uint8
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != render(Instance.from_id(7), Context("forest", style, "hat"), 5, size).tobytes()


def test_every_class_renders_in_every_context():
    for cls, context in itertools.product(range(len(CLASSES)), all_contexts()):
        assert render(Instance.from_id(cls), context, 1, 16).std() > 5


def test_instances_are_balanced_pure_and_all_different():
    instances = [Instance.from_id(k) for k in range(120)]
    assert [i.cls for i in instances] == list(CLASSES) * 20
    assert instances[5] == Instance.from_id(np.int32(5))
    assert len({render(i, Context(), 0).tobytes() for i in instances}) == len(instances)
    for i in instances:
        assert len({i.main, i.second, i.accent}) == 3 and contrast(i.main, i.second) > 100
    assert {i.pattern for i in instances} == set(PATTERNS) and {i.trim for i in instances} == set(TRIMS)
    assert {i.main for i in instances} == set(COLOURS)


@pytest.mark.parametrize("count", [1, 2])
def test_coverage_is_where_individuals_differ(count):
    """Two of a class, one main colour apart, differ where the individual is and nowhere else."""
    context = Context("forest", accessory="hat", count=count)
    red = dataclasses.replace(Instance.from_id(0), main="red", second="white", accent="yellow", pattern="plain")
    blue = dataclasses.replace(red, main="blue")
    covered = coverage(red, context, 3, 64)
    assert covered.shape == (64, 64) and covered.min() == 0.0 and covered.max() == 1.0
    np.testing.assert_array_equal(covered, coverage(blue, context, 3, 64))
    apart = np.abs(render(red, context, 3, 64).astype(int) - render(blue, context, 3, 64)).max(axis=-1)
    assert apart[covered == 0.0].max() == 0
    assert (covered > 0.5)[apart > 100].all() and (apart > 100).sum() > 0.3 * (covered > 0.5).sum()


def test_splits_are_disjoint_and_held_out_class_exists():
    for a, b in itertools.combinations(SPLITS.values(), 2):
        assert a.stop <= b.start or b.stop <= a.start
    assert set(HELD_OUT) < set(CLASSES)


@pytest.mark.parametrize("cls", range(len(CLASSES)))
def test_attributes_are_visible(cls):
    base = dataclasses.replace(
        Instance.from_id(cls), main="red", second="white", accent="blue", pattern="plain", trim="none"
    )
    picture = render(base, Context(), 0)
    changes = {"main": ("green", 100), "second": ("cyan", 8), "accent": ("yellow", 8), "pattern": ("dots", 25)}
    for name, (value, pixels) in {**changes, "trim": ("star", 10)}.items():
        changed = difference(picture, render(dataclasses.replace(base, **{name: value}), Context(), 0)) > 50
        assert changed.sum() >= pixels, f"{base.cls}: {name} changes only {changed.sum()} pixels"
        assert not changed[:2].any(), "attributes belong to the object, not to the frame's edge"
    for a, b in itertools.combinations(PATTERNS, 2):
        one, two = (render(dataclasses.replace(base, pattern=p), Context(), 0) for p in (a, b))
        assert (difference(one, two) > 50).sum() >= 20, f"{base.cls}: {a} and {b} look alike"


def test_scenes_styles_and_accessories_are_distinct():
    instance = Instance.from_id(1)
    for values, make, pixels in (
        (SCENES, lambda v: Context(scene=v), 250),
        (STYLES, lambda v: Context("forest", style=v), 200),
        (ACCESSORIES, lambda v: Context(accessory=v), 15),
    ):
        pictures = {v: render(instance, make(v), 0) for v in values}
        for a, b in itertools.combinations(values, 2):
            assert (difference(pictures[a], pictures[b]) > 40).sum() > pixels, f"{a} and {b} look alike"


def test_context_rejects_unknown_words():
    with pytest.raises(ValueError, match="scene must be one of"):
        Context(scene="moon")


def test_prompts_with_a_placeholder_never_describe_it():
    for context in all_contexts():
        prompt = captions.prompt_for(context)
        assert prompt.count("S*") == 1
        for phrase in captions.ACCESSORY_PHRASES[context.accessory]:  # "a red hat" is about the hat
            prompt = prompt.replace(phrase, "") if phrase else prompt
        assert not DESCRIBING & set(prompt.split())
    assert captions.prompt_for(Context("snow", accessory="hat")) == "a photo of a S* wearing a red hat in the snow"
    assert captions.prompt_for(Context("city", "sketch"), "orange S*") == "a pencil sketch of an orange S* in the city"
    assert len(set(captions.EVALUATION_CONTEXTS)) == 4


def test_captions_name_the_class_and_only_sometimes_describe():
    described = 0
    for k in range(2000):
        instance, context = Instance.from_id(k), sample_context(Draws(k, 1))
        text = captions.caption(instance, dataclasses.replace(context, accessory="none"), k)
        assert text == captions.caption(instance, dataclasses.replace(context, accessory="none"), k)
        assert instance.cls in re.findall(r"\w+", text)
        described += bool(DESCRIBING & set(re.findall(r"\w+", text)))
        assert not ({instance.second, instance.accent} & set(text.split()))
    assert 0.2 < described / 2000 < 0.35


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def test_every_word_is_one_token(clip_tokenizer):
    ids = clip_tokenizer(list(captions.VOCABULARY), add_special_tokens=False)["input_ids"]
    assert [w for w, i in zip(captions.VOCABULARY, ids, strict=True) if len(i) != 1] == []
    assert len({i[0] for i in ids}) == len(captions.VOCABULARY)
    assert 300 <= len(captions.VOCABULARY) <= 500


def test_captions_and_prompts_use_only_single_token_words(clip_tokenizer):
    texts = [captions.caption(Instance.from_id(k), c, k) for k, c in enumerate(all_contexts() * 4)]
    texts += [captions.prompt_for(c, "robot") for c in all_contexts()]
    for text, ids in zip(texts, clip_tokenizer(texts)["input_ids"], strict=True):
        assert len(ids) == len(re.findall(r"\w+|,", text)) + 2 <= tokenizer.MAX_LENGTH


def test_tokenizer_special_tokens_and_unknown_words(clip_tokenizer):
    vocab, _ = tokenizer.build()
    assert len(clip_tokenizer) == len(vocab)
    assert [vocab[tokenizer.START], vocab[tokenizer.END]] == [len(vocab) - 2, len(vocab) - 1]
    assert clip_tokenizer.pad_token_id == clip_tokenizer.eos_token_id == len(vocab) - 1
    assert clip_tokenizer.model_max_length == tokenizer.MAX_LENGTH
    out = clip_tokenizer("A Photo of xyzzyx – ünïcode", padding="max_length", truncation=True)["input_ids"]
    assert len(out) == tokenizer.MAX_LENGTH and out[0] == len(vocab) - 2
    known = clip_tokenizer("a photo of a robot")
    assert clip_tokenizer.decode(known["input_ids"], skip_special_tokens=True) == "a photo of a robot"


def test_prerender_is_a_function_of_split_and_seed():
    data = dataset.prerender("train", 40, size=32, seed=1, workers=1)
    more = dataset.prerender("train", 44, size=32, seed=1, workers=1)
    np.testing.assert_array_equal(data["images"], more["images"][:40])
    assert data["captions"] == more["captions"][:40]
    assert not np.array_equal(data["seed"], dataset.prerender("train", 40, seed=2, workers=1)["seed"])
    items = [dataset.sample_item("train", k, 1) for k in range(40)]
    again = dataset.render_batch([i.instance_id for i in items], [i.context for i in items], [i.seed for i in items])
    np.testing.assert_array_equal(data["images"], again)
    assert [Instance.from_id(i).labels()["pattern"] for i in data["instance_id"]] == data["pattern"].tolist()
    assert [i.context.labels()["scene"] for i in items] == data["scene"].tolist()


def test_prerender_does_not_depend_on_workers():
    alone = dataset.prerender("validation", 600, size=16, workers=1)
    shared = dataset.prerender("validation", 600, size=16, workers=2)
    np.testing.assert_array_equal(alone["images"], shared["images"])
    assert alone["captions"] == shared["captions"]
    assert set(alone["instance_id"].tolist()) <= set(SPLITS["validation"])


def test_prerender_keeps_to_the_classes_asked_for():
    kept = tuple(c for c in CLASSES if c not in HELD_OUT)
    data = dataset.prerender("test", 200, size=16, classes=kept, workers=1)
    assert {CLASSES[k] for k in data["class"]} == set(kept)
    assert set(data["instance_id"].tolist()) <= set(SPLITS["test"])
