"""Bad LoRA files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from corpus import files
from corpus.case import Kind
from corpus.files import content, nothing, tensors
from datencoder_jax.checkpoints.lora_files import read_lora

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {QUERY: (8, 8), CONV: (3, 3, 8, 8), TEXT: (8, 8)}
"""The layers of a model."""

KIND = Kind(
    "LoRA files",
    "The file of `datencoder generate --lora`, read by `read_lora` for a model of three layers.",
    lambda path: read_lora(path, SHAPES),
)

_RNG = np.random.default_rng(0)
DOWN, UP = _RNG.standard_normal((2, 8), dtype=np.float32), _RNG.standard_normal((8, 2), dtype=np.float32)
FILE, STEM = "lora.safetensors", f"lora_unet_{QUERY.replace('.', '_')}"
GOOD = {f"{STEM}.lora_down.weight": DOWN, f"{STEM}.lora_up.weight": UP, f"{STEM}.alpha": np.float32(2)}
PEFT = {f"unet.{QUERY}.lora_A.weight": DOWN, f"unet.{QUERY}.lora_B.weight": UP}
IN_PEFT = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in PEFT.items()}


def good(**changes: Any) -> files.Maker:
    """A good file with some tensors changed: `down`, `up`, `alpha`."""
    names = {"down": f"{STEM}.lora_down.weight", "up": f"{STEM}.lora_up.weight", "alpha": f"{STEM}.alpha"}
    return tensors(FILE, GOOD | {names[name]: value for name, value in changes.items()})


def with_others(**others: Any) -> files.Maker:
    """A good file with more tensors."""
    return tensors(FILE, GOOD | {name.replace("__", "."): value for name, value in others.items()})


def with_settings(settings: Any) -> files.Maker:
    """A file of diffusers with PEFT's settings in its metadata."""
    text = settings if isinstance(settings, str) else json.dumps(settings)
    return tensors(FILE, PEFT, {"lora_adapter_metadata": text})


def with_config(text: str | None) -> files.Maker:
    """A folder of PEFT with a configuration."""

    def make(where: Path) -> Path:
        tensors("lora/adapter_model.safetensors", IN_PEFT)(where)
        if text is not None:
            content("lora/adapter_config.json", text)(where)
        return Path("lora")

    return make


files.damaged_tensors(KIND, FILE, {key: np.atleast_1d(value) for key, value in GOOD.items()})

