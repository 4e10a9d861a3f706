"""`datencoder pretrain`: options, messages, the export of an encoder, and which processes belong together."""

import json
import os
import socket
import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from cli_helpers import fails
from line_task import run, settings

from datencoder_jax.checkpoints.encoder_folder import describe_encoder, read_encoder
from datencoder_jax.cli import main
from datencoder_jax.commands.examples import EXAMPLES
from datencoder_jax.commands.output_folder import lock_folder
from datencoder_jax.errors import PassingError, UserError
from datencoder_jax.training import distributed, loop
from datencoder_jax.training.checkpoints import Checkpoints
from datencoder_jax.training.encoder_export import export_encoder

RECIPE = """
from line_task import run, settings

def get_config(variant="full"):
    config = settings(steps=40 if variant == "full" else 4)
    config.unlock()
    config.stage, config.data, config.output = "encoder", ({"path": "a"},), ""
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.py").write_text(RECIPE)
    return str(tmp_path / "tiny.py")


@pytest.fixture
def stages(monkeypatch):
    """What ran in place of the real stages; `raises` is raised there."""
    module = types.ModuleType("stages")
    module.calls, module.raises, module.work = [], None, lambda config, workdir: None

    def run_stage(config, workdir, accept_changes=False):
        module.calls.append((config, workdir, accept_changes))
        if module.raises:
            raise module.raises
        module.work(config, workdir)

    module.run_stage = run_stage
    monkeypatch.setitem(sys.modules, "datencoder_jax.training.stages", module)
    return module


def pretrain(recipe, *options):
    return main(["pretrain", "--config", recipe, *map(str, options)])


# --- options and messages


def test_options_are_passed_on(recipe, tmp_path, stages, capsys):
    work = tmp_path / "new" / "work"
    settings = ["--set", "optim.lr=1", "keep=9", "--variant", "smoke", "--set", "data.0.path=b"]
    assert pretrain(recipe, "--workdir", work, *settings, "--accept-changes") == 0
    ((config, workdir, accept_changes),) = stages.calls
    assert (config.steps, config.optim.lr, config.keep, config.data) == (4, 1.0, 9, ({"path": "b"},))
    assert workdir == work and accept_changes
    assert capsys.readouterr().out.splitlines() == ["device: 8 x cpu (cpu)"]
    assert pretrain(recipe, "--workdir", work, "--processes", "1") == 0
    config, _, accept_changes = stages.calls[1]
    assert config.steps == 40 and not accept_changes


def test_a_work_folder_is_one_runs_at_a_time(recipe, tmp_path, stages, capsys):
    work = tmp_path / "work"
    with lock_folder(work):
        fails(capsys, "another run of datencoder writes there", "pretrain", "--config", recipe, "--workdir", work)
    assert not stages.calls
    assert pretrain(recipe, "--workdir", work) == 0 and not list(work.iterdir())


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "preview_0000001.png"])
def test_a_work_folder_of_something_else_is_refused(recipe, tmp_path, stages, capsys, name):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text('{"model_type": "clip"}')
    argv = ["pretrain", "--config", recipe, "--workdir", tmp_path / "work"]
    fails(capsys, f"somebody else that `datencoder pretrain` would replace: {name}; choose another --workdir", *argv)
    assert not stages.calls and pretrain(recipe, "--workdir", tmp_path / "work", "--overwrite") == 0
    (tmp_path / "work" / "config.json").write_text('{"optim": {}, "steps": 4}')  # a run's
    assert pretrain(recipe, "--workdir", tmp_path / "work") == 0


def test_an_encoder_is_not_to_replace_another_model(recipe, tmp_path, stages, capsys):
    for folder in (tmp_path / "model", tmp_path / "work" / "encoder"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"_class_name": "CLIPVisionModel"}')
    argv = ["pretrain", "--config", recipe, "--workdir"]
    fails(capsys, "work/encoder: it holds another model", *argv, tmp_path / "work")
    argv += [tmp_path / "new"]
    fails(capsys, "model: it holds another model", *argv, "--export-encoder", tmp_path / "model")
    fails(capsys, "model: it holds another model", *argv, "--set", f"output={tmp_path / 'model'}")
    assert not stages.calls


def test_the_recipe_is_printed_with_its_changes(recipe, tmp_path, stages, capsys):
    assert pretrain(recipe, "--set", "steps=7", "--print-config") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 7 and printed["optim"]["lr"] == 0.01 and printed["data"] == [{"path": "a"}]
    assert not stages.calls and sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["tiny.py"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "with --workdir"),
        (["--workdir", "{file}/work"], "is a file, not a folder"),
        (["--workdir", "{tmp}/w", "--set", "stepz=3"], "has no value 'stepz'; did you mean steps"),
        (["--workdir", "{tmp}/w", "--set", "steps=many"], "'steps=many' does not fit"),
        (["--workdir", "{tmp}/w", "--variant", "smoky"], "invalid choice: 'smoky'"),
        (["--workdir", "{tmp}/w", "--set", "stage=vae", "--export-encoder", "{tmp}/e"], "takes a recipe of an encoder"),
        (["--workdir", "{tmp}/w", "--export-encoder", "{file}/e"], "is a file, not a folder"),
        (["--workdir", "{tmp}/w", "--processes", "2"], "--processes without --coordinator and --process: several"),
        (["--workdir", "{tmp}/w", "--process", "0"], "--process without --coordinator and --processes: several"),
        (["--workdir", "{tmp}/w", "--coordinator", "a:1"], "--coordinator without --processes and --process: several"),
        (["--workdir", "{tmp}/w", "--coordinator", "a", "--processes", "2", "--process", "0"], "a is not HOST:PORT"),
        (["--workdir", "{tmp}/w", "--coordinator", "a:0", "--processes", "2", "--process", "0"], "is not HOST:PORT"),
        (["--workdir", "{tmp}/w", "--coordinator", "a:b", "--processes", "2", "--process", "0"], "is not HOST:PORT"),
        (["--workdir", "{tmp}/w", "--coordinator", "a:1", "--processes", "2", "--process", "2"], "is not one of 2"),
        (["--workdir", "{tmp}/w", "--coordinator", "a:1", "--processes", "0", "--process", "0"], "--processes"),
        (["--workdir", "{tmp}/w", "--cpu-devices", "0"], "--cpu-devices"),
    ],
)
def test_misuse_is_status_two_and_one_sentence(recipe, tmp_path, stages, capsys, options, message):
    (tmp_path / "file").touch()
    options = [option.format(tmp=tmp_path, file=tmp_path / "file") for option in options]
    fails(capsys, message, "pretrain", "--config", recipe, *options)
    assert not stages.calls


def test_what_training_ends_with(recipe, tmp_path, stages, capsys):
    work = ["--workdir", tmp_path / "work"]
    stages.raises = SystemExit("interrupted at step 3; run the same command again to go on")
    assert pretrain(recipe, *work) == 130
    assert capsys.readouterr().out.splitlines()[-1] == str(stages.raises)
    stages.raises = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nand so on")
    fails(capsys, "The memory does not suffice; raise mesh.fsdp", "pretrain", "--config", recipe, *work)
    stages.raises = UserError("this batch cannot be shared")
    fails(capsys, "this batch cannot be shared", "pretrain", "--config", recipe, *work)
    stages.raises = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        pretrain(recipe, *work)


def test_the_work_folder_holds_the_recipe_that_ran_there(tmp_path):
    run(tmp_path, steps=1)
    with pytest.raises(UserError, match="with another recipe"):
        run(tmp_path, steps=1, ema=0.5)
    assert json.loads((tmp_path / "config.json").read_text()) == settings(steps=1).to_dict()
    run(tmp_path, steps=1, notes={"encoder.json": "right"})
    with pytest.raises(UserError, match="with another recipe"):
        run(tmp_path, steps=1, ema=0.5, notes={"encoder.json": "wrong"})
    assert (tmp_path / "encoder.json").read_text() == "right"


def test_help_has_examples(capsys):
    assert main(["pretrain", "--help"]) == 0
    assert EXAMPLES["pretrain"].splitlines()[0] in capsys.readouterr().out


def test_the_cpu_is_split(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--before")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("NPROC")
    distributed.split_cpu(3)
    assert os.environ["XLA_FLAGS"].startswith("--before --xla_force_host_platform_device_count=3 ")
    assert os.environ["JAX_PLATFORMS"] == "cpu" and int(os.environ["NPROC"]) >= 24


# --- the encoder


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """A work folder with checkpoints 2 and 4 of an encoder, whose averages are not its parameters."""
    work, config = tmp_path_factory.mktemp("trained"), settings(steps=4)
    encoder = pipeline.encoder
    description = describe_encoder(encoder.config, pipeline.fingerprint, pipeline.vision_fingerprint)
    (work / "encoder.json").write_text(json.dumps(description))
    state = loop.start(encoder.params, config)
    with Checkpoints(work, {"schema": 1}, 3) as checkpoints:
        for step in (2, 4):
            average = {name: value + step for name, value in encoder.params.items()}
            checkpoints.save(step, replace(state, ema=average))
            checkpoints.wait()
    return work


def holds_average(folder, pipeline, step):
    encoder = read_encoder(folder, pipeline.fingerprint, pipeline.vision_fingerprint)
    assert encoder.config == pipeline.encoder.config
    for name, value in pipeline.encoder.params.items():
        np.testing.assert_allclose(encoder.params[name], value + step, rtol=1e-3)


def test_a_complete_run_exports_without_training(recipe, trained, pipeline, tmp_path, stages, capsys):
    options = ["--variant", "smoke", "--workdir", trained, "--export-encoder", tmp_path / "out"]
    assert pretrain(recipe, *options) == 0 and not stages.calls
    holds_average(tmp_path / "out", pipeline, 4)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote the encoder of step 4 to {tmp_path / 'out'}"


def test_a_run_that_is_not_complete_trains_first(recipe, trained, pipeline, tmp_path, stages):
    def work(config, workdir):
        assert config.steps == 40 and not (tmp_path / "out").exists()

    stages.work = work
    assert pretrain(recipe, "--workdir", trained, "--export-encoder", tmp_path / "out") == 0
    assert len(stages.calls) == 1
    holds_average(tmp_path / "out", pipeline, 4)


def test_results_do_not_take_the_place_of_checkpoints(recipe, trained, tmp_path, stages, capsys):
    new = tmp_path / "new"
    for work, place in ((new, new), (new, trained), (trained, trained)):
        for options in (["--export-encoder", place], ["--set", f"output={place}"]):
            fails(capsys, "the work folder of a run", "pretrain", "--config", recipe, "--workdir", work, *options)
    assert not stages.calls and {path.name for path in (trained / "checkpoints").iterdir()} >= {"2", "4"}


def test_what_cannot_be_exported(trained, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint of an encoder"):
        export_encoder(tmp_path, tmp_path / "out")
    damaged = tmp_path / "damaged"
    (damaged / "checkpoints").mkdir(parents=True)
    (damaged / "encoder.json").write_text((trained / "encoder.json").read_text())
    with pytest.raises(UserError, match="holds no checkpoint of an encoder"):
        export_encoder(damaged, tmp_path / "out")
    (damaged / "checkpoints" / "3").mkdir()
    with pytest.raises(UserError, match="checkpoints/3 cannot be read") as info:
        export_encoder(damaged, tmp_path / "out")
    assert "\n" not in str(info.value) and not (tmp_path / "out").exists()


# --- which processes belong together

OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:34911"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
ALL = {"local_device_ids": []}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (OMPI, ("Open MPI job", {}, 4, 3)),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("Open MPI job", {}, 4, 3)),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("Open MPI job", ALL, 4, 3)),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (SLURM, ("Slurm job", {}, 4, 3)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("Slurm job", {}, 4, 3)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ("Slurm job", ALL, 4, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, ("Slurm job", {}, 4, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, ("Slurm job", ALL, 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # the job's own script
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"JOB_COMPLETION_INDEX": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # and no TPU
    ],
)
def test_what_a_launcher_says(environ, found):
    assert distributed._detect(environ) == found


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, True),  # the metadata server knows
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_tpu_slice(monkeypatch, environ, found):
    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu", raising=False)
    expected = distributed._Launcher("TPU slice", {}) if found else None
    assert distributed._detect(environ) == expected


def test_launchers_that_jax_cannot_ask():
    with pytest.raises(UserError, match="does not tell where process 0 is; add --coordinator"):
        distributed._detect({name: value for name, value in OMPI.items() if "MCA" not in name})
    if find_spec("kubernetes") is None:
        with pytest.raises(UserError, match="pip install kubernetes"):
            distributed._detect({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})


def test_a_launcher_may_be_told_where_the_coordinator_is(monkeypatch):
    """And alone is alone, whatever it says."""
    asked = []
    monkeypatch.setattr(distributed, "_reach", lambda *args: asked.append(args))
    monkeypatch.setattr(distributed, "_start", lambda where, timeout, options: asked.append(options))
    for name, value in OMPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="was told --processes 4, the coordinator 1"):  # nothing was started
        distributed.initialize("10.0.0.1:34")
    assert asked[0] == ("10.0.0.1:34", 3, distributed.TIMEOUT)
    wanted = {"coordinator_address": "10.0.0.1:34", "num_processes": 4, "process_id": 3}
    assert asked[1].items() >= wanted.items() and asked[1]["cluster_detection_method"] == "deactivate"
    distributed.initialize(processes=1)
    assert len(asked) == 2 and not jax.distributed.is_initialized()


def test_a_coordinator_that_cannot_be_reached():
    with socket.create_server(("localhost", 0)) as server:
        taken = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot be the coordinator at {taken} .Address already in use.; name"):
            distributed.initialize(taken, 2, 0, timeout=0)
    with pytest.raises(PassingError, match=f"Process 1 cannot reach the coordinator at {taken} within 0 s .Connection"):
        distributed.initialize(taken, 2, 1, timeout=0)
    with pytest.raises(UserError, match=r"cannot reach the coordinator at nowhere\.invalid:80"):
        distributed.initialize("nowhere.invalid:80", 2, 1, timeout=0)
    assert not jax.distributed.is_initialized()


def test_what_jax_does_not_find_out(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.\nAnd more.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    expected = r"of this Slurm job do not find each other \(coordinator_address should be defined. And more\); say who"
    with pytest.raises(UserError, match=expected):
        distributed.initialize()
