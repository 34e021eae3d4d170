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


@pytest.mark.slow
@pytest.mark.both_ends
def test_composition_example_runs(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(block.strip().splitlines()) <= 26  # 20 lines and some blank ones
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["metrics"]["vae/elbo"].shape == (100, 6)
    assert bool(jax.numpy.isfinite(names["metrics"]["vae/elbo"]).all())
    assert capsys.readouterr().out.strip()


def test_results_table_shows_every_recipe_as_measured() -> None:
    table = README.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    for name in ZOO:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        result = measured().get(name)
        if result is None:
            assert "not measured" in row
        elif "per_step" in result:
            assert f"{result['per_step']['nats']:.3f}" in row
        else:
            assert f"{result['mean']:{'.3g' if 'figures' in result else '.2f'}}" in row
