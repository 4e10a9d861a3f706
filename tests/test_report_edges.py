"""Reports of what is small, unfinished, failed or damaged, and where labels go."""

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from report_helpers import Page, texts

from datencoder_jax.benchmark.learning_rates import RateChoice
from datencoder_jax.benchmark.report import write_report
from datencoder_jax.benchmark.report.labels import clear, spread
from datencoder_jax.benchmark.report.results import read_results
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.scores import MIN_SUBJECTS


def small(folder, count=3, **changes):
    """Writes metrics.json of two methods on `count` subjects, with nothing that is optional."""
    rng = np.random.default_rng(0)
    rows = [
        {"kind": "method", "label": label, "steps": steps, "values": {"CLIP-I": list(rng.random(count))}}
        for label, steps in (("lora", 12), ("lora", 300), ("para", 12))
    ]
    content = {
        "format": "datencoder-evaluation",
        "version": 1,
        "scores": {"CLIP-I": {}},
        "subjects": [{"name": f"dog {k}"} for k in range(count)],
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


@pytest.mark.parametrize("subjects", [1, 2, MIN_SUBJECTS - 1, MIN_SUBJECTS])
def test_what_is_optional_may_be_missing(tmp_path, subjects):
    content = small(tmp_path, MIN_SUBJECTS)
    for one in content["rows"]:
        one["values"] = {name: values[:subjects] for name, values in one["values"].items()}
        one["pictures"] = "pictures/gone.png"
    tiles = {"side": 8, "subjects": [0], "prompts": [0]}
    small(tmp_path, MIN_SUBJECTS, rows=content["rows"], subjects=content["subjects"][:subjects], tiles=tiles)
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    mean, *rest = texts(page.table("scores")["lora", 300][0])
    assert mean == f"{np.mean(content['rows'][1]['values']['CLIP-I']):.3f}"
    assert len(rest) == (subjects >= MIN_SUBJECTS)  # fewer have no interval
    assert ("There are no intervals and no verdicts" in page.text) == (subjects < MIN_SUBJECTS)


@pytest.mark.parametrize("subjects", [1, 2, MIN_SUBJECTS - 1])
def test_few_subjects_have_no_verdicts_and_no_best(tmp_path, subjects):
    small(tmp_path, subjects, axes={"identity": "CLIP-I"})
    write_report(tmp_path)
    said = (tmp_path / "report.md").read_text("utf-8")
    tables = "\n".join(line for line in said.splitlines() if line.startswith("|"))
    assert tables and not any(word in tables for word in ("better", "worse", "undecided", "[", "≈"))
    assert "other rows" not in said
    small(tmp_path, MIN_SUBJECTS, axes={"identity": "CLIP-I"})
    write_report(tmp_path)
    assert "other rows" in (tmp_path / "report.md").read_text("utf-8")


def test_subjects_that_failed_are_not_counted(tmp_path):
    rows = small(tmp_path, 8)["rows"]
    rows[0]["values"]["CLIP-I"][:3] = [None] * 3  # the row that others are compared with
    small(tmp_path, 8, rows=rows, axes={"identity": "CLIP-I"})
    write_report(tmp_path)
    cells = Page((tmp_path / "report.html").read_text("utf-8")).table("differences")
    assert all(len(texts(row[0])) == 1 for row in cells.values())


def test_warnings_of_the_run_stand_in_its_report(tmp_path):
    small(tmp_path, warnings=["the model is a toy"])
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        assert "Warning: the model is a toy" in (tmp_path / name).read_text("utf-8")


def test_default_rates_have_no_verdict_and_unequal_choices_are_told(tmp_path):
    rows = small(tmp_path, 8)["rows"]
    choices = [("chosen", 12, 6), ("chosen", 4, 4), ("default", None, None)]
    for row, choice in zip(rows, choices, strict=True):
        row |= {"rates": [0.0, 1e-3], "rate_choice": RateChoice(*choice)._asdict()}
    small(tmp_path, 8, rows=rows, axes={"identity": "CLIP-I"})
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    cells = {key: [texts(cell) for cell in row] for key, row in page.table("differences").items()}
    assert cells["lora", 300][0][2] in ("better", "worse", "undecided")
    assert cells["lora", 300][1] == ["chosen on 4 individuals of 4 classes"]
    assert len(cells["para", 12][0]) == 2 and cells["para", 12][1] == ["defaults"]
    assert "rates from (lora, 12 steps: chosen on 12 individuals of 6 classes)" in page.text
    assert [texts(page.table("costs")[key][1]) for key in (("lora", 12), ("para", 12))] == [
        ["chosen on 12 individuals of 6 classes"],
        ["defaults"],
    ]
    said = (tmp_path / "report.md").read_text("utf-8")
    assert "There are no verdicts on para, 12 steps" in said and "no verdict on 1 of 2 other rows" in said


def test_goals_without_a_verdict_say_why(tmp_path):
    goal = {"text": "as good", "met": None, "numbers": "+0.1", "reason": "too few", "effort": "rates of a and b"}
    small(tmp_path, goals=[goal])
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        said = (tmp_path / name).read_text("utf-8")
        assert "– no verdict" in said and "no verdict: too few" in said and "rates of a and b" in said
        assert "✓ met" not in said and "✗ missed" not in said


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
