"""Show what the latents of an autoencoder look like.

    python scripts/show_latents.py --config configs/mnist.yaml
    python scripts/show_latents.py --config configs/mnist.yaml --num_images 12 --output latents.png

Takes <output_dir>/autoencoder, or --autoencoder DIR (any stock VQModel or AutoencoderKL), and held-out images of the
run's dataset. Draws three rows: the images, their reconstructions, and their latents as colours. A latent position has
`latent_channels` numbers, a pixel three: red, green and blue are the first three principal components of the latents,
from -2 to 2 standard deviations of the first. A component that hardly varies changes no colour. Latents are enlarged to
the size of the image, so a square of one colour is one latent position. The values are those before quantization, as
stage 2 sees them.

Prints the shapes and the share of the latents' variance that each component has, and the picture's name (--output FILE;
by default <output_dir>/latents.png). Takes the keys of train_unet.py.
"""

import argparse
import logging
from pathlib import Path

import torch

from latent_ddpm.autoencoder.stock import autoencoder_folder, check_autoencoder_fits, latents_of, load_autoencoder
from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data.images import to_float
from latent_ddpm.data.latents import images_for_run
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png
from latent_ddpm.training.launch import run
from pipeline_latent_ddpm import decode_latents

MIN_SIDE = 96  # pixels; smaller images are enlarged to about that
FOR_COMPONENTS = 256  # images whose latents the components are computed from
SHOWN_DEVIATIONS = 2.0


def latents_as_rgb(latents: torch.Tensor, shown: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as colours: their first three principal components.

    Args:
        latents: float (N, D, h, w), of which the components are computed.
        shown: how many, from the first on, are returned as colours.

    Returns:
        float32 (shown, 3, h, w) in [-1, 1], on one scale for all components; 0 for one that does not vary or, with D
        below 3, is not there. And the share of the variance of each of the D components, float64 (D,), descending (all
        0 where nothing varies).
    """
    vectors = latents.double().movedim(1, -1)  # (N, h, w, D)
    centred = vectors - vectors.mean(dim=(0, 1, 2))
    flat = centred.flatten(0, 2)
    variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    # an eigenvector's sign is arbitrary: its largest entry is positive here, so that a picture can be repeated
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    scaled = centred[:shown] @ directions[:, :3] / (SHOWN_DEVIATIONS * variances[0].sqrt()).clamp_min(1e-12)
    rgb = torch.zeros(*scaled.shape[:3], 3)
    rgb[..., : scaled.shape[-1]] = scaled.clamp(-1, 1).float()
    return rgb.movedim(-1, 1), variances / variances.sum().clamp_min(1e-12)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if options.num_images < 1:
        raise UserError(f"--num_images is {options.num_images}; it has to be at least 1.")
    config = parse_config(UNetConfig, rest)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "filelock", "fsspec", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(autoencoder_folder(config), config.autoencoder).to(device)
    check_autoencoder_fits(autoencoder, config)
    _, held_out = images_for_run(config, is_main=True, wait=lambda: None)

    count = min(len(held_out), max(FOR_COMPONENTS, options.num_images))
    # spread over the split, which may be sorted by class; those that are shown come first
    shown = torch.linspace(0, len(held_out) - 1, min(options.num_images, count)).long().unique().tolist()
    others = torch.linspace(0, len(held_out) - 1, count).long().unique().tolist()
    order = shown + [i for i in others if i not in set(shown)]
    latents, originals, reconstructions = [], [], []
    with torch.no_grad():
        for start in range(0, len(order), 32):
            images = to_float(torch.stack([held_out.get(i) for i in order[start : start + 32]])).to(device)
            latents.append(latents_of(autoencoder, images))
            if start < len(shown):
                wanted = len(shown) - start
                originals.append(images[:wanted].cpu())
                reconstructions.append(decode_latents(autoencoder, latents[-1][:wanted]).cpu())
    rgb, shares = latents_as_rgb(torch.cat(latents).cpu(), len(shown))

    side, factor = config.resolution, config.resolution // rgb.shape[-1]
    colours = rgb.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    rows = [torch.cat(images).expand(-1, 3, -1, -1) for images in (originals, reconstructions)]
    scale = max(1, round(MIN_SIDE / side))
    path = options.output or Path(config.output_dir) / "latents.png"
    save_png(make_grid(torch.cat([*rows, colours]), columns=len(shown), scale=scale), path)
    channels = "x".join(map(str, latents[0].shape[1:]))
    print(f"images of {config.image_channels}x{side}x{side}, latents of {channels}")
    print("share of the variance of each component: " + ", ".join(f"{share:.3f}" for share in shares.tolist()))
    print(path)
    return 0


if __name__ == "__main__":
    run(main)
