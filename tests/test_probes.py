"""Known answers of the probe criterion: nothing planted never passes, meaning passes, words and length do not."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from lib.errors import BadInput
from lib.params import PARAMS, Probes, read_yaml
from lib.stats import ruling
from lib.stats.adjust import adjusted_areas, freedman_lane
from lib.stats.contrasts import areas, make_design
from lib.stats.controls import unrelated_offsets
from lib.stats.crossfit import best_weights, dense_source, out_of_fold
from lib.stats.endpoint import CLASSES, CONTRASTS, NAMES, Material, evaluate, make_material
from lib.stats.nulls import permuted_labels, transfer_null
from lib.stats.probes import probe
from lib.stats.ruling import Evidence, Value, rule
from lib.text.synthetic import activations, embeddings, triplets

THRESHOLDS = Probes(**read_yaml(PARAMS / "preregistration.yaml")["probes"])


def study(texts, X, *, seed=0, **more):
    return probe(X, texts, thresholds=THRESHOLDS, model_id="synthetic", layer=len(X) // 2, seed=seed,
                 **{"n_permutations": 400, "n_repeats": 1} | more)


def planted(n=36, *, seed=0, layers=2, d_model=48, text=None, **what):
    texts = triplets(n, seed=seed, **text or {})
    return texts, activations(texts, n_layers=layers, d_model=d_model, seed=1000 + seed, **what)


def verdicts(report):
    return {r.metric.split()[0]: r.verdict for r in report.results}


def bare(n, *, registers=("plain", "counter"), seed=0, n_repeats=1) -> Material:
    """A text table without texts, for tests of the numbers alone."""
    rows = [(f"s{s}", s, r, c) for r in registers for s in range(n) for c in CLASSES]
    return make_material(pd.DataFrame(rows, columns=["scenario_id", "cluster", "register", "label"]), seed=seed, n_repeats=n_repeats)


def noise(rng, material, *, layers=2, d_model=40, scenario=1.0):
    codes = material.design.cluster
    return (0.6 * rng.standard_normal((layers, len(codes), d_model))
            + scenario * rng.standard_normal((layers, codes.max() + 1, d_model))[:, codes]).astype(np.float32)


# --- planted structure passes, everything else does not -------------------------------------------------------------

MEANING = {"text": {"share": 0.12, "swap": True}, "meaning": 0.5}
NOT_MEANING = {
    "nothing": {"text": {"share": 0.0}},
    "a lexicon that transfers": {"text": {"share": 0.2, "swap": False}, "words": 2.0},
    "a faint lexicon": {"text": {"share": 0.06, "swap": False}, "words": 3.0, "scenario": 0.3, "noise": 0.3},
    "a lexicon passed round": {"text": {"share": 0.2, "swap": True}, "words": 2.0},
    "length": {"text": {"share": 0.0, "longer": 3}, "form": 0.8},
    "much length": {"text": {"share": 0.0, "longer": 12}, "form": 1.0},
}


@pytest.fixture(scope="module")
def meaning():
    texts, X = planted(**MEANING)
    ids = [[len(w) + 50 * ord(w[0]) for w in t.split()] for t in texts["response"]]
    return texts, X, study(texts, X, token_ids=ids, dense_baselines={"embedding layer": embeddings(texts, d_model=48, seed=5)})


def test_meaning_in_swapped_words_passes(meaning):
    _, _, report = meaning
    assert set(verdicts(report).values()) == {"PASS"}
    for r in report.results:
        assert not r.flags and r.ci_low > 0.65 and r.text_baseline < 0.7 and r.p <= THRESHOLDS.p_max
        assert r.literal_verdict == "PASS" and r.p_literal_N0 < 0.2 and r.p_literal_N1 > 0.9


@pytest.mark.parametrize("name", NOT_MEANING)
def test_nothing_else_passes(name):
    texts, X = planted(**NOT_MEANING[name])
    report = study(texts, X, dense_baselines={"embedding layer": embeddings(texts, d_model=48, seed=5)})
    assert "PASS" not in verdicts(report).values(), [str(r) for r in report.results]


def test_offsets_of_each_register_alone_do_not_pass():
    """N1: a topic-like difference between the classes that has nothing in common across registers."""
    texts, X = planted(text={"share": 0.0})
    rng, code = np.random.default_rng(0), texts["label"].map(CLASSES.index).to_numpy() + 3 * (texts["register"] == "counter").to_numpy()
    report = study(texts, X + 0.5 * rng.standard_normal((len(X), 6, X.shape[2])).astype(np.float32)[:, code])
    assert "PASS" not in verdicts(report).values()
    assert all(r.literal_verdict == "PASS" for r in report.results)  # the literal form sees a difference, and is content


def test_leaky_texts_are_inconclusive_whatever_the_model_knows():
    texts, X = planted(text={"share": 0.2, "swap": False}, meaning=1.0)
    report = study(texts, X)
    assert set(verdicts(report).values()) == {"INCONCLUSIVE"} and all("LEAKY" in r.flags for r in report.results[:3])


def test_one_register_is_flagged_and_judged_within():
    for share, flags in ((0.02, ("ONE-REGISTER",)), (0.5, ("ONE-REGISTER", "LEAKY"))):
        texts, X = planted(text={"share": share, "registers": ("plain",)}, meaning=0.7)
        report = study(texts, X)
        assert report.results[0].flags == flags and (report.results[0].verdict == "INCONCLUSIVE") == ("LEAKY" in flags)
        assert set(report.layers["evaluation"]) == {"within:plain", "transfer"}


def test_an_encoder_that_transfers_as_well_raises_the_flag():
    texts, X = planted(**MEANING)
    for encoder, flagged in ((X[1], True), (embeddings(texts, d_model=48, seed=5), False)):
        report = study(texts, X, contextual={"encoder": encoder})
        assert all(("ENCODER" in r.flags) == flagged and r.verdict == "PASS" for r in report.results)


@pytest.mark.full
@pytest.mark.parametrize("name", ["meaning", *NOT_MEANING])
def test_rates_over_twenty_data_sets(name):
    """What must pass is planted in the study's 90 scenarios: in 36, length and style cannot be told apart from it in 1 of 11."""
    found = []
    for seed in range(20):
        texts, X = planted(90, seed=seed, **MEANING) if name == "meaning" else planted(seed=seed, **NOT_MEANING[name])
        found += verdicts(study(texts, X, seed=seed, dense_baselines={"embedding layer": embeddings(texts, d_model=48, seed=5)})).values()
    rate = found.count("PASS") / len(found)
    assert rate >= 0.95 if name == "meaning" else rate <= 0.05, rate


