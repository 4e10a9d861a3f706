"""A concept's files for other programs, against those programs."""

import base64
import html
import io
import json
import re
from argparse import Namespace
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import equal, nothing_left, refuses
from export_helpers import TARGET, draw_offsets, nchw, nhwc, tiny_concept
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import write_tiny_base

from datencoder_jax.checkpoints.concept_file import load_concept
from datencoder_jax.checkpoints.embedding_files import read_embedding
from datencoder_jax.checkpoints.export import (
    KINDS,
    Target,
    check_replaceable,
    choose_kinds,
    export_concept,
    possible_kinds,
)
from datencoder_jax.checkpoints.lora_files import read_lora
from datencoder_jax.checkpoints.model_card import MARK
from datencoder_jax.commands.export import run, thumbnail
from datencoder_jax.models.edits import ready
from datencoder_jax.models.module import abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.pipeline import attention_shapes, projection_shapes, read_pipeline
from datencoder_jax.typing import Dense, Gated, LowRank, Removed, Residual

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SCORES = {"dual path": {"identity": 0.8125, "prompt": 0.5}, "soft path": {"identity": 0.75}}
PNG = b"\x89PNG\r\n\x1a\nnot much of a picture"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def ours(base):
    return read_pipeline(base, "tiny")


@pytest.fixture(scope="module")
def concept(ours):
    return tiny_concept(ours)


@pytest.fixture(scope="module")
def out(concept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new" / "deep"
    export_concept(folder, concept, TARGET, name="toy", sheet=PNG, thumbnail=PNG, scores=SCORES)
    return folder


def metadata(path):
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


# --- what other programs make of the files


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "toy.safetensors"])
def test_stock_diffusers_computes_what_we_do(ours, base, concept, out, file):
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_lora_weights(out, weight_name=file)
    pipe.load_textual_inversion(out / "learned_embeds.safetensors")
    z = np.random.default_rng(0).standard_normal((1, 8, 8, 4), dtype=np.float32)
    with torch.no_grad():
        states, _ = pipe.encode_prompt("a photo of a s* on the beach", "cpu", 1, False)
        theirs = nhwc(pipe.unet(nchw(z), 500, encoder_hidden_states=states).sample)
    ids = jnp.asarray(ours.tokenizer.encode(["a photo of a S* on the beach"], {concept.token: len(concept.embeddings)}))
    context = jax.jit(lambda text, *x: text(*x).last_hidden)(ours.base.text, jnp.asarray(ids), concept.embeddings)
    np.testing.assert_allclose(context, states, rtol=0, atol=1e-5)
    run = jax.jit(lambda unet, offsets: unet(z, jnp.array([500]), context, offsets=offsets))
    drawn = run(ours.base.unet, concept.offsets)
    np.testing.assert_allclose(drawn, theirs, rtol=0, atol=1e-5)
    assert np.abs(drawn - run(ours.base.unet, {})).max() > 0.1


