"""Stage 2: train a UNet2DModel from scratch on the latents of stage 1.

    accelerate launch train_unet.py --config configs/mnist.yaml

Takes the autoencoder from <output_dir>/autoencoder/ (or --autoencoder DIR), encodes the training set once, and
leaves <output_dir>/pipeline/, which DiffusionPipeline.from_pretrained of an untouched diffusers loads. Any key of
the config can be overridden (--learning_rate 2e-4). The same command starts a run, goes on where it was stopped, or
says that it is finished.
"""

import logging
import math
from pathlib import Path

import torch

from latent_ddpm.autoencoder.scaling import fold_normalization
from latent_ddpm.autoencoder.stock import check_autoencoder_fits, load_autoencoder
from latent_ddpm.config import UNetConfig, parse_config, save_config
from latent_ddpm.data.dataset import ExampleOrder
from latent_ddpm.data.latents import hash_folder, images_for_run, latents_for_run, read_ahead
from latent_ddpm.diffusion.conditions import Given, check_source, load_encoder, make_conditions, to_device, unet_inputs
from latent_ddpm.diffusion.ema import PowerEMA
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.sampling import draw_film
from latent_ddpm.diffusion.unet import StockUNet, check_latents_fit, make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png
from latent_ddpm.publishing.export import export_pipeline
from latent_ddpm.publishing.hub import check_before_training, make_publisher
from latent_ddpm.random import Stream, normal, seed_for_step, uniform
from latent_ddpm.training.checkpoint import CheckpointFolder, must_fit
from latent_ddpm.training.distributed import StopSignal
from latent_ddpm.training.launch import check_before_loading, claim, fit_to_processes, make_accelerator, run
from latent_ddpm.training.metrics import is_best
from latent_ddpm.training.optim import clip_gradients, learning_rate_factor, make_optimizer, set_learning_rate
from latent_ddpm.training.sharding import Sharding, gather, load_optimizer, prepare, whole_unet
from latent_ddpm.training.skipped import SkippedSteps
from latent_ddpm.training.tracking import Tracker, is_finished
from pipeline_latent_ddpm import LatentDDPMPipeline

logger = logging.getLogger("train_unet")


