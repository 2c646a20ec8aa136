"""Count memory and FLOPs of both stages from their configs, without a GPU and without computing anything.

The networks are built as fake CUDA tensors, which have shapes and types but no values, and run forward under bf16
autocast. Counted are the tensors that autograd saves for the backward pass, and the floating-point operations. The
backward pass counts as twice the forward pass. `count_autoencoder` and `count_unet` return:

- `fixed_bytes`: weights and their bf16 copies, gradients, optimizer moments, averages, frozen networks.
- `bytes_per_image`: saved tensors, and what the backward pass holds beside them.
- `largest_batch`: images per micro-batch that leave `FREE_SHARE` of a card free. The CUDA context, cuDNN's workspaces
  and fragmentation have to fit there.
- `drawing_bytes`: what drawing the grid of a validation needs beside the weights, moments and averages.
- `flops_per_image`: of a training step, and of its forward pass alone.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from latent_ddpm.autoencoder.discriminator import PatchDiscriminator
from latent_ddpm.autoencoder.losses import reconstruction_loss
from latent_ddpm.autoencoder.stock import check_autoencoder_fits, new_like
from latent_ddpm.autoencoder.vqvae import Autoencoder, ResnetBlock
from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.training.optim import make_optimizer, orthogonalize
from pipeline_latent_ddpm import decode_latents, encode_images, image_channels_of, latent_channels_of

GIB = 2**30
CARDS_GIB = (24, 48, 80)
FREE_SHARE = 0.1
BACKWARD_TENSORS = 3  # the gradients at input and output of a layer, and its result in another type
GRID_IMAGES = 32  # of stage 1's grid
TEXT_WIDTH = 768  # of a token; it hardly matters


# --------------------------------------------------------------------------------------------- fake CUDA tensors


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Attention with the kernel that PyTorch takes on a GPU; without one it would take another and save more."""
    half = (x.to(torch.bfloat16) for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(*half)[0]


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """New tensors are fake ones on a GPU."""
    with (
        FakeTensorMode(),
        torch.device("cuda"),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash),
        mock.patch("latent_ddpm.random.has_triton", lambda: False),  # a kernel needs a real GPU
    ):
        yield


@contextlib.contextmanager
def autocast(config: RunConfig) -> Iterator[None]:
    """torch.autocast("cuda", torch.bfloat16), which refuses to work without a GPU; nothing for mixed_precision no."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", config.mixed_precision != "no")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


# ---------------------------------------------------------------------------------------------------- counting


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def parameters_of(*networks: nn.Module | None) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [t for network in networks if network is not None for t in (*network.parameters(), *network.buffers())]


def saved_for_backward(forward: Callable[[], Any], weights: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """The tensors that a forward pass saves for the backward pass, without the weights, and its FLOPs."""
    known, saved = {weight.untyped_storage()._cdata for weight in weights}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FlopCounterMode(display=False) as flops:
        forward()
    return saved, flops.get_total_flops()


class PeakBytes(TorchDispatchMode):
    """The largest sum of the storages that were alive at once, of those made inside this context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def drawing_bytes(draw: Callable[[], Any]) -> int:
    """The most bytes that a pass without gradients needs beside the weights."""
    with torch.no_grad(), PeakBytes() as counter:
        draw()
    return counter.peak


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the moments, and of the tensors that a step makes and frees.

    AdamW has two moments. Muon has one for each matrix; a step holds their updates, those of one shape stacked, and the
    results.
    """
    if len(optimizer.param_groups) == 1:
        return 2 * bytes_of(optimizer.param_groups[0]["params"]), 0
    matrices, others = (bytes_of(group["params"]) for group in optimizer.param_groups)
    return matrices + 2 * others, 3 * matrices


def largest_batch(fixed: int, per_image: int, transient: int, card_gib: float) -> int:
    """Images per micro-batch that fit; 0 if none do."""
    room = (1 - FREE_SHARE) * card_gib * GIB - fixed
    return 0 if room < transient else max(0, int(room // per_image))


def orthogonalization_flops(optimizer: torch.optim.Optimizer) -> int:
    """FLOPs of Muon's matrix products in one step; 0 for AdamW."""
    if len(optimizer.param_groups) == 1:
        return 0
    with FlopCounterMode(display=False) as flops:
        for matrix in optimizer.param_groups[0]["params"]:
            orthogonalize(matrix.detach().flatten(1)[None])
    return flops.get_total_flops()


