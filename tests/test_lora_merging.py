"""LoRA files that others write do to our UNet and text encoders what they do to diffusers' own."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import refuses
from compvis import unet as original_unet
from export_helpers import draw_offsets, nchw, nhwc, tiny_concept
from PIL import Image
from safetensors.numpy import save_file
from tiny import write_tiny_base, write_tiny_xl

from datencoder_jax import api, cli, sampling
from datencoder_jax.checkpoints.lora_names import layer_finder
from datencoder_jax.errors import UserError
from datencoder_jax.loading import with_lora
from datencoder_jax.pipeline import attention_shapes, read_pipeline

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERS = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_in", "conv_out", "conv1", "conv2"]
OTHERS += ["conv_shortcut", "time_emb_proj", "linear_1", "linear_2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return write_tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def pipelines(sd, xl):
    return {"SD": read_pipeline(sd, "tiny"), "XL": read_pipeline(xl, "tiny XL")}


@pytest.fixture(scope="module")
def ours(pipelines):
    return pipelines["SD"]


@pytest.fixture
def stock(sd, xl):
    """diffusers' pipelines, fresh for every file."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    def load(kind):
        if kind == "SD":
            return StableDiffusionPipeline.from_pretrained(sd, local_files_only=True)
        return StableDiffusionXLPipeline.from_pretrained(xl, local_files_only=True)

    return load


IDS = np.array([[3, 5, 7, 4, 2, 6, 1]])


def inputs(pipeline):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 8, 8, 4), dtype=np.float32)
    pooled = rng.standard_normal((1, pipeline.base.unet.config.pooled_width), dtype=np.float32)
    return latents, rng.standard_normal((1, 5, sum(pipeline.base.widths)), dtype=np.float32), pooled


@jax.jit
def _run(base, latents, context, pooled):
    added = base.added(latents, pooled if base.text_2 else None)
    towers = [base.text] if base.text_2 is None else [base.text, base.text_2]
    states = [tower(jnp.asarray(IDS)) for tower in towers]
    return base.unet(latents, jnp.array([300]), context, added=added), [x.last_hidden for x in states]


def our_outputs(pipeline):
    drawn, states = _run(pipeline.base.only("unet", "text", "text_2"), *inputs(pipeline))
    return [np.asarray(x) for x in (drawn, *states)]


def their_outputs(pipe, pipeline):
    """The UNet's prediction and the text encoders' states."""
    import torch

    latents, context, pooled = inputs(pipeline)
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
    added = {"text_embeds": torch.from_numpy(pooled), "time_ids": sizes}
    towers = [pipe.text_encoder] + ([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])
    with torch.no_grad():
        drawn = pipe.unet(nchw(latents), 300, torch.from_numpy(context), added_cond_kwargs=added).sample
        states = [tower(torch.from_numpy(IDS)).last_hidden_state for tower in towers]
    return [nhwc(drawn), *(x.numpy() for x in states)]


def agree(pipeline, found, theirs, changed=None):
    """Outputs with the LoRA are diffusers' and, where `changed` (by default everywhere), not those without it."""
    plain = our_outputs(pipeline)
    for index, (a, b, c) in enumerate(zip(our_outputs(found), theirs, plain, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))
        assert (np.abs(a - c).max() > 0.01) == (changed is None or index in changed), index


def settings(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ATTENTION} | options)


def trained(module):
    """A module with an adapter whose factors are as if it had been trained."""
    import torch

    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def saved_by_peft(module, folder, **options):
    from peft import get_peft_model

    trained(get_peft_model(module, settings(**options))).save_pretrained(folder)


