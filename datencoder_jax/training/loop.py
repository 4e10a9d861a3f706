"""The training loop: one compiled step, exact resume, visible progress.

A `Task` says what is trained and on what. The loop owns everything else. At step `s`, with the batch `task.batch(s)`
and the key `k_s = fold_in(seed, s)`,

    l, g     = L(theta_{s-1}; batch_s, k_s), its gradient                                             (1)
    theta_s  = optimiser(theta_{s-1}, g)                                                              (2)
    ema_s    = d_s ema_{s-1} + (1 - d_s) theta_s,    d_s = min(d, (1 + s) / (10 + s))                 (3)

where a step whose `l` or `|g|` is not finite changes nothing but the count of skipped steps. All of it is a function of
the recipe and `s`, so that rerunning into the same work folder goes on exactly where the last checkpoint was made,
whatever the number of devices and processes. How sums round depends on that number and, on a GPU, also on the run,
unless it is in `runtime.target.deterministic_operations`.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from datencoder_jax.checkpoints.atomic import write_all
from datencoder_jax.compilation import Compilation, announce, compile_lowered
from datencoder_jax.errors import UserError
from datencoder_jax.runtime.hardware import find_chip
from datencoder_jax.runtime.target import Target, lowering_for, sharing_batch
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.checkpoints import Checkpoints, check_alike, describe, on_disk
from datencoder_jax.training.logbook import Logbook
from datencoder_jax.training.optim import adamw
from datencoder_jax.training.previews import DrawingTask, PreviewDrawer, write_previews
from datencoder_jax.training.task import PreviewedTask, Task
from datencoder_jax.typing import Params

_NO_STEP = 2**32 - 1
"""Folded into the seed where a step's number would be: initial weights share no draws with any step."""


