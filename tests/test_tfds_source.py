"""Small TFDS data sets, written by TFDS itself in ArrayRecord format and read without TensorFlow."""

import errno
import io
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from datencoder_jax.data import tfds_boxes
from datencoder_jax.data.items import DamagedItem
from datencoder_jax.data.tfds_source import open_tfds
from datencoder_jax.errors import PassingError, UserError

COUNT = 12
HEIGHT, WIDTH = 100, 200


def picture(index, height=HEIGHT, width=WIDTH):
    """A JPEG file's content, different for each index."""
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 20 * index, np.uint8)).save(content, "JPEG")
    return content.getvalue()


def annotated(top, left, bottom, right, group=0, inside=0):
    box = tfds.features.BBox(ymin=top, xmin=left, ymax=bottom, xmax=right)
    return {"label": "cat", "bbox": box, "is_group_of": group, "is_inside": inside, "is_occluded": 1}


# Of a picture of 100 x 200 pixels.
OBJECTS = {
    0: [annotated(0.0, 0.0, 1.0, 1.0), annotated(0.5, 0.25, 1.0, 0.5)],  # 100 x 200, 50 x 50
    1: [],
    2: [annotated(0.0, 0.0, 0.4, 1.0), annotated(0.0, 0.0, 1.0, 0.2)],  # 40 x 200 and 100 x 40: too small
    3: [annotated(0.0, 0.0, 1.0, 1.0, group=1), annotated(0.0, 0.0, 1.0, 1.0, inside=1)],
    4: [annotated(0.1, 0.1, 0.2, 0.2, group=1), annotated(0.2, 0.3, 0.9, 0.7, group=-1, inside=-1)],  # -1: unknown
}


def builder_class(name, configs, features, example):
    """Of the name and configuration of a well-known data set, whose files are then found by what TFDS knows of it."""
    version = tfds.core.Version("1.2.3")
    configs = [tfds.core.BuilderConfig(name=each, version=version) for each in configs]

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(self, count):
        return ((index, example(index)) for index in range(count))

    def splits(self, _):
        return {"train": generate(self, COUNT), "validation": generate(self, 2)}

    members = {
        "VERSION": version,
        "BUILDER_CONFIGS": configs,
        "_info": info,
        "_split_generators": splits,
        "_generate_examples": generate,
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), {"__module__": __name__, "name": name, **members})


