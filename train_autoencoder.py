"""Stage 1: train a VQ-VAE or KL-VAE on your own images, from scratch or from pretrained weights (--init_from).

    accelerate launch train_autoencoder.py --config configs/mnist.yaml

Writes <output_dir>/autoencoder/, a stock diffusers VQModel (AutoencoderKL for quantizer kl) whose latents have zero
mean and unit variance. Checkpoints, metrics.jsonl and grids of originals above their reconstructions are in the same
folder. Any key of the config can be overridden (--learning_rate 2e-4). The same command starts a run, resumes it, or
says that it is finished.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterator

import torch

from latent_ddpm.autoencoder.health import Watch, check_images
from latent_ddpm.autoencoder.losses import load_lpips
from latent_ddpm.autoencoder.quantizers import images_for_codes, perplexity
from latent_ddpm.autoencoder.scaling import Moments, fold_normalization, overall_std
from latent_ddpm.autoencoder.start import load_start, say_of_start, with_architecture, with_decoder_of
from latent_ddpm.autoencoder.stock import to_stock
from latent_ddpm.autoencoder.training_step import AutoencoderStep
from latent_ddpm.config import AutoencoderConfig, parse_config
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import (
    ExampleOrder,
    ImageDataset,
    eval_batches,
    next_images,
    open_image_dataset,
    train_batches,
)
from latent_ddpm.data.images import to_float
from latent_ddpm.data.inspection.known import say_of_data
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import read_stream, undecodable
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import reconstruction_grid
from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder
from latent_ddpm.files import replace_folder
from latent_ddpm.planning.batch import fitting_images
from latent_ddpm.planning.minutes import plan
from latent_ddpm.planning.sizes import choose_sizes
from latent_ddpm.publishing.hub import check_before_training, make_publisher
from latent_ddpm.training.acceleration import pinned
from latent_ddpm.training.launch import run
from latent_ddpm.training.loop import TrainingRun
from latent_ddpm.training.optim import learning_rate_factor
from latent_ddpm.training.remote import with_run_of_hub

logger = logging.getLogger("train_autoencoder")

NORMALIZATION_IMAGES = 10_000  # enough for the mean and deviation of the exported latents


def main(argv: list[str]) -> int:
    config = with_run_of_hub(parse_config(AutoencoderConfig, argv), "autoencoder")
    start = load_start(config)
    if start is not None:
        config = with_architecture(config, start)
    training = TrainingRun(config, "autoencoder")
    config = training.config
    check_before_training(config)
    lpips = load_lpips(config.lpips_net, config.lpips_weights) if config.lpips_weight > 0 else None

    # ------------------------------------------------------------------------------------------------- data
    sources = None if config.streaming else open_sources(config)
    config = training.start_processes(
        lambda config, free, _: fitting_images(config, None, free),
        plan,
        functools.partial(choose_sizes, latent_shape=None, training_images=lambda: len(sources[0])),
    )
    accelerator, device = training.accelerator, training.accelerator.device
    process = (accelerator.process_index, accelerator.num_processes)
    if config.codebook_start >= config.max_train_steps:  # which may have been given in images
        raise UserError(
            f"codebook_start {config.codebook_start} must be below max_train_steps {config.max_train_steps}. Lower it, "
            f"or train longer."
        )
    if training.is_finished("autoencoder/config.json"):
        return 0
    training.claim()
    if sources is None:
        read_stream(config, *process, accelerator.wait_for_everyone)
        sources = open_sources(config)
    training.check_data(sources[0].identity(), sources[0].findings.notes)
    if accelerator.is_main_process:
        say_of_data(config, sources, "autoencoder", logger)
    train_set, validation_set, bad_images = open_datasets(training, sources)
    order = ExampleOrder(len(train_set), config.seed)
    batches = train_batches(
        train_set,
        order,
        training.first_step,
        training.steps_at_most,
        config.train_batch_size,
        *process,
        accumulation=config.gradient_accumulation_steps,
        num_workers=config.dataloader_num_workers,
    )
    steps_per_epoch = math.ceil(len(train_set) / training.images_per_step)

    # --------------------------------------------------------------------------------- networks and optimizers
    networks = AutoencoderStep(config, accelerator, lpips, training.state, training.first_step, start)
    training.restore_scaler()
    parameters = sum(p.numel() for p in networks.autoencoder.parameters())
    if accelerator.is_main_process:
        if start is not None:
            say_of_start(config, start)
        bad = f", {len(bad_images.names())} undecodable ({bad_images.path})" if bad_images.names() else ""
        logger.info("%d training and %d validation images%s", len(train_set), len(validation_set), bad)
    tracker = training.start_tracking(
        len(train_set), len(validation_set), f"autoencoder of {parameters / 1e6:.2f} million parameters"
    )
    training.publisher = make_publisher(config, accelerator, "autoencoder", tracker.say)
    side = config.resolution // 2 ** (len(config.block_out_channels) - 1)
    watch = Watch(tracker.say, len(validation_set) * side**2, config)

    def begin_codes(first_batch: torch.Tensor) -> None:
        """Initialize the codebook from the first batch; with codebook_start, from as many images as it takes."""
        if config.codebook_start > 0:
            first, count = config.codebook_start * training.images_per_step, images_for_codes(config)
            images = next_images(train_set, order, first, max(training.images_per_step, count), *process)
            first_batch = to_float(images.to(device))
            tracker.say("The codebook starts now: its codes are placed by k-means.")
        networks.start_codes(first_batch)

    # ---------------------------------------------------------------------------------------------- training
    for step in training.steps():
        rate = learning_rate_factor(step, config)
        if step % steps_per_epoch == 0:
            networks.epoch_counts.zero_()
        micro_batches = on_device(itertools.islice(batches, config.gradient_accumulation_steps), device)
        if step in (0, config.codebook_start):
            first = next(micro_batches)
            micro_batches = itertools.chain([first], micro_batches)
            if step == 0:
                check_images(first[0], len(train_set), tracker.say)
            if step == config.codebook_start:
                begin_codes(first[0])
        losses = networks.step(step, micro_batches, rate)
        training.advance()

        if training.is_due(config.logging_steps):
            log(training, networks, losses, watch, rate)
            bad_images.check()
        if training.is_due(config.validation_steps):
            validate(training, networks, validation_set, watch)
            if training.publishes_best(after=config.codebook_start):
                export(training, networks, train_set)
                training.publish()
        if training.should_stop():
            return training.stop(networks.state_dict(training.step))
        if training.is_due(config.checkpointing_steps):
            training.save(networks.state_dict(training.step))
            if training.publishes_checkpoint(after=config.codebook_start):  # before, there are no codes to publish
                export(training, networks, train_set)
                training.publish()
            tracker.pause()
    tracker.close()

    # ------------------------------------------------------------------------------------------------ export
    export(training, networks, train_set)
    return training.finish("autoencoder")


def open_datasets(
    training: TrainingRun, sources: tuple[ImageSource, ImageSource]
) -> tuple[ImageDataset, ImageDataset, BadImages]:
    """The training and the validation set, decoded if they fit the cache, and the list of undecodable images."""
    config, accelerator = training.config, training.accelerator
    total = sum(map(len, sources)) + undecodable(config)
    bad_images = BadImages(training.output_dir / "bad_images.jsonl", total, config.max_bad_image_share)
    train_set, validation_set = (
        open_image_dataset(
            source,
            config,
            training.output_dir / "cache",
            bad_images,
            train=is_train,
            is_main=accelerator.is_main_process,
            wait=accelerator.wait_for_everyone,
        )
        for source, is_train in zip(sources, (True, False), strict=True)
    )
    bad_images.check()
    return train_set, validation_set, bad_images


def on_device(batches: Iterator[dict[str, torch.Tensor]], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """Images (B, C, R, R) in [-1, 1] and example numbers (B,) of each micro-batch, on the device."""
    for batch in batches:
        images, examples = (pinned(batch[key], device).to(device, non_blocking=True) for key in ("image", "example"))
        yield to_float(images), examples


def log(
    training: TrainingRun, networks: AutoencoderStep, losses: dict[str, torch.Tensor], watch: Watch, rate: float
) -> None:
    """Log a step's losses as means over the processes, and how many codes the epoch has used so far."""
    names, tracker = sorted(losses), training.tracker
    values = torch.stack([losses[name].reshape(()) for name in names])
    measured = dict(zip(names, training.accelerator.reduce(values, "mean").tolist(), strict=True))
    for skipped in networks.skipped.values():
        skipped.report(tracker.say)
    watch.training(measured)
    counts = networks.epoch_counts
    if len(counts) and not networks.autoencoder.plain:
        measured |= {"codebook_usage": float((counts > 0).float().mean()), "perplexity": perplexity(counts)}
    tracker.log(**measured, learning_rate=rate * training.config.learning_rate)


