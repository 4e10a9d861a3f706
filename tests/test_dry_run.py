"""Dry runs: a plan's programs are those of a real run, to the letter, for every method and on absent GPUs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from absent_gpu import Hopper, allow_cudnn, with_fused_attention
from tiny import SIDE, in_half_precision, pictures, random_model, tiny_pipeline, write_tiny_base, write_tiny_xl

from datencoder_jax import api, compilation, compile_ahead
from datencoder_jax.encoder.domain_encoder import DomainEncoder
from datencoder_jax.memory import PRESETS, Memory
from datencoder_jax.methods import METHODS
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.plan import dry_run, shapes
from datencoder_jax.runtime.target import Target
from datencoder_jax.training.encoder_stage import domain_config

STEPS = 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model with a tuning-encoder and E4T's encoder, whose attention has a head dimension that cuDNN takes."""
    pipeline = tiny_pipeline(write_tiny_base(tmp_path_factory.mktemp("tiny")))
    config = domain_config(pipeline, "robot", rank=2, width=8, depth=1, heads=2)
    return replace(pipeline, domain=random_model(DomainEncoder, config, 5))


def run(pipeline, method):
    word = "robot" if METHODS[method].word is not None else None
    result = api.personalize(pipeline, list(pictures(1)), method=method, word=word, steps=STEPS, quiet=True)
    count = -(-pipeline.memory.batch // len(pipeline.prompts))
    api.generate(pipeline, pipeline.prompts, concept=result.concept, num=count, quiet=True)


def texts_of_a_run(pipeline, method, monkeypatch):
    """Of every program that a run compiles, name and lowered text."""
    texts = []

    def compile_and_keep(program, args, kwargs):
        traced = program.trace(*args, **kwargs)
        texts.append((program.name, traced.lower().as_text()))
        return compilation.Compilation(traced.lower().compile(), from_cache=False)

    monkeypatch.setattr(compilation.Program, "_compile", compile_and_keep)
    kept, real = {}, compilation.Program.__call__

    def call_afresh(program, *args, **kwargs):
        program._compiled = kept.setdefault(program, {})  # those of earlier tests are not this run's
        return real(program, *args, **kwargs)

    monkeypatch.setattr(compilation.Program, "__call__", call_afresh)
    run(pipeline, method)
    return texts


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        ("datencoder", Memory(batch=4)),
        ("datencoder", PRESETS[8]),
        ("lora", Memory(batch=2)),
        ("perfusion", Memory(batch=4)),
        ("e4t", Memory(batch=4)),
    ],
)
def test_a_plan_has_the_programs_of_a_run_to_the_letter(plain, method, memory, monkeypatch):
    pipeline = replace(plain, memory=memory)
    if memory.in_parts:
        pipeline = replace(pipeline, base=jax.device_get(pipeline.base), encoder=jax.device_get(pipeline.encoder))
    programs = dry_run.record_programs(
        compile_ahead.without_weights(pipeline), jax.devices()[0], method=method, word="robot", steps=STEPS
    )
    planned = [(program.name, program.traced.lower().as_text()) for program in programs]
    compiled = texts_of_a_run(pipeline, method, monkeypatch)
    assert [name for name, _ in planned] == [name for name, _ in compiled]
    for (name, plan), (_, text) in zip(planned, compiled, strict=True):
        assert plan == text, name


@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_shapes_of_a_folder_have_the_programs_of_its_weights(kind, tmp_path):
    """What a plan makes of a folder's configurations is what loading the folder gives."""
    folder = write_tiny_base(tmp_path) if kind == "SD" else write_tiny_xl(tmp_path)
    loaded, target = read_pipeline(folder, "tiny"), Target.of(jax.devices()[0])
    base = shapes.base_of_folder(folder, "float32", target)
    planned = dry_run.hollow_pipeline(base, sorted(folder.glob("tokenizer*")), loaded.memory, name="tiny")
    recorded = [
        dry_run.record_programs(pipeline, jax.devices()[0], method="lora", word="robot", steps=STEPS, resolution=SIDE)
        for pipeline in (planned, compile_ahead.without_weights(loaded))
    ]
    texts = [[(program.name, program.traced.lower().as_text()) for program in programs] for programs in recorded]
    assert [name for name, _ in texts[0]] == [name for name, _ in texts[1]]
    for (name, plan), (_, text) in zip(*texts, strict=True):
        assert plan == text, name


def test_hollow_arrays_take_no_memory():
    array = compile_ahead.hollow_array(jax.ShapeDtypeStruct((10**5, 10**5), jnp.bfloat16))
    assert array.shape == (10**5, 10**5) and not any(array.strides) and array[3, 4] == 1


def test_nothing_is_compiled_in_a_dry_run(plain, monkeypatch):
    monkeypatch.setattr(compilation.Program, "_compile", None)
    hollow = compile_ahead.without_weights(plain)
    names = [p.name for p in dry_run.record_programs(hollow, jax.devices()[0], steps=STEPS)]
    assert names == [
        "prediction", "VAE encoding", "text encoding", "subject mask", "initial state", "tuning", "sampling"
    ]  # fmt: skip
    assert compilation._dry_run is None


# --- GPUs that are not there: tracing asks cuDNN for its version, and refuses what its kernels or their rules cannot do


@pytest.fixture
def trace_for_hopper(monkeypatch):
    """Traces all programs of a method for an H100, in bfloat16."""
    allow_cudnn(monkeypatch)
    monkeypatch.setattr(dry_run, "_place", lambda leaf, device: _shape(leaf))

    def trace(pipeline, method, **options):
        pipeline = replace(pipeline, base=in_half_precision(pipeline.base))
        programs = dry_run.record_programs(
            compile_ahead.without_weights(pipeline), Hopper(), method=method, word="robot", **options
        )
        return {program.name: str(program.traced.jaxpr) for program in programs}

    return trace


def _shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


@pytest.fixture(scope="module")
def wide(plain):
    return with_fused_attention(plain)


@pytest.mark.parametrize("method", METHODS)
def test_every_program_of_every_method_traces_for_a_gpu_through_cudnn(wide, method, trace_for_hopper):
    """Odd numbers of keys (as 77) in tuning's gradient, and no `vmap` in which queries are batched and keys are not."""
    texts = trace_for_hopper(wide, method, steps=STEPS)
    assert {"tuning", "sampling"} <= texts.keys()
    for name in ("tuning", "sampling", "subject mask"):
        if name in texts:
            assert "dot_product_attention_fwd" in texts[name], name
    assert "dot_product_attention_bwd" in texts["tuning"]


def test_the_target_is_that_of_the_absent_gpu():
    assert Target.of(Hopper()) == Target("cuda", (9, 0))
