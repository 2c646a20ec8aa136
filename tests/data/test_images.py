"""Every kind of image file must come out as a person sees it."""

import io

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from latent_ddpm import resizing
from latent_ddpm.data.images import as_seen, decode, resize_and_crop
from latent_ddpm.errors import UserError

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)


def stored(image: Image.Image, format: str, **options) -> Image.Image:
    """The image after a trip through a file of `format`."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return decode(buffer.getvalue())


def palette_image() -> Image.Image:
    """Left pixel red, right pixel blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE] + [0] * 762)
    image.putdata([0, 1])
    return image


def pixels(image: Image.Image, channels: int = 3) -> list:
    seen = as_seen(image, channels)
    assert seen.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(seen).reshape(-1, channels).squeeze().tolist()


# ---------------------------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------------------------


def test_one_bit_image_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(stored(image, "png")) == [[*BLACK], [*WHITE]]
    assert pixels(stored(image, "png"), 1) == [0, 255]


def test_gray_image_keeps_its_values_in_both_modes():
    image = Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8))
    assert pixels(stored(image, "png"), 1) == [0, 1, 128, 255]
    assert pixels(stored(image, "png")) == [[v, v, v] for v in (0, 1, 128, 255)]


def test_colour_becomes_luma():
    assert as_seen(Image.new("RGB", (1, 1), RED), 1).getpixel((0, 0)) == 76  # 0.299 * 255, ITU-R 601
    assert as_seen(Image.new("RGB", (1, 1), (0, 255, 0)), 1).getpixel((0, 0)) == 150  # 0.587 * 255


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("LA", [(100, 255), (100, 0), (0, 128)]),
        ("RGBA", [(100, 100, 100, 255), (100, 100, 100, 0), (0, 0, 0, 128)]),
    ],
)
def test_alpha_is_laid_on_white(mode, values):
    image = Image.new(mode, (3, 1))
    image.putdata(values)
    # 0 at 128/255 over 255 is 255 * 127 / 255.
    assert pixels(stored(image, "png"), 1) == [100, 255, 127]
    assert pixels(stored(image, "png")) == [[100] * 3, [255] * 3, [127] * 3]


def test_premultiplied_alpha():
    image = Image.new("RGBA", (2, 1))
    image.putdata([(*RED, 255), (*RED, 0)])
    assert pixels(image.convert("RGBa")) == [[*RED], [*WHITE]]
    assert pixels(image.convert("LA").convert("La"), 1) == [76, 255]


def test_palette_image():
    assert stored(palette_image(), "png").mode == "P"
    assert pixels(stored(palette_image(), "png")) == [[*RED], [*BLUE]]


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["index", "table"])
def test_palette_image_with_transparency(transparency):
    image = stored(palette_image(), "png", transparency=transparency)
    assert image.mode == "P"
    assert pixels(image) == [[*WHITE], [*BLUE]]


def test_palette_image_with_alpha_channel():
    image = palette_image().convert("PA")
    image.putalpha(0)
    assert pixels(image) == [[*WHITE], [*WHITE]]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 8, 9))])
def test_transparent_colour_of_an_image_without_alpha(mode, key):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 50 if mode == "L" else (50, 50, 50))
    again = stored(image, "png", transparency=key)
    assert again.mode == mode
    assert pixels(again) == [[*WHITE], [50, 50, 50]]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    again = stored(image, "jpeg", quality=100)
    assert again.mode == "CMYK"
    np.testing.assert_allclose(as_seen(again, 3).getpixel((8, 8)), RED, atol=3)
    assert as_seen(again, 1).getpixel((8, 8)) == pytest.approx(76, abs=3)


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), RED),
        ("LAB", (255, 128, 128), WHITE),
        ("LAB", (0, 128, 128), BLACK),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ],
)
def test_other_colour_spaces(mode, value, seen):
    image = Image.new(mode, (1, 1), value)
    np.testing.assert_allclose(as_seen(image, 3).getpixel((0, 0)), seen, atol=1)
    expected = as_seen(Image.new("RGB", (1, 1), seen), 1).getpixel((0, 0))
    assert as_seen(image, 1).getpixel((0, 0)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bit_gray_file_is_scaled_by_its_full_range(format):
    image = Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16))
    again = stored(image, format)
    assert again.mode == "I;16"
    assert pixels(again, 1) == [0, 1, 100, 255]
    assert pixels(again) == [[v] * 3 for v in (0, 1, 100, 255)]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_byte_orders(mode):
    values = np.array([[0, 257, 25700, 65535]], ">u2" if mode == "I;16B" else "<u2")
    assert pixels(Image.frombytes(mode, (4, 1), values.tobytes()), 1) == [0, 1, 100, 255]


