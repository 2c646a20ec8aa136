"""What a run shows: progress bar, metrics.jsonl, picture grids, and TensorBoard, Weights & Biases or Trackio."""

import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import secrets
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import get_token
from PIL import Image

from latent_ddpm import __version__
from latent_ddpm.config import RunConfig
from latent_ddpm.errors import UserError
from latent_ddpm.files import save_png, write_json, write_whole
from latent_ddpm.progress import progress_bar

LASTING = ("tracker_run", "autoencoder")  # what a resumed run keeps of a stage in run.json
MODULES = {"tensorboard": "torch.utils.tensorboard"}  # what a tracker is imported as, where that is not its name


def check_tracker(name: str, project: str) -> None:
    """Check that a tracker will start, so that it does not fail or ask for a login after hours of reading images.

    Args:
        name: `report_to` of the config.
        project: `tracker_project_name`.

    Raises:
        UserError: the tracker's package is missing or cannot be imported, there is no login, or the project's name is
            not one.
    """
    if name == "none":
        return
    instead = "or choose another --report_to, such as none"
    try:
        importlib.import_module(name)
        importlib.import_module(MODULES.get(name, name))
    except ModuleNotFoundError as error:
        if error.name == name:
            raise UserError(f"report_to {name} needs the package {name}: pip install {name}, {instead}.") from error
        raise UserError(f"report_to {name}: its package needs {error.name}: install it, {instead}.") from error
    except Exception as error:  # whatever a broken installation raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"report_to {name}: its package cannot be imported ({reason}): repair it, {instead}."
        ) from error
    if int(os.environ.get("RANK", "0")):  # of several processes the first one logs
        return
    if name == "wandb":
        _check_wandb(project, instead)
    if name == "trackio" and os.environ.get("TRACKIO_SPACE_ID") and not get_token():
        raise UserError(f"TRACKIO_SPACE_ID needs a token: run `hf auth login` once, unset the variable, {instead}.")


def _check_wandb(project: str, instead: str) -> None:
    """Raise UserError if `wandb.init` would ask for a login, or be refused."""
    import wandb

    if len(project) > 128 or re.search(r"[/\\#?%:]", project):
        raise UserError(
            f"tracker_project_name {project!r} cannot be a project of wandb: at most 128 characters, and none of "
            f"/ \\ # ? % :"
        )
    if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) != "online":
        return
    offline = f"set WANDB_MODE=offline to upload later with `wandb sync`, {instead}"
    silent = {"prompt": False} if "prompt" in inspect.signature(wandb.login).parameters else {}
    try:  # without `prompt`, which is of wandb 0.31, login asks only where there is no key
        found = wandb.login(verify=True, **silent) if silent or wandb.api.api_key else False
    except Exception as error:  # a refused key, or no connection
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"report_to wandb: the login fails ({reason}): repeat `wandb login`, {offline}.") from error
    if not found:
        raise UserError(f"report_to wandb needs a login: run `wandb login` once, or set WANDB_API_KEY; {offline}.")


def is_finished(config: RunConfig, stage: str, first_step: int, product: str) -> bool:
    """Whether a stage has nothing left to do: all steps are done, the result is exported and need not be published.

    Args:
        config: the run's.
        stage: "autoencoder" or "unet".
        first_step: step of the checkpoint that the run would resume from.
        product: file of the result in output_dir; its folder is exported atomically.

    Raises:
        UserError: more steps are done than max_train_steps.
    """
    folder = Path(config.output_dir)
    if first_step > config.max_train_steps:
        raise UserError(
            f"{first_step} steps are done, and max_train_steps is {config.max_train_steps}. Raise it, or "
            f"resume from an earlier checkpoint (--resume_from_checkpoint), or give another --output_dir."
        )
    if first_step != config.max_train_steps or config.push_to_hub or not (folder / product).exists():
        return False
    return noted_of(folder, stage).get("finished_at") == first_step


