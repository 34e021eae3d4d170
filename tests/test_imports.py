"""The import rules: which part of genjax may know of which, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genjax

ROOT = Path(genjax.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in sorted(ROOT.rglob("*.py"))}
FAMILIES = [name for name in FILES if name.startswith("families.") and not name.endswith("__init__")]


def imports(path, top_level=False):
    """Every module that a file imports, in full: at module level only, or anywhere."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used"
            yield node.module
            if node.module.startswith("genjax"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """The genjax modules that a file imports: "data.order", "protocol"."""
    found = {module.removeprefix("genjax").lstrip(".") for module in imports(FILES[name]) if module.split(".")[0] == "genjax"}
    return {module for module in found if module in FILES or f"{module}.__init__" in FILES}


def packages(name):
    return {module.split(".")[0] for module in imports(FILES[name])}


def within(name, *allowed):
    assert {module.split(".")[0] for module in own(name)} <= set(allowed), name


def test_the_contract_knows_of_nothing_else():
    within("errors")
    within("protocol", "errors")


def test_families_know_of_no_optimiser_training_or_other_family():
    assert FAMILIES
    for name in FAMILIES:
        assert not packages(name) & {"optax", "flax", "orbax", "sklearn"}, name
        parts = ("distributions", "paths", "coupling", "bounds", "solvers", "guidance", "decoding")
        within(name, "protocol", "errors", *parts, "nets")


def test_training_knows_of_no_family_and_no_data():
    within("train", "protocol", "errors", "optim")
    within("sharding", "protocol", "errors")
    within("optim", "protocol", "errors")
    within("distributions", "protocol", "errors")
    within("paths", "protocol", "errors", "distributions")
    within("coupling", "protocol")
    within("bounds", "protocol", "errors", "distributions", "paths")
    within("solvers", "protocol", "errors", "distributions", "paths")
    within("distributed", "errors")
    within("checkpoint", "protocol", "errors", "distributed")
    assert not {"families", "zoo"} & {module.split(".")[0] for module in own("loop")}


def test_data_and_nets_know_of_the_contract_only():
    for name in FILES:
        if name.startswith("data."):
            within(name, "protocol", "errors", "data")
        if name.startswith("nets."):
            within(name, "protocol", "errors", "nets")


def test_flax_is_imported_under_nets_only():
    assert [name for name in FILES if "flax" in packages(name) and not name.startswith("nets.")] == []


def test_diffrax_is_imported_by_solvers_only_and_only_when_it_is_used():
    assert [name for name in FILES if "diffrax" in packages(name)] == ["solvers"]
    assert "diffrax" not in set(imports(FILES["solvers"], top_level=True))


def test_the_command_line_imports_nothing_heavy():
    for name in ("cli", "cli_runs", "terminal", "errors", "__init__", "__main__"):
        light = sys.stdlib_module_names | {"genjax"}
        modules = set(imports(FILES[name], top_level=True))
        assert {module.split(".")[0] for module in modules} <= light, name
    for name in ("cli", "cli_runs"):
        found = {module for module in imports(FILES[name], top_level=True) if module.startswith("genjax")}
        assert found
        assert all(module.split(".")[1] in ("errors", "terminal") for module in found)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_does_not_import_jax(flag):
    code = f"import sys; from genjax.cli import main; main(['{flag}']); print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.splitlines()[-1] == "False False"


def test_no_file_is_longer_than_500_lines():
    files = [*FILES.values(), *ROOT.parent.glob("tests/*.py"), *ROOT.parent.glob("benchmarks/*.py")]
    assert {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 500} == {}
