"""The embedded world's autoencoder: 32 px pictures to 8 x 8 latents."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` made the shipped weights; `smoke` runs end to end in seconds."""
    config = ConfigDict(
        {
            "stage": "vae",
            "base": "runs/toyworld/base",
            "data": {"count": 60_000, "size": 32, "flat": 0.7},
            "model": {
                "block_out_channels": (24, 64, 128),
                "layers_per_block": 1,
                "latent_channels": 12,
                "norm_num_groups": 8,
                "sample_size": 32,
                "scaling_factor": 1.0,
            },
            "kl_weight": 5e-4,
            "batch_size": 16,
            "steps": 5_500,
            "seed": 0,
            "ema": 0.998,
            "optim": {
                "lr": 2e-3,
                "schedule": "stable",
                "warmup": 200,
                "decay": 0.4,
                "weight_decay": 1e-4,
                "no_decay": "bias|norm|class_embedding|logit_scale",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 100,
            "preview_every": 2500,
            "checkpoint_every": 0,
            "checkpoint_minutes": 3.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.base = "runs/smoke/base"
        config.data.count = 64
        config.model.block_out_channels = (8, 8)
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
