"""What a U-Net may be told besides its noisy latents: a class, an image or semantic map, a text; any, or nothing.

A condition knows how its values are read and cached, how they are left out at random (arXiv 2207.12598), what the U-Net
needs to take them in, and what the pipeline has to be told. The training loop asks `Conditions` and has no branch per
kind: without any, the U-Net is asked as it always was.

    ClassCondition     labels of the dataset -> UNet2DModel's class embedding, one more for "no class"
    ImageCondition     an image or map of classes per example, at the size of the latents -> more input channels
    TextCondition      captions, embedded by a frozen encoder -> cross-attention, of a UNet2DConditionModel
"""

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.captions import Captions, TextEncoder, check_captions, embed_captions, read_captions
from latent_ddpm.data.dataset import ImageDataset, decode_square
from latent_ddpm.data.images import decode, nearest_square, to_uint8
from latent_ddpm.data.indexing import digest
from latent_ddpm.data.latents import LatentCache, build_cache, latents_folder
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.errors import UserError
from latent_ddpm.random import Stream, uniform
from pipeline_latent_ddpm import class_shares, image_channels

# what a batch is given: class_labels (B,), conditioning_image (B, K, h, w), encoder_hidden_states (B, T, W) with
# encoder_attention_mask (B, T)
Given = dict[str, torch.Tensor]


# as the U-Net and as the pipeline name them
TEXT_KEYS = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}


class Condition(abc.ABC):
    """One kind of condition, for the examples of one split.

    Attributes:
        dropout: share of the examples for which it is left out in training.
        stream: of the draws that decide for which.
    """

    dropout: float
    stream: Stream

    @abc.abstractmethod
    def unet_arguments(self) -> dict[str, Any]:
        """What the U-Net's constructor is given: `num_class_embeds`, or `conditioning_channels`."""

    @abc.abstractmethod
    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        """The values of examples.

        Args:
            records: of the latent cache (B,).
            flipped: bool (B,), which of the examples are mirrored, or None.
            numbers: int64 (B,), the example numbers; None where there are none.
        """

    @abc.abstractmethod
    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        """The values with those of the examples `dropped` (B,), bool, replaced by what stands for none."""

    @abc.abstractmethod
    def pipeline_arguments(self) -> dict[str, Any]:
        """What the pipeline's constructor is given."""

    @abc.abstractmethod
    def meaning(self) -> Any:
        """JSON value of all that decides what the U-Net's inputs mean: with another one it would know nothing."""


class ClassCondition(Condition):
    """The class of each image.

    Args:
        names: of the classes, by label.
        dropout: see `Condition`.
    """

    stream = Stream.DROP_CLASS

    def __init__(self, names: Sequence[str], dropout: float) -> None:
        self.names, self.dropout = list(names), dropout

    def unet_arguments(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def values(
        self, records: np.ndarray, flipped: np.ndarray | None = None, numbers: torch.Tensor | None = None
    ) -> Given:
        labels = torch.from_numpy(records["label"].astype(np.int64))
        return {"class_labels": torch.where(labels < 0, len(self.names), labels)}

    def leave_out(self, given: Given, dropped: torch.Tensor) -> Given:
        return {**given, "class_labels": given["class_labels"].masked_fill(dropped, len(self.names))}

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"class_names": self.names}

    def meaning(self) -> Any:
        return ["class", self.names]


