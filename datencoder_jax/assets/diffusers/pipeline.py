"""A personalized concept in diffusers, drawn along two paths.

    pipe = DiffusionPipeline.from_pretrained("<base>", custom_pipeline="<this folder>", trust_remote_code=True)
    pipe.load_concept("<this folder>/concept.safetensors")
    pipe("a photo of a S* on the beach").images[0]

The soft path reads the prompt with the concept's token vectors in the placeholder's place and has its weight offsets
`dW` on: `A B`, a whole matrix, or `-W Q Q^T` where orthonormal directions `Q` are taken out of `W`. The hard path reads
the prompt with a common word in that place and is the base model as it is. Every attention layer, with weights `W`,
input `h` and contexts `c` (soft) and `c'` (hard; both are `h` in self-attention), blends the two:

    soft = softmax(q k^T / sqrt(d)) v,    q = h (W_q + dW_q),  k = c (W_k + dW_k),  v = c (W_v + dW_v)
    hard = softmax(q' k'^T / sqrt(d)) v', q' = h W_q,          k' = c' W_k,         v' = c' W_v
    out  = alpha soft (W_o + dW_o) + (1 - alpha) hard W_o + b

The negative prompt goes along both paths too, with the same vectors in its placeholders' places, and where the model
takes pooled text (XL) that is blended likewise.
Dual-path adaptation is section 4 of arXiv 2307.06925.
"""

import inspect
import re
import warnings
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from safetensors import safe_open
from torch import nn

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_GUIDANCE = inspect.signature(StableDiffusionPipeline.__call__).parameters["guidance_scale"].default


# The letters of scripts that put no blanks between words, as ranges of a character class: Thai, Lao, Tibetan, Burmese,
# Khmer; Chinese and Japanese; Hangul, whose particles are written on to the word.
_BLANKLESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\uaa60-\uaadf"
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0003ffff"
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
)
_LETTER = rf"[^\W{_BLANKLESS}]"  # of all other scripts


class Concept(NamedTuple):
    """The placeholder, the hard path's word, the weight of the soft path, and token vectors `[n, d]`.

    Several placeholders, and their words, have blanks between, and share the vectors equally. Where there are two text
    encoders, `d` holds the first one's vector and then the second one's.
    """

    token: str
    word: str
    blend: float
    vectors: torch.Tensor

    @property
    def tokens(self):
        """The placeholders."""
        return self.token.split()

    @property
    def placeholder(self):
        """Their pattern in a prompt: where one begins or ends with a letter, no letter may be beside it.

        The letters of scripts without blanks between words, such as Chinese and Thai, are no such letters.
        """

        def one(token):
            before, after = (re.match(_LETTER, edge) for edge in (token[0], token[-1]))
            return f"{f'(?<!{_LETTER})' if before else ''}{re.escape(token)}{f'(?!{_LETTER})' if after else ''}"

        return re.compile("|".join(one(token) for token in sorted(self.tokens, key=len, reverse=True)))

    def in_words(self, prompt):
        """The hard path's prompt; a blank keeps its words apart from letters beside them."""
        words = [self.word] if len(self.tokens) == 1 else self.word.split()
        known = dict(zip(self.tokens, words, strict=True))

        def word(match):
            before, after = prompt[: match.start()][-1:], prompt[match.end() :][:1]
            return known[match[0]].join(" " if re.match(r"\w", letter) else "" for letter in (before, after))

        return self.placeholder.sub(word, prompt)

    def places(self, token):
        """Which of the vectors a placeholder stands for."""
        count = len(self.vectors) // len(self.tokens)
        first = count * self.tokens.index(token)
        return range(first, first + count)


