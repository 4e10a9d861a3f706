"""The training loop: one jitted step, time-based checkpoints, exact resume, visible progress.

A `Task` says what is trained and on what. The loop owns everything else: at step `s` it draws the batch
`task.batch(s, rows)` (a pure function), steps with the key `fold_in(seed, s)`, and averages the weights,

    theta_s  = optimiser(theta_{s-1}, grad L(theta_{s-1}; batch_s, key_s))
    ema_s    = d_s ema_{s-1} + (1 - d_s) theta_s,    d_s = min(d, (1 + s) / (10 + s))

so that rerunning into the same work folder goes on exactly where it stopped.
"""

import functools
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from datencoder_jax.errors import UserError
from datencoder_jax.training.optim import adamw
from datencoder_jax.training.task import Task, whole
from datencoder_jax.typing import Params

_NO_STEP = 2**32 - 1
"""Folded into the seed where a step's number would be: initial weights share no draws with any step."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds."""

    step: jax.Array
    params: Params
    ema: Params
    optimiser: optax.OptState


def make_step(task: Task, optimiser: optax.GradientTransformation, seed: int, ema_decay: float):
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; the state is donated."""

    value_and_grad = getattr(task, "value_and_grad", None) or jax.value_and_grad(task.loss, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = value_and_grad(state.params, frozen, batch, key, state.step)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer
            updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, ema, optimiser_state), metrics

    return step


def fit(task: Task, config, workdir: Path, *, initial: Params | None = None, accept_changes: bool = False) -> Params:
    """Trains `task` for `config.steps` steps and returns the averaged weights.

    Args:
        task: what is trained.
        config: `steps`, `seed`, `ema`, `log_every`, `preview_every` (0: only at the end), `checkpoint_minutes`.
        workdir: checkpoints, `log.jsonl` and previews; an interrupted run found there is continued.
        initial: weights to start from instead of `task.init`'s.
        accept_changes: go on from a checkpoint of another recipe.

    Raises:
        UserError: the batch cannot be shared evenly among the devices, or the loss is no longer finite; then the last
            checkpoint is kept.
    """
    if task.batch_size % jax.device_count():
        raise UserError(
            f"a batch of {task.batch_size} cannot be shared by {jax.device_count()} devices; set batch_size"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    optimiser = adamw(config)
    step_fn = make_step(task, optimiser, config.seed, config.ema)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, by_sample = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    frozen = jax.device_put(task.frozen, everywhere)

    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=keep) as manager:
        state = jax.device_put(_initial_state(task, optimiser, config.seed, initial), everywhere)
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, saved_at = int(state.step), time.monotonic()
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"training on {devices}, step {first} of {config.steps}", flush=True)
        quiet = jax.process_index() > 0
        with _Interrupt() as interrupt, tqdm(total=config.steps, initial=first, mininterval=5, disable=quiet) as bar:
            for index in range(first, config.steps):
                batch = jax.device_put(task.batch(index, whole(task)), by_sample)
                state, metrics = step_fn(state, frozen, batch)
                bar.update()
                done = index + 1
                if done % config.log_every == 0 or done == config.steps:
                    _log(workdir, done, metrics, bar)
                if config.preview_every and done % config.preview_every == 0 and done < config.steps:
                    _preview(task, state.ema, workdir, done)
                if interrupt.asked or time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                    _check_finite(done, metrics, workdir)
                    manager.save(done, args=ocp.args.StandardSave(state), force=True)
                    saved_at = time.monotonic()
                if interrupt.asked:
                    manager.wait_until_finished()
                    raise SystemExit(f"interrupted at step {done}; run the same command again to go on")
        if manager.latest_step() != config.steps:
            manager.save(config.steps, args=ocp.args.StandardSave(state), force=True)
            manager.wait_until_finished()
    _preview(task, state.ema, workdir, config.steps)
    return _on_one_device(state.ema)


def _initial_state(
    task: Task, optimiser: optax.GradientTransformation, seed: int, initial: Params | None
) -> TrainState:
    key = jax.random.fold_in(jax.random.key(seed), _NO_STEP)
    params = task.init(key) if initial is None else jax.tree.map(jnp.copy, initial)  # these too will be donated
    # The average starts as a copy: donated buffers may not alias.
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimiser.init(params))


def _log(workdir: Path, step: int, metrics: dict[str, jax.Array], bar: tqdm) -> None:
    _check_finite(step, metrics, workdir)
    values = {name: float(value) for name, value in metrics.items()}
    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
    _append(workdir, {"step": step, "time": time.time(), **values})


def _check_finite(step: int, metrics: dict[str, jax.Array], workdir: Path) -> None:
    for name in ("loss", "grad_norm"):
        if not np.isfinite(value := float(metrics[name])):
            raise UserError(
                f"{name} is {value} at step {step}; lower optim.lr and rerun to go on from the last checkpoint "
                f"in {workdir}"
            )


def _preview(task: Task, params: Params, workdir: Path, step: int) -> None:
    scores = task.preview(_on_one_device(params), workdir / f"preview_{step:07d}.png")
    record = {f"preview/{name}": value for name, value in scores.items()}
    _append(workdir, {"step": step, "time": time.time(), **record})
    print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()), flush=True)


def _on_one_device(replicated: Params) -> Params:
    """The same arrays without the mesh, so that what reads them next is not computed once per device."""
    return {name: value.addressable_data(0) for name, value in replicated.items()}


def _append(workdir: Path, record: dict) -> None:
    with (workdir / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


class _Interrupt:
    """Turns SIGTERM and Ctrl-C into a request to checkpoint and stop after the current step."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        self.asked = True
