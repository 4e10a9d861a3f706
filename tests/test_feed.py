"""Batches: every row a pure function of its number, every item once a pass, every damaged one counted once."""

import errno
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
from checkpoint_helpers import refuses
from data_helpers import (
    CAPTION_REPORT,
    INDEX_REPORT,
    READ_REPORT,
    TINY,
    Colours,
    damaged_folder,
    encoded,
    numbers,
    write_tar,
)

from datencoder_jax.data import items, throughput
from datencoder_jax.data.feed import Feed
from datencoder_jax.data.items import DamagedItem, Prepared
from datencoder_jax.data.shards import Shards
from datencoder_jax.errors import PassingError


def concepts(feed, steps):
    return np.concatenate([feed.batch(step)["concepts"] for step in range(steps)]).tolist()


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_what_a_batch_holds():
    batch = Feed([Colours(40)], [1], **TINY).batch(0)
    shapes = {name: (value.shape, value.dtype) for name, value in batch.items()}
    assert shapes == {
        "images": ((8, 16, 16, 3), np.uint8),
        "vision": ((8, 8, 8, 3), np.uint8),
        "concepts": ((8,), np.int32),
        "templates": ((8,), np.int32),
    }
    assert numbers(batch["images"]) == numbers(batch["vision"]) == batch["concepts"].tolist()
    assert "vision" not in Feed([Colours(40)], [1], **TINY | {"vision_size": None}).batch(0)


def test_every_pass_shows_every_item_once_and_in_an_order_of_its_own():
    passes = np.array(concepts(Feed([Colours(40)], [1], **TINY), 20)).reshape(4, 40)
    for one in passes:
        assert sorted(one) == list(range(40))
    assert len({tuple(one) for one in [*passes, range(40)]}) == 5


def test_rows_depend_on_nothing_but_seed_and_number():
    feed = Feed([Colours(40), Colours(7)], [2, 1], **TINY)
    whole = feed.batch(3)
    for parts in ((8,), (4, 4), (1, 5, 2)):
        pieces, start = [], 0
        for size in parts:  # as other processes, with feeds of their own, would
            pieces.append(Feed([Colours(40), Colours(7)], [2, 1], **TINY).batch(3, slice(start, start + size)))
            start += size
        same(whole, {name: np.concatenate([piece[name] for piece in pieces]) for name in whole})
    bigger = Feed([Colours(40), Colours(7)], [2, 1], **TINY | {"batch_size": 16}).batch(1)
    same(whole, {name: value[8:] for name, value in bigger.items()})
    other = Feed([Colours(40), Colours(7)], [2, 1], **TINY | {"seed": 6})
    assert concepts(other, 4) != concepts(feed, 4)
    assert (feed.batch(0)["templates"] != feed.batch(1)["templates"]).any()


def test_draws_are_new_at_every_visit():
    class Noise(Colours):
        def __getitem__(self, index):
            return (
                super()
                .__getitem__(index)
                ._replace(picture=np.random.default_rng(0).integers(0, 256, (24, 20, 3), "u1"))
            )

    first = Feed([Noise(1)], [1], **TINY).batch(0)
    assert len({view.tobytes() for view in first["images"]}) == 8
    assert set(Feed([Noise(1)], [1], **TINY | {"batch_size": 64}).batch(0)["templates"]) == {0, 1, 2, 3}


def test_mixtures_have_their_weights_and_every_pass_of_each_source_its_items():
    feed = Feed([Colours(30), Colours(10)], [3, 1], **TINY)
    rows = np.array(concepts(feed, 10))
    assert (rows < 30).sum() == 60 and (rows >= 30).sum() == 20
    assert sorted(rows[rows < 30][:30]) == list(range(30)) and sorted(rows[rows >= 30][:10]) == list(range(30, 40))
    uneven = np.array(concepts(Feed([Colours(50), Colours(50)], [0.9, 0.1], **TINY), 50))
    assert abs((uneven < 50).mean() - 0.9) < 0.01
    assert (np.add.reduceat(uneven >= 50, range(0, 400, 80)) >= 7).all()  # spread evenly, not in lumps


