"""Texts as blocks: the three responses of a scenario side by side, `[scenario, label, d_model]`.

Every statistic of separation and specificity compares responses to the *same* scenario, so rows are grouped once,
here, and incomplete scenarios are left out where they would bias a mean.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.stats.finite import check_finite
from lib.stats.ustat import MIN_CLUSTERS

LABELS = {
    "empathy": ("cognitive", "affective", "instrumental"),
    "valence_stripped": ("factual", "informational", "procedural"),
    "non_empathy": ("response_1", "response_2", "response_3"),
}
COLUMNS = ("scenario_id", "cluster", "condition", "register", "label")


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """Complete triplets of one condition and register: `rows` [S, 3] index activation rows, in the order of LABELS."""

    rows: np.ndarray
    scenario: np.ndarray
    cluster: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def index(self) -> pd.Index:
        return pd.Index(self.scenario)

    def only(self, scenarios) -> "Triplets":
        """The triplets of `scenarios`, in that order; all of them must be here."""
        where = self.index.get_indexer(scenarios)
        return Triplets(rows=self.rows[where], scenario=self.scenario[where], cluster=self.cluster[where])


def check(X: np.ndarray, texts: pd.DataFrame) -> None:
    """Raise BadInput unless `X` [..., text, d_model] is finite and has one row for each row of `texts`."""
    missing = [column for column in COLUMNS if column not in texts]
    if missing:
        raise BadInput(f"texts: no column {missing[0]!r}; needed are {', '.join(COLUMNS)}")
    if X.ndim < 2 or X.shape[-2] != len(texts):
        raise BadInput(f"activations: shape {X.shape} does not fit {len(texts)} texts; one row a text is needed")
    check_finite(activations=X)


def find_triplets(texts: pd.DataFrame, *, condition: str, register: str = "plain") -> Triplets:
    """Row numbers of the complete triplets of a condition in a register, scenarios in order of first appearance.

    Raises BadInput where one scenario holds a label twice or lies in two clusters.
    """
    place = texts.reset_index(drop=True).query("condition == @condition and register == @register")
    place = place[place["label"].isin(LABELS[condition])]
    twice = place.duplicated(["scenario_id", "label"])
    if twice.any():
        raise BadInput(f"texts: scenario {place[twice]['scenario_id'].iloc[0]!r} has two {register} {condition} "
                       f"texts with one label; keep one")
    if (place.groupby("scenario_id")["cluster"].nunique() > 1).any():
        raise BadInput("texts: a scenario lies in two clusters; one scenario belongs to one cluster")
    table = place.assign(row=place.index).pivot(index="scenario_id", columns="label", values="row")
    table = table.reindex(index=place["scenario_id"].unique(), columns=list(LABELS[condition])).dropna()
    rows = table.to_numpy(dtype=int)
    return Triplets(rows=rows, scenario=table.index.to_numpy(), cluster=texts["cluster"].to_numpy()[rows[:, 0]])


@dataclass(frozen=True, kw_only=True)
class Scenarios:
    """Complete scenarios: `rows` [S, K] of the activations (C, A, I, three neutral, counter C, A, I as far as K goes)
    and cluster `codes` [S] in 0…G−1."""

    rows: np.ndarray
    codes: np.ndarray

    @property
    def n_clusters(self) -> int:
        return len(np.unique(self.codes))

    @property
    def enough(self) -> bool:
        return self.n_clusters >= MIN_CLUSTERS


def find_scenarios(texts: pd.DataFrame, *parts: tuple[str, str]) -> Scenarios:
    """Scenarios that are complete in every (condition, register) of `parts`."""
    found = [find_triplets(texts, condition=condition, register=register) for condition, register in parts]
    common = [s for s in found[0].scenario if all(s in other.index for other in found[1:])]
    found = [triplets.only(common) for triplets in found]
    return Scenarios(rows=np.hstack([triplets.rows for triplets in found]),
                     codes=np.unique(found[0].cluster, return_inverse=True)[1])
