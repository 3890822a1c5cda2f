"""Tables: read or refused, encoded and decoded, kept as data."""

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import characters, lists, one_of, sampled_from, text

import pfgm
from pfgm.data.tables import Table

pandas = pytest.importorskip("pandas")

FLATS = """area,rooms,year,flag,"city, town",zip,price
84.8,3,1959,yes,Ulm,007,572648.5
45.0,2,1965,no,Bonn,010,131278.25
60.5,2,2001,yes,Ulm,007,286529
89.3,4,1932,no,Gera,010,194377.1
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_comes_back_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", FLATS)
    table = Table.read(path)
    rows, labels = table.encode(path)
    assert rows.dtype == torch.float32
    assert rows.shape == (4, 9)  # three columns for the cities, one for two texts
    assert labels is None
    torch.testing.assert_close(rows.mean(0), torch.zeros(9), atol=1e-6, rtol=0)
    spreads = rows.var(0, correction=0)
    torch.testing.assert_close(spreads[[0, 1, 2, 3, 7, 8]], torch.ones(6))
    assert spreads[4:7].mean() == pytest.approx(1)
    assert table.decode(rows) == {
        "area": [84.8, 45.0, 60.5, 89.3],
        "rooms": [3, 2, 2, 4],
        "year": [1959, 1965, 2001, 1932],
        "flag": ["yes", "no", "yes", "no"],
        "city, town": ["Ulm", "Bonn", "Ulm", "Gera"],
        "zip": ["007", "010", "007", "010"],
        "price": [572648.5, 131278.25, 286529.0, 194377.1],
    }
    table.write(tmp_path / "again.csv", rows)
    quoted = re.sub(r"\b(yes|no|Ulm|Bonn|Gera|007|010)\b", r'"\1"', FLATS)
    assert (tmp_path / "again.csv").read_text() == quoted.replace("286529\n", "286529.0\n")
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_samples_take_values_that_the_file_could_hold(tmp_path: Path) -> None:
    """Any rows at all: few values, decimals, integers, and the range that was seen."""
    generator = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "few": generator.choice([0.5, 2.0, 7.0], 200),
            "integer": generator.integers(-50, 1000, 200),
            "cents": generator.uniform(-0.1, 0.1, 200).round(2),
            "real": generator.normal(size=200),
            "true": generator.random(200) < 0.3,
            "text": pandas.Categorical(generator.choice(["a", "b", "c"], 200)),
        }
    )
    table = Table.read(frame)
    rows = 5 * torch.randn(3000, table.encode(frame).rows.shape[1])
    sampled = pandas.DataFrame(table.decode(rows))
    assert set(sampled["few"]) == {0.5, 2.0, 7.0}
    for name in ("integer", "cents", "real"):
        assert sampled[name].min() == frame[name].min()
        assert sampled[name].max() == frame[name].max()
    assert sampled["integer"].dtype == np.int64
    assert (sampled["cents"].round(2) == sampled["cents"]).all()
    assert "-0.0" not in map(str, sampled["cents"])
    assert set(sampled["true"]) == {True, False}
    assert set(sampled["text"]) == {"a", "b", "c"}
    nearest = table.nearest(rows)
    assert table.decode(nearest)["few"] == sampled["few"].tolist()
    torch.testing.assert_close(nearest, table.encode(sampled).rows)
    # The nearest of few values, against a search over all.
    few = rows[:, 0].double() * frame["few"].std(ddof=0) + frame["few"].mean()
    seen = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    assert sampled["few"].tolist() == seen[(few[:, None] - seen).abs().argmin(1)].tolist()


def test_labels_are_texts_or_integers(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,kind,y\n1.5,oak,7\n2.5,elm,3\n3.5,oak,7\n")
    for column, names, expected in (
        ("kind", ("elm", "oak"), [1, 0, 1]),
        ("y", ("3", "7"), [1, 0, 1]),
        (None, ("3", "7"), [1, 0, 1]),
    ):
        data = pfgm.data.open(str(path), label_column=column)
        assert data.labels.tolist() == expected
        assert (data.classes, data.names, data.grey_levels) == (2, names, 0)
        data.table.write(tmp_path / "again.csv", data.samples[:], data.labels)
        again = (tmp_path / "again.csv").read_text()
        assert again == re.sub("(oak|elm)", r'"\1"', path.read_text())
        without = data.table.decode(data.samples[:])
        assert len(without) == 2
    assert pfgm.data.open(str(path), label_column="").labels is None
    zero = written(tmp_path / "z.csv", "a,label\n1,0\n2,1\n")
    assert pfgm.data.open(str(zero)).names == ()
    for wrong, message in (("b", "must be one of a, kind, y"), ("a", "texts or integers up to")):
        with pytest.raises(ValueError, match=message):
            pfgm.data.open(str(path), label_column=wrong)


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("a;b\n1,5;2,5\n2,5;3\n", {"a": [1.5, 2.5], "b": [2.5, 3.0]}),
        ("a\tb\n1.5\tx y\n", {"a": [1.5], "b": ["x y"]}),
        ('"a;b, c",d\n1, x\n', {"a;b, c": [1], "d": ["x"]}),
        ("\ufeffa,b\n1,2\n", {"a": [1], "b": [2]}),
        ("a,b\n1e3,-2e-3\n", {"a": [1000], "b": [-0.002]}),
        (",a\n0,5\n1,6\n", {"a": [5, 6]}),
        (",a\nMazda,5\nFiat,6\n", {"a": [5, 6]}),
        (",a\n3,5\n1,6\n", {"a": [5, 6]}),
        ("Unnamed: 0,a\n3,5\n7,6\n", {"a": [5, 6]}),
        ("\n\na;NA\n1,5;x\n3;y\n", {"a": [1.5, 3.0], "NA": ["x", "y"]}),
        (
            "day,v\n01.02.2020,1.2.3\n12.02.2020,1.2\n",
            {"day": ["01.02.2020", "12.02.2020"], "v": ["1.2.3", "1.2"]},
        ),
        (
            "x,y\n0.30000000000000004,1.5\n1e-300,2\n",
            {"x": [0.30000000000000004, 1e-300], "y": [1.5, 2.0]},
        ),
    ],
)
def test_other_files_are_read(tmp_path: Path, text: str, decoded: dict[str, list[object]]) -> None:
    path = written(tmp_path / "t.csv", text)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = Table.read(path)
    rows, labels = table.encode(path)
    assert table.decode(rows, labels) == decoded
    index = text.startswith((",", "Unnamed"))
    assert ["tells the rows apart" in str(each.message) for each in warned] == [True] * index
    table.write(tmp_path / "again.csv", rows)
    assert Table.read(tmp_path / "again.csv").decode(rows) == decoded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty or damaged"),
        ("1,2\n3,4\n", "must begin with a line of names, such as x,y; got 1, 2 .* Write the names"),
        ("1,1\n3,4\n", "must have different names of columns, got '1' twice"),
        ("1e5,1e6\n1,2\n", "must begin with a line of names"),
        ("1.5,\n1,2\n", "must have a name for each column|must begin with a line of names"),
        ("12.5,Ulm\n3,Bonn\n", "must begin with a line of names"),
        ("Ulm,yes\nBonn,no\nUlm,no\n", "must begin with a line of names, .* got Ulm, yes"),
        ("a,b\n1,2,3\n4,5,6\n", "as many values as there are names.*Expected 2 fields in line 2"),
        ("a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3"),
        ("a,b\n1,5,2,5\n", "Expected 2 fields in line 2"),
        ("a,\n0,5\n", "must have a name for each column"),
        (",a\n1,5\n1,6\n", "a name for each column, got 'Unnamed: 0'; name it, or leave it out wi"),
        (",Unnamed: 1,a\n0,0,5\n1,1,6\n", "for each column, got 'Unnamed: 1'; name it, or leave"),
        ("NA,5,x\n3,6,y\n", "must begin with a line of names"),
        ("a|b\n1|x\n2|y\n", "columns between commas, semicolons or tabs, got .* column 'a|b'"),
        (
            "a,b\n1,\n2,\n",
            "must have values in each column, got none in 'b'; leave it out with --drop-columns b",
        ),
        ("a\n" + "".join(f"{i}\n" for i in range(30)) + "-\n", "got numbers and '-' in column 'a'"),
        ("label,y,a\n1,2,3\n", "must have one column of labels, got label, y; name it with"),
        ("a,b\n1,2\n3,\n,\n4,5\n", r"got none in 2 rows \(2, 3, .*\) in the columns a, b; fill"),
        ("a,label\n1,0\n2,\n", r"got none in 1 rows \(2, .*\) in the columns label"),
        ("a,b\n1,inf\n", "column 'b' of .* must hold numbers between -1e150 and .* got inf"),
        (
            "a,b\n1,12345678901234567890\n",
            r"integers up to 2\^53, got 12345678901234567.* column 'b'",
        ),
        ("a;b\n1.234;2,5\n1,2;3\n", "write all numbers like 1234.5, .* got '1.234' in column 'a'"),
        ('a,b\n"1,234",2\n5,3\n', "write all numbers like 1234.5, .* got '1,234'"),
        ("a\n1\u202f234\n56\n", "write all numbers like 1234.5, .* got .*202f234'"),
        (
            "a,b\n" + "".join(f"t{i},1\n" for i in range(101)),
            "at most 100 different texts, got 101",
        ),
        ("a,b\n", "must have rows and columns, got 0 × 2"),
        ("label\n1\n", r" must have shape \(n, \*S\), n samples of shape S.*got \(1, 0\)\."),
        ("a\0b\n1\n", "empty or damaged"),
        ("a\n" + "1\n" * 70_000 + "\0\n", "empty or damaged .*not text"),
        ("a\n1\n\n2\n", r"got none in 1 rows \(2, counted from 1\) in the columns a; fill"),
        ('"a,b\n1,2\n', "empty or damaged"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table.read(written(tmp_path / "t.csv", text))


def test_a_table_is_opened_before_it_is_data(tmp_path, refused) -> None:
    """As its columns are standardised, and samples decoded with what was learned of them."""
    path = written(tmp_path / "t.csv", "x,y\n1,2\n3,5\n4,5\n")
    frame = pandas.read_csv(path)
    for source, call in ((path, pfgm.ReferenceSet), (frame, pfgm.PoissonFlow.from_data)):
        message = "data must not be a table, … give what pfgm.data.open makes of it, …"
        refused(lambda call=call, source=source: call(source), message)
    of_file, of_frame = pfgm.data.open(path), pfgm.data.open(frame, label_column="")
    assert of_file.labels.tolist() == [0, 1, 1]
    assert (of_file.samples.shape, of_frame.samples.shape) == ((3, 1), (3, 2))
    references = pfgm.ReferenceSet(of_frame)
    assert references.flipped().table is of_frame.table
    assert of_frame.table.decode(references[:]) == {"x": [1, 3, 4], "y": [2, 5, 5]}


TEXTS = [
    "NA",
    "None",
    "",
    "null",
    "nan",
    "  a",
    "a\rb",
    'b"',
    "c;d",
    "e,f",
    "g\n",
    "h\r\n",
    "7",
    "é",
]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@given(texts=lists(one_of(sampled_from(TEXTS), text(characters(codec="utf-8"))), min_size=1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_is_written_and_read_unchanged(
    tmp_path_factory, separator: str, texts: list[str]
) -> None:
    texts = [each.replace("\0", "").replace("\ufdd0", "") for each in texts]
    frame = pandas.DataFrame({"text": texts, " n, 1": np.arange(len(texts)) / 2, "label": texts})
    frame["text"] = frame["text"].astype(object)
    decimal = "." if separator == "," else ","
    table = dataclasses.replace(Table.read(frame), separator=separator, decimal=decimal)
    rows, labels = table.encode(frame)
    path = tmp_path_factory.mktemp("texts") / "t.csv"
    table.write(path, rows, labels)
    again = table.encode(path)
    assert table.decode(*again) == table.decode(rows, labels) == frame.to_dict("list")
    assert torch.equal(again.rows, rows)


def test_only_cells_without_quotes_are_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", 'a,b\n1,""\n2,"NA"\n3, x\n4,"  y"\n')
    assert Table.read(path).decode(Table.read(path).encode(path).rows)["b"] == [
        "",
        "NA",
        "x",
        "  y",
    ]
    for cell in ("", "NA", " NA", "None"):
        with pytest.raises(ValueError, match=r"got none in 1 rows \(2, .*in the columns b;"):
            Table.read(written(path, f'a,b\n1,x\n2,{cell}\n3,"y"\n'))
    for number in ("", "NA"):
        with pytest.raises(ValueError, match=r"got none in 1 rows \(2, .*in the columns a;"):
            Table.read(written(path, f"a\n1\n{number}\n3\n"))


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("mark", [".", ","])
def test_numbers_that_may_be_thousands_are_decimal_numbers_with_one_warning(
    tmp_path: Path, separator: str, mark: str, refused
) -> None:
    def lines(*rows: tuple[str, ...]) -> Path:
        text = "".join(separator.join(row) + "\n" for row in rows).replace(".", mark)
        return written(tmp_path / "t.csv", text)

    path = lines(("a", "b"), ("1.234", "5.678"), ("12", "-999.125"))
    with pytest.warns(UserWarning, match="three digits after the mark in column 'a'") as warned:
        table = Table.read(path)
    assert len(warned) == 1
    assert table.columns[0].values == (1.234, 12.0)
    sure = [("0.234", "7"), ("1.234", "1500"), ("1.234", "7.5"), ("1234.567", "8")]
    for first, second in sure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Table.read(lines(("a", "b"), (first, "1"), (second, "2"))).columns[0].values
    other = {".": "3,5", ",": "3.5"}[mark]
    for second in (other, f"1{mark}234{mark}567"):
        text = f"a{separator}b\n1{mark}200{separator}{second}\n2{separator}7\n"
        other_path = written(tmp_path / "t.csv", text)
        refused(lambda path=other_path: Table.read(path), "…must write all numbers like 1234.5, …")


def test_all_problems_come_in_one_message_with_what_cures_them(tmp_path: Path) -> None:
    rows = [f"name {i},{i or ''},{'x' if i == 5 else i},{10**17 + i},,{i % 3}" for i in range(200)]
    path = written(tmp_path / "t.csv", "\n".join(["a b,c,d,e,,f", *rows]) + "\n")
    with pytest.raises(ValueError, match=r"t\.csv has 5 problems: it must ") as refusal:
        Table.read(path)
    message = str(refusal.value)
    for part in (
        "got numbers and 'x' in column 'd'",
        "integers up to 2^53, got 1000000000000001",
        "a name for each column, got 'Unnamed: 4'",
        "got none in 1 rows (1, counted from 1) in the columns c;",
        "got 200 (another one in each row), such as 'name 0', ",
    ):
        assert part in message
    assert message.endswith("Together: --drop-missing --drop-columns d e 'Unnamed: 4' 'a b'")
    dropped = ["d", "e", "Unnamed: 4", "a b"]
    table = Table.read(path, drop_missing=True, drop_columns=dropped)
    assert [column.name for column in table.columns] == ["c", "f"]
    again = Table.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    assert again.encode(path, drop_missing=True).rows.shape == (199, 2)  # they stay left out
    with pytest.raises(ValueError, match=r"drop_columns must be among the columns a b, .*got 'g'"):
        Table.read(path, drop_columns=["g"])
    for wrong in ("a b", [1]):
        with pytest.raises(TypeError, match="drop_columns must be a list of names of columns"):
            Table.read(path, drop_columns=wrong)


def test_columns_that_a_table_leaves_out_may_be_missing_elsewhere(tmp_path: Path) -> None:
    """As in the samples of a network, which are then compared with the data."""
    path = written(tmp_path / "t.csv", "id,a,b\nx,1.5,2\ny,2.5,4\n")
    data = pfgm.data.open(str(path), drop_columns=["id"])
    table = Table.from_dict(json.loads(json.dumps(data.table.to_dict())))
    table.write(tmp_path / "samples.csv", data.samples[:])
    for source in (path, tmp_path / "samples.csv", pandas.read_csv(tmp_path / "samples.csv")):
        assert torch.equal(table.encode(source).rows, data.samples[:])
    more = written(tmp_path / "more.csv", "a,b,note\n1.5,2,p\n2.5,4,q\n")
    with pytest.raises(ValueError, match="must have the columns a, b, got 'note' too"):
        pfgm.data.open(str(more), table=table)
    again = pfgm.data.open(str(more), table=table, drop_columns=["note"])
    assert torch.equal(again.samples[:], data.samples[:])


def test_a_file_without_names_comes_back_without_them(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "1.5,2\n2.5,4\n")
    with pytest.raises(ValueError, match=r"or read it with --no-header \(header=False\)\."):
        Table.read(path)
    table = Table.read(path, header=False)
    assert [column.name for column in table.columns] == ["x0", "x1"]
    table.write(tmp_path / "again.csv", table.encode(path).rows)
    assert (tmp_path / "again.csv").read_text() == path.read_text()
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_other_files_of_tables_are_read_as_a_csv_file_is(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", exc_type=ImportError)  # newer ones need numpy 2
    frame = pandas.DataFrame({"a": [1.5, 2.5, 4.0], "b": ["x", None, "NA"], "label": [0, 1, 1]})
    frame.to_csv(tmp_path / "t.CSV", index=False, quoting=2)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t", quoting=2)
    frame.to_csv(tmp_path / "t.csv.gz", index=False, quoting=2)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.loc[1, "b"] = ""  # pandas writes None in quotes as it writes an empty text
    expected = Table.read(frame).encode(frame).rows
    for name in ("t.CSV", "t.tsv", "t.csv.gz"):
        data = pfgm.data.open(str(tmp_path / name))
        assert torch.equal(data.samples[:], expected)
        assert data.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"got none in 1 rows \(2, .*in the columns b;"):
        pfgm.data.open(str(tmp_path / "t.parquet"))
    data = pfgm.data.open(str(tmp_path / "t.parquet"), drop_missing=True)
    assert data.table.decode(data.samples[:])["b"] == ["x", "NA"]
    for name in ("t.csv.gz", "t.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name} must be a "):
            pfgm.data.open(str(tmp_path / name))


@pytest.mark.parametrize("name", ["number", "text", "later", "real"])
def test_a_first_column_that_only_names_the_rows_is_named(tmp_path: Path, name: str) -> None:
    frame = pandas.DataFrame({"real": np.arange(30) ** 2 / 7.0, "number": range(7, 37)})
    frame["text"] = [f"t{i}" for i in range(30)]
    frame["later"] = frame["number"]
    first = [name, *(each for each in frame if each != name)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Table.read(frame[first])
    assert len(warned) == (name != "real")
    for each in warned:
        assert f"column {name!r}; if it only numbers or names the rows, leave it" in str(each)


def test_the_separator_is_that_of_two_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", '"Temp, C";"Druck, hPa"\n1,5;2,5\n3;4\n')
    assert [column.name for column in Table.read(path).columns] == ["Temp, C", "Druck, hPa"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_and_pipes_are_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,city\n1,Köln\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"must be text in UTF-8, got .* save it as UTF-8\."):
        Table.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"t\.csv does not exist\."):
        Table.read(path)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="must be a file, not a folder, pipe"):
        Table.read(path)


@pytest.mark.parametrize("scale", [1e-300, 1e-50, 1e-3, 1e50])
def test_numbers_of_any_size_keep_seven_digits(scale: float) -> None:
    """Beside an offset as well, such as that of a date in days."""
    for offset in (0.0, 2.5e6):
        values = offset * scale + scale * np.random.default_rng(0).normal(size=50)
        frame = pandas.DataFrame({"a": values})
        table = Table.read(frame)
        rows = table.encode(frame).rows
        assert float(rows.std(correction=0)) == pytest.approx(1)
        assert np.abs(np.array(table.decode(rows)["a"]) - values).max() < 5e-7 * scale


def test_rows_with_missing_values_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b,y\n1,x,0\n,y,0\n3,,1\n4,x,\n5,z,1\n")
    data = pfgm.data.open(str(path), drop_missing=True)
    assert data.table.decode(data.samples[:], data.labels) == {
        "a": [1, 5],
        "b": ["x", "z"],
        "y": [0, 1],
    }
    with pytest.raises(ValueError, match="must have rows without missing values"):
        Table.read(written(path, "a,b\n1,\n,2\n"), drop_missing=True)


def test_another_file_is_encoded_by_name_or_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,city,y\n1.5,Ulm,0\n2.5,Bonn,1\n")
    table = Table.read(path)
    swapped = pandas.DataFrame({"city": ["Bonn"], "a": [9.5]})
    rows, labels = table.encode(swapped)
    assert labels is None
    assert torch.equal(rows[:, 1], table.encode(path).rows[1:, 1])
    assert float(rows[0, 0]) == pytest.approx((9.5 - 2.0) / 0.5)
    for frame, message in (
        (swapped.assign(b=1.0), "must have the columns a, city, got 'b' too"),
        (swapped[["a"]], "must have a column 'city', got a"),
        (swapped.assign(city="Gera"), "'city' of the table must hold values that were seen"),
        (swapped.assign(a="x"), "column 'a' of the table must hold numbers, got texts"),
        (swapped.assign(y=5), "must have labels among 0, 1 in column 'y', got 5"),
        (
            pandas.DataFrame({"city": [True, "True"]}),
            "must hold True as a text or as a truth value, got both in column 'city'",
        ),
        (swapped.assign(a=pandas.Timestamp(0)), "numbers, texts and truth values, .*or make"),
    ):
        with pytest.raises(ValueError, match=message):
            table.encode(frame)
    with pytest.raises(
        TypeError, match=r"source must be a DataFrame or the path .*got Series; make"
    ):
        table.encode(swapped["a"])
    for wrong in (torch.zeros(2, 3), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"rows must have the shape \(n, 2\)"):
            table.decode(wrong)
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        table.decode(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64))


def test_digits_and_truth_values_stay_texts_in_another_file(tmp_path: Path) -> None:
    """A file may hold only those of the known texts that look like numbers."""
    frame = pandas.DataFrame(
        {
            "code": ["1", "2", "3b"],
            "true": [True, False, True],
            "y": ["7", "8", "9b"],
            "0": [1, 2, 5],
        }
    )
    table = Table.read(frame, label_column="y")
    rows, labels = table.encode(frame)
    table.write(tmp_path / "t.csv", rows[:2], labels[:2])
    again = table.encode(tmp_path / "t.csv")
    torch.testing.assert_close(again.rows, rows[:2])
    assert again.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="column '0' of the table must hold numbers, got texts"):
        table.encode(frame.assign(**{"0": ["007", "1", "2"]}))


def test_plain_numbers_are_the_same_inside_and_outside(tmp_path: Path) -> None:
    """Every digit of float32, and names with commas, quotes and line ends."""
    values = np.random.default_rng(0).normal(size=(50, 3)) * 10.0 ** np.arange(-30, 31, 30)
    rows, names = torch.from_numpy(values).float(), ("a, b", '"c"\nd', "e")
    table = Table.numbers(names)
    table.write(tmp_path / "t.csv", rows, torch.arange(50) % 2)
    data = pfgm.data.open(tmp_path / "t.csv", table=table, label_column="labels")
    assert torch.equal(data.samples[:], rows)
    assert data.labels.tolist() == [0, 1] * 25


def test_a_frame_means_what_its_file_does(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)).round(3)
    frame = pandas.DataFrame(values, columns=["a", "b", "c"], index=range(7, 57)).assign(d="x")
    frame.to_csv(tmp_path / "t.csv", index=False)
    of_file, of_frame = pfgm.data.open(tmp_path / "t.csv"), pfgm.data.open(frame)
    assert torch.equal(of_file.samples[:], of_frame.samples[:])
    assert of_file.table.columns == of_frame.table.columns
    flow = pfgm.PoissonFlow.from_data(of_frame)
    assert flow.spread == pfgm.PoissonFlow.from_data(of_file.samples[:]).spread
    with pytest.raises(
        TypeError, match=r"data must be an array or.*got a Series of pandas; use series"
    ):
        pfgm.ReferenceSet(frame["a"])


@pytest.mark.parametrize(
    "change",
    [
        {"columns": [{"kind": "code", "name": "a"}]},
        {"columns": [{"kind": "numbers", "name": "a", "scale": 0.0}]},
        {"columns": [{"kind": "numbers", "name": "a", "center": float("nan")}]},
        {"columns": [{"kind": "texts", "name": "a", "values": ["x"], "center": [], "scale": 1}]},
        {"columns": [{"kind": "numbers", "name": "a", "eval": "1"}]},
        {"columns": [{"kind": "numbers", "name": "a", "decimals": 10**9}]},
        {"columns": [{"kind": "numbers", "name": "a", "low": 1.0, "high": 0.0}]},
        {"columns": [{"kind": "texts", "name": "a", "values": [[]], "center": [0], "scale": 1}]},
        {
            "columns": [
                {"kind": "texts", "name": "a", "values": ["x"] * 101, "scale": 1, "center": []}
            ]
        },
        {"separator": "x"},
        {"columns": 3},
        {"label": {"name": "y"}},
    ],
)
def test_crafted_tables_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    content = {**Table.numbers(["a"]).to_dict(), **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Table.from_dict(content)
