"""Text files as people's editors and shells write them."""

import codecs
from pathlib import Path

from latent_ddpm.errors import UserError

# the longer marks first: that of UTF-32 begins with that of UTF-16
_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a file in UTF-8, or in an encoding that its byte-order mark names (PowerShell writes UTF-16).

    Line ends stay as they are.

    Args:
        path: the file.
        most: bytes to read; the text then ends with the last whole character.

    Raises:
        UserError: it is in another encoding.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(-1 if most is None else most)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        whole = most is None or len(data) < most
        text = codecs.getincrementaldecoder(encoding)().decode(data[len(mark) :], final=whole)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in {encoding.upper()} (byte {error.start}): save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path} is not text in UTF-8: it has zero bytes, as UTF-16 has. Save it as UTF-8.")
    return text
