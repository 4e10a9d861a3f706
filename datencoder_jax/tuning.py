"""Tuning a concept's variables on its pictures: a scan over optimiser steps in one program.

The variables `x` are the embeddings `v*`, the edits of the weights and what else a method has; all else is frozen.
With views `z_1 .. z_V` of the pictures (random crops and flips, encoded once), step `s` draws, from `fold_in(key, s)`,
a batch of views, timesteps `t` and noises `e`, and takes an Adam step on

    L(x) = mean_b |unet(z_t, t; dual path of x) - target|^2 + lambda_n |v*|^2 / rho^2              (1)
           + lambda_p mean_b |unet(z^p_t, t; x under the class word) - target|^2
           + lambda_c mean_b calibration of the attention maps                 (objectives.calibration)
    x   <- x - lr adam(grad L(x))                  lr: one rate for every part of x                (2)
    i   <- p i + (1 - p) e(x),  i C^-1 likewise,   p = 0.99                                        (3)

The second line is DreamBooth's prior preservation (arXiv 2208.12242), for methods that ask for it: `z^p` are pictures
that the model itself drew of the class. The soft path reads the template with `v*` in the placeholder's place and has
the edits on, the hard path reads it with the nearest word (arXiv 2307.06925, section 4). Batch size, views, momentum,
rates and `lambda_n` are ours. Methods with one path leave the hard one out; text that does not change while tuning is
read once, before it. Where a reader predicts `v*` for every sample (`encoder.reading`), its encoder is among the
variables, and the penalty is on what the prediction adds to the embeddings. In (3) `i` is the direction of a gate
(`models.edits`) and `e` the text state where the template holds the concept, so the gate stays with the concept as that
moves.

Most of a step's gradient is noise. A method may leave out timesteps at both ends (ours): where noise is low the picture
is known already, and where it is high it cannot be told yet, so that little is learnt there of a concept.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from datencoder_jax.base import Base, concept_state
from datencoder_jax.compilation import Program, put_on_device
from datencoder_jax.diffusion.schedule import add_noise, alphas_cumprod, stratified_timesteps, target
from datencoder_jax.errors import UserError
from datencoder_jax.methods.focus import differences, weights
from datencoder_jax.models.attention import Maps
from datencoder_jax.models.batches import map_in_batches, pictures_at_once
from datencoder_jax.objectives.calibration import calibration_loss
from datencoder_jax.objectives.contrastive import nearest_words
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.objectives.norm import norm_penalty
from datencoder_jax.pipeline import map_layers
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import Condition, Gate, Variables

_FUSED = 25
"""Steps that are one program at most; a person waits for it without a word."""

_KEPT = 0.99
"""`p` of equation (3); Perfusion's."""


@dataclass(frozen=True)
class TuningConfig:
    """What shapes the program; static.

    Attributes:
        draws: samples of `(view, t, noise)` per step.
        views: crops encoded in advance.
        crop: smallest side of a crop, as a share of the picture's.
        flip: whether a view may be mirrored.
        norm_weight: `lambda_n`.
        momentum: Adam's first decay; `momentum_for` has the one for a number of steps.
        remat: compute the UNet's inner states again for the gradient instead of keeping them, for a fraction of the
            memory at a third more work.
        scan_layers: run the UNet's repeated transformer blocks as a loop over a copy of their weights, which compiles
            several times faster.
    """

    draws: int = 8
    views: int = 16
    crop: float = 0.9
    flip: bool = True
    norm_weight: float = 1e-3
    momentum: float = 0.9
    remat: bool = False
    scan_layers: bool = False


class Prior(NamedTuple):
    """Prior preservation.

    Attributes:
        latents: `z^p`, `[pictures, h, w, c]`.
        prompt: the template read with the class word.
        weight: `lambda_p`, scalar.
    """

    latents: jax.Array
    prompt: Condition
    weight: jax.Array


