"""Image grids: samples, and originals over their reconstructions."""

import math

import torch
from PIL import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _to_pixels(images: torch.Tensor, name: str) -> torch.Tensor:
    """float (N, C, H, W) in [-1, 1] to uint8 of the same shape on the CPU; not-a-number becomes 0."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in _MODES:
        raise ValueError(f"{name} must be (N, C, H, W) with N > 0 and C of 1, 3 or 4, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be float in [-1, 1], got {images.dtype}")
    images = images.detach().cpu().float().nan_to_num(nan=-1.0).clamp(-1, 1)
    return ((images / 2 + 0.5) * 255).round().to(torch.uint8)


def make_grid(images: torch.Tensor, columns: int | None = None, scale: int = 1, padding: int = 2) -> Image.Image:
    """Arrange images row by row on white.

    Args:
        images: float (N, C, H, W), any float dtype and device, values in [-1, 1] (others are clamped), C of 1
            (grayscale), 3 (RGB) or 4 (RGBA).
        columns: images per row; by default the grid is about square.
        scale: whole-number nearest-neighbour enlargement, for images too small to see.
        padding: white pixels between and around the images, after enlargement.

    Returns:
        A PIL image of mode L, RGB or RGBA, rows * (H * scale + padding) + padding high and likewise wide.

    Raises:
        ValueError: images of another shape or dtype; columns or scale below 1; padding below 0.
    """
    if scale < 1 or padding < 0 or (columns is not None and columns < 1):
        raise ValueError(f"columns {columns} and scale {scale} must be at least 1, padding {padding} at least 0")
    pixels = _to_pixels(images, "images")
    pixels = pixels.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    canvas = torch.full(shape, 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top = padding + i // columns * (height + padding)
        left = padding + i % columns * (width + padding)
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def reconstruction_grid(originals: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> Image.Image:
    """Alternate rows of originals and, under them, their reconstructions.

    Args:
        originals: float (N, C, H, W) in [-1, 1], C of 1, 3 or 4.
        reconstructions: likewise, of the same shape.
        columns: images per row; fewer when N is smaller.

    Returns:
        A PIL image as `make_grid` makes it, with 2 * ceil(N / columns) rows.

    Raises:
        ValueError: the shapes differ, there are no images, columns is below 1, or as in `make_grid`.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} differ in shape"
        )
    if columns < 1 or len(originals) == 0:
        raise ValueError(f"columns {columns} and the number of images {len(originals)} must be at least 1")
    columns = min(columns, len(originals))
    rows = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            row = images[start : start + columns].detach().cpu().float()
            rows += [row, row.new_ones(columns - len(row), *row.shape[1:])]  # white fills a short last row
    return make_grid(torch.cat(rows), columns=columns)
