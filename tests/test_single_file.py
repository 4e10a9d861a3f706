"""Checkpoints of one file: every tensor goes where diffusers' own converters put it, or it is an error."""

import compvis
import numpy as np
import pytest
from checkpoint_helpers import equal, models_of, refuses
from safetensors.numpy import save_file

from datencoder_jax.checkpoints.folders import read_base, write_base
from datencoder_jax.checkpoints.kernels import open_kernels
from datencoder_jax.checkpoints.keys import Tensors
from datencoder_jax.checkpoints.layouts import to_torch_layout, torch_shape
from datencoder_jax.checkpoints.single_file import configurations, read_single_file, split
from datencoder_jax.models.clip_text import CLIPTextModel
from datencoder_jax.models.module import abstract_params

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CLIP, OPEN = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
VAE = compvis.vae(channels=32, multiples=(1, 2), blocks=1)
SHALLOW = {"multiples": (1, 2), "depths": (1, 0)}
SMALL = {
    "1.x": compvis.checkpoint(
        unet=compvis.unet(channels=32, context=64, **SHALLOW),
        vae=VAE,
        **{CLIP: compvis.clip_text(width=64, layers=2, words=300)},
    ),
    "2.x": compvis.checkpoint(
        unet=compvis.unet(channels=64, context=64, linear=True, **SHALLOW),
        vae=VAE,
        **{OPEN: compvis.open_clip_text(width=64, layers=3, words=300)},
    ),
    "XL": compvis.checkpoint(
        unet=compvis.unet(
            channels=64, multiples=(1, 2), depths=(0, 2), middle=2, blocks=1, context=192, linear=True, added=1536 + 128
        ),
        vae=VAE,
        **{
            FIRST: compvis.clip_text(width=64, layers=2, words=300),
            SECOND: compvis.open_clip_text(width=128, layers=2, words=300),
        },
    ),
}
"""Models of each generation, small."""

IGNORED = {
    "betas": (3,),
    "sqrt_recip_alphas_cumprod": (3,),
    "posterior_mean_coef1": (3,),
    "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (2, 2),
    "denoiser.sigmas": (3,),
}


def random_tensors(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


@pytest.fixture(scope="module", params=list(SMALL))
def small(request, tmp_path_factory):
    """A generation, its small model's file and the tensors in it."""
    tensors = random_tensors(SMALL[request.param])
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(tensors | random_tensors(IGNORED), path)
    return request.param, path, tensors


def by_diffusers(generation, tensors, parts):
    """What diffusers' converters make of a file, by component."""
    import torch
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}
    unet = parts.unet.config.to_dict()
    levels = len(parts.vae.config.block_out_channels)
    vae = parts.vae.config.to_dict() | {"down_block_types": [0] * levels, "up_block_types": [0] * levels}
    found = {"unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), unet)}
    found["vae"] = theirs.convert_ldm_vae_checkpoint(dict(tensors), vae)
    if generation != "2.x":
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    if generation != "1.x":
        last, prefix = ("text_encoder", OPEN) if generation == "2.x" else ("text_encoder_2", SECOND)
        config = CLIPTextConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        model = CLIPTextModelWithProjection(config)
        found[last] = theirs.convert_open_clip_checkpoint(model, dict(tensors), prefix)
    if generation == "2.x":
        # Its list of what Stable Diffusion 2 does not use names the 24th layer only.
        unused = ("text_projection", "text_model.encoder.layers.2.")
        found[last] = {name: value for name, value in found[last].items() if not name.startswith(unused)}
    return {name: {key: value.numpy() for key, value in arrays.items()} for name, arrays in found.items()}


def test_every_tensor_is_where_diffusers_puts_it(small):
    generation, path, tensors = small
    parts = read_base(path)
    models = models_of(parts)
    wanted = by_diffusers(generation, tensors, parts)
    assert models.keys() == wanted.keys()
    for name, model in models.items():
        found = to_torch_layout(model.params, abstract_params(model.kind, model.config))
        arrays = {key: v[:, :, 0, 0] if v.ndim > found[key].ndim else v for key, v in wanted[name].items()}
        equal(found, arrays)


def test_the_folder_of_a_file_is_the_same_model(small, tmp_path):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    generation, path, _ = small
    parts = read_base(path)
    write_base(tmp_path / "base", parts, dtype="float32")
    read = read_base(tmp_path / "base")
    assert read.fingerprint == parts.fingerprint and read.scheduler.items() >= parts.scheduler.items()
    for name, model in models_of(parts).items():
        assert getattr(read, name).config == model.config
        equal(getattr(read, name).params, model.params)
    kind = StableDiffusionXLPipeline if generation == "XL" else StableDiffusionPipeline
    pipe = kind.from_pretrained(tmp_path / "base", local_files_only=True)
    assert type(pipe.scheduler).__name__ == parts.scheduler["_class_name"]


def test_single_weights_of_a_file_are_those_of_the_whole(small, tmp_path):
    _, path, _ = small
    parts = read_base(path)
    write_base(tmp_path / "base", parts, dtype="float32")
    for name, model in models_of(parts).items():
        for source in (path, tmp_path / "base"):
            with open_kernels(source, name, model) as kernels:
                assert kernels.keys() == model.params.keys()
                equal({name: kernels[name] for name in kernels}, model.params)


def test_halves_of_a_file(small, tmp_path):
    _, path, tensors = small
    whole = read_base(path)
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, tmp_path / "half.safetensors")
    half = read_base(tmp_path / "half.safetensors", dtype="bfloat16")
    assert half.fingerprint == whole.fingerprint
    assert {str(value.dtype) for value in half.unet.params.values()} == {"bfloat16"}


