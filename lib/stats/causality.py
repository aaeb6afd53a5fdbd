"""Causality: does removing a direction from the prompt's representation make empathic replies less likely?

`D_s` is the change of log-probability per token of the empathic reply minus the same for the instrumental reply of the
same scenario. (i) The direction's mean `D` is ranked among those of random directions that disturb with equal energy.
(ii) With the direction removed everywhere, the slope of `D` on its own gap is compared with the slopes of controls.
(iii) A judge rates free replies. PASS needs (i) or (ii), and (iii).
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from lib.params import Causality
from lib.stats.finite import check_finite
from lib.stats.response import Slope
from lib.stats.ustat import MIN_CLUSTERS
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result


def split_halves(clusters: np.ndarray, seed: int) -> np.ndarray:
    """A fold number, 0 or 1, for every row, so that rows of one cluster share it."""
    unique = np.unique(clusters)
    order = np.random.default_rng(seed).permutation(len(unique))
    return (order % 2)[np.searchsorted(unique, clusters)]


def style_change(scores: np.ndarray, style: int, against: int) -> np.ndarray:
    """`D [row]` of each edited row against the untouched first one; `scores [1 + row, style]` are log-probabilities."""
    change = scores[1:] - scores[:1]
    return change[:, style] - change[:, against]


@dataclass(frozen=True)
class Effect:
    """Mean `D` over scenarios with interval, standardised size `d_z`, and its rank p among random directions."""

    mean: float
    ci_low: float
    ci_high: float
    d_z: float
    p: float
    random: np.ndarray
    n: int


def effect(d: np.ndarray, random: np.ndarray | None = None) -> Effect:
    """Effect of `d [scenario]` against means `random [row]`; or of `d [scenario, row]`, whose rows after the first are
    the random ones. One-sided: lower is worse."""
    check_finite(effects=d, random_effects=d if random is None else random)  # a rank among NaN would be the most extreme one
    own, means = (d, random) if random is not None else (d[:, 0], d[:, 1:].mean(0))
    n, spread, mean = len(own), own.std(ddof=1), own.mean()
    half = stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n)
    p = (1 + (means <= mean).sum()) / (1 + len(means))
    return Effect(float(mean), float(mean - half), float(mean + half), float(mean / spread) if spread else 0.0, float(p), means, n)


def joint_p(effects: dict[str, Effect]) -> tuple[str, float]:
    """`(direction, p)` of the most extreme direction, corrected for having looked at all.

    Each mean is put in standard units of its random directions; the smallest is ranked among the smallest of tuples of
    random ones. Tuples pair different random directions, as if the tests were independent, which is the strictest case.
    """
    own = {name: (e.mean - e.random.mean()) / (e.random.std() or 1.0) for name, e in effects.items()}
    null = np.stack([np.roll((e.random - e.random.mean()) / (e.random.std() or 1.0), i) for i, e in enumerate(effects.values())])
    best = min(own, key=own.get)
    return best, float((1 + (null.min(0) <= own[best]).sum()) / (1 + null.shape[1]))


@dataclass(frozen=True)
class Judged:
    """Standardised change `d_z` of the judged style under ablation, over `n` scenarios."""

    d_z: float
    n: int

    @classmethod
    def of(cls, change: np.ndarray) -> "Judged":
        """From each scenario's change of its rating; no variation at all counts as no effect."""
        spread = change.std(ddof=1)
        return cls(float(change.mean() / spread) if spread else 0.0, len(change))


def equivalent(d_z: float, n: int, bound: float) -> bool:
    """Whether the 90% interval of a standardised effect lies within ±bound."""
    return abs(d_z) + stats.t.ppf(0.95, n - 1) / np.sqrt(n) < bound


