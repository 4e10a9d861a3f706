"""Plans of what personalization takes, by version of Stable Diffusion: the sizes they go by, and what is compiled."""

import json
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp
import pytest

from datencoder_jax import cli
from datencoder_jax.commands import plan as command
from datencoder_jax.memory import PRESETS, Memory, for_xl
from datencoder_jax.plan import measure, shapes
from datencoder_jax.runtime.target import Target
from datencoder_jax.training.recipes import load_recipe


@pytest.mark.parametrize(
    "version, counts",
    [
        ("1.5", {"unet": 859_520_964, "text": 123_060_480, "vae": 83_653_863, "vision": 632_076_800}),
        pytest.param("2.1", {"unet": 865_910_724, "text": 340_387_840}, marks=pytest.mark.slow),
        pytest.param("XL", {"unet": 2_567_463_684, "text_2": 694_659_840}, marks=pytest.mark.slow),
    ],
)
def test_versions_have_the_sizes_they_are_known_for(version, counts):
    base = shapes.stable_diffusion(version, "bfloat16", vision=True)
    assert {name: sum(x.size for x in getattr(base, name).params.values()) for name in counts} == counts


def test_a_device_computes_in_its_own_type():
    """A T4 has no units for bfloat16, so that a run on it computes in float32."""
    for capability, dtype in (((7, 5), "float32"), ((9, 0), "bfloat16")):
        base = shapes.pipeline_of_version("XL", "lora", Memory(), Target("cuda", capability)).base
        assert base.unet.dtype == base.text_2.dtype == dtype and base.vae.dtype == "float32"
        assert {x.dtype for x in base.unet.params.values()} == {jnp.dtype("bfloat16")}


def test_without_memory_a_plan_has_what_a_run_chooses():
    def setting(gigabytes, is_xl=False):
        machine = Namespace(target_with_memory=Target("cuda", (9, 0), gigabytes * 10**9))
        return command._memory_setting(None, machine, is_large=True, is_xl=is_xl)

    assert setting(16) == PRESETS[16] and setting(80) == Memory()
    assert setting(80, is_xl=True) == for_xl(Memory()) != Memory()


@pytest.fixture
def measured(monkeypatch):
    """Names of the programs that a plan compiles, which it does not do here."""
    compiled = []

    def measure_nothing(program, machine):
        compiled.append(program.name)
        room = measure.Room(1, 0, 0, 0, program.resident, None)
        return measure.Result(program, room, None, None, 0.0)

    monkeypatch.setattr(command, "_measure", measure_nothing)
    return compiled


def test_a_program_that_no_setting_changes_is_compiled_once(measured, capsys):
    options = ["--models", "1.5", "--methods", "lora", "datencoder", "--memory", "8", "0", "--steps", "1", "--json"]
    assert cli.main(["plan", *options]) == 0
    assert {name: measured.count(name) for name in measured} == {
        "VAE encoding": 3, "text encoding": 4, "initial state": 1, "tuning": 4, "sampling": 4, "VAE decoding": 1,
        "image features": 1, "prediction": 2, "subject mask": 2,
    }  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["rows"]
    resident = {
        (row["method"], row["memory"], row["program"]): row["memory_bytes"]["arguments"] + row["memory_bytes"]["beside"]
        for row in rows
    }
    unet, text, vae, vision = 859_520_964, 123_060_480, 83_653_863, 632_076_800
    base = shapes.stable_diffusion("1.5", "bfloat16", vision=True)
    encoder = sum(x.size for x in shapes.tuning_encoder(base).params.values())
    everything = 2 * (unet + text + vae + vision) + 4 * encoder
    few = 40 * 2**20  # of images, latents, offsets and their moments
    assert 0 <= resident["lora", 8, "VAE encoding"] - 2 * vae < few
    assert 0 <= resident["datencoder", 8, "tuning"] - 2 * (unet + text) < few
    assert 0 <= resident["lora", 0, "tuning"] - 2 * (unet + text + vae) < few
    assert 0 <= resident["datencoder", 0, "sampling"] - everything < few


def test_a_gpu_that_is_too_small_is_a_sentence_and_status_1(measured, monkeypatch, capsys):
    def measure_too_much(program, machine):
        room = measure.Room(20 * 10**9, 0, 0, 0, 0, 16 * 10**9)
        return measure.Result(program, room, None, None, 0.0)

    monkeypatch.setattr(command, "_measure", measure_too_much)
    arguments = ["--models", "1.5", "--memory", "8", "--methods", "lora", "--programs", "vae-decoding"]
    assert cli.main(["plan", *arguments]) == 1
    output = capsys.readouterr().out
    assert (
        "| NO |" in output and "1.5 lora, VAE decoding does not fit: it needs 20.0 GB of 16.0 GB; try a lower" in output
    )


def test_a_plan_of_chosen_programs(measured):
    assert cli.main(["plan", "--models", "1.5", "--memory", "8", "--programs", "vae-encoding", "vae-decoding"]) == 0
    assert measured == ["VAE encoding", "VAE encoding", "VAE decoding"]  # of the image, and of its crops


def test_the_encoder_is_as_large_as_recipes_make_it():
    recipe = Path(__file__).parents[1] / "configs" / "sd15_paper.py"
    assert load_recipe(recipe).encoder.to_dict() == shapes.ENCODER | {"blend": 0.5}  # which is no size
