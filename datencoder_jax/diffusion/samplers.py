"""Samplers as one linear recurrence.

Write `alpha_t = sqrt(alpha_bar_t)`, `sigma_t = sqrt(1 - alpha_bar_t)` and `lambda_t = log(alpha_t / sigma_t)`. At every
step from `t` to a less noisy `s` the model's output gives `x0` and `eps` (`schedule.to_x0_eps`). Every sampler is then

    x_s = alpha_s x0 + sqrt(sigma_s^2 - f^2) eps + k (x0 - x0_previous) + f z               (1)

with `x0_previous` the estimate of the step before (at `u`), `z ~ N(0, I)` drawn afresh, and `k = f = 0` except for

    k = (alpha_s - sigma_s alpha_t / sigma_t) / (2 r),
        r = (lambda_t - lambda_u) / (lambda_s - lambda_t)                                   (2), DPM-Solver++ 2M
    f = sigma_s sqrt(1 - q_s^2 / q_t^2)                                                     (3), Euler ancestral

The samplers differ further in the levels they visit. Let `q_t = sigma_t / alpha_t`, which Karras et al. call sigma;
`alpha_bar = 1 / (1 + q^2)` leads back. In the variable `x / alpha` an Euler step of their ODE is (1) with `k = f = 0`,
a DDIM step. Between whole timesteps Euler interpolates `q` linearly, and Karras' levels are

    q_i = (q_max^(1/7) + i / (steps - 1) (q_min^(1/7) - q_max^(1/7)))^7                     (4)

DDIM (eta = 0): Song et al. 2021 (arXiv 2010.02502), equation 12. DPM-Solver++ 2M, midpoint: Lu et al. 2022
(arXiv 2211.01095), algorithm 2, whose `(sigma_s / sigma_t) x_t` is expanded by `x_t = alpha_t x0 + sigma_t eps`; its
first and last steps are first order (`k = 0`), which is a DDIM step. Euler and (4): Karras et al. 2022
(arXiv 2206.00364), algorithm 1 and equation 5. Euler ancestral: k-diffusion's `sample_euler_ancestral`, whose
`sigma_up` is `f / alpha_s`; (3) is also DDIM's with eta = 1. In this form nothing is divided by a vanishing `alpha`,
so a v-predicting model may start from zero terminal SNR.

A sampler is a function from a schedule and a number of steps to a `Plan`; `sample` runs any plan. Timesteps, levels
and the choice of `s` follow diffusers' `DDIMScheduler`, `DPMSolverMultistepScheduler`, `EulerDiscreteScheduler` and
`EulerAncestralDiscreteScheduler`.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.diffusion.schedule import ScheduleConfig, exact_alphas_cumprod, to_x0_eps
from datencoder_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]
"""`predict(latents [batch, ...], t float32 scalar) -> model output [batch, ...]`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """The steps of a sampler: a pytree of `[steps]` arrays and one scalar, computed on the host once.

    Attributes:
        timesteps: float32, what the model is called with; Euler's may lie between whole timesteps.
        alpha_bar: `alpha_bar` at those timesteps.
        signal, noise: `alpha_s` and `sqrt(sigma_s^2 - f^2)` of equation (1).
        correction: `k` of equation (1).
        fresh: `f` of equation (1); None where no noise is drawn, so that nothing is computed for it.
        start: scalar, the standard deviation of the first latents.
        prediction_type: what the model predicts.
        clip: the range estimates of `x0` are clipped to; None for no clipping.
    """

    timesteps: jax.Array
    alpha_bar: jax.Array
    signal: jax.Array
    noise: jax.Array
    correction: jax.Array
    fresh: jax.Array | None
    start: jax.Array
    prediction_type: str = field(metadata={"static": True})
    clip: float | None = field(default=None, metadata={"static": True})

    @property
    def steps(self) -> int:
        """How many times the model is called."""
        return self.timesteps.shape[0]


