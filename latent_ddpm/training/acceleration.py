"""How fast a device computes: precision, determinism, memory layout and torch.compile."""

import contextlib
import copy
import functools
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from latent_ddpm.config import Config, RunConfig
from latent_ddpm.errors import UserError

# Another backend of torch.compile, aot_eager, captures the same graphs but compiles nothing: for tests.
BACKEND = os.environ.get("LATENT_DDPM_COMPILE_BACKEND", "inductor")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def set_arithmetic(deterministic: bool) -> None:
    """Choose the algorithms of this process.

    Float32 products on a GPU use TF32. With `deterministic`, the same step gives the same bits on the same machine;
    without, cuDNN measures its algorithms and takes the fastest, which may be another one in the next process.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # convolutions use TF32 by default
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Otherwise deterministic algorithms also fill every new tensor with NaN, one more pass over its memory.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic
    # cuDNN's attention has no deterministic gradient in some versions. Flash attention has one, see `strict`.
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def strict(config: RunConfig) -> Iterator[None]:
    """Make every operation deterministic or an error, if the config asks for determinism; for a backward pass.

    torch's attention takes its deterministic gradient only then. `warn_only`, which is set elsewhere for the operations
    that have none, would give the fast one.
    """
    if not config.deterministic:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def take_compile_request(config: Config) -> None:
    """Turn `accelerate launch --dynamo_backend inductor` into the key torch_compile, in place.

    accelerate would compile stage 1 as a whole, and again in every phase of its training. Other backends, which serve
    to find errors, are left to accelerate.

    Raises:
        UserError: the launcher asks for a mode that torch_compile does not have.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "inductor":
        return
    del os.environ["ACCELERATE_DYNAMO_BACKEND"]
    mode = os.environ.pop("ACCELERATE_DYNAMO_MODE", "default")
    if mode not in COMPILE_MODES:
        raise UserError(f"dynamo_mode {mode} of accelerate launch is not supported; use one of {COMPILE_MODES}.")
    if config.torch_compile == "off":
        config.torch_compile = mode
        config.validate()


def check_compiler(config: RunConfig) -> None:
    """Raises `UserError` if torch_compile lacks what it needs on this machine."""
    if config.torch_compile == "off" or BACKEND != "inductor":
        return
    on_gpu, off = torch.cuda.is_available(), "or set torch_compile off."
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise UserError(f"torch_compile needs the package triton on a GPU. Install it, {off}")
    variable, usual = ("CC", ("gcc", "clang", "cc")) if on_gpu else ("CXX", ("g++", "clang++", "c++", "cl"))
    if not any(shutil.which(name) for name in (os.environ.get(variable, ""), *usual) if name):
        language = "C" if on_gpu else "C++"
        raise UserError(f"torch_compile needs a {language} compiler ({usual[0]}). Install one, {off}")


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Whether Python can read the tensor without waiting for a device to finish its work."""
    return tensor.device.type == "cpu"


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in page-locked memory if `device` is a GPU: a copy from there to it does not make Python wait."""
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # in a new thread, the first GPU would be the current one
        return tensor.pin_memory()


@contextlib.contextmanager
def in_any_order() -> Iterator[None]:
    """Allow a GPU to do sums in any order: for integers, whose sum does not depend on it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def is_channels_last(config: RunConfig, device: torch.device) -> bool:
    """Whether the run's networks store the channels innermost."""
    return device.type == "cuda" if config.channels_last is None else config.channels_last


def set_layout(network: nn.Module, config: RunConfig, device: torch.device) -> nn.Module:
    """The network with its convolutions in the layout that the config asks for, in place."""
    if is_channels_last(config, device):
        network.to(memory_format=torch.channels_last)
    return network


def align_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments of an optimizer, which may come from a checkpoint, the memory layout of their parameters.

    Fused AdamW needs equal layouts. Checkpoints hold contiguous tensors.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if is_moment and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


def contiguous(network: nn.Module) -> nn.Module:
    """The network, or a copy of it if weights are not contiguous, which safetensors requires."""
    if all(weight.is_contiguous() for weight in network.state_dict().values()):
        return network
    return copy.deepcopy(network).to(memory_format=torch.contiguous_format)


