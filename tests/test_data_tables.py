"""Tables with named columns: CSV, TSV and Parquet, what they become, and what is refused."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from program import refused

import genjax.cli
from genjax.data import kept, open_source, rows
from genjax.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
COLUMNS = {
    "age": RNG.integers(20, 80, 60).tolist(),
    "income": RNG.normal(5e4, 2e4, 60).tolist(),
    "kind": [("cat", "dog", "bird")[index % 3] for index in range(60)],
    "name": [f"n{index}" for index in range(60)],
}


def saved(folder, ending="csv", columns=COLUMNS):
    path = folder / f"people.{ending}"
    if ending.lower() == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return str(path)
    tab = ending.lower() == "tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if tab else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "CSV"])
def test_every_format_is_the_same_table(tmp_path, ending):
    source = open_source(saved(tmp_path, ending), label="kind", conditional=True)
    spec = source.spec
    assert (spec.shape, spec.kind, spec.columns) == ((2,), "continuous", ("age", "income"))
    assert spec.class_names == ("bird", "cat", "dog")
    assert "left out, as they are no numbers: name" in "; ".join(source.notes)
    rows = np.concatenate([batch.x for batch in source.load()])
    wanted = np.stack([COLUMNS["age"], COLUMNS["income"]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], wanted[np.lexsort(wanted.T)])
    kind = dict(zip(map(tuple, wanted), COLUMNS["kind"], strict=True))
    for batch in source.load():
        for row, label in zip(batch.x, batch.cond, strict=True):
            assert kind[tuple(row)] == spec.class_names[label]


def test_columns_and_conditions_are_chosen(tmp_path):
    path = saved(tmp_path)
    assert open_source(path, columns=("income",)).spec.columns == ("income",)
    source = open_source(path, condition_columns=("age",), conditional=True)
    assert (source.spec.columns, source.spec.cond_dim) == (("income",), 1)
    with pytest.raises(ConfigError, match=r"no column of .* called 'incme'\. Did you mean income"):
        open_source(path, columns=("incme",))
    with pytest.raises(ConfigError, match="'age' is given twice"):
        open_source(path, columns=("age", "age"))
    with pytest.raises(DataError, match=r"--label NAME.*found age, income, kind, name"):
        open_source(path, conditional=True)
    with pytest.raises(DataError, match=r"'name' has no numbers but string: row 1 is 'n0'"):
        open_source(path, columns=("age", "name"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_missing_values_are_refused_by_row_and_column(tmp_path, ending):
    columns = {"age": [1.5, 2.5, None, 4.5], "size": [1, 2, 3, 4]}
    path = saved(tmp_path, ending, columns)
    with pytest.raises(DataError, match=r"row 3 of column 'age' is missing"):
        open_source(path)
    assert open_source(path, columns=("size",)).spec.shape == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("a,b\n", "no rows"),
        ("a,a\n1,2\n3,4\n5,6\n", "several columns are called 'a'"),
        ("a,b\n1,2\n3\n", "cannot be read as a table"),
        ("1,2\n3,4\n5,6\n", "its first line is numbers"),
        ("a,b\n1,x\n2,y\n3,2\n", "'b' has no numbers but string"),
        ("a,b\n1,nan\n2,3\n3,2\n", "row 1 of column 'b' is"),
        ("a\nx\ny\nz\n", "no column has numbers"),
        ("a,b\n1,inf\n2,3\n3,2\n", "row 1 of column 'b' is inf"),
    ],
)
def test_what_is_no_table(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(str(path), columns=("a", "b") if ",b" in text and "'b'" in message else None)


def test_a_cell_that_is_no_number_does_not_cost_its_column(tmp_path):
    rows = ["height,name", *(f"{row},x{row}" for row in range(50)), "five,x"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match="column 'height' has numbers, but row 51 is 'five'"):
        open_source(str(tmp_path / "t.csv"))


def test_damage_and_absence(tmp_path):
    for ending in ("csv", "parquet"):
        with pytest.raises(DataError, match="there is no such file"):
            open_source(str(tmp_path / f"none.{ending}"))
    whole = Path(saved(tmp_path, "parquet")).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as a table"):
        open_source(str(tmp_path / "cut.parquet"))


@pytest.mark.slow
def test_a_sample_is_a_table_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    small = "--steps 2 --batch-size 8 --hidden 4 --latent-dim 2 --evaluate-every 0"
    command = f"train vae --data people.csv --label kind --conditional {small} --out run"
    genjax.cli.main(command.split())
    assert "columns age, income" in capsys.readouterr().out
    genjax.cli.main(["sample", "run", "--n", "5", "--cond", "dog"])
    with (tmp_path / "run" / "samples" / "sample_n5_seed0_conddog.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["age", "income", "class"]
    assert len(rows) == 5
    assert {row[2] for row in rows} == {"dog"}
    genjax.cli.main(["evaluate", "run", "--n", "4"])
    text = (tmp_path / "people.csv").read_text().splitlines()
    (tmp_path / "people.csv").write_text("\n".join([text[0], *reversed(text[1:])]) + "\n")
    assert "not those that run was trained on" in refused(["evaluate", "run"], capsys)


# --- larger than memory ---------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Every Parquet file is; its groups have a few rows each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def save(columns=COLUMNS):
        monkeypatch.setattr(rows, "LIMIT", 100)
        path = tmp_path / "people.parquet"
        table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return str(path)

    return save


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label": "kind", "conditional": True},
        {"columns": ("income",), "condition_columns": ("age",), "conditional": True},
        {"columns": ("age",), "kind": "discrete"},
    ],
)
def test_a_parquet_file_larger_than_memory_is_the_same_table(tmp_path, monkeypatch, large, options):
    path = large()
    found = open_source(path, **options)
    again = open_source(path, **options)
    monkeypatch.setattr(rows, "LIMIT", 2**29)
    wanted = open_source(path, **options)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert found.notes == wanted.notes
    for own, other, whole in zip(found.load(), again.load(), wanted.load(), strict=True):
        assert isinstance(own.x, rows.Rows)
        assert own.x.dtype == whole.x.dtype
        np.testing.assert_array_equal(own.x, whole.x)
        np.testing.assert_array_equal(other.x, whole.x)
        np.testing.assert_array_equal(own.cond, whole.cond)
    np.testing.assert_allclose(found.spec.shift or (), wanted.spec.shift or (), rtol=1e-12)
    np.testing.assert_allclose(found.spec.scale or (), wanted.spec.scale or (), rtol=1e-12)


def test_missing_values_of_a_large_table_have_their_row_in_the_file(tmp_path, large):
    path = large({"age": [*range(40), None, 41], "size": [*range(41), float("nan")]})
    with pytest.raises(DataError, match=r"row 41 of column 'age' is missing"):
        open_source(path)
    with pytest.raises(DataError, match=r"row 42 of column 'size' is nan"):
        open_source(path, columns=("size",))
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]


def test_a_large_table_that_cannot_be_kept_is_one_message(tmp_path, monkeypatch, large):
    path = large()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in .*XDG_CACHE_HOME=FOLDER"):
        open_source(path)


def test_a_large_table_that_changes_is_told(tmp_path, monkeypatch, large):
    path, stream = large(), kept.stream

    def written_to(where, parts, about):
        first = next(parts)
        Path(path).touch()
        return stream(where, iter([first, *parts]), about)

    monkeypatch.setattr(kept, "stream", written_to)
    with pytest.raises(DataError, match=r"people\.parquet changed while it was being read"):
        open_source(path)


def test_a_class_that_is_not_used_is_said(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,kind\n" + "".join(f"{i},{i * i},{'xy'[i % 2]}\n" for i in range(40)))
    said = "kind is not used: --conditional takes it as the condition"
    assert said in open_source(str(path), label="kind").notes
    assert said not in open_source(str(path), label="kind", conditional=True).notes
    vector = open_source(str(path), columns=("a",), condition_columns=("b",))
    assert "b is not used: --conditional takes it as the condition" in vector.notes


def test_a_missing_label_is_no_class(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{i},{i * i},{['cat', 'dog', ''][i % 3]}" for i in range(40)]
    path.write_text("a,b,kind\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="row 3 of column 'kind' is missing, and 12 more"):
        open_source(str(path), label="kind", conditional=True)


NONE = [{"columns": ()}, {"condition_columns": (), "conditional": True}]


@pytest.mark.parametrize("chosen", NONE)
def test_no_column_is_no_choice(tmp_path, chosen):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * 9)
    with pytest.raises(ConfigError, match="names at least one column"):
        open_source(str(path), **chosen)


# --- what pandas writes beside the columns, and other encodings -----------------------------------


def test_the_row_index_of_pandas_in_csv_is_no_feature(tmp_path):
    """`df.to_csv(path)` writes it first, without a name."""
    path = tmp_path / "t.csv"
    path.write_text(",a,b\n" + "".join(f"{i},{i * i},{i % 7}.5\n" for i in range(40)))
    source = open_source(str(path))
    assert source.spec.columns == ("a", "b")
    assert "left out the row index of pandas: '' (--columns takes it)" in source.notes
    assert open_source(str(path), columns=("", "a")).spec.columns == ("", "a")
    again = path.read_text().replace(",a,b", "Unnamed: 0,a,b")  # as pandas reads and writes it
    (tmp_path / "again.csv").write_text(again)
    assert open_source(str(tmp_path / "again.csv")).spec.columns == ("a", "b")
    path.write_text("a,,b\n" + "".join(f"{i},{i * i},{i % 7}.5\n" for i in range(40)))
    assert open_source(str(path)).spec.columns == ("a", "", "b")  # it is no index there
    path.write_text(",kind\n" + "0,cat\n1,dog\n" * 9)
    with pytest.raises(DataError, match=r"found kind \(string\), the row index of pandas: ''"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("__index_level_0__", None),
        ("__index_level_0__", ["__index_level_0__"]),
        ("row", ["row"]),
        ("__index_level_0__", 3),  # what is damaged says nothing
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
def test_the_row_index_of_pandas_in_parquet_is_no_feature(
    tmp_path, monkeypatch, large, index, said, is_large
):
    columns = {"a": COLUMNS["income"], "b": COLUMNS["age"], index: list(range(60))}
    table = pyarrow.table(columns)
    if said is not None:
        ranged = {"kind": "range", "name": None, "start": 0, "stop": 60, "step": 1}
        text = json.dumps({"index_columns": [*said, ranged] if isinstance(said, list) else said})
        table = table.replace_schema_metadata({"pandas": text})
    path = large(table)
    monkeypatch.setattr(rows, "LIMIT", 100 if is_large else 2**29)
    source = open_source(path)
    assert source.spec.columns == ("a", "b")
    assert f"left out the row index of pandas: {index!r} (--columns takes it)" in source.notes
    assert open_source(path, columns=("b", index)).spec.columns == ("b", index)
    assert "row index" not in str(open_source(path, label=index, conditional=True).notes)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("text", ["größe,b\n1,2\n3,4\n", "a,food\n1,Käse\n2,Brot\n"])
def test_a_table_that_is_not_utf8_is_told(tmp_path, text, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes((text * 9).encode(encoding))
    with pytest.raises(DataError, match=r"t\.csv: is not UTF-8\. Save it as UTF-8"):
        open_source(str(path), label="food" if "food" in text else None)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("start", "message"),
    [(gzip.compress(b"a\n1\n"), "by gzip.*gunzip <"), (b"PK\3\4..", "a zip")],
    ids=["gzip", "zip"],  # gzip writes the time into what it packs
)
def test_a_table_that_is_packed_is_told(tmp_path, ending, start, message):
    path = tmp_path / f"t.{ending}"
    path.write_bytes(start)
    with pytest.raises(DataError, match=message):
        open_source(str(path))
