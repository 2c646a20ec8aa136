"""Find a model of diffusers: in a folder, in a folder of a pipeline, or in a repository of the Hub."""

import fnmatch
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_ddpm.errors import UserError

WEIGHTS = "diffusion_pytorch_model"
FILES = ("config.json", f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*.safetensors", f"{WEIGHTS}.safetensors.index.json")
OF_A_PIPELINE = ("model_index.json", "scheduler/scheduler_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # weights that can run code


def find_model(
    name: str, key: str, parts: tuple[str, ...], subfolder: str | None = None, revision: str | None = None
) -> Path:
    """The folder of a model's config.json and safetensors; those of a repository are downloaded to the Hub's cache.

    Args:
        name: a folder, or "OWNER/NAME" on the Hub. If it holds a pipeline, the first of `parts` in it is the model.
        key: of the config, for messages.
        parts: what a pipeline may call the model.
        subfolder: of the model in the folder or repository; None looks for it.
        revision: branch, tag or commit of the repository; None is its main branch.

    Raises:
        UserError: there is no such folder or repository, it may not be read, or it has no such weights.
    """
    if os.path.isdir(name) or not is_repo_id(name):
        folder = Path(name)
        if folder.is_file():
            raise UserError(f"{key} {name} is a file. Give the folder that holds it and its config.json.")
        if not folder.is_dir():
            raise UserError(f"{key} {name} is neither a folder here nor an id of the Hub, OWNER/NAME.")
        if subfolder is not None and not (folder / subfolder).is_dir():
            raise UserError(f"{key} {name} has no folder {subfolder}.")
        return _inside(folder, parts, subfolder)
    return _from_hub(name, key, parts, subfolder, revision)


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repository of the Hub; that of a folder can, too."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache belongs to; None for other folders."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", str(folder))
    return found[1] if found else None


def hash_folder(folder: Path, patterns: Sequence[str] = ("*",)) -> str:
    """SHA-256 over names and contents of those JSON and safetensors files of a folder that match a pattern."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        chosen = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        if chosen and path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_whole(kind: Any, folder: Path) -> Any:
    """The model of a class of diffusers in a folder, if config.json and weights belong together.

    Raises:
        ValueError: weights are missing, or some are left over. Other errors come from diffusers.
    """
    model, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing, left = found["missing_keys"], found["unexpected_keys"]
    if missing:
        raise ValueError(f"its weights lack {len(missing)} of those that config.json asks for, such as {min(missing)}")
    if left:
        raise ValueError(f"it has {len(left)} weights that config.json does not ask for, such as {min(left)}")
    return model


def pickles_in(names: Sequence[str]) -> list[str]:
    """Those of the file names that are weights in a format that can run code."""
    return sorted(name for name in names if name.endswith(PICKLES))


def only_pickles(found: Sequence[str]) -> str:
    """Why a model is refused whose only weights are the pickles `found`: the end of a sentence."""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"has its weights only as a pickle ({found[0]}{more}), which can run code. Only safetensors are read. If you "
        f"trust it, load it with diffusers, write it with save_pretrained(FOLDER), and give that folder."
    )


def _inside(folder: Path, parts: Sequence[str], subfolder: str | None) -> Path:
    """The folder of the model inside `folder`."""
    if subfolder is not None:
        return folder / subfolder
    if (folder / "config.json").exists():
        return folder
    return next((folder / part for part in parts if (folder / part / "config.json").exists()), folder)


def download(name: str, key: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Those files of a repository that match a pattern, in the Hub's cache; the folder of its top.

    Args:
        name: "OWNER/NAME".
        key: of the config, for messages.
        revision: branch, tag or commit; None is the main branch.
        patterns: of paths, as in a shell.

    Raises:
        UserError: the repository cannot be read.
    """
    from huggingface_hub import snapshot_download  # slow to import, and runs of one's own do without

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the Hub's client, or of the library that it sends requests with
        raise UserError(f"{key} {name}: {_reason(name, error, revision)}") from error


@functools.lru_cache  # a run asks several times
def _from_hub(name: str, key: str, parts: tuple[str, ...], subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi

    # the configs first: a repository may hold many gigabytes of other models
    places = [".", *parts] if subfolder is None else [subfolder]
    configs = [f"{place}/config.json".removeprefix("./") for place in places]
    root = download(name, key, revision, [*configs, *OF_A_PIPELINE])
    folder = _inside(root, parts, subfolder)
    inside = folder.relative_to(root).as_posix()
    where = "" if inside == "." else f" in its folder {inside}"
    if not (folder / "config.json").exists():
        lacks = where or f", also not in {', '.join(parts)}"
        raise UserError(f"{key} {name} holds no config.json{lacks}: it is not a model of diffusers.")
    commit = commit_of(root) or revision
    download(name, key, commit, [file if inside == "." else f"{inside}/{file}" for file in FILES])
    if not list(folder.glob("*.safetensors")):
        try:
            files = HfApi().list_repo_files(name, revision=commit)
        except Exception:  # it is for the message alone
            files = []
        beside = [file for file in files if Path(file).parent == Path(inside)]
        if found := pickles_in(beside):
            raise UserError(f"{key} {name} {only_pickles(found)}")
        raise UserError(f"{key} {name} holds no {WEIGHTS}.safetensors{where}.")
    return folder


def _reason(name: str, error: Exception, revision: str | None) -> str:
    """What is wrong with a repository, in a sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Accept its conditions at huggingface.co/{name}, and run `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "it is neither a folder here nor a repository that you can read on the Hub. If it is private, run "
            "`hf auth login`."
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "it is no folder here, the Hub cannot be reached, and its files are not in the Hub's cache."
    return " ".join(str(error).split())[:300]
