"""What samples become: decoded sequences, text, pictures and music; and runs of models that go step
by step.
"""

import functools
import json
from pathlib import Path

import jax
import mido
import numpy as np
import pytest
from program import arrays_in, refused

import genjax.cli
from genjax.errors import ConfigError, DataError
from genjax.families.flow_matching import flow_matching
from genjax.families.gan import gan
from genjax.families.pixelcnn import pixelcnn
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.protocol import DataSpec
from genjax.runs import pictures, samples
from genjax.runs.folder import keep_spec, read_spec
from genjax.runs.samples import Decoding
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

STREAM = DataSpec(
    (6,), "tokens", levels=3, vocabulary=("a", "b", "\n"), step="character", name="letters"
)

LINES = DataSpec(
    (6,),
    "tokens",
    levels=3,
    vocabulary=("\n", "a", "b"),
    step="character",
    end=0,
    n_classes=2,
    name="lines",
)

IDS = DataSpec((5,), "tokens", levels=13, step="token", name="ids")
ROLLS = DataSpec((9, 88), "binary", step="frame", lengths=True, name="rolls")


@functools.cache
def letters():
    model = rnn(STREAM, d_embed=4, d_hidden=6)
    return model, *model.init(jax.random.key(0))


def draw(n: int = 5, seed: int = 0, **how) -> np.ndarray:
    model, params, state = letters()
    return samples.draw(model, params, state, jax.random.key(seed), n, None, Decoding(**how))


@pytest.mark.slow
def test_without_settings_samples_are_the_models_own() -> None:
    model, params, state = letters()
    np.testing.assert_array_equal(draw(), model.sample(params, state, jax.random.key(0), 5))


@pytest.mark.slow
def test_a_prompt_is_kept_and_what_follows_depends_on_it() -> None:
    x = draw(200, prompt="ab\n", length=8)
    assert x.shape == (200, 8)
    assert [samples.decode(row, STREAM)[:3] for row in x] == ["ab\n"] * 200
    assert len(np.unique(x[:, 3:], axis=0)) > 50


@pytest.mark.slow
def test_a_prompt_that_fills_all_there_is_to_be_is_no_sample() -> None:
    model = transformer(STREAM, d_model=4, n_layers=1, n_heads=2)
    params, state = model.init(jax.random.key(0))
    how = Decoding(prompt="ab" * 20, length=30)  # beyond the context, where windows go on
    with pytest.raises(ConfigError, match="40 characters, and only 30 fit"):
        samples.draw(model, params, state, jax.random.key(0), 1, None, how)


def test_where_tokens_are_no_text_a_prompt_is_ids() -> None:
    model = rnn(IDS, d_embed=2, d_hidden=2)
    params, state = model.init(jax.random.key(0))

    def with_prompt(prompt):
        how = Decoding(prompt=prompt)
        return samples.draw(model, params, state, jax.random.key(0), 50, None, how)

    x = with_prompt(" 12, 7,3")
    np.testing.assert_array_equal(x[:, :3], np.tile([12, 7, 3], (50, 1)))
    assert len(np.unique(x[:, 3:])) > 5
    for bad in ("12,13", "-1", "", "a,b", "1,,2", "1.5", "9" * 5000, "\u0661"):
        with pytest.raises(ConfigError, match=r"give ids from 0 to 12 between commas.*got '"):
            with_prompt(bad)
    with pytest.raises(ConfigError, match="The prompt has 6 tokens, and only 5 fit"):
        with_prompt("1,2,3,4,5,6")


@pytest.mark.slow
def test_temperature_zero_is_greedy_and_agrees_with_one_beam() -> None:
    greedy = draw(3, temperature=0.0)
    assert (greedy == greedy[:1]).all()
    np.testing.assert_array_equal(greedy, draw(3, seed=1, temperature=0.0))
    np.testing.assert_array_equal(greedy, draw(3, beams=1))
    np.testing.assert_array_equal(greedy, draw(3, top_k=1, length=6))


@pytest.mark.slow
def test_rules_cut_off_what_they_say() -> None:
    model, params, state = letters()
    (outputs, _) = model.autoregressive.begin(params, state, 1)
    rarest = int(np.argmin(outputs[0]))
    assert rarest in draw(500)[:, 0]
    assert rarest not in draw(500, top_k=2)[:, 0]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"prompt": "abc"}, DataError, r"the prompt: the character 'c' .* at position 2"),
        ({"prompt": "abababa"}, ConfigError, "7 characters, and only 6 fit"),
        ({"temperature": -1.0}, ConfigError, "temperature"),
        ({"top_p": 0.0}, ConfigError, r"\(0, 1\]"),
        ({"top_p": 1.5}, ConfigError, r"\(0, 1\]"),
        ({"beams": 2, "top_k": 1}, ConfigError, "--beams"),
        ({"guidance": 2.0}, ConfigError, "condition"),
    ],
)
def test_settings_that_do_not_fit_are_refused(how, error, message) -> None:
    with pytest.raises(error, match=message):
        draw(**how)


