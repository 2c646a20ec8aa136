"""Encode a run's training set into its caches (latents, conditioning images, captions) without training.

    accelerate launch scripts/cache_latents.py --config configs/mnist.yaml

train_unet.py does the same when the cache is missing; alone it is of use to encode on other machines than those
that train. Takes the keys of train_unet.py. A finished cache is left as it is, an interrupted one completed.
"""

import logging
from pathlib import Path

from latent_ddpm.autoencoder.stock import autoencoder_folder, check_autoencoder_fits, load_autoencoder
from latent_ddpm.config import UNetConfig, parse_config, with_saved_plan
from latent_ddpm.data.latents import images_for_run, latents_for_run
from latent_ddpm.diffusion.conditions import check_source, load_encoder, make_conditions
from latent_ddpm.training.launch import check_before_loading, make_accelerator, run

logger = logging.getLogger("cache_latents")


def main(argv: list[str]) -> int:
    config = parse_config(UNetConfig, argv)
    config, _ = with_saved_plan(config, Path(config.output_dir) / "train_unet.yaml")
    check_before_loading(config, "unet")
    autoencoder = load_autoencoder(autoencoder_folder(config), config.autoencoder)
    latent_size = check_autoencoder_fits(autoencoder, config)
    accelerator = make_accelerator(config)
    device, is_main, wait = accelerator.device, accelerator.is_main_process, accelerator.wait_for_everyone
    encoder = load_encoder(config)
    images = images_for_run(config, is_main, wait, lambda sources, config: check_source(sources[0], config))
    cache, _ = latents_for_run(config, autoencoder.to(device), device, is_main, wait, images)
    make_conditions(config, images, latent_size, cache.flips, device, wait, encoder)
    logger.info("%d latents of %s in %s", len(cache), "x".join(map(str, cache.shape)), cache.folder)
    return 0


if __name__ == "__main__":
    run(main)
