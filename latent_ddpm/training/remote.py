"""Resume a run from its repository on the Hub, where `push_checkpoints` has put what it takes."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import TypeVar

from latent_ddpm.config import RunConfig, changed, resize_of_run
from latent_ddpm.errors import UserError
from latent_ddpm.files import aside_name
from latent_ddpm.pretrained import download, is_repo_id
from latent_ddpm.training.checkpoint import CheckpointFolder

Config = TypeVar("Config", bound=RunConfig)

FILES = ("run.json", "metrics.jsonl", "train_autoencoder.yaml", "train_unet.yaml")
FOLDERS = ("autoencoder", "ema")  # beside the checkpoints


def with_run_of_hub(config: Config, stage: str) -> Config:
    """The config, ready to resume from the checkpoints of a repository if `resume_from_checkpoint` names one.

    They are downloaded into the run's folder, with the rest that resuming takes. What is there already stays. So a run
    that was resumed in this way goes on from its own checkpoints.

    Args:
        config: as it was given.
        stage: "autoencoder" or "unet".

    Raises:
        UserError: the repository cannot be read, or has no checkpoint of this stage.
    """
    wanted, folder = config.resume_from_checkpoint, Path(config.output_dir)
    is_local = wanted is None or Path(wanted).exists() or (folder / "checkpoints" / wanted).exists()
    if wanted == "latest" or is_local or not is_repo_id(wanted):
        return config
    note = config.source_note
    if not CheckpointFolder(folder / "checkpoints", stage, 1).all():
        patterns = ["checkpoints/*", *FILES, *(f"{name}/*" for name in FOLDERS)]
        root = download(wanted, "resume_from_checkpoint", None, patterns)
        found = CheckpointFolder(root / "checkpoints", stage, 1).all()
        if not found:
            raise UserError(
                f"resume_from_checkpoint {wanted} holds no checkpoint of train_{stage}.py. A run publishes them with "
                f"--push_to_hub true --push_checkpoints true."
            )
        # said when the log begins, with the notes on the source
        note = "; ".join(filter(None, [note, f"resuming from {found[-1].name} of {wanted}"]))
        for path in (*(root / "checkpoints").glob("*"), *(root / name for name in (*FOLDERS, *FILES))):
            _copy(path, folder / path.relative_to(root))
    made = changed(config, resume_from_checkpoint="latest")
    made.source_note = note
    if made.image_resize is None:
        made.image_resize = resize_of_run(made)
    return made


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder that is not there yet; it appears whole. Other processes may do the same."""
    if target.exists() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_name(target)
    aside = aside.with_name(f"{aside.name}.{os.getpid()}")
    try:
        if source.is_dir():
            shutil.copytree(source, aside)
        else:
            shutil.copyfile(source, aside)
        with contextlib.suppress(OSError):  # another process was faster
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
