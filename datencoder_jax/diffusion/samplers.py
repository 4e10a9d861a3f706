"""Deterministic samplers as one linear recurrence.

Write `alpha_t = sqrt(alpha_bar_t)`, `sigma_t = sqrt(1 - alpha_bar_t)` and `lambda_t = log(alpha_t / sigma_t)`. At every
step from `t` to a less noisy `s` the model's output gives `x0` and `eps` (`schedule.to_x0_eps`). Both samplers are then

    x_s = alpha_s x0 + sigma_s eps + k (x0 - x0_previous)                                   (1)

with `x0_previous` the estimate of the step before (at `u`), and

    k = 0                                                                                   (2), DDIM
    k = (alpha_s - sigma_s alpha_t / sigma_t) / (2 r),
        r = (lambda_t - lambda_u) / (lambda_s - lambda_t)                                   (3), DPM-Solver++ 2M

DDIM (eta = 0): Song et al. 2021 (arXiv 2010.02502), equation 12. DPM-Solver++ 2M, midpoint: Lu et al. 2022
(arXiv 2211.01095), algorithm 2, whose `(sigma_s / sigma_t) x_t` is expanded by `x_t = alpha_t x0 + sigma_t eps`; its
first and last steps are first order (`k = 0`), which is a DDIM step. In this form nothing is divided by a vanishing
`alpha`, so a v-predicting model may start from zero terminal SNR.

A sampler is a function from a schedule and a number of steps to a `Plan`; `sample` runs any plan. Timesteps and the
choice of `s` follow diffusers' `DDIMScheduler` and `DPMSolverMultistepScheduler`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.diffusion.schedule import ScheduleConfig, exact_alphas_cumprod, to_x0_eps
from datencoder_jax.errors import UserError

Predict = Callable[[jax.Array, jax.Array], jax.Array]
"""`predict(latents [batch, ...], t int32 scalar) -> model output [batch, ...]`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """The steps of a sampler: a pytree of `[steps]` arrays, computed on the host once.

    Attributes:
        timesteps: int32, what the model is called with.
        alpha_bar: `alpha_bar` at those timesteps.
        signal, noise: `alpha_s` and `sigma_s` of equation (1).
        correction: `k` of equation (1).
        prediction_type: what the model predicts.
        clip: the range estimates of `x0` are clipped to; None for no clipping.
    """

    timesteps: jax.Array
    alpha_bar: jax.Array
    signal: jax.Array
    noise: jax.Array
    correction: jax.Array
    prediction_type: str = field(metadata={"static": True})
    clip: float | None = field(default=None, metadata={"static": True})

    @property
    def steps(self) -> int:
        """How many times the model is called."""
        return self.timesteps.shape[0]


def ddim(config: ScheduleConfig, steps: int) -> Plan:
    """The plan of DDIM with eta = 0; equations (1) and (2)."""
    table, count = exact_alphas_cumprod(config), config.num_train_timesteps
    timesteps = _timesteps(config, steps, points=steps)
    # As in diffusers, s = t - T // steps whatever the spacing, so with `linspace` it is not quite the next timestep.
    following = timesteps - count // steps
    last = 1.0 if config.set_alpha_to_one else table[0]
    alpha_bar_s = np.where(following >= 0, table[np.maximum(following, 0)], last)
    clip = config.clip_sample_range if config.clip_sample else None
    return _plan(timesteps, table[timesteps], alpha_bar_s, np.zeros(steps), config.prediction_type, clip)


def dpm_solver_2m(config: ScheduleConfig, steps: int) -> Plan:
    """The plan of DPM-Solver++ 2M (midpoint), ending without noise; equations (1) and (3)."""
    table = exact_alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        table[-1] = 2.0**-24  # diffusers' floor: lambda stays finite at zero terminal SNR
    # Of the steps + 1 points of `leading` and `linspace`, the last (t = 0) is where sampling ends, not a model call.
    timesteps = _timesteps(config, steps, points=steps + 1)
    alpha_bar = np.append(table[timesteps], 1.0)

    correction = np.zeros(steps)
    if steps > 2:
        alpha, sigma = np.sqrt(alpha_bar[:-1]), np.sqrt(1.0 - alpha_bar[:-1])
        gap = np.diff(np.log(alpha / sigma))
        r = gap[:-1] / gap[1:]
        correction[1:-1] = (alpha[2:] - sigma[2:] * alpha[1:-1] / sigma[1:-1]) / (2.0 * r)
    return _plan(timesteps, alpha_bar[:-1], alpha_bar[1:], correction, config.prediction_type, None)


SAMPLERS: dict[str, Callable[[ScheduleConfig, int], Plan]] = {"ddim": ddim, "dpm++2m": dpm_solver_2m}
"""Samplers by the name a person gives."""


def make_plan(sampler: str, config: ScheduleConfig, steps: int) -> Plan:
    """The plan of a sampler given by name; an unknown name or impossible number of steps is a `UserError`."""
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is not known; choose one of: {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler](config, steps)


def sample(plan: Plan, predict: Predict, noise: jax.Array) -> jax.Array:
    """Runs a plan as one `lax.scan`.

    Args:
        plan: from `make_plan`.
        predict: the denoiser, called as `predict(latents, t)` with float32 latents and a scalar timestep.
        noise: `[batch, ...]`, a standard normal draw.

    Returns:
        Clean latents `[batch, ...]`, float32.
    """

    def step(carry, at: Plan):
        x_t, previous = carry
        prediction = predict(x_t, at.timesteps).astype(jnp.float32)
        x0, eps = to_x0_eps(prediction, x_t, at.alpha_bar, at.prediction_type)
        if at.clip is not None:
            x0 = jnp.clip(x0, -at.clip, at.clip)
        x_s = at.signal * x0 + at.noise * eps + at.correction * (x0 - previous)  # (1)
        return (x_s, x0), None

    noise = noise.astype(jnp.float32)
    # The first step's correction is zero, so what stands in for its `x0_previous` does not matter.
    (latents, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), plan)
    return latents


def _timesteps(config: ScheduleConfig, steps: int, *, points: int) -> np.ndarray:
    """The first `steps` of `points` descending timesteps, spaced as the configuration says."""
    count = config.num_train_timesteps
    if not 1 <= steps <= count:
        raise UserError(f"steps is {steps}; choose between 1 and {count}, the timesteps of this model's schedule")
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, count - 1, points).round()[::-1]
    elif config.timestep_spacing == "leading":
        timesteps = (np.arange(points) * (count // points))[::-1] + config.steps_offset
    elif config.timestep_spacing == "trailing":
        # Written as diffusers does, so that halves round alike; the slice below drops the extra element this can give.
        timesteps = np.arange(count, 0, -count / steps).round() - 1
    else:
        raise UserError(f"ScheduleConfig: timestep_spacing {config.timestep_spacing!r} is not supported")
    timesteps = timesteps[:steps].astype(np.int64)
    if timesteps[0] >= count or np.any(np.diff(timesteps) >= 0):
        raise UserError(
            f"steps is {steps}, too many for {config.timestep_spacing!r} spacing of {count} timesteps with "
            f"steps_offset {config.steps_offset}; choose fewer steps"
        )
    return timesteps


def _plan(timesteps, alpha_bar, alpha_bar_s, correction, prediction_type: str, clip: float | None) -> Plan:
    columns = (alpha_bar, np.sqrt(alpha_bar_s), np.sqrt(1.0 - alpha_bar_s), correction)
    return Plan(
        timesteps.astype(np.int32),
        *(column.astype(np.float32) for column in columns),
        prediction_type=prediction_type,
        clip=clip,
    )
