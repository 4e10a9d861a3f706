"""Weights in and out: what other programs write is read, what is written others read, and damage is refused."""

import json
import resource
import shutil
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import equal, refuses
from safetensors.numpy import load_file, save_file

from datencoder_jax import api
from datencoder_jax.checkpoints import hub
from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.folders import BaseParts, read_base, read_component, write_base, write_component
from datencoder_jax.checkpoints.identity import base_fingerprint
from datencoder_jax.checkpoints.layouts import from_torch_layout, to_torch_layout
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_text import CLIPTextConfig
from datencoder_jax.models.clip_vision import CLIPVisionConfig
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNetConfig
from datencoder_jax.models.vae import VAEConfig
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.prompts import PROMPTS
from datencoder_jax.toyworld.captions import DEFAULTS
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH, write_tokenizer

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
    **BLOCKS,
)
VAE = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
TOWER = {"intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12}
VISION = dict(**TOWER, hidden_size=8, image_size=16, patch_size=8)


def random_model(kind, config, seed):
    """Parameters drawn by numpy: compiling the initializers of this many shapes would take most of the tests' time."""
    rng = np.random.default_rng(seed)
    params = {name: 0.1 * rng.normal(size=x.shape).astype("f4") for name, x in abstract_params(kind, config).items()}
    return Model(kind, config, jax.device_put(params))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_options(tokenizer):
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    return dict(**TOWER, hidden_size=12, vocab_size=words, max_position_embeddings=MAX_LENGTH, eos_token_id=words - 1)


@pytest.fixture(scope="session")
def parts(tokenizer, text_options):
    configs = {
        "unet": UNetConfig(**UNET),
        "vae": VAEConfig(**VAE),
        "text_encoder": CLIPTextConfig(**text_options),
        "image_encoder": CLIPVisionConfig(**VISION, with_projection=True),
    }
    models = {}
    for i, (name, config) in enumerate(configs.items()):
        kind = COMPONENTS[name].kind
        models[name] = random_model(kind, config, i)
    extractor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    return BaseParts(**models, scheduler=scheduler, tokenizer=tokenizer, feature_extractor=extractor)


@pytest.fixture(scope="session")
def written(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "base"
    write_base(folder, parts, dtype="float32")
    return folder


@pytest.fixture
def base(written, tmp_path):
    """A folder to damage."""
    return Path(shutil.copytree(written, tmp_path / "base"))


# --- layouts


def test_layouts_are_inverse_and_tables_stay():
    rng = np.random.default_rng(0)
    torch_arrays = {
        "a.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "conv.weight": rng.normal(size=(3, 5, 2, 4)).astype(np.float32),
        "token_embedding.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "a.bias": rng.normal(size=3).astype(np.float32),
    }
    shapes = {"a.weight": (5, 3), "conv.weight": (2, 4, 5, 3), "token_embedding.weight": (3, 5), "a.bias": (3,)}
    abstract = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    ours = from_torch_layout(torch_arrays, abstract)
    np.testing.assert_array_equal(ours["conv.weight"][1, 2, 3, 0], torch_arrays["conv.weight"][0, 3, 1, 2])
    assert all(a.flags.c_contiguous for a in ours.values())
    back = to_torch_layout(ours, abstract)
    assert all(a.flags.c_contiguous for a in back.values())
    equal(back, torch_arrays)
    half = {name: a.astype(ml_dtypes.bfloat16) for name, a in torch_arrays.items()}
    equal(to_torch_layout(from_torch_layout(half, abstract), abstract, dtype="bfloat16"), half)


def test_layouts_refuse_what_does_not_match():
    abstract = {f"p{i}.weight": jax.ShapeDtypeStruct((2, 3), np.float32) for i in range(8)}
    good = {name: np.zeros((3, 2), np.float32) for name in abstract}
    message = refuses("8 missing", from_torch_layout, {}, abstract)
    assert "p4" in message and "p5" not in message and "and 3 more" in message
    refuses(r"1 unexpected \(odd\)", from_torch_layout, good | {"odd": np.zeros(1)}, abstract)
    wrong = good | {"p3.weight": np.zeros((2, 3), np.float32)}
    refuses(r"p3.weight is \[2, 3\] instead of \[3, 2\]", from_torch_layout, wrong, abstract)
    refuses("1 parameter.*p3.weight", to_torch_layout, {n: a.T for n, a in wrong.items()}, abstract)
    refuses("type int64", from_torch_layout, good | {"p3.weight": np.zeros((3, 2), np.int64)}, abstract)
    large = {n: np.full((2, 3), 1e6, np.float32) for n in abstract}
    refuses("too large for float16", to_torch_layout, large, abstract, dtype="float16")


# --- folders of our own


def test_base_round_trip(parts, written):
    read = read_base(written)
    for name in COMPONENTS:
        equal(getattr(read, name).params, getattr(parts, name).params)
        assert getattr(read, name).config == getattr(parts, name).config
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_round_trip(parts, tmp_path, dtype):
    write_component(tmp_path / "unet", parts.unet, dtype=dtype)
    component = COMPONENTS["unet"]
    read = read_component(tmp_path, "unet", component.kind, component.config_class)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    equal(read.params, {n: np.asarray(v).astype(kind).astype(np.float32) for n, v in parts.unet.params.items()})
    again = read_component(tmp_path, "unet", component.kind, component.config_class, dtype=dtype)
    assert {v.dtype for v in again.params.values()} == {np.dtype(kind)}


def test_fingerprint_tells_models_apart_and_precisions_not(parts, written, tmp_path):
    write_base(tmp_path / "half", parts, dtype="float16")
    full = read_base(written).fingerprint
    assert read_base(tmp_path / "half").fingerprint == full
    assert read_base(tmp_path / "half", dtype="bfloat16").fingerprint == full
    other = parts.unet.params | {"conv_in.bias": parts.unet.params["conv_in.bias"] + 0.01}
    assert base_fingerprint(other, parts.text_encoder.params) != full


# --- stock diffusers and transformers


def test_stock_pipeline_loads_what_we_write(parts, written, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    write_base(tmp_path / "half", parts)
    StableDiffusionPipeline.from_pretrained(tmp_path / "half", local_files_only=True)
    pipe = StableDiffusionPipeline.from_pretrained(written, local_files_only=True)
    assert type(pipe.image_encoder).__name__ == "CLIPVisionModelWithProjection" and pipe.feature_extractor is not None
    for name, component in COMPONENTS.items():
        model = getattr(parts, name)
        wanted = to_torch_layout(model.params, abstract_params(component.kind, model.config))
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
    for name in COMPONENTS:
        equal(getattr(read, name).params, getattr(parts, name).params)
    save_file(bare | {"text_model.final_layer_norm.bias": bare["final_layer_norm.bias"]}, text)
    refuses("two names of one parameter", read_base, base)


def test_variants_and_shards(base, parts):
    unet = base / "unet"
    plain, stem = unet / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"
    arrays = load_file(plain)
    save_file({k: np.zeros_like(v) for k, v in arrays.items()}, unet / f"{stem}.non_ema.safetensors")
    save_file({k: v.astype(np.float16) for k, v in arrays.items()}, unet / f"{stem}.fp16.safetensors")

    def read():
        return read_component(base, "unet", COMPONENTS["unet"].kind, UNetConfig).params

    equal(read(), parts.unet.params)
    plain.unlink()
    equal(read(), {k: np.asarray(v).astype(np.float16).astype(np.float32) for k, v in parts.unet.params.items()})
    (unet / f"{stem}.fp16.safetensors").unlink()
    assert not any(np.any(v) for v in read().values())

    names = sorted(arrays)
    shards = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: arrays[key] for key in keys}, unet / file)
    index = unet / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in shards.items() for key in keys}}))
    equal(read(), parts.unet.params)
    (unet / file).unlink()
    refuses("00002-of-00002.safetensors, which is missing", read)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    refuses("not a file of its own folder", read)


