"""The launch files: linted, their commands parsed by the real parser, and run as far as one machine allows.

Programs of clouds and clusters are stood in for by scripts of the same name, first on the PATH, that write down how
they were called; none of the real ones is ever run.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from launch_helpers import JOBSET, ROOT, SBATCH, SKYPILOT, SRUN, Stand

from datencoder_jax.cli import build_parser

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
BIN = Path(sys.executable).parent
TRAINING = ["--config", "configs/sd15_laion.py", "--workdir", "/mnt/runs/a b", "--set", "steps=3", "data.0.path=it's"]
IMAGE = "us-docker.pkg.dev/me/my/datencoder:tpu"


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


def parse(command):
    """The options of a `datencoder pretrain` command, by the program's own parser."""
    assert command[:2] == ["datencoder", "pretrain"]
    return build_parser().parse_args(command[1:])


# --- lint and help


def test_all_launchers_are_there():
    assert {path.name for path in LAUNCH.iterdir()} == {
        "Dockerfile",
        "gke_jobset.yaml",
        "gpus.sh",
        "skypilot.yaml",
        "slurm.sh",
        "tpu_vm.sh",
        "xpk.sh",
    }


def shellcheck(*arguments, text=None):
    done = subprocess.run(
        [BIN / "shellcheck", "--enable=all", "--exclude=SC2250,SC2310,SC2312,SC2249", *arguments],
        input=text,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    assert os.access(script, os.X_OK)
    shellcheck(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_and_misuse(script, stand):
    text = stand.run(script, "--help").stdout
    assert text.startswith("usage: ") and "datencoder pretrain" in text
    assert max(map(len, text.splitlines())) <= 120
    assert stand.run(script, "-h").stdout == text
    for wrong in ([], ["--nonsense"], ["--name"]):
        done = stand.run(script, *wrong, status=2)
        assert done.stdout == "" and re.fullmatch(r"error: .*\n", done.stderr), done.stderr
    assert stand.calls() == []


def test_the_examples_in_help_texts_parse(stand):
    """Those of `datencoder pretrain`'s options that help texts and YAML files mention exist, and recipes do too."""
    known = subprocess.run(
        [BIN / "datencoder", "pretrain", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for path in LAUNCH.iterdir():
        text = path.read_text("utf-8").replace("\\\n", " ")
        for recipe in re.findall(r"configs/\w+\.py", text):
            assert (ROOT / recipe).exists(), f"{path.name} names {recipe}"
        for command in re.findall(r"datencoder pretrain (--.*)", text):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", command):
                assert re.search(rf"{option}\b", known), f"{path.name} names {option}"


# --- TPU VMs


def tpu_vm(action, *rest, dry_run=False):
    given = ["--name", "pod", "--zone", "us-central1-a", *rest[: rest.index("--") if "--" in rest else None]]
    after = rest[rest.index("--") :] if "--" in rest else []
    return [LAUNCH / "tpu_vm.sh", action, *given, *(["--dry-run"] if dry_run else []), *after]


TPU_ACTIONS = {
    "create": ["--type", "v6e-64", "--version", "v2-alpha-tpuv6e", "--spot", "--project", "me"],
    "status": [],
    "setup": ["--image", IMAGE],
    "run": ["--image", IMAGE, "--mount", "/mnt/nfs", "--", *TRAINING],
    "logs": [],
    "stop": [],
    "delete": [],
}
# As `gcloud compute tpus ... --help` of Google Cloud SDK 528.0.0 lists them.
GCLOUD = {
    "queued-resources create": {"node-id", "zone", "project", "accelerator-type", "runtime-version", "spot"},
    "queued-resources describe": {"zone", "project", "format"},
    "queued-resources delete": {"zone", "project", "force"},
    "tpu-vm ssh": {"zone", "project", "worker", "command"},
}


@pytest.mark.parametrize("action", TPU_ACTIONS)
def test_tpu_vm_says_what_it_would_run(action, stand):
    dry = stand.run(*tpu_vm(action, *TPU_ACTIONS[action], dry_run=True)).stdout
    assert stand.calls() == []
    stand.add("gcloud")
    stand.run(*tpu_vm(action, *TPU_ACTIONS[action]))
    assert [shlex.split(line) for line in dry.splitlines()] == stand.calls()
    for call in stand.calls():
        assert call[:3] == ["gcloud", "compute", "tpus"] and call[5] == "pod"
        flags = {flag.removeprefix("--").partition("=")[0] for flag in call[6:]}
        assert flags <= GCLOUD[" ".join(call[3:5])] and "--zone=us-central1-a" in call


def remote(call):
    return next(flag.removeprefix("--command=") for flag in call if flag.startswith("--command="))


def test_tpu_vm_creates_what_is_asked_for(stand):
    stand.add("gcloud")
    stand.run(*tpu_vm("create", *TPU_ACTIONS["create"]))
    assert stand.calls() == [
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod"),
            *("--zone=us-central1-a", "--project=me", "--accelerator-type=v6e-64"),
            *("--runtime-version=v2-alpha-tpuv6e", "--spot"),
        ]
    ]


def test_tpu_vm_runs_the_command_on_every_machine(stand):
    """What the shell of a machine makes of the command that is sent to it."""
    stand.add("gcloud")
    stand.run(*tpu_vm("run", *TPU_ACTIONS["run"]))
    (call,) = stand.calls()
    assert "--worker=all" in call
    stand.log.unlink()
    stand.add("sudo")
    stand.run("bash", "-c", remote(call))
    removal, started = stand.calls()
    assert removal == ["sudo", "docker", "rm", "--force", "datencoder"]
    assert started[:4] == ["sudo", "docker", "run", "--detach"] and started[-len(TRAINING) - 3] == IMAGE
    assert "/mnt/nfs:/mnt/nfs" in started and "HF_HOME=/mnt/nfs/huggingface" in started
    args = parse(started[-len(TRAINING) - 2 :])
    assert (args.config, str(args.workdir), args.set) == (TRAINING[1], TRAINING[3], TRAINING[5:])


@pytest.mark.parametrize("action", ["setup", "logs", "stop"])
def test_tpu_vm_remote_commands_are_shell(action, stand):
    stand.add("gcloud")
    stand.run(*tpu_vm(action, *TPU_ACTIONS[action]))
    (call,) = stand.calls()
    shellcheck("--shell=bash", "-", text=remote(call))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--name", "pod"], "name the slice with --name and its zone with --zone"),
        (["dance", "--name", "pod", "--zone", "z"], "the action dance is not known"),
        (["run", "stop"], "one action at a time"),
        (["run", "--name", "pod", "--zone", "z", "--image", "i"], "say what to train after --"),
        (["run", "--name", "pod", "--zone", "z", "--", "--config", "c"], "name the image with --image"),
        (["run", "--config", "c"], "Options of datencoder pretrain come after --"),
    ],
)
def test_tpu_vm_mistakes(arguments, message, stand):
    assert message in stand.run(LAUNCH / "tpu_vm.sh", *arguments, status=2).stderr


# --- GKE: XPK, JobSet


def test_xpk(stand):
    options = ["--cluster", "pods", "--name", "sd15", "--image", IMAGE, "--slices", "2", "--storage", "runs"]
    dry = stand.run(LAUNCH / "xpk.sh", *options, "--dry-run", "--", *TRAINING).stdout
    stand.add("xpk")
    stand.run(LAUNCH / "xpk.sh", *options, "--", *TRAINING)
    (call,) = stand.calls()
    assert shlex.split(dry) == call and call[:3] == ["xpk", "workload", "create"]
    given = dict(flag.removeprefix("--").split("=", 1) for flag in call[3:])
    assert given.pop("command") and parse(shlex.split(remote(call))).set == TRAINING[5:]
    assert given == {
        "cluster": "pods",
        "workload": "sd15",
        "docker-image": IMAGE,
        "tpu-type": "v5litepod-16",
        "num-slices": "2",
        "max-restarts": "20",
        "restart-on-exit-codes": "1",
        "termination-grace-period-seconds": "600",
        "storage": "runs",
    }


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text("utf-8"))


