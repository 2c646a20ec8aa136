"""Formats: what can be read here, what is missing for the rest, and what a file's first bytes say."""

import io
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, features

from latent_ddpm.data import formats
from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.images import as_seen, decode
from latent_ddpm.data.sources.hub import image_bytes

PLUGINS = ("pillow_heif", "pi_heif", "pillow_avif", "pillow_jxl")
HEADS = {
    "HEIC": b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf",
    "AVIF": b"\0\0\0 ftypavif\0\0\0\0avifmif1miafMA1B",
    "JXL": b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0",
}
FAKE = """
from PIL import Image, ImageFile

class Fake(ImageFile.ImageFile):
    format = "JXL"

    def _open(self):
        self._size, self._mode = (4, 4), "RGB"
        self.tile = [ImageFile._Tile("raw", (0, 0, 4, 4), 32, ("RGB", 0, 1))]

Image.register_open("JXL", Fake, lambda head: head.startswith(b"\\xff\\x0a"))
Image.register_extension("JXL", ".jxl")
"""


def forget():
    formats.register_plugins.cache_clear()
    formats.readable_extensions.cache_clear()


@pytest.fixture
def without_plugins(monkeypatch):
    """As on a machine where none of the plugins is installed, and Pillow has no AVIF."""
    Image.init()
    monkeypatch.setattr(Image, "ID", [form for form in Image.ID if form not in formats._BY_PLUGIN])
    monkeypatch.setattr(Image, "OPEN", {form: Image.OPEN[form] for form in Image.OPEN if form in Image.ID})
    others = {ending: form for ending, form in Image.EXTENSION.items() if form not in formats._BY_PLUGIN}
    monkeypatch.setattr(Image, "EXTENSION", others)
    for name in (*PLUGINS, "PIL.AvifImagePlugin"):
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    yield
    forget()


def encoded(format, image=None, **options):
    file = io.BytesIO()
    (image or picture()).save(file, format, **options)
    return file.getvalue()


def picture():
    values = np.zeros((64, 96, 3), np.uint8)
    values[:, :48] = (200, 30, 60)
    return Image.fromarray(values)


# ---------------------------------------------------------------------------------------------------------------
# Without plugins
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "package"),
    [(".heic", "pillow-heif"), (".HEIF", "pillow-heif"), (".hif", "pillow-heif"), (".jxl", "pillow-jxl-plugin")]
    + [(".avif", "pillow>=11.3")],
)
def test_what_is_missing_is_named(without_plugins, extension, package):
    assert extension.lower() not in formats.readable_extensions()
    assert f"pip install {package}" in formats.unreadable(extension).replace('"', "")


@pytest.mark.parametrize(
    ("kind", "package"), [("HEIC", "pillow-heif"), ("AVIF", "pillow>=11.3"), ("JXL", "pillow-jxl")]
)
def test_bytes_of_a_missing_format_name_the_package(without_plugins, kind, package):
    """As in a dataset's row, which has no extension."""
    with pytest.raises(OSError, match=package):
        decode(HEADS[kind] + bytes(100))


def test_ordinary_formats_need_no_plugin(without_plugins):
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp"} <= set(formats.readable_extensions())
    assert not {".avif", ".heic", ".jxl"} & set(formats.readable_extensions())
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        assert decode(encoded(form)).size == (96, 64)


def test_a_plugin_that_does_not_load_is_as_good_as_none(without_plugins, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pillow_jxl")
    (tmp_path / "pillow_jxl.py").write_text("raise OSError('libjxl.so.9: cannot open shared object file')")
    assert "pillow-jxl-plugin" in formats.unreadable(".jxl")
    with pytest.raises(OSError, match="pillow-jxl-plugin"):
        decode(b"\xff\x0a" + bytes(100))


# ---------------------------------------------------------------------------------------------------------------
# With plugins
# ---------------------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_used_where_it_is_needed(without_plugins, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pillow_jxl")
    (tmp_path / "pillow_jxl.py").write_text(FAKE)
    decode(encoded("PNG"))
    assert "pillow_jxl" not in sys.modules  # ordinary images do not wait for it
    image = decode(b"\xff\x0a".ljust(32, b"\0") + bytes((1, 2, 3)) * 16)  # nobody has asked for the extensions before
    assert as_seen(image, 3).getpixel((3, 3)) == (1, 2, 3)
    assert ".jxl" in formats.readable_extensions()
    assert formats.unreadable(".jxl") is None
    monkeypatch.delitem(sys.modules, "pillow_jxl")


def test_a_plugin_that_has_to_be_asked_to_register(without_plugins, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pillow_heif")
    lines = FAKE.replace("JXL", "HEIF").replace(".jxl", ".heic").splitlines()
    registering = [f"    {line}" for line in lines if line.startswith("Image.register")]
    lines = [line for line in lines if not line.startswith("Image.register")]
    (tmp_path / "pillow_heif.py").write_text("\n".join([*lines, "def register_heif_opener():", *registering]))
    assert ".heic" in formats.readable_extensions()
    monkeypatch.delitem(sys.modules, "pillow_heif")


def test_a_pillow_that_lists_avif_without_reading_it(without_plugins, monkeypatch):
    """As Pillow's own plugin does where libavif is missing."""
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda head: "AVIF support not installed"))
    assert ".avif" not in formats.readable_extensions()
    with pytest.raises(OSError, match="pillow>="):
        decode(HEADS["AVIF"] + bytes(100))


def plugin(extension):
    return pytest.mark.skipif(
        extension not in formats.readable_extensions(), reason=f"nothing that reads {extension} is installed"
    )


