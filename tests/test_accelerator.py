"""The benchmark of accelerators, at sizes for this CPU: every part runs and says what it should."""

import pytest

from benchmarks import accelerator, report_accelerator


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return accelerator.main(small=True, names=("right", "members", "attention", "bitwise"))


@pytest.mark.slow
def test_values_agree_with_the_cpus_where_the_card_is_the_cpu(found):
    row = found["right"]["gan-ring"]
    assert row["highest"] == row["default"] == 0
    assert 0 < row["bfloat16"] < 0.05
    assert row["samples are finite"]


def test_members_and_attention_have_times(found):
    members = found["members"]["gan-ring"]
    assert all(ms > 0 for ms in members["ms"].values())
    assert members["price of 4"] > 0
    ways = found["attention"]["ms"]
    assert ways["our products"] > 0
    assert isinstance(ways["jax.nn, cuDNN"], str)  # the error: there is no such thing here


def test_a_run_goes_on_bitwise(found):
    assert found["bitwise"]["rows"] == {"gan-ring": True}


@pytest.mark.slow
@pytest.mark.tools
def test_large_models_are_measured_with_their_shares():
    rows = accelerator.main(small=True, names=("scale",))["scale"]["rows"]
    assert len(rows) == 3
    for row in rows.values():
        assert row["ms"] > 0
        assert row["product_flops"] > 0
        assert row["share_of_product"] > 0


def test_a_part_that_fails_is_told_and_costs_no_other(monkeypatch):
    def failing(small):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(accelerator, "PARTS", {"one": failing, "two": lambda small: {"here": 1}})
    found = accelerator.main(small=True)
    assert "no such kernel" in found["one"]["error"]
    assert found["two"] == {"here": 1}
    monkeypatch.setattr(accelerator, "BUDGET", -1.0)
    assert "not begun" in accelerator.main(small=True)["two"]["error"]


def test_the_report_shows_every_part(found, monkeypatch):
    about = {
        "date": "a day",
        "driver": "none",
        "versions": {"jax": "0"},
        "hardware": {"device": "x"},
    }
    torch = {"skipped": "no PyTorch here"}
    monkeypatch.setattr(report_accelerator, "read", lambda name: {**found, **about, "torch": torch})
    text = "\n".join(report_accelerator.parts())
    for title in set(report_accelerator.TITLES) - {"scale"}:
        assert report_accelerator.TITLES[title] in text
    assert "no PyTorch here" in text
    assert "price of 4" in text
    monkeypatch.setattr(report_accelerator, "read", lambda name: None)
    assert report_accelerator.parts() == []
