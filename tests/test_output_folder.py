"""What a run may replace in its output folder, and that one run at a time writes there. The models are fakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_helpers import nothing_left, refuses
from cli_helpers import fails
from PIL import Image

from datencoder_jax import api
from datencoder_jax.benchmark import run
from datencoder_jax.checkpoints.atomic import atomic_write
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.checkpoints.encoder_folder import check_encoder_place
from datencoder_jax.cli import main
from datencoder_jax.commands.output_folder import LOCK_FILE, lock_folder
from datencoder_jax.errors import UserError
from datencoder_jax.training import encoder_stage

pytest_plugins = ("cli_fixtures",)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def personalize(picture, out, *options):
    return ["personalize", picture, "--prompt", "a S*", "--num", "2", "--out", str(out), *options]


def generate(out, *options):
    return ["generate", "--prompt", "a robot", "--num", "1", "--out", str(out), *options]


@pytest.mark.parametrize("first", ["personalize", "generate"])
def test_pictures_and_report_of_another_command_stay(tmp_path, capsys, picture, calls, first):
    out = tmp_path / "out"
    commands = [personalize(picture, out), generate(out)]
    if first == "generate":
        commands.reverse()
    assert main(commands[0]) == 0 and main(commands[0]) == 0
    before = contents(out)
    calls.clear()
    capsys.readouterr()
    fails(capsys, f"holds files of `datencoder {first}`", *commands[1])
    assert contents(out) == before and not calls
    assert main([*commands[1], "--overwrite"]) == 0
    assert json.loads((out / "report.json").read_text())["command"] != first
    assert main(commands[1]) == 0


@pytest.mark.parametrize("name", ["report.json", "samples.png", "01_a-s_1.png", "input.png", "concept.safetensors"])
def test_a_file_of_a_person_stays(tmp_path, capsys, picture, calls, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"pictures": ["holiday.png"]}')
    fails(
        capsys,
        f"somebody else that `datencoder personalize` would replace: {name}",
        *personalize(picture, tmp_path / "out"),
    )
    assert list(contents(tmp_path / "out")) == [name] and not calls
    assert main(personalize(picture, tmp_path / "out", "--overwrite")) == 0


def test_the_default_prompts_are_looked_at_too(tmp_path, capsys, picture, calls):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "02_s-and-s_0.png").touch()
    fails(capsys, "02_s-and-s_0.png", "personalize", picture, "--out", tmp_path / "out")
    assert "personalize" not in calls


def test_a_run_goes_on_over_the_concept_that_an_interrupted_one_left(tmp_path, capsys, picture, calls, monkeypatch):
    out, drawn = tmp_path / "out", api.generate

    def stopped(*_, quiet=False, **__):
        if not quiet:
            raise KeyboardInterrupt

    monkeypatch.setattr(api, "generate", stopped)
    assert main(personalize(picture, out)) == 130
    assert [path.name for path in out.iterdir()] == ["concept.safetensors"]
    monkeypatch.setattr(api, "generate", drawn)
    found = load_concept(out / "concept.safetensors")
    recorded = {"method": "datencoder", "seed": "0"}  # as the API does
    save_concept(out / "concept.safetensors", replace(found, metadata=found.metadata | recorded))
    other = tmp_path / "other.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(other)
    capsys.readouterr()
    fails(capsys, "concept.safetensors", *personalize(str(other), out))
    assert main(personalize(picture, out)) == 0


def test_exports_of_another_concept_stay(tmp_path, capsys, picture, calls, concept_file):
    out, folder = tmp_path / "out", tmp_path / "out"
    assert main(personalize(picture, out, "--export", "kohya", "card")) == 0
    before = contents(folder)
    for kind, name in (("kohya", "my_concept.safetensors"), ("card", "README.md")):
        fails(capsys, name, "export", concept_file, "--to", kind, "--out", out)
    assert contents(folder) == before
    assert main(["export", str(out / "concept.safetensors"), "--to", "kohya", "--out", str(out)]) == 0
    # What an export has put there is none of `personalize`'s.
    assert main(["export", str(out / "concept.safetensors"), "--to", "embedding", "--out", str(out)]) == 0
    capsys.readouterr()
    fails(capsys, "my_concept_emb.safetensors", *personalize(picture, out, "--export", "embedding"))


def test_a_sheet_of_samples_of_a_person_stays(tmp_path, capsys, calls, concept_file):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "samples.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.png").write_text("mine")
    argv = ["export", concept_file, "--to", "card", "--out", str(tmp_path / "out")]
    fails(capsys, "samples.png", *argv)
    assert main([*argv, "--overwrite"]) == 0 and main(argv) == 0


def test_toyworld_replaces_its_own_pictures_alone(tmp_path, capsys):
    path = tmp_path / "fish.png"
    argv = ["toyworld", "--class", "fish", "--out", str(path)]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    before = path.read_bytes()
    fails(capsys, "fish.png", *argv)
    assert path.read_bytes() == before
    assert main([*argv, "--overwrite"]) == 0 and main([*argv, "--seed", "1"]) == 0


def test_check_replaces_its_own_files_alone(tmp_path, capsys):
    (tmp_path / "check.json").write_text('{"passed": true}')
    fails(capsys, "somebody else that `datencoder check` would replace: check.json", "check", "--out", tmp_path)


def test_evaluate_leaves_the_files_of_others(tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    argv = ["evaluate", "--suite", "toyworld", "--methods", "base", "--out", tmp_path]
    fails(capsys, "somebody else that `datencoder evaluate` would replace: report.md", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize(("num", "told"), [(1, "wrote 1 picture, "), (2, "wrote 2 pictures, ")])
def test_pictures_are_counted_in_words_that_fit(tmp_path, capsys, calls, num, told):
    assert main(["generate", "--prompt", "a", "--num", str(num), "--out", str(tmp_path)]) == 0
    assert told in capsys.readouterr().out


def test_the_bar_of_an_evaluation_has_no_stray_comma(tmp_path, capsys, monkeypatch):
    row = Namespace(name="base", entry=None)
    units = [
        Namespace(row=row, seed=0, name=name, file=tmp_path / name, error_file=tmp_path / f"{name}.txt")
        for name in ("a", "b")
    ]
    monkeypatch.setattr(run, "_passes", lambda *_: 1)
    monkeypatch.setattr(run, "_each", lambda setup, units, jobs: ((unit, None) for unit in units))
    run.execute(None, units)
    bar = capsys.readouterr().err
    assert re.search(r"\| \[00:\d\d<[^ ]+, 0/2 units", bar) and "| ," not in bar


@pytest.mark.parametrize("output", ["", "elsewhere"])
def test_pretraining_says_where_its_encoder_went(tmp_path, capsys, monkeypatch, output):
    written = []
    monkeypatch.setattr(encoder_stage, "fit", lambda *_, **__: {})
    monkeypatch.setattr(encoder_stage, "describe_encoder", lambda *_: {})
    monkeypatch.setattr(encoder_stage, "Model", lambda *_: None)
    monkeypatch.setattr(encoder_stage, "write_encoder", lambda place, *_: written.append(str(place)))
    config = Namespace(initial="", output=output and str(tmp_path / output))
    pipeline = Namespace(fingerprint="a", vision_fingerprint="b")
    encoder_stage._fit(Namespace(config=None), None, config, tmp_path, pipeline)
    assert written == [str(tmp_path / (output or "encoder"))]
    assert capsys.readouterr().out == f"wrote the encoder to {written[0]}\n"


# --- folders that are replaced as a whole


def test_a_folder_with_files_of_others_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("config.json", "notes.txt"):
        (tmp_path / "a" / name).write_text("mine")
    with (
        pytest.raises(UserError, match=r"it also holds notes\.txt"),
        atomic_write(tmp_path / "a", replaces="config.json") as temporary,
    ):
        temporary.mkdir()
        (temporary / "config.json").write_text("new")
    assert contents(tmp_path / "a") == dict.fromkeys(["config.json", "notes.txt"], b"mine") and nothing_left(tmp_path)


def test_an_encoder_takes_the_place_of_encoders_alone(tmp_path):
    check_encoder_place(tmp_path / "new")
    (tmp_path / "config.json").write_text('{"_class_name": "CLIPVisionModel"}')
    refuses("another model than an encoder", check_encoder_place, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "TuningEncoder"}')
    check_encoder_place(tmp_path)
    (tmp_path / "README.md").touch()
    refuses(r"it also holds README\.md", check_encoder_place, tmp_path)


# --- one run at a time


def test_a_second_run_is_told(tmp_path, capsys, picture, calls):
    out = tmp_path / "out"
    with lock_folder(out):
        for argv in (personalize(picture, out), generate(out, "--overwrite")):
            fails(capsys, "is in use: another run of datencoder writes there", *argv)
    assert not calls and not list(out.iterdir())
    assert main(generate(out)) == 0 and not (out / LOCK_FILE).exists()


def test_the_lock_of_a_killed_run_is_gone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom datencoder_jax.commands.output_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="choose another --workdir"), lock_folder(tmp_path, "--workdir"):
            pass
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_an_export_waits_a_moment(tmp_path):
    started = time.perf_counter()
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use"), lock_folder(tmp_path, wait=0.3):
        pass
    assert time.perf_counter() - started >= 0.3


def test_storage_without_locks_is_written_without_one(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr("datencoder_jax.commands.output_folder.FileLock.acquire", acquire)
    with lock_folder(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert os.listdir(tmp_path / "a") == ["file"]
