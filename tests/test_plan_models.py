"""Plans of what personalization takes, by version of Stable Diffusion: the sizes they go by, and what is compiled."""

import json
from pathlib import Path

import pytest

from datencoder_jax import cli
from datencoder_jax.commands import plan as command
from datencoder_jax.plan import measure, shapes
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


def test_a_program_that_no_setting_changes_is_compiled_once(monkeypatch, capsys):
    compiled = []

    def measured(program, machine, _):
        compiled.append(program.name)
        room = measure.Room(1, 0, 0, 0, program.resident, None)
        return measure.Result(program, room, None, None, 0.0)

    monkeypatch.setattr(command, "_measured", measured)
    options = ["--models", "1.5", "--methods", "lora", "datencoder", "--memory", "8", "16", "24", "0", "--json"]
    assert cli.main(["plan", *options]) == 0
    assert {name: compiled.count(name) for name in compiled} == {
        "encode": 1, "see": 1, "predict": 2, "tune": 8, "draw": 8, "decode": 4
    }  # fmt: skip
    rows = json.loads(capsys.readouterr().out)["rows"]
    beside = {
        (row["method"], row["memory"], program["program"]): program["memory"]["beside"]
        for row in rows
        for program in row["programs"]
    }
    unet, text, vae, vision = 859_520_964, 123_060_480, 83_653_863, 632_076_800
    base = shapes.stable_diffusion("1.5", "bfloat16", vision=True)
    encoder = sum(x.size for x in shapes.tuning_encoder(base).params.values())
    assert beside["lora", 8, "encode"] == beside["datencoder", 16, "encode"] == beside["datencoder", 24, "predict"] == 0
    assert beside["lora", 0, "encode"] == 2 * (unet + text) and beside["lora", 24, "tune"] == 2 * (vae + text)
    assert beside["datencoder", 0, "encode"] == 2 * (unet + text + vision) + 4 * encoder


def test_the_encoder_is_as_large_as_recipes_make_it():
    recipe = Path(__file__).parents[1] / "configs" / "sd15_paper.py"
    assert load_recipe(recipe).encoder.to_dict() == shapes.ENCODER | {"blend": 0.5}  # which is no size
