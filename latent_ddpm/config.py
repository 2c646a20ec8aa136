"""The configuration: one YAML file is one reproducible run of both stages. The command line overrides any key.

Keys at the top level of the YAML file apply to both stages. The sections `train_autoencoder:` and `train_unet:` hold
the keys of one stage and may override a common key for it. Each stage gets one flat, typed config. Types, ranges and
combinations are checked before anything is loaded.

The string below a key is its description in `--help`. The checks of a group of keys stand below that group.
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
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_whole
from latent_ddpm.places import expand, same_place
from latent_ddpm.text_files import read_text

MAX_SIGMA_REL = 0.28  # the plain mean of all weights has 12^-0.5 = 0.289, the largest possible (ema.gamma_of)
LPIPS_MIN_PIXELS = {"vgg": 16, "alex": 31, "squeeze": 17}  # smaller images leave a pooling layer of the trunk empty
EMBEDDED_ENCODER = "embedded:minilm"  # see latent_ddpm/data/captions.py
SECTIONS = ("train_autoencoder", "train_unet")


# ----------------------------------------------------------------------------------------------------------- checks


def _require(good: bool, key: str, value: object, want: str) -> None:
    if not good:
        raise UserError(f"{key} is {value}; it must be {want}.")


def _require_positive(config: "RunConfig", *keys: str) -> None:
    for key in keys:
        _require(getattr(config, key) > 0, key, getattr(config, key), "greater than 0")


def _require_nonnegative(config: "RunConfig", *keys: str) -> None:
    for key in keys:
        _require(getattr(config, key) >= 0, key, getattr(config, key), "0 or more")


def _require_positive_or_null(config: "RunConfig", *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value is None or value > 0, key, value, "greater than 0, or null")


def _require_below_one(config: "RunConfig", *keys: str) -> None:
    for key in keys:
        _require(0 <= getattr(config, key) < 1, key, getattr(config, key), "at least 0 and below 1")


def _require_divisible(channels: Sequence[int], groups: int, prefix: str = "") -> None:
    for width in channels:
        if width <= 0 or width % groups:
            raise UserError(
                f"{prefix}norm_num_groups {groups} does not divide the {width} channels of "
                f"{prefix}block_out_channels {list(channels)}."
            )


# ---------------------------------------------------------------------------------------------- keys of both stages


@dataclass(kw_only=True)
class RunConfig:
    """The keys that both stages share."""

    source_note = ""  # what `parse_config` replaced, for the log; not a key
    given_keys = frozenset()  # of the file and the command line; not a key

    # ---------------------------------------------------------------------------------------------------------- run

    output_dir: str = "outputs/run"
    """folder of the run; both stages use the same one."""
    seed: int = 0
    """random seed; with the example number it determines order, augmentation, timesteps and noise."""
    resume_from_checkpoint: str | None = "latest"
    """`latest` (the newest undamaged checkpoint in output_dir, if any), the folder of a checkpoint, or the Hub id of a
    run with push_checkpoints; null starts from scratch and rejects a folder that holds checkpoints."""

    def _check_run(self) -> None:
        _require_nonnegative(self, "seed")
        _require(bool(self.output_dir.strip()), "output_dir", repr(self.output_dir), "the name of a folder")

    # --------------------------------------------------------------------------------------------------------- data

    train_data_dir: str | None = None
    """folder of images, at any depth; folder names become labels."""
    dataset_name: str | None = None
    """Hub id, local dataset folder, parquet files, tar files (WebDataset), or `embedded:mnist`."""
    dataset_config_name: str | None = None
    """configuration of a Hub dataset that has several."""
    streaming: bool = False
    """read dataset_name once, from start to end, and keep only the pixels that training uses."""
    image_column: str = "image"
    """column of `dataset_name` that holds the images."""
    class_column: str | None = None
    """column of the classes (integers, strings or class labels); for a folder, a key in metadata files or NAME.json.
    Unset takes `label`, `labels` or `cls`, and for a folder the names of its folders."""
    class_names: list[str | int] | None = None
    """the classes to train on, in this order; images of other classes are left out. Unset takes all."""
    conditioning_image_dir: str | None = None
    """folder of stage 2's conditioning images, with the file names of train_data_dir and any suffix. Both stages leave
    it out where it lies among the images."""
    resolution: int = 64
    """images are resized to a square of this many pixels per side."""
    image_channels: int = 3
    """1 (grayscale) or 3 (RGB)."""
    image_resize: Literal["pytorch", "pillow"] | None = None
    """library that resizes the images, with nearly equal results; unset keeps what the run in output_dir began with,
    and takes the faster one, pytorch, for a new run."""
    center_crop: bool = True
    """crop the centre; false crops at a random position (stage 1 only: the latent cache holds the centre)."""
    random_flip: bool = False
    """mirror half of the images; the latent cache holds both versions."""
    validation_fraction: float = 0.05
    """share of the images held out if the dataset has no validation split."""
    max_validation_images: int = 1000
    """maximum number of validation images."""
    max_bad_image_share: float = 0.05
    """stop if more than this share of the images cannot be decoded."""
    image_cache_gib: float = 4.0
    """decode the images once, into a memory-mapped file, if they fit into this many GiB; 0 disables the cache."""
    dataloader_num_workers: int = 2
    """worker processes that decode images."""

    def _check_data(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            have = "both are set" if self.train_data_dir else "neither is set"
            raise UserError(f"Set exactly one of train_data_dir and dataset_name ({have}).")
        if self.streaming and (self.dataset_name is None or self.dataset_name.startswith("embedded:")):
            raise UserError(
                "streaming is for a dataset_name; a folder and embedded images are local: set streaming false."
            )
        if self.streaming and not self.center_crop:
            raise UserError("streaming keeps only the centre of each image, so center_crop cannot be false.")
        if self.class_names is not None:
            fits = len(self.class_names) == len(set(self.class_names)) > 0
            _require(fits, "class_names", self.class_names, "a list of different names, or null")
        _require(self.image_channels in (1, 3), "image_channels", self.image_channels, "1 (grayscale) or 3 (RGB)")
        _require_positive(self, "resolution", "max_validation_images")
        _require_nonnegative(self, "image_cache_gib", "dataloader_num_workers")
        _require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        _require(0 <= self.max_bad_image_share <= 1, "max_bad_image_share", self.max_bad_image_share, "in 0 to 1")

    # ----------------------------------------------------------------------------------- batch, steps and processes

    train_batch_size: int | Literal["auto"] = 64
    """images per process and micro-batch; auto takes the most that fit the GPU, and needs images_per_step."""
    gradient_accumulation_steps: int = 1
    """micro-batches per optimizer step."""
    images_per_step: int | None = None
    """images per optimizer step, of all processes; sets gradient_accumulation_steps, so that a step does not depend on
    the number of processes and their memory. train_batch_size auto needs it."""
    max_train_steps: int = 10_000
    """total number of optimizer steps."""
    max_train_images: int | None = None
    """total number of training images; overrides max_train_steps, so that the length of the run does not depend on the
    number of processes. lr_warmup_images and lr_decay_images do the same for their keys."""
    train_minutes: float | None = None
    """minutes that both stages may take together on this machine, from start to end. The run first measures its own
    speed; max_train_steps and the keys that go with it then only give the proportions."""
    train_hours: float | None = None
    """the same in hours."""
    autoencoder_time_share: float = 0.4
    """share of train_minutes for stage 1; stage 2 gets what is left."""
    auto_sizes: bool = False
    """choose networks, batch size and learning rate by the images, the speed of this machine and train_minutes, which
    it needs (docs/which-recipe.md). Keys that you give stay as they are."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """no, bf16 or fp16; unset uses the setting of `accelerate launch`."""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass instead of storing them: less memory, more time."""
    heartbeat_timeout: float = 20.0
    """seconds without a heartbeat after which a process counts as dead and the others exit; 0 waits forever."""

    def _check_batch(self) -> None:
        _require_positive(self, "gradient_accumulation_steps", "max_train_steps")
        _require_positive_or_null(self, "max_train_images", "images_per_step")
        if self.train_batch_size == "auto":
            if self.images_per_step is None:
                raise UserError("train_batch_size auto needs images_per_step, the images of an optimizer step.")
        else:
            _require_positive(self, "train_batch_size")
        if self.images_per_step is not None and self.gradient_accumulation_steps != 1:
            raise UserError("images_per_step sets gradient_accumulation_steps; leave one of them out.")
        _require_nonnegative(self, "heartbeat_timeout")
        self._check_time()

    def _check_time(self) -> None:
        _require_positive_or_null(self, "train_minutes", "train_hours")
        if self.minutes is not None:
            _require(math.isfinite(self.minutes), "train_minutes", self.minutes, "a number")
        share = self.autoencoder_time_share
        _require(0 < share < 1, "autoencoder_time_share", share, "between 0 and 1")
        if self.train_minutes is not None and self.train_hours is not None:
            raise UserError("Set one of train_minutes and train_hours.")
        if keys_to_size(self) and self.minutes is None:
            raise UserError("auto_sizes chooses networks by the time that they have: set train_minutes or train_hours.")
        if self.minutes is not None and self.streaming:
            raise UserError(
                "streaming reads the whole dataset before the first step, so the run cannot plan its time: set "
                "max_train_steps instead of train_minutes, or streaming false."
            )

    @property
    def minutes(self) -> float | None:
        """The minutes that both stages may take together; None without such a limit."""
        return self.train_minutes if self.train_hours is None else 60 * self.train_hours

    # ------------------------------------------------------------------------------------------------------ speed

    torch_compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    """compile the networks with torch.compile, in one of its modes. The first steps take minutes, the others less time.
    reduce-overhead (CUDA graphs) is for small networks; max-autotune needs deterministic false."""
    channels_last: bool | None = None
    """store images and convolutions with the channels innermost, the layout of a GPU's matrix units; unset does so on a
    GPU."""
    deterministic: bool = True
    """use deterministic algorithms only, so that a resumed run repeats the bits of an uninterrupted one on the same
    machine; false lets the GPU choose the fastest algorithms."""

    def _check_speed(self) -> None:
        if self.torch_compile == "max-autotune" and self.deterministic:
            raise UserError(
                "torch_compile max-autotune chooses kernels by their time, which can differ after a resume: set "
                "deterministic false, or torch_compile default."
            )

    # ---------------------------------------------------------------------------------- optimizer and learning rate

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw or muon (arXiv 2502.16982); muon uses AdamW for parameters that are not matrices."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.99
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    adam_weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm."""
    learning_rate: float = 2e-4
    """peak learning rate."""
    lr_scheduler: Literal["constant", "cosine", "linear", "warmup_stable_decay"] = "constant"
    """learning rate after the warm-up: constant, cosine or linear decay to 0, or warmup_stable_decay (constant, then a
    linear decay to 0 over lr_decay_steps)."""
    lr_warmup_steps: int = 100
    """steps over which the learning rate rises from 0."""
    lr_warmup_images: int | None = None
    """the same in images."""
    lr_decay_steps: int | None = None
    """decay steps of warmup_stable_decay; unset uses the last 3 tenths of the run."""
    lr_decay_images: int | None = None
    """the same in images."""

    def _check_optimizer(self) -> None:
        _require_positive(self, "learning_rate", "max_grad_norm", "adam_epsilon")
        _require_nonnegative(self, "lr_warmup_steps", "adam_weight_decay")
        _require_positive_or_null(self, "lr_warmup_images", "lr_decay_steps", "lr_decay_images")
        if self.lr_scheduler != "warmup_stable_decay" and (self.lr_decay_steps or self.lr_decay_images):
            raise UserError("lr_decay_steps and lr_decay_images are for lr_scheduler warmup_stable_decay.")
        _require_below_one(self, "adam_beta1", "adam_beta2")

    # -------------------------------------------------------------------------------------- logging and checkpoints

    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "none"
    """tensorboard, wandb, trackio or none; metrics.jsonl is always written."""
    tracker_project_name: str = "latent-ddpm"
    """project name at wandb or trackio."""
    logging_steps: int = 10
    """steps between log entries."""
    validation_steps: int = 500
    """steps between validations; each draws an image grid."""
    checkpointing_steps: int = 500
    """steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """number of newest checkpoints to keep."""

    def _check_logging(self) -> None:
        _require_positive(self, "logging_steps", "validation_steps", "checkpointing_steps", "checkpoints_total_limit")

    # ---------------------------------------------------------------------------------------------------------- Hub

    push_to_hub: bool = False
    """publish the result; a failure of the Hub never stops training."""
    hub_model_id: str | None = None
    """repository, `user/name` or `name`; unset uses the name of output_dir."""
    hub_private_repo: bool = False
    """create a private repository; an existing public one is rejected."""
    hub_token: str | None = None
    """write token, accepted on the command line only, where others may see it: prefer HF_TOKEN or `hf auth login`."""
    hub_strategy: Literal["end", "checkpoint", "best"] = "end"
    """push at the end, at every checkpoint in the background, or whenever the validation result is the best so far."""
    hub_variants: list[Literal["fp16", "bf16"]] = dataclasses.field(default_factory=list)
    """weights published in addition to the float32 ones, for `from_pretrained(..., variant="fp16")`."""
    push_checkpoints: bool = False
    """also publish the newest checkpoint, from which another machine resumes: --resume_from_checkpoint OWNER/NAME."""
    hub_license: str | None = None
    """license of the model for its card, as a Hub identifier (apache-2.0, cc-by-4.0, ...)."""

    def _check_hub(self) -> None:
        if self.push_checkpoints and not self.push_to_hub:
            raise UserError("push_checkpoints needs push_to_hub: set it to true, or push_checkpoints to false.")

    # --------------------------------------------------------------------------------------------------- all checks

    def validate(self) -> None:
        """Raise UserError, naming the key, if a value or a combination of values is impossible."""
        self._check_run()
        self._check_data()
        self._check_batch()
        self._check_speed()
        self._check_optimizer()
        self._check_logging()
        self._check_hub()


