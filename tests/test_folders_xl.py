"""Folders of Stable Diffusion XL: two text towers, two tokenizers, both ways with stock diffusers."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_helpers import UNET, VAE, equal, models_of, random_model, refuses
from safetensors.numpy import load_file, save_file

from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.folders import read_base, write_base, write_component
from datencoder_jax.checkpoints.identity import base_fingerprint
from datencoder_jax.models.clip_text import CLIPTextConfig
from datencoder_jax.models.module import Model
from datencoder_jax.models.unet import UNetConfig
from datencoder_jax.typing import Added

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest_plugins = ("base_fixtures",)

UNET_XL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 12 + 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
SECOND = {"hidden_size": 8, "projection_dim": 10, "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def stock(text_options, tokenizer, tmp_path_factory):
    """A folder that stock diffusers saved, and its pipeline."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig as TextConfig
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    pipe = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**UNET_XL),
        vae=AutoencoderKL(**VAE, **vae_blocks, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(TextConfig(**text_options, bos_token_id=0)),
        text_encoder_2=CLIPTextModelWithProjection(TextConfig(**text_options | SECOND, bos_token_id=0)),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder)
    return folder, pipe


@pytest.fixture
def base(stock, tmp_path):
    """A folder to damage."""
    return Path(shutil.copytree(stock[0], tmp_path / "base"))


def test_reads_what_stock_diffusers_saves(stock):
    import torch

    folder, pipe = stock
    ours = read_base(folder)
    assert ours.tokenizer_2 == folder / "tokenizer_2" and ours.force_zeros_for_empty_prompt
    assert ours.image_encoder is None and ours.vae.config.scaling_factor == 0.13025
    rng = np.random.default_rng(0)
    z, context = rng.normal(size=(1, 8, 8, 4)).astype("f4"), rng.normal(size=(1, 5, 20)).astype("f4")
    added = Added(rng.normal(size=(1, 10)).astype("f4"), np.array([[16, 16, 0, 2, 16, 16]], "f4"))
    ids = pipe.tokenizer_2(["a red cube"], padding="max_length", return_tensors="np").input_ids
    with torch.no_grad():
        told = {"text_embeds": torch.from_numpy(added.pooled), "time_ids": torch.from_numpy(added.sizes)}
        theirs = pipe.unet(
            torch.from_numpy(np.moveaxis(z, -1, 1).copy()),
            torch.tensor([7]),
            torch.from_numpy(context),
            added_cond_kwargs=told,
        ).sample
        found = jax.jit(lambda unet, *x: unet(*x, added=added))(ours.unet, z, np.array([7]), context)
        np.testing.assert_allclose(found, np.moveaxis(theirs.numpy(), 1, -1), atol=2e-5)
        theirs = pipe.text_encoder_2(torch.from_numpy(ids), output_hidden_states=True)
        found = jax.jit(Model.__call__)(ours.text_encoder_2, ids)
        np.testing.assert_allclose(found.projected, theirs.text_embeds, atol=2e-5)
        np.testing.assert_allclose(found.penultimate, theirs.hidden_states[-2], atol=2e-5)


def test_stock_pipeline_loads_what_we_write(stock, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    folder, pipe = stock
    parts = read_base(folder)._replace(force_zeros_for_empty_prompt=False)
    write_base(tmp_path / "base", parts, dtype="float32")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base", local_files_only=True, add_watermarker=False)
    assert again.config.force_zeros_for_empty_prompt is False and again.tokenizer_2.pad_token == "!"
    assert type(again.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    for name in models_of(parts):
        wanted = {key: value.numpy() for key, value in getattr(pipe, name).state_dict().items()}
        equal({key: value.numpy() for key, value in getattr(again, name).state_dict().items()}, wanted)
    read = read_base(tmp_path / "base")
    assert not read.force_zeros_for_empty_prompt and read.fingerprint == parts.fingerprint
    for name, model in models_of(parts).items():
        assert getattr(read, name).config == model.config
        equal(getattr(read, name).params, model.params)


def test_fingerprint_has_both_token_tables(stock, base):
    before = read_base(base)
    texts = before.text_encoder.params, before.text_encoder_2.params
    assert before.fingerprint == base_fingerprint(before.unet.params, *texts)
    assert before.fingerprint != base_fingerprint(before.unet.params, texts[0])
    weights = base / "text_encoder_2" / "model.safetensors"
    arrays = load_file(weights)
    table = next(name for name in arrays if name.endswith("token_embedding.weight"))
    save_file(arrays | {table: arrays[table] + 1}, weights)
    assert read_base(base).fingerprint != before.fingerprint


def test_parts_of_different_models(base, text_options):
    def write(name, config):
        write_component(base / name, random_model(COMPONENTS[name].kind, config, 0))

    second = CLIPTextConfig(**text_options | SECOND, with_projection=True)
    write("text_encoder_2", CLIPTextConfig(**text_options | SECOND | {"projection_dim": 9}, with_projection=True))
    refuses("pooled text of width 10 .* makes 9", read_base, base)
    write("text_encoder_2", CLIPTextConfig(**text_options | SECOND, with_projection=False))
    refuses("pooled text of width 10 .* makes 0", read_base, base)
    write("text_encoder_2", CLIPTextConfig(**text_options | SECOND | {"hidden_size": 6}, with_projection=True))
    refuses("vectors of 20 .* vectors of 18", read_base, base)
    write("text_encoder_2", second)
    write("unet", UNetConfig(**UNET_XL | {"in_channels": 9}))
    refuses("draws from text alone", read_base, base)
    write("unet", UNetConfig(**UNET | {"cross_attention_dim": 20}))
    refuses("pooled text of width 0 .* makes 10", read_base, base)


def test_folders_that_are_none(base):
    index = json.loads((base / "model_index.json").read_text())

    def write(**changes):
        (base / "model_index.json").write_text(json.dumps(index | changes))

    write(text_encoder=[None, None], tokenizer=[None, None])
    refuses("is the refiner of Stable Diffusion XL", read_base, base)
    write(requires_aesthetics_score=True)
    refuses("is the refiner of Stable Diffusion XL", read_base, base)
    write(text_encoder_3=["transformers", "T5EncoderModel"], transformer=["diffusers", "SD3Transformer2DModel"])
    refuses("not a Stable Diffusion 1.x, 2.x or XL model: it has a transformer", read_base, base)
    write(text_encoder_2=[None, None])
    refuses("vectors of 20 .* vectors of 12", read_base, base)
    write()
    (base / "tokenizer_2" / "vocab.json").unlink(missing_ok=True)
    (base / "tokenizer_2" / "tokenizer.json").unlink(missing_ok=True)
    refuses("tokenizer_2 holds neither", read_base, base)
    shutil.rmtree(base / "tokenizer_2")
    refuses("lacks the folder tokenizer_2", read_base, base)
