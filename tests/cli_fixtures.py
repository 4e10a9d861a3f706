"""Fixtures of the tests of the command line: fakes in place of the models, and files to give it."""

from argparse import Namespace
from contextlib import contextmanager

import numpy as np
import pytest
from checkpoint_helpers import PATH, concept
from PIL import Image

from datencoder_jax import api, compile_ahead, loading, pipeline
from datencoder_jax.checkpoints.concept_file import save_concept


@pytest.fixture
def calls(monkeypatch):
    """Fakes in place of the three calls of the API; what they were called with."""
    made = {}

    def load(model, **options):
        made["load"] = (model, options)
        schedule = Namespace(prediction_type="epsilon")
        networks = {"unet": Namespace(params={}), "text": None, "vision": None}
        base = Namespace(table=np.zeros((5, 12)), widths=(12,), schedule=schedule, **networks)
        own = {"base": base, "prompts": ("a S*", "S* and S*"), "timings": {"load": 1.0}}
        return Namespace(name=str(model), fingerprint="f" * 32, resolution=32, **own)

    def personalize(pipeline, images, **options):
        made["personalize"] = (images, options)
        report = {"nearest_words": [("robot", np.float32(0.5))], "losses": [1.0, float("nan")], "steps": 12}
        report |= {name: options[name] for name in ("steps",) if name in options}
        blend = options.get("blend", 0.3)
        seconds = {"compile": 2.0, "predict": 0.1, "tune": 3.0}
        found = concept(token=options["token"], blend=blend, nearest_word=options.get("word") or "gömböc")
        return api.Personalized(found, report | {"seconds": seconds})

    def generate(pipeline, prompts, **options):
        made["generate"] = (list(prompts), options)
        images = np.zeros((len(prompts), options["num"], 32, 32, 3), np.uint8)
        images += np.arange(options["num"], dtype=np.uint8)[:, None, None, None]
        return api.Generated(
            images, {"seconds": {"compile": 1.5, "sample": 4.0}, "guidance": 2.0, "blend": options.get("blend", 1.0)}
        )

    @contextmanager
    def compiling_ahead(pipeline, run):
        run(pipeline)
        quiet = [made[name][1].pop("quiet", None) for name in ("personalize", "generate") if name in made]
        made["ahead"] = dict(made, quiet=quiet)
        yield 0.5

    monkeypatch.setattr(compile_ahead, "compiling_ahead", compiling_ahead)
    for function in (load, personalize, generate):
        monkeypatch.setattr(api, function.__name__, function)
    for module in (pipeline, loading):
        monkeypatch.setattr(module, "attention_shapes", lambda unet: {PATH: (8, 6)})
    return made


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "robot.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def concept_file(tmp_path):
    save_concept(tmp_path / "concept.safetensors", concept())
    return str(tmp_path / "concept.safetensors")
