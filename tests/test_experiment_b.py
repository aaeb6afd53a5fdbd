"""Experiment B end to end: what notebooks 05 and 07 call, on null data, on planted data, and on too little of it."""

import numpy as np
import pandas as pd
import pytest

from lib.params import load_params
from lib.stats import simulate
from lib.stats.clusters import clusters
from lib.stats.convergence import convergence
from lib.stats.probes import probe
from lib.stats.separation import layer_curve, separation
from lib.stats.specificity import specificity
from lib.stats.verdicts import INCONCLUSIVE, PASS
from lib.text.leakage import audit_or_say
from lib.text.synthetic import TYPES, embeddings, triplets

PARAMS = load_params("smollm2-135m")
LIMITS = PARAMS.thresholds
BLOCKS = {("empathy", "plain"): TYPES, ("empathy", "counter"): TYPES, ("valence_stripped", "plain"): ("factual", "informational", "procedural"),
          ("non_empathy", "plain"): ("response_1", "response_2", "response_3")}


def texts_of(n, *, seed, **more):
    """A text table of all conditions; only the empathy texts may differ in their words."""
    empathy = triplets(n, seed=seed, **more)
    neutral = triplets(n, seed=seed + 500, share=0.0, registers=("plain",))
    tables = [empathy]
    for condition, own in (("valence_stripped", ""), ("non_empathy", "n")):
        names = dict(zip(TYPES, BLOCKS[condition, "plain"], strict=True))
        table = neutral.assign(condition=condition, label=neutral["label"].map(names), scenario_id=own + neutral["scenario_id"])
        tables.append(table.assign(cluster=table["cluster"] + 1000 * bool(own), text_id=condition + table["text_id"]))
    return pd.concat(tables, ignore_index=True)


def activations(texts, offsets, *, d=48, layers=2, seed=0, extra=None):
    """Activations [layer, text, d]: scenario + class offset [block][3, d] + noise; `extra` [text, d] is added."""
    rng, spread = np.random.default_rng([3, seed]), simulate.power_law(d)
    codes = np.unique(texts["cluster"], return_inverse=True)[1]
    which = np.zeros((len(texts), d))
    for block, labels in BLOCKS.items():
        for k, label in enumerate(labels):
            which[((texts["condition"] == block[0]) & (texts["register"] == block[1]) & (texts["label"] == label)).to_numpy()] = offsets[block][k]
    return np.stack([spread.scenarios(codes.max() + 1, rng)[codes] + which + rng.standard_normal((len(texts), d)) + (0 if extra is None else extra)
                     for _ in range(layers)]).astype(np.float32)


def null_offsets(null, *, d=48, seed=0):
    """N0: none. N1: three styles alike in all conditions, so nothing is special to empathy, and a counter register whose
    offsets have nothing in common with the plain one's. (Offsets of their own in each condition would be specific.)"""
    rng, spread = np.random.default_rng([5, seed]), simulate.power_law(d)
    styles, other = (simulate.null_offsets(null, 3, spread=spread, rng=rng) for _ in range(2))
    return {block: other if block[1] == "counter" else styles for block in BLOCKS}


def planted_offsets(*, d=48, seed=0):
    """C, A and I in directions of their own, the same in both registers; controls with structures of their own."""
    rng, size = np.random.default_rng([6, seed]), 0.35
    meaning = size * rng.standard_normal((3, d))
    return {block: meaning if block[0] == "empathy" else size * rng.standard_normal((3, d)) for block in BLOCKS}


def experiment(texts, X, *, seed=0, n_permutations=400):
    """All result rows of notebooks 05 and 07. Holm over seven contrasts leaves room for a PASS from 280 permutations on."""
    about = dict(model_id="synthetic", layer=1, seed=seed, n_permutations=n_permutations)
    found = probe(X, texts, thresholds=LIMITS.probes, n_repeats=1, dense_baselines={"embedding layer": embeddings(texts, d_model=48, seed=5)}, **about).results
    leaky = "LEAKY" in found[0].flags
    return [*found, separation(X[1], texts, thresholds=LIMITS.separation, leaky=leaky, **about).result,
            specificity(X[1], texts, thresholds=LIMITS.specificity, **about).result]


