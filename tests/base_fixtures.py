"""Fixtures of the tests of base models on disk: a tiny model, and folders it is written to."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_helpers import TOWER, UNET, VAE, VISION, random_model

from datencoder_jax.checkpoints.components import COMPONENTS
from datencoder_jax.checkpoints.folders import BaseParts, write_base
from datencoder_jax.models.clip_text import CLIPTextConfig
from datencoder_jax.models.clip_vision import CLIPVisionConfig
from datencoder_jax.models.unet import UNetConfig
from datencoder_jax.models.vae import VAEConfig
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_options(tokenizer):
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    return dict(**TOWER, hidden_size=12, vocab_size=words, max_position_embeddings=MAX_LENGTH, eos_token_id=words - 1)


@pytest.fixture(scope="session")
def parts(tokenizer, text_options):
    configs = {
        "unet": UNetConfig(**UNET),
        "vae": VAEConfig(**VAE),
        "text_encoder": CLIPTextConfig(**text_options),
        "image_encoder": CLIPVisionConfig(**VISION, with_projection=True),
    }
    models = {}
    for i, (name, config) in enumerate(configs.items()):
        kind = COMPONENTS[name].kind
        models[name] = random_model(kind, config, i)
    extractor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    return BaseParts(**models, scheduler=scheduler, tokenizer=tokenizer, feature_extractor=extractor)


@pytest.fixture(scope="session")
def written(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "base"
    write_base(folder, parts, dtype="float32")
    return folder


@pytest.fixture
def base(written, tmp_path):
    """A folder to damage."""
    return Path(shutil.copytree(written, tmp_path / "base"))
