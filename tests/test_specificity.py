"""Specificity: known answers of the overlap, of condition transfer and of the verdict."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.params import load_params
from lib.stats import simulate
from lib.stats.carryover import accuracy, confusion_by_order, null_accuracy, predictions, transfer_table
from lib.stats.overlap import PAIRS, cka, overlap_rows
from lib.stats.specificity import CONDITIONS, biased_overlap, centre, decide, effects, specificity
from lib.stats.ustat import Interval, jackknife
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS
from lib.stats.whitening import cross_fitted

THRESHOLDS = load_params("smollm2-135m").thresholds.specificity
EQUIVALENCE = (THRESHOLDS.equivalence_low, THRESHOLDS.equivalence_high)
N = 90


def structures(mix, *, reliability, spread, rng, n=N):
    """Offsets [3, d] of E, V, N; each control takes a share `mix` of E's (classes renamed), the rest is its own."""
    d = len(spread.noise)
    noise = 2 * (spread.noise.astype(float) ** 2).sum() / n  # of three centred class means together

    def own():
        return centre(rng.standard_normal((1, 3, d)) * spread.noise)[0]
    empathy = own()
    found = [empathy] + [np.sqrt(mix) * empathy[[1, 2, 0]] + np.sqrt(1 - mix) * own() for _ in range(2)]
    return [o * np.sqrt(noise * reliability / (1 - reliability) / (o**2).sum()) for o in found]


def draw_blocks(offsets, *, spread, rng, n=N):
    codes = np.arange(n)
    return {part: (simulate.draw(n, o, spread=spread, rng=rng).astype(float), own)
            for part, o, own in zip("EVN", offsets, (codes, codes, codes + n), strict=True)}


def planted(mix, *, reliability=0.9, d=40, decay=0.0, seed=0, n=N):
    spread, rng = simulate.power_law(d, decay=decay), np.random.default_rng(seed)
    offsets = structures(mix, reliability=reliability, spread=spread, rng=rng, n=n)
    return rows_of(draw_blocks(offsets, spread=spread, rng=rng, n=n))


def rows_of(blocks):
    """Activations and texts of the blocks E, V, N."""
    return simulate.as_texts({(CONDITIONS[part], "plain"): values for part, (values, _) in blocks.items()})


def run(X, texts, n_permutations=200):
    return specificity(X, texts, thresholds=THRESHOLDS, model_id="planted", layer=3, seed=0,
                       n_permutations=n_permutations)


def rates(mix, *, repeats, d=40, decay=0.0, reliability=0.8, seed=0):
    """Bias and coverage of O (E against V and N), and shares of PASS and FAIL over planted data sets."""
    rng, spread, errors, verdicts = np.random.default_rng(seed), simulate.power_law(d, decay=decay), [], []
    for k in range(repeats):
        offsets = structures(mix, reliability=reliability, spread=spread, rng=rng)
        raw = draw_blocks(offsets, spread=spread, rng=rng)
        blocks = {part: (centre(values), codes) for part, (values, codes) in raw.items()}
        rows, found = [], {}
        for metric in ("euclidean", "whitened"):
            fitted = cross_fitted(list(raw.values()), n_clusters=2 * N) if metric == "whitened" else None
            more, found[metric] = overlap_rows(effects(blocks, 2 * N, fitted), metric, equivalence=EQUIVALENCE)
            rows += more
        cells = transfer_table(blocks, n_clusters=2 * N, n_permutations=5, seed=k)
        verdicts.append(decide(pd.DataFrame(rows), found, cells.pivot(index="train", columns="test", values="accuracy"),
                               THRESHOLDS)[0])
        for i, control in enumerate("VN"):
            o, true = found["euclidean"]["E", control], biased_overlap(offsets[0], offsets[i + 1])
            errors.append((o.estimate - true, o.low <= true <= o.high))
    bias, coverage = np.mean(np.array(errors, float), axis=0)
    return bias, coverage, verdicts.count(PASS) / repeats, verdicts.count(FAIL) / repeats