def initial_key(seed: int) -> jax.Array:
    """The key of initial weights."""
    return jax.random.fold_in(jax.random.key(seed), _NO_STEP)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training; what a checkpoint holds.

    Attributes:
        step: how many steps were made, skipped ones included.
        params, ema: the parameters and their average.
        optimiser: its state.
        skipped, in_a_row: steps that changed nothing: all, and those since the last that did.
    """

    step: jax.Array
    params: Params
    ema: Params
    optimiser: optax.OptState
    skipped: jax.Array
    in_a_row: jax.Array


def start(params: Params, config: Any) -> TrainState:
    """The state before the first step; parameters and average are copies, since both will be donated."""
    first, average = (jax.tree.map(jnp.copy, params) for _ in range(2))
    none = jnp.int32(0)
    return TrainState(none, first, average, adamw(config)[0].init(params), none, none)


def state_shapes(task: Task, config: Any, mesh: Mesh, initial: Params | None = None) -> TrainState:
    """The state's `jax.ShapeDtypeStruct`s with their shardings; nothing is allocated."""
    params = jax.eval_shape(task.init, jax.random.key(0)) if initial is None else initial
    shapes = jax.eval_shape(lambda params: start(params, config), params)
    shardings = on_mesh.of_state(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def make_step(
    task: Task, config: Any
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`: equations (1) to (3)."""
    optimiser, rate = adamw(config)
    value_and_grad = getattr(task, "value_and_grad", None) or jax.value_and_grad(task.loss, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        (loss, metrics), grads = value_and_grad(state.params, frozen, batch, key, state.step)  # (1)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer
            updates, moments = optimiser.update(grads, state.optimiser, state.params)
            lr = rate(state.step - state.skipped)
        params = cast(Params, optax.apply_updates(state.params, updates))  # (2)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema, (1 + count) / (10 + count))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)  # (3)

        params, average, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, average, moments),
            (state.params, state.ema, state.optimiser),
        )
        bad = (~finite).astype(jnp.int32)
        new = TrainState(state.step + 1, params, average, moments, state.skipped + bad, bad * (state.in_a_row + 1))
        counts = {"skipped": new.skipped, "in_a_row": new.in_a_row}
        return new, {"loss": loss, "grad_norm": norm, "lr": jnp.asarray(lr), **metrics, **counts}

    return step


def fit(
    task: Task,
    config: Any,
    workdir: Path,
    *,
    initial: Params | None = None,
    accept_changes: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Params:
    """Trains `task` for `config.steps` steps and returns the averaged weights, on one device.

    Args:
        task: what is trained.
        config: the resolved recipe. Read here: `steps`, `seed`, `ema`, `optim` (see `training.optim`), `mesh` (see
            `training.mesh`), `threads` that draw batches, `log_every`, `preview_every` (0: at the end alone),
            `checkpoint_every` steps (0: none) and `checkpoint_minutes` (0: none; at steps that are logged), `keep` of
            the latest checkpoints and `best` (see `training.checkpoints`), `max_bad_steps` in a row.
        workdir: checkpoints, metrics, previews, and the recipe as `config.json`; an interrupted run found there is
            continued.
        initial: weights to start from instead of `task.init`'s.
        accept_changes: go on from a checkpoint of another recipe.
        notes: further texts for the work folder, by file name.

    Raises:
        UserError: the batch cannot be shared evenly, processes differ in what they run, the run in the work folder is
            another one, the disk fails, or too many steps in a row were not finite.
        SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    mesh = on_mesh.make_mesh(config.mesh)
    on_mesh.rows_here(task.batch_size, mesh)
    run = describe(config, getattr(task, "identity", {}))
    check_alike(run)
    with on_disk(workdir), Checkpoints(workdir, run, config.keep, config.get("best")) as checkpoints:
        state, resumed = _state(task, config, initial, mesh, checkpoints, accept_changes)
        if jax.process_index() == 0:
            # Not before the run there is known to be this one.
            texts = {"config.json": config.to_json(indent=2) + "\n", **(notes or {})}
            write_all(workdir, {name: partial(_write, text=text) for name, text in texts.items()})
        first = int(state.step)
        if first < config.steps:
            state = _train(task, config, workdir, mesh, checkpoints, state, resumed)
        else:
            _say(f"step {first} of {config.steps}: this run is complete")
    return on_mesh.fetch(state.ema, mesh)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _train(
    task: Task, config: Any, workdir: Path, mesh: Mesh, checkpoints: Checkpoints, state: TrainState, resumed: bool
) -> TrainState:
    """The steps that are left, and what is done between them."""
    first, seconds = int(state.step), 60 * config.checkpoint_minutes
    _say(f"training on {mesh.size} x {mesh.devices.flat[0].device_kind}, step {first} of {config.steps}")
    frozen = on_mesh.place(task.frozen, on_mesh.of_frozen(task.frozen, mesh))
    batches = on_mesh.batches(task.batch, task.batch_size, mesh, range(first, config.steps), config.threads)
    batch = next(batches)
    step_fn = _compile(task, config, state, frozen, batch, mesh)
    preview = _Preview(task, frozen, mesh, workdir)
    with Logbook(workdir, first if resumed else None, config.steps) as log, _Interrupt() as interrupt:
        if config.preview_every and not resumed:
            preview(state, log)
        speed, saved_at = _Speed(step_fn, task.batch_size, mesh, first), time.monotonic()
        for done in range(first + 1, config.steps + 1):
            state, metrics = step_fn(state, frozen, batch)
            batch = next(batches, None)
            log.bar.update()
            last, stop = done == config.steps, interrupt.asked(done)
            logged = last or done % config.log_every == 0
            if logged:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                in_a_row = values.pop("in_a_row")
                report = getattr(task, "data_report", dict)()
                data = {f"data/{name}": float(count) for name, count in report.items()}
                log.metrics(done, values | speed.since_last(done) | data)
                if in_a_row >= config.max_bad_steps:
                    raise UserError(_not_finite(done, int(in_a_row), checkpoints))
            shown = last or (config.preview_every and done % config.preview_every == 0)
            late = logged and seconds and _agreed(time.monotonic() - saved_at > seconds)
            chosen = config.checkpoint_every and done % config.checkpoint_every == 0
            due, scored = last or stop or late or chosen, shown and checkpoints.seeks_best
            if due and not scored:  # before the preview, which may fail; where the best is sought, scores go with it
                checkpoints.save(done, state)
            if shown:
                scores = preview(state, log)
                speed.restart(done)
                if scored:
                    checkpoints.save(done, state, scores)
            if due or scored:
                saved_at = time.monotonic()
            if stop and not last:
                checkpoints.wait()
                raise SystemExit(f"interrupted at step {done}; run the same command again to go on")
        checkpoints.wait()
    return state


def _state(
    task: Task, config: Any, initial: Params | None, mesh: Mesh, checkpoints: Checkpoints, accept_changes: bool
) -> tuple[TrainState, bool]:
    """The state to go on from, on its devices, and whether a checkpoint held it."""
    shapes = state_shapes(task, config, mesh, initial)
    if found := checkpoints.restore(shapes, accept_changes):
        state, complaints = found
        for line in complaints:
            _say(line)
        return state, True
    params = task.init(initial_key(config.seed)) if initial is None else initial
    placed = on_mesh.place(params, on_mesh.of_params(params, mesh))
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(lambda params: start(params, config), out_shardings=shardings)(placed), False


def trace_step(
    task: Task, config: Any, state: TrainState, frozen: Any, batch: dict, mesh: Mesh, *, keep_unused: bool = False
) -> jax.stages.Traced:
    """The training step for these arrays (or shapes with shardings), traced for the devices of `mesh`.

    It takes over the state's memory.

    Args:
        keep_unused: keep arguments that the step does not read, for counting their memory.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, on_mesh.WHOLE)
    jitted = jax.jit(make_step(task, config), donate_argnums=0, out_shardings=shardings, keep_unused=keep_unused)
    with lowering_for(Target.of(mesh.devices.flat[0])), sharing_batch(mesh if mesh.size > 1 else None):
        return jitted.trace(state, frozen, batch)


def _compile(task: Task, config: Any, state: TrainState, frozen: Any, batch: dict, mesh: Mesh) -> Any:
    """The step for these shapes and places, compiled once."""

    def prepare() -> Compilation:
        lowered = trace_step(task, config, state, frozen, batch, mesh).lower()
        return compile_lowered(lowered, Target.of(mesh.devices.flat[0]).compiler_options())

    return announce("preparing the training step", prepare, quiet=jax.process_index() > 0)


class _Preview:
    """Writes the sample grid of the averaged weights, and its scores: drawn by the whole mesh, or on process 0."""

    def __init__(self, task: Task, frozen: Any, mesh: Mesh, workdir: Path):
        self.task, self.mesh, self.workdir = task, mesh, workdir
        draws = hasattr(task, "draw_previews")
        self.drawer = PreviewDrawer(cast(DrawingTask, task), frozen, mesh) if draws else None

    def __call__(self, state: TrainState, log: Logbook) -> dict[str, float]:
        step = int(state.step)
        path = self.workdir / f"preview_{step:07d}.png"
        # All processes have to help, in drawing or in fetching the average.
        shown = self.drawer(state.ema) if self.drawer else on_mesh.fetch(state.ema, self.mesh)
        scores = self._write(shown, path) if jax.process_index() == 0 else {}
        log.preview(step, scores, path)
        return scores

    def _write(self, shown: Any, path: Path) -> dict[str, float]:
        if self.drawer:
            return write_previews(self.drawer.previews, shown, path)
        return cast(PreviewedTask, self.task).preview(shown, path)


def _not_finite(step: int, in_a_row: int, checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    latest = checkpoints.latest()
    last = "there is no checkpoint yet" if latest is None else f"the last good checkpoint is step {latest}"
    return (
        f"loss or gradient is not finite at step {step} and was not in the {in_a_row} steps up to it; {last} "
        f"in {checkpoints.folder}; lower optim.lr and rerun with --accept-changes"
    )


def _agreed(asked: bool) -> bool:
    """What process 0 says, on all."""
    return bool(multihost_utils.broadcast_one_to_all(jnp.bool_(asked))) if jax.process_count() > 1 else asked


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


class _Speed:
    """Pictures per second since the last log, and the share of the chips' peak that the step's operations make up.

    The compiler counts the operations of one pass through a loop, whatever the number of passes: a lower bound.
    """

    def __init__(self, compiled: Any, batch_size: int, mesh: Mesh, step: int):
        self.batch_size, chip = batch_size, find_chip(mesh.devices.flat[0])
        cost: dict[str, float] = {}
        with suppress(NotImplementedError, jax.errors.JaxRuntimeError):  # not every backend can say
            cost = compiled.cost_analysis() or {}
        self.of_peak = cost.get("flops", 0.0) / chip.flops if chip else 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.at = step, time.perf_counter()

    def since_last(self, step: int) -> dict[str, float]:
        rate = (step - self.step) / (time.perf_counter() - self.at)
        self.restart(step)
        return {"images_per_second": rate * self.batch_size} | ({"mfu": rate * self.of_peak} if self.of_peak else {})


class _Interrupt:
    """Turns SIGTERM and Ctrl-C into a request to checkpoint and stop after the current step.

    With several processes JAX itself listens to SIGTERM, and sees to it that all of them stop at the same step. It
    is told of Ctrl-C.
    """

    def __init__(self):
        self.heard, self.alone = False, jax.process_count() == 1

    def asked(self, step: int) -> bool:
        return self.heard if self.alone else multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> "_Interrupt":
        numbers = (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.heard = True
        if not self.alone:
            os.kill(os.getpid(), signal.SIGTERM)
