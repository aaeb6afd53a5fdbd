"""Exact L2-penalised logistic and ridge classifiers, many at once.

    minimise over w, b   sum_i loss(y_i, f_i) + lam/2 |w|^2,    f_i = w.x_i + b,    loss: logistic, or (y - f)^2 / 2

Where texts are fewer than features (`Dual`), w = X'c and everything needs inner products K = X X' only: the cost does
not grow with d_model. Otherwise (`Primal`) c is w itself. Contrasts, penalties and permutations are columns of one
problem. Newton's equations for w are solved by conjugate gradients: one product with K, or two with X, a step, and no
factorisation. The steps are computed in single precision, since the next step mends what rounding spoils; gradients,
scores and coefficients stay in the precision of the data. Where single precision stops helping, double takes over.
Columns that are done leave the iteration, so easy penalties cost nothing while hard ones go on.

A convex function's slope at the end of a step says whether the step went too far, so the line search needs no
function values. Preconditioning with the bound K/4 + lam of Boehning (1992) was tried: it halves the steps and doubles
their cost. Labels are [column, row]; coefficients [..., column, row or feature]; batches (layers) come first.
"""

from dataclasses import dataclass, replace

import numpy as np

MAX_NEWTON, MAX_CG, MAX_HALVINGS = 100, 2000, 40
CROWDED = 0.75  # columns are moved together when no more than this share is still at work
FLOOR = 1e-30  # of the curvature, where every label is certain


