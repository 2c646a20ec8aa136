"""Search recipes on one GPU: train many small autoencoders and U-Nets at once, each for the steps of its CPU minutes.

    python benchmarks/search_recipes.py --jobs docs/results/recipes/NAME.yaml --sets_dir outputs/sets \\
        --json docs/results/recipes/NAME.json --seconds 400

Each training step, with optimizer and averages, is one CUDA graph, and each run has a stream of its own, so that the
small kernels of many runs fill the GPU. On a CPU it does the same without graphs: `--at_once 1`, and `--steps 4` for a
try. `--only digits icons` trains the runs of these sets.

The jobs are a YAML file. `autoencoders` and `unets` hold named recipes: the keys of a training script, and `ms`, the
milliseconds of a step on two CPU cores. `minutes` are those of both stages; a recipe gets as many steps as fit them,
with the guidance in the weights. `runs` lists what to train: sets (benchmark_recipes.py names them), an autoencoder,
its U-Nets, and a seed. Runs that are listed first begin first.

Beside the keys of the scripts, an autoencoder can have `late: {from: 0.6, noise: 0.2, half: 0.25}`: in the last part of
its training, noise on the latents, and a share of steps on halved latents and images (arXiv 2502.14831). A U-Net can
have `noises: k` (the nearest of k noises, arXiv 2505.18521), `dispersive: weight` (arXiv 2506.09027), `learned_weights:
true` (arXiv 2312.02696, eq. 15), `guidance_steps` and `guidance`. `stock: true` is the recipe from stock parts. Only
`kl` and stock autoencoders can be captured: the other quantizers change their codes outside the graph.

Writes the Frechet distance (EfficientNet-Lite0) of each autoencoder's reconstructions and each U-Net's samples, without
and with guidance in the weights, as JSON, and a picture of the samples.
"""

import argparse
import copy
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

from latent_ddpm.autoencoder import equivariance, posterior
from latent_ddpm.autoencoder.losses import reconstruction_loss
from latent_ddpm.autoencoder.stock import new_vqmodel
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.diffusion.noise_schedule import noise_levels, noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import add_noise, loss_weight, target
from latent_ddpm.diffusion.quality import gaussian_distance
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.evaluation.digits import digit_tensors
from latent_ddpm.evaluation.features import extract_features, load_extractor
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png, write_json
from latent_ddpm.training.ema import gamma_of
from latent_ddpm.training.optim import orthogonalize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS = {"digits": 1, "gray": 1}  # of the other sets: 3
AUTOENCODER = {"norm_num_groups": 8, "quantizer": "kl", "reconstruction_loss": "l2", "train_batch_size": 32}
AUTOENCODER |= {"optimizer": "muon", "learning_rate": 2e-3, "adam_beta2": 0.95, "adam_weight_decay": 0.0}
UNET = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "loss_weighting": "uniform"}
UNET |= {"timestep_sampling": "logit_normal", "optimizer": "muon", "learning_rate": 1.4e-3, "adam_weight_decay": 0.0}
OWN = ("ms", "stock", "late", "noises", "dispersive", "learned_weights", "guidance_steps", "guidance")
GUIDANCE_STEP = 2.0  # steps of the main training that a step with guidance takes
WEAK = 0.125  # the early average that guides: after this share of the steps
SHOWN = 16  # images of each recipe in the picture


