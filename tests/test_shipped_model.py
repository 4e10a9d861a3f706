"""The embedded model is an ordinary diffusers folder: stock diffusers loads it and draws the same latents."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax import api, sampling
from datencoder_jax.checkpoints.encoder_folder import read_encoder
from datencoder_jax.checkpoints.hub import resolve_base
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.evaluation.judge import load_judge
from datencoder_jax.evaluation.suite import instances, make_bench, references, score
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.toyworld.captions import EVALUATION_CONTEXTS, prompt_for

FOLDER = resolve_base("toyworld")
PROMPTS = ["a photo of a robot on the beach", "a pencil sketch of a house at night"]


@pytest.fixture(scope="module")
def pipeline():
    return read_pipeline(FOLDER, "toyworld")


def test_sizes_stay_small_enough_to_ship():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert max(path.stat().st_size for path in files) <= 15e6
    encoder = FOLDER.with_name("toyworld_encoder")
    assert sum(path.stat().st_size for path in encoder.rglob("*") if path.is_file()) <= 15e6


def test_the_shipped_encoder_belongs_to_the_shipped_model(pipeline):
    encoder = read_encoder(FOLDER.with_name("toyworld_encoder"), pipeline.fingerprint, pipeline.vision_fingerprint)
    assert encoder.config.embedding_dim == pipeline.base.table.shape[1]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_stock_diffusers_draws_the_same_latents(pipeline, guidance):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(str(FOLDER), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    side, channels = pipeline.base.unet.config.sample_size, pipeline.base.unet.config.in_channels
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), side, side, channels)).astype(np.float32)
    theirs = stock(
        PROMPTS,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=20,
        guidance_scale=guidance,
        output_type="latent",
    ).images.numpy()

    tokenizer = pipeline.tokenizer
    request = sampling.Request(
        tokenizer.encode(PROMPTS), None, tokenizer.encode([""]), noise, jnp.float32(guidance), jnp.float32(0)
    )
    plan = make_plan("ddim", pipeline.base.schedule, 20)
    ours = np.asarray(jax.jit(sampling.sample_latents)(pipeline.base, plan, request, None)).transpose(0, 3, 1, 2)
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


def test_stock_diffusers_decodes_the_same_pictures(pipeline):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(str(Path(FOLDER) / "vae"))
    side, channels = pipeline.base.unet.config.sample_size, pipeline.base.unet.config.in_channels
    latents = np.random.default_rng(1).standard_normal((2, side, side, channels)).astype(np.float32)
    with torch.no_grad():
        scaled = torch.from_numpy(latents.transpose(0, 3, 1, 2)) / vae.config.scaling_factor
        theirs = vae.decode(scaled).sample.numpy().transpose(0, 2, 3, 1)
    ours = pipeline.base.vae.bind().decode(jnp.asarray(latents) / pipeline.base.vae.config.scaling_factor)
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())


def test_bfloat16_as_on_an_accelerator_personalizes_as_float32_does():
    """A development individual after three steps: losses, vectors and the judge's scores of what is drawn.

    Along one path and with all pixels alike, since most of the time goes into compiling.
    """
    bench, judge = make_bench(instances("development", 1), EVALUATION_CONTEXTS[:4]), load_judge()
    answers, subject = references(bench, judge), bench.instances[0].cls
    prompts = [prompt_for(context, subject).replace(subject, "S*") for context in bench.contexts]

    def personalize(dtype):
        pipeline = api.load(dtype=dtype, compute_dtype=dtype)
        base = pipeline.base
        assert {pipeline.dtype, base.unet.dtype, base.text.dtype, base.vae.dtype, base.eyes.dtype} == {dtype}
        made = api.personalize(pipeline, bench.pictures[0], steps=3, blend=1.0, options={"focus": 0}, quiet=True)
        drawn = api.generate(pipeline, prompts, concept=made.concept, num=1, sampling_steps=8, quiet=True)
        return made, score(bench, judge, answers, [0], drawn.images[None])

    (made, scores), (expected, expected_scores) = personalize("bfloat16"), personalize("float32")
    np.testing.assert_allclose(made.report["losses"], expected.report["losses"], rtol=0.01)
    assert made.report["hard_word"] == expected.report["hard_word"]
    a, b = (np.asarray(x.concept.embeddings).ravel() for x in (made, expected))
    assert a.dtype == np.float32 and a @ b > 0.995 * np.linalg.norm(a) * np.linalg.norm(b)
    for name, tolerance in (("identity", 0.03), ("attributes", 0.1), ("prompt", 0.25)):
        assert abs(scores[name].mean() - expected_scores[name].mean()) <= tolerance, name