# --- other kinds of files
KIND.refused("an empty folder", files.folder("lora"))
KIND.refused("a folder of pickles", lambda w: content("lora/pytorch_lora_weights.bin", b"PK")(w).parent)
KIND.refused("a pickle", content("lora.pt", b"PK\x03\x04"))
KIND.refused("a pickle whose ending is in capitals", content("lora.CKPT", b"PK\x03\x04"))
KIND.refused("a file without tensors", tensors(FILE, {}))
KIND.refused("an embedding", tensors(FILE, {"S*": DOWN}))
KIND.refused("a whole base model", tensors(FILE, {"model.diffusion_model.input_blocks.0.0.weight": DOWN}))
KIND.refused("a DoRA", with_others(**{f"{STEM}.dora_scale": UP}))
KIND.refused("a LoHa", tensors(FILE, {f"{STEM}.hada_w1_a": UP, f"{STEM}.alpha": np.float32(1)}))
KIND.refused("a LoKr", tensors(FILE, {f"{STEM}.lokr_w1": UP}))
KIND.refused("a LoCon with a Tucker core", with_others(**{f"{STEM}.lora_mid.weight": np.ones((2, 2, 3, 3), "f4")}))
KIND.refused("an (IA)^3", tensors(FILE, {f"{STEM}.weight": UP[:, 0], f"{STEM}.on_input": np.float32(1)}))
KIND.refused("a full difference", with_others(**{f"{STEM}.diff": np.ones((8, 8), "f4")}))
KIND.refused(
    "a LoRA of FLUX",
    tensors(FILE, {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{p}.weight": DOWN for p in ("down", "up")}),
)
KIND.refused(
    "a LoRA of Stable Diffusion XL",
    with_others(**{f"lora_te2_text_projection.lora_{p}.weight": DOWN for p in ("down", "up")}),
)
KIND.refused("a tensor of no known name beside the factors", with_others(strange=np.float32(1)))
KIND.refused("a tensor whose name has a line break", with_others(**{"stra\nnge": np.float32(1)}))
KIND.refused("a tensor without a name", with_others(**{"": np.float32(1)}))

# --- factors
KIND.refused("one of the two factors alone", tensors(FILE, {f"{STEM}.lora_down.weight": DOWN}))
KIND.refused("factors of two ranks", good(down=np.ones((3, 8), "f4")))
KIND.refused("factors of rank 0", good(down=np.ones((0, 8), "f4"), up=np.ones((8, 0), "f4")))
KIND.refused("a factor that is one number", good(down=np.float32(1)))
KIND.refused("a factor of three axes", good(down=np.ones((2, 8, 1), "f4")))
KIND.refused("a factor of five axes", good(down=np.ones((2, 8, 1, 1, 1), "f4")))
KIND.refused("a factor of another width", good(down=np.ones((2, 9), "f4")))
KIND.refused("the factors in each other's places", good(down=UP, up=DOWN))
KIND.refused("the factors of a convolution for a linear layer", good(down=np.ones((2, 8, 3, 3), "f4")))
KIND.refused("the same factor under two names", tensors(FILE, GOOD | PEFT))
KIND.refused("factors so large that they overflow", good(up=np.full((8, 2), 3e38, "f4"), alpha=np.float32(100)))
KIND.refused("an alpha of two numbers", good(alpha=np.ones(2, "f4")))
KIND.refused("an alpha of no number", good(alpha=np.ones(0, "f4")))
KIND.refused("an alpha that is not a number", good(alpha=np.float32("nan")))
KIND.refused("an infinite alpha", good(alpha=np.float32("inf")))
KIND.refused(
    "an alpha without its factors", tensors(FILE, GOOD | {f"lora_unet_{CONV.replace('.', '_')}.alpha": np.float32(1)})
)
KIND.refused(
    "an alpha of 8 bits",
    files.raw_tensors(
        FILE,
        {
            f"{STEM}.lora_down.weight": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]},
            f"{STEM}.lora_up.weight": {"dtype": "F32", "shape": [8, 2], "data_offsets": [64, 128]},
            f"{STEM}.alpha": {"dtype": "F8_E5M2", "shape": [], "data_offsets": [128, 129]},
        },
        bytes(129),
    ),
)
KIND.used("no alpha", tensors(FILE, {key: value for key, value in GOOD.items() if not key.endswith("alpha")}))
KIND.used("an alpha of 0", good(alpha=np.float32(0)))
KIND.used("a negative alpha", good(alpha=np.float32(-1)))
KIND.used("an alpha that is a whole number", good(alpha=np.int64(2)))
KIND.used("an alpha in a list of one", good(alpha=np.ones((1,), "f4")))
KIND.used("factors in bfloat16", good(down=DOWN.astype(ml_dtypes.bfloat16), up=UP.astype(ml_dtypes.bfloat16)))
KIND.used(
    "one factor in half and one in double precision", good(down=DOWN.astype(np.float16), up=UP.astype(np.float64))
)
KIND.used("a rank above the width of the layer", good(down=np.ones((64, 8), "f4"), up=np.ones((8, 64), "f4")))
KIND.used(
    "a convolution beside a linear layer, of another rank",
    tensors(
        FILE,
        PEFT
        | {
            f"unet.{CONV}.lora_A.weight": np.ones((4, 8, 3, 3), "f4"),
            f"unet.{CONV}.lora_B.weight": np.ones((8, 4, 1, 1), "f4"),
        },
    ),
)
KIND.used(
    "metadata of kohya that are no JSON", tensors(FILE, GOOD, {"ss_network_args": "{", "ss_tag_frequency": "\x1b[2J"})
)
KIND.used("an ending in capitals", tensors("LORA.SAFETENSORS", GOOD))
KIND.used("no ending", tensors("lora", GOOD))

