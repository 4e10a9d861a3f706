"""From a recipe to a pretrained encoder, a tuning-encoder or E4T's of one domain.

It is trained on pairs of the embedded world, or on pictures from anywhere.
"""

import json
import logging
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.base import Base
from datencoder_jax.bookkeeping import SHIPPED_SEEDS
from datencoder_jax.checkpoints.encoder_folder import describe_encoder, read_encoder, write_encoder
from datencoder_jax.checkpoints.hub import resolve_base
from datencoder_jax.data.images import to_uint8
from datencoder_jax.data.records import Records, weights_fingerprint
from datencoder_jax.encoder.domain_encoder import DomainConfig, DomainEncoder
from datencoder_jax.encoder.features import denoiser_features, tapped_layers
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.loading import on_host
from datencoder_jax.methods.e4t import domain_word
from datencoder_jax.methods.method import embeddings_of
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import Pipeline, attention_shapes, read_pipeline, with_vision
from datencoder_jax.toyworld.world import CLASSES, HELD_OUT
from datencoder_jax.training.anchors import read_anchors
from datencoder_jax.training.distributed import gather
from datencoder_jax.training.e4t import E4TFrozen, E4TTask, E4TWeights
from datencoder_jax.training.loop import fit, initial_key
from datencoder_jax.training.mesh import make_mesh
from datencoder_jax.training.pairs import TOKEN, concept_views
from datencoder_jax.training.previews import Previews
from datencoder_jax.training.sources import open_source
from datencoder_jax.training.templates import TEMPLATES
from datencoder_jax.training.tuning_encoder import Data, Frozen, TuningEncoderTask, Weights
from datencoder_jax.typing import Params

if TYPE_CHECKING:
    from datencoder_jax.data.feed import Feed

_log = logging.getLogger("datencoder_jax")

PREVIEWS_OF_CONCEPTS = 32
"""Concepts of the embedded world that previews are drawn of; recipes on photographs have `previews`."""
DESCRIPTION = "encoder.json"
"""In the work folder: configuration and base model of the encoder that its checkpoints are of."""


def encoder_config(pipeline: Pipeline, **sizes) -> EncoderConfig:
    """The configuration of an encoder for a base model: what it reads and fills is the model's, the sizes are given.

    With `hypernetwork=False` it fills nothing, and predicts an embedding alone.
    """
    pipeline.base.require_words("training an encoder")
    return _encoder_config(pipeline.base, float(pipeline.base.word_norm), **sizes)


def abstract_config(base: Base, **sizes) -> EncoderConfig:
    """As `encoder_config`, for a base model of `jax.ShapeDtypeStruct`s, whose words have no length."""
    return _encoder_config(base, 1.0, **sizes)


def _encoder_config(base: Base, norm: float, *, hypernetwork: bool = True, **sizes) -> EncoderConfig:
    vision, length = base.eyes.config, base.text.config.max_position_embeddings
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    embedding_dim = sum(base.widths)
    latents = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, length, base.unet.config.cross_attention_dim), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    width = base.unet.config.pooled_width
    added = jax.eval_shape(base.added, latents, jax.ShapeDtypeStruct((1, width), jnp.float32)) if width else None
    pooled = jax.eval_shape(denoiser_features, base.unet, latents, t, context, added)
    return EncoderConfig(
        vision_width=vision.hidden_size,
        vision_taps=len(tapped_layers(vision.num_hidden_layers)),
        denoiser_width=pooled.shape[1],
        embedding_dim=embedding_dim,
        inventory=tuple((path, *shape) for path, shape in attention_shapes(base.unet).items() if hypernetwork),
        reference_norm=norm,
        **sizes,
    )


def domain_config(pipeline: Pipeline, domain: str, **sizes) -> DomainConfig:
    """As `encoder_config`, of E4T's encoder of a domain: it fills nothing; q, k and v have offsets that are shared."""
    return _with_shared_offsets(encoder_config(pipeline, blend=1.0, **sizes), domain)


def abstract_domain_config(base: Base, domain: str, **sizes) -> DomainConfig:
    """As `domain_config`, for a base model of `jax.ShapeDtypeStruct`s."""
    return _with_shared_offsets(abstract_config(base, blend=1.0, **sizes), domain)


def _with_shared_offsets(config: EncoderConfig, domain: str) -> DomainConfig:
    shared = tuple(row for row in config.inventory if row[0].endswith((".to_q", ".to_k", ".to_v")))
    own: dict[str, Any] = {option.name: getattr(config, option.name) for option in fields(config)}
    own["inventory"] = ()
    return DomainConfig(**own, domain=domain, shared=shared)


@dataclass(frozen=True)
class Pictures:
    """Batches of pictures from a feed; see `training.tuning_encoder.Data`."""

    feed: "Feed"

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        return self.feed.batch(step, rows)

    def report(self) -> dict[str, int]:
        """Damage by reason, whichever process met it; all processes have to ask for it together."""
        here = jax.process_index()
        for process, findings in enumerate(gather(self.feed.findings())):
            if process != here:
                self.feed.add_findings(findings)
        return self.feed.report()

    @property
    def identity(self) -> str:
        return self.feed.identity


def picture_feed(config, base: Base, *, batch_size: int, seed: int) -> "Feed":
    """The pictures of a recipe's `data` sections, in the sizes that VAE and vision tower see; some are held out."""
    from datencoder_jax.data.feed import Feed  # with grain, which only pretraining needs

    sections = tuple(config.data)
    return Feed(
        [open_source(section) for section in sections],
        [float(section.get("weight", 1.0)) for section in sections],
        batch_size=batch_size,
        seed=seed,
        resolution=config.resolution,
        vision_size=base.eyes.config.image_size,
        templates=len(TEMPLATES),
        hold_out=True,
        **config.augment,
    )


def train_encoder(config, workdir: Path, **options) -> None:
    """Pretrains the tuning-encoder of `config.model` and writes it to `config.output`.

    Args:
        options: as for `training.loop.fit`.
    """
    parts = _parts(config)
    words = tuple(config.get("anchors", ()))
    anchors = read_anchors(parts.pipeline, words) if words else None
    sizes = encoder_config(parts.pipeline, **(anchors.sizes if anchors else {}), **config.encoder)
    task = TuningEncoderTask(
        sizes,
        parts.frozen,
        parts.data,
        parts.previews,
        weights=Weights(**config.weights),
        draws=config.get("draws", 1),
        mesh=parts.mesh if parts.mesh.size > 1 else None,
        anchors=anchors,
        **parts.common,
    )
    _fit(task, TuningEncoder, config, workdir, parts.pipeline, **options)


def train_e4t(config, workdir: Path, **options) -> None:
    """Pretrains E4T's encoder of `config.domain` for `config.model` and writes it to `config.output`.

    Args:
        options: as for `training.loop.fit`.

    Raises:
        UserError: the domain is no single word of the model's.
    """
    parts = _parts(config)
    pipeline, frozen = parts.pipeline, parts.frozen
    word = embeddings_of(pipeline.base, [domain_word(pipeline, config.domain)])
    task = E4TTask(
        domain_config(pipeline, config.domain, **config.encoder),
        E4TFrozen(*frozen, word=word),
        parts.data,
        parts.previews,
        weights=E4TWeights(**config.weights),
        **parts.common,
    )
    _fit(task, DomainEncoder, config, workdir, pipeline, **options)


class _Parts(NamedTuple):
    """What the tasks of both kinds of encoders are made from; `common` are their keyword arguments."""

    pipeline: Pipeline
    frozen: Frozen
    data: Data
    previews: Previews
    mesh: jax.sharding.Mesh
    common: dict[str, Any]


