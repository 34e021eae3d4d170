"""Recurrent variational autoencoders: a recurrent network with a latent variable z_t at every step.

Chung 2015 (the VRNN; its equations 5 to 11), Burda 2015 (the importance-weighted bound), Maddison
2017 (the filtering bound). The networks are in `nets/vrnn.py`, the bounds in `parts/particles.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.checks import check_cond, check_key, checked
from genjax.errors import ConfigError
from genjax.nets.cells import Cell, cell_of, gate_labels
from genjax.nets.functional import Net, functional
from genjax.nets.platforms import at_each
from genjax.parts.autoregressive import check_sequences
from genjax.parts.decoding import check_length, checked_prompt, prompted, settled
from genjax.parts.distributions import normal_sample, softplus
from genjax.parts.likelihoods import Emission, emission
from genjax.parts.particles import (
    RESAMPLING,
    Normal,
    Resampling,
    Sequential,
    elbo_steps,
    particle_bound,
    tiled,
)
from genjax.protocol import (
    Array,
    Autoregressive,
    Aux,
    Batch,
    DataSpec,
    Key,
    Latent,
    Metrics,
    Model,
    Params,
    PyTree,
    State,
    step_mask,
)
from genjax.settings import (
    CondDropout,
    Count,
    Dtype,
    NonNegative,
    Often,
    Rate,
    Remat,
    Whole,
    builder,
    guided_by,
)

# Scales of z are softplus(raw) + this, as in the paper but for the floor: an exponential overflows
# where a sequence surprises its recurrence, and a posterior without a floor can be as narrow as it
# likes.
MIN_SCALE = 1e-3

# --- the model, as functions of its parameters p --------------------------------------------------


class Estimate(NamedTuple):
    """A lower bound that is estimated from paths of the posterior.

    Attributes:
        how: "elbo", "iwae" or "fivo".
        k: from how many paths.
        resampling: of "fivo".
    """

    how: str
    k: int
    resampling: Resampling | None


class VrnnModel(NamedTuple):
    """What a VRNN consists of.

    Attributes:
        spec: the data.
        net: the networks, a `VariationalRecurrentNet`.
        emit: the distribution of an event that the decoder's outputs describe.
        objective: what training maximises.
        beta: the weight of the KL in it, if it is the ELBO.
        reported: what `bound` is.
        dropout: rate, of φ_x(x_t).
        cond_dropout: how often training leaves out the condition, to regularise.
        guided: whether it ever does.
        remat: what of a step is computed again on the way back.
    """

    spec: DataSpec
    net: Net
    emit: Emission
    objective: Estimate
    beta: Any
    reported: Estimate
    dropout: Any
    cond_dropout: Any
    guided: bool
    remat: str


class VrnnNoise(NamedTuple):
    """What the loss draws for a batch.

    Attributes:
        paths: the key of z, which the loop over time folds the step into (each of K paths of the
            ELBO has its own, split from it).
        net: the key of the network's dropout.
        dropped: which examples go without their condition, bool [B]; None if none ever does.
    """

    paths: Key
    net: Key
    dropped: Array | None


class StepBound(NamedTuple):
    """What a VRNN can tell beside its records.

    Attributes:
        step_bound: (params, state, batch, key) -> the terms of the ELBO for one path in nats,
            [B, T], 0 where padded.
    """

    step_bound: Callable[..., Array]


def draw(model: VrnnModel, key: Key, batch: Batch) -> VrnnNoise:
    """The randomness of the loss: the only place that splits its key."""
    key_z, key_cond, key_net = jax.random.split(key, 3)
    dropped = None
    if model.guided:
        dropped = jax.random.bernoulli(key_cond, model.cond_dropout, batch.x.shape[:1])
    return VrnnNoise(key_z, key_net, dropped)


def normal(outputs: Array) -> Normal:
    """Mean and log-scale of z from a network's outputs."""
    mean, raw = jnp.split(outputs, 2, axis=-1)
    return mean, jnp.log(softplus(raw) + MIN_SCALE)