def check_rates(mix, bias, coverage, passed, failed, *, slack=0.0):
    assert abs(bias) <= 0.03
    assert coverage >= 0.90 - slack
    if mix == 0:
        assert passed >= 0.8 and failed == 0
    elif mix == 1:
        assert failed >= 0.8 - slack and passed == 0
    else:
        assert passed <= 0.05 + slack and failed <= 0.05


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_overlap_is_unbiased_covered_and_decided_rightly(mix):
    """Unrelated structures at effective rank 40, half-shared ones, and the same structure with renamed classes.

    An equivalence test needs narrow intervals: at rank 40 it takes reliability .9 to FAIL the same structure.
    """
    check_rates(mix, *rates(mix, repeats=60, reliability=0.9 if mix == 1 else 0.8), slack=0.05)


@pytest.mark.full
@pytest.mark.parametrize(("mix", "reliability", "d", "decay"), [
    (0.0, 0.8, 40, 0.0), (0.5, 0.8, 40, 0.0), (1.0, 0.9, 40, 0.0), (1.0, 0.8, 100, 0.0),
    (0.0, 0.8, 100, 0.7), (0.5, 0.8, 100, 0.7)])
def test_overlap_full(mix, reliability, d, decay):
    found = rates(mix, repeats=400, d=d, decay=decay, reliability=reliability)
    print("mix {} R {} d {} decay {}: bias {:.3f} coverage {:.3f} PASS {:.3f} FAIL {:.3f}".format(
        mix, reliability, d, decay, *found))
    check_rates(mix, *found)


@pytest.mark.parametrize(("cell", "value", "verdict"), [
    (("E", "V"), 0.5, PASS), (("E", "V"), 0.85, INCONCLUSIVE), (("N", "E"), 0.85, INCONCLUSIVE),
    (("V", "N"), 0.9, PASS)])
def test_transfer_as_good_as_the_condition_itself_bars_a_pass(cell, value, verdict):
    low = Interval(estimate=0.1, se=0.02, low=0.06, high=0.14, df=89)
    found = {metric: {pair: low for pair in PAIRS} for metric in ("euclidean", "whitened")}
    table = pd.DataFrame({"pair": ["E/V", "E/N"], "metric": "euclidean", "reliability_first": 0.9,
                          "reliability_second": 0.9})
    transfer = pd.DataFrame(0.4, index=list("EVN"), columns=list("EVN")) + 0.5 * np.eye(3)
    transfer.loc[cell] = value
    assert decide(table, found, transfer, THRESHOLDS)[0] == verdict
    wide = Interval(estimate=0.4, se=0.1, low=0.2, high=0.6, df=89)
    assert decide(table, found | {"whitened": {pair: wide for pair in PAIRS}}, transfer, THRESHOLDS)[0] == INCONCLUSIVE


# Condition transfer

def test_best_of_six_null_is_reproduced():
    """The null of the best mapping is well above 1/3, and the permutations find the same as fresh random labels."""
    rng, n = np.random.default_rng(1), 60
    predicted = rng.integers(0, 3, size=(n, 3))
    found = null_accuracy(predicted, np.arange(n), best=True, n_permutations=4000, rng=rng)
    fresh = []
    for _ in range(4000):
        label = np.argsort(rng.random((n, 3)), axis=1)
        confusion = np.array([[(predicted[label == i] == j).sum() for j in range(3)] for i in range(3)])
        fresh.append(max(confusion[range(3), order].sum() for order in permutations(range(3))) / (3 * n))
    assert np.mean(found) > 0.36
    assert np.mean(found) == pytest.approx(np.mean(fresh), abs=0.003)
    assert np.quantile(found, 0.975) == pytest.approx(np.quantile(fresh, 0.975), abs=0.008)


def test_transfer_equals_leaving_each_cluster_out_by_hand():
    rng, codes = np.random.default_rng(2), np.repeat(np.arange(12), 2)
    train, test = (centre(rng.standard_normal((24, 3, 5)) + np.eye(3, 5)) for _ in range(2))
    predicted = predictions((train, codes), (test, codes), n_clusters=12)
    for s in range(24):
        means = train[codes != codes[s]].mean(0)
        distance = ((test[s][:, None] - means) ** 2).sum(-1)
        assert (predicted[s] == distance.argmin(1)).all()


def test_transfer_p_is_not_too_small_under_the_null():
    rng, codes, p = np.random.default_rng(3), np.arange(30), []
    for k in range(120):
        blocks = {part: (centre(rng.standard_normal((30, 3, 8))), codes) for part in "EV"}
        p.append(transfer_table(blocks, n_clusters=30, n_permutations=99, seed=k).set_index(["train", "test"])["p"])
    rejected = (pd.DataFrame(p) <= 0.05).mean()
    assert (rejected <= 0.12).all()


