"""Data of any size that are made and not read, where real data are too large to ship: token
sequences with the frequencies of a language, and images with the spectrum of photographs.

Likelihood and entropy of both are known exactly, so that a model of any size has a floor that no
figure may go below.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data.drawn import drawn_source
from genjax.data.order import Examples
from genjax.data.source import Source
from genjax.protocol import Array, DataSpec
from genjax.settings import Within, checking

Tokens = Annotated[int, Within(2, 2**20)]
Length = Annotated[int, Within(1, 2**14)]
Side = Annotated[int, Within(1, 2**9)]
Channels = Annotated[int, Within(1, 64)]
Exponent = Annotated[float, Within(0, 8)]

_N_HELD = 256  # validation and test examples, each
_KNOWN = "examples of a known distribution"
N_CLASSES, _STEEPER = 10, 1 / 3  # of `textures`, and by how much each one's exponent is larger


@checking
def zipf(
    n_symbols: Tokens = 50_257,
    length: Length = 1024,
    exponent: Exponent = 1.0,
    n_train: Examples = 4_096,
) -> Source:
    """Independent tokens with Zipf's frequencies, ln p(x) = -Σ_t (a ln(x_t + 1) + ln Σ_k k^-a): as
    large as those of GPT-2 unless told otherwise, and nothing to be learned but their frequencies.

    The entropy is T times that of a token, in closed form.

    Args:
        n_symbols: how many tokens there are; a lower id is more frequent.
        length: how many steps T a sequence has.
        exponent: a; 0 makes all tokens equally frequent.
        n_train: how many training sequences to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.

    Example:
        >>> from genjax import open_source
        >>> round(open_source("zipf", length=1).entropy, 3)
        7.342
    """
    log_p = -exponent * np.log(np.arange(1, n_symbols + 1))
    log_p -= np.log(np.exp(log_p - log_p.max()).sum()) + log_p.max()
    upto = np.cumsum(np.exp(log_p))
    spec = DataSpec((length,), "tokens", n_symbols, step="token", name="zipf")

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, None]:
        found = np.searchsorted(upto, rng.random((n, length)) * upto[-1], side="right")
        return np.minimum(found, n_symbols - 1), None

    def log_prob(x: Array) -> Array:
        return jnp.asarray(log_p)[jnp.asarray(x).astype(jnp.int32)].sum(axis=1)

    entropy = -length * float(np.exp(log_p) @ log_p)
    return drawn_source(spec, draw, log_prob, entropy, (n_train, _N_HELD, _N_HELD), _KNOWN)


@checking
def textures(
    size: Side = 32,
    channels: Channels = 3,
    exponent: Exponent = 2.0,
    conditional: bool = False,
    n_train: Examples = 4_096,
) -> Source:
    """Gaussian random fields: images x [size, size, channels] with independent channels, each
    stationary on a torus with the power spectrum S_k ∝ (1 + |k|²)^(-a/2), and pixels of variance 1.

    ln p(x) = -½ Σ_k (ln 2π S_k + |X_k|² / S_k) with X the unitary Fourier transform, summed over
    channels. Photographs have a spectrum of about |k|^-2 (Field 1987). With `conditional` the class
    0 to 9 sets a to `exponent` + class / 3, and `log_prob` is the mixture's; its entropy is known
    without classes only.

    Args:
        size: the side of an image.
        channels: how many.
        exponent: a, how smooth they are; 0 is white noise.
        conditional: give the class as the condition.
        n_train: how many training images to draw.

    Raises:
        ConfigError: for a setting that is not what its annotation says.

    Example:
        >>> from genjax import open_source
        >>> source = open_source("textures", size=8, channels=1, n_train=16)
        >>> source.log_prob(source.load().test.x).shape
        (256,)
    """
    classes = N_CLASSES if conditional else 1
    spectra = np.stack([_spectrum(size, exponent + k * _STEEPER) for k in range(classes)])
    shape = (size, size, channels)
    n_classes = N_CLASSES if conditional else None
    spec = DataSpec(shape, "continuous", n_classes=n_classes, name="textures")

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        label = rng.integers(classes, size=n)
        white = np.fft.fft2(rng.standard_normal((n, *shape)), axes=(1, 2))
        x = np.fft.ifft2(white * np.sqrt(spectra[label])[..., None], axes=(1, 2)).real
        return x, label

    def log_prob(x: Array) -> Array:
        x = jnp.asarray(x)
        power = jnp.abs(jnp.fft.fft2(x, axes=(1, 2), norm="ortho")) ** 2
        energy = power.sum(axis=3)  # [B, size, size]
        each = [
            -0.5 * (energy / jnp.asarray(s, x.dtype)[None]).sum(axis=(1, 2))
            - channels * _constant(s)
            for s in spectra
        ]
        return jax.nn.logsumexp(jnp.stack(each), axis=0) - math.log(classes)

    entropy = channels * (_constant(spectra[0]) + size**2 / 2)
    known = None if conditional else entropy
    return drawn_source(spec, draw, log_prob, known, (n_train, _N_HELD, _N_HELD), _KNOWN)


def _spectrum(size: int, exponent: float) -> np.ndarray:
    """S_k of one channel, [size, size], of mean 1."""
    k = np.fft.fftfreq(size, 1 / size)
    power = (1 + k[:, None] ** 2 + k[None] ** 2) ** (-exponent / 2)
    return power / power.mean()


def _constant(spectrum: np.ndarray) -> float:
    """½ Σ_k ln 2π S_k, in float64."""
    return 0.5 * float(np.log(2 * math.pi * spectrum).sum())
