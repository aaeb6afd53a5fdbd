"""Convergence: planted planes agree, unrelated directions never pass, permuted p-values are uniform, cosines follow their law."""

import numpy as np
import pytest
from scipy.stats import beta, kstest

from lib.errors import BadInput
from lib.params import load_params
from lib.stats.clusters import clustered_rows
from lib.stats.convergence import (
    Direction,
    build,
    carriers,
    cluster_sums,
    convergence,
    disattenuated,
    energy,
    evaluate,
    halves,
    matched,
    verdict,
)
from tests.test_clusters import BAD, GOOD, text_table

THRESHOLDS = load_params("smollm2-135m").thresholds.convergence
TEXTS = text_table(45)
SMALL = {"n_splits": 10, "n_permutations": 60}


def world(strength, seed, *, d=64, m=128, rank=None, shared=True, texts=TEXTS):
    """`(resid, latents, decoder)`: latents 0…3 fire for the four types; unrelated type offsets instead where not `shared`.

    `rank`: the noise of the activations lives in that many dimensions.
    """
    rng = np.random.default_rng(seed)
    types = clustered_rows(texts)[1]
    basis = rng.standard_normal((rank or d, d)) / np.sqrt(rank or d)
    decoder = rng.standard_normal((m, rank or d)) @ basis
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    latents = np.maximum(rng.standard_normal((len(texts), m)), 0) * 0.3 + np.maximum(rng.standard_normal((texts.cluster.max() + 1, m)), 0)[texts.cluster]
    latents[np.arange(len(texts)), types] += strength
    resid = latents @ decoder + 0.3 * rng.standard_normal((len(texts), rank or d)) @ basis
    if not shared:
        offsets = rng.standard_normal((4, rank or d)) @ basis
        resid = resid - strength * decoder[types] + strength * (offsets / np.linalg.norm(offsets, axis=1, keepdims=True))[types]
    return resid, latents, decoder


def run(made, gates=GOOD, texts=TEXTS, seed=0, **options):
    resid, latents, decoder = made
    return convergence(resid, [latents], [decoder], texts, gates, thresholds=THRESHOLDS, model_id="m", layer=2, seed=seed, **SMALL | options)


def test_planted_plane_agrees_and_passes():
    report = run(world(2.0, 0))
    row = report.table.iloc[0]
    assert row.A >= 0.9 and report.result.verdict == "PASS" and row.ci_low <= row.A <= row.ci_high and report.result.literal_verdict == "PASS"
    assert set(report.table.design) == {"halves", "across registers"} and report.table.A.min() >= 0.9
    diagonal = report.cosines[report.cosines.type == report.cosines.cluster]
    assert diagonal.cosine.min() > 0.9 and (diagonal.cosine > diagonal.null).all()


def test_carriers_are_the_planted_latents():
    resid, _, decoder = world(2.0, 0)
    first = carriers(resid, decoder, TEXTS).query("rank == 0")
    assert first.latent.tolist() == [0, 1, 2, 3] and first.cosine.min() > 0.7


@pytest.mark.parametrize("seed", range(8))
def test_unrelated_directions_at_low_rank_never_pass(seed):
    """Five effective dimensions: random directions agree by chance, and the nulls know it."""
    report = run(world(1.5, seed, rank=5, m=32, shared=False), n_latents=3)
    assert report.result.verdict != "PASS"


@pytest.mark.full
@pytest.mark.parametrize("shared", [False, None])
def test_never_pass_at_full_size(shared):
    found = [run(world(0 if shared is None else 1.5, seed, rank=5, m=32, shared=shared is None), n_latents=3, n_splits=50, n_permutations=200).result.verdict
             for seed in range(100)]
    assert found.count("PASS") == 0


def permuted_p(seed):
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((len(TEXTS), 12)), np.maximum(rng.standard_normal((len(TEXTS), 16)), 0), rng.standard_normal((16, 12))
    side = build(*made, TEXTS, registers=None, n_splits=4, n_latents=3, seed=seed)
    row, _, _ = evaluate(side, made[0], made[2], np.arange(16), quantile=0.975, n_permutations=39, seed=seed)
    return row["p"]


def test_permuted_p_values_are_uniform():
    p = np.array([permuted_p(seed) for seed in range(60)]) - np.random.default_rng(0).random(60) / 40
    assert kstest(p, "uniform").pvalue > 0.01 and (p <= 0.1).mean() <= 0.2


