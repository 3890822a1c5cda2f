"""The function that opens tensors, arrays, files, folders of images or datasets as rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..common.files import StrPath
from .arrays import from_numpy, open_array, open_mapped
from .images import load_images
from .rows import InMemory, Source, check_samples
from .table_files import is_table_file
from .tables import is_frame, is_series, load_table
from .torch_datasets import load_dataset

Samples = Tensor | np.ndarray[Any, Any] | StrPath | Dataset[Any] | DataLoader[Any] | Source
"""What :func:`open_source` opens, beside DataFrames of pandas."""


def open_source(source: Samples, *, progress: bool = False) -> Source:
    """Opens all that :class:`pfgm.ReferenceSet` takes.

    Nothing is unpickled, and values are not checked. The memory of tensors and arrays is shared
    where torch can share it. Files and memory maps are read in place where possible
    (:func:`open_array`, :func:`open_mapped`). Images, tables and datasets are loaded. A source is
    returned as it is.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/images.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    ...     source = open_source(f"{folder}/images.npy")
    >>> source.take(torch.tensor([5, 0]))
    tensor([[10., 11.],
            [ 0.,  1.]])
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, Tensor):
        return InMemory(source)
    if isinstance(source, np.memmap):
        return open_mapped(source)
    if isinstance(source, np.ndarray):
        return InMemory(from_numpy(source, "data"))
    if is_frame(source):
        return InMemory(load_table(source))
    if is_series(source):
        raise TypeError(
            "data must be an array or a DataFrame, got a Series of pandas; use series.to_numpy()."
        )
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if is_table_file(path):
            raise ValueError(
                "data must not be the file of a table, whose columns training standardises, got "
                f"{path}; "
                'take pfgm.datasets.open_data(path, label_column=""), whose rows are .train and '
                "whose columns .table, or pandas.read_csv(path) for the numbers as they are."
            )
        if path.is_dir() or (path.suffix == ".zip" and path.is_file()):
            return InMemory(*load_images(path, progress=progress))
        return open_array(path)
    numbered = hasattr(type(source), "__getitem__") and not isinstance(source, Mapping)
    if numbered or isinstance(source, DataLoader):
        rows, labels = load_dataset(source, progress=progress)
        check_samples(rows.shape, "data")
        return InMemory(rows, labels)
    raise TypeError(
        "data must be a tensor, a NumPy array, a DataFrame, the path of a file or a folder of "
        "images, or a dataset with __len__ and __getitem__ or its DataLoader, got "
        f"{type(source).__name__}."
    )
