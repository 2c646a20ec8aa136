"""Pixels: decode any image file, apply orientation, colour profile and transparency, and resize to an 8-bit square."""

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from latent_ddpm.data import colours, formats, jpeg, png

logger = logging.getLogger(__name__)

# By the library that resizes. Change a number when the resulting pixels change: it is part of every cache key.
TRANSFORM_VERSIONS = {"pillow": 3, "pytorch": 4}
CENTRE = (0.5, 0.5)
_MOST_OF_A_JPEG = 2**28  # pixels before it is reduced; a progressive one needs up to 6 bytes for each


class _Quiet:
    """Silences Pillow while any thread decodes; `warnings.catch_warnings` by itself is not for several threads.

    Pillow says "Corrupt EXIF data" and the like of images that decode, and of large ones that they may be bombs.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._caught = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.|pillow_|pi_heif")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()
if hasattr(os, "register_at_fork"):  # a thread may be inside when a worker is forked
    os.register_at_fork(after_in_child=_quiet.__init__)


def decode(data: bytes, at_least: int | None = None) -> Image.Image:
    """Decodes the first frame of an image file completely; a truncated file raises.

    HEIC, AVIF and JPEG XL are read by the Pillow plugins that are installed. Of a PNG, only what its pixels, their
    colours and its orientation need is read, so no text in it can be too long.

    Args:
        data: the bytes of the file.
        at_least: lets the JPEG decoder reduce the size, as long as both sides keep this many pixels.

    Raises:
        OSError: the bytes are empty, not an image, or of a format for which a package is missing. Pillow's decoders
            also raise `SyntaxError`, `ValueError`, `DecompressionBombError` and others on damaged files, so a caller
            that must continue catches `Exception`.
    """
    if not data:
        raise OSError("the file is empty")
    data, said_of_colours = png.essential(data)
    with _quiet:
        image = _opened(data)
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # only JPEG supports it
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > 2 * Image.MAX_IMAGE_PIXELS:
            raise OSError(f"an image of {image.width} x {image.height} pixels needs too much memory")
        image.load()
        image.info.update(said_of_colours)
        return image


def _opened(data: bytes) -> Image.Image:
    """`Image.open`, with reasons that a person understands, and two kinds of sound JPEG that it refuses."""
    plugin = formats.plugin_for(data[:32])
    try:
        return Image.open(io.BytesIO(data), formats=plugin and (plugin,))
    except Image.DecompressionBombError:
        if not data.startswith(b"\xff\xd8"):
            raise
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))  # a phone's 200 megapixels, which may come reduced
        if image.width * image.height > _MOST_OF_A_JPEG:
            raise
        return image
    except Image.UnidentifiedImageError:
        if data.startswith(b"\xff\xd8"):
            with contextlib.suppress(Image.UnidentifiedImageError):
                return Image.open(io.BytesIO(jpeg.without_odd_segments(data)))
        # Pillow's own message is the address of the buffer
        kind = formats.kind_of(data[:32])
        reason = kind and formats.unreadable(f".{kind.lower()}")
        raise OSError(reason or "not an image, or of a format that Pillow does not read") from None


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """The image as a person sees it: rotated by its EXIF orientation, in sRGB, with transparency on white.

    Colours are converted by LittleCMS, relative colorimetric, from what the file says of them (see `colours`): RGB,
    gray, CMYK and LAB images whose ICC profile is of the same kind, palettes, and images with transparency, whose alpha
    stays. 16-bit gray is converted before it becomes 8 bits. Images in sRGB keep their values, and so do those whose
    profile is broken or of another kind, and float images. One channel is the gray of the converted colours.

    16-bit gray is scaled by its full range. A 32-bit integer image is taken for 16-bit gray unless it holds
    values outside [0, 65535]; then its own minimum and maximum become 0 and 255. A float image is taken for
    [0, 1] when its largest finite value is at most 1, else for [0, 255]; NaN is black.

    Args:
        image: any mode that Pillow decodes to.
        channels: 1 or 3.

    Returns:
        An image of mode "L" (1 channel) or "RGB" (3 channels); `image` itself if nothing has to change.

    Raises:
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    transform = colours.conversion(image) if image.info else None  # before the EXIF block is rewritten
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        of_16_bits = transform is not None and transform.input_mode == "I;16"
        if of_16_bits and values.min() >= 0 and values.max() <= 65535:
            image = colours.to_srgb(Image.fromarray(values.astype(np.uint16)), transform)
        else:
            image = Image.fromarray(_to_8_bit(values))
        transform = None if of_16_bits else transform
    elif image.mode in ("La", "RGBa"):
        image = image.convert(
            "LA" if image.mode == "La" else "RGBA"
        )  # premultiplied: Pillow converts it to nothing else
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
    if transform is not None:
        image = colours.to_srgb(image, transform)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # LAB has no direct way to L
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return image  # sooner than by asking Pillow for an empty EXIF block
    try:
        with _quiet:
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                return image  # exif_transpose would copy it
            return ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block does not make the image unusable
        logger.debug("ignored the EXIF block of an image: %s", error)
        return image


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """(H, W) of uint16, int32 or float32 to uint8, as described in `as_seen`."""
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        scale = 255.0 if finite.size == 0 or finite.max() <= 1 else 1.0
        scaled = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf) * scale
    else:
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high <= 65535:
            low, high = 0, 65535
        scaled = (values.astype(np.float64) - low) * (255.0 / max(high - low, 1))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def resize_and_crop(
    image: Image.Image, resolution: int, crop: tuple[float, float] = CENTRE, library: str = "pillow"
) -> np.ndarray:
    """Resizes the shorter side to `resolution` (Lanczos, antialiased) and takes a square window.

    The window alone is resampled, so the cost does not grow with the aspect ratio. An image whose shorter side
    already is `resolution` is cut at whole pixels and keeps its values.

    PyTorch is several times faster than Pillow. It has the filter of Pillow-SIMD, whose weights have 16 bits where
    Pillow's have 32: a value differs by at most 2 from Pillow's. It knows no window, so the image is cut first, at
    whole pixels, and the filter does not see what lies outside; Pillow's does.

    Args:
        image: mode "L" or "RGB", of any size.
        resolution: side of the result in pixels.
        crop: offset of the window to the right and down, as fractions of the slack; (0.5, 0.5) is the centre.
        library: that resizes, from `resizing.resizer`.

    Returns:
        uint8 (resolution, resolution, C). PyTorch's is a view of (C, resolution, resolution), the order of a batch.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * crop[0], (height - side) * crop[1]
    if library == "pillow" and side != resolution:
        # Pillow's taps reach beyond the box, so this equals resizing the whole image and cropping then.
        box = (left, top, left + side, top + side)
        resized = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
        return np.asarray(resized).reshape(resolution, resolution, -1)
    left, top = round(left), round(top)
    pixels = np.asarray(image).reshape(height, width, -1)[top : top + side, left : left + side].copy()  # (S, S, C)
    if side == resolution:
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, C, S, S), channels innermost: the fast case
    size = (resolution, resolution)
    resized = torch.nn.functional.interpolate(planes, size, mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def nearest_square(image: Image.Image, resolution: int) -> np.ndarray:
    """A map of classes, resized by nearest neighbour within the centre window of `resize_and_crop`.

    Its values are numbers, not colours: a profile does not change them.

    Args:
        image: of one channel: "L", "P" (the palette's indices count), "1", or 16 or 32 bits with values below 256.
        resolution: side of the result in pixels.

    Returns:
        uint8 (resolution, resolution).

    Raises:
        ValueError: the image has several channels, or values above 255 or below 0.
    """
    image = _upright(image)
    if len(image.getbands()) > 1:
        raise ValueError(f"it has {len(image.getbands())} channels, but a map of classes has one")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"its values go from {values.min()} to {values.max()}, but classes go from 0 to 255")
    image = Image.fromarray(values.astype(np.uint8))
    side = min(image.size)
    left, top = ((length - side) * centre for length, centre in zip(image.size, CENTRE, strict=True))
    if side == resolution:
        left, top = round(left), round(top)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.NEAREST, box=box))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] of any shape to uint8, rounded; what lies outside is clamped."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def square(
    load: Callable[[], Image.Image],
    resolution: int,
    channels: int,
    crop: tuple[float, float] = CENTRE,
    library: str = "pillow",
) -> np.ndarray | str:
    """The image that `load` decodes as uint8 (H, W, C), or the reason why it cannot be decoded."""
    try:
        return resize_and_crop(as_seen(load(), channels), resolution, crop, library)
    except Exception as error:  # Pillow's plugins raise nearly every class there is on damaged files
        return f"{type(error).__name__}: {error}"
