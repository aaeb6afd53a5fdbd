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
# Both sides use the same folds, features, labels and penalties, two threads or processes with one BLAS thread each, and
# alternate; medians are shown. scikit-learn is timed on a sample of the cells, since the whole grid would take it an
# hour: one layer and one fold with all penalties and contrasts, counted as often as there are layers and folds.
#
# **Reads** `activations/` where the study has been run, otherwise makes activations of the same shape.
# **Writes** `docs/bench_probes.json`. **Cost**: about ten minutes, local.

# %%
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from IPython.display import display
from joblib import Parallel, delayed
from plotly.subplots import make_subplots
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import PredefinedSplit, permutation_test_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from lib.errors import BadInput
from lib.params import ROOT
from lib.report.figures import styled
from lib.stats.auroc import auroc
from lib.stats.crossfit import dense_source, grid_scores
from lib.stats.endpoint import CLASSES, make_material
from lib.stats.nulls import permuted_labels, transfer_null
from lib.stats.solver import Dual, Primal, logistic
from lib.store import Study, to_json, versions, write_atomic

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study whose activations are used
n_alternations: int = 3  # times each side is timed, in alternating order
n_permutations: int = 2000  # permutations of our null
n_permutations_logistic: int = 200  # permutations of the logistic null, which is scaled up
n_permutations_sklearn: int = 3  # permutations on which scikit-learn is timed
n_texts_max: int = 9000  # largest number of texts of the scaling figure
seed: int = 0  # seed of folds, permutations and synthetic data
out: str = "docs/bench_probes.json"  # file the results go to, under the project's folder; empty: none

# %%
LAMBDAS, THREADS, CHUNK = (0.01, 0.1, 1.0, 10.0, 100.0), 2, 8
warnings.filterwarnings("ignore", category=FutureWarning)  # scikit-learn's own renamings
threadpool_limits(1)
load = os.getloadavg()[0]
print(os.cpu_count(), "cores;", THREADS, "threads; load before the start:", round(load, 1))

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
# Layers × 5 folds × 5 penalties × 7 contrasts, trained on the plain register; the seventh, the macro mean, needs no fit
# of its own on either side. Tolerance 1e-10 on both: scikit-learn's bounds the gradient of the mean loss, ours that of the
# summed loss, which is stricter. A penalty is in units of the mean squared row norm, d_model for standardised features, so
# `C` is 1 / (λ · d_model).

# %%
TOL = 1e-10
mine = design.register == 0
splits = [(np.flatnonzero(mine & (fold != k)), np.flatnonzero(mine & (fold == k))) for k in range(design.n_folds)]


def ours(X: np.ndarray, splits: list, Y: np.ndarray) -> list:
    """Scores [lambda, layer, contrast, test text] of every split; two threads, float64 in and out."""
    source = dense_source(X.astype(np.float64))
    tasks = [(train, test, slice(start, start + CHUNK)) for train, test in splits for start in range(0, len(X), CHUNK)]

    def run(task):
        train, test, layers = task
        return grid_scores(source(train, test, layers), Y[:, train], lambdas=LAMBDAS, solver="logistic", tol=TOL)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, tasks))
    each = len(found) // len(splits)
    return [np.concatenate(found[i:i + each], axis=1) for i in range(0, len(found), each)]


# %%
def one_fit(x: np.ndarray, train: np.ndarray, test: np.ndarray, y: np.ndarray, C: float, solver: str) -> np.ndarray:
    """Decision values of one scikit-learn pipeline; scaled, as ours, on all training texts."""
    with threadpool_limits(1):
        scaler, rows = StandardScaler().fit(x[train]), train[y[train] != 0]
        model = make_pipeline(scaler, LogisticRegression(C=C, tol=TOL, max_iter=100_000, solver=solver))
        model[-1].fit(scaler.transform(x[rows]), y[rows])
        return model.decision_function(x[test])


workers = Parallel(n_jobs=THREADS)


def theirs(X: np.ndarray, splits: list, Y: np.ndarray, solver: str = "lbfgs") -> list:
    """The same by a scikit-learn pipeline a fit, in two processes."""
    X, out = X.astype(np.float64), []
    for train, test in splits:
        cells = list(np.ndindex(len(LAMBDAS), len(X), len(Y)))
        found = workers(delayed(one_fit)(X[layer], train, test, Y[c], 1 / (LAMBDAS[i] * X.shape[2]), solver) for i, layer, c in cells)
        out.append(np.array(found).reshape(len(LAMBDAS), len(X), len(Y), len(test)))
    return out


# %%
def alternate(n: int, **sides) -> tuple[dict, dict]:
    """Median seconds and last output of each side, timed in turn, the order reversed every time."""
    seconds, outputs = {name: [] for name in sides}, {}
    for turn in range(n):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            outputs[name] = sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}, outputs


