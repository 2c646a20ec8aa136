"""Colours: what an image's numbers mean, and their conversion to sRGB by LittleCMS, which Pillow contains.

    colour_profile(image)      the name of what the file says about its colours, for a report
    conversion(image)          the transform that as_seen applies, or None where the numbers already are sRGB

A file that says nothing is taken for sRGB. Otherwise the first of these counts:

    cICP chunk of a PNG        primaries of BT.709, BT.2020 or P3 with an ordinary curve; HDR curves are passed over
    ICC profile                of any format for which Pillow finds it: JPEG, PNG, TIFF, WebP, AVIF, HEIC, JPEG XL
    code points of a HEIC      like cICP
    sRGB chunk of a PNG        nothing to do
    gAMA chunk of a PNG        with the primaries of the cHRM chunk, as browsers do; 1 / 2.2 is taken for sRGB
    EXIF interoperability R03  Adobe RGB: what cameras write instead of a profile
"""

import functools
import io
import logging
import struct
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageCms

logger = logging.getLogger(__name__)

BROKEN = "broken"
UNREADABLE = b"\0"  # stands for a profile of which nothing can be read

# The mode that LittleCMS gets for an image's mode. Not in it: "1", whose two values mean black and white in any
# profile, and "F", which is no colour.
_BASES = {"CMYK": "CMYK", "LAB": "LAB", "I": "I;16"}
_BASES |= dict.fromkeys(("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr", "HSV"), "RGB")
_BASES |= dict.fromkeys(("L", "LA", "La"), "L") | dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "I;16")

# x and y of red, green, blue and white, by the code points of ITU-T H.273
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    1: ("BT.709", ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)),
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65)),
    12: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65)),
}
_SRGB = _PRIMARIES[1][1]
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), _D65)
_SRGB_LIKE = (1, 6, 13, 14, 15)  # transfer functions that are shown as sRGB's, or are it; 8 is linear
_D50 = np.array([0.96420288, 1.0, 0.82490540])  # of the profile connection space, ICC.1:2022, 7.2.16
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def conversion(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """What turns the colours of an image into sRGB: relative colorimetric, of 8 bits per channel.

    Args:
        image: as decoded, with its `info`; of any mode. Its pixels are not read.

    Returns:
        A transform from its `input_mode`, one of "RGB", "L", "I;16", "CMYK" and "LAB", to "RGB". None if the numbers
        are sRGB within 1 of 255 levels, if nothing is known, and if a profile is broken or of another mode.
    """
    found = _found(image)[1]
    return found if isinstance(found, ImageCms.ImageCmsTransform) else None


def to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """The converted image: "RGBA" with the same alpha if it is "RGBA", else "RGB".

    Args:
        image: of a mode that Pillow converts to the transform's `input_mode`. 16-bit gray has to be "I;16".
        transform: from `conversion`.
    """
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if image.mode != transform.input_mode:
        image = image.convert(transform.input_mode)
    image = transform.apply(image)
    if alpha is not None:
        image.putalpha(alpha)
    return image


def colour_profile(image: Image.Image) -> str | None:
    """The name of what a file says about its colours.

    Args:
        image: as `conversion` takes it.

    Returns:
        The description in the profile, or of what stands in for one ("Adobe RGB (EXIF)"). None if there is nothing.
        "broken" if it is ignored, because it is damaged or of another mode than the image.
    """
    profile, found = _found(image)
    if profile is None:
        return None
    return BROKEN if found == BROKEN else _description(profile)


def _found(image: Image.Image) -> tuple[bytes | None, ImageCms.ImageCmsTransform | str | None]:
    """What an image declares, and what `_transform` makes of it."""
    profile, base = _declared(image), _BASES.get(image.mode)
    if profile is None or base is None:
        return profile, None
    return profile, _transform(profile, "L" if base == "I;16" and not _reads_16_bits() else base)


# ---------------------------------------------------------------------------------------------------------------
# What a file says
# ---------------------------------------------------------------------------------------------------------------


def _declared(image: Image.Image) -> bytes | None:
    """The profile of an image, or one that is made for what the file says instead; None if it says nothing."""
    info, gray = image.info, _BASES.get(image.mode) in ("L", "I;16")
    try:
        found = _of_code_points(*info["cicp"], gray) if "cicp" in info else None
        if found or info.get("icc_profile"):
            return found or bytes(info["icc_profile"])
        if "nclx_profile" in info:
            primaries, transfer = (info["nclx_profile"][key] for key in ("color_primaries", "transfer_characteristics"))
            return _of_code_points(primaries, transfer, gray)
        if "srgb" not in info and isinstance(info.get("gamma"), float):
            return _of_gamma(info["gamma"], info.get("chromaticity"), gray)
        if b"R03" in info.get("exif", b""):  # a search of the bytes: few images have it, and parsing is slow
            directories = image.getexif()
            index = directories.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex, "")
            if str(index).startswith("R03"):
                return matrix_profile("Adobe RGB (EXIF)", _ADOBE, 563 / 256, gray)
    except Exception as error:  # text chunks and damaged EXIF blocks put anything there
        logger.debug("ignored what an image says about its colours: %s", error)
    return None