# --- PEFT and diffusers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"attn2.to_k": 5}, "alpha_pattern": {"attn2.to_k": 2, r".*mid_block.*to_v": 9}},
        {"use_rslora": True, "target_modules": ["to_q", "to_v"]},
    ],
)
def test_attention_that_peft_saved(ours, stock, tmp_path, options):
    pipe = stock("SD")
    saved_by_peft(pipe.unet, tmp_path, **options)
    theirs = their_outputs(pipe, ours)
    agree(ours, with_lora(ours, tmp_path), theirs, {0})
    agree(ours, with_lora(ours, tmp_path / "adapter_model.safetensors"), theirs, {0})
    (tmp_path / "adapter_config.json").unlink()
    refuses("Cannot read .*adapter_config.json", with_lora, ours, tmp_path)


@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_a_unet_that_peft_saved(pipelines, stock, tmp_path, kind):
    pipe, pipeline = stock(kind), pipelines[kind]
    saved_by_peft(pipe.unet, tmp_path, target_modules=ATTENTION + OTHERS, alpha_pattern={"conv1": 2})
    agree(pipeline, with_lora(pipeline, tmp_path), their_outputs(pipe, pipeline), {0})


@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_a_text_encoder_that_peft_saved(pipelines, stock, tmp_path, kind):
    pipe, pipeline = stock(kind), pipelines[kind]
    saved_by_peft(pipe.text_encoder, tmp_path, target_modules=TEXT)
    agree(pipeline, with_lora(pipeline, tmp_path), their_outputs(pipe, pipeline), {1})


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_what_diffusers_trainers_save(pipelines, stock, tmp_path, kind, described):
    """With the adapters' settings in the metadata, as today, or without, as before: then the scale is 1."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe, pipeline = stock(kind), pipelines[kind]
    names = ["unet", "text_encoder", "text_encoder_2"][: 2 if kind == "SD" else 3]
    modules = {name: getattr(pipe, name) for name in names}
    for name, module in modules.items():
        inside, scaled = (ATTENTION, "attn1.to_q") if name == "unet" else (TEXT, "layers.0.self_attn.q_proj")
        module.add_adapter(settings(target_modules=inside, alpha_pattern={scaled: 9}))
        trained(module)
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        for name, module in modules.items()
    }
    extra = _collate_lora_metadata(modules) if described else {}
    pipe.save_lora_weights(tmp_path, **layers, **extra)
    trainer, fresh = their_outputs(pipe, pipeline), stock(kind)
    fresh.load_lora_weights(tmp_path)
    theirs = their_outputs(fresh, pipeline)
    assert all(np.allclose(a, b, atol=1e-5) == described for a, b in zip(theirs, trainer, strict=True))
    agree(pipeline, with_lora(pipeline, tmp_path), theirs)


# --- kohya


def drawn(seed, shape, rank=2):
    """Factors of a change of a weight of PyTorch's `shape`."""
    rng = np.random.default_rng(seed)
    outputs, fan, *window = shape
    down = rng.standard_normal((rank, fan, *window), dtype=np.float32) / np.float32(np.prod(shape[1:])) ** 0.5
    return down.astype(np.float32), 0.3 * rng.standard_normal((outputs, rank) + (1, 1) * bool(window), dtype=np.float32)


def kohya(layers, alpha=1.0):
    """A file of kohya's trainer, from shapes by name."""
    tensors = {}
    for seed, (name, shape) in enumerate(layers.items()):
        down, up = drawn(seed, shape)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = np.asarray(alpha, np.float16)
    return tensors


def shapes_of(module, prefix, inside):
    """kohya's names and the shapes of a module's linear and convolution layers that it changes."""
    return {
        f"{prefix}_{name.replace('.', '_')}": tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if type(layer).__name__ in ("Linear", "Conv2d") and re.search(inside, name)
    }


def text_shapes(pipe):
    """Attention and feed-forward of the text encoders."""
    towers = {"te1": pipe.text_encoder, "te2": pipe.text_encoder_2} if hasattr(pipe, "text_encoder_2") else {}
    found = {}
    for name, tower in (towers or {"te": pipe.text_encoder}).items():
        shapes = shapes_of(tower, f"lora_{name}", "self_attn|mlp")
        # transformers has the first part of the name in some versions and classes; files always have it.
        prefix = f"lora_{name}_"
        found |= {
            prefix + "text_model_" + key.removeprefix(prefix).removeprefix("text_model_"): shape
            for key, shape in shapes.items()
        }
    return found


