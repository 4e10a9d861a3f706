"""Every program that personalizing and drawing run, compiled for a GPU and a TPU, and checked on the compiled text."""

import functools
from dataclasses import replace

import jax
import pytest

import datencoder_jax
from datencoder_jax.compile_ahead import without_weights
from datencoder_jax.memory import PRESETS, choose, for_xl
from datencoder_jax.methods import METHODS
from datencoder_jax.plan import inspection, shapes
from datencoder_jax.plan.devices import find_machine
from datencoder_jax.plan.dry_run import record_programs
from datencoder_jax.plan.work import count_attention

TOPOLOGIES = ("H100", "v5e:1x1")
FLOAT32_PLACES = (
    "encoder/",  # the tuning-encoder, which is trained in float32
    "objectives/",
    "methods/text_metric.py",
    "models/edits.py",  # PaRa's decomposition and Perfusion's gates
    "models/vae.py",  # of XL
    "base.py:Base.vision_input",  # resizing pixels
    "tuning.py:views_of",  # cropping them
    "tuning.py:_views_of_maps",  # and the subject's mask with them
)
"""Files and functions whose products are meant to have float32 factors."""
EXACT_PLACES = ("objectives/", "methods/text_metric.py", "models/vae.py")
"""Those whose float32 factors must not be rounded as they are multiplied."""

ALONE = {"image features": 1.6, "VAE encoding": 0.6, "text encoding": 0.4, "initial state": 0.1, "VAE decoding": 0.8}
"""What each takes where networks visit the device one by one."""
BUDGETS = {
    ("1.5", "chosen", "H100"): {"prediction": 4.6, "VAE encoding": 4.6, "text encoding": 4.4, "initial state": 4.4}
    | {"subject mask": 4.7, "tuning": 12.0, "sampling": 6.9},
    ("1.5", "chosen", "v5e:1x1"): ALONE | {"prediction": 2.7, "subject mask": 2.6, "tuning": 4.5, "sampling": 2.5},
    ("1.5", 8, "H100"): ALONE | {"prediction": 2.6, "subject mask": 2.4, "tuning": 3.8, "sampling": 3.3},
    ("1.5", 8, "v5e:1x1"): ALONE | {"prediction": 2.7, "subject mask": 2.4, "tuning": 3.3, "sampling": 2.3},
}
"""GB of a device that a program may take, with all that lies beside it, by model, `--memory` and device."""


@functools.cache
def toyworld():
    """The embedded model in bfloat16, weights and computations, with E4T's encoder of a domain beside its own."""
    pipeline = datencoder_jax.load(dtype="bfloat16", compute_dtype="bfloat16")
    domain = shapes.domain_encoder(pipeline.base, "robot", {"rank": 4, "width": 64, "depth": 1, "heads": 2})
    return without_weights(replace(pipeline, domain=domain))


def check_fused_attention(result, *, needed=True):
    """Every attention that is traced as a fused one is compiled as one; nobody needs the gradient of some."""
    traced, compiled = count_attention(result.program.traced.jaxpr), inspection.fused_attention(result.text)
    assert compiled[0] == traced[0] and compiled[1] <= traced[1]
    if needed:
        assert compiled[0] > 0
        assert compiled[1] > 0 or result.program.name not in ("tuning", "train")


WITH_UNET = ("prediction", "subject mask", "tuning", "sampling")
"""Programs that run the UNet, most of whose attention is to be fused."""


def check_compiled(result, *, needs_attention):
    """What holds for every program; see `plan.inspection`."""
    program, text = result.program, result.text
    assert not inspection.host_callbacks(text)
    assert not inspection.float32_products(text, FLOAT32_PLACES)
    assert not inspection.rounded_products(text, EXACT_PLACES)
    check_fused_attention(result, needed=needs_attention)
    if program.name == "tuning":
        assert inspection.aliased_outputs(text) == len(jax.tree.leaves(program.arguments[0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_embedded_model(topology, method, compiled):
    machine, names = find_machine(topology), []
    for program in record_programs(toyworld(), machine.devices[0], method=method, word="robot"):
        result = compiled(program, machine, f"toyworld {method}")
        # A TPU's kernels are for more pixels than it has.
        check_compiled(result, needs_attention=machine.target.platform == "cuda" and program.name in WITH_UNET)
        names.append(program.name)
    assert {"VAE encoding", "tuning", "sampling"} <= set(names)


@pytest.mark.parametrize("memory", ["chosen", 8])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    "version", ["1.5", pytest.param("2.1", marks=pytest.mark.slow), pytest.param("XL", marks=pytest.mark.slow)]
)
def test_stable_diffusion(version, topology, memory, compiled):
    machine = find_machine(topology)
    settings = choose(True, machine.target_with_memory) if memory == "chosen" else PRESETS[memory]
    settings = for_xl(settings) if version == "XL" and memory == "chosen" else settings
    pipeline = shapes.pipeline_of_version(version, "datencoder", settings, machine.target)
    budgets = BUDGETS.get((version, memory, topology))
    resolution = 512 if version == "1.5" else None
    for program in record_programs(pipeline, machine.devices[0], steps=12, resolution=resolution):
        result = compiled(program, machine, f"{version}{'' if memory == 'chosen' else f' --memory {memory}'}")
        check_compiled(result, needs_attention=program.name in WITH_UNET)
        if budgets is not None:
            assert result.room.total <= 1e9 * budgets[program.name], program.name
