"""A sequence net as a model: what `parts/autoregressive.py` makes of any network, seen on a tiny
one that is no family's, and what the families of sequences get from it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from gates import assert_close, assert_same, quick
from rows import grown, widen

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vrnn import vrnn
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.labels import labels_of
from genjax.learning.step import training
from genjax.nets.sequence import dropout
from genjax.parts.autoregressive import SequenceNet, autoregressive, recomputed
from genjax.parts.likelihoods import emission
from genjax.protocol import Batch, DataSpec

KEY = jax.random.key(3)
WORDS = DataSpec((4,), "tokens", levels=3, step="symbol", end=2, name="words")
LABELLED = DataSpec((4,), "tokens", levels=3, step="symbol", n_classes=2, name="labelled words")
STREAM = DataSpec((4,), "tokens", levels=3, step="symbol", name="a stream")
IMAGES = DataSpec((2, 2, 1), "binary", name="images")
PIXELS = DataSpec((4, 1), "binary", step="pixel", name="pixels")


def toy(spec, rate=0.0, **options):
    """The logits of a step are a dense layer of the sum of what came before it, and of the
    condition: a whole family.
    """
    steps = options.get("steps") or spec
    emit, n_events = emission(steps), steps.size // steps.shape[0] * (steps.levels or 1)

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = ((n_events, 4), (4, emit.n_outputs), (max(spec.cond_size, 1), 4))
        draw = (jax.random.normal(one, shape) for one, shape in zip(keys, shapes, strict=True))
        return dict(zip(("table", "kernel", "condition"), draw, strict=True))

    def outputs(p, x, c, dropped, key):
        event = jax.nn.one_hot(x, steps.levels) if steps.levels else x.astype(p["table"].dtype)
        seen = jnp.cumsum(event.reshape(*x.shape[:2], -1) @ p["table"], axis=1)
        h = jnp.concatenate([jnp.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
        if c is not None:
            dropped = jnp.zeros(len(c), bool) if dropped is None else dropped
            h = h + jnp.where(dropped[:, None], 0, c @ p["condition"])[:, None]
        return dropout(key, jnp.sin(h), rate) @ p["kernel"]

    net = SequenceNet(init, outputs, *recomputed(steps, outputs), context=steps.shape[0])
    return autoregressive(spec, emit, net, player="toy", **options), outputs


def setup(spec, **options):
    model, outputs = toy(spec, **options)
    return model, *model.init(jax.random.key(0)), outputs


def every(spec):
    """All events of the data; of sequences that differ in their padding one each."""
    levels = spec.levels or 2
    x = np.asarray(list(itertools.product(range(levels), repeat=spec.size)))
    if spec.end is not None:
        ended = np.cumsum(x == spec.end, axis=1) - (x == spec.end) > 0
        x = np.unique(np.where(ended, spec.end, x), axis=0)
    return jnp.asarray(x.reshape(-1, *spec.shape), spec.dtype)


def many(spec, n):
    """The same event n times over, with the label 1."""
    x = jnp.repeat(example_batch(spec, jax.random.key(1), 1).x, n, axis=0)
    return Batch(x, jnp.ones(n, jnp.int32) if spec.n_classes else None)


def p_value(observed, expected):
    """Of Pearson's test; what is rare is counted together."""
    common = expected >= 5
    observed, expected = (
        np.append(a[common], a[~common].sum())[: common.sum() + (~common).any()]
        for a in (observed, expected)
    )
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


# --- a network that is no family's ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "steps"),
    [(WORDS, None), (LABELLED, None), (IMAGES, PIXELS)],
    ids=["words", "labels", "images"],
)
def test_a_toy_net_is_a_distribution_and_its_samples_follow_it(spec, steps, x64):
    model, params, state, _ = setup(spec, steps=steps)
    x, params = every(spec), widen(params)
    n, score = 3000, quick(model.log_prob)
    for label in range(spec.n_classes or 1):
        cond = jnp.full(len(x), label, jnp.int32) if spec.n_classes else None
        p = np.exp(score(params, state, Batch(widen(x), cond), KEY))
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        assert p.max() > 3 * p.mean()
        labels = jnp.full(n, label, jnp.int32) if spec.n_classes else None
        drawn = quick(model.sample, static_argnums=3)(params, state, KEY, n, labels)
        same = (np.asarray(drawn)[None] == np.asarray(x)[:, None]).reshape(len(x), n, -1).all(-1)
        assert same.sum() == n
        assert p_value(same.sum(1), n * p) > 1e-3
        assert p_value(same.sum(1), n * p[::-1]) < 1e-6  # it can tell


