# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark · Probe solver against scikit-learn
# How much does one Gram matrix per (layer, fold) with all labels as columns save, and does it give the same numbers?
#
# Both sides run in the same process on the same folds, features, labels and penalties, in alternating order; medians
# are shown. scikit-learn is timed on a few layers, since the whole grid would take it hours.
#
# **Reads** `activations/` where the study has been run, otherwise makes activations of the same shape.
# **Writes** nothing. **Cost**: about ten minutes, local.

# %%
import os
import time
import warnings

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import display
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, permutation_test_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.errors import BadInput
from lib.report.figures import styled
from lib.stats.auroc import auroc
from lib.stats.crossfit import dense_source, grid_scores
from lib.stats.endpoint import CLASSES, make_material
from lib.stats.nulls import permuted_labels, transfer_null
from lib.stats.solver import Dual, Primal, logistic
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study whose activations are used
n_alternations: int = 3  # times each side is timed, in alternating order
n_layers_sklearn: int = 1  # layers on which scikit-learn is timed
n_permutations: int = 2000  # permutations of our null
n_permutations_sklearn: int = 3  # permutations on which scikit-learn is timed
n_texts_max: int = 9000  # largest number of texts of the scaling figure
seed: int = 0  # seed of folds, permutations and synthetic data

# %%
LAMBDAS = (0.01, 0.1, 1.0, 10.0, 100.0)
warnings.filterwarnings("ignore", category=FutureWarning)  # scikit-learn's own renamings
print(os.cpu_count(), "cores; BLAS threads:", os.environ.get("OMP_NUM_THREADS", "all"), "; load before the start:", round(os.getloadavg()[0], 1))

# %% [markdown]
# ## Material
# 90 triplets in two registers. A falling spectrum and a shared part of each scenario make the synthetic activations as
# ill-conditioned as real ones.

# %%
def synthetic(n_layers: int, n_scenarios: int, d_model: int, rng: np.random.Generator) -> np.ndarray:
    """Activations [layer, text, d_model] with variances k^-1 along random axes, half of it shared in a scenario."""
    axes = np.linalg.qr(rng.standard_normal((d_model, d_model)))[0] * np.arange(1, d_model + 1)[:, None] ** -0.5
    shared = np.tile(np.repeat(rng.standard_normal((n_layers, n_scenarios, d_model)), 3, axis=1), (1, 2, 1))
    return ((shared + rng.standard_normal(shared.shape)) @ axes).astype(np.float32)


def table(n_scenarios: int) -> pd.DataFrame:
    rows = [(f"s{s}", s, r, c) for r in ("plain", "counter") for s in range(n_scenarios) for c in CLASSES]
    return pd.DataFrame(rows, columns=["scenario_id", "cluster", "register", "label"])


# %%
rng = np.random.default_rng(seed)
try:
    home = Study(study, "05_probe")
    texts = home.load_texts()
    keep = (texts["condition"] == "empathy").to_numpy()
    X, texts, origin = home.load_tensors("activations/resid_post.safetensors")["resid_post"][:, keep], texts[keep], study
except (BadInput, OSError, TypeError):
    X, texts, origin = synthetic(30, 90, 576, rng), table(90), "synthetic"
material = make_material(texts, seed=seed, n_repeats=1)
design, fold = material.design, material.design.folds[0]
print(origin, X.shape, X.dtype, "layer, text, d_model;", design.n_clusters, "clusters")

# %% [markdown]
# ## Probe grid
# For each layer: 5 folds × 5 penalties × 6 contrasts, trained on the plain register, gradient to 1e-10. A penalty is in
# units of the mean squared row norm, d_model for standardised features, so scikit-learn's `C` is 1 / (λ · d_model).

# %%
mine = design.register == 0
splits = [(np.flatnonzero(mine & (fold != k)), np.flatnonzero(mine & (fold == k))) for k in range(design.n_folds)]


def ours(X: np.ndarray, splits: list, Y: np.ndarray, *, dtype=np.float64, tol: float = 1e-10) -> list:
    """Scores [lambda, layer, contrast, test text] of every split."""
    source = dense_source(X.astype(dtype))
    return [grid_scores(source(train, test, slice(None)), Y[:, train], lambdas=LAMBDAS, solver="logistic", tol=tol)
            for train, test in splits]


