"""Points with what is known of them, for the tests of figures about samples."""

import math

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, size: int, rank: int | None = None) -> np.ndarray:
    a = normal(seed, size, rank or size)
    return a @ a.T


def rotation(seed: int, size: int) -> np.ndarray:
    return np.linalg.qr(normal(seed, size, size))[0]


def with_moments(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """The points moved so that their sample mean and unbiased sample covariance are exactly
    these.
    """
    white = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + white @ np.linalg.cholesky(cov).T


def mean_and_error(values) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
