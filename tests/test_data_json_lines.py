"""JSON lines as text: what is read, labels, and what is refused by the number of its line."""

import gzip
import itertools
import json

import numpy as np
import pytest

import genjax.cli
from genjax import data
from genjax.data import json_lines, open_source
from genjax.errors import ConfigError, DataError

ROWS = [{"text": f"{'ab' * (n % 5 + 1)}{n}", "kind": ["even", "odd"][n % 2]} for n in range(40)]


def saved(folder, rows, name="mine.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    return str(path)


def decoded(source):
    return [[data.decode(row, source.spec) for row in batch.x] for batch in source.load()]


def all_of(source):
    return [*itertools.chain(*decoded(source))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz", "a.ndjson", "a.NdJson"])
def test_each_text_is_an_example_with_its_class(tmp_path, name):
    path = saved(tmp_path, ROWS, name)
    source = open_source(path, layout="lines", label="kind", conditional=True)
    kinds = {row["text"]: row["kind"] for row in ROWS}
    names = source.spec.class_names
    assert names == ("even", "odd")
    texts = decoded(source)
    assert sorted(itertools.chain(*texts)) == sorted(kinds)
    for part, batch in zip(texts, source.load(), strict=True):
        assert [kinds[text] for text in part] == [names[label] for label in batch.cond]


def test_a_stream_has_the_texts_one_after_the_other(tmp_path):
    source = json_lines(saved(tmp_path, ROWS), context=8)
    whole = "\n".join(row["text"] for row in ROWS) + "\n"
    windows = source.load().train.x
    found = "".join(source.spec.vocabulary[token] for token in windows[:, 0])
    assert whole.startswith(found)
    assert len(found) == len(whole) * 85 // 100 - 7
    octets = json_lines(saved(tmp_path, ROWS), context=8, unit="byte").spec
    assert (octets.levels, octets.step) == (256, "byte")


def test_texts_with_newlines_end_in_another_character(tmp_path):
    rows = [{"story": f"one\ntwo\r\n{n}"} for n in range(10)]
    source = json_lines(saved(tmp_path, rows), layout="lines")
    assert sorted(all_of(source)) == [f"one\ntwo\n{n}" for n in range(10)]
    with pytest.raises(DataError, match=r"both newlines and the character U\+0003"):
        json_lines(saved(tmp_path, [*rows, {"story": "\x03"}]))


BAD = [
    (b"{", r"line 6 is no JSON \(Expecting property name.* at column 2\)"),
    (b'["a"]', "line 6 is a JSON list, no object"),
    (b'{"text": "\xff"}', r"line 6 is not UTF-8 \(byte 0xff at column 11\)"),
    (b'{"txt": "a"}', "line 6 has no 'text'; it has 'txt'"),
    (b'{"text": 3}', "line 6 has a number for 'text', where a text is expected"),
    (b'{"text": "\\ud800"}', "line 6 has half a character in 'text' .*half."),
    (b"[" * 100_000, "line 6 is no JSON that can be read"),
]


@pytest.mark.parametrize(("line", "match"), BAD)
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path, line, match):
    path = saved(tmp_path, [*ROWS[:5], line, *ROWS[5:]])
    with pytest.raises(DataError, match=f"{match}. Mend it, or .* --skip-bad"):
        json_lines(path, layout="lines")
    source = json_lines(path, layout="lines", skip_bad=True)
    assert len(all_of(source)) == 40
    assert "left out 1 lines that cannot be used" in source.notes
    with pytest.raises(DataError, match=", and 1 more lines are bad"):
        json_lines(saved(tmp_path, [*[*ROWS, line, line][-8:], {"text": ""}]), layout="lines")


def test_columns_and_labels_that_are_not_there(tmp_path):
    path = saved(tmp_path, ROWS)
    with pytest.raises(DataError, match="no column 'txt'; there are 'text', 'kind'"):
        json_lines(path, column="txt")
    with pytest.raises(DataError, match=r"which column .* 'a', 'b': say one with --column"):
        json_lines(saved(tmp_path, [{"a": "x", "b": "y"}], "two.jsonl"))
    with pytest.raises(DataError, match=r"--label NAME\), of 'kind'"):
        json_lines(path, layout="lines", conditional=True)
    with pytest.raises(DataError, match="no column 'sort' for the class; take 'kind'"):
        json_lines(path, layout="lines", conditional=True, label="sort")
    with pytest.raises(ConfigError, match="--layout lines"):
        json_lines(path, conditional=True, label="kind")
    bad = saved(tmp_path, [*ROWS, {"text": "a"}])
    with pytest.raises(DataError, match="line 41 has no 'kind', where a class"):
        json_lines(bad, layout="lines", conditional=True, label="kind")


def test_a_label_that_is_not_used_is_said(tmp_path):
    path = saved(tmp_path, ROWS)
    with pytest.raises(DataError, match="no column 'sort' for the class; take 'kind'"):
        json_lines(path, layout="lines", label="sort")
    source = json_lines(path, layout="lines", label="kind")
    assert source.spec.n_classes is None
    assert "the class 'kind' is not used: --conditional --layout lines uses it" in source.notes


def test_long_and_empty_texts_are_left_out(tmp_path):
    path = saved(tmp_path, [*ROWS, {"text": "c" * 500}, {"text": ""}])
    source = json_lines(path, layout="lines", max_length=20)
    assert source.spec.shape == (13,)
    assert "left out 1 texts of more than 20 characters" in source.notes
    assert "left out 1 empty texts" in source.notes
    with pytest.raises(DataError, match="longer than max_length=1; the shortest has 3"):
        json_lines(path, layout="lines", max_length=1)


def test_what_is_no_file_of_json_lines(tmp_path):
    for content, match in (
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"only words", "no line is a JSON object; line 1 is no JSON"),
        (b"\x89PNG\r\n", "no line is a JSON object; line 1 is not UTF-8"),
        (json.dumps(ROWS).encode(), "line 1 is a JSON list, no object. Write one object a line"),
        (gzip.compress(b'{"text": "abc"}\n' * 999)[:-20], "cut short|corrupt"),
        (gzip.compress(bytes(1 << 27)), r"bytes of gzip give more than .* .gunzip -k"),
    ):
        (tmp_path / "wrong.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=match):
            json_lines(str(tmp_path / "wrong.jsonl"))
    with pytest.raises(DataError, match="there is no such file"):
        json_lines(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        json_lines(str(tmp_path))


def test_real_text_in_gzip_is_no_bomb(tmp_path):
    path = tmp_path / "long.txt.gz"
    path.write_bytes(gzip.compress(b"the same line again and again\n" * 100_000))
    assert open_source(path, context=8).spec.shape == (8,)


@pytest.mark.slow
def test_json_lines_are_trained_on_and_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, ROWS)
    small = "--data mine.jsonl --layout lines --label kind --conditional --steps 4 --batch-size 4"
    more = "--warmup-steps 0 --d-model 16 --n-layers 1 --n-heads 2 --out here"
    genjax.cli.main(["train", "transformer", *small.split(), *more.split()])
    genjax.cli.main(["sample", "here", "--n", "2"])
    found = np.load(next((tmp_path / "here").glob("**/*.npz")), allow_pickle=False)
    assert found["x"].dtype == np.int32