# --- the report -----------------------------------------------------------------------------------------------------

def test_tables_have_the_columns_that_notebooks_read(meaning):
    _texts, _X, report = meaning
    assert [r.metric for r in report.results] == [f"{c} transfer AUROC" for c in ("C/A", "C/I", "A/I", "macro")]
    layers = report.layers
    assert list(layers.columns) == ["layer", "contrast", "evaluation", "solver", "auroc", "ci_low", "ci_high", "d_prime", "null_high"]
    assert set(layers["contrast"]) == set(NAMES) and set(layers["solver"]) == {"logistic", "ridge"} and len(layers) == 2 * 7 * 5 * 2
    T = layers[layers["evaluation"] == "transfer"]
    assert T["null_high"].between(0.5, 0.85).all() and layers.loc[layers["evaluation"] != "transfer", "null_high"].isna().all()
    assert list(report.baselines.columns) == ["name", "family", "contrast", "direction", "T", "ci_low", "ci_high"]
    assert {"embedding layer", "length", "model tokens, binary, naive Bayes"} <= set(report.baselines["name"])
    assert set(report.baselines["direction"]) == {"within:plain", "within:counter", "plain->counter", "counter->plain", "transfer"}
    assert report.learning_curve["n"].unique().tolist() == [15, 30, 36]
    assert report.selectivity["control_held_out"].between(0.3, 0.7).all()
    assert {c: v.shape for c, v in report.directions.items()} == {c: (48,) for c in CONTRASTS}


def test_transfer_is_the_lesser_direction_and_best_words_the_greatest(meaning):
    _, _, report = meaning
    wide = report.layers.pivot_table(index=["layer", "contrast", "solver"], columns="evaluation", values="auroc")
    assert np.allclose(wide["transfer"], wide[["plain->counter", "counter->plain"]].min(axis=1))
    for r in report.results:
        own = report.baselines.query("contrast == @r.metric.split()[0] and direction == 'transfer'")
        assert np.isclose(own["T"].max(), r.text_baseline)