def test_equal_sources_are_not_shuffled_alike():
    rows = np.array(concepts(Feed([Colours(40), Colours(40)], [1, 1], **TINY), 10))
    assert rows[rows < 40].tolist() != (rows[rows >= 40] - 40).tolist()


def test_damaged_items_are_replaced_and_counted_once(caplog):
    caplog.set_level(logging.INFO, "datencoder_jax")
    damaged = {3, 8, 20, 31}
    good, bad = Feed([Colours(40)], [1], **TINY), Feed([Colours(40, damaged)], [1], **TINY)
    shown, wanted = concepts(bad, 15), concepts(good, 15)
    assert not damaged & set(shown)
    assert [(a, b) for a, b in zip(shown, wanted, strict=True) if b not in damaged and a != b] == []
    assert bad.report() == {"even": 2, "odd": 2}
    assert len(caplog.records) == 4 and "colours: 31 is left out: odd." in caplog.text
    again = Feed([Colours(40, damaged)], [1], **TINY)  # knows of no damage yet, as after a restart
    assert concepts(again, 15)[80:] == shown[80:]
    same(Feed([Colours(40, damaged)], [1], **TINY).batch(9), bad.batch(9))


def test_many_damaged_items_do_not_flood_the_screen(caplog):
    caplog.set_level(logging.INFO, "datencoder_jax")
    concepts(Feed([Colours(80, set(range(0, 60, 2)))], [1], **TINY), 10)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING"] * 10 + ["INFO"] * 20


def test_counts_hold_in_several_threads(caplog):
    damaged = set(range(0, 90, 3))
    feed = Feed([Colours(100, damaged)], [1], **TINY)
    reports = []
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(feed.batch, range(26)))
        reports.append(feed.report())
    assert reports == [{"even": 15, "odd": 15}]
    for step, batch in enumerate(batches):
        same(batch, Feed([Colours(100, damaged)], [1], **TINY).batch(step))


def test_shards_with_everything_wrong_in_them(tmp_path, monkeypatch):
    monkeypatch.setenv("DATENCODER_CACHE", str(tmp_path / "cache"))
    good = damaged_folder(tmp_path / "data")
    feed = Feed([Shards(tmp_path / "data")], [1], **TINY)
    shown = concepts(feed, 9)
    assert len(set(shown)) == good
    assert feed.report() == INDEX_REPORT | READ_REPORT | CAPTION_REPORT


def test_grain_prefetches_batches_in_their_order():
    feed = Feed([Colours(40, {5})], [1], **TINY)
    steps = grain.MapDataset.range(6).map(lambda step: feed.batch(int(step), slice(2, 6)))
    options = grain.ReadOptions(num_threads=3, prefetch_buffer_size=4)
    for step, batch in enumerate(steps.to_iter_dataset(options)):
        same(batch, Feed([Colours(40, {5})], [1], **TINY).batch(step, slice(2, 6)))


def test_two_threads_that_meet_the_same_damage_count_it_once(caplog):
    barrier = threading.Barrier(2, timeout=20)

    class Meeting(Colours):
        def __getitem__(self, index):
            if index in self.damaged:
                barrier.wait()
            return super().__getitem__(index)

    feed = Feed([Meeting(40, {7})], [1], **TINY)
    row = concepts(Feed([Colours(40)], [1], **TINY), 5).index(7)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(feed.row, [row, row])
    same(one, other)
    assert feed.report() == {"odd": 1} and len(caplog.records) == 1


def test_what_the_sources_left_out_is_reported_too():
    one, two = Colours(20, {1}), Colours(20)
    one.report, two.report = {"odd": 4, "empty": 1}, {"empty": 2}
    feed = Feed([one, two], [1, 1], **TINY)
    concepts(feed, 6)
    assert feed.report() == {"odd": 5, "empty": 3}