class Optimizer:
    """Muon or AdamW (latent_ddpm/training/optim.py) with clipping and schedule, all on the device.

    Args:
        parameters: of the network.
        muon: whether Muon updates the matrices.
        rate: peak learning rate.
        betas, decay: of AdamW.
        steps, warmup: of the schedule.
        schedule: "cosine" or "linear" decay to 0, or "constant".
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        muon: bool,
        rate: float,
        betas: tuple[float, float],
        decay: float,
        steps: int,
        warmup: int,
        schedule: str = "cosine",
    ) -> None:
        self.parameters, self.rate, self.betas, self.decay = parameters, rate, betas, decay
        self.steps, self.warmup, self.schedule = steps, max(1, warmup), schedule
        self.done = torch.zeros((), device=DEVICE, dtype=torch.float64)
        matrices = [muon and p.ndim >= 2 and min(len(p), p.numel() // len(p)) >= 16 for p in parameters]
        self.matrices = [number for number, is_matrix in enumerate(matrices) if is_matrix]
        self.others = [number for number, is_matrix in enumerate(matrices) if not is_matrix]
        self.momenta = [torch.zeros_like(parameters[k]) for k in self.matrices]
        self.first = [torch.zeros_like(parameters[k]) for k in self.others]
        self.second = [torch.zeros_like(parameters[k]) for k in self.others]

    def _rate_now(self) -> torch.Tensor:
        progress = ((self.done - self.warmup) / max(1, self.steps - self.warmup)).clamp(0, 1)
        factor = {
            "cosine": 0.5 * (1 + torch.cos(math.pi * progress)),
            "linear": 1 - progress,
            "constant": torch.ones_like(progress),
        }[self.schedule]
        return (self.rate * factor * ((self.done + 1) / self.warmup).clamp(max=1)).float()

    @torch.no_grad()
    def step(self, loss: torch.Tensor) -> None:
        """Differentiate the loss, clip the gradients to a norm of 1, and update the parameters."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (1 / (norm + 1e-6)).clamp(max=1.0))
        rate = self._rate_now()
        self.done += 1
        if self.decay:
            torch._foreach_mul_(self.parameters, 1 - rate * self.decay)
        if self.matrices:
            mine = [gradients[k] for k in self.matrices]
            torch._foreach_lerp_(self.momenta, mine, 0.05)
            nesterov = torch._foreach_lerp(mine, self.momenta, 0.95)
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for k, update in enumerate(nesterov):
                by_shape.setdefault(tuple(update.flatten(1).shape), []).append(k)
            for shape, numbers in by_shape.items():
                updates = orthogonalize(torch.stack([nesterov[k].flatten(1) for k in numbers]))
                updates *= 0.2 * max(shape) ** 0.5 * rate
                for k, update in zip(numbers, updates, strict=True):
                    p = self.parameters[self.matrices[k]]
                    p.sub_(update.view_as(p))
        if self.others:
            mine, (b1, b2) = [gradients[k] for k in self.others], self.betas
            torch._foreach_lerp_(self.first, mine, 1 - b1)
            torch._foreach_mul_(self.second, b2)
            torch._foreach_addcmul_(self.second, mine, mine, 1 - b2)
            scale = torch._foreach_sqrt(self.second)
            torch._foreach_div_(scale, (1 - b2**self.done).float().sqrt())
            torch._foreach_add_(scale, 1e-8)
            updates = torch._foreach_div(self.first, scale)
            torch._foreach_mul_(updates, rate / (1 - b1**self.done).float())
            torch._foreach_sub_([self.parameters[k] for k in self.others], updates)


