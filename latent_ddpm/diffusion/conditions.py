"""The conditioning of a U-Net: any of a class, an image or semantic map, and a text, or none.

A condition defines how its values are read and cached, how they are dropped at random (arXiv 2207.12598), which
arguments the U-Net's constructor needs for them, and which the pipeline needs. The training loop uses `Conditions` and
has no branch per kind. An unconditional model has an empty `Conditions`.

    ClassCondition     labels of the dataset -> UNet2DModel's class embedding, with an extra class for "no class"
    ImageCondition     an image or semantic map per example, at the size of the latents -> extra input channels
    TextCondition      captions, embedded by a frozen encoder -> cross-attention in a UNet2DConditionModel
"""

import abc
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_ddpm.config import UNetConfig, encoding_batch_size
from latent_ddpm.data.captions import Captions, TextEncoder, check_captions, embed_captions, read_captions
from latent_ddpm.data.dataset import ImageDataset, decode_square
from latent_ddpm.data.formats import readable_extensions
from latent_ddpm.data.images import CENTRE, decode, nearest_square, to_uint8
from latent_ddpm.data.indexing import digest
from latent_ddpm.data.latents import LatentCache, build_cache, latents_folder
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.layout import JUNK
from latent_ddpm.errors import UserError
from latent_ddpm.places import no_folder
from latent_ddpm.random import Stream, uniform
from latent_ddpm.resizing import resizer
from pipeline_latent_ddpm import class_shares, image_channels

# the conditioning of a batch: class_labels (B,), conditioning_image (B, K, h, w), encoder_hidden_states (B, T, W) with
# encoder_attention_mask (B, T)
Given = dict[str, torch.Tensor]


CHECKED_IMAGES = 256  # conditioning images that are looked at before training

# the U-Net's names -> the pipeline's names
TEXT_KEYS = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}


class Condition(abc.ABC):
    """One kind of condition, for the examples of one split.

    Attributes:
        dropout: share of the examples whose condition is dropped in training.
        stream: random stream that selects these examples.
    """

    dropout: float
    stream: Stream

    @abc.abstractmethod
    def unet_arguments(self) -> dict[str, Any]:
        """Arguments of `make_unet`: `num_class_embeds`, `conditioning_channels` or `cross_attention_dim`."""

    @abc.abstractmethod
    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        """The conditioning of examples.

        Args:
            records: records of the latent cache (B,).
            flipped: bool (B,), true for mirrored examples; None if none is mirrored.
            numbers: int64 (B,), the example numbers; None outside of training.
        """

    @abc.abstractmethod
    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        """The values, where those of the examples `dropped`, bool (B,), are replaced by the null condition."""

    @abc.abstractmethod
    def null(self, given: Given) -> Given:
        """The null condition in the place of this condition's values, on their device."""

    @abc.abstractmethod
    def pipeline_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor."""

    @abc.abstractmethod
    def meaning(self) -> Any:
        """JSON value that identifies the meaning of the U-Net's inputs. A U-Net is only valid for an equal value."""


class ClassCondition(Condition):
    """The class of each image.

    Args:
        names: class names, in the order of the labels.
        dropout: see `Condition`.
        labels: of each image, integers (N,). None takes those of the latent cache, which may be older.
    """

    stream = Stream.DROP_CLASS

    def __init__(self, names: Sequence[str], dropout: float, labels: np.ndarray | None = None) -> None:
        self.names, self.dropout, self.labels = list(names), dropout, labels

    def unet_arguments(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        found = records["label"] if self.labels is None else self.labels[records["index"]]
        labels = torch.from_numpy(found.astype(np.int64))
        return {"class_labels": torch.where(labels < 0, len(self.names), labels)}

    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        return {**given, "class_labels": given["class_labels"].masked_fill(dropped, len(self.names))}

    def null(self, given: Given) -> Given:
        return {"class_labels": torch.full_like(given["class_labels"], len(self.names))}

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"class_names": self.names}

    def meaning(self) -> Any:
        return ["class", self.names]


