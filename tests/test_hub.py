"""What a person calls a model, and what is fetched for it."""

import pytest
from checkpoint_helpers import refuses

from datencoder_jax.checkpoints import hub

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest_plugins = ("base_fixtures",)


def test_resolve_base(tmp_path, monkeypatch):
    assert hub.resolve_base(tmp_path) == tmp_path
    assert hub.resolve_base("toyworld").parts[-2:] == ("assets", "toyworld")
    refuses("There is no folder", hub.resolve_base, tmp_path / "none")
    refuses("home folder that is not known", hub.resolve_base, "~nosuchuser/x")
    (tmp_path / "sd.ckpt").write_text("")
    refuses("from_single_file", hub.resolve_base, tmp_path / "sd.ckpt")
    refuses("gone .*use stable-diffusion-v1-5/", hub.resolve_base, "runwayml/stable-diffusion-v1-5")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    refuses("cannot be reached .no route", hub.resolve_base, "nobody-at-all/nothing-here")


def test_download_takes_one_set_of_weights():
    files = ["model_index.json", "v1-5-pruned.safetensors", "README.md", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    files += ["scheduler/scheduler_config.json", "safety_checker/model.safetensors", "unet/config.json"]
    files += [f"unet/diffusion_pytorch_model{v}" for v in (".bin", ".safetensors", ".fp16.safetensors")]
    files += ["unet/diffusion_pytorch_model.non_ema.safetensors", "vae/config.json"]
    files += ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors", "datencoder.json"]
    wanted = set(hub.choose_files(files, "a/b"))
    assert wanted == {
        "model_index.json",
        "datencoder.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    refuses("only pickled", hub.choose_files, [f for f in files if "vae" not in f or ".bin" in f], "a/b")
    refuses("not in diffusers format", hub.choose_files, ["model.safetensors"], "a/b")