def test_cosine_quantiles_follow_the_beta_law():
    """cos² of random directions in d dimensions is Beta(1/2, (d − 1)/2)."""
    d, rng = 24, np.random.default_rng(0)
    v = rng.standard_normal((40_000, d))
    cosines = np.abs(disattenuated(v / np.linalg.norm(v, axis=1, keepdims=True), np.eye(d)[:1], np.ones(len(v)), np.ones(1)))[:, 0]
    for q in (0.5, 0.9, 0.975):
        assert np.quantile(cosines, q) == pytest.approx(np.sqrt(beta(0.5, (d - 1) / 2).ppf(q)), abs=0.01)


def test_energy_is_the_share_in_the_span():
    directions = np.eye(4)[:3]
    assert energy(directions, np.array([[1.0, 1, 0, 0], [1, -1, 0, 0]])) == pytest.approx([1, 1, 0])


def test_matching_is_one_to_one_and_best():
    cosines = np.array([[0.9, 0.8, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.5]])
    mean, order = matched(cosines)
    assert mean == pytest.approx((0.8 + 0.9 + 0.5) / 3) and order.tolist() == [1, 0, 2]


def test_reliability_is_one_for_repeats_and_zero_for_noise():
    rng = np.random.default_rng(0)
    cluster, onehot = np.repeat(np.arange(40), 4), np.tile(np.eye(4), (40, 1))
    for values, wanted in ((np.tile(rng.standard_normal((4, 50)), (40, 1)), 1.0), (rng.standard_normal((160, 50)), 0.0)):
        found = cluster_sums(values, onehot, cluster, n_clusters=40).total(np.ones((1, 40), bool))
        assert found.reliability == pytest.approx(np.full((1, 4), wanted), abs=0.2)


def test_leaving_a_cluster_out_equals_doing_without_it():
    rng = np.random.default_rng(0)
    cluster, onehot, values = np.repeat(np.arange(12), 4), np.tile(np.eye(4), (12, 1)), rng.standard_normal((48, 6))
    sums, mask = cluster_sums(values, onehot, cluster, n_clusters=12), np.ones((1, 12), bool)
    loo = sums.without(sums.total(mask), mask)
    mask[0, 5] = False
    direct = sums.total(mask)
    for name in ("sums", "own", "n", "n_own"):
        assert getattr(loo, name)[0, 5] == pytest.approx(getattr(direct, name)[0])
    assert isinstance(direct, Direction)


def test_halves_are_disjoint_halves():
    masks = halves(45, n_splits=7, rng=np.random.default_rng(0))
    assert masks.shape == (7, 45) and (masks[0] != masks[1]).all() and set(masks.sum(1)) <= {22, 23}


def test_noise_shrinks_the_plain_cosine_but_not_a():
    """With noisy probe directions A stays near 1, since reliability is divided out."""
    resid, latents, decoder = world(2.0, 1)
    noisy = resid + 3 * np.random.default_rng(5).standard_normal(resid.shape)
    row = run((noisy, latents, decoder)).table.iloc[0]
    assert row.reliability_probe < 0.7 and row.A == pytest.approx(1, abs=0.12)


def test_gates_decide_first():
    report = run(world(2.0, 0), gates=BAD)
    assert report.result.verdict == "INCONCLUSIVE" and "mmcs" in report.result.reason


def test_rules():
    row = {"A": 0.8, "ci_low": 0.7, "ci_high": 0.9, "null_permuted": 0.5, "null_noise": 0.3, "null_rows": 0.2, "P": 0.6, "P_null": 0.3,
           "reliability_probe": 0.9, "reliability_sae": 0.9}
    for change, wanted in (({}, "PASS"), ({"P": 0.2}, "INCONCLUSIVE"), ({"null_rows": 0.75}, "INCONCLUSIVE"), ({"null_rows": 0.85}, "FAIL"),
                           ({"null_rows": 0.85, "reliability_sae": 0.5}, "INCONCLUSIVE"), ({"A": 0.3, "ci_low": 0.2, "ci_high": 0.4}, "FAIL")):
        assert verdict([row | change], GOOD, THRESHOLDS)[0] == wanted


def test_one_register_is_flagged():
    texts = text_table(45, registers=("plain",))
    report = run(world(2.0, 0, texts=texts), texts=texts)
    assert report.result.flags == ("ONE-REGISTER",) and set(report.table.design) == {"halves"}


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda x, z, w: (np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x), z, w), "activations: NaN"),
    (lambda x, z, w: (x, z * np.inf, w), "latents: NaN"),
])
def test_bad_input_is_one_line(spoil, words):
    with pytest.raises(BadInput, match=words), np.errstate(all="ignore"):
        run(spoil(*world(0, 0)))


def test_few_clusters_are_inconclusive():
    texts = text_table(15)
    report = run(world(0, 0, texts=texts), texts=texts)
    assert report.result.verdict == "INCONCLUSIVE" and "at least 20" in report.result.reason and report.result.estimate is None
    assert report.table.empty and report.cosines.empty and report.carriers.empty
