"""Pictures from files: whatever a camera, a browser or a paint program wrote, as upright 8-bit RGB."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

MIN_SIDE = 8
"""Fewer pixels than this a side show nothing to learn from."""

# The formats of pictures that Pillow reads by itself: no documents (EPS would be handed to another program).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX")

_log = logging.getLogger("datencoder_jax")


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
    path = expand_user(path)
    _check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is no concern here ...
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # ... and of bombs, which are refused
        try:
            with Image.open(path, formats=FORMATS) as image:
                _check_size(path, *image.size)
                frames = getattr(image, "n_frames", 1)
                image.load()
                picture = _rgb(path, _upright(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UserError(
                f"{path} is too large: it claims more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels; "
                "make it smaller first."
            ) from error
        except UnidentifiedImageError as error:
            raise UserError(
                f"{path} is not a picture in a format that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF)."
            ) from error
        except UserError:
            raise
        except Exception as error:  # decoders of damaged files fail in every way there is
            raise UserError(f"{path} is damaged or cut short and cannot be read ({_reason(error)}).") from error
    if frames > 1 and image.format != "MPO":  # an MPO is one photograph with its preview
        _log.warning("%s holds %d pictures (an animation or pages); the first one is used.", path, frames)
    return picture


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """The centre square of a picture, at another size.

    Shrinking by an integer factor averages blocks, so a picture that was enlarged by repeating its pixels comes back
    exactly; any other change of size is an antialiased Lanczos filter.

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
    if length % side == 0:
        return np.array(pixels.reduce(length // side))
    return np.array(pixels.resize((side, side), Image.Resampling.LANCZOS))


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


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path} is only {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed.")


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
        return ImageOps.exif_transpose(image)
    return image


def _rgb(path: Path, image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(path, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(paper, image).convert("RGB"))
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK"):
        with suppress(Exception):  # a profile that cannot be used is ignored, as viewers do
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return np.array(converted)
    return np.array(image.convert("RGB"))


def _deep(path: Path, image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits. 16 bits are scaled by their full range, anything else by the values it holds."""
    grey = np.asarray(image).astype(np.float64)
    if not np.isfinite(grey).all():
        raise UserError(f"{path} holds values that are not finite (NaN or infinity).")
    low, high = float(grey.min()), float(grey.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = np.clip(np.round((grey - low) / max(high - low, 1e-12) * 255), 0, 255).astype(np.uint8)
    return np.repeat(scaled[..., None], 3, axis=2)


def _reason(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    return (text[:1].lower() + text[1:]).rstrip(".")