def test_the_same_seed_gives_the_same_report(meaning):
    texts, X, report = meaning
    ids = [[len(w) + 50 * ord(w[0]) for w in t.split()] for t in texts["response"]]
    again = study(texts, X, token_ids=ids, dense_baselines={"embedding layer": embeddings(texts, d_model=48, seed=5)})
    pd.testing.assert_frame_equal(report.layers, again.layers)
    assert [r.row() for r in report.results] == [r.row() for r in again.results]


def test_other_conditions_do_not_matter(meaning):
    texts, X, report = meaning
    other = texts.assign(condition="valence_stripped", label=texts["label"].map(dict(zip(CLASSES, ("factual", "informational", "procedural"), strict=True))))
    mixed = pd.concat([other, texts], ignore_index=True)
    again = study(mixed, np.concatenate([X[:, ::-1], X], axis=1), dense_baselines={"embedding layer": np.tile(embeddings(texts, d_model=48, seed=5), (2, 1))})
    assert [r.estimate for r in again.results] == [r.estimate for r in report.results]


def test_directions_are_in_activation_units_and_point_to_the_first_class():
    material, rng = bare(30), np.random.default_rng(0)
    X = noise(rng, material, layers=1)[0] * np.geomspace(0.01, 100, 40)
    w = np.zeros(40)
    w[7] = X[:, 7].std() * 2
    X = X + np.where(material.classes == 0, 1, -1)[:, None] * w
    found = best_weights(X, material.design)[0]
    scores = X @ found
    assert scores[material.classes == 0].mean() > scores[material.classes == 1].mean() + 1
    assert np.argmax(abs(found * X.std(axis=0))) == 7


# --- null distributions ---------------------------------------------------------------------------------------------

def null_areas(n_sets, n, cluster_of):
    found = []
    for seed in range(n_sets):
        material = bare(n, seed=seed)
        X = noise(np.random.default_rng(seed), material)
        texts = material.texts.assign(cluster=cluster_of(material.texts))
        design = make_design(texts["label"], texts["register"], texts["cluster"], contrasts=CONTRASTS, seed=seed, n_repeats=1)
        scores = out_of_fold(dense_source(X), design, n_layers=len(X), tol=1e-3)
        found.append([evaluate(scores, design)[name].value.mean() for name in ("within:plain", "plain->counter")])
    return np.mean(found, axis=0)


def test_grouped_null_is_at_chance_and_ungrouped_is_anti_predictive():
    within, across = null_areas(12, 30, lambda texts: texts["cluster"])
    assert abs(within - 0.49) <= 0.03 and abs(across - 0.49) <= 0.03
    within, _ = null_areas(6, 30, lambda texts: np.arange(len(texts)))
    assert within < 0.35


def max_t(n_sets, n, n_permutations, layers):
    """p of the best layer, and of the preregistered one, on data without any class effect."""
    p_any, p_one = [], []
    for seed in range(n_sets):
        material = bare(n, seed=seed)
        X = noise(np.random.default_rng(seed), material, layers=layers)
        labels = permuted_labels(material.design, material.classes, material.triplet, n_permutations=n_permutations, seed=seed)
        T = transfer_null(dense_source(X), material.design, labels, n_layers=layers, lambdas=(0.1, 1.0, 10.0))
        largest = T.max(axis=(0, 1))
        p_any.append((largest >= largest[:, :1]).mean(axis=1))
        p_one.append((largest >= T[0, :, :, 0].max(axis=0)[:, None]).mean(axis=1))
    return np.array(p_any), np.array(p_one)


def test_max_t_keeps_its_size():
    p_any, p_one = max_t(100, 20, 100, 3)
    assert (p_any[:, 0] <= 0.05).mean() <= 0.10 and (p_any <= 0.05).mean() <= 0.08
    assert 0.4 < p_any.mean() < 0.6  # and is a p-value, not merely a large number
    assert (p_one <= 0.05).mean() <= 0.05