class Problem(NamedTuple):
    """Everything a step reads and does not change.

    Attributes:
        base: the frozen model.
        latents: the views, `[views, h, w, c]`.
        soft_ids: the template with the placeholder, `[1, L]`.
        hard: the template read with the nearest word; None for the soft path alone.
        blend: weight of the soft path, scalar.
        rates: learning rates, one for each of the variables' arrays, or for a part of them as a whole.
        key: of all draws.
        soft: the template read with the embeddings, where these are not tuned; `soft_ids` then does not matter.
        prior: what the model is to go on drawing.
        metric: `C^-1` `[width, width]` of equation (3), where the variables have a gate.
        calibration: `lambda_c`, scalar, where the embeddings are a modifier and a class word for each concept.
        focus: what squared errors are weighted with, `[views, h, w]` (`methods.focus`); None for 1.
        levels: the lowest and highest `t`, as shares of the schedule, `[2]`; None for all of it.
    """

    base: Base
    latents: jax.Array
    soft_ids: jax.Array
    hard: Condition | None
    blend: jax.Array
    rates: Any
    key: jax.Array
    soft: Condition | None = None
    prior: Prior | None = None
    metric: jax.Array | None = None
    calibration: jax.Array | None = None
    focus: jax.Array | None = None
    levels: jax.Array | None = None


class TuneState(NamedTuple):
    """The scan's carry."""

    step: jax.Array
    variables: Variables
    optimiser: optax.OptState


def views_of(images: jax.Array, key: jax.Array, config: TuningConfig) -> jax.Array:
    """Random crops (resized back) and flips of pictures `[k, H, W, c]` in turn: `[views, H, W, c]`.

    The first view of each picture is the picture itself, so that a single view is no augmentation at all.
    """
    count, side = config.views, images.shape[1]
    crop_key, place_key, flip_key = jax.random.split(key, 3)
    plain = jnp.arange(count) < len(images)
    share = jnp.where(plain, 1.0, jax.random.uniform(crop_key, (count,), minval=config.crop, maxval=1.0))
    corner = jax.random.uniform(place_key, (count, 2)) * (1.0 - share)[:, None] * side
    flip = config.flip & ~plain & jax.random.bernoulli(flip_key, 0.5, (count,))

    def view(index, share, corner, flip):
        image = images[index % len(images)]
        scale = jnp.broadcast_to(1.0 / share, (2,))
        cropped = jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, "linear", antialias=False
        )
        return jnp.where(flip, cropped[:, ::-1], cropped)

    return jax.vmap(view)(jnp.arange(count), share, corner, flip)


def momentum_for(steps: int) -> float:
    """What Adam remembers of the gradients before: a fifth of all steps at most, and ten at most (ours).

    With 0.9 throughout, the first of a dozen gradients weighs a third of the last one in the last step.
    """
    return min(0.9, max(0.0, 1.0 - 5.0 / max(steps, 1)))


def _adam(momentum: float = 0.9) -> optax.GradientTransformation:
    """Without its rate; a state of it is the same for every momentum."""
    return optax.scale_by_adam(b1=momentum, b2=0.99)


def _start(variables: Variables) -> TuneState:
    own = jax.tree.map(jnp.copy, variables)
    return TuneState(jnp.int32(0), own, _adam().init(cast(Any, own)))


start = Program("initial state", _start)
"""`start(variables) -> TuneState`: the state before the first step, with its own arrays, which `tune` takes over."""


