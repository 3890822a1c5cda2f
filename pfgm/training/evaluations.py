"""The evaluations within a run: metrics of some samples, and a picture of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import metrics
from ..common.images import is_image
from ..data import Data, to_unit
from ..flows.batched_sampling import draw_prior, sample_in_batches
from ..flows.flow import Flow
from ..plotting.figures import require_matplotlib
from ..references import ReferenceSet
from .run_config import MIN_SAMPLES, RunConfig

_MAX_COMPARED_ROWS = 10_000  # of the data
_SAMPLE_BATCH = 1000
_NEIGHBOURS = 3  # k of precision and recall
_PICTURE_SAMPLES = 100


class Evaluation:
    """Draws samples, compares them with held-out data and draws a picture of some."""

    def __init__(
        self,
        config: RunConfig,
        flow: Flow,
        data: Data,
        folder: Path,
        device: torch.device,
        progress: bool = False,
    ) -> None:
        self._flow, self._folder, self._device = flow, folder, device
        self._count, self._seed = config.samples, config.training.seed
        self._classes, self._names = (data.classes if config.labels else 0), data.names
        self._few_step = config.teacher is not None
        against = ReferenceSet(data.held_out or data)
        rows = torch.arange(len(against), device="cpu")
        if len(rows) < MIN_SAMPLES:
            raise ValueError(
                f"{config.data} must have at least {MIN_SAMPLES} rows to compare samples with, got "
                f"{len(rows)}."
            )
        if len(rows) > _MAX_COMPARED_ROWS:
            generator = torch.Generator().manual_seed(0)
            rows = against.draw(_MAX_COMPARED_ROWS, generator=generator)
        self._rows, self._against, self._table = rows, against, data.table
        self._neighbours: Tensor | None = None  # of the data, found by the first evaluation
        self._progress = progress
        if self._draws_pictures and config.training.evaluates:
            require_matplotlib()

    @property
    def _draws_pictures(self) -> bool:
        return is_image(self._flow.shape)

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        samples = self._samples(network)
        if self._draws_pictures:
            from ..plotting import image_grid
            from ..plotting.images import label_columns

            shown = samples[: max(_PICTURE_SAMPLES, self._classes)]
            columns = label_columns(range(self._classes), self._names, len(shown))
            shown = shown[: len(shown) // (each := columns.get("columns", 1)) * each]  # whole rows
            image_grid(shown, self._folder / f"samples-{step:08d}.png", **columns)
            samples = samples.clamp(-1, 1)
        if self._table is not None:
            samples = self._table.nearest(samples)
        against = to_unit(self._against[self._rows].cpu())
        if self._neighbours is None:
            self._neighbours = metrics.neighbour_distances(
                against, _NEIGHBOURS, progress=self._progress
            )
        precision, recall = metrics.precision_recall(
            samples, against, _NEIGHBOURS, neighbours=self._neighbours
        )
        return {
            "frechet_distance": metrics.frechet_distance(samples, against),
            "precision": precision,
            "recall": recall,
        }

    def _samples(self, network: nn.Module) -> Tensor:
        numbers = torch.arange(self._count, device="cpu")
        return sample_in_batches(
            self._flow,
            network,
            draw_prior(self._flow, self._count, self._seed),
            batch_size=_SAMPLE_BATCH,
            device=self._device,
            labels=numbers % self._classes if self._classes else None,
            solver="consistency" if self._few_step else None,
        )[0]
