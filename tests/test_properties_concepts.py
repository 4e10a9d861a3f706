"""Properties of concept files: what is saved is loaded equal, and whatever else a file holds is refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from checkpoint_helpers import DTYPES, packed
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save

from datencoder_jax.checkpoints.concept_file import concept_size, load_concept, save_concept
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.printable import escape_hidden, is_printable
from datencoder_jax.typing import Concept, Dense, Gate, Gated, LowRank, Reader, Removed, Residual

sizes = st.integers(1, 3)
lines = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
"""Texts of one printable line."""
words = lines.filter(lambda text: text.split() == [text])
wild_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
paths = st.lists(
    st.sampled_from(["down_blocks", "attn1", "to_q", "0", "down", "gate"]) | words, min_size=1, max_size=4
).map(".".join)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def arrays_of(*shape):
    return arrays(np.float32, shape, elements=floats, fill=floats)


@st.composite
def edits(draw, concepts):
    """An edit of any kind; gated ones have an output for each of the concepts."""
    first, second, rank = draw(sizes), draw(sizes), draw(sizes)
    kind = draw(st.sampled_from([LowRank, Dense, Removed, Residual, Gated]))
    if kind is LowRank:
        return LowRank(draw(arrays_of(first, rank)), draw(arrays_of(rank, second)))
    return kind(draw(arrays_of(concepts if kind is Gated else first, second)))


@st.composite
def readers(draw, count, width):
    """The encoder that adds to a concept's vectors, of any small size."""
    config = EncoderConfig(
        vision_width=draw(sizes),
        vision_taps=draw(sizes),
        denoiser_width=draw(sizes),
        embedding_dim=width,
        inventory=(),
        width=draw(sizes),
        depth=draw(st.integers(0, 2)),
        heads=1,
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = abstract_params(TuningEncoder, config)
    params = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in shapes.items()}
    pictures, tokens = draw(sizes), draw(sizes)
    return Reader(
        Model(TuningEncoder, config, params),
        draw(arrays_of(pictures, config.vision_taps, config.vision_width)),
        draw(arrays_of(pictures, tokens, config.vision_width)),
        draw(arrays_of(1, tokens, width)),
        draw(st.none() | arrays_of(1, 2)),
        draw(arrays_of(count)),
    )


