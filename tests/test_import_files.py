"""LoRA and embedding files of other programs: what is read as it is, and what is refused in one sentence.

What LoRAs do to a model is in `test_lora_merging`.
"""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import refuses
from export_helpers import draw_offsets
from safetensors.numpy import save_file

from datencoder_jax.checkpoints.embedding_files import read_embedding
from datencoder_jax.checkpoints.lora_files import diffusers_tensors, kohya_tensors, layer_shapes, read_lora

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def shapes(pipeline):
    return layer_shapes(pipeline.base.unet.params)


def test_half_precision_is_read_as_it_is(shapes, tmp_path):
    offsets = draw_offsets({FIRST: shapes[FIRST]})
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


def test_other_kinds_and_other_models(shapes, tmp_path):
    path = tmp_path / "lora.safetensors"
    offsets = draw_offsets({FIRST: shapes[FIRST]})
    good = {key: np.ascontiguousarray(value) for key, value in kohya_tensors(offsets).items()}
    name = "lora_unet_" + FIRST.replace(".", "_")
    scalar = np.ones((), np.float32)

    def refused(match, tensors, metadata=None):
        save_file(tensors, path, metadata)
        assert str(path) in refuses(match, read_lora, path, shapes, base="tiny")

    refused("is a DoRA file", good | {f"{name}.dora_scale": np.ones((8, 1), "f4")})
    refused("is a LoHa file", {f"{name}.hada_w1_a": np.ones((8, 1), "f4"), f"{name}.alpha": scalar})
    refused("is a LoKr file", {f"{name}.lokr_w1": np.ones((8, 1), "f4")})
    refused(r"is a \(IA\)\^3 file", {f"{name}.weight": np.ones(8, "f4"), f"{name}.on_input": scalar})
    refused("is a full-difference file", good | {f"{name}.diff": np.ones((8, 8), "f4")})
    refused("is a full-difference file", good | {f"{name}.diff_b": np.ones(8, "f4")})
    refused("is a LoCon .Tucker. file", good | {f"{name}.lora_mid.weight": np.ones((2, 2, 3, 3), "f4")})
    refused("is not a LoRA", {"conv_in.weight": np.ones((2, 2), "f4"), "x.alpha": scalar})
    refused("is not a LoRA", {"S*": np.ones((1, 8), "f4")})
    refused("strange, which is no part", good | {"strange": scalar})
    refused("only one of the two factors of " + FIRST, {k: v for k, v in good.items() if k != f"{name}.lora_up.weight"})
    others = [f"lora_unet_double_blocks_{i}_img_attn_qkv" for i in range(19)]
    strangers = {f"{o}.lora_{p}.weight": np.ones((2, 2), "f4") for o in others for p in ("down", "up")}
    refused(f"changes 19 layer.s. that tiny does not have, {others[0]} the first .* another family", good | strangers)
    second = {f"lora_te2_text_projection.lora_{p}.weight": np.ones((2, 2), "f4") for p in ("down", "up")}
    refused(r"changes 1 layer.s. that tiny does not have, lora_te2_text_projection", good | second)
    norm = {f"unet.conv_norm_out.lora_{p}.weight": np.ones((2, 2), "f4") for p in "AB"}
    refused(r"changes 1 layer.s. that tiny does not have, unet.conv_norm_out", good | norm)
    wide = {f"{name}.lora_down.weight": np.ones((2, 9), "f4")}
    refused(r"another model: its .*attn1.to_q is \[9, 8\] and that of tiny is \[8, 8\]", good | wide)
    refused(
        r"should be \[rank, in\].* and are \[3, 8\] and \[8, 2\]",
        good | {f"{name}.lora_down.weight": np.ones((3, 8), "f4")},
    )
    refused(
        r"should be \[rank, in\].* and are \[0, 8\] and \[8, 0\]",
        {f"{name}.lora_down.weight": np.ones((0, 8), "f4"), f"{name}.lora_up.weight": np.ones((8, 0), "f4")},
    )
    conv = {
        f"unet.{CONV}.lora_A.weight": np.ones((2, 8, 3, 3), "f4"),
        f"unet.{CONV}.lora_B.weight": np.ones((8, 2), "f4"),
    }
    save_file(conv, path)
    assert read_lora(path, shapes)[CONV].down.shape == (72, 2)
    refused(
        r"and are \[2, 8, 3, 3\] and \[8, 2, 3, 3\]", conv | {f"unet.{CONV}.lora_B.weight": np.ones((8, 2, 3, 3), "f4")}
    )
    small = conv | {f"unet.{CONV}.lora_A.weight": np.ones((2, 8, 1, 1), "f4")}
    refused(r"another model: its .*conv1 is \[8, 8\] and that of tiny is \[3, 3, 8, 8\]", small)
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
        ('{"unet.lora_alpha": 2, "unet.init_lora_weights": "pissa_niter_4"}', "took something from the base model"),
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
        old, new = (tmp_path / f"old{end}" for end in (ending, ".safetensors"))
        assert f"torch.load('{old}', map_location='cpu', weights_only=True)" in message and f"'{new}'" in message
    refuses("There is no file .*none.safetensors", read, tmp_path / "none.safetensors", argument)
    refuses("is a folder without", read, tmp_path, argument)
    refuses("home folder that is not known", read, "~nosuchuser/x", argument)
    path = tmp_path / "short.safetensors"
    save_file({"emb_params": np.ones((4, 6), "f4")}, path)
    path.write_bytes(path.read_bytes()[:-8])
    refuses("cut short", read, path, argument)
    path.write_bytes(b"")
    refuses("is empty", read, path, argument)


