"""Losses whose value is known: for each family, parameters of which one can say in advance what
every example costs.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from gates import by_hand
from rows import B

from genjax.families.compose import latent_spec, reflow
from genjax.families.diffusion import diffusion
from genjax.families.flow_matching import flow_matching
from genjax.families.gan import gan
from genjax.families.rnn import rnn
from genjax.families.transformer import transformer
from genjax.families.vae import vae
from genjax.families.vrnn import vrnn
from genjax.protocol import step_mask
from genjax.zoo.sections import sections_of

KEY = jax.random.key(1)  # of the loss in G1
UNIT = -7 + math.log1p(math.exp(7))  # bounded_log_scale(0)


def zero(tree):
    return by_hand(np.zeros_like, tree)


def vae_known(row):
    """Both nets give 0, so q(z|x) = p(z) = N(0, I), every importance weight is p(x|0), and the KL
    is 0.
    """
    p = row.params["vae"]
    params = {"vae": {**p, "encoder": zero(p["encoder"]), "decoder": zero(p["decoder"])}}
    scale = row.recipe.model.get("scale", "shared")
    scale = scale if isinstance(scale, float) else math.exp(UNIT)

    def logistic(x):
        width = 2 / (row.spec.levels - 1)
        edges = np.concatenate(
            [[-np.inf], (np.arange(row.spec.levels - 1) + 0.5) * width - 1, [np.inf]]
        )
        return np.log(np.diff(scipy.stats.logistic.cdf(edges, 0, scale)))[x.astype(int)]

    log_likelihood = {
        "binary": lambda x: np.full(x.shape, -math.log(2)),
        "discrete": logistic,
        "continuous": lambda x: scipy.stats.norm.logpdf(x, 0, scale),
    }[row.spec.kind]
    return params, {
        "vae": lambda batch: -log_likelihood(np.asarray(batch.x, np.float64)).reshape(B, -1).sum(1)
    }


def gan_known(row):
    """A discriminator of zeros tells nothing apart, its gradient is 0, and it guesses every class
    alike.
    """
    params = {**row.params, "discriminator": zero(row.params["discriminator"])}
    settings = {name: value for name, (_, value, _) in sections_of(row.recipe)["model"].items()}
    ln2 = math.log(2)
    discriminator, generator = {
        "minimax": (2 * ln2, -ln2),
        "nonsaturating": (2 * ln2, ln2),
        "least_squares": (0.5, 0.5),
        "hinge": (2.0, 0.0),
        "wasserstein": (0.0, 0.0),
        "relativistic": (ln2, ln2),
    }[settings["objective"]]
    task = settings["auxiliary_weight"] * math.log(row.spec.n_classes or 1)
    task = task if settings["discriminator_cond"] == "auxiliary" else 0.0
    values = {
        "discriminator": discriminator + settings["gradient_penalty"] + task,
        "generator": generator + task,
    }
    return params, {
        player: lambda batch, value=value: np.full(B, value) for player, value in values.items()
    }


def sequence_known(row):
    """All parameters 0: every step has the same distribution, uniform or N(0, exp(UNIT)²), and a
    latent path costs nothing.
    """
    (player,) = row.losses

    def nats(batch):
        x = np.asarray(batch.x, np.float64)
        if row.spec.kind == "continuous":
            each = -scipy.stats.norm.logpdf(x, 0, math.exp(UNIT))
        else:
            each = np.full(x.shape, math.log(row.spec.levels or 2))
        return (each.reshape(*x.shape[:2], -1).sum(2) * np.asarray(step_mask(row.spec, batch))).sum(
            1
        )

    return zero(row.params), {player: nats}


def diffusion_known(row):
    """A new network predicts 0, so that its error is the target, for the noise of G1's key."""
    settings = {name: value for name, (_, value, _) in sections_of(row.recipe)["model"].items()}
    path, sd = row.model.denoiser.path(row.params), settings["sigma_data"]

    def over(values):
        return np.asarray(values, np.float64).reshape(B, *[1] * len(row.spec.shape))

    def sum_of(values):
        return np.square(values).reshape(B, -1).sum(1)

    def squares(batch):
        noise = row.model.noise["diffusion"](KEY, batch)
        x0, epsilon = np.float64(row.spec.normalize(batch.x)), np.float64(noise.epsilon)
        alpha, sigma = over(path.alpha(noise.t)), over(path.sigma(noise.t))
        if settings["precondition"] == "edm":
            s = sigma / alpha
            skip, out = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(s**2 + sd**2)
            return sum_of((x0 - skip * (x0 + s * epsilon)) / out)
        if settings["prediction"] is None:
            return sum_of(alpha * epsilon - sigma * x0)
        return whole_bound(noise, x0, epsilon)

    def whole_bound(noise, x0, epsilon):
        """Minus the bound of a variational diffusion model whose estimate of the noise is 0."""

        def log_snr(t):
            return -2 * jnp.log(path.alpha(t) / path.sigma(t))

        rate = jax.jvp(log_snr, (noise.t,), (jnp.ones(B),))[1]
        alpha, sigma = (float(c(jnp.zeros(()))) for c in (path.alpha, path.sigma))
        x_end = alpha * x0 + sigma * np.float64(noise.end)
        values = np.linspace(-1, 1, row.spec.levels)
        logits = -0.5 * np.square((x_end[..., None] - alpha * values) / sigma)
        true = -0.5 * np.square((x_end - alpha * x0) / sigma)
        reconstruction = (true - np.logaddexp.reduce(logits, axis=-1)).reshape(B, -1).sum(1)
        diffused = 0.5 * np.asarray(rate) * sum_of(epsilon)
        return diffused + 0.5 * math.exp(-5) * sum_of(x0) - reconstruction

    return row.params, {"diffusion": squares}


