"""Models in bfloat16: what is float32 all the same, and which products of float32 ask for the highest precision.

Programs are traced and not run. Accelerators round the factors of a float32 product that does not ask for more
(`runtime.precision`), which no result on a CPU would show.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import draw, personalize
from program_helpers import TracedPrograms, operations, products
from tiny import SIDE, UNET, VAE, in_half_precision, pictures, random_model

from datencoder_jax.diffusion.samplers import SAMPLERS, make_plan
from datencoder_jax.diffusion.schedule import alphas_cumprod
from datencoder_jax.encoder.domain_encoder import DomainEncoder
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.evaluation import judge, picture_scores
from datencoder_jax.methods import METHODS
from datencoder_jax.models.dot_product_attention import attend
from datencoder_jax.models.layers import timestep_features
from datencoder_jax.models.unet import UNet2DConditionModel
from datencoder_jax.models.vae import AutoencoderKL
from datencoder_jax.objectives.contrastive import contrastive_dense, contrastive_ring
from datencoder_jax.training.clip import contrastive_loss
from datencoder_jax.training.encoder_stage import domain_config
from datencoder_jax.training.judge import pair_loss
from datencoder_jax.training.mesh import make_mesh
from datencoder_jax.training.pairs import Pairs
from datencoder_jax.training.tuning_encoder import Frozen, TuningEncoderTask, Weights
from datencoder_jax.typing import Features

ENCODER = ("encoder/tuning_encoder.py TuningEncoder.",)
"""A network that is trained, in float32; its products are as exact as the device's own."""

ACTIVATIONS = ("models/attention.py _GEGLU", "models/clip.py _MLP")
"""Where exponentials are an activation's or its derivative's."""

SHARED_KEYS = ("models/attention.py _rows",)
"""Keys and values of one prompt, whose gradients from the samples are added in the type that they are computed in."""

EXACT = {
    "datencoder": ("encoder/tuning_encoder.py TuningEncoder._embed_timesteps",),
    "para": ("models/edits.py ready",),
    "perfusion": (
        "models/edits.py _gated",
        "models/edits.py apply",
        "tuning.py _followed",
        "base.py concept_state",
        "methods/perfusion.py _read",
        "methods/text_metric.py _sum",
    ),
    "disendiff": ("objectives/calibration.py calibration_loss",),
}
"""By method: functions with products of float32 that are to be exact."""

STATISTICS = {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "cumsum", "cumlogsumexp", "sin", "cos", "sort", "top_k"}
"""Operations of norms, softmax, losses and features of timesteps, beside reductions."""


@pytest.fixture(scope="module")
def half(pipeline):
    """The tiny model, stored and computing in bfloat16, with both kinds of encoder."""
    domain = domain_config(pipeline, "creature", rank=2, width=8, depth=1, heads=2)
    base = in_half_precision(pipeline.base)
    return replace(pipeline, base=base, domain=random_model(DomainEncoder, domain, 5))


@pytest.fixture(scope="module")
def programs(half):
    """A method's programs, from its start over tuning to pictures."""

    @functools.cache
    def trace(method):
        options = {"word": None} if METHODS[method].word is None else {}
        if METHODS[method].several:
            options = {"token": "A* B*", "word": "robot fish"}
        with TracedPrograms() as traced:
            concept = personalize(half, method, **options).concept
            draw(half, concept, [f"a photo of a {concept.subject}"])
        assert {"tuning", "sampling"} <= traced.traces.keys()
        return traced

    return trace


def is_reduction(operation):
    return operation.name.startswith("reduce_") and operation.name != "reduce_precision"


def check_statistics(found):
    """No exponential, norm, logarithm or sum in less than float32, but for the listed ones."""
    for operation in found:
        if operation.types <= {"float32"} or not (operation.name in STATISTICS or is_reduction(operation)):
            continue
        listed = SHARED_KEYS if is_reduction(operation) else ACTIVATIONS if operation.name == "exp" else ()
        assert operation.is_within(listed), operation


def check_products(found, default=()):
    """Products are of one type; those of float32 are exact, but in the places named."""
    for product in found:
        assert len(product.types) == 1, product
        if product.types == {"float32"}:
            assert product.is_exact or product.is_within(default), product


