"""What commands leave in the output folder: all or nothing, and nothing of an earlier run. The models are fakes."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import nothing_left
from cli_helpers import fails
from PIL import Image

from datencoder_jax import api
from datencoder_jax.checkpoints import atomic
from datencoder_jax.checkpoints.concept_file import load_concept
from datencoder_jax.cli import main
from datencoder_jax.commands import personalize
from datencoder_jax.data.writing import check_writable, picture_name, reserve_room, write_files
from datencoder_jax.errors import UserError

pytest_plugins = ("cli_fixtures",)


def test_output_that_cannot_be_written_is_told_first(tmp_path, capsys, picture, calls):
    argv = ["personalize", picture, "--out"]
    fails(capsys, "is a file", *argv, picture)
    fails(capsys, "is a file", *argv, Path(picture) / "deep" / "er")
    fails(capsys, "Cannot write", *argv, "/proc/nowhere")
    fails(capsys, "is a file", "generate", "--prompt", "a", "--out", picture)
    fails(capsys, "Cannot write", "toyworld", "--out", Path(picture) / "a.png")
    fails(capsys, "folder", "toyworld", "--out", full_of_something(tmp_path / "folder.png"))
    assert not calls


def full_of_something(folder):
    folder.mkdir()
    (folder / "something").touch()
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """No PNG named `samples.png` can be written any more."""
    real = Image.Image.save

    def save(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        if str(path).endswith("samples.png"):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys, picture, calls, full_disk):
    out = tmp_path / "a" / "b"
    assert main(["generate", "--prompt", "a", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: Cannot write {out / 'samples.png'}: no space left on device.\n"
    assert not (tmp_path / "a").exists()
    fails(capsys, "no space left", "personalize", picture, "--out", out)
    assert [path.name for path in out.iterdir()] == ["concept.safetensors"]  # whole: the tuning is not lost
    load_concept(out / "concept.safetensors")


def test_a_failure_leaves_earlier_results_alone(tmp_path, full_disk):
    write_files(tmp_path, {"report.json": {"run": 1}})
    with pytest.raises(UserError, match="no space"):
        write_files(tmp_path, {"report.json": {"run": 2}, "samples.png": np.zeros((8, 8, 3), np.uint8)})
    assert json.loads((tmp_path / "report.json").read_text()) == {"run": 1}
    assert nothing_left(tmp_path)


def test_files_get_their_names_only_when_all_are_on_the_disk(tmp_path, monkeypatch):
    names = ["report.json", "a.json", "b.json", "c.json"]
    write_files(tmp_path, dict.fromkeys(names[:3], 1))
    flushed, real = [], os.fsync

    def fsync(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 3:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"Cannot write .*b\.json: input/output error\."):
        write_files(tmp_path, dict.fromkeys(names, 2))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names[:3], "1\n")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"c\.json: a folder is in the way"):
        write_files(tmp_path, dict.fromkeys(names, 2))
    assert (tmp_path / "a.json").read_text() == "1\n" and nothing_left(tmp_path)


def test_a_home_that_is_not_there(tmp_path, capsys, picture, calls):
    fails(capsys, "home folder", "personalize", picture, "--out", "~nosuchuser/out")
    fails(capsys, "home folder", "toyworld", "--out", "~nosuchuser/a.png")
    assert not calls


def test_a_failing_rerun_leaves_no_report_of_another_concept(tmp_path, picture, calls, monkeypatch):
    def generate(*_, quiet=False, **__):
        if not quiet:  # as it is where programs are compiled ahead
            raise UserError("There is a hole.")

    argv = ["personalize", picture, "--export", "kohya", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    monkeypatch.setattr(api, "generate", generate)
    assert main([*argv, "--blend", "0.9"]) == 2
    assert load_concept(tmp_path / "out" / "concept.safetensors").blend == 0.9
    assert not (tmp_path / "out" / "report.json").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"concept.safetensors"}


def test_a_failing_rerun_on_its_own_input_picture_leaves_that(tmp_path, picture, calls, monkeypatch):
    def generate(*_, quiet=False, **__):
        if not quiet:  # as it is where programs are compiled ahead
            raise UserError("There is a hole.")

    out = tmp_path / "out"
    assert main(["personalize", picture, "--out", str(out)]) == 0
    monkeypatch.setattr(api, "generate", generate)
    assert main(["personalize", str(out / "input.png"), "--out", str(out)]) == 2
    assert {path.name for path in out.iterdir()} == {"concept.safetensors", "input.png"}


def test_a_rerun_removes_the_pictures_of_the_one_before(tmp_path, picture, calls):
    out = tmp_path / "out"
    argv = ["personalize", picture, "--prompt", "a S*", "--out", str(out)]
    assert main([*argv, "--num", "3"]) == 0 and main(["personalize", picture, picture, *argv[2:]]) == 0
    theirs = {"holiday.png", "02_a-s_0.png", "01_a-s_0 copy.png"}
    for name in theirs:
        (out / name).touch()
    (tmp_path / "01_outside_0.png").touch()
    report = json.loads((out / "report.json").read_text())
    assert "input_2.png" in report["input_pictures"] and "01_a-s_3.png" in report["pictures"]
    report["pictures"] += ["holiday.png", "../01_outside_0.png"]
    (out / "report.json").write_text(json.dumps(report))
    kept = {"concept.safetensors", "input.png", "samples.png", "report.json"} | theirs
    assert main([*argv, "--num", "2"]) == 0
    assert {path.name for path in out.iterdir()} == kept | {"01_a-s_0.png", "01_a-s_1.png"}
    assert (tmp_path / "01_outside_0.png").exists()
    drawing = ["generate", "--num", "1", "--out", str(out), "--prompt"]
    assert main([*drawing, "a robot"]) == 2  # what another command has made stays
    assert {path.name for path in out.iterdir()} == kept | {"01_a-s_0.png", "01_a-s_1.png"}
    assert main([*drawing, "a robot", "--overwrite"]) == 0
    assert {path.name for path in out.iterdir()} == kept | {"01_a-robot_0.png"}
    for text in ("[]", "no JSON", '{"pictures": 3}', '{"pictures": [3]}'):
        (out / "report.json").write_text(text)
        assert main([*drawing, "a"]) == 2 and (out / "report.json").read_text() == text
        assert main([*drawing, "a", "--overwrite"]) == 0
    assert (out / "01_a-robot_0.png").exists()


def test_a_rerun_removes_the_exported_files_of_the_one_before(tmp_path, picture, calls):
    out = tmp_path / "out"
    argv = ["personalize", picture, "--prompt", "a S*", "--num", "1", "--out", str(out)]

    def names():
        return {path.name for path in out.iterdir()}

    def listed():
        return json.loads((out / "report.json").read_text())["exported"]

    assert main(argv) == 0 and listed() == []
    plain = names()
    assert main([*argv, "--export"]) == 0
    assert set(listed()) == names() - plain | {"concept.safetensors", "samples.png"} and len(names() - plain) == 6
    assert main([*argv, "--export", "kohya", "--name", "toy"]) == 0
    assert names() == plain | {"toy.safetensors"} and listed() == ["toy.safetensors"]
    # Pictures of the concept leave its exported files alone, and in the list.
    assert main(["generate", "--prompt", "a", "--num", "1", "--overwrite", "--out", str(out)]) == 0
    assert listed() == ["toy.safetensors"] and "toy.safetensors" in names()

    assert main([*argv, "--export", "--overwrite"]) == 0 and "toy.safetensors" not in names()
    (out / "README.md").write_text("mine")
    (tmp_path / "toy.safetensors").touch()
    (out / "other.safetensors").touch()
    report = json.loads((out / "report.json").read_text())
    report["exported"] += ["../toy.safetensors", str(tmp_path / "toy.safetensors"), "holiday.md", 3]
    (out / "holiday.md").touch()
    (out / "report.json").write_text(json.dumps(report))
    assert main(argv) == 0
    assert names() == plain | {"README.md", "other.safetensors", "holiday.md"} and listed() == []
    assert (tmp_path / "toy.safetensors").exists()


def test_an_export_that_fails_leaves_none_of_another_concept(tmp_path, capsys, picture, calls, monkeypatch):
    out = tmp_path / "out"
    argv = ["personalize", picture, "--prompt", "a S*", "--num", "1", "--export", "kohya", "--out", str(out)]
    assert main(argv) == 0 and (out / "my_concept.safetensors").exists()

    def full(*_, **__):
        raise UserError("The disk is full.")

    monkeypatch.setattr(personalize, "export_concept", full)
    assert main(argv) == 2
    assert not (out / "my_concept.safetensors").exists()
    assert json.loads((out / "report.json").read_text())["exported"] == []


def test_a_full_disk_shows_before_the_work(tmp_path, monkeypatch):
    class Full:
        def __init__(self, **_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datencoder_jax.data.writing.tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"Cannot write to .*out: no space left on device\."):
        check_writable(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_picture_names():
    assert picture_name(0, "A photo of a S* on the Beach!", 3) == "01_a-photo-of-a-s-on-the-beach_3.png"
    assert picture_name(11, "../..", 0) == "12_prompt_0.png"
    assert picture_name(0, "ein Gemälde", 0) == "01_ein-gemalde_0.png"
    assert len(picture_name(0, "word " * 99, 0)) < 64


def test_a_link_to_a_place_that_is_away_shows_before_the_work(tmp_path, capsys, picture, calls):
    (tmp_path / "link").symlink_to("/nonexistent/run")
    for out in (tmp_path / "link", tmp_path / "link" / "deep" / "er"):
        fails(capsys, "link is a link to /nonexistent/run, which is away", "personalize", picture, "--out", out)
        fails(capsys, "which is away", "generate", "--prompt", "a", "--out", out)
    assert not calls
    (tmp_path / "disk").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "disk")
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "there" / "new")]) == 0


def test_room_for_the_concept_is_made_sure_of_before_the_tuning(tmp_path, capsys, picture, calls, monkeypatch):
    wanted = []

    def posix_fallocate(descriptor, start, size):
        wanted.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    real, tuned = api.personalize, []
    monkeypatch.setattr(api, "personalize", lambda *a, quiet=False, **k: tuned.append(quiet) or real(*a, **k))
    fails_at_end(capsys, "no space left on device, where 0.1 MB are", "personalize", picture, tmp_path / "out")
    assert tuned == [True] and wanted[0] > 2**16 and not (tmp_path / "out").exists()


def fails_at_end(capsys, match, *argv):
    """The command ends with status 2, and its last line is one sentence that contains `match`."""
    assert main([*map(str, argv[:-1]), "--out", str(argv[-1])]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and match in line, line
    return line


@pytest.mark.parametrize("error", [AttributeError("not on this system"), OSError(errno.EINVAL, "not on this disk")])
def test_room_is_made_sure_of_by_writing_where_it_cannot_be_asked_for(tmp_path, monkeypatch, error):
    def posix_fallocate(*_):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    with reserve_room(tmp_path, 200_001):
        assert not list(tmp_path.iterdir())


def test_a_concept_that_cannot_be_written_is_put_elsewhere(tmp_path, capsys, picture, calls, monkeypatch):
    real = atomic.save_tensors

    def save_tensors(path, *args, **kwargs):
        if (tmp_path / "out") in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *args, **kwargs)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("datencoder_jax.checkpoints.concept_file.save_tensors", save_tensors)
    line = fails_at_end(capsys, "no space left on device; the concept is in", "personalize", picture, tmp_path / "out")
    load_concept(line.rsplit(" ", 1)[1].rstrip("."))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("datencoder_jax.checkpoints.concept_file.save_tensors", full)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "tmp")
    before = list((tmp_path / "tmp").iterdir())
    line = fails_at_end(capsys, "no space left on device.", "personalize", picture, tmp_path / "out")
    assert "concept is in" not in line and list((tmp_path / "tmp").iterdir()) == before


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