def flow_known(row):
    """A new network says that nothing moves, so that its error is ε - x0."""
    if row.recipe.first is not None:
        return row.params, {"flow": functools.partial(stage_squares, row)}

    def squares(batch):
        return flow_squares(row.spec, row.model.noise["flow"](KEY, batch), batch)

    return row.params, {"flow": squares}


def flow_squares(spec, noise, batch):
    moved = 0.0 if noise.u is None else noise.u
    x0 = np.float64(spec.normalize(batch.x + moved))
    return np.square(np.float64(noise.epsilon) - x0).reshape(B, -1).sum(1)


def stage_squares(row, batch):
    """The same, of latents that the loss draws from the first stage."""
    second = row.recipe.family(latent_spec(row.on.model), **row.recipe.model)
    noise = row.model.noise["flow"](KEY, batch)
    mean, log_scale = row.model.latent.encode(row.params, row.state, batch.x, batch.cond)
    codes = batch._replace(x=mean + jnp.exp(log_scale) * noise.epsilon)
    return flow_squares(second.spec, second.noise["flow"](noise.second, codes), codes)


def reflow_known(row):
    """A teacher by which nothing moves leaves noise where it is: the pairs have no distance."""
    return zero(row.params), {"flow": lambda batch: np.zeros(B)}


# family -> (row) -> parameters, and for each player the loss [B] that they must give for a batch.
ANALYTIC = {
    reflow: reflow_known,
    vae: vae_known,
    gan: gan_known,
    rnn: sequence_known,
    transformer: sequence_known,
    vrnn: sequence_known,
    diffusion: diffusion_known,
    flow_matching: flow_known,
}


def said_by(family, what, default=None):
    """What a family says of itself in its own tests, tests/test_<its file>.py. (Of those in the
    table above it stands in the tables of the gates.)
    """
    if family in ANALYTIC:
        return default
    own = importlib.import_module(f"test_{family.__module__.rpartition('.')[2]}")
    return getattr(own, what, default)


def analytic(row):
    """Parameters, and for each player the loss that they must give: from the table above, or from
    the family's own tests, `analytic_loss` in tests/test_<its file>.py.
    """
    family = row.recipe.family
    if family in ANALYTIC:
        return ANALYTIC[family](row)
    return said_by(family, "analytic_loss")(row)
