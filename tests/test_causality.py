"""Causality by known answers: size of both tests, power on a planted readout, and that no verdict comes without coherence and judge."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from lib.errors import BadInput
from lib.model import sweeps
from lib.model.interventions import unit
from lib.model.prompts import Encoded
from lib.params import load_params
from lib.stats.causality import Judged, causality, effect, equivalent, joint_p, selectivity, split_halves, style_change
from lib.stats.directions import fit
from lib.stats.response import slope_test

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


def test_size_over_three_directions():
    """Looking at three directions and taking the one that stands out does not inflate the size; and p can reach .0125."""
    rng = np.random.default_rng(1)
    null = [joint_p({name: effect(simulated(rng.standard_normal() * 0.02, rng)) for name in "abc"})[1] for _ in range(300)]
    assert np.mean(np.array(null) <= 0.05) <= 0.08
    planted = [joint_p({name: effect(simulated(-0.15 if name == "b" else 0.0, rng)) for name in "abc"}) for _ in range(50)]
    assert np.mean([p <= 0.0125 and name == "b" for name, p in planted]) >= 0.9


def sloped(extra, rng, n=12, n_controls=199, shared=-0.05, own_gap=3.0):
    """D and gaps [scenario, 1 + control]: all directions are read alike but for the tested one's `extra`; its gap is wider or narrower."""
    gap = rng.standard_normal((n, n_controls + 1)) * np.r_[own_gap, np.ones(n_controls)]
    slopes = shared + rng.standard_normal(n_controls + 1) * 0.02 + np.r_[extra, np.zeros(n_controls)]
    return slopes * gap + rng.standard_normal(gap.shape) * 0.03, gap