@pytest.mark.full
def test_max_t_keeps_its_size_at_full_size():
    p_any, _ = max_t(400, 30, 400, 8)
    assert (p_any <= 0.05).mean() <= 0.07 and ((p_any <= 0.05).mean(axis=0) <= 0.10).all()


def test_permutations_keep_what_they_should():
    material = bare(20)
    design = material.design
    labels = permuted_labels(design, material.classes, material.triplet, n_permutations=300, seed=0)
    assert (labels[:, 0] == design.Y).all()
    for c, Y in enumerate(design.Y):
        assert (abs(labels[c]) == abs(Y)).all()
        sums = np.stack([np.bincount(material.triplet, weights=row) for row in labels[c]])
        assert (sums == sums[0]).all()
        by_register = labels[c].reshape(300, 2, 20, 3)
        assert (by_register[:, 0] == by_register[:, 1]).all()  # what ties a scenario's two registers together stays
        assert 0.2 < (labels[c, 1:] == Y)[:, Y != 0].mean() < 0.8
    halves = make_design(material.texts["label"], material.texts["register"], material.texts["cluster"] // 2, contrasts=CONTRASTS, seed=0, n_repeats=1)
    moved = permuted_labels(halves, material.classes, material.triplet, n_permutations=50, seed=0).reshape(6, 50, 2, 10, 2, 3)
    assert (moved[..., 0, :] == moved[..., 1, :]).all()


def test_an_incomplete_triplet_keeps_its_labels():
    material = bare(20)
    keep = np.flatnonzero(np.arange(120) != 1)
    design = make_design(material.texts["label"].iloc[keep], material.texts["register"].iloc[keep], material.texts["cluster"].iloc[keep],
                         contrasts=CONTRASTS, seed=0, n_repeats=1)
    labels = permuted_labels(design, material.classes[keep], material.triplet[keep], n_permutations=100, seed=0)
    assert (labels[0][:, 0] == 1).all() and (labels[3][:, [0, 1]] == design.Y[3, [0, 1]]).all()
    assert len(np.unique(labels[1][:, 0])) == 2  # C and I of that triplet are both there


def test_logistic_and_ridge_nulls_agree():
    material = bare(20)
    X = noise(np.random.default_rng(0), material)
    labels = permuted_labels(material.design, material.classes, material.triplet, n_permutations=100, seed=0)[:1]
    T = [transfer_null(dense_source(X), material.design, labels, n_layers=2, lambdas=(1.0, 10.0), solver=s) for s in ("ridge", "logistic")]
    assert T[0].shape == T[1].shape == (2, 2, 1, 100)
    assert abs(np.quantile(T[0], 0.975) - np.quantile(T[1], 0.975)) < 0.03 and np.corrcoef(T[0].ravel(), T[1].ravel())[0, 1] > 0.9


def test_the_null_of_the_data_is_the_cross_validated_value():
    material = bare(20)
    X = noise(np.random.default_rng(0), material)
    labels = permuted_labels(material.design, material.classes, material.triplet, n_permutations=2, seed=0)
    T = transfer_null(dense_source(X), material.design, labels, n_layers=2, lambdas=(0.1, 1.0))
    for i, lam in enumerate((0.1, 1.0)):
        scores = out_of_fold(dense_source(X), material.design, n_layers=2, lambdas=(lam,), solver="ridge", tol=1e-6)
        assert np.allclose(T[:, i, :, 0], evaluate(scores, material.design)["transfer"].value[:, :6], atol=1e-4)


def test_unrelated_offsets_transfer_by_chance_and_more_so_in_few_dimensions():
    """N1: T scatters around .5, widely where there are few dimensions; planted meaning lies above it."""
    spread = {}
    for d in (4, 100):
        material, rng = bare(30), np.random.default_rng(0)
        X = noise(rng, material, layers=1, d_model=d)[0] + (rng.standard_normal((3, d)) * 1.5)[material.classes].astype(np.float32)
        T = unrelated_offsets(X, material, seed=0, n_draws=60)
        assert T.shape == (60, 7) and 0.3 < np.median(T[:, 0]) < 0.6
        spread[d] = np.quantile(T[:, 0], 0.95)
        seen = evaluate(out_of_fold(dense_source(X[None]), material.design, n_layers=1, tol=1e-3), material.design)["transfer"].value[0, 0]
        assert d == 4 or seen > T[:, 0].max()
    assert spread[4] > spread[100] + 0.05


# --- adjustment -----------------------------------------------------------------------------------------------------

def adjusted_null(n_sets, *, effect=0.0):
    """Scores that hold the confound, a class effect or none, and noise; the confound is larger in the first class."""
    values, raw, p = [], [], []
    for seed in range(n_sets):
        material, rng = bare(30, seed=seed), np.random.default_rng(seed)
        y, n = material.design.Y[0], len(material.classes)
        F = np.column_stack([0.8 * y + rng.standard_normal(n), rng.standard_normal(n)])
        s = F[:, 0] + effect * y + rng.standard_normal(n)
        scores = np.broadcast_to(s, (1, 2, 6, n))
        direction = (0, 1)
        values.append(adjusted_areas(scores, material.design, direction, F).value[0, 0])
        raw.append(areas(scores[None], material.design, direction).value[0, 0])
        p.append(freedman_lane(scores, material, F, 0, n_permutations=99, seed=seed))
    return np.mean(values), np.mean(raw), np.array(p)


def test_adjusted_null_is_at_chance_and_an_effect_survives():
    adjusted, raw, p = adjusted_null(80)
    assert abs(adjusted - 0.5) <= 0.03 and raw > 0.65
    assert (p <= 0.05).mean() <= 0.10 and (p > 0.5).any()
    adjusted, _, p = adjusted_null(20, effect=1.0)
    assert adjusted > 0.7 and (p <= 0.05).mean() >= 0.9


# --- the rule -------------------------------------------------------------------------------------------------------

def evidence(T=0.9, lexical=0.6, adjusted=0.88, p=0.001, se=0.02, **more):
    rng = np.random.default_rng(0)

    def value(v):
        z = rng.standard_normal(90)
        z = (z - z.mean()) / z.std()
        return Value(v, v + z * se / np.sqrt(89))
    return Evidence(**{"T": value(T), "adjusted": value(adjusted), "lexical": value(lexical), "lexical_name": "words", "p": p, "p_offsets": 0.005,
                       "encoder": None, "one_register": False} | more)


@pytest.mark.parametrize(("change", "verdict", "said"), [
    ({}, "PASS", "lead"), ({"p": 0.03}, "INCONCLUSIVE", "p 0.030"), ({"p_offsets": 0.03}, "INCONCLUSIVE", "GENERIC"), ({"lexical": 0.81}, "INCONCLUSIVE", "LEAKY"),
    ({"T": 0.58, "adjusted": 0.7, "se": 0.02}, "FAIL", "below 0.65"), ({"adjusted": 0.5}, "FAIL", "adjusted"),
    ({"adjusted": 0.53, "se": 0.05}, "INCONCLUSIVE", "reaches .5"), ({"T": 0.74, "lexical": 0.72, "se": 0.03}, "INCONCLUSIVE", "reaches 0"),
    ({"T": 0.5, "lexical": 0.9}, "INCONCLUSIVE", "LEAKY"), ({"T": 0.62, "adjusted": 0.62, "se": 0.05, "p": 0.5}, "INCONCLUSIVE", "p 0.5"),
    ({"lexical": 0.97, "T": 0.999, "adjusted": 0.99, "se": 0.001, "one_register": True}, "PASS", "lead"),
    ({"lexical": 0.99, "one_register": True}, "INCONCLUSIVE", "LEAKY")])
def test_rule(change, verdict, said):
    found, reason = rule(evidence(**change), THRESHOLDS)
    assert found == verdict and said in reason, reason


def test_a_flattering_baseline_is_replaced_by_chance():
    assert np.isclose(evidence(T=0.7, lexical=0.2).lead(THRESHOLDS).value, 0.2)
    assert np.isclose(evidence(T=0.7, lexical=0.42).lead(THRESHOLDS).value, 0.28)


def test_power_says_what_could_have_been_seen():
    def said(**change):
        return ruling.power(evidence(**change), THRESHOLDS, n_clusters=90)
    assert said().startswith("90 clusters tell a lead of 0.0") and "more" not in said()
    assert "more triplets would decide it (PASS)" in said(T=0.70, lexical=0.68, se=0.03)
    assert "no number of triplets" in said(lexical=0.9)
    assert "more triplets would decide it (FAIL)" in said(T=0.6, adjusted=0.62, lexical=0.62, se=0.05, p=0.5)
    assert "would not decide it" in said(T=0.7, adjusted=0.7, lexical=0.72)
    assert "more triplets would not decide it" in said(p_offsets=0.04)


def test_the_clusters_asked_for_would_decide():
    """With the interval that so many clusters give, and the same values, the rule decides as foretold."""
    e = evidence(T=0.74, lexical=0.70, adjusted=0.6, se=0.05, p=0.04)
    to_pass, to_fail = ruling.clusters_needed(e, THRESHOLDS, n_clusters=90)
    assert 90 < to_pass < to_fail
    for factor, verdict in ((1.02, "PASS"), (0.9, "INCONCLUSIVE")):
        shrink = np.sqrt(90 / (factor * to_pass))
        p = norm.sf(norm.isf(0.04) / shrink)
        assert rule(evidence(T=0.74, lexical=0.70, adjusted=0.6, se=0.05 * shrink, p=p), THRESHOLDS)[0] == verdict


def test_interval_of_the_rule_is_the_one_asked_for():
    assert np.isclose(evidence(se=0.02).T.high - 0.9, 1.987 * 0.02, atol=1e-3)


# --- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("spoil", "said"), [
    (lambda t, X: (t, np.where(np.arange(48) == 3, np.nan, X)), "NaN"), (lambda t, X: (t, np.where(np.arange(48) == 3, np.inf, X)), "infinite"),
    (lambda t, X: (t, X[:, 1:]), "do not fit"), (lambda t, X: (t, X[0]), "layer, text"), (lambda t, X: (t, np.ones_like(X)), "constant")])
