"""Compare our diffusion training with the recipe from stock parts: same network and time, alternating.

    python benchmarks/benchmark_diffusion.py --minutes 30 --work_dir outputs/diffusion --json docs/results/NAME.json \\
        --config configs/cifar10.yaml --autoencoder outputs/cifar10/autoencoder

`--recipes` are `stock` (the settings of diffusers' example: epsilon, linear betas, AdamW 1e-4, cosine decay, EMA;
UNet2DModel's own initialization) and `ours`. The other options are the keys of train_unet.py. A recipe can have its own
keys, in quotes: `--recipes ours "ours --loss_weighting edm" "stock --autoencoder DIR"`. Each recipe trains for
`--minutes`, in turns of `--turn` seconds, so that other load on the machine affects all alike, and writes its pipeline
to `--work_dir`. Then each draws `--num_images` from the same noise, and scripts/evaluate.py compares them with the
training images. A conditional recipe (`"ours --conditions [class]"`) gets the conditions of the training images, with
each of `--guidance_scales`; the best scale counts. A second call only measures what is already trained. Writes JSON,
and a grid of samples beside it.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image

from latent_ddpm.autoencoder.scaling import fold_normalization
from latent_ddpm.autoencoder.stock import autoencoder_folder, check_autoencoder_fits, load_autoencoder
from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data.dataset import ExampleOrder
from latent_ddpm.data.latents import images_for_run, latents_for_run
from latent_ddpm.diffusion.conditions import make_conditions, to_device, unet_inputs
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.features import EXTRACTORS, check_installed
from latent_ddpm.files import folder_name, write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.publishing.export import export_pipeline
from latent_ddpm.random import Stream, uniform
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.launch import run
from latent_ddpm.training.optim import clip_gradients, learning_rate_factor, make_optimizer, set_learning_rate
from pipeline_latent_ddpm import latent_channels_of

ROOT = Path(__file__).resolve().parent.parent
STOCK_STEPS = 50  # of DDIM: what LDMPipeline does unless told otherwise
SCHEDULE_STEPS = 100_000  # a schedule in time is one in so many steps


class Trainer:
    """What both recipes share: an autoencoder, its latents, the order of the examples."""

    def __init__(self, config: UNetConfig, device: torch.device) -> None:
        self.config, self.device, self.steps = config, device, 0
        self.autoencoder = load_autoencoder(autoencoder_folder(config)).to(device)
        self.size = check_autoencoder_fits(self.autoencoder, config)
        self.images = images_for_run(config, True, lambda: None)
        self.latents, _ = latents_for_run(config, self.autoencoder, device, True, lambda: None, self.images)
        self.order = ExampleOrder(len(self.latents), config.seed)
        torch.manual_seed(config.seed)

    def next_examples(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray | None, torch.Tensor]:
        """Normalized latents (B, D, h, w) of the next examples, their records, which are mirrored, their numbers."""
        start = self.steps * self.config.train_batch_size
        numbers = torch.arange(start, start + self.config.train_batch_size)
        flipped = (uniform(self.config.seed, Stream.FLIP, numbers) < 0.5).numpy() if self.latents.flips else None
        records = self.latents.records(self.order.indices(np.asarray(numbers)))
        return self.latents.normalized(records, flipped).to(self.device), records, flipped, numbers


class Ours(Trainer):
    """The step of train_unet.py; after the warm-up in steps, the learning rate falls with the time used."""

    def __init__(self, config: UNetConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.conditions, _ = make_conditions(config, self.images, self.size, self.latents.flips, device, lambda: None)
        fold_normalization(self.autoencoder, self.latents.mean, self.latents.std)
        channels, told = latent_channels_of(self.autoencoder), self.conditions.unet_arguments()
        self.unet = make_unet(config, channels, self.size, **told).to(device)
        self.optimizer = make_optimizer(self.unet.parameters(), config, config.learning_rate, config.optimizer)
        self.ema = PowerEMA(self.unet, config.ema_sigma_rels)
        table = noise_table(config)
        self.table = table.to(device) if table is not None else None
        self.timed = dataclasses.replace(config, lr_warmup_steps=0, lr_decay_steps=None, max_train_steps=SCHEDULE_STEPS)

    def step(self, progress: float) -> None:
        warmed_up = min(1.0, (self.steps + 1) / max(1, self.config.lr_warmup_steps))
        rate = warmed_up * learning_rate_factor(int(progress * SCHEDULE_STEPS), self.timed)
        set_learning_rate(self.optimizer, rate * self.config.learning_rate)
        clean, records, flipped, numbers = self.next_examples()
        batch = training_batch(clean, numbers.to(self.device), self.config, self.table)
        given = to_device(self.conditions.given(records, flipped, numbers), self.device)
        noisy, words = unet_inputs(batch.noisy, given)
        batch.loss(self.unet(noisy, batch.timesteps, **words).sample).backward()
        clip_gradients(self.optimizer, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.unet, self.steps)
        self.steps += 1

    def export(self, folder: Path) -> int:
        """Write the pipeline; returns its sampling steps."""
        scheduler = sampling_scheduler(self.config)
        steps, known = self.config.num_inference_steps, self.conditions.pipeline_arguments()
        export_pipeline(folder, self.autoencoder, self.ema.model, scheduler, steps, **known)
        return steps


class Stock(Trainer):
    """diffusers' unconditional training example on the latents as its autoencoder scales them."""

    def __init__(self, config: UNetConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.unet = make_unet(config, latent_channels_of(self.autoencoder), self.size, zero_branches=False)
        self.unet.to(device)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(self, progress: float) -> None:
        warmed_up = min(1.0, (self.steps + 1) / 500)
        set_learning_rate(self.optimizer, 1e-4 * warmed_up * 0.5 * (1 + math.cos(math.pi * progress)))
        normalized, *_ = self.next_examples()
        as_encoded = normalized * self.latents.std + self.latents.mean.view(-1, 1, 1).to(self.device)
        clean = as_encoded * self.autoencoder.config.scaling_factor
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=self.device)
        prediction = self.unet(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        F.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        self.steps += 1

    def export(self, folder: Path) -> int:
        """Write the pipeline; returns its sampling steps."""
        self.ema.copy_to(self.unet.parameters())
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)
        export_pipeline(folder, self.autoencoder, self.unet, scheduler, STOCK_STEPS)
        return STOCK_STEPS


