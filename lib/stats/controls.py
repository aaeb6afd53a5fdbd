"""What a probe's score must be read against: a control task, its learning curve, the literal form on two nulls, and the
transfer that registers with unrelated class offsets reach by chance."""

from dataclasses import replace

import numpy as np
import pandas as pd

from lib.stats.auroc import auroc, jackknife_interval
from lib.stats.contrasts import Design, areas
from lib.stats.crossfit import LAMBDAS, dense_source, grid_scores, out_of_fold
from lib.stats.endpoint import NAMES, Material, evaluate, with_macro
from lib.stats.folds import grouped_folds
from lib.stats.simulate import TAU

TOL = 1e-4
STEP = 15  # clusters between two points of the learning curve
N_OFFSETS, OFFSETS_TOGETHER = 199, 32  # draws of N1, and how many are in memory at a time


def subset(design: Design, rows: np.ndarray, *, seed: int) -> Design:
    """The design of some rows, clusters numbered anew, one repeat of fresh folds."""
    cluster = np.unique(design.cluster[rows], return_inverse=True)[1]
    folds = grouped_folds(cluster, n_folds=design.n_folds, n_repeats=1, seed=seed)
    return replace(design, Y=design.Y[:, rows], register=design.register[rows], cluster=cluster, folds=folds)


def complete(design: Design) -> bool:
    """Whether every contrast has both classes in every register."""
    return all({-1, 1} <= set(y[design.register == r]) for r in range(len(design.registers)) for y in design.Y)


def learning_curve(X: np.ndarray, design: Design, *, seed: int, n_draws: int = 4) -> pd.DataFrame:
    """Endpoint of random subsets of clusters: n, contrast, T, ci_low, ci_high, ci_width, means over draws.

    X [text, d] of one layer; n = 15, 30, ... clusters, then all.
    """
    rng, rows, total = np.random.default_rng(seed), [], design.n_clusters
    for n in [*range(STEP, total, STEP), total]:
        found = []
        for _ in range(n_draws if n < total else 1):
            chosen = np.flatnonzero(np.isin(design.cluster, rng.permutation(total)[:n]))
            part = subset(design, chosen, seed=seed)
            if complete(part):
                T = evaluate(out_of_fold(dense_source(X[None, chosen]), part, n_layers=1, tol=TOL), part)["transfer"]
                found.append((T.value[0], *(end[0] for end in jackknife_interval(T.value, T.deleted))))
        if found:
            T, low, high = np.mean(found, axis=0)
            rows += zip([n] * len(NAMES), NAMES, T, low, high, high - low, strict=True)
    return pd.DataFrame(rows, columns=["n", "contrast", "T", "ci_low", "ci_high", "ci_width"])


def selectivity(X: np.ndarray, design: Design, T: np.ndarray, *, seed: int, n_draws: int = 10) -> pd.DataFrame:
    """T [7 contrasts] beside probes of X [text, d] for labels that are random per cluster (Hewitt and Liang 2019).

    control_held_out: on clusters unseen in training, where .5 is the only honest answer. control_memorised: on the
    other register of the training clusters, with the penalty that memorises best; missing in one register.
    """
    rng = np.random.default_rng(seed)
    sign = np.argsort(rng.random((n_draws, design.n_clusters)), axis=1) % 2 * 2 - 1
    task = replace(design, contrasts=tuple(map(str, range(n_draws))), Y=sign[:, design.cluster], folds=design.folds[:1])
    source = dense_source(X[None])
    scores = out_of_fold(source, task, n_layers=1, tol=TOL)
    held_out = np.mean([areas(scores, task, d).value for d in task.directions])
    memorised = []
    for a, b in task.directions if len(task.registers) > 1 else []:
        train, test = np.flatnonzero(task.register == a), np.flatnonzero(task.register == b)
        found = grid_scores(source(train, test, slice(None)), task.Y[:, train], lambdas=LAMBDAS, solver="logistic", tol=TOL)
        memorised.append(auroc(found[:, 0], task.Y[:, test] > 0).mean(axis=1).max())
    seen = min(memorised, default=np.nan)
    return pd.DataFrame({"contrast": NAMES, "T": T, "control_held_out": held_out, "control_memorised": seen, "selectivity": T - seen})


