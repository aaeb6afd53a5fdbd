"""Known answers: each calibrated verdict on simulated data with planted truth, and on data with none.

The report shows this table beside the real results, so that a reader sees what the same code says when the truth is known.
"""

import numpy as np
import pandas as pd

from lib.params import Thresholds
from lib.stats import simulate
from lib.stats.bandwidth import Range, bandwidth, effective_dimension
from lib.stats.causality import Judged, causality, effect
from lib.stats.clusters import clustered_rows, clusters
from lib.stats.convergence import convergence
from lib.stats.probes import probe
from lib.stats.separation import separation
from lib.stats.specificity import specificity
from lib.stats.verdicts import FAIL, PASS, Result
from lib.text import synthetic

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


def probed(meaning: float, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Probes of C against A where each type has a direction of length `meaning`, and words that mislead across registers."""
    seed = int(rng.integers(2**31))
    texts = synthetic.triplets(36, seed=seed, share=0.12)
    X = synthetic.activations(texts, n_layers=1, d_model=48, seed=seed + 1, meaning=meaning, words=0.5)
    return probe(X, texts, thresholds=thresholds.probes, n_permutations=400, n_repeats=1, **ABOUT).results[0]


def grouped(strength: float, rng: np.random.Generator) -> tuple[pd.DataFrame, dict, pd.DataFrame]:
    """Texts, `{resid, latents, decoder}` whose first four latents fire for the four types with `strength`, and gates that pass."""
    _, texts = simulate.as_texts({block: np.zeros((N // 2, 3, 1)) for block in (*SEPARATION, ("empathy", "counter"))})
    texts = texts.assign(text_id=[f"t{i}" for i in range(len(texts))], context="", response="")
    decoder = rng.standard_normal((128, D))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    latents = np.maximum(rng.standard_normal((len(texts), 128)), 0) * 0.3 + np.maximum(rng.standard_normal((N, 128)), 0)[texts.cluster]
    latents[np.arange(len(texts)), clustered_rows(texts)[1]] += strength
    gates = pd.DataFrame([{"gate": "mmcs", "value": 1.0, "rule": ">=", "bound": 0.0, "passed": True}])
    return texts, {"resid": latents @ decoder + 0.3 * rng.standard_normal((len(texts), D)), "latents": [latents], "decoders": [decoder]}, gates


def counted(strength: float, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Clusters where the four types differ by `strength`."""
    texts, made, gates = grouped(strength, rng)
    return clusters(made["latents"], {}, texts, gates, thresholds=thresholds.clusters, n_surrogates=40, n_bootstraps=20, n_permutations=200, **ABOUT).result


def agreed(shared: bool, thresholds: Thresholds, rng: np.random.Generator) -> Result:
    """Convergence where probes and clusters read the same four directions, or unrelated ones."""
    texts, made, gates = grouped(2.0, rng)
    if not shared:
        types, offsets = clustered_rows(texts)[1], rng.standard_normal((4, D))
        made["resid"] += 2.0 * (offsets / np.linalg.norm(offsets, axis=1, keepdims=True) - made["decoders"][0][:4])[types]
    return convergence(**made, texts=texts, gates=gates, thresholds=thresholds.convergence, n_splits=10, n_permutations=60, **ABOUT).result


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


# Of each criterion: what the data are, the verdict that truth demands, and how they are made and judged.
CASES = {
    "probes": (("a direction for each type, words that mislead", PASS, probed, 1.0), ("words alone", f"not {PASS}", probed, 0.0)),
    "separation": (("C and A orthogonal", PASS, separated, 0.0), ("C and A nearly parallel (cosine .95)", FAIL, separated, 0.95),
                   ("no class effect", f"not {PASS}", separated, None)),
    "clusters": (("four groups of latents", PASS, counted, 3.0), ("no groups", FAIL, counted, 0.0)),
    "convergence": (("probes and latents read the same directions", PASS, agreed, True), ("unrelated directions", f"not {PASS}", agreed, False)),
    "specificity": (("controls with structures of their own", PASS, specific, False), ("controls with the structure of empathy", FAIL, specific, True)),
    "causality": (("ablation lowers empathic replies", PASS, caused, 0.1), ("ablation does nothing", f"not {PASS}", caused, 0.0)),
    "bandwidth": (("twice the steering range", PASS, wide, 2.0), ("equal bandwidths", FAIL, wide, 1.0)),
}


def known_answers(criterion: str, thresholds: Thresholds, *, seed: int) -> list[dict]:
    """One row a simulated data set of a criterion: what it is, the verdict that truth demands, and the verdict given. Of `thresholds`,
    only the criterion's own section enters."""
    rows = []
    for number, (data, expected, make, planted) in enumerate(CASES[criterion]):
        row = make(planted, thresholds, np.random.default_rng([seed, number])).row()
        rows.append({"data": data, "expected": expected, "seed": seed}
                    | {key: row[key] for key in ("criterion", "verdict", "reason", "estimate", "ci_low", "ci_high")})
    return rows


def as_expected(row: dict) -> bool:
    """Whether a known answer is what truth demands."""
    wanted = row["expected"]
    return row["verdict"] != wanted[4:] if wanted.startswith("not ") else row["verdict"] == wanted
