"""Optimizers (AdamW, Muon), gradient clipping and the learning rate schedule."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

from latent_ddpm.config import RunConfig
from latent_ddpm.training.acceleration import reads_are_free
from latent_ddpm.training.distributed import all_gather_rows, process_count, process_index
from latent_ddpm.training.sharding import part_of, whole_tensor

WSD_DECAY_SHARE = 0.3  # share of a run, unless lr_decay_steps is set
_MUON_MOMENTUM = 0.95
_MUON_SMALLEST = 16  # AdamW updates matrices with fewer rows or columns


def orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Approximately the nearest matrices with orthonormal rows or columns, whichever are fewer.

    The quintic Newton-Schulz iteration of Muon: it brings all singular values between 0.7 and 1.2, except those
    below about a thousandth of the largest.

    Args:
        matrices: (N, R, C) float.
        iterations: of Newton-Schulz.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    # A GPU iterates in bf16, as Muon's authors do. There, the iteration on the rounded Gram matrix would diverge.
    if not reads_are_free(wide):
        wide = _iterate_in_bf16(wide.bfloat16(), iterations).float()
    elif wide.shape[2] > 2 * wide.shape[1]:
        wide = _iterate_on_gram(wide, iterations)
    else:
        wide = _iterate(wide, iterations)
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    """The factor of an iteration, without its multiple of the identity."""
    return torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)


def _iterate(wide: torch.Tensor, iterations: int) -> torch.Tensor:
    for _ in range(iterations):
        wide = 3.4445 * wide + _polynomial(wide @ wide.mT) @ wide
    return wide


def _iterate_in_bf16(wide: torch.Tensor, iterations: int) -> torch.Tensor:
    """As `_iterate`, in three kernels per iteration; each sums in float32 and rounds once."""
    for _ in range(iterations):
        wide = torch.baddbmm(wide, _polynomial(wide @ wide.mT), wide, beta=3.4445)
    return wide


def _iterate_on_gram(wide: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same result: every iteration multiplies by a polynomial in the Gram matrix, so all of them together do too.

    The products are then R x R. Only two involve C, which is 9 times as large for a 3x3 convolution.
    """
    gram = wide @ wide.mT
    identity = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    total = identity.expand_as(gram)
    for i in range(iterations):
        factor = _polynomial(gram) + 3.4445 * identity
        total = factor @ total if i else factor
        if i < iterations - 1:
            gram = factor @ gram @ factor
    return total @ wide


