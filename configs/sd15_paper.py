"""A tuning-encoder for Stable Diffusion 1.5 on what its paper names (arXiv 2307.06925): ImageNet-1K and Open Images.

Open Images shows several objects a picture: every annotated one that is large enough is a concept of its own. Sizes,
rates and weights are ours; nobody has published any. The other recipes for Stable Diffusion start from this one.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for accelerators; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = ConfigDict(
        {
            "stage": "encoder",
            "architecture": "1.5",
            "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "vision": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "dtype": "bfloat16",
            "resolution": 512,
            "output": "",
            "initial": "",
            "data": (
                {"kind": "tfds", "name": "imagenet2012", "split": "train", "data_dir": "", "weight": 0.5},
                {
                    "kind": "tfds",
                    "name": "open_images_v4/300k",
                    "split": "train",
                    "data_dir": "",
                    "boxes": "bobjects",
                    "min_side": 128,
                    "weight": 0.5,
                },
            ),
            "augment": {"crop": 0.8, "flip": True, "min_side": 128},
            "encoder": {"rank": 4, "width": 768, "depth": 4, "heads": 12, "blend": 0.5},
            "weights": {
                "contrastive": 0.002,
                "norm": 3e-4,
                "temperature": 0.1,
                "neighbours": 3,
                "gamma": 5.0,
                "contrastive_warmup": 2000,
            },
            "batch_size": 256,
            "draws": 1,
            "accumulate": 1,
            "remat": True,
            "mesh": {"data": -1, "fsdp": 1},
            "steps": 60_000,
            "seed": 0,
            "ema": 0.9995,
            "optim": {
                "lr": 2e-4,
                "schedule": "cosine",
                "warmup": 1000,
                "decay": 0.1,
                "weight_decay": 0.01,
                "no_decay": "bias|norm|queries",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
            "threads": 16,
            "max_bad_steps": 20,
            "log_every": 50,
            "previews": 8,
            "preview_every": 2000,
            "checkpoint_every": 0,
            "checkpoint_minutes": 15.0,
            "keep": 3,
            "best": {"metric": "", "mode": "max"},
        }
    )
    return smoke(config) if variant == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The recipe on the embedded model, with pictures of its world."""
    config.model, config.vision, config.dtype, config.resolution = "toyworld", "", "float32", 32
    config.data = ({"kind": "world", "count": 64, "size": 64, "weight": 1.0},)
    config.augment.min_side = 16
    config.encoder.update(rank=2, width=32, depth=1, heads=2)
    config.weights.contrastive_warmup = 2
    config.update(batch_size=8, steps=4, previews=4, threads=2, log_every=2, preview_every=0)
    config.optim.update(lr=1e-3, warmup=2)
    return config
