"""Synthetic activations with known truth: the nulls N0 and N1, and planted two-factor structures.

A text's activation is `scenario + class offset + noise`. N0: no offsets. N1: every class has an independent random
offset, drawn like a scenario's own deviation and `TAU` times as large: a topic-like difference with no structure.
Planted: offsets of chosen angle and reliability. The same code serves the tests and, with the noise of a real study,
says how often a literal criterion would pass there on either null.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.stats.triplets import LABELS
from lib.stats.whitening import principal_axes

TAU = 0.5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Noise standard deviations `noise` [r] along r axes, and `scenario` [m, r] whose Gram matrix is the covariance
    of scenario means in the same axes."""

    noise: np.ndarray
    scenario: np.ndarray

    def scenarios(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """`n` independent scenario deviations [n, r]."""
        return rng.standard_normal((n, len(self.scenario)), dtype=np.float32) @ self.scenario


def power_law(d_model: int, *, decay: float = 0.0, scenario_scale: float = 1.0) -> Spread:
    """Variances k^−decay along `d_model` axes, total variance d_model; scenarios vary alike, `scenario_scale` times."""
    variance = np.arange(1, d_model + 1.0) ** -decay
    noise = np.sqrt(variance * d_model / variance.sum()).astype(np.float32)
    return Spread(noise=noise, scenario=np.diag(noise * np.float32(scenario_scale)))


def spread_of(noise: np.ndarray, scenario_means: np.ndarray) -> Spread:
    """The spread of a study, in the axes of its own noise: noise rows [m, d], scenario means [S, d]."""
    deviations = scenario_means - scenario_means.mean(0)
    axes, variances = principal_axes(noise)
    outside = deviations - (deviations @ axes.T) @ axes
    # scenarios may leave the span of the noise where d_model is larger than the number of texts
    if (outside**2).sum() > 1e-6 * (deviations**2).sum():
        more, _ = principal_axes(outside)
        axes, variances = np.vstack([axes, more]), np.concatenate([variances, np.zeros(len(more))])
    factor = deviations @ axes.T / np.sqrt(len(deviations) - 1)
    return Spread(noise=np.sqrt(variances).astype(np.float32), scenario=factor.astype(np.float32))


def draw(n_scenarios: int, offsets: np.ndarray, *, spread: Spread, rng: np.random.Generator) -> np.ndarray:
    """Activations [S, K, r] of `n_scenarios` with K texts each, class offsets [K, r]."""
    values = rng.standard_normal((n_scenarios, *offsets.shape), dtype=np.float32)
    values *= spread.noise
    values += offsets.astype(np.float32)
    values += spread.scenarios(n_scenarios, rng)[:, None]
    return values


def null_offsets(null: str, n_classes: int, *, spread: Spread, rng: np.random.Generator) -> np.ndarray:
    """Class offsets [K, r] of the null `N0` (zero) or `N1` (independent, `TAU` of the scenario spread)."""
    return spread.scenarios(n_classes, rng) * (TAU if null == "N1" else 0.0)


def null_values(statistic: Callable, make: Callable, *, n_draws: int, seed: int) -> dict[str, list]:
    """`statistic(make(null, rng))` for `n_draws` draws of each null."""
    return {null: [statistic(make(null, np.random.default_rng([seed, i, k]))) for k in range(n_draws)]
            for i, null in enumerate(("N0", "N1"))}


def two_factor(rho: float, *, reliability: float, n_scenarios: int, spread: Spread,
               rng: np.random.Generator) -> np.ndarray:
    """Offsets [6, r] of C, A, I and three neutral labels: C and A at cosine `rho` from the neutral mean, I orthogonal.

    The length is such that U(c, c) / ‖c̄‖² is `reliability`: noise of `c = x_C − v̄` is 4/3 of a text's.
    """
    basis = np.linalg.qr(rng.standard_normal((len(spread.noise), 3)))[0].T
    noise = (spread.noise.astype(float) ** 2).sum() * 4 / 3 / n_scenarios
    length = np.sqrt(noise * reliability / (1 - reliability))
    c, other, i = length * basis
    return np.vstack([c, rho * c + np.sqrt(1 - rho**2) * other, i, np.zeros((3, len(c)))])


def as_texts(blocks: dict[tuple[str, str], np.ndarray], *, cluster_size: int = 1) -> tuple[np.ndarray, pd.DataFrame]:
    """Activation rows [text, d] and text table of `blocks`: (condition, register) → [S, 3, d].

    Conditions share scenario ids by position, except non_empathy, whose scenarios are its own.
    """
    tables = []
    for (condition, register), values in blocks.items():
        own = condition == "non_empathy"
        scenario = np.repeat(np.arange(len(values)), 3)
        tables.append(pd.DataFrame({
            "scenario_id": [f"{'n' if own else 's'}{s:04d}" for s in scenario],
            "cluster": scenario // cluster_size + (100_000 if own else 0),
            "condition": condition, "register": register, "label": LABELS[condition] * len(values)}))
    X = np.concatenate([values.reshape(-1, values.shape[-1]) for values in blocks.values()])
    return X, pd.concat(tables, ignore_index=True)
