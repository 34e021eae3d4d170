"""Figures about samples: how far they lie from data, and what of the data they miss.

They take arrays [n, F], one row a sample, of points, flattened images or a network's features, and
compute in float64. They depend on n and on the features, so say both beside every figure.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from genjax.errors import ConfigError, DataError, unknown_name
from genjax.evaluation.estimates import Estimate, estimate

# (x [n, F], y [m, F]) -> k(x_i, y_j) [n, m].
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Rows of a matrix of distances that are in memory at once: 40 MB against 10,000 samples.
_ROWS = 500
# Of a squared distance from a matrix product, relative to the squared norms: float64 has 1e-16 a
# term.
_ROUNDING = 1e-13


def modes_covered(x: np.ndarray, modes: np.ndarray, sd: float, within: float = 3.0) -> int:
    """How many modes are the nearest one of at least one sample of high quality, one within
    `within` sd of it.

    #{m : ∃i, m = argmin_j |x_i - modes_j| and |x_i - modes_m| ≤ within · sd}, from 0 to M. The
    definition of Srivastava et al. 2017 (VEEGAN), which Lin et al. 2018 (PacGAN) compute too. As a
    sample counts for its nearest mode only, it cannot cover two modes that overlap. The count grows
    with n (VEEGAN draws 2,500), and one stray sample is enough for it.

    Args:
        x: samples [n, D].
        modes: the centres [M, D] of the true components, `Source.modes`.
        sd: the components' standard deviation along each axis, `Source.mode_std`.
        within: in units of sd.

    Raises:
        DataError: for arrays that are empty, not finite, or of different D.
        ConfigError: for sd or within that is not positive.
    """
    nearest, good = _nearest_mode(x, modes, sd, within)
    return len(np.unique(nearest[good]))


def high_quality_share(
    x: np.ndarray, modes: np.ndarray, sd: float, within: float = 3.0
) -> Estimate:
    """The share of samples within `within` sd of the nearest mode, with its binomial standard
    error.

    1/n #{i : min_j |x_i - modes_j| ≤ within · sd} ± √(p (1 - p) / (n - 1)). Srivastava et al. 2017
    (VEEGAN). The truth is not 1 but P[χ²_D ≤ within²]: 1 - exp(-4.5) = 98.9 % for Gaussians in the
    plane that do not overlap. A share above that says that samples are too narrow.

    Args and errors as in `modes_covered`.
    """
    return estimate(_nearest_mode(x, modes, sd, within)[1])


def _nearest_mode(
    x: np.ndarray, modes: np.ndarray, sd: float, within: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's nearest mode, int [n], and whether it is near enough, bool [n]."""
    _check_positive(sd=sd, within=within)
    x, modes = _samples(x=x, modes=modes)
    distance = np.stack([np.linalg.norm(x - mode, axis=1) for mode in modes], axis=1)  # [n, M]
    return distance.argmin(axis=1), distance.min(axis=1) <= within * sd


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """The squared Fréchet distance between the Gaussians that have the means and covariances of two
    sets of features.

    `gaussian_frechet_distance` of the sample means and the unbiased sample covariances (n - 1), in
    squared units of the features; 0 says equal moments, not equal distributions. Heusel et al. 2017
    take it over features of Inception; we never call it FID, since that name belongs to that
    network and its weights: FD[the features' name].

    The value is biased upwards, for samples of the true distribution as well: by about C/n, where C
    grows like F² and differs between models (Binkowski et al. 2018, Chong and Forsyth 2020). So
    report n, compare only values of the same n, and give the value of real against real data beside
    it. `kernel_mmd` has no such bias.

    Args:
        real: features [n, F]; fewer rows than features are fine.
        fake: features [m, F].

    Raises:
        DataError: for fewer than 2 rows, values that are not finite, or different F.
    """
    real, fake = _samples(real=real, fake=fake, least=2)
    if max(len(real), len(fake)) >= real.shape[1]:
        return gaussian_frechet_distance(*_moments(real), *_moments(fake))
    # Of fewer rows than features the rows are a factor of the covariance themselves: [F, F] of
    # large pictures is more than there is memory for.
    factors = [(x - x.mean(axis=0)).T / math.sqrt(len(x) - 1) for x in (real, fake)]
    traces = sum(float((factor**2).sum()) for factor in factors)
    return _distance(real.mean(axis=0), fake.mean(axis=0), traces, *factors)