@pytest.mark.slow
def test_a_net_without_a_cache_gives_its_outputs_step_by_step():
    model, params, state, _ = setup(LABELLED, cond_dropout=0.5)
    batch, own = example_batch(LABELLED, KEY, 5), model.autoregressive
    dropped = jnp.asarray([True, False, True, False, False])
    wanted = own.outputs(params, state, batch.x, batch.cond, dropped)
    found, carry = own.begin(params, state, 5, batch.cond, dropped)
    steps = [found]
    for t in range(3):
        found, carry = own.advance(params, state, carry, batch.x[:, t], batch.cond, dropped)
        steps.append(found)
    assert_close(jnp.stack(steps, axis=1), wanted, rtol=1e-6)
    kept = own.outputs(params, state, batch.x, batch.cond)
    differs = np.asarray((kept != wanted).any(axis=(1, 2)))
    np.testing.assert_array_equal(differs, dropped)


@pytest.mark.slow
def test_data_that_are_no_sequences_are_modelled_as_one_and_keep_their_shape():
    model, params, state, _ = setup(IMAGES, steps=PIXELS)
    batch = example_batch(IMAGES, KEY, 3)
    drawn = model.sample(params, state, KEY, 3)
    assert (drawn.shape, drawn.dtype) == ((3, 2, 2, 1), jnp.float32)
    own = model.autoregressive
    each = own.step_log_prob(params, state, batch)
    assert each.shape == (3, 4)
    loss, aux = model.losses["toy"](params, state, batch, KEY, 0)
    assert_close(loss, -each.sum(1), rtol=1e-6)
    assert_close(aux.metrics["nats_per_step"], -each.sum(1) / 4, rtol=1e-6)
    prompt = batch.x.reshape(3, 4, 1)[:, :3]
    x = own.generate(params, state, KEY, 3, prompt=prompt)
    assert_same(x.reshape(3, 4, 1)[:, :3], prompt)
    assert x.shape == (3, 2, 2, 1)
    assert own.generate(params, state, KEY, 3, length=2).shape == (3, 2, 1)


# --- what the loss draws --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_draws_what_its_noise_says():
    model, params, state, outputs = setup(LABELLED, rate=0.4, cond_dropout=0.3)
    batch = example_batch(LABELLED, KEY, 64)
    noise = model.noise["toy"](KEY, batch)
    assert 5 < noise.dropped.sum() < 40
    assert noise.restart is None
    c = jax.nn.one_hot(batch.cond, 2)
    found = outputs(params["toy"], batch.x, c, noise.dropped, noise.net)
    wanted = -emission(LABELLED).log_prob(batch.x, found).sum(1)
    assert_close(model.losses["toy"](params, state, batch, KEY, 0)[0], wanted, rtol=1e-6)


SMALL = {
    rnn: {"d_embed": 4, "d_hidden": 5},
    transformer: {"d_model": 4, "n_heads": 2, "n_layers": 1},
    vrnn: {"latent_dim": 2, "d_hidden": 4, "hidden": (4,)},
}
every_family = pytest.mark.parametrize("family", SMALL, ids=lambda family: family.__name__)


@pytest.mark.slow
@every_family
def test_conditions_are_left_out_where_the_noise_says(family):
    """The loss of an example does not depend on its condition exactly where the noise drops it."""
    model = family(LABELLED, **SMALL[family], cond_dropout=0.3)
    (player,) = model.losses
    params, state = model.init(jax.random.key(0))
    params, batch = grown(params), many(LABELLED, 64)
    loss = quick(model.losses[player])
    one, other = (
        np.asarray(loss(params, state, batch._replace(cond=cond), KEY, 0)[0])
        for cond in (batch.cond, 1 - batch.cond)
    )
    dropped = np.asarray(model.noise[player](KEY, batch).dropped)
    assert 5 < dropped.sum() < 40
    np.testing.assert_array_equal(one == other, dropped)
    without = family(LABELLED, **SMALL[family])
    assert without.noise[player](KEY, batch).dropped is None


@pytest.mark.slow
def test_streams_begin_afresh_where_the_noise_says():
    model = rnn(STREAM, **SMALL[rnn], lanes=32, restart=0.3)
    params, state = model.init(jax.random.key(0))
    params, batch = grown(params), many(STREAM, 32)
    loss = quick(model.losses["rnn"])
    first, (state, _) = loss(params, state, batch, jax.random.key(0), 0)
    second, _ = loss(params, state, batch, KEY, 0)
    again = np.asarray(model.noise["rnn"](KEY, batch).restart)
    assert 3 < again.sum() < 20
    np.testing.assert_array_equal(np.isclose(first, second, rtol=1e-6), again)