def test_renamed_classes_transfer_by_their_best_mapping_only():
    X, texts = planted(1.0, reliability=0.97)
    report = run(X, texts)
    assert report.transfer.loc["E", "V"] > 0.9
    values = {part: X[texts["condition"] == name].reshape(-1, 3, X.shape[1]).astype(float)
              for part, name in (("E", "empathy"), ("V", "valence_stripped"))}
    predicted = predictions(*((centre(v), np.arange(N)) for v in values.values()), n_clusters=N)
    confusion = confusion_by_order(predicted)[:, 0].sum(0)
    assert accuracy(confusion, best=False) < 0.1 < 0.9 < accuracy(confusion, best=True)


# Other measures

def test_cka_is_one_for_the_same_variation_and_near_zero_for_orthogonal():
    rng = np.random.default_rng(4)
    scale = np.r_[np.ones(5), np.zeros(5)]
    a, b, c = (centre(rng.standard_normal((80, 3, 10)) * s) for s in (scale, scale, scale[::-1]))
    assert cka((a, np.arange(80)), (b, np.arange(80))) == pytest.approx(1, abs=0.1)
    assert cka((a, np.arange(80)), (c, np.arange(80))) == pytest.approx(0, abs=1e-9)


def test_magnitude_ratio_is_found_and_its_equivalence_tested():
    spread, rng = simulate.power_law(40), np.random.default_rng(5)
    offsets = structures(0.0, reliability=0.95, spread=spread, rng=rng)
    blocks = {part: (centre(values), codes) for part, (values, codes) in
              draw_blocks([2 * offsets[0], offsets[1], offsets[2]], spread=spread, rng=rng).items()}
    rows = pd.DataFrame(overlap_rows(effects(blocks, 2 * N), "euclidean", equivalence=EQUIVALENCE)[0]).set_index("pair")
    assert rows["magnitude_ratio"][["E/V", "V/N"]].tolist() == pytest.approx([2, 1], rel=0.1)
    assert rows["magnitude_equivalent"][["E/V", "V/N"]].tolist() == [False, True]


# The whole report

def test_unrelated_structures_pass():
    report = run(*planted(0.0))
    row = report.result
    assert row.verdict == PASS and row.ci_high < 0.5 and row.p < 0.025 and row.reliability > 0.8
    assert row.p_literal_N0 > 0.9 and "80% power" in row.power and row.null and row.n_clusters == 2 * N
    assert report.transfer.shape == (3, 3) and len(report.transfer_null) == 9 and len(report.overlap) == 6
    assert (np.diag(report.transfer) > 0.8).all()
    assert "SPECIFIC" not in row.flags  # the controls share nothing with each other either


def test_the_same_structure_fails_whatever_the_classes_are_called():
    row = run(*planted(1.0)).result
    assert row.verdict == FAIL and row.estimate == pytest.approx(1, abs=0.2) and row.literal_verdict == FAIL


@pytest.mark.parametrize("same", [1, 2])
def test_one_control_alike_and_one_without_structure_fails_with_the_numbers_of_the_first(same):
    spread, rng = simulate.power_law(40), np.random.default_rng(7)
    offsets = structures(0.0, reliability=0.95, spread=spread, rng=rng)
    offsets[same], offsets[3 - same] = offsets[0], np.zeros((3, 40))
    row = run(*rows_of(draw_blocks(offsets, spread=spread, rng=rng))).result
    assert row.verdict == FAIL and row.estimate == pytest.approx(1, abs=0.15) and row.ci_low < 1 < row.ci_high


def test_controls_alike_and_empathy_apart_is_specific():
    spread, rng = simulate.power_law(40), np.random.default_rng(6)
    offsets = structures(0.0, reliability=0.95, spread=spread, rng=rng)
    blocks = draw_blocks([offsets[0], offsets[1], offsets[1]], spread=spread, rng=rng)
    report = run(*rows_of(blocks))
    assert report.result.verdict == PASS and "SPECIFIC" in report.result.flags


