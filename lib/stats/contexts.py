"""Around the bandwidth: parallel analysis, B with its interval, what it means in a context, transfer, latents, validation."""

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

from lib.stats.bandwidth import Dimension, Range, effective_dimension, steering_range
from lib.stats.finite import check_finite


def parallel_analysis(y: np.ndarray, *, seed: int, n_surrogates: int = 100, quantile: float = 0.95) -> int:
    """Leading components of `y [n, d]` whose variance exceeds that of data with every column permuted by itself.

    Components count up to the first one that does not (Horn 1965; Buja and Eyuboglu 1992): on white noise none is found,
    in 95% of samples, whatever n and d.
    """
    check_finite(effects=y)
    rng = np.random.default_rng(seed)

    def spectrum(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(0)
        return np.linalg.eigvalsh(centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred)[::-1]

    surrogates = np.array([spectrum(rng.permuted(y, axis=0)) for _ in range(n_surrogates)])
    # the (n_surrogates + 1)-th order statistic makes the first component's test exact: p ≤ 1 − quantile
    rank = int(np.ceil(quantile * (n_surrogates + 1))) - 1
    beats = spectrum(y) > np.sort(surrogates, axis=0)[min(rank, n_surrogates - 1)]
    return int(len(beats) if beats.all() else np.argmin(beats))


def log_bandwidth(dimension: Dimension | None, reach: Range | None) -> dict:
    """`b, b_low, b_high, censored` of PR × range with its 95% interval on the log scale; None where it is not known."""
    if dimension is None or reach is None or reach.total <= 0:
        return {"b": None, "b_low": None, "b_high": None, "censored": bool(reach and reach.censored)}
    half = stats.t.ppf(0.975, dimension.n - 1) * np.hypot(dimension.log_se, reach.log_se)
    b = dimension.pr * reach.total
    return {"b": float(b), "b_low": float(b * np.exp(-half)), "b_high": float(b * np.exp(half)), "censored": reach.censored}


def meaning(row: dict, pooled: dict) -> str:
    """What a context's bandwidth means, in one sentence computed from its row and that of all contexts."""
    name = row["context"].replace("_", " ")
    if row["b"] is None:
        return f"{name}: its bandwidth is not known from {row['n']} scenarios ({row['note'] or 'no dose keeps the replies coherent'})."
    bound = "at least " if row["censored"] else ""
    said = (f"{name}: empathy varies in about {row['pr']:.0f} independent ways here and stays coherent over {row['range']:.2f} residual norms of "
            f"steering, a bandwidth of {bound}{row['b']:.1f} [{row['b_low']:.1f}, {row['b_high']:.1f}]")
    if pooled.get("b") is None:
        return said + "."
    if row["b_low"] > pooled["b"]:
        return said + f"; more room than over all contexts ({pooled['b']:.1f})."
    if row["b_high"] < pooled["b"]:
        return said + f"; less room than over all contexts ({pooled['b']:.1f})."
    return said + f"; not distinguishable from all contexts together ({pooled['b']:.1f})."


def transfer(source: np.ndarray, warm: np.ndarray, neutral: np.ndarray) -> dict:
    """AUROC of a direction (mean of `source [n, d]`, effects of one context) for telling another context's `warm [m, d]`
    from `neutral [m, d]` replies of the same scenarios, with a jackknife interval over those scenarios."""
    check_finite(source=source, warm=warm, neutral=neutral)
    w = source.mean(0)
    a, b, m = warm @ w, neutral @ w, len(warm)
    wins = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    left = np.array([np.delete(np.delete(wins, i, 0), i, 1).mean() for i in range(m)])
    half = stats.t.ppf(0.975, m - 1) * np.sqrt((m - 1) / m * np.square(left - left.mean()).sum())
    return {"auroc": float(wins.mean()), "ci_low": float(max(0.0, wins.mean() - half)), "ci_high": float(min(1.0, wins.mean() + half)), "n": m}


def active_latents(latents: np.ndarray) -> tuple[float, int]:
    """`(effective, active)` of latent effects `[n, d_sae]`: the participation ratio of their mean squares, and how many
    differ from nothing in at least half of the scenarios."""
    check_finite(latents=latents)
    power = np.square(latents).mean(0)
    active = int((np.count_nonzero(latents, axis=0) >= len(latents) / 2).sum())
    return (float(power.sum() ** 2 / np.square(power).sum()) if power.any() else 0.0), active


def falling(pr: float, d: int) -> np.ndarray:
    """Variances k^−a along d axes whose participation ratio is `pr`."""
    def ratio(decay: float) -> float:
        spectrum = np.arange(1, d + 1.0) ** -decay
        return spectrum.sum() ** 2 / np.square(spectrum).sum()

    return np.arange(1, d + 1.0) ** -brentq(lambda decay: ratio(decay) - pr, 0, 3)


def validation(coeffs: np.ndarray, needed: float, *, n: int, d_model: int, seed: int) -> pd.DataFrame:
    """The same code on planted data: effective dimension, parallel analysis and range against what was planted."""
    rng, rows = np.random.default_rng(seed), []
    for truth in (41, 302):
        spectrum = falling(truth, d_model)
        found = effective_dimension(rng.standard_normal((n, d_model)) * np.sqrt(spectrum) + 1)
        rows.append(("participation ratio", truth, found.pr, *found.interval))
    for k in (0, 3):
        y = rng.standard_normal((n, d_model)) + rng.standard_normal((n, k)) @ rng.standard_normal((k, d_model))
        rows.append(("parallel analysis, components", k, parallel_analysis(y, seed=seed), np.nan, np.nan))
    reach = rng.uniform(0.2, 0.5, 400)  # P(coherent at c) falls from 1 at .2 to 0 at .5
    found = steering_range(coeffs, np.abs(coeffs)[:, None] <= reach[None], needed)
    rows.append(("range, one sign", 0.2 + 0.3 * (1 - needed), found.positive, np.nan, np.nan))
    return pd.DataFrame(rows, columns=["quantity", "planted", "found", "ci_low", "ci_high"])
