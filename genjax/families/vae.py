"""Variational autoencoders: p(x) = ∫ p(z) p(x|z) dz with an amortised posterior q(z|x).

Kingma & Welling 2013 (the VAE), Higgins 2017 (beta), Burda 2015 (the importance-weighted bound),
Roeder 2017 and Tucker 2018 (its lower-variance gradients), Sohn 2015 (conditional), Tomczak &
Welling 2017 (VampPrior).
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax import nets
from genjax.checks import check_whole, checked
from genjax.nets.functional import Net
from genjax.nets.own import Call, Network, given_only, own_net, separate
from genjax.nets.platforms import at_each
from genjax.parts.distributions import log_mean_exp, normal_log_prob, sum_event
from genjax.parts.likelihoods import Likelihood, bounded_log_scale, likelihood_of
from genjax.parts.priors import Prior, checked_prior, labels_within, normal_prior, vamp_prior
from genjax.protocol import (
    Array,
    Aux,
    Batch,
    DataSpec,
    Key,
    Latent,
    Metrics,
    Model,
    Params,
    State,
    dtype_of,
)
from genjax.settings import Count, Dtype, NonNegative, Often, Positive, Whole, builder, used
from genjax.spec import as_vectors

# The floor of the log-scale of q(z|x): at e^-15 its KL to N(0, 1) is already 14.5 nats for each
# dimension of z.
MIN_LOG_SCALE = -15.0


class Autoencoder(NamedTuple):
    """The pieces of a VAE. The functions below take it, and `p`, which is `params["vae"]`.

    Attributes:
        spec: the data.
        encoder: normalised events and conditions -> features [N, 2 d].
        decoder: z and conditions -> outputs [N, *shape, n_outputs], but for a reshape.
        flat: whether the encoder takes them as vectors, the conditions appended.
        likelihood: p(x | outputs).
        scale: of the likelihood: "shared" is p["log_scale"], "element" is among the outputs, a
            number is fixed.
        prior: p(z).
        latent_dim: d.
    """

    spec: DataSpec
    encoder: Net
    decoder: Net
    flat: bool
    likelihood: Likelihood
    scale: Any
    prior: Prior
    latent_dim: int


class Noise(NamedTuple):
    """What one pass draws: z_k = mean + scale epsilon_k, [K, B, d], and a key for the prior."""

    epsilon: Array
    prior: Key


def draw_noise(latent_dim: int, k: int, key: Key, batch: Batch) -> Noise:
    """The noise of K draws of z for each example."""
    shape = (k, batch.x.shape[0], latent_dim)
    epsilon = jax.random.normal(key, shape, nets.layers.wide(batch.x.dtype))
    return Noise(epsilon, jax.random.fold_in(key, 1))


# --- the model ------------------------------------------------------------------------------------


def posterior(model: Autoencoder, p: Any, x: Array, c: Array | None) -> tuple[Array, Array]:
    """Mean and log-scale of q(z | x, c) for normalised events x: [N, d] each."""
    given = (nets.mlp.flatten_with(x, len(model.spec.shape), c),) if model.flat else (x, c)
    mean, raw = jnp.split(model.encoder.apply(p["encoder"], {}, *given)[0], 2, axis=-1)
    # A scale so small that z - mean is lost to rounding ends in NaN. The gradient passes, to find
    # the way back.
    return mean, raw + jax.lax.stop_gradient(jnp.maximum(raw, MIN_LOG_SCALE) - raw)


def decoded(model: Autoencoder, p: Any, z: Array, c: Array | None) -> tuple[Array, Array | float]:
    """The decoder's outputs [N, *shape, n_outputs] for z [N, d], and the log-scale that goes with
    them.
    """
    outputs = model.decoder.apply(p["decoder"], {}, nets.mlp.flatten_with(z, 1, c))[0]
    outputs = outputs.reshape(-1, *model.spec.shape, model.likelihood.n_outputs)
    return outputs, log_scale_of(model, p)


def log_scale_of(model: Autoencoder, p: Any) -> Array | float:
    """The log-scale of p(x | z, c) for all z, of the shape of an event, or a number."""
    if "log_scale" in p:
        return bounded_log_scale(p["log_scale"])
    # A Bernoulli has no scale, and with scale="element" it is among the outputs.
    if isinstance(model.scale, str) or not model.likelihood.scaled:
        return 0.0
    return jnp.log(model.scale)


def log_likelihood(model: Autoencoder, p: Any, x: Array, z: Array, c: Array | None) -> Array:
    """ln p(x | z, c) for x [B, *shape] and z [K, B, d]: nats [K, B]."""
    k, b = z.shape[:2]
    tiled = None if c is None else jnp.broadcast_to(c, (k, *c.shape))
    outputs = at_each(lambda z, c: decoded(model, p, z, c)[0], z, tiled)
    # One axis for the event: sums over several are not vectorised on a CPU, and 50 times as slow.
    size = model.spec.size
    flat = outputs.reshape(k, b, size, model.likelihood.n_outputs)
    log_scale = log_scale_of(model, p)
    return sum_event(model.likelihood.log_prob(x.reshape(1, b, size), flat, log_scale))


def log_prior(
    model: Autoencoder, p: Any, state: State, z: Array, c: Array | None, key: Key
) -> Array:
    """ln p(z | c) for z [K, B, d] and c [B, E]: nats [K, B]."""
    tiled = None if c is None else jnp.broadcast_to(c, (len(z), *c.shape))
    q = partial(posterior, model, p)
    return model.prior.log_prob(p["prior"], state["vae"], q, z, tiled, key)


def sample_prior(
    model: Autoencoder, p: Any, state: State, key: Key, n: int, c: Array | None
) -> Array:
    """z ~ p(z | c), [n, d]."""
    z = model.prior.sample(p["prior"], state["vae"], partial(posterior, model, p), key, n, c)
    return z.astype(dtype_of(p))  # a prior without parameters draws in any dtype


# --- the bound ------------------------------------------------------------------------------------


def log_weights(
    model: Autoencoder,
    p: Any,
    state: State,
    x: Array,
    c: Array | None,
    noise: Noise,
    gradient: str = "pathwise",
    beta: Array | float = 1.0,
) -> tuple[Array, Array]:
    """ln p(x|z_k) and ln p(z_k) - ln q(z_k|x) for z_k ~ q(z|x), each [K, B] in nats.

    Values are the same for every `gradient`, which is what the derivative with respect to the
    parameters of q is: see `vae`.
    """
    mean, log_scale = posterior(model, p, model.spec.normalize(x), c)
    z = mean[None] + jnp.exp(log_scale)[None] * noise.epsilon
    if gradient != "pathwise":
        mean, log_scale = jax.lax.stop_gradient((mean, log_scale))

    def terms(z: Array) -> tuple[Array, Array]:
        log_q = sum_event(normal_log_prob(z, mean[None], log_scale[None]))
        log_ratio = log_prior(model, p, state, z, c, noise.prior) - log_q
        return log_likelihood(model, p, x, z, c), log_ratio

    if gradient != "dreg":
        return terms(z)
    # DReG: with v the normalised weights, the path through z gets v² (in general v (1 - beta + beta
    # v), by the same derivation), the model's parameters get v, which the gradient of log-mean-exp
    # supplies; so the path is scaled by the rest. The first pass has the same values as the second,
    # and the compiler merges them.
    log_lik, log_ratio = terms(jax.lax.stop_gradient(z))
    v = jax.nn.softmax(log_lik + beta * log_ratio, axis=0)[..., None]
    return terms(_scale_gradient(z, 1 - beta + beta * v))


def _scale_gradient(z: Array, factor: Array) -> Array:
    """z, whose gradient is multiplied by `factor` (a constant) on the way back."""
    factor = jax.lax.stop_gradient(factor)
    return z * factor + jax.lax.stop_gradient(z * (1 - factor))


def elbo_terms(
    model: Autoencoder, p: Any, state: State, x: Array, c: Array | None, noise: Noise
) -> tuple[Array, Array]:
    """ln p(x|z) for one z ~ q, and KL(q || p), in closed form where the prior has one: each [B] in
    nats.
    """
    if model.prior.kl is None:
        log_lik, log_ratio = log_weights(model, p, state, x, c, noise)
        return log_lik[0], -log_ratio[0]
    mean, log_scale = posterior(model, p, model.spec.normalize(x), c)
    z = mean + jnp.exp(log_scale) * noise.epsilon[0]
    kl = model.prior.kl(p["prior"], mean, log_scale)
    return log_likelihood(model, p, x, z[None], c)[0], kl


def importance_weighted_bound(
    model: Autoencoder, p: Any, state: State, batch: Batch, c: Array | None, key: Key, k: int
) -> Array:
    """ln 1/K Σ_k p(x, z_k) / q(z_k|x), [B] in nats. Burda 2015, equation 8."""
    # In a scan over equal chunks, as large as divides K, so that memory does not grow with K.
    chunk = max(size for size in range(1, 65) if k % size == 0)

    def add(total: Array, key: Key) -> tuple[Array, None]:
        noise = draw_noise(model.latent_dim, chunk, key, batch)
        log_lik, log_ratio = log_weights(model, p, state, batch.x, c, noise)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_lik + log_ratio, axis=0)), None

    start = jnp.full(batch.x.shape[:1], -jnp.inf, batch.x.dtype)
    return jax.lax.scan(add, start, jax.random.split(key, k // chunk))[0] - math.log(k)


def kl_weight(
    beta: Array | float, warmup_steps: Array | int, step: Array | int, dtype: Any
) -> Array | float:
    """beta min(step / warmup_steps, 1): 0 at step 0, beta from step `warmup_steps` on."""
    if not used(warmup_steps):
        return beta
    step, steps = jnp.asarray(step, dtype), jnp.asarray(warmup_steps, dtype)
    # A traced number of steps may be 0.
    return beta * jnp.where(step < steps, step / jnp.maximum(steps, 1), 1)


def objective(
    model: Autoencoder,
    p: Any,
    state: State,
    batch: Batch,
    noise: Noise,
    gradient: str,
    beta: Array | float,
) -> tuple[Array, Metrics]:
    """The loss [B] in nats with K = len(noise.epsilon), and what is reported, without beta."""
    c = model.spec.embed(batch.cond, p)
    if len(noise.epsilon) == 1 and gradient == "pathwise":
        log_lik, kl = elbo_terms(model, p, state, batch.x, c, noise)
        return beta * kl - log_lik, {"elbo": log_lik - kl, "log_likelihood": log_lik, "kl": kl}
    log_lik, log_ratio = log_weights(model, p, state, batch.x, c, noise, gradient, beta)
    value = -log_mean_exp(log_lik + beta * log_ratio)
    log_lik, log_ratio = jax.lax.stop_gradient((log_lik, log_ratio))
    return value, {
        "elbo": jnp.mean(log_lik + log_ratio, axis=0),
        "iwae": log_mean_exp(log_lik + log_ratio),
        "log_likelihood": jnp.mean(log_lik, axis=0),
        "kl": -jnp.mean(log_ratio, axis=0),
    }


# --- assembly -------------------------------------------------------------------------------------


def _own_nets(
    spec: DataSpec,
    made: tuple[Net, Net],
    own: tuple[Network | None, Network | None],
    d_z: int,
    n_outputs: int,
    dtype: str,
) -> tuple[Net, Net]:
    """Encoder and decoder, each the user's own where there is one."""
    cond = [("cond", (spec.cond_size,))] if spec.conditional else []
    encoder, decoder = made
    if own[0] is not None:
        call = Call("the encoder of a VAE", [("x", spec.shape), *cond], (2 * d_z,))
        encoder = given_only(own_net(own[0], call, dtype))
    if own[1] is not None:
        output = (*spec.shape, n_outputs)
        call = Call("the decoder of a VAE", [("z", (d_z,)), *cond], output)
        decoder = separate(own_net(own[1], call, dtype), d_z, spec.conditional)
    return encoder, decoder


