"""Directions for interventions, cross-fitted: fitted on one register and one half of the scenario clusters, tested on the rest.

Cognitive and Affective are mean differences to the instrumental replies, their difference is `cognitive-affective`,
Instrumental is the difference to the mean of both, formality that of formal and casual wordings (one register).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.stats.causality import split_halves

EMPATHY = ("cognitive", "affective", "cognitive-affective")
MEANING = {"cognitive": "cognitive − instrumental replies", "affective": "affective − instrumental replies",
           "cognitive-affective": "cognitive − affective replies", "instrumental": "instrumental − mean of cognitive and affective replies",
           "formality": "formal − casual wordings"}


@dataclass(frozen=True)
class Directions:
    """Unit vectors `[d_model]` by `(name, register fitted on, half tested on)`, and the half each scenario is tested in."""

    vectors: dict[tuple[str, str, int], np.ndarray]
    half: dict[str, int]

    def of(self, name: str, scenario_id: str, register: str) -> np.ndarray:
        """The direction for a test text: from the other half and, where there is one, from the other register."""
        half, other = self.half[scenario_id], "counter" if register == "plain" else "plain"
        return self.vectors.get((name, other, half), self.vectors.get((name, register, half)))

    def mean(self, name: str) -> np.ndarray:
        """Mean of a direction's vectors at length 1: for use outside this study's texts."""
        total = sum(vector for (own, _, _), vector in self.vectors.items() if own == name)
        return total / np.linalg.norm(total)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _, _ in self.vectors))

    def agreement(self) -> dict[str, float]:
        """Mean cosine between a direction's vectors of different halves."""
        return {name: float(np.mean([a @ b for (n, _, h), a in self.vectors.items() if n == name and h == 0
                                     for (m, _, k), b in self.vectors.items() if m == name and k == 1])) for name in self.names}


def contrasts(means: pd.Series) -> dict[str, np.ndarray]:
    """Every direction that the labels' mean residuals give."""
    found = {}
    if {"cognitive", "affective", "instrumental"} <= set(means.index):
        c, a, i = means["cognitive"], means["affective"], means["instrumental"]
        found |= {"cognitive": c - i, "affective": a - i, "cognitive-affective": c - a, "instrumental": i - (c + a) / 2}
    if {"formal", "casual"} <= set(means.index):
        found["formality"] = means["formal"] - means["casual"]
    return found


def fit(resid: np.ndarray, texts: pd.DataFrame, *, seed: int) -> Directions:
    """Directions of `resid [text, d_model]`; BadInput where a half of the clusters lacks a type or a difference is zero."""
    types = texts.label.isin(("cognitive", "affective", "instrumental"))
    one = texts.cluster[types].nunique() < 2  # a single cluster has no halves; then no verdict is given
    half = split_halves((texts.scenario_id if one else texts.cluster).to_numpy(), seed)
    vectors = {}
    for register in texts.register.unique():
        for test in (0, 1):
            rows = np.flatnonzero((texts.register == register) & (half != test))
            labels = texts.label.to_numpy()[rows]
            found = contrasts(pd.Series({label: resid[rows[labels == label]].mean(0) for label in np.unique(labels)}))
            for name, vector in found.items():
                norm = np.linalg.norm(vector)
                if not np.isfinite(norm) or norm == 0:
                    raise BadInput(f"direction {name}: has norm {norm} in half {1 - test} of register {register}; more texts are needed")
                vectors[name, register, test] = vector / norm
    missing = [name for name in EMPATHY for test in (0, 1) if not any((name, register, test) in vectors for register in ("plain", "counter"))]
    if missing:
        raise BadInput(f"direction {missing[0]}: a half of the scenarios has no such replies; at least two clusters are needed")
    return Directions(vectors, dict(zip(texts.scenario_id, half, strict=True)))
