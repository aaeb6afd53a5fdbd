"""How many clusters: the gap statistic against surrogates that have the data's covariance but no clusters.

Tibshirani, Walther & Hastie (2001) compare log W_k with that of uniform data in a box; correlated data then look
clustered whatever they are. Here the reference is N(0, Ĉov), put through the same within-scenario centring, and the
gap at k is taken relative to that at 1, so the overall scale plays no part.

Two steps. *Any clusters at all?* The largest standardised gap over k must exceed the (1 − ALPHA) quantile of the same
maximum over surrogates, each compared with the others; otherwise k̂ = 1. Their own rule starts at k = 1 and stops
there on four equidistant clusters, since no split in two fits those. *How many?* Their rule from k = 2 on: the
smallest k with gap(k) ≥ gap(k + 1) − s(k + 1).

A limit: where the noise within clusters has an effective rank of about 3, its clusters are flatter than the surrogates
and go on splitting, so k̂ is too high (never too low); from rank 9 on planted clusters are counted right.
"""

from dataclasses import dataclass

import numpy as np

from lib.stats.kmeans import kmeans

ALPHA = 0.05
K_MAX = 8


@dataclass(frozen=True, kw_only=True)
class Gap:
    """`log_w` [K]: log W_k of the data for k = 1…K; `reference` [B, K]: the same of the surrogates."""

    log_w: np.ndarray
    reference: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """`[K]` gap relative to k = 1."""
        return relative(self.reference).mean(0) - relative(self.log_w)

    @property
    def band(self) -> np.ndarray:
        """`[2, K]`: central 95% of the surrogates' own gaps."""
        reference = relative(self.reference)
        return np.quantile(reference.mean(0) - reference, [0.025, 0.975], axis=0)

    @property
    def k(self) -> int:
        return int(choose(self.log_w[None], self.reference)[0])


def relative(log_w: np.ndarray) -> np.ndarray:
    """log(W_k / W_1) [..., K]."""
    return log_w - log_w[..., :1]


def choose(log_w: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """k̂ [D] of data sets `log_w` [D, K] against one `reference` [B, K]."""
    n, at_one = len(reference), relative(reference)
    gaps = at_one.mean(0) - relative(log_w)
    spread = at_one[:, 1:].std(0, ddof=1) * np.sqrt(1 + 1 / n)
    others = (at_one.sum(0) - at_one) / (n - 1)
    null = ((others - at_one)[:, 1:] / spread).max(1)
    clustered = (gaps[:, 1:] / spread).max(1) > np.quantile(null, 1 - ALPHA, method="higher")
    s = reference.std(0, ddof=1) * np.sqrt(1 + 1 / n)
    enough = np.concatenate([gaps[:, 1:-1] >= gaps[:, 2:] - s[2:], np.ones((len(gaps), 1), bool)], axis=1)
    return np.where(clustered, enough.argmax(1) + 2, 1)


def within(X: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`X` [..., n, p] less the mean of its group (`codes` [n] in 0…S−1)."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(codes.max() + 1))
    sums = np.add.reduceat(X[..., order, :], starts, axis=-2)
    return X - (sums / np.bincount(codes)[:, None])[..., codes, :]


def surrogates(X: np.ndarray, codes: np.ndarray, *, n: int, rng: np.random.Generator) -> np.ndarray:
    """`[n, row, p]` Gaussian tables with the covariance of the centred table `X` [row, p] and its centring."""
    values, vectors = np.linalg.eigh(X.T @ X / len(X))
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    lost = len(X) / (len(X) - (codes.max() + 1))  # centring takes a degree of freedom a scenario
    draws = rng.standard_normal((n, *X.shape), np.float32) @ (np.sqrt(lost) * root).astype(np.float32)
    return within(draws, codes)


def log_inertia(X: np.ndarray, *, rng: np.random.Generator, weights: np.ndarray | None = None, k_max: int = K_MAX) -> np.ndarray:
    """`[B, K]` log of the mean squared distance to the nearest centre, of data sets `X` [B or 1, n, p]."""
    total = X.shape[1] if weights is None else weights.sum(1)[:, None]
    return np.log(np.stack([kmeans(X, k, rng=rng, weights=weights)[1] for k in range(1, k_max + 1)], axis=1) / total)


def gap_statistic(X: np.ndarray, codes: np.ndarray, *, n_surrogates: int, rng: np.random.Generator) -> Gap:
    """Gap of a table `X` [n, p] that is centred within groups `codes` [n]."""
    draws = surrogates(X, codes, n=n_surrogates, rng=rng)
    return Gap(log_w=log_inertia(X[None], rng=rng)[0], reference=log_inertia(draws, rng=rng))


def bootstrap_k(X: np.ndarray, codes: np.ndarray, weights: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """k̂ [B] of resampled tables: `weights` [B, n] say how often a row was drawn.

    The reference is resampled alike, one surrogate a bootstrap, so that repeated rows make no clusters.
    """
    draws = surrogates(X, codes, n=len(weights), rng=rng)
    reference = log_inertia(draws, rng=rng, weights=weights)
    return choose(log_inertia(X[None], rng=rng, weights=weights), reference)
