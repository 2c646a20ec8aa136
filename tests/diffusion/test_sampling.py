"""latent_ddpm.diffusion.sampling: an image depends on seed and number only. (Schedulers and loading:
test_sample_script.py; several processes: test_evaluate_pipeline.py.)"""

import pytest
import torch
from small_pipeline import save_pipeline

from latent_ddpm.data.images import to_uint8
from latent_ddpm.diffusion import sampling
from latent_ddpm.diffusion.sampling import draw_images, draw_shared, image_shape, load_pipeline, with_scheduler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("run") / "pipeline")


@pytest.fixture
def pipe(folder):
    pipe = load_pipeline(str(folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = with_scheduler(pipe.scheduler, "euler-a")  # draws its own noise
    return pipe


def test_shared_drawing_is_drawing_the_blocks_in_order(pipe):
    together = draw_shared(pipe, 3, 8, 3, 2)
    blocks = [draw_images(pipe, 3, numbers, 2) for numbers in torch.arange(8).split(3)]
    assert together.dtype == torch.uint8 and together.shape == (8, *image_shape(pipe)) == (8, 1, 16, 16)
    assert torch.equal(together, to_uint8(torch.cat(blocks) * 2 - 1))
    assert len(together.flatten(1).unique(dim=0)) == 8
    one_by_one = draw_shared(pipe, 3, 3, 1, 2)
    assert (one_by_one.int() - together[:3].int()).abs().max() <= 1
    assert (draw_shared(pipe, 4, 3, 1, 2).int() - one_by_one.int()).abs().max() > 3


def test_a_cpu_draws_with_one_thread(pipe, monkeypatch):
    """The number of threads changes the order of a sum."""
    seen, before = [], torch.get_num_threads()
    draw = sampling.draw_images

    def noting(*arguments):
        seen.append(torch.get_num_threads())
        return draw(*arguments)

    monkeypatch.setattr(sampling, "draw_images", noting)
    try:
        torch.set_num_threads(2)
        draw_shared(pipe, 0, 2, 2, 1)
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