def validate(training: TrainingRun, networks: AutoencoderStep, validation_set: ImageDataset, watch: Watch) -> None:
    """Measure the averaged autoencoder on the held-out images, and draw some of them above their reconstructions."""
    config, accelerator, tracker = training.config, training.accelerator, training.tracker
    averaged, counts = networks.ema.model, networks.epoch_counts

    def reconstruct(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = averaged(images)
        return output.reconstruction, output.quantized.indices

    process = (accelerator.process_index, accelerator.num_processes)
    codes = 0 if networks.autoencoder.plain else len(counts)
    shares = eval_batches(validation_set, config.train_batch_size, *process)
    # SSIM is for the model card: on the CPU it would take longer than the rest
    measured = evaluate_autoencoder(reconstruct, shares, codes, accelerator.device, with_ssim=training.is_last)
    tracker.log(**{f"validation_{key}": value for key, value in measured.items() if key != "images"})
    if accelerator.is_main_process:
        # spread over the split, which may be sorted by class
        shown = torch.linspace(0, len(validation_set) - 1, min(32, len(validation_set))).long().tolist()
        originals = to_float(torch.stack([validation_set.get(i) for i in shown])).to(accelerator.device)
        with torch.no_grad():
            reconstructions = reconstruct(originals)[0]
        tracker.image(reconstruction_grid(originals.cpu(), reconstructions.cpu()))
        tracker.histogram(latents=averaged.encode(originals))
        said = f"validation PSNR {measured['psnr']:.2f} dB"
        if codes:
            tracker.histogram(uses_of_a_code=counts)
            said += f", {measured['codebook_usage']:.1%} of codes in use, perplexity {measured['perplexity']:.0f}"
        tracker.say(said)
        watch.validation(measured, training.step / config.max_train_steps)
    accelerator.wait_for_everyone()
    tracker.pause()


@torch.no_grad()
def export(training: TrainingRun, networks: AutoencoderStep, train_set: ImageDataset) -> None:
    """Write the averaged autoencoder as a stock diffusers model whose scaled latents have zero mean, unit variance.

    Where its encoder was frozen, the latents stay those of the pretrained autoencoder instead.
    """
    config, accelerator = training.config, training.accelerator
    folder = training.output_dir / "autoencoder"
    if config.freeze_encoder:
        if accelerator.is_main_process:
            stock = with_decoder_of(networks.start, networks.ema.model)
            replace_folder(folder, lambda aside: stock.save_pretrained(aside, safe_serialization=True))
        return
    process = (accelerator.process_index, accelerator.num_processes)
    moments = Moments(config.latent_channels)
    for batch in eval_batches(train_set, config.train_batch_size, *process):
        moments.add(networks.ema.model.encode(to_float(batch["image"].to(accelerator.device))))
        if len(batch["image"]) and moments.images * accelerator.num_processes >= NORMALIZATION_IMAGES:
            break
    mean, variance = moments.result(accelerator.device)
    std = overall_std(variance)
    if not std > 1e-6:
        training.tracker.say("All latents are equal, so scaling_factor stays 1. Stage 1 has failed: look at samples/.")
        std = 1.0
    if accelerator.is_main_process:
        stock = to_stock(networks.ema.model, config)
        fold_normalization(stock, mean.cpu(), std)
        replace_folder(folder, lambda aside: stock.save_pretrained(aside, safe_serialization=True))


if __name__ == "__main__":
    run(main)
