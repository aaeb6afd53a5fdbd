"""The metric of noise: the Ledoit-Wolf precision of within-class, within-scenario residuals.

Distances in units of how much responses of one class to one scenario would vary, so that a direction in which all
texts vary a lot (a nuisance shared by the classes) counts for little. Residual of a text = what is left after its
scenario's mean and its class's mean are taken out. Covariance: (1 − δ) S + δ μ I with δ of Ledoit & Wolf (2004);
only the span of the residuals is ever decomposed, so the cost is min(n, d_model)³ whatever the width.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import helmert

from lib.errors import BadInput
from lib.stats.ustat import CrossFitted

N_FOLDS = 10
SHRINKAGE_MIN = 1e-6  # copies of one feature make a covariance singular even where δ is 0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """An inverse covariance: `weights` [r] along orthonormal `axes` [r, d_model], `rest` in all other directions."""

    axes: np.ndarray
    weights: np.ndarray
    rest: float
    shrinkage: float

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """`rows @ M` for rows [n, d_model]."""
        return self.rest * rows + ((rows @ self.axes.T) * (self.weights - self.rest)) @ self.axes


def contrasts(values: np.ndarray) -> np.ndarray:
    """Orthonormal contrasts [S, K − 1, d_model] within each scenario of `values` [S, K, d_model]: its mean is out."""
    return np.einsum("jk,skd->sjd", helmert(values.shape[1]), values)


def residuals(values: np.ndarray) -> np.ndarray:
    """Noise rows [S (K − 1), d_model] of complete blocks `values` [S, K, d_model], each with one text's covariance.

    Contrasts within the scenario take out its mean, centring over scenarios takes out the class means.
    """
    within = contrasts(values)
    scale = np.sqrt(len(values) / (len(values) - 1))
    return ((within - within.mean(0)) * scale).reshape(-1, values.shape[2])


def exchangeable(values: np.ndarray) -> Precision:
    """Precision of all variation within scenarios, class effects included: the same for every order of the labels.

    A permutation test needs this one; the metric of the noise alone knows which labels were the real ones.
    """
    return ledoit_wolf(contrasts(values).reshape(-1, values.shape[2]))


def principal_axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal axes [r, d] of `rows` [n, d] (not centred) and the mean squares [r] along them, largest first."""
    n, d_model = rows.shape
    small = rows @ rows.T if n < d_model else rows.T @ rows
    values, vectors = np.linalg.eigh(small)
    keep = values > values[-1] * 1e-12
    values, vectors = values[keep][::-1], vectors[:, keep][:, ::-1]
    axes = (vectors.T @ rows) / np.sqrt(values)[:, None] if n < d_model else vectors.T
    return axes, values / n


def ledoit_wolf(rows: np.ndarray) -> Precision:
    """Precision of centred `rows` [n, d_model]. Raises BadInput where they do not vary."""
    n, d_model = rows.shape
    axes, variances = principal_axes(rows) if rows.any() else (rows[:0], np.zeros(0))
    if not len(variances):
        raise BadInput("activations: no variation within class and scenario, so there is no noise to compare with")
    mean = variances.sum() / d_model
    # δ needs only ‖S‖² and Σ‖x‖⁴, both at hand without a d × d matrix
    distance = (variances**2).sum() - d_model * mean**2
    spread = (((rows**2).sum(1) ** 2).mean() - (variances**2).sum()) / n
    shrinkage = float(np.clip(spread / distance, SHRINKAGE_MIN, 1)) if distance > 0 else 1.0
    floor = shrinkage * mean
    return Precision(axes=axes, weights=1 / ((1 - shrinkage) * variances + floor), rest=1 / floor, shrinkage=shrinkage)


def cross_fitted(blocks: list[tuple[np.ndarray, np.ndarray]], *, n_clusters: int) -> CrossFitted:
    """The metric of noise without each fold of clusters; `blocks` are (values [S, K, d_model], cluster codes [S])."""
    folds = np.arange(n_clusters) % N_FOLDS
    return CrossFitted(folds=folds, maps=tuple(
        ledoit_wolf(np.concatenate([residuals(values[folds[codes] != f]) for values, codes in blocks]))
        for f in range(N_FOLDS)))