def unrelated_offsets(X: np.ndarray, material: Material, *, seed: int, n_draws: int = N_OFFSETS) -> np.ndarray:
    """T [draw, 7 contrasts] where the classes of each register have offsets of their own (N1), as large as those seen.

    Two registers that share nothing agree by chance, the more so the fewer effective dimensions X [text, d] has, and no
    exchange of labels within triplets shows that: the labels are right, only the offsets are unrelated. Offsets are
    drawn like a scenario mean's deviation.
    """
    rng, design = np.random.default_rng(seed), material.design
    X = X - X.mean(axis=0)
    means = pd.DataFrame(X).groupby(design.cluster).mean().to_numpy(X.dtype)
    deviations = (means - means.mean(axis=0)) / np.sqrt(len(means) - 1).astype(X.dtype)
    cell = design.register * (material.classes.max() + 1) + material.classes
    own = pd.DataFrame(X).groupby(cell).mean().to_numpy(X.dtype).reshape(len(design.registers), -1, X.shape[1])
    bare, own = X - own.reshape(-1, X.shape[1])[cell], own - own.mean(axis=1, keepdims=True)
    found = []
    for start in range(0, n_draws, OFFSETS_TOGETHER):
        size = (min(OFFSETS_TOGETHER, n_draws - start), *own.shape[:2], len(means))
        offsets = rng.standard_normal(size, dtype=np.float32).astype(X.dtype) @ deviations
        offsets -= offsets.mean(axis=2, keepdims=True)
        length = np.linalg.norm(offsets, axis=(2, 3), keepdims=True)
        offsets *= np.linalg.norm(own, axis=(1, 2))[:, None, None] / np.where(length > 0, length, 1)
        data = bare + offsets.reshape(len(offsets), -1, X.shape[1])[:, cell]
        scores = out_of_fold(dense_source(data), replace(design, folds=design.folds[:1]), n_layers=len(data), lambdas=(1.0,), solver="ridge", tol=TOL)
        by_direction = [[auroc(scores[:, 0, a, c, rows], design.Y[c, rows] > 0) for c in range(len(design.contrasts)) for rows in [design.rows(b, c)]]
                        for a, b in design.directions]
        found.append(np.min([with_macro(np.stack(areas_), axis=0) for areas_ in by_direction], axis=0).T)
    return np.concatenate(found)


def literal_rates(X: np.ndarray, material: Material, *, seed: int, n_draws: int = 40) -> dict[str, np.ndarray]:
    """Share [7 contrasts] of draws of N0 and N1 on which the literal reading passes: interval of the AUROC above .5.

    Within the first register, X [text, d]: N0 lets a triplet's texts change classes; N1 adds to that an independent
    offset for each class, drawn like a scenario mean's deviation and TAU times as large.
    """
    rng, keep = np.random.default_rng(seed), np.flatnonzero(material.design.register == 0)
    part = replace(subset(material.design, keep, seed=seed), registers=material.design.registers[:1])
    X, classes, triplet = X[keep], material.classes[keep], material.triplet[keep]
    means = pd.DataFrame(X).groupby(part.cluster).mean().to_numpy(X.dtype)
    deviations = (means - means.mean(axis=0)) / np.sqrt(len(means) - 1).astype(X.dtype)
    null = np.empty((n_draws, *X.shape), X.dtype)
    for each in null:
        each[np.lexsort((classes, triplet))] = X[np.lexsort((rng.random(len(X)), triplet))]
    offsets = X.dtype.type(TAU) * rng.standard_normal((n_draws, classes.max() + 1, len(means))).astype(X.dtype) @ deviations
    rates = {}
    for name, data in (("N0", null), ("N1", null + offsets[:, classes])):
        scores = out_of_fold(dense_source(data), part, n_layers=n_draws, lambdas=(1.0,), tol=TOL)
        found = areas(scores, part, (0, 0))
        low, _ = jackknife_interval(with_macro(found.value, axis=1), with_macro(found.deleted, axis=1))
        rates[name] = (low > 0.5).mean(axis=0)
    return rates
