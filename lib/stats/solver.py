"""Exact L2-penalised logistic and ridge classifiers, many at once.

    minimise over w, b   sum_i loss(y_i, f_i) + lam/2 |w|^2,    f_i = w.x_i + b,    loss: logistic, or (y - f)^2 / 2

In dual form w = X'alpha and f = K alpha + b with the Gram matrix K = X X', so the cost grows with the number of texts
and not with d_model, and labels, penalties and permutations are columns of one problem. Newton's equations for w are
solved by conjugate gradients in the inner product of K: one product with K a step, no factorisation, no rounding of
small probabilities. In one dimension a convex function's slope at the end of a step says whether it went too far, so
the line search needs no function values. `primal` gives the same numbers where there are more texts than features.
"""

from dataclasses import dataclass

import numpy as np

MAX_NEWTON, MAX_CG = 100, 1000
TINY = 1e-30


@dataclass(frozen=True)
class Fit:
    """Dual coefficients alpha [..., row, column] and intercepts b [..., 1, column]; scores are `K @ alpha + b`."""

    alpha: np.ndarray
    b: np.ndarray

    def scores(self, K: np.ndarray) -> np.ndarray:
        """Decision values [..., text, column] from inner products K [..., text, row] with the training rows."""
        return K @ self.alpha + self.b


def logistic(K: np.ndarray, Y: np.ndarray, lam: np.ndarray | float, *, tol: float = 1e-6, start: Fit | None = None) -> Fit:
    """Logistic classifiers for every column of Y on Gram matrices K.

    K [..., row, row]; Y [row, column] of +1, -1, or 0 where a row is no part of that column; `lam` [column] or one
    number (scikit-learn's 1/C). Stops when the gradient's norm in w and its component in b are at most `tol`.
    """
    member, target = (Y != 0).astype(K.dtype), (Y > 0).astype(K.dtype)
    shape = (*K.shape[:-1], Y.shape[-1])
    if start is None:
        alpha, b, f = np.zeros(shape, K.dtype), np.zeros((*shape[:-2], 1, shape[-1]), K.dtype), np.zeros(shape, K.dtype)
    else:
        alpha, b, f = start.alpha, start.b, start.scores(K)
    g, D = _gradient(f, target, member)
    for _ in range(MAX_NEWTON):
        residual = g - lam * alpha
        K_residual = K @ residual
        worst = max(np.sqrt(np.maximum(_dot(residual, K_residual), 0)).max(), abs(_sum(g)).max())
        if worst <= tol:
            break
        a, Ka, db = _newton_step(K, D, g, residual, K_residual, lam, accuracy=min(0.3, worst**0.5), tol=tol)
        alpha, b, f, g, D = _line_search(a, Ka, db, alpha, b, f, g, residual, lam, target, member)
    return Fit(alpha, b)


def ridge(K: np.ndarray, Y: np.ndarray, lam: np.ndarray | float, *, tol: float = 1e-10) -> Fit:
    """Ridge regression on labels Y, shapes as in `logistic`, `lam` as scikit-learn's alpha: one Newton step is exact."""
    member = (Y != 0).astype(K.dtype)
    g = np.broadcast_to(Y.astype(K.dtype), (*K.shape[:-1], Y.shape[-1]))
    D = np.broadcast_to(member, g.shape)
    alpha, _, b = _newton_step(K, D, g, g, K @ g, lam, accuracy=0, tol=tol)
    return Fit(alpha, b)


def _sum(v: np.ndarray) -> np.ndarray:
    return v.sum(axis=-2, keepdims=True)


def _dot(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("...ij,...ij->...j", u, v)[..., None, :]


def _gradient(f: np.ndarray, target: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label minus probability, and the curvature p(1-p), zero outside the column's problem."""
    p = 1 / (1 + np.exp(-np.clip(f, -500, 500))) if f.dtype == np.float64 else 1 / (1 + np.exp(-np.clip(f, -80, 80)))
    return member * (target - p), member * (p * (1 - p) + f.dtype.type(TINY))


def _newton_step(K, D, g, residual, K_residual, lam, *, accuracy: float, tol: float) -> tuple:
    """Step a of alpha, K a, and the step of b, by CG to a residual `accuracy` times the first (or tol/10).

    With the intercept eliminated the equations are (D - d d'/sum d) K a + lam a = residual - d sum(g)/sum(d).
    """
    total = _sum(D)
    share = D / total
    r = residual - share * _sum(g)
    Kr = K_residual if abs(_sum(g)).max() == 0 else K @ r
    p, Kp = r, Kr
    a, Ka = np.zeros_like(r), np.zeros_like(r)
    rr = np.maximum(_dot(r, Kr), 0)
    stop = np.maximum(rr * accuracy**2, (tol / 10) ** 2)
    for _ in range(MAX_CG):
        q = D * (Kp - _dot(share, Kp)) + lam * p
        pq = _dot(Kp, q)
        active = (rr > stop) & (pq > 0)
        if not active.any():
            break
        step = np.where(active, rr / np.where(active, pq, 1), 0)
        a = a + step * p
        Ka = Ka + step * Kp
        r = r - step * q
        Kr = K @ r
        rr, old = np.where(active, np.maximum(_dot(r, Kr), 0), 0), rr
        beta = rr / np.where(active, old, 1)
        p, Kp = r + beta * p, Kr + beta * Kp
    return a, Ka, _sum(g) / total - _dot(share, Ka)


def _line_search(a, Ka, db, alpha, b, f, g, residual, lam, target, member) -> tuple:
    """Halve the step of every column whose slope at its end exceeds half the slope at its start."""
    rise = _dot(residual, Ka) + _sum(g) * db
    step = np.ones_like(db)
    for _ in range(40):
        f_new, alpha_new = f + step * (Ka + db), alpha + step * a
        g_new, D_new = _gradient(f_new, target, member)
        slope = _dot(g_new - lam * alpha_new, Ka) + _sum(g_new) * db
        far = slope < -0.5 * rise - 1e-12
        if not far.any():
            break
        step = np.where(far, step / 2, step)
    return alpha_new, b + step * db, f_new, g_new, D_new
