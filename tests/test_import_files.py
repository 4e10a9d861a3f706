"""LoRA and embedding files of other programs do to our pictures what they do to those programs' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import refuses
from export_helpers import draw_offsets, nchw, nhwc
from safetensors.numpy import save_file
from tiny import write_tiny_base

from datencoder_jax.checkpoints.embedding_files import read_embedding
from datencoder_jax.checkpoints.lora_files import diffusers_tensors, kohya_tensors, read_lora
from datencoder_jax.pipeline import attention_shapes, read_pipeline

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("import"))


@pytest.fixture(scope="module")
def ours(base):
    return read_pipeline(base, "tiny")


@pytest.fixture(scope="module")
def shapes(ours):
    return attention_shapes(ours.base.unet)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((1, 8, 8, 4), dtype=np.float32), rng.standard_normal((1, 5, 12), dtype=np.float32)


def their_unet(base):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(base / "unet")


def their_output(unet, inputs):
    import torch

    with torch.no_grad():
        return nhwc(unet(nchw(inputs[0]), 300, encoder_hidden_states=torch.from_numpy(inputs[1])).sample)


@jax.jit
def run(unet, inputs, offsets):
    return unet(inputs[0], jnp.array([300]), inputs[1], offsets=offsets)


def train(unet, **options):
    """Gives `unet` an adapter as a trainer would, with factors as if it had been trained."""
    import torch
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ATTENTION} | options)
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return config


def agree(ours, inputs, found, theirs):
    drawn = run(ours.base.unet, inputs, found)
    np.testing.assert_allclose(drawn, theirs, rtol=0, atol=1e-5)
    assert np.abs(drawn - run(ours.base.unet, inputs, {})).max() > 0.1


# --- what others write


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"attn2.to_k": 5}, "alpha_pattern": {"attn2.to_k": 2, r".*mid_block.*to_v": 9}},
        {"use_rslora": True},
        {"target_modules": ["to_q", "to_v"]},
    ],
)
def test_what_peft_saved(ours, base, shapes, inputs, tmp_path, options):
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraConfig

    torch.manual_seed(0)
    model = get_peft_model(
        their_unet(base), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ATTENTION} | options)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    theirs = their_output(model.base_model.model, inputs)
    agree(ours, inputs, read_lora(tmp_path, shapes), theirs)
    agree(ours, inputs, read_lora(tmp_path / "adapter_model.safetensors", shapes), theirs)
    (tmp_path / "adapter_config.json").unlink()
    refuses("Cannot read .*adapter_config.json", read_lora, tmp_path, shapes)


@pytest.mark.parametrize("described", [True, False])
def test_what_diffusers_trainers_save(ours, base, shapes, inputs, tmp_path, described):
    """With the adapter's settings in the metadata, as today, or without, as before: then the scale is 1."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    unet = their_unet(base)
    train(unet, alpha_pattern={"attn1.to_q": 7})
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    extra = _collate_lora_metadata({"unet": unet}) if described else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **extra)
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_lora_weights(tmp_path)
    theirs = their_output(pipe.unet, inputs)
    assert np.allclose(theirs, their_output(unet, inputs), atol=1e-5) == described
    agree(ours, inputs, read_lora(tmp_path, shapes), theirs)


def foreign(offsets, style):
    """Offsets as one or another trainer names them, at half the scale where it can say so."""
    tensors = {}
    for path, offset in offsets.items():
        down, up, rank = np.ascontiguousarray(offset.down.T), np.ascontiguousarray(offset.up.T), offset.down.shape[1]
        if style == "kohya":
            name = "lora_unet_" + path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.asarray(rank / 2, np.float16)
        elif style == "integer alpha":
            name = "lora_unet_" + path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.asarray(2 * rank)
        elif style == "old":
            owner, _, projection = path.replace("to_out.0", "to_out").rpartition(".")
            tensors[f"unet.{owner}.processor.{projection}_lora.down.weight"] = down
            tensors[f"unet.{owner}.processor.{projection}_lora.up.weight"] = up
        elif style == "lora.down":
            tensors |= {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up}
    return tensors


@pytest.mark.parametrize(("style", "scale"), [("kohya", 0.5), ("integer alpha", 2.0), ("old", 1.0), ("lora.down", 1.0)])
def test_names_of_other_trainers(ours, base, shapes, inputs, tmp_path, style, scale):
    from diffusers import StableDiffusionPipeline

    path = tmp_path / "lora.safetensors"
    # Of ranks that differ, values alone: diffusers then gives one alpha to all.
    for ranks in ((2, 3), (2,)):
        offsets = draw_offsets(shapes, ranks=ranks)
        save_file(foreign(offsets, style), path)
        found = read_lora(path, shapes)
        for name, offset in offsets.items():
            np.testing.assert_array_equal(found[name].down, offset.down)
            np.testing.assert_array_equal(found[name].up, offset.up * np.float32(scale))
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    agree(ours, inputs, found, their_output(pipe.unet, inputs))