def _dot(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.vecdot(u, v)[..., None]


@dataclass(frozen=True)
class Form:
    """Training rows `inner` and texts to score `outer`, as inner products or as features."""

    inner: np.ndarray
    outer: np.ndarray

    def to(self, dtype: type) -> "Form":
        """The training rows in another precision."""
        return replace(self, inner=self.inner.astype(dtype, copy=False), outer=self.outer[..., :0, :])

    @property
    def size(self) -> np.ndarray:
        """Root mean squared norm [..., 1, 1] of the training rows."""
        return np.sqrt(self.squares.mean(axis=-1))[..., None, None]

    def scores(self, c: np.ndarray) -> np.ndarray:
        """Scores [..., column, text] of the texts to score, without intercept."""
        return c @ self.outer.swapaxes(-1, -2)


@dataclass(frozen=True)
class Dual(Form):
    """`inner` [..., row, row], `outer` [..., text, row]; `full`: K is known to have no null space but the mean's."""

    full: bool = False

    @property
    def squares(self) -> np.ndarray:
        return np.diagonal(self.inner, axis1=-2, axis2=-1)

    def image(self, c: np.ndarray) -> np.ndarray:
        """Scores of the training rows, without intercept, for coefficients c."""
        return c @ self.inner

    def pull(self, rows: np.ndarray) -> np.ndarray:
        """Coefficients of the sum of training rows weighted by `rows`."""
        return rows

    def product(self, c: np.ndarray, e: np.ndarray, image_e: np.ndarray) -> np.ndarray:
        """Inner product of the weights that c and e stand for."""
        return _dot(c, image_e)


@dataclass(frozen=True)
class Primal(Form):
    """`inner` [..., row, feature], `outer` [..., text, feature]."""

    full: bool = True

    @property
    def squares(self) -> np.ndarray:
        return np.vecdot(self.inner, self.inner)

    def image(self, c: np.ndarray) -> np.ndarray:
        return c @ self.inner.swapaxes(-1, -2)

    def pull(self, rows: np.ndarray) -> np.ndarray:
        return rows @ self.inner

    def product(self, c: np.ndarray, e: np.ndarray, image_e: np.ndarray) -> np.ndarray:
        return _dot(c, e)


Space = Dual | Primal


def make_space(train: np.ndarray, texts: np.ndarray) -> Space:
    """The cheaper form for training features [..., row, d] and features to score [..., text, d]."""
    if train.shape[-2] > train.shape[-1]:
        return Primal(inner=train, outer=texts)
    other = train.swapaxes(-1, -2)
    return Dual(inner=train @ other, outer=texts @ other, full=True)


@dataclass(frozen=True)
class Fit:
    """Coefficients c [..., column, row or feature] and intercepts b [..., column, 1]."""

    space: Space
    c: np.ndarray
    b: np.ndarray

    def scores(self) -> np.ndarray:
        """Decision values [..., column, text] of the space's texts."""
        return self.space.scores(self.c) + self.b

    def weights(self, train: np.ndarray) -> np.ndarray:
        """Weights [..., column, d], given the training features [..., row, d]."""
        return self.c @ train if isinstance(self.space, Dual) else self.c


def logistic(space: Space, Y: np.ndarray, lam: float | np.ndarray, *, tol: float = 1e-6) -> Fit:
    """Logistic classifiers, one for every column of labels Y [column, row]: +1, -1, or 0 for a row left out.

    `lam` is scikit-learn's 1/C, a number or [column, 1]. Stops when the gradient's component along any training row
    (of root mean squared norm) and in b are at most `tol`.
    """
    dtype, size = space.inner.dtype, space.size
    work, last = space.to(np.float32 if space.full else np.float64), np.inf
    member, target = (Y != 0).astype(dtype), (Y > 0).astype(dtype)
    f = np.zeros((*space.inner.shape[:-2], *Y.shape), dtype)
    c, b = np.zeros_like(space.pull(f)), np.zeros((*f.shape[:-1], 1), dtype)
    g, D = _gradient(f, target, member)
    for _ in range(MAX_NEWTON):
        off, total = g.sum(-1, keepdims=True), D.sum(-1, keepdims=True)
        share = D / total
        r = space.pull(g - share * off) - lam * c
        image = space.image(r)
        left = np.maximum(abs(image / np.where(size > 0, size, 1)).max(-1, keepdims=True), abs(off))
        worst = left.max()
        if worst <= tol:
            break
        if worst > last / 2 and work.inner.dtype == np.float32:
            work = space.to(np.float64)
        last = worst
        e = _solve(work, D, share, r, image, lam, accuracy=np.minimum(0.3, left), tol=tol).astype(dtype)
        image = space.image(e)
        db = off / total - _dot(share, image)
        c, b, f, g, D = _line_search(space, e, image, db, c, b, f, g, lam, target, member)
    return Fit(space, c, b)


def ridge(space: Space, Y: np.ndarray, lam: float | np.ndarray, *, tol: float = 1e-8) -> Fit:
    """Ridge regression on the labels Y, arguments as in `logistic`; `lam` is scikit-learn's alpha. One linear system."""
    dtype = space.inner.dtype
    y = np.broadcast_to(Y.astype(dtype), (*space.inner.shape[:-2], *Y.shape))
    D = np.broadcast_to((Y != 0).astype(dtype), y.shape)
    share = D / D.sum(-1, keepdims=True)
    r = space.pull(y - share * y.sum(-1, keepdims=True))
    c = _solve(space, D, share, r, space.image(r), lam, accuracy=np.zeros(1), tol=tol)
    return Fit(space, c, _dot(share, y) - _dot(share, space.image(c)))


def _gradient(f: np.ndarray, target: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label minus probability, and the curvature p(1-p); zero in rows left out."""
    p = 1 / (1 + np.exp(-np.maximum(f, -80)))
    return member * (target - p), member * (p * (1 - p) + f.dtype.type(FLOOR))


def _line_search(space, e, image, db, c, b, f, g, lam, target, member) -> tuple:
    """The whole Newton step, or half, a quarter ... of it in columns whose slope at its end has turned up too far."""
    move, step = image + db, np.ones_like(db)
    rise = _dot(g, move) - lam * space.product(c, e, image)
    # moving no score by more than 1 changes no curvature by more than e: such a step cannot overshoot
    large = abs(move).max(axis=-1, keepdims=True) > 1
    for _ in range(MAX_HALVINGS):
        f_new, c_new = f + step * move, c + step * e
        g, D = _gradient(f_new, target, member)
        slope = _dot(g, move) - lam * space.product(c_new, e, image)
        far = large & (slope < -0.5 * rise)
        if not far.any():
            break
        step = np.where(far, step / 2, step)
    return c_new, b + step * db, f_new, g, D


def _solve(space: Space, D, share, r, image, lam, *, accuracy: np.ndarray, tol: float) -> np.ndarray:
    """Newton's step e: pull(D image(e) - D mean) + lam e = r, where mean is that of image(e) by the weights `share`.

    Conjugate gradients in the inner product of the weights, down to `accuracy` times the first residual, or tol / 10.
    """
    dtype = space.inner.dtype
    D, share, r, image = (each.astype(dtype, copy=each is r) for each in (D, share, r, image))
    rr = np.maximum(space.product(r, r, image), 0)
    stop = np.maximum(rr * np.maximum(accuracy, 100 * np.finfo(dtype).eps) ** 2, (tol / 10 * space.size) ** 2)
    lam = np.broadcast_to(np.asarray(lam, dtype), rr.shape)
    found, columns = np.zeros_like(r), np.arange(r.shape[-2])
    e, p, Fp = np.zeros_like(r), r.copy(), image.copy()
    for _ in range(MAX_CG):
        v = Fp - _dot(share, Fp)
        v *= D
        curve = _dot(Fp, v) + lam * space.product(p, p, Fp)
        active = (rr > stop) & (curve > 0)
        at_work = active.reshape(-1, active.shape[-2]).any(axis=0)
        if not at_work.any():
            break
        if at_work.mean() <= CROWDED:
            found[..., columns, :], columns = e, columns[at_work]
            D, share, lam, stop, rr, e, r, p, Fp, v, curve, active = (
                each[..., at_work, :] for each in (D, share, lam, stop, rr, e, r, p, Fp, v, curve, active))
        q = space.pull(v) + p * lam
        step = np.divide(rr, curve, out=np.zeros_like(rr), where=active)
        e += p * step
        r -= q * step
        Fr = space.image(r)
        rr, old = np.maximum(space.product(r, r, Fr), 0), rr
        beta = np.divide(rr, old, out=np.zeros_like(rr), where=active)
        p *= beta
        p += r
        Fp *= beta
        Fp += Fr
    found[..., columns, :] = e
    return found
