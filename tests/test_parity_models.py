"""Every model against its PyTorch original, with random weights, in float32."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datencoder_jax.checkpoints.layouts import from_torch_layout
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.runtime.target import current_target
from datencoder_jax.typing import Added, LowRank

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5

UNET_SD1 = {
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}
UNET_SMALL = UNET_SD1 | {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "sd1": UNET_SD1,
    "sd2": UNET_SD1 | {"attention_head_dim": (2, 4, 6), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": UNET_SMALL
    | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4)}
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    | {"addition_embed_type": "text_time", "addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 46},
    # Options that no version changes, so that their being read shows.
    "other": UNET_SMALL
    | {"layers_per_block": 2, "transformer_layers_per_block": 2, "norm_eps": 0.1}
    | {"flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 5, "out_channels": 3, "act_fn": "gelu"},
}
VAE = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "sample_size": 32,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 20,
}
TEXT = TOWER | {"vocab_size": 100, "max_position_embeddings": 12, "pad_token_id": 99, "bos_token_id": 98}
VISION = TOWER | {"image_size": 24, "patch_size": 8}


def randomized(module, seed=0):
    """`module` for inference, with every bias and every norm's scale drawn at random, so that no mix-up goes unseen."""
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.normal_(1, 0.2)
            elif name.endswith("embedding.weight") and parameter.ndim == 2:
                parameter.normal_(0, 0.5)
    return module.eval().requires_grad_(False)


def ours(kind, config, module, prefix=""):
    """Our model `kind` of `config` with the weights of a PyTorch module, whose keys lack `prefix`."""
    arrays = {prefix + name: value.numpy() for name, value in module.state_dict().items()}
    params = from_torch_layout(arrays, abstract_params(kind, config))
    return Model(kind, config, {name: jnp.asarray(value) for name, value in params.items()})


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


def error(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual) - np.asarray(expected)).max())


def check(tolerance=TOLERANCE, **errors):
    print({name: f"{value:.1e}" for name, value in errors.items()})  # shown by `pytest -rP`
    assert max(errors.values()) <= tolerance, errors


