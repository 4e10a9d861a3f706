"""Properties of LoRA names: every program's spelling names one layer, and any other text names none or is refused."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_lora_names import OURS, TOWERS, UNETS, text_layers, unet_layers

from datencoder_jax.checkpoints.lora_files import diffusers_tensors, kohya_tensors, read_lora
from datencoder_jax.checkpoints.lora_names import layer_finder
from datencoder_jax.errors import UserError
from datencoder_jax.printable import is_printable
from datencoder_jax.typing import LowRank

UNET_LAYOUTS = {
    "diffusers": lambda original, ours: f"unet.{ours}",
    "bare": lambda original, ours: ours,
    "PEFT": lambda original, ours: f"base_model.model.{ours}",
    "PEFT inside": lambda original, ours: f"unet.base_model.model.{ours}",
    "kohya": lambda original, ours: f"lora_unet_{ours.replace('.', '_')}",
    "kohya, original names": lambda original, ours: f"lora_unet_{original.replace('.', '_')}",
    "ComfyUI": lambda original, ours: f"diffusion_model.{original}",
    "ComfyUI, whole": lambda original, ours: f"model.diffusion_model.{original}",
    "old diffusers": lambda original, ours: (
        "unet." + ours.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")
    ),
}
"""The name of a UNet's layer from that of the original code and that of diffusers."""

TEXT_LAYOUTS = {
    "diffusers": lambda network, tower, layer: f"{network}.{layer}",
    "PEFT inside": lambda network, tower, layer: f"{network}.base_model.model.{layer}",
    "PEFT outside": lambda network, tower, layer: f"base_model.model.{network}.{layer}",
    "without text_model": lambda network, tower, layer: f"{network}.{layer.removeprefix('text_model.')}",
    "kohya": lambda network, tower, layer: f"{KOHYA[network]}{layer.replace('.', '_')}",
    "kohya of 1.x": lambda network, tower, layer: f"{KOHYA[network].replace('te1', 'te')}{layer.replace('.', '_')}",
    "ComfyUI": lambda network, tower, layer: f"text_encoders.{tower}.transformer.{layer}",
    "bare towers": lambda network, tower, layer: f"{tower}.{layer}",
}
"""The name of a text encoder's layer from its network, ComfyUI's name of that and the layer's own name."""

KOHYA = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def spellings(generation):
    """Every layer of a model by our name, with all names that programs give it."""
    names = {}
    for original, ours, _ in unet_layers(generation):
        names[ours] = [layout(original, ours) for layout in UNET_LAYOUTS.values()]
    for tower in TOWERS[generation]:
        for layer in text_layers(tower):
            network = OURS[tower]
            names[f"{network}.{layer}"] = [layout(network, tower, layer) for layout in TEXT_LAYOUTS.values()]
    return names


MODELS = {generation: spellings(generation) for generation in UNETS}
UNET_LAYERS = {generation: {ours for _, ours, _ in unet_layers(generation)} for generation in UNETS}
FINDERS = {generation: layer_finder(names) for generation, names in MODELS.items()}

generations = st.sampled_from(sorted(MODELS))
layers = generations.flatmap(lambda g: st.tuples(st.just(g), st.sampled_from(sorted(MODELS[g]))))
pieces = st.sampled_from(["unet.", "lora_te_", "input_blocks", ".", "_", "0", "4", "1", "transformer.", "text_model."])


@st.composite
def changed_names(draw):
    """A generation and a layer's name in which a part was replaced by other text."""
    generation, layer = draw(layers)
    name = draw(st.sampled_from(MODELS[generation][layer]))
    start = draw(st.integers(0, len(name)))
    end = draw(st.integers(start, min(len(name), start + 4)))
    return generation, name[:start] + draw(pieces | st.text(max_size=4)) + name[end:]


any_names = changed_names() | st.tuples(generations, st.text() | st.lists(pieces | st.text(max_size=3)).map("".join))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("loras") / "lora.safetensors"


@given(layers)
def test_every_name_of_a_layer_finds_that_layer(layer):
    generation, ours = layer
    assert {FINDERS[generation](name) for name in MODELS[generation][ours]} == {ours}


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([diffusers_tensors, kohya_tensors]), st.data())
def test_written_names_are_read_as_the_layers_they_were_written_for(path, generation, write, data):
    unet = [ours for _, ours, _ in unet_layers(generation)]
    chosen = data.draw(st.lists(st.sampled_from(unet), min_size=1, max_size=8, unique=True))
    offsets = {
        name: LowRank(np.full((3, 1), number, np.float32), np.ones((1, 2), np.float32))
        for number, name in enumerate(chosen)
    }
    save_file({name: np.ascontiguousarray(array) for name, array in write(offsets).items()}, path)
    found = read_lora(path, dict.fromkeys(MODELS[generation], (3, 2)))
    assert {name: change.down[0, 0] for name, change in found.items()} == {n: k for k, n in enumerate(chosen)}


@given(any_names)
@example(("XL", f"diffusion_model.input_blocks.{'9' * 5000}.0.op"))
@example(("XL", "lora_unet_input_blocks_\u0664_1_proj_in"))
@example(("1.x", "diffusion_model.input_blocks.1.41.proj_in"))
@example(("1.x", "diffusion_model.input_blocks.1.0.op"))
@example(("1.x", "diffusion_model.output_blocks.1.1.conv"))
@example(("1.x", "diffusion_model.input_blocks.01.1.proj_in"))
@example(("XL", "unet.text_encoder_2.text_model.encoder.layers.0.mlp.fc1"))
@example(("XL", "unet.text_model.encoder.layers.0.mlp.fc1"))
def test_any_other_name_finds_a_layer_of_the_same_numbers_or_none(named):
    """A name may be spelled with dots or underscores, but its numbers are those of the layer in one of its names."""
    generation, name = named
    found = FINDERS[generation](name)
    if found is not None:
        assert not name.startswith(("unet.", "lora_unet_")) or found in UNET_LAYERS[generation]
        assert numbers(name) in map(numbers, MODELS[generation][found])


def numbers(name):
    """The numbers of a name, as they are written, after the network's part."""
    parts = name.removeprefix("base_model.model.").removeprefix("text_encoder_2").replace(".", "_").split("_")
    return [part for part in parts if part.isdecimal()]


@given(layers, st.data())
def test_two_names_of_one_layer_in_a_file_are_refused(path, layer, data):
    generation, ours = layer
    names = sorted(set(MODELS[generation][ours]))
    first, second = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    tensors = {f"{name}.lora_{part}.weight": np.ones((1, 1), np.float32) for name in (first, second) for part in "AB"}
    save_file(tensors, path)
    with pytest.raises(UserError, match="two tensors for one factor"):
        read_lora(path, dict.fromkeys(MODELS[generation], (1, 1)))


@given(any_names, st.sampled_from([("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]))
@example(("1.x", f"lora_unet_output_blocks_{'1' * 5000}_1_proj_in"), ("lora_down.weight", "lora_up.weight"))
def test_a_file_with_any_name_is_read_whole_or_refused(path, named, ends):
    generation, name = named
    good = "unet.conv_in"
    stems = {good, name}
    tensors = {f"{stem}.{end}": np.ones((1, 1), np.float32) for stem in stems for end in ends}
    save_file(tensors, path)
    try:
        found = read_lora(path, dict.fromkeys(MODELS[generation], (1, 1)))
    except UserError as error:
        assert is_printable(str(error))
    else:
        assert len(found) == len(stems)
