"""A tuning-encoder for one domain, faces, as E4T has it (arXiv 2302.12228): FFHQ's pictures as a folder."""

from ml_collections import ConfigDict
from sd15_paper import get_config as paper
from sd15_paper import smoke


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for accelerators; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = paper()
    config.data = ({"kind": "folder", "path": "data/ffhq", "weight": 1.0},)
    config.update(batch_size=64, steps=30_000)
    config.optim.lr = 1e-4
    return smoke(config) if variant == "smoke" else config
