"""A small classifier of the embedded digits, which judges the digits that a pipeline draws."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from latent_ddpm.data.images import to_float
from latent_ddpm.data.sources.embedded import DigitsSource
from latent_ddpm.random import Stream, permutation, uniform

CONFIDENT = 0.9


def digit_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """All embedded digits: images float32 (5000, 1, 32, 32) in [-1, 1], and labels int64 (5000,)."""
    source = DigitsSource()
    pixels = np.stack([np.asarray(source.load(i).convert("L")) for i in range(len(source))])
    return to_float(torch.from_numpy(pixels)[:, None]), torch.from_numpy(source.labels).long()


def train_digit_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 24, seed: int = 0) -> nn.Module:
    """Train a small convolutional network on shifted digits, within a minute.

    Args:
        images: (N, 1, 32, 32) in [-1, 1].
        labels: (N,) in 0..9.

    Returns:
        A frozen network, images (B, 1, 32, 32) -> logits (B, 10).
    """
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 24, 5, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(48 * 16, 10)),
    )
    batch_size = 64
    steps = epochs * len(images) // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for step in range(steps):
        epoch, place = divmod(step * batch_size, len(images))
        chosen = torch.from_numpy(permutation(seed, epoch, len(images))[place : place + batch_size])
        shift = (uniform(seed, Stream.CROP, torch.tensor([step]), (2,))[0] * 3).long().sub(1).tolist()
        batch = torch.roll(images[chosen], shift, dims=(2, 3))  # the border is black, so rolling equals shifting
        loss = F.cross_entropy(network(batch), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def digit_probabilities(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
    return torch.cat([classifier(batch).softmax(1) for batch in images.split(500)])


def judge(probabilities: torch.Tensor) -> dict:
    """Summarize the classifier's probabilities (N, 10) for a set of samples.

    Returns:
        confident: share of images with a class of probability above 0.9; class_shares: share of each of the ten
        classes among all images, by the most probable class.
    """
    best, digit = probabilities.max(1)
    shares = torch.bincount(digit, minlength=10).double() / len(digit)
    return {
        "confident": float((best > CONFIDENT).double().mean()),
        "class_shares": [round(share, 4) for share in shares.tolist()],
        "smallest_class_share": float(shares.min()),
        "largest_class_share": float(shares.max()),
    }


def silhouettes(images: torch.Tensor) -> torch.Tensor:
    """Bright pixels of digits (N, 1, 32, 32) in [-1, 1], as in the column `silhouette`: bool (N, 32, 32)."""
    return images[:, 0] >= 128 / 127.5 - 1


def intersection_over_union(asked: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Intersection over union of silhouettes (N, H, W), bool: float (N,); 1 where both are empty."""
    both, either = ((asked & drawn).flatten(1).sum(1), (asked | drawn).flatten(1).sum(1))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)
