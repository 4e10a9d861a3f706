"""Settings by memory and types of stored weights: what they change, and that concepts and pictures stay the same."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pictures, tiny_pipeline, write_tiny_base

import datencoder_jax
from datencoder_jax import api, memory, sampling, tuning
from datencoder_jax.checkpoints.encoder_folder import write_encoder
from datencoder_jax.errors import UserError
from datencoder_jax.memory import PRESETS, Memory
from datencoder_jax.methods import datencoder
from datencoder_jax.runtime.target import Target, current_target, lowering_for
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates

PROMPTS = ["a photo of a S* on the beach", "a pencil sketch of a S*"]
CONFIG = TuningConfig(draws=8, views=4)
NETWORKS = ("unet", "vae", "text", "vision")
HOPPER = Target("cuda", (9, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(folder):
    return replace(datencoder_jax.load(folder), encoder=tiny_pipeline(folder).encoder)


@pytest.fixture(scope="module")
def small(folder, plain, tmp_path_factory):
    encoder = tmp_path_factory.mktemp("encoder") / "encoder"
    write_encoder(encoder, plain.encoder, plain.fingerprint, plain.vision_fingerprint, dtype="float32")
    return datencoder_jax.load(folder, encoder=encoder, memory=8)


@pytest.fixture(scope="module")
def predicted(plain):
    return personalize(plain, steps=0).concept


def personalize(pipeline, **changes):
    return api.personalize(pipeline, pictures(2), **{"config": CONFIG, "quiet": True} | changes)


def tune(pipeline, **changes):
    """Three steps of LoRA, with the bytes of memory that the tuning program works in."""
    before = set(tuning.tune._compiled)
    rates = LearningRates(0.0, 0.05)
    result = personalize(pipeline, method="lora", word="robot", steps=3, learning_rates=rates, **changes)
    (new,) = set(tuning.tune._compiled) - before
    return result, tuning.tune._compiled[new].memory_analysis().temp_size_in_bytes


def generate(pipeline, concept, **changes):
    options = {"num": 2, "sampling_steps": 3, "quiet": True}
    return api.generate(pipeline, PROMPTS, concept=concept, **options | changes).images


def leaves(base):
    return jax.tree.leaves([getattr(base, name) for name in NETWORKS])


# --- the same results from less memory


def test_networks_stay_with_the_host(plain, small):
    assert small.memory == PRESETS[8] and plain.memory == Memory()
    assert all(type(leaf) is np.ndarray for leaf in [*leaves(small.base), *small.encoder.params.values()])
    assert all(isinstance(leaf, jax.Array) for leaf in leaves(plain.base))
    for a, b in zip(leaves(small.base), leaves(plain.base), strict=True):
        np.testing.assert_array_equal(a, b)
    assert small.fingerprint == plain.fingerprint


def test_pictures_in_parts_are_the_same(plain, small, predicted, monkeypatch):
    seen = []
    for index, program in enumerate(sampling.IN_PARTS):
        name = ("_read", "_denoise", "_decode")[index]

        def spy(base, *args, program=program, **options):
            seen.append([network for network in ("text", "unet", "vae") if getattr(base, network).params])
            return program(base, *args, **options)

        monkeypatch.setattr(sampling, name, spy)
    drawn = generate(small, predicted)
    assert seen == [["text"], ["unet"], ["vae"]] * 4  # one picture at a time, with one network at a time
    wanted = generate(plain, predicted)
    assert len(seen) == 3 * 4 and wanted.std() > 5 and drawn.shape == wanted.shape
    assert np.abs(drawn.astype(int) - wanted).max() <= 1


def test_the_encoder_predicts_the_same_with_a_network_at_a_time(small, predicted, monkeypatch):
    seen = []

    def spying(program):
        def spy(base, *args, **options):
            seen.append([network for network in NETWORKS if getattr(base, network).params])
            return program(base, *args, **options)

        spy.seconds = 0.0
        return spy

    monkeypatch.setattr(datencoder, "IN_PARTS", tuple(spying(program) for program in datencoder.IN_PARTS))
    found = personalize(small, steps=0).concept
    assert seen == [["vision"], ["vae"], ["text"], ["unet"]]
    np.testing.assert_allclose(found.embeddings, predicted.embeddings, rtol=1e-5, atol=1e-6)
    assert found.nearest_word == predicted.nearest_word


def test_rematerialised_tuning_is_the_same_in_less_memory(plain, small):
    assert small.memory.remat and not plain.memory.remat
    (kept, room), (again, less) = tune(plain), tune(small, config=replace(CONFIG, remat=True))
    np.testing.assert_allclose(again.report["losses"], kept.report["losses"], rtol=1e-5)
    for path, offset in kept.concept.offsets.items():
        for found, wanted in zip(again.concept.offsets[path], offset, strict=True):
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert less < 0.8 * room


def test_many_calls_of_the_tuning_are_given_the_model_once(small, monkeypatch):
    given = []

    def watch(state, problem, **options):
        given.append(problem.base.unet.params["conv_in.weight"])
        return state, np.zeros(1)

    monkeypatch.setattr(tuning, "tune", watch)
    personalize(small, method="lora", word="robot", steps=29)  # a prime: a step a call
    assert len(given) == 29 and all(isinstance(kernel, jax.Array) and kernel is given[0] for kernel in given)


def test_settings_reach_the_tuning(small, monkeypatch):
    seen = []

    def spy(state, problem, *, steps, config, **_):
        seen.append(config)
        return state, jnp.zeros(steps)

    spy.seconds = 0.0
    monkeypatch.setattr(tuning, "tune", spy)
    personalize(small, method="lora", config=None)
    assert set(seen) == {TuningConfig(draws=1, views=16, remat=True, scan_layers=False)}
    seen.clear()
    personalize(replace(small, memory=Memory()), method="lora", config=None)
    assert set(seen) == {TuningConfig(draws=8, views=16, remat=False, scan_layers=True)}


# --- which settings


def test_less_memory_asks_for_no_more(plain):
    sizes = sorted(PRESETS)
    steps = [*(PRESETS[size] for size in sizes), Memory()]
    for less, more in itertools.pairwise(steps):
        assert less.draws <= more.draws and less.batch <= more.batch
        assert less.remat >= more.remat and less.in_parts >= more.in_parts
        assert less.scan_layers <= more.scan_layers
        assert less != more


@pytest.mark.parametrize(
    ("backend", "share", "limit", "wanted"),
    [
        ("gpu", None, 4e9, PRESETS[8]),
        ("gpu", None, 11.7e9, PRESETS[16]),
        ("gpu", "0.95", 11.4e9, PRESETS[8]),
        ("gpu", "0.95", 14.9e9, PRESETS[16]),
        ("gpu", None, 18e9, PRESETS[24]),
        ("gpu", None, 60e9, Memory()),
        ("gpu", None, None, Memory()),
        ("tpu", None, 16.9e9, PRESETS[16]),
    ],
)
def test_settings_are_chosen_by_the_device(monkeypatch, backend, share, limit, wanted):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    if share:
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", share)

    class Device:
        platform = backend
        compute_capability = "9.0"

        def memory_stats(self):
            return None if limit is None else {"bytes_limit": int(limit)}

    target = Target.of(Device())
    assert memory.choose(large=True, target=target) == wanted
    assert memory.choose(large=False, target=target) == Memory()


def test_xl_recomputes_however_much_there_is():
    assert memory.for_xl(Memory()) == replace(PRESETS[24], scan_layers=True)
    assert memory.for_xl(PRESETS[8]) == PRESETS[8] and memory.for_xl(PRESETS[16]) == PRESETS[16]


def test_a_processor_has_no_second_memory():
    chosen = memory.choose(large=True, target=current_target())
    assert chosen.remat and chosen.batch == 1 and not chosen.in_parts and not chosen.scan_layers
    assert memory.choose(large=False, target=current_target()) == Memory()


# --- how weights are stored


@pytest.mark.parametrize(("dtype", "levels"), [("bfloat16", 3), ("float16", 1)])
def test_half_precision_is_stored_and_not_computed_on_a_processor(folder, plain, predicted, dtype, levels):
    half = datencoder_jax.load(folder, dtype=dtype)
    assert {leaf.dtype for leaf in leaves(half.base)} == {jnp.dtype(dtype)}
    assert {getattr(half.base, name).dtype for name in NETWORKS} == {"float32"}
    assert half.fingerprint == plain.fingerprint  # so a concept may be used with weights stored either way
    difference = np.abs(generate(half, predicted).astype(int) - generate(plain, predicted))
    assert 0 < difference.mean() < levels


def test_half_precision_can_be_tuned(folder, plain):
    half = datencoder_jax.load(folder, dtype="float16")
    tuned, _ = tune(half, config=replace(CONFIG, draws=2))
    assert {leaf.dtype for leaf in jax.tree.leaves(tuned.concept.offsets)} == {np.dtype("float32")}
    assert tuned.concept.embeddings.dtype == np.float32 and tuned.concept.nearest_word == "robot"


def test_the_type_that_is_chosen(folder, plain, monkeypatch):
    assert {leaf.dtype for leaf in leaves(plain.base)} == {np.dtype("float32")}
    monkeypatch.setattr("datencoder_jax.loading._LARGE", 0)  # any model is a large one
    assert datencoder_jax.load(folder).base.unet.params["conv_in.weight"].dtype == jnp.bfloat16
    monkeypatch.undo()
    with lowering_for(HOPPER):
        found = datencoder_jax.load(folder).base.unet
    assert found.params["conv_in.weight"].dtype == jnp.bfloat16 and found.dtype == "bfloat16"


def test_float16_is_not_tuned_where_it_is_computed_in(folder):
    half = datencoder_jax.load(folder, dtype="float16", compute_dtype="float16")
    assert half.base.unet.dtype == "float16"
    with pytest.raises(UserError, match=r"tuning in float16 loses its gradients; load .* bfloat16 or float32"):
        personalize(half, method="lora", steps=1)
    personalize(half, method="lora", steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 12}, "no setting for 12 GB of memory; choose one of: 8, 16, 24"),
        ({"dtype": "int8"}, "dtype 'int8' is not known; choose one of: auto, float32, bfloat16, float16"),
        ({"compute_dtype": "int8"}, "compute_dtype 'int8' is not known; choose one of: auto, float32, bfloat16"),
    ],
)
def test_misuse_is_one_sentence(folder, options, message):
    with pytest.raises(UserError, match=message) as info:
        datencoder_jax.load(folder, **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("target", "dtype", "wanted"),
    [
        (Target("cpu"), "bfloat16", "float32"),
        (Target("tpu"), "bfloat16", "bfloat16"),
        (HOPPER, "bfloat16", "bfloat16"),
        (Target("cuda", (7, 5)), "bfloat16", "float32"),
        (Target("cuda", (7, 5)), "float16", "float16"),
        (Target("rocm"), "bfloat16", "bfloat16"),
    ],
)
def test_computations_are_of_a_type_the_device_has(target, dtype, wanted):
    assert target.compute_dtype(dtype) == wanted
