"""The benchmark program on the shipped model: a row for each kind of method, rates swept, files written."""

import functools
import json

import jax
import numpy as np
import pytest

from datencoder_jax import api, benchmark
from datencoder_jax.evaluation.clip_scores import text_similarity
from datencoder_jax.evaluation.suite import Row, instances, make_bench, read_rows
from datencoder_jax.toyworld.captions import prompt_for
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.world import Context
from datencoder_jax.typing import LearningRates


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a run on one test instance, its learning rates swept on one development instance."""
    out = tmp_path_factory.mktemp("benchmark")
    options = ["--only", "base model", "v* off", "--sweep", "1", "--instances", "1", "--num", "1"]
    with jax.numpy_rank_promotion("allow"):
        benchmark.main([*options, "--out", str(out)])
    return out


def test_a_row_for_each_method_and_the_anchors(made):
    rows = {row.name: row for row in read_rows(made / "rows.json")}
    assert list(rows) == [
        "true picture, another seed",
        "another of its class",
        "base model, class word",
        "encoder + 12 steps, v* off",
    ]
    assert all("CLIP" in row.values and len(row.values["identity"]) == 1 for row in rows.values())
    lines = (made / "table.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(rows)


def test_rates_are_those_without_a_better_neighbour(made):
    name = "encoder + 12 steps, v* off"
    record = json.loads((made / "rates.json").read_text())
    quality = {trial["offsets"]: trial["quality"] for trial in record["tried"][name]}
    assert {trial["embeddings"] for trial in record["tried"][name]} == {0.0}
    for trial in record["tried"][name]:
        missing = max(0.0, 0.95 - 0.5 * (trial["scene"] + trial["style"]))
        assert trial["quality"] == pytest.approx(trial["identity"] - 5 * missing, abs=1e-3)
    [[_, chosen]] = record["chosen"].values()
    factor = benchmark._FACTORS.offsets
    for neighbour in (chosen * factor, chosen / factor):
        [near] = [value for rate, value in quality.items() if rate == pytest.approx(neighbour)]
        assert near <= quality[chosen]
    row = next(row for row in read_rows(made / "rows.json") if row.name == name)
    assert row.settings == {"steps": 12, "blend": None, "embeddings": 0.0, "offsets": chosen, "num": 1}


def test_rates_are_taken_from_a_file_and_rows_are_made_side_by_side(tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"chosen": {"encoder only (0 steps)": [0.25, 0.5]}}))
    options = ["--only", "base model", "encoder only", "--rates", str(rates), "--jobs", "2"]
    benchmark.main([*options, "--instances", "1", "--num", "1", "--out", str(tmp_path)])
    *_, base, encoder = read_rows(tmp_path / "rows.json")
    assert (base.name, encoder.name) == ("base model, class word", "encoder only (0 steps)")
    assert (encoder.settings["embeddings"], encoder.settings["offsets"]) == (0.25, 0.5)


def test_differences_are_paired():
    def row(name, values):
        scores = {score: np.array(values) for score in ("identity", "CLIP", "scene", "style")}
        return Row(name, scores, {})

    rows = [row("encoder + 12 steps", [0.5, 0.9]), row("base model, class word", [0.25, 0.65])]
    line = benchmark.comparison(rows)
    assert line.startswith("- encoder + 12 steps minus base model, class word: identity +0.250 [+0.250, +0.250], CLIP")
    assert benchmark.comparison(rows[:1]) == ""


@pytest.mark.parametrize("start", ["encoder", "class word"])
@pytest.mark.parametrize("part", ["offsets", "embeddings"])
def test_parts_that_are_off_stay_off(start, part):
    pipeline = api.load("toyworld")
    bench = make_bench(benchmark.load_judge(), instances("development", 1))
    rates = LearningRates(1e-2, 1e-2)
    producer = benchmark.Producer(pipeline, benchmark.Method("", start, 3, rates, **{part: False}), 1)
    concept = producer.personalize(bench.pictures[0], bench.instances[0].cls, 0)
    word = np.asarray(pipeline.base.table[pipeline.tokenizer.word_id(concept.nearest_word)], np.float32)
    moved = {
        "offsets": any(np.asarray(o.up).any() for o in concept.offsets.values()),
        "embeddings": not np.allclose(concept.embeddings[0], word),
    }
    assert moved == {"offsets": True, "embeddings": True} | {part: False}
    if start == "class word":
        assert concept.nearest_word == bench.instances[0].cls


def test_the_shipped_encoder_personalizes():
    """On six development instances, far from the intervals of the table: what would break if an asset did not fit."""
    pipeline = api.load("toyworld")
    bench = make_bench(benchmark.load_judge(), instances("development", 6))
    names = ("base model, class word", "encoder only (0 steps)", "encoder + 12 steps")
    methods = {method.name: method for method in benchmark.METHODS}
    base, encoder, tuned = (benchmark.run(pipeline, methods[name], bench, 1) for name in names)
    assert encoder.minus(base, "identity").mean > 0.1
    assert tuned.minus(base, "identity").mean > 0.2
    assert tuned.values["scene"].mean() > 0.85 and tuned.values["style"].mean() > 0.85


def test_clip_prefers_the_prompt_of_the_picture():
    pipeline = api.load("toyworld")
    one = instances("development", 6)
    pictures = render_batch([i.id for i in one], [Context("beach")] * 6, list(range(6)))
    score = functools.partial(text_similarity, pipeline)
    right = score(pictures, [prompt_for(Context("beach"), i.cls) for i in one])
    wrong = score(pictures, [prompt_for(Context("snow", style="sketch"), i.cls) for i in one])
    assert right.shape == (6,) and (right > wrong + 0.1).all()
