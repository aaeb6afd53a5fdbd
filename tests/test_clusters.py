"""Clusters: structureless data give one, planted ones are counted, gates decide, bad input is one line."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from lib.errors import BadInput
from lib.params import load_params
from lib.stats.agreement import ari, contingency, jaccard, nmi, permuted_within
from lib.stats.clusters import clustered_rows, clusters, prepare, silhouettes, verdict
from lib.stats.describe import describe, telling_words
from lib.stats.gap import bootstrap_k, choose, gap_statistic, surrogates, within
from lib.stats.kmeans import kmeans

THRESHOLDS = load_params("smollm2-135m").thresholds.clusters
GOOD = pd.DataFrame([{"gate": "mmcs", "value": 0.8, "rule": ">=", "bound": 0.7, "passed": True}])
BAD = GOOD.assign(value=0.6, passed=False)
SMALL = {"n_surrogates": 40, "n_bootstraps": 20, "n_permutations": 200}


def text_table(n_scenarios=60, registers=("plain", "counter")):
    """Rows as in the study: three empathy types in each register, three neutral texts a scenario."""
    rows = [(f"s{s}", s, condition, register, label) for s in range(n_scenarios)
            for condition, register, labels in [*(("empathy", r, ("cognitive", "affective", "instrumental")) for r in registers),
                                                ("valence_stripped", "plain", ("factual", "informational", "procedural"))]
            for label in labels]
    table = pd.DataFrame(rows, columns=["scenario_id", "cluster", "condition", "register", "label"])
    return table.assign(text_id=[f"t{i}" for i in range(len(table))], context="frustration", response="some words")


def features(texts, strength, seed, *, d=60, decay=0.9, heavy=False):
    """Topics, noise of falling variance, and type means at `strength` times the noise's length."""
    rng = np.random.default_rng(seed)
    scale = decay ** np.arange(d)
    noise = (rng.standard_t(5, (len(texts), d)) if heavy else rng.standard_normal((len(texts), d))) * scale
    means = rng.standard_normal((4, d))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    topics = rng.standard_normal((texts.cluster.max() + 1, d))[texts.cluster] * 2
    return topics + noise + strength * np.linalg.norm(scale) * means[clustered_rows(texts)[1]]


def k_hat(strength, seed, *, n_surrogates=40, **options):
    table = prepare(features(TEXTS, strength, seed, **options), TEXTS)
    return gap_statistic(table.X, table.scenario, n_surrogates=n_surrogates, rng=np.random.default_rng(seed)).k


TEXTS = text_table(45)


@pytest.mark.parametrize("heavy", [False, True])
def test_structureless_data_give_one_cluster(heavy):
    assert np.mean([k_hat(0, seed, heavy=heavy) == 1 for seed in range(8)]) >= 0.85


def test_planted_four_are_counted():
    assert np.mean([k_hat(1.2, seed) == 4 for seed in range(8)]) >= 0.85


@pytest.mark.full
@pytest.mark.parametrize("decay", [0.9, 0.98])
def test_counts_at_full_size(decay):
    """Noise of effective rank 9 and 49; within a type the default study's latents have 13."""
    assert np.mean([k_hat(0, seed, decay=decay, n_surrogates=100) == 1 for seed in range(40)]) >= 0.85
    assert np.mean([k_hat(1.2, seed, decay=decay, n_surrogates=100) == 4 for seed in range(40)]) >= 0.85


@pytest.mark.full
def test_a_known_limit_noise_of_rank_three_is_counted_too_high():
    """Four clusters whose noise is flatter than the surrogates' split further; none are still none."""
    assert np.mean([k_hat(0, seed, decay=0.7, n_surrogates=100) == 1 for seed in range(40)]) >= 0.85
    assert min(k_hat(1.2, seed, decay=0.7, n_surrogates=100) for seed in range(40)) >= 4


def test_silhouette_counts_clusters_where_there_are_none():
    """Why the literal count decides nothing: it never says one."""
    counts = [silhouettes(prepare(features(TEXTS, 0, s), TEXTS).X, rng=np.random.default_rng(s)).argmax() + 2 for s in range(4)]
    assert min(counts) >= 2


def test_bootstraps_of_structureless_data_stay_at_one():
    """Repeated rows alone must not look like clusters."""
    table = prepare(features(TEXTS, 0, 3), TEXTS)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(45, np.full(45, 1 / 45), size=30)[:, table.cluster].astype(np.float32)
    assert np.mean(bootstrap_k(table.X, table.scenario, weights, rng=rng) == 1) >= 0.85


def test_surrogates_match_the_covariance():
    table = prepare(features(TEXTS, 1, 0), TEXTS)
    draws = surrogates(table.X, table.scenario, n=200, rng=np.random.default_rng(0))
    own, drawn = table.X.T @ table.X / len(table.X), np.mean([x.T @ x / len(x) for x in draws], axis=0)
    assert np.abs(own - drawn).max() < 0.02 * own.max()
    assert np.abs(within(draws, table.scenario) - draws).max() < 1e-5


def test_choice_of_k_on_made_curves():
    rng = np.random.default_rng(0)
    reference = np.log(np.linspace(1, 0.6, 8)) + 0.01 * rng.standard_normal((100, 8))
    flat = reference.mean(0)
    drop = np.where(np.arange(1, 9) >= 3, -0.5, 0.0)
    assert choose((flat + drop)[None], reference) == [3] and choose(flat[None], reference) == [1]


