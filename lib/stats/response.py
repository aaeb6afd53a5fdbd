"""First-order response of log-probabilities to ablation, for any number of directions, and the slope test on it.

Ablating ŵ removes `a = ŵᵀ(h − μ)` at each node; to first order a reply's log-probability changes by `−Σ a ŵᵀg`, with g
its gradient. A random direction's `a` is scaled to the energy of the direction it is compared with. The gap of a
direction is what it removes from the empathic reply more than from the other one (mean over reply nodes): ablation at
all positions takes away likelihood in proportion to it, and the slope says how much the model reads each unit.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from lib.stats.finite import check_finite


@dataclass(frozen=True)
class Response:
    """Of one scenario: `change [row, text]` of log-probability a token, and what each row removes, `gap [row, text]`."""

    change: np.ndarray
    gap: np.ndarray


def response(resid: np.ndarray, gradient: np.ndarray, where: np.ndarray, replies: np.ndarray, *, directions: np.ndarray,
             mean: np.ndarray) -> Response:
    """Response to ablating each of `directions [row, d]` (unit length) on the nodes `where`, at the energy of row 0.

    `resid [node, d]`, `gradient [text, node, d]`, `replies [text, node]` (which nodes are a text's reply).
    """
    removed = (resid - mean) @ directions.T * where[:, None]
    energy = np.square(removed).sum(0)
    removed = removed * np.sqrt(energy[0] / np.maximum(energy, 1e-20))
    read = np.einsum("tnd,rd->tnr", gradient, directions)
    return Response(-np.einsum("nr,tnr->rt", removed, read), (replies @ removed / replies.sum(1, keepdims=True)).T)


@dataclass(frozen=True)
class Slope:
    """Slope of D on the direction's own gap, its p among the controls' slopes (one-sided: more negative), and those."""

    value: float
    ci_low: float
    ci_high: float
    p: float
    controls: np.ndarray


def through_origin(d: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Least-squares slope through the origin over the first axis: no gap, no effect."""
    return (d * gap).sum(0) / np.maximum(np.square(gap).sum(0), 1e-20)


def slope_test(d: np.ndarray, gap: np.ndarray) -> Slope:
    """Row 0 of `d, gap [scenario, row]` against the controls in the other rows, each on its own gap.

    A control's slope varies by what the control is and by its noise; the tested slope's own noise (jackknife over
    scenarios) is added, so that a direction with a small gap is not called special for being noisy.
    """
    check_finite(effects=d, gaps=gap)
    n, slopes = len(d), through_origin(d, gap)
    left = np.array([through_origin(np.delete(d[:, 0], i), np.delete(gap[:, 0], i)) for i in range(n)])
    variance = (n - 1) / n * np.square(left - left.mean()).sum()
    controls, half = slopes[1:], stats.t.ppf(0.975, n - 1) * np.sqrt(variance)
    spread = np.sqrt(controls.var(ddof=1) * (1 + 1 / len(controls)) + variance)
    p = stats.t.cdf((slopes[0] - controls.mean()) / spread, len(controls) - 1) if spread else 1.0
    return Slope(float(slopes[0]), float(slopes[0] - half), float(slopes[0] + half), float(p), controls)
