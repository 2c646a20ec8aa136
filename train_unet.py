"""Stage 2: train a UNet2DModel from scratch on the latents of stage 1.

    accelerate launch train_unet.py --config configs/mnist.yaml

Takes the autoencoder from <output_dir>/autoencoder/ (or --autoencoder DIR), encodes the training set once, and
leaves <output_dir>/pipeline/, which DiffusionPipeline.from_pretrained of an unmodified diffusers loads. Any key of
the config can be overridden (--learning_rate 2e-4). The same command starts a run, resumes it, or says that it is
finished.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel

from latent_ddpm.autoencoder.scaling import fold_normalization
from latent_ddpm.autoencoder.stock import StockAutoencoder, check_autoencoder_fits, load_autoencoder
from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data.dataset import ExampleOrder
from latent_ddpm.data.inspection.known import say_of_data
from latent_ddpm.data.latents import LatentCache, hash_folder, images_for_run, latents_for_run, read_ahead
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.diffusion.conditions import (
    Conditions,
    Given,
    check_conditioning_images,
    check_source,
    identity_of,
    load_encoder,
    make_conditions,
    to_device,
    unet_inputs,
)
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.sampling import draw_film
from latent_ddpm.diffusion.unet import StockUNet, check_latents_fit, make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png
from latent_ddpm.planning.batch import fitting_images
from latent_ddpm.publishing.export import export_pipeline
from latent_ddpm.publishing.hub import check_before_training, make_publisher
from latent_ddpm.random import Stream, normal, seed_for_step, uniform
from latent_ddpm.training.acceleration import (
    align_state,
    compile_networks,
    next_iteration,
    pinned,
    set_layout,
    strict,
)
from latent_ddpm.training.checkpoint import must_fit
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.launch import run
from latent_ddpm.training.loop import TrainingRun
from latent_ddpm.training.optim import clip_gradients, learning_rate_factor, make_optimizer, set_learning_rate
from latent_ddpm.training.sharding import Sharding, gather, load_optimizer, prepare, whole_unet
from latent_ddpm.training.skipped import SkippedSteps
from pipeline_latent_ddpm import LatentDDPMPipeline

logger = logging.getLogger("train_unet")


def main(argv: list[str]) -> int:
    training = TrainingRun(parse_config(UNetConfig, argv), "unet")
    config = training.config
    check_before_training(config)
    autoencoder = load_autoencoder(config.autoencoder_dir)
    autoencoder_hash = hash_folder(config.autoencoder_dir)
    latent_size = check_fit(training, autoencoder, autoencoder_hash)

    # ---------------------------------------------------------------------------------------------- latents
    sharding = Sharding.take_request()
    latent_shape = (autoencoder.config.latent_channels, latent_size)
    config = training.start_processes(
        lambda config, free, processes: fitting_images(config, latent_shape, free, processes if sharding else 1)
    )
    if training.is_finished("pipeline/model_index.json"):
        return 0
    training.claim()
    accelerator, device = training.accelerator, training.accelerator.device
    is_main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    autoencoder.to(device)
    encoder = load_encoder(config)
    images = images_for_run(config, is_main, wait, functools.partial(check_images, training))
    latents, held_out = latents_for_run(config, autoencoder, device, is_main, wait, images)
    conditions, of_held_out = make_conditions(config, images, latent_size, latents.flips, device, wait, encoder)
    check_conditions(training, conditions)
    fold_normalization(autoencoder, latents.mean, latents.std)

    # -------------------------------------------------------------------------------------- model and optimizer
    state = training.state
    torch.manual_seed(config.seed)
    unet = make_unet(config, autoencoder.config.latent_channels, latent_size, **conditions.unet_arguments())
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = PowerEMA(unet, config.ema_sigma_rels)
    if state:
        with must_fit(config.resume_from_checkpoint):
            unet.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
        if state["latents"] != latents.folder.name and training.data_changed is None:
            logger.warning(
                "The images or their transform differ from those of the checkpoint. Training continues on the new ones."
            )
    for network in (unet, *ema.models):
        network.to(device)
        if sharding is not None:
            sharding.cut(network)
        else:
            set_layout(network, config, device)
    compile_networks([unet] if sharding is None else sharding.blocks(unet), config)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    if state:
        with must_fit(config.resume_from_checkpoint):
            load_optimizer(optimizer, state["optimizer"])
    align_state(optimizer)
    model, optimizer = prepare(accelerator, unet, optimizer)
    training.restore_scaler()
    alphas_cumprod = noise_table(config)
    alphas_cumprod = alphas_cumprod.to(device) if alphas_cumprod is not None else None
    saved_counts = state.get("skipped") if state else None
    skipped = SkippedSteps("U-Net", saved_counts, device, scaled=accelerator.scaler is not None)
    del state

    if is_main:
        logger.info(
            "%d images as latents of %s in %s (std %.3g before normalization)",
            len(latents), "x".join(map(str, latents.shape)), latents.folder, latents.std,
        )  # fmt: skip
    sharded = f", sharded over {accelerator.num_processes} processes" if sharding else ""
    description = f"U-Net of {unet.num_parameters() / 1e6:.2f} million parameters{sharded}"
    tracker = training.start_tracking(len(latents), len(held_out), description)
    training.publisher = make_publisher(config, accelerator, "unet", tracker.say)
    shown = of_held_out.shown(held_out, config.num_validation_samples, config.guidance_scale)  # what grids draw
    for of_split in images:  # their latents are what is trained on
        of_split.source.release()

    def training_state() -> dict[str, Any]:
        """The checkpoint: whole tensors in the main process, None for them in the others."""
        saved = {
            "latents": latents.folder.name,
            "autoencoder": autoencoder_hash,
            "conditions": conditions.meaning(),
            "model": unet.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.optimizer.state_dict(),
            "skipped": skipped.counts,
        }
        return gather(saved, keep=is_main)

    # ---------------------------------------------------------------------------------------------- training
    accumulation = config.gradient_accumulation_steps
    snapshot_steps = -(-config.max_train_steps // config.ema_snapshots) if config.ema_snapshots else None
    micro_batches = read_ahead(
        examples_of(training, latents, conditions),
        training.first_step * accumulation,
        config.max_train_steps * accumulation,
    )
    for step in training.steps():
        rate = learning_rate_factor(step, config)
        set_learning_rate(optimizer, rate * config.learning_rate)
        torch.manual_seed(seed_for_step(config.seed, step, accelerator.process_index))  # for dropout
        next_iteration(config)
        total_loss = torch.zeros((), device=device)
        for _ in range(accumulation):
            numbers, clean, given = next(micro_batches)
            numbers, clean = numbers.to(device, non_blocking=True), clean.to(device, non_blocking=True)
            given = to_device(given, device)
            batch = training_batch(clean, numbers, config, alphas_cumprod)
            noisy, words = unet_inputs(batch.noisy, given)
            with accelerator.accumulate(model):
                loss = batch.loss(model(noisy, batch.timesteps, **words).sample)
                with strict(config):
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    grad_norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                    skipped.add(kept)
                optimizer.step()
                optimizer.zero_grad()
            total_loss += loss.detach() / accumulation
        ema.update(unet, step)
        training.advance()

        if training.is_due(config.logging_steps):
            mean_loss = float(accelerator.reduce(total_loss, "mean"))
            skipped.report(tracker.say)
            tracker.log(loss=mean_loss, grad_norm=float(grad_norm), learning_rate=rate * config.learning_rate)
        if snapshot_steps and training.is_due(snapshot_steps):
            ema.save_snapshots(training.output_dir / "ema", training.step, keep=is_main)
            tracker.pause()
        if training.is_due(config.validation_steps):
            validate(training, autoencoder, ema, held_out, (conditions, of_held_out), shown)
            if training.publishes_best():
                export(training, autoencoder, ema, conditions)
                training.publish()
        if training.should_stop():
            return training.stop(training_state())
        if training.is_due(config.checkpointing_steps):
            training.save(training_state())
            if training.publishes_checkpoint():
                export(training, autoencoder, ema, conditions)
                training.publish()
            tracker.pause()
    tracker.close()

    # ------------------------------------------------------------------------------------------------ export
    averaged = export(training, autoencoder, ema, conditions)
    if is_main:
        draw_film_strip(training, make_sampler(config, autoencoder, averaged, conditions), shown)
    return training.finish("pipeline")


def check_fit(training: TrainingRun, autoencoder: StockAutoencoder, autoencoder_hash: str) -> int:
    """Check that config, autoencoder and checkpoint fit together; returns the height of the latents.

    Raises:
        UserError: they do not.
    """
    state, config = training.state, training.config
    if state and state.get("autoencoder", autoencoder_hash) != autoencoder_hash:
        raise UserError(
            f"The checkpoints in {training.checkpoints.folder} were trained with a different autoencoder than "
            f"{config.autoencoder_dir}. Give that one with --autoencoder, or use a new --output_dir."
        )
    latent_size = check_autoencoder_fits(autoencoder, config)
    check_latents_fit(config, latent_size)
    return latent_size


def check_images(training: TrainingRun, sources: tuple[ImageSource, ImageSource], config: UNetConfig) -> None:
    """Check that the training images have what the conditions need and are those of the run; say what is known of them.

    Raises:
        UserError: they lack it, or are those of another run.
    """
    check_source(sources[0], config)
    if "image" in config.conditions:
        check_conditioning_images(sources[0], config)
    training.check_data(identity_of(sources[0], config), sources[0].findings.notes)
    if training.accelerator.is_main_process:
        say_of_data(config, sources, "unet", logger)


def check_conditions(training: TrainingRun, conditions: Conditions) -> None:
    """Raises `UserError` when the checkpoint was trained with other conditions."""
    state = training.state
    if state and state.get("conditions", conditions.meaning()) != conditions.meaning():
        raise UserError(
            f"{training.checkpoints.folder} was trained with other conditions: different class names, a different "
            f"order of them, or a different text_encoder. Use the same conditions, or a new --output_dir."
        )


def examples_of(
    training: TrainingRun, latents: LatentCache, conditions: Conditions
) -> Callable[[int], tuple[torch.Tensor, torch.Tensor, Given]]:
    """A function from a micro-batch number to this process's example numbers, latents and conditions.

    They are on the CPU, in page-locked memory if the run is on a GPU.
    """
    config, accelerator, device = training.config, training.accelerator, training.accelerator.device
    order = ExampleOrder(len(latents), config.seed)

    def examples(number: int) -> tuple[torch.Tensor, torch.Tensor, Given]:
        share = number * accelerator.num_processes + accelerator.process_index
        numbers = share * config.train_batch_size + torch.arange(config.train_batch_size)
        flipped = (uniform(config.seed, Stream.FLIP, numbers) < 0.5).numpy() if latents.flips else None
        records = latents.records(order.indices(numbers.numpy()))
        given = conditions.given(records, flipped, numbers)
        given = {name: pinned(value, device) for name, value in given.items()}
        return pinned(numbers, device), pinned(latents.normalized(records, flipped), device), given

    return examples


@torch.no_grad()
def validate(
    training: TrainingRun,
    autoencoder: StockAutoencoder,
    ema: PowerEMA,
    held_out: LatentCache,
    conditions: tuple[Conditions, Conditions],
    shown: dict[str, Any],
) -> None:
    """Measure the averaged U-Net on the held-out images, and draw a grid of samples.

    Args:
        training: the run.
        autoencoder: decodes the samples.
        ema: its first average is validated.
        held_out: latents of the held-out images.
        conditions: of the training set, and of the held-out images.
        shown: what the samples are conditioned on.
    """
    averaged = whole_unet(ema.model, keep=training.accelerator.is_main_process)
    if averaged is not None and training.accelerator.is_main_process:
        if len(held_out):
            training.tracker.log(validation_loss=validation_loss(training, averaged, held_out, conditions[1]))
        draw_grid(training, make_sampler(training.config, autoencoder, averaged, conditions[0]), held_out.shape, shown)
    training.accelerator.wait_for_everyone()
    training.tracker.pause()


def validation_loss(training: TrainingRun, averaged: StockUNet, held_out: LatentCache, conditions: Conditions) -> float:
    """The mean training loss over the held-out images, with the same noise and times at every validation."""
    config, accelerator, total = training.config, training.accelerator, 0.0
    alphas_cumprod = noise_table(config)
    for start in range(0, len(held_out), config.train_batch_size):
        numbers = torch.arange(start, min(start + config.train_batch_size, len(held_out)))
        records = held_out.records(numbers.numpy())
        clean = held_out.normalized(records).to(accelerator.device)
        batch = training_batch(clean, numbers.to(accelerator.device), config, alphas_cumprod)
        noisy, words = unet_inputs(batch.noisy, to_device(conditions.given(records), accelerator.device))
        with accelerator.autocast():
            total += float(batch.loss(averaged(noisy, batch.timesteps, **words).sample)) * len(numbers)
    return total / len(held_out)


def make_sampler(
    config: UNetConfig, autoencoder: StockAutoencoder, unet: UNet2DModel, conditions: Conditions
) -> LatentDDPMPipeline:
    """The pipeline that grids are drawn with, without a progress bar."""
    scheduler = sampling_scheduler(config)
    pipeline = LatentDDPMPipeline(autoencoder, unet, scheduler, **conditions.pipeline_arguments())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_grid(
    training: TrainingRun, sampler: LatentDDPMPipeline, shape: tuple[int, int, int], shown: dict[str, Any]
) -> None:
    """Draw samples from fixed seeds and latents of `shape` (D, h, w), conditioned on `shown`."""
    config, accelerator, tracker = training.config, training.accelerator, training.tracker
    numbers = torch.arange(config.num_validation_samples, device=accelerator.device)
    with accelerator.autocast():
        pictures = sampler(
            batch_size=len(numbers),
            latents=normal(config.seed, Stream.SAMPLE, numbers, shape),
            num_inference_steps=config.num_inference_steps,
            output_type="pt",
            **shown,
        ).images
    path = tracker.image(make_grid(pictures.cpu() * 2 - 1))
    tracker.say(f"samples in {path}")


def export(
    training: TrainingRun, autoencoder: StockAutoencoder, ema: PowerEMA, conditions: Conditions
) -> StockUNet | None:
    """Write the pipeline folder with the averaged U-Net; returns that U-Net in the main process."""
    config, is_main = training.config, training.accelerator.is_main_process
    averaged = whole_unet(ema.model, keep=is_main)
    if is_main:
        scheduler, steps = sampling_scheduler(config), config.num_inference_steps
        folder = training.output_dir / "pipeline"
        export_pipeline(folder, autoencoder, averaged, scheduler, steps, **conditions.pipeline_arguments())
    return averaged


def draw_film_strip(training: TrainingRun, sampler: LatentDDPMPipeline, shown: dict[str, Any]) -> None:
    """Draw four samples as they take shape: a row per sample, a column per sampling step."""
    config = training.config
    four = {name: value[:4] if isinstance(value, torch.Tensor) else value for name, value in shown.items()}
    _, film = draw_film(sampler, 4, config.seed, torch.arange(4), config.num_inference_steps, **four)  # (4, S, C, R, R)
    save_png(make_grid(film.flatten(0, 1) * 2 - 1, film.shape[1]), training.output_dir / "samples" / "film_strip.png")


if __name__ == "__main__":
    run(main)
