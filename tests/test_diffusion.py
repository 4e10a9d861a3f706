"""Schedule and samplers against diffusers' schedulers, and the algebra of the prediction types."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax.diffusion import schedule
from datencoder_jax.diffusion.guidance import guided
from datencoder_jax.diffusion.samplers import SAMPLERS, make_plan, sample
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers turns torch tensors into arrays the way NumPy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ORACLES = {"ddim": diffusers.DDIMScheduler, "dpm++2m": diffusers.DPMSolverMultistepScheduler}


def _noise(shape=(2, 4, 4, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _oracle(sampler, options, steps, noise):
    """diffusers' trajectory, with `sin(x) + t / 1000` as the model."""
    options = dict(options)
    if sampler == "dpm++2m":
        for name in ("set_alpha_to_one", "clip_sample"):
            options.pop(name, None)
    scheduler = ORACLES[sampler](**options)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x) + float(t) * 1e-3, t, x).prev_sample
    return scheduler, x.numpy()


def _ours(sampler, options, steps, noise):
    plan = make_plan(sampler, ScheduleConfig.from_dict(options), steps)
    latents = jax.jit(lambda plan, noise: sample(plan, lambda x, t: jnp.sin(x) + t.astype(jnp.float32) * 1e-3, noise))
    return plan, np.asarray(latents(plan, noise))


def _relative(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


SPACINGS = ("leading", "trailing", "linspace")
CASES = list(itertools.product(ORACLES, ("epsilon", "v_prediction"), SPACINGS, ("scaled_linear", "linear")))


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "betas"), CASES)
def test_trajectory_is_diffusers(sampler, prediction, spacing, betas):
    # Offsets and final alphas alternate over the cases rather than multiplying them.
    index = CASES.index((sampler, prediction, spacing, betas))
    options = {
        **STABLE_DIFFUSION,
        "beta_schedule": betas,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": index % 2,
        "set_alpha_to_one": bool(index // 2 % 2),
        "clip_sample": False,
    }
    noise = _noise()
    scheduler, expected = _oracle(sampler, options, 20, noise)
    plan, actual = _ours(sampler, options, 20, noise)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    assert _relative(actual, expected) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize(("offset", "to_one"), [(0, False), (1, False), (0, True), (1, True)])
def test_trajectory_at_other_step_counts(sampler, steps, offset, to_one):
    options = {**STABLE_DIFFUSION, "steps_offset": offset, "set_alpha_to_one": to_one, "clip_sample": False}
    options |= {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    noise = _noise(seed=steps)
    scheduler, expected = _oracle(sampler, options, steps, noise)
    plan, actual = _ours(sampler, options, steps, noise)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    assert _relative(actual, expected) < 1e-5


def test_clipped_trajectory_is_diffusers():
    options = {**STABLE_DIFFUSION, "clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "leading"}
    noise = _noise()
    assert _relative(_ours("ddim", options, 20, noise)[1], _oracle("ddim", options, 20, noise)[1]) < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_zero_terminal_snr_is_diffusers(sampler):
    options = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    options |= {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    noise = _noise()
    assert schedule.alphas_cumprod(ScheduleConfig.from_dict(options))[-1] == 0.0
    assert _relative(_ours(sampler, options, 20, noise)[1], _oracle(sampler, options, 20, noise)[1]) < 2e-5


@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_timesteps_are_diffusers_at_every_count(sampler):
    for spacing in SPACINGS:
        options = {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
        oracle = ORACLES[sampler](**options)
        for steps in (*range(1, 60), 99, 100, 123, 333, 499):
            oracle.set_timesteps(steps)
            plan = SAMPLERS[sampler](ScheduleConfig.from_dict(options), steps)
            # At 499 steps diffusers' trailing spacing yields a 500th timestep by a rounding error.
            np.testing.assert_array_equal(plan.timesteps, oracle.timesteps.numpy()[:steps])


def test_exact_model_returns_the_clean_latents():
    """A model that knows x0 must be sampled back to x0, whatever the sampler and the number of steps."""
    config = ScheduleConfig.from_dict({**STABLE_DIFFUSION, "set_alpha_to_one": True})
    table = jnp.asarray(schedule.alphas_cumprod(config))
    x0 = jnp.asarray(_noise(seed=1))

    def predict(x, t):
        return (x - jnp.sqrt(table[t]) * x0) / jnp.sqrt(1 - table[t])

    for sampler in SAMPLERS:
        for steps in (1, 4):
            latents = sample(make_plan(sampler, config, steps), predict, jnp.asarray(_noise()))
            np.testing.assert_allclose(latents, x0, atol=2e-5)


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
    assert ScheduleConfig.from_dict({"_class_name": "EulerDiscreteScheduler"}).timestep_spacing == "linspace"
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
    ],
)
def test_unsupported_options_are_refused(options):
    with pytest.raises(UserError):
        ScheduleConfig.from_dict(options)


def test_impossible_step_counts_are_refused():
    config = ScheduleConfig(num_train_timesteps=10, steps_offset=1)
    for sampler, steps in itertools.product(SAMPLERS, (0, -1, 10, 11)):
        with pytest.raises(UserError, match="steps"):
            make_plan(sampler, config, steps)
    with pytest.raises(UserError, match="euler"):
        make_plan("euler", config, 5)


def test_a_plan_is_an_argument():
    """Two plans of one shape share one compiled program."""
    compiled = jax.jit(lambda plan, noise: sample(plan, lambda x, t: x, noise))
    for sampler, config in itertools.product(SAMPLERS, (ScheduleConfig(), ScheduleConfig(beta_end=0.01))):
        compiled(make_plan(sampler, config, 5), _noise())
    assert compiled._cache_size() == 1
