"""A neural spline flow by flowjax's bijections; `peer_flows.py` says what is asked of it."""

from importlib.metadata import version
from typing import Any

import equinox as eqx  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax  # pyright: ignore[reportMissingImports]
from flowjax.bijections import (  # pyright: ignore[reportMissingImports]
    Affine,
    Chain,
    Coupling,
    Flip,
    Invert,
    RationalQuadraticSpline,
    Scan,
    TriangularAffine,
)
from flowjax.distributions import Normal, Transformed  # pyright: ignore[reportMissingImports]
from peer_flows import decay, rate, serve


def layers(case: dict[str, Any]) -> Any:
    """So many times: scale and shift, turn the order round, a product L U, and a coupling layer of
    splines; `Scan` loops over them, as flowjax's own flows do.
    """
    d, (width, *others) = case["d"], case["hidden"]
    assert all(other == width for other in others), "flowjax has one width for all hidden layers"
    spline = RationalQuadraticSpline(knots=case["bins"] - 1, interval=case["tail_bound"])

    def layer(key: Any) -> Any:
        coupling = Coupling(
            key,
            transformer=spline,
            untransformed_dim=d // 2,
            dim=d,
            nn_width=width,
            nn_depth=len(case["hidden"]),
            nn_activation=jax.nn.gelu,
        )
        zeros = jnp.zeros(d)
        triangles = [TriangularAffine(zeros, jnp.eye(d), lower=lower) for lower in (False, True)]
        return Chain([Affine(zeros, jnp.ones(d)), Flip((d,)), *triangles, coupling])

    keys = jax.random.split(jax.random.key(case["seed"]), case["n_layers"])
    return Scan(eqx.filter_vmap(layer)(keys))


def make(case: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    # The direction of the density is the one in which the layers go forward.
    flow = Transformed(Normal(jnp.zeros(case["d"])), Invert(layers(case)))
    flow = eqx.tree_at(lambda f: f.base_dist, flow, replace_fn=paramax.non_trainable)

    def leaf(node: Any) -> bool:
        return isinstance(node, paramax.NonTrainable)

    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=leaf)
    optimizer = optax.inject_hyperparams(optax.adam)(case["learning_rate"])

    def log_prob(params: Any, x: Any) -> Any:
        return paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    @eqx.filter_jit
    def step(params: Any, average: Any, opt: Any, x: Any, rate: Any, decay: Any) -> Any:
        loss = eqx.filter_grad(lambda params: -log_prob(params, x).mean())
        opt.hyperparams["learning_rate"] = rate
        updates, opt = optimizer.update(loss(params), opt, params)
        params = eqx.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - decay), opt

    now = [params, params, optimizer.init(params)]

    def train(batch: np.ndarray, at: int) -> None:
        params, average, opt = now
        given = (batch, np.float32(rate(case, at)), np.float32(decay(case, at)))
        now[:] = step(params, average, opt, *given)
        jax.block_until_ready(now[0])

    def score(x: np.ndarray) -> np.ndarray:
        return np.asarray(eqx.filter_jit(log_prob)(now[1], x))

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    words = f"flowjax {version('flowjax')}, jax {jax.__version__}"
    return {"version": words, "parameters": count}, train, score


if __name__ == "__main__":
    serve(make)
