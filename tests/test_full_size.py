"""Folders of full size, as diffusers writes them, with random weights: they load, and the outputs are torch's."""

import gc
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import datencoder_jax
from datencoder_jax.checkpoints.folders import read_base
from datencoder_jax.models.module import Model
from datencoder_jax.typing import Added

pytestmark = [
    pytest.mark.slow,
    # Importing torch and its friends warns about Python's own future.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-4
TOKENIZERS = Path(datencoder_jax.__file__).parent / "assets"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
MODELS = {
    "1.5": ({"cross_attention_dim": 768}, {"text_encoder": CLIP_L}, "epsilon", 0.18215),
    "2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        | {"upcast_attention": True, "sample_size": 96},
        {"text_encoder": OPEN_CLIP_H | {"hidden_act": "gelu"}},
        "v_prediction",
        0.18215,
    ),
}
XL_TOWERS = {"text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G | {"hidden_act": "gelu", "projection_dim": 1280}}
# of the ten transformer blocks of the lowest level, two; and all of them, which takes 16 GB
for name, depth in (("XL, shallow", 2), ("XL", 10)):
    MODELS[name] = (XL | {"transformer_layers_per_block": (1, 2, depth)}, XL_TOWERS, "epsilon", 0.13025)
"""UNet, text encoders, prediction type and scale of the latents."""


def inputs(config):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    context = draw(1, 77, config["cross_attention_dim"])
    added = Added(draw(1, 1280), np.array([[1024, 768, 0, 8, 1024, 1024]], np.float32))
    return draw(1, 16, 16, 4), context, added, rng.integers(0, 49406, (1, 77), dtype=np.int32)


def nchw(x):
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def write_stock(folder, unet_options, towers, scaling_factor):
    """Writes the parts one after the other, and returns what each makes of `inputs`."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    z, context, added, ids = inputs(unet_options)
    told = {"text_embeds": torch.from_numpy(added.pooled), "time_ids": torch.from_numpy(added.sizes)}
    outputs = {}

    def keep(name, model, run):
        with torch.no_grad():
            outputs[name] = np.asarray(run(model.eval()))
        model.save_pretrained(folder / name, max_shard_size="2GB")

    keep(
        "unet",
        UNet2DConditionModel(**unet_options),
        lambda m: m(nchw(z), torch.tensor([321]), torch.from_numpy(context), added_cond_kwargs=told).sample,
    )
    gc.collect()
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": scaling_factor}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    keep("vae", AutoencoderKL(**widths, **blocks), lambda m: m.decode(nchw(z)).sample)
    for name, options in towers.items():
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        config = CLIPTextConfig(**options, eos_token_id=49407, bos_token_id=49406, pad_token_id=1)
        keep(name, kind(config), lambda m: m(torch.from_numpy(ids).long()).last_hidden_state)
        tokenizer = "clip_tokenizer" if options is CLIP_L else "open_clip_tokenizer"
        shutil.copytree(TOKENIZERS / tokenizer, folder / name.replace("text_encoder", "tokenizer"))
    return outputs


def close(found, wanted):
    assert np.abs(np.asarray(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("version", list(MODELS))
def test_outputs_are_those_of_torch(version, tmp_path):
    from diffusers import DDIMScheduler

    options, towers, prediction_type, scaling_factor = MODELS[version]
    wanted = write_stock(tmp_path, options, towers, scaling_factor)
    gc.collect()
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type).save_pretrained(
        tmp_path / "scheduler"
    )
    parts = {name: ["transformers", "CLIPTextModel"] for name in towers}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    base = read_base(tmp_path)
    assert base.scheduler["prediction_type"] == prediction_type and base.vae.config.scaling_factor == scaling_factor
    z, context, added, ids = inputs(options)
    added = added if version.startswith("XL") else None
    found = jax.jit(lambda unet, *x: unet(*x, added=added))(base.unet, z, np.array([321]), context)
    close(np.moveaxis(found, -1, 1), wanted["unet"])
    close(np.moveaxis(jax.jit(lambda vae, z: vae.bind().decode(z))(base.vae, z), -1, 1), wanted["vae"])
    for name in towers:
        close(jax.jit(Model.__call__)(getattr(base, name), ids).last_hidden, wanted[name])