# --- settings of PEFT
KIND.refused("settings that are no JSON", with_settings("{"))
KIND.refused("settings that are a list", with_settings([1]))
KIND.refused("settings that are null", with_settings("null"))
KIND.refused("settings nested 100,000 deep", with_settings("[" * 100_000))
KIND.refused("settings without an alpha", with_settings({"unet.r": 2}))
KIND.refused("an alpha that is a text", with_settings({"unet.lora_alpha": "much"}))
KIND.refused("an alpha that is null", with_settings({"unet.lora_alpha": None}))
KIND.refused("an infinite alpha in the settings", with_settings('{"unet.lora_alpha": Infinity}'))
KIND.refused("an alpha of 400 digits", with_settings('{"unet.lora_alpha": 1' + "0" * 400 + "}"))
KIND.refused("a pattern of alphas that is a list", with_settings({"unet.lora_alpha": 2, "unet.alpha_pattern": [1]}))
KIND.refused(
    "a pattern of alphas that is no regular expression",
    with_settings({"unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}),
)
KIND.refused(
    "a pattern of alphas that takes a thousand years to match",
    with_settings({"unet.lora_alpha": 2, "unet.alpha_pattern": {"(?:[a-z_0-9.]|[a-z_0-9.])*[!?]": 1}}),
)
KIND.refused("settings of DoRA", with_settings({"unet.lora_alpha": 2, "unet.use_dora": True}))
KIND.refused("settings of a LoHa", with_settings({"unet.lora_alpha": 2, "unet.peft_type": "LOHA"}))
KIND.refused("settings of PiSSA", with_settings({"unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}))
KIND.refused("a folder of PEFT without its configuration", with_config(None))
KIND.refused("a folder of PEFT with an empty configuration", with_config(""))
KIND.refused("a folder of PEFT whose configuration is a list", with_config("[1, 2]"))
KIND.refused("a folder of PEFT whose configuration is a number", with_config("7"))
KIND.refused(
    "a folder of PEFT whose configuration is not UTF-8",
    with_config('{"r": 2, "x": "\udcff"}'.encode("utf-8", "surrogateescape").decode("latin-1")),
)
KIND.refused("a folder of PEFT whose alpha is a list", with_config('{"peft_type": "LORA", "lora_alpha": [2]}'))
KIND.used("settings that name a network there is not", with_settings({"unet.lora_alpha": 2, "prior.lora_alpha": 4}))
KIND.used("a folder of PEFT", with_config('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'))
KIND.refused(
    "a LoRA under a name of PEFT, with no model of its layers",
    tensors(FILE, {"unet.conv_norm_out.lora_A.weight": DOWN, "unet.conv_norm_out.lora_B.weight": UP}),
)
KIND.refused("None in Python", nothing(None))
KIND.refused("bytes in Python", nothing(b"lora.safetensors"))


def named(name: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> files.Maker:
    """A file whose layer goes by this name."""
    return tensors(FILE, {f"{name}.{down}": DOWN, f"{name}.{up}": UP})


KIND.used(
    "the names of PEFT", named(f"base_model.model.unet.{QUERY}", "lora_A.default.weight", "lora_B.default.weight")
)
KIND.used("the names of PEFT inside those of diffusers", named(f"unet.base_model.model.{QUERY}"))
KIND.used(
    "the names of kohya's text encoder",
    named("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
)
KIND.used(
    "the names of ComfyUI's text encoder",
    named("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"),
)
KIND.refused("names in capitals", named(f"UNET.{QUERY}".upper()))
KIND.refused(
    "two adapters in one file",
    tensors(
        FILE,
        {
            f"unet.{QUERY}.lora_{part}.{name}.weight": value
            for name in ("a", "b")
            for part, value in (("A", DOWN), ("B", UP))
        },
    ),
)
