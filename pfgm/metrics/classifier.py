"""Features in which samples are judged: the hidden layer of a small classifier of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.checks import check_floating, check_sample_shape
from ..common.devices import known_device
from ..common.files import MALFORMED, StrPath
from ..common.messages import progress_bar
from ..common.numbers import check_seed, int_tuple, whole
from ..common.tensor_files import read_tensors, write_tensors
from ..common.tensors import as_int64, evaluating

_FORMAT = 1
_KIND = "Classifier"
_BATCH, _LEARNING_RATE = 64, 2e-3
_ROWS = 512  # images of one evaluation
_MOST = 1 << 16  # channels, pixels, classes or features
_FOLDER = Path(__file__).resolve().parent / "classifiers"

CLASSIFIERS = ("avatars", "digits", "fashion-mnist")
"""The data whose classifiers come with the package. ``pfgm features --data NAME`` trains such; that
of avatars has learned their attributes as well (``python -m benchmarks.avatars.features``)."""


class Classifier(nn.Module):
    """Three convolutions and a hidden layer, whose outputs are the features.

    Args:
        shape: (C, H, W) of an image.
        classes: the number of labels.
        width: the number of features.

    Raises:
        ValueError: an argument is out of range.

    >>> net = Classifier((1, 8, 8), classes=10)
    >>> net.features(torch.zeros(5, 1, 8, 8)).shape, net(torch.zeros(5, 1, 8, 8)).shape
    (torch.Size([5, 32]), torch.Size([5, 10]))
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 32) -> None:
        super().__init__()
        self.shape = int_tuple("shape", shape, _MOST)
        if len(self.shape) != 3:
            raise ValueError(f"shape must be (C, H, W) of images, got {self.shape}.")
        self.classes = whole("classes", classes, 1, _MOST)
        self.width = whole("width", width, 1, _MOST)
        self.convolutions = nn.Sequential(
            nn.Conv2d(self.shape[0], 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(256, self.width)
        self.last = nn.Linear(self.width, self.classes)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, width) of images (B, C, H, W) in [-1, 1].

        Raises:
            TypeError: x is not floating point.
            ValueError: x has another shape.
        """
        check_floating("x", x)
        check_sample_shape(x, self.shape)
        return F.relu(self.hidden(self.convolutions(x.to(self.hidden.weight.dtype))))

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.last(self.features(x))
        return logits

    @torch.no_grad()
    def rows(self, images: Tensor) -> Tensor:
        """The features (n, width) of many images (n, C, H, W), on the device of the classifier."""
        device = self.hidden.weight.device
        with evaluating(self):
            return torch.cat([self.features(part.to(device)) for part in images.split(_ROWS)])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The fraction of images (n, C, H, W) whose label, of (n,), has the largest logit."""
        predicted = self.last(self.rows(images)).argmax(1)
        return float((predicted == labels.to(predicted.device)).float().mean())


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int | None = None,
    decay: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Classifier:
    """A classifier trained by Adam on the cross entropy of batches of 64.

    Args:
        images: (n, C, H, W), floating, in [-1, 1].
        labels: (n,), whole numbers from 0; or (n, classes), bool, the attributes that each image
            has, for which the loss is the binary cross entropy.
        epochs: passes over the images. None is about 3000 batches, in 3 to 20 passes: few, so that
            the classifier does not memorise the images.
        decay: whether the learning rate falls to 0, as a quarter of a cosine.
        seed: of the weights and of the order of images.
        device: where it is trained.
        progress: show a progress bar.

    Raises:
        TypeError: images are not floating point, or labels are neither integers nor attributes.
        ValueError: shapes do not fit, there are no images, a label is negative, or an argument is
            out of range.

    >>> images = torch.tensor([-1.0, 1.0]).repeat(100).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    >>> labels = torch.arange(200) % 2
    >>> train_classifier(images, labels).accuracy(images, labels)
    1.0
    """
    check_floating("images", images)
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must have shape (n, C, H, W), got {tuple(images.shape)}.")
    loss_of: Callable[[Tensor, Tensor], Tensor]
    if labels.dtype == torch.bool and labels.shape[:-1] == (len(images),):
        classes, labels = labels.shape[1], labels.float()
        loss_of = F.binary_cross_entropy_with_logits
    else:
        labels, loss_of = _numbers(labels, len(images)), F.cross_entropy
        classes = int(labels.max()) + 1
    if epochs is None:
        epochs = min(20, max(3, 3000 // math.ceil(len(images) / _BATCH)))
    whole("epochs", epochs)
    check_seed(seed)
    device = known_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[1:], classes)
    net.to(device)
    nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)  # a third faster
    optimiser = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    batches = [
        rows
        for _ in range(epochs)
        for rows in torch.randperm(len(images), generator=order, device=order.device).split(_BATCH)
    ]
    bar = progress_bar(batches, desc="classifier", unit="batch", disable=not progress)
    for step, rows in enumerate(bar):
        if decay:
            optimiser.param_groups[0]["lr"] = _LEARNING_RATE * math.cos(
                0.5 * math.pi * step / len(batches)
            )
        logits = net(images[rows].to(device))
        loss = loss_of(logits, labels[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def _numbers(labels: Tensor, count: int) -> Tensor:
    """The labels as int64."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    labels = as_int64("labels", labels)
    if labels.shape != (count,) or int(labels.min()) < 0:
        raise ValueError(
            f"labels must be {count} integers of at least 0, got shape {tuple(labels.shape)} "
            f"and values from {int(labels.min())}."
        )
    return labels


def save_classifier(path: StrPath, classifier: Classifier, **facts: str | float) -> None:
    """Writes a classifier and facts about it, such as its data, as one safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    config = {"shape": classifier.shape, "classes": classifier.classes, "width": classifier.width}
    description = {**facts, "format": _FORMAT, "kind": _KIND, "config": config}
    write_tensors(path, classifier.state_dict(), description)


def load_classifier(name: StrPath, *, device: torch.device | str = "cpu") -> Classifier:
    """A classifier, in evaluation mode. Nothing in its file is executed.

    Args:
        name: one of :data:`CLASSIFIERS`, which come with the package, or a file of
            :func:`save_classifier`, as ``pfgm features`` writes it.
        device: of the classifier.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds no classifier.

    >>> digits = load_classifier("digits")
    >>> digits.features(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 32])
    """
    path = _FOLDER / f"{name}.safetensors" if name in CLASSIFIERS else Path(name)
    tensors, description = read_tensors(path, _FORMAT, "classifier", "classifier")
    if description.get("kind") != _KIND:
        raise ValueError(
            f"{path} must be a classifier: a file of `pfgm features`, or "
            f"{' or '.join(CLASSIFIERS)}."
        )
    try:
        # On "meta" first: a config that does not fit the tensors allocates nothing.
        with torch.device("meta"):
            net = Classifier(**description["config"])
        net.load_state_dict(tensors, assign=True)
    except MALFORMED as error:
        raise ValueError(f"{path} holds other tensors than the classifier it describes.") from error
    return net.requires_grad_(False).to(known_device(device)).eval()
