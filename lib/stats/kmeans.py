"""k-means of many data sets at once (Lloyd 1982, seeded by k-means++, Arthur & Vassilvitskii 2007).

The gap statistic clusters the same table under hundreds of surrogates and resamplings. As one batch, an iteration is
two matrix products; row weights stand for resampled rows, so a bootstrap copies no data.
"""

import numpy as np

CACHE = 400_000  # distances held at once


def kmeans(X: np.ndarray, k: int, *, rng: np.random.Generator, weights: np.ndarray | None = None, restarts: int = 4,
           iterations: int = 30, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(labels [B, n], inertia [B], centres [B, k, p])` of data sets `X` [B or 1, n, p], the best of some restarts.

    `weights` [B, n] count rows (0 leaves a row out of the fit; it is still assigned). `start` [1, k, p] replaces the
    seeding.
    """
    X = X.astype(np.float32)
    n_sets = len(X) if weights is None else len(weights)
    size = max(1, CACHE // (X.shape[1] * k * (1 if start is not None else restarts)))
    parts = []
    for first in range(0, n_sets, size):
        part = slice(first, first + size)
        parts.append(lloyd(X[part] if len(X) > 1 else X, k, weights=None if weights is None else weights[part].astype(np.float32),
                           rng=rng, restarts=restarts, iterations=iterations, start=start))
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def lloyd(X: np.ndarray, k: int, *, weights: np.ndarray | None, rng: np.random.Generator, restarts: int, iterations: int,
          start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`kmeans` of as many sets as the processor's cache holds."""
    counted = None if weights is None else weights[:, None]
    weights = np.ones(X.shape[:2], np.float32) if weights is None else weights
    n_sets, (_, n, p) = len(weights), X.shape
    squares = (X**2).sum(-1)
    if start is None:
        centres = seeding(X, squares, k, weights=weights, restarts=restarts, rng=rng)
    else:
        centres = np.broadcast_to(start[:, None], (n_sets, 1, k, p)).astype(np.float32)
    restarts = centres.shape[1]
    labels, nearest = assign(X, centres)
    for _ in range(iterations):
        chosen = (labels[:, :, None] == np.arange(k, dtype=np.int8)[:, None]).reshape(n_sets, restarts * k, n).astype(np.float32)
        if counted is not None:
            chosen *= counted
        counts = chosen.sum(-1).reshape(n_sets, restarts, k, 1)
        sums = (chosen @ X).reshape(n_sets, restarts, k, p)
        centres = np.where(counts > 0, sums / np.maximum(counts, 1e-9), centres)
        previous, (labels, nearest) = labels, assign(X, centres)
        if np.array_equal(labels, previous):
            break
    inertia = ((squares[:, None] + nearest) * weights[:, None]).sum(-1)
    best = inertia.argmin(1)
    at = np.arange(n_sets)
    return labels[at, best].astype(int), np.maximum(inertia[at, best], 1e-12), centres[at, best]


def assign(X: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre [B, R, n] and its squared distance less ‖x‖², for centres [B, R, k, p]."""
    n_sets, restarts, k, p = centres.shape
    flat = centres.reshape(n_sets, restarts * k, p)
    scores = flat @ (-2 * X).transpose(0, 2, 1)
    scores += (flat**2).sum(-1)[..., None]
    scores = scores.reshape(n_sets, restarts, k, -1)
    nearest, labels = scores[:, :, 0].copy(), np.zeros((n_sets, restarts, scores.shape[-1]), np.int8)
    for number in range(1, k):  # one pass a centre beats argmin over the middle axis by far
        np.copyto(labels, np.int8(number), where=scores[:, :, number] < nearest)
        np.minimum(nearest, scores[:, :, number], out=nearest)
    return labels, nearest


def seeding(X: np.ndarray, squares: np.ndarray, k: int, *, weights: np.ndarray, restarts: int,
            rng: np.random.Generator) -> np.ndarray:
    """Starting centres [B, R, k, p]: each next one is drawn in proportion to the squared distance to those there are."""
    n_sets, at = len(weights), np.arange(len(weights))[:, None]
    source = at if len(X) > 1 else np.zeros_like(at)
    distance = np.ones((n_sets, restarts, X.shape[1]), np.float32)
    centres = np.empty((n_sets, restarts, k, X.shape[2]), np.float32)
    for number in range(k):
        share = np.cumsum(distance * weights[:, None], axis=-1)
        draw = rng.random((n_sets, restarts, 1), np.float32) * share[..., -1:]
        row = np.minimum((share < draw).sum(-1), X.shape[1] - 1)
        centres[:, :, number] = new = X[source, row]
        away = squares[:, None] + (new**2).sum(-1)[..., None] - 2 * (new @ X.transpose(0, 2, 1))
        distance = np.maximum(np.minimum(distance, away) if number else away, 0)
    return centres
