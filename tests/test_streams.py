"""Streams of random draws: no two of them share a tag, but under the seeds of the shipped weights, which draw on."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from datencoder_jax.bookkeeping import SHIPPED_SEEDS
from datencoder_jax.toyworld.world import CLASSES, SPLITS, Draws, Instance, sample_context
from datencoder_jax.training import encoder_stage, judge, loop, pairs

DATA = SimpleNamespace(concepts=40, views=4, flat=0.7, template_share=0.25)


@pytest.fixture
def drawn(monkeypatch):
    """`concept_views` without a model, and the contexts that it draws."""
    contexts = []

    def render(ids, asked, seeds):
        contexts.append((ids[0], list(asked), list(seeds)))
        return np.zeros((len(ids), 2, 2, 3), np.uint8)

    monkeypatch.setattr(pairs, "render_batch", render)
    monkeypatch.setattr(pairs, "coverage", lambda *args: np.zeros((2, 2), np.float32))
    monkeypatch.setattr(pairs, "encode_latents", lambda vae, x: np.zeros((len(x), 1, 1, 4), np.float16))
    vae = SimpleNamespace(config=SimpleNamespace(factor=2))
    tokenizer = SimpleNamespace(encode=lambda texts, tokens: np.zeros((len(texts), 3), np.int32))
    pipeline = SimpleNamespace(base=SimpleNamespace(vae=vae), tokenizer=tokenizer)

    def run(seed, data=DATA):
        contexts.clear()
        pairs.concept_views(pipeline, "train", data, seed)
        return list(contexts)

    return run


TAGS = {"attributes": 0x1D, "captions": 0xCA9, "placement": 0x5EED, "paper": 0xA9, "the command": 0x9C, "inputs": 4}
"""Second words of the keys that the world draws with."""


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
def test_contexts_do_not_follow_from_what_is_drawn_elsewhere(drawn, tag):
    """Under a seed that is the tag of another stream they were functions of that: at 29, of the attributes."""
    for concept, contexts, _ in drawn(tag):
        other = Draws(int(concept), tag, count=256)
        assert contexts != [sample_context(other, flat=DATA.flat) for _ in contexts]


def test_contexts_are_not_a_function_of_the_attributes(drawn):
    """An instance's first colour and its first context's scene are the same share of their options at seed 29."""
    scenes = {colour: set() for colour in ("red", "blue", "white")}
    for concept, contexts, _ in drawn(29, SimpleNamespace(**vars(DATA) | {"concepts": 400})):
        if (main := Instance.from_id(int(concept)).main) in scenes:
            scenes[main].add(contexts[0].scene)
    assert min(len(found) for found in scenes.values()) >= 6


@pytest.mark.parametrize("seed", sorted(SHIPPED_SEEDS))
def test_the_seeds_of_shipped_weights_draw_what_they_drew(drawn, seed):
    ids = [i for i in SPLITS["train"] if CLASSES[i % len(CLASSES)] in CLASSES]
    chosen = np.random.default_rng(seed).choice(ids, size=DATA.concepts, replace=False)
    found = drawn(seed)
    assert [concept for concept, *_ in found] == chosen.tolist()
    for concept, contexts, seeds in found:
        draws = Draws(int(concept), seed, count=256)
        assert contexts == [sample_context(draws, flat=DATA.flat) for _ in range(DATA.views)]
        assert seeds == [int(draws.random() * 2**31) for _ in range(DATA.views)]


def test_many_views_do_not_come_round_again(drawn):
    (_, contexts, seeds), *_ = drawn(0, SimpleNamespace(**vars(DATA) | {"concepts": 1, "views": 120}))
    assert len(set(seeds)) == 120 and len(set(contexts[:60])) > 30 and contexts[:40] != contexts[51:91]


def test_what_is_chosen_is_not_what_batches_are_drawn_with():
    def first(rng):
        return rng.integers(2**31, size=4).tolist()

    for seed in (1, 2, 7, 29):
        assert first(pairs._choice_rng(seed)) != first(np.random.default_rng([seed, 0]))
    # NumPy takes a seed and the same seed with a zero behind for one.
    assert first(pairs._choice_rng(3)) == first(np.random.default_rng([3, 0]))


def test_the_views_of_the_judge_are_not_what_its_batches_are_drawn_with(monkeypatch):
    made = []
    real = np.random.default_rng
    monkeypatch.setattr(judge.np.random, "default_rng", lambda key: made.append(key) or real(key))
    monkeypatch.setattr(judge, "render_many", lambda ids, contexts, seeds, size, workers: np.zeros((len(ids), 2, 2, 3)))
    for split, seed in (("train", 3), ("validation", 0), ("train", 4), ("validation", 4)):
        judge.render_views(split, 2, 2, size=2, seed=seed)
    assert made[:2] == [[3, 0], [0, 1]] and all(len(key) == 3 and key[2] for key in made[2:])


@pytest.mark.parametrize("seed", [3, 4])
def test_fresh_weights_of_a_grown_encoder_share_no_draws_with_steps(monkeypatch, seed):
    keys = []
    monkeypatch.setattr(encoder_stage, "read_encoder", lambda *args: SimpleNamespace(params={}))
    task = SimpleNamespace(init=lambda key: keys.append(key) or {})
    encoder_stage._grown(task, _Config(initial="x", seed=seed), "", "")
    shipped = jax.random.key(seed)
    assert (keys[0] == shipped) == (seed in SHIPPED_SEEDS)
    assert (keys[0] == loop.initial_key(seed)) == (seed not in SHIPPED_SEEDS)


class _Config(SimpleNamespace):
    def get(self, name, default):
        return getattr(self, name, default)
