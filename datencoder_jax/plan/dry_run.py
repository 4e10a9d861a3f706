"""`personalize` and `generate` without weights and without computing: the programs they would compile are recorded.

The base model's weights are arrays that take no memory (one number, broadcast to the right shape). The functions of
`api` run as they are; wherever they call a `compilation.Program`, that program is traced for the target device, kept,
and answered with such arrays. So the list of programs, their arguments and their settings are those of a real run on
that device, whichever method it is, and a program that `personalize` gains is in the next plan by itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from datencoder_jax import api, compilation
from datencoder_jax.base import Base
from datencoder_jax.checkpoints.hub import ASSETS
from datencoder_jax.compile_ahead import hollow_array
from datencoder_jax.encoder.domain_encoder import DomainConfig
from datencoder_jax.memory import Memory
from datencoder_jax.methods import METHODS
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import XL_GUIDANCE, Pipeline
from datencoder_jax.prompts import PromptTokenizer
from datencoder_jax.runtime.target import Target, lowering_for


@dataclass(frozen=True)
class PlannedProgram:
    """A program that is compiled for a device and not run.

    Attributes:
        name: what it does.
        arguments: their shapes and shardings.
        traced: the program at these.
        devices: how many it runs on.
        images: how many it takes or makes in one run.
        resident: bytes on a device while it runs, of its arguments and of networks that stay beside them.
        parts: bytes per device of what its arguments are, by name.
        signature: types of all arguments, and static ones; programs of one base model that share name and signature
            are the same.
        calls: how often the run calls it.
    """

    name: str
    arguments: tuple
    traced: jax.stages.Traced
    devices: int
    images: int
    resident: int
    parts: dict[str, int]
    signature: tuple = ()
    calls: int = 1

    @property
    def key(self) -> str:
        """The name on the command line, such as "subject-mask"."""
        return self.name.lower().replace(" ", "-")


def hollow_pipeline(
    base: Base, tokenizer_folders: list[Path], memory: Memory, *, name: str, encoder: Model | None = None
) -> Pipeline:
    """A pipeline of a base model and an encoder of shapes (`plan.shapes`), whose arrays are hollow.

    Args:
        tokenizer_folders: of the text towers, one each.
        encoder: a tuning-encoder, or E4T's encoder of a domain.
    """
    tokenizers = [
        PromptTokenizer(folder, tower.config.vocab_size, tower.config.max_position_embeddings)
        for folder, tower in zip(tokenizer_folders, filter(None, (base.text, base.text_2)), strict=True)
    ]
    first, is_xl = tokenizers[0], base.text_2 is not None
    base = replace(base, end_token=first.end, second_pad=tokenizers[-1].pad if is_xl else 0, zero_empty=is_xl)
    base, encoder = jax.tree.map(hollow_array, (base, encoder))
    is_domain = encoder is not None and isinstance(encoder.config, DomainConfig)
    return Pipeline(
        name,
        name,
        base,
        first,
        encoder=None if is_domain else encoder,
        domain=encoder if is_domain else None,
        memory=memory,
        guidance=XL_GUIDANCE if is_xl else Pipeline.guidance,
    )


def tokenizer_folders(base: Base) -> list[Path]:
    """The folders of the shipped CLIP tokenizers that Stable Diffusion's text towers read."""
    if base.text_2 is not None:
        return [ASSETS / "clip_tokenizer", ASSETS / "open_clip_tokenizer"]
    is_open_clip = base.text.config.hidden_act == "gelu"
    return [ASSETS / ("open_clip_tokenizer" if is_open_clip else "clip_tokenizer")]


def record_programs(
    pipeline: Pipeline,
    device: Any,
    *,
    method: str = "datencoder",
    word: str | None = None,
    steps: int | None = None,
    resolution: int | None = None,
) -> Iterator[PlannedProgram]:
    """All programs of a run that personalizes one image and draws a full batch with the concept, in their order.

    Args:
        pipeline: of hollow arrays.
        device: what they are compiled for, which need not be present.
        method, word, steps, resolution: as for `api.personalize`; the word is "thing" where the method starts at one.

    Yields:
        Every program once, however often it is called.
    """
    side = resolution or pipeline.resolution
    picture = np.zeros((side, side, 3), np.uint8)
    count = -(-pipeline.memory.batch // len(pipeline.prompts))

    def run() -> None:
        result = api.personalize(
            pipeline,
            [picture],
            method=method,
            word=(word or "thing") if METHODS[method].word is not None else None,
            steps=steps,
            resolution=resolution,
            quiet=True,
        )
        api.generate(pipeline, pipeline.prompts, concept=result.concept, num=count, resolution=resolution, quiet=True)

    yield from record_run(run, pipeline, device)


def record_run(run: Callable[[], None], pipeline: Pipeline, device: Any) -> Iterator[PlannedProgram]:
    """All programs that calls of the API run, as `record_programs` has those of one run.

    Args:
        run: calls the API with the pipeline.
        pipeline: of hollow arrays.
        device: what they are compiled for.
    """
    recorded: dict[Any, PlannedProgram] = {}
    results: dict[Any, Any] = {}
    calls: Counter[Any] = Counter()
    networks = _bytes_of_networks((pipeline.base, pipeline.encoder, pipeline.domain))

    def record(program: compilation.Program, args: tuple, kwargs: dict[str, Any]) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        signature = tuple(_signature(leaf) for leaf in leaves)
        key = (program, structure, signature)
        calls[key] += 1
        if key not in recorded:
            placed_args, placed_kwargs = jax.tree.map(lambda leaf: _place(leaf, device), (args, kwargs))
            traced = program.trace(*placed_args, **placed_kwargs)
            own = _bytes_of_networks((args, kwargs))
            parts = {"networks": own, "others": _bytes((args, kwargs)) - own}
            resident = parts["others"] + (own if pipeline.memory.in_parts else max(own, networks))
            images = _images_of_run(program, kwargs, pipeline.memory)
            recorded[key] = PlannedProgram(program.name, placed_args, traced, 1, images, resident, parts, signature)
            results[key] = jax.tree.map(hollow_array, traced.out_info)
        return results[key]

    with lowering_for(Target.of(device)), compilation.dry_run(record):
        run()
    for key, program in recorded.items():
        yield replace(program, calls=calls[key])


def _images_of_run(program: compilation.Program, kwargs: dict[str, Any], memory: Memory) -> int:
    """How many images a run of a program takes or makes."""
    config = kwargs.get("config")
    if "steps" in kwargs and config is not None:
        return kwargs["steps"] * config.draws
    if config is not None and "pictures" not in kwargs:
        return config.views
    return memory.batch if program.name in ("sampling", "VAE decoding") else 1


def _place(leaf: Any, device: Any) -> Any:
    """The leaf's shape on the device; static arguments stay as they are.

    Arguments of a run on a device that is present are committed to none, and so are these.
    """
    if not hasattr(leaf, "shape"):
        return leaf
    sharding = None if device in jax.local_devices() else SingleDeviceSharding(device)
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


def _bytes_of_networks(tree: Any) -> int:
    """Bytes that the parameters of the models in a tree have on a device."""
    models = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Model))
    return sum(_bytes(model.params) for model in models if isinstance(model, Model))


def _bytes(tree: Any) -> int:
    shaped = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shaped)
