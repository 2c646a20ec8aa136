"""Colours must come out as LittleCMS, used by itself, converts them to sRGB."""

import functools
import io
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import finished
from PIL import Image, ImageCms, PngImagePlugin

from latent_ddpm.data import colours
from latent_ddpm.data.colours import colour_profile
from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.images import as_seen, decode, nearest_square
from latent_ddpm.data.sources.base import ImageSource

RELATIVE = ImageCms.Intent.RELATIVE_COLORIMETRIC
D65 = (0.95047, 1.0, 1.08883)
# Columns: X, Y, Z of red, green and blue. Apple's Display P3 and Adobe RGB (1998), adapted to D50 by Bradford's method.
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def profile(columns=SRGB, gamma=None, space=b"RGB ", name=b"test"):
    """An ICC profile of version 2 with a matrix and curves; without gamma, a table of sRGB's curve."""
    if gamma is None:
        light = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in np.linspace(0, 1, 1024)]
        curve = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *(round(65535 * y) for y in light))
    else:
        curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(79), b"wtpt": xyz(D65)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {letter + b"XYZ": xyz(column) for letter, column in zip((b"r", b"g", b"b"), columns, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    place, table, body = 132 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s12x4s28x3i", place + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ",
                         b"acsp", 63190, 65536, 54061)  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


DISPLAY_P3, ADOBE_RGB = profile(P3), profile(ADOBE, 563 / 256, name=b"Adobe RGB (1998)")
GRAY_18, SRGB_LIKE = profile(gamma=1.8, space=b"GRAY"), profile(name=b"my sRGB")
SWAPPED = profile(SRGB[::-1])  # red and blue exchanged


def littlecms(image, icc, mode=None):
    """What LittleCMS makes of an image: uint8 (H, W, 3)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    target = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(image, source, target, RELATIVE, mode or "RGB"))


def stored(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return decode(file.getvalue())


@functools.cache
def palette_of_everything():
    """Saturated and other colours: RGB, 64 x 64."""
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    values[:8] = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)[np.arange(64) % 4]
    values[8:16] = (np.arange(512).reshape(8, 64, 1) // 2).astype(np.uint8)
    return Image.fromarray(values)


def apart(a, b):
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


# ---------------------------------------------------------------------------------------------------------------
# ICC profiles
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
@pytest.mark.parametrize("icc", [DISPLAY_P3, ADOBE_RGB], ids=["P3", "Adobe RGB"])
def test_rgb_gets_the_values_of_littlecms(icc, format):
    if format == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    options = {"lossless": True} if format == "WEBP" else {}
    image = stored(palette_of_everything(), format, icc_profile=icc, **options)
    seen = as_seen(image, 3)
    assert apart(seen, littlecms(image, icc)) <= 1
    assert apart(seen, image) > 20  # so that the test would notice if nothing happened


def test_the_values_are_those_of_the_formula():
    """(x^2.2 of Adobe RGB) x matrix -> sRGB's curve, computed without LittleCMS."""
    image = stored(palette_of_everything(), icc_profile=ADOBE_RGB)
    light = (np.asarray(image) / 255) ** (563 / 256) @ np.array(ADOBE) @ np.linalg.inv(SRGB)
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.clip(light, 0, None) ** (1 / 2.4) - 0.055)
    assert apart(as_seen(image, 3), np.clip(np.rint(curve * 255), 0, 255)) <= 1


def test_one_channel_is_the_gray_of_the_converted_colours():
    image = stored(palette_of_everything(), icc_profile=DISPLAY_P3)
    np.testing.assert_array_equal(as_seen(image, 1), Image.fromarray(littlecms(image, DISPLAY_P3)).convert("L"))


def test_srgb_keeps_every_value():
    for icc in (SRGB_LIKE, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        image = stored(palette_of_everything(), icc_profile=icc)
        assert as_seen(image, 3) is image
    assert colour_profile(stored(palette_of_everything(), icc_profile=SRGB_LIKE)) == "my sRGB"


def test_a_profile_is_looked_at_once():
    colours._transform.cache_clear()
    for _ in range(3):
        as_seen(stored(Image.new("RGB", (2, 2)), icc_profile=DISPLAY_P3), 3)
        as_seen(stored(Image.new("RGB", (2, 2)), icc_profile=SRGB_LIKE), 3)
    assert colours._transform.cache_info().misses == 2


def test_seen_twice_is_converted_once():
    once = as_seen(stored(palette_of_everything(), icc_profile=SWAPPED), 3)
    np.testing.assert_array_equal(as_seen(once, 3), once)


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_with_a_gray_profile(channels):
    image = stored(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), icc_profile=GRAY_18)
    expected = littlecms(image, GRAY_18)
    seen = np.asarray(as_seen(image, channels))
    assert apart(seen if channels == 3 else seen[..., None], expected) <= 1
    assert apart(expected[..., 0], image) > 15


