"""The rule of methods.md §2: from one contrast's numbers to a verdict, and the sentence that says why."""

from dataclasses import dataclass
from math import ceil

import numpy as np

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
    the p-value, and T of the best sentence encoder where there is one."""

    T: Value
    adjusted: Value
    lexical: Value
    lexical_name: str
    p: float
    encoder: Value | None
    one_register: bool

    def lead(self, thresholds: Probes) -> Value:
        """Delta: T minus the best lexical T, or minus .5 where that baseline is so low that it would flatter."""
        flatters = self.lexical.value < thresholds.baseline_floor
        return self.T.minus(Value(0.5, np.full_like(self.T.deleted, 0.5)) if flatters else self.lexical)


def flags(e: Evidence, thresholds: Probes) -> tuple[str, ...]:
    """ONE-REGISTER, LEAKY, and ENCODER where the probe's lead over the sentence encoder may be none."""
    limit = thresholds.leaky_within if e.one_register else thresholds.leaky_transfer
    on = {"ONE-REGISTER": e.one_register, "LEAKY": e.lexical.value > limit,
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
               f"T adjusted for length and style, {e.adjusted}, reaches .5": e.adjusted.low <= 0.5,
               f"{words} reaches 0": lead.low <= 0}
    said = [text for text, holds in wanting.items() if holds]
    return (INCONCLUSIVE, "; ".join(said)) if said else (PASS, f"T {e.T}, {words}, p {e.p:.4f}")


def power(e: Evidence, thresholds: Probes, *, n_clusters: int) -> str:
    """The lead that this many clusters could have told from none, and how many the lead seen would take."""
    lead = e.lead(thresholds)
    half = (lead.high - lead.low) / 2
    said = f"{n_clusters} clusters tell a lead of {max(half, 0.01):.2f} from none"
    if 0 < lead.value <= half:
        said += f"; the lead seen, {lead.value:.2f}, would take about {ceil(n_clusters * (half / lead.value) ** 2)}"
    return said
