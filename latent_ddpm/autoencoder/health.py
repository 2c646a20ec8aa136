"""Training problems of stage 1, detected in the logged metrics and reported with a remedy."""

import math
from collections import deque
from collections.abc import Callable

import torch

from latent_ddpm.autoencoder.losses import MAX_ADAPTIVE_WEIGHT
from latent_ddpm.config import AutoencoderConfig

PATIENCE = 10  # consecutive log entries that must show a problem before it is reported


class Watch:
    """Reports problems of stage 1. A problem is reported once, and again only if it returns after it disappeared.

    Args:
        say: called with each message.
        validation_positions: number of latent positions in the validation split.
        config: config of the run.
    """

    def __init__(self, say: Callable[[str], None], validation_positions: int, config: AutoencoderConfig) -> None:
        self.say, self.validation_positions, self.config = say, validation_positions, config
        self.winning_loss = 0.02 if config.disc_loss == "hinge" else 0.05
        self._streaks: dict[str, int] = {}
        self._losses: deque[float] = deque(maxlen=PATIENCE)
        self._lowest = math.inf

    def _see(self, ailment: str, present: bool, sentence: str, patience: int = PATIENCE) -> None:
        self._streaks[ailment] = self._streaks.get(ailment, 0) + 1 if present else 0
        if self._streaks[ailment] == patience:
            self.say(sentence)

    def training(self, measured: dict[str, float]) -> None:
        """Check the training metrics of a log entry, named as in metrics.jsonl."""
        loss = measured["loss"]
        if math.isfinite(loss):
            self._losses.append(loss)
        if len(self._losses) == PATIENCE:
            mean = sum(self._losses) / PATIENCE
            self._lowest = min(self._lowest, mean)
            self._see(
                "loss",
                mean > 2 * self._lowest,
                f"The loss has risen from {self._lowest:.3g} to {mean:.3g}. Lower learning_rate, or lengthen "
                f"lr_warmup_steps.",
            )
        if "discriminator_loss" not in measured:
            return
        disc_loss, weight = measured["discriminator_loss"], measured["adaptive_weight"]
        logit = max(abs(measured["logits_real"]), abs(measured["logits_fake"]))
        self._see(
            "starved",
            disc_loss < self.winning_loss,
            f"The discriminator tells every patch apart (loss {disc_loss:.2g}), so the decoder learns little from it. "
            f"Lower disc_learning_rate, set disc_lecam_weight or disc_r1_weight, or start it later (disc_start).",
        )
        gap = abs(measured["logits_real"] - measured["logits_fake"])
        self._see(
            "blind",
            gap < 0.03 * max(1.0, logit) and disc_loss > self.winning_loss,
            f"The discriminator cannot tell reconstructions from images (its mean logits differ by {gap:.2g}), so its "
            f"gradient is amplified noise. Lower disc_learning_rate, and resume from a checkpoint before disc_start.",
            patience=3 * PATIENCE,
        )
        self._see(
            "diverged",
            not logit < 100,
            f"The discriminator's logits have grown to {logit:.3g}: it diverges. Lower disc_learning_rate, or use "
            f"disc_norm: spectral or disc_r1_weight.",
        )
        self._see(
            "vanished",
            weight > 0.9 * MAX_ADAPTIVE_WEIGHT,
            "The discriminator passes no gradient to the decoder (the adaptive weight is at its limit). "
            "It may have diverged: lower disc_learning_rate.",
        )

    def validation(self, measured: dict[str, float], progress: float) -> None:
        """Check the validation metrics; `progress` in 0..1 is the completed share of the run."""
        explained = measured["explained_variance"]  # also 0 if all images are equal
        self._see(
            "grey",
            progress >= 0.2 and not explained > 0.3 and not measured["psnr"] > 30,
            f"Reconstructions are little better than one grey image ({max(explained, 0):.0%} of the variance). "
            f"Train longer or change learning_rate, and look at the images in samples/.",
            patience=1,
        )
        usage = measured.get("codebook_usage")
        codes = self.config.num_vq_embeddings
        if usage is not None and self.validation_positions >= 8 * codes:
            help_ = "Raise codebook_revive_below, or use fewer codes (num_vq_embeddings)."
            if self.config.quantizer == "fsq":
                help_ = "Raise fsq_balance_weight, or use fewer codes (fsq_levels and num_vq_embeddings)."
            asleep = progress >= 0.2 and usage < 0.5
            self._see("asleep", asleep, f"Only {usage:.0%} of the {codes} codes are in use. {help_}", patience=1)


def check_images(images: torch.Tensor, training_images: int, say: Callable[[str], None]) -> None:
    """Report problems of the data that the first batch shows.

    Args:
        images: (B, C, R, R) in [-1, 1].
        training_images: number of training images.
        say: called with each message.
    """
    if training_images < 100:
        say(f"There are only {training_images} training images: expect the model to memorize them.")
    spatial = float(images.flatten(2).var(dim=2, correction=0).mean())
    between = float(images.var(dim=0, correction=0).mean())
    if spatial < 1e-4:
        say("The images of the first batch are of one colour each: check the column or folder.")
    elif between < 1e-4 and len(images) > 1:
        say("The images of the first batch are all alike. Check the column or folder.")
