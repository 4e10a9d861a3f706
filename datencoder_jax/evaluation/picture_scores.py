"""Scores of photographs as the field measures personalization: CLIP-I, CLIP-T and DINO.

With `e` a network's embedding of a picture `x`, `t` CLIP's of a text, references `r` (photographs of the subject),
and `u(v) = v / |v|`:

    CLIP-I(x) = 1/R sum_r <u(e(x)), u(e(r))>      e: CLIP's vision tower, projected                          (1)
    CLIP-T(x) = <u(e(x)), u(t(p))>                p: the prompt of `x` in plain words, see `plain_prompt`    (2)
    DINO(x)   = 1/R sum_r <u(e(x)), u(e(r))>      e: the class token of a DINO ViT after its last norm       (3)

Ruiz et al. 2023 (DreamBooth, arXiv 2208.12242, section 4.1). All are plain cosines: not times 100 or 2.5, and negative
ones are kept.

```python
clip = own_clip(pipeline) or load_clip("openai/clip-vit-base-patch32")
for name, scorer in scorers(clip, load_dino("facebook/dino-vits16")).items():     # clip_i, clip_t, dino
    values = scorer(pictures, references=references, prompts=prompts)             # float64 [n], one per picture
    print(scorer.label, values.mean(), scorer.about)                              # about: the exact model and averaging
```

Pictures and references are uint8, `[n, H, W, 3]` or a list of `[H, W, 3]` of any sizes; prompts are texts without
placeholder, one per picture. A scorer takes all three and uses what it needs. `cut_out` removes backgrounds where
masks are known.

Pictures are resized on the host, by Pillow and to 8 bits, since the numbers that papers print were made so, and
`jax.image.resize` gives others: on twelve photographs its cosines differ by up to 7e-3 (to 32 px, the embedded model's
CLIP) and 8e-4 (to 224 px, a ViT-S/16 of random weights). CLIP's shorter side becomes the tower's own, DINO's 8/7 of it
(256 for 224), and the middle is cut out. The latter is the transform of the original code, which DreamBooth's protocol
took over; transformers' processor of ViTs would squeeze the whole picture into 224x224, so of a DINO folder's
`preprocessor_config.json` only mean and deviation are used. Networks compute in float32, whatever the base model does.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.dino import read_dino
from datencoder_jax.checkpoints.hub import resolve_vision
from datencoder_jax.checkpoints.identity import trait
from datencoder_jax.checkpoints.vision import pixel_statistics, read_clip
from datencoder_jax.errors import UserError
from datencoder_jax.models.clip_vision import VisionOutput
from datencoder_jax.models.dino import DINOOutput
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import CLIP_MEAN, CLIP_STD, Pipeline
from datencoder_jax.prompts import PromptTokenizer, placeholder, put_words
from datencoder_jax.runtime.precision import exact_products

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and deviation of pixels in [0, 1] that DINO is given, where a model does not say."""

_AT_ONCE = 32
_REMEMBERED = 4096
_NEUTRAL = np.array([124, 116, 104], np.uint8)

Pictures = np.ndarray | Sequence[np.ndarray]
"""uint8 `[n, H, W, 3]`, or `n` of `[H, W, 3]` of any sizes."""


class Scorer(Protocol):
    """A score of pictures: a cosine, better when higher.

    Attributes:
        label: what tables call it.
        about: what it is, for reports: the exact network, its input, the text, the averaging.
    """

    @property
    def label(self) -> str: ...
    @property
    def about(self) -> str: ...

    def __call__(
        self, pictures: Pictures, *, references: Pictures | None = None, prompts: Sequence[str] | None = None
    ) -> np.ndarray:
        """Scores of `n` pictures, float64 `[n]`.

        Args:
            pictures: what was drawn.
            references: photographs of the subject, at least one.
            prompts: what each picture should show, in plain words, `n` texts.

        Raises:
            ValueError: pictures are not uint8 `[H, W, 3]`, or what the score needs is missing.
        """
        ...


def scorers(clip: "CLIP | None" = None, dino: "Eye | None" = None) -> dict[str, Scorer]:
    """The scores that these networks can give: `clip_i`, `clip_t` (where CLIP has its text tower) and `dino`."""
    found: dict[str, Scorer] = {}
    if clip is not None:
        found["clip_i"] = Likeness("CLIP-I", clip.eye)
        if clip.text is not None:
            found["clip_t"] = Obedience("CLIP-T", clip)
    if dino is not None:
        found["dino"] = Likeness("DINO", dino)
    return found


