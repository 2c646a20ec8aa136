"""Checkpoints: written atomically, verified when read, in safetensors and JSON only.

A checkpoint is a folder `<output_dir>/checkpoints/<stage>-<step>/` with `state.safetensors` (weights, averaged
weights, optimizer moments), `state.json` (everything that is not a tensor) and `manifest.json` (the format, and size
and SHA-256 of the other two). It is written under another name, fsynced and renamed. A crash leaves only that other
name. A damaged checkpoint does not match its manifest.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latent_ddpm.errors import UserError
from latent_ddpm.files import aside_name, fsync_path

logger = logging.getLogger(__name__)

_FILES = ("state.safetensors", "state.json")
FORMAT = 1  # raise it when older code cannot resume from what is written; 0 is in no manifest


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written."""


@contextlib.contextmanager
def must_fit(wanted: str | None) -> Iterator[None]:
    """Turns torch's error about a state that does not fit into a sentence; `wanted` is resume_from_checkpoint.

    Raises:
        UserError: the state that is loaded within belongs to other networks, another optimizer or the other stage.
    """
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()
        raise UserError(
            f"resume_from_checkpoint {wanted} is of another network or optimizer than this config's "
            f"({reason[min(1, len(reason) - 1)].strip()}). Resume with the config that it was trained with, the "
            f"train_*.yaml of its run."
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested state into tensors by path ("optimizer/state/0/exp_avg") and a JSON skeleton of the rest."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"__tensor__": path}
        if isinstance(value, dict):
            return {
                "__items__": [[key, walk(item, f"{path}/{key}" if path else str(key))] for key, item in value.items()]
            }
        if isinstance(value, (list, tuple)):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint")

    return tensors, walk(state, "")


def join_state(tensors: dict[str, torch.Tensor], skeleton: Any) -> Any:
    """The inverse of `split_state` (tuples come back as lists)."""
    if isinstance(skeleton, dict):
        if "__tensor__" in skeleton:
            return tensors[skeleton["__tensor__"]]
        return {key: join_state(tensors, value) for key, value in skeleton["__items__"]}
    if isinstance(skeleton, list):
        return [join_state(tensors, value) for value in skeleton]
    return skeleton


class CheckpointFolder:
    """The checkpoints of one stage of one run.

    Args:
        folder: `<output_dir>/checkpoints`.
        stage: the prefix of the checkpoints' names.
        total_limit: number of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, stage: str, total_limit: int) -> None:
        self.folder, self.stage, self.total_limit = Path(folder), stage, total_limit

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        pattern = re.compile(rf"{re.escape(self.stage)}-(\d+)")
        found = [path for path in self.folder.glob(f"{self.stage}-*") if pattern.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after `step` steps; call it in one process.

        Raises:
            UserError: the disk is full or not writable; no half-written checkpoint remains.
        """
        final = self.folder / f"{self.stage}-{step:08d}"
        aside = aside_name(final)
        tensors, skeleton = split_state(state)
        try:
            self._remove_leftovers()
            aside.mkdir(parents=True)
            save_file(tensors, aside / "state.safetensors")
            (aside / "state.json").write_text(json.dumps(skeleton), encoding="utf-8")
            manifest = {"format": FORMAT} | {
                name: {"bytes": (aside / name).stat().st_size, "sha256": _sha256(aside / name)} for name in _FILES
            }
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                fsync_path(path)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            fsync_path(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"Could not write the checkpoint {final}: {error}. Earlier checkpoints are untouched; free some "
                f"space and run the same command again."
            ) from error
        for old in self.all()[: -self.total_limit]:
            shutil.rmtree(old)
        return final

    def clear(self) -> None:
        """Remove all checkpoints of the stage."""
        for path in self.all():
            shutil.rmtree(path)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(f".{self.stage}-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Read and verify one checkpoint.

        Raises:
            DamagedCheckpoint: a file is missing, cut short or changed.
            UserError: a later version of latent-ddpm wrote it.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if manifest.get("format", 0) > FORMAT:
                raise UserError(
                    f"The checkpoint {path} has format {manifest['format']}, of a later latent-ddpm; "
                    f"this one reads up to {FORMAT}. Update latent-ddpm, or give another --output_dir."
                )
            for name in _FILES:
                if (path / name).stat().st_size != manifest[name]["bytes"]:
                    raise DamagedCheckpoint(f"{name} has {(path / name).stat().st_size} bytes instead of "
                                            f"{manifest[name]['bytes']}")  # fmt: skip
                if _sha256(path / name) != manifest[name]["sha256"]:
                    raise DamagedCheckpoint(f"{name} does not match its SHA-256")
            return join_state(
                load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
            )
        except (OSError, AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DamagedCheckpoint(str(error)) from error

    def resume(self, wanted: str | None) -> dict[str, Any] | None:
        """The state to resume from: `latest` (the newest undamaged one), a folder, or None to start from scratch.

        A run that started from another run's checkpoint and has its own checkpoints resumes from its own.

        Raises:
            UserError: there are checkpoints and `wanted` is None; the wanted one is damaged or missing; or all are
                damaged.
        """
        present = self.all()
        if wanted is None:
            if present:
                raise UserError(
                    f"{self.folder.parent} already holds {present[-1].name}. Resume from it with "
                    f"--resume_from_checkpoint latest, or give another --output_dir."
                )
            return None
        path = Path(wanted)
        path = path if path.exists() else self.folder / wanted
        began_elsewhere = path.is_dir() and path.resolve().parent != self.folder.resolve()
        if wanted != "latest" and not (began_elsewhere and present):
            if not path.is_dir():
                raise UserError(f"There is no checkpoint {wanted}; in {self.folder} are: {[p.name for p in present]}.")
            try:
                return self.load(path)
            except DamagedCheckpoint as error:
                raise UserError(f"The checkpoint {path} is damaged: {error}.") from error
        for path in reversed(present):
            try:
                return self.load(path)
            except DamagedCheckpoint as error:
                logger.warning("The checkpoint %s is damaged (%s); trying the one before it.", path, error)
        if present:
            raise UserError(
                f"All {len(present)} checkpoints in {self.folder} are damaged; remove them to start from scratch."
            )
        return None
