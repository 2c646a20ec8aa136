"""Sharding: weights, gradients, moments and averages are split over the processes (FSDP2, arXiv 2304.11277; ZeRO,
arXiv 1910.02054).

`accelerate launch` asks for it (configs/accelerate/fsdp2.yaml and zero2.yaml). The sharding is done here and not by
accelerate's prepare, which loses the moments of a resumed run and does not shard the averages. Checkpoints, snapshots
and exports hold whole tensors, so a run can be resumed with or without sharding.
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
    """How a network is sharded.

    Attributes:
        reshard_after_forward: whether a block's weights are sharded again after its forward pass and gathered once more
            for the backward pass (ZeRO-3); else they stay whole between the two (ZeRO-2).
    """

    reshard_after_forward: bool

    @classmethod
    def take_request(cls) -> "Sharding | None":
        """The sharding that `accelerate launch` asks for; None without sharding, and at the second call.

        The request is removed from the environment, because accelerate would shard the network too.

        Raises:
            UserError: the launcher asks for FSDP version 1, offloading or DeepSpeed.
        """
        if _is_set("ACCELERATE_USE_DEEPSPEED"):
            raise UserError(
                "DeepSpeed is not supported: it keeps its state in pickles. configs/accelerate/zero2.yaml shards what "
                "ZeRO stage 2 does, fsdp2.yaml what stage 3 does."
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
        """Shard the U-Net's weights over all processes, in place and block by block; it must be on its device."""
        from torch.distributed.fsdp import fully_shard

        for block in (*self.blocks(unet), unet):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward)

    def blocks(self, unet: "StockUNet") -> list[nn.Module]:
        """The blocks that are sharded, and compiled, one by one."""
        blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        return [block for block in blocks if block is not None]


def prepare(
    accelerator: Accelerator, unet: "StockUNet", optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """`accelerator.prepare`; without DistributedDataParallel where the weights are sharded."""
    if not _is_cut(unet):
        return accelerator.prepare(unet, optimizer)
    # evaluation_mode: mixed precision and torch.compile, but no collectives of accelerate's own
    return accelerator.prepare_model(unet, evaluation_mode=True), accelerator.prepare(optimizer)


def _is_cut(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; call it in all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, split like `like` of the same shape; the tensor if `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    mesh, rank = like.device_mesh, like.device_mesh.get_local_rank()
    pieces = tensor.to(like.device).chunk(mesh.size())  # as fully_shard splits; the last processes may get nothing
    piece = pieces[rank] if rank < len(pieces) else tensor[:0].to(like.device)
    return DTensor.from_local(piece, mesh, like.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def gather(state: Any, keep: bool) -> Any:
    """A nested state with whole tensors; call it in all processes. Without `keep`, sharded tensors become None."""
    if isinstance(state, dict):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather(value, keep) for value in state]
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    return state


def whole_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights of a network that may be sharded, in every process; call it in all of them."""
    return gather(network.state_dict(), keep=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the whole state of an optimizer whose parameters may be sharded.

    Raises:
        ValueError, KeyError: the state belongs to another optimizer.
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
    """The U-Net itself where it is not sharded, else a whole copy in evaluation mode; call it in all processes.

    Returns:
        None where it is sharded and this process does not `keep` it.
    """
    if not _is_cut(unet):
        return unet
    state = gather(unet.state_dict(), keep)
    if not keep:
        return None
    whole = type(unet).from_config(unet.config)
    whole.load_state_dict(state)
    return whole.to(unet.device).eval().requires_grad_(False)
