"""The benchmark of accelerators, at sizes for this CPU: every part runs and says what it should."""

import sys

import jax
import pytest

from benchmarks import __main__ as everything
from benchmarks import accelerator, accelerator_rows, report_accelerator
from benchmarks.processes import AskedProcess
from genjax.errors import ConfigError

PARTS = ("right", "members", "attention", "bitwise")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return accelerator.main(small=True, names=PARTS)


@pytest.mark.slow
def test_values_agree_with_the_cpus_where_the_card_is_the_cpu(found):
    row = found["right"]["gan-ring"]
    assert row["highest"] == row["default"] == 0
    assert row["agrees"]
    assert 0 < row["bfloat16"] < 0.05
    assert row["samples are finite"]


def test_members_and_attention_have_times(found):
    members = found["members"]["gan-ring, 1 steps a dispatch"]
    assert members["1 members, ms"] > 0
    assert members["price of 16"] > 0
    ways = found["attention"]
    assert ways["our products"]["ms"] > 0
    for way in ("our products", "what the Transformer takes", "jax.nn, XLA"):
        assert 0 < ways[way]["distance"] < 0.05  # eight bits
    assert "error" in ways["jax.nn, cuDNN"]  # there is no such thing here


def test_a_run_goes_on_bitwise(found):
    assert found["bitwise"] == {"gan-ring": {"resumes bitwise": True}}


@pytest.mark.slow
@pytest.mark.tools
def test_large_models_are_measured_with_their_shares():
    rows = accelerator.main(small=True, names=("scale",))["scale"]
    assert rows.pop("by the data sheet") == {"tflops": None}
    assert rows.pop("a product, measured")["tflops"] > 0
    assert len(rows) == 3
    for row in rows.values():
        assert row["ms"] > 0
        assert row["product_flops"] > 0
        assert row["share_of_product"] > 0
        assert row["metrics are finite"]


def test_a_row_that_fails_is_told_and_costs_no_other(monkeypatch):
    def failing():
        raise RuntimeError("no such kernel")

    rows = {"one": failing, "two": lambda: {"here": 1}}
    monkeypatch.setattr(accelerator, "PARTS", {"part": (1, lambda small: rows)})
    found = accelerator.main(small=True)["part"]
    assert found == {"one": {"error": "RuntimeError: no such kernel"}, "two": {"here": 1}}
    monkeypatch.setattr(accelerator, "BUDGET", -1.0)
    assert "no time was left" in accelerator.main(small=True)["part"]["two"]["skipped"]


def test_a_call_goes_on_where_another_ended(monkeypatch):
    """On the same card with the same versions: what is missing, or parts that are named; otherwise
    it begins anew.
    """
    kept = {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    about = {"versions": {"jax": "1"}, "hardware": {"device": "card"}}
    monkeypatch.setattr(accelerator, "environment", lambda: about)
    monkeypatch.setattr(accelerator, "read", lambda name: {**about, **kept} if kept else None)
    monkeypatch.setattr(accelerator, "write", lambda name, found: kept.update(found))

    def measured(value, *lacking):
        def rows(small):
            def row(name):
                return {"error": "x"} if name in lacking else {"ms": value}

            return {name: (lambda name=name: row(name)) for name in ("a", "b")}

        monkeypatch.setattr(accelerator, "PARTS", {"one": (1, rows), "two": (1, rows)})

    measured(1, "b")
    accelerator.main()
    assert kept["one"] == {"a": {"ms": 1}, "b": {"error": "x"}}
    measured(2)
    accelerator.main(missing=True)
    assert kept["one"] == kept["two"] == {"a": {"ms": 1}, "b": {"ms": 2}}
    measured(3)
    accelerator.main(names=("two",))
    assert kept["one"] == {"a": {"ms": 1}, "b": {"ms": 2}}
    assert kept["two"] == {"a": {"ms": 3}, "b": {"ms": 3}}
    about["versions"] = {"jax": "2"}
    accelerator.main(names=("two",), missing=True)
    assert kept["two"] == {"a": {"ms": 3}, "b": {"ms": 3}}


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match=r"no accelerator here.*marks\.accelerator --small`"):
        accelerator.main()
    with pytest.raises(ConfigError, match=r"There is no part speed\. There are right, torch"):
        accelerator.main(small=True, names=("speed",))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("accelerator", "jax finds no accelerator here"),
        ("accelerator --names speed", "There is no part speed."),
        ("results --names vea", "There is no recipe called 'vea'. Did you mean vae"),
        ("attack --names kill", "There is no attack called 'kill'. Did you mean kills?"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_message(asked, said, capsys):
    with pytest.raises(SystemExit) as stop:
        everything.main(asked.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"benchmarks: error: {said}")


def test_a_program_that_does_not_answer_is_ended():
    with pytest.raises(RuntimeError, match=r"or had none after 0\.2 s"):
        AskedProcess([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)


def test_the_report_shows_every_part(found, monkeypatch):
    about = {
        "date": "a day",
        "driver": "none",
        "versions": {"jax": "0"},
        "hardware": {"device": "x"},
    }
    torch = {"eager": {"skipped": "no PyTorch here"}}
    monkeypatch.setattr(report_accelerator, "read", lambda name: {**found, **about, "torch": torch})
    text = "\n".join(report_accelerator.parts())
    for title in set(report_accelerator.TITLES) - {"scale"}:
        assert report_accelerator.TITLES[title] in text
    assert "no PyTorch here" in text
    assert "price of 16" in text
    monkeypatch.setattr(report_accelerator, "read", lambda name: None)
    assert report_accelerator.parts() == []


def test_every_family_has_a_row_and_every_scale_row_a_batch():
    assert set(accelerator_rows.SCALE) == {name for name, _ in accelerator_rows.SCALED}
    assert set(accelerator.PARTS) == set(report_accelerator.TITLES)