def ddim(config: ScheduleConfig, steps: int) -> Plan:
    """The plan of DDIM with eta = 0."""
    table, count = exact_alphas_cumprod(config), config.num_train_timesteps
    timesteps = _timesteps(config, "leading", steps, points=steps)
    # As in diffusers, s = t - T // steps whatever the spacing, so with `linspace` it is not quite the next timestep.
    following = timesteps - count // steps
    last = 1.0 if config.set_alpha_to_one else table[0]
    alpha_bar_s = np.where(following >= 0, table[np.maximum(following, 0)], last)
    clip = config.clip_sample_range if config.clip_sample else None
    return _plan(config, timesteps, table[timesteps], alpha_bar_s, clip=clip)


def dpm_solver_2m(config: ScheduleConfig, steps: int) -> Plan:
    """The plan of DPM-Solver++ 2M (midpoint), ending without noise; equation (2)."""
    # Of the steps + 1 points of `leading` and `linspace`, the last (t = 0) is where sampling ends, not a model call.
    timesteps = _timesteps(config, "linspace", steps, points=steps + 1)
    return _multistep(config, timesteps, _ratios(config)[timesteps])


def dpm_solver_2m_karras(config: ScheduleConfig, steps: int) -> Plan:
    """The plan of DPM-Solver++ 2M through Karras' levels; equations (2) and (4)."""
    table = _ratios(config)
    ratios = np.linspace(table[-1] ** (1 / 7), table[0] ** (1 / 7), steps) ** 7  # (4)
    timesteps = np.interp(np.log(ratios), np.log(table), np.arange(config.num_train_timesteps))
    return _multistep(config, timesteps.round(), ratios)


def euler(config: ScheduleConfig, steps: int, *, ancestral: bool = False) -> Plan:
    """The plan of Euler's method, ending without noise; ancestral: some noise is drawn anew, equation (3)."""
    timesteps = _timesteps(config, "linspace", steps, points=steps, fractional=True)
    ratios = np.append(np.interp(timesteps, np.arange(config.num_train_timesteps), _ratios(config)), 0.0)
    alpha_bar = 1.0 / (1.0 + ratios**2)
    fresh = np.sqrt((1.0 - alpha_bar[1:]) * (1.0 - (ratios[1:] / ratios[:-1]) ** 2)) if ancestral else None  # (3)
    # As in diffusers, only `leading` counts the clean latents' variance among that of the first ones.
    start = 1.0 if config.timestep_spacing == "leading" else np.sqrt(1.0 - alpha_bar[0])
    return _plan(config, timesteps, alpha_bar[:-1], alpha_bar[1:], fresh=fresh, start=start)


SAMPLERS: dict[str, Callable[[ScheduleConfig, int], Plan]] = {
    "ddim": ddim,
    "dpm++2m": dpm_solver_2m,
    "dpm++2m-karras": dpm_solver_2m_karras,
    "euler": euler,
    "euler-a": functools.partial(euler, ancestral=True),
}
"""Samplers by the name a person gives."""


def make_plan(sampler: str, config: ScheduleConfig, steps: int) -> Plan:
    """The plan of a sampler given by name; an unknown name or impossible number of steps is a `UserError`."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is not known; choose one of: {', '.join(SAMPLERS)}")
    count = config.num_train_timesteps
    if not 1 <= steps <= count:
        raise UserError(f"steps is {steps}; choose between 1 and {count}, the timesteps of this model's schedule")
    return SAMPLERS[sampler](config, steps)


def sample(plan: Plan, predict: Predict, noise: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Runs a plan as one `lax.scan`.

    Args:
        plan: from `make_plan`.
        predict: the denoiser, called as `predict(latents, t)` with float32 latents and a scalar timestep.
        noise: `[batch, ...]`, a standard normal draw.
        key: `[batch]` keys, one per row so that no row depends on those beside it, and others than `noise` was drawn
            with; read only by plans that draw noise at every step.

    Returns:
        Clean latents `[batch, ...]`, float32.

    Raises:
        ValueError: the plan draws noise and there is no `key`.
    """
    if plan.fresh is not None and key is None:
        raise ValueError("this plan draws noise at every step: give a key for each row")

    def step(carry, each: tuple[jax.Array, Plan]):
        (x_t, previous), (index, at) = carry, each
        prediction = predict(x_t, at.timesteps).astype(jnp.float32)
        x0, eps = to_x0_eps(prediction, x_t, at.alpha_bar, at.prediction_type)
        if at.clip is not None:
            x0 = jnp.clip(x0, -at.clip, at.clip)
        x_s = at.signal * x0 + at.noise * eps + at.correction * (x0 - previous)  # (1)
        if at.fresh is not None:
            x_s += at.fresh * draw(index)
        return (x_s, x0), None

    def draw(index):
        return jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(row, index), noise.shape[1:]))(key)

    x_t = plan.start * noise.astype(jnp.float32)
    each = jnp.arange(plan.steps), dataclasses.replace(plan, start=None)
    # The first step's correction is zero, so what stands in for its `x0_previous` does not matter.
    (latents, _), _ = jax.lax.scan(step, (x_t, jnp.zeros_like(x_t)), each)
    return latents


