"""From a recipe to a pretrained tuning-encoder on the embedded world."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from tqdm import tqdm

from datencoder_jax.checkpoints.encoder_folder import write_encoder
from datencoder_jax.checkpoints.hub import resolve_base
from datencoder_jax.checkpoints.weights import read_params
from datencoder_jax.encoder.features import denoiser_features, tapped_layers
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.pipeline import Pipeline, attention_shapes, read_pipeline
from datencoder_jax.prompts import TEMPLATE
from datencoder_jax.toyworld.captions import prompt_for
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT, SPLITS, Draws, sample_context
from datencoder_jax.training.loop import fit
from datencoder_jax.training.tuning_encoder import Frozen, PairSource, TuningEncoderTask, Weights
from datencoder_jax.training.vae import encode_latents

TOKEN = "S*"


def encoder_config(pipeline: Pipeline, **sizes) -> EncoderConfig:
    """The configuration of an encoder for a base model: what it reads and fills is the model's, the sizes are given."""
    base = pipeline.base
    vision = base.eyes.config
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    latents = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, pipeline.tokenizer.length, base.table.shape[1]), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    width = base.unet.config.pooled_width
    added = jax.eval_shape(base.added, latents, jax.ShapeDtypeStruct((1, width), jnp.float32)) if width else None
    pooled = jax.eval_shape(denoiser_features, base.unet, latents, t, context, added)
    return EncoderConfig(
        vision_width=vision.hidden_size,
        vision_taps=len(tapped_layers(vision.num_hidden_layers)),
        denoiser_width=pooled.shape[1],
        embedding_dim=base.table.shape[1],
        inventory=tuple((path, *shape) for path, shape in attention_shapes(base.unet).items()),
        reference_norm=float(base.word_norm),
        **sizes,
    )


def concept_views(pipeline: Pipeline, split: str, data, seed: int, classes: tuple[str, ...] = CLASSES) -> PairSource:
    """Draws `data.concepts` instances of `classes` in `data.views` contexts each.

    A view's prompt names its context, or, for a share `data.template_share`, is the tuning template.
    """
    ids = [i for i in SPLITS[split] if CLASSES[i % len(CLASSES)] in classes]
    chosen = np.random.default_rng(seed).choice(ids, size=data.concepts, replace=False)
    images, prompts = [], []
    for concept in tqdm(chosen, desc=f"rendering {split}", disable=len(chosen) < 1000):
        draws = Draws(int(concept), seed, count=256)
        contexts = [sample_context(draws, flat=data.flat) for _ in range(data.views)]
        seeds = [int(draws.random() * 2**31) for _ in contexts]
        images.append(render_batch([int(concept)] * data.views, contexts, seeds))
        plain = [draws.random() < data.template_share for _ in contexts]
        prompts += [TEMPLATE.format(TOKEN) if p else prompt_for(c, TOKEN) for p, c in zip(plain, contexts, strict=True)]
    pictures = np.stack(images)
    latents = encode_latents(pipeline.base.vae, pictures.reshape(-1, *pictures.shape[2:]))
    shape = (data.concepts, data.views)
    tokens = pipeline.tokenizer.encode(prompts, {TOKEN: 1})
    return PairSource(pictures, latents.reshape(*shape, *latents.shape[1:]), tokens.reshape(*shape, -1))


def train_encoder(config, workdir: Path) -> None:
    """Pretrains the tuning-encoder of `config.model` and writes it to `config.output`."""
    pipeline = read_pipeline(resolve_base(config.model), str(config.model))
    seen = tuple(name for name in CLASSES if name not in HELD_OUT)
    source = concept_views(pipeline, "train", config.data, config.seed, seen)
    few = config.data.copy_and_resolve_references()
    few.concepts = min(32, config.data.concepts)
    few.template_share = 0.0
    held_out = concept_views(pipeline, "validation", few, 0)
    sizes = encoder_config(pipeline, **config.encoder)
    mesh = None
    if jax.device_count() > 1:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    task = TuningEncoderTask(
        sizes,
        Frozen(pipeline.base, jnp.asarray(pipeline.tokenizer.encode([""]))),
        source,
        held_out,
        batch_size=config.batch_size,
        pairs=config.pairs,
        weights=Weights(**config.weights),
        seed=config.seed,
        mesh=mesh,
    )
    initial = None
    if config.initial:
        initial = jax.device_put(read_params(Path(config.initial), abstract_params(TuningEncoder, sizes)))
    params = fit(task, config, workdir, initial=initial)
    write_encoder(config.output, Model(TuningEncoder, sizes, params), pipeline.fingerprint)