@pytest.mark.parametrize("count, damaged", [(1, 1), (3, 3), (400, 400), (3, 2), (400, 220)])
def test_more_than_half_damaged_is_an_error(count, damaged):
    feed = Feed([Colours(500), Colours(count, set(range(damaged)), "broken")], [1, 1], **TINY)
    refuses("broken: .* cannot be used .*(odd|even)", concepts, feed, 60)


def test_less_than_half_damaged_is_none():
    concepts(Feed([Colours(400, set(range(180)))], [1], **TINY), 60)


class Away(Colours):
    """Storage that fails when items are asked for at some times, counted from 0."""

    def __init__(self, count, times):
        super().__init__(count)
        self.times, self.asked = times, 0

    def __getitem__(self, index):
        self.asked += 1
        if self.asked - 1 in self.times:
            raise DamagedItem(str(index), "cannot be read") from OSError(errno.EIO, "Input/output error")
        return super().__getitem__(index)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(items, "_WAITS", (0.0, 0.0))


def test_what_storage_does_not_give_at_once_is_asked_for_again(impatient):
    feed = Feed([Away(40, {0, 1, 9})], [1], **TINY)
    same(feed.batch(0), Feed([Colours(40)], [1], **TINY).batch(0))
    assert feed.report() == {}


def test_what_storage_does_not_give_now_is_no_damage(impatient, caplog):
    good, feed = Feed([Colours(40)], [1], **TINY), Feed([Away(40, {3, 4, 5})], [1], **TINY)
    wanted, shown = (concepts(each, 5) for each in (good, feed))
    assert [a == b for a, b in zip(shown, wanted, strict=True)] == [True] * 3 + [False] + [True] * 36
    assert feed.report() == {"cannot be read": 1} and len(caplog.records) == 1
    same(feed.batch(0), good.batch(0))  # it is there again


def test_storage_that_is_away_is_no_mistake_in_the_data(impatient):
    """Launchers start a run again after status 1, and leave it after status 2."""
    for count in (3, 500):
        feed = Feed([Away(count, range(30, 10_000))], [1], **TINY)
        with pytest.raises(PassingError, match="colours cannot be read now: input/output error"):
            concepts(feed, 60)
    # Nor where what is known to be damaged lies between.
    mixed = Away(40, range(10_000))
    mixed.damaged = set(range(10))
    feed = Feed([mixed], [1], **TINY)
    for index in mixed.damaged:
        feed._damage[0].add(index, DamagedItem(str(index), "odd"))
    with pytest.raises(PassingError, match="colours cannot be read now"):
        feed.row(0)
    # Now and then is not away, however often.
    assert len(concepts(Feed([Away(400, {n for n in range(10_000) if n % 10})], [1], **TINY), 10)) == 80


def test_prepared_arrays_take_the_place_of_pictures():
    class Records(Colours):
        def __getitem__(self, index):
            if index in self.damaged:
                raise DamagedItem(str(index), "odd")
            return Prepared(str(index), {"moments": np.full((2, 2, 8), index, np.float16)})

    batch = Feed([Records(30, {4})], [1], **TINY).batch(0)
    assert set(batch) == {"moments", "concepts", "templates"} and batch["moments"].dtype == np.float16
    np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], batch["concepts"].astype(np.float16))
    refuses("cannot be mixed", Feed([Records(30), Colours(30)], [1, 1], **TINY).batch, 0)


def test_views_of_one_picture_are_one_concept():
    records, pictures = Colours(12), Colours(5)
    records.views = 3
    found = concepts(Feed([records, pictures], [1, 1], **TINY), 3)
    assert sorted(each for each in found if each < 12) == sorted(list(range(4)) * 3)
    assert {each for each in found if each >= 12} == set(range(12, 17))


def test_identity_tells_that_the_data_changed():
    identities = [
        Feed(sources, weights, **TINY).identity
        for sources, weights in (
            ([Colours(40)], [1]),
            ([Colours(41)], [1]),
            ([Colours(40), Colours(41)], [1, 1]),
            ([Colours(41), Colours(40)], [1, 1]),
            ([Colours(40), Colours(41)], [1, 2]),
        )
    ]
    assert len(set(identities)) == 5
    assert Feed([Colours(40, name="moved")], [1], **TINY).identity == identities[0]


