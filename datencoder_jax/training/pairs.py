"""Pairs of pictures of one concept, which only a world that can be drawn again has: the embedded one."""

import hashlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from datencoder_jax.bookkeeping import SHIPPED_SEEDS
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.prompts import TEMPLATE
from datencoder_jax.toyworld.captions import prompt_for
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.render import coverage
from datencoder_jax.toyworld.world import CLASSES, SPLITS, Draws, Instance, sample_context
from datencoder_jax.training.previews import Previews
from datencoder_jax.training.vae import encode_latents

TOKEN = "S*"

_VIEWS = 0x71
"""The tag of what is drawn here."""
_PER_VIEW = 8
"""More numbers than a view takes."""


@dataclass(frozen=True)
class Pairs:
    """Pictures of concepts, several per concept, in memory; see `training.tuning_encoder.Data`.

    Attributes:
        images: uint8 `[concepts, views, H, W, 3]`.
        latents: scaled, float16 `[concepts, views, h, w, c]`.
        covered: how much of each pixel of a latent the concept covers, in [0, 1], float16 `[concepts, views, h, w]`.
        ids: token ids of each view's prompt with the placeholder (the id after the vocabulary), `[concepts, views, L]`.
        batch_size: of the global batch.
        share: of targets that are another view of the concept.
        seed: of what is drawn.
        draws: targets per sample.
    """

    images: np.ndarray
    latents: np.ndarray
    covered: np.ndarray
    ids: np.ndarray
    batch_size: int = 1
    share: float = 0.0
    seed: int = 0
    draws: int = 1

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        draw = np.random.default_rng([self.seed, step])
        concepts = draw.integers(len(self.images), size=self.batch_size)
        views, each = self.images.shape[1], (self.batch_size, self.draws)
        shown = draw.integers(views, size=self.batch_size)
        other = (shown[:, None] + draw.integers(1, max(views, 2), size=each)) % views
        wanted = np.where(draw.random(each) < self.share, other, shown[:, None])
        concepts, shown, wanted = concepts[rows], shown[rows], wanted[rows]
        targets = concepts[:, None], wanted
        return {
            "concepts": concepts.astype(np.int32),
            "images": self.images[concepts, shown],
            "latents": self.latents[concepts, shown],
            "wanted": self.latents[targets],
            "covered": self.covered[targets],
            "ids": self.ids[targets],
        }

    def report(self) -> dict[str, int]:
        return {}

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.ids.tobytes()).hexdigest()[:16]

    def previews(self, count: int) -> Previews:
        """The first concepts, each to be drawn as its second view shows it."""
        second = min(1, self.images.shape[1] - 1)
        return Previews(self.images[:count, 0], self.ids[:count, second], self.images[:count, second])


def concept_views(pipeline: Pipeline, split: str, data, seed: int, classes: tuple[str, ...] = CLASSES) -> Pairs:
    """Draws `data.concepts` instances of `classes` in `data.views` contexts each.

    A view's prompt names its context, or, for a share `data.template_share`, is the tuning template.
    """
    ids = [i for i in SPLITS[split] if CLASSES[i % len(CLASSES)] in classes]
    chosen = _choice_rng(seed).choice(ids, size=data.concepts, replace=False)
    images, masks, prompts = [], [], []
    for concept in tqdm(chosen, desc=f"rendering {split}", disable=len(chosen) < 1000):
        draws = _view_draws(int(concept), seed, data.views)
        contexts = [sample_context(draws, flat=data.flat) for _ in range(data.views)]
        seeds = [int(draws.random() * 2**31) for _ in contexts]
        images.append(render_batch([int(concept)] * data.views, contexts, seeds))
        instance = Instance.from_id(int(concept))
        masks.append([coverage(instance, context, seed) for context, seed in zip(contexts, seeds, strict=True)])
        plain = [draws.random() < data.template_share for _ in contexts]
        prompts += [TEMPLATE.format(TOKEN) if p else prompt_for(c, TOKEN) for p, c in zip(plain, contexts, strict=True)]
    pictures = np.stack(images)
    latents = encode_latents(pipeline.base.vae, pictures.reshape(-1, *pictures.shape[2:]))
    shape, (height, width) = (data.concepts, data.views), latents.shape[1:3]
    factor = pipeline.base.vae.config.factor
    covered = np.array(masks, np.float32).reshape(*shape, height, factor, width, factor).mean(axis=(3, 5))
    tokens = pipeline.tokenizer.encode(prompts, {TOKEN: 1})
    return Pairs(
        pictures,
        latents.reshape(*shape, *latents.shape[1:]),
        covered.astype(np.float16),
        tokens.reshape(*shape, -1),
    )


def _choice_rng(seed: int) -> np.random.Generator:
    """What concepts are chosen with. A bare seed is that of `Pairs.batch`'s first step too."""
    return np.random.default_rng(seed if seed in SHIPPED_SEEDS else [seed, 0, _VIEWS])


def _view_draws(concept: int, seed: int, views: int) -> Draws:
    """What the views of a concept are made from.

    The tags of the world's own draws, such as those that an instance's attributes are made from, are small numbers, as
    seeds are.
    """
    tag = seed if seed in SHIPPED_SEEDS else (_VIEWS << 32) + seed
    return Draws(concept, tag, count=max(256, _PER_VIEW * views))
