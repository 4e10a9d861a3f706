"""Properties of LoRA and embedding files: tensors of any type, shape and value are read as numbers or refused."""

import json
import struct

import numpy as np
import pytest
from checkpoint_helpers import DTYPES, packed
from hypothesis import example, given
from hypothesis import strategies as st

from datencoder_jax.checkpoints.embedding_files import read_embedding
from datencoder_jax.checkpoints.lora_files import read_lora
from datencoder_jax.errors import UserError

ONE = struct.pack("<f", 1)
FACTORS = {f"unet.conv_in.lora_{part}.weight": ("F32", [1, 1], ONE) for part in "AB"}
ALPHA = "unet.conv_in.alpha"


@st.composite
def tensors(draw):
    """A tensor's type, shape and content."""
    kind = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.sampled_from([[], [1], [1, 1]]) | st.lists(st.integers(0, 2), max_size=5))
    size = DTYPES[kind] * int(np.prod(shape, dtype=int))
    return kind, shape, draw(st.binary(min_size=size, max_size=size))


values = st.floats(allow_subnormal=False) | st.integers() | st.none() | st.text(max_size=3)
settings = st.dictionaries(st.sampled_from(["lora_alpha", "r", "alpha_pattern", "use_rslora"]), values).map(
    lambda options: {f"unet.{name}": value for name, value in options.items()}
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "file.safetensors"


def write(path, entries, metadata=None):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (kind, shape, content) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    path.write_bytes(packed(header, data))


def read(load):
    """What a call gives; None where it refuses in one sentence."""
    try:
        return load()
    except UserError as error:
        assert str(error).endswith(".")
        return None


@given(st.sampled_from([ALPHA, *FACTORS]), tensors(), settings)
@example(ALPHA, ("F8_E4M3", [], b"\x38"), {})
@example(ALPHA, ("C64", [], bytes(8)), {})
@example(ALPHA, ("F32", [1] * 99, ONE), {})
@example(ALPHA, ("F64", [], struct.pack("<d", 1e300)), {})
@example(ALPHA, ("F32", [], ONE), {"unet.lora_alpha": 10**400})
@example("unet.conv_in.lora_A.weight", ("F64", [1, 1], struct.pack("<d", 1e300)), {})
def test_a_lora_with_any_tensor_and_settings_is_read_as_numbers_or_refused(path, name, tensor, settings):
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    write(path, FACTORS | {name: tensor}, metadata)
    found = read(lambda: read_lora(path, {"conv_in": (1, 1)}))
    assert found is None or all(np.isfinite(factor).all() for factor in found["conv_in"])


@given(st.integers(0, 127), st.sampled_from(["I64", "I32", "U8"]))
def test_an_alpha_of_any_integer_scales(path, number, kind):
    write(path, FACTORS | {ALPHA: (kind, [], number.to_bytes(DTYPES[kind], "little"))})
    assert read_lora(path, {"conv_in": (1, 1)})["conv_in"].up == number


@given(tensors())
@example(("F32", [1] * 99, ONE))
@example(("F64", [1, 1], struct.pack("<d", 1e300)))
def test_an_embedding_of_any_tensor_is_read_as_numbers_or_refused(path, tensor):
    write(path, {"<cat>": tensor})
    found = read(lambda: read_embedding(path, (1,)))
    assert found is None or (found[1].dtype == np.float32 and np.isfinite(found[1]).all())