def test_gray_that_says_srgb_stays():
    image = stored(Image.new("L", (2, 2), 99), icc_profile=SRGB_LIKE)
    assert as_seen(image, 1) is image
    assert colour_profile(image) == "my sRGB"


@pytest.mark.skipif(not colours._reads_16_bits(), reason="an early Pillow converts 8 bits of it")
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_converted_before_it_has_8_bits(format):
    linear = profile(gamma=1.0, space=b"GRAY")
    values = np.arange(0, 65536, 16, dtype=np.uint16)[None]
    seen = np.asarray(as_seen(stored(Image.fromarray(values), format, icc_profile=linear), 1))
    light = values / 65535
    curve = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert apart(seen, np.rint(255 * curve)) <= 1  # by 8 bits, 1 / 255 would already be level 13
    wide = Image.fromarray(values.astype(np.int32))
    wide.info["icc_profile"] = linear
    np.testing.assert_array_equal(as_seen(wide, 1), seen)
    floats = Image.fromarray((values / 65535).astype(np.float32))
    floats.info["icc_profile"] = linear
    assert apart(as_seen(floats, 1), np.rint(light * 255)) <= 1  # no colours


def test_16_bit_gray_with_an_early_pillow(monkeypatch):
    monkeypatch.setattr(colours, "_reads_16_bits", lambda: False)
    image = stored(Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16)[None]), icc_profile=GRAY_18)
    assert apart(as_seen(image, 3), littlecms(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), GRAY_18)) <= 1


def cmyk_profile():
    """A printer's profile: a lookup table with 2 points per ink, black in the end; blue is too light."""

    def lab(c, m, y, k):
        r, g, b = ((1 - ink) * (1 - k) for ink in (c, m, y))
        rgb = Image.new("RGB", (1, 1), tuple(round(255 * v) for v in (r, g, (b + 1) / 2 if k < 1 else 0)))
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        return transform.apply(rgb).getpixel((0, 0))

    table = bytes(v for n in range(16) for v in lab(*(n >> 3 & 1, n >> 2 & 1, n >> 1 & 1, n & 1)))
    line = bytes(range(256))
    a_to_b = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536 * (k % 4 == 0) for k in range(9)))
    a_to_b += line * 4 + table + line * 3
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + bytes(79), b"A2B0": a_to_b, b"A2B1": a_to_b}
    place, entries, body = 132 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        entries += tag + struct.pack(">II", place + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x3i", place + len(body), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp",
                         63190, 65536, 54061)  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_with_a_profile_of_inks(format):
    icc = cmyk_profile()
    values = np.random.default_rng(1).integers(0, 256, (4, 4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    image = stored(Image.fromarray(values, "CMYK"), format, icc_profile=icc)
    assert image.mode == "CMYK"
    seen = as_seen(image, 3)
    assert apart(seen, littlecms(image, icc)) <= 1
    assert apart(seen, image.convert("RGB")) > 50
    assert colour_profile(image) == "inks"


def test_lab_with_a_profile():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = stored(Image.new("LAB", (4, 4), (150, 180, 60)), "TIFF", icc_profile=lab)
    assert image.mode == "LAB"
    assert apart(as_seen(image, 3), littlecms(image, lab)) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a key"])
def test_transparency_is_kept(mode):
    icc = GRAY_18 if mode == "LA" else SWAPPED
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 128)])
    options = {"icc_profile": icc}
    if mode == "LA":
        image = image.convert("LA")
    elif mode == "P":
        colour = (200, 0, 0)
        image = Image.new("P", (3, 1))
        image.putpalette(colour * 3)
        image.putdata([0, 1, 2])
        options["transparency"] = bytes((255, 0, 128))
    elif mode == "RGB with a key":
        image = Image.new("RGB", (3, 1), (200, 0, 0))
        image.putpixel((1, 0), (7, 8, 9))
        options["transparency"] = (7, 8, 9)
    seen = as_seen(stored(image, **options), 3)
    opaque, clear, half = (seen.getpixel((x, 0)) for x in range(3))
    # on white, after the conversion
    expected = littlecms(Image.new("L", (1, 1), 60), GRAY_18)[0, 0] if mode == "LA" else (0, 0, 200)
    assert apart(opaque, expected) <= 1
    assert clear == (255, 255, 255)
    assert mode == "RGB with a key" or apart(half, (np.array(opaque) * 128 + 255 * 127) / 255) <= 1


