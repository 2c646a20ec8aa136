"""A small classifier of the embedded digits: the judge of what the quickstart draws."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from latent_ddpm.data import DigitsSource, to_float
from latent_ddpm.random import Stream, permutation, uniform

CONFIDENT = 0.9


def digit_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """All embedded digits: images float32 (5000, 1, 32, 32) in [-1, 1], and labels int64 (5000,)."""
    source = DigitsSource()
    pixels = np.stack([np.asarray(source.load(i).convert("L")) for i in range(len(source))])
    return to_float(torch.from_numpy(pixels)[:, None]), torch.tensor(source.labels)


def train_digit_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 8, seed: int = 0) -> nn.Module:
    """Train a small convolutional network on shifted digits for some seconds.

    Args:
        images: (N, 1, 32, 32) in [-1, 1].
        labels: (N,) in 0..9.

    Returns:
        A frozen network, images (B, 1, 32, 32) -> logits (B, 10).
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 32), (32, 64)):  # 32 -> 16 -> 8 -> 4 pixels
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))
    batch_size = 64
    steps = epochs * len(images) // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for step in range(steps):
        epoch, place = divmod(step * batch_size, len(images))
        chosen = torch.from_numpy(permutation(seed, epoch, len(images))[place : place + batch_size])
        shift = (uniform(seed, Stream.CROP, torch.tensor([step]), (2,))[0] * 5).long().sub(2).tolist()
        batch = torch.roll(images[chosen], shift, dims=(2, 3))  # the border is black, so rolling is shifting
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
    """What the classifier says of a set of samples.

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
