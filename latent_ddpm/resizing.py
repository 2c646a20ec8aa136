"""Which library resizes images: PyTorch's Lanczos filter is several times as fast as Pillow's, but rounds otherwise."""

import torch

from latent_ddpm.errors import UserError

PYTORCH_RESIZES = hasattr(torch.ops.aten, "_upsample_lanczos2d_aa")  # from PyTorch 2.12 on


def resizer(wanted: str | None) -> str:
    """The library that resizes, "pytorch" or "pillow": the wanted one, or by default the faster one that can do it.

    Raises:
        UserError: PyTorch is wanted but too old.
    """
    if wanted == "pytorch" and not PYTORCH_RESIZES:
        raise UserError(
            f"image_resize pytorch needs PyTorch 2.12 or later, this is {torch.__version__}. Update PyTorch, or start "
            "a new run with image_resize pillow."
        )
    return wanted or ("pytorch" if PYTORCH_RESIZES else "pillow")
