"""FID and Inception score, computed by torch-fidelity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..common.checks import check_dtype
from ..common.files import StrPath
from ..common.images import is_image
from ..common.numbers import whole
from ..common.optional import optional
from ..common.values import check_finite

_CHECKSUM = "6726825d"
_WEIGHTS = f"weights-inception-2015-12-05-{_CHECKSUM}.pth"
_RELEASES = "github.com/toshas/torch-fidelity/releases"


class InceptionMetrics(NamedTuple):
    """Lower fid and higher score are better; see :func:`inception_metrics`."""

    fid: float
    score: float
    score_deviation: float


def inception_metrics(
    samples: Tensor,
    real: Tensor,
    *,
    splits: int = 10,
    batch_size: int = 64,
    weights: StrPath | None = None,
) -> InceptionMetrics:
    """FID and Inception score of images, through torch-fidelity.

    FID is :func:`pfgm.metrics.frechet_distance` on 2048 features of Inception v3 (Heusel et al.
    2017, arXiv 1706.08500). The score is exp E KL(p(y|x) ‖ p(y)) for its classes y (Salimans et
    al. 2016, arXiv 1606.03498), as mean and standard deviation over splits of the shuffled samples.
    Published numbers take 50 000 samples; fewer than 2048 leave the covariance singular. The
    images are converted to bytes, and torch-fidelity resizes them.

    The weights of the network (91 MB) are not downloaded. Without them the error says which file
    belongs where. Their file is unpickled, so it can run any code. The eight digits of a checksum
    in the official name are compared, which finds a wrong or damaged file, but no forged one.

    Args:
        samples: (n, C, H, W) with C = 1 (grey) or 3 (RGB), or (n, H, W) grey; uint8, or floating
            values, which are clamped to [-1, 1]; n ≥ 2.
        real: (m, C, H, W) or (m, H, W), likewise. The two sets may differ in image size.
        splits: number of splits for the Inception score, from 1 to n.
        batch_size: images in one call of the network.
        weights: the file of torch-fidelity's weights; None looks in torch's cache.

    Raises:
        ImportError: torch-fidelity is not installed.
        FileNotFoundError: there is no file of weights.
        TypeError: a dtype is neither floating nor uint8.
        ValueError: a shape is not allowed; there are too few images; the devices differ; values
            are NaN or infinity; splits or batch_size is out of range; the checksum differs.

    >>> draw = torch.Generator().manual_seed(0)
    >>> images = torch.rand(20, 3, 32, 32, generator=draw) * 2 - 1
    >>> inception_metrics(images, images, splits=1).fid < 1e-3  # doctest: +SKIP
    True
    """
    whole("splits", splits)
    whole("batch_size", batch_size)
    _check_images("samples", samples)
    _check_images("real", real)
    if splits > len(samples):
        raise ValueError(
            f"splits must be at most {len(samples)}, the number of samples, got {splits}."
        )
    if samples.device != real.device:
        raise ValueError(
            f"samples and real must be on one device, got {samples.device} and {real.device}."
        )
    sets = [_as_bytes("samples", samples), _as_bytes("real", real)]
    fidelity, file = _import_fidelity(), find_inception_weights(weights)
    # torch-fidelity uses the current device; -1 leaves it as it is.
    with torch.cuda.device(samples.device if samples.is_cuda else -1):
        figures = fidelity.calculate_metrics(
            input1=sets[0],
            input2=sets[1],
            isc=True,
            isc_splits=splits,
            fid=True,
            cuda=samples.is_cuda,
            batch_size=batch_size,
            feature_extractor_weights_path=str(file),
            save_cpu_ram=True,  # no worker processes: the images are in memory already
            cache=False,
            verbose=False,
        )
    return InceptionMetrics(
        float(figures[fidelity.KEY_METRIC_FID]),
        float(figures[fidelity.KEY_METRIC_ISC_MEAN]),
        float(figures[fidelity.KEY_METRIC_ISC_STD]),
    )


def find_inception_weights(path: StrPath | None = None) -> Path:
    """The file of the weights that :func:`inception_metrics` needs, with their checksum compared.

    Args:
        path: the file; None looks in torch's cache, where torch-fidelity itself would put it.
    """
    _import_fidelity()
    place = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS)
    if not place.is_file():
        raise FileNotFoundError(
            f"FID needs the weights of Inception v3 (91 MB), and there is no file {place}; copy "
            f"{_WEIGHTS} from {_RELEASES} there."
        )
    with place.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 20):
            digest.update(part)
    checksum = digest.hexdigest()
    if not checksum.startswith(_CHECKSUM):
        raise ValueError(
            f"{place} must be torch-fidelity's file of weights, with a SHA-256 checksum that "
            f"begins with {_CHECKSUM}, got {checksum[:8]}."
        )
    return place


def _import_fidelity() -> Any:
    return optional("torch_fidelity", "FID and Inception score need torch-fidelity", "fid")


class _Bytes(Dataset[Tensor]):
    """A dataset of images (3, H, W) in uint8, the form that torch-fidelity needs."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)


def _check_images(name: str, x: Tensor) -> None:
    check_dtype(name, x)
    if not (x.ndim == 3 or is_image(x.shape[1:])) or x.numel() == 0 or len(x) < 2:
        raise ValueError(
            f"{name} must have shape (n, C, H, W) or (n, H, W), with C = 1 or 3 and n at least 2, "
            f"got {tuple(x.shape)}."
        )


def _as_bytes(name: str, x: Tensor) -> _Bytes:
    check_finite(name, x)
    images = x.detach().unsqueeze(1) if x.ndim == 3 else x.detach()
    if x.dtype != torch.uint8:
        images = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return _Bytes(images.cpu())