def test_kmeans_finds_what_scikit_learn_finds():
    from sklearn.cluster import KMeans
    X = np.concatenate([np.random.default_rng(k).standard_normal((40, 5)) + 6 * np.eye(5)[k] for k in range(4)])
    codes, inertia, _centres = kmeans(X[None], 4, rng=np.random.default_rng(0))
    theirs = KMeans(4, n_init=10, random_state=0).fit(X)
    assert adjusted_rand_score(codes[0], theirs.labels_) == 1 and inertia[0] == pytest.approx(theirs.inertia_, rel=1e-4)
    weights = np.ones((2, len(X)), np.float32)
    weights[1, :40] = 0  # leaving one group out, three centres suffice
    _, inertia, _ = kmeans(X[None], 3, rng=np.random.default_rng(0), weights=weights)
    assert inertia[1] < KMeans(3, n_init=10, random_state=0).fit(X[40:]).inertia_ * 1.001 < inertia[0]


def test_agreement_equals_scikit_learn():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (5, 200)), rng.integers(0, 3, (5, 200))
    b[:, :120] = a[:, :120] % 3
    tables = contingency(a, b)
    assert ari(tables) == pytest.approx([adjusted_rand_score(x, y) for x, y in zip(a, b, strict=True)])
    assert nmi(tables) == pytest.approx([normalized_mutual_info_score(x, y) for x, y in zip(a, b, strict=True)])
    assert ari(contingency(np.zeros((1, 9), int), b[:1, :9])) == [0]
    assert jaccard(a[0], a[:1], np.ones((1, 200))).min() == 1


def test_null_agreement_is_zero_and_stays_in_groups():
    rng = np.random.default_rng(0)
    table = prepare(features(TEXTS, 0, 1), TEXTS)
    permuted = permuted_within(table.types, table.scenario, n=300, rng=rng)
    for s in range(5):
        assert (np.sort(permuted[:, table.scenario == s], axis=1) == np.sort(table.types[table.scenario == s])).all()
    codes = kmeans(table.X[None], 4, rng=rng)[0]
    assert abs(ari(contingency(codes, permuted)).mean()) < 0.01


@pytest.mark.parametrize(("strength", "wanted"), [(1.3, "PASS"), (0.0, "FAIL")])
def test_verdicts(strength, wanted):
    z = [features(TEXTS, strength, seed) for seed in (0, 1)]
    report = clusters(z, {"words": features(TEXTS, 0, 9)}, TEXTS, GOOD, thresholds=THRESHOLDS, model_id="m", layer=3, seed=0, **SMALL)
    assert report.result.verdict == wanted and report.result.criterion == "clusters" and report.result.layer == 3
    assert report.result.ci_low <= report.result.estimate <= report.result.ci_high and -0.05 <= report.result.estimate <= 1
    assert set(report.summary.representation) == {"SAE seed 0", "SAE seed 1", "words"} and len(report.texts) == len(TEXTS)
    assert report.result.text_baseline_name == "words" and str(report.result)
    again = verdict([], BAD, THRESHOLDS)
    assert again[0] == "INCONCLUSIVE" and "mmcs 0.6, needed >= 0.7" in again[1]


def test_two_seeds_must_both_count_four():
    """One SAE with the clusters and one without decide nothing."""
    z = [features(TEXTS, strength, seed) for seed, strength in enumerate((1.3, 0.0))]
    report = clusters(z, {}, TEXTS, GOOD, thresholds=THRESHOLDS, model_id="m", layer=3, seed=0, **SMALL)
    assert report.result.verdict == "INCONCLUSIVE"


def test_rules():
    def made(k=4, share=1.0, ari=0.9, p=0.001):
        boot = np.where(np.arange(100) < 100 * share, 4, 3)
        return SimpleNamespace(k_bootstrap=boot, gap=SimpleNamespace(k=k), ari=ari, p=p)
    for pair, wanted in (((made(), made()), "PASS"), ((made(), made(k=3, share=0.7)), "INCONCLUSIVE"), ((made(), made(ari=0.4)), "INCONCLUSIVE"),
                         ((made(), made(p=0.1)), "INCONCLUSIVE"), ((made(share=0.7), made(share=0.7)), "INCONCLUSIVE"),
                         ((made(k=3, share=0.1), made(k=3, share=0.1)), "FAIL")):
        assert verdict(list(pair), GOOD, THRESHOLDS)[0] == wanted


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda x, t: (np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x), t), "NaN"),
    (lambda x, t: (np.zeros_like(x), t), "hardly any varies"),
    (lambda x, t: (x[:-1], t), "rows for"),
    (lambda x, t: (x, t.assign(cluster=0)), "scenario clusters"),
    (lambda x, t: (x[(t.condition == "empathy").to_numpy()], t[t.condition == "empathy"]), "none of type neutral"),
])
def test_bad_input_is_one_line(spoil, words):
    with pytest.raises(BadInput, match=words):
        prepare(*spoil(features(TEXTS, 0, 0), TEXTS))


def test_clusters_are_described_by_their_words_and_latents():
    texts = TEXTS.assign(response=np.where(TEXTS.label == "affective", "my heart aches", "the form is stamped"), context=np.where(TEXTS.cluster % 2, "a", "b"))
    latents = np.zeros((len(texts), 6))
    latents[(texts.label == "affective").to_numpy(), 2] = 1
    clustered = pd.DataFrame({"text_id": texts.text_id, "type": np.where(texts.label == "affective", "affective", "other"), "context": texts.context,
                              "SAE": (texts.label == "affective").astype(int)})
    top = pd.DataFrame({"latent": [2], "rank": [0], "token": [" heart"]})
    found = describe(clustered, texts, "SAE", latents=latents, scale=np.ones(6), top=top).set_index("cluster")
    assert found.example[1] == "my heart aches" and found.example[0] == "the form is stamped"
    assert found.share_affective[1] == 1 and "heart" in found.words[1] and found.latents[1].startswith("2: ' heart'")
    assert telling_words(["a b"] * 4, np.ones(4, bool)) == []
