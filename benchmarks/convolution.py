"""The gradient of every convolutional family with genjax's convolutions beside the same networks
with plain `flax.nnx` ones.

The whole gradient of a row's losses, their sum with respect to all parameters, at the row's real
size, on a resident batch: alone, and inside a loop of several, which is where training steps are.
The networks, parameters and values are the same.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.common import alternate, ratio, summary, write
from genjax.data import example_batch
from genjax.nets import fast_conv
from genjax.zoo import ZOO
from genjax.zoo.recipe import Recipe, replace

ROWS = ("vae-conv", "dcgan-mnist", "r3gan-mnist", "edm-mnist", "flow-matching-mnist")
TRIPS = 5  # gradients in the loop


def gradients(recipe: Recipe) -> dict[str, Any]:
    """The compiled gradient, alone and in a loop, as functions of (parameters, state, batch, key),
    and their arguments.
    """
    spec = recipe.source().spec
    model = recipe.build(spec)
    params, state = jax.jit(model.init)(jax.random.key(0))
    batch = example_batch(spec, jax.random.key(1), recipe.schedule.batch_size)

    def total(params: Any, state: Any, batch: Any, key: Any) -> Any:
        step = jnp.zeros((), jnp.int32)
        losses = (loss(params, state, batch, key, step)[0] for loss in model.losses.values())
        return sum(loss.mean() for loss in losses)

    def loop(params: Any, state: Any, batch: Any, key: Any) -> Any:
        def trip(params: Any, key: Any) -> tuple[Any, None]:
            slopes = jax.grad(total)(params, state, batch, key)
            return jax.tree.map(
                lambda p, g: p - 1e-6 * g, params, slopes
            ), None  # each trip needs the one before

        return jax.lax.scan(trip, params, jax.random.split(key, TRIPS))[0]

    args = (params, state, batch, jax.random.key(2))
    return {
        "args": args,
        "alone": jax.jit(jax.grad(total)).lower(*args).compile(),
        "loop": jax.jit(loop).lower(*args).compile(),
    }


def plain(recipe: Recipe) -> dict[str, Any]:
    """The same with flax's own convolutions."""
    own = mock.patch.object
    with (
        own(fast_conv.Conv, "__call__", nnx.Conv.__call__),
        own(fast_conv.ConvTranspose, "__call__", nnx.ConvTranspose.__call__),
    ):
        return gradients(recipe)


def compared(name: str, seconds: float, **settings: Any) -> dict[str, Any]:
    """Milliseconds of a gradient in each form, in turns, how many times as long flax's take, and
    how far values differ.
    """
    recipe = replace(ZOO[name], **settings)
    made = {"genjax": gradients(recipe), "flax": plain(recipe)}
    calls = {
        f"{who}/{form}": lambda program=of[form], args=of["args"]: program(*args)
        for form in ("alone", "loop")
        for who, of in made.items()
    }
    one, other = (calls[f"{who}/alone"]() for who in made)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    apart = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )
    rounds = alternate(calls, seconds)
    trips = {"alone": 1, "loop": TRIPS}
    return {
        "recipe": name,
        "batch_size": recipe.schedule.batch_size,
        "difference": apart / largest,
        **{
            form: {
                "ms": {
                    who: 1000 * summary(rounds[f"{who}/{form}"])["median"] / trips[form]
                    for who in made
                },
                "times_as_long": ratio(rounds[f"flax/{form}"], rounds[f"genjax/{form}"]),
            }
            for form in trips
        },
    }


def main(seconds: float = 20.0) -> None:
    """Measure and write results/convolution.json; `seconds` for each row."""
    rows = []
    for name in ROWS:
        rows.append(compared(name, seconds))
        shown = {
            form: f"{rows[-1][form]['times_as_long']['median']:.2f}" for form in ("alone", "loop")
        }
        print(
            f"{name}: flax's convolutions take {shown} times as long; {rows[-1]['difference']:.0e} "
            "apart",
            flush=True,
        )
        write("convolution", {"trips": TRIPS, "rows": rows})
