"""Reports of what is small, unfinished, failed or damaged, and where labels go."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from report_helpers import Page, texts

from datencoder_jax.benchmark.report import write_report
from datencoder_jax.benchmark.report.labels import clear, spread
from datencoder_jax.benchmark.report.results import read_results
from datencoder_jax.errors import UserError


def small(folder, **changes):
    """Writes metrics.json of two methods on three subjects, with nothing that is optional."""
    rng = np.random.default_rng(0)
    rows = [
        {"kind": "method", "label": label, "steps": steps, "values": {"CLIP-I": list(rng.random(3))}}
        for label, steps in (("lora", 12), ("lora", 300), ("para", 12))
    ]
    content = {
        "format": "datencoder-evaluation",
        "version": 1,
        "scores": {"CLIP-I": {}},
        "subjects": [{"name": f"dog {k}"} for k in range(3)],
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content | changes))
    return content


def test_without_matplotlib_there_is_a_report_that_says_so(tmp_path, monkeypatch):
    small(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text("utf-8")
        assert "datencoder_jax[report]" in text.replace("\\", "") and "lora" in text
    assert "svg" not in Page((tmp_path / "report.html").read_text("utf-8")).names


@pytest.mark.parametrize("subjects", [1, 3])
def test_what_is_optional_may_be_missing(tmp_path, subjects):
    content = small(tmp_path)
    for one in content["rows"]:
        one["values"] = {name: values[:subjects] for name, values in one["values"].items()}
        one["pictures"] = "pictures/gone.png"
    tiles = {"side": 8, "subjects": [0], "prompts": [0]}
    small(tmp_path, rows=content["rows"], subjects=content["subjects"][:subjects], tiles=tiles)
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    mean, *rest = texts(page.table("scores")["lora", 300][0])
    assert mean == f"{np.mean(content['rows'][1]['values']['CLIP-I']):.3f}"
    assert len(rest) == (subjects > 1)  # one subject has no interval


def test_seconds_of_several_devices_are_told_apart(tmp_path):
    rows = small(tmp_path)["rows"]
    for one, devices in zip(rows, (["H200"], ["H200"], ["", "1 core of a CPU"]), strict=True):
        one |= {"seconds": {"tune": 1.0}, "devices": devices}
    small(tmp_path, rows=rows[:2])
    write_report(tmp_path)
    assert "compare within one device" not in (tmp_path / "report.md").read_text("utf-8")
    small(tmp_path, rows=rows)
    write_report(tmp_path)
    said = (tmp_path / "report.md").read_text("utf-8")
    assert "on H200: lora, 12 steps and lora, 300 steps" in said
    assert "on an unknown device and 1 core of a CPU: para, 12 steps." in said


def test_nothing_but_failures_is_a_report_too(tmp_path):
    content = small(tmp_path)
    for one in content["rows"]:
        one["values"] = {"CLIP-I": [None] * 3}
        one["failed"] = [{"subject": k, "seed": 0, "error": "out of memory"} for k in range(3)]
    content["rows"][0]["values"] = {}
    axes = {"identity": "CLIP-I", "prompt": "CLIP-T"}
    small(tmp_path, rows=content["rows"], axes=axes, groups={"in domain": [0, 1], "held out": [2]})
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    for table in ("scores", "group-0", "group-1"):
        assert texts(page.table(table)["para", 12][0]) == texts(page.table(table)["lora", 12][0]) == ["–"]
    assert texts(page.table("failures")["para", 12][1]) == ["out of memory"]
    assert not (tmp_path / "plots").exists()


def test_an_unfinished_run_says_so(tmp_path):
    content = small(tmp_path)
    content["rows"][2]["unfinished"] = 3
    for row in content["rows"]:
        row["values"]["CLIP-T"] = row["values"]["CLIP-I"]
    axes = {"identity": "CLIP-I", "prompt": "CLIP-T"}
    small(tmp_path, rows=content["rows"], scores={"CLIP-I": {}, "CLIP-T": {}}, axes=axes)
    write_report(tmp_path)
    drawn = ElementTree.parse(tmp_path / "plots" / "pareto.svg").getroot().itertext()
    assert {"12", "300", "12 (unfinished)"} <= {text.strip() for text in drawn}
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "The run is not finished: 3 units to come" in page.text
    assert [texts(page.table("costs")[key][-1]) for key in (("lora", 12), ("para", 12))] == [["0"], ["3"]]


@pytest.mark.parametrize(
    ("rows", "main"),
    [
        ([("lora", 12), ("datencoder", 4), ("datencoder", 12)], ("datencoder", 12)),
        ([("lora", 4), ("lora", 12), ("lora", 300), ("datencoder", 4)], ("lora", 12)),
        ([("lora", 4), ("lora", 50), ("para", 12)], ("lora", 50)),
        ([("datencoder", 4), ("datencoder", 50), ("lora", 12)], ("datencoder", 50)),
    ],
)
def test_the_row_that_others_are_compared_with(tmp_path, rows, main):
    made = [{"kind": "method", "label": a, "steps": b, "values": {"CLIP-I": [1.0] * 3}} for a, b in rows]
    failed = {"kind": "method", "label": "first", "steps": 12, "values": {"CLIP-I": [None] * 3}}
    small(tmp_path, rows=[failed, *made])
    found = read_results(tmp_path).main
    assert (found.label, found.steps) == main


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "There is no"),
        ({"format": "other"}, "not an evaluation's metrics"),
        ({"version": 2}, "has version 2"),
        ({"subjects": []}, "is damaged"),
        ({"groups": {"held out": [3]}}, "is damaged"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, said):
    if changes is not None:
        small(tmp_path, **changes)
    with pytest.raises(UserError, match=said) as error:
        write_report(tmp_path)
    assert "metrics.json" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_names_at_the_side_keep_their_distance():
    levels = np.array([50.0, 10.0, 51.0, 52.0, 90.0, 99.0])
    settled = spread(levels, gap=10, low=0, high=100)
    np.testing.assert_array_equal(np.argsort(settled), np.argsort(levels))
    assert np.diff(np.sort(settled)).min() >= 10 - 1e-9 and settled.min() >= 0 and settled.max() <= 100
    np.testing.assert_allclose(settled, [41.0, 10.0, 51.0, 61.0, 89.5, 99.5])


def test_labels_cover_neither_one_another_nor_points():
    anchors = np.array([[100.0, 100.0], [104.0, 102.0], [100.0, 106.0]])
    sizes = np.array([[40.0, 10.0]] * 3)
    centres = clear(anchors, sizes, anchors, (0, 0, 300, 300))
    for k in range(3):
        assert not np.any(np.all(np.abs(anchors - centres[k]) < sizes[k] / 2, axis=1))
        for other in range(k):
            assert np.any(np.abs(centres[k] - centres[other]) >= sizes[k])
