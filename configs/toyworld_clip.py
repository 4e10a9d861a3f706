"""The embedded world's CLIP: a text and a vision tower, contrastively trained on captioned pictures."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` made the shipped weights; `smoke` runs end to end in seconds."""
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
        "hidden_act": "gelu",
    }
    config = ConfigDict(
        {
            "stage": "clip",
            "base": "runs/toyworld/base",
            "data": {"count": 80_000, "size": 32, "flat": 0.7},
            "text": tower,
            "vision": {**tower, "image_size": 32, "patch_size": 4},
            "batch_size": 128,
            "steps": 1_200,
            "seed": 1,
            "ema": 0.998,
            "optim": {
                "lr": 1e-3,
                "schedule": "stable",
                "warmup": 300,
                "decay": 0.4,
                "weight_decay": 0.05,
                "no_decay": "bias|norm|class_embedding|logit_scale",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.98,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 100,
            "preview_every": 900,
            "checkpoint_every": 0,
            "checkpoint_minutes": 3.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.base = "runs/smoke/base"
        config.data.count = 64
        for part in (config.text, config.vision):
            part.update(hidden_size=16, intermediate_size=32, projection_dim=16)
            part.update(num_hidden_layers=1, num_attention_heads=2)
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
