"""What the suites of diffusion are held against: normal data, of which the best denoiser and every
density is known.
"""

import math
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from genjax.families.diffusion import diffusion
from genjax.nets.functional import Net
from genjax.parts.paths import coefficients, cosine, edm, from_log_snr, linear
from genjax.protocol import DataSpec

# These programs are small and run once or a few times: most of the time is the compiler's.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PATHS = {
    "cosine": cosine(),
    "linear": linear(),
    "edm": edm(),
    "log-SNR": from_log_snr(lambda t: -13.3 + 18.3 * t),
    "bent": from_log_snr(lambda t: -13.3 + 18.3 * (0.3 * t + 0.7 * t**3)),
}
PLANE = DataSpec((2,), "continuous", name="normal points")
LABELLED = DataSpec((2,), "continuous", n_classes=3, name="clusters")


class Normal(NamedTuple):
    """Data N(mean, sd² I), element by element."""

    mean: float
    sd: float

    def denoise(self, path):
        """E[x0 | x_t] as a function of x_t and t [] or [n]."""

        def denoise(x_t, t):
            alpha, sigma = coefficients(path, t, x_t)
            gain = alpha * self.sd**2 / (alpha**2 * self.sd**2 + sigma**2)
            return self.mean + gain * (x_t - alpha * self.mean)

        return denoise

    def left_over(self, path, t):
        """E (x0 - E[x0 | x_t])² of each element, of t's shape."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return self.sd**2 * sigma**2 / (alpha**2 * self.sd**2 + sigma**2)

    def net(self, sigma_data=1.0, n_classes=0, shift=0.0):
        """The same as a network that predicts x0: of c_in x_t and log-SNR / 4, along a path that
        preserves the variance.

        With classes, class k has the mean `mean + shift (k + 1)`, and an example without its
        condition the mean `mean`.
        """

        def apply(params, state, scaled, level, cond=None, dropped=None):
            def over(v):
                return v.reshape(-1, *[1] * (scaled.ndim - 1))

            alpha2 = over(jax.nn.sigmoid(4 * level))
            x_t = scaled * jnp.sqrt(alpha2 * sigma_data**2 + 1 - alpha2)
            mean = jnp.full((scaled.shape[0],), self.mean, scaled.dtype)
            if n_classes:
                own = mean + shift * (1 + cond.argmax(-1).astype(scaled.dtype))
                mean = own if dropped is None else jnp.where(dropped, mean, own)
            gain = jnp.sqrt(alpha2) * self.sd**2 / (alpha2 * self.sd**2 + 1 - alpha2)
            return over(mean) + gain * (x_t - jnp.sqrt(alpha2) * over(mean)), state

        return Net(lambda key: ({}, {}), apply)

    def sample(self, seed, shape):
        return jnp.asarray(self.mean + self.sd * np.random.default_rng(seed).normal(size=shape))

    def log_prob(self, x):
        """[n] nats."""
        return (
            scipy.stats.norm.logpdf(np.asarray(x, np.float64), self.mean, self.sd)
            .reshape(len(x), -1)
            .sum(1)
        )

    def ode_log_prob(self, path, x):
        """ln p(x) [n] under the ODE with the best denoiser, whose solution is x_t - alpha_t mean =
        c sd(x_t) with a constant c.

        It takes N(0, sigma²) at the start of the path, which is not quite the law of x there, to
        another normal law at its end.
        """
        (alpha, sigma), (alpha_1, sigma_1) = (
            (float(path.alpha(jnp.asarray(t, float))), float(path.sigma(jnp.asarray(t, float))))
            for t in (path.end, path.start)
        )
        k = math.sqrt((alpha**2 * self.sd**2 + sigma**2) / (alpha_1**2 * self.sd**2 + sigma_1**2))
        law = scipy.stats.norm(self.mean * (alpha - k * alpha_1) / alpha, k * sigma_1 / alpha)
        return law.logpdf(np.asarray(x, np.float64)).reshape(len(x), -1).sum(1)

    @property
    def entropy(self):
        """Nats for each element."""
        return 0.5 * math.log(2 * math.pi * math.e * self.sd**2)


def assert_mean(values, want, slack=0.0):
    """The mean over the first axis is `want` within 4 standard errors (and a known remainder)."""
    values = np.asarray(values, np.float64)
    error = values.std(0, ddof=1) / math.sqrt(len(values))
    assert np.all(error > 0), "nothing random to average"
    off = np.abs(values.mean(0) - want)
    assert np.all(off <= 4 * error + slack), (
        f"off by {np.max((off - slack) / error):.1f} standard errors"
    )


@cache
def guided_model():
    """A model of labelled data with random parameters: model, params, state."""
    model = diffusion(LABELLED, hidden=(8,), cond_dropout=0.2, n_steps=3)
    params, state = jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(8)
    return (
        model,
        jax.tree.map(
            lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), params
        ),
        state,
    )
