"""Compare our autoencoder with the recipe from stock parts: same widths, data and time, alternating.

    python benchmarks/benchmark_autoencoder.py --minutes 10 --json docs/results/NAME.json \\
        --config configs/cifar10.yaml --block_out_channels "[32,64,64]" --train_batch_size 32 --learning_rate 1e-3

`--recipes` are `stock` (diffusers' VQModel, squared error plus its commitment loss, AdamW 1e-4) and the quantizers ema,
simvq, fsq and kl. The other options are the keys of train_autoencoder.py. A recipe can have its own keys, in quotes:
`--recipes ema "ema --block_out_channels [16,32,64]"`. Each recipe trains for `--minutes`, in turns of `--turn` seconds,
so that other load on the machine affects all alike. Writes JSON, and beside it a figure and a grid of reconstructions.
`--save_dir DIR` also keeps the trained autoencoders for stage 2 (`--autoencoder DIR/stock`).
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel

from latent_ddpm.autoencoder.equivariance import transform_of
from latent_ddpm.autoencoder.losses import reconstruction_loss
from latent_ddpm.autoencoder.quantizers import images_for_codes
from latent_ddpm.autoencoder.scaling import Moments, fold_normalization, overall_std
from latent_ddpm.autoencoder.stock import new_vqmodel, quantize_indices, to_stock
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, parse_config
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ExampleOrder, eval_batches, open_image_dataset, train_batches
from latent_ddpm.data.images import to_float, to_uint8
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.features import EXTRACTORS, check_installed, frechet_distance
from latent_ddpm.evaluation.grids import reconstruction_grid
from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder
from latent_ddpm.files import folder_name, save_png, write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.ema import EMA
from latent_ddpm.training.launch import run
from latent_ddpm.training.optim import clip_gradients, make_optimizer, set_learning_rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPES = ("stock", "ema", "simvq", "fsq", "kl")


class Stock:
    """diffusers' VQModel, trained as its own example does without the networks that have to be downloaded."""

    def __init__(self, config: AutoencoderConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = new_vqmodel(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, images: torch.Tensor, numbers: torch.Tensor, progress: float) -> None:
        output = self.model(images)
        loss = F.mse_loss(output.sample, images) + output.commit_loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def reconstruct(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.model.encode(images).latents
        return self.model.decode(latents).sample, quantize_indices(self.model, latents)

    def stock_model(self, held_out: list[dict[str, torch.Tensor]], device: torch.device) -> VQModel:
        """As it is, with diffusers' own scaling_factor."""
        return self.model


class Ours:
    """The step of train_autoencoder.py without a discriminator; the learning rate falls with the time used."""

    def __init__(self, config: AutoencoderConfig, device: torch.device) -> None:
        self.config, self.steps = config, 0
        torch.manual_seed(config.seed)
        self.model = Autoencoder(config).to(device)
        self.optimizer = make_optimizer(self.model.parameters(), config, config.learning_rate, config.optimizer)
        self.ema = EMA(self.model, config.ema_decay)
        self.kept: list[torch.Tensor] = []  # the last images, for when the codes enter
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, images: torch.Tensor, numbers: torch.Tensor, progress: float) -> None:
        start = self.config.codebook_start
        self.model.plain = self.ema.model.plain = self.steps < start
        if self.model.plain:
            self.kept = [*self.kept, images][-math.ceil(images_for_codes(self.config) / len(images)) :]
        if self.steps == start:
            self.model.initialize(torch.cat((*self.kept, images)), learned=start > 0)
            if start:
                self.ema.restart(self.model)
        warmed_up = min(1, (self.steps + 1) / max(1, self.config.lr_warmup_steps))
        rate = 0.5 * (1 + math.cos(math.pi * progress)) * warmed_up
        set_learning_rate(self.optimizer, rate * self.config.learning_rate)
        transform = transform_of(self.config.seed, self.steps, self.config.equivariance_share)
        output = self.model(images, numbers, transform)
        images = images if transform is None else transform.apply(images)
        loss = reconstruction_loss(output.reconstruction, images, self.config.reconstruction_loss)
        loss = loss + output.quantized.loss(self.config)
        self.optimizer.zero_grad()
        loss.backward()
        _, kept = clip_gradients(self.optimizer, self.config.max_grad_norm)
        self.optimizer.step()
        if not self.model.plain:
            self.model.quantizer.update(self.steps, kept)
        self.ema.update(self.model, self.steps)
        self.steps += 1

    def reconstruct(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.ema.model(images)
        return output.reconstruction, output.quantized.indices

    @torch.no_grad()
    def stock_model(self, held_out: list[dict[str, torch.Tensor]], device: torch.device) -> VQModel | AutoencoderKL:
        """The averaged weights, with latents of unit variance on held-out images."""
        moments = Moments(self.config.latent_channels)
        for batch in held_out:
            moments.add(self.ema.model.encode(to_float(batch["image"].to(device))))
        mean, variance = moments.result()
        stock = to_stock(self.ema.model.cpu(), self.config)
        fold_normalization(stock, mean, overall_std(variance))
        return stock


def make_recipe(words: list[str], argv: list[str], device: torch.device) -> tuple[Stock | Ours, AutoencoderConfig]:
    """A recipe from its words, the first of which names it, and the keys that all recipes share."""
    name, overrides = words[0], words[1:]
    if name not in RECIPES:
        raise UserError(f"There is no recipe {name}; there are {', '.join(RECIPES)}.")
    words = [*argv, *overrides, "--quantizer", "ema" if name == "stock" else name]
    if name != "fsq":
        words += ["--fsq_levels", "null"]
    elif "--fsq_levels" not in overrides:
        # powers of two, as even as they go: 1,024 codes of 4 channels are 8 * 8 * 4 * 4
        plain = parse_config(AutoencoderConfig, [*words, "--quantizer", "ema", "--fsq_levels", "null"])
        bits, width = plain.num_vq_embeddings.bit_length() - 1, plain.latent_channels
        words += ["--fsq_levels", str([2 ** (bits // width + (i < bits % width)) for i in range(width)])]
    config = parse_config(AutoencoderConfig, words)
    if config.lpips_weight or config.disc_weight or config.gradient_accumulation_steps > 1:
        raise UserError(
            "This benchmark trains on pixels alone, without accumulation: set lpips_weight 0, disc_weight 0 and "
            "gradient_accumulation_steps 1."
        )
    return Stock(config, device) if name == "stock" else Ours(config, device), config


class Contestant:
    """A recipe with its own passage through the data and its own clock."""

    def __init__(
        self, name: str, recipe: Stock | Ours, batches: Iterator[dict[str, torch.Tensor]], num_codes: int
    ) -> None:
        self.name, self.recipe, self.batches, self.num_codes = name, recipe, batches, num_codes
        self.seconds, self.images = 0.0, 0
        self.rates: list[float] = []  # images/s of each turn
        self.curve: list[dict[str, float]] = []

    def take_turn(self, seconds: float, budget: float, device: torch.device) -> None:
        begun, before = time.perf_counter(), self.images
        while (used := time.perf_counter() - begun) < seconds:
            batch = next(self.batches)
            images, numbers = to_float(batch["image"].to(device)), batch["example"].to(device)
            self.recipe.step(images, numbers, min(1.0, (self.seconds + used) / budget))
            self.images += len(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
        self.seconds += used
        self.rates.append((self.images - before) / used)


def draw(contestants: list[Contestant], title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for axis, key, label in zip(axes, ("psnr", "codebook_usage"), ("PSNR (dB)", "codes in use"), strict=True):
        for contestant in contestants:
            points = [point for point in contestant.curve if key in point]  # kl has no codes, others not from the start
            axis.plot(*([p[name] for p in points] for name in ("minutes", key)), marker=".", label=contestant.name)
        axis.set_xlabel("minutes of training")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, 1.02)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def all_reconstructions(reconstruct: Callable, batches: list[dict[str, torch.Tensor]], device: torch.device) -> tuple:
    """uint8 originals and reconstructions (N, C, R, R)."""
    originals = torch.cat([batch["image"] for batch in batches])
    made = torch.cat([reconstruct(to_float(batch["image"].to(device)))[0].cpu() for batch in batches])
    return originals, to_uint8(made)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--turn", type=float, default=20)
    parser.add_argument("--recipes", nargs="+", default=["stock", "ema"])
    parser.add_argument("--feature_extractor", default="efficientnet-lite0", choices=[*EXTRACTORS, "none"])
    parser.add_argument("--frechet_images", type=int, default=1000)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--save_dir", type=Path)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    if options.feature_extractor != "none":
        check_installed(options.feature_extractor)
    config = parse_config(AutoencoderConfig, rest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = options.minutes * 60

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sources = open_sources(config)
        bad = BadImages(scratch / "bad_images.jsonl", sum(map(len, sources)), config.max_bad_image_share)
        train_set, validation_set = (
            open_image_dataset(source, config, scratch / "cache", bad, train=train, is_main=True, wait=lambda: None)
            for source, train in zip(sources, (True, False), strict=True)
        )
        held_out = list(eval_batches(validation_set, 100))
        contestants = []
        for name in options.recipes:
            recipe, own = make_recipe(shlex.split(name), rest, device)
            order = ExampleOrder(len(train_set), own.seed)
            batches = train_batches(train_set, order, 0, 10**9, own.train_batch_size)
            codes = 0 if own.quantizer == "kl" else own.num_vq_embeddings
            contestants.append(Contestant(name, recipe, batches, codes))

        def measure(contestant: Contestant, batches: list) -> dict[str, float]:
            codes = 0 if getattr(contestant.recipe.model, "plain", False) else contestant.num_codes
            return evaluate_autoencoder(contestant.recipe.reconstruct, batches, codes, device)

        turns = math.ceil(budget / options.turn)
        for turn in progress_bar(range(turns), desc="turns", unit="turn"):
            # the order turns round, so that none is always first
            for contestant in contestants if turn % 2 == 0 else reversed(contestants):
                contestant.take_turn(min(options.turn, budget - turn * options.turn), budget, device)
            if turn % max(1, turns // 12) == 0:
                for contestant in contestants:
                    point = {"minutes": contestant.seconds / 60, **measure(contestant, held_out[:5])}
                    contestant.curve.append(point)

        results: dict[str, dict] = {}
        shown = to_float(held_out[0]["image"][:16].to(device))
        reconstructions = []
        stock = next((c for c in contestants if c.name == "stock"), None)
        for contestant in contestants:
            results[contestant.name] = measure(contestant, held_out) | {
                "trained_minutes": contestant.seconds / 60,
                "trained_images": contestant.images,
                "parameters": contestant.recipe.parameters,
                "images_per_second_median": statistics.median(contestant.rates),
                "images_per_second_range": [min(contestant.rates), max(contestant.rates)],
                "curve": contestant.curve,
            }
            if stock is not None:
                ratios = [a / b for a, b in zip(stock.rates, contestant.rates, strict=True)]
                results[contestant.name]["time_per_image_over_stock_median"] = statistics.median(ratios)
                results[contestant.name]["time_per_image_over_stock_quartiles"] = (
                    statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
                )
            with torch.no_grad():
                reconstructions.append(contestant.recipe.reconstruct(shown)[0])

        def write() -> None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            threads = f"cpu, {torch.get_num_threads()} threads"
            result = {
                "command": "python benchmarks/benchmark_autoencoder.py " + shlex.join(argv),
                "feature_extractor": options.feature_extractor,
                "validation_images": len(validation_set),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else threads,
                "torch": torch.__version__,
                "results": results,
            }
            write_json(options.json, result)

        write()  # the distances below take minutes on a CPU
        title = f"{config.resolution} pixels, {config.num_vq_embeddings} codes, widths {config.block_out_channels}"
        draw(contestants, title, options.json.with_suffix(".png"))
        originals = shown.repeat(len(contestants), 1, 1, 1)
        grid = reconstruction_grid(originals, torch.cat(reconstructions), columns=len(shown))
        save_png(grid, options.json.with_name(options.json.stem + "-reconstructions.png"))
        if options.feature_extractor != "none":
            share = held_out[: math.ceil(options.frechet_images / 100)]
            for contestant in progress_bar(contestants, desc="Frechet distances", unit="recipe"):
                originals, made = all_reconstructions(contestant.recipe.reconstruct, share, device)
                distance = frechet_distance(originals, made, options.feature_extractor, device, 64, scratch)
                results[contestant.name] |= {"rfd": distance, "rfd_images": len(made)}
                write()
        for contestant in contestants if options.save_dir is not None else []:
            folder = options.save_dir / folder_name(contestant.name)
            contestant.recipe.stock_model(held_out, device).save_pretrained(folder, safe_serialization=True)
            print(f"{contestant.name}: {folder}")
    for name, figures in results.items():
        print(name, json.dumps({key: value for key, value in figures.items() if key != "curve"}))
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
