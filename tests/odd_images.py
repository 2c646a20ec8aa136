"""A folder of images with one of everything that people's folders have, for the tests of the inspection."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

BAD = ("cats/broken.jpg", "dogs/void.png")


def picture(k: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A colourful picture that only its number determines."""
    coarse = np.random.default_rng(k).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def plain_folder(root: Path, count: int = 24) -> Path:
    """A folder that is as it should be: `count` different pictures in two classes."""
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
    for k in range(count):
        picture(k).save(root / ("dogs" if k % 2 else "cats") / f"{k:02d}.png")
    return root


def odd_folder(root: Path) -> Path:
    """The same, with copies (of each kind one), damaged files (BAD) and odd images."""
    plain_folder(root)
    (root / "cats" / "same-file.png").write_bytes((root / "cats" / "00.png").read_bytes())
    picture(2).save(root / "dogs" / "same-pixels.bmp")
    picture(3).resize((80, 80), Image.Resampling.LANCZOS).save(root / "dogs" / "near.jpg", quality=80)
    picture(4).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "dogs" / "mirrored.png")
    Image.new("RGB", (40, 40), (9, 9, 200)).save(root / "cats" / "flat.png")
    picture(50, (300, 40)).save(root / "cats" / "long.png")
    picture(51).convert("L").save(root / "cats" / "gray.png")
    transparent = picture(52)
    transparent.putalpha(99)
    transparent.save(root / "cats" / "transparent.png")
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    picture(53, (60, 40)).save(root / "cats" / "rotated.jpg", exif=exif, quality=95)
    picture(54).save(root / "cats" / "animated.gif", save_all=True, append_images=[picture(55)])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 3000, (40, 40)).astype(np.uint16)).save(root / "dogs" / "dark.png")
    Image.fromarray(rng.random((40, 40)).astype(np.float32)).save(root / "dogs" / "float.tiff")
    picture(56, (10, 10)).save(root / "dogs" / "small.png")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(57).save(root / "cats" / "profile.png", icc_profile=srgb)
    picture(58).save(root / "cats" / "bad-profile.jpg", icc_profile=b"nonsense", quality=95)
    (root / "cats" / "broken.jpg").write_bytes((root / "cats" / "rotated.jpg").read_bytes()[:300])
    (root / "dogs" / "void.png").write_bytes(b"")
    return root
