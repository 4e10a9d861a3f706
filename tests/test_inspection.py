"""What is read from a compiled program's text is what the program does; by compilers of several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from datencoder_jax.models.layers import conv3x3
from datencoder_jax.objectives.contrastive import nearest_words
from datencoder_jax.plan import inspection

X = jnp.ones((8, 8))


def text_of(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile().as_text()


def test_calls_of_the_host_are_found():
    def call(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    assert inspection.host_callbacks(text_of(call, X))
    assert not inspection.host_callbacks(text_of(jnp.sin, X))


def test_arguments_that_results_replace_are_counted():
    assert inspection.aliased_outputs(text_of(lambda x, y: (x + 1, y * 2), X, X, donate_argnums=(0, 1))) == 2
    assert inspection.aliased_outputs(text_of(lambda x: x + 1, X)) == 0


def test_products_are_found_with_their_place_and_their_number():
    layer = conv3x3(4, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def thrice(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: layer(x), x)

    (place,) = (inspection.float32_products(text_of(thrice, jnp.ones((1, 6, 6, 4))))).items()
    assert place[0].startswith("models/layers.py") and place[1] == 3
    assert not inspection.float32_products(text_of(thrice, jnp.ones((1, 6, 6, 4))), ("models/layers.py",))


def test_rounded_products_are_found():
    """Similarities ask for the highest precision where they are written; convolutions do not."""
    rng = np.random.default_rng(0)
    vectors, words = (jnp.asarray(rng.standard_normal((n, 6)), jnp.float32) for n in (4, 9))
    similar = text_of(lambda v, w: nearest_words(v, w, jnp.ones(9, bool), 2), vectors, words)
    assert inspection.float32_products(similar)
    assert not inspection.rounded_products(similar, ("objectives/",))
    layer = conv3x3(4, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rounded = text_of(lambda x: layer(x), jnp.ones((1, 6, 6, 4)))
    assert inspection.rounded_products(rounded, ("models/",))
    assert not inspection.rounded_products(rounded, ("objectives/",))


GPU = """HloModule jit_tune, is_scheduled=true
  %f = (f16[2,8]) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="a"}
  %g = (f16[2,8]) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="b"}
  %h = (f16[2,8]) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="c"}
"""
TPU = """HloModule jit_tune, is_scheduled=true
  %f = bf16[8] custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="jit(x)/flash_attention_kernel"}
  %g = bf16[8] custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="flash_attention_bwd_dq"}
  %h = bf16[8] custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="flash_attention_bwd_dkv"}
  %i = bf16[8] custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="another_kernel"}
"""


@pytest.mark.parametrize(("text", "count"), [(GPU, (2, 1)), (TPU, (1, 1))])
def test_fused_attention_is_counted(text, count):
    assert inspection.fused_attention(text) == count
