"""Bad input to the program: it is refused in one message that says what to do, and nothing is
written.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import refused

import genjax.cli
from genjax.data.labels import condition_of
from genjax.errors import ConfigError
from genjax.protocol import DataSpec
from genjax.zoo import ZOO


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("trian vae", "There is no command called 'trian'. Did you mean train?"),
        ("train vea", "There is no recipe called 'vea'. Did you mean vae"),
        ("train xyzzy", f"There is no recipe called 'xyzzy'. There are: {', '.join(ZOO)}."),
        ("train", "genjax train needs the name of a recipe. There are: vae"),
        ("sweep --seeds 3", "genjax sweep needs the name of a recipe"),
        (
            "train vae --data digit",
            "There is no data set called 'digit'. Did you mean digits or digit_rows or "
            "digit_pixels?",
        ),
        ("train vae --learnig-rate 1", "--learnig-rate"),
        ("train vae --steps many", "--steps"),
        ("train vae --net cnn", "--net"),
        ("train vae --binarize 3", "--binarize"),
        ("train vae --steps 0", "steps must be at least 1; got 0."),
        ("train vae --seed -1", "seed must be from 0 to 2**32 - 1; got -1."),
        ("train vae --batch-size 5000", "batch_size=5000 is more than the 1257 examples there are"),
        ("train vae --microbatches 5", "A batch of 128 does not divide into 5 equal microbatches."),
        ("sweep vae --latent-dim 2,4", "--latent-dim cannot be swept in one program"),
        ("sweep vae --learning-rate 1,x", "takes finite numbers separated by commas; got '1,x'"),
        ("sweep vae-mnist --augment flip,wrong", "augment"),
        ("train vae --mesh data=²", "A mesh is written as data=4,fsdp=2"),
        ("train vae --mesh member=8", "Share its batch with data in the place of member"),
        ("bench vae --mesh member=8", "Share its batch with data in the place of member"),
        ("compile vae --topology cuda --mesh data=2", "leave out --mesh"),
        (
            "sweep vae --learning-rate 1e-3,fast",
            "--learning-rate takes finite numbers separated by commas; got '1e-3,fast'.",
        ),
        (
            "sweep vae --learning-rate 1e-3,1e-2 --optimizer.learning-rate 0.1",
            "--learning-rate is given one value, 0.1, and several to sweep over: leave one of them",
        ),
        ("sweep vae --seeds 0", "--seeds must be at least 1; got 0."),
        ("sample nowhere", "nowhere is not a run folder: it has no config.json."),
        ("sample nowhere --n 0", "--n must be at least 1; got 0."),
        ("sample nowhere --n-steps 0", "--n-steps must be at least 1; got 0."),
        ("sample nowhere --guidance inf", "--guidance must be a finite number; got inf."),
        ("sample nowhere --film --means", "--film and --means are two different pictures"),
        ("train flow-matching --coupling best", "--coupling"),
        # Refused before the run that it stands on is looked for, or trained.
        ("train reflow-2d --first --guidance=-inf", "guidance must be finite; got -inf."),
        (
            "train flow-matching --guidance 2 --cond-dropout 0",
            "never trained without its condition",
        ),
        ("train flow-matching --net unet --channels 8 8 8 8 8", "must be multiples of 16"),
        ("sample nowhere --seed -3", "--seed must be from 0 to 2**32 - 1; got -3."),
        ("evaluate nowhere", "nowhere is not a run folder: it has no config.json."),
        ("evaluate nowhere --batch-size 0", "--batch-size must be at least 1; got 0."),
        ("evaluate nowhere --split dev", "--split"),
    ],
)
def test_bad_input_is_refused_in_one_message(
    args: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(args.split(), capsys)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


DIGITS = np.zeros((30, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "flags", "message"),
    [
        (None, "", "there is no such file"),
        (b"PK but no archive", "", "damaged, cannot be read as arrays"),
        (b"hello", "", "not a .npz or .npy file"),
        ({"y": DIGITS}, "", "expected the arrays"),
        (
            {"x": DIGITS, "y": np.zeros(29, int)},
            "--conditional",
            "labels of another length: 30 examples in x and 29 in y",
        ),
        ({"x": np.where(np.arange(30) == 3, np.nan, 1.0)[:, None]}, "", "NaN or infinite"),
        ({"x": np.where(np.arange(30) == 3, np.inf, 1.0)[:, None]}, "", "NaN or infinite"),
        ({"x": DIGITS[:0]}, "", "x is empty; expected at least 1 example"),
        (
            {"x_train": DIGITS, "x_test": np.zeros((9, 5, 4), np.uint8)},
            "",
            "must hold examples of one shape; found [4, 4, 1], [5, 4, 1]",
        ),
        ({"x": DIGITS}, "--batch-size 25", "batch_size=25 is more than the 24 examples there are"),
    ],
)
def test_bad_data_are_refused_in_one_message_that_names_the_file(
    arrays: Any,
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(arrays, bytes):
        Path("mine.npz").write_bytes(arrays)
    elif arrays is not None:
        np.savez("mine.npz", **arrays)
    text = refused([*shlex.split("train vae --data mine.npz --hidden 4"), *flags.split()], capsys)
    assert message in text
    assert "mine.npz" in text or "batch_size" in text
    assert not Path("runs").exists()


def test_a_conditional_recipe_asks_for_the_labels_of_ones_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", x=DIGITS, y=np.zeros(29, int))
    assert "30 examples in x and 29 in y" in refused(
        shlex.split("train cvae --data mine.npz"), capsys
    )
    np.savez("mine.npz", x=DIGITS)
    assert "conditional needs labels" in refused(shlex.split("train cvae --data mine.npz"), capsys)
    assert not Path("runs").exists()


def test_a_truncated_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", x=DIGITS)
    whole = Path("mine.npz").read_bytes()
    for end in (len(whole) // 3, len(whole) - 10):
        Path("mine.npz").write_bytes(whole[:end])
        assert "mine.npz: damaged" in refused(shlex.split("train vae --data mine.npz"), capsys)


def test_files_that_are_not_there_are_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENJAX_DATA", str(tmp_path / "data"))
    text = refused(["train", "vae-mnist"], capsys)
    assert str(tmp_path / "data") in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "n_classes", "cond_dim", "expected"),
    [
        (None, None, None, None),
        (None, 3, None, [0, 0, 1, 1, 2]),
        ("1", 3, None, [1] * 5),
        ("2,0", 3, None, [0, 0, 2, 2, 2]),
        ("0.5,-1", None, 2, [[0.5, -1]] * 5),
    ],
)
def test_conditions_as_text(
    text: str | None, n_classes: int | None, cond_dim: int | None, expected: Any
) -> None:
    spec = DataSpec((2,), "continuous", n_classes=n_classes, cond_dim=cond_dim)
    found = condition_of(spec, text, 5)
    if expected is None:
        assert found is None
        return
    if n_classes and text == "2,0":
        assert set(found.tolist()) == {0, 2}
        assert sorted(found.tolist()) == found.tolist()
    elif n_classes and text is None:
        assert found.tolist() == sorted(np.resize([0, 1, 2], 5).tolist())
    else:
        np.testing.assert_array_equal(found, expected)
    assert found.dtype == (np.int32 if n_classes else np.float32)


@pytest.mark.parametrize("text", ["3", "-1", "0.5", "nan", "inf", "1e30", "", ",", "three"])
def test_conditions_that_are_no_classes(text: str) -> None:
    spec = DataSpec((2,), "continuous", n_classes=3)
    with pytest.raises(ConfigError, match="--cond takes"):
        condition_of(spec, text, 5)


def test_streams_that_are_closed_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `genjax list >&-` has it: Python then has None for them."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    genjax.cli.main(["list"])
    with pytest.raises(SystemExit) as stopped:
        genjax.cli.main(["sample", "nowhere"])
    sys.stdout.close()
    sys.stderr.close()
    assert stopped.value.code == 2
