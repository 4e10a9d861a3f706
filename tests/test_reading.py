"""Pictures from files: every kind is read right, every bad one is refused in a sentence."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoint_helpers import refuses
from PIL import Image, ImageCms

from datencoder_jax.data.reading import DamagedPicture, _to_srgb, decode, fit_square, read_image, resample
from datencoder_jax.data.sheets import labelled_sheet
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import Context, Instance


def photo(height=24, width=32):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], -1).astype(np.uint8)


def save(path, array, mode=None, **options):
    Image.fromarray(array).convert(mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", photo())), photo())


def test_the_content_and_not_the_name_decides(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.jpg", photo(), format="PNG")), photo())


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.dstack([photo(), np.full((24, 32), 255, np.uint8)])
    rgba[:, :16, 3], rgba[:, 16:20, 3] = 0, 128
    picture = read_image(save(tmp_path / "a.png", rgba))
    assert (picture[:, :16] == 255).all()
    np.testing.assert_allclose(picture[:, 16:20], (photo()[:, 16:20].astype(int) + 255) / 2, atol=2)
    np.testing.assert_array_equal(picture[:, 20:], photo()[:, 20:])


def test_transparency_of_palettes_and_of_grey(tmp_path):
    palette = Image.fromarray(photo()).convert("P")
    palette.putpixel((0, 0), 7)
    palette.save(tmp_path / "p.png", transparency=7)
    assert (read_image(tmp_path / "p.png")[0, 0] == 255).all()
    Image.new("LA", (9, 9), (10, 0)).save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png") == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palettes(tmp_path, mode):
    image = Image.fromarray(photo()).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    grey = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    picture = read_image(save(tmp_path / f"a.{ending}", grey))
    np.testing.assert_array_equal(picture[..., 1], np.round(grey / 257.0))
    dark = read_image(save(tmp_path / f"b.{ending}", grey // 100))
    assert dark.max() <= 3  # the full range is the measure, not the brightest pixel


def test_floats(tmp_path):
    grey = np.linspace(0, 1, 16 * 16).reshape(16, 16).astype(np.float32)
    np.testing.assert_allclose(read_image(save(tmp_path / "a.tif", grey))[..., 0], grey * 255, atol=0.51)
    np.testing.assert_allclose(read_image(save(tmp_path / "b.tif", grey * 255))[..., 0], grey * 255, atol=0.51)
    assert read_image(save(tmp_path / "c.tif", grey * 9e5 - 3e5)).max() == 255
    grey[0, 0] = np.nan
    refuses("not finite", read_image, save(tmp_path / "d.tif", grey))


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "a.jpg")[8, 8].astype(int)
    assert red > 230 and green < 30 and blue < 30


def test_colour_profiles(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_allclose(
        read_image(save(tmp_path / "a.png", photo(), icc_profile=profile)).astype(int), photo(), atol=2
    )
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", photo(), icc_profile=b"nonsense")), photo())


def test_a_profile_is_followed_and_one_that_is_srgb_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = read_image(save(tmp_path / "a.png", photo(), icc_profile=profile))
    np.testing.assert_array_equal(same, photo())
    swapped = profile.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")
    other = read_image(save(tmp_path / "b.png", photo(), icc_profile=swapped))
    assert _to_srgb(profile, "RGB") is None and _to_srgb(swapped, "RGB") is not None
    np.testing.assert_allclose(other.astype(int), photo()[..., [1, 0, 2]], atol=2)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_pictures_is_used_and_said_so(tmp_path, caplog, ending):
    first, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if ending == "webp" else {}
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=others, **options)
    assert (read_image(tmp_path / f"a.{ending}") == (255, 0, 0)).all()
    assert f"a.{ending} holds 3 pictures" in caplog.text


def test_a_single_picture_is_no_animation(tmp_path, caplog):
    read_image(save(tmp_path / "a.gif", photo(), "P"))
    assert not caplog.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo(photo()))
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", stored, exif=exif)), photo())


def test_damaged_exif_is_ignored(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", photo(), exif=b"Exif\0\0MM\0*\xff\xff")), photo())


def test_what_is_no_picture_is_refused(tmp_path):
    refuses("There is no file", read_image, tmp_path / "missing.png")
    refuses("is a folder", read_image, tmp_path)
    (tmp_path / "empty.png").touch()
    refuses("is empty", read_image, tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("a picture of a robot")
    refuses("not a picture", read_image, tmp_path / "text.png")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")
    refuses("not a picture", read_image, tmp_path / "page.eps")
    refuses("not an ordinary file", read_image, "/dev/null")
    refuses("cannot be read", read_image, tmp_path / ("long" * 100 + ".png"))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_pictures_are_refused(tmp_path, ending, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / f"a.{ending}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    message = refuses("cut short|not a picture", read_image, path)
    assert str(path) in message


def test_tiny_pictures_are_refused(tmp_path):
    refuses("only 1x1 pixels; at least 8x8", read_image, save(tmp_path / "a.png", photo(2, 2)[:1, :1].copy()))
    refuses("only 100x7", read_image, save(tmp_path / "b.png", photo(7, 100)))
    assert read_image(save(tmp_path / "c.png", photo(8, 8))).shape == (8, 8, 3)


def test_content_is_read_as_files_are(tmp_path):
    for name, options in (("a.jpg", {"quality": 80}), ("b.png", {}), ("c.webp", {})):
        path = save(tmp_path / name, photo(), **options)
        np.testing.assert_array_equal(np.asarray(decode(path.read_bytes(), name)), read_image(path))
    for content, reason in ((b"", "empty"), (b"text", "no picture"), (path.read_bytes()[:99], "damaged")):
        with pytest.raises(DamagedPicture, match="shard:7 is") as info:
            decode(content, "shard:7")
        assert info.value.reason == reason


@pytest.mark.parametrize("least, side", [(0, 160), (161, 160), (81, 160), (80, 80), (40, 40), (21, 40), (3, 20)])
def test_a_jpeg_may_be_decoded_smaller(tmp_path, least, side):
    path = save(tmp_path / "a.jpg", photo(160, 320), quality=95)
    small = decode(path.read_bytes(), "a", least=least)
    assert small.mode == "RGB" and small.size == (2 * side, side)
    wanted = Image.fromarray(photo(160, 320)).resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(wanted)).mean() < 4


def test_odd_metadata_is_no_concern_in_several_threads(tmp_path):
    content = save(tmp_path / "a.png", photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05").read_bytes()
    with pytest.warns(UserWarning, match="EXIF"), Image.open(tmp_path / "a.png") as image:
        image.getexif()
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:  # here every warning is an error
        for picture in pool.map(lambda _: decode(content, "a"), range(200)):
            np.testing.assert_array_equal(np.asarray(picture), photo())
    assert warnings.filters == before


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [11_000, 60_000])  # beyond the threshold at which Pillow warns, and refuses
def test_decompression_bombs_are_refused(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(99)))
    (tmp_path / "bomb.png").write_bytes(content + _chunk(b"IEND", b""))
    refuses("too large: it claims more than 89 million pixels", read_image, tmp_path / "bomb.png")


def test_text_bombs_are_refused(tmp_path):
    path = save(tmp_path / "a.png", photo())
    content = path.read_bytes()
    bomb = _chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(5_000_000)))
    path.write_bytes(content[:33] + bomb + content[33:])
    refuses("is damaged", read_image, path)


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_enlarged_pixels_come_back_exactly(scale):
    picture = render(Instance.from_id(1_100_000), Context("beach"), 3)
    np.testing.assert_array_equal(fit_square(picture.repeat(scale, 0).repeat(scale, 1), 32), picture)


@pytest.mark.parametrize("scale", [2, 8])
def test_enlarged_pixels_come_back_nearly_after_compression(scale):
    picture = render(Instance.from_id(1_100_000), Context("beach"), 3)
    file = io.BytesIO()
    Image.fromarray(picture.repeat(scale, 0).repeat(scale, 1)).save(file, "JPEG", quality=95)
    back = fit_square(np.asarray(decode(file.getvalue(), "a.jpg")), 32).astype(int)
    averages = np.asarray(decode(file.getvalue(), "a.jpg").reduce(scale)).astype(int)
    np.testing.assert_array_equal(back, averages)


@pytest.mark.parametrize("side", [150, 200, 300, 700])  # a quarter, a third, one half, and larger
def test_photographs_are_resized_by_one_filter(side):
    picture = photo(600, 600)
    np.testing.assert_array_equal(fit_square(picture, side), np.asarray(resample(Image.fromarray(picture), side)))
    plain = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    assert abs(fit_square(picture, side).astype(int) - plain).max() <= 4


def test_the_centre_square_is_kept():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (fit_square(wide, 20) == 200).all()
    assert (fit_square(wide.swapaxes(0, 1), 10) == 200).all()
    assert fit_square(wide, 13).shape == (13, 13, 3)


def test_shrinking_is_antialiased_and_enlarging_smooth():
    checks = (np.indices((90, 90)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert abs(fit_square(checks, 32).astype(int) - 128).max() < 30
    enlarged = fit_square(photo(16, 16), 64).astype(int)
    assert abs(np.diff(enlarged[..., 0], axis=1)).max() <= 12


@pytest.mark.parametrize("side, cell", [(32, 128), (64, 128), (100, 100), (512, 512), (600, 512)])
def test_the_sheet_shows_every_picture(side, cell):
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 0, 255)]], np.uint8)
    images = np.broadcast_to(colours[:, :, None, None], (2, 2, side, side, 3)).copy()
    sheet = np.asarray(
        labelled_sheet([np.full((50, 40, 3), 9, np.uint8)], ["a photo", "word " * 300 + "x" * 500], images)
    )
    for colour in (*colours.reshape(4, 3), np.array([9, 9, 9])):
        rows, columns = np.nonzero((sheet == colour).all(-1))
        assert len(rows) >= cell * cell and np.ptp(rows) == np.ptp(columns) == cell - 1
    assert (sheet[0] == 255).all() and (sheet[:, -1] == 255).all()


def test_the_sheet_without_input_and_with_many():
    images = np.zeros((1, 3, 32, 32, 3), np.uint8)
    alone = labelled_sheet([], ["a robot"], images)
    many = labelled_sheet([photo()] * 5, ["a robot"], images)
    assert alone.width < many.width and alone.height < many.height
    with pytest.raises(ValueError, match="2 prompts"):
        labelled_sheet([], ["a", "b"], images)