def gaussian_frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """The squared Fréchet (2-Wasserstein) distance between two Gaussians, in closed form.

    |mean1 - mean2|² + tr(cov1 + cov2 - 2 (cov1 cov2)^½). Dowson and Landau 1982. With cov = A Aᵀ,
    the trace of the root is the sum of the singular values of A1ᵀ A2. A comes from a symmetric
    eigen-decomposition, so covariances may be singular and nothing complex appears, unlike with a
    root of the product, which is not symmetric.

    Args:
        mean1, mean2: [F].
        cov1, cov2: [F, F], symmetric and positive semi-definite.

    Raises:
        DataError: for other shapes, values that are not finite, or a matrix that is no covariance.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    if (
        mean1.ndim != 1
        or not mean1.size
        or mean1.shape != mean2.shape
        or not np.isfinite([mean1, mean2]).all()
    ):
        raise DataError(
            f"The two means must be finite and of one shape [F]; got shapes {mean1.shape} and "
            f"{mean2.shape}."
        )
    factor1, factor2 = _factor("cov1", cov1, len(mean1)), _factor("cov2", cov2, len(mean2))
    traces = float(np.trace(cov1) + np.trace(cov2))
    return _distance(mean1, mean2, traces, factor1, factor2)


def _distance(
    mean1: np.ndarray, mean2: np.ndarray, traces: float, factor1: np.ndarray, factor2: np.ndarray
) -> float:
    """`gaussian_frechet_distance` of means [F] and covariances A Aᵀ, by their factors A [F, n] and
    [F, m] and the sum of their traces.
    """
    overlap = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    # Rounding may leave a trifle below 0 where the two are equal.
    return max(float(((mean1 - mean2) ** 2).sum() + traces - 2 * overlap), 0.0)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = x.mean(axis=0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def _factor(name: str, cov: np.ndarray, size: int) -> np.ndarray:
    """A [F, F] with A Aᵀ = cov."""
    cov = np.asarray(cov, np.float64)
    # The bounds leave room for a covariance that was computed in float32.
    if (
        cov.shape != (size, size)
        or not np.isfinite(cov).all()
        or np.abs(cov - cov.T).max() > 1e-5 * np.abs(cov).max()
    ):
        raise DataError(
            f"{name} must be a finite, symmetric matrix of shape {(size, size)}; got one of shape "
            f"{cov.shape}."
        )
    values, vectors = np.linalg.eigh(cov)
    if values[0] < -1e-5 * np.abs(values).max():
        raise DataError(
            f"{name} must be positive semi-definite, as covariances are; it has an eigenvalue of "
            f"{values[0]:.3g}."
        )
    # What is below the rounding of the largest one is 0: its root would be far above rounding.
    return vectors * np.sqrt(
        np.where(values > size * np.finfo(np.float64).eps * values[-1], values, 0.0)
    )


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y / F + 1)³ for all pairs, [n, m]: the kernel of Binkowski et al. 2018, which
    compares three moments.
    """
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # many times faster than base**3


def gaussian_kernel(bandwidth: float) -> Kernel:
    """The kernel k(x, y) = exp(-|x - y|² / (2 bandwidth²)), with the bandwidth in units of the
    features.

    Raises:
        ConfigError: for a bandwidth that is not positive.
    """
    _check_positive(bandwidth=bandwidth)
    return lambda x, y: np.exp(_squared_distances(x, y) / (-2 * bandwidth**2))


