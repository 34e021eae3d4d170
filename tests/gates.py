"""Helpers of the suites that hold one way of computing against another: trees are compared leaf by
leaf and by name.
"""

import jax
import jax.numpy as jnp
import numpy as np


def quick(fun, **options):
    """`jax.jit` without the compiler's optimisations, in half the time: for programs whose speed
    and last bit say nothing.
    """
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0}, **options)


# Undoes what conftest.py switches off to compile faster.
_AS_USERS: dict[str, bool | int] = {
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_backend_optimization_level": 3,
}
if jax.__version__.startswith("0.10."):
    _AS_USERS["xla_cpu_use_fusion_emitters"] = True


def optimised(fun, **options):
    """`jax.jit` as users have it, whatever conftest.py says: for programs whose last bit is
    compared.
    """
    return jax.jit(fun, compiler_options=_AS_USERS, **options)


def array(leaf):
    """A leaf as a numpy array; PRNG keys as their data."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def named(tree):
    """Path -> numpy array, for every leaf of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): array(leaf) for path, leaf in leaves
    }


def assert_same(got, wanted):
    """Every leaf is equal bit for bit, with the same names, shapes and dtypes."""
    got, wanted = named(got), named(wanted)
    assert got.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert (got[name].shape, got[name].dtype) == (leaf.shape, leaf.dtype), name
        assert got[name].tobytes() == leaf.tobytes(), (
            f"{name} differs by at most {np.abs(got[name] - leaf).max()}"
        )


def assert_close(got, wanted, rtol=1e-4):
    """Every leaf is equal to `rtol` of its own largest finite entry: small entries are differences
    of large ones. Whole numbers and keys are equal exactly, and so is what is not finite.
    """
    got, wanted = named(got), named(wanted)
    assert got.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert (got[name].shape, got[name].dtype) == (leaf.shape, leaf.dtype), name
        exact = not np.issubdtype(leaf.dtype, np.floating)
        sizes = [] if exact else np.abs(leaf)[np.isfinite(leaf)]
        scale = rtol * max(sizes, default=0)
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=scale, err_msg=name)


def structure(tree):
    """What must not change under a step: names, shapes, dtypes and weak types."""
    avals = jax.tree.map(jax.typeof, tree)
    return {
        jax.tree_util.keystr(path): (aval.shape, aval.dtype, aval.weak_type)
        for path, aval in jax.tree_util.tree_leaves_with_path(avals)
    }


def differ(one, other):
    """The names of the leaves that are not equal."""
    one, other = named(one), named(other)
    return [name for name in one if not np.array_equal(one[name], other[name])]


def member(tree, index):
    """One member of what an ensemble returned."""
    return by_hand(lambda leaf: leaf[index], tree)


def stack(trees):
    return by_hand(lambda *leaves: np.stack(leaves), *trees)


def by_hand(fun, *trees):
    """`fun` of every leaf as a numpy array: jax would compile a program for each shape. Keys come
    back as keys.
    """

    def one(*leaves):
        found = fun(*map(array, leaves))
        return (
            jax.random.wrap_key_data(found)
            if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key)
            else found
        )

    return jax.tree.map(one, *trees)
