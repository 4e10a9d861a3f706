"""The training loop: what a step does, what a run leaves behind, and that an interrupted one goes on exactly."""

import json
import os
import re
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from line_task import BATCH, BIAS, WEIGHT, Line, losses, newest, records, run, same, settings, steps_kept

from datencoder_jax.errors import UserError
from datencoder_jax.training import loop
from datencoder_jax.training.logbook import FILE, Logbook
from datencoder_jax.training.mesh import make_mesh
from datencoder_jax.training.task import whole


def began(task, **changes):
    """The jitted step of a task and its state before the first one, on one device."""
    config = settings(**changes)
    return jax.jit(loop.make_step(task, config)), loop.start(task.init(jax.random.key(1)), config)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("line")
    return run(workdir), newest(workdir)[1]["state"], records(workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_exactly(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    stop = Line(on_log=lambda count: os.kill(os.getpid(), number) if count == 2 else None)
    with pytest.raises(SystemExit, match="interrupted at step 3; run the same command again"):
        run(tmp_path, stop)
    assert signal.getsignal(number) == before
    assert newest(tmp_path)[0] == 3
    ema = run(tmp_path)
    expected, state, log = uninterrupted
    same(ema, expected)
    same(newest(tmp_path)[1]["state"], state)
    assert records(tmp_path) == log


def test_a_crashed_run_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    """A checkpoint is written while the next steps, which reuse its memory, are already running."""

    def crash(count):
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(on_log=crash), checkpoint_every=2)
    assert steps_kept(tmp_path) == [2, 4]
    same(run(tmp_path), uninterrupted[0])
    same(newest(tmp_path)[1]["state"], uninterrupted[1])
    assert records(tmp_path) == uninterrupted[2]


@pytest.mark.parametrize(
    "end", [b'{"step": 4, "lo', b'{"step": 4, "l\xff\xfe', b"\0" * 64, b"\xc3", b"7", b'{"loss": 1}']
)
def test_a_log_that_a_crash_cut_loses_its_last_line(tmp_path, end):
    lines = [f'{{"step": {step}, "loss": 0.5}}\n'.encode() for step in (1, 2, 3)]
    (tmp_path / FILE).write_bytes(b"".join(lines) + end)
    with Logbook(tmp_path, 3, 6) as log:
        log.metrics(4, {"loss": 0.25})
    kept = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    assert kept[:3] == lines and json.loads(kept[3])["loss"] == 0.25 and len(kept) == 4


def test_records_after_the_checkpoint_are_dropped(tmp_path, uninterrupted):
    """As is half a line, which a killed process leaves."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(on_log=lambda count: (_ for _ in ()).throw(KeyboardInterrupt) if count == 4 else None))
    assert len(losses(tmp_path)) == 3 and steps_kept(tmp_path) == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run(tmp_path)  # from the beginning
    assert records(tmp_path) == uninterrupted[2]


def test_a_complete_run_does_nothing_more(tmp_path, capsys):
    run(tmp_path, steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    drawn = []
    run(tmp_path, Line(on_batch=lambda step, rows: drawn.append(step)), steps=2)
    assert "step 2 of 2: this run is complete" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and drawn == []


def test_a_run_may_start_from_given_weights(tmp_path):
    initial = {WEIGHT: jnp.ones((64, 32)), BIAS: jnp.ones(32)}
    same(run(tmp_path, initial=initial, steps=1, ema=0.0, **{"optim.lr": 0.0}), initial)  # which is still there


def test_the_average_of_the_weights(uninterrupted):
    task, config = Line(), settings()
    step, _ = began(task)
    state = loop.start(task.init(jax.random.fold_in(jax.random.key(0), loop._NO_STEP)), config)
    ema = jax.tree.map(np.array, state.params)
    for s in range(config.steps):
        state, _ = step(state, task.frozen, task.batch(s, whole(task)))
        d = min(config.ema, (1 + s) / (10 + s))
        ema = jax.tree.map(lambda average, new, d=d: d * average + (1 - d) * np.asarray(new), ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), uninterrupted[0], ema)


def test_initial_weights_share_no_draws_with_a_step(tmp_path):
    keys = []

    class Spy(Line):
        def init(self, key):
            if not isinstance(key, jax.core.Tracer):
                keys.append(jax.random.key_data(key))
            return super().init(key)

    run(tmp_path, Spy(), steps=1)
    assert len(keys) == 1  # the weights are made once
    steps = jax.vmap(lambda s: jax.random.key_data(jax.random.fold_in(jax.random.key(0), s)))(jnp.arange(1000))
    assert not (steps == keys[0][None]).all(axis=1).any()
    assert not (keys[0] == jax.random.key_data(jax.random.key(0))).all()


# --- steps that are not finite


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    task = Line(spoiled={1, 2})
    step, state = began(task)
    state, _ = step(state, task.frozen, task.batch(0, whole(task)))
    for bad in (1, 2):
        after, metrics = step(state, task.frozen, task.batch(bad, whole(task)))
        assert not np.isfinite(metrics["loss"])
        same((after.params, after.ema, after.optimiser), (state.params, state.ema, state.optimiser))
        assert (int(after.step), int(after.skipped), int(after.in_a_row)) == (bad + 1, bad, bad)
        state = after
    after, metrics = step(state, task.frozen, task.batch(3, whole(task)))
    assert (int(after.step), int(after.skipped), int(after.in_a_row)) == (4, 2, 0)
    assert float(metrics["lr"]) == pytest.approx(0.005)  # the second update that was made
    assert not np.array_equal(after.params[WEIGHT], state.params[WEIGHT])


def test_some_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    run(tmp_path, Line(spoiled={0, 1, 3, 4}))
    assert [record["skipped"] for record in records(tmp_path) if "skipped" in record] == [1, 2, 2, 3, 4, 4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(newest(tmp_path)[1]["state"]))


@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_in_a_row_stop_the_run(tmp_path, log_every):
    with pytest.raises(
        UserError, match=r"not finite at step 5 .* 3 steps.* last good checkpoint is step \d in"
    ) as info:
        run(tmp_path, Line(spoiled={2, 3, 4, 5}), log_every=log_every, checkpoint_every=2, steps=8)
    assert str(tmp_path) in str(info.value) and "\n" not in str(info.value)
    state = newest(tmp_path)[1]["state"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# --- one program, fed ahead of time


def test_the_step_is_compiled_once_and_takes_the_states_memory(tmp_path, capfd):
    run(tmp_path, steps=3, mesh={"data": 2, "fsdp": 4})
    said = capfd.readouterr().err
    assert (
        len(re.findall(r"preparing the training step \.\.\. (?:compiled|loaded from the cache) in \d+\.\d s", said))
        == 1
    )
    task, mesh = Line(), make_mesh({"data": 2, "fsdp": 4})
    config = settings()
    state, _ = loop._state(task, config, None, mesh, _NoCheckpoints(), False)
    batch = {"x": jax.device_put(task.batch(0, whole(task))["x"], jax.NamedSharding(mesh, loop.on_mesh.BY_ROW))}
    compiled = loop._compile(task, config, state, task.frozen, batch, mesh)
    new, _ = compiled(state, task.frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.optimiser)))
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail("moved"), new, state)
    compiled(new, task.frozen, batch)  # which takes its own result


class _NoCheckpoints:
    def restore(self, *_):
        return None


def test_the_host_asks_for_numbers_only_when_they_are_logged(tmp_path, monkeypatch):
    asked = []
    real = jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda x: asked.append(x) or real(x))
    run(tmp_path, steps=7, log_every=3)
    assert len(asked) == 3 and [r["step"] for r in records(tmp_path) if "loss" in r] == [3, 6, 7]


def test_batches_are_drawn_once_each_by_other_threads(tmp_path):
    drawn = []

    def seen(step, rows):
        drawn.append((step, rows.start, rows.stop, threading.current_thread().name))

    run(tmp_path, Line(on_batch=seen), threads=3)
    assert sorted(row[:3] for row in drawn) == [(s, *rows) for s in range(6) for rows in ((0, 3), (3, 5), (5, 8))]
    assert all(name != "MainThread" for *_, name in drawn)


def test_a_mistake_in_the_data_is_told(tmp_path):
    def broken(step, rows):
        if step == 3:
            raise UserError("all pictures are damaged")

    with pytest.raises(UserError, match="all pictures are damaged"):
        run(tmp_path, Line(on_batch=broken))
    assert threading.active_count() < 40


def test_an_interruption_leaves_no_record_of_its_own(tmp_path):
    """Between two that are due: the log has to be that of a run without it."""
    stop = Line(on_log=lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 1 else None)
    with pytest.raises(SystemExit, match="interrupted at step 3"):
        run(tmp_path, stop, log_every=2)
    run(tmp_path, log_every=2)
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == [2, 4, 6]


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (2, 4)])
def test_losses_do_not_depend_on_the_devices(tmp_path, uninterrupted, data, fsdp):
    run(tmp_path, mesh={"data": data, "fsdp": fsdp})
    expected = [record["loss"] for record in uninterrupted[2] if "loss" in record]
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=1e-5)


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
    task = Line()
    task.batch_size = BATCH + 1
    with pytest.raises(UserError, match="a batch of 9 cannot be shared by 8 devices"):
        run(tmp_path, task)


# --- what a run says


def test_metrics_and_previews(tmp_path):
    run(tmp_path, steps=4, log_every=2, preview_every=2)
    log = records(tmp_path)
    assert [(r["step"], "preview/a" in r) for r in log] == [(0, True), (2, False), (2, True), (4, False), (4, True)]
    assert {"loss", "grad_norm", "lr", "skipped", "bias", "data/damaged"} <= log[1].keys()
    assert log[1]["seen_step"] == 1  # what the loss is told
    for step in (0, 2, 4):
        assert (tmp_path / f"preview_{step:07d}.png").exists()
    curves = list((tmp_path / "tensorboard").iterdir())
    assert len(curves) == 1 and b"preview/a" in curves[0].read_bytes()


def test_a_preview_that_fails_takes_nothing_from_the_run(tmp_path):
    class Broken(Line):
        def preview(self, params, path):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, Broken(), steps=4)
    assert max(steps_kept(tmp_path)) == 4


def test_without_tensorboard_there_are_no_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    run(tmp_path, steps=1)
    assert losses(tmp_path) and not (tmp_path / "tensorboard").exists()


def test_without_grain_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(UserError, match=r'pip install "datencoder_jax\[pretrain\]"'):
        run(tmp_path)


def test_utilization_is_logged_where_the_chips_peak_is_known(tmp_path, monkeypatch):
    chip = loop.find_chip(type("Device", (), {"device_kind": "NVIDIA H200"})())
    assert chip is not None and chip.name == "H200"
    monkeypatch.setattr(loop, "find_chip", lambda _: chip)
    run(tmp_path, steps=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    speeds = [line for line in map(__import__("json").loads, lines) if "mfu" in line]
    assert len(speeds) == 2
    flops = [line["mfu"] * chip.flops * BATCH / line["images_per_second"] for line in speeds]  # of a device's step
    per_sample = 3 * 2 * 64 * 32  # forward, and backward to the weights (to the input there is none)
    assert all(per_sample * 0.5 < x < per_sample * 8 for x in flops)
