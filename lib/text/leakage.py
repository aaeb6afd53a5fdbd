"""Leakage audit: do words alone give the labels away, within a register and across registers?

The whole lexical family of methods.md §2 runs through the very folds and the very transfer that a probe runs through.
A probe that scores .98 on texts which a bag of words sorts at .98 has shown nothing about the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.params import Probes
from lib.stats.auroc import jackknife_interval
from lib.stats.contrasts import Areas, Design, areas, make_design, weakest
from lib.stats.crossfit import LAMBDAS, gram_source, out_of_fold
from lib.stats.solver import Dual, logistic
from lib.text.clusters import scenario_cosines
from lib.text.features import Logistic, NaiveBayes, document_frequency, family, ngrams, scaled_rows, tfidf

EMPATHY = {"C/A": ("cognitive", "affective"), "C/I": ("cognitive", "instrumental"), "A/I": ("affective", "instrumental")}
MIN_SCENARIOS = 10
UNTOUCHED = "untouched"
EMPTY = {"table": "condition pair evaluation baseline auroc ci_low ci_high n",
         "best": "condition pair evaluation baseline auroc ci_low ci_high n", "ngrams": "condition pair register side ngram weight"}


@dataclass(frozen=True)
class LeakageReport:
    """`table`: every baseline; `best`: the strongest per condition, pair and evaluation, "transfer" being the lesser
    of the two directions; `ngrams`: heaviest n-grams; `clusters`: near-duplicate scenarios; `strata`: counts. The same
    classifiers tested on the scenarios never edited against a score alone are the evaluations "…, untouched"."""

    table: pd.DataFrame
    best: pd.DataFrame
    ngrams: pd.DataFrame
    clusters: pd.DataFrame
    strata: pd.DataFrame
    leaky: bool
    reason: str


def lexical_scores(texts: pd.DataFrame, design: Design, *, lambdas: Sequence[float] = LAMBDAS,
                   token_ids: Sequence | None = None) -> tuple[list[str], np.ndarray]:
    """Names and out-of-fold scores [baseline, repeat, training register, contrast, text] of the lexical family."""
    baselines = family(texts["response"], token_ids=token_ids)
    solved = [b for b in baselines if isinstance(b, Logistic)]
    counted = [b for b in baselines if isinstance(b, NaiveBayes)]
    scores = out_of_fold(gram_source([b.gram for b in solved]), design, n_layers=len(solved), lambdas=lambdas, tol=1e-4)
    bayes = np.zeros((len(counted), *scores.shape[1:]))
    for repeat, r, k in np.ndindex(len(design.folds), len(design.registers), design.n_folds):
        test = design.folds[repeat] == k
        train = np.flatnonzero((design.register == r) & ~test)
        for i, baseline in enumerate(counted):
            bayes[i, repeat, r][:, test] = baseline.scores(train, np.flatnonzero(test), design.Y[:, train])
    return [b.name for b in (*solved, *counted)], np.concatenate([scores, bayes])


def audit(texts: pd.DataFrame, *, thresholds: Probes, seed: int, n_repeats: int = 2,
          token_ids: Sequence | None = None) -> LeakageReport:
    """Leakage table of a dataset (columns as in the text table), every condition that has two labels or more.

    A register with fewer than 10 scenarios in a condition is left out of that condition. `leaky` looks at the empathy
    condition where there is one, else at all: best lexical transfer above `thresholds.leaky_transfer`, or, with one
    register only, best lexical AUROC above `thresholds.leaky_within`.
    """
    texts = texts.reset_index(drop=True)
    tables, bests, ngrams = [], [], []
    for condition, rows in texts.groupby("condition", sort=False):
        rows = rows[rows.groupby("register")["scenario_id"].transform("nunique") >= MIN_SCENARIOS]
        pairs = label_pairs(rows["label"])
        if not pairs:
            continue
        ids = None if token_ids is None else [token_ids[i] for i in rows.index]
        design = make_design(rows["label"], rows["register"], rows["cluster"], seed=seed, n_repeats=n_repeats,
                                      contrasts={k: ([a], [b]) for k, (a, b) in pairs.items()})
        table, best = audit_design(rows, design, token_ids=ids)
        tables.append(table.assign(condition=condition))
        bests.append(best.assign(condition=condition))
        ngrams.append(heavy_ngrams(rows, design).assign(condition=condition))
    if not tables:
        raise BadInput(f"texts: no condition has two labels over {MIN_SCENARIOS} scenarios or more")
    best = _first(pd.concat(bests, ignore_index=True), "condition")
    leaky, reason = is_leaky(best, thresholds)
    return LeakageReport(_first(pd.concat(tables, ignore_index=True), "condition"), best,
                         _first(pd.concat(ngrams, ignore_index=True), "condition"), near_duplicates(texts),
                         strata(texts), leaky, reason)


def audit_or_say(texts: pd.DataFrame, *, thresholds: Probes, seed: int, n_repeats: int = 2) -> LeakageReport:
    """`audit`, or where the texts are too few for one: empty tables, not leaky as far as known, and the reason."""
    try:
        return audit(texts, thresholds=thresholds, seed=seed, n_repeats=n_repeats)
    except BadInput as error:
        empty = {name: pd.DataFrame(columns=columns.split()) for name, columns in EMPTY.items()}
        return LeakageReport(**empty, clusters=near_duplicates(texts), strata=strata(texts), leaky=False, reason=f"not audited: {error}")


def _first(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame[[column, *frame.columns.drop(column)]]


def label_pairs(labels: pd.Series) -> dict[str, tuple[str, str]]:
    """Name -> (positive, negative) label of every pair; the three empathy types have their usual letters."""
    found = list(dict.fromkeys(labels))
    if set(found) == {label for pair in EMPATHY.values() for label in pair}:
        return EMPATHY
    return {f"{a}/{b}": (a, b) for a, b in combinations(found, 2)}


def audit_design(rows: pd.DataFrame, design: Design, *, token_ids: Sequence | None) -> tuple:
    """Table of all baselines and table of the best, for one condition."""
    names, scores = lexical_scores(rows, design, token_ids=token_ids)
    found = {design.name(d): areas(scores, design, d) for d in design.evaluations}
    n = {design.name(d): [len(design.rows(d[1], c)) for c in range(len(design.contrasts))] for d in design.evaluations}
    if len(design.registers) > 1:
        across = [design.name(d) for d in design.directions]
        found["transfer"] = weakest([found[name] for name in across])
        n["transfer"] = np.min([n[name] for name in across], axis=0)
        if "untouched" in rows and (own := untouched(rows, design)) is not None:
            apart = {f"{own.name(d)}, {UNTOUCHED}": areas(scores, own, d) for d in own.directions}
            found |= apart | {f"transfer, {UNTOUCHED}": weakest(list(apart.values()))}
            n |= {name: [len(own.rows(0, c)) for c in range(len(own.contrasts))] for name in (*apart, f"transfer, {UNTOUCHED}")}
    table = pd.concat([tidy(each, names, design, n[name]).assign(evaluation=name) for name, each in found.items()])
    table = table[["pair", "evaluation", "baseline", "auroc", "ci_low", "ci_high", "n"]].reset_index(drop=True)
    best = table.loc[table.groupby(["evaluation", "pair"], sort=False)["auroc"].idxmax()].reset_index(drop=True)
    return table[~table["evaluation"].str.startswith("transfer")].reset_index(drop=True), best


def untouched(rows: pd.DataFrame, design: Design) -> Design | None:
    """The design with only those scenarios tested none of whose texts was edited against a score; None where all were."""
    free = rows["scenario_id"].isin(rows.loc[rows["untouched"].astype(bool), "scenario_id"]).to_numpy()
    return replace(design, Y=np.where(free, design.Y, 0)) if free.any() and not free.all() else None


def tidy(found: Areas, names: Sequence[str], design: Design, n: Sequence[int]) -> pd.DataFrame:
    """Long table (baseline, pair, auroc, ci_low, ci_high, n) of `found`."""
    low, high = jackknife_interval(found.value, found.deleted)
    index = pd.MultiIndex.from_product([names, design.contrasts], names=["baseline", "pair"])
    columns = {"auroc": found.value, "ci_low": np.clip(low, 0, 1), "ci_high": np.clip(high, 0, 1)}
    table = pd.DataFrame({k: v.ravel() for k, v in columns.items()}, index=index).reset_index()
    return table.assign(n=np.tile(n, len(names)))


def is_leaky(best: pd.DataFrame, thresholds: Probes) -> tuple[bool, str]:
    """The LEAKY rule on the table of best baselines, and the sentence that says why."""
    if (best["condition"] == "empathy").any():
        best = best[best["condition"] == "empathy"]
    across = best[best["evaluation"] == "transfer"]
    rows, limit = (across, thresholds.leaky_transfer) if len(across) else (best, thresholds.leaky_within)
    what = "transfers across registers" if len(across) else "reaches, in the only register,"
    top = rows.loc[rows["auroc"].idxmax()]
    leaky = bool(top["auroc"] > limit)
    return leaky, (f"best lexical baseline ({top['baseline']}) on {top['pair']} {what} {top['auroc']:.2f}, "
                   f"{'above' if leaky else 'not above'} {limit:.2f}")


def heavy_ngrams(rows: pd.DataFrame, design: Design, *, top: int = 10) -> pd.DataFrame:
    """The n-grams with the largest weights on either side (TF-IDF logistic on all texts of a register)."""
    found = []
    for r, register in enumerate(design.registers):
        train = np.flatnonzero(design.register == r)
        counted = ngrams(rows["response"].iloc[train])
        every = np.arange(len(train))
        K, names = tfidf(counted)(every, every), counted.names()
        fit = logistic(Dual(K, K), design.Y[:, train], 1.0, tol=1e-4)
        idf = np.log((1 + len(train)) / (1 + document_frequency(counted.counts))) + 1
        weights = fit.c @ scaled_rows(counted.counts.multiply(idf).tocsr(), order=2) * idf
        for pair, weight in zip(design.contrasts, weights, strict=True):
            order = np.argsort(weight)
            for side, chosen in (("first", order[::-1][:top]), ("second", order[:top])):
                found += [(pair, register, side, names[i], weight[i]) for i in chosen]
    return pd.DataFrame(found, columns=["pair", "register", "side", "ngram", "weight"])


def near_duplicates(texts: pd.DataFrame) -> pd.DataFrame:
    """Clusters that hold more than one scenario, with the largest cosine inside."""
    each = texts.drop_duplicates("scenario_id")[["scenario_id", "cluster", "scenario"]].reset_index(drop=True)
    cosines = scenario_cosines(list(each["scenario"])) - np.eye(len(each))
    found = [(c, len(g), "; ".join(map(str, g["scenario_id"])), cosines[np.ix_(g.index, g.index)].max())
             for c, g in each.groupby("cluster") if len(g) > 1]
    return pd.DataFrame(found, columns=["cluster", "n_scenarios", "scenario_ids", "max_cosine"])


def strata(texts: pd.DataFrame) -> pd.DataFrame:
    """Scenarios, clusters and texts per condition, register, context and domain."""
    by = [c for c in ("condition", "register", "context", "domain") if c in texts]
    return (texts.groupby(by, sort=False, dropna=False)
            .agg(n_scenarios=("scenario_id", "nunique"), n_clusters=("cluster", "nunique"), n_texts=("response", "size"))
            .reset_index())
