"""The optimiser of the recipes: its rate, its clipping, and what it does not decay."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from line_task import settings

from datencoder_jax.api import load
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.judge import Judge, JudgeConfig
from datencoder_jax.models.module import abstract_params
from datencoder_jax.training.optim import adamw, decayed, learning_rate

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("schedule", "decay", "expected"),
    [
        ("stable", 0.5, {0: 0.0, 1: 0.25, 4: 1.0, 9: 1.0, 10: 1.0, 15: 0.5, 20: 0.0, 25: 0.0}),
        ("constant", 0.5, {0: 0.0, 2: 0.5, 4: 1.0, 20: 1.0}),
        ("cosine", 0.2, {0: 0.0, 2: 0.5, 4: 1.0, 12: 0.6, 20: 0.2, 25: 0.2}),
    ],
)
def test_schedules(schedule, decay, expected):
    optim = settings(**{"optim.lr": 3.0, "optim.warmup": 4, "optim.schedule": schedule, "optim.decay": decay}).optim
    rate = learning_rate(optim, 20)
    with jax.numpy_dtype_promotion("standard"):
        found = {step: float(rate(jnp.int32(step))) / 3.0 for step in expected}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_schedule_that_is_none():
    with pytest.raises(UserError, match=r"optim\.schedule is 'linear'; it can be stable, cosine, constant"):
        adamw(settings(**{"optim.schedule": "linear"}))


def test_a_mask_that_is_no_pattern():
    with pytest.raises(UserError, match=r"optim\.no_decay is no regular expression"):
        adamw(settings(**{"optim.no_decay": "(bias"}))


def test_large_gradients_are_clipped_and_only_some_parameters_decay():
    config = settings(**{"optim.lr": 0.1, "optim.warmup": 1, "optim.schedule": "constant", "optim.weight_decay": 0.5})
    params = {"a.weight": jnp.ones((2, 2)), "a.bias": jnp.ones(2)}
    rule, _ = adamw(config)
    with jax.numpy_dtype_promotion("standard"):
        nothing = jax.tree.map(jnp.zeros_like, params)
        state = rule.init(params)
        _, state = rule.update(nothing, state, params)  # at a rate of zero
        updates, _ = rule.update(nothing, state, params)
        first, _ = rule.update(jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), params), rule.init(params), params)
        assert np.isfinite(first["a.weight"]).all()
        moments = rule.update({"a.weight": jnp.full((2, 2), 30.0), "a.bias": jnp.full(2, 40.0)}, state, params)[1]
    np.testing.assert_allclose(updates["a.weight"], -0.1 * 0.5 * params["a.weight"])
    np.testing.assert_array_equal(updates["a.bias"], 0.0)
    norm = np.sqrt(4 * 30.0**2 + 2 * 40.0**2)
    mu = next(x for path, x in tree_leaves_with_path(moments) if keystr(path).endswith(".mu['a.bias']"))
    np.testing.assert_allclose(mu, (1 - 0.9) * 40.0 / norm, rtol=1e-6)


def test_the_recipes_decay_weights_and_tables_alone():
    """Everything of fewer than two dimensions is kept off, and so is what is never trained."""
    pipeline = load("toyworld")
    base = pipeline.base
    networks = {"vae": base.vae, "unet": base.unet, "encoder": pipeline.encoder}
    shapes = {name: model.params for name, model in networks.items()}
    shapes["clip"] = dict(base.text.params) | dict(base.vision.params) | {"logit_scale": jnp.float32(0)}
    shapes["judge"] = abstract_params(Judge, JudgeConfig())
    for name, params in shapes.items():
        pattern = runpy.run_path(str(CONFIGS / f"toyworld_{name}.py"))["get_config"]().optim.no_decay
        expected = {key: len(x.shape) > 1 and not key.startswith("anchors.") for key, x in params.items()}
        assert decayed(pattern)(params) == expected
