"""The judge: an API model rates pairs of free replies, blind, each pair in both orders.

It sees the message and two replies, and neither which is which nor that a model was edited. A pair is judged twice with
the replies exchanged, and the two ratings are averaged, so that a liking for the first place cancels. The same budget,
journal and resume as generation: what is in the journal is not bought again, and `max_usd` counts over its life.
"""

import json
from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.text import admission
from lib.text.api import Api, Pace, Request, api_key
from lib.text.briefs import prompt
from lib.text.budget import Ledger, price_of
from lib.text.journal import Journal, journal_path
from lib.text.purchases import Purchases

SCALES = ("cognitive", "affective", "instrumental", "helpfulness", "formality")
FIELDS = tuple(f"{place}_{scale}" for place in ("first", "second") for scale in SCALES)
MAX_TOKENS, ATTEMPTS, LEVELS = 1000, 3, range(1, 8)
Pair = tuple[str, str, str]


def request(scenario: str, first: str, second: str, *, model: str, attempt: int = 0) -> Request:
    """The request for one pair in one order."""
    system, user = prompt("rate")
    again = f"Attempt {attempt + 1}: the last answer was not usable." if attempt else ""
    schema = {"type": "object", "properties": {field: {"type": "integer", "enum": list(LEVELS)} for field in FIELDS},
              "required": list(FIELDS), "additionalProperties": False}
    block = {"type": "text", "text": system.substitute().strip(), "cache_control": {"type": "ephemeral"}}
    content = user.substitute(scenario=scenario, first=first or "(empty)", second=second or "(empty)", again=again).strip()
    return Request({"model": model, "max_tokens": MAX_TOKENS, "system": [block], "messages": [{"role": "user", "content": content}],
                    "output_config": {"format": {"type": "json_schema", "schema": schema}}})


def ratings_of(reply) -> np.ndarray:
    """`[2, scale]` of one answer; raises `admission.Rejected` where it is not usable."""
    try:
        found = json.loads(reply.text) if reply.stop_reason in admission.FINISHED else {}
        values = [found[field] for field in FIELDS]
    except (ValueError, KeyError, TypeError, RecursionError):
        values = []
    if not values or not all(type(value) is int and value in LEVELS for value in values):
        raise admission.Rejected("malformed", "it was not the JSON object asked for")
    return np.array(values, dtype=float).reshape(2, len(SCALES))


def rate(study_root: Path, pairs: list[Pair], *, model: str, prices: dict, max_usd: float, batches: bool,
         base_url: str | None = None, pace: Pace | None = None) -> tuple[np.ndarray, str]:
    """`(ratings [pair, 2, scale], stopped)` of pairs `(scenario, reply, other reply)`, mean over both orders.

    A pair that could not be judged in both orders is NaN; `stopped` says why where money or answers ran out. Needs no
    key where the journal has every answer. Raises BadInput where a setting or the key is unusable.
    """
    price = price_of(model, prices, batches=batches)
    journal = Journal(journal_path(Path(study_root).name.partition("--")[0]), secret=api_key(needed=False))
    try:
        purchases = Purchases(journal, Ledger(journal, max_usd), Api(pace=pace or Pace(), base_url=base_url, redact=journal.redact), batches=batches)
        found: dict[tuple[int, int], np.ndarray] = {}
        for attempt in range(ATTEMPTS):
            asked = {(i, order): request(scenario, *(replies if order == 0 else replies[::-1]), model=model, attempt=attempt)
                     for i, (scenario, *replies) in enumerate(pairs) for order in (0, 1) if (i, order) not in found}
            answers = purchases.buy(list(asked.values()), price, label="judging") if asked else {}
            for (i, order), one in asked.items():
                try:
                    if one.key in answers:
                        found[i, order] = ratings_of(answers[one.key])[::-1 if order else 1]
                except admission.Rejected:
                    continue
        purchases.close()
        print(f"judged {sum((i, 0) in found and (i, 1) in found for i in range(len(pairs)))} of {len(pairs)} pairs in both orders; "
              f"spent ${purchases.ledger.spent:.2f} of ${max_usd:.2f}; journal: {journal.path.name}")
        nothing = np.full((2, len(SCALES)), np.nan)
        ratings = np.array([(found.get((i, 0), nothing) + found.get((i, 1), nothing)) / 2 for i in range(len(pairs))])
        if pairs and np.isnan(ratings).all():
            raise BadInput(f"judge: no pair was judged ({purchases.stopped or 'no answer was usable'})")
        return ratings, purchases.stopped
    finally:
        journal.close()
