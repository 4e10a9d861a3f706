"""The losses against plain loops, against each other across devices, and against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datencoder_jax.objectives.contrastive import contrastive_dense, contrastive_ring, nearest_words
from datencoder_jax.objectives.denoising import denoising_loss
from datencoder_jax.objectives.norm import mean_norm, norm_penalty

SETTINGS = {"temperature": 0.1, "neighbours": 3}


def _case(rows=16, width=6, vocabulary=40, seed=0):
    """Embeddings with repeated concepts (some split over devices), masked rows unevenly spread, a restricted table."""
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((rows, width)).astype(np.float32)
    concepts = rng.integers(0, rows // 2, rows).astype(np.int32)
    concepts[[0, rows - 1]] = rows
    mask = np.ones(rows, bool)
    mask[[2, 3, rows // 2]] = False
    table = (0.3 * rng.standard_normal((vocabulary, width))).astype(np.float32)
    allowed = rng.random(vocabulary) < 0.6
    return embeddings, concepts, mask, table, allowed


def _loops(embeddings, concepts, mask, table, allowed, *, temperature, neighbours):
    """Equations (1) to (5) with loops, in float64."""
    u = [v / np.linalg.norm(v) for v in embeddings.astype(np.float64)]
    words = [w / np.linalg.norm(w) for w, ok in zip(table.astype(np.float64), allowed, strict=True) if ok]
    losses = np.zeros(len(u))
    for i in range(len(u)):
        if not mask[i]:
            continue
        positive = sum(np.exp(c / temperature) for c in sorted((u[i] @ w for w in words), reverse=True)[:neighbours])
        negative = sum(
            np.exp(u[i] @ u[j] / temperature) for j in range(len(u)) if mask[j] and concepts[j] != concepts[i]
        )
        losses[i] = -np.log(positive / (positive + negative))
    return losses


def _mesh(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def _value_and_grad(loss, case):
    """Losses per row, and the gradient of a weighted sum of them, so that rows do not cancel."""
    weights = np.linspace(0.5, 1.5, len(case[0])).astype(np.float32)

    def total(embeddings, *rest):
        losses = loss(embeddings, *rest, **SETTINGS)
        return jnp.sum(losses * weights), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(*case)
    return np.asarray(losses), np.asarray(gradient)


def _assert_same_gradient(actual, expected):
    """Equal to 1e-6 of the largest component: sums in another order differ by rounding at that scale, not at zero's."""
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


def test_dense_is_the_loops():
    for seed in range(3):
        case = _case(seed=seed)
        losses, _ = _value_and_grad(contrastive_dense, case)
        np.testing.assert_allclose(losses, _loops(*case, **SETTINGS), rtol=1e-5, atol=1e-6)
        assert (losses[~case[2]] == 0).all() and (losses[case[2]] > 0).all()


def test_gradient_is_finite_differences():
    case = _case()
    _, gradient = _value_and_grad(contrastive_dense, case)
    weights = np.linspace(0.5, 1.5, len(case[0]))
    embeddings, step = case[0].astype(np.float64), 1e-6
    for index in np.ndindex(embeddings.shape):
        ends = []
        for sign in (1, -1):
            moved = embeddings.copy()
            moved[index] += sign * step
            ends.append(weights @ _loops(moved, *case[1:], **SETTINGS))
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_ring_is_dense(devices):
    for rows in (16, 32):
        case = _case(rows)
        losses, gradient = _value_and_grad(contrastive_dense, case)
        ring = functools.partial(contrastive_ring, mesh=_mesh(devices))
        ring_losses, ring_gradient = _value_and_grad(ring, case)
        np.testing.assert_allclose(ring_losses, losses, rtol=1e-6, atol=1e-6)
        _assert_same_gradient(ring_gradient, gradient)


