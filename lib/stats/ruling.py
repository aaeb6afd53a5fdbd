"""The rule of methods.md §2: from one contrast's numbers to a verdict, and the sentence that says why."""

from dataclasses import dataclass
from math import ceil, inf

import numpy as np
from scipy.stats import norm

from lib.params import Probes
from lib.stats.auroc import jackknife_interval
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS


@dataclass(frozen=True)
class Value:
    """A statistic with its delete-one-cluster values [cluster], from which its 95% interval comes."""

    value: float
    deleted: np.ndarray

    @property
    def low(self) -> float:
        return float(jackknife_interval(self.value, self.deleted)[0])

    @property
    def high(self) -> float:
        return float(jackknife_interval(self.value, self.deleted)[1])

    def minus(self, other: "Value") -> "Value":
        return Value(self.value - other.value, self.deleted - other.deleted)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the rule looks at: T of the probe, T adjusted for form, T of the best lexical baseline and its name,
    the p-value, the rank of T among those of unrelated offsets (None with one register), and T of the best sentence
    encoder where there is one."""

    T: Value
    adjusted: Value
    lexical: Value
    lexical_name: str
    p: float
    p_offsets: float | None
    encoder: Value | None
    one_register: bool

    def lead(self, thresholds: Probes) -> Value:
        """Delta: T minus the best lexical T, or minus .5 where that baseline is so low that it would flatter."""
        flatters = self.lexical.value < thresholds.baseline_floor
        return self.T.minus(Value(0.5, np.full_like(self.T.deleted, 0.5)) if flatters else self.lexical)


def flags(e: Evidence, thresholds: Probes) -> tuple[str, ...]:
    """ONE-REGISTER, LEAKY, GENERIC where two registers with unrelated offsets transfer as well by chance, and ENCODER
    where the probe's lead over the sentence encoder may be none."""
    limit = thresholds.leaky_within if e.one_register else thresholds.leaky_transfer
    on = {"ONE-REGISTER": e.one_register, "LEAKY": e.lexical.value > limit,
          "GENERIC": e.p_offsets is not None and e.p_offsets > thresholds.p_max,
          "ENCODER": e.encoder is not None and e.T.minus(e.encoder).low <= 0}
    return tuple(name for name, holds in on.items() if holds)


def rule(e: Evidence, thresholds: Probes) -> tuple[str, str]:
    """(verdict, reason). LEAKY comes first: where words alone decide, nothing else can."""
    lead = e.lead(thresholds)
    if "LEAKY" in flags(e, thresholds):
        return INCONCLUSIVE, f"LEAKY: words alone reach {e.lexical.value:.2f} ({e.lexical_name})"
    if e.T.high < thresholds.fail_transfer:
        return FAIL, f"T {e.T} lies below {thresholds.fail_transfer:.2f}"
    if e.adjusted.high < thresholds.fail_adjusted:
        return FAIL, f"T adjusted for length and style, {e.adjusted}, lies below {thresholds.fail_adjusted:.2f}"
    words = f"lead over the best words ({e.lexical_name}) {lead}"
    wanting = {f"p {e.p:.3f} above {thresholds.p_max:.3f}": e.p > thresholds.p_max,
               f"GENERIC: registers with unrelated offsets transfer as well by chance, p {e.p_offsets or 0:.3f}": "GENERIC" in flags(e, thresholds),
               f"T adjusted for length and style, {e.adjusted}, reaches .5": e.adjusted.low <= 0.5,
               f"{words} reaches 0": lead.low <= 0}
    said = [text for text, holds in wanting.items() if holds]
    return (INCONCLUSIVE, "; ".join(said)) if said else (PASS, f"T {e.T}, {words}, p {e.p:.4f}")


def clusters_needed(e: Evidence, thresholds: Probes, *, n_clusters: int) -> tuple[float, float]:
    """Clusters at which the values seen would PASS, and at which they would FAIL; infinite where they never would.

    Half an interval shrinks with the root of the number of clusters, and a z-value grows with it.
    """
    def at(value: Value, margin: float) -> float:
        half = (value.high - value.low) / 2
        return n_clusters * (half / margin) ** 2 if margin > 0 else inf

    lead, z = e.lead(thresholds), norm.isf(e.p)
    by_p = n_clusters * (norm.isf(thresholds.p_max) / z) ** 2 if z > 0 else inf
    to_pass = max(at(lead, lead.value), at(e.adjusted, e.adjusted.value - 0.5), by_p)
    to_fail = min(at(e.T, thresholds.fail_transfer - e.T.value), at(e.adjusted, thresholds.fail_adjusted - e.adjusted.value))
    return to_pass, to_fail


def power(e: Evidence, thresholds: Probes, *, n_clusters: int) -> str:
    """The lead that this many clusters could have told from none, and how many more would decide an INCONCLUSIVE."""
    lead, (verdict, _) = e.lead(thresholds), rule(e, thresholds)
    said = f"{n_clusters} clusters tell a lead of {max((lead.high - lead.low) / 2, 0.01):.2f} from none"
    if verdict != INCONCLUSIVE:
        return said
    if "LEAKY" in flags(e, thresholds):
        return f"{said}; no number of triplets in these words decides it"
    if "GENERIC" in flags(e, thresholds):
        return f"{said}; more triplets would not decide it: how often unrelated offsets transfer depends on the effective dimension"
    to_pass, to_fail = clusters_needed(e, thresholds, n_clusters=n_clusters)
    if min(to_pass, to_fail) == inf:
        return f"{said}; the values seen lie between the bounds, so more triplets alone would not decide it"
    more = max(ceil(min(to_pass, to_fail)) - n_clusters, 1)
    return f"{said}; about {more} more triplets would decide it ({PASS if to_pass <= to_fail else FAIL}), if the values seen held"