def test_orientation_and_profile_together():
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    tags = Image.Exif()
    tags[0x0112] = 6  # the left half is seen at the top
    seen = as_seen(stored(image, "JPEG", icc_profile=SWAPPED, exif=tags, quality=100), 3)
    assert seen.size == (32, 64)
    np.testing.assert_allclose(seen.getpixel((16, 8)), (0, 0, 255), atol=6)


def test_a_reduced_jpeg_keeps_its_profile():
    file = io.BytesIO()
    Image.new("RGB", (640, 480), (255, 0, 0)).save(file, "JPEG", icc_profile=SWAPPED, quality=100)
    image = decode(file.getvalue(), at_least=100)
    assert image.size == (160, 120)
    np.testing.assert_allclose(as_seen(image, 3).getpixel((9, 9)), (0, 0, 255), atol=6)


def test_a_map_of_classes_is_not_converted():
    image = stored(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), icc_profile=GRAY_18)
    np.testing.assert_array_equal(nearest_square(image, 16).ravel(), np.arange(256))
    assert colour_profile(image) == "test"


def cut(icc):
    return icc[:200]


def of_another_kind(icc):
    return icc[:12] + b"link" + icc[16:]


BROKEN = {
    "noise": bytes(range(200)),
    "short": b"ICC",
    "cut": cut(DISPLAY_P3),
    "device link": of_another_kind(DISPLAY_P3),
    "gray for RGB": GRAY_18,
    "inks for RGB": cmyk_profile(),
    "without tags": DISPLAY_P3[:128] + bytes(4),
}