def test_prediction_type(tmp_path):
    for generation, usual, other in (("1.x", "epsilon", "v_prediction"), ("2.x", "v_prediction", "epsilon")):
        path = tmp_path / f"{generation}.safetensors"
        save_file(random_tensors(SMALL[generation]), path)
        assert read_base(path).scheduler["prediction_type"] == usual
        assert read_base(path, prediction_type=other).scheduler["prediction_type"] == other
    # the small VAE halves its pictures
    assert [read_base(path, prediction_type=kind).unet.config.sample_size for kind in (usual, other)] == [384, 256]
    refuses("does not describe a Stable Diffusion model", read_base, path, prediction_type="sample")
    write_base(tmp_path / "folder", read_base(path))
    assert read_base(tmp_path / "folder").scheduler["prediction_type"] == "v_prediction"
    folder = read_base(tmp_path / "folder", prediction_type="epsilon")
    assert folder.scheduler["prediction_type"] == "epsilon" and folder.scheduler["_class_name"] == "DDIMScheduler"


def test_a_file_may_be_marked(tmp_path):
    """By empty tensors, as ComfyUI writes them."""
    tensors, marks = random_tensors(SMALL["1.x"]), {"v_pred": np.zeros(0, "f4"), "ztsnr": np.zeros(0, "f4")}
    for names, prediction, zero in ((("v_pred",), "v_prediction", False), (("v_pred", "ztsnr"), "v_prediction", True)):
        path = tmp_path / f"{len(names)}.safetensors"
        save_file(tensors | {name: marks[name] for name in names}, path)
        scheduler = read_base(path).scheduler
        assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == (prediction, zero)
    told = read_base(path, prediction_type="epsilon").scheduler
    assert told["prediction_type"] == "epsilon" and not told.get("rescale_betas_zero_snr")


@pytest.mark.parametrize(
    "generation, said, prediction",
    [
        ("1.x", "v", "v_prediction"),
        ("1.x", "V_Prediction", "v_prediction"),
        ("1.x", "something", "epsilon"),
        ("2.x", "epsilon", "epsilon"),
    ],
)
def test_metadata_may_tell_the_prediction(tmp_path, generation, said, prediction):
    """Under ModelSpec's name; the empty tensors, and what the user says, count for more."""
    tensors, path = random_tensors(SMALL[generation]), tmp_path / "told.safetensors"
    save_file(tensors, path, {"modelspec.prediction_type": said})
    parts = read_base(path)
    assert parts.scheduler["prediction_type"] == prediction
    assert parts.unet.config.sample_size == 256  # half of the 512 pixels of all but 2.x with v
    assert read_base(path, prediction_type="v_prediction").scheduler["prediction_type"] == "v_prediction"
    save_file(tensors | {"v_pred": np.zeros(0, "f4")}, path, {"modelspec.prediction_type": "epsilon"})
    assert read_base(path).scheduler["prediction_type"] == "v_prediction"


