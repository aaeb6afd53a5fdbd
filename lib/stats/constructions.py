"""Every way to ask "what is the cosine of C and A?", side by side, each with what it gives where nothing is there.

Three one-vs-rest mean differences sum to zero, so their cosines average to between −1/2 and −1/3 on any data; a
shared instrumental baseline gives +1/2 and a shared neutral one +1/4 from noise alone; logistic weights run backwards,
since the closer C and A lie, the more each weight must point away from the other. Only κ (and κ_D, whose two neutral
references differ) estimates the cosine of the population means.
"""

import numpy as np
import pandas as pd
from scipy.linalg import cho_factor, cho_solve

from lib.stats import simulate
from lib.stats.ustat import Products, cluster_sums, cosine, cross_means, cross_products

# Traits of a block are C, A, I and three neutral labels; rows of weights are directions made of them.
N_DRAWS, N_DRAWS_LOGISTIC = 200, 40
COLUMNS = ["construction", "cos", *[f"{null}_{x}" for null in ("N0", "N1") for x in ("median", "low", "high")], "note"]
NEUTRAL = np.hstack([np.eye(3), np.full((3, 3), -1 / 3)])
SPLIT = np.vstack([np.eye(6)[k] - np.eye(6)[3 + v] for k in (0, 1) for v in range(3)])
ONE_VS_REST = np.array([[1, -0.5, -0.5], [-0.5, 1, -0.5]])
MINUS_INSTRUMENTAL = np.array([[1, 0, -1], [0, 1, -1]])
NOTES = {
    "one_vs_rest": "the three sum to zero, so they average between -1/2 and -1/3 on any data: the literal criterion",
    "logistic_weights": "runs backwards: the nearer C and A, the more opposed their weights",
    "minus_instrumental": "noise of the shared instrumental baseline gives +1/2",
    "minus_neutral": "noise of the shared neutral baseline gives +1/4",
    "disjoint_halves": "no shared noise, but shrunk towards 0 by unreliability",
    "kappa": "unbiased products, minus neutral: the calibrated criterion",
    "kappa_D": "as kappa, with different neutral references on the two sides",
}


