"""Grids are checked pixel by pixel against where each image must lie."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_ddpm.evaluation.grids import make_grid, reconstruction_grid
from latent_ddpm.files import save_animation, save_png


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 7),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    columns=st.none() | st.integers(1, 9),
    scale=st.integers(1, 3),
    padding=st.integers(0, 3),
)
def test_every_image_lies_in_its_cell(count, channels, height, width, columns, scale, padding):
    torch.manual_seed(0)
    levels = torch.randint(0, 256, (count, channels, height, width))
    grid = make_grid(levels / 127.5 - 1, columns=columns, scale=scale, padding=padding)
    assert grid.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cell = (height * scale + padding, width * scale + padding)
    assert grid.size == (columns * cell[1] + padding, rows * cell[0] + padding)
    pixels = np.asarray(grid).reshape(grid.height, grid.width, channels).copy()
    for i, image in enumerate(levels):
        top, left = padding + i // columns * cell[0], padding + i % columns * cell[1]
        for y in range(height * scale):
            for x in range(width * scale):
                assert pixels[top + y, left + x].tolist() == image[:, y // scale, x // scale].tolist()
                pixels[top + y, left + x] = 255
    assert (pixels == 255).all()  # everything else is white


def test_values_are_clamped_and_not_a_number_is_black():
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0, float("nan")]).view(1, 1, 1, 6)
    assert np.asarray(make_grid(images, padding=0)).tolist() == [[0, 0, 128, 255, 255, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_with_or_without_gradient(dtype):
    images = torch.ones(2, 3, 2, 2, dtype=dtype, requires_grad=True)
    assert np.asarray(make_grid(images)).min() == 255


def test_reconstructions_lie_under_their_originals():
    originals = torch.linspace(-1, 0, 5).view(5, 1, 1, 1)
    reconstructions = torch.linspace(0.1, 0.5, 5).view(5, 1, 1, 1)
    pixels = np.asarray(reconstruction_grid(originals, reconstructions, columns=3))
    middle = pixels[2::3, 2::3]  # one pixel per cell with padding 2
    above = ((originals.flatten() / 2 + 0.5) * 255).round().int().tolist()
    below = ((reconstructions.flatten() / 2 + 0.5) * 255).round().int().tolist()
    assert middle.tolist() == [above[:3], below[:3], [*above[3:], 255], [*below[3:], 255]]


def test_reconstruction_grid_is_no_wider_than_it_needs():
    images = torch.zeros(2, 3, 4, 4)
    assert reconstruction_grid(images, images).size == (2 * 6 + 2, 2 * 6 + 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_grid(torch.zeros(3, 4, 4)), r"images must be \(N, C, H, W\)"),
        (lambda: make_grid(torch.zeros(0, 3, 4, 4)), "N > 0"),
        (lambda: make_grid(torch.zeros(1, 2, 4, 4)), "C of 1, 3 or 4"),
        (lambda: make_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "float"),
        (lambda: make_grid(torch.zeros(1, 3, 4, 4), columns=0), "columns"),
        (lambda: make_grid(torch.zeros(1, 3, 4, 4), scale=0), "scale"),
        (lambda: reconstruction_grid(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4)), "differ in shape"),
        (lambda: reconstruction_grid(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4)), "at least 1"),
        (lambda: reconstruction_grid(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), columns=-1), "columns"),
    ],
)
def test_errors_name_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_save_png_makes_parents_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "image.png"
    for level in (10, 20):
        save_png(Image.new("L", (3, 2), level), path)
        assert np.asarray(Image.open(path)).tolist() == [[level] * 3] * 2
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]


def test_save_png_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    save_png(Image.new("L", (3, 2), 10), path)

    def break_off(self, file, format=None):
        with open(file, "wb") as out:
            out.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("L", (3, 2), 20), path)
    monkeypatch.undo()
    assert np.asarray(Image.open(path)).max() == 10
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_animation_holds_every_frame(tmp_path, ending):
    path = tmp_path / "new" / f"film.{ending}"
    levels = [0, 128, 255]
    save_animation([Image.new("L", (5, 4), level) for level in levels], path, milliseconds=250)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (3, (5, 4), 0)
        for i, level in enumerate(levels):
            animation.seek(i)
            assert (np.asarray(animation.convert("L")) == level).all() and animation.info["duration"] == 250
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_animation_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .webp or .gif, got film.mp4"):
        save_animation([Image.new("L", (5, 4))], tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []
