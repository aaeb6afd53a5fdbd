"""The endpoint of the probe study: the empathy contrasts, their evaluations within and across registers, and T."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.stats.auroc import d_prime, jackknife_interval
from lib.stats.contrasts import Areas, Design, areas, make_design, weakest

CLASSES = ("cognitive", "affective", "instrumental")
CONTRASTS = {
    "C/A": (("cognitive",), ("affective",)),
    "C/I": (("cognitive",), ("instrumental",)),
    "A/I": (("affective",), ("instrumental",)),
    "C/rest": (("cognitive",), ("affective", "instrumental")),
    "A/rest": (("affective",), ("cognitive", "instrumental")),
    "I/rest": (("instrumental",), ("cognitive", "affective")),
}
REST = slice(3, 6)  # the one-against-rest contrasts, whose mean is "macro"
NAMES = (*CONTRASTS, "macro")
MIN_CLUSTERS = 10  # a jackknife of fewer has no degrees of freedom worth a verdict
TRANSFER = "transfer"


@dataclass(frozen=True, kw_only=True)
class Material:
    """The empathy texts as a design, with class codes and triplet codes [row]."""

    texts: pd.DataFrame
    design: Design
    classes: np.ndarray
    triplet: np.ndarray


def make_material(texts: pd.DataFrame, *, seed: int, n_repeats: int) -> Material:
    """Raises BadInput where the texts are too few, lack a class in a register, or lie in too few clusters."""
    texts = texts.reset_index(drop=True)
    design = make_design(texts["label"], texts["register"], texts["cluster"], contrasts=CONTRASTS, seed=seed,
                         n_repeats=n_repeats)
    if design.n_clusters < MIN_CLUSTERS:
        raise BadInput(f"{design.n_clusters} scenario clusters: intervals need {MIN_CLUSTERS} or more")
    return Material(texts=texts, design=design, classes=texts["label"].map(CLASSES.index).to_numpy(),
                    triplet=texts.groupby(["scenario_id", "register"], sort=False).ngroup().to_numpy())


def with_macro(values: np.ndarray, *, axis: int) -> np.ndarray:
    """`values` of the six contrasts along `axis`, and of a seventh: the mean of the one-against-rest ones."""
    rest = np.moveaxis(values, axis, 0)[REST].mean(axis=0)
    return np.concatenate([values, np.expand_dims(rest, axis)], axis=axis)


def evaluate(scores: np.ndarray, design: Design) -> dict[str, Areas]:
    """Areas [layer, 7 contrasts] of every evaluation, and of the endpoint T under "transfer"."""
    found = {}
    for direction in design.evaluations:
        each = areas(scores, design, direction)
        found[design.name(direction)] = Areas(with_macro(each.value, axis=1), with_macro(each.deleted, axis=1))
    return found | {TRANSFER: weakest([found[design.name(d)] for d in design.directions])}


def long_table(found: Areas, design: Design, *, names: Sequence, index: str) -> pd.DataFrame:
    """Columns `index`, contrast, auroc, ci_low, ci_high, d_prime; one row for each of `names` and each contrast."""
    low, high = jackknife_interval(found.value, found.deleted)
    pairs = np.min([[(Y[design.register == r] > 0).sum() * (Y[design.register == r] < 0).sum() for Y in design.Y]
                    for r in range(len(design.registers))], axis=0)
    columns = {"auroc": found.value, "ci_low": np.clip(low, 0, 1), "ci_high": np.clip(high, 0, 1),
               "d_prime": d_prime(found.value, n_pairs=np.append(pairs, pairs[REST].min()))}
    rows = pd.MultiIndex.from_product([names, NAMES], names=[index, "contrast"])
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()}, index=rows).reset_index()