class Average:
    """An average of a network's weights; `decay` maps the update's number, from 1 on, to its decay."""

    def __init__(self, network: nn.Module, decay: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.network, self.decay = copy.deepcopy(network).eval().requires_grad_(False), decay
        self.count = torch.zeros((), device=DEVICE, dtype=torch.float64)
        self.source, self.averages = list(network.parameters()), list(self.network.parameters())

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights as they are."""
        self.count += 1
        decay = self.decay(self.count).float()
        torch._foreach_mul_(self.averages, decay)
        torch._foreach_add_(self.averages, torch._foreach_mul(self.source, 1 - decay))


def power_function(sigma_rel: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The decay of an average by a power function (arXiv 2312.02696)."""
    gamma = gamma_of(sigma_rel)
    return lambda count: (1 - 1 / count) ** (gamma + 1)


class LossWeights(nn.Module):
    """u of a noise level: the loss is error / exp(u) + u (arXiv 2312.02696, eq. 15)."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        """Noise levels (B,) -> (B,)."""
        x = level.clamp(1e-3, 1e3).log()[:, None].float() / 4
        return self.linear(math.sqrt(2) * torch.cos(x * self.frequencies + self.phases))[:, 0]


# ------------------------------------------------------------------------------------------------------------- runs


class Run:
    """A training whose step can be captured.

    Attributes:
        steps: of the training.
        modes: the functions of a step, by name; `mode_of` maps the step's number to a name.
        events: functions by the number of the step before which they are called.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.modes: dict[str, Callable[[], None]] = {"": self.step}
        self.mode_of: Callable[[int], str] = lambda number: ""
        self.events: dict[int, Callable[[], None]] = {}
        self.graphs: dict[str, Any] = {}
        self.stream = torch.cuda.Stream() if DEVICE.type == "cuda" else None

    def step(self) -> None:
        """One training step, on the device alone."""
        raise NotImplementedError

    def capture(self) -> None:
        """Capture the step of each mode, after two steps that allocate memory."""
        if self.stream is None:
            return
        torch.cuda.synchronize()
        for name, step in self.modes.items():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):
                    step()
                    self.done += 1
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                step()
            self.graphs[name] = graph
        torch.cuda.synchronize()

    def advance(self) -> None:
        """Start the next step."""
        name = self.mode_of(self.done)
        if self.stream is None:
            self.events.pop(self.done, lambda: None)()
            self.modes[name]()
        else:
            with torch.cuda.stream(self.stream):
                self.events.pop(self.done, lambda: None)()
                self.graphs[name].replay() if self.graphs else self.modes[name]()
        self.done += 1


