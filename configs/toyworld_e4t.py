"""E4T's encoder of one class of the embedded world (arXiv 2302.12228), the tuning-encoder's rival on that class."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` takes 20 minutes on two cores; `smoke` runs end to end in seconds.

    For another class set `domain` and `data.classes` to it.
    """
    config = ConfigDict(
        {
            "stage": "e4t",
            "domain": "creature",
            "model": "toyworld",
            "vision": "",
            "dtype": "float32",
            "output": "runs/toyworld/e4t_out",
            "initial": "",
            "data": {"classes": ("creature",), "concepts": 2_400, "views": 4, "flat": 0.7, "template_share": 0.25},
            "encoder": {"rank": 4, "width": 256, "depth": 3, "heads": 4},
            "pairs": 0.75,
            "weights": {"norm": 0.01, "gamma": 5.0},
            "batch_size": 48,
            "accumulate": 1,
            "remat": False,
            "steps": 2_000,
            "seed": 3,
            "ema": 0.999,
            "optim": {
                "lr": 8e-4,
                "schedule": "stable",
                "warmup": 150,
                "decay": 0.4,
                "weight_decay": 0.01,
                "no_decay": "bias|norm|queries",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "threads": 2,
            "max_bad_steps": 20,
            "log_every": 50,
            "preview_every": 500,
            "checkpoint_every": 0,
            "checkpoint_minutes": 4.0,
            "keep": 2,
            "best": {"metric": "", "mode": "max"},
        }
    )
    if variant == "smoke":  # and leaves the results of the full one alone
        config.output = "runs/smoke/e4t_out"
        config.data.concepts, config.data.views = 12, 2
        config.encoder.update(width=32, depth=1, rank=2)
        config.batch_size, config.steps, config.preview_every, config.log_every = 8, 4, 0, 2
    return config
