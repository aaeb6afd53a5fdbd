"""Out-of-fold scores within and across registers, from any source of inner products.

A classifier is trained on one register of the training scenarios and scores the held-out scenarios in every register.
The penalty is chosen on the training texts alone, by inner grouped folds; the inner fit without folds {j, k} serves
outer fold j and outer fold k, so five folds need ten inner fits and not twenty. Probes, text baselines and encoders
all pass through `out_of_fold`, in the same folds.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from lib.stats.auroc import auroc
from lib.stats.contrasts import Design
from lib.stats.solver import logistic, ridge

LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SOLVERS = {"logistic": logistic, "ridge": ridge}
CHUNK = 12  # layers solved together: enough to hide the interpreter, few enough to stay in cache

Gram = Callable[[np.ndarray, np.ndarray], np.ndarray]


def dense_gram(X: np.ndarray) -> Gram:
    """Inner products [layer, row, training row] of X [layer, text, d], standardised by the training rows.

    The products are in the precision of X. Features constant in training count as zero.
    """
    X = X - X.mean(axis=1, keepdims=True)
    squares, total = X**2, X.var(axis=1)

    def gram(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        weight = np.zeros(X.shape[1], X.dtype)
        weight[train] = 1 / len(train)
        mean = weight @ X
        variance = weight @ squares - mean**2
        with np.errstate(divide="ignore"):
            scale = np.where(variance > 1e-6 * total, 1 / variance, 0).astype(X.dtype)
        A, B = X[:, train], X[:, rows] * scale[:, None]
        shift = mean * scale
        inner = np.einsum("ltd,ld->lt", A, shift) - np.einsum("ld,ld->l", mean, shift)[:, None]
        return B @ A.transpose(0, 2, 1) - inner[:, None] - np.einsum("lrd,ld->lr", X[:, rows], shift)[..., None]

    return gram


def out_of_fold(gram: Gram, design: Design, *, n_layers: int, lambdas: Sequence[float] = LAMBDAS,
                solver: str = "logistic", tol: float = 1e-6) -> np.ndarray:
    """Out-of-fold scores [layer, repeat, training register, text, contrast], penalties chosen by inner folds.

    `gram` gives [n_layers, row, training row]; a penalty is in units of the mean squared norm of the training rows.
    """
    out = np.empty((n_layers, len(design.folds), len(design.registers), *design.Y.shape))
    tasks = [(repeat, r) for repeat in range(len(design.folds)) for r in range(len(design.registers))]

    def run(task):
        repeat, r = task
        out[:, repeat, r] = nested(gram, design, fold=design.folds[repeat], register=r, lambdas=lambdas,
                                   solver=solver, tol=tol)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, tasks))
    return out


def nested(gram: Gram, design: Design, *, fold: np.ndarray, register: int, lambdas: Sequence[float], solver: str,
           tol: float) -> np.ndarray:
    """Out-of-fold scores [layer, text, contrast] in one split, trained on one register."""
    mine, n_folds = design.register == register, fold.max() + 1
    inner = {}
    if len(lambdas) > 1:
        for left in combinations(range(n_folds), 2):
            held = np.isin(fold, left)
            inner[left] = fit_scores(gram, design, np.flatnonzero(mine & ~held), np.flatnonzero(mine & held),
                                     lambdas=lambdas, solver=solver, tol=max(tol, 1e-3))
    out = None
    for k in range(n_folds):
        test = np.flatnonzero(fold == k)
        scores = fit_scores(gram, design, np.flatnonzero(mine & (fold != k)), test, lambdas=lambdas, solver=solver, tol=tol)
        best = choose(inner, design, mine=mine, fold=fold, outer=k) if inner else np.zeros((len(scores), 1), int)
        out = np.empty((len(scores), *design.Y.shape)) if out is None else out
        out[:, test] = np.take_along_axis(scores, best[:, None, :, None], axis=-1)[..., 0]
    return out


def fit_scores(gram: Gram, design: Design, train: np.ndarray, rows: np.ndarray, *, lambdas: Sequence[float],
               solver: str, tol: float) -> np.ndarray:
    """Scores [layer, row, contrast, lambda] of `rows` by classifiers fitted on `train`."""
    K = gram(train, np.concatenate([train, rows]))
    K = K / np.maximum(np.trace(K[:, :len(train)], axis1=1, axis2=2) / len(train), 1e-30)[:, None, None].astype(K.dtype)
    out = np.empty((len(K), len(rows), design.Y.shape[1], len(lambdas)), K.dtype)
    for start in range(0, len(K), CHUNK):
        part = np.s_[start:start + CHUNK]
        inner, outer = np.ascontiguousarray(K[part, :len(train)]), K[part, len(train):]
        for i, lam in enumerate(lambdas):
            out[part, ..., i] = SOLVERS[solver](inner, design.Y[train], K.dtype.type(lam), tol=tol).scores(outer)
    return out


def choose(inner: dict, design: Design, *, mine: np.ndarray, fold: np.ndarray, outer: int) -> np.ndarray:
    """Index [layer, contrast] of the penalty with the best inner AUROC; the larger penalty wins a tie."""
    rows = np.flatnonzero(mine & (fold != outer))
    shape = next(iter(inner.values())).shape
    held = np.empty((shape[0], len(rows), *shape[2:]))
    for (j, k), scores in inner.items():
        if outer in (j, k):
            other = j if outer == k else k
            among = fold[mine & np.isin(fold, (j, k))]
            held[:, fold[rows] == other] = scores[:, among == other]
    best = np.empty((shape[0], shape[2]), dtype=int)
    for c in range(shape[2]):
        use = design.Y[rows, c] != 0
        found = auroc(held[:, use, c].transpose(0, 2, 1), design.Y[rows[use], c] > 0)
        best[:, c] = found.shape[1] - 1 - np.argmax(found[:, ::-1], axis=1)
    return best
