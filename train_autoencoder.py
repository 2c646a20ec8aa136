"""Stage 1: train a VQ-VAE or KL-VAE from scratch on anybody's images.

    accelerate launch train_autoencoder.py --config configs/mnist.yaml

Leaves <output_dir>/autoencoder/, a stock diffusers VQModel (AutoencoderKL for quantizer kl) whose latents have zero
mean and unit variance; checkpoints, metrics.jsonl and grids of originals over reconstructions lie beside it. Any key
of the config can be overridden (--learning_rate 2e-4). The same command starts a run, goes on where it was stopped, or
says that it is finished.
"""

import itertools
import logging
import math
from pathlib import Path

import torch

from latent_ddpm.autoencoder.discriminator import PatchDiscriminator
from latent_ddpm.autoencoder.equivariance import transform_of
from latent_ddpm.autoencoder.health import Watch, check_images
from latent_ddpm.autoencoder.losses import (
    HeldWeight,
    adaptive_weight,
    adversarial_ramp,
    discriminator_loss,
    generator_loss,
    input_gradient,
    lecam_penalty,
    load_lpips,
    r1_penalty,
    reconstruction_loss,
)
from latent_ddpm.autoencoder.quantizers import images_for_codes, perplexity
from latent_ddpm.autoencoder.scaling import Moments, fold_normalization, overall_std
from latent_ddpm.autoencoder.stock import to_stock
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, parse_config, save_config
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ExampleOrder, eval_batches, next_images, open_image_dataset, train_batches
from latent_ddpm.data.images import to_float
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import read_stream, undecodable
from latent_ddpm.diffusion.ema import EMA
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import reconstruction_grid
from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder
from latent_ddpm.files import replace_folder
from latent_ddpm.publishing.hub import check_before_training, make_publisher
from latent_ddpm.training.checkpoint import CheckpointFolder, must_fit
from latent_ddpm.training.distributed import StopSignal
from latent_ddpm.training.launch import check_before_loading, claim, fit_to_processes, make_accelerator, run
from latent_ddpm.training.metrics import is_best
from latent_ddpm.training.optim import clip_gradients, learning_rate_factor, make_optimizer, set_learning_rate
from latent_ddpm.training.skipped import SkippedSteps
from latent_ddpm.training.tracking import Tracker, is_finished

logger = logging.getLogger("train_autoencoder")

NORMALIZATION_IMAGES = 10_000  # enough for the mean and deviation of the exported latents


