"""Out-of-fold scores within and across registers, from any source of features or inner products.

A classifier is trained on one register of the training scenarios and scores the held-out scenarios in every register.
The penalty is chosen on the training texts alone, by inner grouped folds; the inner fit without folds {j, k} serves
outer fold j and outer fold k, so five folds need ten inner fits and not twenty. Probes, text baselines and encoders
all pass through `out_of_fold`, in the same folds. A penalty is in units of the mean squared norm of the training rows.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np

from lib.stats.auroc import auroc
from lib.stats.contrasts import Design
from lib.stats.solver import Dual, Space, logistic, make_space, ridge

LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SOLVERS = {"logistic": logistic, "ridge": ridge}
CHUNK = 8  # layers solved together: enough to hide the interpreter, few enough to stay in cache
INNER_TOL = 1e-3  # inner fits only rank penalties

Source = Callable[[np.ndarray, np.ndarray, slice], Space]
"""(training rows, rows to score, layers) -> their space [layer, ...], whatever was fitted seen on training rows only."""


def dense_source(X: np.ndarray) -> Source:
    """Features X [layer, text, d], standardised by the training rows; features constant there count as zero.

    Everything is computed in the precision of X.
    """
    X = X - X.mean(axis=1, keepdims=True)
    floor = 1e-6 * X.var(axis=1)

    def space(train: np.ndarray, rows: np.ndarray, layers: slice) -> Space:
        Z = X[layers, train]
        mean = Z.mean(axis=1, keepdims=True)
        Z -= mean
        variance = np.vecdot(Z, Z, axis=1)[:, None] / len(train)
        keep = variance > floor[layers, None]
        scale = np.where(keep, 1 / np.sqrt(np.where(keep, variance, 1)), 0)
        scale = scale / np.sqrt(np.maximum(keep.sum(axis=2, keepdims=True), 1)).astype(X.dtype)
        return make_space(Z * scale, (X[layers, rows] - mean) * scale)

    return space


def gram_source(grams: Sequence[Callable[[np.ndarray, np.ndarray], np.ndarray]]) -> Source:
    """One layer for each function (training rows, rows) -> inner products [row, training row]."""

    def space(train: np.ndarray, rows: np.ndarray, layers: slice) -> Space:
        K = np.stack([gram(train, np.concatenate([train, rows])) for gram in grams[layers]])
        size = np.trace(K[:, :len(train)], axis1=1, axis2=2)[:, None, None] / len(train)
        K = K / np.where(size > 0, size, 1)
        return Dual(np.ascontiguousarray(K[:, :len(train)]), K[:, len(train):])

    return space


def out_of_fold(source: Source, design: Design, *, n_layers: int, lambdas: Sequence[float] = LAMBDAS,
                solver: str = "logistic", tol: float = 1e-6) -> np.ndarray:
    """Out-of-fold scores [layer, repeat, training register, contrast, text], penalties chosen by inner folds."""
    out = np.empty((n_layers, len(design.folds), len(design.registers), *design.Y.shape))
    tasks = [(slice(start, start + CHUNK), repeat, r) for repeat in range(len(design.folds))
             for r in range(len(design.registers)) for start in range(0, n_layers, CHUNK)]

    def run(task):
        layers, repeat, r = task
        out[layers, repeat, r] = nested(source, design, layers=layers, fold=design.folds[repeat], register=r,
                                        lambdas=lambdas, solver=solver, tol=tol)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, tasks))
    return out


def nested(source: Source, design: Design, *, layers: slice, fold: np.ndarray, register: int,
           lambdas: Sequence[float], solver: str, tol: float) -> np.ndarray:
    """Out-of-fold scores [layer, contrast, text] in one split, trained on one register."""
    mine, n_folds = design.register == register, int(fold.max()) + 1

    def fit(left: tuple, rows: np.ndarray, tol: float) -> np.ndarray:
        train = np.flatnonzero(mine & ~np.isin(fold, left))
        return grid_scores(source(train, rows, layers), design.Y[:, train], lambdas=lambdas, solver=solver, tol=tol)

    inner = {left: fit(left, np.flatnonzero(mine & np.isin(fold, left)), max(tol, INNER_TOL))
             for left in combinations(range(n_folds), 2) if len(lambdas) > 1}
    out = []
    for k in range(n_folds):
        scores = fit((k,), np.flatnonzero(fold == k), tol)
        best = choose(inner, design, mine=mine, fold=fold, outer=k) if inner else np.zeros(scores.shape[1:3], int)
        out.append(np.take_along_axis(scores, best[None, ..., None], axis=0)[0])
    order = np.argsort(np.concatenate([np.flatnonzero(fold == k) for k in range(n_folds)]))
    return np.concatenate(out, axis=-1)[..., order]


def grid_scores(space: Space, Y: np.ndarray, *, lambdas: Sequence[float], solver: str, tol: float) -> np.ndarray:
    """Scores [lambda, layer, contrast, text] of the space's texts under every penalty."""
    lam, solve = np.asarray(lambdas, space.inner.dtype), SOLVERS[solver]
    scores = solve(space, np.tile(Y, (len(lam), 1)), np.repeat(lam, len(Y))[:, None], tol=tol).scores()
    return np.moveaxis(scores.reshape(*scores.shape[:-2], len(lam), len(Y), -1), -3, 0)


