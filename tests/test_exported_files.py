"""What exported files say of the base model, and which files in a folder are exported ones."""

import pytest
from checkpoint_helpers import concept
from export_helpers import TARGET
from safetensors import safe_open

from datencoder_jax.checkpoints.export import export_concept, exported_files


def test_the_card_names_repositories_of_the_hub_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    for base, there in (
        ("someone/some-model.v2", True),
        ("models/sd15", False),
        ("models/x.safetensors", False),
        ("toyworld", False),
        ("/home/models/sd15", False),
        ("someone/some-model\n", False),
    ):
        export_concept("out", concept(base=base), TARGET, name="toy", kinds=["diffusers", "card"])
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("base_model:" in card) == there, base
        loaded = base if there else "<folder of the base model in diffusers' format>"
        assert card.count(f'from_pretrained("{loaded}"') == 2, base


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("someone/some-model.v2", "someone/some-model.v2"),
        ("toyworld", "toyworld"),
        ("/home/lovelace/models/sd15/", "sd15"),
        ("lovelace/x.safetensors", "x.safetensors"),
        ("C:\\Users\\lovelace\\sd15", "sd15"),
    ],
)
def test_what_others_read_names_no_place_on_this_machine(tmp_path, base, told):
    export_concept(tmp_path, concept(base=base), TARGET, name="toy", kinds=["kohya", "embedding", "card"])
    assert f"text-to-image models on {told} (weights" in (tmp_path / "README.md").read_text()
    with safe_open(tmp_path / "toy.safetensors", "numpy") as file:
        assert file.metadata()["ss_sd_model_name"] == told
    assert not [path for path in tmp_path.iterdir() if b"lovelace" in path.read_bytes()]


def test_exported_files_are_known_by_name_and_mark(tmp_path):
    names = export_concept(tmp_path, concept(), TARGET, name="toy", sheet=b"")
    assert exported_files(tmp_path, names) == set(names) - {"concept.safetensors", "samples.png"}
    others = {
        "holiday.md",
        "toy.bin",
        "report.json",
        "../toy.safetensors",
        "a/b.safetensors",
        ".safetensors",
        "toy",
        "",
    }
    others |= {str(tmp_path / "toy.safetensors"), "concept.safetensors", "samples.png", "..safetensors"}
    assert not exported_files(tmp_path, others)
    for name in ("README.md", "pipeline.py"):
        (tmp_path / name).write_text("mine\n")
    assert exported_files(tmp_path, names) == {name for name in names if name.endswith(".safetensors")} - {
        "concept.safetensors"
    }