def test_kohya_with_convolutions_and_text_encoders(pipelines, stock, tmp_path):
    pipe, pipeline = stock("SD"), pipelines["SD"]
    layers = shapes_of(pipe.unet, "lora_unet", "down_blocks|mid_block|up_blocks") | text_shapes(pipe)
    assert any("conv1" in name for name in layers) and len(layers) > 40
    save_file(kohya(layers), tmp_path / "l.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors")
    agree(pipeline, with_lora(pipeline, tmp_path / "l.safetensors"), their_outputs(pipe, pipeline))


def original(**options):
    """kohya's names of the original code's layers, and their shapes."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in original_unet(**options).items() if len(shape) > 1}
    return {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes.items()}


def test_kohya_of_xl_in_the_names_of_the_original_code(pipelines, stock, tmp_path):
    pipe, pipeline = stock("XL"), pipelines["XL"]
    layers = original(
        channels=8, multiples=(1, 2), depths=(0, 2), middle=2, blocks=1, context=20, linear=True, added=34
    )
    save_file(kohya(layers | text_shapes(pipe)), tmp_path / "l.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors")
    agree(pipeline, with_lora(pipeline, tmp_path / "l.safetensors"), their_outputs(pipe, pipeline))


@pytest.mark.parametrize("multiples", [(1, 2, 4), (1, 2, 4, 4)])
def test_every_name_of_the_original_code_is_known(multiples):
    """As diffusers converts whole checkpoints of it: layers of XL, and of 1.x by four levels."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    xl = len(multiples) == 3
    options = {"depths": (0, 2, 10), "middle": 10, "added": 2816, "linear": True} if xl else {}
    names = list(original_unet(multiples=multiples, **options))
    marked = {f"model.diffusion_model.{name}": index for index, name in enumerate(names)}
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": "text_time" if xl else None}
    theirs = convert_ldm_unet_checkpoint(marked, config)
    layers = {
        names[index].removesuffix(".weight"): name.removesuffix(".weight")
        for name, index in theirs.items()
        if name.endswith(".weight") and "norm" not in name
    }
    find = layer_finder(layers.values())
    found = {name: find(f"lora_unet_{name.replace('.', '_')}") for name in layers}
    assert found == layers and len(found) == (794 if xl else 282)


# --- other trainers


def foreign(offsets, style):
    """Changes as one or another trainer names them."""
    tensors = {}
    for path, offset in offsets.items():
        down, up, rank = np.ascontiguousarray(offset.down.T), np.ascontiguousarray(offset.up.T), offset.down.shape[1]
        if style in ("kohya", "integer alpha"):
            name = "lora_unet_" + path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.asarray(2 * rank if style == "integer alpha" else np.float16(rank / 2))
        elif style == "old":
            owner, _, projection = path.replace("to_out.0", "to_out").rpartition(".")
            tensors[f"unet.{owner}.processor.{projection}_lora.down.weight"] = down
            tensors[f"unet.{owner}.processor.{projection}_lora.up.weight"] = up
        elif style == "lora.down":
            tensors |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up}
    return tensors


def old_text(style):
    """A text encoder's changes by old names of diffusers."""
    tensors, owner = {}, "text_encoder.text_model.encoder.layers.0.self_attn"
    for seed, name in enumerate(("q", "k", "v", "out")):
        layer = f"to_{name}_lora" if style == "old" else f"{name}_proj.lora_linear_layer"
        for part, value in zip(("down", "up"), drawn(seed, (12, 12)), strict=True):
            tensors[f"{owner}.{layer}.{part}.weight"] = value
    return tensors


