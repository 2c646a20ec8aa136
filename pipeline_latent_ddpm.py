"""Latent diffusion pipeline: a U-Net denoises latents, an autoencoder decodes them into images.

This file is also uploaded with the weights as `pipeline.py`, so it only depends on diffusers and its requirements:

    DiffusionPipeline.from_pretrained(repo)                                               # stock LDMPipeline
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)  # this class

Both load the same three components and draw the same images from the same generator. This class adds the
features of later diffusers pipelines: any scheduler, given latents, one generator per image, half precision,
callbacks, CPU offload, `encode` / `decode`, variations of an image (SDEdit) and inpainting. Models conditioned on a
class, an image or semantic map, or a text need this class, because LDMPipeline does not support conditioning.
"""

import difflib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional, Union

import diffusers
import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    LMSDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STEPS = 20
# A key of scheduler_config.json: there, stock diffusers keeps what begins with an underscore, and does not warn of it.
RECORDED_STEPS = "_num_inference_steps"
# text encoder class by transformers' model_type; other models are used whole
ENCODER_CLASSES = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "siglip": "SiglipTextModel",
}
CONDITIONS = ("conditioning_image", "class_labels", "prompt")  # in the order in which guidance adds them


class AutoencoderKind(NamedTuple):
    """What an autoencoder class of diffusers calls its sizes, and how its latents are normalized.

    Attributes:
        channels: key of its config with the number of latent channels; of several, the first that is set.
        levels: key of its config with one entry for each level, of which each but one halves the sides; None if the
            model has a `spatial_compression_ratio`, or its sides are fixed.
        folds: whether mean and standard deviation of the latents can be written into its weights, so that diffusers'
            LDMPipeline, which only divides by `scaling_factor`, decodes normalized latents.
        has_frames: whether it takes images and latents as videos of one frame, (B, C, 1, H, W).
    """

    channels: tuple[str, ...] = ("latent_channels",)
    levels: str | None = None
    folds: bool = False
    has_frames: bool = False


AUTOENCODERS = {
    "AutoencoderKL": AutoencoderKind(levels="block_out_channels", folds=True),
    "VQModel": AutoencoderKind(("vq_embed_dim", "latent_channels"), levels="block_out_channels", folds=True),
    "AsymmetricAutoencoderKL": AutoencoderKind(levels="down_block_out_channels", folds=True),
    "AutoencoderKLFlux2": AutoencoderKind(levels="block_out_channels", folds=True),
    "AutoencoderRAE": AutoencoderKind(("encoder_hidden_size",), folds=True),
    "AutoencoderTiny": AutoencoderKind(levels="encoder_block_out_channels"),
    "AutoencoderDC": AutoencoderKind(levels="encoder_block_out_channels"),
    "AutoencoderKLHunyuanImage": AutoencoderKind(),
    "AutoencoderKLKVAE": AutoencoderKind(("z_channels",), levels="ch_mult"),
    "AutoencoderKLQwenImage": AutoencoderKind(("z_dim",), has_frames=True),
}
# from_pipe of diffusers compares the class of a component with those that the annotation lists
AnyAutoencoder = Union[tuple(getattr(diffusers, name) for name in AUTOENCODERS if hasattr(diffusers, name))]  # noqa: UP007


