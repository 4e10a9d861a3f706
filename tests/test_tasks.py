"""What the embedded world's networks are trained on: batches, losses and their keys."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from line_task import compile_quickly, losses, run, same
from tiny import UNET, VAE, VISION, pictures, random_params, write_tiny_base

from datencoder_jax.checkpoints.folders import write_component
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.evaluation.judge import Judge, JudgeConfig
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.models.vae import AutoencoderKL
from datencoder_jax.pipeline import CLIP_MEAN, CLIP_STD, read_pipeline
from datencoder_jax.toyworld.dataset import LABELS
from datencoder_jax.training.clip import CLIPTask, forget_unseen
from datencoder_jax.training.denoiser import DenoiserTask
from datencoder_jax.training.judge import JudgeTask, Views
from datencoder_jax.training.source import Source
from datencoder_jax.training.task import whole
from datencoder_jax.training.vae import VAETask

BATCH = 8


def denoiser(pipeline):
    ids = pipeline.tokenizer.encode(["a photo of a robot", "a house"] * 4)
    latents = np.random.default_rng(0).standard_normal((8, 8, 8, 4)).astype(np.float16)
    source = Source(latents, [""] * 8, np.arange(8), {"ids": ids})
    base = pipeline.base
    return DenoiserTask(UNET, ScheduleConfig(), base.text, base.vae, source, ids, ids[:1], batch_size=BATCH)


def vae(_):
    return VAETask(VAE, Source(pictures(8), [""] * 8, np.arange(8)), None, batch_size=BATCH, kl_weight=1.0)


def clip(pipeline):
    ids = pipeline.tokenizer.encode(["a photo of a robot", "a house"] * 4)
    source = Source(pictures(8), [""] * 8, np.arange(8), {"ids": ids})
    text = replace(pipeline.base.text.config, with_projection=True, projection_dim=12)
    return CLIPTask(text, VISION, source, source, batch_size=BATCH, mean=CLIP_MEAN, std=CLIP_STD)


def judge(_):
    labels = np.zeros((12, 2, len(LABELS)), np.int32)
    labels[:, :, LABELS.index("class")] = np.arange(12)[:, None] % 6
    views = Views(pictures(24).reshape(12, 2, 16, 16, 3), labels)
    config = JudgeConfig(widths=(8,), embedding=8)
    return JudgeTask(config, views, views, batch_size=BATCH, temperature=0.1)


@pytest.mark.parametrize("make", [denoiser, vae, clip, judge])
def test_batches_are_a_function_of_the_step_and_rows_are_its_rows(pipeline, make):
    task = make(pipeline)
    one, other = task.batch(3, whole(task)), task.batch(4, whole(task))
    same(one, task.batch(3, whole(task)))
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    assert all(len(value) == BATCH for value in one.values())
    for rows in (slice(0, 4), slice(4, 8), slice(2, 3)):
        same(task.batch(3, rows), {name: value[rows] for name, value in one.items()})


@pytest.mark.parametrize("make", [denoiser, vae])
def test_no_key_is_used_twice(pipeline, make):
    task = make(pipeline)
    params = pipeline.base.unet.params if make is denoiser else random_params(AutoencoderKL, VAE, 0)
    batch = task.batch(0, whole(task))
    key_reuse.check_key_reuse(task.loss, params, task.frozen, batch, jax.random.key(0), jnp.int32(0))


def test_a_network_trains_alike_on_one_device_and_on_a_mesh(tmp_path, monkeypatch):
    """Parameters of every rank split, and a loss that looks across the whole batch."""

    class Quick(JudgeTask):
        def init(self, key):
            return jax.device_put(random_params(Judge, self.config, 0))

        def preview(self, params, path):
            return {"pictures": 0.0}

    compile_quickly(monkeypatch)
    task = judge(None)
    task.__class__ = Quick
    steps = {"steps": 3, "optim.lr": 1e-3}
    for name, mesh in (("one", {"data": 1, "fsdp": 1}), ("mesh", {"data": 2, "fsdp": 4})):
        run(tmp_path / name, task, mesh=mesh, **steps)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=1e-5)


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
