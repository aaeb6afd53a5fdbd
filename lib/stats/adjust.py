"""Confound adjustment on out-of-fold scores: s = a + bF + cy, and s - bF goes on.

F are features of the text's form (length, style). Taking F out of the activations inside the folds leaks the labels of
the held-out texts (null AUROC about .60), so it is done to the finished scores. The permutation test of c permutes the
residuals of the model without y (Freedman and Lane 1983).
"""

import numpy as np
import pandas as pd

from lib.stats.auroc import auroc
from lib.stats.contrasts import Areas, Design
from lib.stats.endpoint import Material
from lib.text.features import form


def adjusted_areas(scores: np.ndarray, design: Design, direction: tuple[int, int], F: np.ndarray) -> Areas:
    """AUROCs of adjusted scores, averaged over repeats; b is estimated anew with every cluster deleted.

    `scores` [repeat, training register, contrast, text] of one layer, F [text, feature]; the areas have one layer.
    """
    value, deleted = [], []
    for c in range(len(design.contrasts)):
        rows = design.rows(direction[1], c)
        s, y, cluster = scores[:, direction[0], c, rows].T, design.Y[c, rows], design.cluster[rows]
        value.append(adjusted_area(s, y, F[rows]))
        kept = [cluster != g for g in range(design.n_clusters)]
        deleted.append([value[-1] if k.all() else adjusted_area(s[k], y[k], F[rows][k]) for k in kept])
    return Areas(np.array(value)[None], np.array(deleted)[None])


def adjusted_area(s: np.ndarray, y: np.ndarray, F: np.ndarray) -> float:
    """Mean AUROC of the columns of s [row, repeat] without their part along F [row, feature]."""
    F = F - F.mean(axis=0)
    b = np.linalg.lstsq(np.column_stack([np.ones(len(y)), F, y]), s, rcond=1e-10)[0][1:-1]
    return float(auroc((s - F @ b).T, y > 0).mean())


def freedman_lane(scores: np.ndarray, material: Material, F: np.ndarray, contrast: int, *, n_permutations: int,
                  seed: int) -> float:
    """p of the least coefficient of y over the directions; residuals move within triplets, alike in a cluster.

    `scores` as in `adjusted_areas`, standardised in each repeat and averaged. Incomplete triplets stay as they are.
    """
    design, rng = material.design, np.random.default_rng(seed)
    inside = np.unique(material.classes[design.Y[contrast] != 0])
    order = np.argsort(rng.random((n_permutations + 1, design.n_clusters, len(inside))), axis=-1)
    order[0] = np.arange(len(inside))
    least = np.full(len(order), np.inf)
    for source, target in design.directions:
        rows = design.rows(target, contrast)
        s = scores[:, source, contrast, rows]
        s = ((s - s.mean(axis=1, keepdims=True)) / np.maximum(s.std(axis=1, keepdims=True), 1e-12)).mean(axis=0)
        form = np.column_stack([np.ones(len(rows)), F[rows] - F[rows].mean(axis=0)])
        both = np.column_stack([s, design.Y[contrast, rows]])
        residual, y = (both - form @ np.linalg.lstsq(form, both, rcond=1e-10)[0]).T
        place = -np.ones((material.triplet.max() + 1, len(inside)), int)
        place[material.triplet[rows], np.searchsorted(inside, material.classes[rows])] = np.arange(len(rows))
        place = place[(place >= 0).all(axis=1)]
        still = np.setdiff1d(np.arange(len(rows)), place)
        total = np.full(len(order), y[still] @ residual[still])
        orders = order[:, design.cluster[rows][place[:, 0]]]
        for k in range(len(inside)):
            moved = place[np.arange(len(place)), orders[..., k]]
            total += y[moved] @ residual[place[:, k]]
        least = np.minimum(least, total / max(y @ y, 1e-12))
    return float((least >= least[0] - 1e-12).mean())


def without_form(X: np.ndarray, texts: pd.DataFrame) -> np.ndarray:
    """Activations X [text, d] without what length and style explain within scenario and class; class means move along.

    For mean differences only: no classifier may be tested on these, since they know the held-out texts. Rows without a
    scenario's other texts lose nothing.
    """
    F = form(texts["response"])
    F = np.column_stack([F, np.expm1(F[:, :2])])  # lengths as they are beside their logarithms: classes far apart are extrapolated to
    scenario = texts["scenario_id"].to_numpy()
    kind = pd.get_dummies(texts["condition"] + "/" + texts["register"] + "/" + texts["label"]).to_numpy(float)

    def within(values: np.ndarray) -> np.ndarray:
        return values - pd.DataFrame(values).groupby(scenario).transform("mean").to_numpy()
    F, kind = within(F / np.maximum(F.std(axis=0), 1e-12)), within(kind)
    b = np.linalg.lstsq(np.hstack([F, kind]), within(X.astype(float)), rcond=1e-10)[0][: F.shape[1]]
    return X - F @ b