@pytest.mark.parametrize("style", ["kohya", "integer alpha", "old", "lora.down"])
def test_names_of_other_trainers(ours, stock, tmp_path, style):
    pipe, path = stock("SD"), tmp_path / "lora.safetensors"
    text = old_text(style) if style in ("old", "lora.down") else {}
    save_file(foreign(draw_offsets(attention_shapes(ours.base.unet)), style) | text, path)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    agree(ours, with_lora(ours, path), their_outputs(pipe, ours), {0, 1} if text else {0})


# --- weights


@pytest.fixture
def files(ours, stock, tmp_path):
    """Two LoRAs of the UNet and the text encoder."""
    pipe = stock("SD")
    layers = shapes_of(pipe.unet, "lora_unet", "down_blocks|mid_block|up_blocks") | text_shapes(pipe)
    save_file(kohya(layers), tmp_path / "a.safetensors")
    save_file(kohya(dict(reversed(layers.items())), alpha=0.5), tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # that is the point
def test_weights_and_sums(ours, stock, files):
    pipe = stock("SD")
    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    for a, b in [(0.5, 0.0), (-1.0, 0.0), (1.0, -0.5)]:
        pipe.set_adapters(["a", "b"], [a, b])
        found = with_lora(with_lora(ours, files[0], a), files[1], b)
        agree(ours, found, their_outputs(pipe, ours))
    nothing = with_lora(ours, files[0], 0.0)
    for name in ("unet", "text"):
        for key, value in getattr(nothing.base, name).params.items():
            np.testing.assert_array_equal(value, getattr(ours.base, name).params[key])


def test_the_pipeline_itself_stays_as_it_is(ours, files):
    before = jax.tree.map(np.array, ours.base)
    with_lora(ours, files[0], 2.0)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, ours.base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_arrays_keep_their_kind_and_type(ours, files, dtype):
    stored = replace(ours, base=replace(ours.base, unet=ours.base.unet.cast(dtype), text=ours.base.text.cast(dtype)))
    on_host = replace(stored, base=jax.device_get(stored.base))
    device, host = with_lora(stored, files[0]), with_lora(on_host, files[0])
    wide = with_lora(replace(ours, base=jax.tree.map(lambda x: x.astype(jnp.float32), stored.base)), files[0])
    for name in ("unet", "text"):
        for key, value in getattr(host.base, name).params.items():
            other = getattr(device.base, name).params[key]
            assert type(value) is np.ndarray and isinstance(other, jax.Array) and value.dtype == other.dtype == dtype
            np.testing.assert_array_equal(value, np.asarray(other))
            np.testing.assert_array_equal(value, np.asarray(getattr(wide.base, name).params[key]).astype(dtype))


def errors(found, wanted):
    """The root of the mean squared difference of each kernel, in units of the kernel's own."""
    return {
        f"{part}.{name}": np.sqrt(
            ((np.asarray(value, "f8") - other) ** 2).mean() / (np.asarray(other, "f8") ** 2).mean()
        )
        for part in ("unet", "text")
        for name, value in getattr(found.base, part).params.items()
        for other in (np.asarray(getattr(wanted.base, part).params[name], "f4"),)
        if value.ndim > 1
    }


@pytest.mark.parametrize("on_host", [False, True])
def test_half_precision_rounds_the_sum_of_all_changes_once(sd, ours, files, on_host):
    """Against the model in float32: the weights with three LoRAs are no farther from it than those without."""
    half = read_pipeline(sd, "tiny", dtype="bfloat16")
    if on_host:
        half = replace(half, base=jax.device_get(half.base))
    changes = [(files[0], 0.05), (files[1], 0.03), (files[0], -0.02)]
    wanted, found = ours, half
    for file, weight in changes:
        wanted, found = with_lora(wanted, file, weight), with_lora(found, file, weight)
    for part in ("unet", "text"):
        for key, value in getattr(wanted.base, part).params.items():
            other = np.asarray(getattr(found.base, part).params[key])
            assert other.dtype == "bfloat16"
            # But for sums that lie between two values of bfloat16 and differ in float32 by their order.
            assert (other != np.asarray(value).astype(other.dtype)).mean() < 0.01, key
    rounding, before = errors(found, wanted), errors(half, ours)
    assert max(rounding[name] / before[name] for name in rounding) < 1.3
    assert np.mean([rounding[name] / before[name] for name in rounding]) < 1.02


def test_weights_that_are_not_the_files_any_more_are_summed_as_they_are(sd, ours, files, tmp_path):
    half = read_pipeline(sd, "tiny", dtype="bfloat16")
    kernel = f"{FIRST}.weight"
    other = half.base.unet.with_params(half.base.unet.params | {kernel: -half.base.unet.params[kernel]})
    changed = with_lora(replace(half, base=replace(half.base, unet=other)), files[0])
    wide = with_lora(replace(ours, base=jax.tree.map(lambda x: x.astype(jnp.float32), half.base)), files[0])
    delta = np.asarray(wide.base.unet.params[kernel]) - np.asarray(half.base.unet.params[kernel], "f4")
    expected = delta - np.asarray(half.base.unet.params[kernel], "f4")
    np.testing.assert_allclose(np.asarray(changed.base.unet.params[kernel], "f4"), expected, rtol=0.01, atol=1e-3)
    # And where the files are gone.
    gone = with_lora(replace(half, source=tmp_path / "nowhere"), files[0]).base.unet.params[kernel]
    np.testing.assert_array_equal(gone, np.asarray(wide.base.unet.params[kernel]).astype(gone.dtype))


def test_values_that_do_not_fit(ours, files):
    half = replace(
        ours, base=replace(ours.base, unet=ours.base.unet.cast("float16"), text=ours.base.text.cast("float16"))
    )
    for pipeline in (half, replace(half, base=jax.device_get(half.base))):
        with pytest.raises(UserError, match=r"a.safetensors at weight 1e.06, .* holds values too large for float16"):
            with_lora(pipeline, files[0], 1e6)
    with pytest.raises(UserError, match=r"a.safetensors at weight 1e.40, .* holds values too large for float32"):
        with_lora(ours, files[0], 1e40)
    with pytest.raises(UserError, match=r"weight of .*a.safetensors must be a finite number, not nan"):
        with_lora(ours, files[0], float("nan"))


# --- pictures


def test_both_paths_are_drawn_with_it(ours, files):
    concept = tiny_concept(ours)
    options = {"num": 1, "sampling_steps": 2, "quiet": True, "concept": concept}
    changed = with_lora(ours, files[0])
    assert changed.fingerprint == ours.fingerprint
    for blend in (0.0, 1.0):
        plain = api.generate(ours, ["a S* on the beach"], blend=blend, **options)
        compiled = sampling.generate.seconds
        drawn = api.generate(changed, ["a S* on the beach"], blend=blend, **options)
        assert sampling.generate.seconds == compiled  # it runs the same program
        assert np.abs(drawn.images.astype(int) - plain.images).mean() > 2
        again = api.generate(with_lora(ours, files[0], 0.0), ["a S* on the beach"], blend=blend, **options)
        np.testing.assert_array_equal(again.images, plain.images)


def test_the_command(sd, ours, files, tmp_path):
    out = tmp_path / "out"
    argv = ["generate", "--model", str(sd), "--lora", str(files[0]), "0.5", "--lora", str(files[1])]
    argv += ["--prompt", "a cat", "--num", "1", "--sampling-steps", "2", "--out", str(out)]
    assert cli.main(argv) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["loras"] == [{"file": str(files[0]), "weight": 0.5}, {"file": str(files[1]), "weight": 1.0}]
    assert report["concepts"] == []
    merged = with_lora(with_lora(ours, files[0], 0.5), files[1])
    wanted = api.generate(merged, ["a cat"], num=1, sampling_steps=2, quiet=True).images[0, 0]
    (picture,) = out.glob("01_*.png")
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), wanted)
