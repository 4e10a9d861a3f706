"""Tensors of one component: layouts, variants and shards are read, and damage is refused."""

import ast
import json
import struct
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import equal, refuses
from safetensors.numpy import load_file, save_file

from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.folders import read_base, read_component, write_component
from datencoder_jax.checkpoints.keys import Tensors
from datencoder_jax.checkpoints.layouts import from_torch_layout, to_torch_layout
from datencoder_jax.checkpoints.weights import place
from datencoder_jax.models.unet import UNetConfig

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest_plugins = ("base_fixtures",)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_round_trip(parts, tmp_path, dtype):
    write_component(tmp_path / "unet", parts.unet, dtype=dtype)
    component = COMPONENTS["unet"]
    read = read_component(tmp_path, "unet", component.kind, component.config_class)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    equal(read.params, {n: np.asarray(v).astype(kind).astype(np.float32) for n, v in parts.unet.params.items()})
    again = read_component(tmp_path, "unet", component.kind, component.config_class, dtype=dtype)
    assert {v.dtype for v in again.params.values()} == {np.dtype(kind)}


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


def test_pickles_are_refused(base):
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refuses("only pickled weights .*python -c", read_base, base)
    weights.with_suffix(".bin").rename(weights.with_suffix(".CKPT"))
    refuses("only pickled weights", read_base, base)
    weights.with_suffix(".CKPT").unlink()
    refuses("holds no weights", read_base, base)


def test_a_folder_with_an_apostrophe_does_not_break_the_hint(base):
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    odd = base.rename(base.with_name('it\'s "mine"'))
    message = refuses("only pickled weights", read_base, odd)
    code = message[message.index('python -c "') :].split('"')[1]
    (source,) = [node.value for node in ast.walk(ast.parse(code)) if getattr(node, "value", None) == str(odd)]
    assert source == str(odd)


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


def test_one_tensor_at_a_time_is_on_the_host():
    shapes = {f"p{i}.weight": (64, 64) for i in range(6)}
    abstract = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    made, counts = [], []

    def read():
        array = np.zeros((64, 64), np.float16)
        made.append(weakref.ref(array))
        counts.append(sum(reference() is not None for reference in made))
        return array

    params = place(Tensors(dict.fromkeys(shapes, read)), abstract, dtype="bfloat16", origin="the file")
    assert len(params) == len(counts) == 6 and max(counts) <= 2 and made[-1]() is None
    assert {str(value.dtype) for value in params.values()} == {"bfloat16"}
