"""Gates of a pair of sparse autoencoders: what must hold before any cluster of their latents means something.

Two decoders trained on disjoint data agree when each latent of one has a partner in the other: the mean, over latents
and weighted by activation mass, of the largest cosine (mean max cosine similarity, MMCS; Sharkey et al. 2022, "Taking
features out of superposition"). Without the weights a tail of rare latents, which carry next to nothing, decides it.
"""

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.params import Clusters


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1; zero rows stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def mmcs(first: np.ndarray, second: np.ndarray, *, masses: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Mean max cosine of two decoders `[latent, d_model]`, both ways, weighted by activation `masses` where given."""
    if first.shape[1] != second.shape[1]:
        raise BadInput(f"decoders of width {first.shape[1]} and {second.shape[1]} cannot be compared")
    cosines = unit_rows(first) @ unit_rows(second).T
    weights = masses or (np.ones(len(first)), np.ones(len(second)))
    if not all(np.isfinite(w).all() and w.sum() > 0 for w in weights):
        raise BadInput("latents: no activation at all, so their decoders cannot be compared")
    return float((np.average(cosines.max(1), weights=weights[0]) + np.average(cosines.max(0), weights=weights[1])) / 2)


def random_mmcs(shape: tuple[int, int], *, seed: int) -> float:
    """MMCS of two random decoders of a shape: what chance gives in that many dimensions."""
    rng = np.random.default_rng(seed)
    return mmcs(rng.standard_normal(shape), rng.standard_normal(shape))


def gates_table(measured: dict[str, list[float]], thresholds: Clusters, *, d_model: int,
                nulls: dict[str, dict[str, list[float]]] | None = None) -> pd.DataFrame:
    """One row a gate: `gate, value, rule, bound, passed` and one column a null.

    `measured` holds a list per gate, one value a seed (or a single one); `value` is the worst of them. A gate that was
    not measured (NaN) has not passed. `nulls`: {name: {gate: values}}, measured in the same way on what should fail.
    """
    rules = {"explained_variance": (">=", thresholds.explained_variance_min),
             "train_test_gap": ("<=", thresholds.train_test_gap_max),
             "ce_recovered": (">=", thresholds.ce_recovered_min),
             "dead": ("<=", thresholds.dead_max),
             "l0": ("<=", thresholds.l0_max_over_d_model * d_model),
             "tokens_per_latent": (">=", thresholds.tokens_per_latent_min),
             "mmcs": (">=", thresholds.mmcs_min)}
    rows = []
    for gate, (rule, bound) in rules.items():
        worst = np.min if rule == ">=" else np.max  # NaN wins either way
        value = float(worst(measured.get(gate, [np.nan])))
        passed = value >= bound if rule == ">=" else value <= bound
        rows.append({"gate": gate, "value": value, "rule": rule, "bound": bound, "passed": passed,
                     **{name: float(worst(null.get(gate, [np.nan]))) for name, null in (nulls or {}).items()}})
    return pd.DataFrame(rows)


def failing(gates: pd.DataFrame) -> list[str]:
    """What each gate that has not passed was and should be, in words."""
    return [f"{row.gate} {row.value:.3g}, needed {row.rule} {row.bound:g}" for row in gates.itertuples() if not row.passed]
