"""Variational autoencoders: p(x) = ∫ p(z) p(x|z) dz with an amortised posterior q(z|x).

Kingma & Welling 2013 (the VAE), Higgins 2017 (beta), Burda 2015 (the importance-weighted bound),
Roeder 2017 and Tucker 2018 (its lower-variance gradients), Sohn 2015 (conditional), Tomczak &
Welling 2017 (VampPrior).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax.checks import check_cond, checked
from genjax.errors import ConfigError, unknown_name
from genjax.nets.conv import ConvDecoder, ConvEncoder
from genjax.nets.functional import Net, functional
from genjax.nets.mlp import ACTIVATIONS, MLP, flatten_with
from genjax.parts.distributions import (
    LOG_2PI,
    log_mean_exp,
    normal_kl,
    normal_log_prob,
    normal_sample,
    sum_event,
)
from genjax.parts.likelihoods import LIKELIHOOD_OF_KIND, LIKELIHOODS, bounded_log_scale
from genjax.protocol import Array, Aux, Batch, DataSpec, Key, Metrics, Model, Params, State

# Given normalised events [N, *shape] and conditions [N, E] (or None), the mean and log-scale of
# q(z|x, c), each [N, d].
Posterior = Callable[[Array, Array | None], tuple[Array, Array]]

# The floor of the log-scale of q(z|x): at e^-15 its KL to N(0, 1) is already 14.5 nats for each
# dimension of z.
MIN_LOG_SCALE = -15.0


class Prior(NamedTuple):
    """p(z) as pure functions; bring your own through `vae(spec, prior=Prior(...))`.

    Attributes:
        init: (key) -> params.
        log_prob: (params, posterior, z [..., d]) -> nats [...].
        sample: (params, posterior, key, n) -> z [n, d].
        kl: (params, mean [B, d], log_scale [B, d]) -> KL(q || p) in nats [B] where it has a closed
            form, else None.
    """

    init: Callable[[Key], Any]
    log_prob: Callable[[Any, Posterior, Array], Array]
    sample: Callable[[Any, Posterior, Key, int], Array]
    kl: Callable[[Any, Array, Array], Array] | None = None


def normal_prior(latent_dim: int) -> Prior:
    """p(z) = N(0, I)."""
    return Prior(
        init=lambda key: {},
        log_prob=lambda params, posterior, z: sum_event(normal_log_prob(z, 0.0, 0.0)),
        sample=lambda params, posterior, key, n: jax.random.normal(key, (n, latent_dim)),
        kl=lambda params, mean, log_scale: sum_event(normal_kl(mean, log_scale)),
    )


def vamp_prior(spec: DataSpec, n_components: int) -> Prior:
    """p(z) = 1/M Σ_m q(z | u_m) with M learned pseudo-inputs u_m. Tomczak & Welling 2017, equation
    9.

    Pseudo-inputs live on the normalised scale; those of binary and discrete data go through tanh to
    stay in its range (the paper clips). In a conditional model each has a learned pseudo-condition
    beside it, so p(z) does not depend on the condition. The paper conditions nothing.
    """

    def init(key: Key) -> Any:
        params = {"x": jax.random.normal(key, (n_components, *spec.shape))}
        return params | (
            {"cond": jnp.full((n_components, spec.cond_size), 1 / spec.cond_size)}
            if spec.conditional
            else {}
        )

    def components(params: Any, posterior: Posterior) -> tuple[Array, Array]:
        u = params["x"] if spec.kind == "continuous" else jnp.tanh(params["x"])
        return posterior(u, params.get("cond"))

    def log_prob(params: Any, posterior: Posterior, z: Array) -> Array:
        flat, (mean, log_scale) = z.reshape(-1, z.shape[-1]), components(params, posterior)
        return log_mean_exp(_mixture_log_probs(flat, mean, log_scale)).reshape(z.shape[:-1])

    def sample(params: Any, posterior: Posterior, key: Key, n: int) -> Array:
        key_component, key_noise = jax.random.split(key)
        mean, log_scale = components(params, posterior)
        chosen = jax.random.randint(key_component, (n,), 0, n_components)
        return normal_sample(key_noise, mean[chosen], log_scale[chosen])

    return Prior(init, log_prob, sample)


def _mixture_log_probs(z: Array, mean: Array, log_scale: Array) -> Array:
    """ln N(z_n; mean_m, diag scale_m²) for all pairs, nats [M, N], the components in another order.

    (z - mean)² expanded into matrix products is many times as fast as the sum over a [M, N, d]
    tensor, but cancels: its rounding is that of Σ (z² + mean²) / scale². A tenth of the components,
    those that are worst in this, are summed always, since a few of them tend to be very narrow, and
    the others if its bound exceeds 0.1 nats (a hundredth of that is typical).
    """
    (n, d), n_components = z.shape, mean.shape[0]
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    # The differences are computed once more on the way back.
    one_group = jax.checkpoint(
        lambda m, s: sum_event(normal_log_prob(z[None], m[:, None], s[:, None]))
    )

    def expanded(mean: Array, log_scale: Array) -> Array:
        inverse = jnp.exp(-2 * log_scale)
        square = product(inverse, jnp.square(z).T) - 2 * product(mean * inverse, z.T)
        constant = jnp.sum(-0.5 * jnp.square(mean) * inverse - log_scale - 0.5 * LOG_2PI, axis=1)
        return constant[:, None] - 0.5 * square

    def summed(mean: Array, log_scale: Array) -> Array:
        fits = (
            size
            for size in range(1, len(mean) + 1)
            if len(mean) % size == 0 and size * n * d < 2**18
        )
        size = max(fits, default=1)
        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, size, d), (mean, log_scale))
        return jax.lax.map(lambda pair: one_group(*pair), grouped).reshape(len(mean), n)

    largest = jnp.exp(-2 * log_scale) * (jnp.max(jnp.square(z), axis=0)[None] + jnp.square(mean))
    rounding = jax.lax.stop_gradient(jnp.sum(largest, axis=1)) * jnp.finfo(z.dtype).eps
    order = jnp.argsort(rounding)
    rounding, mean, log_scale = rounding[order], mean[order], log_scale[order]
    n_good = n_components - -(-n_components // 10)
    worst = summed(mean[n_good:], log_scale[n_good:])
    if not n_good:
        return worst
    good = jax.lax.cond(
        rounding[n_good - 1] < 0.1, expanded, summed, mean[:n_good], log_scale[:n_good]
    )
    return jnp.concatenate([good, worst])


def _scale_gradient(z: Array, factor: Array) -> Array:
    """z, whose gradient is multiplied by `factor` (a constant) on the way back."""
    factor = jax.lax.stop_gradient(factor)
    return z * factor + jax.lax.stop_gradient(z * (1 - factor))


def _nets(
    spec: DataSpec,
    net: str,
    hidden: tuple[int, ...],
    channels: tuple[int, ...],
    d_z: int,
    n_out: int,
    act: str,
    dtype: str,
) -> tuple[Net, Net, Callable[[Any, Array, Array | None], Array]]:
    """Encoder, decoder, and how to call the encoder: (params, normalised events, conditions) ->
    features [N, 2 d_z].
    """
    d_out, ndim, e = spec.size * n_out, len(spec.shape), spec.cond_size
    if net == "mlp":
        encoder = functional(partial(MLP, spec.size + e, hidden, 2 * d_z, activation=act), dtype)
        decoder = functional(partial(MLP, d_z + e, hidden[::-1], d_out, activation=act), dtype)
        return encoder, decoder, lambda p, x, c: encoder.apply(p, {}, flatten_with(x, ndim, c))[0]
    if net == "conv":
        shape: Any = spec.shape
        encoder = functional(
            partial(ConvEncoder, shape, channels, 2 * d_z, cond_size=e, activation=act), dtype
        )
        decoder = functional(
            partial(
                ConvDecoder,
                d_z + e,
                shape,
                channels[::-1],
                shape[-1] * n_out if shape else 1,
                activation=act,
            ),
            dtype,
        )
        return encoder, decoder, lambda p, x, c: encoder.apply(p, {}, x, c)[0]
    raise unknown_name("net", net, ("mlp", "conv"))


def vae(
    spec: DataSpec,
    *,
    latent_dim: int = 16,
    net: Literal["mlp", "conv"] = "mlp",
    hidden: tuple[int, ...] = (256, 256),
    channels: tuple[int, ...] = (32, 64),
    activation: Literal["gelu", "relu", "silu", "softplus", "tanh"] = "gelu",
    likelihood: Literal["auto", "bernoulli", "gaussian", "discretized_logistic"] = "auto",
    scale: Literal["shared", "element"] | float = "shared",
    prior: Literal["normal", "vamp"] | Prior = "normal",
    n_pseudo_inputs: int = 100,
    beta: float = 1.0,
    n_samples: int = 1,
    n_bound_samples: int = 1,
    gradient: Literal["pathwise", "stl", "dreg"] = "pathwise",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """A variational autoencoder; conditional (a CVAE) if the spec has a condition.

    With K = `n_samples` draws z_k ~ q(z|x) = N(mean(x), diag scale(x)²) and log-weights w_k = ln
    p(x|z_k) + beta (ln p(z_k) - ln q(z_k|x)), the loss per example is -ln 1/K Σ_k exp(w_k) in nats.
    For K = 1 that is the negative ELBO, -ln p(x|z) + beta KL(q || p), and the KL is in closed form
    where the prior has one.

    `bound` is the same with beta = 1 and K = `n_bound_samples`; it grows with K towards ln p(x) in
    expectation. `log_prob` is None. Shapes: x [B, *shape], z [B, latent_dim].

    Extras, on events in the units of the data:
        encode: (params, state, x, cond=None) -> mean and log-scale of q, each [B, latent_dim].
        decode: (params, state, z, cond=None) -> mean of p(x|z), [B, *shape].
        reconstruct: (params, state, x, cond=None) -> decode of the posterior mean.
        sample_mean: (params, state, key, n, cond=None) -> decode of z ~ p(z): what papers show;
            `sample` also draws x.

    Args:
        spec: the data; binary, discrete or continuous.
        latent_dim: dimensions of z.
        net: encoder and decoder: "mlp", or "conv" for images.
        hidden: widths of the hidden layers of the MLP encoder; the decoder has them reversed. Empty
            means linear.
        channels: for "conv": channels of the encoder, each entry halving the image.
        activation: between layers.
        likelihood: p(x|z); "auto" takes the one that fits the kind of data.
        scale: of a Gaussian (in data units) or discretised logistic (on [-1, 1]): "shared" is one
            learned number, "element" is given by the decoder per element, a number fixes it.
        prior: p(z): "normal", "vamp", or in Python any `Prior`.
        n_pseudo_inputs: for "vamp": components of the mixture.
        beta: weight of the KL term in the loss; 1 is the ELBO.
        n_samples: K of the training objective.
        n_bound_samples: K of `bound`.
        gradient: for q's parameters: "pathwise", "stl" (stops the score term, Roeder 2017; biased
            for n_samples > 1) or "dreg" (Tucker 2018).
        dtype: of the networks' arithmetic; parameters and losses stay float32.

    Raises:
        ConfigError: for settings that do not exist or do not fit the data.
    """
    name = LIKELIHOOD_OF_KIND.get(spec.kind, "") if likelihood == "auto" else likelihood
    if spec.kind == "tokens":
        raise ConfigError(
            "A VAE models binary, discrete or continuous data; got tokens. Use a sequence family."
        )
    if name not in LIKELIHOODS:
        raise unknown_name("likelihood", name, LIKELIHOODS)
    if name != LIKELIHOOD_OF_KIND[spec.kind]:
        fit = LIKELIHOOD_OF_KIND[spec.kind]
        raise ConfigError(
            f"{spec.name} is {spec.kind}, whose likelihood is {fit}; got {name}. Binarize or "
            "rescale the data first."
        )
    if isinstance(scale, str) and scale not in ("shared", "element"):
        raise unknown_name("scale", scale, ("shared", "element"))
    if isinstance(scale, int | float) and scale <= 0:
        raise ConfigError(f"scale must be positive, 'shared' or 'element'; got {scale}.")
    if gradient not in ("pathwise", "stl", "dreg"):
        raise unknown_name("gradient", gradient, ("pathwise", "stl", "dreg"))
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    if dtype not in ("float32", "bfloat16"):
        raise unknown_name("dtype", dtype, ("float32", "bfloat16"))
    sizes = {"latent_dim": latent_dim, "n_samples": n_samples, "n_bound_samples": n_bound_samples}
    for label, number in (sizes | {"n_pseudo_inputs": n_pseudo_inputs}).items():
        if number < 1:
            raise ConfigError(f"{label} must be at least 1; got {number}.")
    like = LIKELIHOODS[name](spec, scale == "element")
    encoder, decoder, encode_net = _nets(
        spec, net, tuple(hidden), tuple(channels), latent_dim, like.n_outputs, activation, dtype
    )
    if isinstance(prior, str):
        priors = {
            "normal": partial(normal_prior, latent_dim),
            "vamp": partial(vamp_prior, spec, n_pseudo_inputs),
        }
        if prior not in priors:
            raise unknown_name("prior", prior, priors)
        prior = priors[prior]()

    def init(key: Key) -> tuple[Params, State]:
        key_encoder, key_decoder, key_prior = jax.random.split(key, 3)
        params: dict[str, Any] = {
            "encoder": encoder.init(key_encoder)[0],
            "decoder": decoder.init(key_decoder)[0],
        }
        params["prior"] = prior.init(key_prior)
        if like.scaled and scale == "shared":
            params["log_scale"] = jnp.zeros(())
        return {"vae": params}, {"vae": {}}

    def condition(cond: Any) -> Array | None:
        return jax.nn.one_hot(cond, spec.n_classes) if spec.n_classes else cond

    def posterior_of(p: Any) -> Posterior:
        def posterior(x: Array, c: Array | None) -> tuple[Array, Array]:
            features = encode_net(p["encoder"], x, c)
            mean, raw = features[..., :latent_dim], features[..., latent_dim:]
            # A scale so small that z - mean is lost to rounding ends in NaN. The gradient passes,
            # to find the way back.
            return mean, raw + jax.lax.stop_gradient(jnp.maximum(raw, MIN_LOG_SCALE) - raw)

        return posterior

    def outputs_of(p: Any, z: Array, c: Array | None) -> tuple[Array, Array | float]:
        """Decoder outputs [N, *shape, n_outputs] for z [N, d], and the log-scale that goes with
        them.
        """
        outputs = decoder.apply(p["decoder"], {}, flatten_with(z, 1, c))[0].reshape(
            -1, *spec.shape, like.n_outputs
        )
        if "log_scale" in p:
            return outputs, bounded_log_scale(p["log_scale"])
        # A Bernoulli has no scale, and with scale="element" it is among the outputs.
        return outputs, 0.0 if isinstance(scale, str) or not like.scaled else jnp.log(scale)

    def log_likelihood(p: Any, x: Array, z: Array, c: Array | None) -> Array:
        """ln p(x|z) for z [K, B, d]: nats [K, B]."""
        k, b = z.shape[:2]
        tiled = None if c is None else jnp.broadcast_to(c, (k, *c.shape)).reshape(k * b, -1)
        outputs, log_scale = outputs_of(p, z.reshape(k * b, -1), tiled)
        # One axis for the event: sums over several are not vectorised on a CPU, and 50 times as
        # slow.
        flat = outputs.reshape(k, b, spec.size, like.n_outputs)
        return sum_event(like.log_prob(x.reshape(1, b, spec.size), flat, log_scale))

    def log_weights(
        p: Any, x: Array, c: Array | None, key: Key, k: int, how: str = "pathwise", beta: Any = 1.0
    ) -> tuple[Array, ...]:
        """ln p(x|z_k) and ln p(z_k) - ln q(z_k|x), each [K, B] in nats."""
        mean, log_scale = posterior_of(p)(spec.normalize(x), c)
        z = normal_sample(key, jnp.broadcast_to(mean, (k, *mean.shape)), log_scale[None])
        if how != "pathwise":
            mean, log_scale = jax.lax.stop_gradient((mean, log_scale))

        def terms(z: Array) -> tuple[Array, Array]:
            log_q = sum_event(normal_log_prob(z, mean[None], log_scale[None]))
            return log_likelihood(p, x, z, c), prior.log_prob(
                p["prior"], posterior_of(p), z
            ) - log_q

        if how != "dreg":
            return terms(z)
        # DReG: with v the normalised weights, the path through z gets v² (in general v (1 - beta +
        # beta v), by the same derivation), the model's parameters get v, which the gradient of
        # log-mean-exp supplies; so the path is scaled by the rest. The first pass has the same
        # values as the second, and the compiler merges them.
        log_lik, log_ratio = terms(jax.lax.stop_gradient(z))
        v = jax.nn.softmax(log_lik + beta * log_ratio, axis=0)[..., None]
        return terms(_scale_gradient(z, 1 - beta + beta * v))

    def elbo_terms(p: Any, x: Array, c: Array | None, key: Key) -> tuple[Array, Array]:
        """ln p(x|z) for one z ~ q, and KL(q || p), in closed form where the prior has one: each [B]
        in nats.
        """
        if prior.kl is None:
            log_lik, log_ratio = log_weights(p, x, c, key, 1)
            return log_lik[0], -log_ratio[0]
        mean, log_scale = posterior_of(p)(spec.normalize(x), c)
        z = normal_sample(key, mean, log_scale)
        return log_likelihood(p, x, z[None], c)[0], prior.kl(p["prior"], mean, log_scale)

    def loss(
        params: Params, state: State, batch: Batch, key: Key, step: Array
    ) -> tuple[Array, Aux]:
        p, c = params["vae"], condition(batch.cond)
        metrics: Metrics
        if n_samples == 1 and gradient == "pathwise":
            log_lik, kl = elbo_terms(p, batch.x, c, key)
            value = beta * kl - log_lik
            metrics = {"elbo": log_lik - kl, "log_likelihood": log_lik, "kl": kl}
        else:
            log_lik, log_ratio = log_weights(p, batch.x, c, key, n_samples, gradient, beta)
            value = -log_mean_exp(log_lik + beta * log_ratio)
            log_lik, log_ratio = jax.lax.stop_gradient((log_lik, log_ratio))
            metrics = {
                "elbo": jnp.mean(log_lik + log_ratio, axis=0),
                "iwae": log_mean_exp(log_lik + log_ratio),
                "log_likelihood": jnp.mean(log_lik, axis=0),
                "kl": -jnp.mean(log_ratio, axis=0),
            }
        return value, Aux(state, metrics)

    def bound(params: Params, state: State, batch: Batch, key: Key) -> Array:
        p, c = params["vae"], condition(batch.cond)
        if n_bound_samples == 1:
            log_lik, kl = elbo_terms(p, batch.x, c, key)
            return log_lik - kl
        # In chunks under a scan, so that memory does not grow with K; the largest divisor of K
        # keeps the chunks equal.
        chunk = max(size for size in range(1, 65) if n_bound_samples % size == 0)

        def add(total: Array, key: Key) -> tuple[Array, None]:
            log_lik, log_ratio = log_weights(p, batch.x, c, key, chunk)
            return jnp.logaddexp(total, jax.nn.logsumexp(log_lik + log_ratio, axis=0)), None

        keys = jax.random.split(key, n_bound_samples // chunk)
        start = jnp.full(batch.x.shape[:1], -jnp.inf, batch.x.dtype)
        return jax.lax.scan(add, start, keys)[0] - math.log(n_bound_samples)

    def encode(params: Params, state: State, x: Array, cond: Any = None) -> tuple[Array, Array]:
        check_cond(spec, cond, x.shape[0])
        return posterior_of(params["vae"])(spec.normalize(x), condition(cond))

    def decode(params: Params, state: State, z: Array, cond: Any = None) -> Array:
        check_cond(spec, cond, z.shape[0])
        return like.mean(*outputs_of(params["vae"], z, condition(cond)))

    def reconstruct(params: Params, state: State, x: Array, cond: Any = None) -> Array:
        return decode(params, state, encode(params, state, x, cond)[0], cond)

    def sample_mean(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        p = params["vae"]
        return decode(params, state, prior.sample(p["prior"], posterior_of(p), key, n), cond)

    def sample(params: Params, state: State, key: Key, n: int, cond: Any = None) -> Array:
        p, (key_z, key_x) = params["vae"], jax.random.split(key)
        z = prior.sample(p["prior"], posterior_of(p), key_z, n)
        return like.sample(key_x, *outputs_of(p, z, condition(cond)))

    return checked(
        Model(
            spec=spec,
            init=init,
            losses={"vae": loss},
            sample=sample,
            bound=bound,
            estimator="ELBO, 1 sample"
            if n_bound_samples == 1
            else f"importance-weighted bound, K={n_bound_samples}",
            extras={
                "encode": encode,
                "decode": decode,
                "reconstruct": reconstruct,
                "sample_mean": sample_mean,
            },
        )
    )