def sequential(model: VrnnModel, p: Any) -> Sequential:
    """The model with its parameters put in."""

    def call(method: str, *args: Any) -> Any:
        return model.net.apply(p, {}, *args, method=method)[0]

    return Sequential(
        prior=lambda h: normal(call("prior_of", h)),
        posterior=lambda observed, h: normal(call("posterior_of", observed, h)),
        log_likelihood=lambda x, z, h: model.emit.log_prob(x, call("outputs_of", z, h)),
        recur=partial(call, "recur"),
    )


def observe(
    model: VrnnModel,
    p: Any,
    x: Array,
    c: Array | None,
    dropped: Array | None = None,
    key: Key | None = None,
) -> tuple[Array, PyTree, PyTree]:
    """x with time first, [T, B, *event], what the networks make of it, [T, B, ...], and the carry
    before it; with dropout where there is a key.
    """

    def apply(*args: Any, method: str) -> Any:
        return model.net.apply(p, {}, *args, method=method)[0]

    x = x.swapaxes(0, 1)
    every = jax.tree.map(partial(tiled, k=len(x)), (c, dropped))
    features = at_each(partial(apply, method="features"), x, *every)
    features = nets.sequence.dropout(key, features, model.dropout)
    observed = at_each(partial(apply, method="observe"), features)
    return x, observed, apply(x.shape[1], c, dropped, method="begin")


def elbo_terms(
    model: VrnnModel, p: Any, batch: Batch, key: Key, k: int = 1, *training: Any
) -> tuple[Array, Array]:
    """Log-likelihood and KL of every step, means over k paths: [B, T] in nats, 0 where padded.

    `training`: which conditions are dropped and the key of dropout, in training mode.
    """
    sequence = observe(model, p, batch.x, model.spec.embed(batch.cond, p), *training)
    mask = step_mask(model.spec, batch)

    def one(key: Key) -> tuple[Array, Array]:
        terms = elbo_steps(sequential(model, p), *sequence, key, model.remat)
        return jax.tree.map(lambda value: jnp.where(mask, value.T, 0), terms)

    if k == 1:
        return one(key)
    return jax.tree.map(lambda v: v.mean(0), jax.lax.map(one, jax.random.split(key, k)))


def particles(
    model: VrnnModel, p: Any, batch: Batch, key: Key, estimate: Estimate, *training: Any
) -> Array:
    """`particle_bound` of a batch in nats, [B]; `training` as in `elbo_terms`."""
    x, observed, carry = observe(model, p, batch.x, model.spec.embed(batch.cond, p), *training)
    resampling = estimate.resampling if estimate.how == "fivo" else None
    mask, own = step_mask(model.spec, batch).T, sequential(model, p)
    return particle_bound(own, x, observed, mask, carry, key, estimate.k, resampling, model.remat)


def loss(
    model: VrnnModel, params: Params, state: State, batch: Batch, key: Key, step: Array
) -> tuple[Array, Aux]:
    """The negative objective in nats, [B], in training mode."""
    p, noise, objective = params["vrnn"], draw(model, key, batch), model.objective
    training = (noise.dropped, noise.net)
    if objective.how != "elbo":
        found = particles(model, p, batch, noise.paths, objective, *training)
        return -found, Aux(state, {objective.how: found})
    terms = elbo_terms(model, p, batch, noise.paths, objective.k, *training)
    log_lik, kl = (value.sum(1) for value in terms)
    metrics: Metrics = {"elbo": log_lik - kl, "log_likelihood": log_lik, "kl": kl}
    return model.beta * kl - log_lik, Aux(state, metrics)


def bound(model: VrnnModel, params: Params, state: State, batch: Batch, key: Key) -> Array:
    """A lower bound of ln p(x | c) in nats, [B], in evaluation mode."""
    p, reported = params["vrnn"], model.reported
    if reported.how != "elbo":
        return particles(model, p, batch, key, reported)
    log_lik, kl = elbo_terms(model, p, batch, key, reported.k)
    return (log_lik - kl).sum(1)


def step_bound(model: VrnnModel, params: Params, state: State, batch: Batch, key: Key) -> Array:
    """The terms of the ELBO for one path in nats, [B, T], 0 where padded."""
    log_lik, kl = elbo_terms(model, params["vrnn"], batch, key)
    return log_lik - kl


