"""What a notebook shows of a run."""

import json
import re

import numpy as np
import pytest

import genjax
from genjax import DataSpec

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
SMALL = {"steps": 4, "batch_size": 8, "hidden": (4,), "latent_dim": 2, "evaluate_every": 2}
QUIET = {"say": str, "sample_every": 0}
MARKS = re.compile(r"</?(?:div|b|table|tr|th|td)>")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    source = genjax.from_arrays(X, name="<b>&data")
    return genjax.train("vae", source, out=tmp_path_factory.mktemp("a") / "<i>", **SMALL, **QUIET)


def words(page):
    """The text between marks, of a page in which nothing else is a mark."""
    rest = MARKS.sub("|", page)
    assert "<" not in rest
    assert ">" not in rest
    for name in ("div", "b", "table", "tr", "th", "td"):
        assert page.count(f"<{name}>") == page.count(f"</{name}>")
    return [one for one in rest.split("|") if one]


@pytest.mark.slow
def test_a_run_is_shown_with_its_figures_and_escaped(run):
    found = words(run._repr_html_())
    about = found[1 : found.index("figure")]
    facts = dict(zip(about[::2], about[1::2], strict=True))
    assert facts["family"] == "vae"
    assert facts["data"] == "&lt;b&gt;&amp;data: continuous [3]"
    assert facts["steps"] == "4 of 4 (the newest checkpoint)"
    assert int(facts["parameters"].replace(",", "")) > 20
    assert facts["folder"].endswith("/&lt;i&gt;")
    assert "valid/bound" in found  # of the log, before anything was evaluated
    report = run.evaluate("valid")
    value = f"{report['mean']:.4f} ± {report['standard_error']:.4f}"
    assert value in words(run._repr_html_())


@pytest.mark.slow
def test_what_was_written_into_the_folder_is_shown_and_what_is_damaged_left_out(run):
    path = run.folder / "report.json"
    path.write_text(json.dumps(run.evaluate() | {"mean": 1.25, "standard_error": 0.5}))
    again = genjax.load(run.folder)
    assert "1.2500 ± 0.5000" in words(again._repr_html_())
    path.write_text("{")
    assert "steps" in words(again._repr_html_())
    path.unlink()


@pytest.mark.slow
def test_without_a_folder_or_a_recipe_there_is_what_there_is():
    run = genjax.train("vae", X, **SMALL, **QUIET)
    assert "valid/bound" in words(run._repr_html_())
    model = genjax.vae(DataSpec((3,), "continuous"), hidden=(4,), latent_dim=1)
    found = words(genjax.train(model, X, steps=2, batch_size=8)._repr_html_())
    assert found[0] == "a model of one&#x27;s own"
    assert "figure" not in found
