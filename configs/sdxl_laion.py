"""A tuning-encoder for Stable Diffusion XL on shards of LAION; the frozen weights lie in shares on eight devices."""

from ml_collections import ConfigDict
from sd15_laion import get_config as sd15
from sd15_paper import smoke


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for a pod; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = sd15()
    config.update(architecture="XL", model="stabilityai/stable-diffusion-xl-base-1.0", resolution=1024)
    config.augment.min_side = 512
    config.mesh.fsdp = 8
    if variant == "smoke":
        config.mesh.fsdp = 1
        return smoke(config)
    return config