def passing(null, seeds, n=30):
    """How many of the null data sets get any calibrated PASS."""
    count = 0
    for seed in seeds:
        texts = texts_of(n, seed=seed, share=0.0)
        rows = experiment(texts, activations(texts, null_offsets(null, seed=seed), seed=seed), seed=seed)
        told = [f"{r.metric} {r.reason}" for r in rows if r.verdict == PASS]
        print(null, seed, told)
        count += bool(told)
    return count


@pytest.mark.parametrize("null", ["N0", "N1"])
def test_null_data_get_no_pass(null):
    assert passing(null, range(4)) == 0


@pytest.mark.full
@pytest.mark.parametrize("null", ["N0", "N1"])
def test_forty_null_data_sets_full(null):
    assert passing(null, range(40)) <= 2


def test_planted_structure_in_swapped_words_passes_everywhere():
    texts = texts_of(48, seed=1, share=0.12, swap=True)
    rows = experiment(texts, activations(texts, planted_offsets(), seed=1, extra=0.5 * embeddings(texts, d_model=48, seed=9)))
    assert [r.verdict for r in rows] == [PASS] * 6, [str(r) for r in rows]
    assert all(r.power and r.null and r.p_literal_N0 is not None for r in rows)


@pytest.mark.parametrize(("words", "longer", "lexicon"), [(0.2, 0, 2.0), (0.0, 4, 0.0)])
def test_a_lexicon_or_length_alone_never_passes(words, longer, lexicon):
    """A vocabulary of each type that is the same in both registers; texts of each type that differ in length."""
    texts = texts_of(40, seed=2, share=words, swap=False, longer=longer)
    size = texts["response"].str.split().str.len().to_numpy(float)
    direction = np.random.default_rng(0).standard_normal(48)
    extra = lexicon * embeddings(texts, d_model=48, seed=9) + (longer > 0) * np.outer((size - size.mean()) / size.std(), direction)
    rows = experiment(texts, activations(texts, null_offsets("N0"), seed=2, extra=extra))
    assert PASS not in [r.verdict for r in rows[:5]], [str(r) for r in rows]


# --- too little data: a reason in every stage, never a crash or a number ---------------------------------------------

def few(texts):
    return texts[(texts["scenario_id"] <= "s002") & (texts["condition"] == "empathy")]


@pytest.mark.parametrize("spoil", [lambda t: t.assign(cluster=0), few, lambda t: t[t["label"] != "affective"]], ids=["one cluster", "three triplets", "one class missing"])
def test_too_little_gives_a_reason_in_every_stage(spoil):
    texts = texts_of(16, seed=0).reset_index(drop=True)
    keep = spoil(texts)
    X = activations(texts, null_offsets("N0"))[:, keep.index]
    keep = keep.reset_index(drop=True)
    rng = np.random.default_rng(0)
    latents = [abs(rng.standard_normal((len(keep), 20))) for _ in range(2)]
    gates = pd.DataFrame(columns=["gate", "value", "rule", "bound", "passed"])
    about = dict(model_id="m", layer=1, seed=0)
    audit = audit_or_say(keep, thresholds=LIMITS.probes, seed=0)
    assert not audit.leaky and (audit.reason.startswith("not audited") or len(audit.best))
    rows = [*experiment(keep, X), clusters(latents, {}, keep, gates, thresholds=LIMITS.clusters, **about).result,
            convergence(X[1], latents, [rng.standard_normal((20, 48))] * 2, keep, gates, thresholds=LIMITS.convergence, **about).result]
    assert len(rows) == 8 and layer_curve(X, keep).empty
    for row in rows:
        assert row.verdict == INCONCLUSIVE and row.reason and row.estimate is None and row.p is None, str(row)