def median_distance(x: np.ndarray) -> float:
    """The median distance between two different rows of x [n, F]; of 1,000 rows, drawn with a fixed
    seed, where n is larger.

    Raises:
        DataError: for fewer than 2 rows, or values that are not finite.
    """
    (x,) = _samples(x=x, least=2)
    x = x[np.random.default_rng(0).permutation(len(x))[:1000]]
    # Relative to one of the rows, so that the distance between equal rows is exactly 0.
    return float(
        np.median(np.sqrt(_squared_distances(x - x[0], x - x[0])[np.triu_indices(len(x), 1)]))
    )


# What `kernel_mmd` can be asked for by name: from the real features [n, F] to the kernel. The
# median heuristic of Gretton et al. 2012 pools both sets; here it looks at the real ones only, so
# that all models are measured with the same kernel.
KERNELS: dict[str, Callable[[np.ndarray], Kernel]] = {
    "polynomial": lambda real: polynomial_kernel,
    "gaussian": lambda real: gaussian_kernel(median_distance(real)),
}


def kernel_mmd(
    real: np.ndarray,
    fake: np.ndarray,
    kernel: str | Kernel = "polynomial",
    n_blocks: int = 10,
    seed: int = 0,
) -> Estimate:
    """The squared maximum mean discrepancy, without bias: the mean over disjoint blocks, with its
    standard error over blocks.

    In a block of m real x and m fake y: 1/(m(m-1)) Σ_{i≠j} (k(x_i, x_j) + k(y_i, y_j)) - 2/m² Σ_ij
    k(x_i, y_j). Gretton et al. 2012; the polynomial kernel over features of Inception is the KID of
    Binkowski et al. 2018. The expectation is 0 for equal distributions, so the estimate may be
    negative; leave it so.

    The usual code averages 100 random subsets, which overlap, so their spread understates the
    error. Disjoint blocks are independent, so the standard error is honest; the price is that only
    pairs within a block count. With few blocks it is itself uncertain, by about 1/√(2 (n_blocks -
    1)), 24 % for 10. One block uses every pair and has no standard error (NaN).

    Args:
        real: features [n, F].
        fake: features [n', F]. Each block has m = min(n, n') // n_blocks rows of both, drawn
            without replacement: data are often in order of their class, and blocks of neighbours
            would differ.
        kernel: "polynomial", "gaussian" (with the median distance between real features as its
            bandwidth), or a function (x [m, F], y [m, F]) -> [m, m], such as
            `gaussian_kernel(0.5)`.
        n_blocks: how many blocks; one takes about 40 m² bytes.
        seed: of the draw.

    Returns:
        The estimate with n = m · n_blocks, the number of rows of each set that were used; up to
        n_blocks - 1 are left over.

    Raises:
        DataError: for values that are not finite, different F, or fewer than 2 rows a block.
        ConfigError: for a kernel that is not known or does not give [m, m], or n_blocks < 1.
    """
    if n_blocks < 1:
        raise ConfigError(f"n_blocks must be at least 1; got {n_blocks}.")
    real, fake = _samples(real=real, fake=fake)
    m = min(len(real), len(fake)) // n_blocks
    if m < 2:
        found = f"{len(real)} real and {len(fake)} fake ones"
        raise DataError(
            f"{n_blocks} blocks need at least {2 * n_blocks} rows of each set; got {found}. Lower "
            "n_blocks."
        )
    if isinstance(kernel, str):
        if kernel not in KERNELS:
            raise unknown_name("kernel", kernel, KERNELS)
        kernel = KERNELS[kernel](real)
    rng = np.random.default_rng(seed)
    blocks = [
        x[rng.permutation(len(x))[: m * n_blocks]].reshape(n_blocks, m, -1) for x in (real, fake)
    ]
    values = [_unbiased_mmd(x, y, kernel) for x, y in zip(*blocks, strict=True)]
    return estimate(np.asarray(values))._replace(n=m * n_blocks)


def _unbiased_mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    m = len(x)
    of_x, of_y, across = kernel(x, x), kernel(y, y), kernel(x, y)
    for found in (of_x, of_y, across):
        if np.shape(found) != (m, m):
            raise ConfigError(
                f"A kernel must give k(x_i, y_j) for all pairs, [{m}, {m}] here; got shape "
                f"{np.shape(found)}."
            )
    pairs = of_x.sum() - np.trace(of_x) + of_y.sum() - np.trace(of_y)
    return float(pairs / (m * (m - 1)) - 2 * across.mean())