# --- refusals of damaged folders


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
    (base / "model_index.json").write_text('{"text_encoder_2": ["transformers", "X"]}')
    refuses("has a text_encoder_2", read_base, base)
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


# --- what a model says of itself


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


def test_pickles_are_refused(base):
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refuses("only pickled weights .*python -c", read_base, base)
    weights.with_suffix(".bin").unlink()
    refuses("holds no weights", read_base, base)


def test_damaged_weights_name_the_file(base):
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content, reason in [
        (whole[:-8], "cut short"),
        (whole[:100], "cut short"),
        (b"", "empty"),
        (struct.pack("<Q", 2**40) + b"x" * 50, "damaged"),
        (b"<!DOCTYPE html><html>not found</html>", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    ]:
        weights.write_bytes(content)
        message = refuses(reason, read_base, base)
        assert str(weights) in message
    arrays = {"a": np.zeros(3, np.float32)}
    save_file(arrays, weights)
    refuses(r"diffusion_pytorch_model.safetensors: .*missing \(conv_in.bias.* and 1 unexpected \(a\)", read_base, base)


def test_wrong_shapes_and_types_in_a_file(base):
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(weights)
    save_file(arrays | {"conv_in.weight": np.zeros((8, 9, 3, 3), np.float32)}, weights)
    refuses(r"conv_in.weight is \[8, 9, 3, 3\] instead of \[8, 4, 3, 3\]", read_base, base)
    save_file(arrays | {"conv_in.bias": np.zeros(8, np.int8)}, weights)
    refuses("conv_in.bias is of type I8", read_base, base)


# --- names of base models


def test_resolve_base(tmp_path, monkeypatch):
    assert hub.resolve_base(tmp_path) == tmp_path
    assert hub.resolve_base("toyworld").parts[-2:] == ("assets", "toyworld")
    refuses("There is no folder", hub.resolve_base, tmp_path / "none")
    refuses("home folder that is not known", hub.resolve_base, "~nosuchuser/x")
    (tmp_path / "sd.ckpt").write_text("")
    refuses("from_single_file", hub.resolve_base, tmp_path / "sd.ckpt")
    refuses("gone .*use stable-diffusion-v1-5/", hub.resolve_base, "runwayml/stable-diffusion-v1-5")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    refuses("cannot be reached .no route", hub.resolve_base, "nobody-at-all/nothing-here")


def test_download_takes_one_set_of_weights():
    files = ["model_index.json", "v1-5-pruned.safetensors", "README.md", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    files += ["scheduler/scheduler_config.json", "safety_checker/model.safetensors", "unet/config.json"]
    files += [f"unet/diffusion_pytorch_model{v}" for v in (".bin", ".safetensors", ".fp16.safetensors")]
    files += ["unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json"]
    files += ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors", "datencoder.json"]
    wanted = set(hub.choose_files(files, "a/b"))
    assert wanted == {
        "model_index.json",
        "datencoder.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    refuses("only pickled", hub.choose_files, [f for f in files if "vae" not in f or ".bin" in f], "a/b")
    refuses("not in diffusers format", hub.choose_files, ["model.safetensors"], "a/b")
