"""The README does what it says: its composition example runs, and its table is what was
measured.
"""

import re
from pathlib import Path

import jax
import pytest

from benchmarks.common import read
from benchmarks.report_results import attack_text, steps_text
from genjax.zoo import ZOO
from genjax.zoo.catalogue import measured

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPORT = (ROOT / "benchmarks" / "REPORT.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(block: str) -> dict:
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_ten_lines_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(BLOCKS[0])
    assert names["x"].shape == (16, 8, 8, 1)
    assert bool(jax.numpy.isfinite(names["metrics"]["vae/elbo"]))
    assert capsys.readouterr().out.startswith("(16, 8, 8, 1)")


def test_ones_own_array_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS[1].strip().splitlines()) <= 10
    names = run(BLOCKS[1])
    mean = names["run"].sample(1000).mean(0)
    assert abs(mean[0] - 5e4) < 2e4
    assert abs(mean[1] - 1e-3) < 5e-4
    assert names["run"].decode(names["z"]).shape == (5, 2)


@pytest.mark.slow
def test_composition_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS[2].strip().splitlines()) <= 26
    names = run(BLOCKS[2])
    assert names["metrics"]["vae/elbo"].shape == (100, 6)
    assert bool(jax.numpy.isfinite(names["metrics"]["vae/elbo"]).all())
    assert capsys.readouterr().out.strip()


def rows_of(text: str) -> dict[str, str]:
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_results_table_shows_every_family_as_measured() -> None:
    table = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    assert_as_measured(rows_of(table))
    of = {name: row.family.__name__ for name, row in ZOO.items()}
    families = {of[name] for name in rows_of(table)}
    said, _, not_measured = table.partition("Not measured yet:")
    for family in set(of.values()) - families:
        assert f"`{family}`" in (said if family in {of[n] for n in measured()} else not_measured)


def test_its_sentences_about_speed_and_attacks_are_as_measured() -> None:
    peers, overhead, attack = read("peers"), read("overhead"), read("attack")
    elsewhere = read("peers_elsewhere")
    assert peers
    assert overhead
    assert attack
    assert elsewhere
    assert steps_text(peers, overhead, elsewhere) in README
    assert attack_text(attack) in README
    lists = attack["arguments"]  # each was refused, or is told to have been accepted
    assert lists["told"] + lists["accepted"] == lists["argument lists"]
    assert f"{lists['accepted']} accepted" in attack_text(attack)


def test_the_report_shows_every_recipe_as_measured() -> None:
    shown = rows_of(REPORT.split("## Results of the zoo")[1])
    assert set(shown) == set(ZOO)
    assert_as_measured(shown)


def assert_as_measured(shown: dict[str, str]) -> None:
    found = measured()
    for name, row in shown.items():
        if name not in found:
            assert "not measured" in row
            continue
        result = found[name]
        if "per_step" in result:
            assert f"{result['per_step']['nats']:.3f}" in row
        else:
            assert f"{result['mean']:{'.3g' if 'figures' in result else '.2f'}}" in row
