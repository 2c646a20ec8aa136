"""Files whose pixels are sound must decode, whatever their metadata holds; a bomb in it must not go off."""

import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latent_ddpm.data.images import as_seen, decode
from latent_ddpm.data.png import essential

NOISE = np.random.default_rng(0).bytes(60_000)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))


def encoded(format="PNG", image=PICTURE, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind, content, sound=True):
    checksum = zlib.crc32(kind + content) ^ (not sound)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*chunks, image=PICTURE, after=False, **options):
    """A PNG with chunks behind IHDR, or in front of IEND."""
    data = encoded(image=image, **options)
    place = len(data) - 12 if after else 33
    return data[:place] + b"".join(chunks) + data[place:]


LONG = zlib.compress(b"x" * 2_000_000)
BOMB = zlib.compress(bytes(50_000_000), 9)
PNG = {
    "compressed text": png(chunk(b"zTXt", b"prompt\0\0" + LONG)),
    "compressed international text": png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)),
    "text behind the pixels": png(chunk(b"zTXt", b"prompt\0\0" + LONG), after=True),
    "texts of 70 MB": png(*(chunk(b"tEXt", f"step {k}\0".encode() + bytes(1_000_000)) for k in range(70))),
    "transparency of a wrong checksum": png(chunk(b"tRNS", bytes(6), sound=False)),
    "bombs": png(*[chunk(b"zTXt", b"prompt\0\0" + BOMB)] * 20),
    "a bomb for XMP": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "a bomb for EXIF": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    "damaged compressed text": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + NOISE)),
    "text without a keyword": png(chunk(b"tEXt", b"")),
    "wrong checksum": png(chunk(b"tIME", bytes(7), sound=False)),
    "wrong checksum behind the pixels": png(chunk(b"tEXt", b"a\0b", sound=False), after=True),
    "short physical size": png(chunk(b"pHYs", b"1")),
    "short gamma": png(chunk(b"gAMA", b"1")),
    "short chromaticities": png(chunk(b"cHRM", b"1")),
    "short transparency": png(chunk(b"tRNS", b"1")),
    "a profile by an unknown method": png(chunk(b"iCCP", b"x\0\5abc")),
    "a large broken profile": png(chunk(b"iCCP", b"x\0\0" + zlib.compress(NOISE * 50))),
    "a bomb for a profile": png(chunk(b"iCCP", b"x\0\0" + BOMB)),
    "an empty profile": png(chunk(b"iCCP", b"")),
    "a short animation control": png(chunk(b"acTL", b"123")),
    "a short frame control": png(chunk(b"acTL", struct.pack(">2I", 2, 0)), chunk(b"fcTL", b"123")),
    "unknown": png(chunk(b"quQU", NOISE)),
    "without an end": png()[:-12],
    "text in an animation": png(
        chunk(b"zTXt", b"prompt\0\0" + LONG), save_all=True, append_images=[Image.new("RGB", PICTURE.size)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", PNG.values(), ids=PNG)
def test_png(data):
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(as_seen(decode(data), 3), PICTURE)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000 + len(data)
    finally:
        tracemalloc.stop()


def segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


PLAIN = encoded("JPEG", quality=95)


def jpeg(*segments):
    return PLAIN[:2] + b"".join(segments) + PLAIN[2:]


def pictures(*entries):
    """A multi-picture index with these directory entries (tag, type, count, value)."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4))


VERSION, COUNT = (0xB000, 7, 4, b"0100"), (0xB001, 4, 1, struct.pack("<I", 5))
JPEG = {
    "300 comments": jpeg(*[segment(0xFE, NOISE)] * 300),
    "long EXIF": jpeg(*[segment(0xE1, b"Exif\0\0" + NOISE)] * 30),
    "long XMP": jpeg(*[segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + NOISE)] * 30),
    "an empty index of pictures": jpeg(segment(0xE2, b"MPF\0")),
    "noise for an index of pictures": jpeg(segment(0xE2, b"MPF\0" + NOISE)),
    "an index without pictures": jpeg(pictures(VERSION, COUNT)),
    "an index that points nowhere": jpeg(pictures(VERSION, COUNT, (0xB002, 7, 80, struct.pack("<I", 2**31)))),
    "half a profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\3abc")),
    "a profile without a number": jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "noise of Photoshop": jpeg(segment(0xED, b"Photoshop 3.0\0" + NOISE)),
    "short resource of Photoshop": jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0\0\0")),
    "short mark of Adobe": jpeg(segment(0xEE, b"Adobe")),
    "short JFIF": jpeg(segment(0xE0, b"JFIF\0")),
    "padding": jpeg(b"\xff\xff\xff", segment(0xE0, b"JFIF\0")),
    "bytes behind": PLAIN + bytes(1000),
}


@pytest.mark.parametrize("data", JPEG.values(), ids=JPEG)
@pytest.mark.filterwarnings("error")
def test_jpeg(data):
    np.testing.assert_array_equal(as_seen(decode(data), 3), decode(PLAIN))


OTHERS = {
    "WebP": encoded("WEBP", lossless=True, exif=b"Exif\0\0" + NOISE * 100, xmp=NOISE * 100),
    "TIFF": encoded("TIFF", tiffinfo={40_000: "x" * 2_000_000, 700: NOISE * 100}),
    "GIF": encoded("GIF", PICTURE.quantize(), comment=NOISE)[:-1],
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("error")
def test_other_formats(data):
    expected = PICTURE.quantize().convert("RGB") if data.startswith(b"GIF") else PICTURE
    np.testing.assert_array_equal(as_seen(decode(data), 3), expected)


# ---------------------------------------------------------------------------------------------------------------
# What must stay
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["IHDR", "PLTE"])
def test_a_wrong_checksum_of_pixels_is_damage(place):
    data = bytearray(encoded(image=PICTURE.quantize()))
    start = data.index(place.encode())
    length = int.from_bytes(data[start - 4 : start], "big")
    data[start + 4 + length] ^= 1
    with pytest.raises((SyntaxError, OSError)):
        decode(bytes(data))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_png_is_damage(share):
    data = png(chunk(b"tEXt", b"a\0b"))
    with pytest.raises((OSError, SyntaxError)):
        decode(data[: int(share * len(data))])


def test_nothing_is_copied_without_metadata():
    assert essential(encoded())[0] is not None and len(essential(encoded())[0]) == len(encoded())
    assert essential(b"\x89PNG\r\n\x1a\n") == (b"\x89PNG\r\n\x1a\n", {})
    assert essential(PLAIN)[0] is PLAIN


EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEXADECIMAL = f"\nexif\n{len(EXIF.tobytes())}\n{EXIF.tobytes().hex()}".encode()


@pytest.mark.parametrize(
    "turning",
    [
        chunk(b"eXIf", EXIF.tobytes()[6:]),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(HEXADECIMAL)),
        chunk(b"tEXt", b"Raw profile type exif\0" + HEXADECIMAL),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(XMP)),
    ],
    ids=["eXIf", "compressed by ImageMagick", "by ImageMagick", "XMP", "compressed XMP"],
)
@pytest.mark.parametrize("after", [False, True])
def test_the_orientation_stays(turning, after):
    data = png(chunk(b"zTXt", b"prompt\0\0" + LONG), turning, after=after)
    np.testing.assert_array_equal(as_seen(decode(data), 3), PICTURE.transpose(Image.Transpose.ROTATE_270))


def test_the_last_pixels_of_an_animation_are_those_of_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(image=frames[0], save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert as_seen(decode(data), 3).getpixel((3, 3)) == (255, 0, 0)


def test_large_images_are_no_warning_and_enormous_ones_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = encoded(image=Image.new("1", (9_500, 9_500)))  # more than 89 megapixels
        assert decode(file).size == (9_500, 9_500)
    with pytest.raises(Image.DecompressionBombError):
        decode(encoded(image=Image.new("1", (20_000, 10_000))))


def test_a_phone_of_200_megapixels():
    data = encoded("JPEG", Image.new("L", (16_320, 12_240), 99))
    assert decode(data, at_least=512).size == (2_040, 1_530)
    with pytest.raises(OSError, match="memory"):
        decode(data)
    header = data.index(b"\xff\xc0")
    with pytest.raises(Image.DecompressionBombError):
        decode(data[: header + 5] + struct.pack(">2H", 65_000, 65_000) + data[header + 9 :], at_least=512)


def test_pillow_alone_refuses_what_these_tests_are_about():
    """So a Pillow that changes its mind is noticed."""
    for name in ("compressed text", "texts of 70 MB", "wrong checksum", "a large broken profile"):
        with pytest.raises((ValueError, SyntaxError, OSError)):
            Image.open(io.BytesIO(PNG[name])).load()
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20
