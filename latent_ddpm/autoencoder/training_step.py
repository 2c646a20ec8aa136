"""One optimizer step of stage 1: the autoencoder's losses and their balance, then the discriminator's.

Every loss on pixels is differentiated down to the reconstruction only. The pixel gradients are balanced (VQGAN's
adaptive weight, arXiv 2012.09841, eq. 7) and pass through decoder and encoder together, in one backward pass.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latent_ddpm.autoencoder.discriminator import PatchDiscriminator
from latent_ddpm.autoencoder.equivariance import Transform, transform_of
from latent_ddpm.autoencoder.losses import (
    HeldWeight,
    adaptive_weight,
    adversarial_ramp,
    discriminator_loss,
    generator_loss,
    input_gradient,
    lecam_penalty,
    r1_penalty,
    reconstruction_loss,
)
from latent_ddpm.autoencoder.quantizers import EMACodebook
from latent_ddpm.autoencoder.start import Start, take_weights
from latent_ddpm.autoencoder.vqvae import Autoencoder, AutoencoderOutput
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.errors import UserError
from latent_ddpm.training.acceleration import (
    align_state,
    compile_networks,
    next_iteration,
    reads_are_free,
    set_layout,
    strict,
    uncompiled,
)
from latent_ddpm.training.checkpoint import must_fit
from latent_ddpm.training.ema import EMA
from latent_ddpm.training.optim import clip_gradients, make_optimizer, set_learning_rate
from latent_ddpm.training.skipped import SkippedSteps

Losses = dict[str, torch.Tensor]  # detached scalars, by their names in metrics.jsonl


class AutoencoderStep:
    """The networks, averages and optimizers of stage 1, and what one optimizer step does with them.

    Args:
        config: of the run, in steps.
        accelerator: of the run.
        lpips: the perceptual distance, or None where lpips_weight is 0.
        state: a checkpoint that holds `state_dict()`, or None for a new run, whose weights follow from config.seed.
        first_step: number of optimizer steps done.

    Attributes:
        autoencoder: the trained autoencoder, without the wrappers of accelerate.
        discriminator: likewise; None where disc_weight is 0.
        start: the pretrained autoencoder that this one starts from, or None.
        ema: the averaged autoencoder, which is validated and exported.
        epoch_counts: float (K,), uses of each code since the caller last zeroed it; empty without a codebook.
        disc_begins: step at which the discriminator enters.
        skipped: counters of the steps skipped for gradients that are not finite, one per network.

    Raises:
        UserError: the checkpoint has other networks, or fp16 is combined with gradient accumulation and a
            discriminator.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        accelerator: Accelerator,
        lpips: nn.Module | None,
        state: dict[str, Any] | None,
        first_step: int,
        start: Start | None = None,
    ) -> None:
        self.config, self.accelerator, saved = config, accelerator, state or {}
        torch.manual_seed(config.seed)
        self.autoencoder, self.start = Autoencoder(config), start
        if start is not None:
            take_weights(self.autoencoder, start, config.freeze_encoder)
        if config.gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        trained = [parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, config, config.learning_rate, config.optimizer)
        self.discriminator = disc_optimizer = None
        self._disc_rate = config.learning_rate if config.disc_learning_rate is None else config.disc_learning_rate
        if config.disc_weight > 0:
            self.discriminator = PatchDiscriminator(
                config.image_channels, config.disc_channels, config.disc_layers, config.disc_norm
            )
            betas = (config.disc_adam_beta1, config.disc_adam_beta2)
            disc_optimizer = make_optimizer(self.discriminator.parameters(), config, self._disc_rate, betas=betas)
        self.epoch_counts = torch.zeros(self.autoencoder.quantizer.num_embeddings)
        self.ema = EMA(self.autoencoder, config.ema_decay)
        # A run without a discriminator can be resumed with one, which then enters at once. Until then it has
        # its initial weights and is not saved.
        self.disc_begins = max(config.disc_start, first_step)
        if state:
            self._load(state, optimizer, disc_optimizer)
        for network in (self.autoencoder, self.ema.model, self.discriminator, lpips):
            if network is not None:
                set_layout(network, config, accelerator.device)
        self._model, self._optimizer = accelerator.prepare(self.autoencoder, optimizer)
        align_state(optimizer)
        self._disc_model = self._disc_optimizer = None
        if self.discriminator is not None:
            self._disc_model, self._disc_optimizer = accelerator.prepare(self.discriminator, disc_optimizer)
            align_state(disc_optimizer)
        scaled, device = accelerator.scaler is not None, accelerator.device
        if scaled and self.discriminator is not None and config.gradient_accumulation_steps > 1:
            raise UserError(  # both networks share one scale, which may change between their last backward passes
                "mixed_precision fp16 with a discriminator cannot accumulate gradients: use bf16, or "
                "gradient_accumulation_steps 1."
            )
        self.ema.model.to(device)
        self.epoch_counts = self.epoch_counts.to(device)
        self._lpips = lpips.to(device) if lpips is not None else None
        # The quantizer stays as it is: it is cheap, and changes at codebook_start. torch.compile cannot differentiate
        # twice, which the R1 penalty needs.
        compiled_discriminator = self.discriminator if config.disc_r1_weight == 0 else None
        parts = (self.autoencoder.encoder, self.autoencoder.decoder, compiled_discriminator, self._lpips)
        compile_networks(parts, config)
        self.skipped = {
            "skipped": SkippedSteps("autoencoder", saved.get("skipped"), device, scaled),
            "disc_skipped": SkippedSteps("discriminator", saved.get("disc_skipped"), device, scaled),
        }
        # A checkpoint with a discriminator, but without a held weight, was written before weights were held.
        never_held = "held_weight" not in saved and saved.get("discriminator") is not None
        self._alone = None if never_held else config.disc_adaptive_steps
        self._held_weight = HeldWeight(self._alone, saved.get("held_weight"), device)

    def _load(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer, disc_optimizer: torch.optim.Optimizer | None
    ) -> None:
        if self.config.freeze_encoder and state.get("start") != self.start.identity:
            raise UserError(
                f"The checkpoint was trained with the encoder of other weights than those of init_from "
                f"{self.start.name}. Give the same ones, or use a new --output_dir."
            )
        with must_fit(self.config.resume_from_checkpoint):
            self.autoencoder.load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        self.epoch_counts = state["epoch_counts"]
        if self.discriminator is None or state["discriminator"] is None:
            return
        self.disc_begins = state.get("disc_begins", self.config.disc_start)
        try:
            self.discriminator.load_state_dict(state["discriminator"])
        except RuntimeError as error:
            raise UserError(
                "The checkpoint's discriminator has another shape (disc_norm, disc_channels, disc_layers). Resume from "
                "a checkpoint before it entered, with another --output_dir."
            ) from error
        disc_optimizer.load_state_dict(state["disc_optimizer"])

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` optimizer steps holds of this object."""
        has_entered = self.discriminator is not None and step > self.disc_begins
        return {
            "model": self.autoencoder.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self._optimizer.optimizer.state_dict(),
            "disc_begins": self.disc_begins,
            "discriminator": self.discriminator.state_dict() if has_entered else None,
            "disc_optimizer": self._disc_optimizer.optimizer.state_dict() if has_entered else None,
            "epoch_counts": self.epoch_counts,
            "start": self.start.identity if self.start is not None else "",
            **{name: skipped.counts for name, skipped in self.skipped.items()},
            "held_weight": self._held_weight.sums,
        }

    @torch.no_grad()
    def start_codes(self, images: torch.Tensor) -> None:
        """Place the codes on the encoder's outputs, at the step codebook_start; call it in every process.

        Codes of a pretrained autoencoder stay where they are.

        Args:
            images: (B, C, R, R) in [-1, 1], this process's share.
        """
        if self.start is not None:
            if isinstance(self.autoencoder.quantizer, EMACodebook):
                self.autoencoder.quantizer.count_uses(self.autoencoder.encode(images))
            return
        learned = self.config.codebook_start > 0
        with uncompiled():
            self.autoencoder.initialize(images, learned)
        if learned:
            self.ema.restart(
                self.autoencoder
            )  # the latents change basis here, so older weights must not be averaged in

    def step(self, step: int, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], rate: float) -> Losses:
        """One optimizer step of both networks, the codebook and the averages.

        Args:
            step: counted from 0.
            batches: the step's micro-batches, `gradient_accumulation_steps` of them: images (B, C, R, R) in [-1, 1]
                and example numbers int64 (B,), on the device.
            rate: factor on the peak learning rates, 0 to 1.

        Returns:
            The losses, as means over this process's micro-batches.
        """
        config, losses = self.config, {}
        next_iteration(config)
        set_learning_rate(self._optimizer, rate * config.learning_rate)
        transform = transform_of(config.seed, step, config.equivariance_share)
        # The discriminator learns what whole, upright images look like.
        entered = self.discriminator is not None and step >= self.disc_begins
        since_entry = step - self.disc_begins if entered and transform is None else None
        if since_entry is not None:
            set_learning_rate(self._disc_optimizer, rate * self._disc_rate)
        self.autoencoder.plain = self.ema.model.plain = step < config.codebook_start
        networks = [network for network in (self._model, self._disc_model) if network is not None]
        for number, (images, examples) in enumerate(batches):
            if entered and step == self.disc_begins and number == 0:
                with uncompiled():
                    self.discriminator.initialize(images)
            with self.accelerator.accumulate(*networks):
                made, reconstruction = self.generator_step(images, examples, transform, since_entry)
                if since_entry is not None:
                    made |= self.discriminator_step(images, reconstruction)
            for name, value in made.items():
                losses[name] = losses.get(name, 0.0) + value.float() / config.gradient_accumulation_steps
        if since_entry is not None:
            self.discriminator.track(losses["logits_real"], losses["logits_fake"], self._disc_kept)
        counts = None if self.autoencoder.plain else self.autoencoder.quantizer.update(step, self._kept)
        if counts is not None:
            self.epoch_counts += counts
        self.ema.update(self.autoencoder, step)
        return losses

    def generator_step(
        self,
        images: torch.Tensor,
        examples: torch.Tensor,
        transform: Transform | None = None,
        since_entry: int | None = None,
    ) -> tuple[Losses, torch.Tensor]:
        """The autoencoder's losses and backward pass for a micro-batch, and after the last one its optimizer step.

        Args:
            images: (B, C, R, R) in [-1, 1].
            examples: int64 (B,), the example numbers.
            transform: of the latents and images of this step, or None.
            since_entry: steps since the discriminator entered; None leaves the adversarial loss out.

        Returns:
            The losses, and the reconstruction (B, C, R, R), float32.
        """
        config, accelerator = self.config, self.accelerator
        output = self._model(images, examples, transform)
        reconstruction = output.reconstruction
        images = images if transform is None else transform.apply(images)
        pixels = reconstruction.detach().requires_grad_()
        losses, pixel_loss = self._pixel_losses(pixels, images)
        gradient = input_gradient(pixel_loss, pixels)
        if since_entry is not None:
            adversarial, weighted = self._adversarial_gradient(output, pixels, gradient, since_entry)
            losses |= adversarial
            gradient = gradient + weighted
        losses |= output.quantized.figures()
        quantizer_loss = output.quantized.loss(config)
        losses["loss"] = pixel_loss.detach() + quantizer_loss.detach()
        # The derivative of this scalar with respect to the reconstruction is `gradient`.
        with strict(config):
            accelerator.backward((reconstruction * gradient).sum() + quantizer_loss)
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(self._optimizer)
            norm, self._kept = clip_gradients(self._optimizer.optimizer, config.max_grad_norm)
            losses["grad_norm"] = (
                norm * config.gradient_accumulation_steps
            )  # one norm per step: undo the division by the accumulation
            self.skipped["skipped"].add(self._kept)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # On a CPU, held until the next step. Freed here, the C library would return their memory to the system, and
        # each step would fault in new pages (3 times as many page faults, 8 % of the time, with configs/mnist.yaml).
        self._held = (output, pixels, gradient) if reads_are_free(pixels) else None
        return _detached(losses), reconstruction

    def _pixel_losses(self, pixels: torch.Tensor, images: torch.Tensor) -> tuple[Losses, torch.Tensor]:
        """Reconstruction and perceptual loss of pixels (B, C, R, R), and their weighted sum."""
        with self.accelerator.autocast():
            total = reconstruction_loss(pixels, images, self.config.reconstruction_loss)
            losses = {"reconstruction_loss": total}
            if self._lpips is not None:
                perceptual = self._lpips(pixels, images).mean()
                losses["lpips_loss"] = perceptual
                total = total + self.config.lpips_weight * perceptual
        return losses, total

    def _adversarial_gradient(
        self, output: AutoencoderOutput, pixels: torch.Tensor, gradient: torch.Tensor, since_entry: int
    ) -> tuple[Losses, torch.Tensor]:
        """The adversarial loss and weight, and the weighted gradient (B, C, R, R) with respect to the pixels.

        The weight is the adaptive weight, measured or held, times disc_weight times the ramp after the entry.
        """
        config = self.config
        self.discriminator.requires_grad_(False)  # compiled code would compute the gradients of its weights too
        with self.accelerator.autocast():
            loss = generator_loss(self.discriminator(pixels).float(), config.disc_loss)
        adversarial = input_gradient(loss, pixels)
        self.discriminator.requires_grad_(True)
        weight = self._held_weight.held(since_entry)
        if weight is None:
            weight = adaptive_weight(output.features, self.autoencoder.decoder.conv_out, gradient, adversarial)
            self._held_weight.add(since_entry, weight)
        ramp = adversarial_ramp(since_entry, self._alone or 0, config.disc_ramp_steps)
        losses = {"generator_loss": loss, "adaptive_weight": weight}
        return losses, config.disc_weight * ramp * weight * adversarial.nan_to_num()

    def discriminator_step(self, images: torch.Tensor, reconstruction: torch.Tensor) -> Losses:
        """The discriminator's losses and backward pass for a micro-batch, and after the last one its optimizer step.

        Args:
            images: (B, C, R, R) in [-1, 1], the real ones.
            reconstruction: (B, C, R, R), the fake ones; it is detached.
        """
        config, accelerator = self.config, self.accelerator
        # Real and fake in one pass: each parameter's gradient is then ready, and reduced over the processes, once.
        real = images.requires_grad_(config.disc_r1_weight > 0)
        with accelerator.autocast():
            logits = self._disc_model(torch.cat((real, reconstruction.detach())))
        real_logits, fake_logits = logits.float().chunk(2)
        loss = discriminator_loss(real_logits, fake_logits, config.disc_loss)
        losses = {"discriminator_loss": loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        if config.disc_r1_weight > 0:
            losses["r1_penalty"] = r1_penalty(real_logits, real)
            loss = loss + config.disc_r1_weight * losses["r1_penalty"]
        if config.disc_lecam_weight > 0:
            means = self.discriminator.logit_means.clone()
            losses["lecam_penalty"] = lecam_penalty(real_logits, fake_logits, means)
            loss = loss + config.disc_lecam_weight * losses["lecam_penalty"]
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(self._disc_optimizer)
            _, self._disc_kept = clip_gradients(self._disc_optimizer.optimizer, config.max_grad_norm)
            self.skipped["disc_skipped"].add(self._disc_kept)
        self._disc_optimizer.step()
        self._disc_optimizer.zero_grad()
        return _detached(losses)


def _detached(losses: Losses) -> Losses:
    return {name: value.detach() for name, value in losses.items()}
