"""Weights, gradients, moments and averages cut over the processes: FSDP2 (arXiv 2304.11277), ZeRO (arXiv 1910.02054).

`accelerate launch` says whether (configs/accelerate/fsdp2.yaml and zero2.yaml). The cutting is done here and not by
accelerate's prepare, which would lose the moments of a run that is resumed and leave the averages whole. What leaves
the processes (checkpoints, snapshots, exports) is whole, so that a run can go on with or without sharding.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel

    StockUNet = UNet2DModel | UNet2DConditionModel

from latent_ddpm.errors import UserError


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


@dataclass(frozen=True)
class Sharding:
    """How a network is cut.

    Attributes:
        reshard_after_forward: whether a block's weights are cut again after its forward pass and gathered once more for
            the backward pass (ZeRO-3); else they stay whole between the two (ZeRO-2).
    """

    reshard_after_forward: bool

    @classmethod
    def take_request(cls) -> "Sharding | None":
        """What `accelerate launch` was asked for; None where weights stay whole, or it has been taken already.

        The request is removed from the environment: accelerate would cut the network too.

        Raises:
            UserError: it was FSDP's first version, its offloading, or DeepSpeed.
        """
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            raise UserError(
                "DeepSpeed keeps its state in pickles, so it is not used here. configs/accelerate/zero2.yaml cuts the "
                "same things over the processes as its stage 2, fsdp2.yaml as its stage 3."
            )
        if not _is_set("ACCELERATE_USE_FSDP"):
            return None
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_config: fsdp_version must be 2 (configs/accelerate/fsdp2.yaml).")
        if _is_set("FSDP_OFFLOAD_PARAMS"):
            raise UserError("fsdp_config: fsdp_offload_params is not supported; set it to false.")
        del os.environ["ACCELERATE_USE_FSDP"]
        return cls(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")

    def cut(self, unet: "StockUNet") -> None:
        """Cut the U-Net's weights over all processes, in place, a block at a time; it is on its device."""
        from torch.distributed.fsdp import fully_shard

        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
            if block is not None:
                fully_shard(block, reshard_after_forward=self.reshard_after_forward)


def prepare(
    accelerator: Accelerator, unet: "StockUNet", optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """`accelerator.prepare`; without DistributedDataParallel where the weights are cut."""
    if not _is_cut(unet):
        return accelerator.prepare(unet, optimizer)
    # as for evaluation: mixed precision and torch.compile, but nothing that would meet the other processes
    return accelerator.prepare_model(unet, evaluation_mode=True), accelerator.prepare(optimizer)


def _is_cut(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which every process has a part, or all; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as `like` of the same shape is; the tensor itself if that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    mesh, rank = like.device_mesh, like.device_mesh.get_local_rank()
    pieces = tensor.to(like.device).chunk(mesh.size())  # as fully_shard cuts; the last processes may go empty
    piece = pieces[rank] if rank < len(pieces) else tensor[:0].to(like.device)
    return DTensor.from_local(piece, mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def gather(state: Any, keep: bool) -> Any:
    """A nested state with whole tensors; all processes call this, and those that do not `keep` it get None for each."""
    if isinstance(state, dict):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather(value, keep) for value in state]
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the whole state of an optimizer whose parameters may be cut.

    Raises:
        ValueError, KeyError: it is another optimizer's.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [number for group in state["param_groups"] for number in group["params"]]
    cut = dict(zip(order, parameters, strict=False))

    def fit(number: int, value: Any) -> Any:
        of_parameter = isinstance(value, torch.Tensor) and number in cut and value.shape == cut[number].shape
        return part_of(value, cut[number]) if of_parameter and value.ndim else value

    fitting = {
        number: {name: fit(number, value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": fitting})


def whole_unet(unet: "StockUNet", keep: bool) -> "StockUNet | None":
    """The U-Net itself where it is whole, else a whole copy in evaluation mode; all processes call this.

    Returns:
        None where it is cut and this process does not `keep` it.
    """
    if not _is_cut(unet):
        return unet
    state = gather(unet.state_dict(), keep)
    if not keep:
        return None
    whole = type(unet).from_config(unet.config)
    whole.load_state_dict(state)
    return whole.to(unet.device).eval().requires_grad_(False)
