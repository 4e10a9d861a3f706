"""Bad pictures."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from corpus import files
from corpus.case import Kind
from corpus.files import chunk, content, encoded, noise, nothing, picture, png
from datencoder_jax.data.reading import read_image, to_images
from datencoder_jax.errors import UserError

KIND = Kind(
    "Pictures",
    "The input picture of `datencoder personalize`, read by `read_image`; further ones are values in Python.",
    read_image,
)


def use_in_python(pictures: Any) -> None:
    """What `personalize` does with pictures in Python before anything is computed."""
    images = to_images(pictures)
    if not images:
        raise UserError("no picture was given")
    for image in images:
        shape = np.shape(image)
        if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise UserError("pictures must be paths, PIL images or uint8 arrays [H, W, 3]")


def _exif(**tags: Any) -> Image.Exif:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[int(tag[1:], 16)] = value
    return exif


def _tiff_loop() -> bytes:
    """A TIFF whose second directory is its first."""
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 200), (279, 4, 1, 256)]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", 8)
    return head.ljust(200, b"\0") + bytes(256)


def _tiff(**changes: int) -> bytes:
    """A TIFF of 16 grey pixels a side, or what it claims."""
    values = {"width": 16, "height": 16, "depth": 8, "compression": 1, "offset": 200, "size": 256} | changes
    tags = {"width": 256, "height": 257, "depth": 258, "compression": 259, "offset": 273, "size": 279}
    entries = sorted([(tag, 4, 1, values[name]) for name, tag in tags.items()] + [(262, 4, 1, 1)])
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + bytes(256)


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


_PIXELS = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(96) for _ in range(32))))
_TEXT_BOMB = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(5_000_000)))
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64"/></svg>'
_HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(400)
_GREY = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _with_value(value: float) -> np.ndarray:
    grey = _GREY.copy()
    grey[3, 3] = value
    return grey


# --- no files
KIND.refused("no file", nothing("cat.png"))
KIND.refused("an empty path", nothing(""))
KIND.refused("a folder", files.folder("pictures"))
KIND.refused("an address on the web", nothing("https://example.org/cat.jpg"))
KIND.refused("a file: address", nothing("file:///home/me/cat.png"))
KIND.refused("a path of Windows", nothing("C:\\Users\\me\\cat.png"))
KIND.refused("a path with its quotation marks", nothing('"cat.png"'))
KIND.refused("a pattern that the shell did not expand", nothing("pictures/*.jpg"))
KIND.refused("a home folder of nobody", nothing("~nosuchuser/cat.png"))
KIND.refused("a name of 300 letters", nothing("n" * 300 + ".png"))
KIND.refused("a path of 5,000 letters", nothing("n/" * 2500 + "cat.png"))
KIND.refused("a name with a zero byte", nothing("cat\0.png"))
KIND.refused("a name with an escape sequence, and no file", nothing("cat\x1b[2J.png"))
KIND.refused("half of a surrogate pair in the name", nothing("cat\ud83d.png"))
KIND.refused("a file in the place of a folder of the path", lambda w: content("cat", b"x")(w) / "cat.png")
KIND.refused("the null device", nothing("/dev/null"))
KIND.refused("a pipe", files.fifo("cat.png"))
KIND.refused("a link to nothing", files.link("cat.png", "gone.png"))
KIND.refused("a link to itself", files.link("cat.png", "cat.png"))

# --- no pictures
KIND.refused("an empty file", content("cat.png", b""))
KIND.refused("one byte", content("cat.png", b"\x89"))
KIND.refused("a million zeros", content("cat.png", bytes(1_000_000)))
KIND.refused("a text", content("cat.png", "a picture of a cat"))
KIND.refused("an error page of a web server", content("cat.jpg", files.HTML))
KIND.refused("a pointer of Git LFS", content("cat.png", files.LFS_POINTER))
KIND.refused("a drawing in SVG", content("cat.svg", _SVG))
KIND.refused("a PDF", content("cat.pdf", "%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n"))
KIND.refused("an EPS", content("cat.eps", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n"))
KIND.refused("a photograph of an iPhone (HEIC)", content("cat.heic", _HEIC))
KIND.refused("a document of Photoshop", content("cat.psd", b"8BPS\0\1" + bytes(6) + b"\0\3" + bytes(99)))
KIND.refused("a zip of pictures", content("cat.zip", b"PK\x03\x04" + bytes(200)))
KIND.refused("a film", content("cat.mp4", struct.pack(">I", 24) + b"ftypisom\0\0\2\0isomiso2" + bytes(99)))
KIND.refused("a sound", content("cat.png", b"RIFF\x24\0\0\0WAVEfmt " + bytes(99)))
KIND.refused("a tensor file", files.tensors("cat.png", {"cat": noise()}))

# --- damaged pictures
for _name, _options in {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {}}.items():
    _data = encoded(Image.fromarray(noise(64, 64)), _name, **_options)
    KIND.refused(f"half of a {_name}", content(f"cat.{_name.lower()}", _cut(_data, 0.5)))
    KIND.refused(f"the start of a {_name}", content(f"cat.{_name.lower()}", _cut(_data, 0.01)))
KIND.refused("half of an AVIF", content("cat.avif", _cut(encoded(Image.fromarray(noise(64, 64)), "AVIF"), 0.5)))
KIND.refused("half of a JPEG 2000", content("cat.jp2", _cut(encoded(Image.fromarray(noise(64, 64)), "JPEG2000"), 0.1)))
KIND.refused("a PNG without pixels", content("cat.png", png(32, 32)))
KIND.refused("a PNG with too few pixels", content("cat.png", png(64, 64, _PIXELS)))
KIND.refused("a PNG whose pixels are no zlib", content("cat.png", png(32, 32, chunk(b"IDAT", b"no zlib at all"))))
KIND.used("a PNG with a wrong checksum", content("cat.png", png(32, 32, _PIXELS[:-2] + b"xx")))
KIND.refused("a PNG of no width", content("cat.png", png(0, 32, _PIXELS)))
KIND.refused("a PNG of an unknown colour type", content("cat.png", png(32, 32, _PIXELS, colour=5)))
KIND.refused("a PNG of an unknown depth", content("cat.png", png(32, 32, _PIXELS, depth=7)))
KIND.refused("a PNG with five megabytes of packed text", content("cat.png", png(32, 32, _TEXT_BOMB, _PIXELS)))
KIND.refused("a PNG that claims 30,000 pixels a side", content("cat.png", png(30_000, 30_000, _PIXELS)))
KIND.refused("a PNG that claims two thousand million pixels a side", content("cat.png", png(2**31 - 1, 2**31 - 1)))
KIND.refused("a TIFF that claims 60,000 pixels a side", content("cat.tif", _tiff(width=60_000, height=60_000)))
KIND.refused("a TIFF whose pixels lie beyond its end", content("cat.tif", _tiff(offset=100_000)))
KIND.refused("a TIFF of an unknown compression", content("cat.tif", _tiff(compression=4711)))
KIND.refused("a TIFF with a value that is not a number", picture("cat.tif", _with_value(np.nan)))
KIND.refused("a TIFF with an infinite value", picture("cat.tif", _with_value(np.inf)))
KIND.refused("a JPEG of its first marker alone", content("cat.jpg", b"\xff\xd8\xff\xe0"))
KIND.refused(
    "a BMP of negative width", content("cat.bmp", encoded(None, "BMP")[:18] + struct.pack("<i", -32) + bytes(99))
)
KIND.refused("one pixel", picture("cat.png", noise()[:1, :1]))
KIND.refused("a strip of seven pixels", picture("cat.png", noise(7, 300)))

# --- odd pictures
KIND.used("eight pixels a side", picture("cat.png", noise(8, 8)))
KIND.used("a panorama of 8 by 4,000 pixels", picture("cat.png", noise(8, 4000)))
KIND.used("one colour", picture("cat.png", Image.new("RGB", (32, 32), "red")))
KIND.used("wholly transparent", picture("cat.png", Image.new("RGBA", (32, 32), (0, 0, 0, 0))))
KIND.used(
    "a palette with a transparent colour", picture("cat.png", Image.fromarray(noise()).convert("P"), transparency=3)
)
KIND.used("grey with transparency", picture("cat.png", Image.new("LA", (32, 32), (9, 99))))
KIND.used("black and white", picture("cat.png", Image.fromarray(noise()).convert("1")))
KIND.used("grey of 16 bits", picture("cat.png", np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64))
KIND.used("grey of 32-bit floating point", picture("cat.tif", _GREY))
KIND.used("CMYK", picture("cat.jpg", Image.new("CMYK", (32, 32), (0, 255, 255, 0))))
KIND.used("a JPEG in YCbCr, progressive", picture("cat.jpg", progressive=True, quality=80))
KIND.used("Lab colours", picture("cat.tif", Image.fromarray(noise()).convert("LAB")))
KIND.used("a colour profile", picture("cat.png", icc_profile=_SRGB))
KIND.used("a colour profile that is nonsense", picture("cat.png", icc_profile=b"nonsense"))
KIND.used("EXIF that turns it", picture("cat.jpg", exif=_exif(x112=6)))
KIND.used("EXIF that turns it in a tenth way", picture("cat.jpg", exif=_exif(x112=9)))
KIND.used(
    "EXIF whose orientation is a text",
    picture("cat.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0"),
)
KIND.used("damaged EXIF", picture("cat.png", exif=b"Exif\0\0MM\0*\xff\xff"))
KIND.used(
    "an animation",
    picture("cat.gif", Image.new("RGB", (16, 16), "red"), save_all=True, append_images=[Image.new("RGB", (16, 16))]),
)
KIND.used(
    "a TIFF of two pages",
    picture("cat.tif", Image.new("RGB", (16, 16), "red"), save_all=True, append_images=[Image.new("RGB", (16, 16))]),
)
KIND.used("a TIFF whose pages go in a circle", content("cat.tif", _tiff_loop()))
KIND.used("a PNG that is called JPEG", picture("cat.jpg", format="PNG"))
KIND.used("an ending in capitals", picture("CAT.PNG", format="PNG"))
KIND.used("no ending", picture("cat", format="PNG"))
KIND.used("a picture with bytes after its end", files.changed(picture("cat.png"), lambda data: data + bytes(999)))
KIND.used("a name with a line break", picture("a\ncat.png", format="PNG"))
KIND.used("a name in Chinese with an emoji", picture("猫🐈.png", format="PNG"))
KIND.used("a name that begins with a dash", picture("-cat.png", format="PNG"))
KIND.used("a name of blanks", picture("  .png", format="PNG"))
KIND.used("a link to a picture", files.linked(picture("cat.png"), "link"))
KIND.used("an icon", picture("cat.ico", Image.fromarray(noise(32, 32))))

# --- values in Python
KIND.refused("in Python: no pictures", nothing(([],)), use_in_python)
KIND.refused("in Python: None", nothing(None), use_in_python)
KIND.refused("in Python: a number", nothing(3), use_in_python)
KIND.refused("in Python: the content of a file", nothing(encoded()), use_in_python)
KIND.refused("in Python: an open file", nothing(io.BytesIO(encoded())), use_in_python)
KIND.refused("in Python: an array of shares of one", nothing(noise() / 255), use_in_python)
KIND.refused("in Python: an array of 16 bits", nothing(noise().astype(np.uint16)), use_in_python)
KIND.refused("in Python: an array with transparency", nothing(np.zeros((32, 32, 4), np.uint8)), use_in_python)
KIND.refused("in Python: an array in PyTorch's order", nothing(np.zeros((3, 32, 32), np.uint8)), use_in_python)
KIND.refused("in Python: a grey array", nothing(noise()[..., 0]), use_in_python)
KIND.refused("in Python: an array without pixels", nothing(np.zeros((0, 32, 3), np.uint8)), use_in_python)
KIND.refused("in Python: an image of one pixel", nothing(Image.new("RGB", (1, 1))), use_in_python)
KIND.refused("in Python: a list with None in it", nothing(([noise(), None],)), use_in_python)
KIND.refused("in Python: an image that was closed", lambda _: _closed_image(), use_in_python)
KIND.refused("in Python: a file that was cut since it was opened", lambda _: _cut_image(), use_in_python)
KIND.used("in Python: an image of 16 bits", nothing(Image.fromarray(noise()[..., 0].astype(np.uint16))), use_in_python)
KIND.used("in Python: a generator of images", lambda _: (image for image in [noise()]), use_in_python)


def _closed_image() -> Image.Image:
    picture("cat.png")(Path())
    image = Image.open("cat.png")
    image.close()
    return image


def _cut_image() -> Image.Image:
    path = content("cat.png", encoded(Image.fromarray(noise(128, 128)), "PNG"))(Path())
    image = Image.open(io.BytesIO(path.read_bytes()[:9000]))
    image.filename = "cat.png"
    return image