# -------------------------------------------------------------------------------------------------- keys of stage 1


@dataclass(kw_only=True)
class AutoencoderConfig(RunConfig):
    """Stage 1: the autoencoder, its losses and its discriminator."""

    # -------------------------------------------------------------------------------------------- pretrained weights

    init_from: str | None = None
    """autoencoder that training starts from, an AutoencoderKL or VQModel: a folder or a Hub id. Its sizes replace those
    of the config."""
    init_from_subfolder: str | None = None
    """folder of the autoencoder in that folder or repository; unset also finds the `vae` or `vqvae` of a pipeline."""
    init_from_revision: str | None = None
    """branch, tag or commit of the repository; unset is the main branch."""
    freeze_encoder: bool = False
    """train the decoder of `init_from` alone: the latents stay the same, so U-Nets trained on them stay valid."""

    def _check_start(self) -> None:
        for key in ("init_from_subfolder", "init_from_revision", "freeze_encoder"):
            if getattr(self, key) and not self.init_from:
                raise UserError(f"{key} needs a pretrained autoencoder: set init_from, too.")

    # --------------------------------------------------------------------------------------------- encoder, decoder

    block_out_channels: list[int] = dataclasses.field(default_factory=lambda: [64, 128, 128])
    """channels per level; every level except the last halves the resolution."""
    layers_per_block: int = 1
    """residual blocks per level of the encoder (the decoder has one more, like stock VQModel)."""
    norm_num_groups: int = 16
    """groups of each group norm."""
    latent_channels: int = 3
    """channels of the latents, which is also the dimension of a code."""
    mid_block_add_attention: bool = False
    """self-attention at the lowest resolution; its cost grows with the square of the number of positions."""
    ema_decay: float = 0.999
    """decay per step of the averaged weights, warmed up as min(ema_decay, (1 + step) / (10 + step))."""

    def _check_network(self) -> None:
        _require(len(self.block_out_channels) >= 1, "block_out_channels", self.block_out_channels, "a list of channels")
        _require_positive(self, "layers_per_block", "norm_num_groups", "latent_channels")
        _require_below_one(self, "ema_decay")
        levels_are_chosen = "block_out_channels" in keys_to_size(self)  # so that they fit
        if self.resolution % self._factor and not levels_are_chosen:
            raise UserError(
                f"resolution {self.resolution} is not divisible by {self._factor}: the {len(self.block_out_channels)} "
                f"levels of block_out_channels {self.block_out_channels} halve it {len(self.block_out_channels) - 1} "
                f"times."
            )
        _require_divisible(self.block_out_channels, self.norm_num_groups)

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)  # image pixels per latent and side

    # ---------------------------------------------------------------------------------------------------- quantizer

    quantizer: Literal["ema", "simvq", "fsq", "kl"] = "ema"
    """ema (codes are moving averages, arXiv 1711.00937), simvq (one learned map of a frozen table, arXiv 2411.02038),
    fsq (a fixed grid, arXiv 2309.15505) or kl (a Gaussian posterior without codes, LDM's KL-VAE, arXiv 2112.10752)."""
    num_vq_embeddings: int = 1024
    """codes in the codebook (not kl)."""
    codebook_start: int = 0
    """step at which the codebook enters; before it, a plain autoencoder trains, which keeps more latent channels in
    use."""
    codebook_decay: float = 0.99
    """decay of the codebook's moving averages (arXiv 1711.00937, appendix A.1)."""
    codebook_revive_below: float = 0.05
    """a code used less than this share of the mean is moved to an encoder output (ema, simvq)."""
    commitment_weight: float = 0.25
    """weight of the commitment loss (arXiv 1711.00937, eq. 3)."""
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"
    """how gradients pass through the quantizer: straight_through, or rotation (arXiv 2410.06424)."""
    fsq_levels: list[int] | None = None
    """levels of fsq's grid, one number per latent channel; their product is num_vq_embeddings."""
    fsq_balance_weight: float = 0.03
    """weight of the loss that moves encoder outputs to unused codes of fsq's grid."""
    kl_weight: float = 1e-6
    """weight of kl's divergence from the standard normal, on the scale of LDM's own 1e-6."""

    def _check_quantizer(self) -> None:
        _require(self.num_vq_embeddings > 1, "num_vq_embeddings", self.num_vq_embeddings, "greater than 1")
        _require_nonnegative(self, "commitment_weight", "codebook_revive_below", "kl_weight", "fsq_balance_weight")
        _require_nonnegative(self, "codebook_start")
        _require_below_one(self, "codebook_decay")
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

    # --------------------------------------------------------------- reconstruction loss, regularization of latents

    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """l1 or l2 distance between pixels in [-1, 1]."""
    lpips_weight: float = 0.0
    """weight of the perceptual loss (arXiv 1801.03924); 0 disables it."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """trunk of the perceptual loss."""
    lpips_weights: str | None = None
    """file of the trunk's ImageNet weights (torchvision's .pth); unset uses torch's cache."""
    equivariance_share: float = 0.0
    """share of the steps that train on rotated or downsampled latents (arXiv 2502.09509)."""
    latent_noise: float = 0.0
    """noise added to the latents in training, in standard deviations of each image's own latents."""

    def _check_losses(self) -> None:
        _require_nonnegative(self, "lpips_weight", "latent_noise")
        share = self.equivariance_share
        _require(0 <= share <= 1, "equivariance_share", share, "in 0 to 1")
        _require(share < 1 or self.disc_weight == 0, "equivariance_share", share, "below 1 with a discriminator")
        smallest = self.resolution // (2 if share > 0 else 1)
        needed = LPIPS_MIN_PIXELS[self.lpips_net]
        if self.lpips_weight > 0 and smallest < needed:
            halved = " when halved by equivariance_share" if share > 0 else ""
            raise UserError(
                f"lpips_net {self.lpips_net} needs images of {needed} pixels or more; they have {smallest}{halved}. "
                f"Set lpips_weight 0, or another lpips_net."
            )
        if share > 0 and self.resolution % (2 * self._factor):
            raise UserError(
                f"equivariance_share needs latents of even sides; those of {self.resolution}-pixel images have "
                f"{self.resolution / self._factor:g}. Set equivariance_share 0, or another resolution."
            )

    # ------------------------------------------------------------------------------------------------ discriminator

    disc_weight: float = 0.0
    """factor on the adaptive weight of the adversarial loss; 0 disables the discriminator."""
    disc_adaptive_steps: int | None = 200
    """steps for which the discriminator first trains alone while the adaptive weight is measured; it then stays
    constant. null measures it at every step, as VQGAN does."""
    disc_start: int = 0
    """step at which the discriminator enters."""
    disc_ramp_steps: int = 0
    """steps over which the adversarial weight then rises from 0."""
    disc_loss: Literal["hinge", "non_saturating"] = "hinge"
    """hinge (arXiv 1705.02894) or non_saturating (arXiv 1406.2661)."""
    disc_norm: Literal["spectral", "actnorm", "none"] = "spectral"
    """spectral (arXiv 1802.05957), actnorm (arXiv 1807.03039) or none."""
    disc_r1_weight: float = 0.0
    """weight of the R1 gradient penalty (arXiv 1801.04406); about doubles the discriminator's time."""
    disc_lecam_weight: float = 0.0
    """weight of LeCam regularization (arXiv 2104.03310)."""
    disc_channels: int = 64
    """channels of the discriminator's first layer."""
    disc_layers: int = 3
    """stride-2 layers of the PatchGAN discriminator."""
    disc_learning_rate: float | None = None
    """learning rate of the discriminator; unset uses learning_rate."""
    disc_adam_beta1: float = 0.0
    """decay of the first moment in the discriminator's AdamW; 0 means no momentum (StyleGAN2, arXiv 1912.04958, app.
    B)."""
    disc_adam_beta2: float = 0.99
    """decay of the second moment in the discriminator's AdamW."""

    def _check_discriminator(self) -> None:
        _require_positive(self, "disc_channels", "disc_layers")
        _require_positive_or_null(self, "disc_adaptive_steps", "disc_learning_rate")
        _require_nonnegative(self, "disc_weight", "disc_start", "disc_ramp_steps", "disc_r1_weight")
        _require_nonnegative(self, "disc_lecam_weight")
        _require_below_one(self, "disc_adam_beta1", "disc_adam_beta2")
        if self.disc_weight > 0 and self.resolution < 2 ** (self.disc_layers + 2):
            raise UserError(
                f"disc_layers {self.disc_layers} leaves no patch of a {self.resolution}-pixel image; "
                f"use fewer layers (or disc_weight 0)."
            )

    # --------------------------------------------------------------------------------------------------- all checks

    def validate(self) -> None:
        """Like RunConfig.validate. Also checks that images, downsampling, channels and groups fit together."""
        super().validate()
        self._check_start()
        self._check_network()
        self._check_quantizer()
        self._check_losses()
        self._check_discriminator()


