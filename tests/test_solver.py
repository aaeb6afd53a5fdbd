"""The solver gives scikit-learn's numbers, on both of its sides, for all columns at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import BernoulliNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.errors import BadInput
from lib.stats.auroc import auroc, d_prime, deleted_auroc, jackknife_interval
from lib.stats.contrasts import make_design
from lib.stats.crossfit import dense_source, out_of_fold
from lib.stats.folds import grouped_folds
from lib.stats.nulls import holm, rank_areas, smoothers
from lib.stats.solver import Dual, Primal, logistic, make_space, ridge

LAMS = (100.0, 1.0, 0.01)


def problem(n: int, d: int, *, seed: int = 0, decay: float = 1.0):
    """Features with a falling spectrum, and labels of six contrasts, three of which leave a third of the rows out."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.arange(1, d + 1) ** (-decay / 2) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    X = (X - X.mean(0)) / X.std(0) / d**0.5
    of = np.arange(n) % 3
    pairs = [np.where(of == a, 1, np.where(of == b, -1, 0)) for a, b in ((0, 1), (0, 2), (1, 2))]
    return X, np.array(pairs + [np.where(of == k, 1, -1) for k in range(3)])


def reference(X, y, lam, kind):
    use = y != 0
    if kind == "ridge":
        return Ridge(alpha=lam).fit(X[use], y[use]).predict(X)
    return LogisticRegression(C=1 / lam, tol=1e-10, max_iter=100_000, solver="newton-cholesky").fit(X[use], y[use]).decision_function(X)


@pytest.mark.parametrize(("n", "d", "form"), [(90, 200, Dual), (90, 91, Dual), (92, 91, Primal), (240, 40, Primal)])
def test_both_sides_agree_with_scikit_learn(n, d, form):
    X, Y = problem(n, d)
    space = make_space(X, X)
    assert isinstance(space, form)
    for lam in LAMS:
        for kind, fit in (("logistic", logistic(space, Y, lam, tol=1e-10)), ("ridge", ridge(space, Y, lam, tol=1e-12))):
            expected = np.array([reference(X, y, lam, kind) for y in Y])
            assert abs(fit.scores() - expected).max() < 1e-6, (kind, lam)


def test_primal_and_dual_give_the_same_numbers_on_one_problem():
    X, Y = problem(120, 60)
    dual, primal = Dual(X @ X.T, X @ X.T), Primal(X, X)
    for solve in (logistic, ridge):
        assert abs(solve(dual, Y, 0.1, tol=1e-10).scores() - solve(primal, Y, 0.1, tol=1e-10).scores()).max() < 1e-7


def test_columns_and_batches_do_not_touch_each_other():
    X, Y = problem(60, 100)
    Z, _ = problem(60, 100, seed=1)
    both = np.stack([X, Z])
    together = logistic(make_space(both, both), Y, np.geomspace(0.01, 10, 6)[:, None], tol=1e-10).scores()
    alone = logistic(make_space(Z, Z), Y[[4]], np.geomspace(0.01, 10, 6)[4], tol=1e-10).scores()
    assert abs(together[1, 4] - alone[0]).max() < 1e-7


def test_weights_follow_from_the_dual_coefficients():
    X, Y = problem(90, 30)
    fit = logistic(make_space(X, X), Y[3:4], 1.0, tol=1e-10)
    expected = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(X, Y[3])
    assert abs(fit.weights(X) - expected.coef_).max() < 1e-7
    assert abs(fit.b[0, 0] - expected.intercept_[0]) < 1e-7


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(6, 60), d=st.integers(1, 80), lam=st.floats(1e-3, 1e3))
def test_optimality_on_any_data(seed, n, d, lam):
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((n, d)), np.where(np.arange(n) % 2, 1.0, -1.0)
    y = rng.permutation(y)
    fit = logistic(make_space(X, X), y[None], lam, tol=1e-9)
    w, f = fit.weights(X)[0], fit.scores()[0]
    slope = 1 / (1 + np.exp(y * f)) * y
    assert np.linalg.norm(X.T @ slope - lam * w) < 1e-6
    assert abs(slope.sum()) < 1e-6


@pytest.mark.parametrize("X", [np.ones((40, 5)), np.repeat(np.random.default_rng(0).standard_normal((40, 1)), 60, axis=1),
                               1e3 * np.random.default_rng(1).standard_normal((40, 3))])
def test_constant_collinear_and_huge_features_stay_finite(X):
    y = np.where(np.arange(40) % 2, 1, -1)[None]
    for solve in (logistic, ridge):
        assert np.isfinite(solve(make_space(X, X), y, 1.0).scores()).all()


def test_unbalanced_and_separable_columns():
    X, _ = problem(80, 200)
    y = -np.ones((1, 80))
    y[0, :3] = 1
    expected = reference(X, y[0], 1e-3, "logistic")
    assert abs(logistic(make_space(X, X), y, 1e-3, tol=1e-11).scores()[0] - expected).max() < 1e-5


def test_smoothers_are_ridge():
    X, Y = problem(60, 100)
    use = np.flatnonzero(Y[0])
    space = Dual((X @ X.T)[None], (X @ X.T)[None])
    S = smoothers(space, use, (0.1, 10.0))
    for i, lam in enumerate((0.1, 10.0)):
        assert abs(Y[0, use] @ S[0, i] - reference(X, Y[0], lam, "ridge")).max() < 1e-5


