"""A task that compiles at once, and what the tests of the loop do with it; also run as a program, to be killed."""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from PIL import Image

from datencoder_jax.errors import UserError
from datencoder_jax.runtime.target import Target
from datencoder_jax.training.logbook import TIMES
from datencoder_jax.training.loop import fit

BATCH = 8
WEIGHT, BIAS = "hidden.weight", "hidden.bias"


class Line:
    """Fits `y = a x + b` under noise that depends on the step's key.

    Args:
        on_batch: called with the step and the rows whenever rows of a batch are drawn, by whatever thread.
        on_log: called with the number of the log.
        spoiled: steps whose batches are not finite.
        identity: of base model and data.
    """

    batch_size = BATCH

    def __init__(self, *, on_batch=lambda step, rows: None, on_log=lambda count: None, spoiled=(), identity=None):
        self.on_batch, self.on_log, self.spoiled = on_batch, on_log, spoiled
        self.identity, self.frozen, self.logs = identity or {}, jnp.float32(0.1), 0

    def init(self, key):
        return {WEIGHT: jax.random.normal(key, (64, 32)), BIAS: jnp.zeros(32)}

    def batch(self, step, rows):
        self.on_batch(step, rows)
        x = np.random.default_rng(step).standard_normal((BATCH, 64), dtype=np.float32)
        return {"x": (x * np.float32(np.nan) if step in self.spoiled else x)[rows]}

    def loss(self, params, frozen, batch, key, step):
        noise = frozen * jax.random.normal(key, (BATCH, 32))
        y = batch["x"] @ params[WEIGHT] + params[BIAS][None] + noise
        metrics = {"bias": jnp.abs(params[BIAS]).mean(), "first": batch["x"][0, 0], "seen_step": step}
        return jnp.square(y - batch["x"][:, :32]).mean(), metrics

    def data_report(self):
        self.logs += 1
        self.on_log(self.logs)
        return {"damaged": 3}

    def preview(self, params, path):
        assert all(len(value.devices()) == 1 for value in params.values())
        Image.new("RGB", (2, 2)).save(path)
        return {"a": float(params[WEIGHT].mean())}


def settings(**changes) -> ConfigDict:
    values = {
        "steps": 6,
        "seed": 0,
        "ema": 0.9,
        "optim": {
            "lr": 1e-2,
            "schedule": "stable",
            "warmup": 2,
            "decay": 0.5,
            "weight_decay": 0.1,
            "no_decay": "bias",
            "clip": 1.0,
            "b1": 0.9,
            "b2": 0.99,
        },
        "mesh": {"data": -1, "fsdp": 1},
        "threads": 1,
        "max_bad_steps": 3,
        "log_every": 1,
        "preview_every": 0,
        "checkpoint_every": 0,
        "checkpoint_minutes": 0.0,
        "keep": 3,
        "best": {"metric": "", "mode": "max"},
    }
    config = ConfigDict(values)
    config.update_from_flattened_dict(changes)
    return config


def run(workdir, task=None, *, initial=None, accept_changes=False, notes=None, **changes):
    options = {"initial": initial, "accept_changes": accept_changes, "notes": notes}
    return fit(task or Line(), settings(**changes), workdir, **options)


def compile_quickly(patch):
    """Steps of a few runs do not repay what optimising their program takes."""
    options = Target.of(jax.devices()[0]).compiler_options()
    quick = {**options, "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    patch.setattr(Target, "compiler_options", lambda self: quick)


def newest(workdir):
    """What the newest checkpoint holds."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        return step, dict(manager.restore(step, args=args))


def steps_kept(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def records(workdir) -> list[dict]:
    """The metrics that do not depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def losses(workdir) -> list[float]:
    return [record["loss"] for record in records(workdir) if "loss" in record]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def main(workdir: str, stall: str, changes: str) -> None:
    """Trains; the save of step `stall` stops before it is complete, until the process is killed."""
    from orbax.checkpoint._src.path import atomicity

    rename = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize(self):
        if self.get_final().name == stall:
            while True:
                time.sleep(1)
        await rename(self)

    if stall:
        atomicity.AtomicRenameTemporaryPath.finalize = finalize
    try:
        run(Path(workdir), **json.loads(changes))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
