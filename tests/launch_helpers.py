"""Stand-ins for the programs of clouds and clusters, and the schemas of the files these programs read."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

RECORD = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


class Stand:
    """A folder of programs that come first on the PATH, and what they were called with."""

    def __init__(self, folder):
        self.folder, self.log = folder / "bin", folder / "calls.jsonl"
        self.folder.mkdir()

    def add(self, name, text=None):
        path = self.folder / name
        path.write_text(text or RECORD.format(python=sys.executable, log=str(self.log)))
        path.chmod(0o755)

    def calls(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def run(self, *command, status=0, **environment):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=self.environment(**environment))
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def environment(self, **more):
        # No program of a cloud by accident: of the machine's own, only what Debian puts into /bin and /usr/bin.
        clouds = {"gcloud", "kubectl", "docker", "sudo", "xpk", "sky", "srun", "sbatch"}
        for name in clouds - {path.name for path in self.folder.iterdir()}:
            self.add(name, "#!/bin/sh\necho unexpected: $0 >&2\nexit 99\n")
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "XLA_FLAGS", "JAX_PLATFORMS") if name in os.environ}
        return {**kept, "PATH": f"{self.folder}:/usr/bin:/bin", **more}


SRUN = """#!{python}
# Starts the tasks of a step, with what Slurm tells each of them.
import os, subprocess, sys
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
shared = {{"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": str(tasks)}}
started = [
    subprocess.Popen(command, env={{**os.environ, **shared, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(tasks)
]
sys.exit(max(process.wait() for process in started))
"""

SBATCH = """#!{python}
# Runs a copy of the script at once, as sbatch's daemon does, with what it asked for.
import os, pathlib, re, shutil, subprocess, sys, tempfile
script = next(n for n, word in enumerate(sys.argv) if n and not word.startswith("--"))
asked = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", pathlib.Path(sys.argv[script]).read_text(), re.M)
asked = dict(asked) | dict(word[2:].split("=", 1) for word in sys.argv[1:script])
tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
told = {{"SLURM_JOB_ID": "4711", "SLURM_NTASKS": str(tasks), "SLURM_CPUS_PER_TASK": asked["cpus-per-task"]}}
with tempfile.TemporaryDirectory() as spool:
    copy = shutil.copy(sys.argv[script], spool)
    sys.exit(subprocess.call([copy, *sys.argv[script + 1 :]], env={{**os.environ, **told}}))
"""


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required=(), **properties):
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


# The fields of JobSet's public API reference, version v1alpha2, that are set by its users; a job's template is checked
# against Kubernetes' own schema.
JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        ["name"], name={"type": "string"}, namespace={"type": "string"}, labels=_TEXTS, annotations=_TEXTS
    ),
    spec=_object(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["name", "template"],
                name={"type": "string"},
                groupName={"type": "string"},
                replicas={"type": "integer", "minimum": 1},
                template=_object(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
                dependsOn={"type": "array"},
            ),
        },
        network=_object(
            enableDNSHostnames={"type": "boolean"},
            subdomain={"type": "string"},
            publishNotReadyAddresses={"type": "boolean"},
        ),
        successPolicy={"type": "object"},
        failurePolicy=_object(
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "type": "array",
                "items": _object(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons={"type": "array", "items": {"type": "string"}},
                    targetReplicatedJobs={"type": "array", "items": {"type": "string"}},
                ),
            },
        ),
        startupPolicy={"type": "object"},
        suspend={"type": "boolean"},
        coordinator={"type": "object"},
        managedBy={"type": "string"},
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    ),
)


# A part of SkyPilot 0.14's own schema (sky.utils.schemas.get_task_schema): the fields that a task of ours may use.
SKYPILOT = _object(
    ["name", "resources", "run"],
    name={"type": "string"},
    workdir={"type": "string"},
    num_nodes={"type": "integer", "minimum": 1},
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup={"type": "string"},
    run={"type": "string"},
    file_mounts={
        "type": "object",
        "additionalProperties": _object(
            name={"type": "string"},
            source={"type": "string"},
            store={"enum": ["s3", "gcs", "azure", "r2", "ibm", "oci", "nebius", "cos"]},
            mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
            persistent={"type": "boolean"},
        ),
    },
    resources=_object(
        infra={"type": "string"},
        accelerators={"type": ["string", "object", "array"]},
        accelerator_args={"type": "object"},
        use_spot={"type": "boolean"},
        disk_size={"type": ["integer", "string"]},
        image_id={"type": "string"},
        job_recovery=_object(strategy={"type": "string"}, max_restarts_on_errors={"type": "integer", "minimum": 0}),
    ),
)