@pytest.mark.parametrize("devices", [1, 2])
def test_ring_is_dense_over_blocks_of_rows(devices):
    """More rows a device than are compared at a time, and no multiple of that."""
    case = _case(1100, width=4, vocabulary=30)
    losses, gradient = _value_and_grad(contrastive_dense, case)
    ring_losses, ring_gradient = _value_and_grad(functools.partial(contrastive_ring, mesh=_mesh(devices)), case)
    np.testing.assert_allclose(ring_losses, losses, rtol=1e-6, atol=1e-6)
    _assert_same_gradient(ring_gradient, gradient)


def test_ring_of_sharded_rows_keeps_them_sharded():
    mesh, case = _mesh(8), _case()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(x, rows) for x in case[:3]]
    losses = contrastive_ring(*sharded, *case[3:], **SETTINGS, mesh=mesh)  # outside jit as well
    assert losses.sharding.is_equivalent_to(rows, losses.ndim)
    np.testing.assert_allclose(losses, contrastive_dense(*case, **SETTINGS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", ["data", ("data", "fsdp")])
def test_ring_on_a_mesh_of_two_axes(axis):
    case, mesh = _case(), jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    losses, gradient = _value_and_grad(contrastive_dense, case)
    ring_losses, ring_gradient = _value_and_grad(functools.partial(contrastive_ring, mesh=mesh, axis=axis), case)
    np.testing.assert_allclose(ring_losses, losses, rtol=1e-6, atol=1e-6)
    _assert_same_gradient(ring_gradient, gradient)


def test_one_device_may_be_all_padding():
    embeddings, concepts, _, table, allowed = _case()
    mask = np.arange(16) >= 5  # of eight devices, two hold only padding and a third half
    padded = np.where(mask[:, None], embeddings, np.nan)
    ring = functools.partial(contrastive_ring, mesh=_mesh(8))
    losses, gradient = _value_and_grad(ring, (padded, concepts, mask, table, allowed))
    alone, _ = _value_and_grad(contrastive_dense, (embeddings[5:], concepts[5:], mask[5:], table, allowed))
    np.testing.assert_allclose(losses[5:], alone, rtol=1e-6, atol=1e-6)
    assert np.isfinite(gradient).all() and (gradient[:5] == 0).all()


@pytest.mark.parametrize("loss", [contrastive_dense, functools.partial(contrastive_ring, mesh=_mesh(2))])
def test_no_negatives_no_loss(loss):
    embeddings, concepts, mask, table, allowed = _case()
    one_concept = (embeddings, np.zeros_like(concepts), mask, table, allowed)
    nothing = (embeddings, concepts, np.zeros_like(mask), table, allowed)
    for case in (one_concept, nothing):
        losses, gradient = _value_and_grad(loss, case)
        np.testing.assert_array_equal(losses, 0)
        np.testing.assert_array_equal(gradient, 0)


def test_cold_temperatures_do_not_overflow():
    case = _case()
    losses, gradient = jax.value_and_grad(
        lambda v: contrastive_dense(v, *case[1:], temperature=1e-3, neighbours=2).sum()
    )(case[0])
    assert np.isfinite(losses) and np.isfinite(gradient).all()


def test_a_zero_embedding_has_a_finite_gradient():
    embeddings, *rest = _case()
    embeddings[0] = 0
    losses, gradient = _value_and_grad(contrastive_dense, (embeddings, *rest))
    assert np.isfinite(losses).all() and np.abs(gradient).max() < 1e3


def test_loss_falls_towards_the_nearest_word():
    embeddings, concepts, mask, table, allowed = _case()
    ids, _ = nearest_words(embeddings, table, allowed, 1)
    word = table[ids[0, 0]]
    losses = []
    for fraction in (0.0, 0.3, 0.6, 1.0):
        moved = embeddings.copy()
        moved[0] = (1 - fraction) * embeddings[0] + fraction * word
        losses.append(contrastive_dense(moved, concepts, mask, table, allowed, temperature=0.1, neighbours=1)[0])
    assert (np.diff(losses) < 0).all()


def test_loss_grows_with_the_nearness_of_another_concept():
    embeddings, _, _, table, allowed = _case()
    concepts, mask = np.array([0, 1], np.int32), np.ones(2, bool)
    far, near = (
        contrastive_dense(np.stack([embeddings[0], s * embeddings[0]]), concepts, mask, table, allowed, **SETTINGS)[0]
        for s in (np.float32(-1), np.float32(1))
    )
    assert near > far + 1


def test_the_table_gets_no_gradient():
    case = _case()
    gradient = jax.grad(lambda table: contrastive_dense(*case[:3], table, case[4], **SETTINGS).sum())(case[3])
    np.testing.assert_array_equal(gradient, 0)


def test_nearest_words():
    embeddings, _, _, table, allowed = _case()
    ids, cosines = nearest_words(embeddings, table, allowed, 4)
    assert allowed[ids].all()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = np.where(allowed, unit @ (table / np.linalg.norm(table, axis=1, keepdims=True)).T, -np.inf)
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=1)[:, :4])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :4], atol=1e-6)
    table[ids[0, 0]] *= 7  # cosine: length is irrelevant
    np.testing.assert_array_equal(nearest_words(3 * embeddings, table, allowed, 4)[0], ids)


