"""Bad files of token embeddings."""

from pathlib import Path
from typing import Any

import numpy as np

from corpus import files, models
from corpus.case import Kind
from corpus.files import content, tensors
from datencoder_jax.loading import import_embedding

FILE, WIDTH = "embedding.safetensors", 128
VECTORS = np.random.default_rng(0).standard_normal((2, WIDTH), dtype=np.float32)

KIND = Kind(
    "Embedding files",
    "The file of `datencoder generate --embedding`, read by `import_embedding` for the embedded model, whose token "
    "vectors are of 128.",
    lambda path, token=None: import_embedding(models.toyworld(), path, token),
)


def with_token(make: files.Maker, token: Any) -> files.Maker:
    """A file and the placeholder it is to have."""
    return lambda where: (make(where), token)


_NAMELESS = tensors(FILE, {"emb_params": VECTORS})

files.damaged_tensors(KIND, FILE, {"<cat>": VECTORS})
KIND.refused("an empty folder", files.folder("embedding"))
KIND.refused("a folder with a pickle", lambda w: content("embedding/learned_embeds.bin", b"PK")(w).parent)
KIND.refused("a pickle of A1111", content("embedding.pt", b"PK\x03\x04"))
KIND.refused("a pickle of diffusers", content("learned_embeds.bin", b"PK\x03\x04"))
KIND.refused("a picture that holds an embedding", files.picture("embedding.png"))
KIND.refused("a file without tensors", tensors(FILE, {}))
KIND.refused("a LoRA", tensors(FILE, {"a.lora_A.weight": VECTORS, "a.lora_B.weight": VECTORS}))
KIND.refused("two tokens in one file", tensors(FILE, {"<cat>": VECTORS, "<dog>": VECTORS}))
KIND.refused("an embedding of Stable Diffusion 1.5", tensors(FILE, {"<cat>": np.ones((1, 768), "f4")}))
KIND.refused(
    "an embedding of Stable Diffusion XL",
    tensors(FILE, {"clip_l": np.ones((1, 768), "f4"), "clip_g": np.ones((1, 1280), "f4")}),
)
KIND.refused("the second encoder's half of an embedding of XL", tensors(FILE, {"clip_g": np.ones((1, 1280), "f4")}))
KIND.refused("one number", tensors(FILE, {"<cat>": np.float32(1)}))
KIND.refused("no vectors", tensors(FILE, {"<cat>": np.ones((0, WIDTH), "f4")}))
KIND.refused("vectors of no numbers", tensors(FILE, {"<cat>": np.ones((2, 0), "f4")}))
KIND.refused("a tensor of three axes", tensors(FILE, {"<cat>": VECTORS[None]}))
KIND.refused("the vectors on their side", tensors(FILE, {"<cat>": VECTORS.T}))
KIND.refused("no token in the file, and none given", _NAMELESS)
KIND.refused("a token with a blank in the file", tensors(FILE, {"my cat": VECTORS}))
KIND.refused("a token with a line break in the file", tensors(FILE, {"my\ncat": VECTORS}))
KIND.refused("a token with an escape sequence in the file", tensors(FILE, {"\x1b[2Jcat": VECTORS}))
KIND.refused("a token that turns the direction of writing", tensors(FILE, {"\u202ecat": VECTORS}))
KIND.refused("a token of blanks", with_token(_NAMELESS, "  "))
KIND.refused("a token of two words", with_token(_NAMELESS, "my cat"))
KIND.refused("a token with a zero byte", with_token(_NAMELESS, "c\0at"))
KIND.used("a token that is given", with_token(_NAMELESS, "<cat>"))
KIND.used("a token in Chinese", with_token(_NAMELESS, "猫"))
KIND.used("a token that is given in the place of the file's", with_token(tensors(FILE, {"my cat": VECTORS}), "<cat>"))
KIND.used("one vector without its axis", tensors(FILE, {"<cat>": VECTORS[0]}))
KIND.used("vectors of zeros", tensors(FILE, {"<cat>": np.zeros((1, WIDTH), "f4")}))
KIND.used("vectors a million times too long", tensors(FILE, {"<cat>": 1e6 * VECTORS}))
KIND.used("a folder of diffusers", lambda w: tensors("cat/learned_embeds.safetensors", {"<cat>": VECTORS})(w).parent)
KIND.used("no ending", tensors("embedding", {"<cat>": VECTORS}))
KIND.used("50 vectors, more than a prompt holds", tensors(FILE, {"<cat>": np.resize(VECTORS, (50, WIDTH))}))


def _in_a_closed_folder(where: Path) -> Path:
    path = tensors("closed/embedding.safetensors", {"<cat>": VECTORS})(where)
    return path / "learned_embeds.safetensors"


KIND.refused("a path that goes on behind a file", _in_a_closed_folder)
