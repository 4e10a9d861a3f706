"""The method itself: the tuning-encoder predicts `v*` and the offsets, which are then tuned (arXiv 2307.06925).

The prediction depends on a noisy latent and its timestep. Pretraining makes it at one of a few timesteps `t_j`; for a
concept the predictions at all of them, for each of its pictures `i`, are averaged once and frozen (ours):

    x = mean_{i, j} E(I_i, sqrt(a_j) z_i + sqrt(1 - a_j) e_ij, t_j)                            (1)

Tuning goes on from x. In a concept that is not tuned, each offset has a gain (ours), the same for every picture:

    A_l B_l <- g_l A_l B_l,    g_l the encoder's own for values of cross-attention and for self-attention, else 1   (2)

`predict_and_compare` is one program. `predict_in_parts` runs the same functions as four, each with the networks that it
needs alone.

Factors are averaged, not their products: the decoders are shared, so the factors of one projection live in one basis.
Gains above 1 draw a likeness that a dozen steps reach otherwise, and stand in the way of those steps: tuned from there,
prompts are lost sooner. The encoder's configuration has them, chosen on development individuals.

Predictions for single pictures also tell whether the encoder takes them for the same thing (ours):

    c_ik = <v*_i, v*_k> / (|v*_i| |v*_k|),    v*_i = mean_j v*(I_i, z_ij, t_j)                  (3)
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.compilation import Program
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod
from datencoder_jax.encoder.features import Seen, extract, vision_features
from datencoder_jax.methods.lora import zero_offsets
from datencoder_jax.methods.method import Method, Setup
from datencoder_jax.models.batches import map_in_batches, pictures_at_once
from datencoder_jax.models.module import Model
from datencoder_jax.typing import Condition, Features, LearningRates, LowRank, Variables

_LEVELS = (0.2, 0.4, 0.6, 0.8)
"""The `t_j` of equation (1), as shares of the schedule."""


class Prediction(NamedTuple):
    """What the encoder predicts for the pictures of one concept.

    Attributes:
        variables: equation (1).
        cosines: equation (3), float32 `[pictures, pictures]`.
    """

    variables: Variables
    cosines: jax.Array


def levels(timesteps: int) -> jax.Array:
    """The `t_j` of equation (1) in a schedule of so many timesteps, int32 `[4]`."""
    return jnp.array([int(level * timesteps) for level in _LEVELS], jnp.int32)


def look(
    base: Base,
    images: jax.Array | None,
    latents: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    empty_ids: jax.Array,
    states: Seen | None = None,
    patch_taps: int = 1,
) -> Features:
    """What the encoder sees of noisy latents and the pictures they are of, without gradient.

    Args:
        images: concept pictures in [-1, 1], `[pictures, H, W, 3]`.
        latents: their clean scaled latents `[batch, h, w, c]`, the same number for each picture in turn, noised here to
            `t [batch]` with `noise`.
        empty_ids: token ids of the empty prompt `[1, L]`.
        states: what `vision_features` says of the pictures, in their place where it is known.
        patch_taps: as for `vision_features`, where it is not.
    """
    if states is None:
        assert images is not None
        states = see(base, images, patch_taps)
    return _look(base, states, latents, t, noise, base.condition(empty_ids))


def see(base: Base, images: jax.Array, patch_taps: int = 1) -> Seen:
    """What the vision tower makes of pictures `[batch, H, W, 3]` in [-1, 1]; see `vision_features`."""
    return vision_features(base.eyes, base.vision_input(images), patch_taps)


def _look(
    base: Base,
    states: Seen,
    latents: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    empty: Condition,
) -> Features:
    """As `look`, of pictures that have been seen and an empty prompt that has been read."""
    noisy = add_noise(latents, noise, jnp.asarray(alphas_cumprod(base.schedule))[t])
    empty = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(latents), *x.shape[1:])), empty)
    return extract(states, base.unet, noisy, t, empty.context, base.added(noisy, empty.pooled))


def predict_each(
    encoder: Model,
    base: Base,
    images: jax.Array,
    latents: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    empty_ids: jax.Array,
) -> Variables:
    """One prediction per noisy latent, with a batch axis; arguments as for `look`."""
    return encoder(look(base, images, latents, t, noise, empty_ids, patch_taps=encoder.config.patch_taps))


def _see_in_batches(base: Base, images: jax.Array, patch_taps: int = 1) -> Seen:
    """What `see` returns, computed for a few pictures at a time."""
    function = functools.partial(see, base, patch_taps=patch_taps)
    return map_in_batches(function, images, pictures_at_once(*images.shape[1:3]))


def _encode(base: Base, images: jax.Array) -> jax.Array:
    return map_in_batches(base.vae.bind().to_latents, images, pictures_at_once(*images.shape[1:3]))


def _mean(
    base: Base,
    encoder: Model,
    states: Seen,
    latents: jax.Array,
    empty: Condition,
    key: jax.Array,
) -> Prediction:
    """Equations (1) and (3), with one clean latent per picture, for a few pictures at a time, so that memory does not
    grow with them."""
    timesteps = levels(base.schedule.num_train_timesteps)
    noise = jax.random.normal(key, (len(latents) * len(timesteps), *latents.shape[1:]))

    def predict_means(pictures: tuple[Seen, jax.Array, jax.Array]) -> Variables:
        """The mean over its timesteps of each picture."""
        states, latents, noise = pictures
        t = jnp.tile(timesteps, len(latents))
        noisy = jnp.repeat(latents, len(timesteps), axis=0)
        predicted = encoder(_look(base, states, noisy, t, noise.reshape(noisy.shape), empty))
        return jax.tree.map(lambda x: x.reshape(len(latents), len(timesteps), *x.shape[1:]).mean(axis=1), predicted)

    height, width = (side * base.vae.config.factor for side in latents.shape[1:3])
    pictures = (states, latents, noise.reshape(len(latents), len(timesteps), *latents.shape[1:]))
    means = map_in_batches(predict_means, pictures, pictures_at_once(height, width))
    return Prediction(jax.tree.map(lambda x: x.mean(axis=0), means), _cosines(means.embeddings))


def _cosines(embeddings: jax.Array) -> jax.Array:
    """Equation (3) of `[pictures, n, d]`; sums of products rather than a matrix product, which devices round."""
    rows = embeddings.reshape(len(embeddings), -1).astype(jnp.float32)
    rows /= jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return (rows[:, None] * rows[None]).sum(axis=-1)


def group_alike(cosines: np.ndarray, least: float) -> list[list[int]]:
    """Rows in groups: two with a cosine of at least `least` are in one, and so are all that such pairs connect.

    Args:
        cosines: `[n, n]`, symmetric.

    Returns:
        The groups' rows in rising order, the group of row 0 first.
    """
    groups: list[list[int]] = []
    for row in range(len(cosines)):
        alike = [group for group in groups if any(cosines[row][other] >= least for other in group)]
        groups = [group for group in groups if group not in alike]
        groups.append(sorted([row, *(other for group in alike for other in group)]))
    return sorted(groups)


def _predict(base: Base, encoder: Model, images: jax.Array, empty_ids: jax.Array, key: jax.Array) -> Variables:
    return _predict_and_compare(base, encoder, images, empty_ids, key).variables


def _predict_and_compare(
    base: Base, encoder: Model, images: jax.Array, empty_ids: jax.Array, key: jax.Array
) -> Prediction:
    return _mean(
        base,
        encoder,
        _see_in_batches(base, images, encoder.config.patch_taps),
        _encode(base, images),
        base.condition(empty_ids),
        key,
    )


predict_and_compare = Program("prediction", _predict_and_compare)
"""`predict_and_compare(base, encoder, images [k, H, W, 3] in [-1, 1], empty_ids [1, L], key) -> Prediction`."""


def predict(
    base: Base, encoder: Model, images: jax.Array, empty_ids: jax.Array, key: jax.Array, *, quiet: bool = False
) -> Variables:
    """Equation (1) for pictures `[k, H, W, 3]` in [-1, 1], with token ids of the empty prompt `[1, L]`."""
    return predict_and_compare(base, encoder, images, empty_ids, key, quiet=quiet).variables


IN_PARTS = (
    Program("image features", _see_in_batches, static_argnames=("patch_taps",)),
    Program("VAE encoding", _encode),
    Program("text encoding", Base.condition),
    Program("prediction", _mean),
)
"""The programs of `predict_in_parts`."""


def predict_in_parts(
    base: Base, encoder: Model, images: jax.Array, empty_ids: jax.Array, key: jax.Array, *, quiet: bool = False
) -> Prediction:
    """What `predict_and_compare` returns, as four programs."""
    look_at, encode, read, mean = IN_PARTS
    states = look_at(base.only("vision"), images, patch_taps=encoder.config.patch_taps, quiet=quiet)
    latents = encode(base.only("vae"), images, quiet=quiet)
    empty = read(base.only("text", "text_2"), empty_ids, quiet=quiet)
    return mean(base.only("unet"), encoder, states, latents, empty, key, quiet=quiet)


def _amplified(predicted: Variables, gains: tuple[float, float]) -> Variables:
    """Equation (2)."""
    values, within = gains

    def gain(path: str) -> float:
        return values if path.endswith("attn2.to_v") else within if ".attn1." in path else 1.0

    offsets = cast(dict[str, LowRank], predicted.offsets)  # the encoder predicts no others
    return predicted._replace(offsets={path: x._replace(up=gain(path) * x.up) for path, x in offsets.items()})


def start(setup: Setup) -> Variables:
    """The encoder's prediction, with its gains where it stays as it is.

    Offsets that it does not predict, for want of a hypernetwork, start at zero.
    """
    pipeline = setup.pipeline
    assert pipeline.encoder is not None
    empty = jnp.asarray(pipeline.tokenizer.encode([""]))
    run = predict_in_parts if pipeline.memory.in_parts else predict_and_compare
    predicted, cosines = run(pipeline.base, pipeline.encoder, setup.pictures, empty, setup.key, quiet=setup.quiet)
    if setup.notes is not None:
        setup.notes["picture_cosines"] = cosines
    if predicted.offsets:
        return predicted if setup.tuned else _amplified(predicted, pipeline.encoder.config.gains)
    return predicted._replace(offsets=zero_offsets(pipeline.base, pipeline.encoder.config.rank, setup.key))


METHOD = Method(
    12, LearningRates(embeddings=3.2e-3, offsets=1e-2), start, focus=0.1, levels=(0.4, 0.6), encoder="encoder"
)
"""The steps are the paper's, the rates ours."""
