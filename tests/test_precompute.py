"""Features computed beforehand: what they hold, and that training on them is training on the pictures."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import SIDE, pictures, write_tiny_base

from datencoder_jax.cli import main
from datencoder_jax.data import items
from datencoder_jax.data.folder import Folder
from datencoder_jax.data.images import to_float
from datencoder_jax.data.items import DamagedItem
from datencoder_jax.data.records import Records
from datencoder_jax.encoder.features import vision_features
from datencoder_jax.errors import UserError
from datencoder_jax.pipeline import read_pipeline
from datencoder_jax.training.encoder_stage import _parts, _pictures, read_frozen
from datencoder_jax.training.recipes import load_recipe

RECIPE = Path(__file__).parent.parent / "configs" / "e4t_faces.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny base model, a folder of four pictures and a file that is none, and their records in two views."""
    root = tmp_path_factory.mktemp("records")
    write_tiny_base(root / "model")
    (root / "pictures").mkdir()
    for number, picture in enumerate(pictures(4)):
        Image.fromarray(picture).save(root / "pictures" / f"{number}.png")
    (root / "pictures" / "2x.png").write_bytes(b"not a picture")
    assert run(root, "--views", "2", "--per-file", "2", "--batch-size", "1") == 0
    return root


def test_what_is_left_out_is_told(root, capsys, caplog):
    assert run(root, "--batch-size", "1", "--views", "1", out="told") == 0
    assert "pictures left out: 1 (1 no picture)" in capsys.readouterr().out and "2x.png is left out" in caplog.text


def changes(root, **source):
    """Of the recipe: the tiny model, its pictures whole and as they are."""
    values = {"model": root / "model" / "base", "resolution": SIDE, "augment.crop": 1.0, "augment.min_side": 8}
    values |= {"augment.flip": False, "data": json.dumps([source])}
    return [f"{name}={value}" for name, value in values.items()]


def run(root, *options, kind="folder", path="pictures", out="out"):
    recipe = ["--config", str(RECIPE), "--variant", "smoke", "--set", *changes(root, kind=kind, path=str(root / path))]
    return main(["precompute", *recipe, "--out", str(root / out), *options])


def test_records_hold_what_the_networks_see(root):
    records, base = Records(root / "out"), read_pipeline(root / "model" / "base", "tiny").base
    assert len(records) == 8 and records.views == 2  # the damaged file has none
    images = to_float(pictures(4))
    classes, patches, _ = vision_features(base.vision, base.vision_input(images))
    mean, log_variance = base.vae.bind().encode(images)
    for index in range(8):  # whole pictures: both views are the same
        found = records[index].arrays
        for name, expected in (("classes", classes), ("patches", patches)):
            np.testing.assert_allclose(found[name], expected[index // 2], rtol=2e-3, atol=2e-3)
        moments = np.concatenate([mean[index // 2], log_variance[index // 2]], axis=-1)
        np.testing.assert_allclose(found["moments"], moments, rtol=2e-3, atol=2e-3)


def test_what_is_there_is_not_computed_again(root, monkeypatch, capsys):
    (root / "out" / "00001-of-00003.array_record").unlink()
    asked = []
    get = Folder.__getitem__
    monkeypatch.setattr(Folder, "__getitem__", lambda self, index: asked.append(index) or get(self, index))
    assert run(root, "--views", "2", "--per-file", "2", "--batch-size", "1") == 0
    assert sorted(asked) == [2, 3]
    assert '{"kind": "records", "path": ' in capsys.readouterr().out
    assert run(root, "--views", "1", "--per-file", "2", "--batch-size", "1") == 2
    assert "made with views 2 instead of 1" in capsys.readouterr().err


def test_storage_that_is_away_leaves_nothing_out(root, monkeypatch, capsys):
    get = Folder.__getitem__

    def away(self, index):
        if index == 1:
            raise DamagedItem("1", "cannot be read") from OSError(errno.EIO, "Input/output error")
        return get(self, index)

    monkeypatch.setattr(items, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(Folder, "__getitem__", away)
    assert run(root, "--batch-size", "1", out="late") == 1
    assert "cannot be read now: input/output error" in capsys.readouterr().err
    monkeypatch.setattr(Folder, "__getitem__", get)
    assert run(root, "--batch-size", "1", out="late") == 0 and len(Records(root / "late")) == 4


def test_records_are_not_precomputed_from(root, capsys):
    assert run(root, "--batch-size", "1", kind="records", path="out", out="other") == 2
    assert "holds records already" in capsys.readouterr().err


def test_training_takes_them_in_the_pictures_place(root):
    def batch(*more, **source):
        config = load_recipe(RECIPE, "smoke", [*changes(root, **source), "previews=2", *more])
        data, previews = _pictures(config, read_frozen(config))
        return data.batch(0, slice(0, 8)), previews

    rows, previews = batch(kind="records", path=str(root / "out"))
    assert set(rows) == {"moments", "classes", "patches", "concepts", "templates"}
    assert rows["classes"].shape == (8, 2, 8) and rows["classes"].dtype == np.float16
    assert previews.images.shape == (2, SIDE, SIDE, 3) and previews.images.dtype == np.uint8
    # Both views of a picture are one concept, never each other's negatives.
    records = Records(root / "out")
    for concept, classes in zip(rows["concepts"], rows["classes"], strict=True):
        own = [index // 2 for index in range(8) if np.array_equal(records[index].arrays["classes"], classes)]
        assert set(own) == {concept}


def test_records_hold_one_layer_of_patches(root):
    sources = changes(root, kind="records", path=str(root / "out"))
    config = load_recipe(RECIPE, "smoke", [*sources, "previews=2"])
    config.encoder.unlock()
    config.encoder.patch_taps = 2
    with pytest.raises(UserError, match="records hold the patches of one layer"):
        _parts(config)


def test_records_of_another_resolution_or_network_are_refused(root):
    sources = changes(root, kind="records", path=str(root / "out"))
    config = load_recipe(RECIPE, "smoke", [*sources, "resolution=32"])
    with pytest.raises(UserError, match="made with resolution 16 instead of 32"):
        _pictures(config, read_frozen(config))
    config = load_recipe(RECIPE, "smoke", [*sources, "augment.crop=0.5"])
    with pytest.raises(UserError, match=r"made with crop 1.0 instead of 0.5"):
        _pictures(config, read_frozen(config))
    config = load_recipe(RECIPE, "smoke", sources)
    pipeline = read_frozen(config)
    vae = jax.tree.map(lambda x: x + 1, pipeline.base.vae)
    with pytest.raises(UserError, match=r"made with vae [0-9a-f]+ instead of"):
        _pictures(config, replace(pipeline, base=replace(pipeline.base, vae=vae)))
