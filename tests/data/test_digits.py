"""The handwritten digits of scikit-learn."""

import sys

import numpy as np
import pytest
import torch

from pfgm import data


def test_digits_match_scikit_learn_one_by_one() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    levels, labels = datasets.load_digits(return_X_y=True)
    digits = data.digits()
    assert digits.train.dtype == digits.held_out.dtype == torch.float32
    assert digits.train_labels.dtype == digits.held_out_labels.dtype == torch.int64
    parts = {
        False: (iter(digits.train), iter(digits.train_labels)),
        True: (iter(digits.held_out), iter(digits.held_out_labels)),
    }
    for i, (image, label) in enumerate(zip(levels, labels, strict=True)):
        images_of_part, labels_of_part = parts[i % 9 in (4, 8)]
        expected = image.reshape(1, 8, 8) / 8 - 1
        np.testing.assert_array_equal(next(images_of_part).numpy(), expected)
        assert next(labels_of_part) == label
    assert all(next(left, None) is None for part in parts.values() for left in part)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*pip install '\.\[demo\]'"):
        data.digits()