def test_32_bit_integers():
    def image(*values):
        return Image.fromarray(np.array([values], np.int32))

    assert pixels(image(0, 257, 25700, 65535), 1) == [0, 1, 100, 255]  # 16-bit gray in a wider type
    assert pixels(image(0, 100), 1) == [0, 0]
    assert pixels(image(100_000, 150_000, 200_000), 1) == [0, 128, 255]  # 127.5 rounds to even
    assert pixels(image(-1000, 0, 1000), 1) == [0, 128, 255]
    assert pixels(image(-(2**31), 2**31 - 1), 1) == [0, 255]
    assert pixels(image(70_000, 70_000), 1) == [0, 0]


def test_floats():
    def image(*values):
        return Image.fromarray(np.array([values], np.float32))

    nan, inf = float("nan"), float("inf")
    assert pixels(image(0, 0.2, 1), 1) == [0, 51, 255]
    assert pixels(image(nan, 1, -3), 1) == [0, 255, 0]
    assert pixels(image(0, 51.4, 300, nan), 1) == [0, 51, 255, 0]
    assert pixels(image(0.2, inf, -inf), 1) == [51, 255, 0]
    assert pixels(image(nan, nan), 1) == [0, 0]
    assert pixels(stored(image(0, 0.2, 1), "tiff"), 3) == [[0] * 3, [51] * 3, [255] * 3]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    image = stored(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert image.n_frames == 2
    assert as_seen(image, 3).getpixel((2, 2)) == RED


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_only_gray_and_colour(channels):
    with pytest.raises(ValueError, match="channels"):
        as_seen(Image.new("RGB", (1, 1)), channels)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# Where the corners (top left, top right, bottom left, bottom right) of the stored picture are seen (EXIF 2.3, 4.6.4).
ORIENTATIONS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(orientation):
    colours = {"a": 0, "b": 80, "c": 160, "d": 240}
    image = Image.new("L", (64, 32))
    for corner, box in zip("abcd", [(0, 0), (32, 0), (0, 16), (32, 16)], strict=True):
        image.paste(colours[corner], (*box, box[0] + 32, box[1] + 16))
    seen = as_seen(stored(image, "jpeg", quality=100, exif=exif(orientation)), 1)
    assert seen.size == ((64, 32) if orientation < 5 else (32, 64))
    width, height = seen.size
    corners = [seen.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]
    np.testing.assert_allclose(corners, [colours[c] for c in ORIENTATIONS[orientation]], atol=2)


@pytest.mark.parametrize("options", [{}, {"exif": exif(1)}])
def test_an_upright_image_is_not_copied(options):
    image = stored(ramp(16, 8), "jpeg", **options)
    assert as_seen(image, 3) is image


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation):
    image = stored(ramp(16, 8), "jpeg", exif=exif(orientation))
    np.testing.assert_array_equal(np.asarray(as_seen(image, 3)), np.asarray(image))


def test_orientation_that_follows_the_pixels():
    file = io.BytesIO()
    ramp(16, 8).save(file, "png", exif=exif(6))
    start, length = file.getvalue().index(b"eXIf") - 4, len(exif(6).tobytes()) - 6 + 12
    data = file.getvalue()
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    moved = rest[:-12] + chunk + rest[-12:]  # before IEND
    assert as_seen(Image.open(io.BytesIO(moved)), 3).size == (8, 16)


def test_orientation_of_a_16_bit_image():
    image = Image.fromarray((np.arange(6, dtype=np.uint16) * 257).reshape(2, 3))
    seen = as_seen(stored(image, "png", exif=exif(6)), 1)
    np.testing.assert_array_equal(np.asarray(seen), [[3, 0], [4, 1], [5, 2]])


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_damaged_exif_block_does_not_cost_the_image(block):
    image = stored(Image.new("RGB", (8, 4), RED), "jpeg", exif=block)
    assert as_seen(image, 3).size == (8, 4)


def photo(width: int = 640, height: int = 480) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_jpeg_is_an_error(share):
    data = photo()
    with pytest.raises(OSError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(("data", "message"), [(b"", "empty"), (b"to be or not to be", "not an image")])
def test_what_is_no_image_says_so(data, message):
    with pytest.raises(OSError, match=message):
        decode(data)


def test_jpeg_may_come_smaller_but_not_too_small():
    assert decode(photo(), at_least=100).size == (160, 120)
    assert decode(photo(), at_least=121).size == (320, 240)
    assert decode(photo(), at_least=480).size == (640, 480)
    assert decode(photo(), at_least=10_000).size == (640, 480)
    whole = resize_and_crop(decode(photo()), 50)
    reduced = resize_and_crop(decode(photo(), at_least=100), 50)
    assert np.abs(whole.astype(int) - reduced).mean() < 3


# ---------------------------------------------------------------------------------------------------------------
# Resize and crop
# ---------------------------------------------------------------------------------------------------------------


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8))


