"""Which words give the types away: the audit's n-grams, told to the models in words.

The counter register is written against the n-grams of the plain one. Where a lexical classifier trained on one register
still reads the other too well (or reads it the wrong way round, which would flatter a probe), what the two registers
have in common goes into a rewrite round. Every fifth scenario is never rewritten: its figures are reported apart.
"""

import pandas as pd

from lib.errors import BadInput
from lib.params import Thresholds
from lib.text.dataset import LABELS, Item, texts_table
from lib.text.leakage import EMPATHY, LeakageReport, audit

TOP = 12
TOO_FEW = "(too few texts to count)"
Items = list[tuple[str, Item]]


def untouched(number: int) -> bool:
    """One scenario of each five in a row, moving on by one so that it is not always the same context."""
    return (number + number // 5) % 5 == 4


def look(items: Items, thresholds: Thresholds) -> LeakageReport | None:
    """The audit of these triplets; None where there are too few to say anything."""
    if not items:
        return None
    texts = texts_table(items, cluster_cosine=thresholds.cluster_cosine)
    try:
        return audit(texts, thresholds=thresholds.probes, seed=0, n_repeats=1)
    except BadInput:
        return None


def plain_feedback(report: LeakageReport | None) -> str:
    """The words that mark each type in the plain register, a line a type."""
    if report is None:
        return TOO_FEW
    marks = by_type(report.ngrams[report.ngrams["register"] == "plain"])
    return "\n".join(f"{label}: {', '.join(words)}" for label, words in marks.items())


def by_type(ngrams: pd.DataFrame) -> dict[str, list[str]]:
    """`{type: heaviest n-grams}` over the pairs a type is in."""
    marks = {}
    for label in LABELS["empathy"]:
        side = ngrams["pair"].map(lambda pair, label=label: ["first", "second", ""][(*EMPATHY[pair], label).index(label)])
        own = ngrams[ngrams["side"] == side].assign(size=lambda rows: rows["weight"].abs())
        marks[label] = list(own.groupby("ngram")["size"].max().nlargest(TOP).index)
    return marks


def rewrite_feedback(report: LeakageReport | None, thresholds: Thresholds) -> dict[str, list[str]]:
    """`{sentence: n-grams}` for the pairs whose best lexical transfer is out of bounds; empty where all is well."""
    if report is None:
        return {}
    best, low, high = report.best, thresholds.probes.baseline_floor, thresholds.probes.fail_transfer
    found = {}
    for row in best[best["evaluation"] == "transfer"].itertuples():
        if low <= row.auroc <= high:
            continue
        marks = report.ngrams[report.ngrams["pair"] == row.pair].groupby(["side", "register"])["ngram"].agg(set)
        for side, label in zip(("first", "second"), EMPATHY[row.pair], strict=True):
            opposite = side if row.auroc > high else {"first": "second", "second": "first"}[side]
            both = marks.get((side, "plain"), set()) & marks.get((opposite, "counter"), set())
            what = "still mark" if row.auroc > high else "changed sides too thoroughly; some may come back to"
            if both:
                found[f"These {what} {label} against {' and '.join(set(EMPATHY[row.pair]) - {label})}"] = sorted(both)
    return found


def contains(text: str, ngrams: list[str]) -> bool:
    """Whether any of the n-grams occurs in the text."""
    padded = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())} "
    return any(f" {ngram} " in padded for ngram in ngrams)
