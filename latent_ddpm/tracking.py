"""How a run shows itself: progress bar, metrics.jsonl, pictures, and the tracker of choice."""

import importlib.util
import json
import logging
import math
import os
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from latent_ddpm import __version__
from latent_ddpm.errors import UserError
from latent_ddpm.grids import save_png

logger = logging.getLogger(__name__)


def check_tracker(name: str) -> None:
    """Raise UserError when the package behind `report_to` is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"report_to {name} needs the package {name}: pip install {name}, or --report_to none.")


class Tracker:
    """Writes what the main process measures; in the other processes its methods do nothing.

    Args:
        accelerator: the run's accelerator, made with log_with.
        output_dir: the run's folder; metrics.jsonl and samples/ are written there.
        stage: "autoencoder" or "unet"; stands in every line and picture name.
        config: the resolved config, for the tracker.
        first_step: lines at or after this step are from an attempt that was cut off and are removed.
        last_step: where the progress bar ends.
        images_per_step: of all processes together.
        training_images: in the training set.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        stage: str,
        config: dict,
        first_step: int,
        last_step: int,
        images_per_step: int,
        training_images: int,
    ) -> None:
        self.accelerator, self.stage, self.images_per_step = accelerator, stage, images_per_step
        self.path, self.samples = output_dir / "metrics.jsonl", output_dir / "samples"
        self.main = accelerator.is_main_process
        self.step, self._mark = first_step, (first_step, time.monotonic())
        if self.main:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._cut(first_step)
            self._note_machine(output_dir / "run.json", training_images)
        # TensorBoard's hyper-parameters are numbers and strings
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
        accelerator.init_trackers(stage, config=plain)
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            desc=stage,
            unit="step",
            disable=not self.main,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def _cut(self, first_step: int) -> None:
        if not self.path.exists():
            return
        keep = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run
                continue
            if record["stage"] != self.stage or record["step"] <= first_step:
                keep.append(line + "\n")
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text("".join(keep))
        aside.replace(self.path)

    def _note_machine(self, path: Path, training_images: int) -> None:
        """Write what the stage runs on to run.json, for the model card."""
        noted = json.loads(path.read_text()) if path.exists() else {}
        device = self.accelerator.device
        noted[self.stage] = {
            "training_images": training_images,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads",
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "versions": {"latent_ddpm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(noted, indent=1) + "\n")
        aside.replace(path)

    def advance(self) -> None:
        """One optimizer step is done."""
        self.step += 1
        self.bar.update(1)

    def log(self, **metrics: float) -> None:
        """Record metrics at the current step, with the images seen per second since the last call with a loss.

        A value that is not finite is left out: JSON has no word for it.
        """
        if not self.main:
            return
        if "loss" in metrics:
            steps, now = self.step - self._mark[0], time.monotonic()
            metrics["images_per_second"] = steps * self.images_per_step / max(now - self._mark[1], 1e-9)
            self._mark = (self.step, now)
            shown = {k: f"{metrics[k]:.4g}" for k in ("loss", "psnr", "codebook_usage") if k in metrics}
            self.bar.set_postfix({**shown, "images/s": f"{metrics['images_per_second']:.0f}"}, refresh=False)
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        images = self.step * self.images_per_step
        record = {"stage": self.stage, "step": self.step, "images": images, "time": round(time.time(), 3)}
        record |= {key: float(f"{value:.6g}") for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.accelerator.log({f"{self.stage}/{key}": value for key, value in metrics.items()}, step=self.step)

    def say(self, sentence: str) -> None:
        """A line above the bar, from the main process."""
        if self.main:
            self.bar.write(f"{self.stage} step {self.step}: {sentence}")

    def pause(self) -> None:
        """Restart the clock of images per second: what went before was not training."""
        self._mark = (self.step, time.monotonic())

    def image(self, picture: Image.Image) -> Path:
        """Write a grid to samples/<stage>-<step>.png and send it to the tracker."""
        path = self.samples / f"{self.stage}-{self.step:08d}.png"
        save_png(picture, path)
        pixels = np.asarray(picture.convert("RGB"))
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                # TensorBoard wants a stack of arrays, Weights & Biases a list of pictures
                value = pixels[None] if tracker.name == "tensorboard" else [picture]
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({self.stage: value}, step=self.step, **options)
        return path

    def close(self) -> None:
        """Finish bar and tracker."""
        self.bar.close()
        if self.main:
            for tracker in self.accelerator.trackers:  # not end_training, which also ends the process group
                tracker.finish()
