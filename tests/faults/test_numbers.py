"""Numbers that no verdict may rest on, and numbers so small that they must not change one; and one verdict whatever the threads."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.params import load_params
from lib.stats import bandwidth, causality, contexts, directions, known_answers, response, separation, specificity
from tests.conftest import ROOT
from tests.faults.table import record, size

THRESHOLDS = load_params("tiny").thresholds
ENTRIES = {"probes": "probe", "separation": "separation", "clusters": "clusters", "convergence": "convergence", "specificity": "specificity",
           "causality": "effect", "bandwidth": "effective_dimension"}  # of each criterion, where its numbers go in
TOLERANCE = 1e-4  # of every number of a result, between numbers of threads


def changed(values, change):
    """The numbers that enter, in whatever shape: an array, or a list of them."""
    return [change(each) for each in values] if isinstance(values, list) else change(values)


def judged(criterion: str, change, monkeypatch) -> dict:
    """The criterion's row on data with a planted effect, with what goes in changed."""
    name, (_, _, make, planted) = ENTRIES[criterion], known_answers.CASES[criterion][0]
    real = getattr(known_answers, name)

    def entry(*args, **named):
        first = {"resid": changed(named["resid"], change)} if "resid" in named else {}
        return real(*(changed(each, change) if number == 0 else each for number, each in enumerate(args)), **named | first)
    with monkeypatch.context() as patch:
        patch.setattr(known_answers, name, entry)
        return make(planted, THRESHOLDS, np.random.default_rng(3)).row()


def put(values: np.ndarray, at: random.Random, *, share: float, value: float) -> np.ndarray:
    """A copy with this value in a share of places, one at least."""
    made, rng = np.array(values), np.random.default_rng(at.randrange(2**32))
    made.reshape(-1)[rng.choice(made.size, max(1, int(share * made.size)), replace=False)] = value
    return made


def test_nan_and_infinite_numbers_are_refused_by_name(monkeypatch):
    rng, tries, losses = random.Random(0), 0, []
    for criterion in ENTRIES:
        for _ in range(size(30, 3)):
            value, tries = rng.choice([np.nan, np.inf, -np.inf]), tries + 1
            try:
                losses.append(f"{criterion} with {value}: {judged(criterion, lambda each, value=value: put(each, rng, share=0.0, value=value), monkeypatch)['verdict']}")
            except BadInput as error:
                losses += [] if "finite" in str(error) and "\n" not in str(error) else [str(error)]
    record("NaN and infinity in activations", "refused in one line, by name, by every criterion", tries=tries, losses=len(losses))
    assert not losses, losses[:5]


