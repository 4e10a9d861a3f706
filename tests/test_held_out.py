"""Pictures that training never shows: which they are, and that previews are of them alone."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import TINY, Colours, encoded, numbers, triple, write_tar

from datencoder_jax.data import items
from datencoder_jax.data.feed import Feed
from datencoder_jax.data.folder import Folder
from datencoder_jax.data.held_out import HeldOut, hash_key
from datencoder_jax.data.items import DamagedItem, Prepared
from datencoder_jax.data.shards import Shards
from datencoder_jax.errors import PassingError
from datencoder_jax.training import encoder_stage
from datencoder_jax.training.sources import World

WIDE = {**TINY, "crop": 1.0, "flip": False}


def shown(feed, rows=400):
    """Which pictures the first rows show."""
    return {numbers([feed.row(number)["images"]])[0] for number in range(rows)}


def held_indices(source):
    held = HeldOut(source)
    return {index for index in range(len(source)) if held.contains(held.key(index))}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(items, "_WAITS", ())


@pytest.mark.parametrize("count", [10, 60, 500])
def test_previews_and_training_share_no_picture(count):
    feed = Feed([Colours(count)], [1.0], **WIDE, hold_out=True)
    trained, previews = shown(feed, 12 * count), set(numbers(feed.held_out(64, 1)["images"]))
    assert len(previews) == count // 10 and not trained & previews
    assert trained | previews == set(range(count))  # and nothing else is lost
    assert feed.report() == {}


def test_feeds_that_hold_nothing_out_show_everything():
    feed = Feed([Colours(20)], [1.0], **WIDE)
    assert shown(feed) == set(range(20)) and feed.held_out(4, 0) == {}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_of_a_few_pictures_none_is_held_out(count):
    feed = Feed([Colours(count)], [1.0], **WIDE, hold_out=True)
    assert feed.held_out(4, 0) == {} and shown(feed) == set(range(count))


def test_the_share_of_large_sources():
    class Many(Colours):
        def picture_key(self, index):
            return str(index)

        def __getitem__(self, index):
            raise AssertionError("a key needs no reading")

    held = HeldOut(Many(2_000))
    found = [index for index in range(2_000) if held.contains(str(index))]
    assert 40 < len(found) < 90
    assert sorted(held.indices(3, 2_000)) == found  # all of them, each once
    large = HeldOut(Many(1_000_000))
    few = list(large.indices(3, 32))
    assert len(set(few)) == 32 and few == list(large.indices(3, 32)) != list(large.indices(4, 32))
    assert 0.008 < np.mean([large.contains(str(index)) for index in range(50_000)]) < 0.012


def test_damaged_pictures_are_neither_shown_nor_counted():
    class Named(Colours):
        def picture_key(self, index):
            return str(index)

    bad = sorted(held_indices(Colours(60)))[:3]
    for source, left in ((Named(60, damaged=bad), 6 - 3), (Colours(60, damaged=bad), 57 // 10)):
        feed = Feed([source], [1.0], **WIDE, hold_out=True)
        assert len(feed.held_out(64, 1)["images"]) == left and feed.report() == {}


def test_storage_that_is_away_is_told_and_no_other_pictures_are_held_out():
    class Away(Colours):
        def __getitem__(self, index):
            raise DamagedItem(str(index), "cannot be read") from OSError(errno.EIO, "Input/output error")

    with pytest.raises(PassingError):
        HeldOut(Away(20))


def test_the_hash_is_that_of_the_key():
    assert hash_key("a/b.jpg") == hash_key("a/b.jpg") != hash_key("a/c.jpg")
    assert 0.49 < np.mean([hash_key(f"{k}.jpg") for k in range(20_000)]) < 0.51
    assert round(hash_key("a/b.jpg"), 6) == 0.405966  # in every version
    hash_key("\udcff")


def test_sources_know_keys_without_reading(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(encoded(k, "PNG"))
    write_tar(tmp_path / "shards" / "0.tar", triple("000", 0) + triple("n" * 120, 1) + triple("m" * 120, 2))
    for source in (Folder(tmp_path), Shards(tmp_path / "shards"), World(3, 16)):
        keys = [source.picture_key(index) for index in range(len(source))]
        assert keys == [source[index].key for index in range(len(source))] and len(set(keys)) == len(source)


def test_views_and_objects_of_a_picture_are_on_one_side():
    class Views(Colours):
        views = 2

        def __getitem__(self, index):
            return Prepared(f"{index // 2} object {index % 2}", {"moments": np.zeros(2)})

    held = held_indices(Views(1_000))
    assert held and all(index ^ 1 in held for index in held)


def test_sources_take_turns_in_previews():
    feed = Feed([Colours(200, name="a"), Colours(5, name="b")], [1.0, 1.0], **WIDE, hold_out=True)
    assert len(feed.held_out(8, 0)["images"]) == 8  # though the second has none


def test_recipes_on_pictures_preview_what_they_do_not_train_on(tmp_path, monkeypatch, caplog):
    config = SimpleNamespace(previews=4, seed=0, resolution=16, data=(), augment={}, batch_size=8)
    tokenizer = SimpleNamespace(encode=lambda texts, words: np.zeros((len(texts), 4), np.int32))
    pipeline = SimpleNamespace(base=None, tokenizer=tokenizer)

    def previews(count):
        monkeypatch.setattr(
            encoder_stage,
            "picture_feed",
            lambda config, base, *, batch_size, seed: Feed(
                [Colours(count)], [1.0], **WIDE | {"batch_size": batch_size, "seed": seed}, hold_out=True
            ),
        )
        data, previews = encoder_stage._pictures(config, pipeline)
        return shown(data.feed), set(numbers(previews.images))

    trained, tried = previews(60)
    assert len(tried) == 4 and not trained & tried and "trained on" not in caplog.text
    trained, tried = previews(5)
    assert tried <= trained and "pictures that are trained on" in caplog.text


def test_a_recipes_feed_holds_out():
    base = SimpleNamespace(eyes=SimpleNamespace(config=SimpleNamespace(image_size=8)))
    data = ({"kind": "world", "count": 40, "size": 32},)
    config = SimpleNamespace(data=data, resolution=16, augment={"crop": 1.0, "flip": False})
    feed = encoder_stage.picture_feed(config, base, batch_size=4, seed=0)
    assert len(feed.held_out(8, 0)["images"]) == 4