def encode(model: VrnnModel, params: Params, state: State, x: Array, cond: Any = None) -> Normal:
    """Mean and log-scale of q(z_t | x_t, h_{t-1}), [B, T, latent_dim] each, along the path of
    means.
    """
    check_cond(model.spec, cond, x.shape[0])
    _, observed, carry = observe(model, params["vrnn"], x, model.spec.embed(cond, params))
    own = sequential(model, params["vrnn"])

    def step(carry: PyTree, observed: PyTree) -> tuple[PyTree, Normal]:
        q = own.posterior(observed, carry[0])
        return own.recur(observed, q[0], carry), q

    path = jax.lax.scan(step, carry, observed)[1]
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), path)


def generate(
    model: VrnnModel,
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
    """x [n, length, *event]: z_t comes from the posterior in the prompt and from the prior after
    it. `prompt_length`, an int or [n], may be traced.

    Raises:
        ConfigError: for a length or a prompt that does not fit.
    """
    check_key(key)
    check_cond(model.spec, cond, n)
    n_steps = model.spec.shape[0] if length is None else length
    check_length(n_steps)
    if prompt is not None:
        prompt = checked_prompt(model.spec, n, prompt, prompt_length)
    given, fixed = prompted(n, n_steps, prompt, prompt_length)
    p, c = params["vrnn"], model.spec.embed(cond, params)
    own, apply = sequential(model, p), partial(model.net.apply, p, {})

    def step(loop: PyTree, at: PyTree) -> tuple[PyTree, Array]:
        carry, ended = loop
        t, x_given = at
        key_z, key_x, key_q = jax.random.split(jax.random.fold_in(key, t), 3)
        z = normal_sample(key_z, *own.prior(carry[0]))
        x = model.emit.sample(key_x, apply(z, carry[0], method="outputs_of")[0])
        x, ended = settled(x, x_given, t < fixed, ended, model.spec.end)
        observed = apply(apply(x, c, None, method="features")[0], method="observe")[0]
        if given is not None:
            z_posterior = normal_sample(key_q, *own.posterior(observed, carry[0]))
            z = jnp.where((t < fixed)[:, None], z_posterior, z)
        return (own.recur(observed, z, carry), ended), x

    first = (apply(n, c, None, method="begin")[0], jnp.zeros(n, bool))
    x = jax.lax.scan(step, first, (jnp.arange(n_steps, dtype=jnp.int32), given))[1]
    return x.swapaxes(0, 1)


# --- settings -------------------------------------------------------------------------------------


def in_words(estimate: Estimate, resampling: str) -> str:
    """What an estimate computes, for reports."""
    if estimate.how == "elbo":
        return f"ELBO, {estimate.k} sample{'s' * (estimate.k > 1)}"
    if estimate.how == "iwae":
        return f"importance-weighted bound, K={estimate.k}"
    return f"filtering bound (FIVO), K={estimate.k}, {resampling} resampling"


def labels(spec: DataSpec, cell: Cell, depth: int) -> tuple[tuple[str, str], ...]:
    """What the parameters are, as `Model.labels` has it, for networks of so many hidden layers: the
    matrices of gates, and those that give the distributions.
    """
    joint = f"rest/layers/{depth - 1}" if depth else "(first|second)"
    last = f"^vrnn/((prior|decoder)/layers/{depth}|(encoder|decoder)/{joint})/kernel$"
    return (
        *nets.sequence.embedding_labels(spec),
        *gate_labels("^vrnn/(layer/(inputs/)?|z_inputs/)kernel$", cell),
        (last, "matrix:readout"),
    )


def latents_of(spec: DataSpec, latent_dim: int) -> DataSpec:
    """What the latent variables of one sequence are, with its condition and its length."""
    return dataclasses.replace(
        spec,
        shape=(spec.shape[0], latent_dim),
        kind="continuous",
        levels=None,
        vocabulary=None,
        tokenizer=None,
        end=None,
        name=f"latents of {spec.name}",
        shift=None,
        scale=None,
        columns=None,
        values=None,
    )


@builder
def vrnn(
    spec: DataSpec,
    *,
    cell: Literal["vanilla", "lstm", "gru"] | Cell = "gru",
    latent_dim: Whole = 16,
    d_hidden: Count = 128,
    hidden: tuple[Count, ...] = (128,),
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "relu",
    dropout: Rate = 0.0,
    n_components: Count = 1,
    beta: NonNegative = 1.0,
    objective: Literal["elbo", "iwae", "fivo"] = "elbo",
    n_samples: Often = 1,
    bound_estimator: Literal["elbo", "iwae", "fivo"] = "elbo",
    n_bound_samples: Often = 1,
    resampling: Literal["systematic", "multinomial"] = "systematic",
    remat: Remat = "none",
    cond_dropout: CondDropout = 0.0,
    dtype: Dtype = "float32",
) -> Model:
    """A variational recurrent neural network; conditional if the spec has a condition.

    p(x, z) = Π_t p(z_t | h_{t-1}) p(x_t | z_t, h_{t-1}) with h_t = f(φ_x(x_t, c), φ_z(z_t),
    h_{t-1}), and q(z | x) = Π_t q(z_t | x_t, h_{t-1}); prior and posterior are Gaussian with
    diagonal covariance. The loss is the negative objective in nats per example: "elbo" is
    Σ_t ln p(x_t | z_t, h_{t-1}) - beta KL_t with the KL in closed form, averaged over K =
    `n_samples` paths; "iwae" and "fivo" are `particle_bound` with K particles, without and with
    resampling. Steps that are padding count for nothing. `bound` is the estimator of its own
    arguments, with beta = 1; `log_prob` is None. Shapes: x [B, T, *event], z [B, T, latent_dim].
    Without a latent variable (latent_dim 0) and hidden layers it is `rnn`.

    `latent` has `encode`, mean and log-scale of q along the path of means; `autoregressive` has
    `generate`, with z_t from the posterior in a prompt and from the prior after it; `extras` is a
    `StepBound`, the terms of the ELBO; `noise` gives a `VrnnNoise`.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, vrnn
        >>> spec = DataSpec((5, 3), "binary", step="frame")
        >>> model = vrnn(spec, latent_dim=2, d_hidden=8, hidden=(8,))
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 2).shape
        (2, 5, 3)

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
        remat: "full" keeps only the carry of each step and computes the rest of it again on the way
            back, for less memory where sequences are long or particles many; "dots" keeps the
            results of matrix products too.
        cond_dropout: how often training leaves out the condition. It regularises, and is not for
            guidance, which a VRNN has none of.
        dtype: of the networks' arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data, and for a prompt that
            does not fit.
    """
    check_sequences(spec, "A VRNN")
    if objective != "elbo" and not (isinstance(beta, int | float) and beta == 1):
        raise ConfigError(
            f"beta weighs the KL of the objective 'elbo'; {objective} has none. Leave beta at 1; "
            f"got {beta}."
        )
    emit, guided = emission(spec, n_components), guided_by(spec, cond_dropout)
    sizes = (latent_dim, d_hidden, tuple(hidden), emit.n_outputs)
    net = nets.vrnn.VariationalRecurrentNet
    own_cell = cell_of(cell)
    module = partial(net, spec, own_cell, *sizes, activation, guided)
    chosen = RESAMPLING[resampling]
    model = VrnnModel(
        spec=spec,
        net=functional(module, dtype, nets.sequence.EVENTS),
        emit=emit,
        objective=Estimate(objective, n_samples, chosen),
        beta=beta,
        reported=Estimate(bound_estimator, n_bound_samples, chosen),
        dropout=dropout,
        cond_dropout=cond_dropout,
        guided=guided,
        remat=remat,
    )
    latent = None
    if latent_dim:
        latent = Latent(latents_of(spec, latent_dim), encode=partial(encode, model))

    def init(key: Key) -> tuple[Params, State]:
        return {"vrnn": model.net.init(key)[0]}, {"vrnn": {}}

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        return generate(model, params, state, key, n, cond)

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"vrnn": partial(loss, model)},
            sample=sample,
            bound=partial(bound, model),
            estimator=in_words(model.reported, resampling),
            labels=labels(spec, own_cell, len(hidden)),
            noise={"vrnn": partial(draw, model)},
            latent=latent,
            autoregressive=Autoregressive(generate=partial(generate, model)),
            extras=StepBound(partial(step_bound, model)),
        )
    )