def draw(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", UNETS)
def test_unet(shape):
    theirs = randomized(diffusers.UNet2DConditionModel(**UNETS[shape]))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(1)
    latents, context, t = (
        draw(rng, 2, 8, 16, theirs.config.in_channels),
        draw(rng, 2, 5, 24),
        np.array([7, 903], np.int32),
    )
    added, theirs_added = None, None
    if theirs.config.addition_embed_type:
        added = Added(draw(rng, 2, 10), np.array([[64, 48, 3, 5, 64, 48], [8, 9, 0, 0, 80, 90]], np.float32))
        theirs_added = {"text_embeds": torch.from_numpy(added.pooled), "time_ids": torch.from_numpy(added.sizes)}
    taps = []
    hook = theirs.mid_block.register_forward_hook(lambda _module, _inputs, output: taps.append(output))
    residuals = []
    down = theirs.up_blocks[0].register_forward_hook(
        lambda _module, _inputs, kept, _output: residuals.extend(kept["res_hidden_states_tuple"]), with_kwargs=True
    )
    expected = theirs(
        nchw(latents), torch.from_numpy(t), torch.from_numpy(context), added_cond_kwargs=theirs_added
    ).sample
    hook.remove()
    down.remove()

    def run(model, latents, t, context, added):
        return model(latents, t, context, added=added), model.bind().features(latents, t, context, added)

    actual, features = jax.jit(run)(model, latents, t, context, added)
    if added is None:
        residuals = encoder_residuals(theirs, latents, t, context)
    else:  # the last of them, which go into the first up block
        features = features[-1 - len(residuals) :]
    expected_features = [nhwc(x) for x in [*residuals, taps[0]]]
    check(
        output=error(actual, nhwc(expected)),
        features=max(error(a, b) for a, b in zip(features, expected_features, strict=True)),
    )


def encoder_residuals(unet, latents, t, context):
    """The residuals that diffusers' down blocks hand to its up blocks, `conv_in`'s output first."""
    time = unet.time_embedding(unet.time_proj(torch.from_numpy(t)))
    h = unet.conv_in(nchw(latents))
    residuals = [h]
    for block in unet.down_blocks:
        extra = {"encoder_hidden_states": torch.from_numpy(context)} if hasattr(block, "attentions") else {}
        h, more = block(h, time, **extra)
        residuals += more
    return residuals


def test_one_timestep_stands_for_the_batch():
    theirs = randomized(diffusers.UNet2DConditionModel(**UNET_SMALL))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(1)
    latents, context = draw(rng, 2, 4, 4, 4), draw(rng, 2, 5, 24)
    run = jax.jit(lambda model, t: model.bind().features(latents, t, context)[-1])
    np.testing.assert_array_equal(run(model, jnp.int32(11)), run(model, jnp.array([11, 11])))


def test_a_unet_that_takes_pooled_text_says_so_and_checks_its_width():
    config = UNetConfig.from_dict(UNETS["sdxl"])
    assert config.pooled_width == 10 and UNetConfig.from_dict(UNET_SD1).pooled_width == 0
    module = Model(UNet2DConditionModel, config, abstract_params(UNet2DConditionModel, config))
    with pytest.raises(ValueError, match="pooled text"):
        jax.eval_shape(
            lambda model, *inputs: model(*inputs), module, jnp.zeros((1, 4, 4, 4)), jnp.int32(1), jnp.zeros((1, 5, 24))
        )
    for options in ({"projection_class_embeddings_input_dim": 36}, {"addition_time_embed_dim": None}):
        with pytest.raises(ValueError, match="do not fit"):
            UNetConfig.from_dict(UNETS["sdxl"] | options)


def test_remat_changes_memory_and_not_the_gradient():
    deep = {"layers_per_block": 2, "transformer_layers_per_block": 3}
    theirs = randomized(diffusers.UNet2DConditionModel(**UNET_SD1 | deep))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(3)
    latents, context = draw(rng, 2, 16, 16, 4), draw(rng, 2, 5, 24)

    def gradient(remat):
        def loss(model, context):
            return jnp.square(model(latents, jnp.int32(500), context, remat=remat)).mean()

        return jax.jit(jax.grad(loss, argnums=1)).lower(model, context).compile(current_target().compiler_options())

    plain, saving = gradient(False), gradient(True)
    np.testing.assert_allclose(saving(model, context), plain(model, context), rtol=1e-4, atol=1e-7)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (saving, plain)]
    assert sizes[0] < 0.5 * sizes[1], sizes


