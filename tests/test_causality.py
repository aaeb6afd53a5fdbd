"""Causality by known answers: size of the rank test, power, and that no verdict comes without coherence and judge."""

import numpy as np
import pytest

from lib.params import load_params
from lib.stats.causality import causality, effect, split_halves, style_change

THRESHOLDS = load_params("tiny").thresholds.causality


def simulated(shift, rng, n=12, n_random=199):
    """D [scenario, 1 + random]: directions vary around 0, scenarios around each direction's own mean."""
    means = np.r_[shift, rng.standard_normal(n_random) * 0.02]
    return means + rng.standard_normal((n, n_random + 1)) * 0.02


def decide(effects, **change):
    about = dict(thresholds=THRESHOLDS, model_id="m", layer=1, seed=0, cost=0.01, cost_band=0.1) | change
    return causality(effects, **about)[0]


def test_size_of_the_rank_test():
    rng = np.random.default_rng(0)
    p = [effect(simulated(rng.standard_normal() * 0.02, rng)).p for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.08


def test_power_on_a_planted_effect():
    rng = np.random.default_rng(0)
    assert np.mean([effect(simulated(-0.15, rng)).p <= 0.0125 for _ in range(50)]) >= 0.9


def test_verdicts():
    rng = np.random.default_rng(0)
    planted, none = {"cognitive": effect(simulated(-0.15, rng))}, {"cognitive": effect(simulated(0.0, rng, n=400))}
    assert decide(planted, judged_d_z=-0.6).verdict == "PASS"
    unjudged = decide(planted)
    assert unjudged.verdict == "INCONCLUSIVE" and unjudged.flags == ("LL-only",)
    incoherent = decide(planted, judged_d_z=-0.6, cost=0.5)
    assert incoherent.verdict == "INCONCLUSIVE" and "INCOHERENT" in incoherent.flags
    assert decide(none, judged_d_z=0.0).verdict == "FAIL"
    assert decide(none, judged_d_z=-0.6).verdict != "PASS" and decide(none).verdict == "INCONCLUSIVE"


def test_several_directions_are_corrected_for():
    rng = np.random.default_rng(3)
    effects = {name: effect(simulated(-0.15 if name == "a" else 0.0, rng, n_random=39)) for name in "abc"}
    assert decide(effects).p == pytest.approx(min(1, 3 * effects["a"].p))


def test_halves_keep_clusters_together():
    clusters = np.repeat(np.arange(20), 3)
    half = split_halves(clusters, 0)
    assert all(len(set(half[clusters == c])) == 1 for c in range(20)) and half.mean() == 0.5


def test_style_change_is_relative_to_the_untouched_row():
    scores = np.array([[-2.0, -3.0], [-2.5, -3.1]])
    assert style_change(scores, 0, 1) == pytest.approx([-0.4])
