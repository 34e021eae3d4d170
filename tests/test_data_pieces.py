"""Text in pieces of words, by a tokenizer that travels with the spec."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tokenizers

import genjax.cli
from genjax import DataSpec
from genjax.data import decode, encode_by, json_lines, text
from genjax.errors import ConfigError, DataError

BOOK = "The sun and the moon, the sun and the stars: naïve, ☉ and again.\n" * 40


@pytest.fixture
def files(tmp_path):
    """A book and a byte-pair tokenizer that was trained on it."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([BOOK], vocab_size=300, show_progress=False)
    made.enable_truncation(5)  # which must not cut a book
    made.save(str(tmp_path / "bpe.json"))
    (tmp_path / "book.txt").write_text(BOOK)
    return str(tmp_path / "book.txt"), str(tmp_path / "bpe.json")


def test_a_text_in_pieces_is_the_text_again_without_the_file(files, tmp_path):
    book, bpe = files
    source = text(book, context=8, tokenizer=bpe)
    assert source.files == (book, bpe)
    spec = DataSpec(**json.loads(json.dumps(dataclasses.asdict(source.spec))))
    assert (spec, spec.text, spec.vocabulary) == (source.spec, True, None)
    assert 256 < spec.levels <= 300
    (tmp_path / "bpe.json").unlink()
    tokens = source.load().train.x[:, 0]
    assert BOOK.startswith(decode(tokens, spec))
    assert len(tokens) < len(BOOK) / 2
    assert decode(encode_by(spec, "☉ the moon", "the prompt"), spec) == "☉ the moon"
    assert not any("does not give" in note for note in source.notes)


def test_json_lines_in_pieces(files, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in BOOK.splitlines()))
    source = json_lines(str(path), context=8, tokenizer=files[1])
    assert source.spec == dataclasses.replace(
        text(files[0], context=8, tokenizer=files[1]).spec, name="a"
    )
    np.testing.assert_array_equal(
        source.load().test.x, text(files[0], context=8, tokenizer=files[1]).load().test.x
    )


def test_a_tokenizer_that_loses_something_is_said(files, tmp_path):
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "sun": 1}, unk_token="?"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.save(str(tmp_path / "words.json"))
    notes = text(files[0], context=8, tokenizer=str(tmp_path / "words.json")).notes
    assert "the tokenizer does not give every text back as it was" in notes


def test_what_is_no_tokenizer(files, tmp_path):
    book, bpe = files
    bad = tmp_path / "bad.json"
    for content, match in (
        (b"", "cannot be read as a tokenizer"),
        (b"{}", "cannot be read as a tokenizer"),
        (b'{"version": "1.0", "mod', "cannot be read as a tokenizer .*Tokenizer.save writes"),
        (b"\xff", "not UTF-8"),
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=match):
            text(book, tokenizer=str(bad))
    with pytest.raises(DataError, match="there is no such file"):
        text(book, tokenizer=str(tmp_path / "none.json"))
    for more in ({"layout": "lines"}, {"unit": "byte"}):
        with pytest.raises(ConfigError, match="goes with --layout stream and --unit character"):
            text(book, tokenizer=bpe, **more)
    with pytest.raises(DataError, match="too short for a context of 5000"):
        text(book, tokenizer=bpe, context=5000)


def test_without_the_package_there_is_the_command_that_installs_it(files, monkeypatch):
    spec = text(files[0], context=8, tokenizer=files[1]).spec
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    other = dataclasses.replace(spec, tokenizer=f" {spec.tokenizer}")
    with pytest.raises(ConfigError, match=r"pip install 'genjax-zoo\[tokenizers\]'"):
        decode(np.arange(3), other)


def test_a_spec_has_a_tokenizer_or_a_vocabulary():
    for wrong in ({"vocabulary": ("a", "b")}, {"kind": "discrete"}):
        with pytest.raises(ValueError, match="A tokenizer is for token data"):
            DataSpec(**{"shape": (3,), "kind": "tokens", "levels": 2, "tokenizer": "{}"} | wrong)


@pytest.mark.slow
def test_a_run_in_pieces_is_sampled_without_the_tokenizer(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--data book.txt --tokenizer bpe.json --context 8 --steps 4 --batch-size 4 --out here"
    net = "--warmup-steps 0 --d-model 16 --n-layers 1 --n-heads 2"
    genjax.cli.main(["train", "transformer", *small.split(), *net.split()])
    (tmp_path / "bpe.json").unlink()
    genjax.cli.main(["sample", "here", "--n", "2", "--prompt", "The sun"])
    assert "The sun" in next((tmp_path / "here").glob("samples/*prompt*.txt")).read_text()


@pytest.mark.slow
def test_other_text_is_scored_in_the_pieces_of_the_run(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--data book.txt --tokenizer bpe.json --context 8 --steps 4 --batch-size 4 --out here"
    net = "--warmup-steps 0 --d-model 16 --n-layers 1 --n-heads 2"
    genjax.cli.main(["train", "transformer", *small.split(), *net.split()])
    (tmp_path / "other.txt").write_text(BOOK[:900])
    genjax.cli.main(["evaluate", "here", "--data", "other.txt"])
    assert json.loads((tmp_path / "here" / "report-other.json").read_text())
    saved = json.loads((tmp_path / "bpe.json").read_text())
    (tmp_path / "bpe.json").write_text(json.dumps(saved, indent=1))
    with pytest.raises(SystemExit):
        genjax.cli.main(["evaluate", "here", "--data", "other.txt"])
    said = capsys.readouterr().err
    assert "tokenizer is" in said
    assert len(said) < 2000