# -------------------------------------------------------------------------------------------------- keys of stage 2


@dataclass(kw_only=True)
class UNetConfig(RunConfig):
    """Stage 2: the diffusion model on the cached latents."""

    # ------------------------------------------------------------------------------------------------------ latents

    autoencoder: str | None = None
    """the stage 1 result, or another autoencoder of diffusers: a folder or a Hub id; unset uses
    `<output_dir>/autoencoder`."""
    autoencoder_subfolder: str | None = None
    """folder of the autoencoder in that folder or repository; unset also finds the `vae` or `vqvae` of a pipeline."""
    autoencoder_revision: str | None = None
    """branch, tag or commit of the autoencoder's repository; unset is the main branch."""
    autoencoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """floating-point type in which a frozen autoencoder encodes the training images."""
    autoencoder_tiling: bool = False
    """encode images in overlapping tiles, which needs less memory for large ones."""
    latent_normalization: Literal["overall", "channel", "keep"] | None = None
    """what latents are divided by: one standard deviation, that of each channel, or the autoencoder's own scale; unset
    is keep with init_unet's own, overall for those of train_autoencoder.py and those with codes, else channel."""
    latents_dir: str | None = None
    """folder of the latent cache; unset uses `<output_dir>/latents`."""

    @property
    def autoencoder_dir(self) -> Path:
        """The folder of this run's stage 1 result."""
        return Path(self.output_dir) / "autoencoder"

    def _check_latents(self) -> None:
        for key in ("autoencoder_subfolder", "autoencoder_revision"):
            if getattr(self, key) and not self.autoencoder:
                raise UserError(f"{key} is for an autoencoder that is given: set autoencoder, too.")
        for key in ("init_unet_subfolder", "init_unet_revision"):
            if getattr(self, key) and not self.init_unet:
                raise UserError(f"{key} is for a U-Net that is given: set init_unet, too.")

    # ------------------------------------------------------------------------------------------------- conditioning

    conditions: list[Literal["class", "image", "text"]] = dataclasses.field(default_factory=list)
    """the conditioning of the U-Net: any of class, image (an image or semantic map per example) and text; an empty list
    trains an unconditional model."""
    class_dropout: float = 0.1
    """share of the examples whose class is dropped, which guidance needs (arXiv 2207.12598)."""
    conditioning_image_column: str | None = None
    """column of the dataset that holds the conditioning images."""
    conditioning_image_classes: int | None = None
    """number of classes of a semantic map, whose pixel values are class numbers from 0; unset treats the conditioning
    image as an image."""
    conditioning_image_dropout: float = 0.1
    """share of the examples whose conditioning image is dropped."""
    caption_column: str = "text"
    """column of the captions; for a folder, the key in NAME.json and metadata files."""
    caption_templates: list[str] | None = None
    """captions made from class names instead, each with {} for the name."""
    caption_dropout: float = 0.1
    """share of the examples whose caption is dropped."""
    text_encoder: str | None = None
    """frozen text encoder, any that transformers loads: a folder, a Hub id, or embedded:minilm."""
    max_caption_tokens: int = 77
    """captions are truncated to this many tokens."""
    export_text_encoder: bool = True
    """save encoder and tokenizer in the exported pipeline; false saves only the value of text_encoder."""
    guidance_scale: float = 1.0
    """guidance scale for the grids, the exported pipeline's samples in evaluations, and the card; 1 is no guidance."""

    def _check_conditions(self) -> None:
        kinds = self.conditions
        _require(len(set(kinds)) == len(kinds), "conditions", kinds, "a list that names each kind once")
        _require_below_one(self, "class_dropout", "conditioning_image_dropout", "caption_dropout")
        _require_positive(self, "guidance_scale")
        if self.guidance_scale != 1 and not kinds:
            raise UserError("guidance_scale is for conditions; an unconditional model needs guidance_scale 1.")
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
        self._check_conditioning_images()

    def _check_conditioning_images(self) -> None:
        places = [key for key in ("conditioning_image_column", "conditioning_image_dir") if getattr(self, key)]
        if "image" not in self.conditions:
            if places or self.conditioning_image_classes is not None:
                raise UserError(f"{(*places, 'conditioning_image_classes')[0]} is for conditions that have image.")
            return
        if len(places) != 1:
            raise UserError("conditions has image: set one of conditioning_image_column and conditioning_image_dir.")
        if self.conditioning_image_dir and self.train_data_dir is None:
            raise UserError("conditioning_image_dir needs a train_data_dir; use conditioning_image_column instead.")
        if self.streaming:
            raise UserError("A dataset that is streamed keeps labels, but no conditioning images: set streaming false.")
        classes = self.conditioning_image_classes
        _require(
            classes is None or 2 <= classes <= 256, "conditioning_image_classes", classes, "from 2 to 256, or null"
        )

    # -------------------------------------------------------------------------------------------- pretrained weights

    init_unet: str | None = None
    """U-Net that training starts from: a pipeline, a run's folder, or a Hub id. Its sizes and noise schedule replace
    those of the config, and without an autoencoder the run takes that of its pipeline."""
    init_unet_subfolder: str | None = None
    """folder of the U-Net in that folder or repository; unset looks for `unet`."""
    init_unet_revision: str | None = None
    """branch, tag or commit of the repository; unset is the main branch."""

    # -------------------------------------------------------------------------------------------------------- U-Net

    unet_block_out_channels: list[int] = dataclasses.field(default_factory=lambda: [128, 256, 256])
    """channels per level of the U-Net."""
    unet_layers_per_block: int = 2
    """residual blocks per level."""
    unet_attention_levels: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    """levels (0 is the finest) whose blocks have self-attention."""
    unet_attention_head_dim: int = 32
    """channels per attention head."""
    unet_norm_num_groups: int = 32
    """groups of each group norm."""
    unet_dropout: float = 0.0
    """dropout inside the residual blocks."""
    unet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """how time and class enter a residual block: `default` adds their embedding to the activations, `scale_shift` also
    scales these (adaptive group normalization, arXiv 2105.05233)."""

    def _check_unet(self) -> None:
        _require_positive(self, "unet_layers_per_block", "unet_norm_num_groups", "unet_attention_head_dim")
        levels = len(self.unet_block_out_channels)
        _require(levels >= 1, "unet_block_out_channels", self.unet_block_out_channels, "a list of channels")
        _require_divisible(self.unet_block_out_channels, self.unet_norm_num_groups, "unet_")
        if self.unet_attention_levels and self.unet_block_out_channels[-1] % self.unet_attention_head_dim:
            raise UserError(
                f"unet_attention_head_dim {self.unet_attention_head_dim} does not divide the "
                f"{self.unet_block_out_channels[-1]} channels of the U-Net's middle block (unet_block_out_channels)."
            )
        for level in self.unet_attention_levels:
            _require(0 <= level < levels, "unet_attention_levels", level, f"a level from 0 to {levels - 1}")
            if self.unet_block_out_channels[level] % self.unet_attention_head_dim:
                raise UserError(
                    f"unet_attention_head_dim {self.unet_attention_head_dim} does not divide the "
                    f"{self.unet_block_out_channels[level]} channels of level {level} (unet_block_out_channels)."
                )
        _require_below_one(self, "unet_dropout")

    # ------------------------------------------------------------------------------------ noise schedule, objective

    num_train_timesteps: int = 1000
    """timesteps of the training schedule."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """noise schedule, named as in diffusers (squaredcos_cap_v2 is cosine, arXiv 2102.09672)."""
    beta_start: float = 1e-4
    """first beta of the linear schedules."""
    beta_end: float = 0.02
    """last beta of the linear schedules."""
    rescale_betas_zero_snr: bool = False
    """make the last noise level pure noise (arXiv 2305.08891, algorithm 1)."""
    noise_shift: float = 1.0
    """divides alpha / sigma of every noise level; above 1 for large latents (arXiv 2301.11093)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "v_prediction"
    """prediction target of the U-Net: epsilon (the noise), v_prediction (arXiv 2202.00512, appendix D), sample (the
    clean latents), or flow_prediction (the velocity of a rectified flow, arXiv 2209.03003, which ignores the beta_
    keys)."""
    timestep_sampling: Literal["uniform", "stratified", "logit_normal"] = "stratified"
    """uniform, stratified (uniform, and every batch covers the schedule evenly), or logit_normal, which samples the
    middle of the schedule more often (arXiv 2403.03206, section 3.1)."""
    logit_mean: float = 0.0
    """mean of logit_normal; above 0 samples high noise levels more often."""
    logit_std: float = 1.0
    """standard deviation of logit_normal."""
    loss_weighting: Literal["uniform", "min_snr", "edm"] = "min_snr"
    """uniform (on the prediction target), min_snr (arXiv 2303.09556, section 3.4) or edm (arXiv 2206.00364, eq. 8)."""
    snr_gamma: float = 5.0
    """gamma of min_snr."""

    def _check_noise(self) -> None:
        _require_positive(self, "num_train_timesteps", "snr_gamma", "noise_shift", "logit_std")
        _require(0 < self.beta_start <= self.beta_end < 1, "beta_start", self.beta_start, "0 < beta_start <= beta_end")
        flow = self.prediction_type == "flow_prediction"
        if flow and self.rescale_betas_zero_snr:
            raise UserError(
                "rescale_betas_zero_snr is for a table of betas; prediction_type flow_prediction has none, and already "
                "ends in pure noise."
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "rescale_betas_zero_snr makes the last level pure noise, where prediction_type epsilon says nothing "
                "about the image; use v_prediction or sample."
            )

    # ---------------------------------------------------------------------------------------------- weight averages

    ema_sigma_rels: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.05])
    """widths of the weight averages, relative to the training time (arXiv 2312.02696); the first is validated, sampled
    and exported. With two or more, scripts/reconstruct_ema.py reconstructs any other width."""
    ema_snapshots: int = 16
    """number of float16 snapshots of the averages kept over the run, in `<output_dir>/ema`; 0 keeps none."""

    def _check_averages(self) -> None:
        rels = self.ema_sigma_rels
        fits = len(set(rels)) == len(rels) > 0 and all(0 < rel <= MAX_SIGMA_REL for rel in rels)
        _require(fits, "ema_sigma_rels", rels, f"one or more different numbers above 0 and at most {MAX_SIGMA_REL}")
        _require_nonnegative(self, "ema_snapshots")

    # ----------------------------------------------------------------------------------------------------- distillation

    self_guidance_steps: int = 0
    """steps of a second chapter of stage 2, which trains guidance into the weights: the exported U-Net learns what it
    predicts with guidance away from its own early average (autoguidance, arXiv 2406.02507, distilled as in arXiv
    2210.03142), and with guidance_scale if it has conditions. Samples then need no guidance. 0 leaves it out."""
    self_guidance_images: int | None = None
    """the same in images."""
    self_guidance_scale: float | Literal["auto"] = 2.0
    """guidance scale: 1 is none; auto takes the best of a short sweep, by the distance of samples to held-out and
    training latents, which weighs variety more than a viewer does."""
    self_guidance_weak: float = 0.125
    """the early average is that after this share of max_train_steps, or at the nearest snapshot (ema_snapshots)."""
    self_guidance_interval: list[float] | None = None
    """lowest and highest noise level sigma that is guided (arXiv 2404.07724), e.g. [0.3, 20]; unset guides all."""
    self_guidance_learning_rate: float = 3e-4
    """peak learning rate of this chapter, with AdamW and a linear decay to 0."""
    few_step_training_steps: int = 0
    """steps of a third chapter of stage 2, which trains a U-Net that samples in few steps, and exports it to
    `<output_dir>/pipeline-few-steps`: a single step by distribution matching (DMD2, arXiv 2405.14867), others by
    regression on the sampler's path. 0 leaves it out."""
    few_step_training_images: int | None = None
    """the same in images."""
    few_step_counts: list[int] = dataclasses.field(default_factory=lambda: [4])
    """the numbers of sampling steps that it is trained for; the last one is the pipeline's default. Numbers that divide
    each other share noise levels, where the network learns a mean of both. With 1, a step of training takes twice as
    long."""
    few_step_learning_rate: float = 2e-4
    """peak learning rate of this chapter, with AdamW and a linear decay to 0."""

    @property
    def sampling_guidance_scale(self) -> float:
        """The guidance scale of samples: 1 where guidance_scale is trained into the weights."""
        return 1.0 if self.self_guidance_steps or self.self_guidance_images else self.guidance_scale

    def _check_distillation(self) -> None:
        _require_nonnegative(self, "self_guidance_steps", "few_step_training_steps")
        _require_positive_or_null(self, "self_guidance_images", "few_step_training_images")
        _require_positive(self, "self_guidance_learning_rate", "few_step_learning_rate")
        scale, weak, interval = self.self_guidance_scale, self.self_guidance_weak, self.self_guidance_interval
        _require(scale == "auto" or scale >= 1, "self_guidance_scale", scale, "at least 1, or auto")
        _require(0 < weak < 1, "self_guidance_weak", weak, "between 0 and 1")
        fits = interval is None or (len(interval) == 2 and 0 <= interval[0] < interval[1])
        _require(fits, "self_guidance_interval", interval, "a list [LOW, HIGH] with 0 <= LOW < HIGH, or null")
        if (self.self_guidance_steps or self.self_guidance_images) and scale != 1 and self.ema_snapshots < 2:
            raise UserError(
                "self_guidance_steps needs an early average: set ema_snapshots above 1, or self_guidance_steps 0."
            )
        counts = self.few_step_counts
        fits = counts and counts == sorted(set(counts)) and counts[0] > 0 and counts[-1] <= self.num_train_timesteps
        _require(
            fits,
            "few_step_counts",
            counts,
            f"a list of different numbers of steps, rising, from 1 to {self.num_train_timesteps}",
        )
        trained = self.few_step_training_steps or self.few_step_training_images
        if trained and 1 in counts and self.prediction_type == "epsilon":
            raise UserError(
                "A model of prediction_type epsilon cannot learn to draw in one step: it starts from noise alone, "
                "which says nothing about the image. Take 1 out of few_step_counts, or use another prediction_type."
            )

    # ----------------------------------------------------------------------------------------------------- sampling

    inference_scheduler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    """scheduler of the exported pipeline and the grids; the default is second-order DPM-Solver++ (arXiv 2211.01095)."""
    num_inference_steps: int = 20
    """sampling steps of the grids."""
    num_validation_samples: int = 64
    """images in a sample grid."""

    def _check_sampling(self) -> None:
        _require_positive(self, "num_inference_steps", "num_validation_samples")
        if self.prediction_type == "flow_prediction" and self.inference_scheduler == "ddim":
            raise UserError("inference_scheduler ddim cannot sample prediction_type flow_prediction; use dpmsolver++.")
        if self.num_inference_steps > self.num_train_timesteps:
            raise UserError(
                f"num_inference_steps {self.num_inference_steps} is more than "
                f"num_train_timesteps {self.num_train_timesteps}."
            )

    # --------------------------------------------------------------------------------------------------- all checks

    def validate(self) -> None:
        """Like RunConfig.validate. Also checks that the parts of the U-Net fit together."""
        super().validate()
        self._check_latents()
        self._check_conditions()
        self._check_unet()
        self._check_noise()
        self._check_averages()
        self._check_distillation()
        self._check_sampling()