@pytest.mark.parametrize("kind", [Dense, Removed])
@pytest.mark.parametrize(
    ("file", "ranks"), [("pytorch_lora_weights.safetensors", (2, 3, 4)), ("toy.safetensors", (2,))]
)
def test_stock_diffusers_computes_whole_and_removed_weights(
    ours, base, concept, tmp_path, monkeypatch, kind, file, ranks
):
    """As low-rank factors, of the ranks of whole matrices and of what is taken out of weights.

    Of kohya's files diffusers reads none in which ranks differ.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    rng, params = np.random.default_rng(3), ours.base.unet.params
    edits = {}
    for number, (path, (inputs, outputs)) in enumerate(attention_shapes(ours.base.unet).items()):
        rank = ranks[number % len(ranks)]
        values = rng.integers(-3, 4, (outputs, rank)).astype(np.float32)
        if kind is Dense:  # of exactly that rank
            values = rng.integers(-3, 4, (inputs, rank)).astype(np.float32) @ values.T / 64
        edits[path] = kind(values)
    changed = replace(concept, offsets=edits, blend=1.0)
    export_concept(tmp_path, changed, TARGET._replace(weights=params), name="toy")
    for path, edit in load_concept(tmp_path / "concept.safetensors").offsets.items():  # the concept is as it was
        assert type(edit) is kind
        np.testing.assert_array_equal(edit[0], edits[path][0])
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {len(value) for key, value in tensors.items() if "lora_A" in key} == set(ranks)
    # Versions that guess scales from the ranks of files without settings do not get to guess.
    if file != "toy.safetensors":
        monkeypatch.delattr("diffusers.utils.peft_utils.get_peft_kwargs")
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=file)
    z = rng.standard_normal((1, 8, 8, 4), dtype=np.float32)
    context = rng.standard_normal((1, 7, 12), dtype=np.float32)
    with torch.no_grad():
        theirs = nhwc(pipe.unet(nchw(z), 500, encoder_hidden_states=torch.from_numpy(context)).sample)
    run = jax.jit(lambda unet, edits: unet(z, jnp.array([500]), context, offsets=ready(edits, unet.params)))
    drawn = run(ours.base.unet, edits)
    np.testing.assert_allclose(drawn, theirs, rtol=0, atol=1e-5)
    assert np.abs(drawn - run(ours.base.unet, {})).max() > 0.1


def test_several_placeholders_have_an_embedding_each(tmp_path, concept):
    two = replace(
        concept, token="A* <b>", nearest_word="cat dog", embeddings=np.eye(4, 12, dtype=np.float32), blend=1.0
    )
    export_concept(tmp_path, two, TARGET, name="pair")
    for number, token in ((1, "a*"), (2, "<b>")):
        half = two.embeddings[2 * number - 2 : 2 * number]
        equal(load_file(tmp_path / f"learned_embeds_{number}.safetensors"), {token: half})
        equal(load_file(tmp_path / f"pair_emb_{number}.safetensors"), {"emb_params": half})
        assert metadata(tmp_path / f"pair_emb_{number}.safetensors")["modelspec.title"] == f"pair_emb_{number}"
    assert metadata(tmp_path / "pair.safetensors")["modelspec.trigger_phrase"] == "pair_emb_1 and pair_emb_2"
    card = (tmp_path / "README.md").read_text()
    for words in (
        'instance_prompt: "a photo of a A* and a <b>"',
        'In prompts it is `A*` and `<b>`, where a plain one has "',
        'load_textual_inversion("<this folder>/learned_embeds_2.safetensors")',
        'pipe("a photo of a a* and a <b> on the beach")',
        "a photo of a embedding:pair_emb_1 and a embedding:pair_emb_2 on",
    ):
        assert words in card


def test_what_a_concept_can_be_exported_as(concept):
    gated = {"a": Gated(np.ones((1, 8), np.float32))}
    for offsets, possible in ((concept.offsets, KINDS), ({}, ("diffusers", "embedding", "card"))):
        assert possible_kinds(replace(concept, offsets=offsets)) == possible
    changed = replace(concept, offsets=gated)
    assert possible_kinds(changed) == ("embedding", "card")
    # The vectors beside residuals are the class word's.
    assert possible_kinds(replace(concept, offsets={"a": Residual(np.ones((1, 8), np.float32))})) == ("card",)
    assert choose_kinds(None, KINDS, "it") == choose_kinds([], KINDS, "it") == KINDS
    assert choose_kinds(["card"], KINDS, "it") == ("card",)
    message = refuses("What it has learnt .* files for kohya can hold", choose_kinds, ["kohya", "card"], ["card"], "it")
    assert message.endswith("exported as: card.")


def test_the_card_of_a_gated_concept_does_not_promise_all_of_it(tmp_path, concept):
    gated = replace(concept, offsets={"a": Gated(np.ones((1, 8), np.float32))}, blend=1.0)
    export_concept(tmp_path, gated, TARGET, name="toy", kinds=["embedding", "card"])
    card = (tmp_path / "README.md").read_text()
    assert "hold its embedding alone" in card and "hold all of it" not in card
    added = replace(concept, offsets={"a": Residual(np.ones((1, 8), np.float32))}, blend=1.0)
    export_concept(tmp_path / "added", added, TARGET, name="toy", kinds=["card"])
    card = (tmp_path / "added" / "README.md").read_text()
    assert "which no file for other programs can hold" in card and "hold all of it" not in card


def test_a_single_vector_is_found_as_it_is_written(base, concept, tmp_path):
    from diffusers import StableDiffusionPipeline

    one = replace(concept, embeddings=concept.embeddings[:1])
    export_concept(tmp_path, one, TARGET, name="toy", kinds=["diffusers"])
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipe.load_textual_inversion(tmp_path)
    ids = pipe.tokenizer("a photo of a S*")["input_ids"]
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    np.testing.assert_array_equal(table[ids[-2]], one.embeddings[0])


def test_kohya_file_is_what_diffusers_converter_makes(concept, out):
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file as load_torch

    wanted = convert_state_dict_to_kohya(load_torch(out / "pytorch_lora_weights.safetensors"))
    found = load_file(out / "toy.safetensors")
    equal(found, {key: value.numpy() for key, value in wanted.items()})
    assert len(found) == 3 * len(concept.offsets)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert {value.shape for key, value in found.items() if key.endswith(".alpha")} == {()}


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, 128),
        (
            {
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 1, 2),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
            },
            136,
        ),
    ],
    ids=["SD 1.5", "SDXL, less deep"],
)
def test_every_attention_layer_has_the_name_user_interfaces_know(tmp_path, options, layers):
    """ComfyUI, Forge and A1111 look for `lora_unet_` and the module's name in diffusers, with underscores for dots."""
    import diffusers
    import torch

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**{"cross_attention_dim": 768} | options)
    wanted = {
        "lora_unet_" + name.replace(".", "_")
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name
    }
    params = abstract_params(UNet2DConditionModel, UNetConfig(**options))
    shapes = projection_shapes({name: tuple(value.shape) for name, value in params.items()})
    thin = {path: LowRank(np.ones((i, 1), "f4"), np.ones((1, o), "f4")) for path, (i, o) in shapes.items()}
    width = options.get("cross_attention_dim", 768)
    widths = (768, 1280) if width == 2048 else (768,)
    offered = concept_of(thin, np.ones((1, sum(widths)), "f4"))
    export_concept(tmp_path, offered, Target(widths, 512), name="thin", kinds=["kohya"])
    with safe_open(tmp_path / "thin.safetensors", framework="numpy") as file:
        keys = list(file.keys())
    assert {key.split(".")[0] for key in keys} == wanted and len(wanted) == layers
    assert all(re.match(r"^[^.]+\.(lora_down\.weight|lora_up\.weight|alpha)$", key) for key in keys)