def test_jobset_fits_its_schema(jobset):
    jsonschema.validate(jobset, JOBSET)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    del jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"]


def test_jobset_has_a_machine_for_every_four_chips(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": 4}
    assert spec["parallelism"] == spec["completions"] == rows * columns // 4
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_jobset_runs_the_command(jobset):
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    values = {each["name"]: each["value"] for each in container["env"]}
    command = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container["command"]]
    args = parse(command)
    assert (ROOT / args.config).exists() and str(args.workdir).startswith(container["volumeMounts"][0]["mountPath"])


# --- SkyPilot


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text("utf-8"))


def test_skypilot_fits_its_schema(task):
    jsonschema.validate(task, SKYPILOT)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"nodes": 2}, SKYPILOT)
    for part in ("setup", "run"):
        shellcheck("--shell=bash", "--exclude=SC2154", "-", text=task[part])


def test_skypilot_tells_every_process_who_it_is(task, stand):
    stand.add("datencoder")
    for rank in range(2):
        nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank)}
        stand.run("bash", "-c", task["run"].replace("$PWD/.venv-sky/bin:", ""), **task["envs"], **nodes)
    for rank, args in enumerate(map(parse, stand.calls())):
        assert (args.config, str(args.workdir)) == (task["envs"]["CONFIG"], task["envs"]["WORKDIR"])
        assert (args.coordinator, args.processes, args.process) == ("10.0.0.1:8476", 2, rank)


# --- one machine with GPUs


def counting(stand, statuses):
    """A `datencoder` that ends with these statuses, one after the other."""
    stand.add("datencoder")
    count = f'n=$(wc -l < "{stand.log}" 2>/dev/null || echo 0)\nset -- "$@"\n'
    real = stand.folder / "record"
    shutil.move(stand.folder / "datencoder", real)
    cases = "".join(f"  {n}) exit {status};;\n" for n, status in enumerate(statuses))
    stand.add("datencoder", f'#!/bin/bash\n{count}"{real}" "$CUDA_VISIBLE_DEVICES" "$@"\ncase $n in\n{cases}esac\n')