# -------------------------------------------------------------------------------------- images to steps, batch size

Config = TypeVar("Config", bound=RunConfig)


def in_steps(config: Config, num_processes: int) -> Config:
    """The config with every number of images converted to optimizer steps, rounded up."""
    images_per_step = config.train_batch_size * config.gradient_accumulation_steps * num_processes
    counts = {"max_train_steps": config.max_train_images, "lr_warmup_steps": config.lr_warmup_images}
    counts["lr_decay_steps"] = config.lr_decay_images
    for key in ("self_guidance_steps", "few_step_training_steps"):
        counts[key] = getattr(config, key.replace("_steps", "_images"), None)
    steps = {key: math.ceil(images / images_per_step) for key, images in counts.items() if images is not None}
    return dataclasses.replace(config, **steps)


def same_batch(config: Config, images_per_step: int | None, num_processes: int) -> Config:
    """The config with gradient accumulation adjusted, so that a step has the images that it should have.

    Args:
        config: of the run; its train_batch_size is a number.
        images_per_step: of the checkpoint; None without a checkpoint, or if an old one does not record it.
        num_processes: number of processes that train now.

    Raises:
        UserError: no number of micro-batches gives that many images per step, or the config asks for another number
            than the checkpoint has.
    """
    wanted, whose = config.images_per_step or images_per_step, "images_per_step asks for"
    if images_per_step is not None:
        whose = "The checkpoint's steps are of"
        if wanted != images_per_step:
            raise UserError(
                f"{whose} {images_per_step} images, and images_per_step is {wanted}. Use {images_per_step} to resume "
                f"it, or a new --output_dir."
            )
    at_once = config.train_batch_size * num_processes
    if wanted is None or wanted == at_once * config.gradient_accumulation_steps:
        return config
    if wanted % at_once:
        fitting = [size for size in range(1, wanted + 1) if wanted % (size * num_processes) == 0]
        nearest = min(fitting, key=lambda size: abs(size - config.train_batch_size), default=None)
        way_out = f"set train_batch_size {nearest}" if nearest else "use another number of processes"
        purpose = "To resume it" if images_per_step is not None else "For that"
        raise UserError(
            f"{whose} {wanted} images, which is no multiple of train_batch_size {config.train_batch_size} times "
            f"{num_processes} processes = {at_once}. {purpose}, {way_out}."
        )
    return dataclasses.replace(config, gradient_accumulation_steps=wanted // at_once)


def encoding_batch_size(config: RunConfig) -> int:
    """Images that are encoded at a time where no step is done: train_batch_size, or 64 if it is auto."""
    return 64 if config.train_batch_size == "auto" else config.train_batch_size


# --------------------------------------------------------------------------------------- YAML file and command line

PATH_KEYS = {
    *("output_dir", "train_data_dir", "dataset_name", "resume_from_checkpoint", "lpips_weights"),
    *("autoencoder", "init_from", "init_unet", "latents_dir", "conditioning_image_dir", "text_encoder"),
}
NO_WORDS = {"mixed_precision": "no", "torch_compile": "off"}
# Keys that describe the images of one source, and mean nothing for another one.
SOURCE_KEYS = (
    *("train_data_dir", "dataset_name", "dataset_config_name", "streaming", "image_column"),
    *("class_column", "class_names", "caption_column", "conditioning_image_column", "conditioning_image_dir"),
)

SECTION_OF = {AutoencoderConfig: "train_autoencoder", UNetConfig: "train_unet"}


def keys_of(config_class: type[RunConfig]) -> list[str]:
    """The keys of a stage's config, in order."""
    return [field.name for field in dataclasses.fields(config_class)]


def _nearest(key: object, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


class _Loader(yaml.SafeLoader):
    """Rejects a key that is given twice, of which PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, config_class: type[Config]) -> dict:
    """The flat keys of one stage from a config file: the common keys, overridden by the stage's section.

    Raises:
        UserError: the file is missing, is not a mapping, or has an unknown key (the message suggests the nearest one).
    """
    path = Path(path).expanduser()
    try:
        content = yaml.load(read_text(path), _Loader)
    except OSError as error:
        raise UserError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of keys to values.")
    sections = {name: content.pop(name, None) or {} for name in SECTIONS}
    for stage_class, name in SECTION_OF.items():
        if not isinstance(sections[name], dict):
            raise UserError(f"{path}: the section {name} must be a mapping of keys to values.")
        for key in sections[name]:
            if key not in keys_of(stage_class):
                raise UserError(f"{path}: unknown key '{key}' in {name}.{_nearest(key, keys_of(stage_class))}")
    for key in content:
        if key not in keys_of(RunConfig):
            owner = [name for stage, name in SECTION_OF.items() if key in keys_of(stage)]
            hint = f" It belongs in the section {owner[0]}." if owner else _nearest(key, keys_of(RunConfig))
            raise UserError(f"{path}: unknown key '{key}' at the top level.{hint}")
    values = content | sections[SECTION_OF[config_class]]
    maps = sections[SECTION_OF[UNetConfig]].get("conditioning_image_dir")
    if maps and config_class is AutoencoderConfig:  # stage 1 does not train on them either
        values.setdefault("conditioning_image_dir", maps)
    for key in values.keys() & NO_WORDS.keys():
        if values[key] is False:  # what YAML makes of no and off
            values[key] = NO_WORDS[key]
    if values.get("hub_token"):
        raise UserError(
            f"{path} holds a hub_token. The config is saved with the run and published with the model: remove the "
            f"token from the file and set HF_TOKEN. If the file was shared, create a new token on the Hub."
        )
    return values


def _parser(config_class: type[Config]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the strings below the keys
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__.splitlines()[0])
    parser.add_argument("--config", type=str, help="a YAML file; see configs/")
    parser.add_class_arguments(config_class, nested_key=None)
    return parser


def _explain(error: Exception) -> str:
    """jsonargparse's message, reduced to the key, the expected type and the given value."""
    text = " ".join(str(error).split())
    match = re.search(r'key "(\w+)": Expected an? (.+?)\. Got value: (.*)', text)
    union = (
        r'key "(\w+)": Does not validate .* Subtypes: \[(.+?)(?:, <class \'NoneType\'>)?\] Errors: .* Given value: (.*)'
    )
    match = match or re.search(union, text)  # a key that may be unset
    if not match:
        return text
    kind = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
    kind = re.sub(r"^(\w+), Literal\[('\w+')\]$", r"\1 or \2", kind)
    kind = re.sub(r"Literal\[(.+?)\]", lambda words: f"one of {words[1]}", kind)
    return f"{match[1]} must be {kind}, not {match[3]!r}."


def parse_config(config_class: type[Config], argv: Sequence[str]) -> Config:
    """The config of one stage from command-line arguments: `--config FILE` and any number of `--key value`.

    Returns:
        A validated instance of `config_class`. `--help` prints the keys and raises SystemExit(0).

    Raises:
        UserError: an unknown key or option, a value of the wrong type, an impossible value or combination.
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
    given = {flag.removeprefix("--"): value for flag, value in _pairs(words) if flag.startswith("--")}
    path = given.get("config")
    values = read_yaml(path, config_class) if path else {}
    note = _replace_source(values, given)
    try:
        base = parser.parse_object(values) if values else parser.get_defaults()
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {_explain(error)}") from error
    try:
        namespace = parser.parse_args(words, namespace=base)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(error)) from error
    config = config_class(**{key: getattr(namespace, key) for key in known})
    for key in PATH_KEYS & set(known):
        if getattr(config, key):
            setattr(config, key, expand(getattr(config, key), key))
    config.train_data_dir, config.dataset_name = config.train_data_dir or None, config.dataset_name or None
    config.source_note = note
    config.given_keys = frozenset(values) | frozenset(given)
    config.class_names = None if config.class_names is None else list(map(str, config.class_names))
    config.validate()
    if config.image_resize is None:
        config.image_resize = resize_of_run(config)
    return config


def _replace_source(values: dict, given: dict[str, str]) -> str:
    """Remove the source of a config file, in place, if the command line gives one of the other kind.

    Args:
        values: keys of the file.
        given: keys and values of the command line.

    Returns:
        A sentence on what was replaced, or "".
    """
    for key, other in (("train_data_dir", "dataset_name"), ("dataset_name", "train_data_dir")):
        if given.get(key) not in (None, "", "null") and other not in given and values.get(other):
            removed = {name: values.pop(name) for name in SOURCE_KEYS if name in values and name not in given}
            shown = ", ".join(f"{name} {value}" for name, value in removed.items() if name != key)
            return f"{key} {given[key]} of the command line replaces the config's {shown}"
    return ""


def resize_of_run(config: Config) -> str | None:
    """`image_resize` of the run in output_dir, or of the one whose checkpoint it resumes from; None for a new run."""
    folders = [Path(config.output_dir)]
    if config.resume_from_checkpoint not in (None, "latest"):
        folders.append(Path(config.resume_from_checkpoint).parent.parent)
    stages = (type(config), *SECTION_OF)  # its own first; both stages of a run see the same images
    saved = ((folder / f"{SECTION_OF[stage]}.yaml", stage) for folder in folders for stage in stages)
    for path, stage in saved:
        if path.is_file():
            return read_yaml(path, stage).get("image_resize", "pillow")  # which resized all images before the key was
    return None


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        pairs.append((flag, value if equals else (words[i + 1] if i + 1 < len(words) else "")))
    return pairs


# ------------------------------------------------------------------------------------------- saved config, same run

# Keys that may change when a run resumes. All others determine its result.
FREE_KEYS = {
    *("output_dir", "resume_from_checkpoint", "report_to", "tracker_project_name", "autoencoder", "latents_dir"),
    # the checkpoint identifies the autoencoder, and says how its latents are normalized
    *("autoencoder_subfolder", "autoencoder_revision", "latent_normalization"),
    *("init_from", "init_from_subfolder", "init_from_revision"),  # the weights are those of the checkpoint
    *("init_unet", "init_unet_subfolder", "init_unet_revision"),
    *("max_train_steps", "max_train_images", "train_minutes", "train_hours", "autoencoder_time_share"),
    "auto_sizes",  # the keys that it sets may not change
    # same_batch keeps their product with the processes
    *("train_batch_size", "gradient_accumulation_steps", "images_per_step"),
    *("logging_steps", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("dataloader_num_workers", "heartbeat_timeout", "image_cache_gib", "max_bad_image_share", "lpips_weights"),
    *("num_inference_steps", "num_validation_samples", "inference_scheduler", "ema_snapshots", "guidance_scale"),
    *("text_encoder", "export_text_encoder"),  # only its location: the key of the embeddings identifies the encoder
    # a chapter whose keys change is trained again
    *("self_guidance_steps", "self_guidance_images", "self_guidance_scale", "self_guidance_weak"),
    *("self_guidance_interval", "self_guidance_learning_rate"),
    *("few_step_training_steps", "few_step_training_images", "few_step_counts", "few_step_learning_rate"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy", "hub_variants", "hub_license"),
    "push_checkpoints",
    *("gradient_checkpointing", "torch_compile", "channels_last", "deterministic"),  # only the last bits differ
}


def save_config(config: RunConfig, path: Path) -> None:
    """Write every key of the resolved config as a YAML file that `--config` reads."""
    section = SECTION_OF[type(config)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump({section: dataclasses.asdict(config)}, sort_keys=False))


# Keys that a run with train_minutes sets itself. Its saved config holds what it chose.
PLANNED_KEYS = (
    *("max_train_steps", "max_train_images", "lr_warmup_steps", "lr_warmup_images", "lr_decay_steps"),
    *("lr_decay_images", "validation_steps", "checkpointing_steps", "codebook_start", "disc_start"),
    *("disc_ramp_steps", "disc_adaptive_steps", "self_guidance_steps", "self_guidance_images"),
    *("few_step_training_steps", "few_step_training_images"),
)

# Keys that auto_sizes sets, unless they are given. The saved config holds what it chose.
SIZED_KEYS = (
    *("train_batch_size", "learning_rate", "block_out_channels", "norm_num_groups", "latent_channels"),
    *("unet_block_out_channels", "unet_layers_per_block", "unet_attention_levels", "unet_attention_head_dim"),
    "unet_norm_num_groups",
)


def changed(config: Config, **values: object) -> Config:
    """A copy with other values, and with the notes on its source."""
    made = dataclasses.replace(config, **values)
    made.source_note, made.given_keys = config.source_note, config.given_keys
    return made


def keys_to_size(config: RunConfig) -> list[str]:
    """The keys that auto_sizes chooses for this config: those of SIZED_KEYS that were not given."""
    left = config.auto_sizes and [key for key in SIZED_KEYS if key not in config.given_keys]
    return [key for key in left or () if hasattr(config, key)]


def planned_keys(config: RunConfig) -> list[str]:
    """The keys that a run with train_minutes sets itself."""
    return [*(key for key in PLANNED_KEYS if hasattr(config, key)), *keys_to_size(config)]


def with_saved_plan(config: Config, path: Path) -> tuple[Config, float | None]:
    """A config of a run with train_minutes, with what the run in its folder has chosen.

    Args:
        config: as it was asked for.
        path: the saved config of the run.

    Returns:
        The config, and the minutes that the run in the folder was planned for; None if there is no such plan.
    """
    if config.minutes is None or not path.exists():
        return config, None
    saved = read_yaml(path, type(config))
    minutes = saved.get("train_minutes") or 60 * (saved.get("train_hours") or 0)
    if not minutes:
        return config, None
    return changed(config, **{key: saved[key] for key in planned_keys(config) if key in saved}), minutes


def check_plan(config: RunConfig, minutes: float | None, path: Path) -> None:
    """Check that a run that is resumed was planned for this time.

    Args:
        config: as it was asked for, with a time.
        minutes: of the plan, or None; see `with_saved_plan`.
        path: the saved config of the run.

    Raises:
        UserError: it has no plan, or one for another time.
    """
    if minutes is None:
        raise UserError(
            f"{path.parent} holds a run without train_minutes, which cannot be planned afterwards: give it "
            f"max_train_steps, or use another --output_dir."
        )
    if not math.isclose(minutes, config.minutes):
        raise UserError(
            f"{path.parent} holds a run of {minutes:g} minutes, not of {config.minutes:g}: use another --output_dir, "
            f"or train it longer with --config {path} --train_minutes null --train_hours null --max_train_steps N."
        )


PLACE_KEYS = ("train_data_dir", "dataset_name", "conditioning_image_dir")  # the same data may lie elsewhere


def check_same_run(config: RunConfig, path: Path) -> str:
    """Reject an output folder that holds another run's config.

    Returns:
        How the places of the data differ from the saved ones, for the message of an error; "" if they do not. The
        caller then compares the data.

    Raises:
        UserError: the config saved at `path` differs in a key outside FREE_KEYS and PLACE_KEYS.
    """
    if not path.exists():
        return ""
    saved = read_yaml(path, type(config))
    now = dataclasses.asdict(config)
    differing = [key for key in now if key in saved and key not in FREE_KEYS and not _agree(key, saved[key], now[key])]
    shown = ", ".join(f"{key} was {saved[key]!r}, is {now[key]!r}" for key in differing[:4])
    if len(differing) > 4:
        shown += f" and {len(differing) - 4} more"
    if set(differing) - set(PLACE_KEYS):
        raise another_run(path, shown)
    return shown


def _agree(key: str, saved: object, now: object) -> bool:
    if key in PLACE_KEYS and isinstance(saved, str) and isinstance(now, str):
        return same_place(saved, now)
    return saved == now


def another_run(path: Path, difference: str) -> UserError:
    """The error of an output folder that holds another run, whose config is at `path`."""
    return UserError(
        f"{path.parent} holds another run ({difference}). Use another --output_dir, delete the folder, or use the "
        f"config that created it: --config {path}."
    )