@st.composite
def concepts(draw):
    """Any concept that can be used."""
    tokens = draw(st.lists(words, min_size=1, max_size=3))
    count, width, gates = len(tokens) * draw(sizes), draw(sizes), draw(sizes)
    offsets = draw(st.dictionaries(paths, edits(gates), max_size=4))
    gate = None
    if any(isinstance(edit, Gated) for edit in offsets.values()):
        shape = (gates, draw(sizes))
        gate = Gate(*(draw(arrays_of(*s)) for s in (shape, shape, shape[:1], shape[:1])))
    nearest = draw(lines.filter(str.strip)) if len(tokens) == 1 else " ".join(draw(words) for _ in tokens)
    return Concept(
        embeddings=draw(arrays_of(count, width)),
        offsets=offsets,
        token=" ".join(tokens),
        blend=draw(st.floats(0.0, 1.0)),
        base=draw(lines),
        fingerprint=draw(lines),
        nearest_word=nearest,
        metadata=draw(st.dictionaries(lines, lines, max_size=3)),
        gate=gate,
        reader=draw(readers(count, width)) if draw(st.integers(0, 3)) == 0 else None,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("concepts") / "concept.safetensors"


def assert_equal(first, second):
    """That two concepts are of the same texts, kinds and values."""
    for name in ("token", "blend", "base", "fingerprint", "nearest_word", "metadata"):
        assert getattr(first, name) == getattr(second, name), name
    assert_same_arrays(first.embeddings, second.embeddings)
    assert first.offsets.keys() == second.offsets.keys()
    pairs = [(first.offsets[name], second.offsets[name]) for name in first.offsets]
    for one, other in [*pairs, (first.gate, second.gate)]:
        assert type(one) is type(other)
        for a, b in zip(one or (), other or (), strict=True):
            assert_same_arrays(a, b)
    assert (first.reader is None) == (second.reader is None)
    if first.reader is not None:
        assert first.reader.encoder.config == second.reader.encoder.config
        assert list(first.reader.encoder.params) == list(second.reader.encoder.params)
        for name, value in first.reader.encoder.params.items():
            assert_same_arrays(value, second.reader.encoder.params[name])
        for a, b in zip(first.reader[1:], second.reader[1:], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_arrays(a, b)


def assert_same_arrays(first, second):
    first, second = np.asarray(first), np.asarray(second)
    assert first.dtype == second.dtype == np.float32 and first.shape == second.shape
    assert first.tobytes() == second.tobytes()


@given(concepts())
def test_a_concept_is_loaded_as_it_was_saved(path, concept):
    save_concept(path, concept)
    assert path.stat().st_size == concept_size(concept)
    assert_equal(load_concept(path, concept.fingerprint, width=concept.embeddings.shape[1]), concept)


REQUIRED = {"token": "S*", "base": "b", "fingerprint": "f", "nearest_word": "w"}
SIMPLE = Concept(np.ones((2, 4), np.float32), {}, blend=0.5, metadata={"steps": "5"}, **REQUIRED)


def can_be_saved(concept):
    """Whether there are texts of all kinds, placeholders that share the vectors, and a nearest word for each."""
    tokens, words = concept.token.split(), escape_hidden(concept.nearest_word).split()
    is_fit = bool(tokens) and len(concept.embeddings) % len(tokens) == 0 and len(tokens) in (1, len(words))
    is_whole = concept.base and concept.fingerprint and concept.nearest_word
    return bool(is_fit and is_whole and is_printable(concept.token) and is_printable(concept.fingerprint))


@given(
    st.dictionaries(st.sampled_from(sorted(REQUIRED)), wild_texts, min_size=1), st.dictionaries(wild_texts, wild_texts)
)
@example({"token": " "}, {})
@example({"token": "A* B* C*"}, {})
@example({"token": "A* B*"}, {})
@example({"nearest_word": ""}, {})
@example({"base": ""}, {})
def test_whatever_texts_are_saved_can_be_loaded(path, texts, metadata):
    """Hidden characters are written as escapes, but for those of a placeholder, which would be another one then."""
    path.unlink(missing_ok=True)
    concept = replace(SIMPLE, metadata=metadata, **texts)
    if not can_be_saved(concept):
        with pytest.raises(UserError):
            save_concept(path, concept)
        assert not path.exists()
        return
    save_concept(path, concept)
    found = load_concept(path)
    assert found.token == (REQUIRED | texts)["token"] and len(found.metadata) <= len(metadata)
    for text in (found.token, found.base, found.fingerprint, found.nearest_word, *found.metadata.items()):
        assert is_printable("".join(text))


def load(path, content):
    """The concept in a file of this content; None where it is refused in one sentence."""
    path.write_bytes(content)
    try:
        return load_concept(path)
    except UserError as error:
        assert is_printable(str(error)) and str(error).endswith(".")
        return None


def is_sound(concept):
    """Whether a concept's texts are printable lines and all its values finite numbers."""
    texts = [concept.token, concept.base, concept.fingerprint, concept.nearest_word, *concept.offsets]
    texts += [text for pair in concept.metadata.items() for text in pair]
    values = [concept.embeddings, *(array for edit in concept.offsets.values() for array in edit)]
    values += [*(concept.gate or ())]
    return all(map(is_printable, texts)) and all(np.isfinite(np.asarray(array)).all() for array in values)


@st.composite
def damaged(draw):
    """A concept file that was cut short, or of which bytes of the header or bits were changed."""
    concept = draw(concepts())
    content = bytearray(file_of(concept))
    if draw(st.integers(0, 3)) == 0:
        return bytes(content[: draw(st.integers(0, len(content) - 1))])
    header = 8 + int.from_bytes(content[:8], "little")
    for place in draw(st.lists(st.integers(0, header - 1) | st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = draw(st.integers(0, 255) | st.sampled_from(list(b'"0123456789,[]{}-')))
    return bytes(content)


def file_of(concept):
    """The content of a concept's file."""
    with TemporaryDirectory() as folder:
        save_concept(Path(folder) / "c", concept)
        return (Path(folder) / "c").read_bytes()


@given(damaged() | st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: struct.pack("<Q", len(b)) + b))
def test_damage_is_refused_in_one_sentence(path, content):
    concept = load(path, content)
    assert concept is None or is_sound(concept)


names = st.sampled_from(
    [
        *(f"offsets.p.{part}" for part in ("down", "up", "weight", "directions", "output")),
        *(f"gate.{part}" for part in Gate._fields),
        *("embeddings", "offsets.q.residual", "reader.classes", "reader.scale", "reader.encoder.queries"),
        *("offsets.", "offsets..down", "gate.", "stranger"),
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CONFIG = EncoderConfig(
    vision_width=2, vision_taps=1, denoiser_width=2, embedding_dim=2, inventory=(), width=2
).to_dict()
config_changes = st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values | st.integers(-2, 10**12), max_size=3)
configs = config_changes.map(lambda changes: json.dumps(CONFIG | changes))


def mostly(value, other):
    """A value that is good, or once in a while another one."""
    return st.sampled_from([False] * 7 + [True]).flatmap(lambda is_other: other if is_other else st.just(value))


numbers = st.floats().map(repr) | st.sampled_from(["1", "-0", "1e999", "much", "1_0", "", "9" * 5000])
metadata = st.fixed_dictionaries(
    {
        "token": mostly("S*", wild_texts),
        "blend": mostly("1", numbers),
        "nearest_word": mostly("w", wild_texts),
        "details": mostly("{}", json_values.map(json.dumps) | wild_texts),
    },
    optional={"reader": configs | json_values.map(json.dumps) | wild_texts, "other": wild_texts},
).map(lambda values: {"format": "datencoder-concept", "format_version": "1", "base": "b", "fingerprint": "f"} | values)


@st.composite
def strange_files(draw):
    """A safetensors file of any tensors, types, shapes and metadata under the names that a concept's file has."""
    header, data = {"__metadata__": draw(metadata)}, b""
    for name in {"embeddings", *draw(st.lists(names | wild_texts.map("offsets.{}.weight".format), max_size=5))}:
        kind = draw(st.sampled_from(["F32"] * 60 + sorted(DTYPES)))
        shape = draw(mostly([1, 2], st.lists(st.integers(0, 3), max_size=4)))
        size = DTYPES[kind] * int(np.prod(shape, dtype=int))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += draw(st.sampled_from([b"\0", b"\x3f", b"\x3e", b"\xff", b"\x7e\x01\x02\x40"])) * size
        data = data[: header[name]["data_offsets"][1]]
    return packed(header, data)


def one_tensor(kind="F32", shape=(1, 2), data=bytes(8), **values):
    """A concept file with one tensor."""
    entry = {"dtype": kind, "shape": list(shape), "data_offsets": [0, len(data)]}
    words = {"format": "datencoder-concept", "format_version": "1", "blend": "1"} | REQUIRED | values
    return packed({"__metadata__": words, "embeddings": entry}, data)


@given(
    readers(2, 4),
    st.sampled_from([("classes", 1), ("classes", 2), ("patches", 0), ("patches", 2), ("context", 0), ("scale", 0)]),
)
def test_a_reader_of_which_a_part_does_not_fit_is_refused(path, reader, place):
    name, axis = place
    part = getattr(reader, name)
    longer = np.concatenate([part, part.take([0], axis)], axis)
    with pytest.raises(UserError, match="parts that do not fit"):
        save_concept(path, replace(SIMPLE, reader=reader._replace(**{name: longer})))


@st.composite
def changed_readers(draw):
    """A concept file of which the reader is described as another one."""
    count, width = draw(sizes), draw(sizes)
    embeddings, reader = draw(arrays_of(count, width)), draw(readers(count, width))
    content = file_of(Concept(embeddings, {}, blend=1.0, reader=reader, **REQUIRED))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config = json.loads(header["__metadata__"]["reader"]) | draw(config_changes)
    header["__metadata__"]["reader"] = json.dumps(config)
    return packed(header, content[8 + length :])


@given(strange_files() | changed_readers())
@example(one_tensor(shape=[1] * 99 + [2]))
@example(one_tensor("F64", (1, 1), struct.pack("<d", 1e300)))
@example(one_tensor(reader=json.dumps(CONFIG | {"depth": 10**6})))
@example(one_tensor(details='{"steps": ' + "9" * 5000 + "}"))
def test_a_file_of_any_tensors_and_metadata_is_sound_or_refused(path, content):
    concept = load(path, content)
    assert concept is None or is_sound(concept)
    if concept is not None:
        assert_equal(load_again(path, concept), concept)


def load_again(path, concept):
    save_concept(path, concept)
    return load_concept(path)


@given(
    st.sampled_from([*REQUIRED, "key", "value", "tensor"]),
    wild_texts,
    st.sampled_from("\x1b\n\t\x85\u2028\u202e\u200b\x00"),
)
def test_text_that_is_not_one_printable_line_is_refused(path, place, text, hidden):
    odd = f"a{text}{hidden}"
    tensors = {"embeddings": np.ones((1, 2), np.float32)}
    values = {"format": "datencoder-concept", "format_version": "1", "blend": "1"} | REQUIRED
    if place == "tensor":
        tensors[f"offsets.{odd}.weight"] = np.ones((1, 1), np.float32)
    elif place in REQUIRED:
        values[place] = odd
    else:
        values["details"] = json.dumps({odd: "v"} if place == "key" else {"k": odd})
    path.write_bytes(save(tensors, values))
    with pytest.raises(UserError, match="text that is not one line of printable characters"):
        load_concept(path)