def tune_loss(variables: Variables, problem: Problem, draw_key: jax.Array, config: TuningConfig) -> jax.Array:
    """Equation (1), a scalar."""
    base, count = problem.base, config.draws
    own_key, prior_key = (draw_key, draw_key) if problem.prior is None else jax.random.split(draw_key)
    draw = functools.partial(_draw, base, count=count, levels=problem.levels)
    drawn = draw(problem.latents, own_key, focus=problem.focus)
    vectors = base.vectors(variables, drawn.noisy, drawn.t)
    soft, hard = problem.soft or base.condition(problem.soft_ids, vectors), problem.hard
    each = jnp.full(count, 1.0 / count)
    if problem.prior is not None:
        everywhere = None if problem.focus is None else jnp.ones(problem.prior.latents.shape[:3])
        drawn = _joined(drawn, draw(problem.prior.latents, prior_key, focus=everywhere))
        plain, soft, hard = (x and _repeated(x, count) for x in (problem.prior.prompt, soft, hard))
        soft, hard = _joined(soft, plain), hard and _joined(hard, plain)
        each = jnp.concatenate([each, each * problem.prior.weight])
    maps: Maps | None = None
    if problem.calibration is not None:
        maps = dict.fromkeys(map_layers(base.unet, drawn.noisy.shape[1]))
    prediction = base.denoise(
        drawn.noisy,
        drawn.t,
        soft,
        hard=hard,
        offsets=base.edits(variables, soft),
        blend=problem.blend,
        remat=config.remat,
        scan_layers=config.scan_layers,
        maps=maps,
    )
    error = (each * denoising_loss(prediction, drawn.target, where=drawn.focus)).sum()
    free = vectors if variables.reader is None else vectors - variables.embeddings[None]
    penalty = norm_penalty(free, base.word_norm)
    loss = error + config.norm_weight * penalty.mean()
    if problem.calibration is None or maps is None:
        return loss
    return loss + problem.calibration * _calibration(maps, soft.slots, len(variables.embeddings) // 2, count)


def _calibration(maps: Maps, slots: jax.Array | None, concepts: int, count: int) -> jax.Array:
    """The mean over the concept's own samples, the first `count`, a scalar."""
    assert slots is not None
    found = jnp.stack([each[:count] for each in maps.values() if each is not None])
    mean = found.mean(axis=0)
    side, slots = math.isqrt(mean.shape[1]), jnp.broadcast_to(slots[:count], (count, slots.shape[1]))
    return calibration_loss(mean.reshape(count, side, side, -1), slots, concepts).mean()


class _Drawn(NamedTuple):
    """What a step denoises."""

    noisy: jax.Array
    t: jax.Array
    target: jax.Array
    focus: jax.Array | None


def _draw(
    base: Base, latents: jax.Array, key: jax.Array, *, count: int, levels: jax.Array | None, focus: jax.Array | None
) -> _Drawn:
    """`count` of the latents `[n, h, w, c]`, noised between `levels [2]`, with their weights of `focus [n, h, w]`."""
    view_key, t_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.randint(view_key, (count,), 0, len(latents))
    latents, focus = latents[chosen], None if focus is None else focus[chosen]
    t = stratified_timesteps(t_key, count, base.schedule.num_train_timesteps, levels)
    noise = jax.random.normal(noise_key, latents.shape)
    alpha_bar = jnp.asarray(alphas_cumprod(base.schedule))[t]
    wanted = target(latents, noise, alpha_bar, base.schedule.prediction_type)
    return _Drawn(add_noise(latents, noise, alpha_bar), t, wanted, focus)


def _repeated(condition: Condition, count: int) -> Condition:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), condition)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def tune_step(problem: Problem, state: TuneState, config: TuningConfig) -> tuple[TuneState, jax.Array]:
    """One optimiser step (2); returns the new state and the loss before it."""
    draw_key = jax.random.fold_in(problem.key, state.step)
    loss, grads = jax.value_and_grad(tune_loss)(state.variables, problem, draw_key, config)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer
        updates, optimiser = _adam(config.momentum).update(grads, state.optimiser, cast(Any, state.variables))

    def moved(rate: jax.Array, part: Any, update: Any) -> Any:
        return jax.tree.map(lambda x, u: x - rate * u, part, update)

    variables = jax.tree.map(moved, problem.rates, state.variables, updates)
    if variables.gate is not None:
        variables = variables._replace(gate=_followed(variables.gate, variables.embeddings, problem))
    return TuneState(state.step + 1, variables, optimiser), loss


def _followed(gate: Gate, embeddings: jax.Array, problem: Problem) -> Gate:
    """Equation (3) for one concept; bias and temperature stay."""
    assert problem.metric is not None, "a gate needs the metric of text states"
    now = concept_state(problem.soft or problem.base.condition(problem.soft_ids, embeddings))
    with exact_products():
        dual = now @ problem.metric
    return gate._replace(
        direction=_KEPT * gate.direction + (1 - _KEPT) * now, dual=_KEPT * gate.dual + (1 - _KEPT) * dual
    )


def encode_views(base: Base, images: jax.Array, key: jax.Array, config: TuningConfig) -> jax.Array:
    """Scaled latents of the views of pictures `[k, H, W, 3]`: `[views, h, w, c]` float32."""
    vae = base.vae.bind()
    views = views_of(images, key, config)
    return map_in_batches(vae.to_latents, views, pictures_at_once(*views.shape[1:3]))