def kind_of(autoencoder: ModelMixin) -> AutoencoderKind:
    """The entry of AUTOENCODERS.

    Raises:
        ValueError: it has none; the message lists those that are there.
    """
    name = type(autoencoder).__name__
    if name not in AUTOENCODERS:
        raise ValueError(f"{name} is none of the autoencoders that can be used: {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name]


def latent_channels_of(autoencoder: ModelMixin) -> int:
    """Channels of the latents of an autoencoder in AUTOENCODERS."""
    keys = kind_of(autoencoder).channels
    return next(autoencoder.config[key] for key in keys if autoencoder.config.get(key) is not None)


def image_channels_of(autoencoder: ModelMixin) -> int:
    """Channels of the images of an autoencoder in AUTOENCODERS."""
    names = ("in_channels", "num_channels", "input_channels")
    return next((autoencoder.config[name] for name in names if name in autoencoder.config), 3)


def downsampling_of(autoencoder: ModelMixin) -> int:
    """Pixels per latent along a side, of an autoencoder in AUTOENCODERS."""
    levels = kind_of(autoencoder).levels
    if levels is not None:
        return 2 ** (len(autoencoder.config[levels]) - 1)
    if "spatial_compression_ratio" in autoencoder.config:
        return autoencoder.config.spatial_compression_ratio
    if hasattr(autoencoder, "spatial_compression_ratio"):
        return autoencoder.spatial_compression_ratio
    return autoencoder.decoder_image_size // round(autoencoder.num_patches**0.5)


def encode_images(autoencoder: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1] -> the autoencoder's own latents (B, D, h, w), without `scaling_factor`.

    They are the same at every call: the latents of a VQModel before quantization, the mode of a posterior.
    """
    has_frames = kind_of(autoencoder).has_frames
    encoded = autoencoder.encode(images.unsqueeze(2) if has_frames else images)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents.squeeze(2) if has_frames else latents


def decode_latents(autoencoder: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """The autoencoder's own latents (B, D, h, w) -> images (B, C, H, W) in about [-1, 1]; a VQModel quantizes first."""
    if kind_of(autoencoder).has_frames:
        return autoencoder.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return autoencoder.decode(latents).sample


def class_shares(maps: torch.Tensor, classes: int, size: tuple[int, int]) -> torch.Tensor:
    """The share of each class in the pixels of each latent.

    Args:
        maps: integers (B, H, W) in [0, classes).
        classes: number of classes.
        size: (h, w) of the latents; divides (H, W).

    Returns:
        float32 (B, classes, h, w); the sum over the classes is 1.
    """
    one_hot = torch.nn.functional.one_hot(maps.long(), classes).movedim(-1, 1).float()
    return torch.nn.functional.adaptive_avg_pool2d(one_hot, size)


def image_channels(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1], resized to the latents' size (h, w), plus a channel of ones: (B, C + 1, h, w)."""
    small = torch.nn.functional.adaptive_avg_pool2d(images, size)
    return torch.cat((small, torch.ones_like(small[:, :1])), dim=1)


def guidance_weights(scales: Sequence[float]) -> list[float]:
    """Weights of the predictions v_0, v_1, ..., v_n with none, the first, the first two, ... conditions.

    Guidance adds the conditions one by one: v_0 + sum_k s_k (v_k - v_(k-1)) (arXiv 2211.09800, equation 3). With equal
    scales s it is v_0 + s (v_n - v_0) (arXiv 2207.12598, equation 6, where s = 1 + w).

    Args:
        scales: s_1, ..., s_n, the guidance scale of each condition.

    Returns:
        n + 1 numbers that sum to 1.
    """
    padded = [1.0, *scales, 0.0]
    return [padded[k] - padded[k + 1] for k in range(len(scales) + 1)]


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler follows the straight paths (1 - sigma) * x0 + sigma * noise (arXiv 2210.02747)."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def noise_level(scheduler: SchedulerMixin, t: torch.Tensor) -> tuple[float, float]:
    """Signal and noise in the scheduler's latents before its step at timestep `t`.

    Args:
        scheduler: its timesteps are set, and its next step is at `t`.
        t: scalar, the next element of `scheduler.timesteps`.

    Returns:
        (keep, spread) such that latents = keep * x0 + spread * noise. For flow matching: (1 - sigma, sigma). For
        schedulers that hold x0 + sigma * noise and scale the model's input (Euler, Heun, LMS, KDPM2): (1, sigma).
        For the others: the square roots of alpha_bar and 1 - alpha_bar (arXiv 2006.11239, equation 4).

    Raises:
        ValueError: another scheduler; the message names it.
    """
    if is_flow_matching(scheduler):
        sigma = float(t) / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(f"{type(scheduler).__name__} does not say how noisy its latents are at a timestep")
    # From the scheduler and not from its table: its sigmas may lie between those of the table, and in the half steps
    # of second-order schedulers only the scheduler knows the current sigma.
    scale = 1.0
    if hasattr(scheduler, "scale_model_input"):
        scale = float(scheduler.scale_model_input(torch.ones(()), t))
    if scale < 1:
        return 1.0, (scale**-2 - 1) ** 0.5  # scale = (1 + sigma**2) ** -0.5
    alpha_bar = float(scheduler.alphas_cumprod[round(float(t))])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def predict_original(
    latents: torch.Tensor, prediction: torch.Tensor, scheduler: SchedulerMixin, t: torch.Tensor
) -> torch.Tensor:
    """The clean latents x0 that a prediction of the U-Net implies.

    Args:
        latents: (B, C, h, w), the scheduler's latents before its step at `t`, not scaled for the model.
        prediction: (B, C, h, w), output of the U-Net, of type `scheduler.config.prediction_type`; for flow matching
            the velocity noise - x0.
        scheduler: as in `noise_level`, before its step at `t`.
        t: scalar, the timestep.

    Returns:
        (B, C, h, w) in model space, float32, not clipped.

    Raises:
        ValueError: see `noise_level`; or an unknown prediction type.
    """
    keep, spread = noise_level(scheduler, t)
    latents, prediction = latents.float(), prediction.float()
    kind = "flow_prediction" if is_flow_matching(scheduler) else scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (latents - spread * prediction) / keep
    if kind == "flow_prediction":
        return latents - spread * prediction
    if kind == "v_prediction":  # arXiv 2202.00512, appendix D, where keep**2 + spread**2 = 1
        norm = (keep**2 + spread**2) ** 0.5
        return keep / norm**2 * latents - spread / norm * prediction
    raise ValueError(f"{type(scheduler).__name__} has the unknown prediction_type {kind!r}")


def skip_steps(scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
    """Make a scheduler, whose timesteps are set, start after its first `steps` steps.

    Returns:
        The remaining timesteps.

    Raises:
        ValueError: a `PNDMScheduler` that begins with Runge-Kutta steps.
    """
    if steps == 0:
        return scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        if not scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler cannot begin midway with skip_prk_steps=False: set skip_prk_steps=True")
        # [t0, t1, t1, t2, ...]: PNDM evaluates its second timestep twice, wherever it starts.
        rest = scheduler.timesteps[steps + 1 :]
        return torch.cat((rest[:2], rest[1:]))
    skipped = steps * getattr(scheduler, "order", 1)  # second-order schedulers list most timesteps twice
    if isinstance(scheduler, LMSDiscreteScheduler):
        # LMS uses the step index as the number of past steps. With a begin index it would use a history that does
        # not exist.
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[skipped:], scheduler.sigmas[skipped:]
        return scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


class LatentDDPMPipeline(DiffusionPipeline):
    """Samples images from a diffusion model trained on the latents of an autoencoder.

    Latent diffusion: Rombach et al., arXiv 2112.10752. *Model-space* latents are the inputs of the U-Net, of about unit
    variance: the autoencoder's latents times `vqvae.config.scaling_factor`, or with `latents_std` those less
    `latents_mean`, divided by it.

    Args:
        vqvae: `VQModel`, `AutoencoderKL`, or another autoencoder in AUTOENCODERS.
        unet: `UNet2DModel`, or `UNet2DConditionModel` for text; predicts `scheduler.config.prediction_type`, or the
            velocity of a flow.
        scheduler: any diffusers scheduler that supports this prediction.
        text_encoder: text encoder (transformers) of a model conditioned on text.
        tokenizer: tokenizer of the text encoder.
        class_names: class names of a model conditioned on classes, in the order of the labels. The U-Net has one more
            class embedding, for no class.
        conditioning_classes: number of classes of the semantic maps that condition the model; None for images. The
            U-Net has this many input channels after the latents; for images, their channels and one more.
        text_encoder_id: Hub id or folder from which text encoder and tokenizer are loaded when first needed, unless
            they are given.
        max_caption_tokens: prompts are truncated to this many tokens.
        latents_mean, latents_std: mean and standard deviation of each channel of the autoencoder's latents, where its
            weights do not hold them.
    """

    model_cpu_offload_seq = "text_encoder->unet->vqvae"
    # A VQModel reads its codebook without a call that enable_sequential_cpu_offload could see.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vqvae"]
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "pred_original_sample"]
    # This file, for `save_config`. Read now and kept by the class, because diffusers copies the pipeline.py of each
    # local folder to one place of its cache and runs it in one module: later, another model's may be there.
    _source: ClassVar[bytes] = Path(__file__).read_bytes()

    # Union, not |: from_pretrained of diffusers 0.35 reads these annotations and fails on `|`.
    def __init__(
        self,
        vqvae: AnyAutoencoder,
        unet: Union[UNet2DModel, UNet2DConditionModel],  # noqa: UP007
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        class_names: Optional[list] = None,  # noqa: UP045
        conditioning_classes: Optional[int] = None,  # noqa: UP045
        text_encoder_id: Optional[str] = None,  # noqa: UP045
        max_caption_tokens: Optional[int] = None,  # noqa: UP045
        latents_mean: Optional[list] = None,  # noqa: UP045
        latents_std: Optional[list] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        self.register_modules(
            vqvae=vqvae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        about = {"class_names": class_names, "conditioning_classes": conditioning_classes}
        about |= {"text_encoder_id": text_encoder_id, "max_caption_tokens": max_caption_tokens}
        about |= {"latents_mean": latents_mean, "latents_std": latents_std}
        self.register_to_config(**{name: value for name, value in about.items() if value is not None})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        **kwargs: Any,
    ) -> "LatentDDPMPipeline":
        """Like `DiffusionPipeline.from_pretrained`, but a repository with its own pipeline.py is loaded by this class.

        So code of the repository runs only with `trust_remote_code=True`.
        """
        name = os.fspath(pretrained_model_name_or_path)
        about = {key: kwargs[key] for key in ("cache_dir", "token", "revision", "local_files_only") if key in kwargs}
        index = cls.load_config(name, **about)
        if isinstance(index["_class_name"], str) or kwargs.get("trust_remote_code"):
            return super().from_pretrained(name, **kwargs)
        folder = name
        if not os.path.isdir(name):
            parts = [key for key, value in index.items() if isinstance(value, (list, tuple)) and key != "_class_name"]
            folder = snapshot_download(name, allow_patterns=[f"{part}/*" for part in parts], **about)
        with tempfile.TemporaryDirectory() as aside:  # a copy of the folder whose index names a class instead of a file
            for entry in os.scandir(folder):
                if entry.is_dir():
                    place = os.path.join(aside, entry.name)
                    try:
                        os.symlink(os.path.abspath(entry.path), place, target_is_directory=True)
                    except OSError:  # Windows allows it to few users
                        shutil.copytree(entry.path, place)
            with open(os.path.join(aside, "model_index.json"), "w", encoding="utf-8") as file:
                json.dump({**index, "_class_name": cls.__name__}, file)
            pipeline = super().from_pretrained(aside, **kwargs)
        pipeline.register_to_config(_name_or_path=name)  # not that of the copy, which is gone
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Like `DiffusionPipeline.save_pretrained`, in a folder that loads again.

        What stock diffusers can draw is saved as an `LDMPipeline`: `DiffusionPipeline.from_pretrained(folder)` loads
        it. Other pipelines load with `custom_pipeline=folder, trust_remote_code=True`. Both hold this file as
        pipeline.py.
        """
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)  # with push_to_hub, it must be a str

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write model_index.json and pipeline.py."""
        folder = os.fspath(save_directory)
        os.makedirs(folder, exist_ok=True)
        aside = os.path.join(folder, ".pipeline.py.tmp")
        with open(aside, "wb") as file:
            file.write(self._source)
        os.replace(aside, os.path.join(folder, "pipeline.py"))
        for name in self.components:
            self._remove_stale_index(os.path.join(folder, name))
        super().save_config(folder, *args, **kwargs)

    def to_json_string(self) -> str:
        """The content of model_index.json."""
        index = json.loads(super().to_json_string())
        if self._is_stock(index):
            index = {key: value for key, value in index.items() if key not in self._optional_components}
            index["_class_name"] = "LDMPipeline"
        else:
            index["_class_name"] = ["pipeline", "LatentDDPMPipeline"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def _remove_stale_index(folder: str) -> None:
        """Remove the index of shards that an earlier `save_pretrained` left: diffusers would load by it, and fail."""
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            if name.endswith(".index.json"):
                with open(path, encoding="utf-8") as file:
                    shards = set(json.load(file)["weight_map"].values())
                if not all(os.path.exists(os.path.join(folder, shard)) for shard in shards):
                    os.unlink(path)

    def _is_stock(self, index: dict[str, Any]) -> bool:
        """Whether diffusers' LDMPipeline loads the components of this model_index.json and draws with them."""
        try:
            from diffusers import LDMPipeline  # noqa: F401
        except (ImportError, RuntimeError):  # RuntimeError: a lazy import of diffusers that fails
            return False
        own = ("class_names", "conditioning_classes", "text_encoder_id", "max_caption_tokens", "latents_std")
        return (
            index["unet"] == ["diffusers", "UNet2DModel"]
            and index["vqvae"][0] == "diffusers"
            and kind_of(self.vqvae).folds
            and isinstance(self.unet.config.sample_size, int)
            and not (self.unet.config.num_class_embeds or self.conditioning_channels)
            and not any(index.get(name) for name in own)
            and index["text_encoder"][0] is None
            # LDMPipeline uses these; the schedulers of flow matching have none
            and hasattr(self.scheduler, "init_noise_sigma")
            and hasattr(self.scheduler, "scale_model_input")
        )

    @property
    def recorded_steps(self) -> int | None:
        """The number of sampling steps that a few-step model is made for; None for other models."""
        return self.scheduler.config.get(RECORDED_STEPS)

    @property
    def num_timesteps(self) -> int:
        """Number of U-Net evaluations of the latest call; second-order schedulers need more than one per step."""
        return self._num_timesteps

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the labels, or numbers if there are no names. Empty without classes."""
        count = (self.unet.config.num_class_embeds or 1) - 1
        names = self.config.get("class_names")
        return list(names) if names else [str(k) for k in range(count)]

    @property
    def conditioning_channels(self) -> int:
        """Input channels of the U-Net after the latents; 0 without conditioning image."""
        return self.unet.config.in_channels - self.unet.config.out_channels

    @property
    def takes_text(self) -> bool:
        """Whether the model is conditioned on text."""
        return self.unet.config.get("cross_attention_dim") is not None

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed texts.

        Returns:
            Embeddings, float (B, T, cross_attention_dim), zero at padding, and attention mask, bool (B, T), on the
            pipeline's device.

        Raises:
            ValueError: the pipeline has neither a text encoder nor a text_encoder_id.
        """
        if self.text_encoder is None or self.tokenizer is None:
            name = self.config.get("text_encoder_id")
            if name is None:
                raise ValueError("prompt: this pipeline has no text encoder; give prompt_embeds")
            import transformers

            # False, because unset asks at the terminal whether to run the code of a repository that has some
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            kind = ENCODER_CLASSES.get(config.model_type, "AutoModel")
            encoder = getattr(transformers, kind).from_pretrained(name).eval().requires_grad_(False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.register_modules(text_encoder=encoder.to(self._execution_device), tokenizer=tokenizer)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.get("max_caption_tokens"), return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self._execution_device) for name in ("input_ids", "attention_mask"))
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1), mask.bool()

    @property
    def guidance_scale(self) -> float | dict[str, float]:
        """The `guidance_scale` of the latest call; a callback may set `pipe._guidance_scale` for the next step."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """A callback sets `pipe._interrupt = True` to skip the remaining steps; the images are still decoded."""
        return self._interrupt

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images into model-space latents; for an `AutoencoderKL`, the mode of the posterior.

        Args:
            images: float (B, C, H, W) in [-1, 1], on any device, of any float dtype.

        Returns:
            (B, latent_channels, h, w) in the dtype of the U-Net, of about unit variance, before quantization.
        """
        latents = encode_images(self.vqvae, images.to(self._execution_device, self.vqvae.dtype))
        if self.config.get("latents_std") is not None:
            mean, std = self._normalization(latents)
            return ((latents.float() - mean) / std).to(self.unet.dtype)
        return (latents * self.vqvae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode model-space latents into images; a `VQModel` quantizes the latents first.

        Args:
            latents: (B, latent_channels, h, w), on any device, of any float dtype.

        Returns:
            (B, C, H, W), clamped to [-1, 1], in the dtype of the autoencoder.
        """
        if self.config.get("latents_std") is not None:
            mean, std = self._normalization(latents)
            latents = (latents.float() * std + mean).to(self._execution_device, self.vqvae.dtype)
        else:
            latents = latents.to(self._execution_device, self.vqvae.dtype) / self.vqvae.config.scaling_factor
        return decode_latents(self.vqvae, latents).clamp(-1, 1)

    def _normalization(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel, float32 (D, 1, 1), on the device of the latents."""
        values = [self.config.latents_mean, self.config.latents_std]
        pair = torch.tensor(values, dtype=torch.float32, device=latents.device)
        return tuple(pair[:, :, None, None])

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentDDPMPipeline", int, Any, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: PipelineImageInput | None = None,
        strength: float | None = None,
        mask_image: PipelineImageInput | None = None,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        conditioning_image: PipelineImageInput | torch.Tensor | None = None,
        guidance_scale: float | dict[str, float] = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_unet: UNet2DModel | UNet2DConditionModel | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt: str = "",
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images; `image` draws variations of an image (SDEdit, arXiv 2108.01073); `mask_image` inpaints.

        Inpainting needs no special U-Net: before each evaluation, the latents outside of the mask are replaced by the
        latents of `image` at the same noise level (arXiv 2201.09865, equation 8, without resampling), and after the
        last step by the clean latents. The noise is the initial noise at every step. In the result, the pixels outside
        of the mask are copied from `image`, not decoded.

        Args:
            batch_size: number of images if `num_images_per_prompt` is 1; 1 is replaced by the number of class labels,
                conditioning images or prompts.
            num_inference_steps: denoising steps, at least 1; None takes `recorded_steps`, or 20 without.
            eta: 0 is deterministic DDIM, 1 has the noise of DDPM (arXiv 2010.02502, equation 16). Schedulers without
                `eta` ignore it.
            generator: random generator of the initial noise and of the noise that the scheduler draws. A list has one
                per image; image i then depends on generator i alone, not on the other images of the batch.
            latents: standard normal initial noise (batch_size, out_channels, sample_size, sample_size), by default
                drawn. It is scaled here by the scheduler's `init_noise_sigma`, or added to `image`.
            output_type: "pil": list of PIL images, grayscale (mode L) for one channel; "np": float32
                (B, H, W, C) in [0, 1]; "pt": float32 (B, C, H, W) in [0, 1] on the pipeline's device; "latent":
                the final model-space latents, in the dtype of the U-Net.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: called after each step as `callback(pipe, step, t, {"latents": latents})`. "latents"
                in the dict that it returns replaces the latents; it may return None. It may change
                `pipe._guidance_scale` for the next step. A diffusers `PipelineCallback` also works.
            callback_on_step_end_tensor_inputs: tensors passed to the callback: "latents", the scheduler's latents after
                the step, and "pred_original_sample", the clean latents in model space that the U-Net predicted in this
                step. Both are float32 for a U-Net in half precision.
            image: one image for all or one per drawn image: PIL images, float (B, C, H, W) in [0, 1], or any other
                input of `VaeImageProcessor`. Resized to the model's size without keeping the aspect ratio.
            strength: in (0, 1], the share of the steps to run, at least one; `image` is noised to the level of the
                first of them. 1 starts from pure noise, as without `image`. Default 0.8, or 1 with `mask_image`.
            mask_image: one mask for all or one per drawn image, in the formats of `image` with one channel, resized
                like it. White (at least 0.5) is repainted. A latent is repainted if any of its pixels is.
            class_labels: for a model with classes: a number or name for all images, or one per image; int64 (B,). None
                or -1 means no class.
            conditioning_image: for a model with conditioning images: one for all or one per image, resized to the
                model's size. Semantic maps: integers (B, H, W), or one-channel PIL images of class numbers. Images: see
                `image`. Also the U-Net's input itself, float (B, conditioning_channels, h, w). None means no
                conditioning image.
            guidance_scale: classifier-free guidance (arXiv 2207.12598): 1 is the conditional prediction, 0 the
                unconditional one, above 1 extrapolates. A dict has a scale for each of `class_labels`,
                `conditioning_image` and `prompt`; missing ones are 1. Needs a model trained with dropped conditions.
            guidance_interval: (lowest, highest) noise level sigma, for latents of unit variance, that is guided
                (arXiv 2404.07724); outside, the scale is 1.
            guidance_unet: a weaker model of the same kind, whose prediction replaces the unconditional one
                (autoguidance, arXiv 2406.02507); `guidance_scale` must then be one number.
            prompt: for a model with text: one text for all or one per image. None means no text.
            prompt_embeds: instead of `prompt`, embeddings from `encode_prompt`, (1 or B, T, W).
            prompt_attention_mask: attention mask of `prompt_embeds`, bool (1 or B, T); None uses all tokens.
            negative_prompt: text for the unconditional prediction; training uses the empty text.
            negative_prompt_embeds: instead of `negative_prompt`, embeddings, (1, T, W).
            negative_prompt_attention_mask: attention mask of `negative_prompt_embeds`.
            num_images_per_prompt: images for each of the `batch_size` class labels, conditioning images or prompts; the
                images of one are neighbours in the result. `latents` and a list of generators are for all images.
            timesteps: instead of `num_inference_steps`, the timesteps of the scheduler, if it takes them.
            sigmas: instead of `num_inference_steps`, the noise levels of the scheduler, if it takes them.

        Returns:
            `ImagePipelineOutput` with `images` as in `output_type`, or a tuple.

        Raises:
            ValueError: an invalid batch_size, num_inference_steps, output_type, shape of latents, number of
                generators, images or masks, strength or callback input; a strength or mask without an image; a
                scheduler that cannot begin midway, has no known noise level or does not take timesteps or sigmas. The
                message names the argument or class.
        """
        # A diffusers PipelineCallback names the tensors that it needs.
        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if num_inference_steps is None:
            num_inference_steps = self.recorded_steps or DEFAULT_STEPS
        text = (prompt, prompt_embeds, prompt_attention_mask)
        no_text = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        given, scales = self._read_conditions(
            class_labels, conditioning_image, text, no_text, guidance_scale, guidance_unet
        )
        if not isinstance(batch_size, int) or not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(
                f"batch_size and num_images_per_prompt are numbers of images, got {batch_size!r} and "
                f"{num_images_per_prompt!r}; give conditions by name, as in prompt='...'"
            )
        each = self._spread(given, batch_size)
        batch_size = each * num_images_per_prompt
        shape = self._latents_shape(batch_size)
        self._check_inputs(batch_size, num_inference_steps, generator, latents, shape, output_type, wanted)
        original, repaint, strength = self._read_image(image, mask_image, strength, each)
        given = {name: value.to(self._execution_device) for name, value in given.items()}
        given = {name: value.repeat_interleave(num_images_per_prompt, 0) for name, value in given.items()}
        original, repaint = (
            pixels if pixels is None or len(pixels) == 1 else pixels.repeat_interleave(num_images_per_prompt, 0)
            for pixels in (original, repaint)
        )
        self._interrupt, self._guidance_scale = False, guidance_scale

        # ------------------------------------------------------------------------------ initial latents
        # Some schedulers' init_noise_sigma depends on the timesteps, so these are set first.
        num_inference_steps = self._set_timesteps(num_inference_steps, timesteps, sigmas)
        steps = num_inference_steps if image is None else max(1, round(num_inference_steps * strength))
        timesteps = skip_steps(self.scheduler, num_inference_steps - steps)
        noise = self._initial_noise(latents, shape, generator)
        latents, clean, inside = self._initial_latents(
            noise, original, repaint, timesteps[0], midway=steps < num_inference_steps
        )

        # ------------------------------------------------------------------------------ denoising
        step_arguments = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in step_arguments}
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)
        order = getattr(self.scheduler, "order", 1)
        warmup, self._num_timesteps = len(timesteps) - steps * order, len(timesteps)
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                inputs, last = {}, i == len(timesteps) - 1
                scales = self._read_guidance(self._guidance_scale, guidance_unet)  # a callback may have changed it
                scales_now = self._scales_at(t, scales, guidance_interval)
                prediction = self._predict(scale_model_input(latents, t), t, given, scales_now, guidance_unet)
                if "pred_original_sample" in wanted:
                    inputs["pred_original_sample"] = predict_original(latents, prediction, self.scheduler, t)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
                if repaint is not None:
                    outside = clean if last else self._noised(clean, noise, timesteps[i + 1])
                    latents = torch.where(inside, latents, outside)
                if callback_on_step_end is not None:
                    inputs["latents"] = latents
                    outputs = callback_on_step_end(self, i, t, {name: inputs[name] for name in wanted}) or {}
                    latents = outputs.get("latents", latents).to(latents)
                if last or (i + 1 > warmup and (i + 1) % order == 0):
                    progress_bar.update()
        images = self._to_images(latents, output_type, original, repaint)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------------------------ noise and images

    def _initial_noise(
        self,
        latents: torch.Tensor | None,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The `latents` of `__call__`, or standard normal noise of that shape; on the pipeline's device, float32.

        The latents stay in float32 until the end, also for a U-Net in half precision: the noise is then that of
        LDMPipeline, and the steps of the scheduler, which half precision would round away, add up.
        """
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.promote_types(self.unet.dtype, torch.float32))

    def _initial_latents(
        self,
        noise: torch.Tensor,
        original: torch.Tensor | None,
        repaint: torch.Tensor | None,
        t: torch.Tensor,
        midway: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The scheduler's latents before the first step.

        Args:
            noise: standard normal (B, C, h, w).
            original: from `_read_image`.
            repaint: from `_read_image`.
            t: the first timestep.
            midway: start from the noised image instead of from pure noise.

        Returns:
            (B, C, h, w) in the dtype of the noise; with an image, its model-space latents, otherwise None; with a mask,
            bool (1 or B, 1, h, w), true for the latents to repaint, otherwise None.
        """
        # Flow matching schedulers have no init_noise_sigma: they start from the noise itself.
        latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if original is None:
            return latents, None, None
        clean = self.encode(original * 2 - 1).to(noise)
        if midway:
            latents = self._noised(clean, noise, t)
        if repaint is None:
            return latents, clean, None
        inside = torch.nn.functional.adaptive_max_pool2d(repaint.float(), noise.shape[2:]).bool().to(noise.device)
        return torch.where(inside, latents, self._noised(clean, noise, t)), clean, inside

    def _noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w): the model-space latents `clean` at the noise level of the scheduler's next step, at `t`."""
        keep, spread = noise_level(self.scheduler, t)
        return keep * clean + spread * noise

    def _to_images(
        self, latents: torch.Tensor, output_type: str, original: torch.Tensor | None, repaint: torch.Tensor | None
    ) -> Any:
        """Model-space latents -> images of `output_type`. Pixels outside of a mask are those of `original`."""
        if output_type == "latent":
            return latents.to(self.unet.dtype)
        images = (self.decode(latents) / 2 + 0.5).float()  # (B, C, H, W) in [0, 1]
        if repaint is not None:
            images = torch.where(repaint.to(images.device), images, original.to(images))
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # ------------------------------------------------------------------------------ prediction and guidance

    def _scales_at(
        self, t: torch.Tensor, scales: dict[str, float], interval: tuple[float, float] | None
    ) -> dict[str, float]:
        """The guidance scales at timestep `t`: `scales` within the interval of noise levels, 1 outside."""
        if interval is None:
            return scales
        keep, spread = noise_level(self.scheduler, t)
        lowest, highest = interval
        return scales if lowest * keep <= spread <= highest * keep else dict.fromkeys(scales, 1.0)

    def _predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        given: dict[str, torch.Tensor],
        scales: dict[str, float],
        guidance_unet: UNet2DModel | UNet2DConditionModel | None,
    ) -> torch.Tensor:
        """The guided prediction (B, C, h, w); arguments as in `__call__`, with a scale for each condition."""
        if guidance_unet is not None:
            strong = self._ask(self.unet, latents, t, given)
            scale = next(iter(scales.values()))
            if scale == 1:
                return strong
            weak = self._ask(guidance_unet, latents, t, given)
            return weak + scale * (strong - weak)
        named = [name for name in CONDITIONS if name in given]
        weights = guidance_weights([scales[name] for name in named])
        asked = [(k, weight) for k, weight in enumerate(weights) if weight != 0]
        if len(asked) == 1:
            return self._ask(self.unet, latents, t, {name: given[name] for name in named[: asked[0][0]]})
        # one batch with the first k conditions for each k of non-zero weight
        merged = {
            name: self._join([given[name] if place < k else self._nothing(name, given[name]) for k, _ in asked])
            for place, name in enumerate(named)
        }
        predictions = self._ask(self.unet, torch.cat([latents] * len(asked)), t, merged).chunk(len(asked))
        return sum(weight * prediction for (_, weight), prediction in zip(asked, predictions, strict=True))

    @staticmethod
    def _join(values: list[torch.Tensor]) -> torch.Tensor:
        """Concatenate batches; texts (B, T, W + 1) of different lengths are padded with masked tokens."""
        if values[0].ndim == 3:
            longest = max(value.shape[1] for value in values)
            values = [torch.nn.functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in values]
        return torch.cat(values)

    def _nothing(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The null condition of that name, in the shape and dtype of `like`."""
        if name == "class_labels":
            return torch.full_like(like, self.unet.config.num_class_embeds - 1)
        if name == "prompt":
            if self._no_text is None:  # no guidance was asked for, and a callback has switched it on
                self._no_text = self._pack_prompt(*self._no_text_given)
            empty = self._no_text.to(like)  # of its own length; `_join` pads all to one length
            return empty.expand(len(like), -1, -1)
        return torch.zeros_like(like)

    def _ask(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        latents: torch.Tensor,
        t: torch.Tensor,
        given: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """A U-Net's prediction (B, C, h, w) with the `given` conditions, and null conditions for the others.

        The U-Net computes in its own dtype; the prediction has that of the latents.
        """
        words, kind = {}, latents.dtype
        if unet.config.num_class_embeds is not None:
            nobody = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
            words["class_labels"] = given.get("class_labels", self._nothing("class_labels", nobody))
        if self.takes_text:
            text = given["prompt"] if "prompt" in given else self._nothing("prompt", latents)
            words["encoder_hidden_states"] = text[..., :-1].to(unet.dtype)
            words["encoder_attention_mask"] = text[..., -1] > 0.5
        if self.conditioning_channels:
            empty = latents.new_zeros(len(latents), self.conditioning_channels, *latents.shape[2:])
            latents = torch.cat((latents, given.get("conditioning_image", empty).to(latents.dtype)), dim=1)
        return unet(latents.to(unet.dtype), t, **words).sample.to(kind)

    # ------------------------------------------------------------------------------ reading the arguments

    def _read_conditions(
        self,
        class_labels: Any,
        conditioning_image: Any,
        text: tuple[Any, torch.Tensor | None, torch.Tensor | None],
        no_text: tuple[Any, torch.Tensor | None, torch.Tensor | None],
        guidance_scale: float | dict[str, float],
        guidance_unet: Any,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The conditions that `__call__` got, by their name in `CONDITIONS`, and a guidance scale for each name.

        `text` and `no_text` are (prompt, embeddings, attention mask). The null text is kept for `_nothing`.
        """
        labels = self._read_class_labels(class_labels)
        given = {} if labels is None else {"class_labels": labels}
        maps = self._read_conditioning_image(conditioning_image)
        given |= {} if maps is None else {"conditioning_image": maps}
        scales = self._read_guidance(guidance_scale, guidance_unet)
        if self.takes_text:
            packed = self._pack_prompt(*text)
            given |= {} if packed is None else {"prompt": packed}
            needed = packed is None or (guidance_unet is None and any(scale != 1 for scale in scales.values()))
            if no_text[1] is not None:  # embeddings replace the default negative_prompt
                no_text = (None, *no_text[1:])
            self._no_text_given = no_text
            self._no_text = self._pack_prompt(*no_text) if needed else None
        elif text[0] is not None or text[1] is not None:
            raise ValueError("prompt: this model is not conditioned on text")
        return given, scales

    def _read_class_labels(self, labels: Any) -> torch.Tensor | None:
        """Labels int64 (1 or B,) from numbers or names."""
        if labels is None:
            return None
        names = self.class_names
        if not names:
            raise ValueError("class_labels: this model is not conditioned on classes")
        if isinstance(labels, torch.Tensor):
            labels = labels.flatten().tolist()
        numbers = []
        for label in [labels] if isinstance(labels, (int, str, np.integer)) else labels:
            if isinstance(label, str):
                if label not in names:
                    nearest = difflib.get_close_matches(label, names, n=1, cutoff=0.0)
                    raise ValueError(f"class_labels: there is no class {label!r}; did you mean {nearest[0]!r}?")
                label = names.index(label)
            if not -1 <= int(label) < len(names):
                raise ValueError(f"class_labels must be from 0 to {len(names) - 1}, or -1 for no class, got {label}")
            numbers.append(len(names) if int(label) == -1 else int(label))
        if not numbers:
            raise ValueError("class_labels is empty")
        return torch.tensor(numbers)

    def _read_conditioning_image(self, image: Any) -> torch.Tensor | None:
        """The U-Net's input channels (1 or B, K, h, w) from images or semantic maps."""
        if image is None:
            return None
        if not self.conditioning_channels:
            raise ValueError("conditioning_image: this model is not conditioned on images")
        size = tuple(self._latents_shape(1)[2:])
        is_tensor = isinstance(image, torch.Tensor) and image.is_floating_point()
        if is_tensor and tuple(image.shape[1:]) == (self.conditioning_channels, *size):
            return image
        classes = self.config.get("conditioning_classes")
        if classes is None:
            channels = self.conditioning_channels - 1
            options = {"do_convert_rgb": channels == 3, "do_convert_grayscale": channels == 1}
            pixels = self._preprocess("conditioning_image", image, None, channels, **options)
            return image_channels(pixels * 2 - 1, size)
        factor = downsampling_of(self.vqvae)
        pixels = (size[0] * factor, size[1] * factor)
        maps = self._read_maps(image)
        if tuple(maps.shape[1:]) != pixels:
            maps = torch.nn.functional.interpolate(maps[:, None].float(), pixels, mode="nearest")[:, 0].long()
        if maps.min() < 0 or maps.max() >= classes:
            raise ValueError(
                f"conditioning_image: the maps of this model have the classes 0 to {classes - 1}, got "
                f"{int(maps.min())} to {int(maps.max())}"
            )
        return class_shares(maps, classes, size)

    @staticmethod
    def _read_maps(image: Any) -> torch.Tensor:
        """Semantic maps as integers (1 or B, H, W)."""
        if isinstance(image, torch.Tensor):
            maps = image[None] if image.ndim == 2 else image
        else:
            images = [
                torch.from_numpy(np.array(one)) for one in (image if isinstance(image, (list, tuple)) else [image])
            ]
            if any(one.ndim != 2 for one in images):
                raise ValueError("conditioning_image: a semantic map has one channel, with the class numbers")
            maps = torch.stack([one.long() for one in images])
        if maps.ndim != 3 or maps.is_floating_point():
            raise ValueError(
                f"conditioning_image: semantic maps are integers (B, H, W), got {maps.dtype} {tuple(maps.shape)}"
            )
        return maps.long()

    def _pack_prompt(
        self, prompt: str | Sequence[str] | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Embeddings with their mask as an extra channel: (1 or B, T, W + 1); None without text."""
        width = self.unet.config.cross_attention_dim
        if prompt is not None and embeds is not None:
            raise ValueError("give prompt or prompt_embeds, not both")
        if prompt is not None:
            if not isinstance(prompt, str) and not prompt:
                raise ValueError("prompt is empty")
            embeds, mask = self.encode_prompt(prompt)
        if embeds is None:
            return None
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise ValueError(f"prompt_embeds must be (B, T, {width}), got {tuple(embeds.shape)}")
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return torch.cat((embeds.float(), mask.to(embeds.device)[..., None].float()), dim=-1)

    def _spread(self, given: dict[str, torch.Tensor], batch_size: int) -> int:
        """Repeat conditions given once to the batch size, in place; return that batch size."""
        for name, value in given.items():
            if batch_size == 1 and len(value) > 1:
                batch_size = len(value)
            if len(value) not in (1, batch_size):
                raise ValueError(f"{name}: got {len(value)} for {batch_size} images; one for all, or one per image")
        for name, value in given.items():
            given[name] = value.expand(batch_size, *value.shape[1:])
        return batch_size

    def _set_timesteps(
        self, num_inference_steps: int, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None
    ) -> int:
        """Set the scheduler's timesteps, as asked for in `__call__`; returns their number in steps."""
        asked = {"timesteps": timesteps, "sigmas": sigmas}
        asked = {name: list(values) for name, values in asked.items() if values is not None}
        if not asked:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            return num_inference_steps
        taken = inspect.signature(self.scheduler.set_timesteps).parameters
        unknown = [name for name in asked if name not in taken]
        if unknown or len(asked) > 1:
            what = f"{type(self.scheduler).__name__} takes no {unknown[0]}" if unknown else "got both"
            raise ValueError(f"timesteps, sigmas: give one of them, if the scheduler takes it; {what}")
        self.scheduler.set_timesteps(**asked, device=self._execution_device)
        return -(-len(self.scheduler.timesteps) // getattr(self.scheduler, "order", 1))

    def _read_guidance(self, scale: float | dict[str, float], guidance_unet: Any) -> dict[str, float]:
        if isinstance(scale, dict):
            unknown = [name for name in scale if name not in CONDITIONS]
            if unknown or guidance_unet is not None:
                what = f"{', '.join(unknown)}" if unknown else "a dict with guidance_unet"
                raise ValueError(f"guidance_scale is a number, or a dict of {', '.join(CONDITIONS)}; got {what}")
            return {name: float(scale.get(name, 1.0)) for name in CONDITIONS}
        return dict.fromkeys(CONDITIONS, float(scale))

    def _read_image(
        self,
        image: PipelineImageInput | None,
        mask_image: PipelineImageInput | None,
        strength: float | None,
        batch_size: int,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """Image (1 or B, C, H, W) in [0, 1] or None, mask bool (1 or B, 1, H, W) or None, and strength in (0, 1]."""
        if image is None and (strength is not None or mask_image is not None):
            raise ValueError("strength and mask_image need an image")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if strength is None:
            strength = 0.8 if mask_image is None else 1.0
        original = None if image is None else self._prepare_image(image, batch_size)
        repaint = None if mask_image is None else self._prepare_mask(mask_image, batch_size)
        return original, repaint, strength

    def _prepare_image(self, image: PipelineImageInput, batch_size: int) -> torch.Tensor:
        """Float32 (1 or B, C, H, W) in [0, 1], with the size and channels of the autoencoder's images."""
        channels = image_channels_of(self.vqvae)
        return self._preprocess(
            "image", image, batch_size, channels, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
        )

    def _prepare_mask(self, mask: PipelineImageInput, batch_size: int) -> torch.Tensor:
        """Bool (1 or B, 1, H, W), true for pixels to repaint."""
        return self._preprocess("mask_image", mask, batch_size, 1, do_convert_grayscale=True) >= 0.5

    def _preprocess(
        self, name: str, image: PipelineImageInput, batch_size: int | None, channels: int, **options: bool
    ) -> torch.Tensor:
        factor = downsampling_of(self.vqvae)
        height, width = (side * factor for side in self._latents_shape(1)[2:])
        # Not normalized: a conversion to [-1, 1] and back could round the pixels that inpainting keeps.
        processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, **options)
        image = processor.preprocess(image, height=height, width=width).float().contiguous()
        many = batch_size is not None and len(image) not in (1, batch_size)
        if image.shape[1:] != (channels, height, width) or many:
            raise ValueError(
                f"{name} must be 1 or {batch_size} of {channels} channels ({height}x{width} pixels), "
                f"got the shape {tuple(image.shape)}"
            )
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{name} must be in [0, 1], got [{image.min():.3g}, {image.max():.3g}]")
        return image

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size is not set, so the size of the latents is unknown: set it")
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, self.unet.config.out_channels, height, width)

    def _check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        shape: tuple[int, ...],
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)} for batch_size {batch_size}: give one per image")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