def _figures(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    bytes_at: dict[int, int],
    other_bytes: int,
    forward_flops: int,
    step_flops: int,
) -> dict[str, Any]:
    """The figures of one stage.

    Args:
        network: what the optimizer trains.
        optimizer: its optimizer.
        bytes_at: bytes of activations for two batch sizes; their difference is that of one image.
        other_bytes: of averages and other networks.
        forward_flops, step_flops: for one image.
    """
    (few, small), (many, large) = sorted(bytes_at.items())
    per_image = (large - small) // (many - few)
    copies = small - few * per_image  # of the weights, in bf16
    moments, transient = optimizer_bytes(optimizer)
    gradients = bytes_of(network.parameters())
    fixed = bytes_of(parameters_of(network)) + gradients + moments + other_bytes + copies
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "parameter_tensors": len(list(network.parameters())),
        "fixed_bytes": fixed,
        "bytes_per_image": per_image,
        "optimizer_step_bytes": transient,
        "moments_bytes": moments,
        "forward_flops_per_image": forward_flops,
        "flops_per_image": step_flops,
        "flops_per_optimizer_step": orthogonalization_flops(optimizer),
        "largest_batch": {f"{gib} GiB": largest_batch(fixed, per_image, transient, gib) for gib in CARDS_GIB},
    }


# ------------------------------------------------------------------------------------------------------ stage 1


def untrained_lpips(net: str) -> nn.Module:
    """LPIPS with the shape of `load_lpips` and random weights."""
    import lpips

    with warnings.catch_warnings():  # lpips uses a deprecated torchvision call
        warnings.filterwarnings("ignore", module="torchvision")
        distance = lpips.LPIPS(net=net, verbose=False, pretrained=False, pnet_rand=True)
    distance.scaling_layer.to("cuda")  # it ignores the default device
    return distance.eval().requires_grad_(False)


def count_autoencoder(config: AutoencoderConfig) -> dict[str, Any]:
    """The figures of stage 1 (see the top of the file), with the discriminator where the config has one."""
    with fake_cuda():
        network = Autoencoder(config)
        network.plain = config.quantizer != "kl"  # the codes' own tensors are small, and depend on values
        lpips = untrained_lpips(config.lpips_net) if config.lpips_weight > 0 else None
        discriminator = None
        if config.disc_weight > 0:
            shape = (config.image_channels, config.disc_channels, config.disc_layers, config.disc_norm)
            discriminator = PatchDiscriminator(*shape)
        optimizer = make_optimizer(network.parameters(), config, config.learning_rate, config.optimizer)
        other_bytes = bytes_of(parameters_of(network)) + bytes_of(parameters_of(lpips, discriminator))
        if discriminator is not None:
            other_bytes += 3 * bytes_of(discriminator.parameters())  # its gradients and two moments
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        steps = {batch: _autoencoder_step(config, network, lpips, discriminator, batch) for batch in (1, 2)}
        bytes_at = {batch: held for batch, (held, _, _) in steps.items()}
        figures = _figures(network, optimizer, bytes_at, other_bytes, *steps[1][1:])
        grid = torch.empty(GRID_IMAGES, config.image_channels, config.resolution, config.resolution)
        judged = 0 if discriminator is None else bytes_of(parameters_of(discriminator))
        drawn = drawing_bytes(lambda: network.eval()(grid))
        return figures | {"drawing_bytes": drawn, "discriminator_bytes": judged}


def _autoencoder_step(
    config: AutoencoderConfig,
    network: Autoencoder,
    lpips: nn.Module | None,
    discriminator: PatchDiscriminator | None,
    batch: int,
) -> tuple[int, int, int]:
    """Bytes at the peak of the step in latent_ddpm/autoencoder/training_step.py, FLOPs of the forward pass, and all."""
    weights = parameters_of(network, lpips, discriminator)
    images = torch.empty(batch, config.image_channels, config.resolution, config.resolution)
    pixels = torch.empty_like(images).requires_grad_()
    numbers = torch.arange(batch)

    def autoencode() -> Any:
        with autocast(config):
            return convert_outputs_to_fp32(network.forward)(images, numbers)  # as accelerate wraps it

    def perceive() -> None:
        with autocast(config):
            loss = reconstruction_loss(pixels, images, config.reconstruction_loss)
            if lpips is not None:
                loss = loss + lpips(pixels, images).mean()

    def judge(shown: torch.Tensor) -> None:
        with autocast(config):
            discriminator(shown)

    activations, forward = saved_for_backward(autoencode, weights)
    losses, of_losses = saved_for_backward(perceive, weights)
    # the losses on pixels come first and are freed before the backward pass through the network
    inside = largest_block(network, autoencode, weights, config) if config.gradient_checkpointing else 0
    beside = [BACKWARD_TENSORS * max(bytes_of([tensor]) for tensor in activations) + inside, bytes_of(losses)]
    passes = 4 if config.gradient_checkpointing else 3
    total = passes * forward + 2 * of_losses  # half of it, the features of the originals, has no backward pass
    if discriminator is not None:
        shown, of_judging = saved_for_backward(lambda: judge(pixels), weights)
        beside.append(bytes_of(shown))
        total += 3 * of_judging  # for the autoencoder
        both = torch.cat((images, pixels.detach()))
        total += 3 * saved_for_backward(lambda: judge(both), weights)[1]  # its own step
    features = batch * config.block_out_channels[0] * config.resolution**2 * 4  # float32, held from the step before
    held = bytes_of([*activations, images, pixels]) + max(beside) + features
    return held, forward // batch, total // batch


# ------------------------------------------------------------------------------------------------------ stage 2