@pytest.mark.slow
def test_what_a_key_draws_has_not_changed():
    """Runs go on, and are repeated, with the noise that they had."""
    batch = many(LABELLED, 16)
    for family in (rnn, transformer):
        model = family(LABELLED, **SMALL[family], cond_dropout=0.3)
        (player,) = model.losses
        noise = model.noise[player](KEY, batch)
        key_net, key_cond, _ = jax.random.split(KEY, 3)
        assert_same(noise.net, key_net)
        assert_same(noise.dropped, jax.random.bernoulli(key_cond, 0.3, (16,)))
    noise = vrnn(LABELLED, **SMALL[vrnn], cond_dropout=0.3).noise["vrnn"](KEY, batch)
    key_z, key_cond, key_net = jax.random.split(KEY, 3)
    assert_same((noise.paths, noise.net), (key_z, key_net))
    assert_same(noise.dropped, jax.random.bernoulli(key_cond, 0.3, (16,)))


# --- parameters: their names and what they are ----------------------------------------------------


def renamed(tree):
    """The same tree with text for every key, in which "10" comes before "2"."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): renamed(value) for key, value in tree.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", [rnn, transformer], ids=lambda family: family.__name__)
def test_twelve_layers_are_matched_by_name(family):
    model = family(STREAM, **{**SMALL[family], "n_layers": 12})
    (player,) = model.losses
    params, state = model.init(jax.random.key(0))
    params, batch = grown(params), example_batch(STREAM, KEY, 2)
    text = renamed(params)
    assert jax.tree.structure(text) != jax.tree.structure(params)
    first, own = jax.tree.leaves(text), jax.tree.leaves(params)
    assert not all(one is other for one, other in zip(first, own, strict=True))

    def values(params):
        own = model.autoregressive
        return (
            model.losses[player](params, state, batch, KEY, 0)[0],
            model.log_prob(params, state, batch, KEY),
            own.outputs(params, state, batch.x),
            own.begin(params, state, 2)[0],
        )

    assert_same(quick(values)(text), quick(values)(params))


@pytest.mark.slow
def test_a_checkpoint_with_text_for_the_numbers_of_blocks_is_read(tmp_path):
    """As the Transformer's were before."""
    t = training(transformer(STREAM, **{**SMALL[transformer], "n_layers": 11}), optax.adam(0.1))
    ts, folder = t.init(KEY), Checkpoints(tmp_path)
    params = {"transformer": renamed(ts.params["transformer"])}
    assert "10" in params["transformer"]["blocks"]
    folder.save(ts._replace(params=params))
    assert_same(folder.restore(jax.eval_shape(t.init, KEY)).state, ts)


@every_family
def test_layers_have_whole_numbers_as_keys(family):
    params, _ = jax.eval_shape(family(STREAM, **SMALL[family]).init, KEY)
    paths = jax.tree_util.tree_leaves_with_path(params)
    keys = {entry.key for path, _ in paths for entry in path}
    assert {0} <= keys
    assert not [key for key in keys if isinstance(key, str) and key.isdigit()]


@every_family
@pytest.mark.parametrize("spec", [STREAM, LABELLED], ids=lambda spec: spec.name)
def test_tables_are_embeddings_and_the_rest_is_by_its_dimensions(family, spec):
    options = {"position": "learned"} if family is transformer else {}
    model = family(spec, **SMALL[family], **options)
    (player,) = model.losses
    params = jax.eval_shape(model.init, KEY)[0][player]
    labels = labels_of(params, model.labels, player)
    found = {}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.setdefault(label, set()).add(name)
    embed = "inputs/events" if family is transformer else "embed"
    tables = {f"{embed}/table"}
    if family is transformer:
        tables.add("inputs/positions")
    if spec.n_classes:
        tables.add(f"{embed}/condition/kernel")
    assert found["embedding"] == tables
    assert set(found) == {"embedding", "matrix", "vector"}


# --- bad input ------------------------------------------------------------------------------------


def test_lanes_need_windows():
    with pytest.raises(ConfigError, match="lanes=2 needs a network with `windows`"):
        toy(STREAM, lanes=2)


@every_family
def test_data_without_steps_are_no_sequences(family):
    with pytest.raises(ConfigError, match="models sequences, and images has no steps"):
        family(IMAGES, **SMALL[family])
