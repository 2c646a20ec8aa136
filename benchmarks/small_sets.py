"""Make the small sets on which recipes are chosen: parquet files that the training scripts read.

    npm pack emoji-datasource-google
    python benchmarks/small_sets.py --out outputs/sets --icons emoji-datasource-google-16.0.0.tgz --cifar10 FOLDER

Writes OUT/NAME/train.parquet for each set:

    cifar10       CIFAR-10's 50,000 training images (--cifar10, a folder with its train.parquet)
    gray          10,000 of them in gray
    automobiles   the 5,000 of one class
    icons         1,900 emoji at 64 pixels, on white, without the variants of skin colour (--icons, the npm package
                  emoji-datasource-google; images of Google's Noto Emoji, Apache 2.0)
    patches       5,700 overlapping patches of 64 pixels from seven photographs inside scikit-image and scikit-learn

The sixth set, digits, needs no file: it is `embedded:mnist`. Sets whose source is not given are left out.
"""

import argparse
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

SKIN_COLOURS = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")  # code points in the names of files
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")  # of scikit-image
MORE_PHOTOS = ("china.jpg", "flower.jpg")  # of scikit-learn
PATCH, STRIDE = 64, 16  # pixels
AUTOMOBILE = 1  # CIFAR-10's label
GRAY_IMAGES = 10_000


def icons(archive: Path) -> Iterator[Image.Image]:
    """The 64-pixel emoji of the npm package, on white."""
    with tarfile.open(archive) as package:
        members = [member for member in package.getmembers() if "/img/google/64/" in member.name]
        for member in sorted(members, key=lambda member: member.name):
            if not any(colour in member.name.lower() for colour in SKIN_COLOURS):
                image = Image.open(io.BytesIO(package.extractfile(member).read())).convert("RGBA")
                yield Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def patches() -> Iterator[Image.Image]:
    """Patches of the photographs, row by row."""
    import skimage
    import sklearn.datasets

    first, second = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
    for path in [*(first / name for name in PHOTOS), *(second / name for name in MORE_PHOTOS)]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for top in range(0, pixels.shape[0] - PATCH + 1, STRIDE):
            for left in range(0, pixels.shape[1] - PATCH + 1, STRIDE):
                yield Image.fromarray(pixels[top : top + PATCH, left : left + PATCH])


def of_cifar10(folder: Path) -> dict[str, datasets.Dataset]:
    """CIFAR-10 and the sets made from it."""
    everything = datasets.Dataset.from_parquet(str(folder / "train.parquet")).select_columns(["image", "label"])
    labels = np.array(everything["label"])
    chosen = np.sort(np.random.default_rng(0).permutation(len(everything))[:GRAY_IMAGES])
    gray = everything.select(chosen).select_columns(["image"])
    return {
        "cifar10": everything,
        "gray": datasets.Dataset.from_dict(
            {"image": [image.convert("L") for image in gray["image"]]}, datasets.Features({"image": datasets.Image()})
        ),
        "automobiles": everything.select(np.flatnonzero(labels == AUTOMOBILE)).select_columns(["image"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--cifar10", type=Path, help="folder that holds CIFAR-10's train.parquet")
    parser.add_argument("--icons", type=Path, help="the .tgz of the npm package emoji-datasource-google")
    options = parser.parse_args()
    made = of_cifar10(options.cifar10) if options.cifar10 else {}
    images = {"patches": list(patches())} | ({"icons": list(icons(options.icons))} if options.icons else {})
    made |= {
        name: datasets.Dataset.from_dict({"image": found}, datasets.Features({"image": datasets.Image()}))
        for name, found in images.items()
    }
    for name, dataset in made.items():
        path = options.out / name / "train.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(str(path))
        print(f"{path}: {len(dataset)} images")


if __name__ == "__main__":
    main()
