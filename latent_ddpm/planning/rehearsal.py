"""Rehearse a stage: run its real training script, skip most of its steps, and time every part.

The script runs as always, with the user's config, data and real step numbers. Only the loop is another one: it makes
some steps of each phase (`phases_of`), then jumps to the steps at which the run validates, writes a checkpoint and
ends. What is done once for each image is done for some images. The times are scaled to the whole run by
latent_ddpm/planning/forecast.py.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from latent_ddpm.config import AutoencoderConfig, RunConfig
from latent_ddpm.data import dataset as dataset_module
from latent_ddpm.data import latents as latents_module
from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.images import CENTRE, to_float
from latent_ddpm.data.sources.base import ImageSource, SubsetSource
from latent_ddpm.files import write_json
from latent_ddpm.resizing import resizer
from latent_ddpm.system import peak_resident_bytes
from latent_ddpm.training.distributed import StopSignal
from latent_ddpm.training.ema import UPDATE_OFTEN_UNTIL, UPDATE_STEPS, PowerEMA
from latent_ddpm.training.loop import TrainingRun

LEAST_STEPS = 2  # measured in a phase, after the warm-up
WARM_UP_STEPS = 3  # which allocate memory, and choose kernels on a GPU
LEAST_IMAGES = 64  # decoded, encoded or evaluated, where there are so many
STEPS_SHARE = 0.6  # of the time that is left after the start, for steps
PART_SHARE = 0.08  # of the time, for each part that is done for some of the images
MAPPED_AT_ONCE = 2**16  # bytes around an address that Linux maps with it
ENDLESS = 10**12  # batches
TRIED_IMAGES = 16  # decoded or encoded to see how long an image takes


def phases_of(config: RunConfig) -> dict[str, range]:
    """The phases of a stage, in each of which all steps take about the same time: their steps, by name.

    Args:
        config: of the stage, in steps.
    """
    last = config.max_train_steps
    if isinstance(config, AutoencoderConfig):
        begins = {0: "plain" if config.codebook_start else "autoencoder"}
        if config.codebook_start:
            begins[config.codebook_start] = "codes"
        if config.disc_weight > 0:
            begins[config.disc_start] = "discriminator"
            if config.disc_adaptive_steps is not None:
                begins[config.disc_start] = "discriminator alone"
                begins[config.disc_start + config.disc_adaptive_steps] = "discriminator"
    else:
        begins = {0: "averages updated every step", UPDATE_OFTEN_UNTIL: "averages updated less often"}
    starts = sorted(start for start in begins if start < last)
    return {begins[a]: range(a, b) for a, b in itertools.pairwise([*starts, last])}


def images_per_step(config: RunConfig) -> int:
    """Images of an optimizer step in one process."""
    return config.train_batch_size * config.gradient_accumulation_steps


class First:
    """The first `count` items of a dataset or latent cache, which otherwise is as it was."""

    def __init__(self, of: Any, count: int) -> None:
        self._of, self._count = of, min(count, len(of))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return self._of[number]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__getitems__":
            raise AttributeError(name)
        return getattr(self._of, name)


class Rehearsal:
    """The times of a rehearsal, and the functions that take them.

    Args:
        script: the module of a training script; its functions are replaced.
        stage: "autoencoder" or "unet".
        seconds: how long the rehearsal may take, from the start of the process on. It takes longer where single steps
            or images take long.
        decode: how many images of a split ("train", "validation") to decode ahead, where that is known.

    Attributes:
        found: what is written: see `finish`.
    """

    def __init__(
        self, script: ModuleType, stage: str, seconds: float, decode: dict[str, int | None] | None = None
    ) -> None:
        self.script, self.stage, self.seconds = script, stage, seconds
        self.decode = decode or {}
        self.begun = psutil.Process().create_time()
        self.stops = 0  # steps that are rehearsed only for what is due at them
        self.events: dict[str, list[dict[str, float]]] = {}
        self.phases: dict[str, dict[str, float]] = {}
        self.images: dict[str, int] = {}
        self.decoded = 0  # images that the real run decodes ahead
        self.step_seconds = 0.0  # of the steps measured so far
        self._maps: dict[str, tuple[int, int, int]] = {}  # images here, in the run, and bytes of each, by split
        self._encoded: list[int] = []
        self._inside: list[np.ndarray] = []  # both times of the parts within each part that is being timed
        self._top = np.zeros(2)  # both times of all parts that are in no other
        self._whole: dict[int, int] = {}  # number of images of the whole source, by the id of the source used here
        self.config: Any = None
        self._replace()

    # ------------------------------------------------------------------------------------------------- the clock

    def _now(self) -> np.ndarray:
        """Seconds by the clock and of the processor: float64 (2,)."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return np.array([time.monotonic(), time.process_time()])

    @contextlib.contextmanager
    def part(self, name: str, units: float = 1.0) -> Iterator[dict[str, float]]:
        """Time a part of the run, without the parts inside it.

        Args:
            name: of the part.
            units: number of things that it does, such as images. The yielded dict holds it and can be changed.
        """
        sample = {"units": units, "seconds": 0.0, "processor_seconds": 0.0}
        self._inside.append(np.zeros(2))
        begun = self._now()
        try:
            yield sample
        finally:
            whole = self._now() - begun
            sample["seconds"], sample["processor_seconds"] = (whole - self._inside.pop()).tolist()
            if self._inside:
                self._inside[-1] += whole
            else:
                self._top = self._top + whole
            self.events.setdefault(name, []).append(sample)

    def _wrap(self, owner: Any, name: str, part: str, units: Callable[..., float] | None = None) -> None:
        """Time every call of a function; `units` gets its arguments."""
        real = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part, units(*args, **kwargs) if units else 1.0):
                return real(*args, **kwargs)

        setattr(owner, name, timed)

    def _affordable(self, seconds_each: float, share: float = PART_SHARE) -> int:
        """How many things of so many seconds fit the time for a part."""
        return int(share * self.seconds / max(seconds_each, 1e-9))

    # ----------------------------------------------------------------------------------------- what is replaced

    def _replace(self) -> None:
        rehearsal, script = self, self.script
        TrainingRun.steps = lambda run: rehearsal.journey(run)
        self._wrap(TrainingRun, "save", "checkpoint")
        self._wrap(dataset_module, "_write_cache", "decode", self._note_decoding)
        sources_in = script if self.stage == "autoencoder" else latents_module
        self._open_sources = sources_in.open_sources
        sources_in.open_sources = self._some_images
        # the stops are steps beyond those of a short run
        name, place = ("train_batches", 3) if self.stage == "autoencoder" else ("read_ahead", 2)
        real = getattr(script, name)
        setattr(script, name, lambda *args, **kwargs: real(*args[:place], ENDLESS, *args[place + 1 :], **kwargs))
        if self.stage == "autoencoder":
            self._evaluate = script.evaluate_autoencoder
            script.evaluate_autoencoder = self._evaluate_some
            self._wrap(script, "validate", "grid")
            self._wrap(script, "replace_folder", "export")
            self._export = script.export
            script.export = self._normalize_some
            return
        self._build_cache = latents_module.build_cache
        latents_module.build_cache = self._encode_some
        self._wrap(script, "make_conditions", "conditions", lambda config, images, *_: sum(map(len, images)))
        self._validation_loss, self._draw_grid = script.validation_loss, script.draw_grid
        script.validation_loss, script.draw_grid = self._validation_loss_of_some, self._draw_some
        self._wrap(script, "validate", "validation")
        self._wrap(script, "export_pipeline", "export")
        self._wrap(PowerEMA, "save_snapshots", "snapshot")

    def _some_images(self, config: RunConfig) -> tuple[ImageSource, ImageSource]:
        """The sources; where decoding all images ahead takes long, some of them."""
        self.config = config
        sources = self._open_sources(config)
        self.images = {"train": len(sources[0]), "validation": len(sources[1])}
        each = config.resolution**2 * config.image_channels
        chosen = []
        for split, source in zip(("train", "validation"), sources, strict=True):
            used = source
            ahead = config.center_crop or not (split == "train" and self.stage == "autoencoder")
            if ahead and source.squares() is None and len(source) * each <= config.image_cache_gib * 2**30:
                count = self.decode.get(split)
                if count is None:
                    seconds = self._seconds_to_decode(source, config)
                    count = max(LEAST_IMAGES, self._affordable(seconds))
                self.decode[split] = count = min(count, len(source))
                if count < len(source):
                    used = SubsetSource(source, np.linspace(0, len(source) - 1, count).astype(np.int64))
                self._whole[id(used)] = len(source)
                self._maps[split] = (len(used), len(source), each)
            chosen.append(used)
        return chosen[0], chosen[1]

    def _seconds_to_decode(self, source: ImageSource, config: RunConfig) -> float:
        tried = np.linspace(0, len(source) - 1, min(TRIED_IMAGES, len(source))).astype(int).tolist()
        library = resizer(config.image_resize)
        with self.part("trial") as sample:
            for k in tried:
                decode_square(source, k, config.resolution, config.image_channels, CENTRE, library)
        return sample["seconds"] / len(tried)

    def _note_decoding(self, folder: Path, source: ImageSource, *_: Any) -> float:
        self.decoded += self._whole[id(source)]
        return len(source)

    def _evaluate_some(self, reconstruct: Any, batches: Any, num_codes: int, device: Any, with_ssim: bool) -> dict:
        config = self.config
        batch_seconds = self.step_seconds / config.gradient_accumulation_steps / 2
        count = max(1, self._affordable(batch_seconds))
        with self.part("last evaluation" if with_ssim else "evaluation") as sample:
            measured = self._evaluate(reconstruct, itertools.islice(batches, count), num_codes, device, with_ssim)
            sample["units"] = measured["images"]
        return measured

    def _normalize_some(self, run: TrainingRun, *args: Any) -> None:
        image_seconds = self.step_seconds / run.images_per_step / 4
        whole = self.script.NORMALIZATION_IMAGES
        bound = self.script.NORMALIZATION_IMAGES = max(LEAST_IMAGES, self._affordable(image_seconds))
        self.images["normalization"] = whole
        try:
            with self.part("normalization") as sample:
                batch, available = run.config.train_batch_size, len(args[1])
                sample["units"] = min(available, batch * math.ceil(min(bound, whole) / batch))
                self._export(run, *args)
        finally:
            self.script.NORMALIZATION_IMAGES = whole

    @torch.no_grad()
    def _encode_some(self, encode: Any, images: Any, folder: Path, key: dict, batch_size: int, device: Any,
                     *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        versions, tried = 2 if key["flip"] else 1, min(batch_size, TRIED_IMAGES, len(images))
        with self.part("trial"):
            batch = to_float(torch.stack([images.get(i) for i in range(tried)]).to(device))
            encode(batch)
        with self.part("trial") as sample:
            encode(batch)
        seconds = versions * sample["seconds"] / tried
        count = max(LEAST_IMAGES, batch_size, self._affordable(seconds))
        some = First(images, count)
        with self.part("encode", versions * len(some)):
            cache = self._build_cache(encode, some, folder, key, batch_size, device, *args, **kwargs)
        self._encoded.append(len(some))
        self.images["versions"] = max(versions, self.images.get("versions", 1))
        return cache

    def _validation_loss_of_some(self, run: TrainingRun, averaged: Any, held_out: Any, conditions: Any) -> float:
        batch_seconds = self.step_seconds / run.config.gradient_accumulation_steps / 2
        some = First(held_out, run.config.train_batch_size * max(1, self._affordable(batch_seconds)))
        with self.part("evaluation", len(some)):
            return self._validation_loss(run, averaged, some, conditions)

    def _draw_some(self, run: TrainingRun, data: Any, unet: Any) -> None:
        config = run.config
        passes = config.num_inference_steps * (2 if config.guidance_scale != 1 else 1)
        each = passes * self.step_seconds / run.images_per_step / 3
        count = min(config.num_validation_samples, max(4, self._affordable(each, 2 * PART_SHARE)))
        real = config.num_validation_samples
        try:
            config.num_validation_samples = count
            with self.part("grid", count):
                self._draw_grid(run, data, unet)
        finally:
            config.num_validation_samples = real

    # -------------------------------------------------------------------------------------------------- the steps

    def journey(self, run: TrainingRun) -> Iterator[int]:
        """Replaces `TrainingRun.steps`: the numbers of the steps that are rehearsed."""
        run._signal = StopSignal()
        self.config = config = run.config
        left = self.seconds - (time.time() - self.begun)
        budget = max(STEPS_SHARE * left, 0.25 * self.seconds)
        phases = phases_of(config)
        weights = {name: len(steps) / config.max_train_steps + 0.3 / len(phases) for name, steps in phases.items()}
        for name, steps in phases.items():
            yield from self._phase(run, name, steps, budget * weights[name] / sum(weights.values()))
        for step in self._stops(config, 1):
            yield self._stop(run, step)
        for step in self._stops(config, 2):
            if time.time() - self.begun < 0.7 * self.seconds:
                yield self._stop(run, step)
        yield self._stop(run, config.max_train_steps - 1)

    def _stops(self, config: Any, before_end: int) -> list[int]:
        """Steps at which validations, checkpoints and snapshots fall due: of each kind the last, or the one before."""
        last, intervals = config.max_train_steps, [config.validation_steps, config.checkpointing_steps]
        if getattr(config, "ema_snapshots", 0):
            intervals.append(math.ceil(last / config.ema_snapshots))
        stops = {every * ((last - 1) // every + 1 - before_end) - 1 for every in intervals}
        return sorted(step for step in stops if step >= 0)

    def _stop(self, run: TrainingRun, step: int) -> int:
        self.stops += 1
        return self._at(run, step)

    def _at(self, run: TrainingRun, step: int) -> int:
        run.step = run.tracker.step = step
        return step

    def _phase(self, run: TrainingRun, name: str, steps: range, seconds: float) -> Iterator[int]:
        workers = self.config.dataloader_num_workers
        prefetched = 2 * workers if self.stage == "autoencoder" and not self.decoded else 0
        together = UPDATE_STEPS if self.stage == "unet" else 1  # averages are updated in one of so many steps
        begun, numbers, warm, counted = time.monotonic(), iter(steps), 0, 0
        before = self._now() - self._top  # without the parts, which are timed apart
        for step in numbers:
            if warm >= WARM_UP_STEPS + prefetched or (warm and time.monotonic() - begun > seconds / 3):
                numbers = itertools.chain([step], numbers)
                before = self._now() - self._top
                break
            self.step_seconds = self.step_seconds or 0.1 * (time.time() - self.begun)  # before a step is measured
            last = self._now() - self._top
            yield self._at(run, step)
            warm += 1
            self.step_seconds = (self._now() - self._top - last)[0]
        for step in numbers:
            enough = counted >= LEAST_STEPS and counted % together == 0
            if enough and time.monotonic() - begun > seconds:
                break
            yield self._at(run, step)
            counted += 1
            self.step_seconds = (time.monotonic() - self._top[0] - before[0]) / counted
        spent = self._now() - self._top - before
        if not counted:  # the phase is over before the warm-up
            counted, warm = warm, 0
        each = (spent / counted).tolist()
        self.phases[name] = {"rehearsed": counted + warm, "seconds": each[0], "processor_seconds": each[1]}
        self.step_seconds = each[0]

    # --------------------------------------------------------------------------------------------------- result

    def _mapped(self, whole: bool) -> int:
        """Bytes of decoded images in memory, which are mapped from their file: here, or in the whole run."""
        total, normalized = 0.0, sum(sample["units"] for sample in self.events.get("normalization", ()))
        for split, (here, of_run, each) in self._maps.items():
            images, share = of_run if whole else here, 1.0
            if split == "train" and self.stage == "autoencoder":
                steps = sum(phase["rehearsed"] for phase in self.phases.values())
                read = images_per_step(self.config) * (self.config.max_train_steps if whole else steps)
                at_once = max(each, MAPPED_AT_ONCE)
                share = min(1.0, read * at_once / (images * each))
                ahead = min(1.0, (self.images["normalization"] if whole else normalized) / images)
                share = 1 - (1 - share) * (1 - ahead)
            elif split == "train" and not whole:
                share = min(1.0, self._encoded[0] / images)
            total += share * images * each
        return int(total)

    def finish(self, path: Path) -> None:
        """Write what was measured as JSON.

        phases: seconds of a step, by the clock and of the processor, and number of rehearsed steps, of each phase.
        stops: further steps. events: seconds and units of each part. images: numbers of images of the whole data.
        decode: images of each split that were decoded ahead. peak_bytes: the largest memory of this process, and on a
        GPU of the device (`device_peak_bytes`).
        """
        gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        found = {
            "phases": self.phases,
            "stops": self.stops,
            "events": self.events,
            "images": self.images | {"decoded": self.decoded},
            "decode": self.decode,
            "train_batch_size": self.config.train_batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "peak_bytes": peak_resident_bytes(),
            "mapped_bytes": self._mapped(whole=False),
            "mapped_bytes_of_run": self._mapped(whole=True),
            "device_peak_bytes": torch.cuda.max_memory_reserved() if gpu else None,
            "device_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else psutil.virtual_memory().total,
            "device": torch.cuda.get_device_name(0) if gpu else f"CPU, {torch.get_num_threads()} threads",
            "threads": torch.get_num_threads(),
        }
        write_json(path, found)


def rehearse(
    script: ModuleType, stage: str, argv: list[str], seconds: float, decode: dict[str, int | None], result: Path
) -> int:
    """Rehearse a stage in this process, whose functions stay replaced; returns the script's exit status.

    Args:
        script: the module of the training script, which has `main`.
        stage: "autoencoder" or "unet".
        argv: the script's command line, with an output_dir of its own.
        seconds, decode: see `Rehearsal`.
        result: JSON file to write; see `Rehearsal.finish`.
    """
    rehearsal = Rehearsal(script, stage, seconds, decode)
    status = script.main(argv)
    if not status:
        rehearsal.finish(result)
    return status