def test_a_scan_over_transformer_blocks_changes_neither_prediction_nor_gradient():
    """Two and three blocks in a row, both paths, a low-rank offset in each projection and its gradient."""
    theirs = randomized(diffusers.UNet2DConditionModel(**UNET_SMALL | {"transformer_layers_per_block": (2, 3)}))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(3)
    latents, context, hard = draw(rng, 2, 4, 4, 4), draw(rng, 2, 5, 24), draw(rng, 2, 5, 24)
    weights = {name.removesuffix(".weight"): value for name, value in model.params.items() if ".attn" in name}
    weights = {name: value for name, value in weights.items() if value.ndim == 2}
    offsets = {name: LowRank(0.1 * draw(rng, len(w), 2), 0.1 * draw(rng, 2, w.shape[1])) for name, w in weights.items()}

    def predict(offsets, context, **options):
        return model(latents, jnp.int32(500), context, offsets=offsets, hard_context=hard, blend=0.7, **options)

    def lower_gradient(**options):
        def loss(*inputs):
            predicted = predict(*inputs, **options)
            return jnp.square(predicted).mean(), predicted

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(offsets, context)

    looped, scanned = lower_gradient(), lower_gradient(scan_layers=True, remat=True)
    assert scanned.as_text().count("stablehlo.while") > 0 == looped.as_text().count("stablehlo.while")
    results = [jax.tree.leaves(lowered.compile()(offsets, context)) for lowered in (scanned, looped)]
    results[0].append(jax.jit(functools.partial(predict, scan_layers=True))(offsets, context))
    results[1].append(results[1][-1])
    for own, expected in zip(*results, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("reason", ["maps are collected", "offsets of some blocks", "offsets of several ranks"])
def test_blocks_that_differ_are_not_scanned(reason):
    theirs = randomized(diffusers.UNet2DConditionModel(**UNET_SMALL | {"transformer_layers_per_block": 2}))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(3)
    latents, context = draw(rng, 2, 4, 4, 4), draw(rng, 2, 5, 24)
    attentions = {p.removesuffix(".to_q.weight") for p in model.params if p.endswith("attn2.to_q.weight")}
    ranks = {"maps are collected": (2, 2), "offsets of some blocks": (0, 2), "offsets of several ranks": (1, 2)}[reason]
    offsets = {}
    for path in attentions:
        weight, rank = model.params[f"{path}.to_q.weight"], ranks[int(path.split(".")[-2])]
        if rank:
            offsets[f"{path}.to_q"] = LowRank(draw(rng, len(weight), rank), draw(rng, rank, weight.shape[1]))

    def run(scan_layers):
        maps = dict.fromkeys(attentions) if reason == "maps are collected" else None
        return model(latents, jnp.int32(5), context, offsets=offsets, scan_layers=scan_layers, maps=maps), maps

    (own, maps), (expected, _) = run(True), run(False)
    np.testing.assert_array_equal(own, expected)
    assert maps is None or all(each is not None for each in maps.values())


@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": None}])
def test_vae(options):
    theirs = randomized(diffusers.AutoencoderKL(**VAE | options))
    config = VAEConfig.from_dict(dict(theirs.config))
    model = ours(AutoencoderKL, config, theirs)
    rng = np.random.default_rng(2)
    images, latents = draw(rng, 2, 16, 32, 3), draw(rng, 2, 4, 8, 4)

    def run(model, images, latents):
        vae = model.bind()
        return vae.encode(images), vae.to_latents(images), vae.decode(latents), vae.to_images(latents)

    posterior, scaled, decoded, pictures = jax.jit(run)(model, images, latents)
    expected = theirs.encode(nchw(images)).latent_dist
    scale, shift = config.scaling_factor, config.shift_factor or 0.0
    errors = {
        "mean": error(posterior.mean, nhwc(expected.mean)),
        "log_variance": error(posterior.log_variance, nhwc(expected.logvar)),
        "scaled": error(scaled, nhwc((expected.mean - shift) * scale)),
        "decoded": error(decoded, nhwc(theirs.decode(nchw(latents)).sample)),
        "pictures": error(pictures, nhwc(theirs.decode(nchw(latents) / scale + shift).sample.clamp(-1, 1))),
    }
    check(**errors)
    # The factor is what the data room sizes latents by.
    assert images.shape[1] // config.factor == scaled.shape[1]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [99, 2])
def test_clip_text(act, eos):
    options = TEXT | {"hidden_act": act, "eos_token_id": eos, "layer_norm_eps": 1e-4}
    theirs = randomized(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**options)))
    values = theirs.config.to_dict() | {"architectures": ["CLIPTextModelWithProjection"]}
    model = ours(CLIPTextModel, CLIPTextConfig.from_dict(values), theirs)
    # Token 2 is ordinary text; the padding repeats the end of text.
    ids = np.array([[98, 5, 2, 99, 99, 99, 99], [98, 99, 99, 99, 99, 99, 99], [98, 7, 8, 2, 9, 1, 99]], np.int32)
    expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    actual = jax.jit(lambda model, ids: model(ids))(model, ids)
    check(
        last_hidden=error(actual.last_hidden, expected.last_hidden_state),
        penultimate=error(actual.penultimate, expected.hidden_states[-2]),
        pooled=error(actual.pooled, theirs.text_model(torch.from_numpy(ids)).pooler_output),
        projected=error(actual.projected, expected.text_embeds),
    )


def test_clip_text_without_projection():
    theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=99)))
    values = theirs.config.to_dict() | {"architectures": ["CLIPTextModel"]}
    model = ours(CLIPTextModel, CLIPTextConfig.from_dict(values), theirs, prefix="text_model.")
    ids = np.array([[98, 5, 99]], np.int32)
    actual = model(ids)
    assert actual.projected is None
    assert error(actual.last_hidden, theirs(torch.from_numpy(ids)).last_hidden_state) <= TOLERANCE