def check_text(lowered, default=0):
    """The same of a lowered program's text; so many products of float32 are not exact."""
    lines = [line for line in lowered.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", line)]
    float32 = [line for line in lines if re.search(r": \(tensor<[^>]*f32>, tensor<[^>]*f32>\)", line)]
    exact = [line for line in float32 if re.search(r"HIGHEST\W+(#stablehlo<precision )?HIGHEST", line)]
    assert len(float32) - len(exact) == default, [line for line in float32 if line not in exact][:3]
    return len(exact)


def is_float32(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype("float32")}


# --- personalization and sampling


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_float32(method, programs):
    """Variables, the optimiser's moments and losses, before and after; and all of what a step does not share."""
    (tuning,) = programs(method).traces["tuning"]
    (state, problem), _ = tuning.args_info
    final, losses = tuning.out_info
    assert is_float32(state) and is_float32(final) and is_float32(losses)
    others = problem._replace(base=None, hard=None, soft=None, prior=None)
    assert is_float32(others)
    updates = [o for o in operations(tuning.jaxpr) if o.is_within(("tuning.py tune_step.<locals>.moved",))]
    assert updates and all(o.types <= {"float32"} for o in updates)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_a_method_are_float32(method, programs):
    found = programs(method).operations()
    check_statistics(found)
    assert {"exp", "rsqrt", "reduce_sum", "reduce_max", "sin", "cos"} <= {o.name for o in found}


@pytest.mark.parametrize("method", METHODS)
def test_products_of_a_method(method, programs):
    """The frozen networks multiply bfloat16 alone, in the gradient too."""
    found = [product for _, trace in programs(method) for product in products(trace.jaxpr)]
    check_products(found, ENCODER)
    for place in EXACT.get(method, ()):
        exact = [product for product in found if product.types == {"float32"} and product.is_within((place,))]
        assert exact and all(product.is_exact for product in exact), place


@pytest.mark.parametrize("method", ["para", "perfusion", "disendiff"])
def test_exact_products_in_the_lowered_text(method, programs):
    assert sum(check_text(trace.lower().as_text()) for _, trace in programs(method)) > 0


# --- the networks


def test_a_vae_in_float32_is_exact_and_one_in_bfloat16_as_it_was():
    """Stable Diffusion XL's computes in float32 whatever the others do."""
    vae = random_model(AutoencoderKL, VAE, 0)
    latents, images = jnp.zeros((1, SIDE // 2, SIDE // 2, 4)), jnp.zeros((1, SIDE, SIDE, 3))
    for call, x in ((lambda vae, x: vae.bind().decode(x), latents), (lambda vae, x: vae.bind().encode(x), images)):
        traced = jax.jit(call).trace(vae, x)
        found = products(traced.jaxpr)
        assert {product.name for product in found} == {"dot_general", "conv_general_dilated"}
        assert all(product.is_exact for product in found)
        assert check_text(traced.lower().as_text()) == len(found)
        found = products(jax.make_jaxpr(call)(vae.cast("bfloat16", "bfloat16"), x))
        assert all(product.types == {"bfloat16"} and not product.is_exact for product in found)


def test_embeddings_of_timesteps_are_exact_and_the_rest_of_a_unet_is_not_slowed():
    unet, place = random_model(UNet2DConditionModel, UNET, 0), ("models/unet.py TimestepEmbedding",)
    inputs = jnp.zeros((1, SIDE // 2, SIDE // 2, 4)), jnp.zeros(1), jnp.zeros((1, 5, 12))
    found = products(jax.make_jaxpr(lambda unet, *inputs: unet(*inputs))(unet, *inputs))
    assert sum(product.is_exact for product in found) == 2
    assert all(product.is_exact == product.is_within(place) for product in found)
    half = unet.cast("bfloat16", "bfloat16")
    found = list(operations(jax.make_jaxpr(lambda unet, *inputs: unet(*inputs))(half, *inputs)))
    check_statistics(found)
    assert timestep_features(jnp.arange(3), 8).dtype == jnp.float32


def test_an_encoder_that_chooses_among_words_compares_exactly(half):
    config = replace(half.encoder.config, anchors=3, anchor_dim=5)
    sizes = (config.vision_taps, config.vision_width), (4, config.vision_width), (config.denoiser_width,), (), (5,)
    features = Features(*(jnp.zeros((2, *size)) for size in sizes))
    found = products(jax.make_jaxpr(random_model(TuningEncoder, config, 0))(features))
    compared = [product for product in found if product.is_within(("encoder/tuning_encoder.py _Anchors",))]
    assert len(compared) == 1 and compared[0].is_exact


def test_the_gradient_of_attention_multiplies_its_own_type():
    q = jnp.zeros((1, 6, 2, 4), jnp.bfloat16)
    loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    found = products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, q, q))
    assert len(found) == 6 and all(product.types == {"bfloat16"} for product in found)


def test_schedules_are_float32(pipeline):
    schedule = pipeline.base.schedule
    assert alphas_cumprod(schedule).dtype == np.float32
    for sampler in SAMPLERS:
        assert {x.dtype for x in jax.tree.leaves(make_plan(sampler, schedule, 4))} == {np.dtype("float32")}


# --- losses and pretraining


@pytest.mark.parametrize("ring", [False, True])
def test_the_contrastive_loss_is_exact_and_float32(ring):
    """Of embeddings and a table in bfloat16, with its gradient."""
    v, table = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((10, 4), jnp.bfloat16)
    loss = functools.partial(contrastive_ring, mesh=make_mesh({"data": 8})) if ring else contrastive_dense

    def mean(v, table):
        rows = jnp.arange(8), jnp.ones(8, bool)
        return loss(v, *rows, table, jnp.ones(10, bool), temperature=0.1, neighbours=2).mean()

    traced = jax.jit(jax.value_and_grad(mean)).trace(v, table)
    found = list(operations(traced.jaxpr))
    check_statistics(found)
    check_products(products(traced.jaxpr))
    assert all(product.types == {"float32"} for product in products(traced.jaxpr))
    assert check_text(traced.lower().as_text()) >= 4 and traced.out_info[0].dtype == jnp.float32


@pytest.mark.parametrize("loss", ["pairs", "pictures and captions"])
def test_similarities_that_other_networks_are_trained_on_are_exact(loss):
    u = jnp.ones((4, 3))
    if loss == "pairs":
        jaxpr = jax.make_jaxpr(jax.grad(lambda u: pair_loss(u, 0.1)[0].mean()))(u)
    else:
        same = jnp.eye(4, dtype=bool)
        jaxpr = jax.make_jaxpr(jax.grad(lambda u: contrastive_loss(u, u, jnp.float32(2.0), same)[0].mean()))(u)
    found = products(jaxpr)
    assert len(found) == 3 and all(product.is_exact for product in found)


@pytest.mark.parametrize("mesh", [None, {"data": 4, "fsdp": 2}])
def test_a_step_of_pretraining(mesh, half):
    batch, draws = 8, 2
    shots = pictures(8).reshape(4, 2, SIDE, SIDE, 3)
    latents = np.zeros((4, 2, SIDE // 2, SIDE // 2, 4), np.float16)
    prompts = half.tokenizer.encode(["a photo of S*", "S* at night"] * 4, {"S*": 1}).reshape(4, 2, -1)
    covered = np.zeros((4, 2, SIDE // 2, SIDE // 2), np.float16)
    data = Pairs(shots, latents, covered, prompts, batch_size=batch, share=0.5, seed=0, draws=draws)
    frozen = Frozen(half.base, jnp.asarray(half.tokenizer.encode([""])), jnp.asarray(prompts[0]))
    weights = Weights(contrastive=0.5, norm=1e-2, temperature=0.1, neighbours=3, gamma=5.0)
    task = TuningEncoderTask(
        half.encoder.config,
        frozen,
        data,
        None,
        batch_size=batch,
        weights=weights,
        draws=draws,
        mesh=mesh and make_mesh(mesh),
    )
    inputs = half.encoder.params, frozen, data.batch(0, slice(0, batch)), jax.random.key(0), jnp.int32(0)
    traced = jax.jit(task.value_and_grad).trace(*inputs)
    assert is_float32(traced.out_info)
    found = list(operations(traced.jaxpr))
    check_statistics(found)
    check_products(products(traced.jaxpr), ENCODER)
    exact = [product for product in products(traced.jaxpr) if product.is_exact]
    for place in ("objectives/contrastive.py _einsum", "training/tuning_encoder.py offset_norm"):
        assert any(product.is_within((place,)) for product in exact), place


# --- metrics


def test_metrics_are_float32_and_exact_whatever_the_model_computes_in(half):
    """CLIP's two towers, those of the model itself, and the judge of the embedded world."""
    clip = picture_scores.own_clip(half)
    assert clip is not None
    look = picture_scores._look.trace(
        clip.eye.model, clip.eye.take, np.zeros((2, SIDE, SIDE, 3), np.uint8), *np.zeros((2, 1, 1, 1, 3), np.float32)
    )
    text = replace(half.base.text, config=replace(half.base.text.config, with_projection=True, projection_dim=12))
    text = random_model(text.kind, text.config, 0).cast("bfloat16", "bfloat16")
    read = picture_scores._read.trace(picture_scores._exact(text), np.zeros((2, 8), np.int32))
    network = random_model(judge.Judge, judge.JudgeConfig(widths=(8,), embedding=8), 0)
    verdict = judge._verdict.trace(network, np.zeros((2, SIDE, SIDE, 3), np.uint8))
    for traced in (look, read, verdict):
        found = products(traced.jaxpr)
        assert found and all(product.types == {"float32"} and product.is_exact for product in found)
        assert check_text(traced.lower().as_text()) == len(found)
        check_statistics(operations(traced.jaxpr))
