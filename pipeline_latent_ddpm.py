"""Unconditional latent diffusion: a U-Net denoises latents, an autoencoder turns them into images.

This one file is also uploaded beside the weights as `pipeline.py`, so it needs nothing but diffusers:

    DiffusionPipeline.from_pretrained(repo)                                               # stock LDMPipeline
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)  # this class

Both load the same three components and draw the same images from the same generator. This class adds what
later diffusers pipelines have: any scheduler, given latents, one generator per image, half precision,
callbacks, CPU offload, and `encode` / `decode`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Union

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentDDPMPipeline(DiffusionPipeline):
    """Samples images from a diffusion model trained on the latents of an autoencoder.

    Latent diffusion: Rombach et al., arXiv 2112.10752. Throughout, *model-space* latents are those the U-Net
    sees, of about unit variance: the autoencoder's latents times `vqvae.config.scaling_factor`.

    Args:
        vqvae: `VQModel` or `AutoencoderKL`.
        unet: `UNet2DModel`; predicts what `scheduler.config.prediction_type` says, or a flow's velocity.
        scheduler: any diffusers scheduler that works on such a prediction.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    # Union, not |: from_pretrained of diffusers 0.35 reads these annotations, and fails on the newer spelling.
    def __init__(
        self,
        vqvae: Union[VQModel, AutoencoderKL],  # noqa: UP007
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        """U-Net evaluations of the current or last call; more than its steps for a second-order scheduler."""
        return self._num_timesteps

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
        num_inference_steps: int = 25,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentDDPMPipeline", int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws images.

        Args:
            batch_size: how many images.
            num_inference_steps: denoising steps, at least 1.
            eta: 0 is deterministic DDIM, 1 is as noisy as DDPM (arXiv 2010.02502, equation 16). Schedulers
                without an `eta` ignore it.
            generator: of the starting noise and, where the scheduler draws any, of the noise in between. A list
                holds one per image; image i then depends on generator i alone, whatever the batch around it.
            latents: standard normal starting noise (batch_size, in_channels, sample_size, sample_size) in place
                of a draw; it is scaled here by the scheduler's `init_noise_sigma`.
            output_type: "pil": list of PIL images, grayscale (mode L) for one channel; "np": float32
                (B, H, W, C) in [0, 1]; "pt": float32 (B, C, H, W) in [0, 1] on the pipeline's device; "latent":
                the final model-space latents, in the dtype of the U-Net.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: called after each step as `callback(pipe, step, t, {"latents": latents})`; the
                dict it returns may hold "latents" to go on with. A diffusers `PipelineCallback` also works.
            callback_on_step_end_tensor_inputs: what the callback is given, among `_callback_tensor_inputs`.

        Returns:
            `ImagePipelineOutput` whose `images` is as `output_type` says, or a tuple.

        Raises:
            ValueError: a bad batch_size, num_inference_steps, output_type, shape of latents, number of
                generators or callback input; the message names it.
        """
        # A diffusers PipelineCallback says itself which tensors it wants.
        callback_on_step_end_tensor_inputs = getattr(
            callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs
        )
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
        self._interrupt = False
        device, dtype = self._execution_device, self.unet.dtype

        # ------------------------------------------------------------------------------ starting noise

        # Some schedulers' init_noise_sigma depends on the timesteps, so those are set first.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        if latents is None:
            # In float32 as LDMPipeline draws it, so that a half-precision pipeline starts from the same noise.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # Flow matching schedulers have no init_noise_sigma: they start from the noise as it is.
        latents = (latents.to(device) * getattr(self.scheduler, "init_noise_sigma", 1.0)).to(dtype)

        # ------------------------------------------------------------------------------ denoising

        step_arguments = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in step_arguments}
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)
        order = getattr(self.scheduler, "order", 1)
        warmup = len(timesteps) - num_inference_steps * order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self.unet(scale_model_input(latents, t), t).sample  # (B, C, h, w)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False, **extra)[0].to(dtype)

                if callback_on_step_end is not None:
                    inputs = {"latents": latents}
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
            if output_type in ("np", "pil"):
                images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)

        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size is not set, so the size of the latents is unknown")
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, self.unet.config.in_channels, height, width)

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
