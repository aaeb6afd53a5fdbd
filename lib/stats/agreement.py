"""Agreement of a clustering with labels: adjusted Rand index, normalised mutual information, and their null.

All from contingency tables, many at once. ARI: Hubert & Arabie (1985). NMI: mutual information over the mean of the
two entropies. The null exchanges labels within scenarios only, so whatever sets scenarios apart stays.
"""

import numpy as np


def contingency(codes: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Tables [B, cluster, label] of cluster `codes` [B or 1, n] and `labels` [B or 1, n]; `weights` [B, n] count rows."""
    left = (codes[..., None] == np.arange(codes.max() + 1)).astype(np.float64)
    right = (labels[..., None] == np.arange(labels.max() + 1)).astype(np.float64)
    if weights is not None:
        left = left * weights[..., None]
    return left.transpose(0, 2, 1) @ right


def ari(tables: np.ndarray) -> np.ndarray:
    """Adjusted Rand index [B] of contingency tables [B, cluster, label]; 0 where one side has a single group."""
    def pairs(counts):
        return counts * (counts - 1) / 2
    both = pairs(tables).sum((1, 2))
    left, right = pairs(tables.sum(2)).sum(1), pairs(tables.sum(1)).sum(1)
    expected = left * right / pairs(tables.sum((1, 2)))
    span = (left + right) / 2 - expected
    return np.where(span > 0, (both - expected) / np.where(span > 0, span, 1), 0.0)


def nmi(tables: np.ndarray) -> np.ndarray:
    """Normalised mutual information [B], arithmetic mean of the entropies; 0 where one side has a single group."""
    share = tables / tables.sum((1, 2), keepdims=True)

    def entropy(p, axis):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(axis)
    left, right = entropy(share.sum(2), 1), entropy(share.sum(1), 1)
    mutual = left + right - entropy(share, (1, 2))
    mean = (left + right) / 2
    return np.where(mean > 0, mutual / np.where(mean > 0, mean, 1), 0.0)


def permuted_within(labels: np.ndarray, groups: np.ndarray, *, n: int, rng: np.random.Generator) -> np.ndarray:
    """`[n, row]` labels, exchanged among the rows of each group."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1])
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    shuffled = np.argsort(first + rng.random((n, len(labels))), axis=1)  # sorted inside each run of one group
    out = np.empty((n, len(labels)), labels.dtype)
    out[:, order] = labels[order][shuffled]
    return out


def jaccard(codes: np.ndarray, others: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[B, cluster]` largest Jaccard overlap of each cluster of `codes` [n] with one of `others` [B, n].

    Over the rows a resampling holds (`weights` [B, n] > 0), as in Hennig (2007). NaN where a cluster is not among them.
    """
    held = (weights > 0).astype(np.float64)
    tables = contingency(codes[None], others, weights=held)
    sizes = tables.sum(2)
    union = sizes[:, :, None] + tables.sum(1)[:, None] - tables
    return np.where(sizes > 0, (tables / np.maximum(union, 1)).max(2), np.nan)
