"""The optimiser every recipe uses: AdamW, clipped, warmed up, held, and decayed at the end."""

from typing import Any

import optax


def warmup_stable_decay(peak: float, steps: int, warmup: int, decay: float) -> optax.Schedule:
    """Linear warm-up over `warmup` steps, then `peak`, then linear to zero over the last `decay` (share) of `steps`."""
    tail = max(int(decay * steps), 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, tail),
        ],
        [max(warmup, 1), max(steps - tail, max(warmup, 1) + 1)],
    )


def adamw(config) -> optax.GradientTransformation:
    """AdamW from a recipe's `optim` section (`lr, warmup, decay, weight_decay, clip, b2`) and its number of steps.

    Weight decay is kept off biases, norms and embeddings' scales: every parameter of fewer than two dimensions.
    """
    optim = config.optim
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            warmup_stable_decay(optim.lr, config.steps, optim.warmup, optim.decay),
            b1=0.9,
            b2=optim.b2,
            weight_decay=optim.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Any) -> dict[str, bool]:
    return {name: value.ndim > 1 for name, value in params.items()}