LABELS = tfds.features.ClassLabel(names=["cat", "dog"])
IMAGENET = builder_class(
    "imagenet2012",
    [],
    {"image": tfds.features.Image(encoding_format="jpeg"), "label": LABELS, "file_name": tfds.features.Text()},
    lambda index: {"image": io.BytesIO(picture(index)), "label": index % 2, "file_name": f"n{index}.jpg"},
)
OPEN_IMAGES = builder_class(
    "open_images_v4",
    ["original"],
    {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence({"label": LABELS, "confidence": np.int32}),
        "bobjects": tfds.features.Sequence(
            {
                "label": LABELS,
                "bbox": tfds.features.BBoxFeature(),
                "is_group_of": np.int8,
                "is_inside": np.int8,
                "is_occluded": np.int8,
            }
        ),
    },
    lambda index: {
        "image": io.BytesIO(picture(index)),
        "image/filename": f"{index}.jpg",
        "objects": [],
        "bobjects": OBJECTS.get(index, []),
    },
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for small in (IMAGENET, OPEN_IMAGES):
        small(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def data(prepared, tmp_path, monkeypatch):
    """A copy to write to, and a cache folder of its own."""
    monkeypatch.setenv("DATENCODER_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(prepared, tmp_path / "data")


def shard(data, name):
    return next((data / name).glob("**/*train.array_record*"))


def contents(source):
    return [source[index].picture for index in range(len(source))]


def test_pictures_are_passed_on_as_they_are_stored(data):
    source = open_tfds("imagenet2012", data_dir=str(data))
    assert len(source) == COUNT and source.report == {}
    assert sorted(contents(source)) == sorted(picture(index) for index in range(COUNT))
    assert source[3].key == "train[3]" and source[3].caption is None and source[3].box is None


def test_other_ways_to_name_it(data, monkeypatch):
    expected = contents(open_tfds("imagenet2012", data_dir=str(data)))
    assert contents(open_tfds("imagenet2012:1.2.3", data_dir=str(data))) == expected
    assert len(open_tfds("open_images_v4/original", data_dir=str(data))) == COUNT
    assert contents(open_tfds(str(data / "imagenet2012" / "1.2.3"))) == expected
    assert contents(open_tfds("imagenet2012", data_dir=str(data), split="train[3:5]")) == expected[3:5]
    assert len(open_tfds("imagenet2012", data_dir=str(data), split="train+validation")) == COUNT + 2


def test_a_text_may_be_the_caption(data):
    source = open_tfds("imagenet2012", data_dir=str(data), caption="file_name")
    assert {item.caption: item.picture for item in map(source.__getitem__, range(COUNT))} == {
        f"n{index}.jpg": picture(index) for index in range(COUNT)
    }


def test_no_tensorflow_and_no_warning(data):
    """In a process of its own, where a warning is an error."""
    code = f"""
import sys
from datencoder_jax.data.tfds_source import open_tfds
for options in ({{"name": "imagenet2012"}}, {{"name": "open_images_v4", "boxes": "bobjects", "min_side": 50}}):
    source = open_tfds(data_dir={str(data)!r}, **options)
    print(len(source), sum(len(source[index].picture) > 0 for index in range(len(source))))
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["12 12", "3 3"] and done.stderr == ""


def test_every_object_is_an_item(data):
    pictures = open_tfds("open_images_v4", data_dir=str(data))
    source = open_tfds("open_images_v4", data_dir=str(data), boxes="bobjects", min_side=50)
    expected = []
    for example, content in enumerate(contents(pictures)):
        boxes = {0: [(0, 0, 1, 1), (0.5, 0.25, 1, 0.5)], 4: [(0.2, 0.3, 0.9, 0.7)]}
        index = next(index for index in range(COUNT) if picture(index) == content)
        expected += [(f"train[{example}] object {n}", content, box) for n, box in enumerate(boxes.get(index, []))]
    items = [source[index] for index in range(len(source))]
    assert [(item.key, item.picture) for item in items] == [each[:2] for each in expected]
    np.testing.assert_allclose([item.box for item in items], [each[2] for each in expected], atol=1 / 65535)
    assert all(isinstance(side, float) for item in items for side in item.box)
    assert source.report == {"group of objects": 2, "seen from inside": 1, "too small": 2}


def test_the_least_side_is_in_pixels(data):
    lengths = {
        least: len(open_tfds("open_images_v4", data_dir=str(data), boxes="bobjects", min_side=least))
        for least in (1, 41, 51, 71, 100)
    }
    assert lengths == {1: 5, 41: 3, 51: 2, 71: 1, 100: 1}


def test_the_index_is_made_once(data, monkeypatch):
    def opened():
        return open_tfds("open_images_v4", data_dir=str(data), boxes="bobjects", min_side=50)

    first = opened()
    stored = shard(data, "open_images_v4")
    content = stored.read_bytes()
    stored.write_bytes(bytes(len(content)))  # nothing could be read from it now
    second = opened()
    stored.write_bytes(content)
    assert (second.report, second.identity, len(second)) == (first.report, first.identity, len(first))
    assert [second[index] for index in range(3)] == [first[index] for index in range(3)]
    assert first._examples.nbytes + first._boxes.nbytes == 12 * len(first)


def test_a_damaged_index_is_made_anew(data, caplog):
    options = {"data_dir": str(data), "boxes": "bobjects", "min_side": 50}
    first = open_tfds("open_images_v4", **options)
    (index,) = (data / "open_images_v4" / "original" / "1.2.3").glob("*.safetensors")
    index.write_bytes(index.read_bytes()[:50])
    second = open_tfds("open_images_v4", **options)
    assert "is damaged and is made anew" in caplog.text
    assert [second[index] for index in range(3)] == [first[index] for index in range(3)]


def test_where_the_data_cannot_be_written_the_index_goes_to_the_cache(data, tmp_path, monkeypatch, caplog):
    from datencoder_jax.data import tfds_boxes

    write = tfds_boxes.atomic_write
    readonly = [data]

    def refuse(path):
        if any(folder in Path(path).parents for folder in readonly):
            raise UserError("read-only file system")
        return write(path)

    monkeypatch.setattr(tfds_boxes, "atomic_write", refuse)
    options = {"data_dir": str(data), "boxes": "bobjects", "min_side": 50}
    first = open_tfds("open_images_v4", **options)
    (index,) = (tmp_path / "cache" / "tfds").iterdir()
    changed = index.stat().st_mtime_ns
    assert open_tfds("open_images_v4", **options)[2] == first[2] and index.stat().st_mtime_ns == changed
    with caplog.at_level(logging.WARNING, "datencoder_jax"):
        readonly.append(tmp_path / "cache")
        open_tfds("open_images_v4", **(options | {"min_side": 40}))
    assert "cannot be kept" in caplog.text


def test_identities_tell_sources_apart(data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    options = [
        {},
        {"split": "train[:6]"},
        {"caption": "image/filename"},
        {"boxes": "bobjects", "min_side": 50},
        {"boxes": "bobjects", "min_side": 41},
    ]
    found = [open_tfds("open_images_v4", data_dir=str(data), **each).identity for each in options]
    assert len(set(found)) == len(options)
    assert [open_tfds("open_images_v4", data_dir=str(moved), **each).identity for each in options] == found


def test_threads_read_what_one_reads(data):
    source = open_tfds("imagenet2012", data_dir=str(data))
    expected = contents(source)
    fresh = open_tfds("imagenet2012", data_dir=str(data))
    order = np.random.default_rng(0).integers(0, COUNT, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [item.picture for item in pool.map(fresh.__getitem__, order)] == [expected[index] for index in order]
    assert fresh[-1].picture == expected[-1]
    with pytest.raises(IndexError):
        fresh[COUNT]


def test_a_damaged_record_is_a_damaged_item(data):
    stored = shard(data, "open_images_v4")
    content = bytearray(stored.read_bytes())
    content[1000:1010] = bytes(10)  # within the second of the records, which take about 650 bytes each
    stored.write_bytes(content)
    source = open_tfds("open_images_v4", data_dir=str(data))
    with pytest.raises(DamagedItem) as caught:
        source[1]
    assert (caught.value.key, caught.value.reason) == ("train[1]", "damaged record")
    assert all(source[index].picture for index in range(COUNT) if index != 1)
    objects = open_tfds("open_images_v4", data_dir=str(data), boxes="bobjects", min_side=1)
    assert objects.report["damaged examples"] == 1


def test_storage_that_is_away_leaves_nothing_out_of_the_index(data, monkeypatch):
    def away(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    options = {"data_dir": str(data), "boxes": "bobjects", "min_side": 1}
    with monkeypatch.context() as patch, pytest.raises(PassingError, match="cannot be read now: input/output error"):
        patch.setattr(tfds_boxes.Image, "open", away)
        open_tfds("open_images_v4", **options)
    assert "damaged examples" not in open_tfds("open_images_v4", **options).report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nothing"}, "There is no TFDS data set nothing in .*prepare it with `tfds build nothing"),
        ({"split": "test"}, "open_images_v4/original/1.2.3 has no split 'test'; it has train, validation"),
        ({"image": "objects"}, "has no picture 'objects'; its features are bobjects, image, image/filename, objects"),
        ({"caption": "label"}, "has no text 'label'"),
        ({"boxes": "objects"}, "has no sequence of objects 'objects' with a bbox"),
        ({"boxes": "image"}, "has no sequence of objects 'image' with a bbox"),
        ({"boxes": "bobjects", "min_side": 300}, r"no object is left \(2 group of objects, 1 seen.*lower min_side"),
    ],
)
def test_mistakes_are_sentences(data, options, message):
    with pytest.raises(UserError, match=message):
        open_tfds(**({"name": "open_images_v4", "data_dir": str(data)} | options))


def test_missing_files_and_other_formats(data, monkeypatch):
    folder = data / "imagenet2012" / "1.2.3"
    shard(data, "imagenet2012").unlink()
    with pytest.raises(UserError, match=r"array_record-00000-of-00001 is missing; copy or prepare"):
        open_tfds(str(folder))
    metadata = folder / "dataset_info.json"
    text = metadata.read_text()
    metadata.write_text(text.replace("array_record", "tfrecord"))
    (folder / "imagenet2012-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match=r"is stored as tfrecord.*tfds build --file_format=array_record"):
        open_tfds(str(folder))
    metadata.write_text(text[:100])
    with pytest.raises(UserError, match="cannot be opened"):
        open_tfds(str(folder))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install \"datencoder_jax\[pretrain\]\""):
        open_tfds(str(folder))