class ImageCondition(Condition):
    """An image or semantic map for each image, at the size of the latents and concatenated to them (arXiv 2112.10752).

    A map of K classes becomes K channels, the share of each class in the pixels of a latent. An image becomes its
    channels in [-1, 1] and a channel of ones. The null condition is zero in all channels; no map or image is.

    Args:
        cache: cache of the conditioning images, by the dataset's index.
        classes: number of classes of a semantic map; None for an image.
        dropout: see `Condition`.
    """

    stream = Stream.DROP_IMAGE

    def __init__(self, cache: LatentCache, classes: int | None, dropout: float) -> None:
        self.cache, self.classes, self.dropout = cache, classes, dropout

    def unet_arguments(self) -> dict[str, Any]:
        return {"conditioning_channels": self.cache.shape[0]}

    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        return {"conditioning_image": self.cache.batch(records["index"], flipped)}

    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        image = given["conditioning_image"]
        return {**given, "conditioning_image": image.masked_fill(dropped.view(-1, 1, 1, 1), 0.0)}

    def null(self, given: Given) -> Given:
        return {"conditioning_image": torch.zeros_like(given["conditioning_image"])}

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"conditioning_classes": self.classes}

    def meaning(self) -> Any:
        return ["image", self.classes, self.cache.shape[0]]


class TextCondition(Condition):
    """A caption for each image. If an image has several, the example number selects one.

    Args:
        cache: from `embed_captions`; row 0 is the empty caption, which is the null condition.
        captions: the captions of each image; distinct caption k is row k + 1 of the cache.
        encoder: the encoder that made the embeddings.
        config: config of the run.
    """

    stream = Stream.DROP_TEXT

    def __init__(self, cache: LatentCache, captions: Captions, encoder: TextEncoder, config: UNetConfig) -> None:
        self.cache, self.encoder, self.config, self.dropout = cache, encoder, config, config.caption_dropout
        self._starts, self._rows = captions.starts, captions.rows

    def unet_arguments(self) -> dict[str, Any]:
        return {"cross_attention_dim": self.encoder.width}

    def rows(self, indices: np.ndarray, numbers: torch.Tensor | None) -> np.ndarray:
        """The captions' rows in the cache: int64 (B,); 0 for an image without caption."""
        first = self._starts[indices].astype(np.int64)
        count = self._starts[indices + 1] - first
        place = np.zeros(len(indices), dtype=np.int64)
        if numbers is not None:
            draws = uniform(self.config.seed, Stream.CAPTION, numbers).double().numpy()
            place = np.minimum((draws * count).astype(np.int64), np.maximum(count - 1, 0))
        found = np.zeros(len(indices), dtype=np.int64)
        there = count > 0
        found[there] = self._rows[(first + place)[there]].astype(np.int64) + 1
        return found

    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        return self._embedded(self.rows(records["index"], numbers))

    def _embedded(self, rows: np.ndarray) -> Given:
        different, where = np.unique(rows, return_inverse=True)  # a batch often has few distinct captions
        found = self.cache.records(different)
        embeddings = torch.from_numpy(found["latents"][:, 0, 0].astype(np.float32))[where]  # (B, T, W)
        tokens = torch.from_numpy(found["label"].astype(np.int64))[where]
        mask = torch.arange(embeddings.shape[1]) < tokens[:, None]
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        empty = self.nothing()
        return {
            name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), empty[name], value)
            for name, value in given.items()
        }

    def null(self, given: Given) -> Given:
        like = {name: given[name] for name in TEXT_KEYS}
        return {name: self._on(like[name].device)[name].expand_as(like[name]) for name in TEXT_KEYS}

    @functools.cache  # noqa: B019, one condition lives as long as the run
    def _on(self, device: torch.device) -> Given:
        return to_device(self.nothing(), device)

    def nothing(self) -> Given:
        """The null condition of one example: the empty caption."""
        return self._embedded(np.zeros(1, dtype=np.int64))

    def pipeline_arguments(self) -> dict[str, Any]:
        known = {"max_caption_tokens": self.encoder.most_tokens}
        if self.config.export_text_encoder:
            return {"text_encoder": self.encoder.model, "tokenizer": self.encoder.tokenizer, **known}
        return {"text_encoder_id": self.config.text_encoder, **known}

    def meaning(self) -> Any:
        return ["text", self.encoder.fingerprint, self.encoder.most_tokens]


