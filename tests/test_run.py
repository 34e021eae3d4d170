"""Run folders: what is in one, that it is never overwritten, and what sample, evaluate and sweeps
make of it.
"""

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from genjax.errors import CheckpointError, ConfigError, DataError
from genjax.evaluation.estimates import estimate, score_examples, scorer
from genjax.learning.checkpoint import Checkpoints
from genjax.runs import pictures
from genjax.runs.evaluate import evaluate
from genjax.runs.folder import default_folder, open_folder, read_spec, write_json
from genjax.runs.load import Loaded, load, sample
from genjax.runs.log import Log, logging_in
from genjax.runs.sweeps import check_axes, run_sweep
from genjax.runs.train import VALID_SEED, train
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, config_hash, from_dict, to_dict
from genjax.zoo.sections import replace

pytestmark = pytest.mark.both_ends

SHORT = {
    "steps": 40,
    "steps_per_call": 10,
    "log_every": 20,
    "evaluate_every": 30,
    "sample_every": 20,
    "checkpoint_every": 20,
}


def tiny(name: str, **changes: Any) -> Recipe:
    return replace(
        ZOO[name], **{"hidden": (8,), "latent_dim": 2, "batch_size": 16, **SHORT, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small conditional model of the digits after 40 steps."""
    folder = tmp_path_factory.mktemp("run") / "cvae"
    said: list[str] = []
    train(tiny("cvae"), folder, say=said.append)
    assert said == []
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


def events(folder: Path) -> list[Event]:
    """The TensorBoard events of a run, read as TensorBoard does: length, checksum, event,
    checksum.
    """
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_folder_is_what_the_documentation_says(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "samples",
        "spec.json",
        "tensorboard",
    ]
    assert read_spec(folder) == tiny("cvae").source().spec
    config = json.loads((folder / "config.json").read_text())
    assert config == to_dict(tiny("cvae"))
    assert to_dict(from_dict(config, ZOO)) == config
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["20", "40"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step_00000020.png",
        "step_00000040.png",
    ]
    for picture in [folder / "curves.png", *(folder / "samples").iterdir()]:
        assert matplotlib.image.imread(picture).std() > 0.01

    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30, 40]
    window = {"step", "seconds", "vae/loss", "vae/elbo", "vae/kl", "vae/log_likelihood"}
    assert [set(line) for line in lines] == [
        window,
        {"step", "seconds", "valid/bound"},
        window | {"valid/bound"},
    ]
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    assert lines[0]["vae/loss"] == -lines[0]["vae/elbo"]


def test_tensorboard_shows_the_same_numbers(folder: Path) -> None:
    found = events(folder)
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (1, SessionLog.START)
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in found
        for value in event.summary.value
    }
    lines = pictures.read_metrics(folder / "metrics.jsonl")
    assert scalars == {
        (line["step"], name): float(np.float32(value))
        for line in lines
        for name, value in line.items()
        if name != "step"
    }
    assert all(abs(event.wall_time - time.time()) < 86400 for event in found if event.summary.value)


def test_running_a_finished_run_again_changes_nothing_but_says_so(folder: Path) -> None:
    before = contents(folder)
    said: list[str] = []
    state = train(tiny("cvae"), folder, say=said.append)
    assert int(state.step) == 40
    assert said == [f"all 40 steps of {folder} were done before; nothing is left to train"]
    after = contents(folder)
    new = set(after) - set(before)
    assert all(name.startswith("tensorboard/") for name in new)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"curves.png"}, "drawn again, of the same lines"


def test_samples_are_a_function_of_the_key(loaded: Loaded) -> None:
    assert loaded.step == 40
    cond = np.repeat(np.arange(10, dtype=np.int32), 2)
    one, again, other = (sample(loaded, jax.random.key(seed), 20, cond) for seed in (0, 0, 1))
    assert one.shape == (20, 8, 8, 1)
    assert one.dtype == np.float32
    assert set(np.unique(one)) <= set(range(17))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    means = sample(loaded, jax.random.key(0), 20, cond, means=True)
    assert means.shape == one.shape
    assert not np.equal(means, np.round(means)).all()


def test_a_run_is_sampled_with_its_averaged_weights(folder: Path, loaded: Loaded) -> None:
    recipe = tiny("cvae")
    like = jax.eval_shape(recipe.training(loaded.model.spec).init, jax.random.key(0))
    restored = Checkpoints(folder / "checkpoints").restore(like)
    assert restored is not None
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, restored.state.params)
    assert not all(jax.tree.leaves(same)), (
        "ema_decay is set, so the averages must differ from the weights themselves"
    )


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, r"is conditional: give `cond` \(labels 0\.\.9, int \[4\]\)"),
        (np.asarray([0, 1, 2, 10], np.int32), r"labels 0\.\.9, int \[4\]; got labels from 0 to 10"),
        (np.zeros(3, np.int32), r"int \[4\]; got shape \[3\]"),
        (np.zeros(4, np.float32), "got dtype float32"),
    ],
)
def test_conditions_that_do_not_fit(loaded: Loaded, cond: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(loaded, jax.random.key(0), 4, cond)


def test_means_of_a_family_without_them(loaded: Loaded) -> None:
    without = loaded._replace(model=loaded.model._replace(latent=None))
    with pytest.raises(
        ConfigError, match=r"has no means of p\(x\|z\) to show; sample without --means"
    ):
        sample(without, jax.random.key(0), 1, np.zeros(1, np.int32), means=True)


def test_a_report_says_what_its_figure_is(folder: Path, loaded: Loaded) -> None:
    told: list[tuple[int, int]] = []
    report = evaluate(
        loaded,
        "test",
        seed=3,
        batch_size=77,
        progress=lambda done, total: told.append((done, total)),
    )
    source = loaded.recipe.source()
    arrays = source.load().test
    assert loaded.model.bound is not None
    score = scorer(loaded.model.bound, source.prepare)
    values = score_examples(score, loaded.params, loaded.state, arrays, jax.random.key(3), 77)
    expected = estimate(values)
    assert (report["mean"], report["standard_error"], report["n"]) == expected
    assert report["value"] == report["mean"]
    assert report["bits_per_dim"] == pytest.approx(-expected.mean / (64 * math.log(2)), rel=1e-12)
    assert told[-1] == (360, 360)
    fixed = (
        "recipe",
        "data",
        "unit",
        "kind",
        "estimator",
        "split",
        "seed",
        "step",
        "training_seed",
        "config_hash",
    )
    assert [report[name] for name in fixed] == [
        "cvae",
        "digits",
        "nats per example",
        "lower bound on the log-probability",
        "ELBO, 1 sample",
        "test",
        3,
        40,
        0,
        config_hash(json.loads((folder / "config.json").read_text())),
    ]
    assert report["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "numpy", "genjax-zoo"} <= set(report["versions"])
    assert report["hardware"]["backend"] == "cpu"
    assert json.loads(json.dumps(report)) == report


def test_part_of_a_split_and_other_splits(loaded: Loaded) -> None:
    report = evaluate(loaded, "valid", n=5)
    assert (report["n"], report["split"]) == (5, "valid")
    with pytest.raises(ConfigError, match="There is no split 'dev'; there are: train, valid, test"):
        evaluate(loaded, "dev")
    with pytest.raises(
        ConfigError, match="--n must be at least 2, so that there is a standard error; got 0"
    ):
        evaluate(loaded, n=0)


def test_an_exact_model_says_so(loaded: Loaded) -> None:
    exact = loaded.model._replace(log_prob=loaded.model.bound, bound=None, estimator="exact")
    assert evaluate(loaded._replace(model=exact), n=3)["kind"] == "exact log-probability"


def test_another_run_in_the_folder_is_refused_with_a_readable_difference(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        train(tiny("cvae", learning_rate=0.5, steps=50), folder)
    assert str(caught.value) == (
        f"{folder} holds a run with other settings; nothing was changed:\n"
        "  optimizer.learning_rate: there 0.001, now 0.5\n"
        "  schedule.steps: there 40, now 50\n"
        "Give the same settings to go on with it, or another folder with --out."
    )
    with pytest.raises(ConfigError, match=r"\n  recipe: there 'cvae', now 'vae-vamp'\n"):
        train(tiny("vae-vamp"), folder)
    assert contents(folder) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(
            ConfigError, match="exists and is not a run folder; nothing was written"
        ):
            open_folder(place, {})
    with pytest.raises(
        CheckpointError, match=r"Could not write .*config\.json: (Not a directory|File exists)"
    ):
        open_folder(tmp_path / "thesis.txt" / "below", {})
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recipe": "cva', r"config\.json is damaged: expected JSON"),
        ("[1]", r"config\.json is damaged: expected a JSON object, found list"),
        ('{"recipe": "cvea"}', "no recipe called 'cvea'. Did you mean cvae"),
        ('{"recipe": "cvae"}', "not a configuration of the recipe 'cvae'"),
        ('{"recipe": "cvae", "sweep": {}}', "is a sweep of several members"),
    ],
)
def test_a_damaged_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_settings_that_do_not_fit_leave_no_folder_behind(tmp_path: Path) -> None:
    for error, changes in (
        (DataError, {"batch_size": 2000}),
        (ConfigError, {"warmup_steps": 40}),
        (ConfigError, {"net": "conv", "channels": ()}),
    ):
        with pytest.raises(error):
            train(tiny("vae", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_cannot_be_sampled(tmp_path: Path) -> None:
    open_folder(tmp_path / "run", to_dict(tiny("cvae")))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load(tmp_path / "run")


def test_a_log_is_cut_back_to_the_step_that_training_goes_on_from(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.restore(0)
    for step in (10, 20, 30):
        log({"step": step, "a/loss": 1 / step, "b/loss": [1.0, float("nan")]})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 40, "a/lo')  # killed in the middle of a line
    again = Log(tmp_path)
    again.restore(20)
    again({"step": 25, "a/loss": 7.0})
    again.close()
    lines = pictures.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert lines[1]["a/loss"] == 1 / 20
    assert lines[2]["seconds"] >= lines[1]["seconds"]
    found = events(tmp_path)
    tags = [
        (event.step, [value.tag for value in event.summary.value])
        for event in found
        if event.summary.value
    ]
    members = ["seconds", "a/loss", "b/loss/0", "b/loss/1"]
    assert sorted(tags) == [
        (10, members),
        (20, members),
        (25, ["seconds", "a/loss"]),
        (30, members),
    ]
    # TensorBoard drops what an earlier process logged from the step of a START event on.
    assert [event.step for event in found if event.session_log.status == SessionLog.START] == [
        1,
        21,
    ]


def test_a_log_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.restore(0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(CheckpointError, match=r"Could not write .*metrics\.jsonl: Is a directory"):
        log({"step": 1, "a/loss": 1.0})
    log.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"Could not write .*tensorboard: "):
        Log(tmp_path / "other").restore(0)


def test_curves_are_drawn_however_a_run_ends_and_hide_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(log: Log) -> None:
        log.restore(0)
        log({"step": 1, "a/loss": 1.0})
        raise KeyError("what went wrong")

    with pytest.raises(KeyError, match="what went wrong"), logging_in(tmp_path, "title") as log:
        fail(log)
    assert (tmp_path / "curves.png").stat().st_size > 1000

    def full(*args: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(pictures, "save", full)
    with pytest.raises(KeyError, match="what went wrong"), logging_in(tmp_path, "title"):
        raise KeyError("what went wrong")
    with (
        pytest.raises(CheckpointError, match="the disk is full"),
        logging_in(tmp_path, "title"),
    ):
        pass


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert contents(tmp_path) == {"new/report.json": b'{\n  "a": 1\n}\n'}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "vae"),
        ({"seed": 3}, "vae,seed=3"),
        ({"hidden": (8, 16), "learning_rate": 3e-4}, "vae,hidden=8_16,learning-rate=0.0003"),
    ],
)
def test_each_command_has_a_folder_of_its_own(changes: dict[str, Any], name: str) -> None:
    row = ZOO["vae"]
    assert default_folder(replace(row, **changes), row) == Path("runs") / name


def test_folders_of_other_data_of_sweeps_and_of_many_settings() -> None:
    row = ZOO["cvae"]
    ring = row.on("ring")
    assert default_folder(ring, row) == Path("runs/cvae,data=ring")
    assert default_folder(replace(ring, conditional=False), row) == Path(
        "runs/cvae,conditional=False,data=ring"
    )
    assert default_folder(row, row, "sweep-", learning_rate=[1e-3, 3e-4], seeds=2) == Path(
        "runs/sweep-cvae,learning-rate=0.001_0.0003,seeds=2"
    )
    many = {
        "seed": 1,
        "steps": 12345,
        "batch_size": 17,
        "log_every": 11,
        "evaluate_every": 13,
        "sample_every": 17,
        "beta": 0.123456,
        "learning_rate": 0.000123456,
    }
    names = {
        default_folder(replace(row, **many), row),
        default_folder(replace(row, **{**many, "seed": 2}), row),
    }
    assert len(names) == 2
    assert all(len(name.name) < 60 for name in names), (
        "a long list of settings is replaced by a hash of it"
    )


@pytest.mark.slow
def test_a_sweep_compares_its_members_on_the_validation_split(tmp_path: Path) -> None:
    """A step size of 0 learns nothing, a reasonable one something, and a huge one nothing
    finite.
    """
    recipe = tiny(
        "vae-ring", n_samples=1, sample_every=0, algorithm="sgd", schedule="constant", ema_decay=0.0
    )
    axes = {"learning_rate": [0.0, 3e-3, 1e30]}
    results = run_sweep(recipe, axes, 2, tmp_path / "sweep", say=lambda text: None)
    assert json.loads((tmp_path / "sweep" / "results.json").read_text()) == results
    assert (results["metric"], results["split"], results["seeds"], results["steps"]) == (
        "valid/bound",
        "valid",
        [0, 1],
        40,
    )
    none, some, huge = results["results"]
    assert [line["settings"]["learning_rate"] for line in results["results"]] == axes[
        "learning_rate"
    ]
    assert some["mean"] == pytest.approx(np.mean(some["members"]), rel=1e-12)
    assert some["sd"] == pytest.approx(np.std(some["members"], ddof=1), rel=1e-12)
    assert none["not_finite"] == some["not_finite"] == 0
    assert some["mean"] > none["mean"] + 0.1
    assert (huge["not_finite"], huge["mean"], huge["sd"]) == (2, None, None)

    # Members are ordered by settings, then seeds, and an untrained member is the model as its seed
    # initialises it.
    source = recipe.source()
    model = recipe.build(source.spec)
    assert model.bound is not None
    score, valid = scorer(model.bound, source.prepare), source.load().valid
    for seed, found in enumerate(none["members"]):
        start = recipe.training(source.spec).init(jax.random.key(seed))
        solo = score_examples(
            score, start.params, start.state, valid, jax.random.key(VALID_SEED)
        ).mean()
        assert found == pytest.approx(solo, rel=1e-5)

    lines = pictures.read_metrics(tmp_path / "sweep" / "metrics.jsonl")
    assert np.shape(lines[-1]["vae/loss"]) == (6,)
    with pytest.raises(ConfigError, match="is a sweep of several members"):
        load(tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"sweep\.seeds: there 2, now 3"):
        run_sweep(recipe, axes, 3, tmp_path / "sweep")
    said: list[str] = []
    again = run_sweep(recipe, axes, 2, tmp_path / "sweep", say=said.append)
    assert said[0].startswith("all 40 steps")
    assert again["results"] == results["results"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"latent_dim": [2.0, 4.0]},
            r"--latent-dim cannot be swept in one program: only real-valued .*learning_rate",
        ),
        ({"lerning_rate": [1.0]}, "--lerning-rate cannot be swept"),
        ({"learning_rate": []}, "--learning-rate has no values"),
    ],
)
def test_axes_that_cannot_be_swept(axes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_axes(ZOO["vae"], axes)
