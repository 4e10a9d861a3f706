"""Checkpoints of training: a killed run goes on exactly, and what cannot go on is said."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from line_task import Line, losses, newest, records, run, same, settings, steps_kept

from datencoder_jax.errors import PassingError, UserError
from datencoder_jax.training import checkpoints
from datencoder_jax.training.checkpoints import Checkpoints, describe, on_disk


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices, which shares the tests' compiled programs."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}


def program(workdir, stall="", devices=8, **changes) -> subprocess.Popen:
    """The line task in a process of its own; saving the step `stall` never ends."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "line_task.py"), str(workdir), str(stall), json.dumps(changes)],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


LONG = {"steps": 40, "checkpoint_every": 10, "preview_every": 20}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Forty steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    run(workdir, **LONG)
    return newest(workdir)[1]["state"], records(workdir)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed while step 20 was being saved and the steps after it were already made."""
    workdir = tmp_path_factory.mktemp("killed")
    log = workdir / "metrics.jsonl"
    with program(workdir, stall="20", **LONG) as process:
        wait_for(lambda: log.exists() and '{"step": 26,' in log.read_text(), process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return workdir


def test_a_run_killed_while_it_saves_goes_on_exactly(killed, straight, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(killed, workdir)
    assert steps_kept(workdir) == [10]
    assert [path.name for path in (workdir / "checkpoints").glob("20*")]  # cut short
    assert losses(workdir)[-1] != straight[1][-2]["loss"]
    drawn = []
    run(workdir, Line(on_batch=lambda step, rows: drawn.append(step)), threads=1, **LONG)
    step, found = newest(workdir)
    assert step == 40 and sorted(drawn) == list(range(10, 40))
    same(found["state"], straight[0])
    assert records(workdir) == straight[1]
    assert steps_kept(workdir) == [20, 30, 40]
    assert not [path for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name]


def test_a_run_goes_on_on_fewer_devices(killed, straight, tmp_path):
    """Eight before, two after: another program, so equal but for rounding."""
    workdir = tmp_path / "again"
    shutil.copytree(killed, workdir)
    process = program(workdir, devices=2, **LONG)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "training on 2 x cpu, step 10 of 40" in said, said
    np.testing.assert_allclose(losses(workdir), [r["loss"] for r in straight[1] if "loss" in r], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        newest(workdir)[1]["state"]["params"],
        straight[0]["params"],
    )


# --- what a checkpoint holds, and which stay


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of four steps with a checkpoint at each."""
    workdir = tmp_path_factory.mktemp("made")
    run(workdir, Line(identity={"base": "aaaa", "data": "shards"}), steps=4, checkpoint_every=1)
    return workdir


@pytest.fixture
def again(made, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "again"))


def test_a_checkpoint_describes_its_run(made):
    step, found = newest(made)
    meta = found["meta"]
    assert meta["schema"] == checkpoints.SCHEMA and meta["step"] == step == 4 and meta["data"] == {"position": 4}
    assert meta["config"] == settings(steps=4, checkpoint_every=1).to_dict()
    assert meta["identity"] == {"base": "aaaa", "data": "shards"}
    assert meta["versions"]["jax"] == jax.__version__
    state = found["state"]
    assert set(state) == {"step", "params", "ema", "optimiser", "skipped", "in_a_row"}
    assert "frozen" not in str(jax.tree.structure(state))


def test_the_latest_stay_and_the_best(tmp_path):
    scores = iter([0.0, 3.0, 9.0, 4.0, 5.0, 6.0, 7.0])

    class Scored(Line):
        def preview(self, params, path):
            return super().preview(params, path) | {"psnr": next(scores)}

    best = {"metric": "psnr", "mode": "max"}
    run(tmp_path, Scored(), steps=6, preview_every=1, keep=2, best=best)
    assert steps_kept(tmp_path) == [2, 5, 6]