def test_low_precision_inputs_are_computed_in_float32():
    embeddings, concepts, mask, table, allowed = _case()
    half = jnp.asarray(embeddings, jnp.bfloat16), concepts, mask, jnp.asarray(table, jnp.bfloat16), allowed
    losses = contrastive_dense(*half, **SETTINGS)
    assert losses.dtype == jnp.float32
    rounded = [np.asarray(x, np.float32) if i in (0, 3) else x for i, x in enumerate(half)]
    np.testing.assert_allclose(losses, contrastive_dense(*rounded, **SETTINGS), rtol=1e-6)


def _temporary_bytes(loss, rows, mesh=None):
    """Working memory per device of the compiled loss and gradient."""
    case = _case(rows, width=4, vocabulary=8)
    place = NamedSharding(mesh, PartitionSpec("data")) if mesh else None
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if i < 3 else None) for i, x in enumerate(case)]
    gradient = jax.jit(jax.grad(lambda *case: loss(*case, **SETTINGS).sum()))
    return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_ring_memory_follows_the_rows_per_device():
    """At 128 rows per device the ring's memory hardly grows with devices; dense grows with the square of the batch."""
    ring, dense = {}, {}
    for n in (2, 4, 8):
        ring[n] = _temporary_bytes(functools.partial(contrastive_ring, mesh=_mesh(n)), 128 * n, _mesh(n))
        dense[n] = _temporary_bytes(contrastive_dense, 128 * n)
    assert dense[8] > 12 * dense[2]
    assert ring[8] < 1.5 * ring[2]
    assert ring[8] < dense[8] / 16
    assert ring[8] - ring[4] < 4 * 128 * 4  # less than one more visitor: none is kept for the backward pass


def test_denoising_loss():
    rng = np.random.default_rng(0)
    prediction, target = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    expected = ((prediction - target) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(denoising_loss(prediction, target), expected, rtol=1e-6)
    weight = np.array([0.0, 1.0, 2.0], np.float32)
    np.testing.assert_allclose(denoising_loss(prediction, target, weight), weight * expected, rtol=1e-6)
    assert denoising_loss(jnp.asarray(prediction, jnp.bfloat16), target).dtype == jnp.float32


def test_norm_penalty():
    _, _, _, table, allowed = _case()
    rho = mean_norm(table, allowed)
    np.testing.assert_allclose(rho, np.linalg.norm(table[allowed], axis=1).mean(), rtol=1e-6)
    direction = np.eye(6, dtype=np.float32)[:3]
    scales = np.array([[1.0], [2.0], [0.0]], np.float32)
    np.testing.assert_allclose(norm_penalty(rho * scales * direction, rho), [1.0, 4.0, 0.0], rtol=1e-6)
