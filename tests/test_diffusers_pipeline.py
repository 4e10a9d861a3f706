"""The exported pipeline for diffusers draws what our own sampling draws."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import draw_offsets, nchw, nhwc, tiny_concept
from PIL import Image
from tiny import write_tiny_base, write_tiny_xl

from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.checkpoints.export import Target, export_concept
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.errors import UserError
from datencoder_jax.pipeline import attention_shapes, read_pipeline
from datencoder_jax.sampling import Request, sample_latents
from datencoder_jax.typing import Dense, Removed, Residual, Variables

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS = ["a photo of a S* on the beach", "S* beside a S*"]
STEPS = 4


@pytest.fixture(scope="module", params=["SD", "XL"])
def exported(request, tmp_path_factory):
    """Our pipeline, a concept, the folder it is exported to, and the base model's folder."""
    folder = tmp_path_factory.mktemp("dual")
    base = write_tiny_base(folder) if request.param == "SD" else write_tiny_xl(folder)
    scheduler = base / "scheduler" / "scheduler_config.json"
    # diffusers' pipeline insists on Stable Diffusion's own offset, whatever the file says.
    settings = json.loads(scheduler.read_text()) | {"_class_name": "DDIMScheduler", "clip_sample": False}
    scheduler.write_text(json.dumps(settings | {"steps_offset": 1, "set_alpha_to_one": False}))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    pipeline = read_pipeline(base, "tiny")
    concept = tiny_concept(pipeline)
    export_concept(folder / "out", concept, Target(pipeline.base.widths, 16), name="toy", kinds=["diffusers", "card"])
    return pipeline, concept, folder / "out", base


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where diffusers keeps code that comes with a model."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def theirs(exported, modules):
    """diffusers with the exported code, loaded as a user loads it."""
    from diffusers import DiffusionPipeline

    _, _, out, base = exported
    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=str(out), trust_remote_code=True, local_files_only=True
    )
    assert type(pipe).__name__ == "DualPathPipeline"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_latents(pipeline, concept, noise, guidance, negative):
    """Final latents of `PROMPTS`, drawn as `api.generate` draws."""
    tokenizer = pipeline.tokenizer
    rows = np.repeat(np.arange(len(PROMPTS)), len(noise) // len(PROMPTS))
    variables, places = None, None
    soft, hard = tokenizer.encode(PROMPTS), None
    if concept is not None:
        variables = Variables(jnp.asarray(concept.embeddings), jax.tree.map(jnp.asarray, concept.offsets))
        places = {concept.token: len(concept.embeddings)}
        soft = tokenizer.encode(PROMPTS, places)[rows]
        hard = jnp.asarray(tokenizer.encode(PROMPTS, words={concept.token: concept.nearest_word})[rows])
    request = Request(
        jnp.asarray(soft),
        hard,
        None
        if negative is None and pipeline.base.zero_empty
        else jnp.asarray(tokenizer.encode([negative or ""], places)),
        jnp.asarray(noise),
        jnp.float32(guidance),
        jnp.float32(concept.blend),
    )
    plan = make_plan("ddim", pipeline.base.schedule, STEPS)
    return jax.jit(sample_latents)(pipeline.base, plan, request, variables)


@pytest.mark.parametrize(
    ("guidance", "negative", "num"),
    [(3.0, None, 1), (2.0, "red square", 2), (1.0, "", 1), (2.0, "a red S* and S*", 1)],
)
def test_draws_the_same_along_both_paths(exported, theirs, guidance, negative, num):
    pipeline, concept, out, _ = exported
    noise = np.random.default_rng(3).standard_normal((len(PROMPTS) * num, 8, 8, 4), dtype=np.float32)
    theirs.load_concept(out / "concept.safetensors")
    options = {"num_inference_steps": STEPS, "latents": nchw(noise), "output_type": "latent"}
    options |= {"guidance_scale": guidance, "negative_prompt": negative, "num_images_per_prompt": num}
    drawn = nhwc(theirs(PROMPTS, **options).images)
    np.testing.assert_allclose(drawn, our_latents(pipeline, concept, noise, guidance, negative), rtol=0, atol=1e-4)
    # The blend matters: neither path alone draws this.
    for blend in (0.0, 1.0):
        assert np.abs(nhwc(theirs(PROMPTS, blend=blend, **options).images) - drawn).max() > 0.05


def test_whole_matrices_and_what_is_taken_out_are_drawn_too(exported, theirs, tmp_path):
    pipeline, _, _, _ = exported
    rng, edits = np.random.default_rng(5), {}
    for number, (path, (inputs, outputs)) in enumerate(attention_shapes(pipeline.base.unet).items()):
        kind, shape = ((Dense, (inputs, outputs)), (Removed, (outputs, 2)))[number % 2]
        edits[path] = kind(0.2 * rng.standard_normal(shape, dtype=np.float32))
    concept = tiny_concept(pipeline, offsets=edits)
    save_concept(tmp_path / "other", concept)
    theirs.load_concept(tmp_path / "other")
    noise = rng.standard_normal((len(PROMPTS), 8, 8, 4), dtype=np.float32)
    options = {"num_inference_steps": STEPS, "latents": nchw(noise), "output_type": "latent", "guidance_scale": 2.0}
    drawn = nhwc(theirs(PROMPTS, **options).images)
    np.testing.assert_allclose(drawn, our_latents(pipeline, concept, noise, 2.0, None), rtol=0, atol=1e-4)
    plain = our_latents(pipeline, replace(concept, offsets={}), noise, 2.0, None)
    assert np.abs(drawn - plain).max() > 0.05


def test_without_a_concept_it_is_the_plain_pipeline(exported, theirs):
    _, _, _, base = exported
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    noise = nchw(np.random.default_rng(3).standard_normal((1, 8, 8, 4), dtype=np.float32))
    options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent"}
    np.testing.assert_array_equal(theirs("red", **options).images, plain("red", **options).images)


def test_refuses_what_does_not_belong(exported, theirs, tmp_path):
    pipeline, _, out, _ = exported
    shapes = attention_shapes(pipeline.base.unet)
    first = next(iter(shapes))
    with pytest.raises(ValueError, match="not a concept file"):
        theirs.load_concept(out / "learned_embeds.safetensors")
    for changes, match in [
        ({"embeddings": np.ones((1, 7), np.float32)}, "token vectors of 7; this model's are of (12|20)"),
        ({"offsets": draw_offsets({"down_blocks.7.to_q": (8, 8)})}, "changes offsets.down_blocks.7.to_q.down"),
        ({"offsets": draw_offsets({first: (9, 8)})}, "differs in shape"),
        ({"offsets": {first: Dense(np.ones((9, 8), np.float32))}}, "differs in shape"),
        ({"offsets": {first: Removed(np.ones((9, 1), np.float32))}}, "differs in shape"),
        ({"offsets": {first: Residual(np.ones((2, 8), np.float32))}}, f"changes offsets.{first}.residual"),
    ]:
        save_concept(tmp_path / "other", tiny_concept(pipeline, **changes))
        with pytest.raises(ValueError, match=match):
            theirs.load_concept(tmp_path / "other")
    theirs.load_concept(out / "concept.safetensors")
    for prompt in ("a photo", "red " * 40 + "S*"):
        with pytest.raises(ValueError, match="does not contain 'S\\*'"):
            theirs(prompt)


def test_a_concept_that_is_cut_is_refused_as_the_library_refuses_it(exported, theirs):
    """Several vectors, of which the last position holds the first alone."""
    pipeline, concept, out, _ = exported
    theirs.load_concept(out / "concept.safetensors")
    places, room = {concept.token: len(concept.embeddings)}, pipeline.tokenizer.length - 2
    assert len(concept.embeddings) == 2
    for before, fits in ((room - 2, True), (room - 1, False), (room, False)):
        for prompt in ("red " * before + "S*", "red " * before + "S* red"):
            if fits:
                theirs._soft_ids(prompt, theirs.concept)
                continue
            with pytest.raises(UserError, match="does not fit; write it nearer to the start"):
                pipeline.tokenizer.encode([prompt], places)
            with pytest.raises(ValueError, match=r"does not contain 'S\*' in full in its first .* nearer to the start"):
                theirs(prompt)
            with pytest.raises(ValueError, match=r"does not contain 'S\*' in full"):
                theirs("a S*", negative_prompt=prompt)
    # A second one that is cut does not matter where the first stands in full.
    again = "S* " + "red " * (room - 3) + "S*"
    with pytest.warns(UserWarning, match="cut"):
        wanted = pipeline.tokenizer.encode([again], places)[0]
    ids = theirs._soft_ids(again, theirs.concept)
    assert ids[:room] == wanted[1 : 1 + room].tolist()


def test_a_negative_prompt_without_guidance_is_said(exported, theirs):
    _, _, out, _ = exported
    theirs.load_concept(out / "concept.safetensors")
    with pytest.warns(UserWarning, match="negative_prompt has no effect"):
        theirs("a S*", negative_prompt="red", guidance_scale=0.0, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize("way", [0, 1], ids=["both paths", "soft path"])
def test_what_the_card_says_works(exported, modules, tmp_path, monkeypatch, way):
    pipeline, _, out, base = exported
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[way]
    monkeypatch.chdir(tmp_path)
    for said, place in {"<this folder>": out, "<folder of the base model in diffusers' format>": base}.items():
        code = code.replace(said, str(place))
    exec(code, {})
    with Image.open("picture.png") as picture:
        assert picture.size == (pipeline.resolution, pipeline.resolution)


def test_several_placeholders_stand_for_their_own_vectors(exported, theirs):
    pipeline, _, out, _ = exported
    theirs.load_concept(out / "concept.safetensors")
    two = theirs.concept._replace(token="A* B*", word="cat dog")  # of two vectors, one each
    prompt = "a B* and a A*, B*"
    ids = theirs._soft_ids(prompt, two)
    wanted = pipeline.tokenizer.encode([prompt], {"A*": 1, "B*": 1})[0]
    assert ids == wanted[1 : 1 + len(ids)].tolist() and max(ids) == pipeline.tokenizer.vocab_size + 1
    assert two.in_words(prompt) == "a dog and a cat, dog"
