"""Properties of tar shards: samples come out as they lie there or their damage is counted, and nothing is written."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given
from hypothesis import strategies as st

from datencoder_jax.data.folder import PICTURES
from datencoder_jax.data.items import DAMAGED_CAPTION, DamagedItem
from datencoder_jax.data.shards import Shards
from datencoder_jax.data.tar_index import scan
from datencoder_jax.errors import UserError

LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]

ELSEWHERE = "/tmp/datencoder_escaped/"
"""A place outside the folder of shards that members name."""
CAPTIONED = [("0.json", tarfile.REGTYPE, b'{"caption": "a cat"}')]

stems = st.sampled_from(["000", "001", "a", "\u732b"]) | st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="/.\0"), max_size=6
)
folders = st.sampled_from(["", "a/", "../", "../../", "/", ELSEWHERE, "./", "a/../", "long/" * 30])
endings = st.sampled_from(["jpg", "JPEG", "png", "txt", "json", "seg.png", "mp4", ""])
names = st.tuples(folders, stems, endings).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}".rstrip("/"))
captions = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).map(str.encode)
contents = (
    st.binary(max_size=1200)
    | captions
    | st.dictionaries(
        st.sampled_from(["caption", "url"]), st.text(st.characters()) | st.none() | st.integers(), max_size=2
    ).map(lambda values: json.dumps(values).encode())
)
members = st.tuples(names, st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, *LINKS]), contents)
forms = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def write(members, form=tarfile.GNU_FORMAT):
    """The content of a tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../secret.jpg" if kind in LINKS else ""
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    return file.getvalue()


def read(content):
    """The samples of a shard in a folder of its own, and what was counted; nothing but the index is written."""
    with TemporaryDirectory() as top:
        folder = Path(top) / "a" / "b"
        folder.mkdir(parents=True)
        shard = folder / "0.tar"
        shard.write_bytes(content)
        items, report = [], Counter(scan(shard)[1])
        try:
            source = Shards(shard, quiet=True)
        except UserError as error:
            assert "holds no pictures that can be used" in str(error)
        else:
            for index in range(len(source)):
                assert source.picture_key(index).isprintable()
                try:
                    items.append(source[index])
                except DamagedItem as error:
                    report[error.reason] += 1
            report.update({DAMAGED_CAPTION: source.report.get(DAMAGED_CAPTION, 0)})
        written = {path for path in Path(top).rglob("*") if path.is_file()}
        assert written <= {shard, folder / "0.tar.datencoder_index.safetensors"} and shard.read_bytes() == content
        assert not Path(ELSEWHERE).exists()
    return items, +report


def expected(members):
    """Pictures with their captions by the rules of webdataset, and how many members of each kind are left out."""
    pictures, texts, jsons, report = {}, {}, {}, Counter()
    for name, kind, content in members:
        folder, _, base = name.rstrip("/").rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = (folder, stem), ending.lower()
        if kind == tarfile.DIRTYPE:
            continue
        if kind != tarfile.REGTYPE:
            report["not a file"] += 1
        elif ending in ("txt", "json"):
            (texts if ending == "txt" else jsons).setdefault(key, content)
        elif ending not in PICTURES or not stem:
            report["unknown ending"] += 1
        elif not content:
            report["empty"] += 1
        elif key in pictures:
            report["duplicate key"] += 1
        else:
            pictures[key] = content
    samples = []
    for key, content in pictures.items():
        text, is_damaged = caption(texts.get(key), jsons.get(key))
        samples.append((content, text))
        report[DAMAGED_CAPTION] += is_damaged
    return samples, +report


def caption(text, values):
    """A caption from the content of its member `.txt` or `.json`, and whether a part of it is no text."""
    if text is not None:
        found = text.decode("utf-8", "replace")
        return found.strip() or None, found.encode("utf-8") != text
    try:
        found = json.loads(values.decode("utf-8")) if values else None
    except (ValueError, RecursionError):
        return None, True
    found = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(found, str):
        return None, False
    encodable = found.encode("utf-8", "replace").decode("utf-8")
    return encodable.strip() or None, encodable != found


@given(st.lists(members, max_size=12), forms)
@example([("0.jpg", tarfile.REGTYPE, b"x"), ("0.json", tarfile.REGTYPE, b'{"caption": "\\ud800"}')], tarfile.GNU_FORMAT)
@example([("0.jpg", tarfile.REGTYPE, b"x"), ("0.txt", tarfile.REGTYPE, b""), *CAPTIONED], tarfile.GNU_FORMAT)
def test_samples_are_read_as_webdataset_groups_them(members, form):
    items, report = read(write(members, form))
    pictures, left_out = expected(members)
    assert [item.picture for item in items] == [content for content, _ in pictures]
    assert [item.caption for item in items] == [text for _, text in pictures]
    assert report == left_out


@st.composite
def damaged(draw):
    """A tar with turned bits, or one that is cut short."""
    content = write(draw(st.lists(members, min_size=1, max_size=5)), draw(forms))
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "magic": (257, 265), "prefix": (345, 500)}
numbers = st.integers(-(2**40), 2**64 - 1) | st.integers(-1024, 1024)


def base_256(number):
    """A size in GNU's binary form, in which it may be below zero."""
    return bytes([0xFF if number < 0 else 0x80]) + (number % 2**88).to_bytes(11, "big")


fields = (
    st.tuples(st.just("size"), numbers.map(base_256))
    | st.tuples(st.just("type"), st.sampled_from(list(b"\x0001234567KLSxgXD")).map(lambda n: bytes([n])))
    | st.tuples(st.sampled_from(sorted(FIELDS)), st.binary(min_size=1, max_size=155))
)


def forged(content, number, changes):
    """A tar of which a header says something else, with the checksum of that."""
    blocks = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    if not blocks:
        return content
    start, changed = blocks[number % len(blocks)], bytearray(content)
    for name, value in changes:
        first, end = FIELDS[name]
        value = value[: end - first]
        changed[start + first : start + first + len(value)] = value
    changed[start + 148 : start + 156] = b" " * 8
    changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


PAIR = write([("0.jpg", tarfile.REGTYPE, b"picture"), ("0.txt", tarfile.REGTYPE, b"caption")])


@given(
    damaged()
    | st.binary(max_size=2000)
    | st.builds(
        forged,
        st.builds(write, st.lists(members, min_size=1, max_size=4), forms),
        st.integers(0, 9),
        st.lists(fields, min_size=1, max_size=3),
    )
)
@example(forged(PAIR, 0, [("size", base_256(-1))]))
@example(forged(PAIR, 1, [("size", base_256(-511))]))
@example(forged(PAIR, 0, [("size", base_256(2**64))]))
@example(PAIR[:600])
def test_damage_is_counted_and_ends_in_no_other_error(content):
    items, report = read(content)
    assert all(type(item.picture) is bytes and item.picture in content for item in items)
    assert items or report or not expected_pictures(content)


def expected_pictures(content):
    """Whether Python's own reader finds a picture in a tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return [info.name for info in tar if info.isreg() and info.name.rpartition(".")[2].lower() in PICTURES]
    except Exception:
        return []
