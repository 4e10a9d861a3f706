"""E4T for faces, on Stable Diffusion 1.5 (arXiv 2302.12228): FFHQ's pictures as a folder.

The penalty is the paper's; the domain's word and 30,000 steps of 16 pictures are as others have implemented it for
Stable Diffusion (mkshing/e4t-diffusion); sizes of the encoder, the rank of the shared offsets and rates are ours.
"""

from ml_collections import ConfigDict
from sd15_paper import get_config as paper
from sd15_paper import smoke


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for accelerators; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = paper()
    config.update(stage="e4t", domain="face", batch_size=16, steps=30_000)
    config.data = ({"kind": "folder", "path": "data/ffhq", "weight": 1.0},)
    config.optim.lr = 1e-4
    if variant == "smoke":
        config = smoke(config)
        config.domain = "creature"
    config.weights = ConfigDict({"norm": 0.01, "gamma": 5.0})
    del config.encoder["blend"], config["draws"]
    return config
