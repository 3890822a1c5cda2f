from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from pfgm.data.tables import load_table, round_columns, save_table
from pfgm.datasets import open_data

pandas = pytest.importorskip("pandas")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    """Quoted names, spaces, integers, True and False; the labels leave the other columns."""
    text = '"a, b", n,label,flag\n1.5, 3,oak,True\n-2e3, 4,elm,False\n0.25, 5,oak,True\n'
    data = open_data(str(written(tmp_path / "t.csv", text)))
    rows = data.train[torch.arange(3)]
    assert rows.tolist() == [[1.5, 3, 1], [-2000, 4, 0], [0.25, 5, 1]]
    assert rows.dtype == torch.float32
    assert data.train.labels.tolist() == [1, 0, 1]
    assert (data.classes, data.names, data.levels) == (2, ("elm", "oak"), 0)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Every digit, names with commas, quotes and line ends, and labels by name."""
    values = np.random.default_rng(0).normal(size=(50, 3)) * 10.0 ** np.arange(-30, 31, 30)
    rows, names, path = (
        torch.from_numpy(values).float(),
        ("a, b", '"c"\nd', "e"),
        tmp_path / "t.csv",
    )
    save_table(path, rows, names, ["oak", "elm, old"] * 25)
    read, labels, classes, columns = load_table(path)
    assert torch.equal(read, rows)
    assert labels.tolist() == [1, 0] * 25
    assert (classes, columns) == (("elm, old", "oak"), names)
    save_table(path, rows)
    assert load_table(path)[3] == ("x0", "x1", "x2")
    for wrong in ({"labels": [0]}, {"columns": ["a"]}):
        with pytest.raises(ValueError, match=r"zip|are 1 names; allowed are 3"):
            save_table(path, rows, **wrong)
    assert load_table(path)[3] == ("x0", "x1", "x2")


def test_labels_survive_a_range(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,y\n0,2\n4,0\n")
    data = open_data(str(path), value_range=(0, 4))
    assert data.train[torch.arange(2)].tolist() == [[-1], [1]]
    assert data.train.labels.tolist() == [2, 0]


def test_a_frame_is_taken_where_arrays_are() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    frame = pandas.DataFrame(values, columns=["a", "b", "c"], index=range(7, 57))
    expected = torch.from_numpy(values.astype(np.float32))
    assert torch.equal(load_table(frame)[0], expected)
    assert torch.equal(pfgm.ReferenceSet(frame)[torch.arange(50)], expected)
    flow = pfgm.PoissonFlow.from_data(frame)
    assert flow.shape == (3,)
    assert flow.spread == pfgm.PoissonFlow.from_data(expected).spread
    with pytest.raises(TypeError, match=r"a Series of pandas; allowed is its array, series.to_n"):
        pfgm.ReferenceSet(frame["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, damaged or not a table"),
        ("1,2\n3,4\n", "begins with numbers; allowed is a line of names"),
        ("a,b\n1,x\n", "has object in column 'b'; allowed are numbers, and names in a column"),
        ("a,b\n1,2\n3,\n", "has the value nan in column 'b' of row 1; allowed are finite numbers"),
        ("a,b\n1,inf\n", "has the value inf in column 'b' of row 0"),
        ("a,b\n1,1e39\n", "has the value 1e\\+39 in column 'b' of row 0"),
        ("a,b\n1,2\n1,2,3\n", "is empty, damaged or not a table"),
        ("a,label\n1,0\n2,\n", "has no value in column 'label' of row 1"),
        ("a,label\n1,0\n2,-1\n", "has the label -1 in column 'label'"),
        ("a,label\n1,0.5\n2,1\n", "has float64 in column 'label'; allowed are integers"),
        ("a,b\n", "allowed is"),
        ("label\n1\n", "allowed is"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_table(written(tmp_path / "t.csv", text))


def test_without_pandas_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="Tables need pandas"):
        load_table(written(tmp_path / "t.csv", "a\n1\n"))


def test_columns_are_rounded_to_the_values_seen() -> None:
    """Against a search of the nearest value; columns of more values stay to the bit."""
    generator = torch.Generator().manual_seed(0)
    data = torch.stack(
        [
            torch.randint(2, (300,), generator=generator).double(),
            torch.tensor([-3.0, 0.1, 0.2, 7.0]).double()[torch.arange(300) % 4],
            torch.randn(300, generator=generator, dtype=torch.float64),
        ],
        1,
    )
    samples = 5 * torch.randn(1000, 3, generator=generator, dtype=torch.float64)
    before = samples.clone()
    rounded = round_columns(samples, data)
    for column in (0, 1):
        seen = data[:, column].unique()
        nearest = (samples[:, column, None] - seen).abs().argmin(1)
        assert torch.equal(rounded[:, column], seen[nearest])
    assert torch.equal(rounded[:, 2], samples[:, 2])
    assert torch.equal(samples, before)
    assert torch.equal(round_columns(samples, data, most=1), samples)
    with pytest.raises(ValueError, match=r"samples has shape \(1000, 3\) and data \(300, 2\)"):
        round_columns(samples, data[:, :2])


def test_rounding_brings_back_the_shares_of_a_column() -> None:
    """Samples of a flow are continuous: the Kolmogorov–Smirnov distance of a column of 0 and 1 to
    its data is near the share of a value, and near 0 after rounding."""
    generator = torch.Generator().manual_seed(0)
    ones = (torch.rand(400, generator=generator) < 0.3).float()
    data = torch.stack([ones, torch.randn(400, generator=generator)], 1)
    samples = data[torch.arange(4000) % 400] + 0.1 * torch.randn(4000, 2, generator=generator)

    def distance(column: torch.Tensor) -> float:
        at = torch.cat([column, ones]).unique()
        shares = [torch.searchsorted(x.sort()[0], at, right=True) / len(x) for x in (column, ones)]
        return float((shares[0] - shares[1]).abs().max())

    assert distance(samples[:, 0]) > 0.3
    assert distance(round_columns(samples, data)[:, 0]) < 0.01
