"""Blind ratings of the bundled texts: what a reader who saw one message and one reply said the reply does.

`lib/data/ratings/ratings.csv` holds a row a judgement: `text_id, text_sha256, rater, answer, naturalness`. A rater saw one
reply of a scenario, without type, register or the other replies; the rubric is `rubric.md`. Who the raters are is said in
the data sheet. A judgement of a text that has changed since counts no more: its hash tells.
"""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.params import ROOT
from lib.text.agreement import cohen, interval

RATINGS = ROOT / "lib" / "data" / "ratings" / "ratings.csv"
ANSWERS = ("cognitive", "affective", "instrumental", "unclear")
COLUMNS = ["text_id", "text_sha256", "rater", "answer", "naturalness"]
SUMMARY = ["register", "texts", "raters", "ratings", "kappa_key", "kappa_key_low", "kappa_key_high", "kappa_raters", "naturalness",
           "naturalness_lowest", "stale"]


def text_hash(scenario: str, response: str) -> str:
    """What was judged, as 16 hex digits."""
    return hashlib.sha256(f"{scenario}\n{response}".encode()).hexdigest()[:16]


def read_ratings(path: Path = RATINGS) -> pd.DataFrame:
    """The judgements. Raises BadInput that names the file, the row and the field."""
    try:
        ratings = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path.name}: cannot be read ({str(error).splitlines()[0]})") from None
    if list(ratings.columns) != COLUMNS:
        raise BadInput(f"{path.name}: columns must be {', '.join(COLUMNS)}")
    for field, good in (("answer", ratings.answer.isin(ANSWERS)), ("naturalness", ratings.naturalness.isin(range(1, 6)))):
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise BadInput(f"{path.name}: row {row + 2}: {field}: {ratings[field][row]!r} is none of the rubric's")
    return ratings


def summary(ratings: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """A row a register of the empathy texts: κ with the intended type (with its jackknife interval over scenarios), κ of the first
    with the second rater of each text, mean naturalness, the lowest mean of a text, and how many judgements are stale."""
    empathy = texts[texts.condition == "empathy"]
    known = empathy.assign(text_sha256=[text_hash(s, r) for s, r in zip(empathy.scenario, empathy.response, strict=True)])
    told = ratings.merge(known[["text_id", "text_sha256", "scenario_id", "register", "label"]], on=["text_id", "text_sha256"])
    about = ratings.merge(known[["text_id", "register"]], on="text_id")
    rows = []
    for register, found in told.groupby("register", sort=False):
        label, answer = found.label.to_numpy(object), found.answer.to_numpy(object)
        key = interval(lambda keep, label=label, answer=answer: cohen(label[keep], answer[keep]), list(found.scenario_id))
        each = found.groupby("text_id")
        pairs = each.answer.agg(list)
        pairs = pairs[pairs.map(len) >= 2]
        nature = each.naturalness.mean()
        rows.append((register, len(nature), found.rater.nunique(), len(found), *key, cohen(pairs.str[0], pairs.str[1]),
                     found.naturalness.mean(), nature.min(), int((about.register == register).sum()) - len(found)))
    return pd.DataFrame(rows, columns=SUMMARY)
