"""stub, replaced at the merge"""

_READ = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)


def readable_extensions() -> tuple[str, ...]:
    return _READ


def unreadable(extension: str) -> str | None:
    if extension in (".heic", ".heif", ".jxl"):
        return f"{extension[1:].upper()}: pip install x"
    return "camera raw" if extension in (".cr2", ".nef") else None


def kind_of(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG"):
        return "PNG"
    return "JPEG" if head.startswith(b"\xff\xd8\xff") else None