def test_bad_activations_are_named(spoil, said):
    texts, X = spoil(*planted(12))
    with pytest.raises(BadInput, match=said):
        probe(X, texts, thresholds=THRESHOLDS, model_id="m", layer=0, seed=0)
    with pytest.raises(BadInput, match="layer 9"):
        probe(*planted(12)[::-1], thresholds=THRESHOLDS, model_id="m", layer=9, seed=0)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda t: t["label"] != "affective", "affective"), (lambda t: t["scenario_id"] < "s003", "clusters"), (lambda t: t["scenario_id"] < "s000", "too few"),
    (lambda t: (t["label"] != "cognitive") | (t["register"] == "plain"), "counter")])
def test_too_little_is_inconclusive_with_its_reason(spoil, said):
    texts, X = planted(16)
    keep = spoil(texts).to_numpy()
    report = study(texts[keep], X[:, keep])
    assert set(verdicts(report).values()) == {"INCONCLUSIVE"} and said in report.results[0].reason
    assert all(r.estimate is None for r in report.results) and report.layers.empty and report.directions == {}
    with_one_cluster = study(texts.assign(cluster=0), X)
    assert set(verdicts(with_one_cluster).values()) == {"INCONCLUSIVE"} and "cluster" in with_one_cluster.results[0].reason


def test_odd_features_do_no_harm():
    texts, X = planted(20, **MEANING)
    constant, copied = np.full_like(X[..., :8], 7), np.repeat(X[..., :1], 8, axis=2)
    wide = np.concatenate([X, constant, copied, 1e4 + 0 * X[..., :2]], axis=2)
    wide = np.concatenate([wide, np.ones_like(wide[:1])])
    report = study(texts, wide, n_permutations=50)
    assert all(np.isfinite([r.estimate, r.ci_low, r.ci_high, r.p]).all() for r in report.results)
    assert report.layers.query("layer == 2 and evaluation == 'transfer'")["auroc"].eq(0.5).all()
    assert all(np.isfinite(v).all() and not v[48:56].any() for v in report.directions.values())


def test_half_precision_and_more_texts_than_features():
    texts, X = planted(20, d_model=8, **MEANING)
    report = study(texts, X.astype(np.float16), n_permutations=50)
    assert all(np.isfinite(r.estimate) for r in report.results)


def test_baseline_arrays_must_fit():
    texts, X = planted(12)
    with pytest.raises(BadInput, match="'twin'"):
        study(texts, X, dense_baselines={"twin": X[:, 1:]})