def main(argv: list[str]) -> int:
    config = asked = parse_config(AutoencoderConfig, argv)
    output_dir = Path(config.output_dir)
    saved_config = check_before_loading(config, "autoencoder")
    check_before_training(config)
    checkpoints = CheckpointFolder(output_dir / "checkpoints", "autoencoder", config.checkpoints_total_limit)
    state = checkpoints.resume(config.resume_from_checkpoint)
    first_step = state["step"] if state else 0
    lpips = load_lpips(config.lpips_net, config.lpips_weights) if config.lpips_weight > 0 else None

    # ------------------------------------------------------------------------------------------------- data
    if not config.streaming:
        train_source, validation_source = open_sources(config)
    accelerator = make_accelerator(config)
    config = fit_to_processes(config, state, accelerator)
    if config.codebook_start >= config.max_train_steps:  # which may have been given in images
        raise UserError(
            f"codebook_start {config.codebook_start} is not before the end of the run, step {config.max_train_steps}."
        )
    if is_finished(config, "autoencoder", first_step, "autoencoder/config.json"):
        logger.info("all %d steps are done; the autoencoder is in %s", first_step, output_dir / "autoencoder")
        return 0
    if accelerator.is_main_process:
        claim(output_dir, "autoencoder")
    if config.streaming:
        read_stream(config, accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        train_source, validation_source = open_sources(config)
    total = len(train_source) + len(validation_source) + undecodable(config)
    bad_images = BadImages(output_dir / "bad_images.jsonl", total, config.max_bad_image_share)
    train_set, validation_set = (
        open_image_dataset(
            source,
            config,
            output_dir / "cache",
            bad_images,
            train=is_train,
            is_main=accelerator.is_main_process,
            wait=accelerator.wait_for_everyone,
        )
        for source, is_train in ((train_source, True), (validation_source, False))
    )
    bad_images.check()
    order = ExampleOrder(len(train_set), config.seed)
    batches = train_batches(
        train_set,
        order,
        first_step=first_step,
        last_step=config.max_train_steps,
        batch_size=config.train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        accumulation=config.gradient_accumulation_steps,
        num_workers=config.dataloader_num_workers,
    )
    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(train_set) / images_per_step)

    # --------------------------------------------------------------------------------- models and optimizers
    torch.manual_seed(config.seed)
    model = Autoencoder(config)
    optimizer = make_optimizer(model.parameters(), config, config.learning_rate, config.optimizer)
    discriminator = disc_optimizer = None
    disc_learning_rate = config.learning_rate if config.disc_learning_rate is None else config.disc_learning_rate
    if config.disc_weight > 0:
        discriminator = PatchDiscriminator(
            config.image_channels, config.disc_channels, config.disc_layers, config.disc_norm
        )
        betas = (config.disc_adam_beta1, config.disc_adam_beta2)
        disc_optimizer = make_optimizer(discriminator.parameters(), config, disc_learning_rate, betas=betas)
    # A run that had no discriminator can be continued with one, which then begins where it enters. Until then it is
    # as the seed made it, and not saved.
    disc_begins = max(config.disc_start, first_step)
    epoch_counts = torch.zeros(model.quantizer.num_embeddings)  # uses of each code since the epoch began; kl: none
    ema = EMA(model, config.ema_decay)
    if state:
        with must_fit(config.resume_from_checkpoint):
            model.load_state_dict(state["model"])
            ema.model.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        epoch_counts = state["epoch_counts"]
        if discriminator is not None and state["discriminator"] is not None:
            disc_begins = state.get("disc_begins", config.disc_start)
            try:
                discriminator.load_state_dict(state["discriminator"])
            except RuntimeError as error:
                raise UserError(
                    "The checkpoint's discriminator is another one (disc_norm, disc_channels, disc_layers). Go on from "
                    "a checkpoint before it entered, and with another --output_dir."
                ) from error
            disc_optimizer.load_state_dict(state["disc_optimizer"])
    autoencoder, patch_gan = model, discriminator  # as they are, without what accelerate wraps around them
    model, optimizer = accelerator.prepare(model, optimizer)
    if discriminator is not None:
        discriminator, disc_optimizer = accelerator.prepare(discriminator, disc_optimizer)
    if state and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.scaler is not None and discriminator is not None and config.gradient_accumulation_steps > 1:
        raise UserError(  # both networks share one scale, which may change between their last backward passes
            "mixed_precision fp16 with a discriminator cannot accumulate gradients: use bf16, or "
            "gradient_accumulation_steps 1."
        )
    device = accelerator.device
    networks = [network for network in (model, discriminator) if network is not None]
    ema.model.to(device)
    epoch_counts = epoch_counts.to(device)
    lpips = lpips.to(device) if lpips is not None else None
    scaled, saved = accelerator.scaler is not None, state or {}
    skipped = SkippedSteps("autoencoder", saved.get("skipped"), device, scaled)
    disc_skipped = SkippedSteps("discriminator", saved.get("disc_skipped"), device, scaled)
    # A checkpoint without a held weight, but with a discriminator in play, is of a time when it was never held.
    never_held = "held_weight" not in saved and saved.get("discriminator") is not None
    alone = None if never_held else config.disc_adaptive_steps
    held_weight = HeldWeight(alone, saved.get("held_weight"), device)

    if accelerator.is_main_process:
        save_config(asked, saved_config)
        bad = len(bad_images.names())
        logger.info(
            "%d training and %d validation images%s",
            len(train_set), len(validation_set), f", {bad} undecodable ({bad_images.path})" if bad else "",
        )  # fmt: skip
        logger.info(
            "autoencoder of %.2f million parameters, %d steps of %d images (%.1f epochs)%s",
            sum(p.numel() for p in autoencoder.parameters()) / 1e6, config.max_train_steps, images_per_step,
            config.max_train_steps * images_per_step / len(train_set),
            f", going on from step {first_step}" if first_step else "",
        )  # fmt: skip
    tracker = Tracker(
        accelerator,
        output_dir,
        "autoencoder",
        config,
        first_step,
        config.max_train_steps,
        images_per_step,
        len(train_set),
    )
    publisher = make_publisher(config, accelerator, "autoencoder", tracker.say)

    watch = Watch(
        tracker.say,
        len(validation_set) * (config.resolution // 2 ** (len(config.block_out_channels) - 1)) ** 2,
        config,
    )

    # ------------------------------------------------------------------------------------------- the chapters
    def save(step: int) -> None:
        if accelerator.is_main_process:
            scaler = accelerator.scaler
            has_entered = patch_gan is not None and step > disc_begins
            checkpoints.save(
                step,
                {
                    "step": step,
                    "images_per_step": images_per_step,
                    "model": autoencoder.state_dict(),
                    "ema": ema.model.state_dict(),
                    "optimizer": optimizer.optimizer.state_dict(),
                    "disc_begins": disc_begins,
                    "discriminator": patch_gan.state_dict() if has_entered else None,
                    "disc_optimizer": disc_optimizer.optimizer.state_dict() if has_entered else None,
                    "epoch_counts": epoch_counts,
                    "skipped": skipped.counts,
                    "disc_skipped": disc_skipped.counts,
                    "held_weight": held_weight.sums,
                    "scaler": scaler.state_dict() if scaler is not None else {},
                },
            )
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def start_codes(images: torch.Tensor) -> None:
        """Put the codes where the encoder's outputs are: of the first batch or, later, of as many as it takes."""
        learned = config.codebook_start > 0
        if learned:
            first = config.codebook_start * images_per_step
            count = max(images_per_step, images_for_codes(config))
            shares = (first, count, accelerator.process_index, accelerator.num_processes)
            images = to_float(next_images(train_set, order, *shares).to(device))
        autoencoder.initialize(images, learned)
        if learned:
            ema.restart(autoencoder)  # an average over two bases of the latents would belong to neither
            tracker.say("The codes enter.")

    def validate() -> None:
        def reconstruct(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            output = ema.model(images)
            return output.reconstruction, output.quantized.indices

        shares = eval_batches(
            validation_set, config.train_batch_size, accelerator.process_index, accelerator.num_processes
        )
        codes = 0 if autoencoder.plain else len(epoch_counts)
        measured = evaluate_autoencoder(reconstruct, shares, codes, device)
        tracker.log(**{f"validation_{key}": value for key, value in measured.items() if key != "images"})
        if accelerator.is_main_process:
            # spread over the split, which may be sorted by class
            shown = torch.linspace(0, len(validation_set) - 1, min(32, len(validation_set))).long().tolist()
            originals = to_float(torch.stack([validation_set.get(i) for i in shown])).to(device)
            with torch.no_grad():
                reconstructions = reconstruct(originals)[0]
            tracker.image(reconstruction_grid(originals.cpu(), reconstructions.cpu()))
            tracker.histogram(latents=ema.model.encode(originals))
            if codes:
                tracker.histogram(uses_of_a_code=epoch_counts)
            said = f"validation PSNR {measured['psnr']:.2f} dB"
            if codes:
                said += f", {measured['codebook_usage']:.1%} of codes in use, perplexity {measured['perplexity']:.0f}"
            tracker.say(said)
            watch.validation(measured, tracker.step / config.max_train_steps)
        accelerator.wait_for_everyone()
        tracker.pause()

    def export() -> None:
        moments = Moments(config.latent_channels)
        shares = eval_batches(train_set, config.train_batch_size, accelerator.process_index, accelerator.num_processes)
        with torch.no_grad():
            for batch in shares:
                moments.add(ema.model.encode(to_float(batch["image"].to(device))))
                if len(batch["image"]) and moments.images * accelerator.num_processes >= NORMALIZATION_IMAGES:
                    break
        mean, variance = moments.result(device)
        std = overall_std(variance)
        if not std > 1e-6:
            tracker.say("The latents do not vary, so they are exported as they are, without a scale of their own.")
            std = 1.0
        if accelerator.is_main_process:
            stock = fold_normalization(to_stock(ema.model, config), mean.cpu(), std)
            replace_folder(
                output_dir / "autoencoder", lambda aside: stock.save_pretrained(aside, safe_serialization=True)
            )

    def publish(step: int) -> None:
        export()
        if publisher is not None:
            publisher.push(f"Autoencoder after {step} steps")

    # ---------------------------------------------------------------------------------------------- training
    stop = StopSignal()
    ended_at = first_step
    for step in range(first_step, config.max_train_steps):
        rate = learning_rate_factor(step, config)
        set_learning_rate(optimizer, rate * config.learning_rate)
        transform = transform_of(config.seed, step, config.equivariance_share)
        # The discriminator learns what whole, upright images look like.
        entered = discriminator is not None and step >= disc_begins
        adversarial = entered and transform is None
        if adversarial:
            set_learning_rate(disc_optimizer, rate * disc_learning_rate)
        if step % steps_per_epoch == 0:
            epoch_counts.zero_()
        autoencoder.plain = ema.model.plain = step < config.codebook_start
        losses: dict[str, torch.Tensor] = {}

        def note(name: str, value: torch.Tensor, losses: dict[str, torch.Tensor] = losses) -> None:
            losses[name] = losses.get(name, 0.0) + value.detach().float() / config.gradient_accumulation_steps

        for batch in itertools.islice(batches, config.gradient_accumulation_steps):
            images = to_float(batch["image"].to(device, non_blocking=True))
            if step == 0 and not losses:
                check_images(images, len(train_set), tracker.say)
            if step == config.codebook_start and not losses:
                start_codes(images)
            if entered and step == disc_begins and not losses:
                patch_gan.initialize(images)
            with accelerator.accumulate(*networks):
                output = model(images, batch["example"].to(device, non_blocking=True), transform)
                reconstruction = output.reconstruction
                images = images if transform is None else transform.apply(images)
                # Each loss on pixels is differentiated down to the reconstruction only. Their gradients are then
                # balanced and go through decoder and encoder together, in one pass, and no graph is kept.
                pixels = reconstruction.detach().requires_grad_()
                with accelerator.autocast():
                    pixel_loss = reconstruction_loss(pixels, images, config.reconstruction_loss)
                    note("reconstruction_loss", pixel_loss)
                    if lpips is not None:
                        perceptual_loss = lpips(pixels, images).mean()
                        note("lpips_loss", perceptual_loss)
                        pixel_loss = pixel_loss + config.lpips_weight * perceptual_loss
                gradient = input_gradient(pixel_loss, pixels)
                if adversarial:
                    with accelerator.autocast():
                        adversarial_loss = generator_loss(patch_gan(pixels).float(), config.disc_loss)
                    adversarial_gradient = input_gradient(adversarial_loss, pixels)
                    weight = held_weight.held(step - disc_begins)
                    if weight is None:
                        last_layer = autoencoder.decoder.conv_out
                        weight = adaptive_weight(output.features, last_layer, gradient, adversarial_gradient)
                        held_weight.add(step - disc_begins, weight)
                    ramp = adversarial_ramp(step, disc_begins + (alone or 0), config.disc_ramp_steps)
                    gradient = gradient + config.disc_weight * ramp * weight * adversarial_gradient.nan_to_num()
                    note("generator_loss", adversarial_loss)
                    note("adaptive_weight", weight)
                for name, value in output.quantized.figures().items():
                    note(name, value)
                quantizer_loss = output.quantized.loss(config)
                note("loss", pixel_loss.detach() + quantizer_loss.detach())
                # The derivative of this scalar by the reconstruction is `gradient`.
                accelerator.backward((reconstruction * gradient).sum() + quantizer_loss)
                if accelerator.sync_gradients:
                    accelerator.unscale_gradients(optimizer)
                    norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                    note("grad_norm", norm * config.gradient_accumulation_steps)
                    skipped.add(kept)
                optimizer.step()
                optimizer.zero_grad()
                if adversarial:
                    # Real and fake in one pass: each parameter's gradient is then ready, and reduced, once.
                    real = images.requires_grad_(config.disc_r1_weight > 0)
                    with accelerator.autocast():
                        logits = discriminator(torch.cat((real, reconstruction.detach())))
                    real_logits, fake_logits = logits.float().chunk(2)
                    disc_loss = discriminator_loss(real_logits, fake_logits, config.disc_loss)
                    note("discriminator_loss", disc_loss)
                    note("logits_real", real_logits.mean())
                    note("logits_fake", fake_logits.mean())
                    if config.disc_r1_weight > 0:
                        penalty = r1_penalty(real_logits, real)
                        disc_loss = disc_loss + config.disc_r1_weight * penalty
                        note("r1_penalty", penalty)
                    if config.disc_lecam_weight > 0:
                        penalty = lecam_penalty(real_logits, fake_logits, patch_gan.logit_means.clone())
                        disc_loss = disc_loss + config.disc_lecam_weight * penalty
                        note("lecam_penalty", penalty)
                    accelerator.backward(disc_loss)
                    if accelerator.sync_gradients:
                        accelerator.unscale_gradients(disc_optimizer)
                        _, disc_kept = clip_gradients(disc_optimizer.optimizer, config.max_grad_norm)
                        disc_skipped.add(disc_kept)
                        patch_gan.track(losses["logits_real"], losses["logits_fake"], disc_kept)
                    disc_optimizer.step()
                    disc_optimizer.zero_grad()
        counts = None if autoencoder.plain else autoencoder.quantizer.update(step, kept)
        if counts is not None:
            epoch_counts += counts
        ema.update(autoencoder, step)
        tracker.advance()
        ended_at = step + 1

        # -------------------------------------------------------------------------- what the step leaves behind
        if ended_at % config.logging_steps == 0 or ended_at == config.max_train_steps:
            names = sorted(losses)
            values = accelerator.reduce(torch.stack([losses[name].reshape(()) for name in names]), "mean").tolist()
            measured = dict(zip(names, values, strict=True))
            skipped.report(tracker.say)
            disc_skipped.report(tracker.say)
            watch.training(measured)
            if len(epoch_counts) and not autoencoder.plain:
                measured["codebook_usage"] = float((epoch_counts > 0).float().mean())
                measured["perplexity"] = perplexity(epoch_counts)
            tracker.log(**measured, learning_rate=rate * config.learning_rate)
            bad_images.check()
        if ended_at % config.validation_steps == 0 or ended_at == config.max_train_steps:
            validate()
            by_validation = config.push_to_hub and config.hub_strategy == "best"
            if by_validation and is_best(output_dir, "autoencoder", ended_at, after=config.codebook_start):
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
            every = config.push_to_hub and config.hub_strategy == "checkpoint" and ended_at < config.max_train_steps
            if every and ended_at > config.codebook_start:  # before, it could not be published as what it will be
                publish(ended_at)
            tracker.pause()
    tracker.close()

    # ------------------------------------------------------------------------------------------------ export
    export()
    if publisher is not None and config.hub_strategy != "best":
        publisher.push(f"Autoencoder after {config.max_train_steps} steps")
    if accelerator.is_main_process:
        logger.info("the autoencoder is in %s", output_dir / "autoencoder")
        tracker.finish()
    if publisher is not None:
        publisher.finish()
    accelerator.wait_for_everyone()
    return 0


if __name__ == "__main__":
    run(main)