def causality(effects: dict[str, Effect], *, thresholds: Causality, model_id: str, layer: int, seed: int, cost: float,
              cost_band: float, n_clusters: int | None = None, slopes: dict[str, Slope] | None = None, judged: Judged | None = None) -> tuple[Result, pd.DataFrame]:
    """`(result, table)` over directions; the headline is the direction that stands out most, corrected for the others.

    `cost` is the rise of cross-entropy on neutral replies under the ablation; beyond `cost_band` an effect does not count.
    `n_clusters` scenario clusters lie behind directions and tests; too few of them, and there is no number, only a reason.
    `judged` is the judge's effect on free replies; without it the verdict is at most INCONCLUSIVE (`LL-only`).
    """
    slopes = slopes or {}
    table = pd.DataFrame([{"direction": name, "D": e.mean, "ci_low": e.ci_low, "ci_high": e.ci_high, "d_z": e.d_z, "p": e.p,
                           "random_low": np.quantile(e.random, 0.025), "random_high": np.quantile(e.random, 0.975), "n": e.n}
                          for name, e in effects.items()])
    best, p = joint_p(effects)
    p_slope = min(1.0, len(slopes) * min(slope.p for slope in slopes.values())) if slopes else 1.0
    chosen, shown = effects[best], min(p, p_slope)
    lowers = min(p, p_slope) <= thresholds.p_max
    flags = () if judged is not None else ("LL-only",)
    if cost > cost_band:
        verdict, reason, flags = INCONCLUSIVE, "the ablation leaves the coherent range on neutral texts", (*flags, "INCOHERENT")
    elif lowers and judged is not None and judged.d_z <= thresholds.d_z_max:
        verdict, reason = PASS, "ablation lowers empathic replies more than random directions do, and the judge sees it"
    elif judged is not None and equivalent(judged.d_z, judged.n, thresholds.equivalence) \
            and all(equivalent(e.d_z, e.n, thresholds.equivalence) for e in effects.values()):
        verdict, reason = FAIL, "no direction changes empathic replies by more than the equivalence bound"
    else:
        reason = f"ablation {'lowers' if lowers else 'does not lower'} the empathic replies' likelihood beyond random directions; " + (
            "no judge rated free replies" if judged is None else f"judged d_z = {judged.d_z:.2f}")
        verdict = INCONCLUSIVE
    sd = (chosen.ci_high - chosen.ci_low) / (2 * stats.t.ppf(0.975, chosen.n - 1)) * np.sqrt(chosen.n)
    result = Result(
        criterion="causality", model_id=model_id, layer=layer, metric=f"D, prompt-only ablation of {best}",
        literal_value=chosen.mean, literal_verdict=PASS if chosen.mean < 0 else FAIL, verdict=verdict, reason=reason, flags=flags,
        estimate=chosen.mean, ci_low=chosen.ci_low, ci_high=chosen.ci_high, p=shown, n=chosen.n, n_clusters=chosen.n, seed=seed,
        null=f"{len(chosen.random)} random directions of equal energy",
        power=f"|D| of {max(2.8 * sd / np.sqrt(chosen.n), abs(np.quantile(chosen.random, 0.005))):.3f} nats per token would have been detected with 80% power")
    if n_clusters is not None and n_clusters < MIN_CLUSTERS:
        result = replace(result, verdict=INCONCLUSIVE, reason=f"texts: {n_clusters} scenario clusters; at least {MIN_CLUSTERS} are needed",
                         literal_value=None, literal_verdict=INCONCLUSIVE, estimate=None, ci_low=None, ci_high=None, p=None, power="", n_clusters=n_clusters)
    return result, table


def selectivity(change: np.ndarray) -> pd.DataFrame:
    """How much more each of three edits moves its own style than the other two, from `change [scenario, 3, 3]`.

    Rows are edits, columns styles in the same order; `own − others` per scenario, with its t interval.
    """
    n, rows = len(change), []
    for i in range(3):
        own = change[:, i, i] - np.delete(change[:, i], i, axis=1).mean(1)
        half = stats.t.ppf(0.975, n - 1) * own.std(ddof=1) / np.sqrt(n)
        rows.append({"own_minus_others": own.mean(), "ci_low": own.mean() - half, "ci_high": own.mean() + half})
    return pd.DataFrame(rows)


def monitoring(projection: np.ndarray, rating: np.ndarray) -> dict[str, float | None]:
    """Correlation of the prompt's projection with the judged style of the reply, with Fisher's interval and n; None where
    one of them does not vary."""
    n = len(rating)
    if n < 3 or not projection.std() or not rating.std():
        return {"r": None, "ci_low": None, "ci_high": None, "n": n}
    r = float(np.corrcoef(projection, rating)[0, 1])
    half = stats.norm.ppf(0.975) / np.sqrt(max(n - 3, 1))
    return {"r": r, "ci_low": float(np.tanh(np.arctanh(r) - half)), "ci_high": float(np.tanh(np.arctanh(r) + half)), "n": n}