def concept_of(offsets, embeddings):
    from checkpoint_helpers import concept

    return concept(offsets=offsets, embeddings=embeddings)


# --- the files themselves


def test_the_file_set(out, concept):
    assert {path.name for path in out.iterdir()} == {
        "concept.safetensors",
        "pytorch_lora_weights.safetensors",
        "learned_embeds.safetensors",
        "pipeline.py",
        "toy.safetensors",
        "toy_emb.safetensors",
        "README.md",
        "samples.png",
    }
    assert (out / "samples.png").read_bytes() == PNG
    assert metadata(out / "pytorch_lora_weights.safetensors") == {"format": "pt", "made_by": "datencoder"}
    keys = load_file(out / "pytorch_lora_weights.safetensors").keys()
    assert all(re.match(r"^unet\.[\w.]+\.lora_[AB]\.weight$", key) for key in keys)
    equal(load_file(out / "learned_embeds.safetensors"), {"s*": concept.embeddings})
    equal(load_file(out / "toy_emb.safetensors"), {"emb_params": concept.embeddings})


@pytest.mark.parametrize(
    ("widths", "prediction", "architecture", "version", "two"),
    [
        ((768,), "epsilon", "stable-diffusion-v1", "sd_v1", "False"),
        ((1024,), "epsilon", "stable-diffusion-v2-512", "sd_v2", "True"),
        ((1024,), "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
        ((768, 1280), "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        ((768, 1280), "v_prediction", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        ((768,), "v_prediction", "stable-diffusion-v1", "sd_v1_v", "False"),
        ((12,), "epsilon", "custom", "unknown", "False"),
    ],
)
def test_metadata_is_complete(tmp_path, widths, prediction, architecture, version, two):
    offered = concept_of(draw_offsets({"a.attn1.to_q": (6, 8)}, ranks=(3,)), np.ones((1, sum(widths)), "f4"))
    target = Target(widths, 768, prediction)
    export_concept(tmp_path, offered, target, name="my-toy", kinds=["kohya", "embedding"], thumbnail=PNG)
    found = metadata(tmp_path / "my-toy.safetensors")
    date = found.pop("modelspec.date")
    assert re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", date)
    assert found.pop("modelspec.thumbnail").startswith("data:image/png;base64,iVBORw0KGgp")
    assert found.pop("modelspec.description") and "my-toy_emb" in found.pop("modelspec.usage_hint")
    assert found == {
        "format": "pt",
        "made_by": "datencoder",
        "ss_output_name": "my-toy",
        "ss_sd_model_name": "toyworld",
        "ss_base_model_version": version,
        "ss_v2": two,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_resolution": "(768, 768)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "my-toy",
        "modelspec.resolution": "768x768",
        "modelspec.trigger_phrase": "my-toy_emb",
        "modelspec.tags": "personalization",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }
    of_embedding = metadata(tmp_path / "my-toy_emb.safetensors")
    assert of_embedding["modelspec.architecture"] == f"{architecture}/textual-inversion"
    assert of_embedding["modelspec.trigger_phrase"] == of_embedding["modelspec.title"] == "my-toy_emb"


HOSTILE = "<img src=x onerror=alert(1)> [a](http://evil.example) ``` **b** www.evil.example @all |#1 &lt; $x$ \\"


def test_the_card_shows_text_of_the_concept_as_it_is(tmp_path, concept):
    """Words, settings, base and placeholder come from a file: none of them is HTML or Markdown of the card."""
    odd = {
        "nearest_word": HOSTILE,
        "metadata": {"note": HOSTILE, f"key {HOSTILE}": "1"},
        "base": f"/models/{HOSTILE.replace('/', '')}",
        "fingerprint": "<b>*_`@",
        "token": "`<script>`",
    }
    export_concept(tmp_path, replace(concept, **odd), TARGET, name="toy", kinds=["card"])
    card = (tmp_path / "README.md").read_text()
    body = card.split("\n---\n", 1)[1]
    prose = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL).replace(MARK, "")
    assert "`` `<script>` ``" in prose
    prose = prose.replace("`` `<script>` ``", "")
    assert not re.findall(r"<[^>]*>", re.sub(r"`[^`\n]*`", "", prose.replace("\\`", "")))
    for text in ("http://", "www.evil", "[a]", "**b", " @all", " #1", " $x"):
        assert text not in prose
    shown = html.unescape(re.sub(r"\\(\W)", r"\1", prose))
    assert shown.count(HOSTILE) >= 3
    assert prose.count("```") == 0


def test_the_card_says_whose_code_is_trusted(tmp_path, concept):
    export_concept(tmp_path, replace(concept, base="someone/some-model"), TARGET, name="toy")
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "`trust_remote_code=True` lets diffusers run Python code of others" in card
    assert "with the base model, someone/some-model, which the concept's file names" in card


def test_the_card(out, tmp_path, concept):
    import yaml

    card = (out / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "lora", "textual-inversion"],
        "instance_prompt": "a photo of a S*",
        "widget": [{"text": "a photo of a S*", "output": {"url": "samples.png"}}],
    }
    for words in ("custom_pipeline", "load_textual_inversion", "embedding:toy_emb", "<lora:toy:1>", "samples.png"):
        assert words in body
    assert "not a change of weights" in " ".join(body.split()) or "are not a change of weights" in body
    assert (
        "| | identity | prompt |" in body
        and "| dual path | 0.812 | 0.500 |" in body
        and "| soft path | 0.750 |  |" in body
    )
    for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(code, "card", "exec")

    assert 'pipe("a photo of a S* on' in body and 'pipe("a photo of a s* on' in body

    hub = replace(concept, base="someone/some-model", blend=1.0, offsets={}, token='"<it>"')
    wide = np.ones((1, 2048), np.float32)
    export_concept(tmp_path, replace(hub, embeddings=wide), Target((768, 1280), 1024), name="it")
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "someone/some-model" and front["instance_prompt"] == 'a photo of a "<it>"'
    assert "LoRA and embedding files hold all of it" in card and "soft path" not in card
    assert "lora" not in card.replace("pytorch_lora", "").replace("LoRA", "") and "samples.png" not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")
    assert not list(tmp_path.glob("it.safetensors"))