def sliced_wasserstein(
    real: np.ndarray, fake: np.ndarray, n_projections: int = 200, seed: int = 0
) -> float:
    """The sliced 2-Wasserstein distance: the root of the mean of W₂² between projections on random
    directions.

    √(1/P Σ_p ∫₀¹ (F_p⁻¹(t) - G_p⁻¹(t))² dt) with F_p, G_p the distributions of u_p·real and
    u_p·fake, and u_p uniform on the unit sphere, in the units of the data. Rabin et al. 2011,
    Bonneel et al. 2015. The integral is exact: it pairs the sorted values, and for n ≠ m, where the
    quantile functions step at different t, it sums over all steps of both.

    It shrinks with the dimension: a shift by s gives about |s| / √F. It is biased upwards for small
    n. The directions leave a relative error of up to about 1/√(2 P), 5 % for 200, which is that of
    a shift; the same seed takes the same directions for all models.

    Args:
        real: points [n, F].
        fake: points [m, F].
        n_projections: P.
        seed: of the directions.

    Raises:
        DataError: for arrays that are empty, not finite, or of different F.
        ConfigError: for n_projections < 1.
    """
    if n_projections < 1:
        raise ConfigError(f"n_projections must be at least 1; got {n_projections}.")
    real, fake = _samples(real=real, fake=fake)
    n, m = len(real), len(fake)
    directions = np.random.default_rng(seed).standard_normal((n_projections, real.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # In units of 1/(nm), where all steps are whole numbers: between two of them both quantile
    # functions are constant.
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    weight, row, other = np.diff(steps) / (n * m), steps[:-1] // m, steps[:-1] // n
    squared = 0.0
    # 50 at a time, which bounds the memory.
    for some in np.array_split(directions, math.ceil(n_projections / 50)):
        a, b = np.sort(real @ some.T, axis=0)[row], np.sort(fake @ some.T, axis=0)[other]
        squared += float((weight @ (a - b) ** 2).sum())
    return math.sqrt(squared / n_projections)


class PrecisionRecallDensityCoverage(NamedTuple):
    """Precision, recall and coverage from 0 to 1, density from 0 up to n/k; see the function of
    this name.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    real: np.ndarray, fake: np.ndarray, k: int = 5
) -> PrecisionRecallDensityCoverage:
    """How far samples lie among the data and data among the samples, by balls that reach to the
    k-th nearest neighbour.

    With B(x_i) the ball around a real x_i that reaches to its k-th nearest other x, and B(y_j) the
    same among the fake y:

        precision  1/m Σ_j 1[y_j in some B(x_i)]        recall    1/n Σ_i 1[x_i in some B(y_j)]
        density    1/(km) Σ_j Σ_i 1[y_j in B(x_i)]      coverage  1/n Σ_i 1[some y_j in B(x_i)]

    Kynkäänniemi et al. 2019 (precision, recall; they take k = 3) and Naeem et al. 2020 (density,
    coverage; k = 5). For samples of the true distribution the expected density is 1 and the
    expected coverage 1 - Π_{i<k} (n-1-i)/(n-1-i+m), which is near 1 - 2⁻ᵏ for n = m; precision and
    recall have no such formula. One outlier with a wide ball raises precision, and in the same way
    recall, but hardly density and coverage.

    A point on a ball's surface is inside, as in Kynkäänniemi et al. (the code of Naeem et al.
    leaves it out), so that copies count where data repeat; distances below about 1e-6 of a point's
    distance from the mean count as 0.

    Args:
        real: features [n, F].
        fake: features [m, F].
        k: the number of neighbours, at least 1 and below both n and m.

    Raises:
        DataError: for values that are not finite, or different F.
        ConfigError: for a k out of range.
    """
    real, fake = _samples(real=real, fake=fake)
    n, m = len(real), len(fake)
    if not 1 <= k < min(n, m):
        raise ConfigError(
            f"k must be at least 1 and below the number of samples, {n} real and {m} fake; got {k}."
        )
    centre = real.mean(axis=0)  # a smaller norm leaves less rounding
    real, fake = real - centre, fake - centre
    real_reach, fake_reach = _squared_reach(real, k), _squared_reach(fake, k)
    near_real, balls, near_fake, covered = np.zeros(m, bool), 0, [], []
    for start in range(0, n, _ROWS):
        squared = _squared_distances(real[start : start + _ROWS], fake)
        inside = squared <= real_reach[start : start + _ROWS, None]
        near_real |= inside.any(axis=0)
        balls += int(inside.sum())
        covered.append(inside.any(axis=1))
        near_fake.append((squared <= fake_reach).any(axis=1))
    recall, coverage = (float(np.concatenate(parts).mean()) for parts in (near_fake, covered))
    return PrecisionRecallDensityCoverage(
        float(near_real.mean()), recall, balls / (k * m), coverage
    )


def _squared_reach(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distances [n] from each row to its k-th nearest other row, and a little more: ties
    must survive rounding.
    """
    parts = []
    for start in range(0, len(x), _ROWS):
        squared = _squared_distances(x[start : start + _ROWS], x)
        squared.partition(k, axis=1)
        # A row's distance to itself, 0, is one of the k before; a view would keep them all.
        parts.append(squared[:, k].copy())
    reach = np.concatenate(parts)
    return reach + _ROUNDING * (reach + (x**2).sum(axis=1))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i - y_j|² [n, m] by one matrix product, in place where it can be."""
    squared = x @ y.T
    squared *= -2
    squared += (x**2).sum(axis=1)[:, None]
    squared += (y**2).sum(axis=1)
    return np.maximum(squared, 0, out=squared)


def class_agreement(predicted_labels: np.ndarray, wanted_labels: np.ndarray) -> Estimate:
    """The share of samples in which a classifier sees the class that was asked for, with its
    binomial standard error.

    1/n Σ_i 1[predicted_i = wanted_i] ± √(p (1 - p) / (n - 1)). The GAN-test of Shmelkov et al.
    2018. It says nothing about diversity within a class, and is no finer than the classifier's own
    accuracy on real data, so report that beside it.

    Args:
        predicted_labels: whole numbers [n].
        wanted_labels: whole numbers [n].

    Raises:
        DataError: for anything else, or none.
    """
    predicted, wanted = np.asarray(predicted_labels), np.asarray(wanted_labels)
    for name, labels in (("predicted_labels", predicted), ("wanted_labels", wanted)):
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            found = f"got {labels.dtype} of shape {labels.shape}"
            raise DataError(
                f"{name} must be whole numbers [n], at least one; {found}. Take the argmax of "
                "scores."
            )
    if len(predicted) != len(wanted):
        raise DataError(
            f"There must be one wanted label for each predicted one; got {len(wanted)} for "
            f"{len(predicted)}."
        )
    return estimate(predicted == wanted)


def _samples(least: int = 1, **arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays [n, F] in float64, once they are known to be finite, to have at least `least` rows
    and all the same F.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        x = np.asarray(array, np.float64)
        if x.ndim != 2 or len(x) < least or not x.shape[1]:
            wanted = f"an array [n, F] with n of at least {least}"
            raise DataError(
                f"{name} must be {wanted}; got shape {x.shape}. Flatten images with "
                "x.reshape(len(x), -1)."
            )
        bad = int((~np.isfinite(x)).any(axis=1).sum())
        if bad:
            what = f"{bad} of {len(x)} rows have NaN or infinite values"
            raise DataError(
                f"{name} must be finite; {what}. Did the model diverge? Leave them out only if you "
                "say so."
            )
        found[name] = x
    widths = {name: x.shape[1] for name, x in found.items()}
    if len(set(widths.values())) > 1:
        text = " and ".join(f"{width} for {name}" for name, width in widths.items())
        raise DataError(
            f"All arrays must have the same number of columns; got {text}. Take them from the same "
            "features."
        )
    return list(found.values())


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} must be a positive number; got {value}.")
