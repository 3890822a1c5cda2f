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
from .tables import is_frame, is_series, load_table
from .torch_datasets import load_dataset

Samples = Tensor | np.ndarray[Any, Any] | StrPath | Dataset[Any] | DataLoader[Any] | Source
"""What :func:`open_source` opens, beside DataFrames of pandas."""


def open_source(
    source: Samples,
    *,
    progress: bool = False,
) -> Source:
    """Opens anything that holds samples. Nothing is unpickled, and values are not checked.

    Args:
        source: one of

            - a tensor (n, *S) or a NumPy array, whose memory is shared where torch can share it;
            - a ``numpy.memmap``, whose rows are read from its file. A map that is not C-contiguous
              is copied into memory, and a map of mode "c" counts as an array, because it may
              differ from its file;
            - the path of a ``.npy``, ``.npz`` or ``.safetensors`` file, whose rows are read in
              place. An array is loaded if it is compressed, in Fortran order, in another byte order
              or of a width that references cannot have. Of several arrays in a file,
              :func:`pfgm.data.load_array` tells which one is read;
            - a DataFrame of pandas, or the path of a ``.csv`` file, of numbers, which stay as they
              are: see :func:`pfgm.data.tables.load_table`. :class:`pfgm.data.Table` encodes texts;
            - the path of a folder or a ``.zip`` archive, whose PNG, JPEG, BMP and WebP images are
              decoded: see :func:`pfgm.data.images.load_images`;
            - a dataset with ``__len__`` and ``__getitem__``, or a DataLoader of one, which is
              loaded: see :func:`pfgm.data.torch_datasets.load_dataset`;
            - a source, which is returned as it is.
        progress: show a progress bar while images or a dataset are loaded.

    Returns:
        The rows. float64 becomes float32 if a file or a dataset is loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: images need Pillow or tables pandas, and it is not installed.
        TypeError: the numbers are neither floating nor uint8, or source has another type.
        ValueError: the suffix is not allowed; the file is empty, truncated or damaged; there are
            no numbers, or only (n,) in a file or a dataset; images or items differ in shape or
            dtype.

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
        return InMemory(from_numpy(source, "source"))
    if is_frame(source):
        return InMemory(*load_table(source))
    if is_series(source):
        raise TypeError(
            "source must be an array or a DataFrame, got a Series of pandas; use series.to_numpy()."
        )
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".csv" and path.is_file():
            return InMemory(*load_table(path))
        if path.is_dir() or (path.suffix == ".zip" and path.is_file()):
            return InMemory(*load_images(path, progress=progress))
        return open_array(path)
    numbered = hasattr(source, "__getitem__") and not isinstance(source, Mapping)
    if numbered or isinstance(source, DataLoader):
        rows, labels = load_dataset(source, progress=progress)
        check_samples(rows.shape, "source")
        return InMemory(rows, labels)
    raise TypeError(
        "source must be a tensor, a NumPy array, a DataFrame, the path of a file or a folder of "
        "images, or a dataset with __len__ and __getitem__ or its DataLoader, got "
        f"{type(source).__name__}."
    )
