"""Stage 1's losses: reconstruction, perceptual, adversarial, and the weight that balances the last."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from latent_ddpm.distributed import all_reduce_sum, process_count
from latent_ddpm.errors import UserError

TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean absolute ("l1") or squared ("l2") difference of images in [-1, 1]; scalar."""
    return {"l1": F.l1_loss, "l2": F.mse_loss}[kind](reconstruction, images)


def load_lpips(net: str) -> nn.Module:
    """The LPIPS distance (Zhang et al., arXiv 1801.03924) from the package `lpips`, frozen.

    The result maps two batches (B, 3 or 1, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Raises:
        UserError: the trunk's ImageNet weights are neither in torch's cache nor to be downloaded.
    """
    import lpips

    try:
        distance = lpips.LPIPS(net=net, verbose=False)
    except OSError as error:  # URLError is one
        cache = Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[net]
        raise UserError(
            f"LPIPS ({net}) needs torchvision's ImageNet weights {TRUNKS[net]}, which could not be downloaded "
            f"({getattr(error, 'reason', error)}). Put that file at {cache}, or train without: --lpips_weight 0."
        ) from error
    return distance.eval().requires_grad_(False)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator (Lim and Ye, arXiv 1705.02894, eq. 10 and 11), halved as in VQGAN; scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """What the decoder minimizes under the hinge loss; scalar."""
    return -fake_logits.mean()


def input_gradient(loss: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """d loss / d images, scaled up on the way so that fp16 networks do not flush a mean's gradient to zero."""
    scale = float(images.numel())
    return torch.autograd.grad(loss * scale, images)[0] / scale


def adaptive_weight(
    features: torch.Tensor,
    last_layer: nn.Conv2d,
    reconstruction_gradient: torch.Tensor,
    adversarial_gradient: torch.Tensor,
    delta: float = 1e-6,
) -> torch.Tensor:
    """VQGAN's lambda (arXiv 2012.09841, eq. 6 and 7): ratio of the two losses' gradients at the last layer.

    The paper differentiates both losses through the decoder's last layer and so keeps the whole graph for a
    second pass. The layer is a convolution: its weight gradient follows from its input and the gradient at its
    output, and no graph is needed.

    Args:
        features: (B, F, R, R), the last layer's input.
        last_layer: the decoder's conv_out.
        reconstruction_gradient: d L_rec / d reconstruction (B, C, R, R).
        adversarial_gradient: d L_gan / d reconstruction (B, C, R, R).
        delta: keeps the division finite.

    Returns:
        scalar in [0, 1e4], the same in every process.
    """
    features = features.detach().float()
    with torch.autocast(features.device.type, enabled=False):
        weight_gradients = torch.stack(
            [
                torch.nn.grad.conv2d_weight(features, last_layer.weight.shape, gradient.float(), padding=1)
                for gradient in (reconstruction_gradient, adversarial_gradient)
            ]
        )
    # Each process has the gradient of its own batch's mean; their mean is that of the joint batch.
    all_reduce_sum(weight_gradients).div_(process_count())
    norms = weight_gradients.flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + delta)).clamp(0, 1e4)