def orthogonalize_all(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonalize` for each matrix (R, C). All processes hold the same matrices and share the work."""
    count, mine = process_count(), process_index()
    owners = _owners([tuple(matrix.shape) for matrix in matrices], count)
    by_shape = defaultdict(list)
    for number, matrix in enumerate(matrices):
        if owners[number] == mine:
            by_shape[matrix.shape].append(number)
    made: dict[int, torch.Tensor] = {}
    for numbers in by_shape.values():
        made |= zip(numbers, orthogonalize(torch.stack([matrices[number] for number in numbers])), strict=True)
    if count > 1 and matrices:
        of_each = [[number for number, owner in enumerate(owners) if owner == process] for process in range(count)]
        most = max(sum(matrices[number].numel() for number in numbers) for numbers in of_each)
        sent = matrices[0].new_zeros(most)
        own = [made[number].flatten() for number in of_each[mine]]
        if own:
            torch.cat(own, out=sent[: sum(map(len, own))])
        for numbers, row in zip(of_each, all_gather_rows(sent[None]), strict=True):
            sizes = [matrices[number].numel() for number in numbers]
            for number, values in zip(numbers, row[: sum(sizes)].split(sizes), strict=True):
                made[number] = values.view_as(matrices[number])
    return [made[number] for number in range(len(matrices))]


def _owners(shapes: list[tuple[int, int]], count: int) -> list[int]:
    """The process, of `count`, for each matrix: greedily, the costliest matrix goes to the least loaded process."""
    costs = [min(shape) ** 2 * (max(shape) + 8 * min(shape)) for shape in shapes]
    owners, loads = [0] * len(shapes), [0] * count
    for number in sorted(range(len(shapes)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


class Muon(torch.optim.AdamW):
    """Orthogonalized momentum for matrices and convolutions, AdamW for all other parameters.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with the update scaled to the size of AdamW's (arXiv
    2502.16982, eq. 4), so that both use one learning rate. A convolution (C_out, C_in, k, k) is a matrix of C_out rows.
    The processes share the orthogonalization.

    Args:
        parameters: of the network.
        adamw: arguments of torch.optim.AdamW; learning rate and weight decay apply to the matrices too.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **adamw: object) -> None:
        matrices, others = [], []
        for p in parameters:
            is_matrix = p.ndim >= 2 and min(len(p), p.numel() // len(p)) >= _MUON_SMALLEST
            (matrices if is_matrix else others).append(p)
        super().__init__([{"params": matrices}, {"params": others}], **adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; it changes nothing where `found_inf` is set (see clip_gradients)."""
        matrices, others = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        device = matrices["params"][0].device if matrices["params"] else None
        broken = torch.zeros((), device=device) if found_inf is None else found_inf.to(device)
        rate = matrices["lr"] * (1 - broken)
        reads_free = device is not None and reads_are_free(broken)
        changed = [p for p in matrices["params"] if p.grad is not None and not (reads_free and broken)]
        for p in changed:
            if not self.state[p]:  # AdamW expects a "step" in every state that it loads
                self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        if changed:
            momenta, gradients = [self.state[p]["momentum"] for p in changed], [p.grad for p in changed]
            if reads_free:
                torch._foreach_lerp_(momenta, gradients, 1 - _MUON_MOMENTUM)
            else:
                gradients = _zero_if(broken > 0, gradients)  # what is not finite must not reach the momentum
                share = (1 - broken) * (1 - _MUON_MOMENTUM)
                torch._foreach_mul_(momenta, 1 - share)
                torch._foreach_add_(momenta, torch._foreach_mul(gradients, share))
            nesterov = torch._foreach_lerp(gradients, momenta, _MUON_MOMENTUM)
            updates = [whole_tensor(update).flatten(1).float() for update in nesterov]
            if matrices["weight_decay"]:
                torch._foreach_mul_(changed, 1 - rate * matrices["weight_decay"])
            updates = orthogonalize_all(updates)
            sizes = [0.2 * max(update.shape) ** 0.5 for update in updates]
            updates = [part_of(update.reshape(p.shape), p) for p, update in zip(changed, updates, strict=True)]
            if reads_free:
                for p, update, size in zip(changed, updates, sizes, strict=True):
                    p.addcmul_(update, rate * size, value=-1)
            else:
                torch._foreach_sub_(changed, torch._foreach_mul(torch._foreach_mul(updates, sizes), rate))
        self.param_groups = [others]
        try:
            super().step()
        finally:
            self.param_groups = [matrices, others]


def _zero_if(broken: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients, or zeros if the bool scalar `broken` is true; one kernel for all gradients of a shape."""
    made: dict[int, torch.Tensor] = {}
    by_shape = defaultdict(list)
    for number, gradient in enumerate(gradients):
        by_shape[gradient.shape].append(number)
    for numbers in by_shape.values():
        stacked = torch.stack([gradients[number] for number in numbers])
        made |= zip(numbers, stacked.masked_fill_(broken, 0).unbind(), strict=True)
    return [made[number] for number in range(len(gradients))]


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    config: RunConfig,
    learning_rate: float,
    name: str = "adamw",
    betas: tuple[float, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101), or `muon`, with the config's weight decay and, unless given, betas."""
    return {"adamw": torch.optim.AdamW, "muon": Muon}[name](
        parameters,
        lr=learning_rate,
        betas=betas or (config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip an optimizer's gradients to a global norm; its next step does nothing if that norm is not finite.

    Fused AdamW reads the flag on its device, so nothing synchronizes. On a GPU, AdamW also divides the gradients itself
    (`grad_scale`), which saves a pass over them.

    Returns:
        The norm before clipping, and whether the step counts (bool), both scalars.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
    if reads_are_free(norm):
        if norm > max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    elif type(optimizer) is torch.optim.AdamW:
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_min(1.0).float()
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    kept = norm.isfinite()
    optimizer.found_inf = (~kept).float()
    return norm, kept


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """The learning rate at a step as a share of its peak: a linear warm-up over lr_warmup_steps, then lr_scheduler.

    It depends on the step alone, so there is no scheduler state to save. All schedules but `constant` reach 0 at
    max_train_steps.
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    progress = min(1.0, progress)
    if config.lr_scheduler == "warmup_stable_decay":
        decay_steps = config.lr_decay_steps or math.ceil(WSD_DECAY_SHARE * config.max_train_steps)
        return min(1.0, max(0, config.max_train_steps - step) / decay_steps)
    return {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
    }[config.lr_scheduler]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
