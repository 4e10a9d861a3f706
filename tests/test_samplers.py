"""Every sampler against diffusers' scheduler of the same configuration, and how plans are run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse

from datencoder_jax.diffusion import schedule
from datencoder_jax.diffusion.samplers import SAMPLERS, make_plan, sample
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers turns torch tensors into arrays the way NumPy 1 did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ORACLES = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
}
DETERMINISTIC = [name for name in SAMPLERS if name != "euler-a"]
SPACINGS = ("leading", "trailing", "linspace")
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {**STABLE_DIFFUSION, "num_train_timesteps": 1000, "trained_betas": None, "clip_sample": False}
LATENT |= {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
PUBLISHED = {
    "SD 1.5": {"_class_name": "PNDMScheduler", **LATENT},
    "SD 2.1": {"_class_name": "DDIMScheduler", **LATENT, "prediction_type": "v_prediction"},
    "SD 2.1 base": {"_class_name": "PNDMScheduler", **LATENT, "prediction_type": "epsilon"},
    "SDXL": {
        "_class_name": "EulerDiscreteScheduler",
        **LATENT,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
    },
}
ZERO_SNR = {**LATENT, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}
ROWS = jax.random.split(jax.random.key(7), 2)


def test_every_sampler_has_an_oracle():
    assert list(ORACLES) == list(SAMPLERS)


@pytest.fixture
def oracle(monkeypatch):
    return lambda *arguments: _oracle(monkeypatch, *arguments)


def _noise(shape=(2, 4, 4, 3), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _denoiser(xp, x, t):
    """Nonlinear in both, and noisier inputs hold more noise, so that estimates of x0 stay of order one."""
    angle = 0.03 + 0.001475 * t
    return x * xp.sin(angle) + 0.5 * xp.sin(2.0 * x + 0.01 * t) * xp.cos(angle)


def _oracle(monkeypatch, sampler, options, steps, noise):
    """diffusers' trajectory, with the fresh noise of `ROWS`."""

    def draw(shape, **_):
        keys = jax.vmap(lambda row: jax.random.fold_in(row, scheduler.step_index))(ROWS)
        return torch.tensor(np.asarray(jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)))

    monkeypatch.setattr(diffusers.schedulers.scheduling_euler_ancestral_discrete, "randn_tensor", draw)
    kind, extra = ORACLES[sampler]
    scheduler = kind.from_config(dict(options), **extra)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = _denoiser(torch, scheduler.scale_model_input(x, t), t.float())
        x = scheduler.step(prediction, t, x).prev_sample
    return scheduler, x.numpy()


_sample = jax.jit(lambda plan, noise, key=ROWS: sample(plan, lambda x, t: _denoiser(jnp, x, t), noise, key))


def _ours(sampler, options, steps, noise):
    plan = make_plan(sampler, ScheduleConfig.from_dict(options), steps)
    return plan, np.asarray(_sample(plan, noise))