class Conditions:
    """All conditions of a run, for one split.

    Args:
        all: the conditions; empty for an unconditional model.
        seed: random seed of the run.
    """

    def __init__(self, all: Sequence[Condition], seed: int) -> None:
        self.all, self.seed = list(all), seed

    def __bool__(self) -> bool:
        return bool(self.all)

    def unet_arguments(self) -> dict[str, Any]:
        """See `Condition.unet_arguments`."""
        return {key: value for condition in self.all for key, value in condition.unet_arguments().items()}

    def pipeline_arguments(self) -> dict[str, Any]:
        """See `Condition.pipeline_arguments`."""
        return {key: value for condition in self.all for key, value in condition.pipeline_arguments().items()}

    def meaning(self) -> list:
        """See `Condition.meaning`."""
        return [condition.meaning() for condition in self.all]

    def given(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        """The conditioning of examples, on the CPU.

        Args:
            records: their `LatentCache.records` (B,).
            flipped: bool (B,), true for mirrored examples; None if none is mirrored.
            numbers: int64 (B,), the example numbers, which determine the dropout; None drops nothing.
        """
        values: Given = {}
        for condition in self.all:
            own = condition.values(records, flipped, numbers)
            if numbers is not None and condition.dropout > 0:
                own = condition.leave_out(own, uniform(self.seed, condition.stream, numbers) < condition.dropout)
            values |= own
        return values

    def nothing(self, given: Given) -> Given:
        """The null conditions in the place of the conditioning of examples, on its device."""
        return {key: value for condition in self.all for key, value in condition.null(given).items()}

    def shown(self, latents: LatentCache, count: int, guidance_scale: float) -> dict[str, Any]:
        """The pipeline's arguments for a grid of `count` samples.

        With conditioning images or captions, these are the conditions of the first examples, otherwise the classes in
        turn.
        """
        if not self.all:
            return {}
        given = self.given(latents.records(np.arange(count) % len(latents)))
        for condition in self.all:
            if isinstance(condition, TextCondition):
                nothing = condition.nothing()  # otherwise the pipeline would load the encoder on the GPU
                for of_unet, of_pipeline in TEXT_KEYS.items():
                    given[of_pipeline] = given.pop(of_unet)
                    given[f"negative_{of_pipeline}"] = nothing[of_unet]
            if isinstance(condition, ClassCondition):
                classes, labels = len(condition.names), given["class_labels"]
                own = labels.masked_fill(labels == classes, -1)  # the pipeline's number for no class
                given["class_labels"] = own if len(self.all) > 1 else torch.arange(count) % classes
        return {**given, "guidance_scale": guidance_scale}


def to_device(given: Given, device: torch.device) -> Given:
    """The conditioning, moved to the device."""
    return {name: value.to(device, non_blocking=True) for name, value in given.items()}


def unet_inputs(noisy: torch.Tensor, given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The U-Net's inputs: its sample (B, D + K, h, w) and its keyword arguments.

    Args:
        noisy: noisy latents (B, D, h, w).
        given: the conditioning, on the same device.
    """
    words = {key: value for key, value in given.items() if key != "conditioning_image"}
    if "conditioning_image" in given:
        noisy = torch.cat((noisy, given["conditioning_image"].to(noisy.dtype)), dim=1)
    return noisy, words


# ---------------------------------------------------------------------------------- reading and caching conditions


class ConditioningImages(ImageDataset):
    """The conditioning images of a dataset, square, at its resolution: uint8 classes (1, R, R) or images (C, R, R).

    Args:
        images: the dataset; its image i has conditioning image i.
        config: config of the run.

    Raises:
        UserError: on access, if a conditioning image is missing or cannot be used.
    """

    def __init__(self, images: ImageDataset, config: UNetConfig) -> None:
        self.of, self.classes = ConditioningSource(images.source, config), config.conditioning_image_classes
        super().__init__(self.of, config, images.bad_images, train=False, kept=images.kept)

    def _decode_from(self, i: int, crop: tuple[float, float]) -> tuple[np.ndarray, int]:
        # unlike a damaged image, a damaged conditioning image has no replacement: it would belong to another image
        k, name = self.source_index(i), self.name(i)
        if self.classes is None:
            return _picture(self.of, k, name, self.resolution, self.channels, self.resized_by, crop), i
        return _map_of_classes(self.of, k, name, self.resolution, self.classes)[..., None], i


def _picture(
    source: ImageSource, k: int, name: str, resolution: int, channels: int, library: str, crop: tuple = CENTRE
) -> np.ndarray:
    """The conditioning image of image k, called `name`: uint8 (R, R, C)."""
    pixels = decode_square(source, k, resolution, channels, crop, library)
    if isinstance(pixels, str):
        raise UserError(f"The conditioning image of {name} cannot be used: {pixels}")
    return pixels


def _map_of_classes(source: ImageSource, k: int, name: str, resolution: int, classes: int) -> np.ndarray:
    """The semantic map of image k, called `name`: uint8 (R, R)."""
    try:
        pixels = nearest_square(source.load(k), resolution)
    except Exception as error:  # as for images: Pillow's plugins raise almost any exception class
        raise UserError(f"The conditioning image of {name} cannot be used: {error}") from error
    if pixels.max() >= classes:
        raise UserError(
            f"The conditioning image of {name} has the value {pixels.max()}; conditioning_image_classes is {classes}, "
            f"so values go from 0 to {classes - 1}. Number the classes from 0, or raise it."
        )
    return pixels


class ConditioningSource(ImageSource):
    """The conditioning images of a source, from one of its columns or from a separate folder.

    Raises:
        UserError: the column or folder does not exist.
    """

    def __init__(self, source: ImageSource, config: UNetConfig) -> None:
        self.source, self.column = source, config.conditioning_image_column
        self.folder = Path(config.conditioning_image_dir) if config.conditioning_image_dir else None
        if self.folder is not None:
            if not self.folder.is_dir():
                raise UserError(no_folder("conditioning_image_dir", str(self.folder)))
            self._files = _images_by_name(self.folder)
            stats = ((name, path.stat()) for name, paths in self._files.items() for path in paths)
            about = [(name, found.st_size, found.st_mtime_ns) for name, found in stats]
        else:
            source.check_column(self.column, "conditioning_image_column")
            about = self.column
        self.fingerprint = digest("conditioning", source.fingerprint, about)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def load(self, i: int, at_least: int | None = None) -> Any:
        if self.folder is None:
            return self.source.load_column(i, self.column, at_least)
        return decode(self.data(i), at_least)

    def data(self, i: int) -> bytes | None:
        if self.folder is None:
            return self.source.data(i)  # of the same row
        name = Path(self.name(i))
        stem = name.with_suffix("").as_posix()
        found = self._files.get(stem, [])
        found = [path for path in found if path.name == name.name] or found  # a.png before a.jpg for a.png
        if not found:
            raise FileNotFoundError(f"there is no image {self.folder / stem}.*")
        if len(found) > 1:
            raise OSError(f"it could be {' or '.join(path.name for path in found)}; keep one of them")
        return found[0].read_bytes()


def _images_by_name(folder: Path) -> dict[str, list[Path]]:
    """The images in a folder by their path in it without extension."""
    readable, found = set(readable_extensions()), {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part.lower() in JUNK for part in name.parts)
        if path.suffix.lower() in readable and not hidden and path.is_file():
            found.setdefault(name.with_suffix("").as_posix(), []).append(path)
    return found


def _image_condition(
    config: UNetConfig,
    images: ImageDataset,
    folder: Path,
    latent_size: int,
    flip: bool,
    device: torch.device,
    wait: Callable[[], None],
) -> ImageCondition:
    classes = config.conditioning_image_classes
    dataset, size = ConditioningImages(images, config), (latent_size, latent_size)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        if classes is None:
            return image_channels(batch, size)
        return class_shares(to_uint8(batch)[:, 0], classes, size)

    key = {"version": 1, "dataset": images.fingerprint, "conditioning": dataset.fingerprint, "images": len(dataset)}
    key |= {"resolution": config.resolution, "size": latent_size, "classes": classes, "flip": flip}
    cache = build_cache(
        encode, dataset, folder, key, encoding_batch_size(config), device, wait, config.dataloader_num_workers, False
    )
    cache.mean, cache.std = torch.zeros_like(cache.mean), 1.0  # no normalization
    return ImageCondition(cache, classes, config.conditioning_image_dropout)


def load_encoder(config: UNetConfig) -> TextEncoder | None:
    """The text encoder of a run, or None. Load it before the images, to find out early if it is missing."""
    return TextEncoder(config.text_encoder, config.max_caption_tokens) if "text" in config.conditions else None


def check_source(source: ImageSource, config: UNetConfig) -> None:
    """Check, before images are decoded, that the source has the classes and captions that the config needs.

    Raises:
        UserError: they are missing.
    """
    if "class" in config.conditions:
        _class_names(source)
    if "text" in config.conditions:
        check_captions(source, config)


def check_conditioning_images(source: ImageSource, config: UNetConfig) -> None:
    """Check some of the conditioning images of a source, evenly spaced, as training will read them.

    Raises:
        UserError: one is missing or cannot be used.
    """
    conditioning, classes = ConditioningSource(source, config), config.conditioning_image_classes
    for i in np.unique(np.linspace(0, len(source) - 1, CHECKED_IMAGES).astype(np.int64)).tolist():
        name = source.name(i)
        if classes is None:
            _picture(conditioning, i, name, config.resolution, config.image_channels, resizer(config.image_resize))
        else:
            _map_of_classes(conditioning, i, name, config.resolution, classes)


def identity_of(source: ImageSource, config: UNetConfig) -> str:
    """Identifies the training images, and those of a conditioning_image_dir; see `ImageSource.identity`."""
    if not config.conditioning_image_dir:
        return source.identity()
    return digest(source.identity(), ConditioningSource(source, config).identity())


def make_conditions(
    config: UNetConfig,
    images: tuple[ImageDataset, ImageDataset],
    latent_size: int,
    flip: bool,
    device: torch.device,
    wait: Callable[[], None],
    encoder: TextEncoder | None = None,
) -> tuple[Conditions, Conditions]:
    """The conditions of the config for the training and the held-out images. Every process calls this.

    Args:
        config: config of the run.
        images: from `images_for_run`.
        latent_size: height and width of the latents.
        flip: whether training also needs the mirrored images.
        device: device on which the caches are computed.
        wait: a barrier of the processes.
        encoder: from `load_encoder`; None loads it here.

    Raises:
        UserError: the dataset lacks classes, the column or captions, or has labels out of range; a conditioning image
            is missing or cannot be used.
    """
    encoder = load_encoder(config) if encoder is None else encoder
    folder = latents_folder(config)

    def of_split(images: ImageDataset, folder: Path, train: bool) -> Conditions:
        made: list[Condition] = []
        if "class" in config.conditions:
            made.append(ClassCondition(_class_names(images), config.class_dropout, images.labels))
        if "image" in config.conditions:
            made.append(_image_condition(config, images, folder, latent_size, train and flip, device, wait))
        if encoder is not None:
            captions = read_captions(images, config, required=train)
            cache = embed_captions(encoder, ["", *captions.different], folder, device, wait)
            made.append(TextCondition(cache, captions, encoder, config))
        return Conditions(made, config.seed)

    return of_split(images[0], folder, True), of_split(images[1], folder / "held_out", False)


def _class_names(images: ImageDataset | ImageSource) -> list[str]:
    names = images.class_names
    if not names or len(names) < 2:
        source = images.source if isinstance(images, ImageDataset) else images
        columns = source.class_columns()
        hint = f" Columns that class_column may name: {', '.join(columns[:8])}." if columns else ""
        raise UserError(
            "conditions has class, but the dataset has no classes. It needs a column of labels, or images in two or "
            f"more folders, whose names become the classes.{hint}"
        )
    if images.labels.max(initial=-1) >= len(names):
        i = int(images.labels.argmax())
        raise UserError(f"{images.name(i)} has the label {images.labels[i]}, but there are only {len(names)} classes.")
    return names