needs_pytorch = pytest.mark.skipif(not resizing.PYTORCH_RESIZES, reason="PyTorch before 2.12 has no Lanczos filter")
both_libraries = pytest.mark.parametrize("library", ["pillow", pytest.param("pytorch", marks=needs_pytorch)])


@both_libraries
def test_an_image_that_fits_is_untouched(library):
    np.testing.assert_array_equal(resize_and_crop(ramp(16, 16), 16, library=library), np.asarray(ramp(16, 16)))


@both_libraries
@pytest.mark.parametrize(("crop", "offset"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.9999, 8), (1.0, 8)])
def test_window_of_an_image_whose_shorter_side_fits(crop, offset, library):
    wide = resize_and_crop(ramp(24, 16), 16, (crop, 0.7), library)
    np.testing.assert_array_equal(wide, np.asarray(ramp(24, 16))[:, offset : offset + 16])
    tall = resize_and_crop(ramp(16, 24), 16, (0.7, crop), library)
    np.testing.assert_array_equal(tall, np.asarray(ramp(16, 24))[offset : offset + 16])


@pytest.mark.parametrize(("crop", "left"), [(0.0, 0), (0.5, 16), (1.0, 32)])
def test_window_equals_resizing_first_and_cropping_then(crop, left):
    image = decode(photo(256, 128))
    resized = np.asarray(image.resize((64, 32), Image.Resampling.LANCZOS))
    expected = resized[:, left : left + 32]
    assert np.abs(resize_and_crop(image, 32, (crop, 0.5)).astype(int) - expected).max() <= 1


@both_libraries
def test_downscaling_is_antialiased(library):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = resize_and_crop(Image.fromarray(board.astype(np.uint8)), 8, library=library)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127).max() <= 2  # without a low pass: all black or all white


def picture(mode: str, width: int, height: int) -> Image.Image:
    """A photograph of this size."""
    return ImageOps.fit(Image.fromarray(skimage.data.coffee()), (width, height)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillow_gives_the_bits_of_its_plain_path(mode):
    image = picture(mode, 500, 400)
    resized = image.resize((320, 256), Image.Resampling.LANCZOS).crop((32, 0, 288, 256))
    square = resize_and_crop(image, 256)
    np.testing.assert_array_equal(square.squeeze(), np.asarray(resized))


@needs_pytorch
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(500, 400), (400, 501), (300, 257), (257, 600), (96, 96), (200, 100), (30, 40)])
def test_pytorch_resizes_the_window_as_pillow_does(mode, size):
    image, side = picture(mode, *size), min(size)
    for crop in (0.0, 0.5, 0.8):
        left, top = round((size[0] - side) * crop), round((size[1] - side) * crop)
        window = image.crop((left, top, left + side, top + side))
        expected = np.asarray(window.resize((256, 256), Image.Resampling.LANCZOS)).reshape(256, 256, -1)
        distance = np.abs(resize_and_crop(image, 256, (crop, crop), "pytorch").astype(int) - expected)
        assert distance.max() <= 2 and distance.mean() < 0.05


@needs_pytorch
def test_the_libraries_differ_at_the_border_of_a_crop_only():
    image = picture("RGB", 500, 400)
    by_pillow, by_pytorch = (resize_and_crop(image, 256, library=library) for library in ("pillow", "pytorch"))
    distance = np.abs(by_pillow.astype(int) - by_pytorch)
    assert distance[:, 4:-4].max() <= 2  # the window is 4 pixels away from neither top nor bottom of the image
    assert distance.mean() < 0.05


def test_which_library_resizes(monkeypatch):
    monkeypatch.setattr(resizing, "PYTORCH_RESIZES", True)
    assert [resizing.resizer(wanted) for wanted in (None, "pytorch", "pillow")] == ["pytorch", "pytorch", "pillow"]
    monkeypatch.setattr(resizing, "PYTORCH_RESIZES", False)
    assert [resizing.resizer(wanted) for wanted in (None, "pillow")] == ["pillow", "pillow"]
    with pytest.raises(UserError, match=r"2\.12"):
        resizing.resizer("pytorch")


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 200) | st.sampled_from([1, 5000]),
    height=st.integers(1, 200) | st.sampled_from([1, 5000]),
    resolution=st.integers(1, 48),
    channels=st.sampled_from([1, 3]),
    crop=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    library=st.sampled_from(["pillow", "pytorch"] if resizing.PYTORCH_RESIZES else ["pillow"]),
)
def test_result_is_always_a_square(width, height, resolution, channels, crop, library):
    value = 77 if channels == 1 else (77, 88, 99)
    image = Image.new("L" if channels == 1 else "RGB", (width, height), value)
    square = resize_and_crop(image, resolution, crop, library)
    assert square.shape == (resolution, resolution, channels)
    assert square.dtype == np.uint8
    assert (square == np.array(value)).all()  # a flat image stays flat
