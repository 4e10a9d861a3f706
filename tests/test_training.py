"""Training: the recipes run end to end, an interrupted run goes on exactly, and the losses are what they say."""

import json
import os
import runpy
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from ml_collections import ConfigDict
from tiny import UNET, VAE, pictures, write_tiny_base

from datencoder_jax import api
from datencoder_jax.checkpoints.folders import read_component, write_component
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.errors import UserError
from datencoder_jax.methods import datencoder
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.toyworld.dataset import prerender
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT
from datencoder_jax.training import encoder_stage, stages
from datencoder_jax.training.__main__ import main
from datencoder_jax.training.clip import forget_unseen
from datencoder_jax.training.denoiser import DenoiserTask
from datencoder_jax.training.loop import _initial_state, fit, make_step
from datencoder_jax.training.optim import adamw
from datencoder_jax.training.source import Source
from datencoder_jax.training.vae import VAETask, encode_latents

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH = 8
"""One sample for each of the test's devices."""


def train(stage, workdir, *settings):
    recipe = str(CONFIGS / f"toyworld_{stage}.py")
    main(["--config", recipe, "--variant", "smoke", "--workdir", str(workdir), "--set", *settings])


def log(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


# --- the recipes, one after another as a person runs them


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work folders of the four stages that make a base model and its encoder."""
    root = tmp_path_factory.mktemp("trained")
    train("vae", root / "vae", f"base={root / 'base'}")
    train("clip", root / "clip", f"base={root / 'base'}")
    train("unet", root / "unet", f"base={root / 'base'}", f"output={root / 'model'}")
    train("encoder", root / "encoder", f"model={root / 'model'}", f"output={root / 'out'}")
    return root


def test_the_recipes_run_one_after_another(trained):
    for stage in ("vae", "clip", "unet", "encoder"):
        records = log(trained / stage)
        assert [r["step"] for r in records] == [2, 4, 4]
        assert all(np.isfinite(list(record.values())).all() for record in records)
        assert any(name.startswith("preview/") for name in records[-1])
        assert (trained / stage / "preview_0000004.png").stat().st_size > 100
    alarms = {"denoise", "contrastive", "nearest_cosine", "words", "concept_cosine", "norm", "offset_norm"}
    assert alarms <= set(records[0]) and 1 <= records[0]["words"] <= BATCH


def test_what_they_made_is_a_model_with_its_encoder(trained):
    pipeline = api.load(trained / "model", encoder=trained / "out")
    assert pipeline.resolution == 32 and pipeline.encoder.config.rank == 2
    images, ids = api.prepare(pipeline, pictures(1)), pipeline.tokenizer.encode([""])
    made = jax.eval_shape(datencoder._predict, pipeline.base, pipeline.encoder, images, ids, jax.random.key(0))
    assert made.embeddings.shape == (1, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"base_fingerprint": "0" * 32}, "another base model"), ({"inventory": [["elsewhere", 16, 16]]}, "does not fill")],
)
def test_an_encoder_of_another_model_is_refused(trained, tmp_path, changes, message):
    shutil.copytree(trained / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if "inventory" in changes:
        changes = {"inventory": [*changes["inventory"], *config["inventory"][1:]]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        api.load(trained / "model", encoder=tmp_path / "out")


def test_latents_have_unit_deviation(trained):
    vae = read_component(trained / "model", "vae", AutoencoderKL, VAEConfig)
    latents = encode_latents(vae, prerender("validation", 256, workers=1)["images"])
    assert latents.astype(np.float32).std() == pytest.approx(1.0, abs=0.02)


def test_stages_train_on_their_split_alone(trained, tmp_path, monkeypatch):
    """No test instance and no held-out class reaches training."""
    asked = []

    class ReadyToTrain(Exception):
        pass

    def spy(module, name):
        real = getattr(module, name)

        def recorded(*args, **options):
            asked.append((name, args))
            return real(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    def fit(*_, **__):
        raise ReadyToTrain

    for module in (stages, encoder_stage):
        monkeypatch.setattr(module, "fit", fit)
    spy(stages, "prerender")
    spy(stages, "render_views")
    spy(encoder_stage, "concept_views")
    for stage in ("vae", "clip", "unet", "judge", "encoder"):
        more = [f"model={trained / 'model'}"] if stage == "encoder" else []
        more += [f"base={trained / 'base'}"] if stage in ("vae", "clip", "unet") else []
        with pytest.raises(ReadyToTrain):
            train(stage, tmp_path / stage, *more)
    splits = [(name, args[1] if name == "concept_views" else args[0]) for name, args in asked]
    assert {split for _, split in splits} == {"train", "validation"}
    assert [split for name, split in splits if name == "concept_views"] == ["train", "validation"]
    training = next(args for name, args in asked if name == "concept_views")
    assert set(training[4]) == set(CLASSES) - set(HELD_OUT) and HELD_OUT


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
    task = Line()
    task.batch_size = BATCH + 1
    with pytest.raises(UserError, match="a batch of 9 cannot be shared by 8 devices"):
        run(tmp_path, task)


def test_a_finished_stage_does_nothing_more(trained, capsys):
    before = log(trained / "vae")
    train("vae", trained / "vae", f"base={trained / 'base'}")
    assert "step 4 of 4" in capsys.readouterr().out
    assert [r["step"] for r in log(trained / "vae")[len(before) :]] == [4]  # the preview alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/none.py"], "no recipe configs/none.py"),
        (["--set", "stepz=3"], "no value 'stepz'"),
        (["--set", "optim.lr.x=3"], "no value 'optim.lr.x'"),
        (["--set", "steps=many"], "steps=many does not fit"),
        (["--variant", "smoky"], "invalid choice"),
    ],
)
def test_misuse_is_status_two_and_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as info:
        main(["--config", str(CONFIGS / "toyworld_vae.py"), "--workdir", str(tmp_path), *arguments])
    assert info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_every_recipe_has_both_variants():
    for path in CONFIGS.glob("*.py"):
        get_config = runpy.run_path(str(path))["get_config"]
        full, smoke = get_config(), get_config("smoke")
        assert full.keys() == smoke.keys() and smoke.steps < full.steps
        assert full.batch_size % 8 == 0 and smoke.batch_size % 8 == 0


# --- the loop, on a task that compiles at once


class Line:
    """Fits `y = a x + b` under noise that depends on the step's key."""

    batch_size = BATCH

    def __init__(self, *, on_batch=lambda step: None, spoil_at=None):
        self.on_batch, self.spoil_at, self.frozen = on_batch, spoil_at, jnp.float32(0.1)

    def init(self, key):
        return {"a.weight": jax.random.normal(key, (64, 32)), "a.bias": jnp.zeros(32)}

    def batch(self, step, rows):
        self.on_batch(step)
        x = np.random.default_rng(step).standard_normal((BATCH, 64), dtype=np.float32)
        return {"x": (x * np.float32(np.nan) if step == self.spoil_at else x)[rows]}

    def loss(self, params, frozen, batch, key, step):
        noise = frozen * jax.random.normal(key, (BATCH, 32))
        y = batch["x"] @ params["a.weight"] + params["a.bias"][None] + noise
        return jnp.square(y - batch["x"][:, :32]).mean(), {"bias": jnp.abs(params["a.bias"]).mean()}

    def preview(self, params, path):
        assert all(len(value.devices()) == 1 for value in params.values())
        path.write_bytes(b"-")
        return {"a": float(params["a.weight"].mean())}


def settings(**changes):
    values = {
        "steps": 6,
        "seed": 0,
        "ema": 0.9,
        "log_every": 1,
        "preview_every": 0,
        "checkpoint_minutes": 10.0,
        "optim": {"lr": 1e-2, "warmup": 2, "decay": 0.5, "weight_decay": 0.1, "clip": 1.0, "b2": 0.99},
    }
    return ConfigDict(values | changes)


def run(workdir, task=None, **changes):
    config = settings(**changes)
    return fit(task or Line(), config, workdir)


def newest(workdir):
    """What the newest checkpoint holds."""
    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        return manager.latest_step(), manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("line")
    return run(workdir), newest(workdir)[1], [r["loss"] for r in log(workdir) if "loss" in r]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_exactly(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    stop = Line(on_batch=lambda step: os.kill(os.getpid(), number) if step == 1 else None)
    with pytest.raises(SystemExit, match="interrupted at step 2; run the same command again"):
        run(tmp_path, stop)
    assert signal.getsignal(number) == before
    assert newest(tmp_path)[0] == 2
    ema = run(tmp_path)
    expected, state, losses = uninterrupted
    same(ema, expected)
    same(newest(tmp_path)[1], state)
    assert [r["loss"] for r in log(tmp_path) if "loss" in r] == losses


def test_a_crashed_run_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted):
    """A checkpoint is written while the next steps, which reuse its memory, are already running."""

    def crash(step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(on_batch=crash), checkpoint_minutes=0.0)
    assert newest(tmp_path)[0] == 4
    same(run(tmp_path), uninterrupted[0])
    same(newest(tmp_path)[1], uninterrupted[1])


def test_a_run_may_start_from_given_weights(tmp_path):
    initial = {"a.weight": jnp.ones((64, 32)), "a.bias": jnp.ones(32)}
    config = settings(steps=1, ema=0.0)
    config.optim.lr = 0.0
    same(fit(Line(), config, tmp_path, initial=initial), initial)  # which is still there


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, log_every):
    with pytest.raises(UserError, match=r"loss is nan at step \d; lower optim.lr and rerun") as info:
        run(tmp_path, Line(spoil_at=3), log_every=log_every, checkpoint_minutes=0.0)
    assert str(tmp_path) in str(info.value) and "\n" not in str(info.value)
    step, state = newest(tmp_path)
    assert step == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_average_of_the_weights(tmp_path, uninterrupted):
    task, config = Line(), settings()
    step = make_step(task, adamw(config), config.seed, config.ema)
    state = _initial_state(task, adamw(config), config.seed, None)
    ema = jax.tree.map(np.array, state.params)
    for s in range(config.steps):
        state, _ = step(state, task.frozen, task.batch(s, slice(0, BATCH)))
        d = min(config.ema, (1 + s) / (10 + s))
        ema = jax.tree.map(lambda average, new, d=d: d * average + (1 - d) * np.asarray(new), ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), uninterrupted[0], ema)


