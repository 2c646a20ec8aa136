"""Averages of a model's weights (EMA), which are validated, sampled and exported."""

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latent_ddpm.errors import UserError
from latent_ddpm.files import aside_name, fsync_path
from latent_ddpm.training.sharding import gather

UPDATE_STEPS = 4  # steps between updates: enough for averages over hundreds of steps, as each reads all weights
UPDATE_OFTEN_UNTIL = 256  # up to this step, every step updates the averages
FLOAT16_MAX = torch.finfo(torch.float16).max


class _Pairs:
    """The tensors of an average and of its model, listed once: on a GPU, listing them takes longer than the update."""

    def __init__(self, averaged: nn.Module, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(averaged.parameters()), list(model.parameters())
        self.buffers = list(averaged.buffers()), list(model.buffers())

    def lerp(self, share: float) -> None:
        """averaged <- averaged + share * (model - averaged) for parameters; buffers are copied."""
        torch._foreach_lerp_(*self.parameters, share)
        if self.buffers[0]:
            torch._foreach_copy_(*self.buffers)


class EMA:
    """Exponential moving average of a model's parameters; buffers are copied.

    Every process updates its own copy from identical weights, so the copies stay identical without communication.

    Args:
        model: the trained model, not wrapped for distribution.
        decay: maximum decay per step; at first it is (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._pairs: _Pairs | None = None

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """ema <- decay * ema + (1 - decay) * model."""
        self._lerp(model, 1 - self.decay_at(step))

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Restart the average: ema <- model."""
        self._lerp(model, 1.0)

    def _lerp(self, model: nn.Module, share: float) -> None:
        if self._pairs is None or self._pairs.model is not model:
            self._pairs = _Pairs(self.model, model)
        self._pairs.lerp(share)


# ----------------------------------------------------------------------------------------- power-function averages


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power function with relative width sigma_rel (arXiv 2312.02696, section 3.1).

    The weight of time tau in the average at time t is proportional to tau^gamma; its standard deviation is
    sigma_rel * t = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) * t.

    Args:
        sigma_rel: above 0 and at most 12^-0.5 = 0.289, which gives the plain mean of all weights (gamma 0).
    """
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def profile_products(a: Sequence[tuple[float, int]], b: Sequence[tuple[float, int]]) -> np.ndarray:
    """Inner products of averages, each given as (gamma, step): float64 (len(a), len(b)).

    The average at time t weighs time tau < t by (gamma + 1) tau^gamma / t^(gamma + 1). The integral of the product of
    two such functions has the closed form below (arXiv 2312.02696, appendix C).
    """
    gamma_a, t_a = (np.array(column, np.float64)[:, None] for column in zip(*a, strict=True))
    gamma_b, t_b = (np.array(column, np.float64)[None, :] for column in zip(*b, strict=True))
    both = np.minimum(t_a, t_b)
    # powers of ratios <= 1 do not overflow
    powers = (both / t_a) ** gamma_a * (both / t_b) ** gamma_b / np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * powers


def posthoc_coefficients(snapshots: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> np.ndarray:
    """Least-squares coefficients of the snapshots for another average (arXiv 2312.02696, section 3.2): float64 (N,).

    Args:
        snapshots: (gamma, step) of each snapshot.
        wanted: (gamma, step) of the average to reconstruct.
    """
    gram = profile_products(snapshots, snapshots)
    return np.linalg.lstsq(gram, profile_products(snapshots, [wanted])[:, 0], rcond=None)[0]


class PowerEMA:
    """Power-function averages, whose length grows with training, so that the first steps lose their weight.

    Karras et al., arXiv 2312.02696. An update at time t (counted from 1), n steps after the previous update, has the
    decay (1 - n/t)^(gamma + 1). The current model's weight then is the integral of the power function from t - n to t.
    n is 1 at first, later UPDATE_STEPS. Every process keeps its own copies, as in `EMA`.

    Args:
        model: the trained model, not wrapped for distribution.
        sigma_rels: the relative widths, see `gamma_of`; the first is exported.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        self.sigma_rels = list(sigma_rels)
        self.gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]
        self.models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in sigma_rels]
        self._pairs: list[_Pairs] = []

    @property
    def model(self) -> nn.Module:
        """The average that is validated, sampled and exported."""
        return self.models[0]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update with the weights after optimizer step `step`, counted from 0. Call it after every step."""
        t = step + 1
        since = 1 if t <= UPDATE_OFTEN_UNTIL else UPDATE_STEPS
        if t % since:
            return
        if not self._pairs or self._pairs[0].model is not model:
            self._pairs = [_Pairs(averaged, model) for averaged in self.models]
        for gamma, pairs in zip(self.gammas, self._pairs, strict=True):
            pairs.lerp(1 - (1 - since / t) ** (gamma + 1))

    def state_dict(self) -> dict:
        """The averages, for a checkpoint."""
        return {str(rel): averaged.state_dict() for rel, averaged in zip(self.sigma_rels, self.models, strict=True)}

    def load_state_dict(self, state: dict) -> None:
        """Load the averages from a checkpoint.

        Raises:
            UserError: the checkpoint's averages have other widths.
        """
        if set(state) != {str(rel) for rel in self.sigma_rels}:
            raise UserError(
                f"The checkpoint's averages have the widths {', '.join(state)}; ema_sigma_rels asks for "
                f"{self.sigma_rels}. Use the checkpoint's widths; scripts/reconstruct_ema.py reconstructs others."
            )
        for rel, averaged in zip(self.sigma_rels, self.models, strict=True):
            averaged.load_state_dict(state[str(rel)])

    def save_snapshots(self, folder: Path, step: int, keep: bool = True) -> None:
        """Write each average after `step` steps to `folder` atomically, in float16.

        Every process calls this; the one that writes sets `keep`.

        Raises:
            UserError: the disk is full or not writable.
        """
        averaged_at = step if step <= UPDATE_OFTEN_UNTIL else step - step % UPDATE_STEPS
        for rel, gamma, averaged in zip(self.sigma_rels, self.gammas, self.models, strict=True):
            parameters = gather(dict(averaged.named_parameters()), keep)
            if not keep:
                continue
            path = folder / f"ema-{step:08d}-{rel:g}.safetensors"
            aside = aside_name(path)
            # clamped: the weights of a diverging run may exceed the range of float16
            half = {
                name: p.cpu().clamp(-FLOAT16_MAX, FLOAT16_MAX).half().contiguous() for name, p in parameters.items()
            }
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(half, aside, {"average": json.dumps({"sigma_rel": rel, "gamma": gamma, "step": averaged_at})})
                fsync_path(aside)
                aside.replace(path)
            except (OSError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    aside.unlink()
                raise UserError(
                    f"Could not write the average {path}: {error}. Checkpoints are untouched; free disk space or "
                    f"lower ema_snapshots, and run the same command again."
                ) from error


def _read_snapshots(folder: Path) -> list[tuple[Path, dict]]:
    """The files of `PowerEMA.save_snapshots`, each with its sigma_rel, gamma and step.

    Raises:
        UserError: a file is damaged or of another kind.
    """
    found = []
    for path in sorted(folder.glob("ema-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found.append((path, json.loads(file.metadata()["average"])))
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}). Remove it: the other averages suffice.") from error
    return found


def nearest_snapshot(folder: Path, sigma_rel: float, step: int) -> tuple[dict[str, torch.Tensor], int]:
    """The snapshot of an average that is nearest to an optimizer step.

    Args:
        folder: folder of the snapshots, see `PowerEMA.save_snapshots`.
        sigma_rel: relative width of the average.
        step: the optimizer step.

    Returns:
        The parameters by name, float32, and the snapshot's step.

    Raises:
        UserError: there is no snapshot of this width, or one is damaged.
    """
    found = [(about["step"], path) for path, about in _read_snapshots(folder) if about["sigma_rel"] == sigma_rel]
    if not found:
        raise UserError(f"There are no averages of width {sigma_rel:g} in {folder}. train_unet.py writes them there.")
    nearest, path = min(found, key=lambda pair: (abs(pair[0] - step), pair[0]))
    return {name: value.float() for name, value in load_file(path).items()}, nearest


def reconstruct(
    folder: Path, sigma_rel: float, step: int | None = None, without: float | None = None
) -> tuple[dict[str, torch.Tensor], int]:
    """Reconstruct an average of any width from the snapshots of a run (arXiv 2312.02696, section 3.2).

    Args:
        folder: folder of the snapshots, see `PowerEMA.save_snapshots`.
        sigma_rel: relative width of the average.
        step: optimizer step of the average; None uses that of the newest snapshot.
        without: a width whose snapshots are ignored.

    Returns:
        The parameters by name, float32, and the step.

    Raises:
        UserError: there are no snapshots, the newest is before `step`, or one is damaged.
    """
    found = [(path, about) for path, about in _read_snapshots(folder) if about["sigma_rel"] != without]
    if not found:
        raise UserError(f"There are no averages in {folder}. train_unet.py writes them if ema_snapshots is above 0.")
    newest = max(about["step"] for _, about in found)
    if step is not None and not 0 < step <= newest:
        raise UserError(f"The averages in {folder} end at step {newest}; there is none at {step}.")
    step = newest if step is None else step
    factors = posthoc_coefficients([(about["gamma"], about["step"]) for _, about in found], (gamma_of(sigma_rel), step))
    sums: dict[str, torch.Tensor] = {}
    for factor, (path, _) in zip(factors.tolist(), found, strict=True):
        for name, value in load_file(path).items():
            term = value.double() * factor
            sums[name] = sums[name] + term if name in sums else term
    return {name: value.float() for name, value in sums.items()}, step


def reconstruction_error(folder: Path, sigma_rel: float) -> float:
    """Relative error (L2) of an average reconstructed from the other widths' snapshots, against the tracked average.

    Raises:
        UserError: this width was not tracked, or no other was.
    """
    tracked = [(about["step"], path) for path, about in _read_snapshots(folder) if about["sigma_rel"] == sigma_rel]
    if not tracked:
        raise UserError(f"The width {sigma_rel:g} was not tracked in {folder}. Choose one of the run's ema_sigma_rels.")
    step, path = max(tracked)
    made, _ = reconstruct(folder, sigma_rel, step, without=sigma_rel)
    truth = {name: value.float() for name, value in load_file(path).items()}
    difference = sum(float((made[name] - value).double().square().sum()) for name, value in truth.items())
    return (difference / sum(float(value.double().square().sum()) for value in truth.values())) ** 0.5
