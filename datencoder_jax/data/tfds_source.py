"""Data sets of TensorFlow Datasets as sources, without TensorFlow: whole pictures, or the objects that boxes show.

What is read is a prepared version of a data set in ArrayRecord format. Pictures are handed on as the encoded files that
are stored, so that each is decoded once, where its views are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.data.items import DamagedItem, Item, Source
from datencoder_jax.errors import UserError

Reader = Callable[[bytes], Any]
"""A record's bytes -> a dictionary of the features asked for; the picture is the content of its file."""


def open_tfds(
    name: str,
    *,
    split: str = "train",
    data_dir: str = "",
    image: str = "image",
    caption: str = "",
    boxes: str = "",
    min_side: int = 128,
    quiet: bool = False,
) -> Source:
    """A prepared data set.

    Args:
        name: of the data set: `imagenet2012`, `open_images_v4/300k`, or with a version, `imagenet2012:5.1.0`; or the
            folder of a prepared version.
        split: which part, in TFDS' words: `train`, `train[:10%]`, `train+validation`.
        data_dir: where data sets lie; by default TFDS' own place, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        image: the feature that holds the picture.
        caption: a text feature that describes it, if any.
        boxes: the feature that is a sequence of annotated objects with a `bbox`: `bobjects` in Open Images. Then every
            object is an item of its own.
        min_side: objects with a side of fewer pixels are left out.
        quiet: no progress bar.

    Raises:
        UserError: there is no such data set or split, it is not in ArrayRecord format, files of it are missing, it
            lacks a feature, or the packages for pretraining are not installed.
    """
    pictures = Pictures(name, split, data_dir=data_dir, image=image, caption=caption)
    if not boxes:
        return pictures
    from datencoder_jax.data.tfds_boxes import Objects

    return Objects(pictures, boxes, min_side, quiet=quiet)


class Pictures:
    """A data set's pictures, one item per example; arguments and errors are those of `open_tfds`."""

    def __init__(self, name: str, split: str, *, data_dir: str = "", image: str = "image", caption: str = ""):
        builder = _open_builder(name, data_dir)
        info = builder.info
        self.name, self.report = f"{info.full_name} {split}", {}
        self.split, self.image, self.features = split, image, dict(sorted(info.features.items()))
        self.folder = Path(builder.data_path)
        self._caption = caption
        files = _files(builder, split)
        self._records = _open_records(builder, split)
        sizes = [(Path(file.filename).name, file.skip, file.take, file.examples_in_shard) for file in files]
        self.identity = f"tfds-{digest(info.full_name, image, caption, sizes)}"
        self._check(image, "Image", "picture")
        if getattr(self.features[image], "np_dtype", None) != "uint8":
            raise UserError(f"The pictures of {self.name} are not in 8 bits, and so cannot be used.")
        if caption:
            self._check(caption, "Text", "text")
        self._read = self.reader(*([caption] if caption else []))

    def __len__(self) -> int:
        return len(self._records)

    def picture_key(self, index: int) -> str:
        """See `Source`."""
        return f"{self.split}[{index}]"

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        key = self.picture_key(index)
        example = self.example(index, self._read, key)
        caption = example[self._caption].decode("utf-8", "replace") if self._caption else None
        return Item(key, example[self.image], caption)

    def example(self, index: int, read: Reader, key: str) -> dict[str, Any]:
        """What a reader takes from an example.

        Raises:
            DamagedItem: of that key; the record cannot be read.
        """
        try:
            return read(self._records[index])
        except Exception as error:  # readers of damaged files fail in several ways
            raise DamagedItem(key, "damaged record") from error

    def reader(self, *names: str, **sequences: dict[str, Any]) -> Reader:
        """A reader of the picture as it is stored and of these features, which leaves all others alone."""
        import tensorflow_datasets as tfds

        chosen = {name: self.features[name] for name in (self.image, *names)}
        chosen |= {name: tfds.features.Sequence(inner) for name, inner in sequences.items()}
        features = tfds.features.FeaturesDict(chosen)
        decoders = {self.image: tfds.decode.SkipDecoding()}
        return lambda record: features.deserialize_example_np(record, decoders=decoders)

    def _check(self, feature: str, kind: str, what: str) -> None:
        if type(self.features.get(feature)).__name__ != kind:
            raise UserError(f"{self.name} has no {what} {feature!r}; its features are {', '.join(self.features)}.")


def digest(*values: Any) -> str:
    """Sixteen characters that stand for values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _open_builder(name: str, data_dir: str) -> Any:
    """What TFDS knows of a prepared version, from its files alone: the data set's own code may want TensorFlow."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import naming, read_only_builder, registered
    except ImportError as error:
        raise UserError(
            'TFDS data sets are read by packages that are not installed: pip install "datencoder_jax[pretrain]".'
        ) from error
    folder = expand_user(name)
    try:
        if (folder / "dataset_info.json").is_file():
            return tfds.builder_from_directory(str(folder))
        options = {"data_dir": str(expand_user(data_dir))} if data_dir else {}
        plain, options = naming.parse_builder_name_kwargs(name, **options)
        return read_only_builder.builder_from_files(str(plain), **options)
    except registered.DatasetNotFoundError as error:
        place = data_dir or "TFDS' own folder"
        raise UserError(
            f"There is no TFDS data set {name} in {place}; prepare it with `tfds build {name} "
            "--file_format=array_record`, or say with data_dir where it is."
        ) from error
    except Exception as error:  # metadata that is damaged fails in whatever reads it
        raise UserError(f"The TFDS data set {name} cannot be opened ({_first_line(error)}).") from error


def _files(builder: Any, split: str) -> list[Any]:
    """Which records of which files make up a split; the files are there."""
    try:
        files = list(builder.info.splits[split].file_instructions)
    except Exception as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{builder.info.full_name} has no split {split!r}; it has {known}.") from error
    if not files:
        raise UserError(f"The split {split!r} of {builder.info.full_name} is empty.")
    for file in files:
        if not Path(file.filename).exists():
            raise UserError(f"{file.filename} is missing; copy or prepare {builder.info.full_name} again.")
    return files


def _open_records(builder: Any, split: str) -> Any:
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        return builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.info.full_name} in {builder.data_path} is stored as {builder.info.file_format.value}, where no "
            "example can be read by its number; prepare it with `tfds build --file_format=array_record`."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
