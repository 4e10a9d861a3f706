"""Properties of pictures: every mode and format is read upright as 8-bit RGB, and damage is refused in one sentence."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from datencoder_jax.data.reading import MIN_SIDE, DamagedPicture, decode, read_image, to_images
from datencoder_jax.errors import UserError

FORMATS = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["1", "L", "RGB", "CMYK", "YCbCr"],
    "WEBP": ["L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB", "RGBA"],
}
"""The modes that Pillow writes in each format."""

MODES = [
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "F", "I;16", "I;16B", "I;16L"),
]
"""All modes of pictures in memory."""

SIZES = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": ">u2", "I;16L": "<u2"}
"""The types of modes whose values are no bytes."""

sides = st.integers(1, 24)
orientations = st.integers(0, 9)
kinds = st.sampled_from([(kind, mode) for kind, modes in FORMATS.items() for mode in modes])


@st.composite
def pictures(draw, mode, least=1):
    """A picture of any size and content in a mode, with a palette and a transparent colour of its own where it may."""
    width, height = draw(sides.filter(lambda n: n >= least)), draw(sides.filter(lambda n: n >= least))
    if mode in SIZES:
        values = {"width": 32, "allow_nan": True} if mode == "F" else {}
        elements = st.floats(**values) if mode == "F" else st.integers(0, 65535)
        values = draw(arrays(SIZES[mode], (height, width), elements=elements, fill=elements))
        return Image.frombytes(mode, (width, height), np.ascontiguousarray(values).tobytes())
    seed = draw(st.integers(0, 2**32 - 1))
    picture = Image.new(mode, (width, height))
    size = len(picture.tobytes())
    picture.frombytes(np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes())
    if mode in ("P", "PA"):
        picture.putpalette(np.random.default_rng(seed + 1).integers(0, 256, 768, np.uint8).tobytes())
    if mode == "P" and draw(st.booleans()):
        picture.info["transparency"] = draw(st.integers(0, 255))
    return picture


@st.composite
def files(draw, least=MIN_SIDE):
    """The mode and the content of a picture file."""
    kind, mode = draw(kinds)
    options = {"exif": exif(draw(orientations))} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if kind == "WEBP":
        options["lossless"] = True
    file = io.BytesIO()
    draw(pictures(mode, least)).save(file, kind, **options)
    return mode, file.getvalue()


def saved(kind, orientation=1):
    """The content of a small picture."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 9)).save(file, kind, exif=exif(orientation))
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def upright(content):
    """What Pillow makes of a file's content, turned as its EXIF data says."""
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image)


def read(content):
    return np.asarray(decode(content, "it"))


@given(files())
def test_a_file_is_read_upright_as_pillow_converts_it(file):
    mode, content = file
    wanted = upright(content)
    try:
        found = read(content)
    except DamagedPicture as error:
        assert mode == "F" and "not finite" in str(error)
        return
    assert found.dtype == np.uint8 and found.shape == (wanted.height, wanted.width, 3)
    if wanted.has_transparency_data:
        colours = np.asarray(wanted.convert("RGBA")).astype(float)
        alpha = colours[..., 3:] / 255
        assert np.abs(found - (alpha * colours[..., :3] + (1 - alpha) * 255)).max() <= 1
    elif wanted.mode.startswith("I"):
        grey = np.asarray(wanted).astype(float)[..., None]
        assert np.abs(found - grey / 257).max() <= 0.5
    elif wanted.mode == "F":
        assert (np.diff(found, axis=-1) == 0).all()
    else:
        np.testing.assert_array_equal(found, np.asarray(wanted.convert("RGB")))


@given(st.sampled_from(MODES).flatmap(pictures), orientations)
@example(Image.new("La", (9, 9)), 1)
@example(Image.new("L", (16, 9)), 6)
def test_a_picture_in_memory_is_taken_as_its_file_is(picture, orientation):
    picture.getexif()[0x0112] = orientation
    width, height = picture.size
    values = np.asarray(picture).astype(float)
    try:
        (found,) = to_images(picture)
    except UserError as error:
        assert min(width, height) < MIN_SIDE or not np.isfinite(values).all(), error
        return
    assert found.dtype == np.uint8
    assert found.shape == ((width, height, 3) if 5 <= orientation <= 8 else (height, width, 3))
    if picture.mode in ("1", "L", "RGB", "CMYK", "YCbCr", "HSV"):
        wanted = ImageOps.exif_transpose(picture).convert("RGB")
        np.testing.assert_array_equal(found, np.asarray(wanted))


@given(files(least=1))
def test_a_file_is_refused_where_a_side_is_too_short(file):
    _, content = file
    with Image.open(io.BytesIO(content)) as image:
        least = min(image.size)
    if least >= MIN_SIDE:
        return
    with pytest.raises(DamagedPicture, match="pixels; at least 8x8 are needed"):
        decode(content, "it")


@st.composite
def damaged(draw):
    """A picture file that was cut short, or of which bits were turned."""
    _, content = draw(files())
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    # Headers lie at the start, where a bit changes more than a colour.
    places = st.integers(0, min(99, len(content) - 1)) | st.integers(0, len(content) - 1)
    for place in draw(st.lists(places, min_size=1, max_size=4)):
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


MARKS = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\0\0\0\0WEBP",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"GIF89a",
    b"P6 9 9 255 ",
]


@given(damaged() | st.binary() | st.tuples(st.sampled_from(MARKS), st.binary()).map(b"".join))
@example(saved("PNG").replace(b"\0\0\0\rIHDR", b"\0\0\0\0IHDR"))
def test_damage_is_refused_in_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.picture"
    path.write_bytes(content)
    results = []
    for load in (lambda: read_image(path), lambda: read(content)):
        try:
            results.append(load())
        except UserError as error:
            assert str(error).isprintable() and str(error).endswith(".")
            results.append(None)
    assert (results[0] is None) == (results[1] is None)
    for found in results:
        assert found is None or (found.dtype == np.uint8 and found.shape[2:] == (3,) and min(found.shape[:2]) >= 8)


@given(files().map(lambda file: file[1]) | damaged())
@example(saved("TIFF", 6))
@example(saved("PNG")[:-32])
def test_a_file_that_pillow_opened_is_taken_as_the_file_itself(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that Pillow makes do with
        try:
            image = Image.open(io.BytesIO(content))
        except Exception:
            assume(False)
    try:
        wanted = read(content)
    except UserError:
        with pytest.raises(UserError):
            to_images(image)
    else:
        np.testing.assert_array_equal(to_images(image)[0], wanted)