def double_pixels(x: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour doubling, (B, C, H, W) -> (B, C, 2H, 2W), as an expansion in the layout channels last.

    torch.compile turns `interpolate` into an indexing, whose deterministic gradient took a quarter of a step on a GPU.
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (B, H, 1, W, 1, C)
    doubled = rows.expand(batch, height, 2, width, 2, channels)
    return doubled.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def group_norm(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Group normalization (arXiv 1803.08494) of (B, C, ...) in float32, by the moments of single channels.

    Equal to torch's own up to rounding. In a compiled network, torch's own has two costs. It leaves the layout channels
    last, so that activations are converted at every convolution. And the few channels of a group are a poor access
    pattern. Here every pass over the activations reads whole pixels. The moments of a group follow from those of its
    channels: its variance is the mean of their variances plus the variance of their means.
    """
    x = x.float()
    variance, mean = torch.var_mean(x, tuple(range(2, x.ndim)), correction=0)  # (B, C)
    variance, mean = (moment.unflatten(1, (norm.num_groups, -1)) for moment in (variance, mean))  # (B, G, C/G)
    group_variance, group_mean = torch.var_mean(mean, 2, correction=0, keepdim=True)
    group_variance = group_variance + variance.mean(2, keepdim=True)
    scale = (group_variance + norm.eps).rsqrt().expand_as(mean).flatten(1)  # (B, C)
    shift = group_mean.expand_as(mean).flatten(1)
    if norm.weight is None:
        shift = -shift * scale
    else:
        scale = scale * norm.weight
        shift = norm.bias - shift * scale
    per_channel = (*scale.shape,) + (1,) * (x.ndim - 2)
    return x * scale.view(per_channel) + shift.view(per_channel)


def _doubling(upsampler: nn.Module, x: torch.Tensor, output_size: object = None, **words: object) -> torch.Tensor:
    """The forward pass of diffusers' Upsample2D with `double_pixels`."""
    doubled = double_pixels(x) if output_size is None else F.interpolate(x, size=output_size, mode="nearest")
    return upsampler.conv(doubled)


def _pointwise(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a 1x1 convolution whose input diffusers has made contiguous."""
    if convolution.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, convolution.weight, convolution.bias)


def prepare_for_compiler(network: nn.Module) -> None:
    """Replace forward passes that torch.compile translates badly by equal ones, in place; parameters stay."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    def keep_layout(convolution: nn.Module | None) -> None:
        if isinstance(convolution, nn.Conv2d):
            convolution.forward = functools.partial(_pointwise, convolution)

    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.forward = functools.partial(group_norm, module)
        elif type(module) is Upsample2D and module.use_conv and not module.use_conv_transpose and module.norm is None:
            module.forward = functools.partial(_doubling, module)
        elif type(module) is ResnetBlock2D:
            keep_layout(module.conv_shortcut)
        elif type(module) is Transformer2DModel:
            keep_layout(module.proj_out)


def compile_networks(networks: Iterable[nn.Module | None], config: RunConfig) -> None:
    """Compile the forward passes of networks in place, if the config asks for it; None is skipped.

    In place means that parameters keep their names, so checkpoints, averages and exports do not know of it. Shapes are
    static: a training loop has few of them.
    """
    if config.torch_compile == "off":
        return
    # These modules are imported by the first compilation anyway. In a debug build a missing option would be an error.
    options = importlib.import_module("torch._inductor.config")
    if hasattr(options, "deterministic"):  # otherwise kernels are chosen by their time, also in mode `default`
        options.deterministic = config.deterministic
    for network in networks:
        if network is not None:
            prepare_for_compiler(network)
            if BACKEND == "inductor":
                network.compile(mode=None if config.torch_compile == "default" else config.torch_compile, dynamic=False)
            else:
                network.compile(backend=BACKEND, dynamic=False)


def next_iteration(config: RunConfig) -> None:
    """Tell the CUDA graphs of torch.compile that the tensors of the step before are no longer needed."""
    if config.torch_compile in ("reduce-overhead", "max-autotune"):
        torch.compiler.cudagraph_mark_step_begin()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled networks without their compiled code, for rare calls with other shapes or other modes."""
    with torch.compiler.set_stance("force_eager"):
        yield
