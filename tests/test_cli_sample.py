"""`genjax sample RUN --help` shows the flags that apply to that run, and no others."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from program import refused

import genjax.cli
from genjax.cli.file_names import free, unused_png
from genjax.cli.of_runs import SAMPLE_FLAGS
from genjax.errors import ConfigError
from genjax.families.gan import gan
from genjax.runs import samples
from genjax.runs.samples import Decoding
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, to_dict
from genjax.zoo.sections import replace

RULES = {"temperature", "top-k", "top-p", "min-p", "repetition-penalty", "beams"}
SOLVING = {"solver", "n-steps", "grid"}
ALWAYS = {"n", "seed", "out"}
TINY = {"d_model": 4, "n_layers": 1, "n_heads": 2}


def a_run(recipe: Recipe, folder: Path) -> Path:
    """A run folder as it is before the first checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(recipe)))
    spec = dataclasses.asdict(recipe.source().spec)
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def help_about(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, set[str]]:
    with pytest.raises(SystemExit) as stopped:
        genjax.cli.main(["sample", *args])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    return out, set(re.findall(r"^[│ ] --(\w[\w.-]*)", out, re.MULTILINE))


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (ZOO["vae"], {"means"}),
        (ZOO["cvae"], {"means", "cond"}),
        (ZOO["gan-ring"], set()),
        (ZOO["cgan"], {"cond"}),
        (ZOO["gru-markov"], {*RULES, "length", "prompt"}),
        (replace(ZOO["transformer"], **TINY), {*RULES, "length", "prompt"}),
        (
            replace(ZOO["transformer-unicode-conditional"], **TINY),
            {*RULES, "length", "prompt", "cond", "guidance"},
        ),
        (ZOO["gru-jsb"], {"length"}),
        (ZOO["vrnn"], {"length", "cond"}),
        (ZOO["diffusion-2d"], {*SOLVING, "film"}),
        (ZOO["diffusion"], {*SOLVING, "film", "cond", "guidance"}),
        (
            replace(ZOO["flow-matching"], cond_dropout=0.0, guidance=None),
            {*SOLVING, "film", "cond"},
        ),
        (ZOO["flow-matching"], {*SOLVING, "film", "cond", "guidance"}),
    ],
    ids=lambda of: of.name if isinstance(of, Recipe) else "",
)
def test_help_about_a_run_shows_the_flags_that_apply(
    recipe: Recipe, flags: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(recipe, tmp_path / "run")
    out, shown = help_about([str(run), "--help"], capsys)
    # There is a best checkpoint where there is a figure to compare by.
    which = {"which"} if recipe.family is not gan else set()
    assert shown == flags | ALWAYS | which
    assert "These are the flags that apply to" in out


def test_help_without_a_run_shows_all_flags(capsys: pytest.CaptureFixture[str]) -> None:
    out, shown = help_about(["--help"], capsys)
    fields = [*SAMPLE_FLAGS, *(field.name for field in dataclasses.fields(Decoding))]
    assert shown == {name.replace("_", "-") for name in fields}
    assert "that apply to" not in out
    assert "divides the logits" in out


def test_the_run_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(ZOO["gan-ring"], tmp_path / "run")
    assert help_about(["--n", "3", str(run), "-h"], capsys)[1] == ALWAYS


@pytest.mark.parametrize(
    ("given", "stem"), [("a.npz", "a"), ("a.png", "a"), ("a", "a"), ("v1.5", "v1.5")]
)
def test_an_ending_that_samples_get_anyway_is_not_doubled(
    tmp_path: Path, given: str, stem: str
) -> None:
    assert free(tmp_path / given, {}) == tmp_path / stem


@pytest.mark.parametrize("given", ["", ".", "..", "/", "a/.."])
def test_what_is_no_name_of_a_file_is_refused(given: str) -> None:
    for named in (lambda path: free(path, {}), unused_png):
        with pytest.raises(ConfigError, match=r"--out takes the name of a file, such as .*NAME; '"):
            named(Path(given))


def test_a_picture_of_curves_is_called_a_png(tmp_path: Path) -> None:
    named = {given: unused_png(tmp_path / given).name for given in ("a", "a.png", "a.pdf", "b.PNG")}
    assert list(named.values()) == ["a.png", "a.png", "a.pdf.png", "b.PNG"]


def test_help_about_what_is_no_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(["sample", str(tmp_path / "nowhere"), "--help"], capsys)
    assert "nowhere is not a run folder" in text


@pytest.mark.slow
def test_flags_that_do_not_apply_are_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    small = "train gan-ring --hidden 4 --batch-size 8 --steps 2 --sample-every 0 --out"
    genjax.cli.main([*small.split(), str(run)])
    capsys.readouterr()
    for flags, message in [
        ("--temperature 2", "--temperature: for models that make a sequence step by step"),
        ("--solver heun --n-steps 3", "--solver, --n-steps: for models that go from noise to data"),
        ("--film", "--film shows the way from noise to data"),
        ("--means", "no means of p(x|z) to show"),
        ("--cond 3", "unconditional: leave `cond` out"),
    ]:
        assert message in refused(["sample", str(run), *flags.split()], capsys)


@pytest.mark.slow
def test_what_does_not_apply_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = "--steps 2 --batch-size 8 --evaluate-every 0 --sample-every 0"
    small = "--d-model 4 --n-layers 1 --n-heads 2"
    for name, own in (("vae", "--hidden 4"), ("image-transformer-digits", small)):
        genjax.cli.main(f"train {name} {own} {common} --out {name}".split())
    said = refused(["sample", "vae", "--means", "--temperature", "0.5"], capsys)
    assert "--temperature: for samples, and --means shows means" in said
    said = refused(["sample", "image-transformer-digits", "--length", "32"], capsys)
    assert "a part of one is no image" in said
    assert not list(tmp_path.glob("*/samples/*.npz"))


def test_a_text_goes_on_with_a_context_of_one() -> None:
    def go_on(key, prompt, prompt_length):
        assert int(prompt_length) == 0
        return np.full((2, 1), 3)

    text = samples._beyond(go_on, jax.random.key(0), np.zeros((2, 1), np.int32), 1, 4)
    np.testing.assert_array_equal(text, [[0, 3, 3, 3]] * 2)
