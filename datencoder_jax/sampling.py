"""Prompts to pictures, one program: text, denoising with guidance along both paths, decoding.

At every step the UNet runs once on a batch of two halves, the negative prompt and the prompt, and

    prediction = u + g (c - u)                                                                     (1)

with guidance scale `g`. Without guidance it runs on the prompts alone. With a concept both halves have the offsets on
and are blended with the hard path; the hard path of the negative half reads the negative prompt too, with the same
vectors in its placeholders' places. Without a negative prompt XL's `u` is that of zeros, as it was trained.

Of a concept with a reader (`encoder.reading`) the prompts, though not the negative one, are read anew at every step,
with the vectors that the reader predicts for the latents of that step.

Numbers that overflow, in half precision or under an absurd weight of a LoRA, end as pictures like any others, so
whether a picture was finite comes with it.

`generate` is one program. `draw_in_parts` runs the same functions as three, each with the networks it needs alone, so
that networks held by the host are on the device one after the other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from datencoder_jax.base import Base
from datencoder_jax.compilation import Program
from datencoder_jax.diffusion.guidance import guided
from datencoder_jax.diffusion.samplers import Plan, sample
from datencoder_jax.models.batches import map_in_batches, pictures_at_once
from datencoder_jax.typing import Condition, Variables


class Request(NamedTuple):
    """What to draw, one row per picture.

    Attributes:
        soft_ids, hard_ids: prompts with the placeholder and with the nearest word, `[batch, L]`; `hard_ids` is None
            for the soft path alone.
        negative_ids: `[1, L]`; None for zeros. Without guidance nothing reads it.
        noise: `[batch, h, w, c]`, standard normal.
        guidance: `g`, scalar; None for no guidance.
        blend: weight of the soft path, scalar.
        keys: of the noise that some samplers add at every step, `[batch]`; None for the others.
        class_ids: prompts with the class word, which the attention's keys are of, `[batch, L]`; None for those of
            `soft_ids`.
    """

    soft_ids: jax.Array
    hard_ids: jax.Array | None
    negative_ids: jax.Array | None
    noise: jax.Array
    guidance: jax.Array | None
    blend: jax.Array
    keys: jax.Array | None = None
    class_ids: jax.Array | None = None


class Read(NamedTuple):
    """The prompts of a request for the UNet: with guidance both halves of (1), the negative one first."""

    soft: Condition
    hard: Condition | None
    keys: Condition | None = None


class Drawn(NamedTuple):
    """Pictures, one row each.

    Attributes:
        pictures: uint8 `[batch, H, W, 3]`.
        finite: bool `[batch]`, whether the picture's latents and pixels were; where not, the picture means nothing.
    """

    pictures: jax.Array
    finite: jax.Array


def _generate(base: Base, plan: Plan, request: Request, variables: Variables | None) -> Drawn:
    return decode_checked(base, sample_latents(base, plan, request, variables))


def sample_latents(base: Base, plan: Plan, request: Request, variables: Variables | None) -> jax.Array:
    """Scaled clean latents `[batch, h, w, c]` of a request; `variables` are the concept's, None for none."""
    return denoise(base, plan, request, read(base, request, _embeddings(variables)), variables)


def _embeddings(variables: Variables | None) -> jax.Array | None:
    return None if variables is None else variables.embeddings


def read(base: Base, request: Request, embeddings: jax.Array | None) -> Read:
    """The request's prompts, with a concept's vectors `[n, d]` or one set per row."""
    negative = None
    if request.guidance is not None and request.negative_ids is not None:
        negative = base.condition(request.negative_ids, embeddings)

    def both(positive: Condition) -> Condition:
        if request.guidance is None:
            return positive
        source = _nothing(positive) if negative is None else negative
        return jax.tree.map(lambda u, c: jnp.concatenate([jnp.broadcast_to(u, c.shape), c]), source, positive)

    soft = both(base.condition(request.soft_ids, embeddings))
    others = (None if ids is None else both(base.condition(ids)) for ids in (request.hard_ids, request.class_ids))
    return Read(soft, *others)