class DualPathAttention(nn.Module):
    """The attention processor of one layer; `offsets` are the factors whose product is `dW`, by projection."""

    def __init__(self, offsets):
        super().__init__()
        self.changed = {name: len(factors) for name, factors in offsets.items()}
        for name, factors in offsets.items():
            for index, factor in enumerate(factors):
                # Buffers follow the model to its device and type; they are no part of its weights.
                self.register_buffer(f"{name.split('.')[0]}_{index}", factor, persistent=False)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, hard=None, blend=1.0):
        h = hidden_states
        soft_context, hard_context = (h, h) if encoder_hidden_states is None else (encoder_hidden_states, hard)
        q, k, v = attn.to_q(h), attn.to_k(soft_context), attn.to_v(soft_context)
        soft = self._attend(
            attn,
            q + self._offset("to_q", h),
            k + self._offset("to_k", soft_context),
            v + self._offset("to_v", soft_context),
        )
        mixed = soft
        if hard is not None:
            if hard_context is not soft_context:
                k, v = attn.to_k(hard_context), attn.to_v(hard_context)
            soft = blend * soft
            mixed = soft + (1 - blend) * self._attend(attn, q, k, v)
        return attn.to_out[1](attn.to_out[0](mixed) + self._offset("to_out.0", soft))

    def _offset(self, name, x):
        if name not in self.changed:
            return 0
        for index in range(self.changed[name]):
            x = x @ getattr(self, f"{name.split('.')[0]}_{index}").to(x.device, x.dtype)
        return x

    @staticmethod
    def _attend(attn, q, k, v):
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _factors(parts, weight):
    """The matrices whose product is the change of the weights `weight [in, out]`; of a wrong shape if `parts` are."""
    if "directions" not in parts:
        return [parts[name] for name in ("down", "up", "weight") if name in parts]
    basis = torch.linalg.qr(parts["directions"].double())[0]
    fits = len(basis) == weight.shape[1]
    return [-weight.double().cpu() @ basis, basis.T] if fits else [basis.T]


