"""Count the optimizer steps that are skipped because a gradient is not finite."""

from collections.abc import Callable

import torch

from latent_ddpm.errors import UserError

SKIPPED_IN_A_ROW = 25  # steps
SCALING_SKIPS = 16  # steps that fp16 loss scaling may skip until it has found its scale
RATE_OF = {"autoencoder": "learning_rate", "discriminator": "disc_learning_rate", "U-Net": "learning_rate"}
RATE_OF |= dict.fromkeys(("generator", "critic"), "few_step_learning_rate")


class SkippedSteps:
    """Counts steps skipped because a gradient was not finite, without synchronizing the device.

    Args:
        network: a key of RATE_OF.
        counts: from a checkpoint, or None.
        device: of the gradients.
        scaled: whether fp16 loss scaling is on, which skips some steps itself.

    Attributes:
        counts: int64 (2,): all skipped steps, and those since the last good step; saved in checkpoints.
    """

    def __init__(self, network: str, counts: torch.Tensor | None, device: torch.device, scaled: bool = False) -> None:
        self.network = network
        self.counts = (torch.zeros(2, dtype=torch.int64) if counts is None else counts).to(device)
        self._say_at = SCALING_SKIPS if scaled else 1

    def add(self, kept: torch.Tensor) -> None:
        """Count a step; `kept` is a bool scalar on the device, False for a skipped step."""
        skipped = (~kept).long()
        self.counts.copy_(torch.stack((self.counts[0] + skipped, (self.counts[1] + 1) * skipped)))

    def report(self, say: Callable[[str], None]) -> None:
        """Say how many steps were skipped, each time that number has doubled.

        Raises:
            UserError: the last SKIPPED_IN_A_ROW steps were all skipped, so training cannot recover by itself.
        """
        total, streak = self.counts.tolist()
        rate = RATE_OF[self.network]
        if streak >= SKIPPED_IN_A_ROW:
            raise UserError(
                f"The gradients of the {self.network} were not finite in the last {streak} steps, which were skipped. "
                f"Resume from an earlier checkpoint (--resume_from_checkpoint DIR) with a lower {rate} and another "
                f"--output_dir."
            )
        if total >= self._say_at:
            self._say_at = 2 * total
            say(
                f"Steps skipped: {total} so far, because the gradients of the {self.network} were not finite. If this "
                f"continues, lower {rate}."
            )
