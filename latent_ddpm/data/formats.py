"""Formats of image files: which can be read here, what is missing for others, and what a file's first bytes say.

readable_extensions()     (".apng", ..., ".webp"), and those of the installed Pillow plugins
unreadable(".heic")       "HEIC needs a package: pip install pillow-heif (the extra \"formats\" has it)"
kind_of(data[:32])        "JPEG", "HEIC", ...
"""

import contextlib
import functools
import importlib
import logging

from PIL import Image

logger = logging.getLogger(__name__)

# Raster formats people keep training images in. Pillow opens more (PDF-like, icons, scientific containers).
_OF_PILLOW = (
    *(".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
# By the name that Pillow gives the format: the format's own name, its extensions, the modules that read it, of which
# the first that is installed is used, and how to install one. Importing a module registers it with Pillow, or its
# function "register_heif_opener" does. Pillow 11.3 and later read AVIF themselves.
_BY_PLUGIN = {
    "HEIF": ("HEIC", (".heic", ".heics", ".heif", ".heifs", ".hif"), ("pillow_heif", "pi_heif"), "pillow-heif"),
    "AVIF": ("AVIF", (".avif", ".avifs"), ("PIL.AvifImagePlugin", "pillow_avif"), '"pillow>=11.3"'),
    "JXL": ("JPEG XL", (".jxl",), ("pillow_jxl",), "pillow-jxl-plugin"),
}
_CONVERT = "convert the files to PNG or JPEG"
_RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mef"),
    *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
_LAYERED = (".afphoto", ".clip", ".kra", ".ora", ".pdn", ".psb", ".psd", ".xcf")
_VECTORS = (".ai", ".cdr", ".emf", ".eps", ".ps", ".svg", ".svgz", ".wmf")
_SCIENTIFIC = (
    *(".czi", ".dcm", ".dicom", ".dm3", ".dm4", ".fit", ".fits", ".fts", ".h5", ".hdf5", ".lif", ".mat", ".mha"),
    *(".mhd", ".mrc", ".nd2", ".nii", ".npy", ".npz", ".nrrd", ".svs", ".vsi"),
)
_OTHER = (
    *(".blp", ".bpg", ".cin", ".cur", ".dds", ".dpx", ".exr", ".flif", ".hdr", ".icns", ".ico", ".iff", ".j2c", ".jls"),
    *(".jng", ".jpc", ".jpf", ".jpm", ".jpx", ".jxr", ".ktx", ".ktx2", ".lbm", ".mng", ".pam", ".pcx", ".pic", ".pict"),
    *(".pct", ".rgb", ".sgi", ".ras", ".tx", ".vtf", ".wbmp", ".wdp", ".wp2", ".xbm", ".xpm"),
)
_VIDEOS = (
    *(".3gp", ".avi", ".flv", ".h264", ".hevc", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
    *(".ogv", ".webm", ".wmv"),
)
_DOCUMENTS = (".djvu", ".pdf")
_REASONS = {
    **dict.fromkeys(_RAW, f"camera raw: {_CONVERT}"),
    **dict.fromkeys(_LAYERED, f"a file of layers: {_CONVERT}"),
    **dict.fromkeys(_VECTORS, "vector graphics: convert the files to PNG at the size that you want"),
    **dict.fromkeys(_SCIENTIFIC, f"scientific data, whose values need a range: {_CONVERT}"),
    **dict.fromkeys(_OTHER, f"a format that is not read here: {_CONVERT}"),
    **dict.fromkeys(_VIDEOS, "a video: save its frames as PNG or JPEG"),
    **dict.fromkeys(_DOCUMENTS, "a document: save its pages as PNG or JPEG"),
}


@functools.cache  # a failed import is not tried again for each image
def register_plugins() -> tuple[str, ...]:
    """Make the installed plugins known to Pillow; returns the formats in `_BY_PLUGIN` that it now reads.

    Every process calls it when it needs it, so workers that do not inherit the memory of this process have them too.
    """
    Image.init()
    for form, (_, _, modules, _) in _BY_PLUGIN.items():
        for module in modules:
            if _reads(form):
                break
            with contextlib.suppress(ImportError):
                plugin = _import(module)
                getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(form for form in _BY_PLUGIN if _reads(form))


def _import(module: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise
    except Exception as error:  # one that is installed and does not load, like a library of another version
        logger.warning("cannot load the plugin %s: %s", module, error)
        raise ImportError from error


def _reads(form: str) -> bool:
    # Pillow without libavif still lists AVIF among those it opens, but not its extension.
    return form in Image.OPEN and form in Image.EXTENSION.values()


@functools.cache
def readable_extensions() -> tuple[str, ...]:
    """The extensions of image files that can be decoded here, in lower case with the dot, sorted."""
    return tuple(sorted((*_OF_PILLOW, *(one for form in register_plugins() for one in _BY_PLUGIN[form][1]))))


def unreadable(extension: str) -> str | None:
    """Why files with an extension are no images here, and what to do about it.

    Args:
        extension: with the dot, in upper or lower case.

    Returns:
        A phrase without a full stop, the same for all files of a kind; None for what is readable, or not an image.
    """
    extension = extension.lower()
    if extension in readable_extensions():
        return None
    for name, extensions, _, package in _BY_PLUGIN.values():
        if extension in extensions:
            return f'{name} needs a package: pip install {package} (the extra "formats" has it)'
    return _REASONS.get(extension)


_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\xff\x0a": "JXL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JXL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JP2",
    b"\xff\x4f\xff\x51": "J2K",
    b"qoif": "QOI",
    b"8BPS": "PSD",
    b"v/1\x01": "EXR",
    b"#?RADIANCE": "HDR",
    b"#?RGBE": "HDR",
    b"DDS ": "DDS",
    b"SIMPLE  =": "FITS",
    b"FUJIFILMCCD-RAW": "RAF",
    b"IIRO": "ORF",
    b"IIU\0": "RW2",
    b"II\x2a\0": "TIFF",
    b"MM\0\x2a": "TIFF",
    b"II\x2b\0": "TIFF",
    b"MM\0\x2b": "TIFF",
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    b"crx ": "CR3",
}


def kind_of(head: bytes) -> str | None:
    """The format of an image file whose name does not say it.

    Args:
        head: the first 32 bytes of the file; more do not matter.

    Returns:
        A name, of which "." and the lower-case letters are an extension that `readable_extensions` or `unreadable`
        knows: "JPEG", "PNG", "WEBP", "GIF", "HEIC", "AVIF", "JXL", "TIFF", "BMP", "PSD" and others. None for no image,
        and for formats without a signature, like TGA.
    """
    head = bytes(head[:32])
    if head[:2] == b"II" and head[8:10] == b"CR":
        return "CR2"
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":  # ISO 14496-12; the brand in front decides, else the compatible ones behind it
        brands = [head[8:12], *(head[place : place + 4] for place in range(16, 29, 4))]
        found = next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)
        return found or ("HEIC" if head[8:12] in (b"mif1", b"msf1", b"miaf") else None)
    if head[:2] == b"BM" and head[6:10] == bytes(4) and head[14:18] in _BMP_HEADERS:
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456fF" and head[2:3].isspace() and head[3:4] in b"#0123456789":
        return "PFM" if head[1:2] in b"fF" else "PNM"
    return None


_BMP_HEADERS = tuple(length.to_bytes(4, "little") for length in (12, 40, 52, 56, 64, 108, 124))


def plugin_for(head: bytes) -> str | None:
    """The Pillow format that has to read a file of one of the plugins' kinds; None for any other file.

    Raises:
        OSError: nothing here reads that kind; the message says which package does.
    """
    if head[4:8] not in (b"ftyp", b"JXL ") and head[:2] != b"\xff\x0a":
        return None
    form = {"HEIC": "HEIF", "AVIF": "AVIF", "JXL": "JXL"}.get(kind_of(head))
    if form is not None and form not in register_plugins():
        raise OSError(unreadable(_BY_PLUGIN[form][1][0]))
    return form
