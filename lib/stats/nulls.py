"""The max-T permutation null of the endpoint, over layers and penalties.

Labels are permuted within triplets, in the same way in all triplets of a scenario cluster and in both registers, so
that whatever ties a scenario's texts together stays. Ridge scores are linear in the labels: one eigendecomposition per
(layer, fold) gives the out-of-fold scores of every penalty and permutation by products. Max-T: Westfall & Young 1993.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from lib.stats.contrasts import Design
from lib.stats.crossfit import CHUNK, Source
from lib.stats.solver import Dual, Primal, logistic

BLOCK = 250  # permutations scored together


def permuted_labels(design: Design, classes: np.ndarray, triplet: np.ndarray, *, n_permutations: int,
                    seed: int) -> np.ndarray:
    """Labels [contrast, permutation, row]; permutation 0 is the data's own labelling.

    `classes` [row] are class codes, `triplet` [row] says which rows belong together. A contrast's classes change
    places only in triplets that hold each of them equally often.
    """
    rng = np.random.default_rng(seed)
    n_classes = int(classes.max()) + 1
    order = np.argsort(rng.random((n_permutations, design.n_clusters, n_classes)), axis=-1)
    order[0] = np.arange(n_classes)
    swap = np.where(order[:, :, 0] < order[:, :, 1], 1, -1)[:, design.cluster]
    counts = pd.crosstab(triplet, classes).reindex(columns=range(n_classes), fill_value=0).loc[triplet].to_numpy()
    labels = np.empty((len(design.contrasts), n_permutations, len(classes)), np.float32)
    for c, Y in enumerate(design.Y):
        inside = [k for k in range(n_classes) if Y[classes == k].any()]
        complete = (counts[:, inside] == counts[:, inside[:1]]).all(axis=1)
        sign = np.array([Y[classes == k][0] for k in range(n_classes)])
        moved = Y * swap if len(inside) == 2 else sign[order[:, design.cluster, classes]]
        labels[c] = np.where(complete, moved, Y)
    return labels


def smoothers(space: Dual | Primal, use: np.ndarray, lambdas: Sequence[float]) -> np.ndarray:
    """Ridge smoothers [layer, lambda, training row, text] of the training rows `use`: scores are labels @ smoother."""
    if isinstance(space, Primal):
        other = space.inner.swapaxes(1, 2)
        space = Dual(space.inner @ other, space.outer @ other)
    K, outer = space.inner[:, use][:, :, use], space.outer[:, :, use]
    mean = K.mean(axis=1, keepdims=True)
    centred = K - mean - mean.transpose(0, 2, 1) + mean.mean(axis=2, keepdims=True)
    values, vectors = np.linalg.eigh(centred.astype(np.float64))
    vectors -= vectors.mean(axis=1, keepdims=True)
    shrink = 1 / (np.maximum(values, 0)[:, None] + np.asarray(lambdas)[:, None])
    right = vectors.transpose(0, 2, 1) @ (outer - mean).transpose(0, 2, 1)
    return ((vectors[:, None] * shrink[:, :, None]) @ right[:, None] + 1 / len(use)).astype(np.float32)


def rank_areas(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC [...] of float32 `scores` [..., row] for `positive` [..., row] of 0 and 1, by one plain sort.

    The label rides in the lowest bits of the score's sortable integer form. Where nothing else differs the order of
    two scores is decided by their labels, for or against by turns, so that ties count half on average.
    """
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)
    keys = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    turn = np.arange(scores.shape[-1], dtype=np.int32) & 1
    keys = (keys & np.int32(-4)) | ((positive ^ turn) << 1) | turn
    keys.sort(axis=-1)
    n_pos, n = positive.sum(axis=-1), scores.shape[-1]
    rank_sum = (((keys >> 1) ^ keys) & 1).astype(np.float32) @ np.arange(1, n + 1, dtype=np.float32)
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * (n - n_pos))


def transfer_null(source: Source, design: Design, labels: np.ndarray, *, n_layers: int, lambdas: Sequence[float],
                  solver: str = "ridge") -> np.ndarray:
    """Endpoint T [layer, lambda, contrast, permutation] in the first repeat's folds.

    With permutation 0 unpermuted, [..., 0] is the statistic of the data. `solver` "logistic" solves every permutation
    afresh: the same null within a hundredth, at twenty times the cost.
    """
    tasks = [(slice(start, start + CHUNK), d) for start in range(0, n_layers, CHUNK) for d in design.directions]

    def run(task):
        layers, (r, target) = task
        folds = [_fold(source, design, k, r, target, layers) for k in range(design.n_folds)]
        return [_contrast(folds, design, labels[c], c, lambdas, solver) for c in range(len(labels))]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(run, tasks))
    by_direction = [np.concatenate([np.stack(f, axis=2) for f, (_, d) in zip(found, tasks, strict=True) if d == way])
                    for way in design.directions]
    return np.min(by_direction, axis=0)


def _fold(source: Source, design: Design, k: int, register: int, target: int, layers: slice) -> tuple:
    """(training rows, test rows, space) of fold k, trained on `register`, tested on `target`."""
    held = design.folds[0] == k
    train = np.flatnonzero((design.register == register) & ~held)
    test = np.flatnonzero((design.register == target) & held)
    return train, test, source(train, test, layers)


def _contrast(folds: list, design: Design, labels: np.ndarray, c: int, lambdas: Sequence[float],
              solver: str) -> np.ndarray:
    """AUROC [layer, lambda, permutation] of one contrast, trained and tested on the registers of `folds`."""
    found, truth = [], []
    for train, test, space in folds:
        use, held = np.flatnonzero(design.Y[c, train]), np.flatnonzero(design.Y[c, test])
        truth.append(test[held])
        y = labels[:, train]
        if solver == "ridge":
            found.append((y[:, use], smoothers(space, use, lambdas)[..., held]))
        else:
            fits = [logistic(space, y, space.inner.dtype.type(lam), tol=1e-3).scores()[..., held] for lam in lambdas]
            found.append((None, np.stack(fits, axis=1).astype(np.float32)))
    positive = (labels[:, np.concatenate(truth)] > 0).astype(np.int32)
    out = np.empty((*found[0][1].shape[:2], len(labels)), np.float32)
    for start in range(0, len(labels), BLOCK):
        block = slice(start, start + BLOCK)
        for at in np.ndindex(out.shape[:2]):
            scores = np.concatenate([S[at][block] if y is None else y[block] @ S[at] for y, S in found], axis=-1)
            out[at][block] = rank_areas(scores, positive[block])
    return out


def holm(p: np.ndarray) -> np.ndarray:
    """Step-down adjusted p-values (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    out = np.empty(len(p))
    out[order] = adjusted
    return out