def test_no_structure_is_inconclusive_though_the_literal_form_passes():
    for seed in range(4):
        spread, rng = simulate.power_law(40), np.random.default_rng(seed)
        zero = [np.zeros((3, 40))] * 3
        blocks = draw_blocks(zero, spread=spread, rng=rng, n=40)
        row = run(*rows_of(blocks)).result
        assert row.verdict == INCONCLUSIVE and "reliability" in row.reason and row.literal_verdict == PASS


def test_same_seed_same_report():
    X, texts = planted(0.5, n=30)
    assert run(X, texts).result == run(X, texts).result


# Bad input

def test_bad_activations_are_refused():
    X, texts = planted(0.0, n=12)
    with pytest.raises(BadInput, match="one row a text"):
        run(X[1:], texts)
    X[0, 0] = np.nan
    with pytest.raises(BadInput, match="NaN or infinite"):
        run(X, texts)


@pytest.mark.parametrize(("keep", "reason"), [
    (lambda t: t["condition"] != "non_empathy", "non_empathy: 0 clusters"),
    (lambda t: t["label"] != "factual", "valence_stripped: 0 clusters"),
    (lambda t: ~((t["condition"] == "empathy") & (t["scenario_id"] > "s0005")), "empathy: 6 clusters"),
])
def test_too_little_of_a_condition_is_inconclusive(keep, reason):
    X, texts = planted(0.0)
    chosen = keep(texts)
    report = run(X[chosen.to_numpy()], texts[chosen].reset_index(drop=True))
    assert report.result.verdict == INCONCLUSIVE and reason in report.result.reason
    assert report.result.estimate is None and report.transfer.shape == (3, 3) and "O" in report.overlap


def test_constant_activations_and_one_cluster_are_inconclusive():
    X, texts = planted(0.0, n=20)
    assert "do not vary" in run(X * 0 + 1, texts).result.reason
    assert "1 clusters" in run(X, texts.assign(cluster=0)).result.reason


def test_wide_and_copied_features_work():
    X, texts = planted(0.0, n=15, d=300)
    assert run(X, texts).result.estimate is not None
    X, texts = planted(0.0, n=60, d=20)
    assert run(np.hstack([X, X]), texts).result.estimate == pytest.approx(run(X, texts).result.estimate, abs=1e-6)


def test_undefined_overlap_has_an_undefined_interval():
    products = effects({part: (np.zeros((12, 3, 2)), np.arange(12)) for part in "EVN"}, 12)
    rows, found = overlap_rows(products, "euclidean", equivalence=EQUIVALENCE)
    assert all(np.isnan(row["O"]) for row in rows) and all(np.isnan(o.high) for o in found.values())
    assert not rows[0]["magnitude_equivalent"] and jackknife(lambda p: p[..., 0, 0], products).estimate == 0


@pytest.mark.parametrize(("shared", "verdict"), [(1.0, PASS), (0.0, INCONCLUSIVE)])
def test_a_structure_of_words_is_no_pass(shared, verdict):
    """Unlike both controls in either case; but only a structure that is there in other words too is empathy's own."""
    spread, rng = simulate.power_law(40, decay=0.0), np.random.default_rng(5)
    offsets = structures(0.0, reliability=0.9, spread=spread, rng=rng)
    other = structures(0.0, reliability=0.9, spread=spread, rng=rng)[0]
    blocks = draw_blocks(offsets, spread=spread, rng=rng)
    counter = simulate.draw(N, shared * offsets[0] + (1 - shared) * other, spread=spread, rng=rng)
    X, texts = simulate.as_texts({**{(CONDITIONS[part], "plain"): values for part, (values, _) in blocks.items()}, ("empathy", "counter"): counter})
    result = run(X, texts).result
    assert result.verdict == verdict, result.reason
    assert ("LEXICAL" in result.flags) == (verdict == INCONCLUSIVE) == ("other words" in result.reason)


def test_the_text_baseline_is_the_overlap_of_the_words():
    X, texts = planted(0.0)
    again = specificity(X, texts, thresholds=THRESHOLDS, model_id="planted", layer=3, seed=0, n_permutations=20, words=planted(1.0)[0]).result
    assert again.text_baseline > 0.8 and "embedding" in again.text_baseline_name and "ONE-REGISTER" in again.flags
    assert run(X, texts, 20).result.text_baseline is None
