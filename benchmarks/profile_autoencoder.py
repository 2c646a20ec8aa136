"""Measure where the time of a training step of stage 1 goes, and which variants shorten it.

    python benchmarks/profile_autoencoder.py --json docs/results/NAME.json --resolutions 32 64 256 \\
        --variants plain channels_last compile --config configs/cifar10.yaml

For each resolution: the share of each level of encoder and decoder in the forward and backward pass, and the time of a
whole step (forward, backward, optimizer) in each variant relative to `plain`, alternating. Variants are plain,
channels_last, bf16, compile, doubled (upsampling as in diffusers), and combinations joined by + such as
channels_last+bf16+compile. The other options are the keys of train_autoencoder.py that shape the network. A batch has
`--pixels` pixels of noise.
"""

import argparse
import contextlib
import shlex
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from latent_ddpm.autoencoder.losses import reconstruction_loss
from latent_ddpm.autoencoder.vqvae import Autoencoder, Upsample
from latent_ddpm.config import AutoencoderConfig, parse_config
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import run
from latent_ddpm.training.optim import make_optimizer

PARTS = {"channels_last", "bf16", "compile", "doubled"}


class Step:
    """One training step without a discriminator, in a variant."""

    def __init__(self, config: AutoencoderConfig, variant: str, batch_size: int, device: torch.device) -> None:
        parts = set(variant.split("+")) - {"plain"}
        if parts - PARTS:
            raise UserError(f"There is no variant {variant}; there are plain, {', '.join(sorted(PARTS))}, joined by +.")
        torch.manual_seed(0)
        form = torch.channels_last if "channels_last" in parts else torch.contiguous_format
        self.device, self.config, self.bf16 = device, config, "bf16" in parts
        self.model = Autoencoder(config).to(device, memory_format=form)
        for module in self.model.modules():
            if "doubled" in parts and isinstance(module, Upsample):
                module.forward = lambda x, conv=module.conv: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        self.optimizer = make_optimizer(self.model.parameters(), config, config.learning_rate, config.optimizer)
        size = (batch_size, config.image_channels, config.resolution, config.resolution)
        self.images = (torch.rand(size, device=device) * 2 - 1).to(memory_format=form)
        self.numbers = torch.arange(batch_size, device=device)
        self.model.initialize(self.images)
        self.forward = torch.compile(self.model) if "compile" in parts else self.model

    def __call__(self) -> float:
        """Seconds that one step took."""
        begun = time.perf_counter()
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with autocast:
            output = self.forward(self.images, self.numbers)
        loss = reconstruction_loss(output.reconstruction, self.images, self.config.reconstruction_loss)
        (loss + output.quantized.loss(self.config)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def time_of_levels(step: Step, repeats: int) -> dict[str, float]:
    """Share of forward and backward time of each part of encoder and decoder, by the input's size for a level."""
    model, seconds, marks = step.model, defaultdict(float), {}

    def now() -> float:
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(name: str, module: torch.nn.Module) -> None:
        def begin(*_: object) -> None:
            marks[name] = now()

        def end(*_: object) -> None:
            seconds[name] += now() - marks[name]

        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
        handles.append(module.register_full_backward_pre_hook(begin))
        handles.append(module.register_full_backward_hook(end))

    handles: list = []
    side = step.config.resolution
    for name, coder in (("encoder", model.encoder), ("decoder", model.decoder)):
        blocks = coder.down_blocks if name == "encoder" else coder.up_blocks
        for i, block in enumerate(blocks):
            level = i if name == "encoder" else len(blocks) - 1 - i
            watch(f"{name} {side >> level}px", block)
        watch(f"{name} middle", coder.mid_block)
    watch("quantizer", model.quantizer)
    step()
    seconds.clear()
    whole = sum(step() for _ in range(repeats))
    for handle in handles:
        handle.remove()
    shares = {name: value / whole for name, value in seconds.items()}
    return shares | {"rest (first and last convolutions, loss, optimizer)": 1 - sum(shares.values())}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--variants", nargs="+", default=["plain", "channels_last"])
    parser.add_argument("--pixels", type=int, default=2**15)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "command": "python benchmarks/profile_autoencoder.py " + shlex.join(argv),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "resolutions": {},
    }
    for resolution in options.resolutions:
        config = parse_config(AutoencoderConfig, [*rest, "--resolution", str(resolution)])
        batch_size = max(1, options.pixels // resolution**2)
        steps, peaks = {}, {}
        for name in dict.fromkeys(["plain", *options.variants]):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            steps[name] = Step(config, name, batch_size, device)
            steps[name]()  # compiles, allocates
            if device.type == "cuda":
                peaks[name] = {"peak_memory_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}
        seconds = defaultdict(list)
        for _ in range(options.repeats):
            for name, step in steps.items():
                seconds[name].append(step())
        figures = {"batch_size": batch_size, "variants": {}}
        for name, times in seconds.items():
            ratios = [ours / plain for ours, plain in zip(times, seconds["plain"], strict=True)]
            figures["variants"][name] = {
                "images_per_second_median": batch_size / statistics.median(times),
                "time_over_plain_median": statistics.median(ratios),
                "time_over_plain_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
                **peaks.get(name, {}),
            }
        figures["shares"] = time_of_levels(steps["plain"], options.repeats)
        result["resolutions"][resolution] = figures
        print(f"{resolution} pixels, batches of {batch_size}")
        for name, share in sorted(figures["shares"].items(), key=lambda item: -item[1]):
            print(f"  {share:6.1%}  {name}")
        for name, variant in figures["variants"].items():
            print(f"  {variant['time_over_plain_median']:6.2f}  times plain: {name}")
    write_json(options.json, result)
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
