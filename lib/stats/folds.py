"""Grouped folds: all texts of a scenario cluster fall into the same fold, in every register."""

import numpy as np

from lib.errors import BadInput


def grouped_folds(cluster: np.ndarray, *, n_folds: int, n_repeats: int, seed: int) -> np.ndarray:
    """Fold number [repeat, row] of each row; clusters are shuffled, then each goes to the fold with the fewest rows.

    Raises BadInput where there are fewer clusters than folds.
    """
    ids, member, size = np.unique(cluster, return_inverse=True, return_counts=True)
    if len(ids) < n_folds:
        raise BadInput(f"folds: {len(ids)} scenario clusters cannot fill {n_folds} folds")
    rng = np.random.default_rng(seed)
    folds = np.empty((n_repeats, len(member)), dtype=int)
    for repeat in range(n_repeats):
        shuffled = rng.permutation(len(ids))
        load, of = np.zeros(n_folds), np.empty(len(ids), dtype=int)
        for c in shuffled[np.argsort(-size[shuffled], kind="stable")]:
            of[c] = np.argmin(load)
            load[of[c]] += size[c]
        folds[repeat] = of[member]
    return folds
