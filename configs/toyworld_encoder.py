"""The embedded world's tuning-encoder."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` takes hours; `smoke` runs end to end in seconds.

    The shipped weights were grown, with `fresh=token_head`, from those of 4,600 steps without `anchors` and with
    `patch_taps` 1, and trained for 8,400 steps of 48 samples with 1 draw, the first 635 of them with all pixels alike
    (`focus` 1), and then for 2,400 of 24 with 4, on other concepts (`seed=5 ema=0.998 optim.lr=6e-4 optim.warmup=100
    optim.decay=0.6`).
    """
    config = ConfigDict(
        {
            "stage": "encoder",
            "model": "toyworld",
            "vision": "",
            "dtype": "float32",
            "output": "runs/toyworld/encoder_out",
            "initial": "",
            "fresh": "",
            "data": {"concepts": 16_000, "views": 4, "flat": 0.7, "template_share": 0.25},
            "encoder": {"rank": 4, "width": 256, "depth": 3, "heads": 4, "blend": 0.5, "patch_taps": 2},
            "anchors": ("creature", "robot", "teapot", "house", "car", "fish"),
            "pairs": 0.75,
            "weights": {
                "contrastive": 0.002,
                "norm": 3e-4,
                "temperature": 0.1,
                "neighbours": 3,
                "gamma": 5.0,
                "contrastive_warmup": 0,
                "focus": 0.2,
            },
            "batch_size": 24,
            "draws": 4,
            "accumulate": 1,
            "remat": False,
            "steps": 16_000,
            "seed": 3,
            "ema": 0.999,
            "optim": {
                "lr": 8e-4,
                "schedule": "stable",
                "warmup": 300,
                "decay": 0.4,
                "weight_decay": 0.01,
                "no_decay": "bias|norm|class_embedding|logit_scale",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 50,
            "preview_every": 1000,
            "checkpoint_every": 0,
            "checkpoint_minutes": 4.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.output = "runs/smoke/encoder"
        config.data.concepts, config.data.views = 12, 2
        config.encoder.update(width=32, depth=1, rank=2)
        config.draws = 2
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