def _parts(config) -> _Parts:
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    if config.get("draws", 1) < 1:
        raise UserError(f"draws is {config.draws}; a prediction is tried on 1 target or more")
    pipeline = read_frozen(config)
    data, previews = (_pairs if "concepts" in config.data else _pictures)(config, pipeline)
    from_records = isinstance(data, Pictures) and any(isinstance(source, Records) for source in data.feed.sources)
    if from_records and config.get("anchors", ()):
        raise UserError("records do not hold what anchors are chosen by; train on the pictures, or leave anchors empty")
    if from_records and config.encoder.get("patch_taps", 1) > 1:
        raise UserError("records hold the patches of one layer; train on the pictures, or set encoder.patch_taps=1")
    common = {
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "remat": config.remat,
        "identity": {
            "base": pipeline.fingerprint,
            "vision": pipeline.vision_fingerprint,
            "data": data.identity,
        },
    }
    return _Parts(pipeline, frozen_of(pipeline), data, previews, mesh, common)


def _check_batch(config, mesh: jax.sharding.Mesh) -> None:
    if config.batch_size % (config.accumulate * mesh.size):
        raise UserError(
            f"a batch of {config.batch_size} cannot be taken in {config.accumulate} parts by {mesh.size} devices; "
            "set batch_size or accumulate"
        )


def frozen_of(pipeline: Pipeline) -> Frozen:
    """What is not trained, and the prompts that tell nothing of a picture."""
    tokenizer = pipeline.tokenizer
    prompts = tokenizer.encode([template.format(TOKEN) for template in TEMPLATES], {TOKEN: 1})
    return Frozen(pipeline.base, jnp.asarray(tokenizer.encode([""])), jnp.asarray(prompts))


def _fit(task, kind: type, config, workdir: Path, pipeline: Pipeline, **options) -> None:
    """Trains, and writes the averaged weights."""
    fingerprints = pipeline.fingerprint, pipeline.vision_fingerprint
    initial = _grown(task, config, *fingerprints) if config.initial else None
    # In the work folder it notes what the checkpoints are of, so that they can be exported without the base model.
    description = json.dumps(describe_encoder(task.config, *fingerprints), indent=1) + "\n"
    params = fit(task, config, workdir, initial=initial, notes={DESCRIPTION: description}, **options)
    if jax.process_index() == 0:
        place = config.output or workdir / "encoder"
        write_encoder(place, Model(kind, task.config, params), *fingerprints)
        print(f"wrote the encoder to {place}", flush=True)


def _grown(task, config, fingerprint: str, vision: str) -> Params:
    """The weights of the encoder `config.initial`; what it lacks, and what `config.fresh` matches, starts afresh.

    Anchors are not weights: they are those of the recipe's words, whatever words the initial encoder has.
    """
    found = read_encoder(config.initial, fingerprint, vision).params
    key = jax.random.key(config.seed) if config.seed in SHIPPED_SEEDS else initial_key(config.seed)
    params, fresh = task.init(key), config.get("fresh", "")
    kept = {
        name: found[name]
        for name, value in params.items()
        if name in found and found[name].shape == value.shape and not (fresh and re.search(fresh, name))
    }
    kept |= {name: params[name] for name in kept if name.startswith("anchors.")}
    new = [name for name in sorted(params) if name not in kept]
    if new and jax.process_index() == 0:
        print(f"not taken from {config.initial}: {', '.join(new)}", file=sys.stderr)
    return params | kept


def read_frozen(config) -> Pipeline:
    """The base model in the machine's memory: the loop places each part once, where it belongs."""
    with on_host():
        pipeline = read_pipeline(resolve_base(config.model), str(config.model), dtype=config.dtype)
        if config.vision:
            pipeline = with_vision(pipeline, config.vision, dtype=config.dtype)
    return replace(pipeline, base=jax.device_get(pipeline.base))


