"""Priors of latent vectors, p(z) or p(z | c): normal, a mixture of posteriors, any model.

Tomczak & Welling 2017 (VampPrior).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.errors import ConfigError, expect
from genjax.parts.distributions import (
    LOG_2PI,
    log_mean_exp,
    normal_kl,
    normal_log_prob,
    normal_sample,
    sum_event,
)
from genjax.protocol import Array, Batch, DataSpec, Key, Model, PyTree

# Given normalised events [N, *shape] and conditions [N, E] (or None), the mean and log-scale of
# q(z|x, c), each [N, d].
Posterior = Callable[[Array, Array | None], tuple[Array, Array]]


class Prior(NamedTuple):
    """p(z), or p(z | c), as pure functions; bring your own through `vae(spec, prior=Prior(...))`.

    A condition is a vector, one-hot for a label, and None in an unconditional model. All functions
    are in evaluation mode: a state is read and never changed. A key is for priors whose density is
    estimated.

    Attributes:
        init: (key) -> (params, state).
        log_prob: (params, state, posterior, z [..., d], cond [..., E] or None, key) -> nats [...].
        sample: (params, state, posterior, key, n, cond [n, E] or None) -> z [n, d].
        kl: (params, mean [B, d], log_scale [B, d]) -> KL(q || p) in nats [B] where it has a closed
            form, else None.
        exact: whether `log_prob` is ln p(z), and not a lower bound of it in expectation or an
            estimate with noise.
        labels: what its parameters are to optimisers, as `Model.labels` of a model of its own.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genjax import DataSpec, Prior, vae
        >>> uniform = Prior(  # on (0, 1)²
        ...     init=lambda key: ({}, {}),
        ...     log_prob=lambda params, state, q, z, cond, key: jnp.where(
        ...         ((z > 0) & (z < 1)).all(-1), 0.0, -jnp.inf
        ...     ),
        ...     sample=lambda params, state, q, key, n, cond: jax.random.uniform(key, (n, 2)),
        ... )
        >>> model = vae(DataSpec((3,), "continuous"), latent_dim=2, hidden=(4,), prior=uniform)
        >>> params, state = model.init(jax.random.key(0))
        >>> model.sample(params, state, jax.random.key(1), 5).shape
        (5, 3)
    """

    init: Callable[[Key], tuple[PyTree, PyTree]]
    log_prob: Callable[[PyTree, PyTree, Posterior, Array, Array | None, Key], Array]
    sample: Callable[[PyTree, PyTree, Posterior, Key, int, Array | None], Array]
    kl: Callable[[PyTree, Array, Array], Array] | None = None
    exact: bool = True
    labels: tuple[tuple[str, str], ...] = ()


def checked_prior(prior: Prior, latent_dim: int, **samples: int) -> Prior:
    """The same prior, refused where what it has of ln p(z) is not enough for so many samples, and
    held to the shapes of its results: a number for all of a batch would pass for one of each z.
    """
    for name, k in samples.items():
        if k > 1 and not prior.exact:
            raise ConfigError(
                f"{name}={k} needs ln p(z), and this prior has a bound or a noisy estimate of it: "
                f"the log-mean-exp of bounds is no bound. Say {name}=1, or take a prior with a "
                "density (of an ODE, n_probes=0)."
            )

    def log_prob(
        params: Any, state: Any, posterior: Posterior, z: Array, cond: Array | None, key: Key
    ) -> Array:
        nats = prior.log_prob(params, state, posterior, z, cond, key)
        if jnp.shape(nats) != z.shape[:-1]:
            raise ConfigError(
                f"The prior's log_prob must give nats of shape {list(z.shape[:-1])} for z of shape "
                f"{list(z.shape)}, a sum over the last axis alone; got {list(jnp.shape(nats))}."
            )
        return nats

    def sample(
        params: Any, state: Any, posterior: Posterior, key: Key, n: int, cond: Array | None
    ) -> Array:
        z = prior.sample(params, state, posterior, key, n, cond)
        if z.shape != (n, latent_dim):
            raise ConfigError(
                f"The prior must draw z of shape {[n, latent_dim]}; got {list(z.shape)}."
            )
        return z

    return prior._replace(log_prob=log_prob, sample=sample)


def labels_within(place: str, labels: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """`Model.labels` of a model that has the parameters which these are of at a path of its own.

    Example:
        >>> from genjax.parts.priors import labels_within
        >>> labels_within("vae/prior", (("^x$", "vector"), ("/table$", "embedding")))
        (('^vae/prior/(?:x$)', 'vector'), ('^vae/prior/.*(?:/table$)', 'embedding'))
    """

    def moved(pattern: str) -> str:
        if pattern.startswith("^"):
            return f"^{place}/(?:{pattern[1:]})"
        return f"^{place}/.*(?:{pattern})"

    return tuple((moved(pattern), label) for pattern, label in labels)


def normal_prior(latent_dim: int) -> Prior:
    """p(z) = N(0, I), whatever the condition."""

    def log_prob(
        params: Any, state: Any, posterior: Posterior, z: Array, cond: Array | None, key: Key
    ) -> Array:
        return sum_event(normal_log_prob(z, 0.0, 0.0))

    def sample(
        params: Any, state: Any, posterior: Posterior, key: Key, n: int, cond: Array | None
    ) -> Array:
        return jax.random.normal(key, (n, latent_dim))

    return Prior(
        init=lambda key: ({}, {}),
        log_prob=log_prob,
        sample=sample,
        kl=lambda params, mean, log_scale: sum_event(normal_kl(mean, log_scale)),
    )


# --- a mixture of posteriors ----------------------------------------------------------------------


def vamp_prior(spec: DataSpec, n_components: int) -> Prior:
    """p(z) = 1/M Σ_m q(z | u_m) with M learned pseudo-inputs u_m. Tomczak & Welling 2017, equation
    9.

    Pseudo-inputs live on the normalised scale; those of binary and discrete data go through tanh to
    stay in its range (the paper clips). In a conditional model each has a learned pseudo-condition
    beside it, so p(z) does not depend on the condition. The paper conditions nothing.
    """

    def init(key: Key) -> tuple[Any, Any]:
        params = {"x": jax.random.normal(key, (n_components, *spec.shape), jnp.float32)}
        if spec.conditional:
            params["cond"] = jnp.full(
                (n_components, spec.cond_size), 1 / spec.cond_size, jnp.float32
            )
        return params, {}

    def components(params: Any, posterior: Posterior) -> tuple[Array, Array]:
        u = params["x"] if spec.kind == "continuous" else jnp.tanh(params["x"])
        return posterior(u, params.get("cond"))

    def log_prob(
        params: Any, state: Any, posterior: Posterior, z: Array, cond: Array | None, key: Key
    ) -> Array:
        flat, (mean, log_scale) = z.reshape(-1, z.shape[-1]), components(params, posterior)
        return log_mean_exp(mixture_log_probs(flat, mean, log_scale)).reshape(z.shape[:-1])

    def sample(
        params: Any, state: Any, posterior: Posterior, key: Key, n: int, cond: Array | None
    ) -> Array:
        key_component, key_noise = jax.random.split(key)
        mean, log_scale = components(params, posterior)
        chosen = jax.random.randint(key_component, (n,), 0, n_components)
        return normal_sample(key_noise, mean[chosen], log_scale[chosen])

    # Pseudo-inputs are places among the data: no matrix, and nothing draws them to 0.
    return Prior(init, log_prob, sample, labels=(("^(x|cond)$", "vector"),))


def mixture_log_probs(z: Array, mean: Array, log_scale: Array) -> Array:
    """ln N(z_n; mean_m, diag scale_m²) for all pairs, nats [M, N], the components in another order.

    (z - mean)² expanded into matrix products is many times as fast as the sum over a [M, N, d]
    tensor, but cancels: its rounding is that of Σ (z² + mean²) / scale². A tenth of the components,
    those that are worst in this, are summed always, since a few of them tend to be very narrow, and
    the others if its bound exceeds 0.1 nats (a hundredth of that is typical).
    """
    n_components = mean.shape[0]
    largest = jnp.exp(-2 * log_scale) * (jnp.max(jnp.square(z), axis=0)[None] + jnp.square(mean))
    rounding = jax.lax.stop_gradient(jnp.sum(largest, axis=1)) * jnp.finfo(z.dtype).eps
    order = jnp.argsort(rounding)
    rounding, mean, log_scale = rounding[order], mean[order], log_scale[order]
    n_good = n_components - -(-n_components // 10)
    worst = _summed(z, mean[n_good:], log_scale[n_good:])
    if not n_good:
        return worst
    good = jax.lax.cond(
        rounding[n_good - 1] < 0.1, _expanded, _summed, z, mean[:n_good], log_scale[:n_good]
    )
    return jnp.concatenate([good, worst])


def _expanded(z: Array, mean: Array, log_scale: Array) -> Array:
    """By (z - m)² = z² - 2 z m + m², as matrix products."""
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    inverse = jnp.exp(-2 * log_scale)
    square = product(inverse, jnp.square(z).T) - 2 * product(mean * inverse, z.T)
    constant = jnp.sum(-0.5 * jnp.square(mean) * inverse - log_scale - 0.5 * LOG_2PI, axis=1)
    return constant[:, None] - 0.5 * square


def _summed(z: Array, mean: Array, log_scale: Array) -> Array:
    """By the differences, for groups of components at a time."""
    (n, d), m = z.shape, len(mean)
    fits = (size for size in range(1, m + 1) if m % size == 0 and size * n * d < 2**18)
    size = max(fits, default=1)

    @jax.checkpoint  # the differences are computed once more on the way back
    def one_group(group: tuple[Array, Array]) -> Array:
        mean, log_scale = group
        return sum_event(normal_log_prob(z[None], mean[:, None], log_scale[:, None]))

    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, size, d), (mean, log_scale))
    return jax.lax.map(one_group, grouped).reshape(m, n)


# --- any model ------------------------------------------------------------------------------------


def prior_of(model: Model) -> Prior:
    """p(z) = p_model(z), or p_model(z | c) for a model that has a condition.

    The model's parameters become part of the parameters of whoever takes the prior, and are trained
    jointly through ln p(z): the model's own losses, its `prepare` and its `follows` are not used.
    It begins with its `init`; another beginning, say a trained one, is
    `prior._replace(init=lambda key: (params, state))`. Where the model has only a bound, so has the
    prior, and `exact` says so.

    Args:
        model: of continuous vectors, shape (d,), with a `log_prob` or a `bound`. Its condition, if
            it has one, is that of the model that takes the prior.

    Raises:
        ConfigError: for a model of other events, or one that has neither `log_prob` nor `bound`;
            and, when it is used, for latents or conditions that are not those of the model.

    Example:
        >>> import jax
        >>> from genjax import DataSpec, flow_matching, prior_of, vae
        >>> flow = flow_matching(DataSpec((2,), "continuous"), hidden=(8,), n_likelihood_steps=2)
        >>> model = vae(DataSpec((4, 4, 1), "binary"), latent_dim=2, prior=prior_of(flow))
        >>> params, state = model.init(jax.random.key(0))
        >>> sorted(params["vae"]), sorted(params["vae"]["prior"])
        (['decoder', 'encoder', 'prior'], ['flow'])
        >>> model.sample(params, state, jax.random.key(1), 3).shape
        (3, 4, 4, 1)
    """
    expect("prior_of", model, Model)
    spec, score = model.spec, model.score
    if spec.kind != "continuous" or len(spec.shape) != 1:
        raise ConfigError(
            f"A prior is a model of continuous vectors, shape (d,); {spec.name} is {spec.kind} of "
            f"shape {spec.shape}."
        )
    if score is None:
        raise ConfigError(
            f"A prior needs ln p(z), and this model of {spec.name} has neither log_prob nor bound."
        )

    def condition(cond: Array | None) -> Array | None:
        if not spec.conditional:
            return None
        size = 0 if cond is None else cond.shape[-1]
        if cond is None or size != spec.cond_size:
            raise ConfigError(
                f"The prior takes a condition of size {spec.cond_size}, and the model that it is "
                f"for has one of size {size}. Build both for the same condition, or the prior "
                "without."
            )
        return spec.unembedded(cond)

    def log_prob(
        params: Any, state: Any, posterior: Posterior, z: Array, cond: Array | None, key: Key
    ) -> Array:
        if z.shape[-1:] != spec.shape:
            raise ConfigError(
                f"The prior is a model of {spec.shape[0]} dimensions, and z has {z.shape[-1]}. "
                f"Say latent_dim={spec.shape[0]}."
            )
        flat = None if cond is None else cond.reshape(-1, cond.shape[-1])
        batch = Batch(z.reshape(-1, z.shape[-1]), condition(flat))
        return score(params, state, batch, key).reshape(z.shape[:-1])

    def sample(
        params: Any, state: Any, posterior: Posterior, key: Key, n: int, cond: Array | None
    ) -> Array:
        return model.sample(params, state, key, n, condition(cond))

    exact = model.log_prob is not None and not model.probed
    return Prior(model.init, log_prob, sample, exact=exact, labels=model.labels)