# --- full size, by names and shapes

UNETS = {
    "1.x": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2.x": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "XL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""What `unet/config.json` of the published models says."""

XL = {"multiples": (1, 2, 4), "depths": (0, 2, 10), "middle": 10, "context": 2048, "linear": True, "added": 2816}
FULL = {
    "1.x": {"unet": compvis.unet(), CLIP: compvis.clip_text(width=768, layers=12)},
    "2.x": {"unet": compvis.unet(context=1024, linear=True), OPEN: compvis.open_clip_text(width=1024, layers=24)},
    "XL": {
        "unet": compvis.unet(**XL),
        FIRST: compvis.clip_text(width=768, layers=12),
        SECOND: compvis.open_clip_text(width=1280, layers=32),
    },
}
TOWERS = {
    "1.x": [(768, 12, 12, "quick_gelu", False)],
    "2.x": [(1024, 23, 16, "gelu", False)],
    "XL": [(768, 12, 12, "quick_gelu", False), (1280, 32, 20, "gelu", True)],
}
"""Width, layers, heads, activation and projection of the text towers."""


@pytest.mark.parametrize("generation", list(FULL))
def test_full_size(generation):
    import torch
    from diffusers import UNet2DConditionModel

    shapes = compvis.checkpoint(**FULL[generation], vae=compvis.vae())
    nothing = np.zeros((), np.float32)
    tensors = {name: (lambda shape=shape: np.broadcast_to(nothing, shape)) for name, shape in shapes.items()}
    family, parts = split(Tensors(tensors), "the file")
    configs = configurations(parts, family, "epsilon")
    with torch.device("meta"):
        stock = UNet2DConditionModel(**UNETS[generation])
    assert {name: x.shape for name, x in parts["unet"].items()} == {
        n: tuple(x.shape) for n, x in stock.named_parameters()
    }
    unet = configs["unet"]
    for option in ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim"):
        assert getattr(unet, option) == stock.config[option]
    for option in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        assert getattr(unet, option) == stock.config[option]
    levels = range(len(unet.block_out_channels))
    heads, depths = (UNETS[generation].get(key, 1) for key in ("attention_head_dim", "transformer_layers_per_block"))
    assert [unet.heads(i) for i in levels] == list(np.broadcast_to(heads, len(levels)))
    assert [unet.depth(i) for i in levels] == list(np.broadcast_to(depths, len(levels)))
    towers = [config for name, config in configs.items() if name.startswith("text_encoder")]
    found = [
        (t.hidden_size, t.num_hidden_layers, t.num_attention_heads, t.hidden_act, t.with_projection) for t in towers
    ]
    assert found == TOWERS[generation]
    for name, config in configs.items():
        if name.startswith("text_encoder"):
            wanted = abstract_params(CLIPTextModel, config)
            known = {key: value.shape for key, value in parts[name].items() if key != "logit_scale"}
            assert known == {key: torch_shape(key, x.shape) for key, x in wanted.items()}


# --- refusals


def save(path, tensors):
    save_file(tensors, path)
    return path


def test_what_training_left_beside_the_weights_is_passed_over(tmp_path):
    for generation, start in (("1.x", "cond_stage_model"), ("XL", "conditioner.embedders.0")):
        tensors, path = random_tensors(SMALL[generation]), tmp_path / "model.safetensors"
        more = {f"{start}.logit_scale": np.zeros(1, "f4"), f"{start}.text_projection": np.zeros((8, 8), "f4")}
        wanted = read_single_file(save(path, tensors)).fingerprint
        assert read_single_file(save(path, tensors | more)).fingerprint == wanted


EVERYWHERE = {
    "first_stage_model.loss.logvar": (),
    "first_stage_model.loss.discriminator.main.0.weight": (4, 3, 4, 4),
    "first_stage_model.model_ema.decay": (),
    "first_stage_model.model_ema.encoderconv_inweight": (2, 2),
    "model.diffusion_model.model_ema.num_updates": (),
    "global_step": (),
}
KEPT = {
    "1.x": {
        f"{CLIP}text_projection.weight": (64, 64),
        f"{CLIP}logit_scale": (),
        f"{CLIP}visual_projection.weight": (64, 64),
        f"{CLIP}vision_model.embeddings.class_embedding": (64,),
        f"{CLIP}vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8),
    },
    "2.x": {
        f"{OPEN}attn_mask": (77, 77),
        f"{OPEN}visual.proj": (64, 64),
        f"{OPEN}visual.transformer.resblocks.0.ln_1.weight": (64,),
    },
    "XL": {
        f"{FIRST}text_projection.weight": (64, 64),
        f"{FIRST}vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8),
        f"{SECOND}attn_mask": (77, 77),
        f"{SECOND}visual.conv1.weight": (8, 3, 4, 4),
    },
}
"""Harmless tensors that programs leave in files, of all generations and of each."""


def test_harmless_tensors_are_ignored_and_named_once(small, tmp_path):
    generation, path, tensors = small
    plain = read_base(path)
    extras = random_tensors(EVERYWHERE | KEPT[generation]) | {"global_step": np.asarray(7, np.int64)}
    with pytest.warns(UserWarning, match="that are not used") as caught:
        found = read_base(save(tmp_path / "extras.safetensors", tensors | extras))
    (message,) = [str(warning.message) for warning in caught if warning.category is UserWarning]
    silent = [name for name in extras if name.endswith("logit_scale")]
    assert f"{len(extras) - len(silent)} tensor(s)" in message and "extras.safetensors" in message
    assert sorted(set(extras) - set(silent))[0] in message
    assert found.fingerprint == plain.fingerprint
    for name, model in models_of(plain).items():
        assert getattr(found, name).config == model.config
        equal(getattr(found, name).params, model.params)


@pytest.mark.parametrize("name", ["control_model.input_hint_block.0.weight", "text_model.final_layer_norm.bias"])
def test_weights_of_something_else_are_no_harmless_tensors(tmp_path, name):
    tensors = random_tensors(SMALL["1.x"] | {name: (2,)})
    refuses("1 tensor.s. that are of no known part", read_base, save(tmp_path / "model.safetensors", tensors))


def test_endings_in_capitals(tmp_path):
    tensors = random_tensors(SMALL["1.x"])
    small, capital = (read_base(save(tmp_path / name, tensors)) for name in ("m.safetensors", "M.SAFETENSORS"))
    assert small.fingerprint == capital.fingerprint


def test_strict_both_ways(tmp_path):
    tensors, path = random_tensors(SMALL["1.x"]), tmp_path / "model.safetensors"
    lacking = {key: value for key, value in tensors.items() if "output_blocks.1.0.emb_layers" not in key}
    refuses(r"2 missing \(up_blocks.0.resnets.1.time_emb_proj", read_single_file, save(path, lacking))
    odd = tensors | {"model.diffusion_model.input_blocks.1.0.extra.weight": np.zeros(1, "f4")}
    refuses(r"1 unexpected \(down_blocks.0.resnets.0.extra.weight", read_single_file, save(path, odd))
    refuses(
        "1 tensor.s. that are of no known part, such as odd",
        read_single_file,
        save(path, tensors | {"odd": odd[CLIP + "text_model.final_layer_norm.bias"]}),
    )
    lacking = {key: value for key, value in tensors.items() if key != "model.diffusion_model.input_blocks.0.0.weight"}
    refuses("does not describe a Stable Diffusion model .*conv_in.weight", read_single_file, save(path, lacking))
    bare = {key.replace("transformer.text_model.", "transformer."): value for key, value in tensors.items()}
    bare[CLIP + "embeddings.position_ids"] = np.arange(77)[None]
    equal(read_base(save(path, bare)).text_encoder.params, read_base(save(path, tensors)).text_encoder.params)


def test_a_tower_without_its_last_layer(tmp_path):
    """Files that were written from a diffusers folder of Stable Diffusion 2 lack what it does not use."""
    tensors, path = random_tensors(SMALL["2.x"]), tmp_path / "model.safetensors"
    whole = read_base(save(path, tensors))
    unused = (f"{OPEN}transformer.resblocks.2.", f"{OPEN}text_projection")
    cut = read_base(save(path, {key: value for key, value in tensors.items() if not key.startswith(unused)}))
    assert cut.text_encoder.config == whole.text_encoder.config and whole.text_encoder.config.num_hidden_layers == 2
    equal(cut.text_encoder.params, whole.text_encoder.params)


def full_size(generation, **changes):
    """The tensors of a model of full size, all of their elements one and the same zero."""
    shapes = compvis.checkpoint(**FULL[generation] | changes, vae=compvis.vae())
    nothing = np.zeros((), np.float32)
    return {name: (lambda shape=shape: np.broadcast_to(nothing, shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("layers", [24, 23])
@pytest.mark.parametrize("projection", [True, False])
def test_layers_of_stable_diffusion_2_are_cut_by_count(layers, projection):
    """23 of OpenCLIP's 24 layers are used, whether the file has the last one, the projection, both or neither."""
    tensors = full_size("2.x", **{OPEN: compvis.open_clip_text(width=1024, layers=layers)})
    if not projection:
        del tensors[f"{OPEN}text_projection"]
    family, parts = split(Tensors(tensors), "the file")
    config = configurations(parts, family, "epsilon")["text_encoder"]
    assert (config.num_hidden_layers, config.with_projection) == (23, False)
    wanted = abstract_params(CLIPTextModel, config)
    assert {key for key in parts["text_encoder"] if key != "logit_scale"} == set(wanted)


@pytest.mark.parametrize(
    "generation, changes, message",
    [
        ("2.x", {OPEN: compvis.open_clip_text(width=1024, layers=22)}, "cond_stage_model.model.* has 22 of 24"),
        ("XL", {FIRST: compvis.clip_text(width=768, layers=11)}, "embedders.0.transformer.* has 11 of 12"),
        ("XL", {SECOND: compvis.open_clip_text(width=1280, layers=31)}, "embedders.1.model.* has 31 of 32"),
    ],
)
def test_text_towers_that_lack_layers_in_use_are_refused(generation, changes, message):
    said = refuses("lacks layers of a text encoder", split, Tensors(full_size(generation, **changes)), "the file")
    assert message in said


def test_stable_diffusion_1_may_skip_layers():
    family, parts = split(Tensors(full_size("1.x", **{CLIP: compvis.clip_text(width=768, layers=11)})), "the file")
    assert configurations(parts, family, "epsilon")["text_encoder"].num_hidden_layers == 11


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "is a LoRA"),
        (["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.out.0.weight"], "is the refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "not a whole .*joint_blocks"),
        (["double_blocks.0.img_attn.qkv.weight"], "not a whole .*double_blocks"),
        (["first_stage_model.decoder.conv_in.weight"], "not a whole"),
        (["emb_params"], "not a whole"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight"],
            "text encoder of one",
        ),
    ],
)
def test_files_of_another_kind(tmp_path, names, message):
    path = tmp_path / "model.safetensors"
    save_file({name: np.zeros(1, "f4") for name in names}, path)
    assert str(path) in refuses(message, read_base, path)


def test_models_for_inpainting_and_parts_of_different_models(tmp_path):
    shapes, path = SMALL["XL"], tmp_path / "model.safetensors"
    odd = shapes | {"model.diffusion_model.input_blocks.0.0.weight": (64, 9, 3, 3)}
    refuses("draws from text alone", read_base, save(path, random_tensors(odd)))
    odd = shapes | {f"{SECOND}text_projection": (128, 96)}
    refuses("pooled text of width 128 .* makes 96", read_base, save(path, random_tensors(odd)))


def test_damaged_files(small):
    _, path, _ = small
    cut = path.with_name("cut.safetensors")
    cut.write_bytes(path.read_bytes()[:-8])
    refuses("cut short", read_base, cut)
