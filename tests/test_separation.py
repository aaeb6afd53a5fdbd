"""Separation: known answers of κ, of every construction on the nulls, of the register flags and of the verdict."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression

from lib.errors import BadInput
from lib.params import load_params
from lib.stats import constructions, mtmm, simulate
from lib.stats.constructions import NEUTRAL, logistic_cosine, plain_cosine
from lib.stats.separation import decide, layer_curve, metric_table, separation, swap_p
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS

THRESHOLDS = load_params("smollm2-135m").thresholds.separation
N = 90


def run(X, texts, n_permutations=500, **more):
    return separation(X, texts, thresholds=THRESHOLDS, model_id="planted", layer=3, seed=0,
                      n_permutations=n_permutations, **more)


def planted(rho=0.0, *, reliability=0.9, d=60, decay=0.5, seed=0, n=N, counter=None):
    """Activations and texts with C and A at cosine `rho`; `counter` [3, d] → offsets of the counter register."""
    rng, spread = np.random.default_rng(seed), simulate.power_law(d, decay=decay)
    offsets = simulate.two_factor(rho, reliability=reliability, n_scenarios=n, spread=spread, rng=rng)
    values = simulate.draw(n, offsets, spread=spread, rng=rng)
    blocks = {("empathy", "plain"): values[:, :3], ("valence_stripped", "plain"): values[:, 3:]}
    if counter is not None:
        blocks[("empathy", "counter")] = simulate.draw(n, counter(offsets[:3], rng), spread=spread, rng=rng)
    return simulate.as_texts(blocks)


# What the constructions give by themselves

@given(means=arrays(float, (3, 5), elements=st.floats(-1e3, 1e3)))
@settings(max_examples=200, deadline=None)
def test_triangle_bound_holds_on_any_data(means):
    weights = np.eye(3) * 1.5 - 0.5
    a, b, c = weights @ means
    cosines = [plain_cosine(a, b), plain_cosine(a, c), plain_cosine(b, c)]
    if np.min(np.linalg.norm([a, b, c], axis=1)) > 1e-6:
        assert -0.5 - 1e-6 <= np.mean(cosines) <= -1 / 3 + 1e-6


def test_pure_noise_gives_each_construction_its_own_cosine():
    spread, rng = simulate.power_law(400), np.random.default_rng(0)
    found = [constructions.cosines(simulate.draw(N, np.zeros((6, 400)), spread=spread, rng=rng), np.arange(N))
             for _ in range(20)]
    median = pd.DataFrame(found).median()
    expected = {"one_vs_rest": -0.5, "minus_instrumental": 0.5, "minus_neutral": 0.25, "disjoint_halves": 0.0}
    assert median[list(expected)].to_dict() == pytest.approx(expected, abs=0.03)
    assert median["logistic_weights"] < -0.4


def test_logistic_weights_equal_scikit_learn():
    values = np.random.default_rng(1).standard_normal((30, 3, 12)) + np.eye(3, 12)
    rows, label = values.reshape(-1, 12), np.tile(np.arange(3), 30)
    rows = (rows - rows.mean(0)) / np.sqrt((rows - rows.mean(0)).var(0).mean())
    with_intercept = np.hstack([rows, np.ones((90, 1))])
    model = LogisticRegression(C=1, fit_intercept=False, tol=1e-10, max_iter=5000)
    weights = [model.fit(with_intercept, label == k).coef_[0, :-1].copy() for k in (0, 1)]
    assert logistic_cosine(values) == pytest.approx(plain_cosine(*weights), abs=1e-6)


def test_logistic_weights_run_backwards():
    """The closer C and A truly are, the more opposed their one-vs-rest logistic weights."""
    rng, spread = np.random.default_rng(2), simulate.power_law(60)
    found = []
    for rho in (0.0, 0.5, 0.9):
        offsets = simulate.two_factor(rho, reliability=0.99, n_scenarios=N, spread=spread, rng=rng)
        found.append(np.mean([logistic_cosine(simulate.draw(N, offsets, spread=spread, rng=rng)) for _ in range(5)]))
    assert found[0] > found[1] + 0.05 > found[2] + 0.1


# κ: bias, coverage, error rates

@dataclass
class Rates:
    bias: float
    coverage: float
    passed: float
    failed: float
    inconclusive: float


def rates(rho, *, repeats, decay=0.0, reliability=0.8, d=60, cluster_size=1, seed=0) -> Rates:
    """Behaviour of κ and of the verdict over `repeats` planted data sets; `rho` None: no class effect."""
    rng, spread, rows = np.random.default_rng(seed), simulate.power_law(d, decay=decay), []
    codes = np.arange(N) // cluster_size
    for k in range(repeats):
        offsets = np.zeros((6, d)) if rho is None else simulate.two_factor(
            rho, reliability=reliability, n_scenarios=N, spread=spread, rng=rng)
        values = simulate.draw(N, offsets, spread=spread, rng=rng).astype(float)
        table = metric_table((values, codes), seed=k, n_permutations=200).set_index("metric")
        row = table.loc["euclidean"]
        rows.append((row["kappa"] - (rho or 0), row["ci_low"] <= (rho or 0) <= row["ci_high"],
                     *(decide(table, [], THRESHOLDS)[0] == verdict for verdict in (PASS, FAIL, INCONCLUSIVE))))
    return Rates(*np.nanmean(np.array(rows, float), axis=0))


CASES = [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.0, 1.0), (0.5, 1.0), (0.9, 1.0)]


def check_rates(rho, found, slack=0.0):
    assert abs(found.bias) <= 0.03
    assert found.coverage >= 0.92 - slack
    if rho == 0.5:
        assert found.passed <= 0.05 + slack and found.failed <= 0.08 + slack
    elif rho == 0.0:
        assert found.passed >= 0.9 and found.failed == 0
    else:
        assert found.passed == 0 and found.failed >= 0.8


@pytest.mark.parametrize(("rho", "decay"), CASES)
def test_kappa_is_unbiased_covered_and_rarely_wrong(rho, decay):
    check_rates(rho, rates(rho, repeats=120, decay=decay), slack=0.04)


@pytest.mark.full
@pytest.mark.parametrize(("rho", "decay"), CASES)
def test_kappa_full(rho, decay):
    found = rates(rho, repeats=1000, decay=decay)
    print(f"rho {rho} decay {decay}: {found}")
    check_rates(rho, found)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_without_signal_the_verdict_is_inconclusive(decay):
    assert rates(None, repeats=120, decay=decay).inconclusive >= 0.98


@pytest.mark.full
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_without_signal_full(decay):
    found = rates(None, repeats=1000, decay=decay)
    print(f"no signal, decay {decay}: {found}")
    assert found.inconclusive >= 0.98


def test_scenarios_that_share_noise_are_one_cluster():
    """Near-duplicates in threes: by cluster the interval covers; taken as 90 independent scenarios it does not."""
    rng, spread, covered = np.random.default_rng(3), simulate.power_law(60), {1: [], 3: []}
    for k in range(100):
        offsets = simulate.two_factor(0.5, reliability=0.8, n_scenarios=30, spread=spread, rng=rng)
        shared = np.repeat(simulate.draw(30, np.zeros((6, 60)), spread=spread, rng=rng), 3, axis=0)
        values = shared + 0.3 * simulate.draw(90, offsets / 0.3, spread=spread, rng=rng).astype(float)
        for size in covered:
            row = metric_table((values, np.arange(90) // size), seed=k, n_permutations=20).iloc[0]
            covered[size].append(row["ci_low"] <= 0.5 <= row["ci_high"])
    assert np.mean(covered[3]) >= 0.88 > 0.8 > np.mean(covered[1])


def test_swap_p_is_uniform_where_c_and_a_do_not_differ_even_with_clusters():
    rng = np.random.default_rng(4)
    codes = np.arange(60) // 3
    p = [swap_p(rng.standard_normal((20, 15))[codes] + rng.standard_normal((60, 15)), codes, metric=None, seed=k,
                n_permutations=199) for k in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.quantile(p, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.07)


def test_a_shared_nuisance_is_seen_through_by_the_whitened_metric():
    rng, spread = np.random.default_rng(5), simulate.power_law(200)
    spread.noise[0] = 8  # a direction in which all texts vary, and in which C and A lie together
    offsets = np.zeros((6, 200))
    offsets[[0, 1], [1, 2]], offsets[:2, 0] = 4, 4 * np.sqrt(0.93 / 0.07)
    values = simulate.draw(N, offsets, spread=spread, rng=rng).astype(float)
    table = metric_table((values, np.arange(N)), seed=0, n_permutations=200).set_index("metric")
    assert table.loc["euclidean", "kappa"] == pytest.approx(0.93, abs=0.03)
    assert table.loc["whitened", "kappa"] <= 0.25
    assert decide(table, [], THRESHOLDS)[0] == FAIL  # the primary metric decides


GOOD = dict(kappa=0.2, ci_low=0.1, ci_high=0.3, reliability_C=0.9, reliability_A=0.9, swap_p=0.001)


@pytest.mark.parametrize(("metric", "change", "flags", "verdict"), [
    ("euclidean", {}, [], PASS), ("euclidean", {}, ["GENERIC", "ONE-REGISTER"], PASS),
    ("euclidean", {}, ["LEXICAL"], INCONCLUSIVE), ("euclidean", {"ci_high": 0.51}, [], INCONCLUSIVE),
    ("whitened", {"ci_high": 0.51}, [], INCONCLUSIVE), ("whitened", {"ci_high": np.nan}, [], INCONCLUSIVE),
    ("euclidean", {"swap_p": 0.025}, [], INCONCLUSIVE), ("euclidean", {"reliability_A": 0.49}, [], INCONCLUSIVE),
    ("euclidean", {"reliability_C": np.nan}, [], INCONCLUSIVE), ("euclidean", {"ci_low": 0.51}, ["LEXICAL"], FAIL),
    ("whitened", {"ci_low": 0.51, "ci_high": 0.9}, [], INCONCLUSIVE),
])
def test_each_rule_of_the_verdict_decides_alone(metric, change, flags, verdict):
    table = pd.DataFrame({"euclidean": GOOD, "whitened": GOOD}).T
    table.loc[metric, list(change)] = list(change.values())
    assert decide(table, flags, THRESHOLDS)[0] == verdict


# Registers

def counter_of(kind):
    """Offsets of the counter register: the same directions, swapped vocabularies, or unrelated words."""
    def make(offsets, rng):
        shift = 0.3 * rng.standard_normal(offsets.shape[1])
        if kind == "same":
            return offsets + shift
        if kind == "swapped":
            return offsets[[1, 2, 0]] + shift
        return np.linalg.norm(offsets, axis=1, keepdims=True) * simulate.two_factor(
            0, reliability=0.5, n_scenarios=4, spread=simulate.power_law(offsets.shape[1]), rng=rng)[:3] / 5
    return make


@pytest.mark.parametrize(("kind", "lexical"), [("same", False), ("swapped", True), ("unrelated", True)])
def test_a_direction_that_is_its_words_is_flagged(kind, lexical):
    report = run(*planted(0.0, counter=counter_of(kind)))
    assert ("LEXICAL" in report.result.flags) is lexical
    assert report.result.verdict == (INCONCLUSIVE if lexical else PASS)
    assert "ONE-REGISTER" not in report.result.flags
    assert set(report.metrics["register"]) == {"plain", "counter"}


def test_words_shared_by_chance_rarely_escape_the_flag():
    escaped = sum("LEXICAL" not in run(*planted(0.0, seed=k, d=30, n=30, counter=counter_of("unrelated")),
                                       n_permutations=20).result.flags for k in range(12))
    assert escaped <= 2


def test_chance_agreement_of_unrelated_offsets_grows_as_dimensions_get_fewer():
    found = [mtmm.chance(simulate.power_law(d), seed=0) for d in (6, 60, 600)]
    assert 0.4 < found[0] < 1.2 and found[0] > found[1] > found[2] and found[2] < 0.15


def test_a_difference_of_length_is_flagged_and_meaning_survives_the_adjustment():
    """C and A at the two ends of one direction, length: κ is −1, below any bound, and no structure at all."""
    rng, words = np.random.default_rng(0), {"cognitive": 12, "affective": 40}
    X, texts = simulate.as_texts({part: 0.5 * rng.standard_normal((N, 3, 30)) for part in (("empathy", "plain"), ("valence_stripped", "plain"))})
    size = texts["label"].map(words).fillna(26).to_numpy() + rng.integers(-6, 7, len(texts))
    texts = texts.assign(response=["word " * int(n) for n in size])
    by_length = run(X + np.outer((size - 26) / 14, rng.standard_normal(30)), texts).result
    assert by_length.estimate < -0.5 and "FORM" in by_length.flags and by_length.verdict == INCONCLUSIVE
    meaning = np.where(texts["label"].eq("cognitive").to_numpy()[:, None], rng.standard_normal(30), 0) + np.where(
        texts["label"].eq("affective").to_numpy()[:, None], rng.standard_normal(30), 0)
    assert run(X + meaning, texts).result.verdict == PASS
    assert run(X + meaning, texts, leaky=True).result.verdict == INCONCLUSIVE


def test_one_register_is_flagged():
    report = run(*planted(0.0))
    assert "ONE-REGISTER" in report.result.flags and report.mtmm.empty


# The whole report

def test_planted_structure_passes_and_its_row_is_complete():
    report = run(*planted(0.1, counter=counter_of("same")), unembedding_cov=np.eye(60))
    row = report.result
    assert row.verdict == PASS and row.ci_low <= 0.1 <= row.ci_high and row.p < 0.025 and row.reliability > 0.8
    assert row.p_literal_N0 > 0.9 and row.p_literal_N1 > 0.9 and "80% power" in row.power and row.null
    assert set(report.metrics["metric"]) == {"euclidean", "whitened", "causal"}
    table = report.metrics.query("register == 'plain'").set_index("metric")
    assert table.loc["causal", "kappa"] == pytest.approx(table.loc["euclidean", "kappa"])
    assert table.loc["euclidean", "kappa_D"] == pytest.approx(0.1, abs=0.15)
    assert list(report.constructions["construction"]) == list(constructions.NOTES)
    assert report.constructions.drop(columns="note").set_index("construction").notna().all(axis=None)


def test_near_identical_directions_fail_though_the_literal_form_passes():
    report = run(*planted(0.9, reliability=0.95))
    assert report.result.verdict == FAIL
    assert report.result.ci_low > 0.5


def null_results(null, *, repeats, registers=("plain", "counter")):
    """Rows of `repeats` studies of a null; in N1 each register has offsets of its own, as two sets of words would."""
    found = []
    for k in range(repeats):
        spread, rng = simulate.power_law(40), np.random.default_rng([7, k])
        parts = [("empathy", register) for register in registers] + [("valence_stripped", "plain")]
        offsets = [simulate.null_offsets(null, 3, spread=spread, rng=rng) for _ in parts]
        blocks = {part: simulate.draw(40, o, spread=spread, rng=rng) for part, o in zip(parts, offsets, strict=True)}
        found.append(run(*simulate.as_texts(blocks), n_permutations=200).result)
    return found


def test_on_n0_the_literal_form_passes_and_the_calibrated_one_does_not():
    found = null_results("N0", repeats=8)
    assert sum(row.literal_verdict == PASS for row in found) >= 7
    assert not any(row.verdict == PASS for row in found)


def test_on_n1_two_registers_catch_most_and_one_register_does_not():
    """A known limit of the rule, not a success: real but unrelated offsets *are* separate directions.

    Two registers catch them unless the offsets agree by chance. With one register only GENERIC and ONE-REGISTER tell.
    """
    two, one = null_results("N1", repeats=8), null_results("N1", repeats=4, registers=("plain",))
    assert sum(row.literal_verdict == PASS for row in two + one) >= 11
    assert sum(row.verdict == PASS for row in two) <= 3
    assert all("LEXICAL" in row.flags or row.verdict != INCONCLUSIVE for row in two if row.reliability > 0.9)
    assert all("ONE-REGISTER" in row.flags for row in one)
    assert sum("GENERIC" in row.flags for row in one) >= 2


@pytest.mark.full
@pytest.mark.parametrize("null", ["N0", "N1"])
@pytest.mark.parametrize("registers", [("plain",), ("plain", "counter")])
def test_pass_rates_on_the_nulls_full(null, registers):
    found = null_results(null, repeats=40, registers=registers)
    passed = sum(row.verdict == PASS for row in found)
    literal = sum(row.literal_verdict == PASS for row in found)
    flags = {flag: sum(flag in row.flags for row in found) for flag in ("GENERIC", "LEXICAL")}
    print(f"{null} {len(registers)} register(s), of 40: PASS {passed}, literal PASS {literal}, {flags}")
    if null == "N0":
        assert passed <= 2  # N1 is measured, not bounded: methods.md gives it flags, no verdict


def test_two_unrelated_offsets_are_generic():
    assert "GENERIC" in run(*planted(0.0, reliability=0.95)).result.flags
    assert "GENERIC" not in run(*planted(0.9, reliability=0.95)).result.flags


def test_scale_row_order_and_repetition_change_nothing():
    X, texts = planted(0.2, n=40, d=30, counter=counter_of("same"))
    first, order = run(X, texts).result, np.random.default_rng(8).permutation(len(X))
    assert run(X, texts).result == first
    again = run(X * 1000, texts).result
    shuffled = run(X[order], texts.iloc[order].reset_index(drop=True)).result
    for other in (again, shuffled):
        assert other.verdict == first.verdict
        assert other.estimate == pytest.approx(first.estimate, abs=1e-5)
        assert other.literal_value == pytest.approx(first.literal_value, abs=1e-5)


def test_layer_curve_agrees_with_the_verdict():
    X, texts = planted(0.3)
    curve = layer_curve(np.stack([X, 2 * X]), texts)
    row = run(X, texts).result
    assert curve["kappa"].tolist() == pytest.approx([row.estimate] * 2, abs=1e-6)
    assert curve.loc[0, ["ci_low", "ci_high"]].tolist() == pytest.approx([row.ci_low, row.ci_high], abs=1e-6)
    assert curve["one_vs_rest"].tolist() == pytest.approx([row.literal_value] * 2, abs=1e-6)
    assert {"layer", "minus_instrumental", "minus_neutral"} <= set(curve)


# Bad input

def test_more_dimensions_than_texts_and_copies_of_features_work():
    wide, texts = planted(0.2, d=700, n=20)
    assert run(wide, texts, n_permutations=100).result.estimate is not None
    narrow, texts = planted(0.2, d=10)
    copies = run(np.hstack([narrow, narrow, np.zeros((len(narrow), 2))]), texts)
    assert copies.result.estimate == pytest.approx(run(narrow, texts).result.estimate, abs=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(value):
    X, texts = planted(n=12)
    X[3, 2] = value
    with pytest.raises(BadInput, match="NaN or infinite"):
        run(X, texts)


def test_rows_that_do_not_fit_and_doubled_texts_are_refused():
    X, texts = planted(n=12)
    with pytest.raises(BadInput, match="one row a text"):
        run(X[:-1], texts)
    with pytest.raises(BadInput, match="no column"):
        run(X, texts.drop(columns="label"))
    with pytest.raises(BadInput, match="two plain empathy"):
        run(np.vstack([X, X[:1]]), pd.concat([texts, texts[:1]], ignore_index=True))
    with pytest.raises(BadInput, match="two clusters"):
        run(X, texts.assign(cluster=np.arange(len(texts))))
    with pytest.raises(BadInput, match="unembedding covariance"):
        run(X, texts, unembedding_cov=np.eye(3))


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda X, t: (X, t["scenario_id"] < "s0009"), "9 clusters"),
    (lambda X, t: (X, t["condition"] == "empathy"), "0 clusters"),
    (lambda X, t: (X, t["label"] != "affective"), "0 clusters"),
    (lambda X, t: (X, t["condition"] == "valence_stripped"), "0 clusters"),
    (lambda X, t: (X * 0 + 1, t["label"] != ""), "do not vary"),
])
def test_too_little_data_is_inconclusive_with_its_reason(spoil, reason):
    X, texts = planted()
    X, keep = spoil(X, texts)
    report = run(X[keep.to_numpy()], texts[keep].reset_index(drop=True))
    assert report.result.verdict == INCONCLUSIVE and reason in report.result.reason
    assert report.result.estimate is None and report.result.p is None
    assert "kappa" in report.metrics and "N0_median" in report.constructions and "cos" in report.mtmm


def test_one_cluster_is_inconclusive():
    X, texts = planted()
    assert "1 clusters" in run(X, texts.assign(cluster=0)).result.reason


def test_neutral_mean_is_what_the_directions_are_taken_from():
    assert np.allclose(NEUTRAL.sum(1), 0) and np.allclose(NEUTRAL[:, :3], np.eye(3))
