"""Training the judge (`evaluation.judge`) on true renders.

A batch holds two pictures, in unlike contexts, of each of `n` individuals; half of these are of one class, so that most
of what tells them apart is their own. With unit embeddings `u_i`, `p(i)` the other picture of `i`'s individual,
`z_i` the probes' logits and `a` running over attributes,

    L = w_c mean_i -log( exp(u_i u_p(i) / t) / sum_{j != i} exp(u_i u_j / t) )
      + w_p sum_a mean_i CE(z_i^a, label_i^a)                                                       (1)

Pictures are augmented (mirrored, shifted, blurred, noised), so that slightly imperfect generated ones can be read too.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from datencoder_jax.bookkeeping import SHIPPED_SEEDS
from datencoder_jax.data.images import to_float, write_grid
from datencoder_jax.evaluation.judge import Judge, JudgeConfig, read
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.toyworld.dataset import LABELS, render_many
from datencoder_jax.toyworld.world import CLASSES, SPLITS, STYLES, Instance, sample_context

_VIEWS = 0x72
"""The tag of what `render_views` draws."""


@dataclass(frozen=True)
class Views:
    """The same individuals, each in several contexts.

    Attributes:
        images: uint8 `[individuals, views, height, width, 3]`.
        labels: int32 `[individuals, views, len(LABELS)]`.
    """

    images: np.ndarray
    labels: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One label, `[individuals, views]`."""
        return self.labels[..., LABELS.index(name)]