@pytest.mark.parametrize("eos", [99, 2])
def test_concept_rows_stand_in_for_token_rows(eos):
    config = CLIPTextConfig.from_dict(TEXT | {"eos_token_id": eos})
    theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | {"eos_token_id": eos})))
    model = ours(CLIPTextModel, config, theirs, prefix="text_model.")
    table = model.params["text_model.embeddings.token_embedding.weight"]
    run = jax.jit(lambda model, ids, concept: model(ids, concept))
    written = np.array([[98, 5, 6, 7, 99, 99], [98, 8, 1, 1, 99, 99]], np.int32)
    spliced = np.array([[98, 100, 6, 101, 99, 99], [98, 101, 1, 1, 99, 99]], np.int32)
    # One program for what is compared: another may round otherwise.
    per_sample = jnp.stack([table[np.array([5, 7])], table[np.array([7, 8])]])
    expected = run(model, written, per_sample)
    jax.tree.map(np.testing.assert_array_equal, run(model, spliced, per_sample), expected)
    for_all = table[np.array([5, 7])]
    shared = run(model, spliced, for_all)
    np.testing.assert_array_equal(shared.pooled[0], run(model, written, for_all).pooled[0])
    assert error(run(model, written, None).last_hidden, expected.last_hidden) <= TOLERANCE
    # Ids that nothing stands behind read the last row; they never turn into NaN.
    beyond = run(model, np.where(spliced > 99, spliced + 900, spliced), per_sample)
    assert np.isfinite(beyond.last_hidden).all()
    assert np.isfinite(run(model, spliced, None).last_hidden).all()


def test_gradient_reaches_the_concept():
    config = CLIPTextConfig.from_dict(TEXT | {"eos_token_id": 99})
    theirs = randomized(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=99)))
    model = ours(CLIPTextModel, config, theirs, prefix="text_model.")
    ids = np.array([[98, 100, 99], [98, 102, 99]], np.int32)
    gradient = jax.jit(jax.grad(lambda concept, model: (model(ids, concept).pooled ** 2).sum()))(
        jnp.ones((3, 32)), model
    )
    norms = jnp.linalg.norm(gradient, axis=-1)
    assert norms[0] > 0 and norms[2] > 0
    assert norms[1] == 0  # no id selects it


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_vision(act):
    options = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    theirs = randomized(transformers.CLIPVisionModelWithProjection(options))
    values = theirs.config.to_dict() | {"architectures": ["CLIPVisionModelWithProjection"]}
    model = ours(CLIPVisionModel, CLIPVisionConfig.from_dict(values), theirs)
    images = draw(np.random.default_rng(3), 2, 24, 24, 3)
    expected = theirs(nchw(images), output_hidden_states=True)
    actual = jax.jit(lambda model, images: model(images))(model, images)
    assert len(actual.hidden) == len(expected.hidden_states) == 1 + VISION["num_hidden_layers"]
    check(
        last_hidden=error(actual.last_hidden, expected.last_hidden_state),
        pooled=error(actual.pooled, theirs.vision_model(nchw(images)).pooler_output),
        projected=error(actual.projected, expected.image_embeds),
        hidden=max(error(a, b) for a, b in zip(actual.hidden, expected.hidden_states, strict=True)),
    )


def test_half_precision_follows_float32():
    theirs = randomized(diffusers.UNet2DConditionModel(**UNET_SMALL))
    model = ours(UNet2DConditionModel, UNetConfig.from_dict(dict(theirs.config)), theirs)
    rng = np.random.default_rng(1)
    inputs = draw(rng, 2, 4, 4, 4), np.array([7, 903], np.int32), draw(rng, 2, 5, 24)
    run = jax.jit(lambda model, *inputs: model(*inputs))
    full, half = run(model, *inputs), run(model.cast("bfloat16", "bfloat16"), *inputs)
    assert half.dtype == jnp.float32
    check(0.1, bfloat16=error(half, full))


@pytest.mark.slow
def test_full_size_unet():
    theirs = randomized(diffusers.UNet2DConditionModel(cross_attention_dim=768))
    config = UNetConfig.from_dict(dict(theirs.config))
    rng = np.random.default_rng(4)
    latents, context, t = draw(rng, 1, 16, 16, 4), draw(rng, 1, 77, 768), np.array([501], np.int32)
    expected = nhwc(theirs(nchw(latents), torch.from_numpy(t), torch.from_numpy(context)).sample)
    model = ours(UNet2DConditionModel, config, theirs)
    del theirs
    gc.collect()
    assert sum(x.size for x in model.params.values()) == 859_520_964
    actual = jax.jit(lambda model, *inputs: model(*inputs))(model, latents, t, context)
    relative = error(actual, expected) / float(np.abs(expected).max())
    check(1e-4, relative=relative)