def test_a_run_that_goes_on_keeps_the_best_before(tmp_path):
    state, best = {"x": np.zeros(1, np.float32)}, {"metric": "psnr", "mode": "max"}
    for first, scores in ((1, [1.0, 9.0, 2.0]), (4, [3.0]), (5, [4.0, None])):
        with Checkpoints(tmp_path, {"schema": 1}, 2, best) as kept:
            for step, score in enumerate(scores, first):
                kept.save(step, state, None if score is None else {"psnr": score})
                kept.wait()
    assert steps_kept(tmp_path) == [2, 5, 6]


def test_the_best_may_be_the_lowest(tmp_path):
    scores = iter([9.0, 3.0, 1.0, 4.0, 5.0])

    class Scored(Line):
        def preview(self, params, path):
            return super().preview(params, path) | {"error": next(scores)}

    run(tmp_path, Scored(), steps=4, preview_every=1, keep=1, best={"metric": "error", "mode": "min"})
    assert steps_kept(tmp_path) == [2, 4]


# --- what cannot go on


def spoil(workdir, step, how):
    folder = workdir / "checkpoints" / str(step)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "truncated":
        data = [path for path in files if "/d/" in str(path)]
        assert data
        for path in data:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        for path in files:
            path.write_bytes(b"")
    elif how == "without its state":
        shutil.rmtree(folder / "state")
    else:
        shutil.rmtree(folder / "meta")


@pytest.mark.parametrize("how", ["truncated", "emptied", "without its state", "without its description"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(again, how, capsys):
    spoil(again, 4, how)
    drawn = []
    task = Line(identity={"base": "aaaa", "data": "shards"}, on_batch=lambda step, rows: drawn.append(step))
    run(again, task, steps=4, checkpoint_every=1, threads=1)
    assert "checkpoint 4 cannot be read" in (said := capsys.readouterr().out) and "going on from 3" in said
    assert drawn == [3] and newest(again)[0] == 4 and (again / "checkpoints" / "4.unreadable").is_dir()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), RuntimeError),
        (MemoryError(), MemoryError),
        (OSError(errno.ESTALE, "Stale file handle"), PassingError),
        (ValueError(f"Failed to open [source='file_util.cc:1'; os_error_code='{errno.ESTALE}']"), PassingError),
    ],
)
def test_what_may_pass_damages_no_checkpoint(again, monkeypatch, error, kind):
    """Too little memory, or storage that is away: the file is well, and stays the newest."""

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", restore)
    with pytest.raises(kind):
        run(again, Line(identity={"base": "aaaa", "data": "shards"}), steps=4, checkpoint_every=1)
    assert steps_kept(again) == [2, 3, 4]


def test_no_checkpoint_that_can_be_read(again):
    for step in steps_kept(again):
        spoil(again, step, "truncated")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(the newest, 4: .*use another --workdir"):
        run(again, Line(identity={"base": "aaaa", "data": "shards"}), steps=4, checkpoint_every=1)
    assert steps_kept(again) == [2, 3, 4]  # nobody's files are moved for nothing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim.lr": 0.5}, "optim.lr 0.01 -> 0.5"),
        ({"steps": 8, "seed": 1}, "seed 0 -> 1, steps 4 -> 8"),
        ({"keep": 9, "ema": 0.5}, "ema 0.9 -> 0.5"),
    ],
)
def test_a_run_of_another_recipe_is_not_continued(again, changes, said):
    task = Line(identity={"base": "aaaa", "data": "shards"})
    with pytest.raises(UserError, match="come to step 4 with another recipe: ") as info:
        run(again, task, **{"steps": 4, **changes})
    assert f"recipe: {said}; set that back" in str(info.value) and "--accept-changes" in str(info.value)
    run(again, task, accept_changes=True, **{"steps": 4, **changes})


