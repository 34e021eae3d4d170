"""The README does what it says: its composition example runs, and its table is what was
measured.
"""

import re
from pathlib import Path

import jax
import pytest

from genjax.zoo import ZOO
from genjax.zoo.catalogue import measured

README = (Path(__file__).parent.parent / "README.md").read_text()


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


@pytest.mark.slow
def test_composition_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS[1].strip().splitlines()) <= 26
    names = run(BLOCKS[1])
    assert names["metrics"]["vae/elbo"].shape == (100, 6)
    assert bool(jax.numpy.isfinite(names["metrics"]["vae/elbo"]).all())
    assert capsys.readouterr().out.strip()


def test_results_table_shows_every_recipe_as_measured() -> None:
    table = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    shown = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert set(shown) <= set(ZOO)
    for name, result in measured().items():
        row = shown[name]
        if "per_step" in result:
            assert f"{result['per_step']['nats']:.3f}" in row
        else:
            assert f"{result['mean']:{'.3g' if 'figures' in result else '.2f'}}" in row
