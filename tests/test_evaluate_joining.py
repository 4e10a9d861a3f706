"""Rows that another run measured, in the table of this one."""

import json
import shutil
from pathlib import Path

import pytest
from evaluate_helpers import evaluate, forget, metrics_of, model, row_of  # noqa: F401
from PIL import Image

from datencoder_jax.benchmark.joining import joined_rows, left_out
from datencoder_jax.benchmark.report.results import read_results

ASKED = ["--suite", "toyworld", "--instances", "2", "--seeds", "1", "--methods", "base"]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("ran") / "out"
    assert evaluate(model, out, *ASKED) == 0
    return out


@pytest.fixture
def ran(made, tmp_path):
    """A run that this one goes on with."""
    return Path(shutil.copytree(made, tmp_path / "ran"))


@pytest.fixture
def other(ran, tmp_path):
    """The metrics of a run somewhere else, with methods that this one has not."""
    content = metrics_of(ran)
    base = row_of(content, "base model, class word")
    made = {"kind": "method", "method": "lora", "label": "lora", "pictures": "pictures/lora.png"}
    seconds = {"predict": 0.0, "tune": 30.0, "draw": 1.0}
    content["rows"] += [base | made | {"steps": steps, "seconds": seconds} for steps in (12, 300)]
    content["rows"][0]["values"]["identity"] = [0.5, 0.5]  # of a row that this run has too
    content |= {"command": "datencoder evaluate elsewhere", "device": "abacus"}
    path = tmp_path / "there" / "metrics.json"
    (path.parent / "pictures").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(path.parent / "pictures" / "lora.png")
    path.write_text(json.dumps(content))
    return path


def test_rows_are_taken_as_they_are_and_own_rows_stay(ran, other, model):  # noqa: F811
    before = metrics_of(ran)
    assert evaluate(model, ran, *ASKED, "--join", other) == 0
    content = metrics_of(ran)
    assert content["rows"][: len(before["rows"])] == before["rows"]
    taken = content["rows"][len(before["rows"]) :]
    assert [(row["label"], row["steps"]) for row in taken] == [("lora", 12), ("lora", 300)]
    theirs = row_of(json.loads(other.read_text()), "lora", 300)
    assert row_of(content, "lora", 300) == theirs | {
        "joined": {"command": "datencoder evaluate elsewhere", "device": "abacus"}
    }
    with Image.open(ran / "pictures" / "lora.png") as sheet:
        assert sheet.size == (3, 3)
    report = read_results(ran)
    assert report.row("lora", 300).seconds == {} and report.row("lora", 300).bytes == theirs["bytes"]
    assert "lora, 12 steps: datencoder evaluate elsewhere, on abacus" in (ran / "report.md").read_text()
    # Joined again, it still says who measured it.
    again = other.parent.parent / "again"
    assert evaluate(model, again, *ASKED, "--join", ran / "metrics.json") == 0
    assert row_of(metrics_of(again), "lora", 12)["joined"]["device"] == "abacus"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subjects": []}, "its subjects is not that of this run"),
        ({"fingerprint": "0"}, "its fingerprint is not that of this run"),
        ({"settings": {"suite": "dreambench"}}, "its suite is not that of this run"),
        ({"settings": []}, "cannot be joined"),
    ],
)
def test_another_run_is_refused_before_anything_is_done(other, model, tmp_path, capsys, change, said):  # noqa: F811
    other.write_text(json.dumps(json.loads(other.read_text()) | change))
    out = tmp_path / "out"
    assert evaluate(model, out, *ASKED, "--join", other) == 2
    assert said in capsys.readouterr().err and not (out / "units").exists()


def test_what_is_no_table_is_refused(model, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "metrics.json"
    assert evaluate(model, tmp_path / "out", *ASKED, "--join", path) == 2
    assert f"There is no {path} to join" in capsys.readouterr().err
    path.write_text("{}")
    assert evaluate(model, tmp_path / "out", *ASKED, "--join", path) == 2
    assert "cannot be joined" in capsys.readouterr().err


def test_it_says_what_is_not_joined(ran, other, model, capsys):  # noqa: F811
    content = json.loads(other.read_text())
    content["rows"][-1]["made_with"] = {"encoder": "another"}
    other.write_text(json.dumps(content))
    assert evaluate(model, ran, *ASKED, "--join", other) == 0
    assert [row["steps"] for row in metrics_of(ran)["rows"] if row["label"] == "lora"] == [12]
    assert f"{other}: left out, as made with another encoder: lora@300" in capsys.readouterr().out


def row(label, steps, encoder=None, **more):
    return {"label": label, "steps": steps, "kind": "method", "values": {}, "made_with": {"encoder": encoder}, **more}


def test_a_method_is_not_joined_with_another_encoder(tmp_path):
    own = [row("datencoder", 12, "new")]
    theirs = [row("datencoder", 0, "old"), row("datencoder", 4, "new"), row("e4t", 12, "old"), row("datencoder", 12)]
    other = {"rows": theirs, "command": "there", "device": "abacus", "tiles": {}}
    found = joined_rows(own, {}, [(tmp_path / "metrics.json", other)], tmp_path)
    assert [(each["label"], each["steps"]) for each in found] == [("datencoder", 4), ("e4t", 12)]
    said = f"{tmp_path / 'metrics.json'}: left out, as made with another encoder: datencoder@0"
    assert left_out(own, [(tmp_path / "metrics.json", other)]) == [said]


def test_two_files_are_not_joined_with_two_encoders(tmp_path):
    others = [
        (tmp_path / name, {"rows": rows, "command": name, "device": "abacus", "tiles": {}})
        for name, rows in (
            ("first", [row("datencoder", 0, "old"), row("datencoder", 12, "old")]),
            ("second", [row("datencoder", 4, "new"), row("datencoder", 50, "old"), row("lora", 12)]),
        )
    ]
    found = joined_rows([], {}, others, tmp_path)
    assert [(each["label"], each["steps"]) for each in found] == [
        ("datencoder", 0),
        ("datencoder", 12),
        ("datencoder", 50),
        ("lora", 12),
    ]


def test_sheets_are_taken_where_they_show_the_same_and_from_nowhere_else(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "pictures").mkdir(parents=True)
    (there / "secret.png").write_bytes(b"secret")
    (there / "pictures" / "a.png").write_bytes(b"picture")
    rows = [row("a", 1, pictures="pictures/a.png"), row("b", 1, pictures="secret.png"), row("c", 1, pictures=None)]
    other = {"rows": rows, "command": "", "device": "", "tiles": {"side": 32}}
    found = joined_rows([], {"side": 32}, [(there / "metrics.json", other)], here)
    assert [each["pictures"] for each in found] == ["pictures/a.png", None, None]
    assert (here / "pictures" / "a.png").read_bytes() == b"picture" and len(list(here.rglob("*.png"))) == 1
    found = joined_rows([], {"side": 16}, [(there / "metrics.json", other)], tmp_path / "else")
    assert [each["pictures"] for each in found] == [None, None, None]
