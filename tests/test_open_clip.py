"""CLIP's towers in OpenCLIP's names and in transformers': the same parameters, and the same numbers as either."""

import gc
import json

import jax
import numpy as np
import pytest
from checkpoint_helpers import equal, refuses
from open_clip_oracle import import_open_clip
from safetensors.numpy import load_file, save_file

from datencoder_jax.checkpoints.folders import write_component
from datencoder_jax.checkpoints.keys import Tensors
from datencoder_jax.checkpoints.openclip import text_tower
from datencoder_jax.checkpoints.single_file_configs import text_config
from datencoder_jax.checkpoints.vision import read_clip, read_vision
from datencoder_jax.checkpoints.weights import place
from datencoder_jax.models.clip_text import CLIPTextModel
from datencoder_jax.models.module import Model, abstract_params

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TEXT = {"context_length": 8, "vocab_size": 20, "width": 128, "heads": 2, "layers": 2}
SMALL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 1.5, "patch_size": 8},
}
WIDE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 128, "patch_size": 8},
    "quick_gelu": True,
}
PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
VIT_H = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
}
VIT_L = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
}


def stock(config):
    """OpenCLIP's module with random weights that keep signals near unit scale."""
    import torch

    torch.manual_seed(0)
    model = import_open_clip().model.CLIP(**config, text_cfg=TEXT).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 and "embedding" not in name:
                value.add_(0.1 * torch.randn_like(value))
    return model


def write_open(folder, config, model, **changes):
    """A folder as OpenCLIP pushes it to the Hub."""
    folder.mkdir()
    values = {"model_cfg": config | {"text_cfg": TEXT}, "preprocess_cfg": PIXELS} | changes
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    save_file(arrays, folder / "open_clip_model.safetensors")
    return folder


def pictures(side, count=2):
    return np.random.default_rng(0).normal(size=(count, side, side, 3)).astype("f4")


def nchw(images):
    import torch

    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def close(found, wanted, tolerance):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def check_tower(config, tmp_path, tolerance):
    """Ours and transformers' towers of OpenCLIP's file against OpenCLIP's; and the file under either names."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    model = stock(config)
    folder = write_open(tmp_path / "open", config, model)
    images = pictures(config["vision_cfg"]["image_size"], count=1)
    with torch.no_grad():
        wanted = model.encode_image(nchw(images)).numpy()
    del model
    gc.collect()
    ours, extractor = read_vision(folder)
    assert extractor == {"image_mean": PIXELS["mean"], "image_std": PIXELS["std"]}
    close(jax.jit(Model.__call__)(ours, images).projected, wanted, tolerance)
    write_component(tmp_path / "hugging", ours, dtype="float32")
    again, _ = read_vision(tmp_path / "hugging")
    assert again.config == ours.config
    equal(again.params, ours.params)
    del ours, again
    gc.collect()
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hugging", local_files_only=True)
    with torch.no_grad():
        close(theirs(nchw(images)).image_embeds, wanted, tolerance)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["gelu", "quick_gelu"])
def test_vision_towers(config, tmp_path):
    check_tower(config, tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [VIT_H, VIT_L], ids=["ViT-H-14", "ViT-L-14"])
def test_vision_towers_of_full_size(config, tmp_path):
    check_tower(config, tmp_path, 1e-4)


def test_text_tower():
    import torch

    model = stock(WIDE)
    arrays = {name: value.numpy() for name, value in model.state_dict().items() if not name.startswith("visual.")}
    arrays.pop("logit_scale")
    tensors = text_tower(Tensors({name: lambda value=value: value for name, value in arrays.items()}))
    config = text_config(tensors, "quick_gelu")
    params = place(tensors, abstract_params(CLIPTextModel, config), dtype="float32", origin="the tower")
    ids = np.array([[18, 3, 4, 19, 0, 0, 0, 0], [18, 5, 19, 0, 0, 0, 0, 0]], np.int32)
    with torch.no_grad():
        wanted = model.encode_text(torch.from_numpy(ids).long())
    close(jax.jit(Model.__call__)(Model(CLIPTextModel, config, params), ids).projected, wanted, 1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
def test_folders_of_transformers(tmp_path, whole):
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "hidden_act": "gelu"}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = (CLIPModel(config) if whole else CLIPVisionModel(config.vision_config)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    ours, extractor = read_vision(tmp_path)
    assert extractor == {"image_mean": [0.5, 0.5, 0.5]} and ours.config.with_projection is whole
    images = pictures(16)
    with torch.no_grad():
        tower = model.vision_model if whole else model
        pooled = tower(nchw(images)).pooler_output
        found = jax.jit(Model.__call__)(ours, images)
        close(found.pooled, pooled, 2e-5)
        if whole:
            close(found.projected, model.visual_projection(pooled), 2e-5)
    single, _ = read_vision(tmp_path / "model.safetensors", dtype="bfloat16")
    assert {str(value.dtype) for value in single.params.values()} == {"bfloat16"}


def test_the_mask_of_older_versions_is_ignored(tmp_path):
    """OpenCLIP once saved the text tower's attention mask with its weights; it is the text tower's to speak of."""
    folder = write_open(tmp_path / "open", SMALL | {"embed_dim": 128}, stock(SMALL | {"embed_dim": 128}))
    (folder / "vocab.json").write_text("{}")
    wanted = read_clip(folder)
    file = folder / "open_clip_model.safetensors"
    save_file(load_file(file) | {"attn_mask": np.zeros((8, 8), "f4")}, file)
    equal(read_vision(folder)[0].params, wanted.vision.params)
    with pytest.warns(UserWarning, match="1 tensor.s. that are not used: attn_mask"):
        found = read_clip(folder)
    equal(found.text.params, wanted.text.params)


def test_what_is_refused(tmp_path):
    model = stock(SMALL)
    folder = write_open(tmp_path / "open", SMALL, model)
    settings, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    refuses("There is no file or folder", read_vision, tmp_path / "none")
    arrays = load_file(weights)
    save_file({key: value for key, value in arrays.items() if key != "visual.proj"}, weights)
    refuses(r"1 missing \(visual_projection.weight\)", read_vision, weights)
    save_file(arrays | {"visual.extra": np.zeros(1, "f4")}, weights)
    refuses(r"1 unexpected \(extra\)", read_vision, folder)
    settings.write_text(json.dumps({"model_cfg": SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"pool_type": "avg"}}}))
    refuses("open_clip_config.json: .*pool_type='avg' is not supported", read_vision, folder)
    settings.write_text(json.dumps({"model_cfg": {"embed_dim": 3}}))
    refuses("does not describe an OpenCLIP model .*vision_cfg", read_vision, folder)
    settings.unlink()
    refuses("Cannot read .*open_clip_config.json", read_vision, weights)
    (tmp_path / "other").mkdir()
    save_file({"vision_model.embeddings.class_embedding": np.zeros(1, "f4")}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "siglip", "vision_config": {}}')
    refuses("config.json: model_type 'siglip' is not supported", read_vision, tmp_path / "other")