def test_settings_that_make_no_sense():
    refuses("0 sources", Feed, [], [], **TINY)
    refuses("1 sources .* 2 weights", Feed, [Colours(3)], [1, 2], **TINY)
    refuses("positive", Feed, [Colours(3)], [0], **TINY)
    refuses("positive", Feed, [Colours(3)], [float("nan")], **TINY)
    refuses("empty", Feed, [Colours(0)], [1], **TINY)
    refuses("crop", Feed, [Colours(3)], [1], **TINY, crop=0.0)


def test_decoding_waits_for_no_other_thread():
    """Two threads are inside a source at the same time: a lock around reading would keep the second one out."""
    barrier = threading.Barrier(2, timeout=20)

    class Meeting(Colours):
        def __getitem__(self, index):
            barrier.wait()
            return super().__getitem__(index)

    feed = Feed([Meeting(40)], [1], **TINY)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(feed.batch, range(2)))) == 2


def test_the_throughput_of_made_up_pictures_and_of_a_folder(capsys, tmp_path):
    options = ["--resolution", "16", "--vision-size", "8", "--count", "8", "--repeats", "1"]
    throughput.main([*options, "--size", "40", "50"])
    table = capsys.readouterr().out
    assert all(word in table for word in ("reading", "decoding", "resizing", "assembling", "threads: 2", "images/s"))
    throughput.made_up(tmp_path, 4, 40, 50)
    throughput.main([str(tmp_path), *options])
    assert f"{tmp_path}, 4 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="There is no folder"):
        throughput.main([str(tmp_path / "missing")])


# what several processes find


def halves(source, count=2, **changes):
    """Feeds of processes that each draw their part of every batch."""
    options = {**TINY, **changes}
    feeds = [Feed([source() for source in source], [1.0] * len(source), **options) for _ in range(count)]
    part = options["batch_size"] // count
    return feeds, [slice(k * part, (k + 1) * part) for k in range(count)]


def exchange(feeds):
    found = [json.loads(json.dumps(feed.findings())) for feed in feeds]
    for feed in feeds:
        for other, findings in zip(feeds, found, strict=True):
            if other is not feed:
                feed.add_findings(findings)
    return found


def test_damage_that_another_process_met_is_counted_once():
    bad = {1, 2, 8, 15}
    sources = [lambda: Colours(20, damaged=bad), lambda: Colours(12, damaged={3})]
    feeds, rows = halves(sources)
    alone = Feed([source() for source in sources], [1.0, 1.0], **TINY)
    for step in range(3):
        alone.batch(step)
        for feed, part in zip(feeds, rows, strict=True):
            feed.batch(step, part)
        exchange(feeds)
        assert feeds[0].report() == feeds[1].report() == alone.report()
    for step in range(3, 24):  # many passes: each process meets all of them by itself
        for feed, part in zip(feeds, rows, strict=True):
            feed.batch(step, part)
    exchange(feeds)
    assert feeds[0].report() == feeds[1].report() == {"even": 2, "odd": 3}
    assert exchange(feeds) == [[], []]  # nothing is told twice


def test_captions_and_absent_storage_of_another_process_are_counted(tmp_path, monkeypatch):
    members = [m for k in range(4) for m in ((f"{k}.jpg", encoded(k)), (f"{k}.txt", b"caf\xe9"))]
    write_tar(tmp_path / "0.tar", members)
    feeds, _ = halves([lambda: Shards(tmp_path, quiet=True)])
    feeds[0].sources[0][0], feeds[1].sources[0][0], feeds[1].sources[0][3]  # captions are read with their pictures
    exchange(feeds)
    assert feeds[0].report() == feeds[1].report() == {"damaged caption": 2}
    away = DamagedItem("0", "cannot be read")
    away.__cause__ = OSError(errno.EIO, "Input/output error")
    for feed in feeds:
        feed._damage[0].add(0, away)
    exchange(feeds)
    assert feeds[0].report() == feeds[1].report() == {"damaged caption": 2, "cannot be read": 2}
