"""Pictures from files: whatever a camera, a browser or a paint program wrote, as upright 8-bit RGB."""

from __future__ import annotations

import functools
import io
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from datencoder_jax.checkpoints.paths import expand_user, find_shipped
from datencoder_jax.errors import UserError

MIN_SIDE = 8
"""Fewer pixels than this a side show nothing to learn from."""

# The formats of pictures that Pillow reads by itself: no documents (EPS would be handed to another program).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX")

_log = logging.getLogger("datencoder_jax")


class DamagedPicture(UserError):
    """Content that is no picture, or none that can be used.

    Args:
        message: a sentence for a person.
        reason: why, in few words without particulars.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def read_image(path: str | Path) -> np.ndarray:
    """The picture in a file.

    It is turned upright as its EXIF orientation says; transparency is laid on white; grey, 16-bit, palette and CMYK
    pictures become 8-bit RGB. An embedded colour profile is followed in RGB and CMYK pictures without transparency, and
    ignored in others. Of an animation, or a file of several pages, the first picture is read and a warning is logged.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        UserError: there is no such file; it is a folder, empty, no picture, damaged or cut short; it claims more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS`; or it has a side below `MIN_SIDE`.
    """
    path = find_shipped(expand_user(path), "examples")
    _check_file(path)
    picture, frames = _decode(path, str(path), count_frames=True)
    if frames > 1:
        _log.warning("%s holds %d pictures (an animation or pages); the first one is used.", path, frames)
    return np.array(picture)


def to_images(pictures: Any) -> list[Any]:
    """Pictures as people have them in Python, as uint8 arrays `[H, W, 3]`.

    Args:
        pictures: one or several: paths, PIL images or arrays. Arrays are returned as they are.

    Raises:
        UserError: a file or PIL image that cannot be used, or something else than pictures.
    """
    if isinstance(pictures, str | Path | Image.Image) or getattr(pictures, "ndim", None) == 3:
        pictures = [pictures]
    if not isinstance(pictures, Iterable):
        raise UserError(f"pictures must be paths, PIL images or uint8 arrays [H, W, 3], not {type(pictures).__name__}")
    return [_to_array(picture) for picture in pictures]


def _to_array(picture: Any) -> Any:
    if isinstance(picture, str | Path):
        return read_image(picture)
    if not isinstance(picture, Image.Image):
        return picture
    name = getattr(picture, "filename", "") or "the picture"
    with _quiet, _refusing_damage(name):  # Pillow decodes a picture that it opened only now
        _check_size(name, picture)
        return np.array(_rgb(name, _upright(picture, in_place=False)))


def decode(content: bytes, name: str, *, least: int = 0) -> Image.Image:
    """The picture in a file's content, read as `read_image` does; safe in several threads at once.

    Args:
        content: the encoded picture. Of several, the first one is read.
        name: what to call it in messages.
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as long as its shorter side keeps
            this many pixels; 0: at its full size.

    Returns:
        An upright picture in mode RGB.

    Raises:
        DamagedPicture: it cannot be used.
    """
    if not content:
        raise DamagedPicture(f"{name} is empty.", "empty")
    return _decode(io.BytesIO(content), name, least=least)[0]


GAP = 2.0
"""Pillow may average blocks of pixels first as long as this many times the pixels needed are left."""
_FLAT = 0.5
"""Neighbours inside the blocks of an enlarged picture differ by no more than this share of those across their edges."""


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """The centre square of a picture, at another size.

    A picture that was enlarged by repeating its pixels comes back exactly, and nearly so where it was compressed since:
    its blocks are averaged. Any other change of size is `resample`, through which pretraining sees its pictures too.

    Args:
        image: uint8 `[H, W, 3]`.
        side: the new size in pixels.

    Returns:
        uint8 `[side, side, 3]`.
    """
    height, width = image.shape[:2]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    square = np.ascontiguousarray(image[top : top + length, left : left + length])
    if length == side:
        return square
    pixels = Image.fromarray(square)
    if length % side == 0 and _consists_of_blocks(square, length // side):
        return np.array(pixels.reduce(length // side))
    return np.array(resample(pixels, side))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """A picture `[H, W, 3]` with every pixel as a square of `scale` pixels, which `fit_square` undoes exactly."""
    return image.repeat(scale, 0).repeat(scale, 1)


def resample(
    picture: Image.Image,
    side: int,
    place: tuple[float, float, float, float] | None = None,
    gap: float | None = GAP,
) -> Image.Image:
    """A square part of a picture at another size, by Pillow's antialiased bicubic filter, as CLIP's own preparation is.

    Args:
        picture: in mode RGB.
        side: the new size in pixels.
        place: left, top, right, bottom of the part in pixels; None: all of it.
        gap: blocks of pixels may be averaged first as long as so many times the pixels needed are left; None: never.
    """
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=place, reducing_gap=gap)


def _consists_of_blocks(square: np.ndarray, factor: int) -> bool:
    """Whether neighbours differ at the edges of blocks of `factor` pixels a side, and hardly inside them."""
    inside, across = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(square.astype(np.int16), axis=axis)).mean(axis=(1 - axis, 2))
        edges = np.arange(len(steps)) % factor == factor - 1
        inside.append(steps[~edges].mean())
        across.append(steps[edges].mean() if edges.any() else 0.0)
    return bool(sum(inside) <= _FLAT * sum(across))


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a picture in it.")
        if not path.exists():
            raise UserError(f"There is no file {path}.")
        if not path.is_file():
            raise UserError(f"{path} is not an ordinary file; save the picture to one first.")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty.")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error


class _Quiet:
    """Pillow's warnings are ignored while anybody is in here.

    It warns of odd metadata, which is no concern here, and of too many pixels, which `_check_size` refuses.
    `warnings.catch_warnings` alone is not for several threads: one would put back the filters under another's feet.
    """

    def __init__(self):
        self._lock, self._inside, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self):
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


def _decode(
    file: Path | io.BytesIO, name: str, *, least: int = 0, count_frames: bool = False
) -> tuple[Image.Image, int]:
    """The picture, and of how many it is the first, if that is asked for."""
    with _quiet, _refusing_damage(name), Image.open(file, formats=FORMATS) as image:
        _check_size(name, image)
        frames = getattr(image, "n_frames", 1) if count_frames and image.format != "MPO" else 1
        if least:
            image.draft(None, (max(least, MIN_SIDE), max(least, MIN_SIDE)))
        image.load()  # only now do some formats know their size
        _check_size(name, image)
        return _rgb(name, _upright(image, in_place=True)), frames  # an MPO is one photograph with its preview


@contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    """Whatever goes wrong in the block with a picture is a `DamagedPicture` that names it."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        raise DamagedPicture(
            f"{name} is not a picture in a format that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF).",
            "no picture",
        ) from error
    except DamagedPicture:
        raise
    except Exception as error:  # decoders of damaged files fail in every way there is
        message = f"{name} is damaged or cut short and cannot be read ({_reason(error)})."
        raise DamagedPicture(message, "damaged") from error


def _check_size(name: str, image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        message = f"{name} is only {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed."
        raise DamagedPicture(message, "too small")
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)


def _too_large(name: str) -> DamagedPicture:
    return DamagedPicture(
        f"{name} is too large: it claims more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels; "
        "make it smaller first.",
        "too large",
    )


def _upright(image: Image.Image, *, in_place: bool) -> Image.Image:
    """The picture, turned as its EXIF data says, or a copy that is: a plain copy lacks EXIF data set in Python."""
    image.load()
    with suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
        return ImageOps.exif_transpose(image, in_place=in_place) or image
    return image


def _rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(name, image)
    if image.mode == "La":  # Pillow converts grey of premultiplied transparency to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        with suppress(Exception):  # a profile that cannot be used is ignored, as viewers do
            transform = _to_srgb(profile, image.mode)
            converted = image if transform is None else ImageCms.applyTransform(image, transform)
            if converted is not None:
                return converted
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns colours of a profile into sRGB; None if it leaves them as they are to one level, as most do."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        levels = np.linspace(0, 255, 16).astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
        found = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
        if np.abs(found.astype(int) - colours).max() <= 1:
            return None
    return transform


def _deep(name: str, image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits. 16 bits are scaled by their full range, anything else by the values it holds."""
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise DamagedPicture(f"{name} holds values that are not finite (NaN or infinity).", "damaged")
    low, high = float(grey.min()), float(grey.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = np.clip(np.round((grey - low) / max(high - low, 1e-12) * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def _reason(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    return (text[:1].lower() + text[1:]).rstrip(".")