RECIPES = {"stock": Stock, "ours": Ours}


class Contestant:
    """A recipe with its own clock.

    Args:
        name: the recipe, and keys of its own.
        argv: the keys that all share.
        work_dir: holds the folder of each.
    """

    def __init__(self, name: str, argv: list[str], work_dir: Path) -> None:
        kind, *own = shlex.split(name)
        if kind not in RECIPES:
            raise UserError(f"There is no recipe {kind}; there are {', '.join(RECIPES)}.")
        self.name, self.words, self.recipe = name, [*argv, *own], RECIPES[kind]
        self.folder = work_dir / folder_name(name)
        self.data_words = [*self.words, "--output_dir", str(work_dir / "data")]  # images and latents, of all recipes
        self.config = parse_config(UNetConfig, self.data_words)
        if self.config.gradient_accumulation_steps > 1:
            raise UserError("This benchmark does not accumulate: set gradient_accumulation_steps 1.")
        if self.config.conditions and kind == "stock":
            raise UserError("The stock recipe has no conditions.")
        self.record_path = self.folder / "benchmark.json"
        self.seconds, self.rates = 0.0, []

    def is_trained(self, minutes: float) -> bool:
        """Whether an earlier call has trained it.

        Raises:
            UserError: it did, but something else.
        """
        if not self.record_path.exists():
            return False
        if json.loads(self.record_path.read_text(encoding="utf-8"))["asked"] != [minutes, *self.words]:
            raise UserError(f"{self.folder} holds another run. Give another --work_dir, or remove that folder.")
        return True

    def begin(self, device: torch.device) -> None:
        """Make the networks and, where they are missing, the latents."""
        self.trainer = self.recipe(self.config, device)

    def take_turn(self, seconds: float, budget: float, device: torch.device) -> None:
        """Train for so many seconds of a budget of so many."""
        begun, before = time.perf_counter(), self.trainer.steps
        while (used := time.perf_counter() - begun) < seconds:
            self.trainer.step(min(1.0, (self.seconds + used) / budget))
            if device.type == "cuda":
                torch.cuda.synchronize()
        self.seconds += used
        self.rates.append((self.trainer.steps - before) * self.config.train_batch_size / used)

    def finish(self, minutes: float) -> None:
        """Leave the pipeline, and a record of the training."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = self.trainer.export(self.folder / "pipeline")
        record = {
            "asked": [minutes, *self.words],
            "trained_minutes": self.seconds / 60,
            "trained_images": self.trainer.steps * self.config.train_batch_size,
            "parameters": self.trainer.unet.num_parameters(),
            "rates": self.rates,
            "sampling_steps": steps,
        }
        self.record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def figures(self, options: argparse.Namespace) -> dict:
        """What training left, and what scripts/evaluate.py says of the samples."""
        record = json.loads(self.record_path.read_text(encoding="utf-8"))
        path = self.folder / "evaluation.json"
        words = [*self.data_words, "--pipeline", self.folder / "pipeline"]
        words += ["--steps", record["sampling_steps"], "--num_images", options.num_images, "--json", path]
        words += ["--feature_extractor", options.feature_extractor, *options.evaluation_words]
        if self.config.conditions and options.guidance_scales:
            words += ["--guidance_scales", *options.guidance_scales]
        if not path.exists():
            script = [sys.executable, ROOT / "scripts" / "evaluate.py", "pipeline"]
            if subprocess.run([str(word) for word in [*script, *words]]).returncode:
                raise UserError(f"{self.name} could not be measured.")
        rates = record.pop("rates")
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        more = {"settings": settings} if len(settings) > 1 else {}
        return {
            **{key: value for key, value in record.items() if key != "asked"},
            "images_per_second_median": statistics.median(rates),
            "images_per_second_range": [min(rates), max(rates)],
            **{f"sampled_{key}" if key == "images_per_second" else key: value for key, value in
               min(settings, key=lambda setting: setting["fd"]).items()},
            **more,
        }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--turn", type=float, default=20)
    parser.add_argument("--recipes", nargs="+", default=["stock", "ours"])
    parser.add_argument("--feature_extractor", default="efficientnet-lite0", choices=EXTRACTORS)
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--evaluation_words", type=shlex.split, default=[])
    parser.add_argument("--guidance_scales", type=float, nargs="+")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    check_installed(options.feature_extractor, "matplotlib")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = options.minutes * 60
    contestants = [Contestant(name, rest, options.work_dir) for name in options.recipes]
    training = [contestant for contestant in contestants if not contestant.is_trained(options.minutes)]
    for contestant in training:
        contestant.begin(device)
    turns = math.ceil(budget / options.turn) if training else 0
    for turn in progress_bar(range(turns), desc="turns", unit="turn"):
        # the order turns round, so that none is always first
        for contestant in training if turn % 2 == 0 else reversed(training):
            contestant.take_turn(min(options.turn, budget - turn * options.turn), budget, device)
    for contestant in training:
        contestant.finish(options.minutes)

    results: dict[str, dict] = {}
    sheet = []
    for contestant in contestants:
        results[contestant.name] = contestant.figures(options)
        with Image.open(contestant.folder / "evaluation-samples.png") as picture:
            sheet.append(picture.copy())
    stock = next((results[c.name] for c in contestants if c.recipe is Stock), None)
    for figures in results.values():
        if stock is not None and figures is not stock:
            figures["fd_over_stock"] = figures["fd"] / stock["fd"]
            figures["images_per_second_over_stock"] = (
                figures["images_per_second_median"] / stock["images_per_second_median"]
            )
    result = {
        "command": "python benchmarks/benchmark_diffusion.py " + shlex.join(argv),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "results": results,
    }
    write_json(options.json, result)
    columns = max(picture.width for picture in sheet)
    page = Image.new(sheet[0].mode, (columns, sum(picture.height for picture in sheet) + 8 * (len(sheet) - 1)), "white")
    top = 0
    for picture in sheet:
        page.paste(picture, (0, top))
        top += picture.height + 8
    page.save(options.json.with_suffix(".png"))
    for name, figures in results.items():
        print(name, json.dumps(figures))
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