def plain_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors, NaN where one is zero."""
    norms = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norms) if norms > 0 else float("nan")


def kappa(products: np.ndarray) -> np.ndarray:
    """κ = U(c, a) / √(U(c, c) U(a, a)) from products [..., ≥6, ≥6] of the traits."""
    p = NEUTRAL[:2] @ products[..., :6, :6] @ NEUTRAL[:2].T
    return cosine(p, 0, 1)


def kappa_split(products: np.ndarray) -> np.ndarray:
    """κ_D: the mean of κ over the six ordered pairs v ≠ v′, `C − v` against `A − v′`."""
    p = SPLIT @ products[..., :6, :6] @ SPLIT.T
    return np.mean([cosine(p, v, 3 + w) for v in range(3) for w in range(3) if v != w], axis=0)


def logistic_direction(gram: np.ndarray, positive: np.ndarray, *, ridge: float = 1.0, n_steps: int = 15) -> np.ndarray:
    """Dual weights [n] of an L2 logistic regression on `gram` [n, n] (Newton's method in sample space).

    `weights = α @ X` minimises Σ log-loss + ridge/2 ‖w‖²; the caller's Gram matrix carries the intercept.
    """
    y, f = positive.astype(float), np.zeros(len(positive))
    for _ in range(n_steps):
        p = 1 / (1 + np.exp(-f))
        spread = np.maximum(p * (1 - p), 1e-9)
        working = f + (y - p) / spread
        alpha = cho_solve(cho_factor(gram + np.diag(ridge / spread), check_finite=False), working, check_finite=False)
        step, f = gram @ alpha - f, gram @ alpha
        if np.abs(step).max() < 1e-6:
            break
    return alpha


def logistic_cosine(values: np.ndarray) -> float:
    """Cosine of the one-vs-rest logistic weights of C and A; `values` [S, ≥3, d] on the scale of unit mean variance."""
    rows = values[:, :3].reshape(-1, values.shape[2]).astype(float)
    rows = rows - rows.mean(0)
    scale = rows.var(0).mean()
    if not scale > 0:
        return float("nan")
    gram, label = rows @ rows.T / scale, np.tile(np.arange(3), len(values))
    c, a = (logistic_direction(gram + 1, label == k) for k in (0, 1))
    return float(c @ gram @ a / np.sqrt((c @ gram @ c) * (a @ gram @ a)))


def trait_sums(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster sums [G, K, d] and counts [G] of `values` [S, K, d] with clusters `codes` [S], scenario means out."""
    centred = values - values[:, :6].mean(1, keepdims=True)
    n_clusters = codes.max() + 1
    return cluster_sums(centred, codes, n_clusters=n_clusters), np.bincount(codes, minlength=n_clusters)


def trait_products(values: np.ndarray, codes: np.ndarray, *, metric=None) -> Products:
    """U of all traits of `values` [S, K, d] with clusters `codes` [S] (0…G−1), and its delete-one values."""
    return cross_products(*trait_sums(values, codes), metric=metric)


def mean_cosines(means: np.ndarray) -> dict[str, float]:
    """The constructions that need the class means [3 or 6, d] only."""
    found = {"one_vs_rest": plain_cosine(*(ONE_VS_REST @ means[:3])),
             "minus_instrumental": plain_cosine(*(MINUS_INSTRUMENTAL @ means[:3]))}
    return found | ({"minus_neutral": plain_cosine(*(NEUTRAL[:2] @ means))} if len(means) == 6 else {})


def cosines(values: np.ndarray, codes: np.ndarray, *, logistic: bool = True) -> dict[str, float]:
    """Every construction on blocks [S, 3 or 6, d] with clusters `codes` [S]; 3 traits: no neutral texts."""
    found = mean_cosines(values.mean(0))
    if values.shape[1] == 6:
        halves = [NEUTRAL[:2] @ values[codes % 2 == h].mean(0) for h in (0, 1)]
        found["disjoint_halves"] = float(np.mean([plain_cosine(halves[h][0], halves[1 - h][1]) for h in (0, 1)]))
        products = cross_means(*trait_sums(values, codes))
        found |= {"kappa": float(kappa(products)), "kappa_D": float(kappa_split(products))}
    if logistic:
        found["logistic_weights"] = logistic_cosine(values)
    return found


def table(values: np.ndarray, codes: np.ndarray, noise: np.ndarray, *,
                       seed: int) -> tuple[pd.DataFrame, dict[str, list[dict]]]:
    """Every construction on the data [S, 6, d] and on both nulls at this n, width and noise; also the draws."""
    observed = cosines(values, codes)
    spread = simulate.spread_of(noise, values.mean(1))

    def make(null, rng):
        offsets = np.zeros((6, len(spread.noise)))
        offsets[:3] = simulate.null_offsets(null, 3, spread=spread, rng=rng)
        return simulate.draw(len(values), offsets, spread=spread, rng=rng)
    draws = simulate.null_values(lambda v: cosines(v, codes, logistic=False), make, n_draws=N_DRAWS,
                                 seed=seed)
    logistic = simulate.null_values(logistic_cosine, make, n_draws=N_DRAWS_LOGISTIC, seed=seed)
    rows = []
    for name, note in NOTES.items():
        row = {"construction": name, "cos": observed[name]}
        for null in draws:
            drawn = logistic[null] if name == "logistic_weights" else [draw[name] for draw in draws[null]]
            low, median, high = quantiles(drawn)
            row |= {f"{null}_median": median, f"{null}_low": low, f"{null}_high": high}
        rows.append(row | {"note": note})
    return pd.DataFrame(rows, columns=COLUMNS), draws


def quantiles(values) -> np.ndarray:
    """2.5%, 50% and 97.5% quantile of the defined values; NaN where there are none."""
    defined = np.asarray(values, float)
    defined = defined[np.isfinite(defined)]
    return np.quantile(defined, [0.025, 0.5, 0.975]) if len(defined) else np.full(3, np.nan)
