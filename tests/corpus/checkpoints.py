"""Bad checkpoints: diffusers folders, encoders and files."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compvis
import numpy as np
from safetensors.numpy import load_file, save_file

from corpus import files, models
from corpus.case import Kind
from corpus.files import content, nothing, tensors
from datencoder_jax import api
from datencoder_jax.checkpoints.folders import read_base
from datencoder_jax.loading import load

KIND = Kind(
    "Checkpoints",
    "The base model of `--model`, read by `load`: a folder of diffusers, or one file where the input says so.",
    lambda path: load(str(path)),
)

FILE = "model.safetensors"
UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


def folder(change: Callable[[Path], Any]) -> files.Maker:
    """A good folder of diffusers, changed."""

    def make(_: Path) -> Path:
        base = Path(shutil.copytree(models.tiny_folder(), "base"))
        change(base)
        return base

    return make


def replaced(name: str, data: bytes | str) -> files.Maker:
    """A folder one file of which has another content."""
    return folder(lambda base: (base / name).write_bytes(data.encode() if isinstance(data, str) else data))


def without(*names: str) -> files.Maker:
    """A folder that lacks files or folders."""

    def remove(base: Path) -> None:
        for name in names:
            shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()

    return folder(remove)


def config(name: str, **values: Any) -> files.Maker:
    """A folder with other values in a JSON file; None removes one."""

    def change(base: Path) -> None:
        found = json.loads((base / name).read_text()) | values
        (base / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return folder(change)


def weights(name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> files.Maker:
    """A folder whose tensors are changed."""

    def rewrite(base: Path) -> None:
        arrays = load_file(base / f"{name}.safetensors")
        change(arrays)
        save_file(arrays, base / f"{name}.safetensors")

    return folder(rewrite)


def sharded(table: Any, missing: bool = False) -> files.Maker:
    """A folder whose UNet has an index in the place of its weights."""

    def change(base: Path) -> None:
        whole = base / f"{UNET}.safetensors"
        names = list(load_file(whole))
        whole.rename(base / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
        index = table(names) if callable(table) else table
        (base / f"{UNET}.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
        if missing:
            (base / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors").unlink()

    return folder(change)


def draw(path: Path) -> None:
    """Loads a model and draws a picture."""
    api.generate(load(str(path)), ["a robot"], num=1, sampling_steps=1, guidance=0.0, quiet=True)


_SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"

# --- no model
KIND.refused("no file", nothing(FILE))
KIND.refused("no folder", nothing("models/sd15"))
KIND.refused("an empty name", nothing(""))
KIND.refused(
    "an address of Hugging Face", nothing("https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5")
)
KIND.refused("a repository that cannot be reached", nothing("somebody/something"))
KIND.refused("a repository that was taken down", nothing("runwayml/stable-diffusion-v1-5"))
KIND.refused("a name of 300 letters", nothing("n" * 300))
KIND.refused("a path of 5,000 letters", nothing("n/" * 2500))
KIND.refused("a name with a zero byte", nothing("a\0b"))
KIND.refused("a name with an escape sequence", nothing("a\x1b[2Jb"))
KIND.refused("a home folder of nobody", nothing("~nosuchuser/model"))
KIND.refused("a pickle", content("model.ckpt", b"PK\x03\x04"))
KIND.refused("a pickle that is not there", nothing("model.ckpt"))
KIND.refused("a file of GGUF", content("model.gguf", b"GGUF\3\0\0\0"))
KIND.refused("a text file", content("model.txt", "a model"))
KIND.refused("an empty folder", files.folder("base"))
KIND.refused("a link to nothing", files.link("base", "gone"))
KIND.refused("a link to itself", files.link("base", "base"))
KIND.refused("None in Python", nothing(None))

# --- the index
KIND.refused("a folder without its index", without(_INDEX))
KIND.refused("an empty index", replaced(_INDEX, ""))
KIND.refused("an index that is a list", replaced(_INDEX, "[]"))
KIND.refused("an index that is no JSON", replaced(_INDEX, "{'unet': 1}"))
KIND.refused("an index nested 100,000 deep", replaced(_INDEX, "[" * 100_000))
KIND.refused("an index of FLUX", config(_INDEX, transformer=["diffusers", "FluxTransformer2DModel"]))
KIND.refused("an index of Stable Diffusion 3", config(_INDEX, text_encoder_3=["transformers", "T5EncoderModel"]))
KIND.refused("an index of the refiner of XL", config(_INDEX, requires_aesthetics_score=True))
KIND.refused(
    "an index that names a second text encoder that is not there",
    config(_INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
)

# --- parts
for _part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
    KIND.refused(f"no folder {_part}", without(_part))
KIND.refused("no configuration of the UNet", without("unet/config.json"))
KIND.refused("an empty configuration of the UNet", replaced("unet/config.json", ""))
KIND.refused("a configuration of the UNet that is a list", replaced("unet/config.json", "[1]"))
KIND.refused("a configuration of the UNet of numbers alone", replaced("unet/config.json", "3"))
KIND.refused("a configuration of the UNet that is not UTF-8", replaced("unet/config.json", b'{"\xff": 1}'))
KIND.refused("widths of the UNet that are a text", config("unet/config.json", block_out_channels="wide"))
KIND.refused("widths of the UNet that are negative", config("unet/config.json", block_out_channels=[-8]))
KIND.refused("widths of the UNet that are zero", config("unet/config.json", block_out_channels=[0]))
KIND.refused("widths of the UNet that are empty", config("unet/config.json", block_out_channels=[]))
KIND.refused("widths of the UNet of a million", config("unet/config.json", block_out_channels=[2**20]))
KIND.refused("an unknown block of the UNet", config("unet/config.json", down_block_types=["KDownBlock2D"]))
KIND.refused("heads of the UNet that do not divide its width", config("unet/config.json", attention_head_dim=3))
KIND.refused("heads of the UNet that are zero", config("unet/config.json", attention_head_dim=0))
KIND.refused("groups of norms that do not divide its width", config("unet/config.json", norm_num_groups=3))
KIND.refused("an inpainting UNet of nine channels", config("unet/config.json", in_channels=9))
KIND.refused("a UNet for another text encoder", config("unet/config.json", cross_attention_dim=768))
KIND.refused("an unknown activation of the text encoder", config("text_encoder/config.json", hidden_act="sine"))
KIND.refused("layers of the text encoder that are a text", config("text_encoder/config.json", num_hidden_layers="two"))
KIND.refused("a VAE of another width", config("vae/config.json", block_out_channels=[8, 8]))
KIND.refused("a scaling factor that is a text", config("vae/config.json", scaling_factor="small"))
KIND.refused("a scaling factor of zero", config("vae/config.json", scaling_factor=0))
KIND.refused("a scaling factor that is not a number", config("vae/config.json", scaling_factor=float("nan")))

# --- weights
KIND.refused("no weights", without(f"{UNET}.safetensors"))
KIND.refused("pickled weights alone", folder(lambda base: (base / f"{UNET}.safetensors").rename(base / f"{UNET}.bin")))
KIND.refused("empty weights", replaced(f"{UNET}.safetensors", b""))
KIND.refused("a pointer of Git LFS in the place of weights", replaced(f"{UNET}.safetensors", files.LFS_POINTER))
KIND.refused("an error page in the place of weights", replaced(f"{UNET}.safetensors", files.HTML))
KIND.refused(
    "weights cut short",
    folder(lambda base: (base / f"{UNET}.safetensors").write_bytes((base / f"{UNET}.safetensors").read_bytes()[:-100])),
)
KIND.refused(
    "weights of another part",
    folder(lambda base: shutil.copy(base / f"{VAE}.safetensors", base / f"{UNET}.safetensors")),
)
KIND.refused("a weight missing", weights(UNET, lambda arrays: arrays.pop("conv_in.weight")))
KIND.refused(
    "a weight of another shape", weights(UNET, lambda arrays: arrays.update({"conv_in.weight": np.ones((3, 3), "f4")}))
)
KIND.refused(
    "a weight of whole numbers",
    weights(UNET, lambda arrays: arrays.update({"conv_in.bias": arrays["conv_in.bias"].astype("i4")})),
)
KIND.refused(
    "a weight that belongs to nothing",
    weights(UNET, lambda arrays: arrays.update({"strange\n.weight": np.ones(3, "f4")})),
)
KIND.refused(
    "a weight that is not a number, when it draws",
    weights(UNET, lambda arrays: arrays.update({"conv_in.bias": np.full_like(arrays["conv_in.bias"], np.nan)})),
    draw,
)
KIND.refused(
    "an infinite weight, when it draws",
    weights(
        VAE,
        lambda arrays: arrays.update({"post_quant_conv.bias": np.full_like(arrays["post_quant_conv.bias"], np.inf)}),
    ),
    draw,
)
KIND.refused("an index of shards that is empty", sharded({}))
KIND.refused("an index of shards that is a list", sharded([]))
KIND.refused("an index of shards without a table", sharded({"metadata": {}}))
KIND.refused("an index of shards whose table is a list", sharded({"weight_map": ["a"]}))
KIND.refused(
    "a shard that is missing", sharded(lambda names: {"weight_map": dict.fromkeys(names, _SHARD)}, missing=True)
)
KIND.refused(
    "a shard in the folder above",
    sharded(lambda names: {"weight_map": dict.fromkeys(names, "../../secret.safetensors")}),
)
KIND.refused("a shard at an absolute path", sharded(lambda names: {"weight_map": dict.fromkeys(names, "/etc/passwd")}))
KIND.refused("a shard that is the folder itself", sharded(lambda names: {"weight_map": dict.fromkeys(names, ".")}))
KIND.refused("a shard without a name", sharded(lambda names: {"weight_map": dict.fromkeys(names, "")}))
KIND.refused("a shard whose name is null", sharded(lambda names: {"weight_map": dict.fromkeys(names)}))
KIND.refused(
    "a shard with a zero byte in its name", sharded(lambda names: {"weight_map": dict.fromkeys(names, "a\0b")})
)
KIND.refused(
    "a shard with a name of 300 letters", sharded(lambda names: {"weight_map": dict.fromkeys(names, "n" * 300)})
)
KIND.used("one shard", sharded(lambda names: {"weight_map": dict.fromkeys(names, _SHARD)}))
KIND.used(
    "harmless tensors beside the weights",
    weights(VAE, lambda arrays: arrays.update({"loss.logvar": np.ones((), "f4")})),
)

# --- tokenizer, schedule, defaults
KIND.refused("no words of the tokenizer", without("tokenizer/vocab.json"))
KIND.refused("words of the tokenizer that are no JSON", replaced("tokenizer/vocab.json", "{"))
KIND.refused("words of the tokenizer that are a list", replaced("tokenizer/vocab.json", "[]"))
KIND.refused(
    "words of the tokenizer past the table of the text encoder",
    replaced("tokenizer/vocab.json", json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 99_999})),
)
KIND.refused("no schedule", without(_SCHEDULER))
KIND.refused("an unknown schedule of betas", config(_SCHEDULER, beta_schedule="wavy"))
KIND.refused("betas that are a text", config(_SCHEDULER, beta_start="low"))
KIND.refused("betas above 1", config(_SCHEDULER, beta_end=40.0))
KIND.refused("a schedule of no steps", config(_SCHEDULER, num_train_timesteps=0))
KIND.refused("a schedule of negative steps", config(_SCHEDULER, num_train_timesteps=-5))
KIND.refused("a schedule of 2.5 steps", config(_SCHEDULER, num_train_timesteps=2.5))
KIND.refused("an unknown prediction", config(_SCHEDULER, prediction_type="sample"))
KIND.refused(
    "defaults with a guidance that is a text",
    folder(lambda base: (base / "datencoder.json").write_text('{"guidance": "high"}')),
)
KIND.refused(
    "defaults with an infinite guidance",
    folder(lambda base: (base / "datencoder.json").write_text('{"guidance": Infinity}')),
)
KIND.refused(
    "defaults with prompts without placeholder",
    folder(lambda base: (base / "datencoder.json").write_text('{"prompts": ["a cat"]}')),
)
KIND.refused(
    "defaults with prompts that are numbers",
    folder(lambda base: (base / "datencoder.json").write_text('{"prompts": [1]}')),
)
KIND.refused(
    "means of pixels that are a text",
    folder(
        lambda base: content(str(base / "feature_extractor" / "preprocessor_config.json"), '{"image_mean": "grey"}')(
            base
        )
    ),
)
KIND.refused(
    "means of two colours",
    folder(
        lambda base: content(
            str(base / "feature_extractor" / "preprocessor_config.json"), '{"image_mean": [0.5, 0.5]}'
        )(base)
    ),
)
KIND.refused(
    "deviations of pixels of zero",
    folder(
        lambda base: content(str(base / "feature_extractor" / "preprocessor_config.json"), '{"image_std": [0, 0, 0]}')(
            base
        )
    ),
)
KIND.used(
    "a folder with files of others in it", folder(lambda base: content(str(base / "notes" / "README.md"), "mine")(base))
)
KIND.used(
    "a configuration with keys of a newer diffusers",
    config("unet/config.json", mid_block_only_cross_attention=None, _name_or_path="x"),
)
KIND.used("a name with a line break", lambda _: Path(shutil.copytree(models.tiny_folder(), "a\nbase")))


# --- files
@functools.cache
def single() -> dict[str, np.ndarray]:
    """The tensors of a small file of Stable Diffusion 1.x."""
    shapes = compvis.checkpoint(
        unet=compvis.unet(channels=32, multiples=(1, 2), depths=(1, 0), context=64),
        vae=compvis.vae(channels=32, multiples=(1, 2), blocks=1),
        **{"cond_stage_model.transformer.": compvis.clip_text(width=64, layers=1, words=300)},
    )
    rng = np.random.default_rng(0)
    return {name: 0.1 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def single_file(change: Callable[[dict[str, np.ndarray]], Any], metadata: dict[str, str] | None = None) -> files.Maker:
    """A file of Stable Diffusion 1.x, changed."""

    def make(where: Path) -> Path:
        arrays = dict(single())
        change(arrays)
        return tensors(FILE, arrays, metadata)(where)

    return make


def _only(*prefixes: str) -> Callable[[dict[str, np.ndarray]], None]:
    def keep(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if not name.startswith(prefixes)]:
            del arrays[name]

    return keep


_QUERY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
_FIRST, _TOWER = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer."
for _name, _make in {
    "empty": content(FILE, b""),
    "that is an error page": content(FILE, files.HTML),
    "that is a pointer of Git LFS": content(FILE, files.LFS_POINTER),
    "that is a pickle": content(FILE, b"PK\x03\x04" + bytes(99)),
    "without tensors": tensors(FILE, {}),
    "that is a folder": files.folder(FILE),
    "that is a pipe": files.fifo(FILE),
    "that is a LoRA": tensors(FILE, {"lora_unet_x.lora_down.weight": np.ones((2, 8), "f4")}),
    "that is an embedding": tensors(FILE, {"S*": np.ones((2, 8), "f4")}),
    "of the UNet alone": single_file(_only("model.")),
    "of the VAE alone": single_file(_only("first_stage_model.")),
    "without the text encoder": single_file(_only("model.", "first_stage_model.")),
    "of FLUX": tensors(FILE, {"double_blocks.0.img_attn.qkv.weight": np.ones((2, 8), "f4")}),
    "of the refiner of XL": single_file(
        lambda x: x.update({"conditioner.embedders.0.model.ln_final.weight": np.ones(8, "f4")})
    ),
    "with two text encoders": single_file(
        lambda x: x.update({"cond_stage_model.model.ln_final.weight": np.ones(64, "f4")})
    ),
    "with a weight missing": single_file(lambda x: x.pop(_FIRST)),
    "with a weight of the text encoder missing": single_file(
        lambda x: x.pop(f"{_TOWER}text_model.final_layer_norm.bias")
    ),
    "with a weight of another shape": single_file(lambda x: x.update({f"{_QUERY}.weight": np.ones((32, 31), "f4")})),
    "with a weight of one number": single_file(lambda x: x.update({_FIRST: np.ones((), "f4")})),
    "with weights of whole numbers": single_file(lambda x: x.update({f"{_QUERY}.weight": np.ones((32, 32), "i4")})),
    "with a tensor that belongs to nothing": single_file(lambda x: x.update({"strange.weight": np.ones(3, "f4")})),
    "with a layer of the UNet that has a text for a number": single_file(
        lambda x: x.update({"model.diffusion_model.input_blocks.first.0.weight": np.ones(3, "f4")})
    ),
    "with a layer number of 400 digits": single_file(
        lambda x: x.update({f"model.diffusion_model.input_blocks.{'9' * 400}.0.weight": np.ones(3, "f4")})
    ),
    "with a layer number of 5,000 digits": single_file(
        lambda x: x.update({f"model.diffusion_model.input_blocks.{'9' * 5000}.0.weight": np.ones(3, "f4")})
    ),
}.items():
    KIND.refused(f"a file {_name}", _make, lambda path: read_base(path))
KIND.used("a file", single_file(lambda _: None), lambda path: read_base(path))
KIND.used(
    "a file with metadata that are nonsense",
    single_file(lambda _: None, {"modelspec.prediction_type": "\x1b[2J", "a\nb": ""}),
    lambda path: read_base(path),
)
KIND.used(
    "a file with harmless extra tensors",
    single_file(
        lambda x: x.update({"global_step": np.ones((), "f4"), "first_stage_model.loss.logvar": np.ones((), "f4")})
    ),
    lambda path: read_base(path),
)
KIND.used(
    "a file with the averaged weights of training",
    single_file(lambda x: x.update({"model_ema.decay": np.ones((), "f4")})),
    lambda path: read_base(path),
)
KIND.used(
    "a file in capitals",
    lambda where: single_file(lambda _: None)(where).rename("MODEL.SAFETENSORS"),
    lambda path: read_base(path),
)