def convert(message, folder):
    """Runs the command that a refusal names, as a shell in `folder` does."""
    import subprocess
    import sys

    command = message[message.index("python -c ") :].removesuffix(".").replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, cwd=folder, check=True)


@pytest.mark.parametrize("name", ["toy.pt", 'it\'s a "cat" $HOME `x` 50% 猫!.pt', "TOY.PT", "back\\slash.bin"])
@pytest.mark.parametrize("kind", ["original", "A1111", "diffusers"])
def test_the_command_that_converts_an_embedding_works(tmp_path, name, kind):
    """Files of textual inversion's own code, of A1111 and of diffusers, whatever they are called, wherever it runs."""
    import torch

    vectors = torch.arange(12.0).reshape(6, 2).T  # not contiguous, as some programs save them
    inside = {"*": torch.nn.Parameter(vectors)}
    content = {
        "original": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict(inside)},
        "A1111": {"string_to_token": {"*": 265}, "string_to_param": inside, "name": "toy", "step": 3},
        "diffusers": {"<toy>": vectors},
    }
    (tmp_path / "files").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "files" / name
    torch.save(content[kind], path)
    convert(refuses("is pickled", read_embedding, path, (6,)), tmp_path / "elsewhere")
    token, found = read_embedding(path.with_suffix(".safetensors"), (6,))
    assert token == ("<toy>" if kind == "diffusers" else None)
    np.testing.assert_array_equal(found, vectors)


def test_the_command_that_converts_a_lora_works(shapes, tmp_path):
    """A folder of PEFT or diffusers with pickled weights alone is told the same."""
    import torch

    offsets = draw_offsets({FIRST: shapes[FIRST]})
    tensors = {key: torch.from_numpy(value.copy()) for key, value in diffusers_tensors(offsets).items()}
    torch.save({"state_dict": tensors | {"unet.more": 3}, "epoch": 2}, tmp_path / "pytorch_lora_weights.bin")
    convert(refuses("pytorch_lora_weights.bin is pickled", read_lora, tmp_path, shapes), tmp_path)
    np.testing.assert_array_equal(read_lora(tmp_path, shapes)[FIRST].down, offsets[FIRST].down)


def test_a_pickled_embedding_in_a_folder_is_told(tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(b"\x80\x02}")
    refuses("learned_embeds.bin is pickled", read_embedding, tmp_path, (6,))


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}"])
def test_a_renamed_pickle_is_told_as_one(tmp_path, start):
    (tmp_path / "e.safetensors").write_bytes(start + bytes(100))
    refuses("is a pickled file under another ending", read_embedding, tmp_path / "e.safetensors", (6,))


def test_endings_in_capitals(shapes, tmp_path):
    save_file({"emb_params": np.ones((1, 6), "f4")}, tmp_path / "E.SAFETENSORS")
    assert read_embedding(tmp_path / "E.SAFETENSORS", (6,))[0] is None
    offsets = draw_offsets({FIRST: shapes[FIRST]})
    save_file({k: np.ascontiguousarray(v) for k, v in kohya_tensors(offsets).items()}, tmp_path / "L.SAFETENSORS")
    assert set(read_lora(tmp_path / "L.SAFETENSORS", shapes)) == {FIRST}
    for read, argument in ((read_lora, shapes), (read_embedding, (6,))):
        (tmp_path / "E.PT").write_bytes(b"\x80\x02}")
        refuses("E.PT is pickled", read, tmp_path / "E.PT", argument)


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
