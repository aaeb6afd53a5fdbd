"""Majority of models: the rule's own numbers, its size on a global null, and what stays in M."""

from dataclasses import replace

import numpy as np
import pytest

from lib.errors import BadInput
from lib.stats.majority import majority
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result


def results(*pairs, criterion="separation"):
    return [Result(criterion=criterion, model_id=f"m{i}", layer=3, metric="euclidean", literal_value=0.0,
                   literal_verdict=PASS, verdict=verdict, reason="planted", estimate=0.1, p=p)
            for i, (verdict, p) in enumerate(pairs)]


def test_known_numbers():
    found = majority(results((PASS, 0.001), (PASS, 0.01), (FAIL, 0.9)), n_models=3, alpha=0.05)
    assert found == {"criterion": "separation", "r": 2, "n_models": 3, "n_pass": 2,
                     "p_pc": pytest.approx(0.02), "verdict": PASS}
    assert majority(results((PASS, 0.03)), n_models=1, alpha=0.05)["p_pc"] == pytest.approx(0.03)
    # of four, three must hold: (4 - 3 + 1) times the third smallest
    four = results(*[(PASS, p) for p in (0.001, 0.002, 0.004, 0.5)])
    assert majority(four, n_models=4, alpha=0.05)["p_pc"] == pytest.approx(0.008)


def test_a_small_p_does_not_replace_a_pass():
    found = majority(results((INCONCLUSIVE, 1e-4), (PASS, 1e-4), (INCONCLUSIVE, 1e-4)), n_models=3, alpha=0.05)
    assert found["p_pc"] < 0.05 and found["verdict"] == INCONCLUSIVE


def test_passes_with_large_p_are_not_a_majority():
    assert majority(results((PASS, 0.2), (PASS, 0.2), (PASS, 0.2)), n_models=3, alpha=0.05)["verdict"] == INCONCLUSIVE


def test_a_model_without_a_result_stays_in_m():
    two = results((PASS, 0.001), (PASS, 0.001))
    assert majority(two, n_models=3, alpha=0.05)["verdict"] == PASS
    assert majority(two, n_models=5, alpha=0.05)["verdict"] == INCONCLUSIVE
    assert majority(two, n_models=5, alpha=0.05)["p_pc"] == 1.0
    gate = [replace(two[0], p=None, verdict=INCONCLUSIVE), replace(two[1], p=float("nan"))]
    assert majority(gate, n_models=3, alpha=0.05)["p_pc"] == 1.0


def test_a_majority_of_fails_is_a_fail():
    assert majority(results((FAIL, 0.9), (FAIL, 0.9), (PASS, 0.001)), n_models=3, alpha=0.05)["verdict"] == FAIL
    assert majority(results((FAIL, 0.9), (PASS, 0.001)), n_models=2, alpha=0.05)["verdict"] == INCONCLUSIVE


def test_size_on_models_of_which_one_too_few_holds():
    """With r - 1 true effects the rule may say PASS in at most alpha of the cases."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(2000):
        p = np.concatenate([np.full(2, 1e-6), rng.random(3)])
        passed += majority(results(*[(PASS, value) for value in p]), n_models=5, alpha=0.05)["verdict"] == PASS
    assert passed / 2000 <= 0.06


@pytest.mark.parametrize("bad", [[], results((PASS, 0.1)) + results((PASS, 0.1), criterion="probes"),
                                 results((PASS, 0.1)) + results((PASS, 0.2)), results(*[(PASS, 0.1)] * 4)])
def test_bad_lists_are_refused(bad):
    with pytest.raises(BadInput, match="majority"):
        majority(bad, n_models=3, alpha=0.05)
