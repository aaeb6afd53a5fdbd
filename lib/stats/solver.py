"""Exact L2-penalised logistic and ridge classifiers, many at once.

    minimise over w, b   sum_i loss(y_i, f_i) + lam/2 |w|^2,    f_i = w.x_i + b,    loss: logistic, or (y - f)^2 / 2

With w = X'alpha every quantity needs inner products K = X X' only, so the cost grows with the number of texts and not
with d_model; contrasts, penalties and permutations are rows of one problem. Newton's equations for w are solved by
conjugate gradients in the inner product of K: one product with K a step, no factorisation. Where there are many more
texts than features, K v is computed as X (X'v) and never formed: the same iterates at the cost of the primal.

A convex function's slope at the end of a step says whether the step went too far, so the line search needs no
function values. Preconditioning with the bound K/4 + lam of Boehning (1992) was tried: it halves the steps and doubles
their cost. Labels are [column, row], as are coefficients; batches (layers) come first.
"""

from dataclasses import dataclass

import numpy as np

MAX_NEWTON, MAX_CG, MAX_HALVINGS = 100, 2000, 40
TINY = 1e-30


@dataclass(frozen=True)
class Dual:
    """Training rows as inner products: `inner` [..., row, row], and `outer` [..., text, row] of the texts to score."""

    inner: np.ndarray
    outer: np.ndarray

    def times(self, v: np.ndarray) -> np.ndarray:
        return v @ self.inner

    def scores(self, alpha: np.ndarray) -> np.ndarray:
        return alpha @ self.outer.swapaxes(-1, -2)


@dataclass(frozen=True)
class Primal:
    """Training rows as features: `inner` [..., row, d], and `outer` [..., text, d] of the texts to score."""

    inner: np.ndarray
    outer: np.ndarray

    def times(self, v: np.ndarray) -> np.ndarray:
        return v @ self.inner @ self.inner.swapaxes(-1, -2)

    def scores(self, alpha: np.ndarray) -> np.ndarray:
        return alpha @ self.inner @ self.outer.swapaxes(-1, -2)


Space = Dual | Primal


def make_space(train: np.ndarray, texts: np.ndarray) -> Space:
    """The cheaper form for training features [..., row, d] and features to score [..., text, d]."""
    if train.shape[-2] > 2 * train.shape[-1]:
        return Primal(train, texts)
    other = train.swapaxes(-1, -2)
    return Dual(train @ other, texts @ other)


@dataclass(frozen=True)
class Fit:
    """Dual coefficients alpha [..., column, row] and intercepts b [..., column, 1]."""

    space: Space
    alpha: np.ndarray
    b: np.ndarray

    def scores(self) -> np.ndarray:
        """Decision values [..., column, text] of the space's texts."""
        return self.space.scores(self.alpha) + self.b


def logistic(space: Space, Y: np.ndarray, lam: float | np.ndarray, *, tol: float = 1e-6) -> Fit:
    """Logistic classifiers, one for every column of labels Y [column, row]: +1, -1, or 0 for a row left out.

    `lam` is scikit-learn's 1/C, a number or [column, 1]. Stops when the gradient's norm in w and its component in b
    are at most `tol`.
    """
    dtype = space.inner.dtype
    member, target = (Y != 0).astype(dtype), (Y > 0).astype(dtype)
    shape = (*space.inner.shape[:-2], *Y.shape)
    alpha, f, b = np.zeros(shape, dtype), np.zeros(shape, dtype), np.zeros((*shape[:-1], 1), dtype)
    g, D = _gradient(f, target, member)
    for _ in range(MAX_NEWTON):
        residual = g - lam * alpha
        K_residual = space.times(residual)
        off = g.sum(-1, keepdims=True)
        worst = max(np.sqrt(np.maximum(_dot(residual, K_residual), 0)).max(), abs(off).max())
        if worst <= tol:
            break
        a, Ka, db = _newton_step(space, D, off, residual, lam, accuracy=min(0.3, worst**0.5), tol=tol)
        rise, step = _dot(residual, Ka) + off * db, np.ones_like(db)
        # moving no score by more than 1 changes no curvature by more than e: such a step cannot overshoot
        large = abs(Ka + db).max(axis=-1, keepdims=True) > 1
        for _ in range(MAX_HALVINGS):
            f_new, alpha_new = f + step * (Ka + db), alpha + step * a
            g, D = _gradient(f_new, target, member)
            slope = _dot(g - lam * alpha_new, Ka) + g.sum(-1, keepdims=True) * db
            far = large & (slope < -0.5 * rise)
            if not far.any():
                break
            step = np.where(far, step / 2, step)
        alpha, b, f = alpha_new, b + step * db, f_new
    return Fit(space, alpha, b)


def ridge(space: Space, Y: np.ndarray, lam: float | np.ndarray, *, tol: float = 1e-8) -> Fit:
    """Ridge regression on the labels Y, arguments as in `logistic`; `lam` is scikit-learn's alpha. One Newton step."""
    shape = (*space.inner.shape[:-2], *Y.shape)
    y = np.broadcast_to(Y.astype(space.inner.dtype), shape)
    member = np.broadcast_to((Y != 0).astype(y.dtype), shape)
    alpha, _, b = _newton_step(space, member, y.sum(-1, keepdims=True), y, lam, accuracy=0, tol=tol)
    return Fit(space, alpha, b)


def _dot(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.vecdot(u, v)[..., None]


def _gradient(f: np.ndarray, target: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label minus probability, and the curvature p(1-p); zero in rows left out."""
    p = 1 / (1 + np.exp(-np.maximum(f, -80)))
    return member * (target - p), member * (p * (1 - p) + f.dtype.type(TINY))


def _newton_step(space: Space, D, off, residual, lam, *, accuracy: float, tol: float) -> tuple:
    """Steps of alpha, of K alpha and of b: CG down to `accuracy` times the first residual, or to tol / 10.

    Without the intercept the equations read (D - d d'/sum d) K a + lam a = residual - d off / sum d = r0. The step a
    itself is never accumulated: it follows from the last residual.
    """
    share = D / D.sum(-1, keepdims=True)
    r0 = residual - share * off
    r, Kr = r0.copy(), space.times(r0)
    p, Kp = r0.copy(), Kr.copy()
    Ka, q, work = np.zeros_like(r), np.empty_like(r), np.empty_like(r)
    rr = np.maximum(_dot(r, Kr), 0)
    stop = np.maximum(rr * accuracy**2, (tol / 10) ** 2)
    for _ in range(MAX_CG):
        np.subtract(Kp, _dot(share, Kp), out=q)
        q *= D
        q += np.multiply(p, lam, out=work)
        pq = _dot(Kp, q)
        active = (rr > stop) & (pq > 0)
        if not active.any():
            break
        step = np.divide(rr, pq, out=np.zeros_like(rr), where=active)
        Ka += np.multiply(Kp, step, out=work)
        r -= np.multiply(q, step, out=work)
        Kr = space.times(r)
        rr, old = np.maximum(_dot(r, Kr), 0), rr
        beta = np.divide(rr, old, out=np.zeros_like(rr), where=active)
        p *= beta
        p += r
        Kp *= beta
        Kp += Kr
    centre = _dot(share, Ka)
    a = (r0 - r - D * (Ka - centre)) / lam
    return a, Ka, off / D.sum(-1, keepdims=True) - centre