def row(task: str, ours_s: float, theirs_s: float, note: str) -> dict:
    return {"task": task, "ours_s": ours_s, "sklearn_s": theirs_s, "ratio": theirs_s / ours_s, "note": note}


# %%
some, one = X[[len(X) // 2]], splits[:1]
theirs(some, one, design.Y[:2])  # starts the processes
seconds, outputs = alternate(n_alternations, ours=lambda: ours(X, splits, design.Y), lbfgs=lambda: theirs(some, one, design.Y))
exact_s, exact = alternate(1, newton=lambda: theirs(some, one, design.Y, "newton-cholesky"))
cells, grid = len(X) * len(splits), f"grid: {len(X)} layers × 5 folds × 5 λ × 7 contrasts"
results = [row(grid, seconds["ours"], seconds["lbfgs"] * cells, f"lbfgs, its default; float64; scikit-learn from 1 of {cells} (layer, fold) cells"),
           row(grid, seconds["ours"], exact_s["newton"] * cells, f"newton-cholesky, which reaches the tolerance; float64; from 1 of {cells} cells, once")]
display(pd.DataFrame(results).round(3))

# %% [markdown]
# Agreement of out-of-fold scores and AUROCs in that cell. lbfgs ends before its tolerance: how far it is from the exact
# solver is shown too.

# %%
def disagreement(a: list, b: list, splits: list) -> dict:
    areas = [np.array([[auroc(s[:, :, c, design.Y[c, test] != 0], design.Y[c, test][design.Y[c, test] != 0] > 0) for c in range(s.shape[2])]
                       for s, (_, test) in zip(side, splits, strict=True)]) for side in (a, b)]
    return {"score": float(max(abs(x - y).max() for x, y in zip(a, b, strict=True))), "AUROC": float(abs(areas[0] - areas[1]).max())}


own = [outputs["ours"][0][:, [len(X) // 2]]]
agreement = {"ours and newton-cholesky": disagreement(own, exact["newton"], one), "ours and lbfgs": disagreement(own, outputs["lbfgs"], one),
             "lbfgs and newton-cholesky": disagreement(outputs["lbfgs"], exact["newton"], one)}
display(agreement)

# %% [markdown]
# ## Wide activations
# d_model 4,096, two layers, all folds, penalties and contrasts; scikit-learn on one (layer, fold) cell. What is left of
# the cost is one Gram matrix a fold, which no permutation, penalty or contrast pays again.

# %%
wide, wide_design = synthetic(2, 90, 4096, rng), make_material(table(90), seed=seed, n_repeats=1).design
first = wide_design.register == 0
wide_splits = [(np.flatnonzero(first & (wide_design.folds[0] != k)), np.flatnonzero(first & (wide_design.folds[0] == k))) for k in range(5)]
seconds, outputs = alternate(n_alternations, ours=lambda: ours(wide, wide_splits, wide_design.Y), lbfgs=lambda: theirs(wide[:1], wide_splits[:1], wide_design.Y))
exact_s, exact = alternate(1, newton=lambda: theirs(wide[:1], wide_splits[:1], wide_design.Y, "newton-cholesky"))
task, cell = "d_model 4096: 2 layers × 5 folds × 5 λ × 7 contrasts", outputs["ours"][0][:, :1]
results += [row(task, seconds["ours"], seconds["lbfgs"] * 10, "lbfgs, its default; float64; synthetic; scikit-learn from 1 of 10 cells"),
            row(task, seconds["ours"], exact_s["newton"] * 10, "newton-cholesky, which reaches the tolerance; float64; synthetic; from 1 of 10 cells, once")]
agreement["d_model 4096, lbfgs"] = {"score": float(abs(cell - outputs["lbfgs"][0]).max())}
agreement["d_model 4096, newton-cholesky"] = {"score": float(abs(cell - exact["newton"][0]).max())}

# %% [markdown]
# ## Permutations at one layer
# `permutation_test_score` with the same folds and one penalty, against the multi-column solver (logistic) and against
# the ridge smoother that the study's null uses, which scores five penalties. Per permutation and contrast.

# %%
layer = X[[len(X) // 2]]
shuffled = permuted_labels(design, material.classes, material.triplet, n_permutations=n_permutations, seed=seed)


def permutation_seconds(c: int, estimator) -> float:
    """Seconds a permutation of scikit-learn, in one register and one contrast, two processes."""
    rows = np.flatnonzero(mine & (design.Y[c] != 0))
    start = time.perf_counter()
    permutation_test_score(make_pipeline(StandardScaler(), estimator), layer[0, rows], design.Y[c, rows], groups=material.triplet[rows],
                           cv=PredefinedSplit(fold[rows]), n_permutations=n_permutations_sklearn, scoring="roc_auc", random_state=seed, n_jobs=THREADS)
    return (time.perf_counter() - start) / (n_permutations_sklearn + 1)


def null(X: np.ndarray, solver: str, lambdas: tuple, n: int = n_permutations) -> np.ndarray:
    return transfer_null(dense_source(X), design, shuffled[:, :n], n_layers=len(X), lambdas=lambdas, solver=solver)


def each_contrast(estimator) -> float:
    return sum(permutation_seconds(c, estimator) for c in range(len(design.Y)))


# %%
d_model = X.shape[2]
seconds, outputs = alternate(n_alternations, by_ridge=lambda: each_contrast(RidgeClassifier(alpha=d_model)), ridge=lambda: null(layer, "ridge", (1.0,)),
                             grid=lambda: null(layer, "ridge", LAMBDAS), by_logistic=lambda: each_contrast(LogisticRegression(C=1 / d_model, max_iter=10_000)),
                             logistic=lambda: null(layer, "logistic", (1.0,), n_permutations_logistic))
times, task = 2 * n_permutations, f"{n_permutations} permutations × 7 contrasts × 2 directions, one layer"  # two directions
few = f"scikit-learn from {n_permutations_sklearn} permutations"
results += [row(f"{task}, ridge, 1 λ", seconds["ridge"], outputs["by_ridge"] * times, f"float32; RidgeClassifier; {few}"),
            row(f"{task}, ridge, {len(LAMBDAS)} λ", seconds["grid"], outputs["by_logistic"] * times * len(LAMBDAS), f"the study's null; float32; LogisticRegression; {few}"),
            row(f"{task}, logistic, 1 λ", seconds["logistic"] * n_permutations / n_permutations_logistic, outputs["by_logistic"] * times,
                f"float32; LogisticRegression; {few}, ours from {n_permutations_logistic}")]
quantiles = {name: np.quantile(outputs[name][0, 0], 0.975, axis=-1).round(3) for name in ("ridge", "logistic")}
print("97.5% quantile of T, λ = 1:", quantiles)

# %%
start, cpu = time.perf_counter(), time.process_time()
null(X, "ridge", LAMBDAS)
whole = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "layers": len(X), "permutations": n_permutations}
print(f"whole null, {len(X)} layers × {len(LAMBDAS)} penalties × 7 contrasts × 2 directions × {n_permutations} permutations:", whole)

# %% [markdown]
# ## Cost against the number of texts and of layers
# One contrast at 576 features, λ = 1: inner products (dual) against features (primal). Where the lines cross the solver
# changes sides; both sides give the same scores.

# %%
scaling, d_model = [], 576
layers_cost = [(n, alternate(n_alternations, ours=lambda n=n: ours(X[:n], one, design.Y))[0]["ours"]) for n in (1, 2, 4, 8, 16, 30) if n <= len(X)]
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
    seconds, outputs = alternate(n_alternations if n_texts <= 1080 else 1, **sides)
    scaling += [{"texts": n_texts, "side": name, "seconds": s, "difference": abs(outputs[name] - outputs["scikit-learn"]).max()} for name, s in seconds.items()]
scaling = pd.DataFrame(scaling)
print("largest difference of scores:", scaling["difference"].max())

# %%
figure = make_subplots(1, 2, subplot_titles=["one classifier, 576 features", "one fold of the grid"], horizontal_spacing=0.1)
for (side, part), colour in zip(scaling.groupby("side"), ("#0072B2", "#D55E00", "#777777"), strict=True):
    figure.add_scatter(x=part.texts, y=part.seconds, name=side, mode="lines+markers", line={"color": colour}, row=1, col=1)
figure.add_vline(d_model, line_dash="dot", line_color="#777777", row=1, col=1)
figure.add_scatter(x=[n for n, _ in layers_cost], y=[s for _, s in layers_cost], name="grid", mode="lines+markers", line={"color": "#009E73"}, row=1, col=2)
figure.update_xaxes(type="log")
figure.update_yaxes(type="log")
figure.update_xaxes(title="texts (dotted: the solver changes sides)", col=1)
figure.update_xaxes(title="layers", col=2)
styled(figure, "What does it cost as texts and layers grow?", y="seconds", height=420).show()

# %% [markdown]
# ## Checks and save

# %%
assert scaling["difference"].max() < 1e-6 and agreement["ours and newton-cholesky"]["score"] < 1e-6
assert agreement["ours and newton-cholesky"]["AUROC"] < 1e-9
about = {"activations": origin, "shape": X.shape, "cores": os.cpu_count(), "threads": THREADS, "load_before": load, "alternations": n_alternations,
         "tolerance": TOL, "versions": versions()}
if out:
    write_atomic(ROOT / out, to_json({"about": about, "results": results, "agreement": agreement, "whole_null": whole, "layers": layers_cost,
                                      "texts": scaling.to_dict("records")}))

# %% [markdown]
# ## Summary

# %%
display(pd.DataFrame(results).round(3))