def _relative(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


CASES = list(itertools.product(ORACLES, ("epsilon", "v_prediction"), SPACINGS, ("scaled_linear", "linear")))


@pytest.mark.parametrize(("sampler", "prediction", "spacing", "betas"), CASES)
def test_trajectory_is_diffusers(oracle, sampler, prediction, spacing, betas):
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
    scheduler, expected = oracle(sampler, options, 20, noise)
    plan, actual = _ours(sampler, options, 20, noise)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    assert plan.timesteps.dtype == np.float32 and np.abs(expected).max() < 10
    assert _relative(actual, expected) < 1e-5


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("sampler", ORACLES)
def test_published_configurations_are_read_as_diffusers_does(oracle, sampler, model):
    """What a file leaves out, such as the spacing of SD 1.5 and 2.1, takes the default of the sampler that is used."""
    noise = _noise()
    scheduler, expected = oracle(sampler, PUBLISHED[model], 20, noise)
    plan, actual = _ours(sampler, PUBLISHED[model], 20, noise)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    assert _relative(actual, expected) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sampler", ORACLES)
@pytest.mark.parametrize(("offset", "to_one"), [(0, False), (1, False), (0, True), (1, True)])
def test_trajectory_at_other_step_counts(oracle, sampler, steps, offset, to_one):
    options = {**STABLE_DIFFUSION, "steps_offset": offset, "set_alpha_to_one": to_one, "clip_sample": False}
    options |= {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    noise = _noise(seed=steps)
    scheduler, expected = oracle(sampler, options, steps, noise)
    plan, actual = _ours(sampler, options, steps, noise)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    assert _relative(actual, expected) < 1e-5


def test_clipped_trajectory_is_diffusers(oracle):
    options = {**STABLE_DIFFUSION, "clip_sample": True, "set_alpha_to_one": True, "timestep_spacing": "leading"}
    noise = _noise()
    assert _relative(_ours("ddim", options, 20, noise)[1], oracle("ddim", options, 20, noise)[1]) < 1e-5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ORACLES)
def test_zero_terminal_snr_is_diffusers(oracle, sampler, spacing):
    options = {**ZERO_SNR, "timestep_spacing": spacing}
    noise = _noise()
    assert schedule.alphas_cumprod(ScheduleConfig.from_dict(options))[-1] == 0.0
    # Euler's first noise is 4096 times as large, where float32 holds no more than 2e-4.
    tolerance = 2e-5 if sampler.startswith("euler") else 1e-5
    assert _relative(_ours(sampler, options, 20, noise)[1], oracle(sampler, options, 20, noise)[1]) < tolerance


@pytest.mark.parametrize("sampler", ORACLES)
def test_timesteps_are_diffusers_at_every_count(sampler):
    kind, extra = ORACLES[sampler]
    for spacing, betas in itertools.product(SPACINGS, ({}, STABLE_DIFFUSION)):
        options = {**betas, "timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
        oracle = kind.from_config(options, **extra)
        for steps in (*range(1, 60), 99, 100, 123, 333, 499):
            oracle.set_timesteps(steps)
            plan = SAMPLERS[sampler](ScheduleConfig.from_dict(options), steps)
            # At 499 steps diffusers' trailing spacing yields a 500th timestep by a rounding error.
            np.testing.assert_array_equal(plan.timesteps, oracle.timesteps.numpy()[:steps])


def test_exact_model_returns_the_clean_latents():
    """A model that knows x0 must be sampled back to x0, whatever the sampler and the number of steps."""
    config = ScheduleConfig.from_dict({**STABLE_DIFFUSION, "set_alpha_to_one": True})
    x0 = jnp.asarray(_noise(seed=1))

    for sampler in SAMPLERS:
        for steps in (1, 4):
            plan = make_plan(sampler, config, steps)

            def predict(x, t, plan=plan):
                alpha_bar = jnp.asarray(plan.alpha_bar)[jnp.argmax(plan.timesteps == t)]
                return (x - jnp.sqrt(alpha_bar) * x0) / jnp.sqrt(1 - alpha_bar)

            latents = sample(plan, predict, jnp.asarray(_noise()), ROWS)
            np.testing.assert_allclose(latents, x0, atol=2e-5)


def _plan(sampler, steps=5, **options):
    return make_plan(sampler, ScheduleConfig.from_dict({**LATENT, **options}), steps)


def test_fresh_noise_follows_the_key():
    plan, noise = _plan("euler-a"), _noise()
    one, other = _sample(plan, noise), _sample(plan, noise, jax.random.split(jax.random.key(8), 2))
    np.testing.assert_array_equal(one, _sample(plan, noise))
    assert np.abs(one - other).max() > 0.1
    # The last step ends without noise: a single one draws none that could be seen.
    single = _plan("euler-a", 1)
    np.testing.assert_array_equal(_sample(single, noise), _sample(single, noise, ROWS[::-1]))


def test_a_row_does_not_depend_on_its_neighbours():
    plan, noise = _plan("euler-a"), _noise()
    both, second = _sample(plan, noise), _sample(plan, noise[1:], ROWS[1:])
    np.testing.assert_allclose(both[1:], second, rtol=1e-6, atol=1e-6)
    same = _sample(plan, np.stack([noise[0]] * 2), ROWS)
    assert np.abs(same[0] - same[1]).max() > 0.1


def test_ancestral_steps_keep_the_variance():
    """Equation (1) trades noise that is known for as much that is fresh."""
    ours, plain = _plan("euler-a", 20), _plan("euler", 20)
    assert ours.fresh is not None
    np.testing.assert_allclose(ours.noise**2 + ours.fresh**2, plain.noise**2, rtol=1e-5, atol=1e-7)
    assert np.all(ours.fresh[:-1] > 0) and ours.fresh[-1] == 0


def test_an_ancestral_plan_needs_a_key():
    with pytest.raises(ValueError, match="key"):
        sample(_plan("euler-a"), lambda x, t: x, jnp.asarray(_noise()))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_other_plans_ignore_the_key(sampler):
    plan, noise = _plan(sampler), _noise()
    assert plan.fresh is None
    np.testing.assert_array_equal(_sample(plan, noise, None), _sample(plan, noise))


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_no_key_is_used_twice(sampler):
    plan, noise = _plan(sampler), jnp.asarray(_noise())
    key_reuse.check_key_reuse(lambda key: sample(plan, lambda x, t: x, noise, key), ROWS)


def test_impossible_step_counts_are_refused():
    config = ScheduleConfig(num_train_timesteps=10, steps_offset=1, timestep_spacing="leading")
    for sampler, steps in itertools.product(SAMPLERS, (0, -1, 10, 11)):
        if (sampler, steps) == ("dpm++2m-karras", 10):  # its levels do not depend on the spacing
            continue
        with pytest.raises(UserError, match="steps"):
            make_plan(sampler, config, steps)
    with pytest.raises(UserError, match="heun"):
        make_plan("heun", config, 5)


def test_a_plan_is_an_argument():
    """Two plans of one shape share one compiled program; only fresh noise takes another."""
    compiled = jax.jit(lambda plan, noise: sample(plan, lambda x, t: x, noise, ROWS))
    for sampler, config in itertools.product(DETERMINISTIC, (ScheduleConfig(), ScheduleConfig(beta_end=0.01))):
        compiled(make_plan(sampler, config, 5), _noise())
    assert compiled._cache_size() == 1
    for config in (ScheduleConfig(), ScheduleConfig(beta_end=0.01)):
        compiled(make_plan("euler-a", config, 5), _noise())
    assert compiled._cache_size() == 2