def theirs(X: np.ndarray, splits: list, Y: np.ndarray, *, solver: str = "lbfgs", tol: float = 1e-10) -> list:
    """The same by a scikit-learn pipeline a fit."""
    out = [np.empty((len(LAMBDAS), len(X), len(Y), len(test))) for _, test in splits]
    for (train, test), scores in zip(splits, out, strict=True):
        for i, layer, c in np.ndindex(scores.shape[:3]):
            rows = train[Y[c, train] != 0]
            C = 1 / (LAMBDAS[i] * X.shape[2])
            model = make_pipeline(StandardScaler().fit(X[layer, train].astype(np.float64)), LogisticRegression(C=C, tol=tol, max_iter=100_000, solver=solver))
            model[-1].fit(model[0].transform(X[layer, rows].astype(np.float64)), Y[c, rows])
            scores[i, layer, c] = model.decision_function(X[layer, test].astype(np.float64))
    return out


def alternate(n: int, **sides) -> tuple[dict, dict]:
    """Median seconds and last output of each side, timed in turn."""
    seconds, outputs = {name: [] for name in sides}, {}
    for _ in range(n):
        for name, run in sides.items():
            start = time.perf_counter()
            outputs[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}, outputs


# %%
some = X[len(X) // 2:][:n_layers_sklearn]
seconds, outputs = alternate(n_alternations, ours=lambda: ours(some, splits, design.Y), all_layers=lambda: ours(X, splits, design.Y),
                             lbfgs=lambda: theirs(some, splits, design.Y), newton=lambda: theirs(some, splits, design.Y, solver="newton-cholesky"))

# %% [markdown]
# Agreement of out-of-fold scores and AUROCs with the more exact of scikit-learn's solvers.

# %%
def disagreement(a: list, b: list) -> dict:
    areas = [np.array([[auroc(s[:, :, c, design.Y[c, test] != 0], design.Y[c, test][design.Y[c, test] != 0] > 0) for c in range(s.shape[2])]
                       for s, (_, test) in zip(side, splits, strict=True)]) for side in (a, b)]
    return {"score": max(abs(x - y).max() for x, y in zip(a, b, strict=True)), "AUROC": abs(areas[0] - areas[1]).max()}


print("largest difference, newton-cholesky:", disagreement(outputs["ours"], outputs["newton"]))
print("largest difference, lbfgs:          ", disagreement(outputs["ours"], outputs["lbfgs"]))

# %%
def row(task: str, ours_s: float, theirs_s: float, note: str) -> dict:
    return {"task": task, "ours, s": ours_s, "scikit-learn, s": theirs_s, "ratio": theirs_s / ours_s, "note": note}


n, L = n_layers_sklearn, len(X)
results = [row("grid, per layer", seconds["ours"] / n, seconds["lbfgs"] / n, "lbfgs, its default; float64 both"),
           row("grid, per layer", seconds["ours"] / n, seconds["newton"] / n, "newton-cholesky, its fastest here; float64 both"),
           row(f"grid, {L} layers", seconds["all_layers"], seconds["lbfgs"] / n * L, f"lbfgs, from {n} layer(s)")]
display(pd.DataFrame(results).round(3))

# %% [markdown]
# ## Wide activations
# d_model 4,096, one fold, two contrasts: dual cost depends on the number of texts alone.

# %%
wide = synthetic(1, 90, 4096, rng)
two = design.Y[[0, 3]]
part = [(np.flatnonzero(np.tile(np.repeat(np.arange(90) % 5 != 0, 3), 2) & (np.arange(540) < 270)), np.flatnonzero(np.tile(np.repeat(np.arange(90) % 5 == 0, 3), 2) & (np.arange(540) < 270)))]
labels = np.tile(np.array([[1, -1, 0], [1, -1, -1]]), 180)
seconds, outputs = alternate(n_alternations, ours=lambda: ours(wide, part, labels), lbfgs=lambda: theirs(wide, part, labels))
results.append(row("d_model 4096, 1 fold, 2 contrasts", seconds["ours"], seconds["lbfgs"], "lbfgs; float64 both"))
print("largest difference of scores:", abs(outputs["ours"][0] - outputs["lbfgs"][0]).max())

# %% [markdown]
# ## Permutations at one layer
# `permutation_test_score` with the same folds and one penalty, against the multi-column solver (logistic) and against
# the ridge smoother that the study's null uses, which scores five penalties. Per permutation and contrast.

# %%
layer = X[[len(X) // 2]]
shuffled = permuted_labels(design, material.classes, material.triplet, n_permutations=n_permutations, seed=seed)


def permutation_seconds(c: int) -> float:
    """Seconds a permutation of scikit-learn, in one register and one contrast."""
    rows = np.flatnonzero(mine & (design.Y[c] != 0))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / X.shape[2], max_iter=10_000))
    start = time.perf_counter()
    permutation_test_score(model, layer[0, rows], design.Y[c, rows], groups=material.triplet[rows], cv=PredefinedSplit(fold[rows]),
                           n_permutations=n_permutations_sklearn, scoring="roc_auc", random_state=seed)
    return (time.perf_counter() - start) / (n_permutations_sklearn + 1)


def null(X: np.ndarray, solver: str, lambdas: tuple) -> np.ndarray:
    return transfer_null(dense_source(X), design, shuffled, n_layers=len(X), lambdas=lambdas, solver=solver)


# %%
seconds, outputs = alternate(n_alternations, sklearn=lambda: np.mean([permutation_seconds(c) for c in range(len(design.Y))]),
                             ridge=lambda: null(layer, "ridge", LAMBDAS))
start = time.perf_counter()
by_logistic = null(layer, "logistic", (1.0,))
logistic_s = time.perf_counter() - start
per_fit = outputs["sklearn"] * 2 * len(design.Y) * n_permutations  # two directions
results += [row(f"{n_permutations} permutations × {len(design.Y)} contrasts × 2 directions, logistic, 1 λ", logistic_s, per_fit, "float32; from a few permutations"),
            row(f"the same, ridge, {len(LAMBDAS)} λ", seconds["ridge"], per_fit * len(LAMBDAS), "float32; from a few permutations")]
print("97.5% quantile of T, λ = 1: ridge", np.quantile(outputs["ridge"][0, 2], 0.975, axis=-1).round(3), "logistic", np.quantile(by_logistic[0, 0], 0.975, axis=-1).round(3))

# %%
start = time.perf_counter()
null(X, "ridge", LAMBDAS)
whole = time.perf_counter() - start
print(f"whole null: {len(X)} layers × {len(LAMBDAS)} penalties × {len(design.Y)} contrasts × 2 directions × {n_permutations} permutations: {whole:.0f} s")

# %% [markdown]
# ## Cost against the number of texts
# One contrast at 576 features, λ = 1: inner products (dual) against features (primal). Where the lines cross the solver
# changes sides; both sides give the same scores.

# %%
scaling, d_model = [], 576
axes = np.linalg.qr(rng.standard_normal((d_model, d_model)))[0] * np.arange(1, d_model + 1)[:, None] ** -0.5
for n_texts in [n for n in (90, 270, 540, 1080, 2250, 4500, 9000) if n <= n_texts_max]:
    Z = rng.standard_normal((n_texts, d_model)) @ axes
    Z = (Z - Z.mean(0)) / Z.std(0) / d_model**0.5
    y = np.where(Z @ rng.standard_normal(d_model) + rng.standard_normal(n_texts) > 0, 1, -1)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    sides = {"primal": lambda Z=Z, y=y: logistic(Primal(Z, Z), y[None], 1.0, tol=1e-10).scores()[0],
             "dual": lambda Z=Z, y=y: logistic(Dual(Z @ Z.T, Z @ Z.T), y[None], 1.0, tol=1e-10).scores()[0],
             "scikit-learn": lambda Z=Z, y=y: reference.fit(Z, y).decision_function(Z)}
    if n_texts > 4500:
        del sides["dual"]  # two gigabytes of inner products
    seconds, outputs = alternate(n_alternations, **sides)
    scaling += [{"texts": n_texts, "side": name, "seconds": s, "difference": abs(outputs[name] - outputs["scikit-learn"]).max()} for name, s in seconds.items()]
scaling = pd.DataFrame(scaling)
print("largest difference of scores:", scaling["difference"].max())

# %%
figure = go.Figure()
for (side, part), colour in zip(scaling.groupby("side"), ("#0072B2", "#D55E00", "#777777"), strict=True):
    figure.add_scatter(x=part.texts, y=part.seconds, name=side, mode="lines+markers", line={"color": colour})
figure.add_vline(2 * d_model, line_dash="dot", line_color="#777777", annotation_text="the solver changes sides")
figure.update_xaxes(type="log")
figure.update_yaxes(type="log")
styled(figure, "What does one classifier cost as texts grow?", x="texts", y="seconds").show()

# %% [markdown]
# ## Summary

# %%
summary = pd.DataFrame(results)
assert summary["ours, s"].gt(0).all() and scaling["difference"].max() < 1e-6
display(summary.round(3))
