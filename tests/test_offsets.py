"""Weight offsets and the second path of the UNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.module import Model, init_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.typing import LowRank

CONFIG = UNetConfig(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 2


@pytest.fixture(scope="module")
def model():
    return Model(UNet2DConditionModel, CONFIG, init_params(UNet2DConditionModel, CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "latents": jax.random.normal(keys[0], (2, 4, 4, 4)),
        "t": jnp.array([20, 700]),
        "context": jax.random.normal(keys[1], (2, 5, 12)),
    }


@pytest.fixture(scope="module")
def hard_context():
    """Longer than the soft one: nothing ties the two lengths."""
    return jax.random.normal(jax.random.key(2), (2, 7, 12))


@jax.jit
def run(model, inputs, offsets=None, hard_context=None, blend=1.0):
    return model(**inputs, offsets=offsets, hard_context=hard_context, blend=blend)


def draw_offsets(model, batch=(), seed=3):
    """Offsets of every attention projection, large enough to change the output visibly."""
    rng, offsets = np.random.default_rng(seed), {}
    for name, weight in model.params.items():
        path = name.removesuffix(".weight")
        if path.endswith(PROJECTIONS):
            down = rng.standard_normal((*batch, weight.shape[0], RANK), dtype=np.float32) / weight.shape[0] ** 0.5
            up = rng.standard_normal((*batch, RANK, weight.shape[1]), dtype=np.float32)
            offsets[path] = LowRank(jnp.asarray(down), jnp.asarray(up))
    assert len(offsets) == 4 * 2 * 4  # transformers x attentions x projections
    return offsets


def merged(model, offsets, sample):
    """The model with one sample's offsets added to its weights."""
    changed = {
        f"{path}.weight": model.params[f"{path}.weight"] + o.down[sample] @ o.up[sample] for path, o in offsets.items()
    }
    return model.with_params(model.params | changed)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_zero_offsets_change_no_bit(model, inputs):
    zero = {path: LowRank(o.down, jnp.zeros_like(o.up)) for path, o in draw_offsets(model, (2,)).items()}
    np.testing.assert_array_equal(run(model, inputs, zero), run(model, inputs))
    np.testing.assert_array_equal(run(model, inputs, {}), run(model, inputs))


def test_batched_offsets_equal_merged_weights(model, inputs):
    offsets = draw_offsets(model, (2,))
    actual = run(model, inputs, offsets)
    assert np.abs(actual - run(model, inputs)).max() > 0.1
    for i in range(2):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        close(actual[i : i + 1], run(merged(model, offsets, i), one))


def test_shared_offsets_equal_the_same_for_every_sample(model, inputs):
    shared = draw_offsets(model)
    repeated = jax.tree.map(lambda x: jnp.stack([x, x]), shared)
    close(run(model, inputs, shared), run(model, inputs, repeated))


def test_offsets_of_one_projection_touch_that_one_alone(model, inputs):
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    batched = draw_offsets(model, (2,))
    offsets = {path: batched[path]}
    one = {name: value[1:] for name, value in inputs.items()}
    close(run(model, inputs, offsets)[1:], run(merged(model, offsets, 1), one))


def test_blend_one_is_the_soft_path(model, inputs, hard_context):
    offsets = draw_offsets(model, (2,))
    close(run(model, inputs, offsets, hard_context, 1.0), run(model, inputs, offsets))


def test_blend_zero_is_the_base_model_under_the_hard_context(model, inputs, hard_context):
    actual = run(model, inputs, draw_offsets(model, (2,)), hard_context, 0.0)
    close(actual, run(model, inputs | {"context": hard_context}))


def test_blend_per_sample(model, inputs, hard_context):
    offsets = draw_offsets(model, (2,))
    actual = run(model, inputs, offsets, hard_context, jnp.array([0.0, 0.25]))
    close(actual[0], run(model, inputs | {"context": hard_context})[0])
    close(actual[1], run(model, inputs, offsets, hard_context, 0.25)[1])
    # In between is neither end.
    assert np.abs(actual[1] - run(model, inputs, offsets)[1]).max() > 0.01


def test_contexts_of_one_row_are_every_samples(model, inputs, hard_context):
    offsets, weights = draw_offsets(model), jax.random.normal(jax.random.key(6), (2, 4, 4, 4))

    def loss(contexts):
        out = run(model, inputs | {"context": contexts[0]}, offsets, contexts[1], 0.3)
        return (weights * out).sum(), out

    one = inputs["context"][:1], hard_context[:1]
    repeated = jax.tree.map(lambda x: jnp.concatenate([x, x]), one)
    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(one)
    (_, expected), each = jax.value_and_grad(loss, has_aux=True)(repeated)
    close(out, expected)
    for found, rows in zip(gradients, each, strict=True):
        np.testing.assert_allclose(found, rows.sum(axis=0, keepdims=True), rtol=1e-4, atol=1e-4)
    costs = [jax.jit(loss).lower(contexts).compile().cost_analysis()["flops"] for contexts in (one, repeated)]
    assert costs[0] < costs[1]  # their keys and values are computed once


def test_two_paths_as_the_equations_say(model):
    """Equation (3) of the module, written out for one cross-attention layer."""
    layer = model.bind().mid_block.attentions[0].transformer_blocks[0].attn2
    rng = np.random.default_rng(5)
    h, soft, hard = (
        jnp.asarray(rng.standard_normal(s, dtype=np.float32)) for s in [(2, 6, 16), (2, 5, 12), (2, 7, 12)]
    )
    offsets = {path: o for path, o in draw_offsets(model, (2,)).items() if path.startswith(layer.path)}
    weights = {name: model.params[f"{layer.path}.{name}.weight"][None] for name in PROJECTIONS}
    changed = {
        name: weights[name] + offsets[f"{layer.path}.{name}"].down @ offsets[f"{layer.path}.{name}"].up
        for name in weights
    }

    def path(w, context):
        q, k, v = (x.reshape(2, -1, 2, 8) for x in (h @ w["to_q"], context @ w["to_k"], context @ w["to_v"]))
        return attend(q, k, v, implementation="xla").reshape(2, -1, 16) @ w["to_out.0"]

    expected = (
        0.3 * path(changed, soft) + 0.7 * path(weights, hard) + model.params[f"{layer.path}.to_out.0.bias"][None, None]
    )
    close(layer(h, soft, offsets=offsets, hard_context=hard, dual=True, blend=0.3), expected)


def test_gradient_reaches_every_offset(model, inputs, hard_context):
    def loss(offsets):
        return (model(**inputs, offsets=offsets, hard_context=hard_context, blend=0.7) ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(draw_offsets(model, (2,)))
    for path, gradient in gradients.items():
        for factor in gradient:
            norms = np.linalg.norm(np.asarray(factor).reshape(2, -1), axis=-1)
            assert np.isfinite(norms).all() and (norms > 1e-8).all(), path


@pytest.mark.parametrize("batch", [(), (2,)])
def test_half_precision_needs_no_implicit_promotion(model, inputs, hard_context, batch):
    half = model.cast("bfloat16", "bfloat16")
    shape = jax.eval_shape(
        lambda *args: run(*args), half, inputs, draw_offsets(model, batch), hard_context, jnp.ones(2)
    )
    assert shape.dtype == jnp.float32
