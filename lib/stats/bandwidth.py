"""Bandwidth: effective dimension × coherent steering range.

Effective dimension is the participation ratio `(tr Σ)² / tr Σ²` of the class effect's covariance, with both moments
unbiased U-statistics of the Gram matrix, so it does not grow with n as a rank does. Steering range is the largest
coefficient of each sign whose isotonic `P(coherent)` stays above the preregistered share. `log B = log PR + log range`.
"""

from dataclasses import dataclass
from math import log

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from lib.errors import BadInput
from lib.params import Bandwidth
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result


def moments(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased `(tr Σ, tr Σ²)`, each `[1 + n]`: of all n ≥ 5 samples, then without sample 0, 1, …; the mean is unknown.

    `gram [n, n]` holds the samples' inner products. The deleted values follow from sums over one row of it.
    """
    n, diagonal = len(gram), np.diag(gram)
    off = gram - np.diag(diagonal)
    rows, squares = off.sum(1), np.square(off).sum(1)
    trace = np.r_[diagonal.sum(), diagonal.sum() - diagonal]
    total = np.r_[rows.sum(), rows.sum() - 2 * rows]
    square = np.r_[squares.sum(), squares.sum() - 2 * squares]
    row_square = np.r_[np.square(rows).sum(), np.square(rows).sum() - np.square(rows) - 2 * off @ rows + squares]
    m = np.r_[n, np.full(n, n - 1)].astype(float)
    two, three = m * (m - 1), m * (m - 1) * (m - 2)
    t1 = trace / m - total / two
    t2 = square / two - 2 * (row_square - square) / three + (total**2 - 4 * row_square + 2 * square) / (three * (m - 3))
    return t1, t2


@dataclass(frozen=True)
class Dimension:
    """Participation ratio with its jackknife standard error on the log scale, and the biased companion `rank90`."""

    pr: float
    log_se: float
    rank90: int
    n: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"PR {self.pr:.1f} [{low:.1f}, {high:.1f}] (n = {self.n}; 90% of variance in {self.rank90} components)"

    @property
    def interval(self) -> tuple[float, float]:
        half = stats.t.ppf(0.975, max(self.n - 1, 1)) * self.log_se
        return self.pr * np.exp(-half), self.pr * np.exp(half)


def effective_dimension(y: np.ndarray) -> Dimension:
    """Participation ratio of samples `y [n, d_model]`; BadInput where the samples cannot support one."""
    n = len(y)
    if n < 10 or not np.isfinite(y).all():
        raise BadInput(f"bandwidth: {n} samples; at least 10 finite ones are needed")
    gram = y.astype(np.float64) @ y.T.astype(np.float64)
    (t1, *left1), (t2, *left2) = moments(gram)
    left1, left2 = np.array(left1), np.array(left2)
    var_t1 = (n - 1) / n * np.square(left1 - left1.mean()).sum()
    if not (t1**2 > var_t1 and min(t2, left2.min()) > 1e-12 * t1**2):
        raise BadInput("bandwidth: the effect's covariance is not distinguishable from zero; more texts are needed")
    logs = np.log(np.square(left1)) - np.log(left2)
    log_se = np.sqrt((n - 1) / n * np.square(logs - logs.mean()).sum())
    values = np.linalg.eigvalsh(gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean())[::-1].clip(0)
    rank90 = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9) + 1)
    return Dimension(pr=float((t1**2 - var_t1) / t2), log_se=float(log_se), rank90=rank90, n=n)


def coherent(log_ppl: np.ndarray, repeats: np.ndarray, band: tuple[float, float], repeat_max: float) -> np.ndarray:
    """`[coeff, prompt]` bool: log-perplexity inside the unsteered band and no more repetition than unsteered."""
    return (log_ppl >= band[0]) & (log_ppl <= band[1]) & (repeats <= repeat_max)


def repeated_4grams(text: str) -> float:
    """Share of a text's word 4-grams that occurred before in it (0 for texts under five words)."""
    words = text.lower().split()
    grams = [tuple(words[i:i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def coherence(unsteered, quantiles=(0.025, 0.975)) -> tuple[tuple[float, float], float, float]:
    """`(band, repeat_max, centre)` of unsteered replies (`texts [1][prompt]`, `log_ppl [1, prompt]`).

    The band holds at least 95% of their log-perplexity ratios to their own geometric mean, `log_ppl − centre`: of few
    replies, quantiles between two of them would leave out the outermost on either side, a fifth of ten. Its edges stand
    1e-4 nats outside, so that a reply of the edge scored again in another batch is still inside.
    """
    values = unsteered.log_ppl[0]
    low, high = (np.quantile(values - values.mean(), q, method=side) for q, side in zip(quantiles, ("lower", "higher"), strict=True))
    repeats = [repeated_4grams(text) for text in unsteered.texts[0]]
    return (float(low) - 1e-4, float(high) + 1e-4), float(np.quantile(repeats, quantiles[1], method="higher")), float(values.mean())


def judged_coherent(replies, band: tuple[float, float], repeat_max: float, centre: float) -> np.ndarray:
    """`[coeff, prompt]` bool of steered replies against what `coherence` found."""
    repeats = np.array([[repeated_4grams(text) for text in row] for row in replies.texts])
    return coherent(replies.log_ppl - centre, repeats, band, repeat_max)


def dose_table(name: str, coeffs: np.ndarray, replies, band: tuple[float, float], repeat_max: float, centre: float) -> pd.DataFrame:
    """One row a dose: `direction, coeff, coherent` (share), mean `log_ppl` (ratio to the unsteered mean), `repeated_4grams`."""
    good = judged_coherent(replies, band, repeat_max, centre)
    repeats = [np.mean([repeated_4grams(text) for text in row]) for row in replies.texts]
    return pd.DataFrame({"direction": name, "coeff": coeffs, "coherent": good.mean(1), "log_ppl": (replies.log_ppl - centre).mean(1), "repeated_4grams": repeats})


def largest_coherent(doses: pd.DataFrame, names: list[str], needed: float) -> float:
    """The largest dose at which every one of the directions keeps the needed share coherent at it and at all smaller ones, both signs."""
    rows = doses[doses.direction.isin(names)]
    share = rows.groupby(rows.coeff.abs().round(6)).coherent.min().sort_index()
    good = share[(share >= needed).cummin()]
    return float(good.index.max()) if len(good) else 0.0


def one_sided_range(coeffs: np.ndarray, share: np.ndarray, needed: float) -> tuple[float, bool]:
    """Largest coefficient ≥ 0 up to which the isotonic coherent share is `needed`, and whether the grid ended first."""
    fitted = IsotonicRegression(increasing=False, y_min=0, y_max=1).fit_transform(coeffs, share)
    good = fitted >= needed
    if good.all():
        return float(coeffs[-1]), True
    if not good[0]:
        return 0.0, False
    last = int(np.argmin(good)) - 1
    step = (fitted[last] - needed) / (fitted[last] - fitted[last + 1])
    return float(coeffs[last] + step * (coeffs[last + 1] - coeffs[last])), False


@dataclass(frozen=True)
class Range:
    """Coherent steering range by sign, in units of the residual norm, and its log standard error over prompts."""

    negative: float
    positive: float
    censored: bool
    log_se: float

    @property
    def total(self) -> float:
        return self.negative + self.positive


def steering_range(coeffs: np.ndarray, is_coherent: np.ndarray, needed: float) -> Range:
    """Range of `is_coherent [coeff, prompt]` over a grid of coefficients that holds 0; jackknife over prompts."""
    coeffs = np.asarray(coeffs, dtype=float)

    def both(which):
        share = is_coherent[:, which].mean(1)
        up, down = coeffs >= 0, coeffs <= 0
        plus = one_sided_range(coeffs[up], share[up], needed)
        minus = one_sided_range(-coeffs[down][::-1], share[down][::-1], needed)
        return minus, plus

    n = is_coherent.shape[1]
    if n < 2:
        raise BadInput(f"bandwidth: {n} prompts; at least 2 are needed for a range with an interval")
    minus, plus = both(np.arange(n))
    left = np.array([sum(side[0] for side in both(np.delete(np.arange(n), i))) for i in range(n)])
    logs = np.log(left.clip(1e-3))
    return Range(minus[0], plus[0], minus[1] or plus[1], float(np.sqrt((n - 1) / n * np.square(logs - logs.mean()).sum())))


def bandwidth(empathy: tuple[Dimension | None, Range | None], formality: tuple[Dimension | None, Range | None], *,
              thresholds: Bandwidth, model_id: str, layer: int, seed: int) -> Result:
    """Verdict on log B(empathy) − log B(formality) at matched n, with `B = PR × range`; None where one is unknown."""
    (dim_e, range_e), (dim_f, range_f) = empathy, formality
    about = dict(criterion="bandwidth", model_id=model_id, layer=layer, seed=seed, metric="log PR × range, empathy against formality")
    missing = [name for name, pair in (("empathy", empathy), ("formality", formality)) if None in pair]
    if missing:
        return Result(literal_value=None, literal_verdict=INCONCLUSIVE, verdict=INCONCLUSIVE,
                      reason=f"the effective dimension or range of {' and '.join(missing)} is not known from these texts", **about)
    common = dict(about, literal_value=dim_e.pr * range_e.total, n=dim_e.n + dim_f.n, n_clusters=dim_e.n + dim_f.n,
                  literal_verdict=PASS if dim_e.pr * range_e.total > dim_f.pr * range_f.total else FAIL,
                  null="formality at matched n", text_baseline=dim_f.pr * range_f.total, text_baseline_name="formality")
    flags = ("CENSORED",) if range_e.censored or range_f.censored else ()
    if min(range_e.total, range_f.total) <= 0:
        return Result(verdict=INCONCLUSIVE, reason="no coefficient keeps the replies coherent", flags=flags, **common)
    estimate = log(dim_e.pr * range_e.total) - log(dim_f.pr * range_f.total)
    se = float(np.sqrt(dim_e.log_se**2 + dim_f.log_se**2 + range_e.log_se**2 + range_f.log_se**2))
    half, bound = float(stats.t.ppf(0.975, min(dim_e.n, dim_f.n) - 1)) * se, log(thresholds.ratio)
    low, high = estimate - half, estimate + half
    if low > bound or high < -bound:
        verdict, reason = PASS, (f"empathy's bandwidth is {np.exp(estimate):.2f} times formality's: they differ by more than the "
                                 f"preregistered ratio of {thresholds.ratio:g}")
    elif -bound < low and high < bound:
        verdict, reason = FAIL, "the bandwidths are equal within the preregistered ratio"
    else:
        verdict, reason = INCONCLUSIVE, "the interval of the log ratio reaches across the preregistered ratio"
    if flags and verdict != INCONCLUSIVE:
        verdict, reason = INCONCLUSIVE, "a steering range ended at the grid's end, so the ratio is not known"
    flags += ("SMALLER",) if verdict == PASS and estimate < 0 else ()
    return Result(estimate=estimate, ci_low=low, ci_high=high, verdict=verdict, reason=reason, flags=flags,
                  power=f"a ratio of {np.exp(half + bound):.1f} would have been detected", **common)
