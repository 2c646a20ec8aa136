"""Count the optimizer steps that are skipped because a gradient is not finite."""

from collections.abc import Callable

import torch

from latent_ddpm.errors import UserError

SKIPPED_IN_A_ROW = 25  # steps
SCALING_SKIPS = 16  # steps that fp16's loss scaling may skip before it has found its scale
RATE_OF = {"autoencoder": "learning_rate", "discriminator": "disc_learning_rate", "U-Net": "learning_rate"}


class SkippedSteps:
    """Counts steps that were left out because a gradient was not finite, without waiting for the device.

    Args:
        network: whose gradients, a key of RATE_OF.
        counts: of a checkpoint.
        device: where the gradients are.
        scaled: whether fp16's loss scaling is at work, which skips steps of its own.

    Attributes:
        counts: int64 (2,), all skipped steps, and those since the last good one; part of the checkpoint.
    """

    def __init__(self, network: str, counts: torch.Tensor | None, device: torch.device, scaled: bool = False) -> None:
        self.network = network
        self.counts = (torch.zeros(2, dtype=torch.int64) if counts is None else counts).to(device)
        self._say_at = SCALING_SKIPS if scaled else 1

    def add(self, kept: torch.Tensor) -> None:
        """Take in whether a step counted, a bool scalar on the device."""
        skipped = (~kept).long()
        self.counts.copy_(torch.stack((self.counts[0] + skipped, (self.counts[1] + 1) * skipped)))

    def report(self, say: Callable[[str], None]) -> None:
        """Say how many were skipped so far, whenever that number has doubled.

        Raises:
            UserError: the last SKIPPED_IN_A_ROW steps all were: training cannot get out of this by itself.
        """
        total, streak = self.counts.tolist()
        rate = RATE_OF[self.network]
        if streak >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"The gradients of the {self.network} were not finite in the last {streak} steps, which were skipped. "
                f"Go on from an earlier checkpoint (--resume_from_checkpoint DIR) with a lower {rate} and another "
                f"--output_dir."
            )
        if total >= self._say_at:
            self._say_at = 2 * total
            say(
                f"Steps skipped: {total} so far, since the gradients of the {self.network} were not finite. If this "
                f"goes on, lower {rate}."
            )
