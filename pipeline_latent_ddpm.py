"""Latent diffusion: a U-Net denoises latents, an autoencoder turns them into images.

This one file is also uploaded beside the weights as `pipeline.py`, so it needs nothing but diffusers:

    DiffusionPipeline.from_pretrained(repo)                                               # stock LDMPipeline
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)  # this class

Both load the same three components and draw the same images from the same generator. This class adds what
later diffusers pipelines have: any scheduler, given latents, one generator per image, half precision,
callbacks, CPU offload, `encode` / `decode`, variations of an image (SDEdit) and inpainting. A model that is
conditioned on a class, an image or semantic map, or a text, has this class alone, for LDMPipeline has no word for them.
"""

import difflib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Optional, Union

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# by transformers' model_type, what of a model is its text encoder; of others all
ENCODER_CLASSES = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "siglip": "SiglipTextModel",
}
CONDITIONS = ("conditioning_image", "class_labels", "prompt")  # in the order in which guidance adds them


def class_shares(maps: torch.Tensor, classes: int, size: tuple[int, int]) -> torch.Tensor:
    """The share of each class in the pixels of each latent.

    Args:
        maps: integers (B, H, W) in [0, classes).
        size: (h, w) of the latents; divides (H, W).

    Returns:
        float32 (B, classes, h, w), which sums to 1 over the classes.
    """
    one_hot = torch.nn.functional.one_hot(maps.long(), classes).movedim(-1, 1).float()
    return torch.nn.functional.adaptive_avg_pool2d(one_hot, size)


def image_channels(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) in [-1, 1] at the latents' size (h, w), and a channel of ones: (B, C + 1, h, w)."""
    small = torch.nn.functional.adaptive_avg_pool2d(images, size)
    return torch.cat((small, torch.ones_like(small[:, :1])), dim=1)