def _tune(state: TuneState, problem: Problem, *, steps: int, config: TuningConfig) -> tuple[TuneState, jax.Array]:
    return jax.lax.scan(lambda carry, _: tune_step(problem, carry, config), state, length=steps)


tune = Program("tuning", _tune, static_argnames=("steps", "config"), donate_argnames=("state",))
"""`tune(state, problem, steps=12, config=...) -> (state, losses [steps])`: one program; the state is donated."""


read_prompt = Program("text encoding", Base.condition)
"""`read_prompt(base, ids [1, L], embeddings) -> Condition`."""


def run(
    state: TuneState, problem: Problem, *, steps: int, config: TuningConfig, quiet: bool = False
) -> tuple[TuneState, np.ndarray]:
    """As `tune`, for any number of steps: many are run as several calls of one program, with a progress bar.

    Raises:
        UserError: a loss or, at the end, a variable is not finite; told as soon as a call has returned.
    """
    at_once = next(count for count in range(min(steps, _FUSED), 0, -1) if steps % count == 0)
    losses, problem = [], put_on_device(problem)  # once, where the model is kept in the machine's memory
    for _ in tqdm(
        range(steps // at_once), desc="tuning", unit_scale=at_once, unit="step", disable=quiet or at_once == steps
    ):
        state, more = tune(state, problem, steps=at_once, config=config, quiet=quiet)
        losses.extend(np.asarray(more))
        if not finite(more):
            raise _diverged(int(np.argmin(np.isfinite(losses))), steps)
    if not finite(state.variables):
        raise _diverged(steps, steps)
    return state, np.array(losses)


def finite(tree: Any) -> bool:
    """Whether all numbers of a pytree are, which are fetched for it."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


def _diverged(done: int, steps: int) -> UserError:
    """What is said where the loss, or the variables, are not finite after so many steps."""
    if not done:
        return UserError("the first step's loss is not finite (NaN or infinity); load the model with --dtype f32")
    return UserError(f"tuning diverged at step {done} of {steps} (no longer finite); lower the learning rates")


def focus_views(
    base: Base,
    latents: jax.Array,
    word: Condition,
    empty: Condition,
    noise_key: jax.Array,
    view_key: jax.Array,
    floor: jax.Array,
    *,
    pictures: int,
    config: TuningConfig,
) -> jax.Array:
    """Where the concept is in every view (`methods.focus`): `[views, h, w]`, of mean 1 over each.

    Args:
        latents: what `encode_views` gave for `view_key`, of which the first are those of the `pictures` themselves.
        word, empty: the template read with the concept's nearest word, and the empty prompt.
        floor: `f`.
    """
    found = differences(base, latents[:pictures], word, empty, noise_key)
    return weights(_views_of_maps(found, base.vae.config.factor, view_key, config), floor)


def _views_of_maps(maps: jax.Array, factor: int, key: jax.Array, config: TuningConfig) -> jax.Array:
    """The views that `views_of` takes of images, of maps `[k, h, w]` over their latents: `[views, h, w]`.

    Crops are cut out of images of full size, `factor` times the latents', and so they are of maps.
    """
    count, *sides = maps.shape
    large = jax.image.resize(maps, (count, *(side * factor for side in sides)), "linear")
    views = views_of(large[..., None], key, config)[..., 0]
    return jax.image.resize(views, (config.views, *sides), "linear")


focus_views_program = Program("subject mask", focus_views, static_argnames=("pictures", "config"))
"""`focus_views` compiled ahead."""

encode_views_program = Program("VAE encoding", encode_views, static_argnames=("config",))
"""`encode_views` compiled ahead."""


PROGRAMS = (start, tune, encode_views_program, focus_views_program, read_prompt)
"""All that tuning runs."""


def nearest_word_ids(base: Base, embeddings: jax.Array, k: int = 5) -> tuple[jax.Array, jax.Array]:
    """Ids and cosines of the `k` whole words nearest to `[n, d]` embeddings: `[n, k]` each."""
    return nearest_words(embeddings, base.table, base.words, k)
