"""Every notebook runs from top to bottom, with small settings in place of those in its cell tagged
`parameters`.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SMALL = {
    "01_composition.ipynb": "STEPS = 40\nSWEEP_STEPS = 20\nSEEDS = 2",
    "02_adversarial.ipynb": "STEPS = 40\nSEEDS = 2",
    "03_sequences.ipynb": "STEPS = 20\nPATH_STEPS = 20\nWIDTH = 16",
    "04_guidance.ipynb": "STEPS = 200\nEARLY = 100\nWIDTH = 16\nN = 30",
    "05_scale.ipynb": "SECONDS = 0.02\nHIDDEN = 64\nMEMBERS = (1, 2)\nSTEPS = (1, 2)\nRECIPES = ()",
    "06_your_own_data.ipynb": "STEPS = 20\nN = 300",
    "07_from_python.ipynb": "STEPS = 100\nSEEDS = 2",
    "08_exact_likelihood.ipynb": "STEPS = 20\nCELLS = 8\nSIDE = 6",
}
SHOWS = {  # pictures
    "01_composition.ipynb": 4,
    "02_adversarial.ipynb": 2,
    "03_sequences.ipynb": 2,
    "04_guidance.ipynb": 2,
    "05_scale.ipynb": 1,
    "06_your_own_data.ipynb": 3,
    "07_from_python.ipynb": 2,
    "08_exact_likelihood.ipynb": 3,
}


def test_every_notebook_has_small_settings() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SMALL)


# What most users begin with; the others are for who looks closer.
FIRST = ("06_your_own_data.ipynb", "07_from_python.ipynb")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.tools) for name in SMALL],
)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One device, and pictures in the notebook, as a reader has it; but compiled as fast as the
    # other tests.
    monkeypatch.setenv(
        "XLA_FLAGS", os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    )
    monkeypatch.delenv("MPLBACKEND")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == 1
    settings[0].source = SMALL[name]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    pictures = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == SHOWS[name]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_notebook_was_stored_executed_and_clean(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert not any(out.output_type == "error" or out.get("name") == "stderr" for out in outputs)
