"""Encoders that differ in one thing each."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import datencoder_jax
from datencoder_jax.benchmark import ablations, held_out
from datencoder_jax.benchmark.entries import parse_entries
from datencoder_jax.encoder.tuning_encoder import EncoderConfig
from datencoder_jax.evaluation.scores import MIN_SUBJECTS
from datencoder_jax.training.recipes import load_recipe
from datencoder_jax.training.tuning_encoder import Weights

RECIPE = "configs/toyworld_encoder.py"
SHIPPED = Path(datencoder_jax.__file__).parent / "assets" / "toyworld_encoder"


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_a_change_is_of_something_that_the_recipe_or_the_encoder_has(name):
    recipe = load_recipe(RECIPE)
    before, changes = recipe.to_json(), ablations.ABLATIONS[name]
    config = ablations.changed(recipe, changes)
    assert recipe.to_json() == before  # the recipe itself stays
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        known = {"": set(recipe), "weights": set(Weights._fields)}.get(section)
        known = known or set(EncoderConfig.__dataclass_fields__) | {"hypernetwork"}
        assert last in known
        assert (config[section] if section else config)[last] == value
        assert (section == "encoder" and last in ("sees", "hypernetwork")) or (
            (recipe[section] if section else recipe)[last] != value
        )


def test_encoders_are_pretrained_once_and_the_command_measures_them(tmp_path, capsys, monkeypatch):
    ran = []
    real = ablations.run_stage

    def stage(config, workdir):
        ran.append(workdir.name)
        if workdir.name == "no_hypernetwork":
            real(config, workdir)
        else:  # the recipe as it is is trained elsewhere, and well
            assert config.encoder == load_recipe(RECIPE, "smoke").encoder and config.steps == 1
            shutil.copytree(SHIPPED, tmp_path / workdir.name / "encoder")

    monkeypatch.setattr(ablations, "run_stage", stage)
    monkeypatch.setattr(held_out, "BATCHES", MIN_SUBJECTS)
    monkeypatch.setattr(held_out, "_BATCH", 4)
    arguments = ["--variant", "smoke", "--steps", "1", "--only", "as_it_is", "no_hypernetwork", "--out", str(tmp_path)]
    ablations.main(arguments)
    assert ran == ["as_it_is", "no_hypernetwork"]
    made = tmp_path / "no_hypernetwork" / "encoder"
    assert json.loads((made / "config.json").read_text())["inventory"] == []
    first = capsys.readouterr().out.splitlines()
    files = [tmp_path / name / "losses.json" for name in ran]
    good, bad = (json.loads(file.read_text()) for file in files)
    assert all(len(good[group]) == MIN_SUBJECTS and np.isfinite(good[group]).all() for group in held_out.GROUPS)
    # What one batch differs from another by is the noise's, which both see: it is far more than they differ by.
    difference = np.subtract(bad["in domain"], good["in domain"])
    assert difference.mean() > 0 and difference.std() < np.std(good["in domain"])
    means = [f"{np.mean(good[group]):.4f}" for group in held_out.GROUPS]
    assert f"| as_it_is | {means[0]} | {means[1]} |" in first
    assert any(line.startswith(f"| no_hypernetwork | {difference.mean():+.4f} [") for line in first)
    files[1].write_text(json.dumps({group: [value - 1.0 for value in good[group]] for group in good}))
    ablations.main(arguments)
    again = capsys.readouterr().out.splitlines()
    assert len(ran) == 2 and any("| no_hypernetwork | -1.0000 [" in line for line in again)  # measured once
    with pytest.raises(SystemExit):
        ablations.main(["--variant", "smoke", "--steps", "2", *arguments[4:]])
    assert "other settings: steps was 1 and is now 2; name another --out" in capsys.readouterr().err
    encoders, tuning = (
        parse_entries(command[command.index("--methods") + 1 : command.index("--steps")])
        for command in map(shlex.split, again[-2:])
    )
    assert [entry.encoder for entry in encoders] == [str(tmp_path / name / "encoder") for name in ran]
    assert len(tuning) == len(ablations.TUNING) and not any(entry.encoder for entry in tuning)