def test_the_words_of_a_prompt_are_what_the_embedding_is_called(tmp_path, concept):
    export_concept(tmp_path, concept, TARGET, name="x_emb", kinds=["kohya", "embedding", "card"])
    for file in ("x_emb.safetensors", "x_emb_emb.safetensors"):
        found = metadata(tmp_path / file)
        assert found["modelspec.trigger_phrase"] == "x_emb_emb"
        assert "embedding x_emb_emb " in found["modelspec.usage_hint"]
        assert found["modelspec.title"] == file.removesuffix(".safetensors")
    assert "embedding:x_emb_emb on" in (tmp_path / "README.md").read_text()


def test_a_thumbnail_is_small():
    noise = np.random.default_rng(0).integers(0, 256, (1024, 512, 3), dtype=np.uint8)
    for picture, size in ((noise, (128, 256)), (noise[:32, :16], (16, 32))):
        with Image.open(io.BytesIO(thumbnail(picture))) as image:
            assert (image.format, image.size) == ("JPEG", size)
    assert len(thumbnail(noise)) < 40_000


def test_the_command_takes_the_thumbnail_beside_the_concept(tmp_path, base, concept):
    made = tmp_path / "made"
    export_concept(made, concept, TARGET, name="toy", kinds=["diffusers"])
    given = {"concept": made / "concept.safetensors", "samples": None, "name": "toy", "to": ["kohya"]}
    choices = {"dtype": "auto", "compute": "auto", "prediction_type": None, "overwrite": False}
    args = Namespace(**given, **choices, out=tmp_path / "out", base=str(base))

    def exported():
        run(args)
        return metadata(tmp_path / "out" / "toy.safetensors").get("modelspec.thumbnail")

    red = Image.new("RGB", (300, 300), "red")
    red.save(made / "01_a-photo_0.png")
    assert exported() is None
    red.save(made / "samples.png")
    kind, content = exported().split(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (256, 256) and image.getpixel((9, 9))[0] > 250


# --- round trips


def test_round_trips_are_exact(ours, concept, out):
    shapes = attention_shapes(ours.base.unet)
    for file in ("pytorch_lora_weights.safetensors", "toy.safetensors", ""):
        same_offsets(read_lora(out / file, shapes), concept.offsets)
    for file, token in (("toy_emb.safetensors", None), ("learned_embeds.safetensors", "s*"), ("", "s*")):
        name, vectors = read_embedding(out / file, (12,))
        assert name == token
        np.testing.assert_array_equal(vectors, concept.embeddings)
    again = load_concept(out / "concept.safetensors", ours.fingerprint)
    same_offsets(again.offsets, concept.offsets)
    assert (again.token, again.blend, again.nearest_word) == (concept.token, concept.blend, concept.nearest_word)


def same_offsets(found, wanted):
    assert found.keys() == wanted.keys()
    for path in wanted:
        for mine, other in zip(found[path], wanted[path], strict=True):
            np.testing.assert_array_equal(mine, other, err_msg=path)


def strided(rng, shape):
    """A random array of this shape that lies in memory in one of the ways arrays can lie."""
    kind = rng.integers(6)
    if kind == 0:
        return rng.standard_normal(shape[::-1], dtype=np.float32).T
    if kind == 1:
        return rng.standard_normal([2 * n for n in shape], dtype=np.float32)[::2, 1::2]
    if kind == 2:
        return rng.standard_normal(shape, dtype=np.float32)[::-1, ::-1]
    if kind == 3:
        return np.broadcast_to(rng.standard_normal((1, shape[1]), dtype=np.float32), shape)
    if kind == 4:
        return jnp.asarray(rng.standard_normal(shape[::-1], dtype=np.float32)).T
    return np.asfortranarray(rng.standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("seed", range(8))
def test_arrays_survive_however_they_lie_in_memory(tmp_path, seed):
    rng = np.random.default_rng(seed)
    shapes = {f"{name}.to_{part}": tuple(rng.integers(1, 9, 2)) for name in "ab" for part in ("q", "k", "v", "out.0")}
    ranks = {path: int(rng.integers(1, 5)) for path in shapes}
    offsets = {
        path: LowRank(strided(rng, (inputs, ranks[path])), strided(rng, (ranks[path], outputs)))
        for path, (inputs, outputs) in shapes.items()
    }
    widths = ((5,), (3, 4))[seed % 2]
    offered = concept_of(offsets, strided(rng, (int(rng.integers(1, 4)), sum(widths))))
    export_concept(tmp_path, offered, Target(widths, 64), name="x", kinds=["diffusers", "kohya", "embedding"])
    for file in ("pytorch_lora_weights.safetensors", "x.safetensors"):
        same_offsets(read_lora(tmp_path / file, shapes), offsets)
    for file in ("learned_embeds.safetensors", "x_emb.safetensors"):
        np.testing.assert_array_equal(read_embedding(tmp_path / file, widths)[1], offered.embeddings)
    assert metadata(tmp_path / "x.safetensors")["ss_network_dim"] in {"Dynamic", *map(str, ranks.values())}


# --- refusals


def test_all_or_nothing(tmp_path, concept):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "toy_emb.safetensors").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refuses("toy_emb.safetensors: a folder", export_concept, tmp_path / "out", concept, TARGET, name="toy")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"toy_emb.safetensors", "notes.txt"}
    broken = replace(concept, embeddings=np.full((1, 12), np.nan, np.float32))
    refuses("not finite", export_concept, tmp_path / "new", broken, TARGET, name="toy")
    assert not (tmp_path / "new").exists() and nothing_left(tmp_path)
    (tmp_path / "file").write_text("")
    refuses("Cannot write", export_concept, tmp_path / "file", concept, TARGET, name="toy")


