"""Features that were computed beforehand: written, interrupted, continued, read and refused."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from datencoder_jax.data.feed import Feed
from datencoder_jax.data.items import DamagedItem, Prepared
from datencoder_jax.data.records import METADATA, Records, Settings, weights_fingerprint, write_records
from datencoder_jax.errors import UserError

SETTINGS = Settings("base0", "vae0", "vision0", 64, 0.8, True, 0, 2, "folder-1")
LAYOUT = {
    "moments": ("float16", (4, 4, 8)),
    "classes": ("float16", (3, 6)),
    "patches": ("float16", (9, 6)),
}
PICTURES, PER_FILE = 11, 4


def features(picture, view):
    rng = np.random.default_rng([picture, view])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in LAYOUT.items()}


def produce(first, last, without=()):
    for picture in range(first, last):
        for view in range(SETTINGS.views) if picture not in without else ():
            caption = None if picture % 2 else f"picture ä {picture}"
            yield Prepared(f"{picture}.jpg", features(picture, view), caption)


def write(folder, settings=SETTINGS, produce=produce, layout=LAYOUT, pictures=PICTURES, per_file=PER_FILE, **options):
    write_records(folder, settings, layout, pictures, produce, per_file=per_file, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "features"
    write(folder)
    return folder


@pytest.fixture
def records(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "features")


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_read_is_what_was_written(written):
    source = Records(written)
    assert len(source) == 2 * PICTURES and source.views == 2 and source.report == {}
    for index in range(len(source)):
        item = source[index]
        picture, view = divmod(index, 2)
        assert (item.key, item.caption) == (f"{picture}.jpg", None if picture % 2 else f"picture ä {picture}")
        for name, expected in features(picture, view).items():
            assert item.arrays[name].dtype == np.float16
            np.testing.assert_array_equal(item.arrays[name], expected.astype(np.float16))
    assert source[-1].key == "10.jpg"
    with pytest.raises(IndexError):
        source[len(source)]


def test_files_hold_a_given_number_of_pictures(written):
    from array_record.python.array_record_module import ArrayRecordReader

    names = [f"0000{number}-of-00003.array_record" for number in range(3)]
    assert sorted(files(written)) == [*names, METADATA]
    assert [ArrayRecordReader(str(written / name)).num_records() for name in names] == [8, 8, 6]


def test_threads_read_what_one_reads(written):
    source, fresh = Records(written), Records(written)
    order = np.random.default_rng(0).integers(0, len(source), 100).tolist()
    with ThreadPoolExecutor(8) as pool:
        for index, item in zip(order, pool.map(fresh.__getitem__, order), strict=True):
            np.testing.assert_array_equal(item.arrays["patches"], source[index].arrays["patches"])


def test_an_interrupted_writer_goes_on_file_by_file(written, tmp_path):
    folder, asked = tmp_path / "features", []

    def interrupted(first, last):
        asked.append(first)
        for item in produce(first, last):
            if item.key == "6.jpg":
                raise KeyboardInterrupt
            yield item

    with suppress(KeyboardInterrupt):
        write(folder, produce=interrupted)
    assert sorted(files(folder)) == ["00000-of-00003.array_record", METADATA]  # nothing half-written
    with pytest.raises(UserError, match=r"is not finished: 2 of 3 files are missing, such as 00001-of-00003"):
        Records(folder)

    def watched(first, last):
        asked.append(first)
        return produce(first, last)

    write(folder, produce=watched)
    assert asked == [0, 4, 4, 8]
    assert files(folder) == files(written)
    write(folder, produce=watched)
    assert asked == [0, 4, 4, 8]  # all is there


def test_processes_write_each_its_files(written, tmp_path):
    folder = tmp_path / "features"
    write(folder, part=(1, 2))
    assert sorted(files(folder)) == ["00001-of-00003.array_record", METADATA]
    write(folder, part=(0, 2))
    assert files(folder) == files(written)


def test_pictures_that_cannot_be_used_leave_no_records(tmp_path):
    folder = tmp_path / "features"
    write(folder, produce=lambda first, last: produce(first, last, without=(0, 5, 8, 9, 10)))
    source = Records(folder)
    assert [source[index].key for index in range(len(source))][::2] == [
        f"{picture}.jpg" for picture in (1, 2, 3, 4, 6, 7)
    ]
    write(tmp_path / "none", produce=lambda first, last: iter(()))
    with pytest.raises(UserError, match="holds no record: none of its pictures could be used"):
        Records(tmp_path / "none")


def test_a_feed_passes_the_arrays_on(written):
    feed = Feed([Records(written)], [1.0], batch_size=6, seed=0, resolution=64, vision_size=32, templates=3)
    batch = feed.batch(0, slice(1, 5))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        **{name: (np.float16, (4, *shape)) for name, (_, shape) in LAYOUT.items()},
        "concepts": (np.int32, (4,)),
        "templates": (np.int32, (4,)),
    }


def test_identities_tell_records_apart(written, tmp_path):
    moved = shutil.copytree(written, tmp_path / "moved")
    write(tmp_path / "other", SETTINGS._replace(seed=1))
    write(tmp_path / "fewer", produce=lambda first, last: produce(first, last, without=(3,)))
    first, same, *others = (Records(path).identity for path in (written, moved, tmp_path / "other", tmp_path / "fewer"))
    assert first == same and len({first, *others}) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("base", "base1"), ("vision", "vision1"), ("resolution", 128), ("crop", 0.5), ("views", 3)]
)
def test_other_settings_are_refused(records, name, value):
    source = Records(records)
    source.check(**SETTINGS._asdict())
    with pytest.raises(UserError, match=f"were made with {name} .* instead of {value}; set these options alike"):
        source.check(**{name: value, "source": "folder-1"})
    before = files(records)
    with pytest.raises(UserError, match=f"holds records made with {name} .* instead of {value}"):
        write(records, SETTINGS._replace(**{name: value}))
    assert files(records) == before


def test_other_sizes_are_refused(records):
    with pytest.raises(UserError, match="made with per_file 4 instead of 5; set"):
        write(records, per_file=5)
    with pytest.raises(UserError, match=r"made with arrays .* instead of"):
        write(records, layout=LAYOUT | {"classes": ("float16", (2, 6))})


def test_a_damaged_record_is_a_damaged_item(records):
    path = records / "00001-of-00003.array_record"
    content = bytearray(path.read_bytes())
    place = content.index(features(5, 0)["moments"].astype(np.float16).tobytes())
    content[place + 20] ^= 255
    path.write_bytes(content)
    source = Records(records)
    with pytest.raises(DamagedItem) as caught:
        source[10]
    assert (caught.value.key, caught.value.reason) == ("record 10", "damaged record")
    assert source[9].key == "4.jpg" and source[11].key == "5.jpg"


def test_damaged_folders_are_refused(records):
    metadata = records / METADATA
    content = json.loads(metadata.read_text())
    for change, message in [
        ({"format_version": 2}, "of another format or version"),
        ({"settings": {"base": "base0"}}, "is incomplete"),
    ]:
        metadata.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            Records(records)
    metadata.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        Records(records)
    metadata.write_text(json.dumps(content))
    path = records / "00002-of-00003.array_record"
    path.write_bytes(b"not an ArrayRecord file")
    with pytest.raises(UserError, match="cannot be read"):
        Records(records)
    metadata.unlink()
    with pytest.raises(UserError, match=r"holds no records of features: it has no records\.json"):
        Records(records)


def test_values_have_to_fit(tmp_path):
    def huge(first, last):
        for item in produce(first, last):
            item.arrays["patches"][0, 0] = 1e5
            yield item

    with pytest.raises(UserError, match=r"patches of 0\.jpg holds values that do not fit into float16"):
        write(tmp_path / "features", produce=huge)
    with pytest.raises(ValueError, match="views"):
        write(tmp_path / "views", produce=lambda first, last: list(produce(first, last))[:-1])
    assert sorted(files(tmp_path / "views")) == [METADATA]


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full(array_record_module.ArrayRecordWriter):
        def __init__(self, path, options):
            super().__init__("/dev/full", options)

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"Cannot write .*00000-of-00003\.array_record: .*No space left on device"):
        write(tmp_path / "features")
    assert sorted(files(tmp_path / "features")) == [METADATA]


def test_array_record_is_an_extra(written, tmp_path, monkeypatch):
    for module in ("array_record_data_source", "array_record_module"):
        monkeypatch.setitem(sys.modules, f"array_record.python.{module}", None)
    for action in (lambda: Records(written), lambda: write(tmp_path / "features")):
        with pytest.raises(UserError, match=r"pip install \"datencoder_jax\[pretrain\]\""):
            action()


def test_fingerprints_of_weights():
    params = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    same = weights_fingerprint(dict(reversed(params.items())))
    assert weights_fingerprint(params) == same and len(same) == 16
    assert weights_fingerprint(params | {"b": np.full(2, 2.0, np.float32)}) != same
    assert weights_fingerprint({"a": params["a"], "c": params["b"]}) != same
