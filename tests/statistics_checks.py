"""When a sample is too far from its law: tests under fixed seeds fail by chance once in 16,000."""

import numpy as np
import scipy.stats

# 4 standard errors for a mean; a p-value this small is as rare (two-sided) and is used for whole
# distributions.
RARE = 2 * scipy.stats.norm.sf(4.0)


def check_counts(counts, p):
    """A chi-square test of counts against probabilities, rare levels pooled so that every cell
    expects at least 10.
    """
    n = counts.sum()
    order = np.argsort(-np.asarray(p))
    counts, expected = counts[order], np.asarray(p)[order] * n
    keep = max(1, int(np.sum(expected >= 10)))
    observed = np.append(counts[:keep], counts[keep:].sum())
    expected = np.append(expected[:keep], max(n - expected[:keep].sum(), 0.0))
    if expected[-1] < 10:  # join the pool to its neighbour
        observed, expected = (np.append(a[:-2], a[-2:].sum()) for a in (observed, expected))
    assert len(observed) >= 2
    assert scipy.stats.chisquare(observed, expected * (n / expected.sum())).pvalue > RARE
