"""Every place where a family says that dropout is has it: what a dropped number comes from, or goes
into, has no gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import named, quick

from genjax import Batch, DataSpec, pixelcnn, rnn, ssm, transformer, vrnn

WORD = DataSpec((1,), "tokens", levels=3, step="symbol")  # one step, so that each is drawn once
PIXEL = DataSpec((1, 1, 1), "binary")
# A family, its settings, and parameters that belong to the numbers that are dropped, by which axis.
PLACES = [
    (
        transformer,
        {"d_model": 16, "n_layers": 1, "bias": True},
        {
            "inputs/events/start": 0,
            "blocks/0/attention/out/bias": 0,
            "blocks/0/feed_forward/down/bias": 0,
        },
    ),
    (
        ssm,
        {"cell": "mingru", "d_model": 16, "n_layers": 1, "d_hidden": 20},
        {
            "inputs/events/start": 0,
            "blocks/0/out/dense/kernel": 1,
            "blocks/0/feed_forward/down/kernel": 0,  # [out, in], the longer axis last
        },
    ),
    (
        rnn,
        {"d_embed": 16, "d_hidden": 16, "n_layers": 2},
        {"embed/start": 0, "layers/layers/1/inputs/kernel": 0, "readout/kernel": 0},
    ),
    (
        vrnn,
        {"d_hidden": 16, "hidden": (16,), "activation": "tanh"},
        {"encoder/first/kernel": 0},
    ),
    (pixelcnn, {"channels": 16, "n_layers": 1}, {"outs/0/kernel": 0}),
    (pixelcnn, {"channels": 16, "n_layers": 1, "gated": False}, {"outs/0/kernel": 0}),
]


def without_gradient(build, settings, places, rate):
    """For each place the share of numbers whose parameters have no gradient at all."""
    spec, player = PIXEL if build is pixelcnn else WORD, build.__name__
    model = build(spec, dropout=rate, **settings)
    params, state = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), params
    )
    batch = Batch(jnp.zeros((1, *spec.shape), spec.dtype))

    def loss(params):
        return model.losses[player](params, state, batch, jax.random.key(1), 0)[0].sum()

    found = named(quick(jax.grad(loss))(params)[player])
    zero = {place: np.moveaxis(found[place] == 0, axis, 0) for place, axis in places.items()}
    return {place: z.reshape(len(z), -1).all(axis=1).mean() for place, z in zero.items()}


@pytest.mark.parametrize(("build", "settings", "places"), PLACES)
def test_what_is_dropped_has_no_gradient(build, settings, places):
    dropped, kept = (without_gradient(build, settings, places, rate) for rate in (0.5, 0.0))
    for place in places:  # a ReLU drops some numbers, too
        assert kept[place] + 0.1 < dropped[place] < 0.95, place
