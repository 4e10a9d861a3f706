"""Two real processes of four CPU devices each, through `datencoder pretrain`: they train what one process trains."""

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
    """Two processes of one job; by flags, or as Slurm would start them."""

    def __init__(self, recipe, workdir, *options, slurm=False, **plan):
        port, command = free_port(), [sys.executable, str(TESTS / "line_processes.py")]
        command += ["--config", str(recipe), "--workdir", str(workdir), "--cpu-devices", "4", *options]
        self.processes = []
        for index in range(2):
            flags, more = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index)], {}
            if slurm:
                job = {"JOB_ID": port, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": index, "LOCALID": index}
                flags, more = [], {f"SLURM_{name}": str(value) for name, value in job.items()}
            env = environment(LINE=json.dumps(plan), **more)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen([*command, *flags], env=env, **pipes))

    def ends(self, timeout=120):
        """Exit status, output and error output of each; none is left running."""
        end, results = time.monotonic() + timeout, []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
                # Gloo, which connects CPUs, says so by itself.
                lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
                results.append((process.returncode, lines, err))
        finally:
            for process in self.processes:
                process.kill()
                process.communicate()
        return results


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
    work, rows = tmp_path / "work", tmp_path / "rows"
    rows.mkdir()
    (status, out, err), (other, said, noise) = Pair(recipe, work, rows=str(rows)).ends()
    assert (status, other) == (0, 0), err + noise
    assert max(steps_kept(work)) == STEPS
    agrees(recipe, work, alone)
    # Process 0 alone prints and writes.
    assert out[0].startswith("waiting for 2 processes at localhost:") and "device: 8 x cpu in 2 processes (cpu)" in out
    assert said == [] and noise == ""
    assert len(records(work)) == STEPS + 1 and len(list(work.glob("preview_*"))) == 1
    # Each drew its half of every batch, and nothing else.
    drawn = [sorted({tuple(map(int, line.split())) for line in (rows / f"{i}.txt").open()}) for i in range(2)]
    half = BATCH // 2
    assert drawn == [[(step, i * half, (i + 1) * half) for step in range(STEPS)] for i in range(2)]


def test_two_processes_go_on_from_one(recipe, tmp_path, alone):
    """Started as by Slurm."""
    stop = Line(on_log=lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 10 else None)
    with pytest.raises(SystemExit):
        train_alone(recipe, tmp_path, stop)
    (first,) = steps_kept(tmp_path)
    assert 10 <= first < STEPS
    (status, out, err), (other, _, noise) = Pair(recipe, tmp_path, slurm=True).ends()
    assert (status, other) == (0, 0), err + noise
    assert f"training on 8 x cpu, step {first} of {STEPS}" in out and max(steps_kept(tmp_path)) == STEPS
    agrees(recipe, tmp_path, alone)


def test_one_process_goes_on_from_two(recipe, tmp_path, alone):
    """SIGTERM to one of two stops both at the same step, with a checkpoint."""
    plan = {"process": 1, "log": 3, "act": "term", "pause": 0.4}
    (status, out, err), (other, said, noise) = Pair(recipe, tmp_path, **plan).ends()
    assert (status, other) == (130, 130), err + noise
    (step,) = steps_kept(tmp_path)
    assert 3 <= step < STEPS and out[-1].startswith(f"interrupted at step {step};") and said == []
    agrees(recipe, tmp_path, alone)


def test_a_process_whose_fellow_fails_or_dies_ends_too(recipe, tmp_path):
    failing = Pair(recipe, tmp_path / "a", "--set", "steps=1000", process=1, log=3, act="fail", pause=0.1, heartbeat=10)
    killed = Pair(recipe, tmp_path / "b", "--set", "steps=1000", process=0, log=3, act="kill", pause=0.1, heartbeat=10)
    began = time.monotonic()
    (dead, _, _), (other, _, noise) = killed.ends()
    assert dead == -signal.SIGKILL and other not in (0, None) and "another task died" in noise
    (other, _, noise), (status, _, err) = failing.ends()
    assert status == 2 and err == "error: The data of this process is gone.\n"
    assert other not in (0, None) and "another task died" in noise
    assert time.monotonic() - began < 60
