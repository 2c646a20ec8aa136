"""Open the sources that a config names, and hold out a validation split by a hash of the image names."""

import contextlib
import hashlib
import heapq
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from latent_ddpm.data.indexing import AllBut, digest, in_parts
from latent_ddpm.data.sources.base import MANY, ImageSource, SubsetSource
from latent_ddpm.data.sources.classes import ClassValues, choose_classes, labels_of
from latent_ddpm.data.sources.embedded import EMBEDDED, DigitsSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.data.sources.hub import HubSource, is_folder_of_images, open_hub
from latent_ddpm.data.sources.streaming import StreamedSource, open_stream
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.places import same_place

logger = logging.getLogger(__name__)


def open_sources(cfg: Any) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images of a config.

    `cfg` has `train_data_dir`, `dataset_name`, `dataset_config_name`, `image_column`, `class_column`, `class_names`,
    `validation_fraction`, `max_validation_images`, `output_dir`. A dataset's own split validation, valid, val or test
    is used where there is one. Otherwise `round(validation_fraction * N)` images, at least 1 and at most
    `max_validation_images`, are held out: those whose names have the smallest SHA-256, so adding images hardly changes
    the split. A `dataset_name` that is a folder of image files is read like a `train_data_dir`.

    Raises:
        UserError: not exactly one of `train_data_dir` and `dataset_name` is set; the images do not exist,
            cannot be downloaded, or are too few to hold one out.
    """
    if bool(cfg.train_data_dir) == bool(cfg.dataset_name):
        both = "both are set" if cfg.train_data_dir else "neither is set"
        raise UserError(f"set exactly one of train_data_dir and dataset_name: {both}")
    if cfg.max_validation_images < 1:
        raise UserError(f"max_validation_images must be at least 1, not {cfg.max_validation_images}")
    scratch = Path(cfg.output_dir) / "cache"
    train, validation = _open(cfg, scratch)
    if cfg.class_column is not None and not isinstance(train, HubSource | StreamedSource):
        train, validation = _classes_of_column(cfg.class_column, train, validation)
    elif train.class_names is None and (column := train.label_column()) is not None:
        train, validation = _classes_of_column(column, train, validation, named=False)
    if cfg.class_names is not None:
        train, validation = choose_classes(train, validation, cfg.class_names)
    if validation is None:
        if len(train) < 2:
            where = cfg.train_data_dir or cfg.dataset_name
            raise UserError(
                f"{where!r} has {len(train)} image(s); at least 2 are needed, to hold one out for validation"
            )
        count = max(1, round(cfg.validation_fraction * len(train)))
        held_out = held_out_images(train, min(count, cfg.max_validation_images, len(train) - 1), scratch)
        return SubsetSource(train, AllBut(len(train), held_out)), SubsetSource(train, held_out)
    if len(validation) > cfg.max_validation_images:
        validation = SubsetSource(validation, held_out_images(validation, cfg.max_validation_images, scratch))
    return train, validation


def _open(cfg: Any, scratch: Path) -> tuple[ImageSource, ImageSource | None]:
    """The training images, and those for validation if the dataset separates them."""
    if cfg.streaming:
        return open_stream(cfg)
    if cfg.train_data_dir:
        return _splits_of(FolderSource(cfg.train_data_dir, scratch, _own_folders(cfg)))
    if cfg.dataset_name.startswith(EMBEDDED):
        if cfg.dataset_name != EMBEDDED + "mnist":
            raise UserError(f"dataset_name: {cfg.dataset_name!r} is not embedded; there is {EMBEDDED}mnist")
        return DigitsSource(), None
    if cfg.dataset_config_name is None and is_folder_of_images(cfg.dataset_name):
        return _splits_of(FolderSource(cfg.dataset_name, scratch, _own_folders(cfg), key="dataset_name"))
    return open_hub(cfg.dataset_name, cfg.dataset_config_name, cfg.image_column, cfg.class_column)


def _own_folders(cfg: Any) -> dict[str, str]:
    """Folders of the run that may lie among the images, and why they are left out."""
    own = {cfg.output_dir: "the output_dir of this run"}
    conditioning = getattr(cfg, "conditioning_image_dir", None)
    if conditioning and not same_place(conditioning, cfg.train_data_dir or cfg.dataset_name):
        own[conditioning] = "the conditioning_image_dir"
    return own


def _splits_of(source: FolderSource) -> tuple[ImageSource, ImageSource | None]:
    if not source.roles:
        return source, None
    train, held_out = source.roles["training"], source.roles.get("validation")
    return SubsetSource(source, train), None if held_out is None else SubsetSource(source, held_out)


def _classes_of_column(
    column: str, train: ImageSource, validation: ImageSource | None, named: bool = True
) -> tuple[ImageSource, ImageSource | None]:
    """The splits with the values of a column as classes; unchanged if nobody `named` it and it holds something else."""
    if column not in train.class_columns():
        there = ", ".join(train.class_columns()) or "none"
        raise UserError(
            f"class_column: the dataset has no column {column!r} that can hold classes. There are: {there}."
        )
    classes = None
    for source in filter(None, (train, validation)):
        values = ClassValues()
        try:
            codes = values.codes(source.class_values(i, column) for i in range(len(source)))
        except TypeError as error:
            if not named:
                return train, validation
            raise UserError(f"class_column: {column} cannot hold classes: {error}.") from error
        if classes is None and not named and not (values.number and values.look_like_classes(len(source))):
            return train, validation
        classes = values.ordered() if classes is None else classes
        if not classes:
            raise UserError(f"class_column: no training image has a value in the column {column!r}.")
        source.labels, source.class_names = labels_of([codes], len(source), values, classes), [str(c) for c in classes]
    train.findings.empty_classes.clear()  # those were folders
    return train, validation


def held_out_images(source: ImageSource, count: int, scratch: Path) -> np.ndarray:
    """The indices of the `count` images whose names have the smallest SHA-256: int64 (count,), ascending.

    For a large source they are cached in a file in `scratch`.
    """
    if len(source) < MANY:
        return _smallest_by_hash(source, count)
    path = scratch / f"held-out-{digest(source.fingerprint, count)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["digest"] == digest(known["images"]):
            return np.array(known["images"], dtype=np.int64)
    found = _smallest_by_hash(source, count)
    images = found.tolist()
    try:
        write_json(path, {"images": images, "digest": digest(images)})
    except OSError as error:  # it is only a cache
        logger.info("%s cannot be written: %s", path, error)
    return found


def _smallest_by_hash(source: ImageSource, count: int) -> np.ndarray:
    sha256, found, limit, start = hashlib.sha256, [], b"\xff" * 32, 0
    for names in in_parts(source.all_names()):
        hashes = [sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
        found += [(of_name, i) for i, of_name in enumerate(hashes, start) if of_name <= limit]
        start += len(names)
        if len(found) > 2 * count:
            found = heapq.nsmallest(count, found)
            limit = found[-1][0]
    return np.array(sorted(i for _, i in heapq.nsmallest(count, found)), dtype=np.int64)