def render_views(
    split: str, count: int, views: int, *, size: int = 32, flat: float = 0.55, seed: int = 0, workers: int | None = None
) -> Views:
    """`count` different individuals of a split, each in `views` random contexts."""
    # Without the tag these are the draws of the first steps' batches, too.
    rng = np.random.default_rng([seed, list(SPLITS).index(split), *(() if seed in SHIPPED_SEEDS else (_VIEWS,))])
    ids = rng.choice(SPLITS[split], count, replace=False).repeat(views)
    contexts = [sample_context(rng, flat=flat) for _ in ids]
    seeds = rng.integers(2**31, size=len(ids))
    rows = [Instance.from_id(id).labels() | c.labels() for id, c in zip(ids, contexts, strict=True)]
    labels = np.array([[row[name] for name in LABELS] for row in rows], np.int32)
    images = render_many(ids.tolist(), contexts, seeds.tolist(), size, workers)
    return Views(images.reshape(count, views, size, size, 3), labels.reshape(count, views, -1))


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Float pictures `[batch, h, w, 3]`, each mirrored, shifted by a pixel, blurred and noised at random."""
    flip, shift, blur, noise, strength = jax.random.split(key, 5)
    batch, height, width, _ = images.shape

    def per_picture(key, low: float, high: float):
        return jax.random.uniform(key, (batch, 1, 1, 1), minval=low, maxval=high)

    x = jnp.where(per_picture(flip, 0.0, 1.0) < 0.5, images[:, :, ::-1], images)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    starts = jax.random.randint(shift, (batch, 2), 0, 3)
    cut = jax.vmap(lambda p, s: jax.lax.dynamic_slice(p, (s[0], s[1], jnp.int32(0)), (height, width, 3)))
    x = cut(padded, starts)
    edge = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = 0.25 * edge[:, :-2] + 0.5 * edge[:, 1:-1] + 0.25 * edge[:, 2:]
    soft = 0.25 * rows[:, :, :-2] + 0.5 * rows[:, :, 1:-1] + 0.25 * rows[:, :, 2:]
    amount = jnp.maximum(per_picture(blur, -0.6, 0.8), 0.0)
    x = x + amount * (soft - x)
    return x + per_picture(strength, 0.0, 0.1) * jax.random.normal(noise, x.shape)


def pair_loss(embedding: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """The contrastive term of (1) per picture and whether its nearest neighbour is its partner.

    Args:
        embedding: unit vectors `[2 n, d]`; rows `2 k` and `2 k + 1` show the same individual.
        temperature: `t`.
    """
    count = len(embedding)
    with exact_products():
        logits = embedding @ embedding.T / temperature
    logits = jnp.where(jnp.eye(count, dtype=bool), -1e9, logits)
    partner = jnp.arange(count) ^ 1
    return optax.softmax_cross_entropy_with_integer_labels(logits, partner), logits.argmax(axis=1) == partner


class JudgeTask:
    """Trains a `Judge` on `Views`; see `training.task.Task`."""

    frozen = None

    def __init__(
        self,
        config: JudgeConfig,
        source: Views,
        held_out: Views,
        *,
        batch_size: int,
        temperature: float,
        contrastive_weight: float = 1.0,
        probe_weight: float = 1.0,
        seed: int = 0,
    ):
        self.config, self.source, self.held_out = config, source, held_out
        self.batch_size, self.temperature, self.seed = batch_size, temperature, seed
        self.contrastive_weight, self.probe_weight = contrastive_weight, probe_weight
        classes = source.column("class")[:, 0]
        self._members = [np.flatnonzero(classes == k) for k in range(len(CLASSES))]

    def init(self, key: jax.Array):
        return init_params(Judge, self.config, key)

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, step])
        count, views = self.batch_size // 2, self.source.images.shape[1]
        alike = self._members[step % len(CLASSES)]
        chosen = rng.choice(alike, min(count // 2, len(alike)), replace=False)
        others = np.setdiff1d(rng.choice(len(self.source.images), 2 * count, replace=False), chosen)
        who = np.concatenate([chosen, rng.permutation(others)[: count - len(chosen)]]).repeat(2)
        view = np.stack([rng.choice(views, 2, replace=False) for _ in range(count)]).reshape(-1)
        who, view = who[rows], view[rows]
        return {"images": self.source.images[who, view], "labels": self.source.labels[who, view]}

    def loss(self, params, frozen, batch, key, step):
        verdict = Model(Judge, self.config, params)(augment(to_float(batch["images"]), key))
        pairs, found = pair_loss(verdict.embedding, self.temperature)
        probes, right = jnp.float32(0.0), []
        for k, name in enumerate(LABELS):
            logits, label = verdict.logits[name], batch["labels"][:, k]
            probes += optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            right.append((logits.argmax(axis=-1) == label).mean())
        metrics = {"pairs": pairs.mean(), "found": found.mean(), "probes": probes, "right": jnp.stack(right).mean()}
        return self.contrastive_weight * pairs.mean() + self.probe_weight * probes, metrics

    def preview(self, params, path: Path) -> dict[str, float]:
        judge = Model(Judge, self.config, params)
        count, views = self.held_out.images.shape[:2]
        embedding = read(judge, self.held_out.images).embedding.reshape(count, views, -1)
        nearest = (embedding[:, 0] @ embedding[:, 1].T).argmax(axis=1)
        pairs = np.stack([self.held_out.images[:, 0], self.held_out.images[nearest, 1]], axis=1)
        labels = ("picture", "nearest")
        write_grid(path, pairs[:32].reshape(-1, *pairs.shape[2:]), columns=16, scale=3, labels=labels)
        scores = accuracies(judge, self.held_out)
        return {name: row["all"] for name, row in scores.items()} | separation(judge, self.held_out)


def accuracies(judge: Model, views: Views) -> dict[str, dict[str, float]]:
    """Fraction of pictures each probe reads right: by attribute, over `all` pictures and those of each style."""
    labels = read(judge, views.images).labels
    style = views.column("style").reshape(-1)
    table = {}
    for name in LABELS:
        right = labels[name] == views.column(name).reshape(-1)
        by_style = {word: float(right[style == k].mean()) for k, word in enumerate(STYLES) if (style == k).any()}
        table[name] = {"all": float(right.mean()), **by_style}
    return table


def separation(judge: Model, views: Views) -> dict[str, float]:
    """Mean cosine of two pictures of one individual, of two of the same class, and how often the partner is found.

    `top1` is over all individuals of `views`, from the first picture of each to the second ones.
    """
    count, each = views.images.shape[:2]
    embedding = read(judge, views.images).embedding.reshape(count, each, -1)
    cosine = embedding[:, 0] @ embedding[:, 1].T
    classes = views.column("class")[:, 0]
    alike = (classes[:, None] == classes[None, :]) & ~np.eye(count, dtype=bool)
    found = cosine.argmax(axis=1) == np.arange(count)
    floor = float(cosine[alike].mean()) if alike.any() else float("nan")
    return {"same": float(np.diag(cosine).mean()), "alike": floor, "top1": float(found.mean())}
