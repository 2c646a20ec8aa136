"""Averages of a model's weights: the model that is validated, sampled and exported."""

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

UPDATE_STEPS = 4  # averages over hundreds of steps need not see each; reading all weights is most of their cost
UPDATE_OFTEN_UNTIL = 256  # steps
FLOAT16_MAX = torch.finfo(torch.float16).max


def _lerp(averaged: nn.Module, model: nn.Module, share: float) -> None:
    """averaged <- averaged + share * (model - averaged) for parameters; buffers are copied."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


class EMA:
    """A second model whose parameters follow the trained one's exponentially; buffers are copied.

    Every process updates its own copy from identical weights, so the copies stay identical without traffic.

    Args:
        model: the trained model, not wrapped for distribution.
        decay: the largest decay per step; early on it is min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """ema <- decay * ema + (1 - decay) * model."""
        _lerp(self.model, model, 1 - self.decay_at(step))

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Forget the past: ema <- model."""
        _lerp(self.model, model, 1.0)


# ----------------------------------------------------------------------------------------- power-function averages


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function of relative width sigma_rel (arXiv 2312.02696, section 3.1).

    The weight of time tau in the average at time t is proportional to tau^gamma; its standard deviation is
    sigma_rel * t = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) * t.

    Args:
        sigma_rel: above 0, at most 12^-0.5 = 0.289, which is the plain mean of all weights (gamma 0).
    """
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def profile_products(a: Sequence[tuple[float, int]], b: Sequence[tuple[float, int]]) -> np.ndarray:
    """Inner products of averages, each given as (gamma, step at which it was taken): float64 (len(a), len(b)).

    The average at time t weighs time tau < t by (gamma + 1) tau^gamma / t^(gamma + 1); the integral of the product of
    two of these has the closed form below (arXiv 2312.02696, appendix C).
    """
    gamma_a, t_a = (np.array(column, np.float64)[:, None] for column in zip(*a, strict=True))
    gamma_b, t_b = (np.array(column, np.float64)[None, :] for column in zip(*b, strict=True))
    both = np.minimum(t_a, t_b)
    # as powers of ratios at most 1, which do not overflow
    powers = (both / t_a) ** gamma_a * (both / t_b) ** gamma_b / np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * powers


def posthoc_coefficients(snapshots: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> np.ndarray:
    """Factors of the snapshots whose sum is nearest to another average (arXiv 2312.02696, section 3.2): float64 (N,).

    Args:
        snapshots: (gamma, step) of each.
        wanted: gamma and step of the average to be made.
    """
    gram = profile_products(snapshots, snapshots)
    return np.linalg.lstsq(gram, profile_products(snapshots, [wanted])[:, 0], rcond=None)[0]


class PowerEMA:
    """Averages whose length grows with training, so that they never weigh the first steps' weights (arXiv 2312.02696).

    An update at time t (counted from 1), n steps after the one before it, has the decay (1 - n/t)^(gamma + 1), which
    makes the weight of the model then the integral of the power function from t - n to t. n is 1 at first, later
    UPDATE_STEPS. Every process keeps its own, as with `EMA`.

    Args:
        model: the trained model, not wrapped for distribution.
        sigma_rels: the relative widths, see `gamma_of`; the first is the one to be exported.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        self.sigma_rels = list(sigma_rels)
        self.gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]
        self.models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in sigma_rels]

    @property
    def model(self) -> nn.Module:
        """The average to be validated, sampled and exported."""
        return self.models[0]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0; call it after every step."""
        t = step + 1
        since = 1 if t <= UPDATE_OFTEN_UNTIL else UPDATE_STEPS
        if t % since:
            return
        for gamma, averaged in zip(self.gammas, self.models, strict=True):
            _lerp(averaged, model, 1 - (1 - since / t) ** (gamma + 1))

    def state_dict(self) -> dict:
        """The averages, for a checkpoint."""
        return {str(rel): averaged.state_dict() for rel, averaged in zip(self.sigma_rels, self.models, strict=True)}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`.

        Raises:
            UserError: the state has averages of other widths.
        """
        if set(state) != {str(rel) for rel in self.sigma_rels}:
            raise UserError(
                f"The checkpoint's averages have the widths {', '.join(state)}; ema_sigma_rels asks for "
                f"{self.sigma_rels}. Go on with the checkpoint's (scripts/reconstruct_ema.py makes others)."
            )
        for rel, averaged in zip(self.sigma_rels, self.models, strict=True):
            averaged.load_state_dict(state[str(rel)])

    def save_snapshots(self, folder: Path, step: int, keep: bool = True) -> None:
        """Write each average after `step` steps to `folder`, in float16 and whole or not at all.

        All processes call this; the one that is to write says `keep`.

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
            # clamped: the weights of a run that diverges may be larger than float16 can say
            half = {name: p.cpu().clamp(-FLOAT16_MAX, FLOAT16_MAX).half() for name, p in parameters.items()}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(half, aside, {"average": json.dumps({"sigma_rel": rel, "gamma": gamma, "step": averaged_at})})
                fsync_path(aside)
                aside.replace(path)
            except (OSError, SafetensorError) as error:
                with contextlib.suppress(OSError):
                    aside.unlink()
                raise UserError(
                    f"Could not write the average {path}: {error}. Checkpoints are untouched; make room (or set "
                    f"ema_snapshots lower) and start again with the same command."
                ) from error


def _read_snapshots(folder: Path) -> list[tuple[Path, dict]]:
    """Files of `PowerEMA.save_snapshots`, each with its sigma_rel, gamma and step.

    Raises:
        UserError: one is not such a file, or cut short.
    """
    found = []
    for path in sorted(folder.glob("ema-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found.append((path, json.loads(file.metadata()["average"])))
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}). Remove it: the other averages will do.") from error
    return found


def reconstruct(
    folder: Path, sigma_rel: float, step: int | None = None, without: float | None = None
) -> tuple[dict[str, torch.Tensor], int]:
    """An average of any width from the snapshots of a run (arXiv 2312.02696, section 3.2).

    Args:
        folder: of `PowerEMA.save_snapshots`.
        sigma_rel: relative width of the average.
        step: at which it is taken; by default the newest snapshot's.
        without: a width whose snapshots are not used.

    Returns:
        The parameters by name, float32, and the step.

    Raises:
        UserError: there are no snapshots, none as late as that step, or a damaged one.
    """
    found = [(path, about) for path, about in _read_snapshots(folder) if about["sigma_rel"] != without]
    if not found:
        raise UserError(f"There are no averages in {folder}; train_unet.py writes them (ema_snapshots).")
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
    """How far the average made from the other widths' snapshots is from the tracked one, relative to its norm.

    Raises:
        UserError: this width was not tracked, or none other was.
    """
    tracked = [(about["step"], path) for path, about in _read_snapshots(folder) if about["sigma_rel"] == sigma_rel]
    if not tracked:
        raise UserError(f"The width {sigma_rel:g} was not tracked in {folder}; ema_sigma_rels says which are.")
    step, path = max(tracked)
    made, _ = reconstruct(folder, sigma_rel, step, without=sigma_rel)
    truth = {name: value.float() for name, value in load_file(path).items()}
    difference = sum(float((made[name] - value).double().square().sum()) for name, value in truth.items())
    return (difference / sum(float(value.double().square().sum()) for value in truth.values())) ** 0.5
