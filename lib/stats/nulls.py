"""The max-T permutation null of the endpoint, over layers and penalties.

Labels are permuted within triplets, in the same way in all triplets of a scenario cluster and in both registers, so
that whatever ties a scenario's texts together stays. Ridge scores are linear in the labels: one smoother matrix per
(layer, fold, penalty) gives the out-of-fold scores of all permutations in one product. Max-T: Westfall & Young 1993.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from lib.stats.contrasts import Design
from lib.stats.crossfit import Gram

BLOCK = 250  # permutations scored together


def permuted_labels(design: Design, classes: np.ndarray, triplet: np.ndarray, *, n_permutations: int,
                    seed: int) -> np.ndarray:
    """Labels [contrast, row, permutation]; permutation 0 is the data's own labelling.

    `classes` [row] are class codes, `triplet` [row] says which rows belong together. A contrast's classes change
    places only in triplets that hold each of them equally often.
    """
    rng = np.random.default_rng(seed)
    n_classes = int(classes.max()) + 1
    order = np.argsort(rng.random((n_permutations, design.n_clusters, n_classes)), axis=-1)
    order[0] = np.arange(n_classes)
    swap = np.where(order[:, :, 0] < order[:, :, 1], 1, -1).T[design.cluster]
    counts = pd.crosstab(triplet, classes).reindex(columns=range(n_classes), fill_value=0).loc[triplet].to_numpy()
    labels = np.empty((len(design.contrasts), len(classes), n_permutations), np.float32)
    for c, Y in enumerate(design.Y.T):
        inside = [k for k in range(n_classes) if Y[classes == k].any()]
        complete = (counts[:, inside] == counts[:, inside[:1]]).all(axis=1)
        sign = np.array([Y[classes == k][0] for k in range(n_classes)])
        moved = Y[:, None] * swap if len(inside) == 2 else sign[order[:, design.cluster, classes]].T
        labels[c] = np.where(complete[:, None], moved, Y[:, None])
    return labels


def smoothers(K: np.ndarray, outer: np.ndarray, lambdas: Sequence[float]) -> np.ndarray:
    """Ridge smoothers [layer, lambda, test row, training row]: predictions are smoother @ labels.

    K [layer, training row, training row] and `outer` [layer, test row, training row] are inner products.
    """
    n = K.shape[-1]
    mean = K.mean(axis=1, keepdims=True)
    centred = K - mean - mean.transpose(0, 2, 1) + mean.mean(axis=2, keepdims=True)
    values, vectors = np.linalg.eigh(centred.astype(np.float64))
    left = (outer - mean) @ (vectors - vectors.mean(axis=1, keepdims=True))
    shrunk = left[:, None] / (np.maximum(values, 0)[:, None] + np.asarray(lambdas)[:, None])[:, :, None]
    return shrunk @ (vectors - vectors.mean(axis=1, keepdims=True)).transpose(0, 2, 1)[:, None] + 1 / n


def rank_areas(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """AUROC [...] of float32 `scores` [..., row] for `positive` [..., row], by one plain sort.

    The label rides in the lowest bit of the score's sortable integer form. Scores that differ in that bit alone count
    as tied and their order is decided by the label, half of them by its opposite, so ties count half on average.
    """
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)
    keys = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    odd = np.arange(scores.shape[-1], dtype=np.int32) & 1
    keys = (keys & np.int32(-4)) | (((positive ^ odd) & 1) << 1) | odd
    keys.sort(axis=-1)
    found = ((keys >> 1) ^ keys) & 1
    n_pos, n = positive.sum(axis=-1), scores.shape[-1]
    rank_sum = found.astype(np.float32) @ np.arange(1, n + 1, dtype=np.float32)
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * (n - n_pos))


def transfer_null(gram: Gram, design: Design, labels: np.ndarray, *, lambdas: Sequence[float]) -> np.ndarray:
    """Endpoint T [layer, lambda, contrast, permutation] of ridge probes in the first repeat's folds.

    With permutation 0 unpermuted, [..., 0] is the statistic of the data.
    """
    fold = design.folds[0]
    tasks = [(r, k) for r in range(len(design.registers)) for k in range(design.n_folds)]

    def kernel(task):
        r, k = task
        train, test = np.flatnonzero((design.register == r) & (fold != k)), np.flatnonzero(fold == k)
        K = gram(train, np.concatenate([train, test]))
        scale = np.maximum(np.trace(K[:, :len(train)], axis1=1, axis2=2) / len(train), 1e-30)
        return train, test, (K / scale[:, None, None]).astype(np.float32)

    def run(task):
        (source, target), c = task
        rows, parts = design.rows(target, c), []
        for k in range(design.n_folds):
            train, test, K = kernels[source, k]
            use, held = design.Y[train, c] != 0, np.isin(test, rows)
            S = smoothers(K[:, :len(train)][:, use][:, :, use], K[:, len(train):][:, held][:, :, use], lambdas)
            parts.append((test[held], train[use], S.astype(np.float32)))
        order = np.argsort(np.concatenate([held for held, _, _ in parts]))
        found = np.empty((*parts[0][2].shape[:2], labels.shape[-1]), np.float32)
        for start in range(0, labels.shape[-1], BLOCK):
            block = labels[c, :, start:start + BLOCK]
            positive = (block[rows].T > 0).astype(np.int32)
            columns = [np.ascontiguousarray(block[train].T) for _, train, _ in parts]
            for layer in range(len(found)):
                scores = np.concatenate([y @ S[layer].transpose(0, 2, 1) for (_, _, S), y in zip(parts, columns, strict=True)], axis=-1)
                found[layer, :, start:start + BLOCK] = rank_areas(scores[..., order], positive)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = dict(zip(tasks, pool.map(kernel, tasks), strict=True))
        jobs = [(d, c) for d in design.directions for c in range(len(design.contrasts))]
        found = np.stack(list(pool.map(run, jobs))).reshape(len(design.directions), len(design.contrasts), -1, len(lambdas), labels.shape[-1])
    return found.min(axis=0).transpose(1, 2, 0, 3)


def holm(p: np.ndarray) -> np.ndarray:
    """Step-down adjusted p-values (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    out = np.empty(len(p))
    out[order] = adjusted
    return out
