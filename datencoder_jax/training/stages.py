"""From a recipe to a trained part of the embedded world's base model, written into its folder (`config.base`)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from datencoder_jax.checkpoints.folders import BaseParts, read_component, write_base, write_component
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.judge import Judge, JudgeConfig, save_judge
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import CLIP_MEAN, CLIP_STD
from datencoder_jax.toyworld.captions import DEFAULTS, prompt_for
from datencoder_jax.toyworld.dataset import LABELS, prerender
from datencoder_jax.toyworld.tokenizer import MAX_LENGTH, build, write_tokenizer
from datencoder_jax.toyworld.world import CLASSES, Context, Draws, sample_context
from datencoder_jax.training.clip import CLIPTask, forget_unseen, split_params
from datencoder_jax.training.denoiser import DenoiserTask
from datencoder_jax.training.encoder_stage import train_e4t, train_encoder
from datencoder_jax.training.judge import JudgeTask, accuracies, render_views, separation
from datencoder_jax.training.loop import fit
from datencoder_jax.training.source import Source
from datencoder_jax.training.vae import VAETask, encode_latents


def render_source(split: str, data, seed: int, count: int | None = None, **options) -> Source:
    """Renders a recipe's `data` section (`count, size, flat`) from a split."""
    world = prerender(split, count or data.count, size=data.size, seed=seed, flat=data.flat, **options)
    labels = {name: world[name] for name in LABELS}
    return Source(world["images"], world["captions"], world["instance_id"], labels, seed)


def with_token_ids(source: Source, tokenizer_folder: Path) -> Source:
    """The source with its captions' token ids as `labels["ids"]`, int32 `[n, MAX_LENGTH]`."""
    return replace(source, labels=source.labels | {"ids": token_ids(source.captions, tokenizer_folder)})


def token_ids(texts: list[str], tokenizer_folder: Path) -> np.ndarray:
    """Padded token ids of texts: int32 `[n, MAX_LENGTH]`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="np")
    return encoded["input_ids"].astype(np.int32)


def train_vae(config, workdir: Path, **options) -> None:
    """The autoencoder, its scaling factor set so that latents have unit variance."""
    source = render_source("train", config.data, config.seed)
    held_out = render_source("validation", config.data, 0, 256)
    task = VAETask(
        VAEConfig(**config.model), source, held_out, batch_size=config.batch_size, kl_weight=config.kl_weight
    )
    params = fit(task, config, workdir, **options)
    if jax.process_index():
        return
    model = Model(AutoencoderKL, task.config, params)
    latents = encode_latents(model, held_out.images)
    deviation = float(latents.astype(np.float32).std())
    scaled = replace(model, config=replace(task.config, scaling_factor=round(1.0 / deviation, 5)))
    write_component(Path(config.base) / "vae", scaled, dtype="float32")
    print(f"wrote the autoencoder to {Path(config.base) / 'vae'}", flush=True)


def train_clip(config, workdir: Path, **options) -> None:
    """Both CLIP towers, with their projections to the space they share."""
    base = Path(config.base)
    write_tokenizer(base / "tokenizer")
    vocabulary = len(build()[0])
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        eos_token_id=vocabulary - 1,
        max_position_embeddings=MAX_LENGTH,
        with_projection=True,
        **config.text,
    )
    vision = CLIPVisionConfig(with_projection=True, **config.vision)
    source = with_token_ids(render_source("train", config.data, config.seed), base / "tokenizer")
    held_out = with_token_ids(render_source("validation", config.data, 0, 256), base / "tokenizer")
    task = CLIPTask(text, vision, source, held_out, batch_size=config.batch_size, mean=CLIP_MEAN, std=CLIP_STD)
    params = fit(task, config, workdir, **options)
    if jax.process_index():
        return
    text_params, vision_params, _ = split_params(params)
    text_params = forget_unseen(text_params, source.labels["ids"])
    write_component(base / "text_encoder", Model(CLIPTextModel, text, text_params), dtype="float32")
    write_component(base / "image_encoder", Model(CLIPVisionModel, vision, vision_params), dtype="float32")
    print(f"wrote the towers of CLIP to {base / 'text_encoder'} and {base / 'image_encoder'}", flush=True)


def feature_extractor(side: int) -> dict:
    """`preprocessor_config.json` of a vision tower that sees `side` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }


def preview_prompts() -> list[str]:
    """Forty prompts over every class, scene, style and accessory."""
    draws = Draws(0, 0)
    contexts = [Context(), *(sample_context(draws) for _ in range(39))]
    return [prompt_for(context, CLASSES[k % len(CLASSES)]) for k, context in enumerate(contexts)]


def train_unet(config, workdir: Path, **options) -> None:
    """The denoiser, and with it the whole base model as a diffusers folder."""
    base = Path(config.base)
    vae = read_component(base, "vae", AutoencoderKL, VAEConfig)
    text = read_component(base, "text_encoder", CLIPTextModel, CLIPTextConfig)
    vision = read_component(base, "image_encoder", CLIPVisionModel, CLIPVisionConfig)
    unet = UNetConfig(
        **config.model,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        sample_size=config.data.size // vae.config.factor,
        cross_attention_dim=text.config.hidden_size,
    )
    schedule = ScheduleConfig.from_dict({"_class_name": "DDIMScheduler", **config.schedule})
    source = with_token_ids(render_source("train", config.data, config.seed), base / "tokenizer")
    source = replace(source, images=encode_latents(vae, source.images))
    task = DenoiserTask(
        unet,
        schedule,
        text,
        vae,
        source,
        token_ids(preview_prompts(), base / "tokenizer"),
        token_ids([""], base / "tokenizer"),
        batch_size=config.batch_size,
        gamma=config.gamma,
        dropout=config.dropout,
    )
    initial = None
    if config.initial:
        before = read_component(config.initial, "unet", UNet2DConditionModel, UNetConfig)
        if before.config != unet:
            raise UserError(f"the UNet in {config.initial} has another configuration than the recipe's")
        initial = before.params
    params = fit(task, config, workdir, initial=initial, **options)
    if jax.process_index():
        return
    scheduler = {"_class_name": "DDIMScheduler", **config.schedule, "num_train_timesteps": schedule.num_train_timesteps}
    full = BaseParts(
        unet=Model(UNet2DConditionModel, unet, params),
        vae=vae,
        text_encoder=text,
        image_encoder=vision,
        scheduler=scheduler,
        tokenizer=base / "tokenizer",
        feature_extractor=feature_extractor(vision.config.image_size),
        defaults=DEFAULTS,
    )
    write_base(Path(config.output), full, dtype="float16")
    print(f"wrote the base model to {config.output}", flush=True)


def train_judge(config, workdir: Path, **options) -> None:
    """The judge of pictures, with its accuracy on unseen individuals in its `config.json`."""
    data = config.data
    source = render_views("train", data.instances, data.views, size=data.size, flat=data.flat, seed=config.seed)
    held_out = render_views("validation", data.held_out, data.views, size=data.size, flat=data.flat)
    task = JudgeTask(
        JudgeConfig(**config.model),
        source,
        held_out,
        batch_size=config.batch_size,
        temperature=config.temperature,
        contrastive_weight=config.contrastive_weight,
        probe_weight=config.probe_weight,
        seed=config.seed,
    )
    params = fit(task, config, workdir, **options)
    if jax.process_index():
        return
    judge = Model(Judge, task.config, params).cast("float16").cast("float32")
    scores = {"accuracy": accuracies(judge, held_out), "separation": separation(judge, held_out)}
    (workdir / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    save_judge(config.output, judge, extra=scores)
    print(f"wrote the judge to {config.output}", flush=True)


_STAGES = {
    "vae": train_vae,
    "clip": train_clip,
    "unet": train_unet,
    "encoder": train_encoder,
    "e4t": train_e4t,
    "judge": train_judge,
}


def run_stage(config, workdir: Path, **options) -> None:
    """Runs the stage `config.stage`; options as for `training.loop.fit`.

    Raises:
        UserError: no such stage.
    """
    if config.stage not in _STAGES:
        raise UserError(f"The recipe's stage is {config.stage!r}; it can be {', '.join(_STAGES)}.")
    _STAGES[config.stage](config, workdir, **options)
