"""Stage 1's losses: reconstruction, perceptual, commitment, adversarial, and the adaptive weight of the last."""

import pickle
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from latent_ddpm.errors import UserError
from latent_ddpm.training.distributed import all_reduce_sum, process_count

MAX_ADAPTIVE_WEIGHT = 1e4  # as in VQGAN
NO_WEIGHTS = (LookupError, ValueError, TypeError, RuntimeError, EOFError)  # raised for files of another kind
TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean absolute ("l1") or squared ("l2") difference of images in [-1, 1]; scalar."""
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](reconstruction, images)


def load_lpips(net: str, weights: str | None = None) -> nn.Module:
    """The LPIPS distance (Zhang et al., arXiv 1801.03924) from the package `lpips`, frozen.

    The result maps two batches (B, 3 or 1, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Args:
        net: the trunk: vgg, alex or squeeze.
        weights: file of torchvision's ImageNet weights for the trunk (.pth or .safetensors); None uses torch's
            cache, or downloads them.

    Raises:
        UserError: the trunk's weights are not available and cannot be downloaded, or `weights` does not fit the trunk.
    """
    import lpips

    def untrained_or_cached(**words: bool) -> nn.Module:
        with warnings.catch_warnings():  # lpips uses a deprecated torchvision call
            warnings.filterwarnings("ignore", module="torchvision")
            return lpips.LPIPS(net=net, verbose=False, **words)

    if weights is not None:
        return _with_trunk(untrained_or_cached(pnet_rand=True), net, Path(weights))
    try:
        distance = untrained_or_cached()
    except OSError as error:  # includes URLError
        cache = Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[net]
        raise UserError(
            f"LPIPS ({net}) needs torchvision's ImageNet weights {TRUNKS[net]}, which could not be downloaded "
            f"({getattr(error, 'reason', error)}). Put that file at {cache}, give its path with --lpips_weights FILE, "
            f"or train without LPIPS: --lpips_weight 0."
        ) from error
    return distance.eval().requires_grad_(False)


def _with_trunk(distance: nn.Module, net: str, path: Path) -> nn.Module:
    """Load a trunk file. `lpips` splits torchvision's layers `features.N` into slices but keeps the numbers N."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        trunk = {}
        for name in distance.net.state_dict():
            _, number, rest = name.split(".", 2)
            trunk[name] = tensors[f"features.{number}.{rest}"]
        distance.net.load_state_dict(trunk)
    except OSError as error:
        raise UserError(f"lpips_weights: cannot read {path} ({error.strerror or error}).") from error
    except (*NO_WEIGHTS, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"lpips_weights: {path} does not hold torchvision's {TRUNKS[net]} ({error}).") from error
    return distance.eval().requires_grad_(False)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The discriminator's loss, halved as in VQGAN; scalar.

    Args:
        real_logits, fake_logits: of the same, arbitrary shape.
        kind: "hinge" (Lim and Ye, arXiv 1705.02894, eq. 10 and 11) or "non_saturating", the cross-entropy of
            Goodfellow et al. (arXiv 1406.2661, eq. 1).
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The decoder's adversarial loss: -D for "hinge", -log sigmoid(D) for "non_saturating"; scalar."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """R1 penalty: half the squared gradient at real images (Mescheder et al., arXiv 1801.04406, eq. 9); scalar.

    The gradient is of an image's mean logit, so that the penalty does not depend on the number of patches.

    Args:
        real_logits: (B, 1, H, W), computed from `images`.
        images: (B, C, R, R), a leaf tensor with requires_grad.
    """
    means = real_logits.flatten(1).mean(1)
    scale = float(images[0].numel())  # as in input_gradient
    slope = torch.autograd.grad(means.sum() * scale, images, create_graph=True)[0].float() / scale
    return 0.5 * slope.pow(2).flatten(1).sum(1).mean()


def lecam_penalty(real_logits: torch.Tensor, fake_logits: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """LeCam regularization, for small datasets (Tseng et al., arXiv 2104.03310, section 3.2); scalar.

    Keeps real logits near the running mean of fake logits, and fake logits near that of real ones. Only deviations that
    increase the gap count, as in the authors' code and unlike the paper's equation.

    Args:
        real_logits, fake_logits: of any shape.
        means: (2,), running means of real and fake logits.
    """
    return F.relu(real_logits - means[1]).pow(2).mean() + F.relu(means[0] - fake_logits).pow(2).mean()


def adversarial_ramp(step: int, start: int, ramp_steps: int) -> float:
    """Factor on the adversarial weight at a step: 0 before `start`, then a linear rise to 1 over `ramp_steps` steps."""
    return 0.0 if step < start else min(1.0, (step - start + 1) / max(1, ramp_steps))


def input_gradient(loss: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """d loss / d images. The loss is scaled up on the way: the gradient of a mean could underflow in fp16."""
    scale = float(images.numel())
    return torch.autograd.grad(loss * scale, images)[0] / scale


def adaptive_weight(
    features: torch.Tensor,
    last_layer: nn.Conv2d,
    reconstruction_gradient: torch.Tensor,
    adversarial_gradient: torch.Tensor,
    delta: float = 1e-6,
) -> torch.Tensor:
    """VQGAN's lambda (arXiv 2012.09841, eq. 6 and 7): ratio of the gradient norms of two losses at the last layer.

    The paper differentiates both losses with respect to the decoder's last layer, which keeps the whole graph for a
    second pass. The layer is a convolution: its weight gradient follows from its input and the gradient at its
    output, so no graph is needed.

    Args:
        features: (B, F, R, R), the last layer's input.
        last_layer: the decoder's conv_out.
        reconstruction_gradient: d L_rec / d reconstruction (B, C, R, R).
        adversarial_gradient: d L_gan / d reconstruction (B, C, R, R).
        delta: avoids a division by zero.

    Returns:
        scalar in [0, MAX_ADAPTIVE_WEIGHT], equal in every process; 0 if the adversarial gradient is not finite.
    """
    features = features.detach().float()
    with torch.autocast(features.device.type, enabled=False):
        weight_gradients = torch.stack(
            [
                torch.nn.grad.conv2d_weight(features, last_layer.weight.shape, gradient.float(), padding=1)
                for gradient in (reconstruction_gradient, adversarial_gradient)
            ]
        )
    # Each process has the gradient of its own batch's mean. Their mean is the gradient of the joint batch's mean.
    all_reduce_sum(weight_gradients).div_(process_count())
    norms = weight_gradients.flatten(1).norm(dim=1)
    weight = (norms[0] / (norms[1] + delta)).clamp(0, MAX_ADAPTIVE_WEIGHT)
    return torch.where(norms[1].isfinite(), weight, 0.0)


class HeldWeight:
    """The adaptive weight: measured while the discriminator trains alone, then held constant.

    A weight that is measured at every step amplifies itself: a larger adversarial loss increases the gradient of the
    other losses, which increases the adversarial weight. A constant weight makes the sum of the losses one objective.

    Args:
        steps: number of steps in which the discriminator trains alone; the weight is the mean over their second half.
            None: the discriminator never trains alone, and the weight is measured at every step (arXiv 2012.09841,
            eq. 7).
        sums: float64 (2,), sum and number of the weights measured so far, from a checkpoint.
        device: device of `sums`.

    Attributes:
        sums: see above; saved in checkpoints.
    """

    def __init__(self, steps: int | None, sums: torch.Tensor | None, device: torch.device) -> None:
        self.steps = steps
        self.sums = (torch.zeros(2, dtype=torch.float64) if sums is None else sums).to(device)

    def held(self, steps_since_entry: int) -> torch.Tensor | None:
        """The weight to use, a scalar; None while it is still measured."""
        if self.steps is None or steps_since_entry < self.steps:
            return None
        return (self.sums[0] / self.sums[1].clamp_min(1)).float()

    def add(self, steps_since_entry: int, weight: torch.Tensor) -> None:
        """Add a measured weight, a scalar. 0 marks a gradient that was not finite and is ignored."""
        if self.steps is not None and steps_since_entry >= self.steps // 2:
            self.sums += torch.stack((weight, (weight > 0).float())).double()