def _timesteps(
    config: ScheduleConfig, default: str, steps: int, *, points: int, fractional: bool = False
) -> np.ndarray:
    """The first `steps` of `points` descending timesteps, spaced as the configuration or else the `default` says."""
    count, spacing = config.num_train_timesteps, config.timestep_spacing or default
    if spacing == "linspace":
        timesteps = np.linspace(0, count - 1, points)[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(points) * (count // points))[::-1] + config.steps_offset
    elif spacing == "trailing":
        # Written as diffusers does, so that halves round alike; the slice below drops the extra element this can give.
        timesteps = np.arange(count, 0, -count / steps).round() - 1
    else:
        raise UserError(f"ScheduleConfig: timestep_spacing {spacing!r} is not supported")
    timesteps = timesteps[:steps]
    if not fractional:
        timesteps = timesteps.round().astype(np.int64)
    if timesteps[0] >= count or np.any(np.diff(timesteps) >= 0):
        raise UserError(
            f"steps is {steps}, too many for {spacing!r} spacing of {count} timesteps with "
            f"steps_offset {config.steps_offset}; choose fewer steps"
        )
    return timesteps


def _ratios(config: ScheduleConfig) -> np.ndarray:
    """`q` `[T]` at the whole timesteps."""
    alpha_bar = exact_alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        alpha_bar[-1] = 2.0**-24  # diffusers' floor: q and lambda stay finite at zero terminal SNR
    return np.sqrt((1.0 - alpha_bar) / alpha_bar)


def _multistep(config: ScheduleConfig, timesteps: np.ndarray, ratios: np.ndarray) -> Plan:
    """The plan of DPM-Solver++ 2M through the levels `q`; equation (2)."""
    alpha_bar = np.append(1.0 / (1.0 + ratios**2), 1.0)
    correction = np.zeros(len(timesteps))
    if len(timesteps) > 2:
        alpha, sigma = np.sqrt(alpha_bar[:-1]), np.sqrt(1.0 - alpha_bar[:-1])
        gap = np.diff(np.log(alpha / sigma))
        r = gap[:-1] / gap[1:]
        correction[1:-1] = (alpha[2:] - sigma[2:] * alpha[1:-1] / sigma[1:-1]) / (2.0 * r)  # (2)
    return _plan(config, timesteps, alpha_bar[:-1], alpha_bar[1:], correction=correction)


def _plan(
    config: ScheduleConfig,
    timesteps: np.ndarray,
    alpha_bar: np.ndarray,
    alpha_bar_s: np.ndarray,
    *,
    correction: np.ndarray | float = 0.0,
    fresh: np.ndarray | None = None,
    start: float = 1.0,
    clip: float | None = None,
) -> Plan:
    variance = 1.0 - alpha_bar_s if fresh is None else 1.0 - alpha_bar_s - fresh**2
    correction = np.broadcast_to(correction, alpha_bar.shape)
    arrays = (timesteps, alpha_bar, np.sqrt(alpha_bar_s), np.sqrt(variance), correction, fresh, np.asarray(start))
    arrays = jax.tree.map(lambda array: array.astype(np.float32), arrays)
    return Plan(*arrays, prediction_type=config.prediction_type, clip=clip)