TEXTS = pd.DataFrame([(f"s{s}", s, label, "plain") for s in range(12) for label in ("cognitive", "affective", "instrumental")], columns=["scenario_id", "cluster", "label", "register"])
BESIDE = {"directions": lambda x: directions.fit(x, TEXTS, seed=0), "parallel analysis": lambda x: contexts.parallel_analysis(x, seed=0), "transfer": lambda x: contexts.transfer(x, x[:9], x[9:18]),
          "latents": contexts.active_latents, "dimension": bandwidth.effective_dimension, "slope": lambda x: response.slope_test(x, np.ones_like(x)), "gap": lambda x: response.slope_test(np.ones_like(x), x),
          "random effects": lambda x: causality.effect(np.ones(9), x[0]), "covariance": lambda x: separation.causal_metric(x[:20, :20], 20), "words": lambda x: specificity.baseline_of(x, TEXTS)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_a_verdict_refuses_them_too(name, value):
    rows = np.random.default_rng(0).standard_normal((36, 20))
    rows[0, 3] = value
    with pytest.raises(BadInput, match=r"^[^\n]*(finite|norm)[^\n]*$"):
        BESIDE[name](rows)


@pytest.mark.parametrize("kind", [np.float32, np.float64][:size(2, 1)])
def test_subnormal_numbers_change_nothing(kind, monkeypatch):
    """A fiftieth of all values is subnormal, against zero in the same places."""
    monkeypatch.setattr(known_answers, "N", size(90, 40))
    losses, tiniest = [], np.finfo(kind).smallest_subnormal * 1000
    for criterion in list(ENTRIES)[size(0, 1):]:  # the first takes as long as all others
        first, second = (judged(criterion, lambda each, value=value: put(each.astype(kind), random.Random(1), share=0.02, value=value), monkeypatch) for value in (0.0, tiniest))
        losses += different(first, second, criterion)
    record(f"subnormal numbers in activations, {kind.__name__}", "every verdict and number as with zeros", tries=len(ENTRIES), losses=len(losses))
    assert not losses, losses[:5]


def different(first: dict, second: dict, name: str, tolerance: float = 1e-9) -> list[str]:
    """Where two result rows are not the same."""
    return [f"{name}: {key} {first[key]!r}, then {second[key]!r}" for key in first if key not in ("reason", "power")
            and first[key] != (pytest.approx(second[key], abs=tolerance, rel=tolerance) if isinstance(second[key], float) else second[key])]


MEASURE = """
import json, sys
import numpy as np, torch
torch.set_num_threads(int(sys.argv[1]))
from lib.model import activations, prompts, weights
from lib.params import load_params
from lib.stats import bandwidth, directions
from lib.stats.clusters import clusters
from lib.stats.probes import probe
from lib.stats.separation import separation
from lib.stats.specificity import specificity
from lib.text import dataset
import pandas as pd
texts = dataset.texts_table(dataset.read_folder(dataset.BUNDLED), cluster_cosine=0.4)
texts = texts[texts.cluster % int(sys.argv[2]) == 0].reset_index(drop=True)
params = load_params("tiny")
model, tokenizer, _ = weights.load(params.model)
encoded = [prompts.encode(tokenizer, "chat", row.scenario, row.response) for row in texts.itertuples()]
resid = activations.pool(model, encoded, [0, 1, 2], share=False)[0]
about, t = dict(model_id="tiny", layer=1, seed=0), params.thresholds
gates = pd.DataFrame([{"gate": "mmcs", "value": 1.0, "rule": ">=", "bound": 0.0, "passed": True}])
found = [*probe(resid, texts, thresholds=t.probes, n_permutations=50, n_repeats=1, **about).results,
         separation(resid[1], texts, thresholds=t.separation, n_permutations=100, **about).result,
         specificity(resid[1], texts, thresholds=t.specificity, n_permutations=50, **about).result,
         clusters([np.maximum(resid[1], 0)], {}, texts, gates, thresholds=t.clusters, n_surrogates=10, n_bootstraps=10, n_permutations=50, **about).result]
rows = [result.row() for result in found] + [{"pr": bandwidth.effective_dimension(resid[1]).pr, "agreement": list(directions.fit(resid[1], texts, seed=0).agreement().values())[0]}]
print(json.dumps(rows))
"""


def test_the_number_of_threads_changes_no_verdict(tmp_path):
    """The tiny model's activations of some of the texts, and the criteria on them, in processes with 1, 2 and 4 threads."""
    def measured(threads: int) -> list[dict]:
        few = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        done = subprocess.run([sys.executable, "-c", MEASURE, str(threads), str(size(3, 5))], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **few, "GOMP_SPINCOUNT": "20000"}, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    one, *others = [measured(threads) for threads in (1, 2, 4)[:size(3, 2)]]
    losses = [loss for rows in others for first, second in zip(one, rows, strict=True) for loss in different(first, second, first.get("metric", ""), TOLERANCE)]
    record("1, 2 and 4 threads", f"the same verdicts, every number within {TOLERANCE:g}", tries=len(others) * len(one), losses=len(losses))
    assert len(one) > 5 and not losses, losses[:5]
