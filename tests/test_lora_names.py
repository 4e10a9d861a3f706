"""The names that programs give the tensors of a LoRA: the same tensors are read the same, whatever they are called."""

import compvis
import numpy as np
import pytest
from checkpoint_helpers import refuses
from safetensors.numpy import save_file

from datencoder_jax.checkpoints.folders import read_base
from datencoder_jax.checkpoints.lora_files import read_lora
from datencoder_jax.checkpoints.single_file_names import unet_names

UNETS = {
    "1.x": compvis.unet(channels=8, context=16),
    "2.x": compvis.unet(channels=8, context=16, linear=True),
    "XL": compvis.unet(
        channels=8, multiples=(1, 2, 4), depths=(0, 2, 3), middle=3, context=16, linear=True, added=2816
    ),
}
TOWERS = {"1.x": ["clip_l"], "2.x": ["clip_h"], "XL": ["clip_l", "clip_g"]}
"""What ComfyUI calls the text encoders."""

OURS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}


def unet_layers(generation):
    """The layers of a UNet: the original code's name, diffusers' name and the shape in PyTorch's layout."""
    shapes = UNETS[generation]
    rename = unet_names(shapes)
    return [
        (name.removesuffix(".weight"), rename(name).removesuffix(".weight"), shape)
        for name, shape in shapes.items()
        if len(shape) > 1
    ]


def text_layers(tower):
    """The layers of a text encoder in transformers' names, and their shapes."""
    shapes = compvis.clip_text(width=8, layers=2, words=9)
    found = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if ".layers." in key}
    found = {key: shape for key, shape in found.items() if len(shape) > 1}
    return found | ({"text_projection": (8, 8)} if tower == "clip_g" else {})


def flax(shape):
    return shape[::-1] if len(shape) == 2 else (*shape[2:], shape[1], shape[0])


def factors(seed, shape):
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((2, *shape[1:]), dtype=np.float32)
    return down, rng.standard_normal((shape[0], 2) + (1,) * (len(shape) - 2), dtype=np.float32)


STYLES = {
    "diffusers": ("unet.{ours}", "{network}.{text}", "lora_A.weight", "lora_B.weight"),
    "ComfyUI": (
        "diffusion_model.{original}",
        "text_encoders.{tower}.transformer.{text}",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "ComfyUI's node": (
        "diffusion_model.{original}",
        "text_encoders.{tower}.transformer.{text}",
        "lora_down.weight",
        "lora_up.weight",
    ),
    "bare towers": ("model.diffusion_model.{original}", "{tower}.{text}", "lora_A.weight", "lora_B.weight"),
    "original names": ("unet.{original}", "{tower}.transformer.{text}", "lora_A.weight", "lora_B.weight"),
    "PEFT inside": (
        "unet.base_model.model.{ours}",
        "{network}.base_model.model.{text}",
        "lora_A.weight",
        "lora_B.weight",
    ),
    "adapter": ("unet.{ours}", "{network}.{text}", "lora_A.default.weight", "lora_B.default.weight"),
    "ComfyUI adapter": (
        "diffusion_model.{original}",
        "text_encoders.{tower}.transformer.{text}",
        "lora_A.my_cat.weight",
        "lora_B.my_cat.weight",
    ),
    "PEFT inside, adapter": (
        "unet.base_model.model.{ours}",
        "{network}.base_model.model.{text}",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
    "PEFT outside, adapter": (
        "base_model.model.unet.{ours}",
        "base_model.model.{network}.{text}",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
}
"""How a layer of the UNet, a layer of a text encoder and the two factors are called."""


def write(path, generation, style, alpha=None):
    """A LoRA of every layer; returns the shapes of the model's kernels."""
    unet, text, *ends = STYLES[style]
    tensors, shapes, seed = {}, {}, 0

    def add(stem, ours, shape):
        nonlocal seed
        tensors.update({f"{stem}.{end}": x for end, x in zip(ends, factors(seed, shape), strict=True)})
        if alpha is not None:
            tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
        shapes[ours] = flax(shape)
        seed += 1

    for original, ours, shape in unet_layers(generation):
        add(unet.format(original=original, ours=ours), ours, shape)
    for tower in TOWERS[generation]:
        for layer, shape in text_layers(tower).items():
            network = OURS[tower]
            add(text.format(tower=tower, network=network, text=layer), f"{network}.{layer}", shape)
    save_file(tensors, path)
    return shapes


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        for a, b in zip(found[name], change, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("style", [style for style in STYLES if style != "diffusers"])
@pytest.mark.parametrize("generation", list(UNETS))
def test_every_layer_is_read_as_under_the_names_of_diffusers(tmp_path, generation, style):
    shapes = write(tmp_path / "diffusers.safetensors", generation, "diffusers")
    write(tmp_path / "other.safetensors", generation, style)
    wanted = read_lora(tmp_path / "diffusers.safetensors", shapes)
    assert wanted.keys() == shapes.keys()
    same(read_lora(tmp_path / "other.safetensors", shapes), wanted)


@pytest.mark.parametrize("style", ["ComfyUI", "ComfyUI's node", "PEFT inside", "adapter"])
def test_alpha_scales_layers_under_every_name(tmp_path, style):
    shapes = write(tmp_path / "plain.safetensors", "XL", "diffusers")
    write(tmp_path / "half.safetensors", "XL", style, alpha=1)
    plain = read_lora(tmp_path / "plain.safetensors", shapes)
    same(
        read_lora(tmp_path / "half.safetensors", shapes),
        {name: change._replace(up=change.up / 2) for name, change in plain.items()},
    )


def test_settings_beside_a_named_adapter_scale_it(tmp_path):
    shapes = {"conv_in": (8, 8)}
    down, up = factors(0, (8, 8))
    names = ("base_model.model.conv_in.lora_A.default.weight", "base_model.model.conv_in.lora_B.default.weight")
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "l.safetensors")
    np.testing.assert_array_equal(read_lora(tmp_path / "l.safetensors", shapes)["conv_in"].up, up.T)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    np.testing.assert_array_equal(read_lora(tmp_path / "l.safetensors", shapes)["conv_in"].up, 2 * up.T)


def test_two_adapters_in_one_file_are_refused(tmp_path):
    down, up = factors(0, (8, 8))
    tensors = {f"unet.conv_in.lora_A.{name}.weight": down for name in ("default", "other")}
    tensors |= {f"unet.conv_in.lora_B.{name}.weight": up for name in ("default", "other")}
    save_file(tensors, tmp_path / "l.safetensors")
    refuses("two tensors for one factor", read_lora, tmp_path / "l.safetensors", {"conv_in": (8, 8)})


@pytest.mark.parametrize("style", list(STYLES))
def test_a_lora_in_the_place_of_a_base_model_is_told_as_one(tmp_path, style):
    write(tmp_path / "l.safetensors", "1.x", style)
    refuses("is a LoRA", read_base, tmp_path / "l.safetensors")
