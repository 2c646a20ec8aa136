"""A folder of images, nested in any way, with captions beside the images or in metadata files."""

import contextlib
import functools
import itertools
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_ddpm.data.formats import kind_of, readable_extensions, unreadable
from latent_ddpm.data.images import decode
from latent_ddpm.data.indexing import CompactStrings, RunningDigest, give_memory_back, in_parts, narrow
from latent_ddpm.data.sources.base import MANY, ImageSource
from latent_ddpm.data.sources.layout import JUNK, Layout, read_layout, split_named
from latent_ddpm.data.sources.metadata import (
    FILE_NAME,
    METADATA,
    SIDECARS,
    beside,
    column_names,
    is_given,
    join_rows,
    kind_of_sidecar,
    read_json_object,
)
from latent_ddpm.errors import UserError
from latent_ddpm.places import no_folder
from latent_ddpm.text_files import read_text

LABEL_COLUMNS = ("label", "labels", "cls")  # the last one as in WebDataset
logger = logging.getLogger(__name__)

RUN_FILES = {"train_autoencoder.yaml", "train_unet.yaml"}  # a folder that holds one is the output_dir of a run
# Extensions of files that stand among images; their content is not looked at.
NO_IMAGES = {
    *(".txt", ".json", ".jsonl", ".caption", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm"),
    *(".py", ".ipynb", ".sh", ".log", ".db", ".ini", ".lnk", ".url", ".xmp", ".aae", ".thm", ".pdf", ".doc", ".docx"),
    *(".xls", ".xlsx", ".parquet", ".arrow", ".tar", ".zip", ".gz", ".tgz", ".7z", ".rar", ".npz", ".pt", ".pth"),
    *(".safetensors", ".bin", ".pkl", ".mat", ".h5", ".hdf5", ".lock", ".sha256", ".md5", ".cfg", ".toml"),
}
UNFINISHED = (".part", ".crdownload", ".partial", ".download", ".tmp", ".aria2", "!qb")
MASK_FOLDERS = {"mask", "masks", "annotation", "annotations", "segmentation", "segmentations", "gt", "groundtruth"}
MASK_NAME = re.compile(r"(.+)[-_](mask|masks|seg|segmentation|gt)")
LAYOUT_DEPTH = 3  # folders below the root that may have a meaning: one that contains everything, a split, a class


class FolderSource(ImageSource):
    """All images below a folder, sorted by relative path.

    A file is an image if its extension says so, or its first bytes where it has none; whether it can be decoded is
    known when it is loaded. Hidden files, the folders of `layout.JUNK`, the output_dir of any run, and images that no
    decoder reads are left out, and `findings` counts them. What the folders' names mean: see `read_layout`.

    Args:
        root: the folder.
        scratch: folder for the names if there are many; see `CompactStrings`.
        without: folders that are left out, with the reason.
        key: of the config, for messages.

    Attributes:
        roles: indices of the images of each split, by "training", "validation" and "not used"; empty without splits.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        scratch: str | os.PathLike | None = None,
        without: dict[str, str] | None = None,
        key: str = "train_data_dir",
    ) -> None:
        self.root, self._key = Path(root).expanduser(), key
        if not self.root.is_dir():
            raise UserError(no_folder(key, str(self.root)))
        self._without = {
            place: why for folder, why in (without or {}).items() if (place := _place(os.path.realpath(folder)))
        }
        if _place(self.root) in self._without:
            raise UserError(f"{key}: {self.root} is {self._without[_place(self.root)]}, so it cannot hold the images.")
        self._extensions = frozenset(readable_extensions())
        self.other_extensions: set[str] = set()
        self._sidecars: set[str] = set()
        self._metadata_folders: dict[str, list[str]] = {}
        self._folders: list[str] = []  # at most LAYOUT_DEPTH below the root, with a slash at the end
        self._conditioning: set[str] = set()
        self.names, running = CompactStrings(scratch), RunningDigest("folder")
        number: dict[tuple[str, ...], int] = {}
        numbers: list[np.ndarray] = []  # of each image's folder
        for part in in_parts(self._scan(str(self.root), "", ())):
            running.update(part)
            names = [name for name, _, _ in part]
            self.names.extend(names)
            folders = (tuple(name.split("/")[:-1][:LAYOUT_DEPTH]) for name in names)
            # numbered in order of appearance
            of_part = np.fromiter((number.setdefault(folder, len(number)) for folder in folders), np.int32, len(part))
            numbers.append(narrow([of_part], len(part)))
        if not self.names:
            raise UserError(self._nothing_found())
        self.fingerprint = running.result()
        self._look_for_masks()
        if len(self.names) >= MANY:
            give_memory_back()
        self._understand(read_layout(list(number)), numbers)

    # ------------------------------------------------------------------------------------------------ the images

    def _scan(self, folder: str, prefix: str, above: tuple) -> Iterator[tuple[str, int, int]]:
        """Path, size and time of each image in or below a folder, ordered by path, one folder at a time."""
        try:
            here = _place(folder)
            if here is None or here in above:  # removed after it was listed, or a link to a folder that contains it
                return
            why = self._without.get(here)
            entries = [] if why else _listing(folder)
            if not why and prefix and RUN_FILES & {name for name, _ in entries}:
                why = "of another run (an output_dir)"
            if why:
                self.findings.leave_out(why, prefix)
                return
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self._key}: {folder} cannot be read: {error.strerror}") from error
        if prefix and prefix.count("/") <= LAYOUT_DEPTH:
            self._folders.append(prefix)
        if any(name in METADATA for name, is_folder in entries if not is_folder):
            self._metadata_folders[prefix] = [name for name in METADATA if (name, False) in entries]
            self._conditioning |= self._conditioning_images(prefix)
        for name, is_folder in self._chosen(folder, prefix, entries):
            if is_folder:
                yield from self._scan(f"{folder}/{name[:-1]}", prefix + name, (*above, here))
                continue
            try:
                found = os.stat(f"{folder}/{name}")
            except OSError:  # a dangling link: becomes a bad image when it is loaded
                yield prefix + name, -1, -1
                continue
            if stat.S_ISREG(found.st_mode):
                yield prefix + name, found.st_size, found.st_mtime_ns
            else:  # reading a named pipe would wait forever
                self.findings.leave_out("not regular files", prefix + name)

    def _chosen(self, folder: str, prefix: str, entries: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """The images and folders (with a slash at the end) of a listing, in the order of the paths below them."""
        chosen = []
        for name, is_folder in entries:
            if is_folder:
                why = "hidden folders" if name.startswith(".") else None
                why = "thumbnails, trash and snapshots of a system" if name.lower() in JUNK else why
                if why:
                    self.findings.leave_out(why, f"{prefix}{name}/")
                else:
                    chosen.append((f"{name}/", True))
            else:
                extension = _extension(name)
                usual = extension in self._extensions and name[0] != "." and prefix + name not in self._conditioning
                if usual or self._is_image(folder, prefix, name, extension):
                    chosen.append((name, False))
        return sorted(chosen)

    def _is_image(self, folder: str, prefix: str, name: str, extension: str) -> bool:
        """Whether a file that does not look like an image to train on is one; if it is left out, it is counted."""
        leave_out = functools.partial(self.findings.leave_out, name=prefix + name)
        if name.startswith("."):
            if extension in self._extensions or unreadable(extension):
                leave_out("hidden files")
            return False
        if extension in self._extensions:
            leave_out(f"named in a column ..._{FILE_NAME} of the metadata")
            return False
        if extension:
            self.other_extensions.add(extension)
        if extension in SIDECARS:
            self._sidecars |= {kind_of_sidecar(name, lambda stem: _extension(stem) in self._extensions)} - {None}
            return False
        why = unreadable(extension)
        if why is None and extension in NO_IMAGES:
            return False
        if why is None and (kind := _kind_of_file(f"{folder}/{name}")) is not None:
            readable = kind.lower() in {extension[1:] for extension in self._extensions}
            if extension == "" and readable:
                return True
            if name.lower().endswith(UNFINISHED):
                why = "unfinished downloads"
            elif readable:
                why = f"{kind} images with the unknown extension {extension}: rename them"
            else:
                why = unreadable(f".{kind.lower()}") or f"{kind} images, which no decoder here reads"
        if why is not None:
            leave_out(why)
        return False

    def _nothing_found(self) -> str:
        left_out = ", ".join(f"{count} {why}" for why, count in list(self.findings.counts().items())[:4])
        seen = f". Left out: {left_out}" if left_out else ""
        if self.other_extensions:
            seen += f". It has files ending in {', '.join(sorted(self.other_extensions)[:8])}"
        if self.other_extensions & {".parquet", ".arrow", ".tar"} and self._key == "train_data_dir":
            seen += ": give such a dataset with --dataset_name"
        return (
            f"{self._key}: no image in {str(self.root)!r} or below it{seen}. Looked for "
            f"{', '.join(sorted(self._extensions))}, in lower or upper case"
        )

    def _look_for_masks(self) -> None:
        """Note images that look like masks of others: NAME_mask beside NAME."""
        if len(self.names) >= MANY:
            return
        stems = (name.rsplit(".", 1)[0] for name in self.names)
        of = {stem: match[1] for stem in stems if (match := MASK_NAME.fullmatch(stem))}
        wanted = set(of.values())
        there = {stem for name in self.names if (stem := name.rsplit(".", 1)[0]) in wanted} if wanted else set()
        masks = [stem for stem, image in of.items() if image in there]
        if masks:
            self.findings.notes.append(
                f"{len(masks)} of the images look like masks of others ({masks[0]} of {of[masks[0]]}) and are trained "
                f"on. Move them to a folder of their own, with the names of the images, for conditioning_image_dir."
            )

    def _understand(self, layout: Layout, numbers: Sequence[np.ndarray]) -> None:
        """Splits and classes from the meaning of each folder and the number of each image's folder."""
        length = len(self.names)

        def per_image(of_folder: list[int]) -> np.ndarray:
            values = np.array(of_folder, dtype=np.int64)
            return narrow((values[of_part] for of_part in numbers), length)

        self.roles: dict[str, np.ndarray] = {}
        if layout.has_splits:
            found = sorted(set(zip(layout.tops, layout.roles, strict=True)))
            which = {split: k for k, split in enumerate(found)}
            splits = per_image([which[split] for split in zip(layout.tops, layout.roles, strict=True)])
            count = np.bincount(splits, minlength=len(found))
            for k, (top, role) in enumerate(found):
                if top:
                    self.findings.splits[top] = (int(count[k]), role)
                else:
                    for i in np.flatnonzero(splits == k).tolist():
                        self.findings.leave_out("outside of the folders of the splits", self.names[i])
            for role in ("training", "validation", "not used"):
                wanted = [k for k, (_, use) in enumerate(found) if use == role]
                if wanted:
                    self.roles[role] = np.flatnonzero(np.isin(splits, wanted))
            uses = {"training": "trained on", "validation": "used for validation", "not used": "not used"}
            said = ", ".join(f"{top} is {uses[use]} ({n})" for top, (n, use) in self.findings.splits.items())
            self.findings.notes.append(f"The folders' names are those of splits: {said}.")
        trained = [layout.roles[k] in (None, "training") for k in range(len(layout.roles))]
        names = sorted({name for name, use in zip(layout.classes, trained, strict=True) if use and name is not None})
        if len(names) < 2:
            return
        place = {name: k for k, name in enumerate(names)}
        self.class_names, self.labels = names, per_image([place.get(name, -1) for name in layout.classes])
        missing = np.flatnonzero(self.labels < 0)
        missing = np.intersect1d(missing, self.roles["training"]) if self.roles else missing
        if len(missing):
            first = [self.names[int(i)] for i in missing[:3]]
            self.findings.notes.append(
                f"{len(missing)} {'image is' if len(missing) == 1 else 'images are'} in no folder of a class, and "
                f"{'trains' if len(missing) == 1 else 'train'} without one: {', '.join(first)}"
                f"{', ...' if len(missing) > 3 else ''}."
            )
        if any(map(split_named, names)) and not layout.has_splits:
            odd = ", ".join(filter(split_named, names))
            self.findings.notes.append(
                f"Folders called {odd} are taken for classes, because other folders beside them are no splits: "
                f"{', '.join([name for name in names if not split_named(name)][:3]) or 'none'}."
            )
        if masks := [name for name in names if name.lower() in MASK_FOLDERS]:
            self.findings.notes.append(
                f"Images of the folder {masks[0]} are trained on. If they are masks of others, move the folder away, "
                f"or give it as conditioning_image_dir."
            )
        empty = {
            folder[len(prefix) :].rstrip("/")
            for folder in self._folders
            for prefix in layout.prefixes
            if folder.startswith(prefix) and folder.count("/") == prefix.count("/") + 1
        }
        self.findings.empty_classes.extend(sorted(empty - set(names)))

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode(self.data(i), at_least)

    def data(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()

    def name(self, i: int) -> str:
        return self.names[i]

    def all_names(self) -> Iterator[str]:
        return iter(self.names)

    # ------------------------------------------------------------------------------------- text beside the images

    @functools.cached_property
    def _metadata(self) -> dict[str, dict]:
        """The rows of all metadata files by image path.

        Raises:
            UserError: a file is damaged, or a row has no file_name.
        """
        found = join_rows(self._metadata_files())
        if found and len(self.names) < MANY:
            unknown = found.keys() - {unicodedata.normalize("NFC", name) for name in self.names}
            unknown -= {unicodedata.normalize("NFC", name) for name in self._conditioning}
            if unknown:
                logger.warning(
                    "%d of %d rows of the metadata name no image that is trained on, for example %s",
                    len(unknown), len(found), min(unknown),
                )  # fmt: skip
        return found

    def _metadata_files(self) -> list[tuple[Path, str]]:
        """The path of each metadata file, and its folder."""
        folders = self._metadata_folders.items()
        return [(self.root / folder / name, folder) for folder, names in folders for name in names]

    def _row(self, name: str) -> dict[str, Any]:
        return self._metadata.get(unicodedata.normalize("NFC", name), {})

    def _conditioning_images(self, folder: str) -> set[str]:
        """The images that a folder's metadata names in columns like `mask_file_name`: they are not trained on."""
        found: set[str] = set()
        for name in self._metadata_folders[folder]:
            path = self.root / folder / name
            with contextlib.suppress(UserError):  # is raised where the metadata are used
                columns = [column for column in column_names(path) if column.endswith(f"_{FILE_NAME}")]
                for row in join_rows([(path, folder)]).values() if columns else ():
                    found |= {row[column] for column in columns if isinstance(row.get(column), str)}
        return found

    def caption_columns(self) -> list[str]:
        return self._caption_columns

    @functools.cached_property
    def _caption_columns(self) -> list[str]:  # cached: it may have to look beside every image
        columns = dict.fromkeys(key for row in self._metadata.values() for key in row)
        if self._sidecars:
            for name in self.names:
                found = [path for path in self._beside(name) if path.suffix.lower() != ".json"]
                if found:
                    columns["text"] = None
                    break
            jsons = (path for name in self.names for path in self._beside(name) if path.suffix.lower() == ".json")
            for path in itertools.islice(jsons, 100):
                columns |= dict.fromkeys(read_json_object(path))
            if "caption" in columns:
                columns["text"] = None
        return list(columns)

    def _beside(self, name: str) -> Iterator[Path]:
        paths = (self.root / found for found in beside(name, self._sidecars))
        return (path for path in paths if path.is_file())

    def captions(self, i: int, column: str) -> Any:
        """From the metadata, else from NAME.json, else, for `text`, the lines of NAME.txt or NAME.caption."""
        name = self.names[i]
        value = self._row(name).get(column)
        if is_given(value):
            return value
        for path in self._beside(name):
            if path.suffix.lower() == ".json":
                found = read_json_object(path)
                # img2dataset and others call it caption
                value = found.get(column, found.get("caption") if column == "text" else None)
            elif column == "text":
                value = _lines(path)
            if is_given(value):
                return value
        return None

    def label_column(self) -> str | None:
        """The column of the metadata files that is called like one of classes; None without one."""
        if self._metadata_folders:
            with contextlib.suppress(UserError):  # is raised where the metadata are used
                columns = {column for path, _ in self._metadata_files() for column in column_names(path)}
                return next((name for name in LABEL_COLUMNS if name in columns), None)
        return None

    def class_columns(self) -> list[str]:
        return self.caption_columns()

    def class_values(self, i: int, column: str) -> Any:
        return self.captions(i, column)

    def image_columns(self) -> list[str]:
        ending = f"_{FILE_NAME}"
        return [key.removesuffix(ending) for key in self.caption_columns() if key.endswith(ending)]

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        path = self._row(self.names[i]).get(f"{column}_{FILE_NAME}")
        if not isinstance(path, str):
            raise OSError(f"the metadata have no {column}_{FILE_NAME} for it")
        if os.path.isabs(path) or path.split("/")[0] == "..":
            raise OSError(f"{path}, which the metadata name, is outside of {self.root}")
        return decode((self.root / path).read_bytes(), at_least)


def _place(folder: str | os.PathLike) -> tuple[int, int] | None:
    """Device and inode, which identify a folder however it is written; None if there is none."""
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _listing(folder: str) -> list[tuple[str, bool]]:
    """The names in a folder, and whether each is a folder."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = False
            with contextlib.suppress(OSError):  # a link to itself counts as dangling
                is_folder = entry.is_dir()
            found.append((entry.name, is_folder))
    return found


def _extension(name: str) -> str:
    """In lower case with its dot; "" without one."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _kind_of_file(path: str) -> str | None:
    """The image format that a file's first bytes name; None if they name none or it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            return kind_of(file.read(32))
    except OSError:
        return None


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