class DualPathPipeline(StableDiffusionPipeline):
    """The base model's pipeline with one concept; until one is loaded, the plain pipeline."""

    concept: Concept | None = None

    def load_concept(self, path):
        """Takes the concept in the file `path`, instead of any it has.

        Raises:
            ValueError: the file is no concept file, or the base model is another than it was made for.
        """
        with safe_open(str(path), framework="pt") as file:
            values = dict(file.metadata() or {})
            if values.get("format") != "datencoder-concept":
                raise ValueError(f"{path} is not a concept file.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        vectors = tensors.pop("embeddings")
        width = sum(self._widths)
        if vectors.shape[1] != width:
            raise ValueError(f"{path} was made for token vectors of {vectors.shape[1]}; this model's are of {width}.")
        self.unet.set_attn_processor(self._processors(path, tensors))
        self.concept = Concept(values["token"], values["nearest_word"], float(values["blend"]), vectors)

    def _processors(self, path, tensors):
        """A processor for each attention layer, with all the offsets in `tensors` shared out among them."""
        left, processors = set(tensors), {}
        for name in self.unet.attn_processors:
            owner, offsets = name.removesuffix(".processor"), {}
            layer = self.unet.get_submodule(owner)
            for projection in _PROJECTIONS:
                start = f"offsets.{owner}.{projection}."
                parts = {key.removeprefix(start): tensors[key] for key in left if key.startswith(start)}
                linear = layer.get_submodule(projection)
                factors = _factors(parts, linear.weight.detach().T)
                if not factors:
                    continue
                if (factors[0].shape[0], factors[-1].shape[1]) != (linear.in_features, linear.out_features):
                    raise ValueError(f"{path} was made for another base model: {owner}.{projection} differs in shape.")
                offsets[projection] = [factor.to(linear.weight) for factor in factors]
                left -= {start + part for part in parts}
            processors[name] = DualPathAttention(offsets)
        if left:
            raise ValueError(f"{path} was made for another base model: it changes {min(left)}, which is not there.")
        return processors

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        *,
        negative_prompt=None,
        num_images_per_prompt=1,
        guidance_scale=_GUIDANCE,
        blend=None,
        **options,
    ):
        """As `StableDiffusionPipeline`; every prompt has to contain the concept's token, and the negative one may.

        Args:
            blend: the weight of the soft path from 0 to 1; by default the concept's own.
        """
        options |= {"num_images_per_prompt": num_images_per_prompt, "guidance_scale": guidance_scale}
        concept = self.concept
        if concept is None:
            return super().__call__(prompt, negative_prompt=negative_prompt, **options)
        blend = concept.blend if blend is None else blend
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if guidance_scale <= 1 and any(
            [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or ()
        ):
            warnings.warn("negative_prompt has no effect: at or below 1 guidance_scale is none", stacklevel=2)
        negatives = negative_prompt if isinstance(negative_prompt, list | tuple) else [negative_prompt or ""]
        soft = self._read([self._soft_ids(text, concept) for text in prompts], concept.vectors)
        hard = self._read([self._ids(concept.in_words(text)) for text in prompts])
        negative = self._read([self._soft_ids(text, concept, required=False) for text in negatives], concept.vectors)
        if negative_prompt is None and self.config.get("force_zeros_for_empty_prompt"):
            negative = tuple(torch.zeros_like(x) for x in negative)
        negative = tuple(x.expand(len(prompts), *x.shape[1:]) for x in negative)
        both = [negative, hard] if guidance_scale > 1 else [hard]  # as the plain pipeline joins its halves
        options["cross_attention_kwargs"] = {
            "hard": torch.cat([states.repeat_interleave(num_images_per_prompt, dim=0) for states, *_ in both]),
            "blend": blend,
        }
        options |= {"prompt_embeds": soft[0], "negative_prompt_embeds": negative[0]}
        for soft_pooled, hard_pooled, negative_pooled in zip(soft[1:], hard[1:], negative[1:], strict=True):
            options["pooled_prompt_embeds"] = blend * soft_pooled + (1 - blend) * hard_pooled
            options["negative_pooled_prompt_embeds"] = negative_pooled
        return super().__call__(**options)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _soft_ids(self, prompt, concept, required=True):
        """Token ids; those past the vocabulary stand for the concept's vectors.

        Raises:
            ValueError: a placeholder does not fit with all of its vectors, or one is required and there is none.
        """
        size = self.text_encoder.get_input_embeddings().num_embeddings
        ids, end = [], 0
        for found in concept.placeholder.finditer(prompt):
            ids += [*self._ids(prompt[end : found.start()]), *(size + place for place in concept.places(found[0]))]
            end = found.end()
        ids += self._ids(prompt[end:])
        if required and max(ids, default=0) < size:
            raise ValueError(f"The prompt {prompt!r} does not contain {concept.token!r}.")
        left = set(ids[: self._room])
        for token in concept.tokens:
            places = {size + place for place in concept.places(token)}
            if places & set(ids) and not places <= left:
                raise ValueError(
                    f"The prompt {prompt!r} does not contain {token!r} in full in its first {self._room} tokens; write "
                    "it nearer to the start."
                )
        return ids

    @property
    def _room(self):
        """Tokens of a prompt between the marks of its start and end."""
        return self.text_encoder.config.max_position_embeddings - 2

    @property
    def _towers(self):
        """Tokenizers and text encoders."""
        if not hasattr(self, "text_encoder_2"):
            return [(self.tokenizer, self.text_encoder)]
        return [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]

    @property
    def _widths(self):
        return [tower.get_input_embeddings().embedding_dim for _, tower in self._towers]

    def _read(self, prompts, vectors=None):
        """Text states of prompts given by their ids; with two text encoders, pooled text after them."""
        parts = [None] * len(self._towers) if vectors is None else vectors.split(self._widths, dim=1)
        outputs = [self._encode(*tower, prompts, part) for tower, part in zip(self._towers, parts, strict=True)]
        if len(outputs) == 1:
            return (outputs[0].last_hidden_state.to(self.unet.dtype),)
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return states.to(self.unet.dtype), outputs[1].text_embeds.to(self.unet.dtype)

    def _encode(self, words, tower, prompts, vectors):
        """What a text encoder says of ids, cut or padded to its length."""
        room, device = self._room, self._execution_device
        rows = [[words.bos_token_id, *ids[:room], words.eos_token_id] for ids in prompts]
        ids = torch.tensor([row + [words.pad_token_id] * (room + 2 - len(row)) for row in rows], device=device)
        table = tower.get_input_embeddings()
        past = ids >= table.num_embeddings

        def splice(module, inputs, output):
            if vectors is None:
                return output
            output = output.clone()
            output[past] = vectors.to(output)[ids[past] - table.num_embeddings]
            return output

        hook = table.register_forward_hook(splice)
        try:
            return tower(ids.masked_fill(past, 0), output_hidden_states=True)
        finally:
            hook.remove()
