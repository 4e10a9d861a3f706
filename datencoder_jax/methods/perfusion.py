"""Perfusion (Tewel et al. 2023, arXiv 2305.01644): one gated rank-1 edit of every key and value of cross-attention.

The matrices `W` that text states `e` go through are memories, and the concept is one entry in each: at the state `i*`
they are to give `o*`. With the metric `C^-1` of text states (`text_metric`), for every state of a prompt,

    sim = e C^-1 i*',  E = i* C^-1 i*',  g = sigmoid((sim / E - beta) / tau)                        (1)
    h   = (e - i* sim / E) W + g o*                                                                 (2)

(`models.edits`, equation (4), which has several concepts too). With `w` the state of the class word in the template,

    i* = w at the start, then the moving average of the concept's state   (`tuning`, equation (3))  (3)
    o*_K = w W_K, locked,    o*_V = w W_V at the start, tuned with the concept's vector             (4)

Keys say where, values say what, so locked keys leave the layout to the class. The option `lock` is

    local    equation (4)
    global   tuned like "local"; when drawing, keys are those of the prompt with the class word in the concept's place,
             position by position, and the file has no keys
    off      o*_K is tuned like o*_V, for comparison

beta and tau are .75 and .1 while tuning (options), and .7 and .15 (.5 for global locking, where the paper has .4 to .6)
in the concept's file; `generate` may change them. `g = 0` is not the base model: (2) then takes `i*` out of what it
reads. The rates are the paper's; the steps are those of a public re-implementation. The paper weighs the loss by a mask
of the object from a segmentation model; the option `focus` (`methods.focus`) has one of the model's own, and is off.
Equation (3) at one template, and "global" as keys without any edit, are our reading.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from datencoder_jax.base import Base, concept_state
from datencoder_jax.compilation import Program
from datencoder_jax.errors import UserError
from datencoder_jax.methods.method import Method, Setup, embeddings_of
from datencoder_jax.methods.text_metric import PROGRAMS as _METRIC
from datencoder_jax.methods.text_metric import text_metric
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.prompts import TEMPLATE
from datencoder_jax.runtime.precision import exact_products
from datencoder_jax.typing import Gate, Gated, LearningRates, Variables

_KEY, _VALUE = ".attn2.to_k", ".attn2.to_v"
_DRAWING = {"local": (0.7, 0.15), "global": (0.5, 0.15), "off": (0.7, 0.15)}
"""beta and tau of a concept's file."""
_DEFAULTS = {"lock": ("local", "global", "off"), "beta": 0.75, "tau": 0.1}


def _read(base: Base, ids: jax.Array, word: jax.Array, weights: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
    state = concept_state(base.condition(ids, word))
    with exact_products():
        return state, {path: Gated(state @ weight.astype(jnp.float32)) for path, weight in weights.items()}


_class_word = Program("class word", _read)

PROGRAMS = (_class_word, *_METRIC)
"""The programs of `start`."""


def start(setup: Setup, beta: float = 0.75, tau: float = 0.1) -> Variables:
    """The class word: its vector, its state and what keys and values of that are."""
    pipeline = setup.pipeline
    if setup.class_tokens > 1:
        raise UserError(
            f"perfusion edits at a class word of one token, and this one is {setup.class_tokens}; name a wider class, "
            "such as dog"
        )
    word = embeddings_of(pipeline.base, setup.word_ids[-1:])
    ids = jnp.asarray(pipeline.tokenizer.encode([TEMPLATE.format("S*")], {"S*": 1}))
    weights = _weights(pipeline.base)
    state, outputs = _class_word(pipeline.base.only("text", "text_2"), ids, word, weights, quiet=setup.quiet)
    metric = jnp.asarray(text_metric(pipeline, quiet=setup.quiet))
    with exact_products():
        dual = state @ metric
    return Variables(word, outputs, Gate(state, dual, jnp.array([beta]), jnp.array([tau])))


def _weights(base: Base) -> dict[str, jax.Array]:
    """The edited projections by path."""
    paths = [path for path in attention_shapes(base.unet) if path.endswith((_KEY, _VALUE))]
    return {path: base.unet.params[f"{path}.weight"] for path in paths}


def rates_of(variables: Variables, rates: LearningRates, class_tokens: int = 1, lock: str = "local") -> Variables:
    """Keys are locked, unless they are not to be; the gate is not tuned."""
    offsets = {path: 0.0 if path.endswith(_KEY) and lock != "off" else rates.offsets for path in variables.offsets}
    return Variables(rates.embeddings, offsets, 0.0)  # type: ignore[arg-type]


def finish(variables: Variables, lock: str = "local") -> Variables:
    """With the gate for drawing, and without keys where they are the class word's."""
    gate, (beta, tau) = variables.gate, _DRAWING[lock]
    assert gate is not None
    offsets = {path: edit for path, edit in variables.offsets.items() if lock != "global" or path.endswith(_VALUE)}
    bias, temperature = (jnp.full_like(gate.bias, value) for value in (beta, tau))
    return variables._replace(offsets=offsets, gate=gate._replace(bias=bias, temperature=temperature))


def _variant(lock: str, beta: float, tau: float) -> Method:
    if tau <= 0.0:
        raise UserError(f"option tau of perfusion is {tau:g}, not a number above 0")
    return Method(
        400,
        LearningRates(embeddings=6e-3, offsets=3e-2),
        functools.partial(start, beta=beta, tau=tau),
        word="thing",
        rates_of=functools.partial(rates_of, lock=lock),
        finish=functools.partial(finish, lock=lock),
        norm_weight=0.0,
        metric=text_metric,
        exports=("embedding", "card"),
        defaults=_DEFAULTS,
        variant=_variant,
    )


METHOD = _variant("local", 0.75, 0.1)
"""Under its defaults."""