def _of_code_points(primaries: int, transfer: int, gray: bool) -> bytes | None:
    """The profile for the numbers of ITU-T H.273; None for high dynamic range and for primaries that are not here."""
    if primaries not in _PRIMARIES or transfer not in (8, *_SRGB_LIKE):
        return None
    name, places = _PRIMARIES[primaries]
    return matrix_profile(f"{name} (code points)", places, 1.0 if transfer == 8 else None, gray)


def _of_gamma(gamma: float, chromaticity: Sequence[float] | None, gray: bool) -> bytes | None:
    """The profile for a PNG's gAMA chunk, and its cHRM: white, red, green and blue; None if it is sRGB or absurd."""
    if not 0.2 <= gamma <= 1.2:
        return None
    primaries = _SRGB
    if chromaticity:
        white, *others = zip(chromaticity[::2], chromaticity[1::2], strict=True)
        primaries = (*others, white)
    if np.abs(np.subtract(primaries, _SRGB)).max() < 0.01:
        if abs(gamma * 2.2 - 1) < 0.05:  # libpng's threshold
            return None
        primaries = _SRGB
    return matrix_profile(f"gamma {1 / gamma:.2f} (gAMA)", tuple(primaries), 1 / gamma, gray)


@functools.lru_cache(maxsize=16)
def matrix_profile(
    name: str, primaries: tuple[tuple[float, float], ...], exponent: float | None, gray: bool = False
) -> bytes:
    """An ICC profile (version 4.3) of a display.

    Args:
        name: the description.
        primaries: x and y of red, green, blue and white.
        exponent: of the curve from stored values to light, or None for sRGB's curve.
        gray: makes it a profile for gray images, which has no primaries.
    """
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T  # (3, 4): X, Y, Z of each at Y = 1
    cone = _BRADFORD @ xyz
    adapted = np.linalg.inv(_BRADFORD) @ (cone * ((_BRADFORD @ _D50) / cone[:, 3])[:, None])  # white becomes D50
    columns = adapted[:, :3] * np.linalg.solve(adapted[:, :3], _D50)  # which add up to white

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    words = name.encode("utf-16-be")
    curve = (3, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)) if exponent is None else (0, (exponent,))
    trc = b"para" + struct.pack(">IHH", 0, curve[0], 0) + fixed(*curve[1])
    tags = {
        b"desc": b"mluc" + struct.pack(">3I2s2s2I", 0, 1, 12, b"en", b"US", len(words), 28) + words,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*_D50),
    }
    if gray:
        tags[b"kTRC"] = trc
    else:
        tags |= {c + b"XYZ": b"XYZ \0\0\0\0" + fixed(*columns[:, k]) for k, c in enumerate((b"r", b"g", b"b"))}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), trc)
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    size = place + len(body)
    header = struct.pack(">I4xI", size, 0x04300000) + b"mntr" + (b"GRAY" if gray else b"RGB ") + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + fixed(*_D50)
    return header.ljust(128, b"\0") + table + body


# ---------------------------------------------------------------------------------------------------------------
# LittleCMS
# ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)  # needs no lock: two threads may make the same transform, which is harmless
def _transform(profile: bytes, base: str) -> ImageCms.ImageCmsTransform | str | None:
    """The transform to sRGB from images of mode `base`, BROKEN, or None if the numbers already are sRGB.

    Most files of a folder share a few profiles. A transform has no state that changes, so threads share it.
    """
    try:
        if base in ("L", "I;16") and profile[16:20] == b"RGB " and _transform(profile, "RGB") is None:
            return None  # common: a gray file that says "sRGB"
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        # The optimizer makes a short table of a curve, which is too coarse for 16-bit gray.
        flags = ImageCms.Flags.NOOPTIMIZE if base == "I;16" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, _srgb(), base, "RGB", renderingIntent=intent, flags=flags)
    except Exception as error:  # OSError for what is no profile, PyCMSError for one of another kind than the image
        logger.debug("ignored a colour profile: %s", error)
        return BROKEN
    return None if base in ("RGB", "L", "I;16") and _changes_nothing(source, base) else transform


def _changes_nothing(source: ImageCms.ImageCmsProfile, base: str) -> bool:
    """Whether sRGB values move by at most one level: on the grays and on a grid of colours, of 8 bits."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)  # (256, 3)
    if base == "RGB":
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        values = np.concatenate((values, np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)))
    mode = "RGB" if base == "RGB" else "L"
    colours = Image.fromarray(values[None]).convert(mode)  # (1, N)
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    seen = ImageCms.buildTransform(source, _srgb(), mode, "RGB", renderingIntent=intent).apply(colours)
    return int(np.abs(np.asarray(seen).astype(int) - values[None]).max()) <= 1


@functools.cache
def _reads_16_bits() -> bool:
    """Whether Pillow gives LittleCMS 16-bit gray as such: version 10.3 takes it for 8 bits."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(matrix_profile("gray", _SRGB, None, gray=True)))
    transform = ImageCms.buildTransform(source, _srgb(), "I;16", "RGB")
    seen = np.asarray(transform.apply(Image.fromarray(np.array([[257 * 200, 257 * 9]], np.uint16))))
    return int(np.abs(seen[0, :, 0].astype(int) - (200, 9)).max()) <= 2


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.lru_cache(maxsize=64)
def _description(profile: bytes) -> str:
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        return " ".join(name.replace("\0", " ").split()) or "unnamed"
    except Exception:  # the colours may be readable nevertheless
        return "unnamed"
