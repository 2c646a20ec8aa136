"""How fast a device computes: precision, determinism, memory layout and torch.compile."""

import contextlib
import copy
import importlib
import os
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from latent_ddpm.config import Config, RunConfig
from latent_ddpm.errors import UserError

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
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Whether Python can read the tensor without waiting for a device to finish its work."""
    return tensor.device.type == "cpu"


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
            network.compile(mode=None if config.torch_compile == "default" else config.torch_compile, dynamic=False)


def next_iteration(config: RunConfig) -> None:
    """Tell the CUDA graphs of torch.compile that the tensors of the step before are no longer needed."""
    if config.torch_compile in ("reduce-overhead", "max-autotune"):
        torch.compiler.cudagraph_mark_step_begin()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled networks without their compiled code, for rare calls with other shapes or other modes."""
    with torch.compiler.set_stance("force_eager"):
        yield
