"""Sharded training on 8 virtual devices: the values of one device, the layout asked for, and the
collectives that it takes.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gates import assert_close, quick
from jax.sharding import Mesh, PartitionSpec
from rows import batch, one_device, optimizer, plain, run, widen

from genjax.data import example_batch
from genjax.errors import ConfigError
from genjax.families.diffusion import diffusion
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.learning.checkpoint import Checkpoints
from genjax.learning.members import ensemble
from genjax.learning.optim import track_ema
from genjax.learning.sharding import TENSOR_RULES, describe, layout, make_mesh, parse_mesh, shard
from genjax.learning.step import training
from genjax.learning.transforms import microbatch, scan_steps
from genjax.nets.platforms import traced_for
from genjax.profiling.measure import cost_of
from genjax.protocol import Batch, DataSpec
from genjax.runs.train import train
from genjax.zoo import ZOO
from genjax.zoo.sections import replace

KEY = jax.random.key(0)
TX = optax.chain(optax.adam(1e-2), track_ema(0.9))
PLANE = DataSpec((2,), "continuous")
VAE = training(vae(PLANE, latent_dim=2, hidden=(16,)), TX)
WORDS = DataSpec((5,), "tokens", levels=8, step="token")
IMAGES = DataSpec((4, 4, 1), "continuous")
TOKENS = DataSpec((16,), "tokens", levels=8, step="token")
SPLIT = {
    "transformer": (transformer(WORDS, d_model=16, n_layers=2, n_heads=4), WORDS),
    "dit": (diffusion(IMAGES, net="dit", d_model=16, n_layers=1, n_heads=4), IMAGES),
}


def batches(spec=PLANE, n=16):
    return [example_batch(spec, jax.random.key(seed), n) for seed in (1, 2)]


def program(t, spec=PLANE, key=KEY, n=16):
    ts = t.init(key)
    return jax.jit(t.step).lower(ts, batches(spec, n)[0]).compile()


PARTED = {
    # Of rows that are all steps of all examples, a device would compute the whole gradient.
    "rnn": lambda: rnn(TOKENS, cell="lstm", d_hidden=32, d_embed=64),
    "vrnn": lambda: vrnn(TOKENS, hidden=(64,), d_hidden=32),
    # Rows that are all samples of all examples.
    "fivo": lambda: vrnn(TOKENS, hidden=(64,), d_hidden=32, objective="fivo", n_samples=3),
    "iwae": lambda: vae(IMAGES, hidden=(64, 64), n_samples=3),
    # Latents that never meet an example.
    "gan": lambda: gan(IMAGES, hidden=(64, 64), objective="nonsaturating"),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "rnn" else pytest.param(name, marks=pytest.mark.slow) for name in PARTED],
)
def test_each_device_computes_its_part_of_a_step(name):
    """In the form for accelerators."""
    model, flops = PARTED[name](), {}
    for devices in (1, 4):
        t = training(model, TX)
        if devices > 1:
            t = shard(t, make_mesh({"data": devices}, jax.devices()[:devices]))
        with traced_for("tpu"):
            ts = jax.eval_shape(t.init, KEY)
            compiled = jax.jit(t.step).lower(ts, batches(model.spec, 64)[0]).compile()
        flops[devices] = cost_of(compiled)[0]
    assert flops[4] < 0.3 * flops[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTED)
def test_the_form_for_accelerators_takes_the_same_step(name):
    found = []
    for platform in ("cpu", "tpu"):
        with traced_for(platform):
            model = PARTED[name]()  # anew: a network keeps its trace
            t = training(model, optax.sgd(0.1))
            ts = quick(t.init)(KEY)
            found.append(quick(t.step)(ts, batches(model.spec, 8)[0]))
    assert_close(found[1], found[0])


def collectives(compiled):
    return set(
        re.findall(
            r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\b",
            compiled.as_text(),
        )
    )


def share(tree):
    """The part of a tree's bytes that the first device holds, from the arrays' own shards."""
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    first = jax.devices()[0]
    held = sum(
        s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == first
    )
    return held / sum(leaf.nbytes for leaf in leaves)


# --- values ---------------------------------------------------------------------------------------


# A family for each kind of parameters and state: the rest is the transform's, not the family's.
SPLIT_ROWS = ("gan-ring", "transformer", "lstm-lanes", "glow-mnist", "dcgan-mnist")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vae", *(pytest.param(n, marks=pytest.mark.slow) for n in SPLIT_ROWS)]
)
def test_a_step_with_a_split_state_equals_one_device(name):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    start, *wanted = one_device(name)
    with jax.enable_x64(True):
        data = [widen(batch(name, seed)) for seed in range(3)]
        first = jax.device_put(widen(start), layout(start, mesh))
        assert_close(
            run(quick(shard(plain(name).t, mesh).step), first, data), tuple(wanted), rtol=1e-9
        )


@functools.cache
def whole(name):
    """A start, the compiled step of one device in float64, two batches, and the state and metrics
    after them.
    """
    model, spec = SPLIT[name]
    t = training(model, optimizer())
    start = t.init(KEY)
    with jax.enable_x64(True):
        data = [widen(one) for one in batches(spec)]
        step = quick(t.step).lower(widen(start), data[0]).compile()
        return start, step, data, run(step, widen(start), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("axes", [{"tensor": 4}, {"data": 2, "tensor": 2, "fsdp": 2}], ids=describe)
def test_tensor_parallel_steps_equal_one_device_and_split_the_arithmetic(name, axes):
    start, alone, data, wanted = whole(name)
    sharded = shard(training(SPLIT[name][0], optimizer()), make_mesh(axes))
    begun = quick(sharded.init)(KEY)
    assert_close(begun, start)
    with jax.enable_x64(True):
        first = jax.device_put(widen(start), jax.tree.map(lambda leaf: leaf.sharding, begun))
        step = quick(sharded.step).lower(first, data[0]).compile()
        assert_close(run(step, first, data), wanted, rtol=1e-9)
    assert "all-reduce" in collectives(step)
    assert step.cost_analysis()["flops"] < 0.7 * alone.cost_analysis()["flops"]


@pytest.mark.slow
def test_members_over_devices_equal_members_on_one_and_never_speak():
    t = ensemble(VAE)
    sharded = shard(t, make_mesh({"member": 8}))
    keys = jax.random.split(KEY, 8)
    start = jax.jit(sharded.init)(keys)
    step = jax.jit(sharded.step).lower(start, batches()[0]).compile()
    got = run(step, start, batches())
    assert_close(got, run(jax.jit(t.step), t.init(keys), batches()), rtol=1e-4)
    assert share(got[0].params) == 1 / 8
    assert share(got[0].opt) == 1 / 8
    text = step.as_text()
    assert collectives(step) <= {"all-gather"}, text  # of the metrics, at the end


@pytest.mark.slow
def test_members_with_batches_of_their_own_and_weights():
    t = ensemble(VAE, batch_axis=0)
    sharded = shard(
        t, make_mesh({"member": 2, "data": 4}), batch_spec=PartitionSpec("member", "data")
    )
    keys, weight = (
        jax.random.split(KEY, 4),
        jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 16)), jnp.float32),
    )
    data = [example_batch(PLANE, jax.random.key(seed), 64) for seed in (1, 2)]
    data = [Batch(one.x.reshape(4, 16, 2), weight=weight) for one in data]
    got = run(jax.jit(sharded.step), jax.jit(sharded.init)(keys), data)
    wanted = run(jax.jit(t.step), t.init(keys), data)
    assert_close(got, wanted, rtol=1e-4)
    assert share(got[0].params) == 1 / 2
    # In one dispatch the axis of steps comes first, and the members' own stays theirs.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    scanned, metrics = jax.jit(scan_steps(sharded).step)(jax.jit(sharded.init)(keys), stacked)
    assert_close(scanned, wanted[0], rtol=1e-4)
    assert metrics["vae/loss"].shape == (2, 4)
    assert share(scanned.params) == 1 / 2


@pytest.mark.slow
def test_a_weighted_batch_is_averaged_over_all_devices():
    weight = jnp.asarray(
        [1, 0, 2, 0.5, 0, 1, 3, 1] * 2, jnp.float32
    )  # not the same sum on every device
    data = [batch._replace(weight=weight) for batch in batches()]
    got = run(jax.jit(shard(VAE, make_mesh({"data": 8})).step), jax.jit(VAE.init)(KEY), data)
    assert_close(got, run(jax.jit(VAE.step), jax.jit(VAE.init)(KEY), data), rtol=1e-5)


@pytest.mark.slow
def test_sharding_composes_with_the_other_transforms():
    data = batches()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    t = scan_steps(microbatch(shard(VAE, mesh), 2))
    got, _ = jax.jit(t.step)(jax.jit(t.init)(KEY), stacked)
    wanted, _ = run(jax.jit(microbatch(VAE, 2).step), jax.jit(VAE.init)(KEY), data)
    assert_close(got, wanted, rtol=1e-4)
    assert share(got.params) < 1 / 3


DATA, PARTS = DataSpec((64,), "continuous"), 4


@functools.cache
def wide():
    return training(vae(DATA, latent_dim=64, hidden=(64, 64)), TX)


def flops(t):  # the compiler counts the body of a loop once, so of one part
    return program(t, DATA, n=64).cost_analysis()["flops"]


@functools.cache
def flops_of_one_device():
    return flops(microbatch(wide(), PARTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "most"),
    [({"data": 4}, 0.4), ({"data": 8}, 0.3), ({"data": 2, "fsdp": 4}, 0.18)],
    ids=str,
)
def test_each_device_computes_its_share_of_every_part(axes, most):
    """A part that lies on one device is computed by all, whole: 1, 0.57 and 0.2 of the work of one
    device alone. A share is 1/4 or 1/8, and what every device does with the state.
    """
    for t in (
        shard(microbatch(wide(), PARTS), make_mesh(axes)),
        microbatch(shard(wide(), make_mesh(axes)), PARTS),
    ):
        assert flops(t) < most * flops_of_one_device()


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp_keeps_an_eighth_of_the_state_on_each_device_and_gathers_it_to_use_it():
    wide = training(vae(PLANE, latent_dim=8, hidden=(64, 64)), TX)
    t = shard(wide, make_mesh({"fsdp": 8}))
    ts = jax.jit(t.init)(KEY)
    after, _ = jax.jit(t.step)(ts, batches()[0])
    for state in (ts, after):  # an eighth but for a few biases and counters
        assert 1 / 8 <= share(state) < 1.05 / 8
    assert "all-gather" in collectives(jax.jit(t.step).lower(ts, batches()[0]).compile())


@pytest.mark.slow
def test_data_parallel_steps_replicate_the_state_and_sum_over_devices():
    t = shard(VAE, make_mesh({"data": 8}))
    found = collectives(program(t))
    assert "all-reduce" in found
    assert "all-gather" not in found
    ts, _ = jax.jit(t.step)(jax.jit(t.init)(KEY), batches()[0])
    assert {
        (len(leaf.sharding.device_set), leaf.sharding.is_fully_replicated)
        for leaf in jax.tree.leaves(ts)
    } == {(8, True)}


def test_rules_name_the_last_dimensions_and_optimisers_follow_their_parameters():
    mesh = make_mesh({"data": 2, "tensor": 4})
    model, _ = SPLIT["transformer"]
    ts = jax.eval_shape(training(model, TX).init, KEY)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(layout(ts, mesh, TENSOR_RULES))
    }
    assert layout(ts, mesh, dict(TENSOR_RULES)) == layout(ts, mesh, TENSOR_RULES)
    block = "transformer/blocks/1/"
    assert found[f"params/{block}attention/qkv/kernel"] == PartitionSpec(None, "tensor")
    assert found[f"params/{block}attention/out/kernel"] == PartitionSpec("tensor", None)
    assert found[f"params/{block}feed_forward/down/kernel"] == PartitionSpec(None, "tensor")
    assert not any(found["params/transformer/readout/norm/scale"])
    moments = [
        spec
        for name, spec in found.items()
        if name.startswith("opt/") and name.endswith("1/attention/qkv/kernel")
    ]
    assert moments == [PartitionSpec(None, "tensor")] * 3  # two of Adam and the average


def test_the_longest_dimension_that_can_be_divided_is_split():
    tree = {
        "a": jnp.zeros((8, 24)),
        "b": jnp.zeros((16, 9)),
        "c": jnp.zeros((3, 5)),
        "d": jnp.zeros(()),
    }
    found = jax.tree.map(
        lambda s: tuple(s.spec),
        layout(tree, make_mesh({"fsdp": 8})),
        is_leaf=lambda x: hasattr(x, "spec"),
    )
    assert found == {"a": (None, "fsdp"), "b": ("fsdp", None), "c": (None, None), "d": ()}


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
    t, other = shard(VAE, make_mesh({"fsdp": 8})), shard(VAE, make_mesh({"data": 4, "fsdp": 2}))
    ts, _ = jax.jit(t.step)(jax.jit(t.init)(KEY), batches()[0])
    Checkpoints(tmp_path).save(ts)
    shapes = jax.eval_shape(other.init, KEY)
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        layout(shapes, make_mesh({"data": 4, "fsdp": 2})),
    )
    for wanted in (like, shapes):  # placed at once, or where the step will put it
        restored = Checkpoints(tmp_path).restore(wanted).state
        assert_close(restored, ts, rtol=0)
        got = jax.jit(other.step)(restored, batches()[1])
        assert_close(got, jax.jit(t.step)(ts, batches()[1]), rtol=1e-4)


@pytest.mark.slow
def test_a_run_trains_on_a_mesh_and_goes_on_with_another(tmp_path):
    recipe = replace(
        ZOO["vae"],
        hidden=(8,),
        latent_dim=2,
        batch_size=16,
        steps=20,
        steps_per_call=5,
        checkpoint_every=10,
        sample_every=0,
    )
    straight = train(recipe, tmp_path / "one")
    on_mesh = train(recipe, tmp_path / "mesh", mesh={"data": 2, "fsdp": 4})
    assert_close(on_mesh.params, straight.params, rtol=1e-4)
    assert share(on_mesh.params) < 1 / 3
    for step in Checkpoints(tmp_path / "mesh" / "checkpoints").steps()[1:]:
        (tmp_path / "mesh" / "checkpoints" / str(step)).rename(tmp_path / f"gone{step}")
    again = train(recipe, tmp_path / "mesh", mesh={"data": 8})
    assert_close(again.params, straight.params, rtol=1e-4)


# --- bad input ------------------------------------------------------------------------------------


def test_a_mesh_that_does_not_exist():
    with pytest.raises(
        ConfigError,
        match=r"no axis 'model'. There are: member \(the members of an ensemble\), data",
    ):
        make_mesh({"model": 2})
    with pytest.raises(ConfigError, match=r"takes 16 devices; there are 8\. XLA_FLAGS"):
        make_mesh({"data": 4, "fsdp": 4})
    cards = [types.SimpleNamespace(platform="gpu")] * 4  # which no flag adds to
    with pytest.raises(ConfigError, match=r"8 devices; there are 4\. .* such as data=4\.$"):
        make_mesh({"data": 8}, cards)
    with pytest.raises(ConfigError, match="at least 1 device; got 0"):
        make_mesh({"data": 0})
    with pytest.raises(
        ConfigError, match="an axis 'x'; those of a training are member, data, fsdp, tensor"
    ):
        shard(VAE, Mesh(np.asarray(jax.devices()), ("x",)))


@pytest.mark.parametrize(
    "text", ["data", "data=", "data=two", "data=2;fsdp=4", "data=2,data=4", "", "data=-1"]
)
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="written as data=4,fsdp=2"):
        parse_mesh(text)


def test_a_mesh_in_words_and_back():
    assert parse_mesh("data=4, fsdp=2") == {"data": 4, "fsdp": 2}
    assert describe(make_mesh({"fsdp": 2, "data": 4}).shape) == "data=4,fsdp=2"


def test_batches_members_and_rules_that_do_not_fit():
    ts = jax.eval_shape(VAE.init, KEY)
    six = Batch(jnp.zeros((6, 2)))
    with pytest.raises(
        ConfigError, match="batch of 6 does not divide over the 8 devices of the mesh's data x fsdp"
    ):
        jax.eval_shape(shard(VAE, make_mesh({"data": 2, "fsdp": 4})).step, ts, six)
    with pytest.raises(ConfigError, match="8 devices to share members; key has the shape"):
        jax.eval_shape(shard(VAE, make_mesh({"member": 8})).init, KEY)
    with pytest.raises(ConfigError, match=r"key has the shape \[6\]"):
        jax.eval_shape(
            shard(ensemble(VAE), make_mesh({"member": 8})).init, jax.random.split(KEY, 6)
        )
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(
        ConfigError,
        match=r"'nothing' matches no parameter. There are, among others: params/vae/decoder",
    ):
        layout(ts, mesh, [("nothing", PartitionSpec("tensor"))])
    with pytest.raises(ConfigError, match=r"'nothing' matches no parameter"):
        layout(ts, mesh, {"nothing": PartitionSpec("tensor")})
    with pytest.raises(ConfigError, match=r"splits over 'tensor'; the mesh is data=8"):
        layout(ts, make_mesh({"data": 8}), TENSOR_RULES)
    with pytest.raises(
        ConfigError,
        match=r"of shape \[2\], as \('tensor',\) over a mesh tensor=8, which does not divide it",
    ):
        layout(ts, mesh, [("decoder/.*bias", PartitionSpec("tensor"))])