def test_names_of_the_original_code(tmp_path):
    """kohya's trainer names the blocks of XL as its original code does; diffusers' loader knows what is what."""
    from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers

    sides = (
        [f"input_blocks_{i}_1" for i in (4, 5, 7, 8)] + ["middle_block_1"] + [f"output_blocks_{i}_1" for i in range(6)]
    )
    names = [
        f"lora_unet_{side}_transformer_blocks_{depth}_attn{a}_{projection.replace('.', '_')}"
        for side in sides
        for depth in range(2)
        for a in (1, 2)
        for projection in ATTENTION
    ]
    value = {name: np.full((1, 1), index, np.float32) for index, name in enumerate(names)}
    tensors = {f"{name}.lora_{part}.weight": value[name] for name in names for part in ("down", "up")}
    save_file(tensors, tmp_path / "xl.safetensors")
    config = type("Config", (), {"layers_per_block": 2})
    mapped = _maybe_map_sgm_blocks_to_diffusers({f"{name}.lora_down.weight": name for name in names}, config)
    wanted = {
        _convert_unet_lora_key(key).replace(".processor", "").removesuffix("_lora.down.weight"): value[name][0, 0]
        for key, name in mapped.items()
    }
    blocks = [f"down_blocks.{b}.attentions.{i}" for b in (1, 2) for i in range(2)] + ["mid_block.attentions.0"]
    blocks += [f"up_blocks.{b}.attentions.{i}" for b in range(2) for i in range(3)]
    shapes = {
        f"{block}.transformer_blocks.{depth}.attn{a}.{projection}": (1, 1)
        for block in blocks
        for depth in range(2)
        for a in (1, 2)
        for projection in ATTENTION
    }
    found = read_lora(tmp_path / "xl.safetensors", shapes)
    assert {path.replace("to_out.0", "to_out"): offset.down[0, 0] for path, offset in found.items()} == wanted
    assert len(wanted) == len(names) == 176


def test_half_precision_is_read_as_it_is(shapes, tmp_path):
    import ml_dtypes

    offsets = draw_offsets(shapes)
    for kind in (np.float16, ml_dtypes.bfloat16):
        half = {key: np.ascontiguousarray(value).astype(kind) for key, value in diffusers_tensors(offsets).items()}
        save_file(half, tmp_path / "half.safetensors")
        found = read_lora(tmp_path / "half.safetensors", shapes)[FIRST]
        assert found.down.dtype == np.float32
        np.testing.assert_array_equal(found.down, offsets[FIRST].down.astype(kind).astype(np.float32))


def test_embeddings(tmp_path):
    vectors = np.arange(12, dtype=np.float32).reshape(2, 6)
    path = tmp_path / "e.safetensors"
    for tensors, widths, token in [
        ({"<toy>": vectors}, (6,), "<toy>"),
        ({"<toy>": vectors[0]}, (6,), "<toy>"),
        ({"emb_params": vectors}, (6,), None),
        ({"*": vectors}, (6,), None),
        ({"emb_params": vectors.astype(np.float16)}, (6,), None),
        (
            {"clip_g": np.ascontiguousarray(vectors[:, 2:]), "clip_l": np.ascontiguousarray(vectors[:, :2])},
            (2, 4),
            None,
        ),
    ]:
        save_file(tensors, path)
        found = read_embedding(path, widths)
        assert found[0] == token and found[1].dtype == np.float32
        np.testing.assert_array_equal(found[1], vectors[: len(found[1])])


# --- refusals


def test_what_cannot_be_applied_is_counted_not_dropped(ours, base, shapes, tmp_path):
    unet = their_unet(base)
    train(unet, target_modules=[*ATTENTION, "proj_in", "ff.net.0.proj", "conv1"])
    from peft.utils import get_peft_model_state_dict

    tensors = {f"unet.{key}": value.numpy() for key, value in get_peft_model_state_dict(unet).items()}
    text = {
        f"text_encoder.text_model.layers.{i}.q_proj.lora_{p}.weight": np.ones((2, 2), "f4")
        for i in (0, 1)
        for p in "AB"
    }
    save_file({k: np.ascontiguousarray(v) for k, v in (tensors | text).items()}, tmp_path / "l.safetensors")
    message = refuses("cannot be changed here", read_lora, tmp_path / "l.safetensors", shapes)
    assert "8 of feed-forward and in/out projections, 5 of other layers, 2 of the text encoder" in message


