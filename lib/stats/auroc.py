"""AUROC of many score columns at once, its delete-one-cluster values, and d'.

AUROC is the Mann-Whitney share P(s+ > s-) + P(s+ = s-)/2 (Hanley and McNeil 1982). Deleting a cluster removes its
positives, its negatives and the pairs it has with itself, so all delete-one values come from one pass over the pairs.
"""

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata, t


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC [...] of `scores` [..., row] for the boolean `positive` [row] or [..., row]; ties count half."""
    positive = np.broadcast_to(np.asarray(positive, dtype=bool), scores.shape)
    n_pos = positive.sum(axis=-1)
    n_neg = scores.shape[-1] - n_pos
    order = np.argsort(scores, axis=-1)
    ordered = np.take_along_axis(scores, order, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        rank_sum = np.where(positive, rankdata(scores, axis=-1), 0).sum(axis=-1)
    else:
        rank_sum = np.take_along_axis(positive, order, axis=-1) @ np.arange(1.0, scores.shape[-1] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)


def deleted_auroc(scores: np.ndarray, positive: np.ndarray, cluster: np.ndarray, *, n_clusters: int) -> np.ndarray:
    """AUROC [..., cluster] without each cluster 0 .. n_clusters-1 in turn; `scores` [..., row]."""
    pos, neg = np.flatnonzero(positive), np.flatnonzero(~np.asarray(positive, dtype=bool))
    in_pos, in_neg = (cluster[rows][:, None] == np.arange(n_clusters) for rows in (pos, neg))
    own = np.nonzero(cluster[pos][:, None] == cluster[neg])
    in_own = cluster[pos][own[0]][:, None] == np.arange(n_clusters)
    n_left = (len(pos) - in_pos.sum(0)) * (len(neg) - in_neg.sum(0))
    flat = scores.reshape(-1, scores.shape[-1])
    found = np.empty((len(flat), n_clusters))
    for start in range(0, len(flat), 256):
        s = flat[start:start + 256]
        higher = np.sign(s[:, pos, None] - s[:, None, neg])
        lost = higher.sum(2) @ in_pos + higher.sum(1) @ in_neg - higher[:, own[0], own[1]] @ in_own
        with np.errstate(invalid="ignore", divide="ignore"):
            found[start:start + 256] = 0.5 + 0.5 * (higher.sum((1, 2))[:, None] - lost) / n_left
    return found.reshape(*scores.shape[:-1], n_clusters)


def jackknife_interval(estimate: np.ndarray, deleted: np.ndarray, *, level: float = 0.95) -> tuple:
    """Ends (low, high) [...] of the delete-one-cluster jackknife interval with t(G-1); `deleted` [..., cluster]."""
    n_clusters = deleted.shape[-1]
    spread = ((deleted - deleted.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    half = t.ppf((1 + level) / 2, n_clusters - 1) * np.sqrt((n_clusters - 1) / n_clusters * spread)
    return estimate - half, estimate + half


def d_prime(area: np.ndarray, *, n_pairs: int) -> np.ndarray:
    """Distance of two equal normal distributions with this AUROC, in standard deviations.

    An area of 0 or 1 is clipped to half a pair, so the value stays finite: n_pairs = positives x negatives.
    """
    return np.sqrt(2) * ndtri(np.clip(area, 0.5 / n_pairs, 1 - 0.5 / n_pairs))
