"""JPEG files whose metadata Pillow cannot read, though their pixels are sound."""


def without_odd_segments(data: bytes) -> bytes:
    """A JPEG file without the metadata segments whose content is shorter than their headers say.

    Such a segment makes Pillow refuse the image. EXIF, XMP, comments and whole profiles stay.

    Args:
        data: the file, which may be damaged: then the rest of it stays as it is.
    """
    kept, start, place = [], 0, 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:  # pixels follow
            break
        if marker == 0xFF:  # padding
            place += 1
            continue
        content, end = data[place + 4 : place + 2 + length], place + 2 + length
        odd = (
            (marker == 0xE0 and content.startswith(b"JFIF") and len(content) < 14)
            or (marker == 0xE2 and content.startswith(b"ICC_PROFILE\0") and len(content) < 14)
            or (marker == 0xE2 and content.startswith(b"MPF"))
            or (marker == 0xED and content.startswith(b"Photoshop 3.0"))
            or (marker == 0xEE and content.startswith(b"Adobe") and len(content) < 12)
        )
        if odd:
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]])