def test_other_kinds_and_other_models(ours, shapes, tmp_path):
    path = tmp_path / "lora.safetensors"
    offsets = draw_offsets(shapes)
    good = {key: np.ascontiguousarray(value) for key, value in kohya_tensors(offsets).items()}
    name = "lora_unet_" + FIRST.replace(".", "_")
    scalar = np.ones((), np.float32)

    def refused(match, tensors, metadata=None):
        save_file(tensors, path, metadata)
        assert str(path) in refuses(match, read_lora, path, shapes, base="tiny")

    refused("is a DoRA file", good | {f"{name}.dora_scale": np.ones((8, 1), "f4")})
    refused("is a LoHa file", {f"{name}.hada_w1_a": np.ones((8, 1), "f4"), f"{name}.alpha": scalar})
    refused("is a LoKr file", {f"{name}.lokr_w1": np.ones((8, 1), "f4")})
    refused("is not a LoRA", {"conv_in.weight": np.ones((2, 2), "f4"), "x.alpha": scalar})
    refused("is not a LoRA", {"S*": np.ones((1, 8), "f4")})
    refused("strange, which is no part", good | {"strange": scalar})
    refused("only one of the two factors of " + FIRST, {k: v for k, v in good.items() if k != f"{name}.lora_up.weight"})
    other = name.replace("down_blocks_0", "down_blocks_2")
    refused(
        f"another model: it changes {other}, which tiny does not have",
        good | {f"{other}.lora_down.weight": np.ones((2, 8), "f4"), f"{other}.lora_up.weight": np.ones((8, 2), "f4")},
    )
    wide = {f"{name}.lora_down.weight": np.ones((2, 9), "f4")}
    refused(r"another model: its .*attn1.to_q is \[9, 8\] and that of tiny is \[8, 8\]", good | wide)
    refused(
        r"should be \[rank, in\].* and are \[3, 8\] and \[8, 2\]",
        good | {f"{name}.lora_down.weight": np.ones((3, 8), "f4")},
    )
    refused("not finite", good | {f"{name}.lora_up.weight": np.full((8, 2), np.nan, "f4")})
    refused("alpha should be one number", good | {f"{name}.alpha": np.ones(2, "f4")})
    refused("two tensors for one factor", good | {f"unet.{FIRST}.lora_A.weight": np.ones((2, 8), "f4")})
    refused("is of type I8", good | {f"{name}.lora_up.weight": np.ones((8, 2), np.int8)})
    peft = {key: np.ascontiguousarray(value) for key, value in diffusers_tensors(offsets).items()}
    for settings, match in [
        ("{", "does not describe a LoRA"),
        ("[1]", "does not describe a LoRA"),
        ('{"unet.r": 2}', "give no alpha"),
        ('{"unet.lora_alpha": "x"}', "give no alpha"),
        ('{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}', "give no alpha"),
        ('{"unet.lora_alpha": 2, "unet.use_dora": true}', "asks for use_dora"),
        ('{"unet.lora_alpha": 2, "unet.peft_type": "LOHA"}', "a LOHA adapter"),
    ]:
        refused(match, peft, {"lora_adapter_metadata": settings})


def test_an_embedding_of_another_model(tmp_path):
    path = tmp_path / "e.safetensors"

    def refused(match, tensors, widths=(6,)):
        save_file(tensors, path)
        assert str(path) in refuses(match, read_embedding, path, widths)

    refused("vectors are of 8 and this one's of 6", {"emb_params": np.ones((1, 8), "f4")})
    two = {"clip_l": np.ones((1, 2), "f4"), "clip_g": np.ones((1, 4), "f4")}
    refused("vectors are of 2 and 4 and this one's of 6", two)
    refused("vectors are of 6 and this one's of 2 and 4", {"emb_params": np.ones((1, 6), "f4")}, (2, 4))
    refused("is not an embedding: .* and holds 3", two | {"more": np.ones((1, 2), "f4")})
    refused(r"should hold \[n, d\]", {"emb_params": np.ones((1, 2, 6), "f4")})
    refused(r"should hold \[n, d\]", two | {"clip_l": np.ones((2, 2), "f4")}, (2, 4))
    refused("not finite", {"emb_params": np.full((1, 6), np.inf, "f4")})
    refused("type I32", {"emb_params": np.ones((1, 6), np.int32)})


@pytest.mark.parametrize("read", [read_lora, read_embedding])
def test_files_that_are_none(tmp_path, read):
    argument = {FIRST: (8, 8)} if read is read_lora else (6,)
    for ending in (".pt", ".bin", ".ckpt", ".pth"):
        (tmp_path / f"old{ending}").write_bytes(b"\x80\x02}")
        message = refuses("is pickled", read, tmp_path / f"old{ending}", argument)
        assert f"torch.load('old{ending}', weights_only=True)" in message and "'old.safetensors'" in message
    refuses("Cannot read .*none.safetensors", read, tmp_path / "none.safetensors", argument)
    refuses("is a folder without", read, tmp_path, argument)
    refuses("home folder that is not known", read, "~nosuchuser/x", argument)
    path = tmp_path / "short.safetensors"
    save_file({"emb_params": np.ones((4, 6), "f4")}, path)
    path.write_bytes(path.read_bytes()[:-8])
    refuses("cut short", read, path, argument)
    path.write_bytes(b"")
    refuses("is empty", read, path, argument)


def test_the_way_out_of_a_pickle(tmp_path):
    """The line that the refusal names makes a file that is read."""
    import subprocess
    import sys

    import torch

    vectors = torch.arange(6.0).reshape(1, 6)
    torch.save({"string_to_param": {"*": torch.nn.Parameter(vectors)}, "name": "toy"}, tmp_path / "toy.pt")
    message = refuses("is pickled", read_embedding, tmp_path / "toy.pt", (6,))
    code = message.split('-c "')[1].rsplit('"', 1)[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    token, found = read_embedding(tmp_path / "toy.safetensors", (6,))
    assert token is None
    np.testing.assert_array_equal(found, vectors)
