"""``pfgm features``: trains the classifier in whose features ``pfgm evaluate`` judges samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.devices import usable_device
from ..common.files import output_folder
from ..common.messages import print_result
from ..common.numbers import check_seed
from ..data import Data, to_unit
from ..data.opening import open as open_data
from ..metrics import save_classifier, train_classifier
from .options import Output, Progress


@dataclass
class Features:
    """Train a small classifier of labelled images, for the features of pfgm evaluate."""

    out: Output
    """The .safetensors file of the classifier."""
    data: str
    """Images with labels: avatars, digits, fashion-mnist, cifar10 or a path, as for train."""
    epochs: int | None = None
    """Passes over the training images. By default about 3000 batches of 64, in 3 to 20 passes."""
    seed: int = 0
    """Seed of the classifier's weights, and of the order of images."""
    device: str = "auto"
    """auto: cuda if there is a GPU, else cpu."""
    progress: Progress = True

    def run(self) -> None:
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out must end in .safetensors, got {self.out}.")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}.")
        check_seed(self.seed)
        device = usable_device(self.device)
        data = open_data(self.data, progress=self.progress)
        if data.labels is None or len(data.samples.shape) != 4:
            raise ValueError(f"data must be images with labels, got {self.data}.")
        with output_folder(self.out.parent):
            print_result(self._train(data, device))

    def _train(self, data: Data, device: torch.device) -> str:
        """Trains and writes the classifier; returns the line that tells of it."""
        assert data.labels is not None
        classifier = train_classifier(
            to_unit(data.samples[:]),
            data.labels,
            epochs=self.epochs,
            seed=self.seed,
            device=device,
            progress=self.progress,
        )
        facts: dict[str, str | float] = {"data": self.data}
        shown = str(self.out)
        if data.held_out is not None and data.held_out.labels is not None:
            accuracy = classifier.accuracy(to_unit(data.held_out.samples[:]), data.held_out.labels)
            facts["accuracy"] = accuracy
            shown += f": right on {accuracy:.1%} of the held-out images".replace("%", " %")
        save_classifier(self.out, classifier, **facts)
        return shown
