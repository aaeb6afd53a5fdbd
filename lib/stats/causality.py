"""Causality: does removing a direction from the prompt's representation make empathic replies less likely?

`D_s` is the change of log-probability per token of the empathic reply minus the same for the instrumental reply of the
same scenario. The direction's mean `D` is ranked among those of random directions that disturb with equal energy.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from lib.params import Causality
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


def effect(d: np.ndarray) -> Effect:
    """Effect of `d [scenario, row]`: row 0 the direction, the other rows random ones. One-sided: lower is worse."""
    own, means = d[:, 0], d.mean(0)
    n, spread = len(own), own.std(ddof=1)
    half = stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n)
    p = (1 + (means[1:] <= means[0]).sum()) / len(means)
    return Effect(float(means[0]), float(means[0] - half), float(means[0] + half), float(means[0] / spread) if spread else 0.0,
                  float(p), means[1:], n)


def causality(effects: dict[str, Effect], *, thresholds: Causality, model_id: str, layer: int, seed: int,
              cost: float, cost_band: float, n_clusters: int | None = None,
              judged_d_z: float | None = None) -> tuple[Result, pd.DataFrame]:
    """`(result, table)` over directions; the headline is the direction with the smallest p (Bonferroni over them).

    `cost` is the rise of cross-entropy on neutral replies under the ablation; beyond `cost_band` an effect does not count.
    `n_clusters` scenario clusters lie behind directions and tests; too few of them, and there is no number, only a reason.
    `judged_d_z` is the judge's effect on free generations; without it the verdict is at most INCONCLUSIVE (`LL-only`).
    """
    table = pd.DataFrame([{"direction": name, "D": e.mean, "ci_low": e.ci_low, "ci_high": e.ci_high, "d_z": e.d_z, "p": e.p,
                           "random_low": np.quantile(e.random, 0.025), "random_high": np.quantile(e.random, 0.975), "n": e.n}
                          for name, e in effects.items()])
    best = min(effects, key=lambda name: (effects[name].p, effects[name].mean))
    chosen = effects[best]
    p = min(1.0, chosen.p * len(effects))
    sd = (chosen.ci_high - chosen.ci_low) / (2 * stats.t.ppf(0.975, chosen.n - 1)) * np.sqrt(chosen.n)
    half = stats.t.ppf(0.95, chosen.n - 1) / np.sqrt(chosen.n)
    flags = () if judged_d_z is not None else ("LL-only",)
    if cost > cost_band:
        verdict, reason, flags = INCONCLUSIVE, "the ablation leaves the coherent range on neutral texts", (*flags, "INCOHERENT")
    elif p <= thresholds.p_max and judged_d_z is not None and judged_d_z <= thresholds.d_z_max:
        verdict, reason = PASS, "ablation lowers empathic replies more than random directions do, and the judge sees it"
    elif judged_d_z is not None and all(abs(e.d_z) + half < thresholds.equivalence for e in effects.values()):
        verdict, reason = FAIL, "no direction changes empathic replies by more than the equivalence bound"
    else:
        lowered = "lowers" if p <= thresholds.p_max else "does not lower"
        reason = f"ablation {lowered} the empathic replies' likelihood beyond random directions; " + (
            "no judge rated free replies" if judged_d_z is None else f"judged d_z = {judged_d_z:.2f}")
        verdict = INCONCLUSIVE
    result = Result(
        criterion="causality", model_id=model_id, layer=layer, metric=f"D, prompt-only ablation of {best}",
        literal_value=chosen.mean, literal_verdict=PASS if chosen.mean < 0 else FAIL, verdict=verdict, reason=reason, flags=flags,
        estimate=chosen.mean, ci_low=chosen.ci_low, ci_high=chosen.ci_high, p=p, n=chosen.n, n_clusters=chosen.n, seed=seed,
        null=f"{len(chosen.random)} random directions of equal energy",
        power=f"|D| of {2.8 * sd / np.sqrt(chosen.n):.3f} nats per token would have been detected with 80% power")
    if n_clusters is not None and n_clusters < MIN_CLUSTERS:
        result = replace(result, verdict=INCONCLUSIVE, reason=f"texts: {n_clusters} scenario clusters; at least {MIN_CLUSTERS} are needed",
                         literal_value=None, literal_verdict=INCONCLUSIVE, estimate=None, ci_low=None, ci_high=None, p=None, power="", n_clusters=n_clusters)
    return result, table
