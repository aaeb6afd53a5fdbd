"""The leakage audit finds planted leaks, stays silent without, and works on other people's data."""

import time

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.params import PARAMS, Probes, read_yaml
from lib.text.clusters import scenario_clusters
from lib.text.contrast_audit import audit_contrast
from lib.text.leakage import audit
from lib.text.synthetic import triplets

THRESHOLDS = Probes(**read_yaml(PARAMS / "preregistration.yaml")["probes"])


def run(texts, **more):
    return audit(texts, thresholds=THRESHOLDS, seed=0, n_repeats=1, **more)


def best(report, pair="C/A"):
    return report.best[report.best["pair"] == pair].set_index("evaluation")["auroc"]


def test_swapped_vocabularies_leak_within_a_register_but_do_not_transfer():
    report = run(triplets(40, seed=0, share=0.15, swap=True))
    assert set(report.table["evaluation"]) == {"within:plain", "within:counter", "plain->counter", "counter->plain"}
    assert list(report.table.columns) == ["condition", "pair", "evaluation", "baseline", "auroc", "ci_low", "ci_high", "n"]
    assert best(report)["within:plain"] > 0.9 and best(report)["within:counter"] > 0.9
    assert best(report)["transfer"] < 0.65
    assert not report.leaky and "not above" in report.reason


def test_a_shared_vocabulary_is_leaky():
    report = run(triplets(40, seed=0, share=0.15, swap=False))
    assert report.leaky and best(report)["transfer"] > THRESHOLDS.leaky_transfer
    heaviest = report.ngrams[(report.ngrams["pair"] == "C/A") & (report.ngrams["side"] == "first")]
    assert (heaviest["weight"] > 0).all() and set(heaviest["register"]) == {"plain", "counter"}


def test_no_difference_gives_chance_with_an_interval_around_it():
    table = run(triplets(60, seed=0, share=0.0)).table
    assert 0.45 < table["auroc"].mean() < 0.53
    covered = (table["ci_low"] <= 0.5) & (table["ci_high"] >= 0.5)
    assert covered.mean() > 0.85


def test_one_register_uses_its_own_limit():
    clean, leaky = (run(triplets(40, seed=0, share=s, registers=("plain",))) for s in (0.05, 0.4))
    assert not clean.leaky and set(clean.best["evaluation"]) == {"within:plain"}
    assert leaky.leaky and "only register" in leaky.reason


def test_the_least_direction_counts():
    report = run(triplets(40, seed=1, share=0.1, swap=False))
    table = report.table.pivot_table(index=["pair", "baseline"], columns="evaluation", values="auroc")
    least = table[["plain->counter", "counter->plain"]].min(axis=1).groupby("pair").max()
    assert np.allclose(least.sort_index(), report.best[report.best["evaluation"] == "transfer"].set_index("pair")["auroc"].sort_index())


