"""Recurrent variational autoencoders: a recurrent network with a latent variable z_t at every step.

Chung 2015 (the VRNN; its equations 5 to 11), Burda 2015 (the importance-weighted bound), Maddison
2017 (the filtering bound).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from genjax.checks import check_cond, check_key, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.functional import functional
from genjax.nets.mlp import ACTIVATIONS
from genjax.nets.recurrent import Cell, cell_of, rematerialised
from genjax.nets.vrnn import VariationalRecurrentNet
from genjax.parts.distributions import (
    log_mean_exp,
    normal_kl,
    normal_log_prob,
    normal_sample,
    softplus,
    sum_event,
)
from genjax.parts.likelihoods import emission
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    Metrics,
    Model,
    Params,
    PyTree,
    State,
    step_mask,
)

# Scales of z are softplus(raw) + this, as in the paper but for the floor: an exponential overflows
# where a sequence surprises its recurrence, and a posterior without a floor can be as narrow as it
# likes.
MIN_SCALE = 1e-3

Normal = tuple[Array, Array]  # mean and log-scale
# (key, k, n) -> numbers in [0, 1), [k, n]: where the cumulated weights of n examples are cut to
# choose k particles.
Resampling = Callable[[Key, int, int], Array]


class Sequential(NamedTuple):
    """A latent-variable model of sequences with its parameters put in, as functions of one step of
    N examples.

    `carry` is a tuple whose first entry is h_{t-1} [N, d]; `observed` is anything that was computed
    from x, leading axis N.
    """

    prior: Callable[[Array], Normal]  # (h) -> p(z_t | h_{t-1}), [N, latent_dim] each
    posterior: Callable[[Any, Array], Normal]  # (observed, h) -> q(z_t | x_t, h_{t-1})
    log_likelihood: Callable[
        [Array, Array, Array], Array
    ]  # (x, z, h) -> ln p(x_t | z_t, h_{t-1}) in nats [N]
    recur: Callable[[Any, Array, Any], Any]  # (observed, z, carry) -> carry


def _step_keys(key: Key, n_steps: int) -> Key:
    """The noise of a step depends on no other step, and so not on how much padding there is."""
    return jax.vmap(lambda t: jax.random.fold_in(key, t))(jnp.arange(n_steps))


def elbo_steps(
    model: Sequential, x: Array, observed: Any, carry: Any, key: Key, remat: bool = False
) -> tuple[Array, Array]:
    """ln p(x_t | z_t, h_{t-1}) and KL(q(z_t | x_t, h_{t-1}) || p(z_t | h_{t-1})) in nats, each [T,
    N], for one path z ~ q.

    Their difference, summed over time, is the ELBO of Chung 2015, equation 11. x and `observed` are
    [T, N, ...].
    """

    def step(carry: Any, at: Any) -> tuple[Any, Any]:
        observed, key = at
        mean, log_scale = model.posterior(observed, carry[0])
        z = normal_sample(key, mean, log_scale)
        return model.recur(observed, z, carry), (carry[0], z, mean, log_scale)

    path = jax.lax.scan(rematerialised(step, remat), carry, (observed, _step_keys(key, len(x))))[1]
    # Decoder and prior are not part of the recurrence: all steps at once.
    flat, h, z, mean, log_scale = jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), (x, *path)
    )
    kl = sum_event(normal_kl(mean, log_scale, *model.prior(h)))
    return model.log_likelihood(flat, z, h).reshape(x.shape[:2]), kl.reshape(x.shape[:2])


def systematic(key: Key, k: int, n: int) -> Array:
    """(i + u) / k with one u ~ U[0, 1) for each example. Kitagawa 1996."""
    u = jax.random.uniform(key, (1, n))
    return (jnp.arange(k, dtype=u.dtype)[:, None] + u) / k


def multinomial(key: Key, k: int, n: int) -> Array:
    """Independent u_i ~ U[0, 1)."""
    return jax.random.uniform(key, (k, n))


RESAMPLING: dict[str, Resampling] = {"systematic": systematic, "multinomial": multinomial}


def ancestors(cuts: Array, log_weight: Array) -> Array:
    """Which particle takes the place of each, int [K, N]: the one whose share of the cumulated
    weights holds the cut.
    """
    upper = jnp.cumsum(jax.nn.softmax(log_weight, axis=0), axis=0)
    below = upper[None] <= cuts.astype(upper.dtype)[:, None]
    return jnp.minimum(below.sum(1), len(log_weight) - 1)  # the last sum may round to less than 1


def particle_bound(
    model: Sequential,
    x: Array,
    observed: Any,
    mask: Array,
    carry: Any,
    key: Key,
    k: int,
    resampling: Resampling | None = None,
    remat: bool = False,
) -> Array:
    """ln p̂(x) in nats [B] from K particles z_{1..T} ~ q with E p̂(x) = p(x), so that E ln p̂(x) <=
    ln p(x).

    With weights w_t = w_{t-1} p(x_t, z_t | h_{t-1}) / q(z_t | x_t, h_{t-1}): without resampling p̂
    = 1/K Σ_k w_T, the importance-weighted bound (Burda 2015, equation 8). With it, whenever the
    effective sample size (Σ w)² / Σ w² is below K/2 and steps are still to come, p̂ gains the
    factor 1/K Σ_k w_t, particles are drawn anew in proportion to their weights, and
    these return to 1: the filtering bound (Maddison 2017, algorithm 1). As there, gradients ignore
        how particles were chosen.

    x and `observed` are [T, B, ...], the mask is [T, B] and carries are [B, ...].
    """
    n_steps, b = x.shape[:2]
    tile = lambda leaf: jnp.tile(leaf, (k, *[1] * (leaf.ndim - 1)))  # noqa: E731

    def step(loop: Any, at: Any) -> tuple[Any, None]:
        carry, log_weight, total = loop
        x, observed, valid, more, key = at
        key_z, key_cuts = jax.random.split(key)
        x, observed, h = tile(x), jax.tree.map(tile, observed), carry[0]
        mean, log_scale = model.posterior(observed, h)
        z = normal_sample(key_z, mean, log_scale)
        log_ratio = sum_event(
            normal_log_prob(z, *model.prior(h)) - normal_log_prob(z, mean, log_scale)
        )
        gain = (model.log_likelihood(x, z, h) + log_ratio).reshape(k, b)
        log_weight = log_weight + jnp.where(valid[None], gain, 0)
        carry = model.recur(observed, z, carry)
        if resampling is not None:
            log_size = 2 * jax.nn.logsumexp(log_weight, axis=0) - jax.nn.logsumexp(
                2 * log_weight, axis=0
            )
            due = more & (jnp.exp(log_size) < k / 2)
            chosen = ancestors(resampling(key_cuts, k, b), log_weight)
            rows = (
                jnp.where(due[None], chosen, jnp.arange(k)[:, None]) * b + jnp.arange(b)[None]
            ).reshape(-1)
            carry = jax.tree.map(lambda leaf: leaf[rows], carry)
            total = total + jnp.where(due, log_mean_exp(log_weight), 0)
            log_weight = jnp.where(due[None], 0, log_weight)
        return (carry, log_weight, total), None

    more = jnp.concatenate([mask[1:], jnp.zeros((1, b), bool)])
    dtype = carry[0].dtype
    start = (jax.tree.map(tile, carry), jnp.zeros((k, b), dtype), jnp.zeros(b, dtype))
    _, log_weight, total = jax.lax.scan(
        rematerialised(step, remat), start, (x, observed, mask, more, _step_keys(key, n_steps))
    )[0]
    return total + log_mean_exp(log_weight)


def vrnn(
    spec: DataSpec,
    *,
    cell: Literal["vanilla", "lstm", "gru"] | Cell = "gru",
    latent_dim: int = 16,
    d_hidden: int = 128,
    hidden: tuple[int, ...] = (128,),
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "relu",
    dropout: float = 0.0,
    n_components: int = 1,
    beta: float = 1.0,
    objective: Literal["elbo", "iwae", "fivo"] = "elbo",
    n_samples: int = 1,
    bound_estimator: Literal["elbo", "iwae", "fivo"] = "elbo",
    n_bound_samples: int = 1,
    resampling: Literal["systematic", "multinomial"] = "systematic",
    remat: bool = False,
    cond_dropout: float = 0.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A variational recurrent neural network; conditional if the spec has a condition.

    p(x, z) = Π_t p(z_t | h_{t-1}) p(x_t | z_t, h_{t-1}) with h_t = f(φ_x(x_t, c), φ_z(z_t),
    h_{t-1}), and q(z | x) = Π_t q(z_t | x_t, h_{t-1}); prior and posterior are Gaussian with
    diagonal covariance. The loss is the negative
    objective in nats per example: "elbo" is Σ_t ln p(x_t | z_t, h_{t-1}) - beta KL_t with the KL in
    closed form, averaged over K = `n_samples` paths; "iwae" and "fivo" are `particle_bound` with K
    particles, without and with resampling. Steps that are padding count for nothing. `bound` is the
    estimator of its own arguments, with beta = 1; `log_prob` is None.
    Shapes: x [B, T, *event], z [B, T, latent_dim]. Without a latent variable (latent_dim 0) and
        hidden layers it is `rnn`.

    Extras:
        encode: (params, state, x, cond=None) -> mean and log-scale of q, each [B, T, latent_dim],
            along the path of means.
        step_bound: (params, state, batch, key) -> the terms of the ELBO for one path, [B, T], 0
            where padded.
        generate: (params, state, key, n, cond=None, *, prompt=None, prompt_length=None,
            length=None) -> x [n, length, *event]:
            z_t from the posterior in the prompt and from the prior after it; `prompt_length` int or
            [n] may be traced.

    Args:
        spec: the data; a sequence of any kind.
        cell: f; in Python any `Cell`.
        latent_dim: dimensions of z_t.
        d_hidden: the size of h.
        hidden: widths of the hidden layers of prior, encoder and decoder, and of the layers of φ_x
            and φ_z. Empty means linear.
        activation: between layers.
        dropout: rate, applied to φ_x(x_t), so to what encoder and recurrence see of the data.
        n_components: Gaussians in the mixture that continuous events have.
        beta: weight of the KL in the loss, for the objective "elbo".
        objective: what is maximised.
        n_samples: K of the objective.
        bound_estimator: what `bound` computes.
        n_bound_samples: K of `bound`.
        resampling: of "fivo".
        remat: keep only the carry of each step and compute the rest of it again on the way back,
            for less memory where sequences are long or particles many.
        cond_dropout: how often training leaves out the condition.
        dtype: of the networks' arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data, and for a prompt that
            does not fit.
    """
    if spec.step is None:
        raise ConfigError(
            f"A VRNN models sequences; {spec.name} has no steps. Give its DataSpec `step`, or use "
            "vae."
        )
    for label, given, names in (
        ("objective", objective, ("elbo", "iwae", "fivo")),
        ("bound_estimator", bound_estimator, ("elbo", "iwae", "fivo")),
        ("resampling", resampling, RESAMPLING),
        ("activation", activation, ACTIVATIONS),
        ("dtype", dtype, ("float32", "bfloat16")),
    ):
        if given not in names:
            raise unknown_name(label, given, names)
    sizes = {
        "d_hidden": d_hidden,
        "n_components": n_components,
        "n_samples": n_samples,
        "n_bound_samples": n_bound_samples,
    }
    for label, number in sizes.items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    if latent_dim < 0:
        raise ConfigError(f"latent_dim must be at least 0; got {latent_dim}.")
    for label, rate in {"dropout": dropout, "cond_dropout": cond_dropout}.items():
        if isinstance(rate, int | float) and not 0 <= rate < 1:
            raise ConfigError(f"{label} must be in [0, 1); got {rate}.")
    if objective != "elbo" and not (isinstance(beta, int | float) and beta == 1):
        raise ConfigError(
            f"beta weighs the KL of the objective 'elbo'; {objective} has none. Leave beta at 1; "
            f"got {beta}."
        )
    emit = emission(spec, n_components)
    droppable = isinstance(cond_dropout, Tracer) or cond_dropout > 0
    sizes_of = (latent_dim, d_hidden, tuple(hidden), emit.n_outputs)
    net = functional(
        partial(VariationalRecurrentNet, spec, cell_of(cell), *sizes_of, activation, droppable),
        dtype,
    )

    def init(key: Key) -> tuple[Params, State]:
        return {"vrnn": net.init(key)[0]}, {"vrnn": {}}

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def normal(outputs: Array) -> Normal:
        mean, raw = jnp.split(outputs, 2, axis=-1)
        return mean, jnp.log(softplus(raw) + MIN_SCALE)

    def model_of(p: Any) -> Sequential:
        call = lambda method, *args: net.apply(p, {}, *args, method=method)[0]  # noqa: E731
        return Sequential(
            prior=lambda h: normal(call("prior_of", h)),
            posterior=lambda observed, h: normal(call("posterior_of", observed, h)),
            log_likelihood=lambda x, z, h: emit.log_prob(x, call("outputs_of", z, h)),
            recur=lambda observed, z, carry: call("recur", observed, z, carry),
        )

    def observe(
        p: Any, x: Array, c: Array | None, dropped: Array | None = None, key: Key | None = None
    ) -> tuple[Array, PyTree, PyTree]:
        """x with time first, [T, B, *event], what the networks make of it, [T, B, ...], and the
        carry before it.
        """
        x = x.swapaxes(0, 1)
        n_steps, b = x.shape[:2]
        every = lambda leaf: (
            None if leaf is None else jnp.tile(leaf, (n_steps, *[1] * (leaf.ndim - 1)))
        )  # noqa: E731
        flat = x.reshape(n_steps * b, *x.shape[2:])
        observed = net.apply(p, {}, flat, every(c), every(dropped), key, dropout, method="observe")[
            0
        ]
        observed = jax.tree.map(lambda leaf: leaf.reshape(n_steps, b, *leaf.shape[1:]), observed)
        return x, observed, net.apply(p, {}, b, c, dropped, method="begin")[0]

    def terms(p: Any, batch: Batch, key: Key, k: int, *training: Any) -> tuple[Array, Array]:
        """Log-likelihood and KL of every step, means over k paths: [B, T] in nats, 0 where
        padded.
        """
        sequence = observe(p, batch.x, condition(batch.cond), *training)
        mask = step_mask(spec, batch)

        def one(key: Key) -> tuple[Array, Array]:
            return jax.tree.map(
                lambda v: jnp.where(mask, v.T, 0), elbo_steps(model_of(p), *sequence, key, remat)
            )

        if k == 1:
            return one(key)
        return jax.tree.map(lambda v: v.mean(0), jax.lax.map(one, jax.random.split(key, k)))

    def particles(p: Any, batch: Batch, key: Key, k: int, how: str, *training: Any) -> Array:
        x, observed, carry = observe(p, batch.x, condition(batch.cond), *training)
        choose = RESAMPLING[resampling] if how == "fivo" else None
        return particle_bound(
            model_of(p), x, observed, step_mask(spec, batch).T, carry, key, k, choose, remat
        )

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        p, n = params["vrnn"], batch.x.shape[0]
        key_z, key_cond, key_net = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(key_cond, cond_dropout, (n,)) if spec.conditional else None
        metrics: Metrics
        if objective == "elbo":
            log_lik, kl = (
                value.sum(1) for value in terms(p, batch, key_z, n_samples, dropped, key_net)
            )
            value = beta * kl - log_lik
            metrics = {"elbo": log_lik - kl, "log_likelihood": log_lik, "kl": kl}
        else:
            value = -particles(p, batch, key_z, n_samples, objective, dropped, key_net)
            metrics = {objective: -value}
        return value, Aux(state, metrics)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        if bound_estimator != "elbo":
            return particles(params["vrnn"], batch, key, n_bound_samples, bound_estimator)
        log_lik, kl = terms(params["vrnn"], batch, key, n_bound_samples)
        return (log_lik - kl).sum(1)

    def step_bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        log_lik, kl = terms(params["vrnn"], batch, key, 1)
        return log_lik - kl

    def encode(params: Params, state: State, x: Array, cond: Any = None) -> Normal:
        check_cond(spec, cond, x.shape[0])
        _, observed, carry = observe(params["vrnn"], x, condition(cond))
        model = model_of(params["vrnn"])

        def step(carry: PyTree, observed: PyTree) -> tuple[PyTree, Normal]:
            q = model.posterior(observed, carry[0])
            return model.recur(observed, q[0], carry), q

        return jax.tree.map(
            lambda leaf: leaf.swapaxes(0, 1), jax.lax.scan(step, carry, observed)[1]
        )

    def generate(
        params: Params,
        state: State,
        key: Key,
        n: int,
        cond: Any = None,
        *,
        prompt: Array | None = None,
        prompt_length: Array | int | None = None,
        length: int | None = None,
    ) -> Array:
        check_key(key)
        check_cond(spec, cond, n)
        p, c, steps = params["vrnn"], condition(cond), spec.shape[0] if length is None else length
        model, whole = model_of(p), 0 if prompt is None else prompt.shape[1]
        if steps < 1:
            raise ConfigError(f"The length must be at least 1; got {steps}.")
        if whole > steps:
            raise ConfigError(
                f"A prompt of {whole} steps does not fit into {steps}: shorten it or generate more."
            )
        if isinstance(prompt_length, int) and not 0 <= prompt_length <= whole:
            raise ConfigError(
                f"prompt_length must be from 0 to the {whole} steps of the prompt; got "
                f"{prompt_length}."
            )
        given = jnp.zeros((steps, n, *spec.shape[1:]), spec.dtype)
        if prompt is not None:
            if prompt.ndim != given.ndim or (prompt.shape[0], *prompt.shape[2:]) != (
                n,
                *spec.shape[1:],
            ):
                wanted = ", ".join(map(str, (n, "steps", *spec.shape[1:])))
                raise ConfigError(
                    f"The prompt must have the shape [{wanted}]; got {list(prompt.shape)}."
                )
            given = given.astype(prompt.dtype).at[:whole].set(prompt.swapaxes(0, 1))
        fixed = jnp.broadcast_to(
            jnp.asarray(whole if prompt_length is None else prompt_length), (n,)
        )

        def step(loop: PyTree, at: PyTree) -> tuple[PyTree, Array]:
            carry, ended = loop
            t, x_given = at
            key_z, key_x, key_q = jax.random.split(jax.random.fold_in(key, t), 3)
            z = normal_sample(key_z, *model.prior(carry[0]))
            x = emit.sample(key_x, net.apply(p, {}, z, carry[0], method="outputs_of")[0])
            prompted = t < fixed
            if prompt is not None:
                x = jnp.where(prompted.reshape(n, *[1] * (x.ndim - 1)), x_given.astype(x.dtype), x)
            if spec.end is not None:
                x = jnp.where(ended, jnp.asarray(spec.end, x.dtype), x)
                ended = ended | (x == spec.end)
            observed = net.apply(p, {}, x, c, None, method="observe")[0]
            if prompt is not None:
                z_posterior = normal_sample(key_q, *model.posterior(observed, carry[0]))
                z = jnp.where(prompted[:, None], z_posterior, z)
            return (model.recur(observed, z, carry), ended), x

        carry = net.apply(p, {}, n, c, None, method="begin")[0]
        x = jax.lax.scan(step, (carry, jnp.zeros(n, bool)), (jnp.arange(steps), given))[1]
        return x.swapaxes(0, 1)

    names = {
        "elbo": f"ELBO, {n_bound_samples} sample{'s' if n_bound_samples > 1 else ''}",
        "iwae": f"importance-weighted bound, K={n_bound_samples}",
        "fivo": f"filtering bound (FIVO), K={n_bound_samples}, {resampling} resampling",
    }

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(params, state, key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"vrnn": loss},
            sample=sample,
            bound=bound,
            estimator=names[bound_estimator],
            extras={"encode": encode, "step_bound": step_bound, "generate": generate},
        )
    )
