"""A tuning-encoder for Stable Diffusion 1.5 on shards of LAION, as `img2dataset` writes them, over a pod."""

from ml_collections import ConfigDict
from sd15_paper import get_config as paper
from sd15_paper import smoke


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for a pod; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = paper()
    config.data = ({"kind": "shards", "path": "data/laion", "weight": 1.0},)
    config.update(batch_size=2048, steps=100_000)
    config.optim.update(lr=4e-4, warmup=2000)
    return smoke(config) if variant == "smoke" else config