def as_words(keys: dict[str, Any]) -> list[str]:
    """Keys of a config as a command line, without our own."""
    pairs = [(key, value) for key, value in keys.items() if key not in OWN]
    return [
        word for key, value in pairs for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


class AutoencoderRun(Run):
    """Stage 1 on a set of uint8 images (N, C, R, R) on the device."""

    def __init__(self, images: torch.Tensor, recipe: dict[str, Any], steps: int, seed: int) -> None:
        super().__init__(steps)
        self.images, self.stock = images, bool(recipe.get("stock"))
        self.held_out = max(1, min(500, len(images) // 20))
        shape = {"resolution": images.shape[-1], "image_channels": images.shape[1], "seed": seed}
        quantizer = {"quantizer": "ema"} if self.stock else {}
        keys = AUTOENCODER | recipe | quantizer | shape | {"dataset_name": "embedded:mnist", "max_train_steps": steps}
        self.config = parse_config(AutoencoderConfig, as_words(keys))
        torch.manual_seed(seed)
        self.batch_size = self.config.train_batch_size
        self.numbers = torch.arange(self.batch_size, device=DEVICE)
        if self.stock:
            self.model = new_vqmodel(self.config).to(DEVICE)
            parameters = list(self.model.parameters())
            self.optimizer = Optimizer(parameters, False, 1e-4, (0.9, 0.999), 0.01, steps, 1, "constant")
        else:
            self.model = Autoencoder(self.config).to(DEVICE).train()
            parameters, rate = list(self.model.parameters()), self.config.learning_rate
            self.optimizer = Optimizer(parameters, True, rate, (0.9, 0.95), 0.0, steps, 50)
            self.average = Average(self.model, lambda t: torch.minimum(torch.full_like(t, 0.99), t / (9 + t)))
        if late := recipe.get("late"):
            coins, begins = np.random.default_rng(seed).random(steps + 9), int(late["from"] * steps)
            self.modes["late"] = lambda: self._late(late, halved=False)
            if late.get("half"):
                self.modes["half"] = lambda: self._late(late, halved=True)
            self.mode_of = lambda n: "" if n < begins else "half" if coins[n] < late.get("half", 0) else "late"

    def _late(self, late: dict[str, float], halved: bool) -> None:
        before, self.model.latent_noise = self.model.latent_noise, late.get("noise", 0.0)
        self.step(halved)
        self.model.latent_noise = before

    def step(self, halved: bool = False) -> None:
        chosen = torch.randint(self.held_out, len(self.images), (self.batch_size,), device=DEVICE)
        images = self.images[chosen].float() / 127.5 - 1
        if self.stock:
            made = self.model(images)
            loss = F.mse_loss(made.sample, images) + made.commit_loss.mean()
        else:
            transform = equivariance.Transform(0, True) if halved else None
            output = self.model(images, self.numbers, transform)
            images = images if transform is None else transform.apply(images)
            loss = reconstruction_loss(output.reconstruction, images, self.config.reconstruction_loss)
            loss = loss + output.quantized.loss(self.config)
        self.optimizer.step(loss)
        if not self.stock:
            self.average.step()

    @torch.no_grad()
    def finish(self, judge: "Judge", set_name: str) -> tuple[dict[str, Any], torch.Tensor]:
        """The figures, and reconstructions (16, C, R, R); afterwards `latents` and `decode` are for stage 2."""
        model = self.model.eval() if self.stock else self.average.network
        factor = self.model.config.scaling_factor if self.stock else 1.0
        batches = [batch.float() / 127.5 - 1 for batch in self.images.split(500)]
        encoded = [model.encode(x).latents * factor if self.stock else model.encode(x) for x in batches]
        latents = torch.cat(encoded)
        mean, std = latents.mean((0, 2, 3), keepdim=True), 1.0
        if self.stock:
            mean = torch.zeros_like(mean)
        else:
            std = float((latents - mean).square().mean().sqrt())

        def decode(x: torch.Tensor) -> torch.Tensor:
            x = (x * std + mean) / factor
            return to_bytes(model.decode(x).sample if self.stock else model.decode(x))

        self.latents, self.decode = (latents - mean) / std, decode
        made = torch.cat([decode(x) for x in self.latents[: judge.images].split(500)])
        some = slice(0, min(self.held_out, len(made)))
        error = (made[some].float() - self.images[some].float()).square().flatten(1).mean(1).clamp_min(1e-3)
        figures = {"psnr": float((10 * torch.log10(255**2 / error)).mean()), "rfd": judge.distance(set_name, made)}
        return figures, made[:SHOWN].cpu()


class UNetRun(Run):
    """Stage 2 on the latents of an autoencoder."""

    def __init__(self, autoencoder: AutoencoderRun, recipe: dict[str, Any], steps: int, seed: int) -> None:
        super().__init__(steps)
        self.autoencoder, self.recipe, self.stock = autoencoder, recipe, bool(recipe.get("stock"))
        self.latents = autoencoder.latents[autoencoder.held_out :]
        keys = UNET | recipe | {"dataset_name": "embedded:mnist", "max_train_steps": steps, "seed": seed}
        config = self.config = parse_config(UNetConfig, as_words(keys))
        torch.manual_seed(seed)
        shape = self.latents.shape[1:3]
        self.unet = make_unet(config, *shape, zero_branches=not self.stock).to(DEVICE).train()
        parameters = list(self.unet.parameters())
        if self.stock:
            self.table = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).to(DEVICE)
            self.optimizer = Optimizer(parameters, False, 1e-4, (0.95, 0.999), 1e-6, steps, min(500, steps // 2))
            self.average = Average(self.unet, lambda count: (1 - count**-0.75).clamp(max=0.9999))
        else:
            table = noise_table(config)
            self.table = None if table is None else table.to(DEVICE)
            betas, warmup = (config.adam_beta1, config.adam_beta2), min(config.lr_warmup_steps, steps // 2)
            muon, decay = config.optimizer == "muon", config.adam_weight_decay
            self.optimizer = Optimizer(parameters, muon, config.learning_rate, betas, decay, steps, warmup)
            self.average = Average(self.unet, power_function(config.ema_sigma_rels[0]))
            self.events[max(3, round(WEAK * steps))] = self._keep_weak
        self.weights = LossWeights().to(DEVICE) if recipe.get("learned_weights") else None
        if self.weights is not None:
            own = list(self.weights.parameters())
            self.of_weights = Optimizer(own, False, 1e-2, (0.9, 0.99), 0.0, steps, 10)
        if recipe.get("dispersive"):
            self.unet.mid_block.register_forward_hook(self._keep_middle)

    def _keep_weak(self) -> None:
        self.weak = copy.deepcopy(self.average.network)

    def _keep_middle(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.middle = output

    def batch(self) -> tuple[torch.Tensor, ...]:
        """Noisy latents, timesteps, targets, weights and noise levels of a new batch."""
        config, size = self.config, self.config.train_batch_size
        clean = self.latents[torch.randint(len(self.latents), (size,), device=DEVICE)]
        if self.stock:
            timesteps = torch.randint(1000, (size,), device=DEVICE)
            alpha, sigma = self.table[timesteps].sqrt(), (1 - self.table[timesteps]).sqrt()
        else:
            times = ((torch.arange(size, device=DEVICE) + torch.rand((), device=DEVICE)) / size).double()
            if config.timestep_sampling == "uniform":
                times = torch.rand(size, device=DEVICE).double()
            if config.timestep_sampling == "logit_normal":
                quantile = torch.special.ndtri(times.clamp(1e-6, 1 - 1e-6))
                times = torch.sigmoid(config.logit_mean + config.logit_std * quantile).clamp(max=1 - 2.0**-40)
            timesteps, alpha, sigma = noise_levels(times, config, self.table)
        count = self.recipe.get("noises", 1)
        noise = torch.randn(count, *clean.shape, device=DEVICE)
        nearest = (noise - clean).flatten(2).square().sum(2).argmin(0)
        noise = noise[nearest, torch.arange(size, device=DEVICE)]
        kind = "epsilon" if self.stock else config.prediction_type
        weight = loss_weight(alpha, sigma, kind, "uniform" if self.stock else config.loss_weighting, config.snr_gamma)
        return (
            add_noise(clean, noise, alpha, sigma),
            timesteps,
            target(clean, noise, alpha, sigma, kind),
            weight,
            (sigma / alpha),
        )

    def step(self) -> None:
        noisy, timesteps, wanted, weight, level = self.batch()
        prediction = self.unet(noisy, timesteps, return_dict=False)[0]
        error = (prediction.float() - wanted).square().flatten(1).mean(1)
        if self.weights is None:
            loss = (weight * error).mean()
        else:
            learned = self.weights(level)
            self.of_weights.step((error.detach() / learned.exp() + learned).mean())
            loss = (error / learned.detach().exp()).mean()
        if self.recipe.get("dispersive"):
            features = self.middle.flatten(1).float()
            squares = features.square().sum(1)
            apart = (squares[:, None] + squares - 2 * features @ features.T).clamp_min(0) / features.shape[1]
            loss = loss + self.recipe["dispersive"] * torch.log(torch.exp(-apart / 0.5).mean())
        self.optimizer.step(loss)
        self.average.step()

    def finish(self, judge: "Judge", set_name: str) -> tuple[dict[str, Any], torch.Tensor]:
        """The distance of the samples, and some of them (16, C, R, R)."""
        made = draw(self, self.average.network, judge.images)
        name = "fd" if self.stock else "fd_without_guidance"
        return {name: judge.distance(set_name, made)}, made[:SHOWN].cpu()


class GuidanceRun(Run):
    """Guidance in the weights, after the main training of a U-Net (latent_ddpm/diffusion/self_guidance.py)."""

    def __init__(self, main: UNetRun) -> None:
        super().__init__(main.recipe.get("guidance_steps", 160))
        self.main, self.scale = main, main.recipe.get("guidance", 2.0)
        self.strong = main.average.network
        self.unet = copy.deepcopy(self.strong).requires_grad_(True).train()
        parameters = list(self.unet.parameters())
        self.optimizer = Optimizer(parameters, False, 3e-4, (0.9, 0.99), 0.0, self.steps, 10, "linear")
        self.average = Average(self.unet, power_function(0.1))

    def step(self) -> None:
        noisy, timesteps, *_ = self.main.batch()
        with torch.no_grad():
            strong = self.strong(noisy, timesteps, return_dict=False)[0]
            wanted = strong + (self.scale - 1) * (strong - self.main.weak(noisy, timesteps, return_dict=False)[0])
        self.optimizer.step(F.mse_loss(self.unet(noisy, timesteps, return_dict=False)[0], wanted))
        self.average.step()

    def finish(self, judge: "Judge", set_name: str) -> tuple[dict[str, Any], torch.Tensor]:
        """As UNetRun.finish."""
        made = draw(self.main, self.average.network, judge.images)
        return {"fd": judge.distance(set_name, made)}, made[:SHOWN].cpu()


# ----------------------------------------------------------------------------------------------------------- judging


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


@torch.no_grad()
def draw(run: UNetRun, unet: nn.Module, count: int) -> torch.Tensor:
    """uint8 samples (count, C, R, R) of a U-Net on the latents of `run`."""
    noise, made = torch.Generator(DEVICE).manual_seed(123), []
    for start in range(0, count, 500):
        shape = (min(500, count - start), *run.latents.shape[1:])
        latents = torch.randn(shape, generator=noise, device=DEVICE)
        scheduler = DDIMScheduler(beta_schedule="linear") if run.stock else sampling_scheduler(run.config)
        scheduler.set_timesteps(50 if run.stock else run.config.num_inference_steps, device=DEVICE)
        for t in scheduler.timesteps:
            latents = scheduler.step(unet(latents, t, return_dict=False)[0], t, latents, return_dict=False)[0]
        made.append(run.autoencoder.decode(latents))
    return torch.cat(made)


class Judge:
    """Frechet distances to `images` images of each set."""

    def __init__(self, sets: dict[str, torch.Tensor], images: int) -> None:
        self.images, self.network = images, load_extractor("efficientnet-lite0", DEVICE)
        self.reals = {name: self._features(of_set[:images]) for name, of_set in sets.items()}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return extract_features(self.network, images.split(250), DEVICE).to(DEVICE)

    def distance(self, set_name: str, images: torch.Tensor) -> float:
        """Of uint8 images (N, C, R, R)."""
        return float(gaussian_distance(self._features(images), self.reals[set_name]))


def load_sets(names: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """uint8 images (N, C, R, R) of each set on the device, in a fixed random order."""
    found = {}
    for name in names:
        if name == "digits":
            images = to_bytes(digit_tensors()[0])
        else:
            dataset = datasets.Dataset.from_parquet(str(folder / name / "train.parquet"))
            mode = "L" if CHANNELS.get(name) == 1 else "RGB"
            pixels = np.stack([np.asarray(image.convert(mode)) for image in dataset["image"]])
            images = torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        found[name] = images[order].to(DEVICE)
    return found


# ---------------------------------------------------------------------------------------------------------- the queue


class Job:
    """One training, and what is known of it."""

    def __init__(self, make: Callable[[], Run], set_name: str, names: dict[str, Any], after: list["Job"]) -> None:
        self.make, self.set_name, self.names, self.after = make, set_name, names, after
        self.run: Any = None


def jobs_of(plan: dict[str, Any], sets: dict[str, torch.Tensor], steps: int | None) -> list[Job]:
    """The autoencoders to train, each with the U-Nets that follow; `steps` replaces the planned ones."""
    made = []
    first, second = plan["minutes"]
    for entry in plan["runs"]:
        for set_name in entry["sets"]:
            recipe, seed = plan["autoencoders"][entry["autoencoder"]], entry.get("seed", 0)
            names = {"set": set_name, "autoencoder": entry["autoencoder"], "seed": seed}
            count = steps or round(60e3 * first / recipe["ms"])
            job = Job(
                lambda set_name=set_name, recipe=recipe, count=count, seed=seed: AutoencoderRun(
                    sets[set_name], recipe, count, seed
                ),
                set_name,
                names | {"steps": count},
                [],
            )
            for unet in entry["unets"]:
                of_unet = dict(plan["unets"][unet])
                guided = 0 if of_unet.get("stock") else of_unet.setdefault("guidance_steps", 160)
                count = round(60e3 * second / of_unet["ms"] - GUIDANCE_STEP * guided)
                if steps:
                    count, of_unet["guidance_steps"] = max(steps, 8), min(guided, 3)
                job.after.append(
                    Job(
                        lambda job=job, of_unet=of_unet, count=count, seed=seed: UNetRun(job.run, of_unet, count, seed),
                        set_name,
                        names | {"unet": unet, "steps": count},
                        [],
                    )
                )
            made.append(job)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--sets_dir", type=Path, default=Path("outputs/sets"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--at_once", type=int, default=12, help="runs side by side")
    parser.add_argument("--num_images", type=int, default=2000, help="of each Frechet distance")
    parser.add_argument("--only", nargs="+", help="sets")
    parser.add_argument("--steps", type=int, help="instead of those that fit the minutes, for a try")
    options = parser.parse_args()
    begun = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # the draws of a captured step come from the device's generator, which a graph advances
    posterior.normal = equivariance.normal = lambda seed, stream, numbers, shape: torch.randn(
        len(numbers), *shape, device=numbers.device
    )
    plan = yaml.safe_load(options.jobs.read_text(encoding="utf-8"))
    for entry in plan["runs"] if options.only else ():
        entry["sets"] = [name for name in entry["sets"] if name in options.only]
    sets = load_sets(sorted({name for entry in plan["runs"] for name in entry["sets"]}), options.sets_dir)
    judge = Judge(sets, options.num_images)
    waiting, active = jobs_of(plan, sets, options.steps), []
    results: list[dict[str, Any]] = []
    pictures: list[torch.Tensor] = []
    steps, seconds_of_steps = 0, 0.0

    def note(job: Job, figures: dict[str, Any]) -> None:
        results.append(job.names | figures | {"at": round(time.monotonic() - begun, 1)})
        print(json.dumps(results[-1]), flush=True)
        save()

    def save() -> None:
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        result = {
            "command": f"python benchmarks/search_recipes.py {' '.join(sys.argv[1:])}",
            "device": device,
            "torch": torch.__version__,
            "steps_per_second": steps / max(seconds_of_steps, 1e-9),
            "left_out": len(waiting) + len(active),
            "jobs": yaml.safe_load(options.jobs.read_text(encoding="utf-8")),
            "results": results,
        }
        write_json(options.json, result)

    while (waiting or active) and time.monotonic() - begun < options.seconds:
        while waiting and len(active) < options.at_once:
            job = waiting.pop(0)
            try:
                job.run = job.make()
                job.run.capture()
                active.append(job)
            except Exception:  # another recipe may work
                note(job, {"error": traceback.format_exc()[-2000:]})
        mark = time.monotonic()
        for _ in range(40):
            for job in active:
                if job.run.done < job.run.steps:
                    job.run.advance()
                    steps += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds_of_steps += time.monotonic() - mark
        for job in [job for job in active if job.run.done >= job.run.steps]:
            active.remove(job)
            figures, made = job.run.finish(judge, job.set_name)
            note(job, figures)
            pictures.append(made)
            job.run.graphs = {}
            following = job.after
            if isinstance(job.run, UNetRun) and not job.run.stock and job.run.recipe["guidance_steps"]:
                names = job.names | {"guided": True}
                following = [Job(lambda run=job.run: GuidanceRun(run), job.set_name, names, [])]
            waiting[:0] = following
    save()
    draw_pictures(pictures, options.json.with_suffix(".png"))
    return 0


def draw_pictures(pictures: list[torch.Tensor], path: Path) -> None:
    """The images of all runs, a row for each, in the order of the results."""
    if not pictures:
        return
    rows = [make_grid(made.float().expand(-1, 3, -1, -1) / 127.5 - 1, columns=SHOWN) for made in pictures]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    save_png(page, path)


if __name__ == "__main__":
    sys.exit(main())