REAL = [
    pytest.param("HEIF", ".heic", marks=plugin(".heic")),
    pytest.param("AVIF", ".avif", marks=plugin(".avif")),
    pytest.param("JXL", ".jxl", marks=plugin(".jxl")),
]


@pytest.mark.parametrize(("form", "extension"), REAL)
def test_real_files(form, extension):
    assert formats.unreadable(extension) is None
    data = encoded(form, quality=95)
    assert f".{formats.kind_of(data[:32]).lower()}" == extension
    seen = as_seen(decode(image_bytes({"bytes": data, "path": None}), at_least=32), 3)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(picture())).mean() < 4
    assert as_seen(decode(data), 1).mode == "L"
    with pytest.raises(Exception, match=r"\w"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(("form", "extension"), REAL)
def test_real_files_are_turned_once(form, extension):
    tags = Image.Exif()
    tags[0x0112] = 6
    seen = as_seen(decode(encoded(form, quality=95, exif=tags.tobytes())), 3)
    assert seen.size == (64, 96)
    np.testing.assert_allclose(seen.getpixel((32, 10)), (200, 30, 60), atol=12)
    np.testing.assert_allclose(seen.getpixel((32, 80)), (0, 0, 0), atol=12)


def test_avif_needs_a_pillow_with_libavif():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow before 11.3 does not know the feature
        known = features.check("avif")
    assert known is None or not known or ".avif" in formats.readable_extensions()


# ---------------------------------------------------------------------------------------------------------------
# Names and first bytes
# ---------------------------------------------------------------------------------------------------------------


def test_extensions_are_lower_case_and_have_no_reason():
    assert len(set(formats.readable_extensions())) == len(formats.readable_extensions())
    for extension in formats.readable_extensions():
        assert extension.startswith(".") and extension == extension.lower()
        assert formats.unreadable(extension) is None and formats.unreadable(extension.upper()) is None
    assert not set(formats._REASONS) & set(formats.readable_extensions())


@pytest.mark.parametrize(
    "extension",
    (
        [
            ".cr2",
            ".cr3",
            ".NEF",
            ".arw",
            ".dng",
            ".raf",
            ".orf",
            ".rw2",
            ".psd",
            ".svg",
            ".exr",
            ".hdr",
            ".dcm",
            ".nii",
            ".fits",
            ".npy",
            ".mp4",
            ".mov",
            ".ico",
            ".pdf",
            ".xcf",
        ]
    ),
)
def test_images_that_are_not_read_have_a_reason(extension):
    assert "PNG" in formats.unreadable(extension)


@pytest.mark.parametrize("extension", ["", ".txt", ".json", ".csv", ".zip", ".py", ".parquet", ".ini", "png"])
def test_other_files_have_none(extension):
    assert formats.unreadable(extension) is None


OTHER_HEADS = {
    "PSD": b"8BPS\0\1", "EXR": b"v/1\x01\2\0\0\0", "HDR": b"#?RADIANCE\n", "DDS": b"DDS |\0\0\0",
    "FITS": b"SIMPLE  =                    T", "RAF": b"FUJIFILMCCD-RAW 0201", "ORF": b"IIRO\x08\0\0\0",
    "RW2": b"IIU\0\x18\0\0\0", "CR2": b"II*\0\x10\0\0\0CR\2\0", "CR3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
    "PFM": b"PF\n4 4\n-1\n", "JXL": b"\xff\x0a\xd7\x06", "J2K": b"\xff\x4f\xff\x51\0\x2f",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "head"), [*HEADS.items(), *OTHER_HEADS.items()])
def test_kind_by_head(kind, head):
    assert formats.kind_of(head.ljust(32, b"\0")) == kind
    extension = f".{kind.lower()}"
    assert extension in formats.readable_extensions() or formats.unreadable(extension)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("PNG", "PNG"), ("JPEG", "JPEG"), ("GIF", "GIF"), ("WEBP", "WEBP"), ("BMP", "BMP"), ("TIFF", "TIFF")]
    + [("PPM", "PNM"), ("JPEG2000", "JP2"), ("QOI", "QOI"), ("DDS", "DDS")],
)
def test_kind_of_what_pillow_writes(form, kind):
    data = encoded(form)
    assert formats.kind_of(data[:32]) == formats.kind_of(data) == kind
    assert f".{kind.lower()}" in formats.readable_extensions() or formats.unreadable(f".{kind.lower()}")


@pytest.mark.parametrize("brand", [b"mif1", b"msf1"])
def test_a_brand_that_several_formats_share(brand):
    assert formats.kind_of(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"avif") == "AVIF"
    assert formats.kind_of(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"heic") == "HEIC"
    assert formats.kind_of(b"\0\0\0\x14ftyp" + brand + b"\0\0\0\0" + brand) == "HEIC"


@pytest.mark.parametrize(
    "head",
    [b"", b"P", b"P5", b"BM", b"II", b"to be or not to be", b"P1 is the first word", b"BMW is a car, not a bitmap....",
     b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", b"\0\0\0\x14ftypqt  ", b"%PDF-1.7", b"PK\3\4",
     b'{"a": 1}', b"\xff\xfeU\0T\0F\0", bytes(32), b"\x93NUMPY\1\0"],
)  # fmt: skip
def test_what_is_no_image(head):
    assert formats.kind_of(head) is None


def test_camera_raw_in_a_row_says_what_it_is(without_plugins):
    with pytest.raises(OSError, match="camera raw"):
        decode(OTHER_HEADS["RAF"] + bytes(100))


def test_a_reason_reaches_the_list_of_bad_images(without_plugins):
    class Row:
        def load(self, k, at_least=None):
            return decode(HEADS["HEIC"] + bytes(100), at_least)

    assert "pip install pillow-heif" in decode_square(Row(), 0, 16, 3)
