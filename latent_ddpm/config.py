"""Configs: one YAML file is one reproducible run of both stages; any key can be overridden on the command line.

Keys at the top level of the YAML file hold for both stages; the sections `train_autoencoder:` and
`train_unet:` hold the keys of one stage (and may override a common one for it). Each stage sees one flat,
typed config. Types, ranges and combinations are checked before anything is loaded.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_whole

MAX_SIGMA_REL = 0.28  # of an average of weights; the plain mean of all has 12^-0.5 = 0.289 (ema.gamma_of)
LPIPS_MIN_PIXELS = {"vgg": 16, "alex": 31, "squeeze": 17}  # below, a pooling layer of the trunk has no output
EMBEDDED_ENCODER = "embedded:minilm"  # see latent_ddpm/data/captions.py
SECTIONS = ("train_autoencoder", "train_unet")


@dataclass(kw_only=True)
class RunConfig:
    """What both stages share.

    Args:
        output_dir: the run's folder; both stages work in the same one.
        seed: with the example number it determines order, augmentation, timesteps and noise.
        train_data_dir: a folder of images, nested as you like; folder names become labels.
        dataset_name: a Hub id, a local dataset folder, parquet files, tar files (WebDataset), or `embedded:mnist`.
        dataset_config_name: the configuration of a Hub dataset that has several.
        streaming: read dataset_name once, from front to back, and keep of each image only what training sees of it.
        image_column: the column of `dataset_name` that holds the images.
        resolution: images are brought to this many pixels square.
        image_channels: 1 (grayscale) or 3 (RGB).
        center_crop: crop the centre; false crops at a random place (stage 1 only, the latent cache has the centre).
        random_flip: mirror half of the images (in the latent cache: keep both versions).
        validation_fraction: share held out when the dataset has no validation split of its own.
        max_validation_images: at most so many validation images.
        max_bad_image_share: stop when more than this share of the images cannot be decoded.
        image_cache_gib: decode once and keep when the decoded images fit into so many GiB; 0 never keeps.
        dataloader_num_workers: processes that decode images.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead, and ends the others; 0
            has them wait for it.
        train_batch_size: images per process and micro-batch.
        gradient_accumulation_steps: micro-batches per optimizer step.
        max_train_steps: optimizer steps in all.
        learning_rate: the peak learning rate.
        max_train_images: images in all; sets max_train_steps by what a step sees, so that the number of processes does
            not change the length of the run. So do lr_warmup_images and lr_decay_images for their keys.
        lr_scheduler: what follows the warm-up: constant, cosine or linear decay to 0, or warmup_stable_decay, which is
            constant and then falls linearly to 0 over lr_decay_steps.
        lr_warmup_steps: steps over which the learning rate rises from 0.
        lr_warmup_images: the same in images.
        lr_decay_steps: of warmup_stable_decay; unset takes the last 3 tenths of the run.
        lr_decay_images: the same in images.
        optimizer: adamw, or muon (arXiv 2502.16982), which has AdamW for what is no matrix.
        adam_beta1: AdamW's decay of the first moment.
        adam_beta2: AdamW's decay of the second moment.
        adam_epsilon: AdamW's epsilon.
        adam_weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: no, bf16 or fp16; unset takes what `accelerate launch` says.
        report_to: tensorboard, wandb, trackio or none; metrics.jsonl is always written.
        tracker_project_name: the project at wandb or trackio.
        logging_steps: steps between lines of metrics.
        validation_steps: steps between validations, each with a picture grid.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: keep so many of the newest checkpoints.
        resume_from_checkpoint: `latest` (the newest undamaged one in output_dir, if any), or a checkpoint's folder;
            null starts afresh, and refuses a folder that holds checkpoints.
        push_to_hub: publish what the run makes; no failure of the Hub stops training.
        hub_model_id: `user/name` or `name` of the repository; unset takes the name of output_dir.
        hub_private_repo: make the repository private; one that exists and is public is refused.
        hub_token: a token that may write, on the command line only, where others may see it: better set HF_TOKEN, or
            run `hf auth login` once.
        hub_strategy: push at the end, at every checkpoint in the background, or whenever validation was never better.
        hub_variants: weights published beside the float32 ones, for `from_pretrained(..., variant="fp16")`.
        hub_license: what the card says of the model's licence, by the Hub's identifiers (apache-2.0, cc-by-4.0, ...).
    """

    output_dir: str = "outputs/run"
    seed: int = 0
    train_data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    streaming: bool = False
    image_column: str = "image"
    resolution: int = 64
    image_channels: int = 3
    center_crop: bool = True
    random_flip: bool = False
    validation_fraction: float = 0.05
    max_validation_images: int = 1000
    max_bad_image_share: float = 0.05
    image_cache_gib: float = 4.0
    dataloader_num_workers: int = 2
    heartbeat_timeout: float = 20.0
    train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 10_000
    learning_rate: float = 2e-4
    max_train_images: int | None = None
    lr_scheduler: Literal["constant", "cosine", "linear", "warmup_stable_decay"] = "constant"
    lr_warmup_steps: int = 100
    lr_warmup_images: int | None = None
    lr_decay_steps: int | None = None
    lr_decay_images: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "none"
    tracker_project_name: str = "latent-ddpm"
    logging_steps: int = 10
    validation_steps: int = 500
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = "latest"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    hub_token: str | None = None
    hub_strategy: Literal["end", "checkpoint", "best"] = "end"
    hub_variants: list[Literal["fp16", "bf16"]] = dataclasses.field(default_factory=list)
    hub_license: str | None = None

    def validate(self) -> None:
        """Raise UserError naming the key when a value or a combination is impossible."""
        if (self.train_data_dir is None) == (self.dataset_name is None):
            have = "both are set" if self.train_data_dir else "neither is set"
            raise UserError(f"Set exactly one of train_data_dir and dataset_name ({have}).")
        if self.streaming and (self.dataset_name is None or self.dataset_name.startswith("embedded:")):
            raise UserError("streaming is for a dataset_name: a folder's and the embedded images are here already.")
        if self.streaming and not self.center_crop:
            raise UserError("streaming keeps the centre of each image, so center_crop cannot be false.")
        _require(self.image_channels in (1, 3), "image_channels", self.image_channels, "1 (grayscale) or 3 (RGB)")
        positive = ("resolution", "max_validation_images", "train_batch_size", "gradient_accumulation_steps")
        positive += ("max_train_steps", "logging_steps", "validation_steps", "checkpointing_steps")
        positive += ("checkpoints_total_limit", "learning_rate", "max_grad_norm", "adam_epsilon")
        for key in positive:
            _require(getattr(self, key) > 0, key, getattr(self, key), "greater than 0")
        nonnegative = ("seed", "lr_warmup_steps", "image_cache_gib", "dataloader_num_workers", "heartbeat_timeout")
        for key in (*nonnegative, "adam_weight_decay"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("max_train_images", "lr_warmup_images", "lr_decay_steps", "lr_decay_images"):
            value = getattr(self, key)
            _require(value is None or value > 0, key, value, "greater than 0, or null")
        if self.lr_scheduler != "warmup_stable_decay" and (self.lr_decay_steps or self.lr_decay_images):
            raise UserError("lr_decay_steps and lr_decay_images are for lr_scheduler warmup_stable_decay.")
        for key in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "at least 0 and below 1")
        _require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        _require(0 <= self.max_bad_image_share <= 1, "max_bad_image_share", self.max_bad_image_share, "in 0 to 1")


@dataclass(kw_only=True)
class AutoencoderConfig(RunConfig):
    """Stage 1: the autoencoder, its losses and its discriminator.

    Args:
        block_out_channels: channels per resolution; each level but the last halves the resolution.
        layers_per_block: residual blocks per level of the encoder (the decoder has one more, as in stock VQModel).
        norm_num_groups: groups of each group norm.
        latent_channels: channels of the latents, which are also the width of a code.
        num_vq_embeddings: codes in the codebook (not kl).
        mid_block_add_attention: attention at the lowest resolution; its cost grows with the square of the pixels.
        quantizer: ema (codes are moving averages, arXiv 1711.00937), simvq (one learned map of a frozen table,
            arXiv 2411.02038), fsq (a fixed grid, arXiv 2309.15505) or kl (no codes but a Gaussian posterior, LDM's
            KL-VAE, arXiv 2112.10752).
        fsq_levels: values per latent channel of fsq's grid; their product is num_vq_embeddings.
        fsq_balance_weight: weight of the loss that moves encoder outputs to codes of fsq's grid that lie idle.
        gradient_estimator: how gradients pass the choice of a code: straight_through, or rotation (arXiv 2410.06424).
        kl_weight: weight of kl's divergence from the standard normal, on the scale of LDM's own 1e-6.
        codebook_start: step at which the codes enter; until then the network learns as a plain autoencoder, which keeps
            more of the latent channels alive.
        codebook_decay: decay of the codebook's moving averages (arXiv 1711.00937, appendix A.1).
        codebook_revive_below: a code used less than this share of the mean is put on an encoder output (ema, simvq).
        commitment_weight: weight of the commitment loss (arXiv 1711.00937, eq. 3).
        equivariance_share: share of the steps that train on turned or halved latents (arXiv 2502.09509).
        latent_noise: noise on the latents in training, in standard deviations of an image's own latents.
        reconstruction_loss: l1 or l2 between pixels in -1..1.
        lpips_weight: weight of the perceptual loss (arXiv 1801.03924); 0 switches it off.
        lpips_net: trunk of the perceptual loss.
        lpips_weights: a file of the trunk's ImageNet weights (torchvision's .pth); unset takes torch's cache.
        ema_decay: decay per step of the averaged weights, warmed up as min(ema_decay, (1 + step) / (10 + step)).
        disc_weight: factor on the adaptive weight of the adversarial loss; 0 switches the discriminator off.
        disc_adaptive_steps: the discriminator first learns alone for so many steps, at the end of which the adaptive
            weight is measured, and then held; null measures it at every step, as VQGAN does.
        disc_start: step at which the discriminator enters.
        disc_ramp_steps: steps over which the adversarial weight then rises from 0.
        disc_loss: hinge (arXiv 1705.02894) or non_saturating (arXiv 1406.2661).
        disc_norm: spectral (arXiv 1802.05957), actnorm (arXiv 1807.03039) or none.
        disc_r1_weight: weight of the R1 gradient penalty (arXiv 1801.04406); about doubles the discriminator's time.
        disc_lecam_weight: weight of LeCam regularization (arXiv 2104.03310).
        disc_channels: channels of the discriminator's first layer.
        disc_layers: stride-2 layers of the PatchGAN discriminator.
        disc_learning_rate: learning rate of the discriminator; unset takes learning_rate.
        disc_adam_beta1: its AdamW's decay of the first moment; 0 is no momentum (StyleGAN2, arXiv 1912.04958, app. B).
        disc_adam_beta2: its AdamW's decay of the second moment.
    """

    block_out_channels: list[int] = dataclasses.field(default_factory=lambda: [64, 128, 128])
    layers_per_block: int = 1
    norm_num_groups: int = 16
    latent_channels: int = 3
    num_vq_embeddings: int = 1024
    mid_block_add_attention: bool = False
    quantizer: Literal["ema", "simvq", "fsq", "kl"] = "ema"
    fsq_levels: list[int] | None = None
    fsq_balance_weight: float = 0.03
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"
    kl_weight: float = 1e-6
    codebook_start: int = 0
    codebook_decay: float = 0.99
    codebook_revive_below: float = 0.05
    commitment_weight: float = 0.25
    equivariance_share: float = 0.0
    latent_noise: float = 0.0
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    lpips_weight: float = 0.0
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    lpips_weights: str | None = None
    ema_decay: float = 0.999
    disc_weight: float = 0.0
    disc_adaptive_steps: int | None = 200
    disc_start: int = 0
    disc_ramp_steps: int = 0
    disc_loss: Literal["hinge", "non_saturating"] = "hinge"
    disc_norm: Literal["spectral", "actnorm", "none"] = "spectral"
    disc_r1_weight: float = 0.0
    disc_lecam_weight: float = 0.0
    disc_channels: int = 64
    disc_layers: int = 3
    disc_learning_rate: float | None = None
    disc_adam_beta1: float = 0.0
    disc_adam_beta2: float = 0.99

    def validate(self) -> None:
        """As RunConfig.validate, and that images, downsampling, channels and groups fit."""
        super().validate()
        _require(len(self.block_out_channels) >= 1, "block_out_channels", self.block_out_channels, "a list of channels")
        for key in ("layers_per_block", "norm_num_groups", "latent_channels", "disc_channels", "disc_layers"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "greater than 0")
        _require(self.num_vq_embeddings > 1, "num_vq_embeddings", self.num_vq_embeddings, "greater than 1")
        nonnegative = ("lpips_weight", "latent_noise", "commitment_weight", "codebook_revive_below", "disc_weight")
        for key in (*nonnegative, "disc_start", "disc_ramp_steps", "disc_r1_weight", "disc_lecam_weight"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("kl_weight", "fsq_balance_weight", "codebook_start"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("codebook_decay", "ema_decay", "disc_adam_beta1", "disc_adam_beta2"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "at least 0 and below 1")
        share = self.equivariance_share
        _require(0 <= share <= 1, "equivariance_share", share, "in 0 to 1")
        _require(share < 1 or self.disc_weight == 0, "equivariance_share", share, "below 1 with a discriminator")
        steps = self.disc_adaptive_steps
        _require(steps is None or steps > 0, "disc_adaptive_steps", steps, "greater than 0, or null")
        rate = self.disc_learning_rate
        _require(rate is None or rate > 0, "disc_learning_rate", rate, "greater than 0, or null")
        smallest = self.resolution // (2 if share > 0 else 1)
        needed = LPIPS_MIN_PIXELS[self.lpips_net]
        if self.lpips_weight > 0 and smallest < needed:
            halved = " when halved by equivariance_share" if share > 0 else ""
            raise UserError(
                f"lpips_net {self.lpips_net} needs images of {needed} pixels or more; they have {smallest}{halved}. "
                f"Set lpips_weight 0, or another lpips_net."
            )
        factor = 2 ** (len(self.block_out_channels) - 1)
        if self.equivariance_share > 0 and self.resolution % (2 * factor):
            raise UserError(
                f"equivariance_share needs latents of even sides; those of {self.resolution}-pixel images have "
                f"{self.resolution / factor:g}."
            )
        if self.resolution % factor:
            raise UserError(
                f"resolution {self.resolution} is not divisible by {factor}: the {len(self.block_out_channels)} levels "
                f"of block_out_channels {self.block_out_channels} halve it {len(self.block_out_channels) - 1} times."
            )
        _check_groups(self.block_out_channels, self.norm_num_groups)
        self._check_quantizer()
        if self.disc_weight > 0 and self.resolution < 2 ** (self.disc_layers + 2):
            raise UserError(
                f"disc_layers {self.disc_layers} leaves no patch of a {self.resolution}-pixel image; "
                f"use fewer layers (or disc_weight 0)."
            )

    def _check_quantizer(self) -> None:
        has_codes, start = self.quantizer != "kl", self.codebook_start
        _require(has_codes or start == 0, "codebook_start", start, "0 when quantizer is kl, which has no codes")
        if self.quantizer != "fsq":
            _require(self.fsq_levels is None, "fsq_levels", self.fsq_levels, "unset unless quantizer is fsq")
            usual = self.gradient_estimator == "straight_through"
            want = "unset when quantizer is kl, which has no codes"
            _require(usual or self.quantizer != "kl", "gradient_estimator", self.gradient_estimator, want)
            return
        levels = self.fsq_levels or []
        fits = len(levels) == self.latent_channels and math.prod(levels) == self.num_vq_embeddings
        _require(
            fits and min(levels) > 1,
            "fsq_levels",
            self.fsq_levels,
            f"{self.latent_channels} numbers above 1 (latent_channels) whose product is {self.num_vq_embeddings} "
            "(num_vq_embeddings)",
        )


@dataclass(kw_only=True)
class UNetConfig(RunConfig):
    """Stage 2: the diffusion model on the cached latents.

    Args:
        autoencoder: stage 1's folder (config.json and safetensors); unset takes `<output_dir>/autoencoder`.
        latents_dir: where the latent cache is kept; unset takes `<output_dir>/latents`.
        conditions: what the U-Net is told besides: class, image (an image or semantic map per example), text, any of
            these, or nothing.
        class_dropout: share of the examples whose class is left out, which guidance needs (arXiv 2207.12598).
        conditioning_image_column: the column of the dataset that holds the conditioning images.
        conditioning_image_dir: a folder that holds them, under the names that train_data_dir has, with any suffix.
        conditioning_image_classes: classes of a semantic map, whose pixels are their numbers from 0; unset takes the
            conditioning image as an image.
        conditioning_image_dropout: share of the examples whose conditioning image is left out.
        caption_column: the column that holds the captions, or of a folder the key in NAME.json and metadata files.
        caption_templates: captions made from class names in its place, each with {} for the name.
        caption_dropout: share of the examples whose caption is left out.
        text_encoder: any encoder that transformers loads, frozen: a folder, an id of the Hub, or embedded:minilm.
        max_caption_tokens: captions are cut there.
        export_text_encoder: put encoder and tokenizer into the exported pipeline, which else names text_encoder.
        guidance_scale: of the grids, the exported pipeline's samples in evaluations, and the card; 1 is no guidance.
        unet_block_out_channels: channels per level of the U-Net.
        unet_layers_per_block: residual blocks per level.
        unet_attention_levels: levels (0 is the finest) whose blocks have self-attention.
        unet_attention_head_dim: channels per attention head.
        unet_norm_num_groups: groups of each group norm.
        unet_dropout: dropout inside the residual blocks.
        unet_time_scale_shift: how time and class reach a residual block: `default` adds them to its activations,
            `scale_shift` multiplies these as well (adaptive group normalization, arXiv 2105.05233).
        gradient_checkpointing: compute the U-Net's activations again on the way back in place of keeping them: less
            memory, more time.
        num_train_timesteps: diffusion steps of the training schedule.
        beta_schedule: noise schedule, by the names of diffusers (squaredcos_cap_v2 is cosine, arXiv 2102.09672).
        beta_start: first beta of the linear schedules.
        beta_end: last beta of the linear schedules.
        prediction_type: what the U-Net predicts: the noise, v (arXiv 2202.00512, appendix D), the clean latents, or
            the velocity of a rectified flow (arXiv 2209.03003), for which the beta_ keys mean nothing.
        rescale_betas_zero_snr: have the last of the noise levels be pure noise (arXiv 2305.08891, algorithm 1).
        noise_shift: divides alpha / sigma of every noise level; above 1 for large latents (arXiv 2301.11093).
        timestep_sampling: uniform, stratified (uniform, and every batch covers the schedule evenly), or logit_normal,
            which trains the middle of the schedule more often (arXiv 2403.03206, section 3.1).
        logit_mean: of logit_normal; above 0 trains noisy levels more often.
        logit_std: of logit_normal.
        loss_weighting: uniform (on what is predicted), min_snr (arXiv 2303.09556, section 3.4) or edm (arXiv
            2206.00364, eq. 8).
        snr_gamma: of min_snr.
        inference_scheduler: what the exported pipeline and the grids sample with; the default is DPM-Solver++ of the
            second order (arXiv 2211.01095).
        ema_sigma_rels: widths of the averages of the weights, relative to the training time (arXiv 2312.02696); the
            first is validated, sampled and exported. From two, scripts/reconstruct_ema.py makes any other.
        ema_snapshots: snapshots of the averages kept over the run, in `<output_dir>/ema`, float16; 0 keeps none.
        num_inference_steps: sampling steps of the grids.
        num_validation_samples: images in a sample grid.
    """

    autoencoder: str | None = None
    latents_dir: str | None = None
    conditions: list[Literal["class", "image", "text"]] = dataclasses.field(default_factory=list)
    class_dropout: float = 0.1
    conditioning_image_column: str | None = None
    conditioning_image_dir: str | None = None
    conditioning_image_classes: int | None = None
    conditioning_image_dropout: float = 0.1
    caption_column: str = "text"
    caption_templates: list[str] | None = None
    caption_dropout: float = 0.1
    text_encoder: str | None = None
    max_caption_tokens: int = 77
    export_text_encoder: bool = True
    guidance_scale: float = 1.0
    unet_block_out_channels: list[int] = dataclasses.field(default_factory=lambda: [128, 256, 256])
    unet_layers_per_block: int = 2
    unet_attention_levels: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    unet_attention_head_dim: int = 32
    unet_norm_num_groups: int = 32
    unet_dropout: float = 0.0
    unet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    gradient_checkpointing: bool = False
    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    rescale_betas_zero_snr: bool = False
    noise_shift: float = 1.0
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "v_prediction"
    timestep_sampling: Literal["uniform", "stratified", "logit_normal"] = "stratified"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    loss_weighting: Literal["uniform", "min_snr", "edm"] = "min_snr"
    snr_gamma: float = 5.0
    inference_scheduler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    ema_sigma_rels: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.05])
    ema_snapshots: int = 16
    num_inference_steps: int = 20
    num_validation_samples: int = 64

    def validate(self) -> None:
        """As RunConfig.validate, and that the U-Net's own parts fit together."""
        super().validate()
        for key in ("unet_layers_per_block", "unet_norm_num_groups", "unet_attention_head_dim"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "greater than 0")
        for key in ("num_train_timesteps", "num_inference_steps", "num_validation_samples"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "greater than 0")
        levels = len(self.unet_block_out_channels)
        _require(levels >= 1, "unet_block_out_channels", self.unet_block_out_channels, "a list of channels")
        _check_groups(self.unet_block_out_channels, self.unet_norm_num_groups, "unet_")
        if self.unet_attention_levels and self.unet_block_out_channels[-1] % self.unet_attention_head_dim:
            raise UserError(
                f"unet_attention_head_dim {self.unet_attention_head_dim} does not divide the "
                f"{self.unet_block_out_channels[-1]} channels of the U-Net's middle (unet_block_out_channels)."
            )
        for level in self.unet_attention_levels:
            _require(0 <= level < levels, "unet_attention_levels", level, f"a level from 0 to {levels - 1}")
            if self.unet_block_out_channels[level] % self.unet_attention_head_dim:
                raise UserError(
                    f"unet_attention_head_dim {self.unet_attention_head_dim} does not divide the "
                    f"{self.unet_block_out_channels[level]} channels of level {level} (unet_block_out_channels)."
                )
        _require(0 <= self.unet_dropout < 1, "unet_dropout", self.unet_dropout, "at least 0 and below 1")
        for key in ("snr_gamma", "noise_shift", "logit_std"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "greater than 0")
        rels = self.ema_sigma_rels
        fits = len(set(rels)) == len(rels) > 0 and all(0 < rel <= MAX_SIGMA_REL for rel in rels)
        _require(fits, "ema_sigma_rels", rels, f"one or more different numbers above 0 and at most {MAX_SIGMA_REL}")
        _require(self.ema_snapshots >= 0, "ema_snapshots", self.ema_snapshots, "0 or more")
        self._check_noise()
        self._check_conditions()
        _require(0 < self.beta_start <= self.beta_end < 1, "beta_start", self.beta_start, "0 < beta_start <= beta_end")
        if self.num_inference_steps > self.num_train_timesteps:
            raise UserError(
                f"num_inference_steps {self.num_inference_steps} is more than "
                f"num_train_timesteps {self.num_train_timesteps}."
            )

    def _check_noise(self) -> None:
        flow = self.prediction_type == "flow_prediction"
        if flow and self.inference_scheduler == "ddim":
            raise UserError("inference_scheduler ddim cannot sample prediction_type flow_prediction; use dpmsolver++.")
        if flow and self.rescale_betas_zero_snr:
            raise UserError(
                "rescale_betas_zero_snr is for a table of betas; prediction_type flow_prediction has none, and ends "
                "in pure noise as it is."
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "rescale_betas_zero_snr makes the last level pure noise, from which prediction_type epsilon says "
                "nothing about the image; use v_prediction or sample."
            )

    def _check_conditions(self) -> None:
        kinds = self.conditions
        _require(len(set(kinds)) == len(kinds), "conditions", kinds, "a list that names each kind once")
        for key in ("class_dropout", "conditioning_image_dropout", "caption_dropout"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "at least 0 and below 1")
        _require(self.guidance_scale > 0, "guidance_scale", self.guidance_scale, "greater than 0")
        if self.guidance_scale != 1 and not kinds:
            raise UserError("guidance_scale is for conditions; an unconditional model has nothing to be guided by.")
        if ("text" in kinds) != (self.text_encoder is not None):
            lacks = "set text_encoder" if "text" in kinds else "text_encoder is for conditions that have text"
            raise UserError(f"conditions {kinds}: {lacks}.")
        if self.text_encoder == EMBEDDED_ENCODER and not self.export_text_encoder:
            raise UserError(f"text_encoder {EMBEDDED_ENCODER} has no name on the Hub: set export_text_encoder true.")
        templates = self.caption_templates
        fits = templates is None or (len(templates) > 0 and all("{}" in template for template in templates))
        _require(fits, "caption_templates", templates, "a list of texts with {} in each, or null")
        _require(self.max_caption_tokens > 1, "max_caption_tokens", self.max_caption_tokens, "greater than 1")
        if "text" in kinds and self.streaming and templates is None:
            raise UserError("A dataset that is streamed keeps labels, but no captions: set caption_templates.")
        places = [key for key in ("conditioning_image_column", "conditioning_image_dir") if getattr(self, key)]
        if "image" not in kinds:
            if places or self.conditioning_image_classes is not None:
                raise UserError(f"{(*places, 'conditioning_image_classes')[0]} is for conditions that have image.")
            return
        if len(places) != 1:
            raise UserError("conditions has image: set one of conditioning_image_column and conditioning_image_dir.")
        if self.conditioning_image_dir and self.train_data_dir is None:
            raise UserError("conditioning_image_dir lies beside a train_data_dir; a dataset_name has columns.")
        if self.streaming:
            raise UserError("A dataset that is streamed keeps labels, but no conditioning images.")
        classes = self.conditioning_image_classes
        _require(
            classes is None or 2 <= classes <= 256, "conditioning_image_classes", classes, "from 2 to 256, or null"
        )

    @property
    def autoencoder_dir(self) -> Path:
        """Where stage 1's result is read from."""
        return Path(self.autoencoder) if self.autoencoder else Path(self.output_dir) / "autoencoder"