def _pairs(config, pipeline: Pipeline) -> tuple[Data, Previews]:
    # Classes that a recipe does not name are those that the encoder is to be tried on unseen, too.
    named = tuple(config.data.get("classes", ()))
    seen = named or tuple(name for name in CLASSES if name not in HELD_OUT)
    source = concept_views(pipeline, "train", config.data, config.seed, seen)
    few = config.data.copy_and_resolve_references()
    few.concepts = min(PREVIEWS_OF_CONCEPTS, config.data.concepts)
    few.template_share = 0.0
    held_out = concept_views(pipeline, "validation", few, 0, named or CLASSES)
    drawn = {"batch_size": config.batch_size, "share": config.pairs, "draws": config.get("draws", 1)}
    return replace(source, **drawn, seed=config.seed), held_out.previews(PREVIEWS_OF_CONCEPTS)


def _pictures(config, pipeline: Pipeline) -> tuple[Data, Previews]:
    base = pipeline.base
    feed = picture_feed(config, base, batch_size=config.batch_size, seed=config.seed)
    for records in (source for source in feed.sources if isinstance(source, Records)):
        parts = {name: weights_fingerprint(part.params) for name, part in (("vae", base.vae), ("vision", base.eyes))}
        shown = {name: config.augment[name] for name in ("crop", "flip") if name in config.augment}
        records.check(resolution=config.resolution, **shown, **parts)
    few = feed.held_out(config.previews, config.seed + 1)
    if not few:
        few = picture_feed(config, base, batch_size=config.previews, seed=config.seed + 1).batch(0)
        if jax.process_index() == 0:
            _log.warning(
                "no picture could be held out of so few, so the previews, and scores of them, are of pictures that are "
                "trained on"
            )
    images = few["images"] if "images" in few else _decoded(base, few["moments"])
    ids = pipeline.tokenizer.encode([TEMPLATES[0].format(TOKEN)] * len(images), {TOKEN: 1})
    return Pictures(feed), Previews(images, ids, images)


def _decoded(base: Base, moments: np.ndarray) -> np.ndarray:
    """Pictures at the means of precomputed posteriors."""
    vae = base.vae.bind()
    means = np.split(moments.astype(np.float32), 2, axis=-1)[0]
    return np.concatenate([to_uint8(vae.to_images(vae.scaled(jnp.asarray(mean[None])))) for mean in means])


def abstract_task(
    config, base: Base, mesh: jax.sharding.Mesh
) -> tuple[TuningEncoderTask | E4TTask, dict[str, jax.ShapeDtypeStruct]]:
    """The task of a recipe on shapes alone, and the shapes of a global batch: for compiling without weights or data.

    Args:
        config: a resolved recipe of the stages "encoder" or "e4t".
        base: a base model of `jax.ShapeDtypeStruct`s with a vision tower.
        mesh: of the devices it is compiled for.

    Raises:
        UserError: the batch cannot be shared evenly.
    """
    _check_batch(config, mesh)
    shape: Any = jax.ShapeDtypeStruct
    length = base.text.config.max_position_embeddings
    ids, templates = shape((1, length), jnp.int32), shape((len(TEMPLATES), length), jnp.int32)
    common = {"batch_size": config.batch_size, "accumulate": config.accumulate, "remat": config.remat}
    if config.stage == "e4t":
        frozen = E4TFrozen(base, ids, templates, shape((1, sum(base.widths)), jnp.float32))
        sizes = abstract_domain_config(base, config.domain, **config.encoder)
        task = E4TTask(sizes, frozen, None, None, weights=E4TWeights(**config.weights), **common)
    else:
        task = TuningEncoderTask(
            abstract_config(base, **config.encoder),
            Frozen(base, ids, templates),
            None,
            None,
            weights=Weights(**config.weights),
            draws=config.get("draws", 1),
            mesh=mesh if mesh.size > 1 else None,
            **common,
        )
    count, side, seen = config.batch_size, config.resolution, base.eyes.config.image_size
    batch = {
        "images": shape((count, side, side, 3), jnp.uint8),
        "vision": shape((count, seen, seen, 3), jnp.uint8),
        "concepts": shape((count,), jnp.int32),
        "templates": shape((count,), jnp.int32),
    }
    return task, batch