def count_unet(config: UNetConfig, autoencoder: AutoencoderConfig | Path, checkpointing: bool) -> dict[str, Any]:
    """The figures of stage 2 on the latents of `autoencoder`, without conditions.

    Args:
        config: of stage 2.
        autoencoder: config of stage 1, or the folder of a pretrained autoencoder.
        checkpointing: the value of gradient_checkpointing. A step then runs the forward pass twice.
    """
    if isinstance(autoencoder, Path):
        channels, size = latents_of_pretrained(autoencoder, config)[:2]
        with fake_cuda():
            return _count_unet(config, channels, size, new_like(autoencoder), checkpointing)
    channels, size = autoencoder.latent_channels, config.resolution // 2 ** (len(autoencoder.block_out_channels) - 1)
    with fake_cuda():
        return _count_unet(config, channels, size, Autoencoder(autoencoder).eval(), checkpointing)


def latents_of_pretrained(folder: Path, config: UNetConfig) -> tuple[int, int, int]:
    """(D, h, w) of a latent of a pretrained autoencoder, from its config alone.

    Raises:
        UserError: it does not fit the images.
    """
    with torch.device("meta"):
        autoencoder = new_like(folder)
    size = check_autoencoder_fits(autoencoder, config)
    return latent_channels_of(autoencoder), size, size


def count_pretrained(folder: Path, config: UNetConfig) -> dict[str, Any]:
    """Of a pretrained autoencoder the number of parameters, and `encoder_flops` of an image, from its config alone."""
    with fake_cuda():
        autoencoder = new_like(folder)
        image = torch.empty(1, image_channels_of(autoencoder), config.resolution, config.resolution)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            encode_images(autoencoder, image)
        parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    return {"parameters": parameters, "encoder_flops": flops.get_total_flops()}


def count_unet_alone(config: UNetConfig, latent_channels: int, latent_size: int) -> dict[str, Any]:
    """The figures of stage 2 without the frozen autoencoder, on latents (B, latent_channels, latent_size, latent_size).

    Captions are counted. Class labels and conditioning images need next to nothing.
    """
    with fake_cuda():
        return _count_unet(config, latent_channels, latent_size, None, config.gradient_checkpointing)


def _count_unet(
    config: UNetConfig, channels: int, size: int, frozen: nn.Module | None, checkpointing: bool
) -> dict[str, Any]:
    """The figures of stage 2, among fake tensors."""
    width = None if config.text_encoder is None else TEXT_WIDTH
    unet = make_unet(config, channels, size, zero_branches=False, cross_attention_dim=width)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    averages = len(config.ema_sigma_rels) * bytes_of(parameters_of(unet))
    weights, bytes_at, forward = parameters_of(unet), {}, 0

    def predict(batch: int) -> torch.Tensor:
        with autocast(config):
            noisy, timesteps = torch.empty(batch, channels, size, size), torch.zeros(batch, dtype=torch.long)
            text = {"encoder_hidden_states": torch.empty(batch, config.max_caption_tokens, width)} if width else {}
            return unet(noisy, timesteps, **text).sample.float()

    def draw() -> torch.Tensor:
        with autocast(config):
            latents = predict(config.num_validation_samples)
            own = isinstance(frozen, Autoencoder)
            return frozen.decode(latents) if own else decode_latents(frozen, latents)

    for batch in (1, 2):
        inside = largest_block(unet, lambda: predict(batch), weights, config) if checkpointing else 0  # noqa: B023
        with checkpointed(unet) if checkpointing else contextlib.nullcontext():
            saved, flops = saved_for_backward(lambda: predict(batch).square(), weights)  # noqa: B023
        beside = BACKWARD_TENSORS * max(bytes_of([tensor]) for tensor in saved)
        batch_bytes = 4 * batch * 4 * channels * size**2  # latents, noise, noisy latents and target, float32
        bytes_at[batch] = bytes_of(saved) + inside + beside + batch_bytes
        forward = flops // batch
    step_flops = (4 if checkpointing else 3) * forward
    figures = _figures(unet, optimizer, bytes_at, averages + bytes_of(parameters_of(frozen)), forward, step_flops)
    return figures if frozen is None else figures | {"drawing_bytes": drawing_bytes(draw)}


@contextlib.contextmanager
def checkpointed(unet: nn.Module) -> Iterator[None]:
    """gradient_checkpointing: true."""
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


def largest_block(
    network: nn.Module, forward: Callable[[], Any], weights: list[torch.Tensor], config: RunConfig
) -> int:
    """The most bytes that one residual block saves, which checkpointing makes again in the backward pass."""
    inputs: dict[nn.Module, tuple] = {}
    blocks = [module for module in network.modules() if isinstance(module, (ResnetBlock2D, ResnetBlock))]
    hooks = [block.register_forward_pre_hook(lambda block, args: inputs.update({block: args})) for block in blocks]
    forward()
    for hook in hooks:
        hook.remove()

    def again(block: nn.Module) -> None:
        with autocast(config):
            block(*inputs[block])

    return max(bytes_of(saved_for_backward(lambda: again(block), weights)[0]) for block in blocks)  # noqa: B023
