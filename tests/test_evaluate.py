"""`datencoder evaluate` on the embedded world's individuals, with a tiny model: units, going on, failures, numbers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from cli_helpers import fails
from evaluate_helpers import evaluate, forget, metrics_of, model, row_of  # noqa: F401
from PIL import Image

from datencoder_jax.benchmark import making, run, units
from datencoder_jax.benchmark.entries import Row, make_rows, parse_entries, parse_steps, slug
from datencoder_jax.benchmark.making import make, unit_seed
from datencoder_jax.benchmark.suites import Setup, Subject
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation import suite
from datencoder_jax.evaluation.judge import load_judge
from datencoder_jax.toyworld.captions import EVALUATION_CONTEXTS_8
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates

METHODS = "base,lora:rank=2,datencoder,e4t"
NAMES = ("creature-1100004", "robot-1100005")
ASKED = ["--suite", "toyworld", "--instances", "2", "--seeds", "2", "--steps", "0,2", "--methods", METHODS]


@pytest.fixture(scope="module")
def ran(model, tmp_path_factory):  # noqa: F811
    """A run in which one method fails, for want of an encoder of its own."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert evaluate(model, out, *ASKED) == 0
    return out


def pictures(out, *place):
    with np.load(out.joinpath("units", *place)) as file:
        return file["pictures"]


# what is asked for


def test_entries_are_methods_with_options_and_steps():
    texts = ["datencoder:start=word,blend=1@0+12,lora", "perfusion:lock=global,gate=0.6/0.1", "base"]
    first, lora, perfusion, base = parse_entries(texts)
    assert (first.label, first.method, first.steps) == ("datencoder:start=word,blend=1", "datencoder", (0, 12))
    assert first.options == {"start": "word", "blend": 1.0}
    assert (lora.label, lora.options, lora.steps) == ("lora", {}, None)
    assert perfusion.options == {"lock": "global", "gate": (0.6, 0.1)}
    rows = make_rows([first, lora, base], parse_steps("4,50"))
    assert [row.name for row in rows][1:] == ["datencoder:start=word,blend=1@12", "lora@4", "lora@50", "base@0"]
    assert len({row.slug for row in rows}) == 5 and not any(set(row.slug) & set(":,/ ") for row in rows)


def test_rows_are_read_back_whatever_their_labels_hold():
    rows = make_rows(parse_entries(["e4t:encoder=runs/enc@2024@0+12", "datencoder:encoder=enc@v2@12", "base"]), (0,))
    assert [row.name for row in rows][:2] == ["e4t:encoder=runs/enc@2024@0", "e4t:encoder=runs/enc@2024@12"]
    back = units.rows_of({row.name: {"steps": row.steps, "rates": list(row.rates)} for row in rows})
    assert [(row.name, row.entry.options, row.rates) for row in back] == [
        (row.name, row.entry.options, row.rates) for row in rows
    ]
    long = "x" * 240
    assert slug("robot_1") == "robot_1" and slug(long) != slug(f"{long}x") and len(slug(long)) < 100


