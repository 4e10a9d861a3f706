"""The variance-preserving noise schedule and the quantities a denoiser may predict.

With `a = alpha_bar_t` in [0, 1], a clean latent `x0` and noise `eps ~ N(0, I)`:

    alpha_bar_t = prod_{s <= t} (1 - beta_s)                                (1)
    x_t = sqrt(a) x0 + sqrt(1 - a) eps                                      (2)
    v   = sqrt(a) eps - sqrt(1 - a) x0                                      (3)

    x0  = (x_t - sqrt(1 - a) eps) / sqrt(a)                                 (4), when the model predicts epsilon
    x0  = sqrt(a) x_t - sqrt(1 - a) v                                       (5), when it predicts v
    eps = sqrt(a) v + sqrt(1 - a) x_t                                       (6)

    snr = a / (1 - a)                                                       (7)
    w   = min(1, gamma / snr)              (epsilon)                        (8)
    w   = min(1, (gamma + 1) / (snr + 1))  (v)                              (9)

(1), (2), (4): Ho et al. 2020 (arXiv 2006.11239). (3), (5), (6): Salimans and Ho 2022 (arXiv 2202.00512).
(8): Min-SNR weighting, Hang et al. 2023 (arXiv 2303.09556). (9) is ours: it caps the weight of nearly clean inputs as
min-SNR does but keeps that of the noisiest ones, where class and layout are decided. The schedule itself is computed
once on the host in float64 and rounded to float32 at the end; only the factors of (1) are rounded before, as diffusers'
are, so that the tables agree to the last digits.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.errors import UserError
from datencoder_jax.models.config import ConfigMixin

# What diffusers assumes for options that a scheduler_config.json leaves out depends on the class that wrote it.
_PIXEL = {"clip_sample": True, "set_alpha_to_one": True}
_SIGMA = {"set_alpha_to_one": True}
_CLASS_DEFAULTS = {
    "DDIMScheduler": _PIXEL,
    "DDIMParallelScheduler": _PIXEL,
    "DDPMScheduler": _PIXEL,
    "PNDMScheduler": {},
    "DPMSolverMultistepScheduler": _SIGMA,
    "DPMSolverSinglestepScheduler": _SIGMA,
    "UniPCMultistepScheduler": _SIGMA,
    "EulerDiscreteScheduler": _SIGMA,
    "EulerAncestralDiscreteScheduler": _SIGMA,
    "HeunDiscreteScheduler": _SIGMA,
    "LMSDiscreteScheduler": _SIGMA,
    "DEISMultistepScheduler": _SIGMA,
    "DPMSolverSDEScheduler": _SIGMA,
    "KDPM2DiscreteScheduler": _SIGMA,
    "KDPM2AncestralDiscreteScheduler": _SIGMA,
    "SASolverScheduler": _SIGMA,
}


@dataclass(frozen=True)
class ScheduleConfig(ConfigMixin):
    """The options of a diffusers `scheduler_config.json` that define the diffusion process; hashable.

    Options that choose or refine a diffusers sampler (its class, solver order, Karras spacing) are ignored: samplers
    are chosen by name in `samplers.SAMPLERS`.

    Attributes:
        num_train_timesteps: steps `T` of the process; timesteps are 0 .. T - 1.
        beta_start, beta_end, beta_schedule: `linear`, `scaled_linear` (linear in sqrt(beta)) or `squaredcos_cap_v2`.
        trained_betas: the betas themselves, overriding the three above.
        prediction_type: `epsilon` or `v_prediction`.
        timestep_spacing: how a sampler picks its timesteps: `leading`, `trailing` or `linspace`; None, as in the files
            of Stable Diffusion 1 and 2, leaves it to the sampler: `leading` for DDIM, `linspace` for the others.
        steps_offset: added to `leading` timesteps.
        set_alpha_to_one: DDIM's last step goes to `alpha_bar = 1` instead of `alpha_bar_0`.
        clip_sample, clip_sample_range: DDIM clips its estimates of `x0`.
        rescale_betas_zero_snr: shift the schedule to zero terminal SNR (arXiv 2305.08891); needs `v_prediction`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    _required: ClassVar[dict[str, tuple]] = {
        "thresholding": (False, None),
        "use_flow_sigmas": (False, None),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace", None),
        "timestep_type": ("discrete", None),
        "interpolation_type": ("linear", None),
        "final_sigmas_type": ("zero", None),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }

    def __post_init__(self):
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"ScheduleConfig: trained_betas holds {len(self.trained_betas)} values but num_train_timesteps is "
                f"{self.num_train_timesteps}; make them equal"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError("ScheduleConfig: rescale_betas_zero_snr needs prediction_type='v_prediction', not epsilon")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From the content of a `scheduler_config.json`; an unsupported option or scheduler is a `UserError`."""
        name = values.get("_class_name", "PNDMScheduler")
        if name not in _CLASS_DEFAULTS:
            known = ", ".join(_CLASS_DEFAULTS)
            raise UserError(f"ScheduleConfig: scheduler {name} is not supported; supported: {known}")
        return super().from_dict({**_CLASS_DEFAULTS[name], **values})


@functools.cache
def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """`alpha_bar` `[T]` float32 on the host, read-only; equation (1)."""
    table = exact_alphas_cumprod(config).astype(np.float32)
    table.setflags(write=False)
    return table


def exact_alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """`alpha_bar` `[T]` float64, for computing coefficients on the host."""
    alpha_bar = np.cumprod((1.0 - _betas(config)).astype(np.float32), dtype=np.float64)  # (1)
    if config.rescale_betas_zero_snr:
        # Algorithm 1 of arXiv 2305.08891: shift sqrt(alpha_bar) to end at 0, scale it to start as before.
        signal = np.sqrt(alpha_bar)
        alpha_bar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return alpha_bar


def _betas(config: ScheduleConfig) -> np.ndarray:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), count) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":
        cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - cosine[1:] / cosine[:-1], 0.999)
    raise UserError(f"ScheduleConfig: beta_schedule {config.beta_schedule!r} is not supported")


def _levels(alpha_bar: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sqrt(a)` and `sqrt(1 - a)` in `like`'s type; from `[batch]` shaped to multiply `like` `[batch, ...]`."""
    alpha_bar = jnp.asarray(alpha_bar, jnp.float32)
    if alpha_bar.ndim:
        alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (like.ndim - alpha_bar.ndim))
    return jnp.sqrt(alpha_bar).astype(like.dtype), jnp.sqrt(1.0 - alpha_bar).astype(like.dtype)


