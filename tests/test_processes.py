"""Two real processes of four CPU devices each, through `datencoder pretrain`: they train what one process trains."""

import ast
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from line_task import BATCH, Line, losses, records, steps_kept

from datencoder_jax.training.loop import fit
from datencoder_jax.training.recipes import load_recipe

TESTS = Path(__file__).parent
STEPS = 24
RECIPE = f"""
from line_task import settings

def get_config(variant="full"):
    config = settings(steps={STEPS})
    config.unlock()
    config.stage = "line"
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "line.py"
    path.write_text(RECIPE)
    return path


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def environment(**more):
    """The tests' own, but for the devices, and for what would make a process one of somebody else's job."""
    own = ("XLA_FLAGS", "LINE", "SLURM", "OMPI", "KUBERNETES", "JOB_", "JAX_COORDINATOR")
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(own) and "proxy" not in name.lower()
    }
    folders = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    cache = str(TESTS.parent / ".pytest_cache" / "compiled")
    return env | {"PYTHONPATH": folders, "JAX_COMPILATION_CACHE_DIR": cache} | more


class Pair:
    """Two processes of one job; by flags, or as Slurm would start them. What they say goes to files in `folder`.

    `absent` ones are not started.
    """

    def __init__(self, recipe, folder, *, slurm=False, absent=(), **plan):
        port, command = free_port(), [sys.executable, str(TESTS / "line_processes.py"), "--config", str(recipe)]
        command += ["--workdir", str(folder / "work"), "--cpu-devices", "4"]
        self.processes, self.folder = [], folder
        for index in (index for index in range(2) if index not in absent):
            flags, more = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index)], {}
            if slurm:
                job = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": index, "LOCALID": index}
                flags, more = [], {f"SLURM_{name}": str(value) for name, value in job.items()}
            env = environment(LINE=json.dumps(plan), **more)
            with (folder / f"out{index}").open("w") as out, (folder / f"err{index}").open("w") as err:
                self.processes.append(subprocess.Popen([*command, *flags], env=env, stdout=out, stderr=err))

    def ends(self, timeout=120):
        """Exit status (None: it did not end), lines of output and error output of each; none is left running."""
        end, results = time.monotonic() + timeout, []
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
        for index, process in enumerate(self.processes):
            status = process.poll()
            process.kill()
            process.wait()
            out, err = ((self.folder / f"{name}{index}").read_text() for name in ("out", "err"))
            results.append((status, [line for line in out.splitlines() if not is_gloo(line)], err))
        return results


def is_gloo(line):
    """Gloo, which connects CPUs, says so by itself, in pieces: what one thread says stands amid what another does."""
    said = ("[Gloo] Rank", "is connected to", "peer ranks.", "Expected number of connected peer ranks is :")
    rest = line
    for piece in said:
        rest = rest.replace(piece, "")
    return not rest.strip(" 0123456789")


def test_gloo_is_known_however_it_is_cut():
    assert is_gloo("[Gloo] Rank 5 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7")
    assert is_gloo("[Gloo] Rank [Gloo] Rank 35 is connected to 7 peer ranks. ")
    assert is_gloo("5 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7")
    assert not is_gloo("training on 8 x cpu, step 0 of 24")


def train_alone(recipe, workdir, task=None):
    """One process, this one, of eight devices."""
    return fit(task or Line(), load_recipe(recipe), workdir)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The losses and the averaged weights of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    average = train_alone(recipe, workdir)
    return losses(workdir), average


def agrees(recipe, workdir, alone):
    """The run, which one process reads or goes on with, comes to what it comes to alone."""
    expected, average = alone
    found = train_alone(recipe, workdir)
    np.testing.assert_allclose(losses(workdir), expected, rtol=1e-5)
    for name, value in found.items():
        np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-6)


def test_two_processes_train_what_one_does(recipe, tmp_path, alone):
    (status, out, err), (other, said, noise) = Pair(recipe, tmp_path, rows=str(tmp_path)).ends()
    assert (status, other) == (0, 0), err + noise
    work = tmp_path / "work"
    assert max(steps_kept(work)) == STEPS
    agrees(recipe, work, alone)
    # Process 0 alone prints and writes.
    assert out[0].startswith("waiting for 2 processes at localhost:") and "device: 8 x cpu in 2 processes (cpu)" in out
    assert (said, noise) == ([], "")
    assert [record["step"] for record in records(work)] == [*range(1, STEPS + 1), STEPS]
    assert len(list(work.glob("preview_*"))) == 1
    # Each drew its half of every batch, and nothing else.
    texts = [(tmp_path / f"rows{i}").read_text().splitlines() for i in range(2)]
    drawn = [sorted(tuple(map(int, line.split())) for line in lines) for lines in texts]
    half = BATCH // 2
    assert drawn == [[(step, i * half, (i + 1) * half) for step in range(STEPS)] for i in range(2)]


def test_two_processes_go_on_from_one(recipe, tmp_path, alone):
    """Started as by Slurm."""
    work = tmp_path / "work"
    stop = Line(on_log=lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 10 else None)
    with pytest.raises(SystemExit):
        train_alone(recipe, work, stop)
    (first,) = steps_kept(work)
    assert 10 <= first < STEPS
    (status, out, err), (other, _, noise) = Pair(recipe, tmp_path, slurm=True).ends()
    assert (status, other) == (0, 0), err + noise
    assert f"training on 8 x cpu, step {first} of {STEPS}" in out and max(steps_kept(work)) == STEPS
    agrees(recipe, work, alone)


@pytest.mark.parametrize("act", ["term", "int"])
def test_one_process_goes_on_from_two(recipe, tmp_path, alone, act):
    """SIGTERM or Ctrl-C to one of two stops both at the same step, with a checkpoint."""
    plan = {"process": 1, "log": 3, "act": act, "pause": 0.4}
    (status, out, err), (other, said, noise) = Pair(recipe, tmp_path, **plan).ends()
    assert (status, other) == (130, 130), err + noise
    (step,) = steps_kept(tmp_path / "work")
    assert 3 <= step < STEPS and out[-1].startswith(f"interrupted at step {step};") and said == []
    agrees(recipe, tmp_path / "work", alone)


def test_a_process_whose_fellow_dies_ends_too(recipe, tmp_path):
    plan = {"log": 3, "pause": 0.2}
    folders = [tmp_path / act for act in ("fail", "kill")]
    for folder in folders:
        folder.mkdir()
    failing = Pair(recipe, folders[0], process=1, act="fail", heartbeat=20, **plan)
    killed = Pair(recipe, folders[1], process=0, act="kill", **plan)
    (dead, _, _), (other, _, noise) = killed.ends()
    assert dead == -signal.SIGKILL and other not in (0, None) and "another task died" in noise
    (other, _, noise), (status, _, err) = failing.ends()
    assert status == 2 and err == "error: The data of this process is gone.\n"
    assert other not in (0, None) and "another task died" in noise


def test_processes_that_read_something_else_do_not_start(recipe, tmp_path):
    for status, _, err in Pair(recipe, tmp_path, differs=True).ends():
        assert status not in (0, None) and "Traceback" not in err
    said = "".join((tmp_path / f"err{index}").read_text() for index in range(2))
    assert "error: not all processes have the same base model or data; start them with" in said
    assert not (tmp_path / "work").exists()


def test_processes_that_do_not_share_the_work_folder_do_not_go_on(recipe, tmp_path):
    train_alone(recipe, tmp_path / "work0", Line())
    (tmp_path / "work1").mkdir()
    for status, _, err in Pair(recipe, tmp_path, apart=True).ends():
        assert status not in (0, None) and "Traceback" not in err
    said = "".join((tmp_path / f"err{index}").read_text() for index in range(2))
    assert "error: not all processes see the same checkpoints in" in said


def test_a_process_that_does_not_come(recipe, tmp_path):
    ((status, out, err),) = Pair(recipe, tmp_path, absent=[1], timeout=2).ends()
    assert status == 1 and err.startswith("error: Not all processes at localhost:") and err.count("\n") == 1
    assert out[0].startswith("waiting for 2 processes") and not (tmp_path / "work").exists()


METERS = """
import sys
from data_helpers import TINY, Colours
from datencoder_jax.data.feed import Feed
from datencoder_jax.training import distributed
distributed.split_cpu(1)
port, process = sys.argv[1:]
with distributed.joined(f"localhost:{port}", 2, int(process)):
    from datencoder_jax.training.encoder_stage import Pictures
    source = Pictures(Feed([Colours(16, damaged={1, 6, 7})], [1.0], **TINY))
    half = slice(0, 4) if process == "0" else slice(4, 8)
    said = [source.report()]
    for step in range(2):
        source.batch(step, half)
        said.append(source.report())
    print("REPORT", said)
"""


def test_process_0_counts_what_another_met(tmp_path):
    """Each draws its half of one pass over the data."""
    port = str(free_port())
    command = [sys.executable, "-c", METERS, port]
    started = [
        subprocess.Popen(
            [*command, str(k)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [line for out, _ in ended for line in out.splitlines() if line.startswith("REPORT")]
    assert len(said) == 2 and said[0] == said[1], ended
    before, _, after = ast.literal_eval(said[0].removeprefix("REPORT "))
    assert before == {} and after == {"even": 1, "odd": 2}
