"""The benchmarks compare like with like, and every part of them runs."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from benchmarks import by_hand, common, overhead, peers, report, report_results
from genjax.data import example_batch, open_source
from genjax.errors import ConfigError
from genjax.families.vae import vae
from genjax.learning.step import training
from genjax.learning.transforms import compiled
from genjax.protocol import DataSpec
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

SIDE, WIDTH, LATENT = 4, 6, 2
TORCH = os.environ.get("GENJAX_TORCH_PYTHON", "")


@pytest.fixture(autouse=True)
def _as_anyone_would_write_it() -> Iterator[None]:
    """The hand-written step adds its biases by broadcasting, as people do."""
    with jax.numpy_rank_promotion("allow"):
        yield


TINY_CASES: dict[str, Callable[[], list[overhead.Case]]] = {
    "vae": lambda: [overhead.vae_case("tiny", SIDE, WIDTH, LATENT, 8)],
    "gan": lambda: [overhead.gan_case(WIDTH, d=4, latent=LATENT, batch=8)],
    "rnn": lambda: [overhead.recurrent_case("vanilla", 8, length=5, levels=4, batch=8)],
    "lstm": lambda: [overhead.recurrent_case("lstm", 8, length=5, levels=4, batch=8)],
    "gru": lambda: [overhead.recurrent_case("gru", 8, length=5, levels=4, batch=8)],
    "transformer": lambda: [overhead.transformer_case(8, 2, length=5, levels=4, batch=8)],
    "vrnn": lambda: [overhead.vrnn_case(WIDTH, LATENT, side=3, levels=4, batch=8)],
    "diffusion": lambda: [overhead.diffusion_case(WIDTH, d=4, batch=8)],
    "flow_matching": lambda: [overhead.flow_case(WIDTH, d=4, batch=8)],
}


def test_the_cases_by_hand_are_the_ones_that_are_measured() -> None:
    assert TINY_CASES.keys() == overhead.CASES.keys()


def test_families_without_a_case_are_reported_as_not_measured() -> None:
    families = {recipe.family.__name__ for recipe in ZOO.values()}
    assert common.not_measured(families) == []
    assert common.not_measured(families - {"vae", "gan"}) == ["Not measured: gan, vae.", ""]


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.parametrize("name", TINY_CASES)
def test_a_step_by_hand_does_the_same_arithmetic(name: str) -> None:
    """Gradients of the first step and losses of three equal genjax's for the same weights, data and
    noise.
    """
    (case,) = TINY_CASES[name]()
    batch = jax.jit(partial(example_batch, case.model.spec), static_argnums=1)(
        jax.random.key(1), case.batch
    )
    t, hand = (
        training(case.model, optax.adam(1e-3)),
        by_hand.adam(case.by_hand, overhead.draws_of(case.model)),
    )
    ts = jax.jit(t.init)(jax.random.key(2))
    # A net may begin with layers of zeros, behind which every gradient is zero.

    def noisy(leaf: jax.Array) -> jax.Array:
        return leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    ts = ts._replace(params=jax.jit(partial(jax.tree.map, noisy))(ts.params))
    mine, step = hand.init(ts.params, ts.key), jax.jit(t.step)
    player = list(case.by_hand)[-1]
    for index in range(3):
        ts, metrics = step(ts, batch)
        mine, loss = hand.step(mine, batch.x)
        np.testing.assert_allclose(metrics[f"{player}/loss"], loss, rtol=2e-5)
        if index == 0:
            for of in case.by_hand:
                adam = ts.opt[of][0]
                chex.assert_trees_all_close(adam.mu, mine["m"][of], rtol=1e-3, atol=1e-6)
                assert all(np.any(leaf) for leaf in jax.tree.leaves(adam.mu)), of


@pytest.mark.slow
@pytest.mark.tools
def test_alternation_gives_one_value_a_round_and_program() -> None:
    spec = DataSpec((SIDE, SIDE, 1), "binary")
    batch = jax.jit(partial(example_batch, spec), static_argnums=1)(jax.random.key(1), 8)
    t = compiled(training(vae(spec, hidden=(WIDTH,), latent_dim=LATENT), optax.adam(1e-3)))
    from genjax.profiling.measure import stepper

    calls = {name: stepper(t.step, t.init(jax.random.key(0)), batch) for name in ("a", "b")}
    rounds = common.alternate(calls, seconds=0.2, block=0.005)
    assert len(rounds["a"]) == len(rounds["b"]) >= 5
    assert all(value > 0 for values in rounds.values() for value in values)
    assert common.ratio([2.0] * 5, [1.0] * 5)["median"] == 2


@pytest.mark.slow
@pytest.mark.tools
def test_a_value_without_first_steps_is_the_mean_over_all_others(tmp_path: Path) -> None:
    from benchmarks import published
    from genjax.runs.load import load
    from genjax.runs.train import train
    from genjax.zoo.sections import replace

    recipe = replace(
        ZOO["transformer"],
        d_model=8,
        n_layers=1,
        n_heads=2,
        context=8,
        batch_size=8,
        steps=2,
        warmup_steps=0,
    )
    train(replace(recipe, sample_every=0, evaluate_every=0), tmp_path / "run")
    loaded = load(tmp_path / "run")
    found = published.value(tmp_path / "run")
    x = loaded.recipe.source().load().test.x.astype(np.int32)
    assert loaded.model.autoregressive is not None
    outputs = jax.jit(loaded.model.autoregressive.outputs)(loaded.params, loaded.state, x)
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(outputs)), x[..., None], -1)[..., 0]
    assert found["steps"] == nats[:, 1:].size
    assert found["nats"] == pytest.approx(nats[:, 1:].mean(), rel=1e-5)
    assert published.values("gru-jsb", tmp_path) is None


@pytest.mark.slow
@pytest.mark.tools
def test_the_command_writes_tables_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import generation, throughput

    small = {"tiny": {"side": SIDE, "width": WIDTH, "latent": LATENT, "batch": 8}}
    for module in (overhead, throughput):
        monkeypatch.setattr(module, "SIZES", small)
    few_families = {name: TINY_CASES[name] for name in ("vae", "diffusion")}
    monkeypatch.setattr(overhead, "CASES", few_families)
    for name, few in {"DTYPES": ("float32",), "SCANS": (10,), "MEMBERS": (4,)}.items():
        monkeypatch.setattr(throughput, name, few)
    for name, few in {"ROWS": ("gru",), "BATCHES": (2,), "LENGTHS": (4, 8)}.items():
        monkeypatch.setattr(generation, name, few)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    rows = overhead.step_overhead(0.2)
    assert [row["compiled_programs"] for row in rows] == [1, 1]
    common.write(
        "overhead",
        {"step": rows, "loop": overhead.loop_overhead(2, 200, 100, hidden=(WIDTH,), batch_size=8)},
    )
    throughput.main(0.02)
    generation.main(0.02)
    report.main()
    assert {"solo", "scan k=10", "vmap x4", "map x4"} == {
        row["variant"] for row in json.loads((tmp_path / "throughput.json").read_text())["rows"]
    }
    generated = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [(row["length"], row["programs"]) for row in generated] == [
        (4, 1),
        (8, 1),
    ]  # one for prompts of any length
    text = (tmp_path / "REPORT.md").read_text()
    assert "Overhead" in text
    assert "vmap x4" in text
    assert "tokens/s" in text
    assert "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n<!-- results -->\n| recipe")


@pytest.mark.slow
@pytest.mark.tools
def test_convolutions_and_widths_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import convolution, report_costs, widths

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(convolution, "ROWS", ("vae-conv",))
    monkeypatch.setattr(convolution, "TRIPS", 2)
    monkeypatch.setattr(
        convolution,
        "compared",
        partial(convolution.compared, channels=(2, 2), latent_dim=2, batch_size=4),
    )
    cases = {
        "vae": widths.Case("hidden", ((8, 8),), (2, 8)),
        "transformer": widths.Case("d_model", (8, 16), (2,)),
    }
    monkeypatch.setattr(widths, "CASES", cases)
    monkeypatch.setattr(widths, "PRODUCT", 64)
    convolution.main(0.02)
    widths.main(0.02)
    (row,) = common.read("convolution")["rows"]
    assert 0 < row["difference"] < 1e-5  # other programs, the same values to rounding
    assert all(row[form]["ms"][who] > 0 for form in ("alone", "loop") for who in ("genjax", "flax"))
    of_vae, twice, one, other = common.read("widths")["rows"]
    assert [row["width"] for row in (of_vae, twice, one, other)] == [[8, 8], [8, 8], 8, 16]
    assert [row["batch_size"] for row in (of_vae, twice, one, other)] == [2, 8, 2, 2]
    assert 1.5 < twice["flops"] / of_vae["flops"] < 4  # the optimiser's stay the same
    assert 0 < twice["with_products_at_peak"] <= 1
    assert not any("with_products_at_peak" in row for row in (of_vae, one, other))
    assert 1 < other["flops"] / one["flops"] < 4.5  # between linear and quadratic in the width
    text = "\n".join(report_costs.parts())
    assert "## Convolutions" in text
    assert "## Steps by their widths" in text
    assert "| `vae`, hidden 8 8 | 2 |" in text
    assert "| `vae`, hidden 8 8 | 8 |" in text


@pytest.mark.slow
@pytest.mark.tools
def test_the_costs_of_programs_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import ensemble, memory, programs, report_costs, sampling, startup

    tiny: dict[str, Any] = {"hidden": (WIDTH,), "latent_dim": LATENT}
    for module in (programs, memory, ensemble):
        monkeypatch.setattr(module, "ROWS", ("vae-ring",))
    monkeypatch.setattr(memory, "CHANGES", {"vae-ring": {**tiny, "batch_size": 8}})
    monkeypatch.setattr(programs, "ROWS", ("vae",))
    monkeypatch.setattr(sampling, "ROWS", ("vae-ring", "gru-markov", "diffusion-2d"))
    small = {
        "gru-markov": {"d_hidden": 4, "d_embed": 3},
        "diffusion-2d": {"hidden": (4,), "n_steps": 3},
    }
    monkeypatch.setattr(sampling, "SETTINGS", {"vae-ring": tiny, **small})
    for module, few in (
        (sampling, {"BATCHES": (1, 3)}),
        (ensemble, {"BATCHES": (4,), "MEMBERS": (2,), "STEPS": 2}),
    ):
        for name, values in few.items():
            monkeypatch.setattr(module, name, values)
    monkeypatch.setattr(ensemble, "compared", partial(ensemble.compared, **tiny))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    sampling.main(0.02)
    ensemble.main(0.02)
    memory.main()
    programs.main()
    monkeypatch.setattr(startup, "ROWS", ("vae",))
    started = startup.measure(1, "--hidden", "4", "--latent-dim", "2", "--batch-size", "8")
    assert 0 < started[0]["warm"][0] < 120
    common.write("startup", {"runs": 1, "rows": started, "help": [startup.seconds_of_help()]})

    drawn = common.read("sampling")["rows"]
    assert [(row["batch"], row["solver_steps"]) for row in drawn] == [(1, None), (3, None)] * 2 + [
        (1, 3),
        (3, 3),
    ]
    assert all(row["samples_per_second"] > 0 and row["compile_seconds"] > 0 for row in drawn)
    assert drawn[2]["steps_per_second"] > drawn[2]["samples_per_second"]
    assert [row["members"] for row in common.read("ensemble")["rows"]] == [2]
    (kept,) = common.read("memory")["rows"]
    assert set(kept["ways"]) == {
        "float32",
        "bfloat16",
        "accumulated",
        "whole loss again",
    }  # a VAE has no loops
    assert all(way["reused_bytes"] == way["state_bytes"] for way in kept["ways"].values())
    text = "\n".join(report_costs.parts())
    for words in (
        "Size of a compiled step",
        "Memory of a step",
        "Samplers",
        "From the command",
        "Many small models",
    ):
        assert f"## {words}" in text


def settings_of_two(cache: str) -> dict[str, dict[str, str]]:
    """The allocator as it is, and one setting."""
    from benchmarks import pages
    from benchmarks.own_step import environments

    plain = environments(cache)["default"]
    return {"default": plain, "kept": {**plain, **pages.GLIBC["kept"]}}


@pytest.mark.slow
@pytest.mark.tools
def test_allocators_are_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import pages, report_costs

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "settings", settings_of_two)
    small = {"hidden": (4,), "latent_dim": 2, "batch_size": 8}
    monkeypatch.setattr(pages, "measure", partial(pages.measure, **small))
    lost = dataclasses.replace(ZOO["vae"], name="lost", data="nowhere.npy")
    monkeypatch.setattr(pages, "ZOO", {"vae": ZOO["vae"], "lost": lost})
    pages.main(("vae", "lost"), rounds=2, block=0.01)
    found = common.read("pages")
    (row,) = found["rows"]
    assert list(found["left_out"]) == ["lost"]
    assert "MALLOC_TRIM_THRESHOLD_" in row["allocators"]["kept"]
    assert row["allocators"]["default"] == "the system's"
    assert list(row["forms"]) == ["one step a dispatch", "10 steps a dispatch"]
    for form in row["forms"].values():
        for one in ("default", "kept"):
            assert form["ms"][one] > 0
            assert form["faults"][one] >= 0
            assert form["peak_bytes"][one] > 2**20
            assert form["to_default"][one]["rounds"] == 2
        assert form["to_default"]["default"]["median"] == 1
    text = "\n".join(report_costs.parts())
    assert "## Allocators of memory" in text
    assert text.count("| `vae` (") == 4
    assert "Left out: lost, " in text


def test_a_row_that_does_not_exist_is_refused_before_anything_is_measured() -> None:
    from benchmarks import pages

    with pytest.raises(ConfigError, match="Did you mean vae"):
        pages.main(("vea",))


def test_a_picture_of_nothing_is_not_drawn_over_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gallery

    monkeypatch.setattr(gallery, "RESULTS", tmp_path)
    (tmp_path / "gallery.png").write_bytes(b"as it was")
    with pytest.raises(ConfigError, match="No recipe has a run in"):
        gallery.main(tmp_path)
    assert (tmp_path / "gallery.png").read_bytes() == b"as it was"


@pytest.mark.slow
@pytest.mark.tools
def test_how_far_flows_are_from_the_truth_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance is the difference of the two means of a run's report."""
    from benchmarks import flows, report_exact

    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def train(name: str, seed: int, folder: Path, *flags: str) -> float:
        small = ["--n-layers", "1", "--hidden", "8", "--bins", "4"]
        small += ["--steps", "2", "--n-train", "600"]
        command = [sys.executable, "-m", "genjax", "train", name, "--seed", str(seed)]
        subprocess.run([*command, "--out", str(folder), *small], check=True)
        return 0.0

    monkeypatch.setattr(flows.results_of_zoo, "train", train)
    flows.main(["nsf-ring"], [0], tmp_path)
    found = common.read("flows")
    assert found is not None
    (row,) = found["rows"]
    assert row["recipe"] == "nsf-ring"
    assert row["n"] == 10_000
    report = flows.results_of_zoo.evaluate(tmp_path / "nsf-ring_seed0", 2)
    wanted = report["true_log_prob"]["mean"] - report["mean"]
    assert row["mean"] == pytest.approx(wanted, abs=1e-3)
    assert row["mean"] > 10 * row["standard_error"] > 0  # it has hardly learned anything
    assert f"| `nsf-ring` | {row['mean']:.4f} |" in "\n".join(report_exact.parts())