@pytest.mark.parametrize(
    ("statuses", "calls", "status"),
    [([0], 1, 0), ([1, 134, 0], 3, 0), ([2], 1, 2), ([1, 130], 2, 130), ([1] * 9, 4, 1)],
    ids=["complete", "failing twice", "misuse", "stopped", "failing always"],
)
def test_a_failed_run_is_started_again(statuses, calls, status, stand):
    counting(stand, statuses)
    stand.run(LAUNCH / "gpus.sh", "--gpus", "0,1", "--restarts", "3", "--", *TRAINING, status=status)
    assert stand.calls() == [["record", "0,1", "pretrain", *TRAINING]] * calls


def test_a_run_that_is_told_to_stop_may_write_its_checkpoint_first(stand, tmp_path):
    begun, written = tmp_path / "begun", tmp_path / "written"
    stand.add(
        "datencoder",
        f"#!{sys.executable}\n"
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(written)!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)\n",
    )
    process = subprocess.Popen([LAUNCH / "gpus.sh", "--", *TRAINING], env=stand.environment())
    while not begun.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130 and written.exists()


# --- Slurm


@pytest.fixture
def slurm(stand):
    stand.add("srun", SRUN.format(python=sys.executable))
    stand.add("sbatch", SBATCH.format(python=sys.executable))
    return stand


def test_slurm_options_are_those_of_sbatch():
    """As `man sbatch` of Slurm 24.05 lists them."""
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "open-mode"}
    given = re.findall(r"^#SBATCH --([a-z-]+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert set(given) == known | {"requeue", "signal"} and len(given) == len(set(given))


def test_slurm_starts_the_command_once_for_each_task(slurm):
    slurm.add("datencoder")
    slurm.run("sbatch", "--nodes=3", LAUNCH / "slurm.sh", *TRAINING)
    assert slurm.calls() == [["datencoder", "pretrain", *TRAINING]] * 3
    assert parse(slurm.calls()[0]).workdir == Path(TRAINING[3])
    assert "this is no Slurm job" in slurm.run(LAUNCH / "slurm.sh", *TRAINING, status=2).stderr


def test_slurm_fails_when_a_task_does(slurm):
    slurm.add("one", '#!/bin/sh\nexit "$SLURM_PROCID"\n')
    slurm.run("sbatch", LAUNCH / "slurm.sh", *TRAINING, status=1, DATENCODER="one")


def test_processes_find_each_other_by_what_slurm_says(slurm, tmp_path):
    """Two real processes of JAX that know of each other what Slurm tells them, and no more."""
    program = tmp_path / "meet.py"
    program.write_text(
        "import sys\n"
        "from datencoder_jax.training import distributed\n"
        "distributed.split_cpu(2)\n"
        "distributed.initialize(timeout=60)\n"
        "import jax\n"
        "assert jax.process_count() == 2 and jax.device_count() == 4, (jax.process_count(), jax.device_count())\n"
        f"open({str(tmp_path)!r} + f'/met-{{jax.process_index()}}', 'w').write(' '.join(sys.argv[1:]))\n"
    )
    start = f"{sys.executable} {program}"
    slurm.run("sbatch", LAUNCH / "slurm.sh", "--config", "x", DATENCODER=start, PYTHONPATH=str(ROOT))
    assert sorted(path.name for path in tmp_path.glob("met-*")) == ["met-0", "met-1"]
    assert (tmp_path / "met-1").read_text() == "pretrain --config x"


@pytest.mark.slow
def test_slurm_pretrains(slurm, tmp_path):
    """The real command on the embedded world, by two processes; a second job finds it complete."""
    command = [
        *("--config", "configs/toyworld_vae.py", "--variant", "smoke", "--workdir", str(tmp_path / "run")),
        *("--cpu-devices", "2"),
    ]
    for _ in range(2):
        slurm.run("sbatch", LAUNCH / "slurm.sh", *command, DATENCODER=str(BIN / "datencoder"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1


# --- the container


def test_the_container_installs_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    steps = [line.split(maxsplit=1) for line in re.sub(r"\\\n", " ", text).splitlines() if line and line[0] != "#"]
    ordered = [name for name, _ in steps if name in ("FROM", "COPY", "RUN", "CMD")]
    assert ordered == ["FROM", "COPY", "COPY", "COPY", "COPY", "RUN", "CMD"]
    copied = {source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]}
    assert {"configs", "examples", "setup.py"} <= copied  # the wheel takes them along
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    named = {*re.findall(r"EXTRA=(\w+)", text), *re.search(r'"\.\[\$\{EXTRA\},(\w+)\]"', text).groups()}
    assert named == {"cuda", "tpu", "pretrain"} and named <= set(extras)
    parse([*json.loads(dict(steps)["CMD"])[:2], "--config", "x"])