def noted_of(folder: Path, stage: str) -> dict:
    """What run.json in a run's folder says about a stage; empty if it says nothing or is damaged."""
    try:
        noted = json.loads((folder / "run.json").read_text(encoding="utf-8"))[stage]
        return noted if isinstance(noted, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Tracker:
    """Writes the metrics and pictures of the main process; in other processes its methods do nothing.

    Args:
        accelerator: the run's accelerator, made with log_with.
        output_dir: the run's folder; metrics.jsonl and samples/ are written there.
        stage: "autoencoder" or "unet"; part of every line and picture name.
        config: the resolved config.
        first_step: later lines are removed; they come from an attempt that was interrupted.
        last_step: end of the progress bar.
        images_per_step: of all processes together.
        training_images: in the training set.
        validation_images: held out.
        data: identity of the training images, or "".
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        stage: str,
        config: RunConfig,
        first_step: int,
        last_step: int,
        images_per_step: int,
        training_images: int,
        validation_images: int,
        data: str = "",
    ) -> None:
        self.accelerator, self.stage, self.images_per_step = accelerator, stage, images_per_step
        self.path, self.samples = output_dir / "metrics.jsonl", output_dir / "samples"
        self.main = accelerator.is_main_process
        self.step, self._mark = first_step, (first_step, time.monotonic())
        self._rate: float | None = None  # last measured images per second
        if self.main:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._cut(first_step)
            self._note_machine(output_dir / "run.json", training_images, validation_images, data)
            self._start_trackers(config, first_step)
        self.bar = progress_bar(
            total=last_step,
            initial=first_step,
            desc=stage,
            unit="step",
            disable=not self.main,
            smoothing=0.05,
        )

    def _cut(self, first_step: int) -> None:
        if not self.path.exists():
            return
        keep = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the incomplete last line of a killed run
                continue
            if record["stage"] != self.stage or record["step"] <= first_step:
                keep.append(line + "\n")
        write_whole(self.path, "".join(keep))

    def _note_machine(self, path: Path, training_images: int, validation_images: int, data: str) -> None:
        """Write hardware, versions and numbers of images to run.json, for the model card."""
        noted = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        device = self.accelerator.device
        noted[self.stage] = {key: value for key, value in noted.get(self.stage, {}).items() if key in LASTING} | {
            "training_images": training_images,
            "validation_images": validation_images,
            "data": data,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}",
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "versions": {"latent_ddpm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        write_json(path, noted)

    def _start_trackers(self, config: RunConfig, first_step: int) -> None:
        """Start the tracker, or continue its run when the stage is resumed."""
        path = self.path.parent / "run.json"
        noted = json.loads(path.read_text(encoding="utf-8"))
        mine = noted[self.stage]
        run_id = mine.get("tracker_run") if first_step else None
        mine["tracker_run"] = run_id or secrets.token_hex(4)
        write_json(path, noted)
        name = f"{self.path.parent.resolve().name}-{self.stage}"
        settings = {
            # hides what was logged after the checkpoint; it is logged again
            "tensorboard": {"purge_step": first_step + 1},
            "wandb": {"name": name, "id": mine["tracker_run"], "resume": "allow", "dir": str(self.path.parent)},
            "trackio": {"name": f"{name}-{mine['tracker_run']}", "resume": "allow"},
        }
        # TensorBoard's hyperparameters must be numbers or strings
        plain = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in dataclasses.asdict(config).items()
        }
        project = self.stage if config.report_to == "tensorboard" else config.tracker_project_name
        self.accelerator.init_trackers(project, config=plain, init_kwargs=settings)

    def histogram(self, **values: torch.Tensor) -> None:
        """Record histograms of values of any shape: 64 bins in metrics.jsonl, and the tracker's own histogram."""
        if not self.main:
            return
        spread = {}
        for name, tensor in values.items():
            # double: nearly equal values still need 64 different bin edges
            flat = tensor.detach().flatten().cpu().double().numpy()
            flat = flat[np.isfinite(flat)]
            if not len(flat):
                continue
            counts, edges = np.histogram(flat, bins=64)
            spread[name] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
            for tracker in self.accelerator.trackers:
                label = f"{self.stage}/{name}"
                if tracker.name == "tensorboard":
                    tracker.tracker.add_histogram(label, flat, self.step)
                else:
                    made = importlib.import_module(tracker.name).Histogram(np_histogram=(counts, edges))
                    tracker.log({label: made}, step=self.step)
        self._append({"histograms": spread})

    def _append(self, metrics: dict) -> None:
        images = self.step * self.images_per_step
        record = {"stage": self.stage, "step": self.step, "images": images, "time": round(time.time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | metrics) + "\n")

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.bar.update(1)

    def log(self, **metrics: float) -> None:
        """Record metrics at the current step, with images per second since the last call with a loss.

        Values that are not finite are left out, because JSON cannot represent them.
        """
        if not self.main:
            return
        if "loss" in metrics:
            steps, now = self.step - self._mark[0], time.monotonic()
            if steps:  # since the last pause
                self._rate = steps * self.images_per_step / max(now - self._mark[1], 1e-9)
                metrics["images_per_second"] = self._rate
            self._mark = (self.step, now)
            shown = {k: f"{metrics[k]:.4g}" for k in ("loss", "psnr", "codebook_usage") if k in metrics}
            speed = {} if self._rate is None else {"images/s": f"{self._rate:.0f}"}
            self.bar.set_postfix({**shown, **speed}, refresh=False)
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._append({key: float(f"{value:.6g}") for key, value in metrics.items()})
        self.accelerator.log({f"{self.stage}/{key}": value for key, value in metrics.items()}, step=self.step)

    def set_last_step(self, step: int) -> None:
        """Move the end of the progress bar."""
        self.bar.total = step
        self.bar.refresh()

    def say(self, sentence: str) -> None:
        """Print a line above the bar, from the main process."""
        if self.main:
            self.bar.write(f"{self.stage} step {self.step}: {sentence}")

    def pause(self) -> None:
        """Restart the measurement of images per second, after time that was not spent on training."""
        self._mark = (self.step, time.monotonic())

    def image(self, picture: Image.Image) -> Path:
        """Write a grid to samples/<stage>-<step>.png and send it to the tracker."""
        path = self.samples / f"{self.stage}-{self.step:08d}.png"
        save_png(picture, path)
        pixels = np.asarray(picture.convert("RGB"))
        for tracker in self.accelerator.trackers:
            if tracker.name == "trackio":
                import trackio

                tracker.log({self.stage: trackio.Image(picture)}, step=self.step)
            else:
                # TensorBoard takes a stack of arrays, Weights & Biases a list of pictures
                value = pixels[None] if tracker.name == "tensorboard" else [picture]
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({self.stage: value}, step=self.step, **options)
        return path

    def note(self, **facts: object) -> None:
        """Write JSON values about the stage to run.json."""
        if self.main:
            path = self.path.parent / "run.json"
            noted = json.loads(path.read_text(encoding="utf-8"))
            noted[self.stage] |= facts
            write_json(path, noted)

    def finish(self, **facts: object) -> None:
        """Note in run.json that the stage is done and exported, and further facts."""
        self.note(finished_at=self.step, **facts)

    def close(self) -> None:
        """Close the bar and the trackers."""
        self.bar.close()
        if self.main:
            for tracker in self.accelerator.trackers:  # not end_training, which also destroys the process group
                tracker.finish()
