"""Stable Diffusion XL from end to end: conditions, latents and pictures against diffusers, concepts in both towers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIDE, pictures, random_model, write_tiny_vision, write_tiny_xl

import datencoder_jax
from datencoder_jax import api, drawing, sampling
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.checkpoints.encoder_folder import write_encoder
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.memory import PRESETS
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.training.encoder_stage import encoder_config
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import Concept, LearningRates, LowRank

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ["a red robot on the beach", "a pencil sketch of a fish"]
SOFT = ["a red S* on the beach", "a pencil sketch of a S*"]
CONFIG = TuningConfig(draws=2, views=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl(folder):
    return datencoder_jax.load(folder)


@pytest.fixture(scope="module")
def stock(folder):
    import torch
    from diffusers import StableDiffusionXLPipeline

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model several wait for each other most of the time
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sighted(folder, xl, tmp_path_factory):
    """With a vision tower from elsewhere and a tuning-encoder whose every weight is random."""
    vision, encoder = write_tiny_vision(tmp_path_factory.mktemp("vision")), tmp_path_factory.mktemp("made") / "encoder"
    seeing = datencoder_jax.load(folder, vision=vision)
    config = encoder_config(seeing, rank=2, width=8, depth=1, heads=2)
    marks = seeing.fingerprint, seeing.vision_fingerprint
    write_encoder(encoder, random_model(TuningEncoder, config, 9), *marks, dtype="float32")
    return datencoder_jax.load(folder, vision=vision, encoder=encoder)


@pytest.fixture(scope="module")
def concept(xl):
    rng = np.random.default_rng(0)
    offsets = {
        path: LowRank(
            rng.standard_normal((inputs, 2), dtype=np.float32) / np.float32(inputs**0.5),
            rng.standard_normal((2, outputs), dtype=np.float32),
        )
        for path, (inputs, outputs) in attention_shapes(xl.base.unet).items()
    }
    vectors = 0.1 * rng.standard_normal((1, sum(xl.base.widths)), dtype=np.float32)
    return Concept(vectors, offsets, "S*", 0.5, xl.name, xl.fingerprint, "robot")


condition = jax.jit(lambda base, ids, vectors=None: base.condition(ids, vectors))


def generate(pipeline, prompts, **changes):
    """One picture of each prompt."""
    options = {"num": 1, "sampler": "euler", "sampling_steps": 20, "guidance": 5.0, "seed": 3, "quiet": True}
    return api.generate(pipeline, prompts, **options | changes).images


def personalize(pipeline, **changes):
    return api.personalize(pipeline, pictures(2), **{"steps": 2, "config": CONFIG, "quiet": True} | changes)


def close(a, b, levels=1):
    assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= levels


def far(a, b):
    return np.abs(a.astype(int) - b).max() > 5


# --- against diffusers


def test_conditions_are_those_of_diffusers(xl, stock):
    import torch

    prompts = [*PROMPTS, "", "a photo of two robots under water at night, in the snow"]
    with torch.no_grad():
        context, negative, pooled, negative_pooled = stock.encode_prompt(prompts, device="cpu", negative_prompt=None)
        empty = stock.encode_prompt(prompts[:1], device="cpu", negative_prompt=[""])
    found = condition(xl.base, xl.tokenizer.encode(prompts))
    assert found.context.shape == (4, xl.tokenizer.length, 12 + 8) and found.pooled.shape == (4, 10)
    np.testing.assert_allclose(found.context, context, atol=2e-5)
    np.testing.assert_allclose(found.pooled, pooled, atol=2e-5)
    assert np.ptp(pooled.numpy(), axis=0).min() > 0.1  # prompts differ
    # The second tower's padding matters, and is not the first's.
    assert (xl.tokenizer.pad, xl.base.second_pad) == (xl.base.end_token, stock.tokenizer_2.pad_token_id)
    other = condition(replace(xl.base, second_pad=xl.base.end_token), xl.tokenizer.encode(prompts))
    assert np.abs(other.context - found.context)[..., 12:].max() > 0.1
    # No negative prompt is zeros for models that say so, and for others the empty prompt.
    assert xl.base.zero_empty and not negative.any() and not negative_pooled.any()
    np.testing.assert_allclose(found.context[2], empty[1][0], atol=2e-5)
    np.testing.assert_allclose(found.pooled[2], empty[3][0], atol=2e-5)


@pytest.mark.parametrize("negative", [None, "a blue house"])
def test_latents_are_those_of_diffusers(xl, stock, negative):
    import torch

    noise, keys = drawing.initial_noise(xl, 2, 1, seed=3)
    assert noise.shape == (2, SIDE // 2, SIDE // 2, 4)
    options = {"num_inference_steps": 20, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}
    options |= {"negative_prompt": negative and [negative] * 2}
    latents = torch.from_numpy(np.moveaxis(np.asarray(noise), -1, 1).copy())
    with torch.no_grad():
        wanted = np.moveaxis(stock(PROMPTS, latents=latents, output_type="latent", **options).images.numpy(), 1, -1)

    ids = jnp.asarray(xl.tokenizer.encode(PROMPTS))
    negative_ids = None if negative is None else jnp.asarray(xl.tokenizer.encode([negative]))
    request = sampling.Request(ids, None, negative_ids, noise, jnp.float32(5), jnp.float32(1), keys)
    plan = make_plan("euler", xl.base.schedule, 20)
    found = jax.jit(sampling.sample_latents)(xl.base, plan, request, None)
    assert np.std(wanted) > 0.1 and np.abs(wanted[0] - wanted[1]).max() > 0.1
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_pictures_are_those_of_diffusers(xl, stock):
    import torch

    latents = torch.from_numpy(np.moveaxis(np.asarray(drawing.initial_noise(xl, 2, 1, seed=3)[0]), -1, 1).copy())
    options = {"num_inference_steps": 20, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}
    with torch.no_grad():
        wanted = stock(PROMPTS, latents=latents, output_type="np", **options).images
    assert xl.base.vae.dtype == "float32"
    close(generate(xl, PROMPTS)[:, 0], np.round(255 * wanted).astype(np.uint8))


def test_pictures_in_parts_are_the_same(folder, xl):
    small = datencoder_jax.load(folder, memory=8)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(small.base))
    close(generate(small, PROMPTS, batch_size=2), generate(xl, PROMPTS))


# --- concepts


def test_a_concept_of_a_words_rows_is_the_word(xl):
    table = np.asarray(xl.base.table)
    assert table.shape[1] == 20 and xl.base.widths == (12, 8)
    rows = table[[xl.tokenizer.word_id(word) for word in ("red", "robot")]]
    found = condition(xl.base, xl.tokenizer.encode(["a S* on the beach"], {"S*": 2}), rows)
    wanted = condition(xl.base, xl.tokenizer.encode(["a red robot on the beach"]))
    assert found.slots[0, 2:4].tolist() == [0, 1] and (np.delete(found.slots[0], [2, 3]) < 0).all()
    plain = (each._replace(slots=None) for each in (found, wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *plain)


def test_gradients_reach_both_halves_of_a_vector(xl):
    ids = xl.tokenizer.encode(["a photo of a S*"], {"S*": 1})

    @jax.jit
    def gradients(vectors):
        def mean(vectors, part):
            return jnp.square(getattr(xl.base.condition(ids, vectors), part)).mean()

        return [jax.grad(mean)(vectors, part)[0] for part in ("context", "pooled")]

    context, pooled = (np.abs(x) for x in gradients(jnp.full((1, 20), 0.1)))
    assert context.min() > 0
    assert pooled[12:].min() > 0 and not pooled[:12].any()  # pooled text is the second tower's alone


def test_offsets_cover_every_attention_layer(xl, stock):
    shapes = attention_shapes(xl.base.unet)
    wanted = {
        name: (module.in_features, module.out_features)
        for name, module in stock.unet.named_modules()
        if ".attn" in name and hasattr(module, "in_features")
    }
    # Four transformers of depth 2; two attentions of four projections each.
    assert shapes == wanted and len(shapes) == 4 * 2 * 2 * 4


def test_the_two_paths(xl, concept):
    drawn = generate(xl, SOFT, concept=concept)
    # With one path, that path alone: the hard word does not matter, and neither does the soft prompt.
    alone = generate(xl, SOFT, concept=concept, blend=1.0)
    np.testing.assert_array_equal(alone, generate(xl, SOFT, concept=replace(concept, nearest_word="fish"), blend=1.0))
    hard = [prompt.replace("S*", "robot") for prompt in SOFT]
    vanilla = generate(xl, hard)
    close(generate(xl, SOFT, concept=concept, blend=0.0), vanilla)
    assert far(alone, drawn) and far(alone, vanilla) and far(drawn, vanilla)


def test_pooled_text_is_blended_as_attention_is(xl):
    """At a blend of 1 the two paths are the soft one alone, and at 0 the hard one, pooled text included."""
    noise, t = drawing.initial_noise(xl, 2, 1, seed=0)[0], jnp.array([500, 20])
    soft, hard = (condition(xl.base, xl.tokenizer.encode([prompt] * 2)) for prompt in PROMPTS)
    mixed = hard._replace(pooled=(0.25 * soft.pooled + 0.75 * hard.pooled))

    @jax.jit
    def denoise(soft, hard, blend):
        return xl.base.denoise(noise, t, soft, hard=hard, blend=blend)

    both = jax.jit(lambda soft: xl.base.denoise(noise, t, soft))
    np.testing.assert_allclose(denoise(soft, hard, 1.0), both(soft), atol=1e-5)
    np.testing.assert_allclose(denoise(soft, hard, 0.0), both(hard), atol=1e-5)
    pooled_alone = soft._replace(context=hard.context)
    np.testing.assert_allclose(denoise(pooled_alone, hard, 0.25), both(mixed), atol=1e-5)
    assert np.abs(both(mixed) - both(hard)).max() > 1e-3


# --- end to end


def round_trip(pipeline, concept, path):
    save_concept(path, concept)
    shapes, width = attention_shapes(pipeline.base.unet), sum(pipeline.base.widths)
    return load_concept(path, pipeline.fingerprint, shapes, width=width)


@pytest.mark.parametrize("method", ["datencoder", "textual_inversion"])
def test_personalize_save_and_generate(xl, sighted, method, tmp_path):
    pipeline, word = (sighted, None) if method == "datencoder" else (xl, "robot")
    start, tuned = (personalize(pipeline, method=method, word=word, steps=steps) for steps in (0, 2))
    concept = tuned.concept
    assert concept.embeddings.shape == (1, 20) and np.isfinite(tuned.report["losses"]).all()
    assert len(concept.offsets) == (64 if method == "datencoder" else 0)
    assert (concept.embeddings != start.concept.embeddings).all()
    drawn = generate(xl, SOFT, concept=concept)
    np.testing.assert_array_equal(generate(xl, SOFT, concept=round_trip(xl, concept, tmp_path / "c")), drawn)
    assert not np.array_equal(generate(xl, SOFT, concept=start.concept), drawn)


def test_lora_at_other_resolutions(xl, stock, tmp_path):
    tuned = personalize(xl, method="lora", word="red robot", resolution=12, learning_rates=LearningRates(0.0, 0.1))
    concept = tuned.concept
    assert concept.metadata["resolution"] == "12" and tuned.report["resolution"] == 12
    rows = [xl.tokenizer.word_id(word) for word in ("red", "robot")]
    np.testing.assert_array_equal(concept.embeddings, xl.base.table[jnp.array(rows)])
    assert concept.offsets.keys() == attention_shapes(xl.base.unet).keys()
    assert all(np.abs(offset.up).min() > 0 for offset in concept.offsets.values())  # every layer has learned
    images = generate(xl, SOFT, concept=concept, resolution=24)
    assert images.shape == (2, 1, 24, 24, 3) and images.std() > 5
    again = round_trip(xl, concept, tmp_path / "c")
    np.testing.assert_array_equal(generate(xl, SOFT, concept=again, resolution=24), images)
    # The UNet is told of the size that is drawn.
    sizes = xl.base.added(jnp.zeros((2, 12, 12, 4)), jnp.zeros((2, 10))).sizes
    wanted = stock._get_add_time_ids((24, 24), (0, 0), (24, 24), stock.dtype, text_encoder_projection_dim=10)
    np.testing.assert_array_equal(sizes, np.repeat(wanted, 2, axis=0))


@pytest.mark.parametrize("resolution", [18, 0, -4])
def test_a_resolution_that_does_not_divide_is_one_sentence(xl, resolution):
    for call in (
        lambda: generate(xl, PROMPTS, resolution=resolution),
        lambda: personalize(xl, method="lora", word="robot", resolution=resolution),
    ):
        with pytest.raises(UserError, match=f"multiple of 4 pixels for this model, and is {resolution}") as info:
            call()
        assert "\n" not in str(info.value)


def test_it_recomputes_where_nothing_is_asked_for(folder, xl):
    assert xl.memory.remat and xl.memory.batch == 4
    assert datencoder_jax.load(folder, memory=16).memory == PRESETS[16]


def test_an_encoder_needs_eyes(folder, tmp_path):
    with pytest.raises(UserError, match=r"has no vision tower .*--vision"):
        datencoder_jax.load(folder, encoder=tmp_path)