class ImageCondition(Condition):
    """An image or semantic map for each image, at the size of the latents and concatenated to them (arXiv 2112.10752).

    A map of K classes becomes K channels, each the share of a class in a latent's pixels; an image its channels in
    [-1, 1], and one of ones. Nothing is zeros in all of them, which neither can be.

    Args:
        cache: of `conditioning_images`, by the dataset's index.
        classes: of a semantic map; None for an image.
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

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"conditioning_classes": self.classes}

    def meaning(self) -> Any:
        return ["image", self.classes, self.cache.shape[0]]


class TextCondition(Condition):
    """A caption for each image, chosen among its own by the example's number.

    Args:
        cache: of `embed_captions`; its row 0 is the empty caption, which stands for none.
        captions: of each image of the dataset; number k of the different ones is row k + 1 of the cache.
        encoder: that made the embeddings.
        config: of the run.
    """

    stream = Stream.DROP_TEXT

    def __init__(self, cache: LatentCache, captions: Captions, encoder: TextEncoder, config: UNetConfig) -> None:
        self.cache, self.encoder, self.config, self.dropout = cache, encoder, config, config.caption_dropout
        self._starts, self._rows = captions.starts, captions.rows

    def unet_arguments(self) -> dict[str, Any]:
        return {"cross_attention_dim": self.encoder.width}

    def rows(self, indices: np.ndarray, numbers: torch.Tensor | None) -> np.ndarray:
        """The captions' rows in the cache: int64 (B,); 0 for an image without."""
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
        different, where = np.unique(rows, return_inverse=True)  # a batch often has few
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

    def nothing(self) -> Given:
        """What stands for no caption, of one example."""
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
        all: of them; none for an unconditional model.
        seed: of the run.
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
        """What examples are given, on the CPU.

        Args:
            records: `LatentCache.records` (B,) of them.
            flipped: bool (B,), which of them are mirrored.
            numbers: int64 (B,), the example numbers, which decide what is left out; None leaves out nothing.
        """
        values: Given = {}
        for condition in self.all:
            own = condition.values(records, flipped, numbers)
            if numbers is not None and condition.dropout > 0:
                own = condition.leave_out(own, uniform(self.seed, condition.stream, numbers) < condition.dropout)
            values |= own
        return values

    def shown(self, latents: LatentCache, count: int, guidance_scale: float) -> dict[str, Any]:
        """What the pipeline is told for a grid of `count` samples.

        With conditioning images or captions, the first examples' own conditions; else the classes in turn.
        """
        if not self.all:
            return {}
        given = self.given(latents.records(np.arange(count) % len(latents)))
        for condition in self.all:
            if isinstance(condition, TextCondition):
                nothing = condition.nothing()  # or the pipeline would ask the encoder, and keep it on the GPU
                for of_unet, of_pipeline in TEXT_KEYS.items():
                    given[of_pipeline] = given.pop(of_unet)
                    given[f"negative_{of_pipeline}"] = nothing[of_unet]
            if isinstance(condition, ClassCondition):
                classes, labels = len(condition.names), given["class_labels"]
                own = labels.masked_fill(labels == classes, -1)  # no class has another number in the pipeline
                given["class_labels"] = own if len(self.all) > 1 else torch.arange(count) % classes
        return {**given, "guidance_scale": guidance_scale}


def to_device(given: Given, device: torch.device) -> Given:
    """What is given, on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in given.items()}


def unet_inputs(noisy: torch.Tensor, given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the U-Net is called with: its sample (B, D + K, h, w), and its keyword arguments.

    Args:
        noisy: latents (B, D, h, w).
        given: on the same device.
    """
    words = {key: value for key, value in given.items() if key != "conditioning_image"}
    if "conditioning_image" in given:
        noisy = torch.cat((noisy, given["conditioning_image"].to(noisy.dtype)), dim=1)
    return noisy, words


# ------------------------------------------------------------------------------------------------ making them


