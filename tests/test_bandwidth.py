"""Bandwidth by known answers: effective dimension, steering range, verdict."""

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.params import load_params
from lib.stats.bandwidth import (
    Range,
    bandwidth,
    coherence,
    coherent,
    effective_dimension,
    judged_coherent,
    largest_coherent,
    moments,
    one_sided_range,
    repeated_4grams,
    steering_range,
)
from lib.stats.contexts import active_latents, falling, log_bandwidth, meaning, parallel_analysis, transfer, validation

THRESHOLDS = load_params("tiny").thresholds.bandwidth


def sample(spectrum, n, rng):
    return rng.standard_normal((n, len(spectrum))) * np.sqrt(spectrum) + 3.0


@pytest.mark.parametrize("truth", [41, 302])
def test_participation_ratio_is_unbiased_at_n_90(truth):
    spectrum = falling(truth, 576)
    rng = np.random.default_rng(0)
    found = [effective_dimension(sample(spectrum, 90, rng)).pr for _ in range(40)]
    assert np.mean(found) == pytest.approx(truth, rel=0.10)


def test_the_naive_ratio_would_be_far_off():
    """Without the unbiased moments the same data give a ratio bounded by n: the test above can fail."""
    rng = np.random.default_rng(0)
    y = sample(np.ones(576), 90, rng)
    values = np.linalg.eigvalsh(np.cov(y.T))
    assert values.sum() ** 2 / np.square(values).sum() < 90 and effective_dimension(y).pr > 400


def test_deleted_moments_equal_those_of_the_smaller_matrix():
    y = np.random.default_rng(0).standard_normal((12, 30))
    t1, t2 = moments(y @ y.T)
    for i in range(12):
        less = np.delete(y, i, 0)
        assert (t1[1 + i], t2[1 + i]) == pytest.approx([m[0] for m in moments(less @ less.T)])


def test_interval_covers_and_rank90_is_bounded():
    spectrum = np.arange(1, 577.0) ** -0.7
    truth = spectrum.sum() ** 2 / np.square(spectrum).sum()
    rng = np.random.default_rng(1)
    found = [effective_dimension(sample(spectrum, 50, rng)) for _ in range(60)]
    assert np.mean([low <= truth <= high for low, high in (one.interval for one in found)]) >= 0.88
    assert max(one.rank90 for one in found) <= 49


@pytest.mark.parametrize("y", [np.ones((20, 5)), np.full((20, 5), np.nan), np.random.default_rng(0).standard_normal((5, 3))])
def test_no_number_from_nothing(y):
    with pytest.raises(BadInput):
        effective_dimension(y)


def test_range_is_found_within_002():
    coeffs = np.linspace(-0.6, 0.6, 25)
    rng = np.random.default_rng(0)
    reach = rng.uniform(0.2, 0.5, 400)  # P(coherent at c) = 1 − (c − .2) / .3, so .8 is left at .26
    found = steering_range(coeffs, np.abs(coeffs)[:, None] <= reach[None], 0.8)
    assert found.positive == pytest.approx(0.26, abs=0.02) and found.negative == pytest.approx(0.26, abs=0.02) and not found.censored


def test_range_at_the_grids_end_is_censored_and_none_is_zero():
    coeffs = np.array([0.0, 0.3, 0.6])
    assert one_sided_range(coeffs, np.ones(3), 0.8) == (0.6, True)
    assert one_sided_range(coeffs, np.zeros(3), 0.8) == (0.0, False)


def test_repetition_is_incoherent():
    assert repeated_4grams("the same four words " * 6) > 0.7 and repeated_4grams("every word here differs from all others") == 0
    assert not coherent(np.array([1.0]), np.array([0.7]), (0.0, 2.0), 0.1)[0]


def verdict(range_e=0.4, range_f=0.4, decay_e=0.7, decay_f=0.7, *, censored=False, n=600):
    rng = np.random.default_rng(0)
    dims = [effective_dimension(sample(np.arange(1, 201.0) ** -decay, n, rng)) for decay in (decay_e, decay_f)]
    ranges = [Range(reach, reach, censored, 0.02) for reach in (range_e, range_f)]
    return bandwidth((dims[0], ranges[0]), (dims[1], ranges[1]), thresholds=THRESHOLDS, model_id="m", layer=1, seed=0)