def stratified_timesteps(key: jax.Array, count: int, steps: int, levels: jax.Array | None = None) -> jax.Array:
    """`count` timesteps in 0 .. steps - 1, int32 `[count]`, ascending: a uniform draw from each of `count` equal bands.

    Each is uniform over the schedule when its row is, and their mean varies less than that of independent draws.

    Args:
        levels: where the lowest band begins and the highest ends, as shares of the schedule, `[2]`; None for all of it.
    """
    low, high = (0.0, 1.0) if levels is None else levels
    bands = jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, (count,))
    return jnp.minimum((steps * low + bands * (steps * (high - low) / count)).astype(jnp.int32), steps - 1)


def add_noise(x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """The noisy `x_t` `[batch, ...]` of `x0` and `noise`, with `alpha_bar` `[batch]` or scalar; equation (2)."""
    signal_level, noise_level = _levels(alpha_bar, x0)
    return signal_level * x0 + noise_level * noise


def velocity(x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    """`v` `[batch, ...]` of `x0` and `noise`, with `alpha_bar` `[batch]` or scalar; equation (3)."""
    signal_level, noise_level = _levels(alpha_bar, x0)
    return signal_level * noise - noise_level * x0


def target(x0: jax.Array, noise: jax.Array, alpha_bar: jax.Array, prediction_type: str) -> jax.Array:
    """What a model of this `prediction_type` should output for `add_noise(x0, noise, alpha_bar)`."""
    _check(prediction_type)
    return noise if prediction_type == "epsilon" else velocity(x0, noise, alpha_bar)


def to_x0_eps(
    prediction: jax.Array, x_t: jax.Array, alpha_bar: jax.Array, prediction_type: str
) -> tuple[jax.Array, jax.Array]:
    """The clean latents and the noise that a model's output implies; equations (4) to (6).

    Args:
        prediction, x_t: `[batch, ...]`, of one type.
        alpha_bar: `[batch]` or scalar; above 0 when the prediction is epsilon.
        prediction_type: `epsilon` or `v_prediction`.

    Returns:
        `x0` and `eps`, both `[batch, ...]`.
    """
    _check(prediction_type)
    signal_level, noise_level = _levels(alpha_bar, x_t)
    if prediction_type == "epsilon":
        return (x_t - noise_level * prediction) / signal_level, prediction
    return signal_level * x_t - noise_level * prediction, signal_level * prediction + noise_level * x_t


def snr(alpha_bar: jax.Array) -> jax.Array:
    """Signal-to-noise ratio, elementwise; equation (7)."""
    return alpha_bar / (1.0 - alpha_bar)


def snr_weight(alpha_bar: jax.Array, gamma: float, prediction_type: str) -> jax.Array:
    """Weight of the denoising loss, elementwise; equations (8) and (9). `gamma` is 5 in the Min-SNR paper."""
    _check(prediction_type)
    # (8) by the reciprocal, so that it is 1 at zero terminal SNR; (9) is written in alpha_bar = snr / (snr + 1).
    capped = gamma / snr(alpha_bar) if prediction_type == "epsilon" else (gamma + 1.0) * (1.0 - alpha_bar)
    return jnp.minimum(1.0, capped)


def _check(prediction_type: str) -> None:
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"prediction_type {prediction_type!r} is not supported; use 'epsilon' or 'v_prediction'")