def test_initial_weights_share_no_draws_with_a_step(tmp_path):
    keys = []

    class Spy(Line):
        def init(self, key):
            keys.append(jax.random.key_data(key))
            return super().init(key)

    run(tmp_path, Spy(), steps=1)
    steps = jax.vmap(lambda s: jax.random.key_data(jax.random.fold_in(jax.random.key(0), s)))(jnp.arange(1000))
    assert not (steps == keys[0][None]).all(axis=1).any()
    assert not (keys[0] == jax.random.key_data(jax.random.key(0))).all()


# --- the tasks


def test_words_no_caption_used_say_nothing_and_are_nobodys_neighbour(tmp_path):
    folder = write_tiny_base(tmp_path)
    before = read_pipeline(folder, "tiny")
    text, tokenizer = before.base.text, before.tokenizer
    ids = tokenizer.encode(["a photo of a robot in the snow", "a house"])
    params = forget_unseen(text.params, ids)
    zero = np.flatnonzero(~np.asarray(params[TOKEN_TABLE]).any(axis=1))
    np.testing.assert_array_equal(zero, np.setdiff1d(np.arange(len(params[TOKEN_TABLE])), ids))
    shutil.rmtree(folder / "text_encoder")
    write_component(folder / "text_encoder", replace(text, params=params), dtype="float32")
    words = read_pipeline(folder, "tiny").base.words
    assert {tokenizer.word(i) for i in np.flatnonzero(words)} == {"photo", "robot", "the", "snow", "house"}


def denoiser(pipeline):
    ids = pipeline.tokenizer.encode(["a photo of a robot", "a house"] * 4)
    latents = np.zeros((8, 8, 8, 4), np.float16)
    source = Source(latents, [""] * 8, np.arange(8), {"ids": ids})
    base = pipeline.base
    return DenoiserTask(UNET, ScheduleConfig(), base.text, base.vae, source, ids, ids[:1], batch_size=BATCH)


def test_no_key_is_used_twice(pipeline):
    key = jax.random.key(0)
    base = pipeline.base
    vae = VAETask(VAE, Source(pictures(8), [""] * 8, np.arange(8)), None, batch_size=BATCH, kl_weight=1.0)
    for each, model in ((denoiser(pipeline), base.unet), (vae, base.vae)):
        key_reuse.check_key_reuse(
            each.loss, model.params, each.frozen, each.batch(0, slice(0, BATCH)), key, jnp.int32(0)
        )