@dataclass(frozen=True)
class Likeness:
    """Equations (1) and (3), a `Scorer`: does the picture show the subject."""

    label: str
    eye: "Eye"

    @property
    def about(self) -> str:
        """See `Scorer`."""
        return (
            "cosine between the embeddings of a drawn picture and of a reference picture, mean over all reference "
            f"pictures that are given; {self.eye.about}"
        )

    def __call__(
        self, pictures: Pictures, *, references: Pictures | None = None, prompts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Scorer`; prompts are not used."""
        if references is None or not len(references):
            raise ValueError(f"{self.label} needs at least one reference picture")
        embeddings = self.eye([*pictures, *references])
        return embeddings[: len(pictures)] @ embeddings[len(pictures) :].mean(axis=0)


@dataclass(frozen=True)
class Obedience:
    """Equation (2), a `Scorer`: does the picture show what was asked for."""

    label: str
    clip: "CLIP"

    @property
    def about(self) -> str:
        """See `Scorer`."""
        return (
            "cosine between the embeddings of a drawn picture and of its prompt, whose text has the class word alone "
            f"in the placeholder's place; {self.clip.about}"
        )

    def __call__(
        self, pictures: Pictures, *, references: Pictures | None = None, prompts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Scorer`; references are not used."""
        if prompts is None or isinstance(prompts, str) or len(prompts) != len(pictures):
            raise ValueError(f"{self.label} needs one prompt for each picture")
        return (self.clip.eye(pictures) * self.clip.read(prompts)).sum(axis=1)


@dataclass(frozen=True)
class Eye:
    """A vision network and how pictures enter it.

    Attributes:
        name: what reports call it.
        model: the network; float32 is what it computes in.
        take: its output -> embeddings `[n, d]`; one of this module's functions, since programs are kept by it.
        resize: pixels of a picture's shorter side before its middle is cut out.
        mean, std: `[3]`, of pixels in [0, 1].
    """

    name: str
    model: Model
    take: Callable[[Any], jax.Array]
    resize: int
    mean: Sequence[float]
    std: Sequence[float]
    _seen: dict[bytes, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def side(self) -> int:
        """Pixels along each side of what the network is given."""
        return self.model.config.image_size

    @property
    def about(self) -> str:
        """The network and its input in words."""
        config = self.model.config
        return (
            f"{self.name} ({config.num_hidden_layers} layers of width {config.hidden_size}, patches of "
            f"{config.patch_size} px, weights {digest(self.model)}, float32) of pictures whose shorter side is resized "
            f"to {self.resize} px (Pillow, bicubic) and whose middle {self.side}x{self.side} px are taken"
        )

    def __call__(self, pictures: Pictures) -> np.ndarray:
        """Unit vectors of pictures, float64 `[n, d]`.

        Embeddings are remembered, since the references are the same for all that is drawn of a subject, and all scores
        of a network look at the same pictures.
        """
        keys = [_key(picture) for picture in pictures]
        if len(self._seen) + len(keys) > _REMEMBERED:
            self._seen.clear()
        new = {key: k for k, key in enumerate(keys) if key not in self._seen}
        if new:
            small = np.stack([shrink(pictures[k], self.resize, self.side) for k in new.values()])
            mean, std = (np.asarray(x, np.float32).reshape(1, 1, 1, 3) for x in (self.mean, self.std))
            rows = _in_parts(lambda part: _look(self.model, self.take, part, mean, std), small)
            self._seen.update(zip(new, rows, strict=True))
        return np.stack([self._seen[key] for key in keys]).astype(np.float64)


@dataclass(frozen=True)
class CLIP:
    """CLIP's two towers, or its vision tower alone.

    Attributes:
        eye: the vision tower.
        text: the text tower, with its projection into the same space; None where there is none.
        tokenizer: its tokenizer, None without it.
    """

    eye: Eye
    text: Model | None = None
    tokenizer: PromptTokenizer | None = None

    @property
    def about(self) -> str:
        """The towers and their input in words."""
        if self.text is None or self.tokenizer is None:
            return self.eye.about
        return (
            f"{self.eye.about}; its text tower ({self.text.config.num_hidden_layers} layers of width "
            f"{self.text.config.hidden_size}, weights {digest(self.text)}, float32) reads at most "
            f"{self.tokenizer.length} tokens"
        )

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float64 `[n, d]`."""
        if self.text is None or self.tokenizer is None:
            raise ValueError(f"{self.eye.name} has no text tower")
        different = {text: k for k, text in enumerate(dict.fromkeys(texts))}
        ids = self.tokenizer.encode(list(different))
        rows = _in_parts(functools.partial(_read, self.text), ids)
        return rows[[different[text] for text in texts]].astype(np.float64)


def own_clip(pipeline: Pipeline) -> CLIP | None:
    """The base model's own CLIP; None where it has no vision tower that projects into a space shared with text.

    Stable Diffusion's text tower comes without its projection, so it is CLIP without texts.
    """
    vision, text = pipeline.base.vision, pipeline.base.text
    if vision is None or not vision.config.with_projection:
        return None
    mean, std = (np.asarray(x, np.float32).tolist() for x in (pipeline.base.pixel_mean, pipeline.base.pixel_std))
    eye = _clip_eye(f"the CLIP of {pipeline.name}", vision, mean, std)
    if not text.config.with_projection or text.config.projection_dim != vision.config.projection_dim:
        return CLIP(eye)
    return CLIP(eye, _exact(text), pipeline.tokenizer)


def load_clip(name: str | Path) -> CLIP:
    """CLIP from a folder or file (transformers', OpenCLIP's) or a Hugging Face repository.

    Raises:
        UserError: there is no such model, it is unsupported, or its vision tower has no projection.
    """
    parts = read_clip(resolve_vision(name))
    if not parts.vision.config.with_projection:
        raise UserError(
            f"{name} is a vision tower without its projection, whose pictures are not where CLIP-I compares them; name "
            "a folder with the whole of CLIP, such as openai/clip-vit-base-patch32."
        )
    mean, std = pixel_statistics(parts.extractor, name, CLIP_MEAN, CLIP_STD)
    eye = _clip_eye(f"CLIP {name}", parts.vision, mean, std)
    if parts.text is None or parts.tokenizer is None:
        return CLIP(eye)
    config = parts.text.config
    tokenizer = PromptTokenizer(parts.tokenizer, config.vocab_size, config.max_position_embeddings)
    return CLIP(eye, _exact(parts.text), tokenizer)


def load_dino(name: str | Path = "facebook/dino-vits16") -> Eye:
    """DINO from a folder, a file or a Hugging Face repository; see `checkpoints.dino`.

    Raises:
        UserError: there is no such model, or it is unsupported.
    """
    model, extractor = read_dino(name)
    mean, std = pixel_statistics(extractor, name, IMAGENET_MEAN, IMAGENET_STD)
    return Eye(f"DINO {name}", _exact(model), _class_token, model.config.image_size * 8 // 7, mean, std)


def plain_prompt(prompt: str, token: str, word: str) -> str:
    """What CLIP-T reads: the prompt with the class word in the placeholder's place.

    Where the word follows the placeholder anyway (`a S* backpack`), the placeholder is dropped.
    """
    before_word = rf"(?:{placeholder(token).pattern})\s+(?={placeholder(word).pattern})"
    return put_words(re.sub(before_word, "", prompt), {token: word})


def cut_out(pictures: Pictures, masks: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Pictures whose background is grey, so that a score compares the subjects alone.

    A masked score is a scorer called with `cut_out` pictures and `cut_out` references. The masks are the caller's: who
    made them belongs beside the score, which cannot know. The grey is the mean of photographs, about zero for all
    these networks.

    Args:
        pictures: `n` of them, as everywhere here.
        masks: bool `[n, H, W]`, or `n` of `[H, W]`: where the subject is.

    Raises:
        ValueError: a mask is empty, or not of its picture's size.
    """
    cut = []
    for picture, mask in zip(pictures, masks, strict=True):
        if mask.shape != picture.shape[:2] or not mask.any():
            raise ValueError(f"a mask of {list(mask.shape)} with {mask.sum()} pixels for a picture of {picture.shape}")
        cut.append(np.where(mask[..., None], picture, _NEUTRAL))
    return cut


def shrink(picture: np.ndarray, resize: int, side: int) -> np.ndarray:
    """The middle `[side, side, 3]` of a picture whose shorter side is made `resize` pixels, bicubically; uint8."""
    height, width, _ = picture.shape
    short = min(height, width)
    size = (int(resize * width / short), int(resize * height / short))
    picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    top, left = ((n - side) // 2 for n in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def digest(model: Model) -> str:
    """Eight hexadecimal digits that tell a network's weights from others: of samples of every parameter."""
    found = hashlib.sha256()
    for name, value in sorted(model.params.items()):
        found.update(f"{name} ".encode() + trait(np.asarray(value)))
    return found.hexdigest()[:8]


def _clip_eye(name: str, vision: Model, mean: Sequence[float], std: Sequence[float]) -> Eye:
    return Eye(name, _exact(vision), _projected, vision.config.image_size, mean, std)


def _exact(model: Model) -> Model:
    return replace(model, dtype="float32")


def _projected(output: VisionOutput) -> jax.Array:
    assert output.projected is not None
    return output.projected


def _class_token(output: DINOOutput) -> jax.Array:
    return output.class_token


@functools.partial(jax.jit, static_argnames="take")
def _look(model: Model, take: Callable, pixels: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    with exact_products():
        return _unit(take(model((pixels.astype(jnp.float32) / 255 - mean) / std)))


@jax.jit
def _read(model: Model, ids: jax.Array) -> jax.Array:
    with exact_products():
        return _unit(model(ids).projected)


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _in_parts(program: Callable[[np.ndarray], jax.Array], rows: np.ndarray) -> np.ndarray:
    """The program on a few rows at a time; the last few are filled up, so that all run the same program."""
    parts = [np.resize(np.arange(k, min(k + _AT_ONCE, len(rows))), _AT_ONCE) for k in range(0, len(rows), _AT_ONCE)]
    return np.concatenate([np.asarray(program(rows[part])) for part in parts])[: len(rows)]


def _key(picture: np.ndarray) -> bytes:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 [height, width, 3], got {picture.dtype} {list(picture.shape)}")
    return hashlib.sha256(f"{picture.shape} ".encode() + picture.tobytes()).digest()