def guidance_weights(scales: Sequence[float]) -> list[float]:
    """How much each prediction counts, of the model that is given none, the first, the first two, ... conditions.

    Guidance adds one condition after the other: v_0 + sum_k s_k (v_k - v_(k-1)) (arXiv 2211.09800, equation 3). With
    one scale for all it is v_0 + s (v_n - v_0) (arXiv 2207.12598, equation 6, where s = 1 + w).

    Args:
        scales: s_1, ..., s_n.

    Returns:
        n + 1 numbers that sum to 1.
    """
    padded = [1.0, *scales, 0.0]
    return [padded[k] - padded[k + 1] for k in range(len(scales) + 1)]


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler follows the straight paths (1 - sigma) * x0 + sigma * noise (arXiv 2210.02747)."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def noise_level(scheduler: SchedulerMixin, t: torch.Tensor) -> tuple[float, float]:
    """What the scheduler's latents are made of when the U-Net is asked at timestep `t`.

    Args:
        scheduler: its timesteps are set, and its next step is the one at `t`.
        t: scalar, the element of `scheduler.timesteps` that is next.

    Returns:
        (keep, spread) such that latents = keep * x0 + spread * noise. For flow matching (1 - sigma, sigma); for
        schedulers that hold x0 + sigma * noise and scale the model's input (Euler, Heun, LMS, KDPM2) (1, sigma);
        for the others the square roots of alpha_bar and 1 - alpha_bar (arXiv 2006.11239, equation 4).

    Raises:
        ValueError: the scheduler is none of these; the message names it.
    """
    if is_flow_matching(scheduler):
        sigma = float(t) / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    if not (hasattr(scheduler, "add_noise") and hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(f"{type(scheduler).__name__} does not say how noisy its latents are at a timestep")
    # Asked of the scheduler rather than of its table: its sigmas may lie between the table's, and in the half
    # steps of second-order schedulers only it knows which of its sigmas is meant.
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
    """The clean latents that a prediction of the U-Net amounts to.

    Args:
        latents: (B, C, h, w), as the scheduler holds them before its step at `t`, not scaled for the model.
        prediction: (B, C, h, w), the U-Net's output: what `scheduler.config.prediction_type` says, or for flow
            matching the velocity noise - x0.
        scheduler: as for `noise_level`; no step at `t` has been made yet.
        t: scalar, the timestep.

    Returns:
        (B, C, h, w) in model space, float32, not clipped.

    Raises:
        ValueError: as `noise_level`, or another prediction type.
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
    """Has a scheduler, whose timesteps are set, begin after its first `steps` steps; the timesteps that remain.

    Raises:
        ValueError: it is a `PNDMScheduler` that begins with Runge-Kutta steps.
    """
    if steps == 0:
        return scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        if not scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler can not begin midway with skip_prk_steps=False: set skip_prk_steps=True")
        # [t0, t1, t1, t2, ...]: it asks twice at the second timestep of whichever it begins with.
        rest = scheduler.timesteps[steps + 1 :]
        return torch.cat((rest[:2], rest[1:]))
    skipped = steps * getattr(scheduler, "order", 1)  # second-order schedulers list most timesteps twice
    if isinstance(scheduler, LMSDiscreteScheduler):
        # It takes the index of a step for the number of steps made, so from a begin index it would use a past
        # that it does not have.
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[skipped:], scheduler.sigmas[skipped:]
        return scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


class LatentDDPMPipeline(DiffusionPipeline):
    """Samples images from a diffusion model trained on the latents of an autoencoder.

    Latent diffusion: Rombach et al., arXiv 2112.10752. Throughout, *model-space* latents are those the U-Net
    sees, of about unit variance: the autoencoder's latents times `vqvae.config.scaling_factor`.

    Args:
        vqvae: `VQModel` or `AutoencoderKL`.
        unet: `UNet2DModel`; predicts what `scheduler.config.prediction_type` says, or a flow's velocity.
        scheduler: any diffusers scheduler that works on such a prediction.
        class_names: of a model that is conditioned on a class, by label. Its U-Net has one embedding more, which stands
            for no class.
        conditioning_classes: of the semantic maps of a model that is conditioned on them; None for images. Its U-Net
            has that many input channels behind the latents', or an image's and one.
        text_encoder: of a model that is conditioned on text, whose U-Net is a `UNet2DConditionModel`; transformers'.
        tokenizer: of the text encoder.
        text_encoder_id: a Hub id or folder, from which the two are loaded when they are needed and not given.
        max_caption_tokens: prompts are cut there.
    """

    model_cpu_offload_seq = "text_encoder->unet->vqvae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "pred_original_sample"]

    # Union, not |: from_pretrained of diffusers 0.35 reads these annotations, and fails on the newer spelling.
    def __init__(
        self,
        vqvae: Union[VQModel, AutoencoderKL],  # noqa: UP007
        unet: Union[UNet2DModel, UNet2DConditionModel],  # noqa: UP007
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        class_names: Optional[list] = None,  # noqa: UP045
        conditioning_classes: Optional[int] = None,  # noqa: UP045
        text_encoder_id: Optional[str] = None,  # noqa: UP045
        max_caption_tokens: Optional[int] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        self.register_modules(
            vqvae=vqvae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        about = {"class_names": class_names, "conditioning_classes": conditioning_classes}
        about |= {"text_encoder_id": text_encoder_id, "max_caption_tokens": max_caption_tokens}
        self.register_to_config(**{name: value for name, value in about.items() if value is not None})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        **kwargs: Any,
    ) -> "LatentDDPMPipeline":
        """As `DiffusionPipeline.from_pretrained`; a repository that names its own pipeline.py is loaded by this class.

        So nothing that lies in a stranger's repository is run.
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
        with tempfile.TemporaryDirectory() as aside:  # the same folder, whose index names a class and no file
            for entry in os.scandir(folder):
                if entry.is_dir():
                    os.symlink(os.path.abspath(entry.path), os.path.join(aside, entry.name), target_is_directory=True)
            with open(os.path.join(aside, "model_index.json"), "w") as file:
                json.dump({**index, "_class_name": cls.__name__}, file)
            return super().from_pretrained(aside, **kwargs)

    @property
    def num_timesteps(self) -> int:
        """U-Net evaluations of the current or last call; more than its steps for a second-order scheduler."""
        return self._num_timesteps

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by label; numbers where the model has none. Empty without class condition."""
        count = (self.unet.config.num_class_embeds or 1) - 1
        names = self.config.get("class_names")
        return list(names) if names else [str(k) for k in range(count)]

    @property
    def conditioning_channels(self) -> int:
        """Input channels of the U-Net behind the latents'; 0 without conditioning image."""
        return self.unet.config.in_channels - self.unet.config.out_channels

    @property
    def takes_text(self) -> bool:
        """Whether the model is conditioned on text."""
        return self.unet.config.get("cross_attention_dim") is not None

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of texts, and which of their tokens count.

        Returns:
            float (B, T, cross_attention_dim), zero where there is no token, and bool (B, T), on the pipeline's device.

        Raises:
            ValueError: the pipeline has no text encoder and names none.
        """
        if self.text_encoder is None or self.tokenizer is None:
            name = self.config.get("text_encoder_id")
            if name is None:
                raise ValueError("prompt: this pipeline has no text encoder; give prompt_embeds")
            import transformers

            kind = ENCODER_CLASSES.get(transformers.AutoConfig.from_pretrained(name).model_type, "AutoModel")
            encoder = getattr(transformers, kind).from_pretrained(name).eval().requires_grad_(False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.register_modules(text_encoder=encoder.to(self._execution_device), tokenizer=tokenizer)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.get("max_caption_tokens"), return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self._execution_device) for name in ("input_ids", "attention_mask"))
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask.unsqueeze(-1), mask.bool()

    @property
    def interrupt(self) -> bool:
        """A callback sets `pipe._interrupt = True` to skip the steps that remain; the images are still decoded."""
        return self._interrupt

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images to model-space latents; of an `AutoencoderKL`, the mode of the posterior.

        Args:
            images: float (B, C, H, W) in [-1, 1], on any device, of any float dtype.

        Returns:
            (B, latent_channels, h, w) in the dtype of the U-Net, about unit variance, before any quantization.
        """
        images = images.to(self._execution_device, self.vqvae.dtype)
        encoded = self.vqvae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents * self.vqvae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Model-space latents to images; a `VQModel` quantizes them on the way.

        Args:
            latents: (B, latent_channels, h, w), on any device, of any float dtype.

        Returns:
            (B, C, H, W), clamped to [-1, 1], in the dtype of the autoencoder.
        """
        latents = latents.to(self._execution_device, self.vqvae.dtype)
        return self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample.clamp(-1, 1)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentDDPMPipeline", int, Any, dict], dict] | None = None,
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
    ) -> ImagePipelineOutput | tuple:
        """Draws images; with `image`, variations of it (SDEdit, arXiv 2108.01073); with `mask_image`, fills holes.

        Inpainting works on the unconditional U-Net: before each of its evaluations the latents outside of the mask
        are replaced by the image's own at the same noise level (arXiv 2201.09865, equation 8, without resampling),
        all with one noise, that of the start; after the last step by the clean ones. In the images returned, the
        pixels outside of the mask are the input's own, not decoded ones.

        Args:
            batch_size: how many images; 1 becomes the number of class labels or conditioning images.
            num_inference_steps: denoising steps, at least 1.
            eta: 0 is deterministic DDIM, 1 is as noisy as DDPM (arXiv 2010.02502, equation 16). Schedulers
                without an `eta` ignore it.
            generator: of the starting noise and, where the scheduler draws any, of the noise in between. A list
                holds one per image; image i then depends on generator i alone, whatever the batch around it.
            latents: standard normal starting noise (batch_size, out_channels, sample_size, sample_size) in place
                of a draw; it is scaled here by the scheduler's `init_noise_sigma`, or added to `image`.
            output_type: "pil": list of PIL images, grayscale (mode L) for one channel; "np": float32
                (B, H, W, C) in [0, 1]; "pt": float32 (B, C, H, W) in [0, 1] on the pipeline's device; "latent":
                the final model-space latents, in the dtype of the U-Net.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: called after each step as `callback(pipe, step, t, {"latents": latents})`; the
                dict it returns may hold "latents" to go on with. A diffusers `PipelineCallback` also works.
            callback_on_step_end_tensor_inputs: what the callback is given: "latents" as the scheduler holds them
                after the step, "pred_original_sample", the clean latents that the U-Net saw in those before it, in
                model space.
            image: one image for all or one per image drawn: PIL images, or float (B, C, H, W) in [0, 1], or what
                else `VaeImageProcessor` takes. Resized, without regard to its proportions, to the model's size.
            strength: in (0, 1], the share of the steps that are made, at least one: `image` is noised to where
                they begin. All steps begin with pure noise, as without `image`. By default 0.8, and 1 with
                `mask_image`.
            mask_image: one for all or one per image drawn, in the forms of `image` with one channel, resized
                likewise; white (at least 0.5) is painted anew. A latent with any such pixel is.
            class_labels: of a model with classes: a number or name for all, or one per image; int64 (B,). None, or -1,
                is no class.
            conditioning_image: of a model with conditioning images: one for all or one per image, resized to the
                model's size. Semantic maps: integers (B, H, W), or PIL images of one channel that hold the classes'
                numbers. Images: as `image`. Or what the U-Net sees, float (B, conditioning_channels, h, w). None is no
                conditioning image.
            guidance_scale: how far beyond the prediction without conditions to go (arXiv 2207.12598): 1 is the
                prediction with them, 0 that without. A dict has a scale for each of `class_labels`,
                `conditioning_image` and `prompt`, 1 where it has none. Needs a model whose conditions were left out at
                times.
            guidance_interval: (lowest, highest) noise level sigma, of latents of unit variance, within which there is
                guidance (arXiv 2404.07724); elsewhere its scale is 1.
            guidance_unet: a weaker model of the same kind, in the place of the prediction without conditions
                (autoguidance, arXiv 2406.02507); `guidance_scale` is then one number.
            prompt: of a model with text: one for all or one per image. None is no text.
            prompt_embeds: in its place, what `encode_prompt` returns first, (1 or B, T, W).
            prompt_attention_mask: and second, bool (1 or B, T); None takes all tokens.
            negative_prompt: what stands for no text; what the model has learned as such is the empty one.
            negative_prompt_embeds: in its place, as prompt_embeds, (1, T, W).
            negative_prompt_attention_mask: as prompt_attention_mask.

        Returns:
            `ImagePipelineOutput` whose `images` is as `output_type` says, or a tuple.

        Raises:
            ValueError: a bad batch_size, num_inference_steps, output_type, shape of latents, number of
                generators, images or masks, strength or callback input, a strength or mask without an image, a
                scheduler that can not begin midway or does not tell its noise level; the message names it.
        """
        # A diffusers PipelineCallback says itself which tensors it wants.
        callback_on_step_end_tensor_inputs = getattr(
            callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs
        )
        labels = self._read_class_labels(class_labels)
        given = {} if labels is None else {"class_labels": labels}
        maps = self._read_conditioning_image(conditioning_image)
        given |= {} if maps is None else {"conditioning_image": maps}
        scales = self._read_guidance(guidance_scale, guidance_unet)
        if self.takes_text:
            text = self._pack_prompt(prompt, prompt_embeds, prompt_attention_mask)
            given |= {} if text is None else {"prompt": text}
            needed = text is None or (guidance_unet is None and any(scale != 1 for scale in scales.values()))
            nothing = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
            if negative_prompt_embeds is not None:
                nothing = (None, *nothing[1:])
            self._no_text = self._pack_prompt(*nothing) if needed else None
        elif prompt is not None or prompt_embeds is not None:
            raise ValueError("prompt: this model takes no text")
        batch_size = self._spread(given, batch_size)
        shape = self._latents_shape(batch_size)
        self._check_inputs(
            batch_size,
            num_inference_steps,
            generator,
            latents,
            shape,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if image is None and (strength is not None or mask_image is not None):
            raise ValueError("strength and mask_image need an image")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if strength is None:
            strength = 0.8 if mask_image is None else 1.0
        original = repaint = None
        if image is not None:
            original = self._prepare_image(image, batch_size)  # (1 or B, C, H, W) in [0, 1]
        if mask_image is not None:
            repaint = self._prepare_mask(mask_image, batch_size)  # (1 or B, 1, H, W), bool
        self._interrupt = False
        device, dtype = self._execution_device, self.unet.dtype
        given = {name: value.to(device) for name, value in given.items()}

        # ------------------------------------------------------------------------------ starting noise

        # Some schedulers' init_noise_sigma depends on the timesteps, so those are set first.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        steps = num_inference_steps if image is None else max(1, round(num_inference_steps * strength))
        timesteps = skip_steps(self.scheduler, num_inference_steps - steps)
        noise = latents
        if noise is None:
            # In float32 as LDMPipeline draws it, so that a half-precision pipeline starts from the same noise.
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        noise = noise.to(device)
        # Flow matching schedulers have no init_noise_sigma: they start from the noise as it is.
        latents = (noise * getattr(self.scheduler, "init_noise_sigma", 1.0)).to(dtype)
        if original is not None:
            clean = self.encode(original * 2 - 1)
            if steps < num_inference_steps:
                latents = self._noised(clean, noise, timesteps[0])
            if repaint is not None:
                repaint_latents = torch.nn.functional.adaptive_max_pool2d(repaint.float(), shape[2:]).bool().to(device)
                latents = torch.where(repaint_latents, latents, self._noised(clean, noise, timesteps[0]))

        # ------------------------------------------------------------------------------ denoising

        step_arguments = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in step_arguments}
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)
        order = getattr(self.scheduler, "order", 1)
        warmup = len(timesteps) - steps * order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                inputs = {}
                inside = scales
                if guidance_interval is not None:
                    keep, spread = noise_level(self.scheduler, t)
                    lowest, highest = guidance_interval
                    inside = scales if lowest * keep <= spread <= highest * keep else dict.fromkeys(scales, 1.0)
                prediction = self._predict(scale_model_input(latents, t), t, given, inside, guidance_unet)
                if "pred_original_sample" in callback_on_step_end_tensor_inputs:
                    inputs["pred_original_sample"] = predict_original(latents, prediction, self.scheduler, t).to(dtype)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False, **extra)[0].to(dtype)
                if repaint is not None:
                    last = i == len(timesteps) - 1
                    known = clean if last else self._noised(clean, noise, timesteps[i + 1])
                    latents = torch.where(repaint_latents, latents, known)

                if callback_on_step_end is not None:
                    inputs["latents"] = latents
                    outputs = callback_on_step_end(
                        self, i, t, {name: inputs[name] for name in callback_on_step_end_tensor_inputs}
                    )
                    latents = outputs.pop("latents", latents)

                if i == len(timesteps) - 1 or (i + 1 > warmup and (i + 1) % order == 0):
                    progress_bar.update()

        # ------------------------------------------------------------------------------ images

        images = latents
        if output_type != "latent":
            images = (self.decode(latents) / 2 + 0.5).float()  # (B, C, H, W) in [0, 1]
            if repaint is not None:
                images = torch.where(repaint.to(images.device), images, original.to(images))
            if output_type in ("np", "pil"):
                images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)

        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        given: dict[str, torch.Tensor],
        scales: dict[str, float],
        guidance_unet: UNet2DModel | UNet2DConditionModel | None,
    ) -> torch.Tensor:
        """The U-Net's prediction (B, C, h, w), guided; arguments as of `__call__`, with a scale for each condition."""
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
        # all in one batch: the model with the first k conditions, for each k that counts
        merged = {
            name: self._join([given[name] if place < k else self._nothing(name, given[name]) for k, _ in asked])
            for place, name in enumerate(named)
        }
        predictions = self._ask(self.unet, torch.cat([latents] * len(asked)), t, merged).chunk(len(asked))
        return sum(weight * prediction for (_, weight), prediction in zip(asked, predictions, strict=True))

    @staticmethod
    def _join(values: list[torch.Tensor]) -> torch.Tensor:
        """One batch of several; texts, (B, T, W + 1), of different lengths are padded with tokens that do not count."""
        if values[0].ndim == 3:
            longest = max(value.shape[1] for value in values)
            values = [torch.nn.functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in values]
        return torch.cat(values)

    def _nothing(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """What stands for no condition of that name, in the shape and dtype of `like`."""
        if name == "class_labels":
            return torch.full_like(like, self.unet.config.num_class_embeds - 1)
        if name == "prompt":
            empty = self._no_text.to(like)  # as long as it is; `_predict` brings all to one length
            return empty.expand(len(like), -1, -1)
        return torch.zeros_like(like)

    def _ask(
        self,
        unet: UNet2DModel | UNet2DConditionModel,
        latents: torch.Tensor,
        t: torch.Tensor,
        given: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """A U-Net's prediction (B, C, h, w) with what is `given`, and nothing in the place of what is not."""
        words = {}
        if unet.config.num_class_embeds is not None:
            nobody = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
            words["class_labels"] = given.get("class_labels", self._nothing("class_labels", nobody))
        if self.takes_text:
            text = given["prompt"] if "prompt" in given else self._nothing("prompt", latents)
            words["encoder_hidden_states"] = text[..., :-1].to(latents.dtype)
            words["encoder_attention_mask"] = text[..., -1] > 0.5
        if self.conditioning_channels:
            empty = latents.new_zeros(len(latents), self.conditioning_channels, *latents.shape[2:])
            latents = torch.cat((latents, given.get("conditioning_image", empty).to(latents.dtype)), dim=1)
        return unet(latents, t, **words).sample

    def _read_class_labels(self, labels: Any) -> torch.Tensor | None:
        """Labels int64 (1 or B,) from numbers and names."""
        if labels is None:
            return None
        names = self.class_names
        if not names:
            raise ValueError("class_labels: this model knows no classes")
        if isinstance(labels, torch.Tensor):
            labels = labels.flatten().tolist()
        numbers = []
        for label in [labels] if isinstance(labels, (int, str)) else labels:
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
        """Input channels (1 or B, K, h, w) from images or semantic maps."""
        if image is None:
            return None
        if not self.conditioning_channels:
            raise ValueError("conditioning_image: this model takes none")
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
        factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1)
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
        """Integers (1 or B, H, W)."""
        if isinstance(image, torch.Tensor):
            maps = image[None] if image.ndim == 2 else image
        else:
            images = [
                torch.from_numpy(np.array(one)) for one in (image if isinstance(image, (list, tuple)) else [image])
            ]
            if any(one.ndim != 2 for one in images):
                raise ValueError("conditioning_image: a semantic map has one channel, which holds the classes' numbers")
            maps = torch.stack([one.long() for one in images])
        if maps.ndim != 3 or maps.is_floating_point():
            raise ValueError(
                f"conditioning_image: semantic maps are integers (B, H, W), got {maps.dtype} {tuple(maps.shape)}"
            )
        return maps.long()

    def _pack_prompt(
        self, prompt: str | Sequence[str] | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Embeddings and, as one channel more, their mask: (1 or B, T, W + 1); None without text."""
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
        """Repeats what is given once for all, in place; the batch size that results."""
        for name, value in given.items():
            if batch_size == 1 and len(value) > 1:
                batch_size = len(value)
            if len(value) not in (1, batch_size):
                raise ValueError(f"{name}: got {len(value)} for {batch_size} images; one for all, or one each")
        for name, value in given.items():
            given[name] = value.expand(batch_size, *value.shape[1:])
        return batch_size

    def _read_guidance(self, scale: float | dict[str, float], guidance_unet: Any) -> dict[str, float]:
        if isinstance(scale, dict):
            unknown = [name for name in scale if name not in CONDITIONS]
            if unknown or guidance_unet is not None:
                what = f"{', '.join(unknown)}" if unknown else "a dict with guidance_unet"
                raise ValueError(f"guidance_scale is a number, or a dict of {', '.join(CONDITIONS)}; got {what}")
            return {name: float(scale.get(name, 1.0)) for name in CONDITIONS}
        return dict.fromkeys(CONDITIONS, float(scale))

    def _noised(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w): the model-space latents `clean` at the noise level of the scheduler's next step, at `t`."""
        keep, spread = noise_level(self.scheduler, t)
        return (keep * clean.float() + spread * noise.float()).to(clean.dtype)

    def _prepare_image(self, image: PipelineImageInput, batch_size: int) -> torch.Tensor:
        """Float32 (1 or B, C, H, W) in [0, 1], of the size and channels of the autoencoder's images."""
        channels = self.vqvae.config.in_channels
        return self._preprocess(
            "image", image, batch_size, channels, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
        )

    def _prepare_mask(self, mask: PipelineImageInput, batch_size: int) -> torch.Tensor:
        """Bool (1 or B, 1, H, W): which pixels to paint anew."""
        return self._preprocess("mask_image", mask, batch_size, 1, do_convert_grayscale=True) >= 0.5

    def _preprocess(
        self, name: str, image: PipelineImageInput, batch_size: int | None, channels: int, **options: bool
    ) -> torch.Tensor:
        factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1)
        height, width = (side * factor for side in self._latents_shape(1)[2:])
        # Not normalized: a trip through [-1, 1] could round the pixels that inpainting keeps.
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
            raise ValueError("unet.config.sample_size is not set, so the size of the latents is unknown")
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
            raise ValueError(f"generator is a list of {len(generator)} for batch_size {batch_size}: one per image")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