def test_rates_of_an_entry_are_its_own_or_the_methods_and_0_where_a_part_is_off():
    plain, own, off = parse_entries(["datencoder", "lora:rates=0/3e-3", "datencoder:offsets=off"])
    assert plain.rates == (3.2e-3, 1e-2) and own.rates == (0.0, 3e-3) and off.rates == (3.2e-3, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "'lorra' of --methods is not known"),
        ("lora:ranks=2", "lora takes no option 'ranks'"),
        ("lora:rank=two", "is 'two', not a whole number of 1 or more"),
        ("lora:blend=1.5", "a number from 0 to 1"),
        ("lora:rates=1e-3", "two learning rates"),
        ("datencoder:offsets=no", "on or off"),
        ("perfusion:lock=both", "one of"),
        ("datencoder:gains=2", "gains of cross-attention's values and of self-attention"),
        ("base:rank=2", "base takes no option"),
        ("lora@12,lora@300", "names lora twice"),
        ("lora@12+x", "'12+x'"),
        (" ,", "names no method"),
    ],
)
def test_mistakes_in_entries_are_told(text, said):
    with pytest.raises(UserError, match=said.replace("+", r"\+")):
        parse_entries([text])


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "4,4", "many"])
def test_mistakes_in_steps_are_told(text):
    with pytest.raises(UserError, match="whole numbers"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "coco", "--methods", "lora"], "no suite and no folder coco"),
        (["--suite", "dreambench", "--methods", "lora"], "--data"),
        (["--suite", "toyworld", "--data", "x", "--methods", "lora"], "--data goes with"),
        (["--suite", "toyworld", "--dino", "x", "--methods", "lora"], "--clip and --dino score photographs"),
        (["--suite", ".", "--methods", "lora", "--sweep", "2"], "--sweep chooses rates on development individuals"),
        (
            ["--suite", "toyworld", "--split", "development", "--methods", "lora", "--sweep", "2"],
            "for a table of its test",
        ),
        (["--suite", "toyworld", "--methods", "lora", "--sweep", "2", "--rates", "x"], "leave one of them out"),
        (["--suite", "toyworld", "--methods", "lorra"], "not known"),
        (["--suite", "toyworld", "--methods", "lora", "--steps", "x"], "--steps is 'x'"),
        (["--suite", "toyworld", "--methods", "lora", "--rates", "none.json"], "no file of learning rates"),
    ],
)
def test_mistakes_in_options_are_told_at_once(argv, said, tmp_path, capsys):
    fails(capsys, said, "evaluate", *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# what is written


def test_every_unit_has_a_file_or_says_why_not(ran):
    files = {path.relative_to(ran / "units").parent.as_posix() for path in ran.glob("units/**/*.npz")}
    assert {name.partition("-")[0] for name in files} == {"base/0", "datencoder/0", "datencoder/2", "lora_rank=2"}
    errors = list(ran.glob("units/e4t/*/*.error.txt"))
    assert len(errors) == 8 and "e4t starts from an E4T encoder" in errors[0].read_text()
    assert pictures(ran, "datencoder", "2", "creature-1100004-1.npz").shape == (8, 1, 16, 16, 3)


def test_numbers_are_those_of_the_pictures(ran):
    content = metrics_of(ran)
    bench = suite.make_bench(suite.instances("test", 2), EVALUATION_CONTEXTS_8, size=16)
    judge = load_judge()
    drawn = [pictures(ran, "datencoder", "2", f"{name}-{seed}.npz") for name in NAMES for seed in (0, 1)]
    cells = suite.score(bench, judge, suite.references(bench, judge), [0, 0, 1, 1], np.stack(drawn))
    row = row_of(content, "datencoder", 2)
    for name, value in cells.items():
        np.testing.assert_allclose(row["values"][name], value.reshape(2, -1).mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(row["by_prompt"][name], value.mean(axis=(0, 2)), atol=1e-5)
    np.testing.assert_allclose(
        row["values"]["product"], np.multiply(row["values"]["identity"], row["values"]["prompt"]), atol=1e-5
    )
    assert content["axes"] == {"identity": "identity", "prompt": "prompt"} and content["settings"]["seeds"] == [0, 1]
    assert set(content["scores"]) == {*cells, "product"} == set(row["values"])
    assert [subject["name"] for subject in content["subjects"]] == ["creature 1100004", "robot 1100005"]
    assert {"predict", "tune", "draw"} == set(row["seconds"]) and row["bytes"] > 1000 and row["trained"] > 100
    assert row_of(content, "datencoder", 0)["trained"] == 0
    [device] = row["devices"]
    assert jax.default_backend() != "cpu" or re.fullmatch(r"\d+ cores? of a CPU", device)
    assert row_of(content, "the input picture itself")["values"]["prompt"] == pytest.approx([0, 0], abs=0.2)


def test_a_failing_method_is_a_row_of_nothing(ran):
    content = metrics_of(ran)
    row = row_of(content, "e4t", 2)
    assert row["values"]["identity"] == [None, None] and row["pictures"] is None
    assert [(each["subject"], each["seed"]) for each in row["failed"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all("E4T" in each["error"] for each in row["failed"])
    assert all(not each.get("failed") for each in content["rows"] if each["label"] != "e4t")


def test_sheets_are_tiles_without_gaps(ran):
    content = metrics_of(ran)
    assert content["tiles"] == {"side": 16, "subjects": [0, 1], "prompts": list(range(8))}
    sheet = np.asarray(Image.open(ran / row_of(content, "datencoder", 2)["pictures"]))
    drawn = [pictures(ran, "datencoder", "2", f"{name}-0.npz")[:, 0] for name in NAMES]
    np.testing.assert_array_equal(sheet, np.concatenate([np.concatenate(list(row), axis=1) for row in drawn]))
    assert np.asarray(Image.open(ran / content["inputs"])).shape == (16, 32, 3)


def test_all_methods_see_the_same_noise(ran):
    """Before its first step LoRA is the base model, so its pictures are the base model's under the class word."""
    for name in NAMES:
        [lora] = [path.parent.name for path in ran.glob("units/lora_rank=2-*/0")]
        np.testing.assert_array_equal(
            pictures(ran, lora, "0", f"{name}-1.npz"), pictures(ran, "base", "0", f"{name}-1.npz")
        )
    assert (pictures(ran, "base", "0", f"{NAMES[0]}-1.npz") != pictures(ran, "base", "0", f"{NAMES[0]}-0.npz")).any()
    who = Subject("creature 1", "creature")
    assert len({unit_seed(who, 0), unit_seed(who, 1), unit_seed(Subject("robot 1", "robot"), 0)}) == 3


# going on


def test_a_rerun_does_what_is_missing_and_no_more(ran, model):  # noqa: F811
    files = sorted(ran.glob("units/**/*.npz"))
    lost, kept = files[::3], [file for file in files if file not in files[::3]]
    before = {file: pictures(ran, file) for file in lost}
    times = {file: file.stat().st_mtime_ns for file in kept}
    numbers = {row["label"]: row["values"] for row in metrics_of(ran)["rows"]}
    for file in lost:
        file.unlink()
    (ran / "metrics.json").unlink()
    assert evaluate(model, ran, *ASKED) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == times
    for file, old in before.items():
        np.testing.assert_array_equal(pictures(ran, file), old)
    assert {row["label"]: row["values"] for row in metrics_of(ran)["rows"]} == numbers


def test_other_settings_are_refused_by_name(ran, model, capsys):  # noqa: F811
    capsys.readouterr()
    for name, old, new in (("num", 1, 2), ("instances", 2, 3)):
        assert evaluate(model, ran, *ASKED, f"--{name}", new) == 2
        assert f"{name} was {old} and is now {new}" in capsys.readouterr().err
    rates = ran / "other.json"
    rates.write_text(json.dumps({"format": "datencoder-rates", "chosen": {"datencoder@2": [0.5, 0.5]}, "tried": {}}))
    assert evaluate(model, ran, *ASKED, "--rates", rates) == 2
    assert "rates of datencoder@2 was [0.0032, 0.01] and is now [0.5, 0.5]" in capsys.readouterr().err


def test_what_failed_is_tried_again_when_asked(ran, model, capsys):  # noqa: F811
    [first, *_] = sorted(ran.glob("units/e4t/0/*.error.txt"))
    first.write_text("it was a bad day\n")
    again = ["--suite", "toyworld", "--instances", "2", "--seeds", "2", "--methods", "e4t@0"]
    assert evaluate(model, ran, *again) == 0 and first.read_text() == "it was a bad day\n"
    assert evaluate(model, ran, *again, "--retry-failed") == 0 and "E4T" in first.read_text()
    # A result counts, though whoever wrote it was killed before the sentence was gone.
    row, name, seed = make_rows(parse_entries(["e4t@0"]), ())[0], *first.name.removesuffix(".error.txt").rsplit("-", 1)
    unit = units.Unit(ran, row, 0, name, int(seed))
    assert unit.error_file == first and unit.error
    unit.file.touch()
    assert unit.error is None and unit.done
    unit.file.unlink()


def test_what_then_succeeds_is_counted(model, tmp_path, monkeypatch):  # noqa: F811
    """Under both seeds of a subject, so that as many units have been tried as before."""
    broken, real = [NAMES[1]], run.make

    def make(setup, row, subject, seed):
        if making.open_suite(setup).subjects[subject].name.replace(" ", "-") in broken:
            raise UserError("it was a bad day")
        return real(setup, row, subject, seed)

    monkeypatch.setattr(run, "make", make)
    asked = ["--suite", "toyworld", "--instances", "2", "--methods", "base", "--seeds", "2"]
    assert evaluate(model, tmp_path, *asked) == 0
    row = row_of(metrics_of(tmp_path), "base model, class word")
    assert [each["error"] for each in row["failed"]] == ["it was a bad day"] * 2
    broken.clear()
    assert evaluate(model, tmp_path, *asked, "--retry-failed") == 0
    row = row_of(metrics_of(tmp_path), "base model, class word")
    assert not row["failed"] and None not in row["values"]["identity"]


def test_one_label_does_not_stand_for_two_encoders(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    asked = ["--suite", "toyworld", "--instances", "1", "--seeds", "1", "--methods"]
    assert evaluate(model, tmp_path, *asked, "datencoder@0") == 0
    before = row_of(metrics_of(tmp_path), "datencoder", 0)["made_with"]
    monkeypatch.setattr(units, "_identity", lambda params: "another")
    assert evaluate(model, tmp_path, *asked, "datencoder@1") == 2
    assert f'encoder of datencoder@0 was "{before["encoder"]}" and is now "another"' in capsys.readouterr().err
    # A run that does not name the method leaves its row as it was made.
    assert evaluate(model, tmp_path, *asked, "base") == 0
    assert row_of(metrics_of(tmp_path), "datencoder", 0)["made_with"] == before


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_damaged_results_are_told(ran, model, tmp_path, capsys, content):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(ran, out)
    file = out / "units" / "base" / "0" / f"{NAMES[0]}-0.npz"
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    capsys.readouterr()
    assert evaluate(model, out, *ASKED) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


def test_interrupted_it_shows_what_there_is(ran, model, tmp_path, monkeypatch, capsys):  # noqa: F811
    units = []

    def do(setup, unit):
        if units:
            raise KeyboardInterrupt
        units.append(unit)
        unit.file.parent.mkdir(parents=True)
        shutil.copy(ran / "units" / "base" / "0" / f"{unit.name}-0.npz", unit.file)

    monkeypatch.setattr(run, "do", do)
    asked = ["--suite", "toyworld", "--instances", "2", "--methods", "base", "--seeds", "1"]
    assert evaluate(model, tmp_path, *asked) == 130 and "interrupted" in capsys.readouterr().err
    row = row_of(metrics_of(tmp_path), "base model, class word")
    assert row["unfinished"] == 1 and row["values"]["identity"][0] is not None and row["values"]["identity"][1] is None


def test_killed_at_any_moment_it_goes_on(ran, model, tmp_path):  # noqa: F811
    """A real SIGKILL, while two processes work: they end too, what is there is whole, and the rest is made."""
    out = tmp_path / "out"
    asked = ["--suite", "toyworld", "--instances", "2", "--methods", "base", "--seeds", "2"]
    argv = ["evaluate", *asked, *model, "--sampling-steps", "2", "--draws", "2", "--out", str(out), "--jobs", "2"]
    code = f"import sys; from datencoder_jax.cli import main; sys.exit(main({argv!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("units/**/*.npz")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while _alive(process.pid):
            assert time.monotonic() < deadline, "the processes of --jobs went on without the one that started them"
            time.sleep(0.1)
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    done = {file: file.stat().st_mtime_ns for file in out.glob("units/**/*.npz")}
    assert done and not (out / "metrics.json").exists()
    assert evaluate(model, out, *asked) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    for name in NAMES:
        for seed in (0, 1):
            place = ("base", "0", f"{name}-{seed}.npz")
            np.testing.assert_array_equal(pictures(out, *place), pictures(ran, *place))
    assert row_of(metrics_of(out), "base model, class word")["unfinished"] == 0


def _alive(group):
    """Whether any process of a group is there and not a zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return any(line.strip() and not line.startswith("Z") for line in done.stdout.splitlines())


# the parts of the encoder's method


@pytest.mark.parametrize("start", ["encoder", "word"])
@pytest.mark.parametrize("part", ["offsets", "embeddings"])
def test_parts_that_are_off_stay_off(model, start, part):  # noqa: F811
    setup = Setup("toyworld", instances=2, model=model[1], encoder=model[3], draws=2)
    [entry] = parse_entries([f"datencoder:start={start},{part}=off"])
    row = Row(entry, 2, LearningRates(*(1e-2 if rate else 0.0 for rate in entry.rates)))
    pipeline, world = making.open_pipeline(setup), making.open_suite(setup)
    concept = making._personalize(setup, pipeline, row, world.given(0), world.subjects[0], 0).concept
    word = np.asarray(pipeline.base.table[pipeline.tokenizer.word_id(concept.nearest_word)], np.float32)
    moved = {
        "offsets": any(np.asarray(offset.up).any() for offset in concept.offsets.values()),
        "embeddings": not np.allclose(concept.embeddings[0], word),
    }
    assert moved == {"offsets": True, "embeddings": True} | {part: False}
    if start == "word":
        assert concept.nearest_word == "creature"


def test_encoders_that_are_compared_share_one_base_model(model):  # noqa: F811
    setup = Setup("toyworld", instances=2, model=model[1], encoder=model[3])
    pipeline, another = making.open_pipeline(setup), making.open_pipeline(setup, f"{model[3]}/.")
    assert another.base is pipeline.base and another.encoder is not pipeline.encoder
    for index in range(8):
        making.open_pipeline(setup, model[3] + "/." * (index + 2))
    assert making.open_pipeline.cache_info().currsize <= 2  # encoders come and go


def test_gains_are_those_of_an_entry_where_it_names_some(model):  # noqa: F811
    setup = Setup("toyworld", instances=2, model=model[1], encoder=model[3], draws=2)
    named = ["datencoder", "datencoder:gains=1/1", "datencoder:gains=0/0", "datencoder:gains=0/0,embeddings=off"]
    rows = make_rows(parse_entries(named), (0, 1))
    drawn = {row.name: make(setup, row, 0, 0).pictures for row in rows}
    np.testing.assert_array_equal(drawn["datencoder:gains=1/1@0"], drawn["datencoder@0"])
    np.testing.assert_array_equal(drawn["datencoder:gains=0/0@1"], drawn["datencoder@1"])
    assert (drawn["datencoder:gains=0/0@0"] != drawn["datencoder@0"]).any()
    told = {row.name: units.of_row(setup, row).get("gains") for row in rows}
    assert told["datencoder@0"] == [1.0, 1.0] and told["datencoder:gains=0/0@0"] == [0.0, 0.0]
    assert told["datencoder@1"] is None


def test_options_of_tuning_reach_it(model):  # noqa: F811
    setup = Setup("toyworld", instances=2, model=model[1], encoder=model[3], draws=2)
    pipeline = making.open_pipeline(setup)
    text = "draws=3,views=5,crop=0.5,flip=off,norm_weight=0.25,momentum=0.5,remat=on"
    [row] = make_rows(parse_entries([f"lora:{text}@2"]), (2,))
    config = making._config(setup, pipeline, row, 1)
    expected = TuningConfig(draws=3, views=5, crop=0.5, flip=False, norm_weight=0.25, momentum=0.5, remat=True)
    assert config == replace(expected, scan_layers=pipeline.memory.scan_layers)


def test_the_shipped_encoder_personalizes():
    """On four development instances: what would break if an asset did not fit."""
    setup = Setup("toyworld", split="development", instances=4, sampling_steps=12)
    world, means = making.open_suite(setup), {}
    for row in make_rows(parse_entries(["base", "datencoder"]), (0, 12)):
        made = [make(setup, row, subject, 0).pictures for subject in range(4)]
        means[row.name] = {name: value.mean() for name, value in world.score(range(4), made).items()}
    assert means["datencoder@0"]["identity"] > means["base@0"]["identity"] + 0.1
    assert means["datencoder@12"]["identity"] > means["base@0"]["identity"] + 0.2
    assert means["datencoder@12"]["scene"] > 0.8 and means["datencoder@12"]["style"] > 0.8