@pytest.mark.slow
@pytest.mark.tools
def test_what_caches_gain_a_pixelcnn_is_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import pixels, report_exact

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    row = ZOO["pixelcnn-digits"]
    monkeypatch.setattr(pixels, "ZOO", {"small": replace(row, **row.tiny)})
    monkeypatch.setattr(pixels, "BATCHES", (2,))
    common.write("pixels", pixels.measure(0.02, ("small",)))
    (found,) = common.read("pixels")["rows"]
    assert found["same"] == 1.0
    assert "| `small` | 2 | " in "\n".join(report_exact.parts())


def test_makemores_transformer_reads_the_names_that_ours_reads(tmp_path: Path) -> None:
    from benchmarks import makemore

    (tmp_path / "names.txt").write_text("ab\nabc\nc\n" * 40)
    source = open_source(str(tmp_path / "names.txt"), layout="lines")
    found = makemore.lines(source)
    splits = source.load()
    for name, batch in splits._asdict().items():
        for line, x in zip(found[name], np.asarray(batch.x), strict=True):
            length = list(x).index(source.spec.end) + 1
            np.testing.assert_array_equal(line[:length], x[:length])
            assert (line[length:] == -1).all()


@pytest.mark.skipif(not TORCH, reason=peers.NO_TORCH)
@pytest.mark.slow
@pytest.mark.tools
def test_makemores_transformer_is_trained_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import makemore

    rng = np.random.default_rng(0)
    some = {
        name: np.pad(rng.integers(1, 3, (40, 3)), ((0, 0), (0, 1)))
        for name in ("train", "valid", "test")
    }
    monkeypatch.setattr(makemore, "lines", lambda source: some)
    (run,) = makemore.twin(TORCH, None, [0], 500)
    assert run["best_step"] == 500
    # Three coins and a sure end: 3 ln 2 / 4 nats per token at least, but for what the training
    # lines tell of the test lines.
    assert 0.4 < run["test"] < 0.8
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.write("makemore", {"steps": 500, "runs": [run], **common.over_seeds([run["test"]])})
    text = "\n".join(report_results.makemore_parts(common.read("makemore")))
    assert f"| makemore's Transformer | {run['test']:.3f} |" in text
    assert "| `gru-names` | 1." in text