@pytest.mark.parametrize("icc", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_broken_profile_is_ignored_and_can_be_counted(icc, format):
    image = stored(palette_of_everything(), format, icc_profile=icc)
    assert as_seen(image, 3) is image
    assert colour_profile(image) == "broken"


def test_a_profile_of_colours_does_not_fit_gray():
    image = stored(Image.new("L", (2, 2), 99), icc_profile=ADOBE_RGB)
    assert as_seen(image, 1) is image
    assert colour_profile(image) == "broken"


def test_names_of_profiles():
    assert colour_profile(stored(Image.new("RGB", (2, 2)))) is None
    assert colour_profile(stored(Image.new("RGB", (2, 2)), icc_profile=ADOBE_RGB)) == "Adobe RGB (1998)"
    assert colour_profile(stored(Image.new("1", (2, 2)), icc_profile=GRAY_18)) == "test"
    assert colour_profile(Image.new("F", (2, 2))) is None
    assert colour_profile(stored(Image.new("RGB", (2, 2)), icc_profile=profile(P3, name=b""))) == "unnamed"


# ---------------------------------------------------------------------------------------------------------------
# What else gives pixels a meaning
# ---------------------------------------------------------------------------------------------------------------


def exif_of_a_camera(index="R03"):
    tags = Image.Exif()
    tags[0x010F] = "a camera"
    tags.get_ifd(0x8769)[0xA001] = 65535  # ColorSpace: uncalibrated
    tags.get_ifd(0x8769)[0xA005] = {1: index}  # the interoperability IFD
    return tags


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_camera_that_says_adobe_rgb(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = stored(palette_of_everything(), format, exif=exif_of_a_camera(), **options)
    assert apart(as_seen(image, 3), littlecms(image, ADOBE_RGB)) <= 1
    assert colour_profile(image) == "Adobe RGB (EXIF)"
    with_profile = stored(palette_of_everything(), format, exif=exif_of_a_camera(), icc_profile=SRGB_LIKE, **options)
    assert as_seen(with_profile, 3) is with_profile  # the profile counts
    ordinary = stored(palette_of_everything(), format, exif=exif_of_a_camera("R98"), **options)
    assert as_seen(ordinary, 3) is ordinary
    gray = stored(palette_of_everything().convert("L"), format, exif=exif_of_a_camera(), **options)
    assert apart(as_seen(gray, 1), gray.convert("L")) < 12 and colour_profile(gray) == "Adobe RGB (EXIF)"


def with_chunks(image, *chunks):
    """The image as a PNG with chunks (kind, content) before its pixels."""
    info = PngImagePlugin.PngInfo()
    for kind, content in chunks:
        info.add(kind, content)
    return stored(image, pnginfo=info)


def gama(value):
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(*values):
    return b"cHRM", struct.pack(">8I", *(round(v * 100_000) for v in values))


OF_SRGB = chrm(0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
OF_ADOBE = chrm(0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def test_the_gamma_of_a_png():
    old_mac = with_chunks(palette_of_everything(), gama(1 / 1.8))
    assert apart(as_seen(old_mac, 3), littlecms(old_mac, profile(SRGB, 461 / 256))) <= 2  # 1.8 has no exact fraction
    assert colour_profile(old_mac) == "gamma 1.80 (gAMA)"
    gray = with_chunks(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), gama(1 / 1.8), OF_SRGB)
    assert apart(as_seen(gray, 3), littlecms(gray, profile(gamma=461 / 256, space=b"GRAY"))) <= 2
    adobe = with_chunks(palette_of_everything(), gama(256 / 563), OF_ADOBE)
    assert apart(as_seen(adobe, 3), littlecms(adobe, ADOBE_RGB)) <= 1


@pytest.mark.parametrize(
    "chunks",
    [
        [gama(0.45455)],
        [gama(0.45455), OF_SRGB],
        [OF_ADOBE],  # without gAMA, primaries say too little
        [gama(1 / 1.8), (b"sRGB", b"\0")],
        [gama(0)],
        [gama(40_000)],
        [(b"gAMA", b"\0\0")],
        [gama(1 / 1.8), (b"cHRM", b"\0")][1:],
        [gama(1 / 1.8), chrm(0, 0, 0, 0, 0, 0, 0, 0)],
        [(b"cICP", bytes((1, 13, 0, 1)))],
        [(b"cICP", bytes((9, 16, 0, 1)))],  # PQ: high dynamic range
        [(b"cICP", bytes((12, 13)))],
    ],
)
def test_png_chunks_that_change_nothing(chunks):
    image = with_chunks(palette_of_everything(), *chunks)
    assert as_seen(image, 3) is image


def test_code_points_of_a_png():
    image = with_chunks(palette_of_everything(), (b"cICP", bytes((12, 13, 0, 1))), gama(1 / 1.8))
    assert apart(as_seen(image, 3), littlecms(image, DISPLAY_P3)) <= 1
    assert colour_profile(image) == "Display P3 (code points)"


def test_code_points_of_a_heic():
    image = palette_of_everything().copy()
    image.info["nclx_profile"] = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6}
    assert apart(as_seen(image, 3), littlecms(image, DISPLAY_P3)) <= 1
    image.info["icc_profile"] = SRGB_LIKE
    assert as_seen(image, 3) is image  # the profile is in front


@pytest.mark.parametrize("key", ["gamma", "icc_profile", "transparency", "srgb", "chromaticity", "cicp", "exif"])
def test_a_text_of_a_png_is_no_property_of_its_pixels(key):
    info = PngImagePlugin.PngInfo()
    info.add_text(key, "R03 0.3")
    info.add_itxt(key, "R03 0.3")
    image = stored(palette_of_everything(), pnginfo=info)
    np.testing.assert_array_equal(as_seen(image, 3), palette_of_everything())
    for text in ("x", b"R03", 0.5, ("a", "b"), (1,), None):  # an image that did not come through decode
        image = palette_of_everything().copy()
        image.info[key] = text
        if key != "transparency":
            as_seen(image, 3)


# ---------------------------------------------------------------------------------------------------------------
# Processes and threads
# ---------------------------------------------------------------------------------------------------------------


class OneFile(ImageSource):
    fingerprint = "one"

    def __init__(self, content):
        self.content = content

    def __len__(self):
        return 8

    def load(self, i, at_least=None):
        return decode(self.content, at_least)

    def name(self, i):
        return str(i)


def content_of_p3():
    file = io.BytesIO()
    palette_of_everything().save(file, "PNG", icc_profile=DISPLAY_P3)
    return file.getvalue()


def test_threads_share_transforms():
    source = OneFile(content_of_p3())
    expected = decode_square(source, 0, 64, 3)
    colours._transform.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda k: decode_square(source, k % 8, 64, 3), range(64)))
    assert all(np.array_equal(one, expected) for one in found)


SCRIPT = """
import sys, torch
sys.path[:0] = ["tests", "tests/data", "."]
import test_colours as t
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        return torch.from_numpy(t.decode_square(t.OneFile(t.content_of_p3()), k, 64, 3))

if __name__ == "__main__":
    first = Squares()[0]  # from here on, this process has the transform
    loader = DataLoader(Squares(), num_workers=1, multiprocessing_context=sys.argv[1])
    assert all(torch.equal(batch[0], first) for batch in loader)
    print("the same")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_convert_too(method, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = finished([sys.executable, str(tmp_path / "script.py"), method])
    assert "the same" in done.stdout, done.stderr[-2000:]
