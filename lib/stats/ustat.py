"""Unbiased inner products of mean vectors, and a jackknife that costs next to nothing.

`U(p, q)` is the mean of ⟨p_s, q_t⟩ over pairs of scenarios s, t in *different* clusters. Noise of one scenario, or of
one cluster, never meets itself, so E[U(p, q)] = ⟨E p, E q⟩, where ⟨p̄, q̄⟩ of two plain means is too large by the
shared noise. With cluster sums P_g and T = Σ_g P_g:

    U · (number of pairs) = ⟨T, T⟩ − Σ_g ⟨P_g, P_g⟩,    without cluster g: the same − ⟨P_g, T⟩ − ⟨T, P_g⟩ + 2 ⟨P_g, P_g⟩

so all delete-one-cluster values of all pairs come from two small products (Hoeffding 1948; Efron & Stein 1981).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from lib.errors import BadInput

MIN_CLUSTERS = 10  # a jackknife of fewer clusters has no degrees of freedom worth a verdict


@dataclass(frozen=True, kw_only=True)
class Products:
    """Inner products of K mean vectors: `full` [K, K] by U, `loo` [G, K, K] without each cluster, `plain` biased."""

    full: np.ndarray
    loo: np.ndarray
    plain: np.ndarray

    def contrasts(self, weights: np.ndarray) -> "Products":
        """Products of the linear combinations `weights` [n, K]; the combined vectors must share their scenarios."""
        def turn(products):
            return weights @ products @ weights.T
        return Products(full=turn(self.full), loo=turn(self.loo), plain=turn(self.plain))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A jackknife estimate: standard error, `df` = clusters − 1 and the interval at the level asked for."""

    estimate: float
    se: float
    low: float
    high: float
    df: int

    def at(self, level: float) -> tuple[float, float]:
        """The interval at another level, e.g. 0.90 for an equivalence test."""
        half = student.ppf(0.5 + level / 2, self.df) * self.se
        return self.estimate - half, self.estimate + half

    def p_below(self, bound: float) -> float:
        """One-sided p of `estimate < bound` against the null that it is `bound` or more."""
        return float(student.cdf((self.estimate - bound) / self.se, self.df)) if self.se > 0 else float("nan")


def cluster_sums(values: np.ndarray, codes: np.ndarray, *, n_clusters: int) -> np.ndarray:
    """Sums over the scenarios of each cluster: `values` [S, …], `codes` [S] in 0…G−1 → [G, …] in float64."""
    sums = np.zeros((n_clusters, *values.shape[1:]))
    if len(codes):
        order = np.argsort(codes, kind="stable")
        present, starts = np.unique(codes[order], return_index=True)
        sums[present] = np.add.reduceat(values[order], starts, axis=0)
    return sums


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """One metric a fold of clusters, estimated without that fold: `folds` [G] and a map of rows for each fold.

    A metric estimated on the very noise it then measures makes U too large. Pairs across folds under the metric of
    one of the two folds have no such bias, since the noise on that side is new to the metric.
    """

    folds: np.ndarray
    maps: tuple[Callable, ...]


def _pairs(sums: np.ndarray, folds: np.ndarray, maps: tuple[Callable, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Sums over cross-fold pairs [K, K], and the same without each cluster [G, K, K]."""
    def mapped(rows):
        if len(maps) == 1:
            return maps[0](rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return np.stack([each(block) for each, block in zip(maps, rows, strict=True)])
    fold_sums = cluster_sums(sums, folds, n_clusters=folds.max() + 1)
    others = mapped(fold_sums.sum(0) - fold_sums)
    own = mapped(fold_sums)
    full = np.einsum("fkd,fld->kl", fold_sums, others, optimize=True)
    as_left = sums @ others[folds].transpose(0, 2, 1)
    as_right = (own.sum(0) - own)[folds] @ sums.transpose(0, 2, 1)
    loo = full - as_left - as_right
    return (full + full.T) / 2, (loo + loo.transpose(0, 2, 1)) / 2


def cross_products(sums: np.ndarray, counts: np.ndarray, *, metric: "Callable | CrossFitted | None" = None) -> Products:
    """U of all pairs of K traits, and its delete-one-cluster values.

    `sums` [G, K, d] are cluster sums, `counts` [G] or [G, K] the scenarios behind them, `metric` maps rows [n, d] to
    `rows @ M` (default: Euclidean). Raises BadInput where fewer than three clusters hold a trait.
    """
    n_clusters, n_traits, _ = sums.shape
    counts = np.asarray(counts, float)
    counts = np.repeat(counts[:, None], n_traits, axis=1) if counts.ndim == 1 else counts
    if ((counts > 0).sum(0) < 3).any():
        raise BadInput("a jackknife over clusters needs at least three clusters with each kind of text")
    if isinstance(metric, CrossFitted):
        folds, maps = metric.folds, metric.maps
    else:
        folds, maps = np.arange(n_clusters), (metric or _identity,)
    full, loo = _pairs(sums, folds, maps)
    n_full, n_loo = _pairs(counts[..., None], folds, (_identity,))
    means = sums.sum(0) / counts.sum(0)[:, None]
    plain = means @ np.mean([each(means) for each in maps], axis=0).T
    return Products(full=full / n_full, loo=loo / n_loo, plain=plain)


def cross_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Euclidean U [K, K] alone of cluster sums [G, K, d] with `counts` [G]: simulations need no jackknife."""
    total = sums.sum(0)
    own = np.tensordot(sums, sums, axes=([0, 2], [0, 2]))
    return (total @ total.T - own) / (counts.sum() ** 2 - (counts**2).sum())


def _identity(rows: np.ndarray) -> np.ndarray:
    return rows


def jackknife(statistic: Callable, products: Products, *, level: float = 0.95) -> Interval:
    """Interval of `statistic`, a vectorised function of products [..., K, K], from its delete-one-cluster values.

    Student's t with G − 1 degrees of freedom. Where any delete-one value is undefined, so is the interval (NaN).
    """
    estimate, values = float(statistic(products.full)), statistic(products.loo)
    n = len(values)
    se = float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))
    half = student.ppf(0.5 + level / 2, n - 1) * se
    return Interval(estimate=estimate, se=se, low=float(estimate - half), high=float(estimate + half), df=n - 1)


def cosine(products: np.ndarray, i: int, j: int) -> np.ndarray:
    """cos of traits i and j from products [..., K, K]; NaN where a squared norm is not positive."""
    norms = products[..., i, i] * products[..., j, j]
    usable = (products[..., i, i] > 0) & (products[..., j, j] > 0)
    return np.where(usable, products[..., i, j] / np.sqrt(np.where(usable, norms, 1.0)), np.nan)
