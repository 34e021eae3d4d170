"""No family's train step grows unnoticed: FLOPs, bytes accessed and instructions of the compiled
program against a baseline.
"""

import jax
import pytest

from benchmarks import programs


@pytest.mark.parametrize(
    "name", [n if n == "vae" else pytest.param(n, marks=pytest.mark.slow) for n in programs.ROWS]
)
def test_the_compiled_step_has_not_grown(name: str) -> None:
    was = programs.baseline()
    if not was:
        pytest.skip(
            f"no baseline for jax {programs.version()}: python -m benchmarks programs makes one"
        )
    if name not in was:
        pytest.skip(f"{name} is not measured: python -m benchmarks programs makes a baseline")
    grown = programs.growth(was[name], programs.measured(name, quick=True))
    assert not grown, "\n".join(grown)


def test_growth_is_said_with_what_was_and_is() -> None:
    was = {"recipe": "vae", "flops": 1000.0, "bytes_accessed": 200.0, "instructions": 50}
    assert programs.growth(was, was) == []
    assert programs.growth(was, was | {"flops": 1029.0, "instructions": 10}) == []
    (line,) = programs.growth(was, was | {"flops": 1100.0})
    assert line == (
        "vae: FLOPs of its train step were 1,000 and are 1,100 (+10.0 %, allowed +3 %). "
        "If meant, run python -m benchmarks programs."
    )
    assert (
        len(
            programs.growth(
                was, {"recipe": "vae", "flops": 2e3, "bytes_accessed": 4e2, "instructions": 99}
            )
        )
        == 3
    )


def test_a_baseline_keeps_those_of_other_versions(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(programs.common, "RESULTS", tmp_path)
    monkeypatch.setattr(programs, "ROWS", ("vae",))
    monkeypatch.setattr(programs, "measured", lambda name: {"recipe": name, "flops": 1.0})
    for version in ("0.12", "0.9", "0.10"):
        monkeypatch.setattr(programs, "version", lambda version=version: version)
        assert programs.baseline() == {}
        programs.main()
        assert programs.baseline() == {"vae": {"recipe": "vae", "flops": 1.0}}
    assert list(programs.common.read("programs")["versions"]) == ["0.9", "0.10", "0.12"]


@pytest.mark.slow
def test_the_size_does_not_depend_on_the_flags_of_the_suite() -> None:
    """The suite has eight devices and switches parts of the compiler off; the options undo that,
    but for `quick`.
    """
    assert len(jax.devices()) == 8
    fields = list(programs.CHECKED)
    quick, full = programs.measured("gan-ring", quick=True), programs.measured("gan-ring")
    assert [quick[field] for field in fields] == [full[field] for field in fields]
