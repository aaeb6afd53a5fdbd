"""Which replies may enter the set: complete, well-formed, English, of the right length, and not there already.

A reply that is turned down stays in the journal; the word for why is counted and goes into the next attempt.
"""

import json
import re
from collections.abc import Iterable
from functools import cache

from lib.text.clusters import scenario_cosines
from lib.text.features import FUNCTION_WORDS, words
from lib.text.journal import WORKED, Reply

FINISHED = ("end_turn", "stop_sequence")
RESPONSE_WORDS, SCENARIO_WORDS = (35, 65), (12, 50)
MAX_RATIO = 1.15  # longest response of an item over the shortest, in words
FUNCTION_SHARE = 0.25  # English prose has about half, other languages' texts below a tenth
SHARED_5GRAMS = 0.5  # two responses that share more of these are one response
MIN_NATURALNESS = 3


class Rejected(Exception):
    """A reply that does not enter the set. `kind` is one word, for counting; the message says what to do better."""

    def __init__(self, kind: str, fault: str):
        super().__init__(fault)
        self.kind = kind


def fields_of(reply: Reply, names: Iterable[str]) -> dict:
    """The answer's fields, by its schema; texts stripped of space at their ends."""
    if reply.kind == WORKED and reply.stop_reason not in FINISHED:
        kind = {"max_tokens": "truncated", "refusal": "refused"}.get(reply.stop_reason, "unfinished")
        raise Rejected(kind, f"it was {kind}")
    try:
        content = json.loads(reply.text)
        found = {name: content[name].strip() if isinstance(content[name], str) else content[name] for name in names}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Rejected("malformed", "it was not the JSON object asked for") from None
    if not all(is_plain(value) or (name == "safety_step" and value == "") or (name == "naturalness" and value in range(1, 6))
               for name, value in found.items()):
        raise Rejected("malformed", "a field was empty or not plain text")
    return found


def is_plain(value) -> bool:
    """A text that is not empty and holds nothing unprintable but line breaks."""
    return isinstance(value, str) and value.replace("\n", " ").isprintable() and value != ""


def check_texts(texts: dict[str, str], *, limits: tuple[int, int] = RESPONSE_WORDS) -> None:
    """English, within the limits, and of like length."""
    lengths = [len(text.split()) for text in texts.values()]
    if not all(is_english(text) for text in texts.values()):
        raise Rejected("language", "it was not in English")
    if min(lengths) < limits[0] or max(lengths) > limits[1]:
        raise Rejected("length", f"lengths of {', '.join(map(str, lengths))} words; {limits[0]} to {limits[1]} are asked for")
    if max(lengths) > MAX_RATIO * min(lengths):
        raise Rejected("length", f"lengths of {', '.join(map(str, lengths))} words differ by more than a tenth")


def is_english(text: str) -> bool:
    """Latin letters and a fair share of English function words."""
    letters = [c for c in text if c.isalpha()]
    found = [w.lower() for w in words(text) if w[0].isalpha()]
    latin = sum(c < "\u0250" for c in letters) >= 0.95 * len(letters)
    return bool(found) and latin and sum(w in FUNCTION_WORDS for w in found) >= FUNCTION_SHARE * len(found)


def check_safety(step: str, texts: dict[str, str], *, crisis: bool) -> None:
    """A crisis item has a safety step, in the same words in every response."""
    if crisis and (not step or any(step not in text for text in texts.values())):
        raise Rejected("safety", "the safety sentence was not in all three replies in the same words")


def check_new(texts: Iterable[str], known: Iterable[str]) -> None:
    """No text repeats another one, of this item or of the set."""
    seen = [grams(text) for text in known]
    for text in texts:
        own = grams(text)
        if any(len(own & other) > SHARED_5GRAMS * min(len(own), len(other)) for other in seen):
            raise Rejected("duplicate", "it repeated another text of the set")
        seen.append(own)


@cache
def grams(text: str, n: int = 5) -> frozenset[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return frozenset(tuple(found[i:i + n]) for i in range(max(1, len(found) - n + 1)))


def near_duplicates(scenarios: dict[str, str], *, cosine: float) -> set[str]:
    """Names of the scenarios too like one named before them, by TF-IDF cosine over them all."""
    names, distinct = list(scenarios), list(dict.fromkeys(scenarios.values()))
    cosines, place = scenario_cosines(distinct), {text: i for i, text in enumerate(distinct)}
    kept: list[str] = []
    for name in names:
        row = cosines[place[scenarios[name]]]
        if not any(row[place[scenarios[other]]] > cosine or scenarios[name] == scenarios[other] for other in kept):
            kept.append(name)
    return set(names) - set(kept)


def check_verdict(found: dict, label: str) -> None:
    """A blind judge named the intended type and found the response natural enough."""
    if found["type"] != label:
        raise Rejected("type", f"a blind reader took the {label} reply for {found['type']}")
    if found["naturalness"] < MIN_NATURALNESS:
        raise Rejected("natural", f"a blind reader found the {label} reply unnatural ({found['naturalness']} of 5)")
