"""U against brute force and planted noise; the jackknife against the textbook; the whitening against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf

from lib.errors import BadInput
from lib.stats.ustat import cluster_sums, cosine, cross_means, cross_products, jackknife
from lib.stats.whitening import cross_fitted, exchangeable, ledoit_wolf, residuals


def brute_force(values, codes, metric, without=None):
    """Mean of ⟨p_s, q_t⟩ over pairs of scenarios in different clusters, pair by pair; NaN marks missing traits."""
    n_traits = values.shape[1]
    total, n = np.zeros((n_traits, n_traits)), np.zeros((n_traits, n_traits))
    for s in range(len(codes)):
        for t in range(len(codes)):
            if codes[s] != codes[t] and without not in (codes[s], codes[t]):
                product = values[s] @ metric @ values[t].T
                total += np.nan_to_num(product)
                n += ~np.isnan(product)
    return total / n


@given(seed=st.integers(0, 10**6), n_clusters=st.integers(4, 7), missing=st.booleans())
@settings(max_examples=25, deadline=None)
def test_u_and_its_delete_one_values_equal_brute_force(seed, n_clusters, missing):
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(n_clusters), rng.integers(0, n_clusters, 5)])
    values, root = rng.standard_normal((len(codes), 3, 4)), rng.standard_normal((4, 4))
    if missing:
        values[-3:, 2] = np.nan
    present = ~np.isnan(values[..., 0])
    counts = cluster_sums(present.astype(float), codes, n_clusters=n_clusters)
    products = cross_products(cluster_sums(np.nan_to_num(values), codes, n_clusters=n_clusters), counts,
                              metric=lambda rows: rows @ (root @ root.T))
    assert np.allclose(products.full, brute_force(values, codes, root @ root.T))
    for g in range(n_clusters):
        assert np.allclose(products.loo[g], brute_force(values, codes, root @ root.T, without=g))


def test_the_short_form_equals_the_long_one():
    sums, counts = np.random.default_rng(9).standard_normal((8, 3, 4)), np.arange(1, 9)
    assert np.allclose(cross_means(sums, counts), cross_products(sums, counts).full)


def test_u_is_unbiased_where_a_plain_product_is_not():
    rng, codes = np.random.default_rng(0), np.repeat(np.arange(20), 3)
    u, plain = [], []
    for _ in range(300):
        shared = rng.standard_normal((20, 1, 30))[codes]  # noise that a cluster's scenarios and traits have in common
        values = shared + rng.standard_normal((60, 2, 30))
        products = cross_products(cluster_sums(values, codes, n_clusters=20), np.full(20, 3))
        u.append(products.full), plain.append(products.plain)
    error = np.std(u, axis=0) / np.sqrt(300)
    assert (np.abs(np.mean(u, axis=0)) < 4 * error).all()
    assert np.mean(plain, axis=0)[0, 1] > 1.2  # 30 dimensions / 20 clusters of noise taken for signal


def test_jackknife_of_a_mean_is_the_textbook_standard_error():
    x = np.random.default_rng(1).standard_normal(25)
    values = np.stack([x, np.ones(25)], axis=1)[..., None]
    interval = jackknife(lambda p: p[..., 0, 1], cross_products(values, np.ones(25)))
    assert interval.estimate == pytest.approx(x.mean())
    assert interval.se == pytest.approx(x.std(ddof=1) / 5)
    assert interval.high - interval.estimate == pytest.approx(2.0639 * interval.se, rel=1e-4)  # t with 24 df
    assert interval.at(0.95) == pytest.approx((interval.low, interval.high))


def test_one_undefined_delete_one_value_makes_the_interval_undefined():
    products = cross_products(np.random.default_rng(2).standard_normal((12, 2, 3)), np.ones(12))
    interval = jackknife(lambda p: np.where(p[..., 0, 0] == p[..., 0, 0].max(), np.nan, p[..., 0, 0]), products)
    assert np.isnan([interval.low, interval.high]).all()


def test_cosine_of_a_vector_without_length_is_undefined():
    assert np.isnan(cosine(np.array([[-0.1, 0.3], [0.3, 1.0]]), 0, 1))
    assert np.isnan(cosine(np.zeros((2, 2)), 0, 1))


def test_two_clusters_are_refused():
    with pytest.raises(BadInput, match="three clusters"):
        cross_products(np.ones((2, 2, 3)), np.ones(2))


@pytest.mark.parametrize(("n", "d"), [(200, 20), (30, 80)])
def test_precision_equals_scikit_learn(n, d):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((n, d)) * np.linspace(0.2, 3, d)
    reference = LedoitWolf(assume_centered=True).fit(rows)
    ours = ledoit_wolf(rows)
    assert ours.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-6)
    assert np.allclose(ours(np.eye(d)), reference.precision_, rtol=1e-5, atol=1e-8)


def test_precision_of_copies_is_finite_and_of_nothing_is_refused():
    rows = np.repeat(np.random.default_rng(4).standard_normal((50, 3)), 4, axis=1)
    assert np.isfinite(ledoit_wolf(rows)(np.eye(12))).all()
    with pytest.raises(BadInput, match="no variation"):
        ledoit_wolf(np.zeros((20, 5)))


def test_cross_fitting_takes_the_bias_out_of_a_whitened_u():
    """A metric fitted to the noise it measures finds length in noise; the same metric without the fold does not."""
    rng, codes, within, crossed = np.random.default_rng(5), np.arange(40), [], []
    for _ in range(60):
        values = rng.standard_normal((40, 6, 100)) * np.arange(1, 101.0) ** -1
        sums = values - values.mean(1, keepdims=True)
        metrics = ledoit_wolf(residuals(values)), cross_fitted([(values, codes)], n_clusters=40)
        for found, metric in zip((within, crossed), metrics, strict=True):
            products = cross_products(sums, np.ones(40), metric=metric)
            found.append(np.trace(products.full) / np.trace(products.plain))
    assert np.mean(within) > 0.1
    assert abs(np.mean(crossed)) < 4 * np.std(crossed) / np.sqrt(60)


def test_the_permutation_metric_does_not_know_the_labels():
    rng = np.random.default_rng(6)
    values = rng.standard_normal((15, 3, 8)) + np.array([0.0, 1, 2])[None, :, None]
    swapped = values.copy()
    swapped[::2, [0, 1]] = swapped[::2, [1, 0]]
    assert np.allclose(exchangeable(values)(np.eye(8)), exchangeable(swapped)(np.eye(8)))
