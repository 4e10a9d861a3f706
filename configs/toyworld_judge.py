"""The judge of the embedded world: reads who and what a picture shows. Used in evaluation only."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` made the shipped weights; `smoke` runs end to end in seconds."""
    config = ConfigDict(
        {
            "stage": "judge",
            "output": "datencoder_jax/assets/judge",
            "data": {"instances": 9_000, "views": 4, "held_out": 1_000, "size": 32, "flat": 0.55},
            "model": {"widths": (48, 96, 160), "embedding": 64, "norm_num_groups": 8},
            "temperature": 0.1,
            "contrastive_weight": 1.0,
            "probe_weight": 1.0,
            "batch_size": 128,
            "steps": 3_000,
            "seed": 3,
            "ema": 0.995,
            "optim": {
                "lr": 3e-3,
                "schedule": "stable",
                "warmup": 150,
                "decay": 0.5,
                "weight_decay": 0.02,
                "no_decay": "bias|norm|class_embedding|logit_scale",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 100,
            "preview_every": 1000,
            "checkpoint_every": 0,
            "checkpoint_minutes": 3.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.output = "runs/smoke/judge"
        config.data.update(instances=24, views=2, held_out=12)
        config.model.update(widths=(8, 16), embedding=8)
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