def main(argv: list[str]) -> int:
    config = asked = parse_config(UNetConfig, argv)
    output_dir = Path(config.output_dir)
    saved_config = check_before_loading(config, "unet")
    check_before_training(config)
    checkpoints = CheckpointFolder(output_dir / "checkpoints", "unet", config.checkpoints_total_limit)
    state = checkpoints.resume(config.resume_from_checkpoint)
    first_step = state["step"] if state else 0
    autoencoder = load_autoencoder(config.autoencoder_dir)
    autoencoder_hash = hash_folder(config.autoencoder_dir)
    if state and state.get("autoencoder", autoencoder_hash) != autoencoder_hash:
        raise UserError(
            f"{config.autoencoder_dir} is not the autoencoder on whose latents {checkpoints.folder} was trained. Give "
            f"--autoencoder the one it was, or another --output_dir to train on this one's latents."
        )
    latent_size = check_autoencoder_fits(autoencoder, config)
    check_latents_fit(config, latent_size)

    # ---------------------------------------------------------------------------------------------- latents
    sharding = Sharding.take_request()
    accelerator = make_accelerator(config)
    config = fit_to_processes(config, state, accelerator)
    if is_finished(config, "unet", first_step, "pipeline/model_index.json"):
        logger.info("all %d steps are done; the pipeline is in %s", first_step, output_dir / "pipeline")
        return 0
    if accelerator.is_main_process:
        claim(output_dir, "unet")
    device = accelerator.device
    autoencoder.to(device)
    is_main, wait = accelerator.is_main_process, accelerator.wait_for_everyone
    encoder = load_encoder(config)
    images = images_for_run(config, is_main, wait, check_source)
    latents, held_out = latents_for_run(config, autoencoder, device, is_main, wait, images)
    conditions, of_held_out = make_conditions(config, images, latent_size, latents.flips, device, wait, encoder)
    if state and state.get("conditions", conditions.meaning()) != conditions.meaning():
        raise UserError(
            f"{checkpoints.folder} was trained with other conditions: other class names, another order of them, or "
            f"another text_encoder. Give the ones it was, or another --output_dir to train on these."
        )
    fold_normalization(autoencoder, latents.mean, latents.std)

    # -------------------------------------------------------------------------------------- model and optimizer
    torch.manual_seed(config.seed)
    unet = make_unet(config, autoencoder.config.latent_channels, latent_size, **conditions.unet_arguments())
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = PowerEMA(unet, config.ema_sigma_rels)
    if state:
        with must_fit(config.resume_from_checkpoint):
            unet.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
        if state["latents"] != latents.folder.name:
            logger.warning("The images or their transform are not those of the checkpoint.")
    for network in (unet, *ema.models):
        network.to(device)
        if sharding is not None:
            sharding.cut(network)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    if state:
        with must_fit(config.resume_from_checkpoint):
            load_optimizer(optimizer, state["optimizer"])
    model, optimizer = prepare(accelerator, unet, optimizer)
    if state and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    alphas_cumprod = noise_table(config)
    alphas_cumprod = alphas_cumprod.to(device) if alphas_cumprod is not None else None
    saved_counts = state.get("skipped") if state else None
    skipped = SkippedSteps("U-Net", saved_counts, device, scaled=accelerator.scaler is not None)

    micro_batch = config.train_batch_size * accelerator.num_processes
    images_per_step = micro_batch * config.gradient_accumulation_steps
    order = ExampleOrder(len(latents), config.seed)

    def examples(number: int) -> tuple[torch.Tensor, torch.Tensor, Given]:
        """Micro-batch number `number` of this process: the examples' numbers, latents and conditions, on the CPU."""
        start = number * micro_batch + accelerator.process_index * config.train_batch_size
        numbers = torch.arange(start, start + config.train_batch_size)
        flipped = (uniform(config.seed, Stream.FLIP, numbers) < 0.5).numpy() if latents.flips else None
        records = latents.records(order.indices(numbers.numpy()))
        return numbers, latents.normalized(records, flipped), conditions.given(records, flipped, numbers)

    if accelerator.is_main_process:
        save_config(asked, saved_config)
        logger.info(
            "%d images as latents of %s in %s (std %.3g before normalization)",
            len(latents), "x".join(map(str, latents.shape)), latents.folder, latents.std,
        )  # fmt: skip
        logger.info(
            "U-Net of %.2f million parameters%s, %d steps of %d images (%.1f epochs)%s",
            unet.num_parameters() / 1e6, f", cut over {accelerator.num_processes} processes" if sharding else "",
            config.max_train_steps, images_per_step,
            config.max_train_steps * images_per_step / len(latents),
            f", going on from step {first_step}" if first_step else "",
        )  # fmt: skip
    tracker = Tracker(
        accelerator,
        output_dir,
        "unet",
        config,
        first_step,
        config.max_train_steps,
        images_per_step,
        len(latents),
    )
    publisher = make_publisher(config, accelerator, "unet", tracker.say)

    # ------------------------------------------------------------------------------------------- the chapters
    def save(step: int) -> None:
        state = {
            "step": step,
            "images_per_step": images_per_step,
            "latents": latents.folder.name,
            "autoencoder": autoencoder_hash,
            "conditions": conditions.meaning(),
            "model": unet.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.optimizer.state_dict(),
            "skipped": skipped.counts,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
        }
        state = gather(state, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            checkpoints.save(step, state)
        accelerator.wait_for_everyone()

    # what the grids are drawn with
    shown = of_held_out.shown(held_out, config.num_validation_samples, config.guidance_scale)
    for of_split in images:  # their latents are what is trained on
        of_split.source.release()

    def sampler(averaged: StockUNet) -> LatentDDPMPipeline:
        pipeline = LatentDDPMPipeline(
            autoencoder, averaged, sampling_scheduler(config), **conditions.pipeline_arguments()
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def validate() -> None:
        averaged = whole_unet(ema.model, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            # the averaged weights on held-out images; their noise and times are the same at every validation
            total, micro_batch = 0.0, config.train_batch_size
            for start in range(0, len(held_out), micro_batch):
                numbers = torch.arange(start, min(start + micro_batch, len(held_out)))
                records = held_out.records(numbers.numpy())
                clean = held_out.normalized(records).to(device)
                batch = training_batch(clean, numbers.to(device), config, alphas_cumprod)
                given = to_device(of_held_out.given(records), device)
                noisy, words = unet_inputs(batch.noisy, given)
                with accelerator.autocast():
                    total += float(batch.loss(averaged(noisy, batch.timesteps, **words).sample)) * len(numbers)
            if len(held_out):
                tracker.log(validation_loss=total / len(held_out))

            pipeline = sampler(averaged)
            numbers = torch.arange(config.num_validation_samples, device=device)
            with accelerator.autocast():
                pictures = pipeline(
                    batch_size=len(numbers),
                    latents=normal(config.seed, Stream.SAMPLE, numbers, latents.shape),
                    num_inference_steps=config.num_inference_steps,
                    output_type="pt",
                    **shown,
                ).images
            path = tracker.image(make_grid(pictures.cpu() * 2 - 1))
            tracker.bar.write(f"unet step {tracker.step}: samples in {path}")
        accelerator.wait_for_everyone()
        tracker.pause()

    def export() -> StockUNet | None:
        averaged = whole_unet(ema.model, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            scheduler = sampling_scheduler(config)
            export_pipeline(
                output_dir / "pipeline",
                autoencoder,
                averaged,
                scheduler,
                config.num_inference_steps,
                **conditions.pipeline_arguments(),
            )
        return averaged

    def publish(step: int) -> None:
        export()
        if publisher is not None:
            publisher.push(f"U-Net after {step} steps")

    # ---------------------------------------------------------------------------------------------- training
    snapshot_steps = math.ceil(config.max_train_steps / config.ema_snapshots) if config.ema_snapshots else 0
    stop = StopSignal()
    ended_at, accumulation = first_step, config.gradient_accumulation_steps
    batches = read_ahead(examples, first_step * accumulation, config.max_train_steps * accumulation)
    for step in range(first_step, config.max_train_steps):
        rate = learning_rate_factor(step, config)
        set_learning_rate(optimizer, rate * config.learning_rate)
        torch.manual_seed(seed_for_step(config.seed, step, accelerator.process_index))  # for dropout
        total_loss = torch.zeros((), device=device)
        for _ in range(config.gradient_accumulation_steps):
            numbers, clean, given = next(batches)
            clean, given = clean.to(device, non_blocking=True), to_device(given, device)
            batch = training_batch(clean, numbers.to(device), config, alphas_cumprod)
            noisy, words = unet_inputs(batch.noisy, given)
            with accelerator.accumulate(model):
                loss = batch.loss(model(noisy, batch.timesteps, **words).sample)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    grad_norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                    skipped.add(kept)
                optimizer.step()
                optimizer.zero_grad()
            total_loss += loss.detach() / config.gradient_accumulation_steps
        ema.update(unet, step)
        tracker.advance()
        ended_at = step + 1

        # -------------------------------------------------------------------------- what the step leaves behind
        if ended_at % config.logging_steps == 0 or ended_at == config.max_train_steps:
            mean_loss = float(accelerator.reduce(total_loss, "mean"))
            skipped.report(tracker.say)
            tracker.log(loss=mean_loss, grad_norm=float(grad_norm), learning_rate=rate * config.learning_rate)
        if snapshot_steps and (ended_at % snapshot_steps == 0 or ended_at == config.max_train_steps):
            ema.save_snapshots(output_dir / "ema", ended_at, keep=accelerator.is_main_process)
            tracker.pause()
        if ended_at % config.validation_steps == 0 or ended_at == config.max_train_steps:
            validate()
            if config.push_to_hub and config.hub_strategy == "best" and is_best(output_dir, "unet", ended_at):
                publish(ended_at)
        if stop.should_stop() and ended_at < config.max_train_steps:
            save(ended_at)
            tracker.close()
            if publisher is not None:
                publisher.finish(wait=False)
            logger.info("stopped at step %d; the same command goes on from there", ended_at)
            return stop.exit_status
        if ended_at % config.checkpointing_steps == 0 or ended_at == config.max_train_steps:
            save(ended_at)
            if config.push_to_hub and config.hub_strategy == "checkpoint" and ended_at < config.max_train_steps:
                publish(ended_at)
            tracker.pause()
    tracker.close()

    # ------------------------------------------------------------------------------------------------ export
    averaged = export()
    if accelerator.is_main_process:
        four = {name: value[:4] if isinstance(value, torch.Tensor) else value for name, value in shown.items()}
        _, film = draw_film(  # (4, S, C, R, R)
            sampler(averaged), 4, config.seed, torch.arange(4), config.num_inference_steps, **four
        )
        save_png(make_grid(film.flatten(0, 1) * 2 - 1, film.shape[1]), output_dir / "samples" / "film_strip.png")
    if publisher is not None and config.hub_strategy != "best":
        publisher.push(f"U-Net after {config.max_train_steps} steps")
    if accelerator.is_main_process:
        logger.info("the pipeline is in %s", output_dir / "pipeline")
        tracker.finish()
    if publisher is not None:
        publisher.finish()
    accelerator.wait_for_everyone()
    return 0


if __name__ == "__main__":
    run(main)