def test_nested_out_of_fold_scores_equal_a_scikit_learn_pipeline():
    rng = np.random.default_rng(3)
    label, cluster = np.tile(["a", "b"], 40), np.repeat(np.arange(40), 2)
    X = rng.standard_normal((80, 50)) + 0.4 * rng.standard_normal(50) * (label == "a")[:, None]
    lambdas = (0.01, 1.0, 100.0)
    design = make_design(label, ["plain"] * 80, cluster, contrasts={"a/b": (("a",), ("b",))}, seed=0, n_repeats=1)
    ours = out_of_fold(dense_source(X[None]), design, n_layers=1, lambdas=lambdas, tol=1e-10)[0, 0, 0, 0]
    theirs, fold, y = np.empty(80), design.folds[0], (label == "a").astype(int)
    for k in range(5):
        train = np.flatnonzero(fold != k)
        grid = {}
        for lam in lambdas:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (lam * 50), tol=1e-10, max_iter=10_000, solver="newton-cholesky"))
            held = np.empty(len(train))
            for j in set(fold[train]):
                inner, out = train[fold[train] != j], fold[train] == j
                held[out] = model.fit(X[inner], y[inner]).decision_function(X[train[out]])
            grid[lam] = roc_auc_score(y[train], held)
        best = max(lambdas, key=lambda lam: (grid[lam], lam))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (best * 50), tol=1e-10, max_iter=10_000, solver="newton-cholesky"))
        theirs[fold == k] = model.fit(X[train], y[train]).decision_function(X[fold == k])
    assert abs(ours - theirs).max() < 1e-6
    assert abs(auroc(ours, y > 0) - roc_auc_score(y, theirs)) < 1e-9


def test_auroc_matches_scikit_learn_with_and_without_ties():
    rng = np.random.default_rng(0)
    y = rng.random(50) < 0.4
    for scores in (rng.standard_normal((7, 50)), rng.integers(0, 4, (7, 50)).astype(float)):
        assert abs(auroc(scores, y) - [roc_auc_score(y, s) for s in scores]).max() < 1e-12


def test_deleted_auroc_is_the_auroc_without_each_cluster():
    rng = np.random.default_rng(0)
    scores, y, cluster = rng.integers(0, 9, (3, 40)).astype(float), np.arange(40) % 2 > 0, np.arange(40) // 4
    fast = deleted_auroc(scores, y, cluster, n_clusters=11)
    slow = np.stack([auroc(scores[:, cluster != g], y[cluster != g]) for g in range(11)], axis=-1)
    assert abs(fast - slow).max() < 1e-12
    assert np.allclose(fast[:, 10], auroc(scores, y))


def test_rank_areas_of_permutations_and_of_ties():
    rng = np.random.default_rng(0)
    scores, y = rng.standard_normal((200, 60)).astype(np.float32), rng.integers(0, 2, (200, 60), dtype=np.int32)
    assert abs(rank_areas(scores, y) - auroc(scores, y > 0)).max() < 1e-6
    assert abs(rank_areas(np.zeros((500, 60)), np.tile(y, (3, 1))[:500]).mean() - 0.5) < 0.02


def test_d_prime_within_a_tenth_and_finite_at_the_ends():
    rng = np.random.default_rng(0)
    for true in (0.5, 1.0, 2.0):
        scores = np.concatenate([rng.normal(true, 1, (200, 90)), rng.normal(0, 1, (200, 90))], axis=1)
        found = d_prime(auroc(scores, np.arange(180) < 90), n_pairs=8100).mean()
        assert abs(found - true) < 0.1 * true
    assert np.isfinite(d_prime(np.array([0.0, 1.0]), n_pairs=8100)).all()


def test_jackknife_of_a_mean_is_the_t_interval():
    x = np.random.default_rng(0).standard_normal(30)
    low, high = jackknife_interval(x.mean(), (x.sum() - x) / 29)
    half = 2.045 * x.std(ddof=1) / 30**0.5
    assert np.allclose([low, high], [x.mean() - half, x.mean() + half], atol=1e-3)


def test_folds_keep_clusters_whole_and_even():
    cluster = np.repeat(np.arange(50), np.random.default_rng(0).integers(1, 9, 50))
    folds = grouped_folds(cluster, n_folds=5, n_repeats=4, seed=1)
    assert all(len(np.unique(fold[cluster == c])) == 1 for fold in folds for c in range(50))
    assert all(np.ptp(np.bincount(fold)) <= 9 for fold in folds)
    assert (folds[0] != folds[1]).any()
    assert (folds == grouped_folds(cluster, n_folds=5, n_repeats=4, seed=1)).all()
    with pytest.raises(BadInput, match="clusters"):
        grouped_folds(np.zeros(20), n_folds=5, n_repeats=1, seed=0)


def test_holm():
    assert np.allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])


def test_naive_bayes_matches_scikit_learn():
    from scipy import sparse

    from lib.text.features import NaiveBayes
    rng = np.random.default_rng(0)
    X = (rng.random((60, 25)) < 0.3).astype(float)
    y = np.where(np.arange(60) % 2, 1, -1)
    ours = NaiveBayes("x", sparse.csr_matrix(X), True).scores(np.arange(40), np.arange(40, 60), y[None, :40])[0]
    theirs = BernoulliNB(fit_prior=False).fit(X[:40], y[:40]).predict_log_proba(X[40:])
    assert np.allclose(ours, theirs[:, 1] - theirs[:, 0])
