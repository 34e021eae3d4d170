"""What `genjax list` says of rows and their models comes from files, so that it answers at once.
Here those files are held to the truth.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
from program import environment

import genjax.cli
from genjax.zoo import ZOO, catalogue

QUICK = ("vae", "cgan", "gru-markov")
HEAVY = "{'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'orbax', 'sklearn', 'matplotlib'}"


def written():
    return json.loads(catalogue.PATH.read_text())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_what_is_written_of_a_row_is_true(name):
    row = written()["rows"].get(name)
    if row is None:
        pytest.skip(f"{name} is not counted yet: `python -m genjax.zoo.catalogue` does it")
    assert row == catalogue.about(ZOO[name]) | catalogue.counted(ZOO[name])


def test_the_file_is_of_the_rows_that_there_are():
    again = "Run `python -m genjax.zoo.catalogue`: until then `genjax list` takes seconds."
    assert list(written()["rows"]) == list(ZOO), again
    assert written()["rows_sha256"] == catalogue._fingerprint(), again


def test_the_list_has_a_row_for_every_recipe(capsys):
    genjax.cli.main(["list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(ZOO)
    wanted = {"name", "family", "data", "score", "conditional", "parameters", "expected", "time"}
    assert all(wanted <= set(row) and all(row.values()) for row in rows)
    by_name = {row["name"]: row for row in rows}
    # 64-256-256-(8+8) and 8-256-256-64, each with its biases, and one scale.
    sizes = [(64, 256), (256, 256), (256, 16), (8, 256), (256, 256), (256, 64)]
    assert by_name["vae"]["parameters"] == f"{sum(a * b + b for a, b in sizes) + 1:,}"
    assert (by_name["vae"]["score"], by_name["cvae"]["conditional"]) == ("bound", "10 classes")
    assert by_name["gan"]["score"] == "samples"


def test_a_row_that_was_added_since_is_there_and_not_counted(monkeypatch):
    new = dataclasses.replace(ZOO["vae"], name="new", summary="a new one")
    monkeypatch.setitem(ZOO, "new", new)
    assert "new" not in catalogue.known()  # nobody has edited the files
    monkeypatch.setattr(catalogue, "_fingerprint", lambda: "another")
    known = catalogue.known()
    assert list(known) == list(ZOO)
    assert known["new"] == catalogue.about(new) | dict.fromkeys(catalogue.COUNTED, "not counted")
    assert known["vae"] == written()["rows"]["vae"]
    row = next(row for row in catalogue.rows() if row["name"] == "new")
    assert (row["parameters"], row["expected"]) == ("not counted", "not measured")


@pytest.mark.parametrize(
    "args", [["list"], ["list", "--json"], ["list", "--help"], ["train", "--help"], ["sweep"]]
)
def test_what_is_known_of_the_rows_takes_nothing_heavy(args):
    code = (
        "import sys\nfrom genjax.cli import main\n"
        f"try: main({args!r})\n"
        "except SystemExit as stop: pass\n"
        f"print(sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "vae" in done.stdout + done.stderr or args == ["list", "--help"]


def test_what_settings_a_recipe_has_takes_jax_and_no_more():
    code = (
        "import sys\nfrom genjax.cli import main\n"
        "try: main(['train', 'cgan', '--help'])\n"
        "except SystemExit as stop: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'jax', 'flax', 'optax', 'orbax', 'chex', 'sklearn', 'scipy', 'diffrax', 'matplotlib'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "['jax']"
