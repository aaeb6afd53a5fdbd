"""Known answers: each calibrated verdict on simulated data with planted truth, and on data with none.

The report shows this table beside the real results, so that a reader sees what the same code says when the truth is known.
"""

import numpy as np

from lib.params import Thresholds
from lib.stats import simulate
from lib.stats.bandwidth import Range, bandwidth, effective_dimension
from lib.stats.causality import Judged, causality, effect
from lib.stats.separation import separation
from lib.stats.specificity import specificity
from lib.stats.verdicts import FAIL, PASS, Result

N, D = 90, 64
SPREAD = simulate.power_law(D, decay=0.3)
ABOUT = dict(model_id="simulated", layer=0, seed=0)
SEPARATION = (("empathy", "plain"), ("valence_stripped", "plain"))


def triplets(offsets: np.ndarray, rng: np.random.Generator) -> tuple:
    """Activations and texts of N scenarios in both registers with class offsets [6, d]: C, A, I and three neutral."""
    plain = simulate.draw(N, offsets, spread=SPREAD, rng=rng)
    counter = simulate.draw(N, offsets[:3], spread=SPREAD, rng=rng)
    return simulate.as_texts({SEPARATION[0]: plain[:, :3], SEPARATION[1]: plain[:, 3:], ("empathy", "counter"): counter})


def separated(rho: float | None, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Separation where the true cosine of C and A is `rho`; None plants nothing."""
    offsets = np.zeros((6, D)) if rho is None else simulate.two_factor(rho, reliability=0.95, n_scenarios=N, spread=SPREAD, rng=rng)
    X, texts = triplets(offsets, rng)
    return separation(X, texts, thresholds=thresholds.separation, n_permutations=500, **ABOUT).result


def specific(same: bool, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Specificity where the controls have the very structure of empathy, or structures of their own."""
    blocks, empathy = {}, rng.standard_normal((3, D))
    for condition in ("empathy", "valence_stripped", "non_empathy"):
        offsets = empathy if same or condition == "empathy" else rng.standard_normal((3, D))
        blocks[condition, "plain"] = simulate.draw(N, offsets, spread=SPREAD, rng=rng)
    X, texts = simulate.as_texts(blocks)
    return specificity(X, texts, thresholds=thresholds.specificity, n_permutations=200, **ABOUT).result


def caused(shift: float, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Causality with a judge, where ablation lowers the empathic replies by `shift` nats per token."""
    d = np.r_[-shift, rng.standard_normal(199) * 0.01] + rng.standard_normal((N, 200)) * 0.02
    judged = Judged(-1.0 if shift else 0.0, N)
    return causality({"C": effect(d)}, thresholds=thresholds.causality, cost=0.0, cost_band=0.1, judged=judged, **ABOUT)[0]


def wide(reach: float, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Bandwidth where empathy's steering range is `reach` times formality's and the dimensions are equal."""
    dims = [effective_dimension(rng.standard_normal((400, D))) for _ in range(2)]
    ranges = [Range(0.2 * factor, 0.2 * factor, False, 0.02) for factor in (reach, 1.0)]
    return bandwidth((dims[0], ranges[0]), (dims[1], ranges[1]), thresholds=thresholds.bandwidth, **ABOUT)


def known_answers(thresholds: Thresholds, *, seed: int) -> list[dict]:
    """One row a simulated data set: what it is, the verdict that truth demands, and the verdict given."""
    cases = [
        ("C and A orthogonal", PASS, separated, 0.0), ("C and A nearly parallel (cosine .95)", FAIL, separated, 0.95),
        ("no class effect", f"not {PASS}", separated, None),
        ("controls with structures of their own", PASS, specific, False), ("controls with the structure of empathy", FAIL, specific, True),
        ("ablation lowers empathic replies", PASS, caused, 0.1), ("ablation does nothing", f"not {PASS}", caused, 0.0),
        ("twice the steering range", PASS, wide, 2.0), ("equal bandwidths", FAIL, wide, 1.0),
    ]
    rows = []
    for number, (data, expected, make, planted) in enumerate(cases):
        row = make(planted, thresholds, np.random.default_rng([seed, number])).row()
        rows.append({"data": data, "expected": expected, "seed": seed}
                    | {key: row[key] for key in ("criterion", "verdict", "reason", "estimate", "ci_low", "ci_high")})
    return rows
