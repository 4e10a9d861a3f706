"""The frozen networks of a base model as one pytree, and what they compute together.

Stable Diffusion XL has two text towers. With ids `i` and concept vectors `c = [c_1, c_2]`, side by side as in the
table `[E_1, E_2]`, and `h_j` the states before a tower's last layer, its UNet is told

    context = [h_1(i, c_1), h_2(i', c_2)],    pooled = projected_2(i', c_2)                         (1)

where `i'` pads with another token after the end of the text. Dual-path adaptation has a soft and a hard prompt, and the
UNet one place for the pooled text, so it is blended as the attention's outputs are (ours):

    pooled = alpha pooled_soft + (1 - alpha) pooled_hard                                            (2)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.encoder.reading import read_again
from datencoder_jax.errors import UserError
from datencoder_jax.models.attention import Maps
from datencoder_jax.models.clip_text import TOKEN_TABLE
from datencoder_jax.models.edits import Ready, paired, ready
from datencoder_jax.models.module import Model
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import Added, Condition, Variables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Base:
    """The frozen networks and constants that compiled programs take as one argument.

    Attributes:
        unet, vae, text: Stable Diffusion's parts.
        vision: the CLIP vision tower; None where the model has none (then there is no tuning-encoder either).
        words: bool `[vocabulary]`, what may be a concept's nearest word: whole words with an embedding other than zero.
        word_norm: mean length of those words' embeddings, scalar; infinite where there are none.
        pixel_mean, pixel_std: `[3]`, of the vision tower's input in [0, 1].
        schedule: the noise schedule (static).
        text_2: the second text tower of XL.
        end_token, second_pad: what ends every prompt, and what pads the second tower's after it (static).
        zero_empty: no negative prompt is zeros instead of the empty prompt (static).
    """

    unet: Model
    vae: Model
    text: Model
    vision: Model | None
    words: jax.Array
    word_norm: jax.Array
    pixel_mean: jax.Array
    pixel_std: jax.Array
    schedule: ScheduleConfig = field(metadata={"static": True})
    text_2: Model | None = None
    end_token: int = field(default=0, metadata={"static": True})
    second_pad: int = field(default=0, metadata={"static": True})
    zero_empty: bool = field(default=False, metadata={"static": True})

    @property
    def table(self) -> jax.Array:
        """The text towers' token embeddings, side by side `[vocabulary, d]`."""
        return jnp.concatenate([tower.params[TOKEN_TABLE] for tower in self._towers], axis=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """How the columns of `table` divide among the text towers."""
        return tuple(tower.config.hidden_size for tower in self._towers)

    @property
    def _towers(self) -> list[Model]:
        return [self.text] if self.text_2 is None else [self.text, self.text_2]

    def condition(self, ids: jax.Array, concept: jax.Array | None = None) -> Condition:
        """What the UNet is told of prompts; equation (1).

        Args:
            ids: `[batch, l]`; those past the vocabulary select rows of `concept`.
            concept: vectors `[n, d]`, or `[batch, n, d]`, one set per sample, each of which reads a single prompt too.
        """
        if concept is not None and concept.ndim == 3:
            ids = jnp.broadcast_to(ids, (len(concept), ids.shape[1]))
        slots = ids - self.text.config.vocab_size
        if self.text_2 is None:
            return Condition(self.text(ids, concept).last_hidden, slots=slots)
        parts = (None, None) if concept is None else jnp.split(concept, [self.widths[0]], axis=-1)
        end = (ids == self.end_token).astype(jnp.int32)
        padding = jnp.cumsum(end, axis=1) - end > 0  # an end before it
        first = self.text(ids, parts[0])
        second = self.text_2(jnp.where(padding, self.second_pad, ids), parts[1])
        return Condition(jnp.concatenate([first.penultimate, second.penultimate], axis=-1), second.projected, slots)

    def edits(self, variables: Variables | None, soft: Condition) -> dict[str, Ready] | None:
        """A concept's edits as `denoise` takes them, for prompts that have been read."""
        if variables is None:
            return None
        return ready(variables.offsets, self.unet.params, gate=variables.gate, slots=soft.slots)

    def vectors(self, variables: Variables, latents: jax.Array, t: jax.Array) -> jax.Array:
        """A concept's vectors for noisy latents `[batch, h, w, c]` at `t`.

        They are `[n, d]`, whatever the latents; where a reader predicts them, one set per latent, `[batch, n, d]`.
        """
        reader = variables.reader
        if reader is None:
            return variables.embeddings
        pooled = reader.pooled
        if pooled is not None:
            pooled = jnp.broadcast_to(pooled, (len(latents), *pooled.shape[1:]))
        return read_again(reader, variables.embeddings, self.unet, latents, t, self.added(latents, pooled))

    def denoise(
        self,
        latents: jax.Array,
        t: jax.Array,
        soft: Condition,
        *,
        hard: Condition | None = None,
        keys: Condition | None = None,
        offsets: Mapping[str, Ready] | None = None,
        blend: jax.Array | float = 1.0,
        remat: bool = False,
        scan_layers: bool = False,
        maps: Maps | None = None,
    ) -> jax.Array:
        """The UNet's prediction for noisy latents `[batch, h, w, c]` under a soft prompt, blended with a hard one.

        Where there are residuals, the model without them runs beside it in the same batch (`models.attention`, equation
        (5)), and what it predicts is left out.

        Args: as the UNet's; conditions are of the whole batch, or of one row, which is every sample's. `keys` is what
            keys are of in `soft`'s place.
        """
        streams = paired(offsets)
        if streams is not None:
            latents, t, soft, hard, keys = _twice((latents, jnp.broadcast_to(t, len(latents)), soft, hard, keys))
            blend = jnp.concatenate([blend, blend]) if jnp.ndim(blend) else blend
        prediction = self.unet(
            latents,
            t,
            soft.context,
            added=self.added(latents, _blended(soft.pooled, hard and hard.pooled, blend)),
            offsets=offsets if streams is None else streams,
            hard_context=None if hard is None else hard.context,
            key_context=None if keys is None else keys.context,
            pair=streams is not None,
            blend=blend,
            remat=remat,
            scan_layers=scan_layers,
            maps=maps,
        )
        return prediction if streams is None else jnp.split(prediction, 2)[1]

    def added(self, latents: jax.Array, pooled: jax.Array | None) -> Added | None:
        """What XL's UNet is told beside the context: pooled text and the size of uncropped pictures."""
        if pooled is None:
            return None
        height, width = (side * self.vae.config.factor for side in latents.shape[1:3])
        sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
        pooled = jnp.broadcast_to(pooled, (len(latents), pooled.shape[-1]))
        return Added(pooled, jnp.broadcast_to(sizes, (len(latents), len(sizes))))

    def require_words(self, purpose: str) -> None:
        """Raises `UserError` where the vocabulary has no whole words; `purpose` says what needs them."""
        if not np.asarray(self.words).any():
            raise UserError(
                f"{purpose} needs whole words, and this model's tokenizer has none of three letters from a to z or more"
            )

    def only(self, *names: str) -> "Base":
        """The same without the parameters of all networks but the named, which are then no argument of a program."""
        networks = ("unet", "vae", "text", "text_2", "vision")
        emptied = {n: getattr(self, n) for n in networks if n not in names and getattr(self, n) is not None}
        return replace(self, **{name: model.with_params({}) for name, model in emptied.items()})

    @property
    def eyes(self) -> Model:
        """The vision tower; a `UserError` where the model has none."""
        if self.vision is None:
            raise UserError(
                "this base model has no vision tower (image_encoder), which the tuning-encoder looks through"
            )
        return self.vision

    def vision_input(self, images: jax.Array) -> jax.Array:
        """Pictures `[batch, H, W, 3]` in [-1, 1] -> the vision tower's normalized input at its own resolution.

        They are resized as `data.reading.resample` does it, which pretraining and CLIP's own preparation take: Pillow's
        bicubic filter in 8 bits, along rows and then along columns.
        """
        side = self.eyes.config.image_size
        for shape in ((*images.shape[:2], side, 3), (len(images), side, side, 3)):
            if images.shape != shape:
                images = _in_8_bits(jax.image.resize(images, shape, "cubic", antialias=True))
        scale, shift = (x.reshape(1, 1, 1, 3) for x in (self.pixel_std, self.pixel_mean))
        return (0.5 * images + 0.5 - shift) / scale


def _in_8_bits(images: jax.Array) -> jax.Array:
    """Values in [-1, 1] as they are once they have been pixels of 8 bits."""
    return jnp.round(jnp.clip((images + 1.0) * 127.5, 0.0, 255.0)) / 127.5 - 1.0


def concept_state(prompt: Condition) -> jax.Array:
    """The text state where a prompt holds the concept, the mean where it does so twice, `[1, d]` float32."""
    assert prompt.slots is not None
    here = (prompt.slots >= 0).astype(jnp.float32)
    with exact_products():
        return jnp.einsum("bl,bld->d", here, prompt.context.astype(jnp.float32))[None] / here.sum()


def _twice(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


def _blended(soft: jax.Array | None, hard: jax.Array | None, blend: jax.Array | float) -> jax.Array | None:
    """Equation (2), with one blend or one per sample."""
    if soft is None or hard is None:
        return soft
    weight = jnp.asarray(blend, soft.dtype).reshape(-1, 1)
    return weight * soft + (1 - weight) * hard
