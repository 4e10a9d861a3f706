"""The noise schedule against diffusers, and the algebra of the prediction types."""

import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax.diffusion import schedule
from datencoder_jax.diffusion.guidance import guided
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers turns torch tensors into arrays the way NumPy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _noise(shape=(2, 4, 4, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alphas_and_noising_are_diffusers(betas):
    options = {**STABLE_DIFFUSION, "beta_schedule": betas}
    oracle = diffusers.DDPMScheduler(**options)
    table = schedule.alphas_cumprod(ScheduleConfig.from_dict(options))
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, oracle.alphas_cumprod.numpy(), rtol=1e-5, atol=1e-7)

    x0, noise, t = _noise(seed=1), _noise(seed=2), np.array([3, 900])
    tensors = torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)
    noisy, v = schedule.add_noise(x0, noise, table[t]), schedule.velocity(x0, noise, table[t])
    np.testing.assert_allclose(noisy, oracle.add_noise(*tensors).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(v, oracle.get_velocity(*tensors).numpy(), rtol=1e-5, atol=1e-5)


def test_trained_betas_are_used():
    config = ScheduleConfig.from_dict({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.5]})
    np.testing.assert_allclose(schedule.alphas_cumprod(config), [0.9, 0.72, 0.36], rtol=1e-6)
    hash(config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_prediction_types_invert(prediction):
    x0, noise, alpha_bar = jnp.asarray(_noise(seed=1)), jnp.asarray(_noise(seed=2)), jnp.array([0.9, 0.2])
    x_t = schedule.add_noise(x0, noise, alpha_bar)
    output = schedule.target(x0, noise, alpha_bar, prediction)
    back, eps = schedule.to_x0_eps(output, x_t, alpha_bar, prediction)
    np.testing.assert_allclose(back, x0, atol=2e-6)
    np.testing.assert_allclose(eps, noise, atol=2e-6)


def test_snr_weights():
    alpha_bar = jnp.array([0.0, 0.5, 0.9])  # snr 0, 1, 9
    np.testing.assert_allclose(schedule.snr(alpha_bar), [0.0, 1.0, 9.0], rtol=1e-6)
    np.testing.assert_allclose(schedule.snr_weight(alpha_bar, 5.0, "epsilon"), [1.0, 1.0, 5 / 9], rtol=1e-6)
    np.testing.assert_allclose(schedule.snr_weight(alpha_bar, 5.0, "v_prediction"), [1.0, 1.0, 6 / 10], rtol=1e-6)


def test_guidance():
    uncond, cond = jnp.asarray(_noise(seed=1)), jnp.asarray(_noise(seed=2))
    np.testing.assert_array_equal(guided(uncond, cond, 0.0), uncond)
    both = guided(uncond, cond, jnp.array([2.0, 7.5]))
    np.testing.assert_allclose(both[1], guided(uncond, cond, 7.5)[1], rtol=1e-6)


def test_defaults_follow_the_class_that_wrote_the_file():
    assert ScheduleConfig.from_dict({"_class_name": "DDIMScheduler"}).clip_sample
    assert not ScheduleConfig.from_dict({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    assert ScheduleConfig.from_dict({"_class_name": "EulerDiscreteScheduler"}).timestep_spacing is None
    for name in ("DEISMultistepScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        assert ScheduleConfig.from_dict({"_class_name": name, **STABLE_DIFFUSION}).beta_schedule == "scaled_linear"
    config = ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", "clip_sample": False, **STABLE_DIFFUSION})
    assert ScheduleConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "options",
    [
        {"thresholding": True},
        {"prediction_type": "sample"},
        {"beta_schedule": "sigmoid"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1]},
        {"final_sigmas_type": "sigma_min"},
        {"sigma_min": 0.002},
        {"sigma_max": 80.0},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
    ],
)
def test_unsupported_options_are_refused(options):
    with pytest.raises(UserError):
        ScheduleConfig.from_dict(options)
