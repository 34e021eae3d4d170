"""Figures that go elsewhere as well: named writers, of one's own, missing and failing ones."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from short_runs import tiny

from genjax.errors import ConfigError
from genjax.runs.train import train
from genjax.runs.writers import Writers


class Service:
    """What a fake wandb or trackio was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.step = self.finished = 0
        self.config = self
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init, module.Image = self.init, str
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **how: Any) -> "Service":
        self.begun.append(how)
        return self

    def update(self, config: dict[str, Any], allow_val_change: bool) -> None:
        self.begun[-1]["config"] = config

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.lines.append((step, metrics))
        self.step = step + 1

    def finish(self) -> None:
        self.finished += 1


class Own:
    def __init__(self, fails: bool = False) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.fails, self.calls = fails, 0

    def begin(self, config: dict[str, Any], name: str, folder: Path) -> None: ...
    def image(self, step: int, name: str, path: Path) -> None: ...
    def close(self) -> None: ...

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.calls += 1
        if self.fails:
            raise OSError("no network")
        self.lines.append((step, metrics))


@pytest.mark.slow
def test_both_services_get_figures_and_pictures_and_go_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, trackio = Service(monkeypatch, "wandb"), Service(monkeypatch, "trackio")
    folder = tmp_path / "run"
    train(tiny("vae"), folder, say=str, log_to=("wandb", "trackio"))
    for service in (wandb, trackio):
        assert [step for step, line in service.lines if "vae/loss" in line] == [20, 40]
        assert [step for step, line in service.lines if "samples" in line] == [20, 40]
        assert service.begun[0]["config"]["schedule"]["steps"] == 40
        assert service.finished == 1
    train(tiny("vae", steps=60), folder, say=str, log_to="wandb")
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"]
    assert wandb.begun[1]["resume"] == "allow"
    assert [step for step, line in wandb.lines if "vae/loss" in line] == [20, 40, 60]


@pytest.mark.slow
def test_a_step_that_wandb_has_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Service(monkeypatch, "wandb")
    wandb.step = 21
    train(tiny("vae"), tmp_path / "run", say=str, log_to="wandb")
    assert min(step for step, _ in wandb.lines) > 20


def test_a_missing_package_is_said_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'genjax-zoo\[wandb\]'"):
        train(tiny("vae"), tmp_path / "run", log_to="wandb")
    with pytest.raises(ConfigError, match="Did you mean wandb"):
        train(tiny("vae"), tmp_path / "run", log_to="wand")
    with pytest.raises(ConfigError, match=r"has no begin\(\)"):
        train(tiny("vae"), tmp_path / "run", log_to=[3])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_writer_that_fails_is_said_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Own(fails=True), Own()
    state = train(tiny("vae"), tmp_path / "run", say=str, log_to=(bad, good))
    assert int(state.step) == 40
    assert caplog.text.count("the writer Own (0) failed (OSError: no network)") == 1
    assert bad.calls == 1
    assert [step for step, line in good.lines if "vae/loss" in line] == [20, 40]


def test_members_are_figures_of_their_own(tmp_path: Path) -> None:
    own = Own()
    writers = Writers({"own": own})
    writers.begin({}, tmp_path)
    writers.write({"step": 3, "a/loss": [1.0, 2.0], "b": 4.0})
    assert own.lines == [(3, {"a/loss/0": 1.0, "a/loss/1": 2.0, "b": 4.0})]
