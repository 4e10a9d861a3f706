"""The embedded world's recipes, run one after another as a person runs them, and what they make."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from line_task import compile_quickly, records
from PIL import Image
from tiny import random_params

from datencoder_jax import api
from datencoder_jax.checkpoints.concept_file import load_concept
from datencoder_jax.checkpoints.folders import read_component
from datencoder_jax.cli import main
from datencoder_jax.errors import UserError
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.toyworld.dataset import prerender
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT
from datencoder_jax.training import encoder_stage, stages
from datencoder_jax.training.vae import encode_latents

CONFIGS = Path(__file__).parent.parent / "configs"
BATCH = 8


def train(stage, workdir, *settings):
    """On one device, whose programs take less to compile than those of eight."""
    recipe = ["--config", str(CONFIGS / f"toyworld_{stage}.py"), "--variant", "smoke", "--workdir", str(workdir)]
    return main(["pretrain", *recipe, "--set", "mesh.data=1", *settings])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work folders of the four stages that make a base model and its encoder."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("vae", "clip", "denoiser", "tuning_encoder"):
            # One program per shape of a parameter would take most of the time.
            patch.setattr(f"datencoder_jax.training.{module}.init_params", lambda kind, config, _: drawn(kind, config))
        compile_quickly(patch)
        assert train("vae", root / "vae", f"base={root / 'base'}") == 0
        assert train("clip", root / "clip", f"base={root / 'base'}") == 0
        assert train("unet", root / "unet", f"base={root / 'base'}", f"output={root / 'model'}") == 0
        assert train("encoder", root / "encoder", f"model={root / 'model'}", f"output={root / 'out'}") == 0
    return root


def drawn(kind, config):
    return jax.device_put(random_params(kind, config, 0))


def test_the_recipes_run_one_after_another(trained):
    for stage in ("vae", "clip", "unet", "encoder"):
        log = records(trained / stage)
        assert [record["step"] for record in log] == [2, 4, 4]
        assert all(np.isfinite(list(record.values())).all() for record in log)
        assert any(name.startswith("preview/") for name in log[-1])
        assert (trained / stage / "preview_0000004.png").stat().st_size > 100
    alarms = {"denoise", "contrastive", "nearest_cosine", "words", "concept_cosine", "norm", "offset_norm"}
    assert alarms <= set(log[0]) and 1 <= log[0]["words"] <= BATCH


def test_what_they_made_is_a_model_with_its_encoder(trained, tmp_path):
    Image.fromarray(prerender("test", 1, workers=1)["images"][0]).save(tmp_path / "shot.png")
    given = ["--model", str(trained / "model"), "--encoder", str(trained / "out")]
    shown = ["--steps", "0", "--num", "1", "--sampling-steps", "1", "--prompt", "a photo of a S*"]
    assert main(["personalize", str(tmp_path / "shot.png"), *given, *shown, "--out", str(tmp_path / "out")]) == 0
    concept = load_concept(tmp_path / "out" / "concept.safetensors")
    assert concept.embeddings.shape == (1, 16) and next(iter(concept.offsets.values())).down.shape[1] == 2
    assert (tmp_path / "out" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_fingerprint": "0" * 32}, "another base model"),
        ({"vision_fingerprint": "0" * 16}, "another vision tower"),
        ({"inventory": [["elsewhere", 16, 16]]}, "does not fill"),
    ],
)
def test_an_encoder_of_another_model_is_refused(trained, tmp_path, changes, message):
    shutil.copytree(trained / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if "inventory" in changes:
        changes = {"inventory": [*changes["inventory"], *config["inventory"][1:]]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        api.load(trained / "model", encoder=tmp_path / "out")


def test_latents_have_unit_deviation(trained):
    vae = read_component(trained / "model", "vae", AutoencoderKL, VAEConfig)
    latents = encode_latents(vae, prerender("validation", 256, workers=1)["images"])
    assert latents.astype(np.float32).std() == pytest.approx(1.0, abs=0.02)


def test_a_finished_stage_does_nothing_more(trained, capsys):
    before = (trained / "vae" / "metrics.jsonl").read_bytes()
    train("vae", trained / "vae", f"base={trained / 'base'}")
    assert "step 4 of 4: this run is complete" in capsys.readouterr().out
    assert (trained / "vae" / "metrics.jsonl").read_bytes() == before


def test_a_unet_is_not_continued_on_another_vae(trained, tmp_path, capsys):
    """What a stage reads is part of what its checkpoints belong to."""
    shutil.copytree(trained / "base", tmp_path / "base")
    shutil.copytree(trained / "unet", tmp_path / "unet")
    vae = tmp_path / "base" / "vae"
    shutil.rmtree(vae)
    model = read_component(trained / "base", "vae", AutoencoderKL, VAEConfig)
    changed = model.with_params({name: value + 0.5 for name, value in model.params.items()})
    stages.write_component(vae, changed, dtype="float32")
    assert train("unet", tmp_path / "unet", f"base={tmp_path / 'base'}", f"output={trained / 'model'}") == 2
    assert "has read something else: vae " in capsys.readouterr().err


def test_stages_train_on_their_split_alone(trained, tmp_path, monkeypatch):
    """No test instance and no held-out class reaches training."""
    asked = []

    class ReadyToTrain(Exception):
        pass

    def spy(module, name):
        real = getattr(module, name)

        def recorded(*args, **options):
            asked.append((name, args))
            return real(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    def fit(*_, **__):
        raise ReadyToTrain

    for module in (stages, encoder_stage):
        monkeypatch.setattr(module, "fit", fit)
    spy(stages, "prerender")
    spy(stages, "render_views")
    spy(encoder_stage, "concept_views")
    for stage in ("vae", "clip", "unet", "judge", "encoder", "e4t"):
        more = [f"model={trained / 'model'}"] if stage in ("encoder", "e4t") else []
        more += [f"base={trained / 'base'}"] if stage in ("vae", "clip", "unet") else []
        with pytest.raises(ReadyToTrain):
            train(stage, tmp_path / stage, *more)
    splits = [(name, args[1] if name == "concept_views" else args[0]) for name, args in asked]
    assert {split for _, split in splits} == {"train", "validation"}
    assert [split for name, split in splits if name == "concept_views"] == ["train", "validation"] * 2
    training, _, *domain = (args for name, args in asked if name == "concept_views")
    assert set(training[4]) == set(CLASSES) - set(HELD_OUT) and HELD_OUT
    assert [args[4] for args in domain] == [("creature",), ("creature",)]
