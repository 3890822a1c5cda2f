"""Map-style datasets and loaders of torch, loaded item by item into one tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from ..common.dtypes import REFERENCES
from ..common.messages import reading_bar
from .arrays import from_numpy
from .images import channel_count, pixels
from .opened import Data
from .rows import InMemory, check_samples

_SAMPLE_KEYS = ("image", "images", "x", "data")
_LABEL_KEYS = ("label", "labels")
_KEPT_DTYPES = REFERENCES.keys() - {torch.float64}


def load_dataset(dataset: Any, *, progress: bool | None = None) -> Data:
    """Loads every item of a map-style dataset once, or of the dataset of a DataLoader.

    Order and batches of a DataLoader are left out, as those of training are drawn by its own seed.

    An item is a sample, a sequence or a mapping. The sample of a sequence is its first value. The
    sample of a mapping is the value of the key image, images, x or data, or else the first value. A
    sample is a tensor, an array or a Pillow image, which becomes uint8 (C, H, W). The label is the
    second value of a sequence, or the value of the key label or labels in a mapping, if it is an
    integer.

    Returns:
        The samples (n, *S), where float64 becomes float32; and the labels (n,) int64, or None.
    """
    if isinstance(dataset, DataLoader):
        dataset = _loaded_by(dataset)
    count = _length(dataset)
    first, label = _split(dataset[0])
    channels = channel_count(first, _name(0)) if _is_image(first) else 0
    row = _row(first, 0, channels)
    rows = torch.empty(count, *row.shape, dtype=row.dtype, device="cpu")
    labels = None if label is None else torch.empty(count, dtype=torch.int64, device="cpu")
    rest = (_split(dataset[index]) for index in range(1, count))
    items = reading_bar(chain([(first, label)], rest), count, progress, desc="dataset", unit="item")
    for index, (value, label) in enumerate(items):
        row = _row(value, index, channels)
        if (row.shape, row.dtype) != (rows.shape[1:], rows.dtype):
            raise ValueError(
                f"{_name(index)} must have the shape and dtype of item 0, {tuple(rows.shape[1:])} "
                f"and {rows.dtype}, got {tuple(row.shape)} and {row.dtype}."
            )
        rows[index] = row
        if (label is None) != (labels is None):
            article, first_has = ("no", "one") if label is None else ("an", "none")
            raise ValueError(
                f"{_name(index)} has {article} integer label, but item 0 has {first_has}; either "
                "all items must have a label, or none."
            )
        if label is not None and labels is not None:
            if label >= 2**63:
                raise ValueError(f"{_name(index)} must have a label below 2^63, got {label}.")
            labels[index] = label
    check_samples(rows.shape, "data")
    return Data(InMemory(rows), labels)


def _loaded_by(loader: DataLoader[Any]) -> Any:
    """The dataset of a DataLoader that takes each item once and leaves it as it is."""
    sampler, batches = loader.sampler, loader.batch_sampler
    custom = None
    if not isinstance(loader.dataset, IterableDataset):
        if not (batches is None or type(batches) is BatchSampler):
            custom = f"batch_sampler, a {type(batches).__name__}"
        elif not (type(sampler) is SequentialSampler or _visits_all(sampler, loader.dataset)):
            custom = f"sampler, a {type(sampler).__name__}"
    if loader.collate_fn not in (default_collate, default_convert):
        custom = "collate_fn"
    if custom is not None:
        raise ValueError(
            f"data must be a DataLoader of all items as they are, got one with its own {custom}; "
            "give a dataset of the samples, such as its own (loader.dataset) or a Subset of it."
        )
    return loader.dataset


def _visits_all(sampler: Any, dataset: Any) -> bool:
    """Whether a sampler shuffles the items and leaves none out."""
    shuffles = type(sampler) is RandomSampler and not sampler.replacement
    return shuffles and sampler.num_samples == len(dataset)


def _length(dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or isinstance(dataset, IterableDataset):
        raise TypeError(
            f"data must have __len__ and __getitem__, got {type(dataset).__name__}, a dataset "
            "without a length or without numbered items; if its items fit in memory, give "
            "list(dataset)."
        )
    count = len(dataset)
    if count == 0:
        raise ValueError("data must have at least one item, got a dataset of 0 items.")
    return count


def _split(item: Any) -> tuple[Any, int | None]:
    """The sample of an item, and its label or None."""
    if isinstance(item, Mapping) and item:
        key = next((key for key in _SAMPLE_KEYS if key in item), next(iter(item)))
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
        return item[key], _as_integer(label)
    if isinstance(item, (tuple, list)) and item:
        return item[0], _as_integer(item[1]) if len(item) > 1 else None
    return item, None


def _as_integer(value: Any) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return None


def _name(index: int) -> str:
    return f"Item {index} of the dataset"


def _is_image(value: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # without Pillow imported there are no Pillow images
    return module is not None and isinstance(value, module.Image)


def _row(value: Any, index: int, channels: int) -> Tensor:
    """The sample as a tensor; an image has at least ``channels`` channels."""
    name = _name(index)
    if _is_image(value):
        # A grey image gets the channels of coloured ones. Colours are never dropped.
        return pixels(value, max(channels, channel_count(value, name)))
    if isinstance(value, np.ndarray):
        value = from_numpy(value, name)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, a NumPy array, a Pillow image, or a sequence or mapping "
            f"that holds one, got {type(value).__name__}; torch.tensor takes lists of numbers."
        )
    row = value.detach().float() if value.dtype == torch.float64 else value.detach()
    if row.dtype not in _KEPT_DTYPES:
        raise TypeError(f"{name} must hold uint8 or floating-point numbers, got {row.dtype}.")
    return row