Config = TypeVar("Config", bound=RunConfig)


def in_steps(config: Config, num_processes: int) -> Config:
    """The config with steps in place of whatever was given in images, rounded up."""
    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    counts = {"max_train_steps": config.max_train_images, "lr_warmup_steps": config.lr_warmup_images}
    counts["lr_decay_steps"] = config.lr_decay_images
    steps = {key: math.ceil(images / images_per_step) for key, images in counts.items() if images is not None}
    return dataclasses.replace(config, **steps)


def same_batch(config: Config, images_per_step: int | None, num_processes: int) -> Config:
    """The config with the gradient accumulation that keeps a checkpoint's steps as they were, on any processes.

    Args:
        config: of the run that goes on.
        images_per_step: of the checkpoint; None where there is none, or it is too old to know.
        num_processes: that train now.

    Raises:
        UserError: no number of micro-batches gives a step as many images.
    """
    at_once = config.train_batch_size * num_processes
    if images_per_step is None or images_per_step == at_once * config.gradient_accumulation_steps:
        return config
    if images_per_step % at_once:
        fitting = [size for size in range(1, images_per_step + 1) if images_per_step % (size * num_processes) == 0]
        nearest = min(fitting, key=lambda size: abs(size - config.train_batch_size), default=None)
        way_out = f"set train_batch_size {nearest}" if nearest else "use another number of processes"
        raise UserError(
            f"The checkpoint's steps are of {images_per_step} images, which is no multiple of train_batch_size "
            f"{config.train_batch_size} times {num_processes} processes = {at_once}. To go on with it, {way_out}."
        )
    return dataclasses.replace(config, gradient_accumulation_steps=images_per_step // at_once)


SECTION_OF = {AutoencoderConfig: "train_autoencoder", UNetConfig: "train_unet"}


def _require(good: bool, key: str, value: object, want: str) -> None:
    if not good:
        raise UserError(f"{key} is {value}; it has to be {want}.")


def _check_groups(channels: Sequence[int], groups: int, prefix: str = "") -> None:
    for width in channels:
        if width <= 0 or width % groups:
            raise UserError(
                f"{prefix}norm_num_groups {groups} does not divide the {width} channels of "
                f"{prefix}block_out_channels {list(channels)}."
            )


def _nearest(key: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def keys_of(config_class: type[RunConfig]) -> list[str]:
    """The keys of a stage's config, in order."""
    return [field.name for field in dataclasses.fields(config_class)]


def read_yaml(path: str | Path, config_class: type[Config]) -> dict:
    """The flat keys of one stage in a config file: the common ones, overridden by the stage's section.

    Raises:
        UserError: the file is missing, is no mapping, or holds an unknown key (the nearest known one is named).
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} has to be a mapping of keys to values.")
    sections = {name: content.pop(name, None) or {} for name in SECTIONS}
    for stage_class, name in SECTION_OF.items():
        if not isinstance(sections[name], dict):
            raise UserError(f"{path}: the section {name} has to be a mapping of keys to values.")
        for key in sections[name]:
            if key not in keys_of(stage_class):
                raise UserError(f"{path}: unknown key '{key}' in {name}.{_nearest(key, keys_of(stage_class))}")
    for key in content:
        if key not in keys_of(RunConfig):
            owner = [name for stage, name in SECTION_OF.items() if key in keys_of(stage)]
            hint = f" It belongs in the section {owner[0]}." if owner else _nearest(key, keys_of(RunConfig))
            raise UserError(f"{path}: unknown key '{key}' at the top level.{hint}")
    values = content | sections[SECTION_OF[config_class]]
    if values.get("hub_token"):
        raise UserError(
            f"{path} holds a hub_token. A config is saved with the run and published with the model: take the token "
            f"out of the file, make a new one on the Hub if the file was shared, and set HF_TOKEN."
        )
    return values


def _parser(config_class: type[Config]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__.splitlines()[0])
    parser.add_argument("--config", type=str, help="a YAML file; see configs/")
    parser.add_class_arguments(config_class, nested_key=None)
    return parser


def _explain(error: Exception) -> str:
    """jsonargparse's message without its frame: the key, what was expected, what was given."""
    text = " ".join(str(error).split())
    match = re.search(r'key "(\w+)": Expected an? (.+?)\. Got value: (.*)', text)
    union = (
        r'key "(\w+)": Does not validate .* Subtypes: \[(.+?)(?:, <class \'NoneType\'>)?\] Errors: .* Given value: (.*)'
    )
    match = match or re.search(union, text)  # of a key that may also be unset
    if not match:
        return text
    kind = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
    kind = re.sub(r"Literal\[(.+?)\]", lambda words: f"one of {words[1]}", kind)
    return f"{match[1]} has to be {kind}, not {match[3]!r}."


def parse_config(config_class: type[Config], argv: Sequence[str]) -> Config:
    """The config of one stage from command-line words: `--config FILE` and any number of `--key value`.

    Returns:
        A checked instance of `config_class`. An environment that asks for help is answered by SystemExit(0).

    Raises:
        UserError: an unknown key or flag, a value of the wrong type, an impossible value or combination.
    """
    known = keys_of(config_class)
    words = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("-", "_")
            if flag not in (*known, "config", "help"):
                raise UserError(f"Unknown option --{flag}.{_nearest(flag, known)}")
            word = f"--{flag}{equals}{value}"
        words.append(word)
    parser = _parser(config_class)
    path = next((value for flag, value in _pairs(words) if flag == "--config"), None)
    values = read_yaml(path, config_class) if path else {}
    try:
        base = parser.parse_object(values) if values else parser.get_defaults()
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    try:
        namespace = parser.parse_args(words, namespace=base)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(error)) from error
    config = config_class(**{key: getattr(namespace, key) for key in known})
    config.validate()
    return config


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        pairs.append((flag, value if equals else (words[i + 1] if i + 1 < len(words) else "")))
    return pairs


# Keys that may change between the start of a run and its continuation without making it another run.
FREE_KEYS = {
    *("output_dir", "resume_from_checkpoint", "report_to", "tracker_project_name", "autoencoder", "latents_dir"),
    *("max_train_steps", "max_train_images"),
    *("train_batch_size", "gradient_accumulation_steps"),  # their product with the processes is kept: same_batch
    *("logging_steps", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("dataloader_num_workers", "heartbeat_timeout", "image_cache_gib", "max_bad_image_share", "lpips_weights"),
    *("num_inference_steps", "num_validation_samples", "inference_scheduler", "ema_snapshots", "guidance_scale"),
    *("text_encoder", "export_text_encoder"),  # where it lies; that it is the same one, its embeddings' key says
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_variants", "hub_license"),
    "gradient_checkpointing",
}


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config, every key of it, as YAML that `--config` reads again."""
    section = SECTION_OF[type(config)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump({section: dataclasses.asdict(config)}, sort_keys=False))


def check_same_run(config: RunConfig, path: Path) -> None:
    """Refuse an output folder that holds another run's config.

    Raises:
        UserError: the config saved at `path` differs in a key that makes it another run.
    """
    if not path.exists():
        return
    saved = read_yaml(path, type(config))
    now = dataclasses.asdict(config)
    differing = [key for key in now if key in saved and key not in FREE_KEYS and saved[key] != now[key]]
    if differing:
        shown = ", ".join(f"{key} was {saved[key]!r}, is {now[key]!r}" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{path.parent} holds another run ({shown}{more}). Give another --output_dir, remove the folder, "
            f"or start with the config that it was made with: --config {path}."
        )