@pytest.mark.slow
def test_rules_are_for_tokens_and_steps() -> None:
    key = jax.random.key(0)
    model = rnn(ROLLS, d_embed=2, d_hidden=2)
    params, state = model.init(key)
    with pytest.raises(
        ConfigError, match="--temperature: rules and beams are for tokens; rolls is binary"
    ):
        samples.draw(model, params, state, key, 2, None, Decoding(temperature=0.5))
    with pytest.raises(
        ConfigError, match="--prompt takes text or token ids, and rolls has neither"
    ):
        samples.draw(model, params, state, key, 2, None, Decoding(prompt="a"))
    model = vae(DataSpec((2,), "continuous"), hidden=(2,), latent_dim=1)
    with pytest.raises(ConfigError, match="step by step"):
        samples.draw(model, *model.init(key), key, 2, None, Decoding(top_k=2))


@functools.cache
def squares():
    spec = DataSpec((2, 2, 1), "discrete", levels=5, n_classes=2, name="squares")
    model = flow_matching(spec, hidden=(4,), cond_dropout=0.5, n_steps=3)
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    return (
        model,
        jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(leaf.dtype), params),
        state,
    )


@pytest.mark.slow
def test_a_solver_its_steps_and_guidance_are_what_a_model_from_noise_to_data_takes() -> None:
    model, params, state = squares()
    key, cond = jax.random.key(1), np.arange(6) % 2

    def draw(**how) -> np.ndarray:
        return samples.draw(model, params, state, key, 6, cond, Decoding(**how))

    np.testing.assert_array_equal(draw(), model.sample(params, state, key, 6, cond))
    how: dict = {"solver": "ddim", "n_steps": 7, "grid": "cosine", "guidance": 3.0}
    wanted = model.denoiser.generate(params, state, key, 6, cond, **how)
    np.testing.assert_array_equal(draw(**how), wanted)
    assert (np.asarray(wanted) != draw()).any()
    film = samples.film(model, params, state, key, 6, cond, Decoding(**how))
    assert film.shape == (8, 6, 2, 2, 1)
    np.testing.assert_array_equal(film[-1], wanted)
    assert len(samples.film(model, params, state, key, 6, cond, Decoding())) == 4


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"temperature": 0.5, "solver": "heun"},
            r"--temperature: for models that make a sequence .* --solver, --n-steps, --grid",
        ),
        (
            {"prompt": "a", "beams": 2},
            "--prompt, --beams: for models that make a sequence step by step",
        ),
        ({"solver": "huen"}, r"no solver called 'huen'\. Did you mean heun\?"),
        ({"grid": "karas"}, r"no grid called 'karas'\. Did you mean karras\?"),
    ],
)
def test_settings_that_do_not_fit_a_model_from_noise_to_data_are_refused(how, message) -> None:
    model, params, state = squares()
    with pytest.raises(ConfigError, match=message):
        samples.draw(
            model, params, state, jax.random.key(0), 2, np.zeros(2, np.int32), Decoding(**how)
        )


def test_solvers_and_films_are_for_models_from_noise_to_data_only() -> None:
    message = r"--solver, --n-steps: for models that go from noise to data \(diffusion, flow match"
    with pytest.raises(ConfigError, match=message):
        draw(solver="heun", n_steps=3, temperature=0.5)
    model, params, state = letters()
    with pytest.raises(
        ConfigError, match=r"--film shows the way from noise to data .*letters has none"
    ):
        samples.film(model, params, state, jax.random.key(0), 2, None, Decoding())
    plain = vae(DataSpec((2,), "continuous"), hidden=(2,), latent_dim=1)
    with pytest.raises(ConfigError, match=r"--n-steps: for models that go from noise to data"):
        samples.draw(
            plain, *plain.init(jax.random.key(0)), jax.random.key(0), 2, None, Decoding(n_steps=3)
        )


def test_guidance_of_a_model_that_was_never_trained_without_its_condition_is_refused() -> None:
    model = flow_matching(squares()[0].spec, hidden=(4,))
    with pytest.raises(
        ConfigError, match=r"never trained without its condition: build it with cond_dropout"
    ):
        samples.draw(
            model,
            *model.init(jax.random.key(0)),
            jax.random.key(0),
            2,
            np.zeros(2, np.int32),
            Decoding(guidance=2.0),
        )


RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SOLVING = ("solver", "n_steps", "grid")
IMAGES = DataSpec((2, 2, 1), "binary", n_classes=2, name="images")


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (rnn(STREAM, d_embed=2, d_hidden=2), ("prompt", *RULES, "beams", "length")),
        (
            rnn(LINES, d_embed=2, d_hidden=2, cond_dropout=0.5),
            ("prompt", *RULES, "guidance", "beams", "length"),
        ),
        (rnn(IDS, d_embed=2, d_hidden=2), ("prompt", *RULES, "beams", "length")),
        (rnn(ROLLS, d_embed=2, d_hidden=2), ("length",)),
        (vrnn(STREAM, d_hidden=2, hidden=(2,), latent_dim=2), ("prompt", "length")),
        (pixelcnn(IMAGES, channels=2, n_layers=1), ()),
        (vae(IMAGES, hidden=(2,), latent_dim=1), ()),
        (gan(IMAGES, hidden=(2,)), ()),
        (flow_matching(IMAGES, hidden=(2,)), SOLVING),
        (flow_matching(IMAGES, hidden=(2,), cond_dropout=0.5), ("guidance", *SOLVING)),
    ],
    ids=[
        "text",
        "classes",
        "ids",
        "music",
        "latent steps",
        "pixels",
        "vae",
        "gan",
        "flow",
        "guided flow",
    ],
)
def test_what_applies_to_a_model_is_known_before_it_is_sampled(model, fields) -> None:
    assert samples.fields_for(model) == fields


def test_means_are_for_latents_and_films_for_what_comes_from_noise() -> None:
    of_latents, flows = vae(IMAGES, hidden=(2,), latent_dim=1), flow_matching(IMAGES, hidden=(2,))
    wide = flow_matching(DataSpec((5,), "continuous"), hidden=(2,))
    assert [samples.shows_means(model) for model in (of_latents, flows)] == [True, False]
    assert [samples.has_film(model) for model in (of_latents, flows, wide)] == [False, True, False]
    assert samples.picture_sampler(of_latents) is of_latents.latent.sample_mean
    assert samples.picture_title(of_latents) == "means of p(x|z), z ~ p(z),"
    vectors = vae(DataSpec((5,), "binary"), hidden=(2,), latent_dim=1)
    for model in (flows, vectors):
        assert samples.picture_sampler(model) is model.sample
        assert samples.picture_title(model) == "samples"


@pytest.mark.parametrize(
    ("spec", "n"),
    [
        (IMAGES, 100),
        (DataSpec((2, 2, 1), "binary"), 64),
        (DataSpec((5,), "continuous"), 2000),
        (DataSpec((5, 5), "continuous"), 64),
        (DataSpec((2,), "continuous", n_classes=3), 2000),
        (LINES, 16),
        (ROLLS, 16),
    ],
)
def test_how_many_samples_a_picture_shows(spec: DataSpec, n: int) -> None:
    assert samples.picture_size(spec) == n


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of flow matching of digits."""
    where = tmp_path_factory.mktemp("flow") / "run"
    recipe = replace(
        ZOO["flow-matching"],
        hidden=(8,),
        steps=4,
        steps_per_call=2,
        evaluate_every=4,
        n_likelihood_steps=1,
    )
    train(recipe, where, say=lambda text: None)
    return where


@pytest.mark.slow
def test_a_run_is_sampled_by_the_solver_asked_for_and_filmed(
    flow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--solver",
        "heun",
        "--n-steps",
        "4",
        "--grid",
        "karras",
        "--guidance",
        "2",
        "--cond",
        "3",
        "--n",
        "5",
    ]
    genjax.cli.main(["sample", str(flow), *flags])
    genjax.cli.main(["sample", str(flow), *flags, "--film"])
    stem = "sample_n5_seed0_cond3{}_guidance2.0_solverheun_n_steps4_gridkarras"
    plain, film = (
        arrays_in(flow / "samples" / f"{stem.format(part)}.npz") for part in ("", "_film")
    )
    assert film["film"].shape == (5, 5, 8, 8, 1)
    np.testing.assert_array_equal(film["x"], plain["x"])
    np.testing.assert_array_equal(film["film"][-1], plain["x"])
    assert plain["cond"].tolist() == [3] * 5
    assert (flow / "samples" / f"{stem.format('_film')}.png").stat().st_size > 1000
    assert "5 samples from noise to data [5, 8, 8, 1] in " in capsys.readouterr().out
    for bad, message in (
        (["--solver", "huen"], "Did you mean heun?"),
        (["--n-steps", "0"], "--n-steps must be at least 1; got 0."),
        (["--guidance", "nan"], "--guidance must be a finite number"),
        (["--temperature", "0.5"], "for models that make a sequence step by step"),
    ):
        assert message in refused(["sample", str(flow), *bad], capsys)


def test_text_is_written_as_text_and_names_its_classes(tmp_path: Path) -> None:
    x = np.asarray([[1, 2, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
    assert samples.texts(x, LINES) == ["ab", "bbbbbb"]
    named = DataSpec(
        **{**json.loads(json.dumps(LINES.__dict__)), "class_names": ["LATIN", "GREEK"]}
    )
    (path,) = samples.show(x, named, tmp_path / "s", "", cond=np.asarray([1, 0]))
    assert path == tmp_path / "s.txt"
    assert path.read_text() == "GREEK: ab\nLATIN: bbbbbb\n"


@pytest.mark.slow
def test_piano_rolls_are_drawn_and_played(tmp_path: Path) -> None:
    x = (np.random.default_rng(0).random((10, 9, 88)) < 0.1).astype(np.float32)
    (picture,) = samples.show(x, ROLLS, tmp_path / "s", "title")
    assert picture.suffix == ".png"
    paths = samples.play(x, ROLLS, tmp_path / "s")
    assert [path.name for path in paths] == [f"s_{i}.mid" for i in range(samples.MIDI_FILES)]
    notes = [m.note - 21 for m in mido.MidiFile(paths[1]) if m.type == "note_on"]
    assert set(notes) == set(np.flatnonzero(x[1].any(0)).tolist())
    assert samples.play(x[..., :3], DataSpec((9, 3), "binary", step="frame"), tmp_path / "t") == []


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec((12, 3), "continuous", step="step"),
        DataSpec((12,), "tokens", levels=5, step="token"),
        DataSpec((8, 8), "discrete", levels=17, step="row"),
    ],
    ids=["lines", "raster", "image rows"],
)
def test_sequences_have_a_picture(spec) -> None:
    x = np.random.default_rng(0).integers(0, 5, (7, *spec.shape)).astype(np.float32)
    picture = pictures.samples(x, spec, "title")
    assert picture is not None
    assert picture.axes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of an LSTM of a text file of one's own."""
    where = tmp_path_factory.mktemp("text")
    (where / "book.txt").write_text("the cat sat on the mat. " * 60)
    recipe = replace(
        ZOO["lstm"].__class__(
            **{
                **ZOO["lstm"].__dict__,
                "data": str(where / "book.txt"),
                "data_options": {"context": 16},
            }
        ),
        d_embed=4,
        d_hidden=8,
        lanes=0,
        steps=20,
        batch_size=8,
        evaluate_every=20,
        sample_every=20,
    )
    train(recipe, where / "run", say=lambda text: None)
    return where / "run"