def test_planted_difference_passes_none_does_not():
    assert verdict(range_e=0.9).verdict == "PASS"
    assert verdict(decay_e=0.3).verdict == "PASS" and "SMALLER" not in verdict(decay_e=0.3).flags
    smaller = verdict(range_f=0.9)
    assert smaller.verdict == "PASS" and smaller.flags == ("SMALLER",) and "times formality's" in smaller.reason
    assert verdict().verdict == "FAIL" and verdict(n=30).verdict == "INCONCLUSIVE"
    assert verdict(range_e=0.0).verdict == "INCONCLUSIVE"
    unknown = verdict(range_e=0.9, censored=True)
    assert unknown.verdict == "INCONCLUSIVE" and "CENSORED" in unknown.flags


def test_parallel_analysis_is_exact_on_white_noise():
    """A component is found in white noise at the nominal 5%, and planted ones are counted."""
    rng = np.random.default_rng(0)
    found = [parallel_analysis(rng.standard_normal((30, 40)), seed=k, n_surrogates=39) for k in range(300)]
    assert 0.02 <= np.mean([k > 0 for k in found]) <= 0.08
    for k in (1, 3):
        y = rng.standard_normal((90, 200)) + rng.standard_normal((90, k)) @ rng.standard_normal((k, 200)) * 1.5
        assert parallel_analysis(y, seed=0) == k


def test_validation_finds_what_was_planted():
    found = validation(np.linspace(-0.6, 0.6, 25), 0.8, n=90, d_model=576, seed=0)
    pr = found[found.quantity == "participation ratio"]
    assert ((pr.ci_low <= pr.planted) & (pr.planted <= pr.ci_high)).all()
    rest = found[found.quantity != "participation ratio"]
    assert (abs(rest.found - rest.planted) <= np.where(rest.quantity.str.startswith("range"), 0.02, 0)).all()


def test_bandwidth_has_an_interval_and_a_sentence():
    rng = np.random.default_rng(0)
    dimension = effective_dimension(sample(np.arange(1, 201.0) ** -0.7, 90, rng))
    found = log_bandwidth(dimension, Range(0.2, 0.3, False, 0.1))
    assert found["b"] == pytest.approx(dimension.pr * 0.5) and found["b_low"] < found["b"] < found["b_high"]
    assert log_bandwidth(None, None)["b"] is None and log_bandwidth(dimension, Range(0, 0, False, 0.1))["b"] is None
    row = {"context": "crisis_support", "n": 90, "pr": dimension.pr, "range": 0.5, "note": "", **found}
    assert "less room" in meaning(row, {"b": 1e3}) and "more room" in meaning(row, {"b": 0.1}) and "not distinguishable" in meaning(row, {"b": found["b"]})
    assert "at least" in meaning(row | {"censored": True}, {"b": None})
    assert "not known" in meaning({"context": "x", "n": 4, "b": None, "note": "4 samples"}, {"b": 1.0})


def test_transfer_is_one_for_a_shared_direction_and_half_for_none():
    rng = np.random.default_rng(0)
    shift = rng.standard_normal(50)
    neutral = rng.standard_normal((18, 50))
    shared = transfer(rng.standard_normal((18, 50)) + shift, neutral + rng.standard_normal((18, 50)) + shift, neutral)
    assert shared["auroc"] > 0.9 and shared["ci_low"] > 0.7
    aurocs = [transfer(rng.standard_normal((18, 50)) + shift, rng.standard_normal((18, 50)), rng.standard_normal((18, 50)))["auroc"] for _ in range(60)]
    assert np.mean(aurocs) == pytest.approx(0.5, abs=0.05)


def test_latents_that_carry_the_effect_are_counted():
    z = np.zeros((20, 100))
    z[:, :7] = 1.0
    z[:3, 50] = 1.0
    effective, active = active_latents(z)
    assert active == 7 and effective == pytest.approx(7, rel=0.1) and active_latents(np.zeros((5, 9))) == (0.0, 0)


def test_the_largest_coherent_dose_stops_at_the_first_hole():
    doses = pd.DataFrame({"direction": "a", "coeff": [-0.4, -0.2, -0.1, 0, 0.1, 0.2, 0.4], "coherent": [1, 0.5, 1, 1, 1, 1, 1]})
    assert largest_coherent(doses, ["a"], 0.8) == 0.1


def test_one_prompt_gives_no_range():
    with pytest.raises(BadInput, match="at least 2"):
        steering_range(np.array([-0.1, 0, 0.1]), np.ones((3, 1), dtype=bool), 0.8)


def test_unsteered_replies_are_inside_their_own_band():
    """Of ten replies too: nothing that was done to none of them may be called incoherent."""
    from lib.model.steering import Replies
    rng = np.random.default_rng(0)
    for n in (5, 10, 30):
        unsteered = Replies([[f"reply number {i} says its own words {rng.integers(9)}" for i in range(n)]], rng.standard_normal((1, n)))
        assert judged_coherent(unsteered, *coherence(unsteered)).mean() >= 0.95