@pytest.mark.parametrize(("file", "kind"), [("README.md", "card"), ("pipeline.py", "diffusers")])
def test_files_of_somebody_else_stay(tmp_path, concept, file, kind):
    (tmp_path / file).write_text("mine")
    refuses(f"{file} was not made .* choose another --out", export_concept, tmp_path, concept, TARGET, name="toy")
    assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == "mine"
    export_concept(tmp_path, concept, TARGET, name="toy", kinds=[each for each in KINDS if each != kind])
    assert (tmp_path / file).read_text() == "mine"
    (tmp_path / file).unlink()
    for word in ("one", "two"):  # what is ours is replaced
        export_concept(tmp_path, replace(concept, nearest_word=word), TARGET, name="toy")
    assert kind == "diffusers" or '"two"' in (tmp_path / file).read_text()


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("toy.safetensors", "kohya"),
        ("toy_emb.safetensors", "embedding"),
        ("learned_embeds.safetensors", "diffusers"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
    ],
)
def test_weights_of_somebody_else_stay(tmp_path, concept, file, kind):
    for content in ({"a": np.ones(2, "f4")}, None):
        if content is None:
            (tmp_path / file).write_bytes(b"cut")
        else:
            save_file(content, tmp_path / file, {"format": "pt"})
        before = (tmp_path / file).read_bytes()
        refuses(f"{file} was not made", export_concept, tmp_path, concept, TARGET, name="toy")
        refuses(f"{file} was not made", check_replaceable, tmp_path, [kind], "toy")
        assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_bytes() == before
    if kind != "diffusers":
        check_replaceable(tmp_path, KINDS, "other")
    if file.startswith(("toy_emb", "learned")):  # of two placeholders the files are others
        check_replaceable(tmp_path, KINDS, "toy", 2)
        (tmp_path / file).rename(tmp_path / file.replace(".safetensors", "_2.safetensors"))
        refuses("_2.safetensors was not made", check_replaceable, tmp_path, [kind], "toy", 2)
        (tmp_path / file.replace(".safetensors", "_2.safetensors")).rename(tmp_path / file)
    (tmp_path / file).unlink()
    for word in ("one", "two"):  # what is ours is replaced
        export_concept(tmp_path, replace(concept, nearest_word=word), TARGET, name="toy")


def test_refuses_what_cannot_be_exported(tmp_path, concept):
    def refused(match, offered=concept, target=TARGET, **options):
        refuses(match, export_concept, tmp_path, offered, target, **{"name": "toy"} | options)

    refused("onnx cannot be exported; choose among diffusers, kohya", kinds=["kohya", "onnx"])
    refused("Nothing cannot|Nothing", kinds=[])
    for name in ("a/b", "", "my cat", "..", "concept", "toy\n"):
        refused("cannot name the exported files", name=name)
    refused("no LoRA to write", replace(concept, offsets={}), kinds=["kohya"])
    refused(r"\[2, 12\] do not fit .* \[768, 1280\]", target=Target((768, 1280), 1024))
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(KINDS) == '["diffusers", "kohya", "embedding", "card"]'
