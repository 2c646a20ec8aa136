"""The chunks of a PNG file that its pixels need.

Pillow refuses a whole image for a metadata chunk that is too long, has a wrong checksum or a wrong length, and takes
any keyword of a text chunk for a property of the image. So the decoder gets none of them: it never sees a text that
would decompress to gigabytes.
"""

import struct
import zlib
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Image generators write prompts of megabytes, and no text of that length says how an image is to be turned.
_MOST_TEXT = 2**20  # bytes of a chunk that may hold the orientation
_MOST_PROFILE = 2**23  # bytes of an ICC profile; Pillow's limit is an eighth
# Texts in which Pillow finds an orientation, which ImageMagick and Adobe's programs write.
_TURNING = (b"Raw profile type exif", b"exif", b"XML:com.adobe.xmp")
_TRANSPARENCY_LENGTHS = {0: (2,), 2: (6,), 3: range(1, 257)}  # of tRNS, by colour type


def essential(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """A PNG file without the chunks that its pixels do not need, and what those said of its colours.

    Critical chunks stay as they are, so a damaged image is still found to be damaged. Transparency and orientation stay
    if they are sound. All frames of an animation but the first are left out.

    Args:
        data: the file, which may be damaged, or not a PNG; then it is returned as it is.

    Returns:
        The shorter file, and the keys that Pillow's `info` would have: icc_profile (bytes; `b"\\0"` if it cannot be
        read), gamma (float), chromaticity (8 floats), srgb (int); and cicp, the code points of primaries and transfer.
    """
    if not data.startswith(SIGNATURE):
        return data, {}
    kept, info, start, place, turning = [], {}, 0, len(SIGNATURE), set()
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if end > len(data) or not kind.isalpha() or kind == b"IEND":
            break
        if kind[0] & 0x20:  # ancillary
            content = memoryview(data)[place + 8 : end - 4]
            sound = zlib.crc32(memoryview(data)[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
            if not (sound and _stays(kind, content, data[25], turning)):
                kept.append(memoryview(data)[start:place])
                start = end
                if sound and kind in _COLOURS:
                    _COLOURS[kind](bytes(content), info)
        place = end
    return (b"".join([*kept, memoryview(data)[start:]]) if start else data), info


def _stays(kind: bytes, content: memoryview, colour_type: int, turning: set[bytes]) -> bool:
    if kind == b"tRNS":
        return len(content) in _TRANSPARENCY_LENGTHS.get(colour_type, ())
    if kind == b"eXIf":
        return True
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return False
    keyword, zero, text = bytes(content[:80]).partition(b"\0")
    if keyword not in _TURNING or keyword in turning or not zero:
        return False
    turning.add(keyword)
    if kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1"):
        try:
            rest = bytes(content[len(keyword) + 2 :])
            if kind == b"iTXt":  # a byte for the method, language, translated keyword
                rest = rest[1:].split(b"\0", 2)[2]
            _inflate(rest, _MOST_TEXT)
        except (zlib.error, ValueError, IndexError):
            return False
    return len(content) <= _MOST_TEXT


def _inflate(content: bytes, most: int) -> bytes:
    """Raises `ValueError` if more than `most` bytes come out, before they do."""
    stream = zlib.decompressobj()
    found = stream.decompress(content, most)
    if not stream.eof and (stream.unconsumed_tail or len(found) >= most):
        raise ValueError(f"more than {most} bytes")
    return found


# ---------------------------------------------------------------------------------------------------------------
# What chunks say of colours
# ---------------------------------------------------------------------------------------------------------------


def _iccp(content: bytes, info: dict[str, Any]) -> None:
    try:
        info["icc_profile"] = _inflate(content[content.index(b"\0") + 2 :], _MOST_PROFILE) or b"\0"
    except (zlib.error, ValueError):
        info["icc_profile"] = b"\0"


def _gama(content: bytes, info: dict[str, Any]) -> None:
    if len(content) == 4:
        info["gamma"] = int.from_bytes(content, "big") / 100_000


def _chrm(content: bytes, info: dict[str, Any]) -> None:
    if len(content) == 32:
        info["chromaticity"] = tuple(value / 100_000 for value in struct.unpack(">8I", content))


def _srgb(content: bytes, info: dict[str, Any]) -> None:
    if len(content) == 1:
        info["srgb"] = content[0]


def _cicp(content: bytes, info: dict[str, Any]) -> None:
    if len(content) == 4 and content[2] == 0 and content[3] == 1:  # RGB of the full range
        info["cicp"] = (content[0], content[1])


_COLOURS = {b"iCCP": _iccp, b"gAMA": _gama, b"cHRM": _chrm, b"sRGB": _srgb, b"cICP": _cicp}