class ConditioningImages(ImageDataset):
    """The conditioning images of a dataset, square, at its resolution: uint8 (1, R, R) classes, or (C, R, R).

    Args:
        images: the dataset, whose image i has conditioning image i.
        config: of the run.

    Raises:
        UserError: one is missing or cannot be used, when it is asked for.
    """

    def __init__(self, images: ImageDataset, config: UNetConfig) -> None:
        self.of, self.classes = ConditioningSource(images.source, config), config.conditioning_image_classes
        super().__init__(self.of, config, images.bad_images, train=False, kept=images.kept)

    def _decode_from(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[np.ndarray, int]:
        # nothing stands in for a damaged one, as among images: it would belong to another image
        name = self.name(i)
        if self.classes is None:
            pixels = decode_square(self.of, self.source_index(i), self.resolution, self.channels, crop, flip)
            if isinstance(pixels, str):
                raise UserError(f"The conditioning image of {name} cannot be used: {pixels}")
            return pixels, i
        try:
            pixels = nearest_square(self.of.load(self.source_index(i)), self.resolution)
        except Exception as error:  # as for images: Pillow's plugins raise nearly every class there is
            raise UserError(f"The conditioning image of {name} cannot be used: {error}") from error
        if pixels.max() >= self.classes:
            raise UserError(
                f"The conditioning image of {name} has the value {pixels.max()}; conditioning_image_classes is "
                f"{self.classes}, so values go from 0 to {self.classes - 1}."
            )
        return pixels[..., None], i


class ConditioningSource(ImageSource):
    """The conditioning images of a source: of one of its columns, or in a folder beside its own.

    Raises:
        UserError: there is no such column or folder.
    """

    def __init__(self, source: ImageSource, config: UNetConfig) -> None:
        self.source, self.column = source, config.conditioning_image_column
        self.folder = Path(config.conditioning_image_dir) if config.conditioning_image_dir else None
        if self.folder is not None:
            if not self.folder.is_dir():
                raise UserError(f"conditioning_image_dir {self.folder} is not a folder.")
            files = sorted(path for path in self.folder.rglob("*") if path.is_file())
            self._files = {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in files}
            about = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self._files.items()]
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
        stem = Path(self.name(i)).with_suffix("").as_posix()
        if stem not in self._files:
            raise FileNotFoundError(f"there is no {self.folder / stem}.*")
        return decode(self._files[stem].read_bytes(), at_least)


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
        encode, dataset, folder, key, config.train_batch_size, device, wait, config.dataloader_num_workers, False
    )
    cache.mean, cache.std = torch.zeros_like(cache.mean), 1.0  # as they are
    return ImageCondition(cache, classes, config.conditioning_image_dropout)


def load_encoder(config: UNetConfig) -> TextEncoder | None:
    """The text encoder of a run, None without one; before the images are looked at, to find out whether it is there."""
    return TextEncoder(config.text_encoder, config.max_caption_tokens) if "text" in config.conditions else None


def check_source(source: ImageSource, config: UNetConfig) -> None:
    """Find out before images are decoded whether there are the classes and captions that a config asks for.

    Raises:
        UserError: there are not.
    """
    if "class" in config.conditions:
        _class_names(source)
    if "text" in config.conditions:
        check_captions(source, config)


def make_conditions(
    config: UNetConfig,
    images: tuple[ImageDataset, ImageDataset],
    latent_size: int,
    flip: bool,
    device: torch.device,
    wait: Callable[[], None],
    encoder: TextEncoder | None = None,
) -> tuple[Conditions, Conditions]:
    """The conditions that a config asks for, of the training and of the held-out images; all processes call this.

    Args:
        config: of the run.
        images: of `images_for_run`.
        latent_size: side of the latents.
        flip: whether the training images are needed mirrored too.
        device: where caches are made.
        wait: a barrier of the processes.
        encoder: of `load_encoder`, where it has been loaded already.

    Raises:
        UserError: the dataset has no classes, or labels beyond them, or no such column, or no captions; a conditioning
            image is missing or cannot be used.
    """
    encoder = load_encoder(config) if encoder is None else encoder
    folder = latents_folder(config)

    def of_split(images: ImageDataset, folder: Path, train: bool) -> Conditions:
        made: list[Condition] = []
        if "class" in config.conditions:
            made.append(ClassCondition(_class_names(images), config.class_dropout))
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
        raise UserError(
            "conditions has class, but the dataset has no classes: it needs a column of labels, or images in two "
            "or more folders, whose names are the classes."
        )
    if images.labels.max(initial=-1) >= len(names):
        i = int(images.labels.argmax())
        raise UserError(f"{images.name(i)} has the label {images.labels[i]}, but there are only {len(names)} classes.")
    return names