def test_scenarios_that_share_a_cluster_share_a_fold():
    """A type word per scenario pair leaks only if near-duplicates fall apart."""
    texts = triplets(40, seed=0, share=0.0, registers=("plain",))
    flip = np.random.default_rng(0).integers(0, 2, 20)
    tell = [f" zq{s // 2}" + ("x" if (label == "cognitive") == flip[s // 2] else "y")
            for s, label in zip(texts["scenario_id"].str[1:].astype(int), texts["label"], strict=True)]
    texts["response"] = texts["response"] + [t * 8 for t in tell]
    apart, together = run(texts), run(texts.assign(cluster=texts["cluster"] // 2))
    assert best(apart)["within:plain"] > 0.8 > 0.7 > best(together)["within:plain"]


def test_controls_registers_and_clusters_are_listed():
    texts = triplets(20, seed=0)
    few = triplets(20, seed=1).assign(condition="non_empathy")
    few = few[(few["register"] == "plain") | (few["scenario_id"] < "s005")]
    few["label"] = few["label"].map({"cognitive": "response_1", "affective": "response_2", "instrumental": "response_3"})
    copy = texts.assign(scenario=texts["scenario"].where(texts["scenario_id"] != "s001", texts["scenario"].iloc[0]))
    copy["cluster"] = copy["cluster"].replace(1, 0)
    report = run(pd.concat([copy, few.assign(scenario_id="n" + few["scenario_id"], cluster=few["cluster"] + 100)], ignore_index=True))
    control = report.table[report.table["condition"] == "non_empathy"]
    assert set(control["evaluation"]) == {"within:plain"}  # five scenarios in counter are too few
    assert set(control["pair"]) == {"response_1/response_2", "response_1/response_3", "response_2/response_3"}
    assert report.clusters["scenario_ids"].tolist() == ["s000; s001"] and report.clusters["max_cosine"].iloc[0] > 0.99
    assert report.strata["n_texts"].sum() == len(copy) + len(few)


def test_scenario_clusters():
    scenarios = ["my dog ran off in the park", "my dog ran off in the park today", "the boiler broke", "the boiler broke", "!", ""]
    found = scenario_clusters(scenarios, cosine=0.4)
    assert found[0] == found[1] and found[2] == found[3] and len(set(found)) == 4
    assert (scenario_clusters(scenarios * 3, cosine=0.4)[:6] == found).all()
    with pytest.raises(BadInput):
        scenario_clusters([], cosine=0.4)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda t: t[t["label"] == "cognitive"], "no condition"),
    (lambda t: t[t["scenario_id"] < "s004"], "no condition"),
    (lambda t: t.assign(cluster=0), "cluster"),
    (lambda t: t.assign(response=""), "non-empty")])
def test_bad_texts_are_named(spoil, said):
    with pytest.raises(BadInput, match=said):
        run(spoil(triplets(20, seed=0)))


def contrast(n, seed=0, **more):
    texts = triplets(n, seed=seed, registers=("plain",), **more)
    texts = texts[texts["label"] != "instrumental"].reset_index(drop=True)
    return pd.DataFrame({"text": texts["response"], "label": (texts["label"] == "cognitive").astype(int), "group": texts["scenario_id"]})


def test_audit_of_other_peoples_contrast():
    for share, low, high in ((0.0, 0.3, 0.75), (0.2, 0.95, 1.0)):
        table = audit_contrast(contrast(50, share=share), seed=0, cosine=0.4)
        assert list(table.columns) == ["evaluation", "family", "baseline", "auroc", "ci_low", "ci_high", "n"]
        assert low <= table["auroc"].iloc[0] <= high and (table["evaluation"] == "grouped").all() and (table["n"] == 100).all()


def test_an_own_test_set_is_scored_as_given():
    rows = contrast(50, share=0.1).assign(split=["train"] * 60 + ["test"] * 40)
    table = audit_contrast(rows, seed=0, cosine=0.4)
    assert (table["evaluation"] == "train->test").all() and (table["n"] == 40).all() and table["auroc"].iloc[0] > 0.8
    flipped = rows.assign(label=rows["label"].where(rows["split"] == "train", 1 - rows["label"]))
    again = audit_contrast(flipped, seed=0, cosine=0.4).set_index("baseline")["auroc"]
    assert np.allclose(again, 1 - table.set_index("baseline")["auroc"][again.index], atol=1e-9)


def test_pairs_without_groups_are_grouped_by_near_duplication():
    rows = contrast(30, share=0.0)
    twins = pd.concat([rows, rows]).drop(columns="group")
    twins["label"] = np.random.default_rng(0).integers(0, 2, len(rows)).tolist() * 2
    assert audit_contrast(twins, seed=0, cosine=0.4)["auroc"].max() < 0.8
    assert audit_contrast(twins.assign(group=range(len(twins))), seed=0, cosine=0.4)["auroc"].max() > 0.95


def test_activations_stand_beside_the_words():
    rows = contrast(40, share=0.0)
    X = np.random.default_rng(0).standard_normal((2, 80, 30))
    X[1] += rows["label"].to_numpy()[:, None]
    table = audit_contrast(rows, seed=0, cosine=0.4, X=X).set_index("baseline")
    assert table.loc["layer 1", "auroc"] > 0.95 > 0.7 > table.loc["layer 0", "auroc"]


@pytest.mark.parametrize(("change", "said"), [
    ({"label": 2}, "label"), ({"label": 1}, "one class"), ({"group": None}, "group"), ({"group": "one"}, "cluster"),
    ({"split": "dev"}, "split"), ({"text": " "}, "non-empty")])
def test_bad_contrast_data_are_named(change, said):
    with pytest.raises(BadInput, match=said):
        audit_contrast(contrast(20).assign(**change), seed=0, cosine=0.4)
    with pytest.raises(BadInput, match="column"):
        audit_contrast(contrast(20).drop(columns="text"), seed=0, cosine=0.4)


@pytest.mark.full
def test_audit_of_720_texts_takes_half_a_minute_at_most():
    texts = pd.concat([triplets(120, seed=0)], ignore_index=True)
    start = time.perf_counter()
    audit(texts, thresholds=THRESHOLDS, seed=0)
    assert time.perf_counter() - start < 30
