"""Text beside the images of a folder: metadata files as `datasets.imagefolder` reads them, and one file per image."""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from latent_ddpm.errors import UserError
from latent_ddpm.text_files import read_text

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
HEAD_BYTES = 2**20  # of a metadata file, which hold its first row
SIDECARS = (".json", ".txt", ".caption")  # NAME.json and NAME.jpg.json; likewise the others


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file; each has a `file_name`.

    Raises:
        UserError: the file cannot be read, a row has too many values, or there is no `file_name`.
    """
    try:
        reader = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
        rows = reader(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(FILE_NAME), str) or not row[FILE_NAME].strip():
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(f"{path} cannot be read: row {number} has no {FILE_NAME}. Its columns are {columns}.")
    return rows


def column_names(path: Path) -> list[str]:
    """The columns of a metadata file, from its beginning: of JSON lines, those of the first row.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(path).names
        first = read_text(path, most=HEAD_BYTES).lstrip().split("\n", 1)[0]
        if path.suffix == ".csv":
            return _names(first, _delimiter(first))
        row = json.loads(first) if first else {}
        return list(row) if isinstance(row, dict) else []  # reading the rows says that they are none
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _delimiter(header: str) -> str:
    # a comma, or what Excel writes where the comma is the decimal mark
    return next((mark for mark in ",;\t" if FILE_NAME in _names(header, mark)), ",")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    delimiter = _delimiter(text.split("\n", 1)[0])
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    twice = [name for k, name in enumerate(reader.fieldnames) if name in reader.fieldnames[:k]]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(
                f"line {reader.line_num} has {len(row) - 1 + len(row[None])} values for {len(reader.fieldnames)} "
                f'columns. Put a value that contains {delimiter!r} in quotes: "a cat, on a mat"'
            )
        rows.append(row)
    return rows


def _names(header: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in header.split(delimiter)]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def join_rows(files: Iterable[tuple[Path, str]]) -> dict[str, dict[str, Any]]:
    """The rows of several metadata files by the path of their image, relative to the root.

    Rows of the same image are one row, whose values are lists where they differ.

    Args:
        files: path, and the folder relative to the root ("" or with a slash at the end).
    """
    found: dict[str, dict[str, Any]] = {}
    for path, folder in files:
        for row in read_metadata(path):
            name = row[FILE_NAME].strip().replace("\\", "/")
            values = {key: value for key, value in row.items() if key != FILE_NAME}
            name = unicodedata.normalize("NFC", posixpath.normpath(folder + name))
            own = found.setdefault(name, {})
            for key, value in values.items():
                if key.endswith(f"_{FILE_NAME}") and isinstance(value, str):
                    value = posixpath.normpath(folder + value.strip().replace("\\", "/"))
                if key not in own or own[key] == value:
                    own[key] = value
                else:
                    own[key] = [*_as_list(own[key]), *_as_list(value)]
    return found


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_given(value: Any) -> bool:
    """Whether a cell holds something: not None, an empty string or an empty list."""
    if isinstance(value, (list, tuple)):
        return any(map(is_given, value))
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def beside(image: str, kinds: set[str]) -> Iterator[str]:
    """The names that a file beside an image may have: NAME.json, NAME.jpg.json, NAME.txt, ...

    Args:
        image: path of the image.
        kinds: those that exist in the folder; see `kind_of_sidecar`.
    """
    for kind in SIDECARS:
        if kind in kinds:
            yield image[: -len(posixpath.splitext(image)[1]) or None] + kind
        if f"*{kind}" in kinds:
            yield image + kind


def kind_of_sidecar(name: str, is_image: Callable[[str], bool]) -> str | None:
    """ ".txt" for NAME.txt, "*.txt" for NAME.jpg.txt, None for other files; likewise .json and .caption."""
    stem, extension = posixpath.splitext(name)
    if extension.lower() not in SIDECARS or name in METADATA:
        return None
    return f"*{extension}" if is_image(stem) else extension


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it does not.
    """
    try:
        value = json.loads(read_text(path))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