def initial(model: Autoencoder, key: Key) -> tuple[Params, State]:
    """Random parameters, and the state, which is the prior's."""
    key_encoder, key_decoder, key_prior = jax.random.split(key, 3)
    prior, state = model.prior.init(key_prior)
    p: dict[str, Any] = {
        "encoder": model.encoder.init(key_encoder)[0],
        "decoder": model.decoder.init(key_decoder)[0],
        "prior": prior,
    }
    if model.likelihood.scaled and model.scale == "shared":
        p["log_scale"] = jnp.zeros((), jnp.float32)
    return {"vae": p}, {"vae": state}


def _latent(model: Autoencoder) -> Latent:
    """What the model offers beside samples; `checked` looks at the arguments."""
    spec, like = model.spec, model.likelihood
    latents = DataSpec(
        (model.latent_dim,),
        "continuous",
        n_classes=spec.n_classes,
        cond_dim=spec.cond_dim,
        class_names=spec.class_names,
        name=f"latents of {spec.name}",
    )

    def encode(params: Params, state: State, x: Array, cond: Any = None) -> tuple[Array, Array]:
        return posterior(model, params["vae"], spec.normalize(x), spec.embed(cond, params))

    def decode(params: Params, state: State, z: Array, cond: Any = None) -> Array:
        return like.mean(*decoded(model, params["vae"], z, spec.embed(cond, params)))

    def draw(params: Params, state: State, key: Key, z: Array, cond: Any = None) -> Array:
        return like.sample(key, *decoded(model, params["vae"], z, spec.embed(cond, params)))

    def log_lik(params: Params, state: State, batch: Batch, z: Array) -> Array:
        c = spec.embed(batch.cond, params)
        return log_likelihood(model, params["vae"], batch.x, z[None], c)[0]

    def reconstruct(params: Params, state: State, x: Array, cond: Any = None) -> Array:
        return decode(params, state, encode(params, state, x, cond)[0], cond)

    def sample_mean(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        z = sample_prior(model, params["vae"], state, key, n, spec.embed(cond, params))
        return decode(params, state, z, cond)

    return Latent(latents, encode, decode, draw, log_lik, reconstruct, sample_mean)


@builder
def vae(
    spec: DataSpec,
    *,
    latent_dim: Count = 16,
    net: Literal["mlp", "conv"] = "mlp",
    hidden: tuple[Count, ...] = (256, 256),
    channels: tuple[Count, ...] = (32, 64),
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "gelu",
    likelihood: Literal[
        "auto", "bernoulli", "gaussian", "discretized_logistic", "categorical"
    ] = "auto",
    scale: Literal["shared", "element"] | Positive = "shared",
    prior: Literal["normal", "vamp"] | Prior = "normal",
    n_pseudo_inputs: Count = 100,
    encoder: Network | None = None,
    decoder: Network | None = None,
    beta: NonNegative = 1.0,
    beta_warmup_steps: Whole = 0,
    n_samples: Often = 1,
    n_bound_samples: Often = 1,
    gradient: Literal["pathwise", "stl", "dreg"] = "pathwise",
    dtype: Dtype = "float32",
) -> Model:
    """A variational autoencoder; conditional (a CVAE) if the spec has a condition.

    With K = `n_samples` draws z_k ~ q(z|x) = N(mean(x), diag scale(x)²) and log-weights w_k = ln
    p(x|z_k) + beta (ln p(z_k) - ln q(z_k|x)), the loss per example is -ln 1/K Σ_k exp(w_k) in nats.
    For K = 1 that is the negative ELBO, -ln p(x|z) + beta KL(q || p), and the KL is in closed form
    where the prior has one and the gradient is pathwise. With `beta_warmup_steps` = S the loss of
    optimiser step s = 0, 1, ... has beta min(s / S, 1) for beta; metrics and bound have 1 at all
    times.

    `bound` is the same with beta = 1 and K = `n_bound_samples`; it grows with K towards ln p(x) in
    expectation. `log_prob` is None. Shapes: x [B, *shape], z [B, latent_dim]. `latent` has all of
    its fields.

    Args:
        spec: the data; binary, discrete or continuous.
        latent_dim: dimensions of z.
        net: encoder and decoder: "mlp", or "conv" for images.
        hidden: widths of the hidden layers of the MLP encoder; the decoder has them reversed. Empty
            means linear.
        channels: for "conv": channels of the encoder, each entry halving the image.
        activation: between layers.
        likelihood: p(x|z); "auto" takes the usual one of the kind of data. For discrete data
            "categorical" gives each level a logit, in the place of an order and a scale.
        scale: of a Gaussian (of standardised values) or discretised logistic (on [-1, 1]):
            "shared" is one learned number, "element" is given by the decoder per element, a number
            fixes it.
        prior: p(z): "normal", "vamp", or in Python any `Prior`, such as `prior_of(model)`.
        n_pseudo_inputs: for "vamp": components of the mixture.
        encoder: in Python, a Flax module of one's own in the place of that of `net`: (normalised x
            [n, *shape], and cond [n, cond_size] where there is one) -> [n, 2 latent_dim], mean and
            log-scale; see `nets.own`.
        decoder: the same, (z [n, latent_dim], and cond) -> [n, *shape, n_outputs], the outputs of
            the likelihood: 1 of a Bernoulli or Gaussian, 2 with scale="element".
        beta: weight of the KL term in the loss; 1 is the ELBO.
        beta_warmup_steps: over how many optimiser steps that weight rises from 0 to beta; 0 begins
            with beta.
        n_samples: K of the training objective.
        n_bound_samples: K of `bound`.
        gradient: for q's parameters: "pathwise", "stl" (stops the score term, Roeder 2017; biased
            for n_samples > 1) or "dreg" (Tucker 2018).
        dtype: of the networks' arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, example_batch, vae
        >>> spec = DataSpec((8, 8, 1), "binary")
        >>> model = vae(spec, latent_dim=2, hidden=(16,), n_bound_samples=5)
        >>> params, state = model.init(jax.random.key(0))
        >>> batch = example_batch(spec, jax.random.key(1), 4)
        >>> model.bound(params, state, batch, jax.random.key(2)).shape
        (4,)
        >>> model.latent.reconstruct(params, state, batch.x).shape
        (4, 8, 8, 1)
    """
    check_whole(spec, "A VAE")
    if isinstance(prior, str):
        prior = normal_prior(latent_dim) if prior == "normal" else vamp_prior(spec, n_pseudo_inputs)
    prior = checked_prior(prior, latent_dim, n_samples=n_samples, n_bound_samples=n_bound_samples)
    like = likelihood_of(spec, likelihood, scale == "element")
    # ln p sees events as vectors, see `log_likelihood`.
    of_vectors = likelihood_of(as_vectors(spec), likelihood, scale == "element")
    like = like._replace(log_prob=of_vectors.log_prob)
    widths, own = (tuple(hidden), tuple(channels)), (encoder, decoder)
    made = nets.autoencoder.pair(spec, net, widths, latent_dim, like.n_outputs, activation, dtype)
    made = _own_nets(spec, made, own, latent_dim, like.n_outputs, dtype)
    flat = net == "mlp" and encoder is None
    model = Autoencoder(spec, *made, flat, like, scale, prior, latent_dim)
    noise_of = partial(draw_noise, latent_dim, n_samples)

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        noise = noise_of(key, batch)
        weight = kl_weight(beta, beta_warmup_steps, step, noise.epsilon.dtype)
        value, metrics = objective(model, params["vae"], state, batch, noise, gradient, weight)
        return value, Aux(state, metrics)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        p, c = params["vae"], spec.embed(batch.cond, params)
        if n_bound_samples > 1:
            return importance_weighted_bound(model, p, state, batch, c, key, n_bound_samples)
        noise = draw_noise(latent_dim, 1, key, batch)
        log_lik, kl = elbo_terms(model, p, state, batch.x, c, noise)
        return log_lik - kl

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        key_z, key_x = jax.random.split(key)
        p, c = params["vae"], spec.embed(cond, params)
        z = sample_prior(model, p, state, key_z, n, c)
        return like.sample(key_x, *decoded(model, p, z, c))

    many = f"importance-weighted bound, K={n_bound_samples}"
    return checked(
        Model(
            spec=spec,
            init=partial(initial, model),
            losses={"vae": loss},
            sample=sample,
            bound=bound,
            estimator="ELBO, 1 sample" if n_bound_samples == 1 else many,
            labels=(
                *nets.autoencoder.labels("vae", net, widths, tuple(one is None for one in own)),
                *labels_within("vae/prior", prior.labels),
            ),
            noise={"vae": noise_of},
            latent=_latent(model),
        )
    )
