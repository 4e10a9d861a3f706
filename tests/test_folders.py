"""Base models as folders: what other programs write is read, what is written others read, and damage is refused."""

import json
import os
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_helpers import UNET, VAE, VISION, equal, models_of, random_model, refuses
from safetensors.numpy import load_file, save_file

from datencoder_jax import api
from datencoder_jax.checkpoints import hub
from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.folders import read_base, write_base, write_component
from datencoder_jax.checkpoints.identity import base_fingerprint
from datencoder_jax.checkpoints.layouts import to_torch_layout
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNetConfig
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.prompts import PROMPTS
from datencoder_jax.toyworld.captions import DEFAULTS
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest_plugins = ("base_fixtures",)


def test_base_round_trip(parts, written):
    read = read_base(written)
    assert models_of(read).keys() == models_of(parts).keys()
    for name, model in models_of(parts).items():
        equal(getattr(read, name).params, model.params)
        assert getattr(read, name).config == model.config
    assert read.scheduler["beta_schedule"] == "scaled_linear" and read.feature_extractor == parts.feature_extractor
    assert read.fingerprint == base_fingerprint(parts.unet.params, parts.text_encoder.params)


def test_full_disk_leaves_no_folder(parts, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        refuses("Cannot write .*too large", write_base, tmp_path / "base", parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_tells_models_apart_and_precisions_not(parts, written, tmp_path):
    write_base(tmp_path / "half", parts, dtype="float16")
    full = read_base(written).fingerprint
    assert read_base(tmp_path / "half").fingerprint == full
    assert read_base(tmp_path / "half", dtype="bfloat16").fingerprint == full
    other = parts.unet.params | {"conv_in.bias": parts.unet.params["conv_in.bias"] + 0.01}
    assert base_fingerprint(other, parts.text_encoder.params) != full


def test_stock_pipeline_loads_what_we_write(parts, written, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    write_base(tmp_path / "half", parts)
    StableDiffusionPipeline.from_pretrained(tmp_path / "half", local_files_only=True)
    pipe = StableDiffusionPipeline.from_pretrained(written, local_files_only=True)
    assert type(pipe.image_encoder).__name__ == "CLIPVisionModelWithProjection" and pipe.feature_extractor is not None
    for name, model in models_of(parts).items():
        wanted = to_torch_layout(model.params, abstract_params(model.kind, model.config))
        found = {key: value.numpy() for key, value in getattr(pipe, name).state_dict().items()}
        if name == "text_encoder":
            found = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in found.items()}
        equal({key: v for key, v in found.items() if not key.endswith("position_ids")}, wanted)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.zeros(1, 4, 8, 8)
    ids = pipe.tokenizer(["red"], padding="max_length", return_tensors="np").input_ids
    with torch.no_grad():
        ours = jax.jit(Model.__call__)(parts.text_encoder, ids)
        theirs = pipe.text_encoder(torch.from_numpy(ids))
        np.testing.assert_allclose(ours.last_hidden, theirs.last_hidden_state, atol=2e-5)
        np.testing.assert_allclose(ours.pooled, theirs.pooler_output, atol=2e-5)
        image = pipe("red", num_inference_steps=2, latents=noise, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()


def stock_models(text_options):
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig as TextConfig
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection
    from transformers import CLIPVisionConfig as VisionConfig

    torch.manual_seed(0)
    vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE, **vae_blocks),
        "text_encoder": CLIPTextModel(TextConfig(**text_options, bos_token_id=0)),
        "image_encoder": CLIPVisionModelWithProjection(VisionConfig(**VISION)),
    }


@pytest.fixture(scope="session")
def stock(text_options, tokenizer, tmp_path_factory):
    """A folder that stock diffusers saved, and its torch modules."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPTokenizer

    models = stock_models(text_options)
    folder = tmp_path_factory.mktemp("stock")
    pipe = StableDiffusionPipeline(
        **models,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder, models


def test_reads_what_stock_diffusers_saves(stock):
    import torch

    folder, models = stock
    ours = read_base(folder)
    rng = np.random.default_rng(0)
    z, context = rng.normal(size=(1, 8, 8, 4)).astype("f4"), rng.normal(size=(1, 5, 12)).astype("f4")
    images = rng.normal(size=(1, 16, 16, 3)).astype("f4")

    def nchw(x):
        return torch.from_numpy(np.moveaxis(x, -1, 1).copy())

    with torch.no_grad():
        theirs = models["unet"](nchw(z), torch.tensor([7]), torch.from_numpy(context)).sample
        np.testing.assert_allclose(
            jax.jit(Model.__call__)(ours.unet, z, np.array([7]), context), np.moveaxis(theirs.numpy(), 1, -1), atol=2e-5
        )
        theirs = models["vae"].decode(nchw(z)).sample
        np.testing.assert_allclose(
            jax.jit(lambda vae, z: vae.bind().decode(z))(ours.vae, z), np.moveaxis(theirs.numpy(), 1, -1), atol=2e-5
        )
        theirs = models["image_encoder"](nchw(images)).image_embeds
        np.testing.assert_allclose(jax.jit(Model.__call__)(ours.image_encoder, images).projected, theirs, atol=2e-5)


def test_names_of_other_times(base, parts):
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(vae).items():
        for new, legacy in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{legacy}.")
        is_projection = ".attentions.0." in key and value.ndim == 2
        old[key] = value[:, :, None, None] if is_projection and "query" not in key else value
    assert sum("proj_attn" in key for key in old) == 4
    save_file(old, vae)
    text = base / "text_encoder" / "model.safetensors"
    bare = {key.removeprefix("text_model."): value for key, value in load_file(text).items()}
    save_file(bare | {"embeddings.position_ids": np.arange(MAX_LENGTH)[None]}, text)
    eyes = base / "image_encoder" / "model.safetensors"
    save_file({key.removeprefix("vision_model."): value for key, value in load_file(eyes).items()}, eyes)
    read = read_base(base)
    for name, model in models_of(parts).items():
        equal(getattr(read, name).params, model.params)
    save_file(bare | {"text_model.final_layer_norm.bias": bare["final_layer_norm.bias"]}, text)
    refuses("two names of one parameter", read_base, base)


def test_harmless_tensors_in_parts_are_ignored_and_named(base, parts):
    """What training and conversion leave beside the weights; of a tower that is wanted nothing may be too much."""
    extras = {
        "vae": ("loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay"),
        "text_encoder": ("text_projection.weight", "vision_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"),
        "unet": ("model_ema.num_updates", "global_step"),
    }
    for part, names in extras.items():
        (file,) = (base / part).glob("*.safetensors")
        save_file(load_file(file) | {name: np.zeros(2, "f4") for name in names}, file)
    with pytest.warns(UserWarning, match="that are not used") as caught:
        found = read_base(base)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(said) == 3
    for part, names in extras.items():
        (message,) = [message for message in said if f"{part}{os.sep}" in message]
        assert f"{len(names)} tensor(s)" in message and all(name in message for name in names)
    assert found.fingerprint == base_fingerprint(parts.unet.params, parts.text_encoder.params)
    (file,) = (base / "text_encoder").glob("*.safetensors")
    odd = {"text_model.encoder.layers.9.mlp.fc1.bias": np.zeros(2, "f4")}
    save_file({key: value for key, value in load_file(file).items() if key.startswith("text_model.")} | odd, file)
    with pytest.warns(UserWarning, match="that are not used"):
        refuses("1 unexpected .text_model.encoder.layers.9", read_base, base)


def test_folders_that_are_none(tmp_path, base):
    refuses("There is no folder .*nowhere", read_base, tmp_path / "nowhere")
    refuses("is a file", read_base, base / "model_index.json")
    (base / "vae" / "config.json").write_text("{ nonsense")
    refuses("vae/config.json is not valid JSON", read_base, base)
    (base / "vae" / "config.json").write_text("[1]")
    refuses("vae/config.json holds list", read_base, base)
    (base / "vae" / "config.json").write_text('{"block_out_channels": "wide"}')
    refuses("vae/config.json does not describe a AutoencoderKL", read_base, base)
    (base / "vae" / "config.json").write_text('{"down_block_types": ["Sphere"]}')
    refuses("vae/config.json: .*Sphere", read_base, base)
    (base / "vae" / "config.json").unlink()
    refuses("Cannot read .*vae/config.json", read_base, base)
    (base / "tokenizer" / "vocab.json").unlink()
    refuses("tokenizer holds neither", read_base, base)
    shutil.rmtree(base / "scheduler")
    refuses("lacks the folder scheduler", read_base, base)
    (base / "model_index.json").write_text('{"transformer": ["diffusers", "X"]}')
    refuses("has a transformer", read_base, base)
    (base / "model_index.json").unlink()
    refuses("no model_index.json", read_base, base)


def test_parts_of_different_models(base, parts):
    config = UNetConfig(**UNET | {"cross_attention_dim": 20})
    kind = COMPONENTS["unet"].kind
    write_component(base / "unet", random_model(kind, config, 0))
    refuses("vectors of 20 .* vectors of 12", read_base, base)


@pytest.mark.parametrize("channels", [{"in_channels": 9}, {"out_channels": 8}, {"in_channels": 8, "out_channels": 8}])
def test_models_for_inpainting_and_editing_are_refused(base, channels):
    write_component(base / "unet", random_model(COMPONENTS["unet"].kind, UNetConfig(**UNET | channels), 0))
    refuses("draws from text alone", read_base, base)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer/vocab.json", '{"a": 0, "b', "tokenizer .*damaged"),
        ("tokenizer/vocab.json", "{}", "tokenizer .*damaged"),
        ("tokenizer/merges.txt", None, "tokenizer .*damaged"),
        ("tokenizer/merges.txt", "#version: 0.2\nalone\n", "tokenizer .*damaged"),
        ("tokenizer/tokenizer_config.json", "{ nonsense", "tokenizer .*damaged"),
        ("tokenizer/tokenizer_config.json", "[1]", "tokenizer .*damaged"),
        ("scheduler/scheduler_config.json", '{"beta_start": "small"}', "noise schedule .beta_start cannot be 'small'"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": 10.5}', "num_train_timesteps cannot be 10.5"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": 0}', "noise schedule"),
        ("scheduler/scheduler_config.json", '{"beta_start": 2}', "betas are not between"),
        ("scheduler/scheduler_config.json", '{"trained_betas": 3}', "trained_betas cannot be 3"),
        ("scheduler/scheduler_config.json", '{"clip_sample": "yes"}', "clip_sample cannot be 'yes'"),
        ("scheduler/scheduler_config.json", '{"_class_name": ["DDIMScheduler"]}', "noise schedule"),
        ("scheduler/scheduler_config.json", '{"_class_name": "Sphere"}', "scheduler_config.json: .*Sphere"),
        ("unet/config.json", '{"sample_size": true}', "sample_size cannot be True"),
        ("datencoder.json", "2.0", "datencoder.json holds float"),
        ("datencoder.json", '{"guidance": "2"}', "defaults .guidance cannot be '2'"),
        ("datencoder.json", '{"guidance": NaN}', "guidance cannot be nan"),
        ("datencoder.json", '{"prompts": "a photo of a S*"}', "datencoder.json: .*list of texts"),
        ("datencoder.json", '{"prompts": ["a photo"]}', "datencoder.json: .*does not contain"),
        ("datencoder.json", '{"prompts": [3]}', "datencoder.json does not describe"),
    ],
)
def test_damaged_settings_name_the_file(base, file, content, message):
    (base / file).write_text(content) if content is not None else (base / file).unlink()
    assert str(base / Path(file).parts[0]) in refuses(message, read_pipeline, base, "base")


def test_a_tokenizer_of_another_model(base):
    words = json.loads((base / "tokenizer" / "vocab.json").read_text())
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(words | {"more</w>": len(words)}))
    refuses("tokenizer has more than", read_pipeline, base, "base")


def test_an_encoder_needs_a_vision_tower(parts, tmp_path):
    write_base(tmp_path / "blind", parts._replace(image_encoder=None))
    assert api.load(tmp_path / "blind").base.vision is None
    with pytest.raises(UserError, match="blind has no vision tower"):
        api.load(tmp_path / "blind", encoder=tmp_path / "none")


def test_defaults_of_a_model(parts, written, tmp_path):
    found = read_pipeline(written, "plain")
    assert found.guidance == 7.5 and found.prompts == PROMPTS and not (written / "datencoder.json").exists()
    write_base(tmp_path / "base", parts._replace(defaults=DEFAULTS), dtype="float32")
    own = read_pipeline(tmp_path / "base", "own")
    assert own.guidance == 2.0 and own.prompts == tuple(DEFAULTS["prompts"]) and own.fingerprint == found.fingerprint
    (tmp_path / "base" / "datencoder.json").write_text('{"guidance": 3}')
    half = read_pipeline(tmp_path / "base", "half")
    assert half.guidance == 3 and half.prompts == PROMPTS
    embedded = json.loads((hub.resolve_base("toyworld") / "datencoder.json").read_text())
    assert embedded == DEFAULTS