@pytest.mark.parametrize("own_gap", [0.3, 1.0, 3.0])
def test_size_of_the_slope_test(own_gap):
    rng = np.random.default_rng(2)
    p = [slope_test(*sloped(0.0, rng, own_gap=own_gap)).p for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.08


def test_power_of_the_slope_test():
    rng = np.random.default_rng(3)
    assert np.mean([slope_test(*sloped(-0.15, rng)).p <= 0.0125 for _ in range(50)]) >= 0.9


FEEL, OTHER, WARM, COLD = range(100, 110), range(200, 400), range(500, 505), range(600, 605)


@pytest.fixture(scope="module")
def reader(tiny):
    """A model whose output provably reads direction w from the prompt: its third block averages w over what it sees and
    writes it onto the difference between warm and cold words; prompts that hold a feeling word carry w."""
    model = copy.deepcopy(tiny[0])
    w = torch.tensor(unit(np.random.default_rng(5).standard_normal(48)), dtype=torch.float32)
    with torch.no_grad():
        head = torch.nn.Linear(48, model.config.vocab_size, bias=False)
        head.weight.copy_(model.get_output_embeddings().weight)
        u = torch.tensor(unit(np.random.default_rng(6).standard_normal(48)), dtype=torch.float32)
        head.weight[list(WARM)] += 0.5 * u
        head.weight[list(COLD)] -= 0.5 * u
        model.set_output_embeddings(head)
        model.get_input_embeddings().weight[list(FEEL)] += 0.05 * w
        attention = model.get_decoder().layers[2].self_attn
        attention.q_proj.weight.zero_(), attention.k_proj.weight.zero_(), attention.v_proj.weight.zero_(), attention.o_proj.weight.zero_()
        attention.v_proj.weight[0] = w
        attention.o_proj.weight[:, 0] = 0.05 * u
    return model, w.numpy().astype(float)


def study(model, direction, rng, n=6, n_random=199):
    """(i) and (ii) for one direction on `n` made-up scenarios: p of the rank test and of the slope test, exact D beside the first order."""
    random = unit(rng.standard_normal((n_random, 48)))
    stack, mean = np.vstack([direction, random]), np.zeros(48)
    prompt, every, gap, exact = [], [], [], []
    for _ in range(n):
        words = [*rng.choice(OTHER, 14), *rng.choice(FEEL, rng.integers(2, 9))]
        rng.shuffle(words)
        replies = [[*rng.choice(OTHER, 3), *rng.choice(kind, 3)] for kind in (WARM, COLD)]
        case = sweeps.Case("s", "plain", "", [Encoded((*map(int, words), *map(int, reply)), len(words)) for reply in replies], ["", ""])
        found = sweeps.responses(model, case, 1, {"w": stack}, mean=mean)["w"]
        prompt.append(found[0].change), every.append(found[1].change), gap.append(found[1].gap)
        exact.append(sweeps.ablated(model, case, 1, [direction[None]], mean=mean, where="prompt")[0][0])
    difference = [np.stack(values)[..., 0] - np.stack(values)[..., 1] for values in (prompt, every, gap, exact)]
    return effect(difference[3], difference[0][:, 1:].mean(0)), slope_test(difference[1], difference[2]), difference


def test_power_on_a_planted_readout(reader):
    model, w = reader
    rng = np.random.default_rng(7)
    found = [study(model, w, rng) for _ in range(20)]
    assert np.mean([e.p <= 0.0125 and e.mean < 0 for e, _, _ in found]) >= 0.9
    exact, linear = (np.concatenate([d[k] if k == 3 else d[k][:, 0] for _, _, d in found]) for k in (3, 0))
    assert linear.mean() == pytest.approx(exact.mean(), rel=0.3) and np.corrcoef(exact, linear)[0, 1] > 0.9


def test_a_direction_that_is_not_read_does_not_stand_out(reader):
    model, _ = reader
    rng = np.random.default_rng(8)
    found = [study(model, unit(rng.standard_normal(48)), rng) for _ in range(20)]
    assert np.mean([e.p <= 0.05 for e, _, _ in found]) <= 0.15 and np.mean([s.p <= 0.05 for _, s, _ in found]) <= 0.15


def test_verdicts():
    rng = np.random.default_rng(0)
    planted, none = {"cognitive": effect(simulated(-0.15, rng))}, {"cognitive": effect(simulated(0.0, rng, n=400))}
    assert decide(planted, judged=Judged(-0.6, 30)).verdict == "PASS"
    unjudged = decide(planted)
    assert unjudged.verdict == "INCONCLUSIVE" and unjudged.flags == ("LL-only",)
    incoherent = decide(planted, judged=Judged(-0.6, 30), cost=0.5)
    assert incoherent.verdict == "INCONCLUSIVE" and "INCOHERENT" in incoherent.flags
    assert decide(none, judged=Judged(0.0, 400)).verdict == "FAIL"
    assert decide(none, judged=Judged(0.0, 10)).verdict == "INCONCLUSIVE"  # ten judged replies cannot show equivalence
    assert decide(none, judged=Judged(-0.6, 30)).verdict != "PASS" and decide(none).verdict == "INCONCLUSIVE"
    slope = slope_test(*sloped(-0.3, rng))
    assert decide(none, judged=Judged(-0.6, 30), slopes={"cognitive": slope}).verdict == "PASS"


def test_equivalence_needs_enough_scenarios():
    assert equivalent(0.0, 30, 0.35) and not equivalent(0.0, 20, 0.35) and not equivalent(0.4, 1000, 0.35)


def test_selectivity_is_own_minus_others():
    rng = np.random.default_rng(0)
    change = rng.standard_normal((30, 3, 3)) * 0.1 - np.eye(3)
    found = selectivity(change)
    assert (found.ci_high < -0.8).all() and (selectivity(rng.standard_normal((30, 3, 3))).ci_low < 0.3).all()


def table(registers=("plain", "counter"), n=12):
    return pd.DataFrame([{"scenario_id": f"s{s}", "cluster": s, "register": r, "label": k} for r in registers for s in range(n)
                         for k in ("cognitive", "affective", "instrumental")])


def test_directions_are_never_fitted_on_what_they_are_tested_on():
    texts, rng = table(), np.random.default_rng(0)
    resid = rng.standard_normal((len(texts), 16))
    fitted = fit(resid, texts, seed=0)
    for id_ in ("s0", "s5"):
        for register, other in (("plain", "counter"), ("counter", "plain")):
            changed = resid.copy()
            own = ((texts.scenario_id == id_) | (texts.register == register)).to_numpy()
            changed[own] += rng.standard_normal((own.sum(), 16))  # the scenario itself, and the whole test register
            assert np.array_equal(fit(changed, texts, seed=0).of("cognitive", id_, register), fitted.of("cognitive", id_, register))
            changed = resid.copy()
            changed[(texts.register == other).to_numpy() & (texts.label == "cognitive").to_numpy()] += rng.standard_normal((n := 12, 16))
            assert n and not np.allclose(fit(changed, texts, seed=0).of("cognitive", id_, register), fitted.of("cognitive", id_, register))
    one = fit(resid[:36], table(("plain",)), seed=0)
    assert one.of("affective", "s1", "plain").shape == (16,)


def test_directions_need_both_halves():
    with pytest.raises(BadInput, match=r"more texts|two clusters"):
        fit(np.zeros((36, 4)), table(("plain",)), seed=0)
    with pytest.raises(BadInput, match="two clusters"):
        fit(np.random.default_rng(0).standard_normal((3, 4)), table(("plain",), n=1), seed=0)


def test_halves_keep_clusters_together():
    clusters = np.repeat(np.arange(20), 3)
    half = split_halves(clusters, 0)
    assert all(len(set(half[clusters == c])) == 1 for c in range(20)) and half.mean() == 0.5


def test_style_change_is_relative_to_the_untouched_row():
    scores = np.array([[-2.0, -3.0], [-2.5, -3.1]])
    assert style_change(scores, 0, 1) == pytest.approx([-0.4])