def choose(inner: dict, design: Design, *, mine: np.ndarray, fold: np.ndarray, outer: int) -> np.ndarray:
    """Index [layer, contrast] of the penalty with the best inner AUROC; the larger penalty wins a tie."""
    held, rows = [], []
    for pair, scores in inner.items():
        if outer in pair:
            other = pair[pair[0] == outer]
            among = np.flatnonzero(mine & np.isin(fold, pair))
            held.append(scores[..., fold[among] == other])
            rows.append(among[fold[among] == other])
    return best_of(np.concatenate(held, axis=-1), design.Y[:, np.concatenate(rows)])


def best_of(scores: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Index [layer, contrast] of the penalty with the best AUROC of `scores` [lambda, layer, contrast, row]."""
    found = np.stack([auroc(scores[:, :, c, y != 0], y[y != 0] > 0) for c, y in enumerate(Y)], axis=-1)
    return len(found) - 1 - np.argmax(found[::-1], axis=0)


def best_penalty(source: Source, design: Design, *, n_layers: int, train: np.ndarray, lambdas: Sequence[float]) -> np.ndarray:
    """Index [layer, contrast] of the penalty with the best out-of-fold AUROC on `train`, by the first repeat's folds."""
    fold, held = design.folds[0], np.empty((len(lambdas), n_layers, len(design.Y), len(train)))
    for k in np.unique(fold[train]):
        test = fold[train] == k
        space = source(train[~test], train[test], slice(0, n_layers))
        held[..., test] = grid_scores(space, design.Y[:, train[~test]], lambdas=lambdas, solver="logistic", tol=INNER_TOL)
    return best_of(held, design.Y[:, train])


def given_split(source: Source, design: Design, *, n_layers: int, train: np.ndarray, test: np.ndarray,
                lambdas: Sequence[float] = LAMBDAS, tol: float = 1e-4) -> np.ndarray:
    """Scores [layer, contrast, test row] after training on `train`, whose own folds choose the penalties."""
    best = best_penalty(source, design, n_layers=n_layers, train=train, lambdas=lambdas)
    scores = grid_scores(source(train, test, slice(0, n_layers)), design.Y[:, train], lambdas=lambdas, solver="logistic", tol=tol)
    return np.take_along_axis(scores, best[None, ..., None], axis=0)[0]


def best_weights(X: np.ndarray, design: Design, *, lambdas: Sequence[float] = LAMBDAS) -> np.ndarray:
    """Logistic weights [contrast, d] in the units of X [text, d], on all texts of all registers.

    Penalties are chosen by grouped folds; a positive score means the contrast's first class.
    """
    X, every = X.astype(np.float64), np.arange(len(X))
    best = best_penalty(dense_source(X[None]), design, n_layers=1, train=every, lambdas=lambdas)[0]
    std = X.std(axis=0)
    scale = np.divide(1, std, out=np.zeros_like(std), where=std > 1e-6 * std.mean())
    scale /= np.sqrt(max((scale > 0).sum(), 1))
    Z = (X - X.mean(axis=0)) * scale
    fit = logistic(make_space(Z, Z[:0]), design.Y, np.asarray(lambdas)[best][:, None])
    return fit.weights(Z) * scale
