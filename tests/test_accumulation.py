"""Gradients of coupled losses: in parts or at once they are the same, and those of the loss as it is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datencoder_jax.training.accumulation import CoupledLoss, _split, value_and_grad

B, IN, D = 8, 5, 3


def loss(counter=None):
    """d = |x|^4, c_i = log sum_j exp <v_i, v_j>: every sample's gradient depends on all the others."""

    def prepare(samples):
        return {"f": jnp.sin(samples["z"]), "y": samples["y"]}

    def predict(params, f):
        return jnp.tanh(f["f"] @ params["w"])

    def each(x, f):
        d = jnp.sum((x - f["y"]) ** 4, axis=1)
        return d, {"d": d}

    def coupled(v, samples):
        c = jax.nn.logsumexp(v @ v.T + samples["bias"][:, None], axis=1)
        return 0.3 * c, {"c": c.mean()}

    return CoupledLoss(prepare, predict, lambda x: x, each, coupled)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((IN, D)), jnp.float32)}
    shapes = {"z": (B, IN), "y": (B, D), "bias": (B,)}
    return params, {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def written(w, samples):
    """Equation (1) in numpy, float64."""
    x = np.tanh(np.sin(samples["z"]) @ w)
    d = ((x - samples["y"]) ** 4).sum(axis=1)
    c = 0.3 * np.log(np.exp(x @ x.T + samples["bias"][:, None]).sum(axis=1))
    return d.mean() + c.mean()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_value_and_gradient_are_those_of_the_loss_as_it_is_written(problem, parts):
    params, samples = problem
    (value, values), grads = jax.jit(lambda p, s: value_and_grad(loss(), p, s, parts))(params, samples)
    exact = {name: np.asarray(x, np.float64) for name, x in samples.items()}
    w = np.asarray(params["w"], np.float64)
    assert value == pytest.approx(written(w, exact), rel=1e-5)
    numeric, h = np.empty_like(w), 1e-6
    for place in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[place] = h
        numeric[place] = (written(w + step, exact) - written(w - step, exact)) / (2 * h)
    np.testing.assert_allclose(grads["w"], numeric, rtol=1e-4, atol=1e-5)
    assert set(values) == {"d", "c"}
    assert values["d"] == pytest.approx(((np.tanh(np.sin(exact["z"]) @ w) - exact["y"]) ** 4).sum(1).mean(), rel=1e-5)


def test_parts_apart_are_not_the_whole(problem):
    """What the test above would miss if nothing were coupled: averaging the parts' own losses is another number."""
    params, samples = problem
    halves = [jax.tree.map(lambda x, k=k: x[k::2], samples) for k in range(2)]
    apart = sum(value_and_grad(loss(), params, half)[0][0] for half in halves) / 2
    assert abs(apart - value_and_grad(loss(), params, samples)[0][0]) > 0.05


def test_inputs_are_computed_once_per_sample(problem):
    """Frozen features are the dearest after the loss itself: the second pass takes those of the first."""
    params, samples = problem
    calls = []
    given = loss()
    counted = CoupledLoss(
        lambda s: calls.append(1) or given.prepare(s), given.predict, given.vectors, given.each, given.coupled
    )
    jax.eval_shape(lambda p, s: value_and_grad(counted, p, s, 4), params, samples)
    assert len(calls) == 1


def test_a_split_batch_stays_where_it_lies(problem):
    """Rows on a device are that device's in every part: splitting moves nothing between devices."""
    params, samples = problem
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(samples, rows)
    split = jax.jit(lambda tree: _split(tree, 4)).lower(placed).compile()
    assert not any(name in split.as_text() for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert split(placed)["z"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "data")), 3)
    (value, _), grads = jax.jit(lambda p, s: value_and_grad(loss(), p, s, 4))(params, placed)
    (whole, _), expected = value_and_grad(loss(), params, samples)
    assert value == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-4, atol=1e-5)