def test_what_does_not_change_the_result_may_change(again):
    free = {"log_every": 3, "preview_every": 2, "checkpoint_minutes": 5.0, "keep": 1, "threads": 1, "max_bad_steps": 9}
    task = Line(identity={"base": "aaaa", "data": "shards"})
    run(again, task, steps=4, mesh={"data": 1, "fsdp": 8}, best={"metric": "a", "mode": "min"}, **free)


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize(
    ("identity", "said"),
    [({"base": "bbbb", "data": "shards"}, "base aaaa -> bbbb"), ({"base": "aaaa", "data": "x"}, "data shards -> x")],
)
def test_another_base_model_or_data_is_refused(again, identity, said, accept):
    with pytest.raises(UserError, match=f"has read something else: {said}; put that back or use another --workdir"):
        run(again, Line(identity=identity), steps=4, checkpoint_every=1, accept_changes=accept)


def test_another_schema_is_refused(again, monkeypatch):
    monkeypatch.setattr(checkpoints, "SCHEMA", 2)
    with pytest.raises(UserError, match="has checkpoints of schema 1, not 2; use another --workdir"):
        run(again, Line(identity={"base": "aaaa", "data": "shards"}), steps=4)


# --- the disk


def test_a_work_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r".*file/run cannot be written: not a directory; there is no checkpoint yet"):
        run(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_work_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: permission denied; there is no checkpoint yet"):
        run(tmp_path / "run")


FULL_DISK = """
import pathlib, shutil
from line_task import run, steps_kept
disk = pathlib.Path("disk")
run(disk / "run", steps=4, checkpoint_every=2)
shutil.rmtree(disk / "run" / "checkpoints" / "4")
with (disk / "filler").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        file.truncate(file.tell() - 7 * 4096)  # room for metrics, none for a checkpoint
try:
    run(disk / "run", steps=4, checkpoint_every=2)
except Exception as error:
    print("said", type(error).__name__, error)
print("kept", steps_kept(disk / "run"))
(disk / "filler").unlink()
run(disk / "run", steps=4, checkpoint_every=2)
print("kept", steps_kept(disk / "run"))
"""


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """On a file system of its own, filled up once there is a checkpoint."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(FULL_DISK)
    mount = f"mount -t tmpfs -o size=1m tmpfs disk && touch mounted && exec {sys.executable} program.py"
    made = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(1), "PYTHONPATH": str(Path(__file__).parent)},
    )
    if not (tmp_path / "mounted").exists():
        pytest.skip("no file system may be mounted here")
    said, first, second = [line for line in made.stdout.splitlines() if line.startswith(("said", "kept"))]
    assert re.fullmatch(r"said UserError .*no space left on device; the last good checkpoint is step 2; put .*", said)
    assert (first, second) == ("kept [2]", "kept [2, 4]")
    assert "Traceback" not in made.stderr, made.stderr


def test_a_disk_that_fails_is_said(made):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    named = OSError(errno.EROFS, os.strerror(errno.EROFS), str(made / "preview.png"))
    arrays = ValueError(f"RESOURCE_EXHAUSTED: writing {made}/checkpoints/5: No space left on device [OS error 28]")
    for error, reason in (
        (full, "no space left on device"),
        (named, "read-only file"),
        (arrays, "no space left on device"),
    ):
        said = f"cannot be written: {reason}.*; the last good checkpoint is step 4; put "
        with pytest.raises(UserError, match=said), on_disk(made):
            raise error


@pytest.mark.parametrize("error", [ValueError("a mistake"), PermissionError(errno.EACCES, "", "/pictures/1.png")])
def test_what_the_disk_did_not_do_is_left_alone(made, error):
    with pytest.raises(type(error)), on_disk(made):
        raise error


def test_saving_and_reading_without_a_loop(tmp_path):
    state = {"a": jax.numpy.arange(4.0)}
    run_ = describe(settings(), {})
    with Checkpoints(tmp_path, run_, keep=1) as folder:
        assert folder.latest() is None and folder.restore(state) is None
        folder.save(3, state)
        folder.wait()
        assert folder.latest() == 3
        found = folder.restore(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        )
    assert found is not None and found[1] == []
    same(found[0], state)
