"""Bad concept files."""

import json
from typing import Any

import numpy as np
from checkpoint_helpers import PATH

from corpus import files
from corpus.case import Kind
from corpus.files import content, nothing, tensors
from datencoder_jax.checkpoints.concept_file import load_concept

FILE, FINGERPRINT = "concept.safetensors", "f" * 32

KIND = Kind(
    "Concept files",
    "The file of `datencoder generate --concept`, `export` and `info`, read by `load_concept` for a model of one "
    "layer.",
    lambda path: load_concept(path, FINGERPRINT, {PATH: (8, 6)}, width=12),
)

_RNG = np.random.default_rng(0)
ARRAYS = {
    "embeddings": _RNG.standard_normal((2, 12), dtype=np.float32),
    f"offsets.{PATH}.down": _RNG.standard_normal((8, 2), dtype=np.float32),
    f"offsets.{PATH}.up": _RNG.standard_normal((2, 6), dtype=np.float32),
}
METADATA = {
    "format": "datencoder-concept",
    "format_version": "1",
    "token": "S*",
    "blend": "0.3",
    "base": "toyworld",
    "fingerprint": FINGERPRINT,
    "nearest_word": "robot",
    "details": "{}",
}


def concept(arrays: dict[str, Any] | None = None, **metadata: str | None) -> files.Maker:
    """A good file with some tensors and metadata changed; None removes one."""
    both = ARRAYS | (arrays or {}), METADATA | metadata
    kept, texts = ({key: value for key, value in each.items() if value is not None} for each in both)
    return tensors(FILE, kept, texts)  # pyright: ignore[reportArgumentType]


for _name, _make in {
    "no file": nothing(FILE),
    "a folder": files.folder(FILE),
    "an empty file": content(FILE, b""),
    "an error page of a web server": content(FILE, files.HTML),
    "a pointer of Git LFS": content(FILE, files.LFS_POINTER),
    "a pickle": content(FILE, b"PK\x03\x04" + bytes(99)),
    "a picture": files.picture(FILE, format="PNG"),
    "a file cut short": files.cut(concept(), 0.9),
    "a file cut in its header": files.cut(concept(), 0.05),
    "a link to nothing": files.link(FILE, "gone"),
    "a link to itself": files.link(FILE, FILE),
    "a pipe": files.fifo(FILE),
    "a name of 300 letters": nothing("n" * 300),
    "a path of 5,000 letters": nothing("n/" * 2500 + FILE),
    "a name with a zero byte": nothing("a\0b"),
    "a home folder of nobody": nothing("~nosuchuser/concept.safetensors"),
    "an empty path": nothing(""),
    "a LoRA": tensors(FILE, {"a.lora_A.weight": ARRAYS["embeddings"]}),
    "an embedding": tensors(FILE, {"S*": ARRAYS["embeddings"]}),
    "no metadata": tensors(FILE, ARRAYS),
    "another format": concept(format="other"),
    "a later version": concept(format_version="2"),
    "a version that is a text": concept(format_version="\x1b[2J"),
    "no token": concept(token=None),
    "an empty token": concept(token=""),
    "a token of blanks": concept(token="  "),
    "a token with a line break": concept(token="S\n*"),
    "a token with an escape sequence": concept(token="\x1b[2JS*"),
    "a token that turns the direction of writing": concept(token="\u202eS*"),
    "a token with half of a surrogate pair": files.raw_tensors(
        FILE, b'{"__metadata__": {"format": "datencoder-concept", "token": "\\ud83d"}}'
    ),
    "more tokens than vectors": concept(token="A* B* C*", nearest_word="a b c"),
    "two tokens and one word": concept(token="A* B*"),
    "no nearest word": concept(nearest_word=None),
    "a nearest word with a line break": concept(nearest_word="robot\n"),
    "no blend": concept(blend=None),
    "a blend that is a text": concept(blend="half"),
    "a blend that is not a number": concept(blend="nan"),
    "an infinite blend": concept(blend="inf"),
    "a blend above 1": concept(blend="7"),
    "a blend below 0": concept(blend="-1"),
    "no fingerprint": concept(fingerprint=None),
    "another base model": concept(fingerprint="0" * 32),
    "a base model with a line break in its name": concept(base="toy\nworld"),
    "details that are no JSON": concept(details="{"),
    "details that are a list": concept(details="[1]"),
    "details nested 100,000 deep": concept(details="[" * 100_000),
    "details with an escape sequence": concept(details=json.dumps({"a\x1b": "b"})),
    "no embeddings": concept({"embeddings": None}),
    "embeddings of no vector": concept({"embeddings": np.ones((0, 12), "f4")}),
    "embeddings of another width": concept({"embeddings": np.ones((2, 13), "f4")}),
    "embeddings of one axis": concept({"embeddings": np.ones(12, "f4")}),
    "embeddings of whole numbers": concept({"embeddings": np.ones((2, 12), "i4")}),
    "embeddings that are not numbers": concept({"embeddings": np.full((2, 12), np.nan, "f4")}),
    "an infinite offset": concept({f"offsets.{PATH}.up": np.full((2, 6), np.inf, "f4")}),
    "one factor of an offset": concept({f"offsets.{PATH}.up": None}),
    "factors of two ranks": concept({f"offsets.{PATH}.up": np.ones((3, 6), "f4")}),
    "an offset of another shape": concept({f"offsets.{PATH}.up": np.ones((2, 7), "f4")}),
    "an offset of one axis": concept({f"offsets.{PATH}.up": np.ones(2, "f4")}),
    "an offset of a layer that is not there": concept(
        {"offsets.elsewhere.down": np.ones((8, 2), "f4"), "offsets.elsewhere.up": np.ones((2, 6), "f4")}
    ),
    "an offset without a layer": concept({"offsets..down": np.ones((8, 2), "f4")}),
    "an offset of an unknown kind": concept({f"offsets.{PATH}.sideways": np.ones((8, 2), "f4")}),
    "an offset of two kinds": concept({f"offsets.{PATH}.weight": np.ones((8, 6), "f4")}),
    "a tensor of no meaning": concept({"strange": np.ones(2, "f4")}),
    "a tensor whose name has a line break": concept({"offsets.a\nb.down": np.ones((8, 2), "f4")}),
    "a gate without its edits": concept({"gate.bias": np.ones(1, "f4")}),
    "gated edits without their gate": concept(
        {f"offsets.{PATH}.down": None, f"offsets.{PATH}.up": None, f"offsets.{PATH}.output": np.ones((1, 6), "f4")}
    ),
    "a part of a reader": concept({"reader.strange": np.ones((2, 2), "f4")}),
}.items():
    KIND.refused(_name, _make)
KIND.used("a good file", concept())
KIND.used("metadata that nobody knows", concept(author="somebody"))
KIND.used("half precision", concept({key: value.astype(np.float16) for key, value in ARRAYS.items()}))
KIND.used(
    "a rank above the width of the layer",
    concept({f"offsets.{PATH}.down": np.ones((8, 32), "f4"), f"offsets.{PATH}.up": np.ones((32, 6), "f4")}),
)
KIND.used("no offsets", concept({f"offsets.{PATH}.down": None, f"offsets.{PATH}.up": None}))
KIND.used("offsets of zeros", concept({f"offsets.{PATH}.up": np.zeros((2, 6), "f4")}))
KIND.used("details of other programs", concept(details=json.dumps({"author": "somebody", "steps": 12})))
KIND.used("a token in Chinese", concept(token="猫"))
KIND.used("no ending", lambda where: concept()(where).rename("concept"))