@pytest.mark.slow
def test_a_run_of_text_shows_text_and_needs_no_data_to_sample(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shown,) = (folder / "samples").glob("step_*.txt")
    assert set(shown.read_text()) <= set("the cat sat on the mat. -\n")
    (folder.parent / "book.txt").rename(folder.parent / "gone.txt")
    try:
        genjax.cli.main(
            [
                "sample",
                str(folder),
                "--n",
                "2",
                "--prompt",
                "the",
                "--temperature",
                "0.5",
                "--length",
                "40",
            ]
        )
    finally:
        (folder.parent / "gone.txt").rename(folder.parent / "book.txt")
    out = capsys.readouterr().out
    texts = [text for text in out.split("-" * 40 + "\n") if text][:2]
    assert len(texts) == 2
    assert all(text.startswith("the") for text in texts)
    x = arrays_in(folder / "samples" / "sample_n2_seed0_prompt_temperature0.5_length40.npz")["x"]
    assert x.shape == (2, 40)


def test_a_report_on_text_counts_in_characters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genjax.cli.main(["evaluate", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    per = report["per_step"]
    assert report["kind"] == "exact log-probability"
    assert per["n"] == report["n"] * 16
    assert per["nats"] == pytest.approx(-report["mean"] / 16, rel=1e-6)
    assert per["bits"] == pytest.approx(per["nats"] / np.log(2))
    assert per["perplexity"] == pytest.approx(np.exp(per["nats"]))
    assert f"{per['nats']:.4f} ± " in capsys.readouterr().out


def test_changed_data_are_noticed(folder: Path, tmp_path: Path) -> None:
    spec = read_spec(folder)
    assert spec is not None
    assert spec.vocabulary == tuple(sorted(set("the cat sat on the mat. ")))
    keep_spec(folder, spec)
    changed = DataSpec(
        (16,), "tokens", levels=2, vocabulary=("a", "b"), step="character", name=spec.name
    )
    with pytest.raises(DataError, match=r"levels was 11, is 2; vocabulary was .*, is \('a', 'b'\)"):
        keep_spec(folder, changed)
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"spec\.json is damaged"):
        read_spec(tmp_path)


@pytest.mark.slow
def test_bad_settings_end_in_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["--prompt", "dog"], "'d'"),
        (["--temperature", "-1"], "temperature"),
        (["--length", "0"], "--length must be at least 1"),
        (["--top-p", "2"], "(0, 1]"),
        (["--guidance", "2"], "condition"),
    ):
        assert message in refused(["sample", str(folder), *args], capsys)
