"""The result row: one literal reading and one calibrated verdict, with what they rest on."""

from dataclasses import asdict, dataclass, replace
from math import isfinite

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
VERDICT_MARKS = {PASS: "✓", FAIL: "✗", INCONCLUSIVE: "?"}  # so that a verdict is not read from its colour
CONTRASTS = ("C/A", "C/I", "A/I")
CRITERIA = ("separation", "probes", "clusters", "convergence", "specificity", "causality", "bandwidth")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One criterion on one model at one layer.

    `literal_value` and `literal_verdict` are the criterion as first worded; `verdict` is the calibrated one and
    `reason` says in one sentence which rule decided it. `estimate` with `ci_low` and `ci_high` (95%) is the
    calibrated statistic; `p_literal_N0` and `p_literal_N1` are the rates at which the literal form passes on data
    with no class effect and on data with unrelated class offsets. `text_baseline` is the best text-only value.
    """

    criterion: str
    model_id: str
    layer: int
    metric: str
    literal_value: float | None
    literal_verdict: str
    verdict: str
    reason: str
    flags: tuple[str, ...] = ()
    estimate: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    null: str = ""
    reliability: float | None = None
    p_literal_N0: float | None = None
    p_literal_N1: float | None = None
    text_baseline: float | None = None
    text_baseline_name: str = ""
    power: str = ""
    n: int = 0
    n_clusters: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.verdict not in (PASS, FAIL, INCONCLUSIVE):
            raise ValueError(f"verdict {self.verdict!r} is none of PASS, FAIL, INCONCLUSIVE")
        if self.verdict != INCONCLUSIVE and not (self.estimate is not None and isfinite(self.estimate)):
            raise ValueError(f"{self.criterion}: a {self.verdict} needs a finite estimate")

    def row(self) -> dict:
        """A flat, JSON-ready dict; NaN and infinity become None, flags a '; ' list."""
        row = {k: (None if isinstance(v, float) and not isfinite(v) else v) for k, v in asdict(self).items()}
        return row | {"flags": "; ".join(self.flags)}

    def __str__(self) -> str:
        value = "-" if self.estimate is None else f"{self.estimate:.2f} [{self.ci_low:.2f}, {self.ci_high:.2f}]"
        return f"{self.criterion}: {self.verdict} {value} ({self.reason})"


def with_flags(result: Result, *flags: str) -> Result:
    """The same row with more flags."""
    return replace(result, flags=(*result.flags, *flags))
