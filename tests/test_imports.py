"""The import rules, by folder: which room of the house may know of which, read from the source.

An arrow points downwards only: a room imports from the rooms before it in `ORDER`, and from itself.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genjax

ROOT = Path(genjax.__file__).parent
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(ROOT.rglob("*.py"))
}
# Rooms on one level do not know of each other.
ORDER = (
    {"errors", "spec"},
    {"protocol"},
    {"values"},
    {"checks", "settings"},
    {"nets", "data"},
    {"parts", "learning"},
    {"families"},
    {"zoo"},
    {"evaluation", "profiling"},
    {"runs"},
    {"cli"},
)


def imports(path, top_level=False):
    """Every module that a file imports, in full: at module level only, or anywhere."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used"
            yield node.module
            if node.module == "genjax":
                yield from (f"genjax.{alias.name}" for alias in node.names)


def rooms(name):
    """The rooms of genjax that a file imports from."""
    found = (module.split(".") for module in imports(FILES[name]))
    return {parts[1] for parts in found if parts[0] == "genjax" and len(parts) > 1}


def packages(name):
    return {module.split(".")[0] for module in imports(FILES[name])}


def room_of(name):
    return name.split(".")[0]


INSIDE = [name for name in FILES if room_of(name) not in ("__init__", "__main__")]


def test_every_file_is_in_a_room():
    known = set().union(*ORDER)
    assert {room_of(name) for name in INSIDE} == known


@pytest.mark.parametrize("name", INSIDE)
def test_arrows_point_downwards(name):
    level = next(index for index, group in enumerate(ORDER) if room_of(name) in group)
    below = set().union(*ORDER[:level])
    assert rooms(name) <= below | {room_of(name)}


def test_a_family_knows_of_no_other_family_but_in_compose():
    for name in FILES:
        if not name.startswith("families.") or name in ("families.compose", "families.__init__"):
            continue
        others = {module for module in imports(FILES[name]) if module.startswith("genjax.families")}
        assert others == set(), name


def test_families_know_of_no_optimiser():
    for name in FILES:
        if room_of(name) == "families":
            assert not packages(name) & {"optax", "flax", "orbax", "sklearn"}, name


def test_flax_is_imported_under_nets_only():
    assert [
        name for name in FILES if "flax" in packages(name) and not name.startswith("nets.")
    ] == []


def test_diffrax_is_imported_by_solvers_only_and_only_when_it_is_used():
    assert [name for name in FILES if "diffrax" in packages(name)] == ["parts.solvers"]
    assert "diffrax" not in set(imports(FILES["parts.solvers"], top_level=True))


def test_the_command_line_imports_nothing_heavy():
    # The bar names the loop's type of what it shows, and is itself imported when training starts.
    light = [name for name in FILES if room_of(name) == "cli" and name != "cli.progress"]
    for name in (*light, "errors", "__init__", "__main__"):
        modules = set(imports(FILES[name], top_level=True))
        assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names | {
            "genjax"
        }, name
    for name in light:
        found = {
            module for module in imports(FILES[name], top_level=True) if module.startswith("genjax")
        }
        assert {module.split(".")[1] for module in found} <= {"errors", "cli"}, name


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_does_not_import_jax(flag):
    code = (
        f"import sys; from genjax.cli import main; main(['{flag}']); "
        "print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_no_file_is_longer_than_500_lines():
    files = [*FILES.values(), *ROOT.parent.glob("tests/*.py"), *ROOT.parent.glob("benchmarks/*.py")]
    assert {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 500} == {}