def _nothing(positive: Condition) -> Condition:
    """Zeros in a prompt's place, in which no concept stands."""
    zeros = jax.tree.map(jnp.zeros_like, positive)
    return zeros if zeros.slots is None else zeros._replace(slots=zeros.slots - 1)


def _read_again(base: Base, request: Request, soft: Condition, vectors: jax.Array) -> Condition:
    """`Read.soft` with other vectors for the prompts, `[batch, n, d]`; the negative half stays."""
    positive = base.condition(request.soft_ids, vectors)
    if request.guidance is None:
        return positive
    return jax.tree.map(lambda both, c: jnp.concatenate([both[: len(c)], c]), soft, positive)


def denoise(base: Base, plan: Plan, request: Request, prompts: Read, variables: Variables | None) -> jax.Array:
    """As `sample_latents`, from prompts that have been read."""
    edits = base.edits(variables, prompts.soft)

    def predict(latents, t):
        soft = prompts.soft
        if variables is not None and variables.reader is not None:
            soft = _read_again(base, request, soft, base.vectors(variables, latents, t))
        rows = latents if request.guidance is None else jnp.concatenate([latents, latents])
        rows = base.denoise(rows, t, soft, hard=prompts.hard, keys=prompts.keys, offsets=edits, blend=request.blend)
        if request.guidance is None:
            return rows
        unconditional, conditional = jnp.split(rows, 2)
        return guided(unconditional, conditional, request.guidance)

    return sample(plan, predict, request.noise, request.keys)


def decode(base: Base, latents: jax.Array) -> jax.Array:
    """Latents `[batch, h, w, c]` -> uint8 pictures `[batch, H, W, 3]`, a few at a time."""
    return decode_checked(base, latents).pictures


def decode_checked(base: Base, latents: jax.Array) -> Drawn:
    """As `decode`, and whether latents and pixels were finite."""
    vae = base.vae.bind()
    height, width = (side * base.vae.config.factor for side in latents.shape[1:3])

    def pictures(z):
        pixels = vae.to_images(z)
        finite = jnp.isfinite(z).all(axis=(1, 2, 3)) & jnp.isfinite(pixels).all(axis=(1, 2, 3))
        return Drawn(jnp.round((pixels + 1.0) * 127.5).astype(jnp.uint8), finite)

    return map_in_batches(pictures, latents, pictures_at_once(height, width))


def _denoising(variables: Variables | None) -> tuple[str, ...]:
    """The networks that `denoise` runs."""
    return ("unet",) if variables is None or variables.reader is None else ("unet", "text", "text_2")


generate = Program("sampling", _generate)
"""`generate(base, plan, request, variables) -> Drawn`, compiled per batch size and sampler length."""

_read = Program("text encoding", read)
_denoise = Program("sampling", denoise)
_decode = Program("VAE decoding", decode_checked)


def draw_in_parts(
    base: Base, plan: Plan, request: Request, variables: Variables | None, *, quiet: bool = False
) -> Drawn:
    """What `generate` returns, as three programs."""
    prompts = _read(base.only("text", "text_2"), request, _embeddings(variables), quiet=quiet)
    latents = _denoise(base.only(*_denoising(variables)), plan, request, prompts, variables, quiet=quiet)
    return _decode(base.only("vae"), latents, quiet=quiet)


_latents = Program("sampling", sample_latents)


def draw_latents(
    base: Base,
    plan: Plan,
    request: Request,
    variables: Variables | None,
    *,
    in_parts: bool = False,
    quiet: bool = False,
) -> jax.Array:
    """What `sample_latents` returns, as one program or as two with the networks that each needs."""
    if not in_parts:
        return _latents(base, plan, request, variables, quiet=quiet)
    prompts = _read(base.only("text", "text_2"), request, _embeddings(variables), quiet=quiet)
    return _denoise(base.only(*_denoising(variables)), plan, request, prompts, variables, quiet=quiet)


LATENTS = (_latents, _read, _denoise)
"""The programs of `draw_latents`."""

IN_PARTS = (_read, _denoise, _decode)
"""The programs of `draw_in_parts`."""
