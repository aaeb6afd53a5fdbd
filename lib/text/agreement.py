"""Agreement of annotators: Cohen's and Fleiss' kappa with intervals, blind guesses, self-consistency, disagreements.

Only independent decisions count; an adjudication was made in sight of the others'. Intervals are delete-one-scenario
jackknives with t(G-1), so the two registers of a scenario are one unit. Cohen (1960); Fleiss (1971), with items rated by
different numbers of annotators weighted by their pairs.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from lib.stats.auroc import jackknife_interval
from lib.text.labels import REPEAT, State

COLUMNS = ("measure", "annotators", "estimate", "ci_low", "ci_high", "n")


def fleiss(counts: np.ndarray) -> float:
    """Fleiss' kappa of counts [item, category]; NaN without two ratings of an item, 1 where all ratings are one category."""
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return float("nan")
    n = counts.sum(axis=1)
    observed = ((counts**2).sum(axis=1) - n).sum() / (n * (n - 1)).sum()
    chance = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return 1.0 if chance == 1 else float((observed - chance) / (1 - chance))


def cohen(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two annotators' labels of the same items; NaN without items, 1 where both only used one label."""
    first, second = np.asarray(first, dtype=object), np.asarray(second, dtype=object)
    if not len(first):
        return float("nan")
    names = sorted({*first, *second})
    p, q = (np.array([(each == name).mean() for name in names]) for each in (first, second))
    observed, chance = (first == second).mean(), float(p @ q)
    return 1.0 if chance == 1 else float((observed - chance) / (1 - chance))


def interval(statistic, scenarios: Sequence[str]) -> tuple[float, float, float]:
    """`(estimate, low, high)` of statistic(kept items [bool]), deleting one scenario at a time; NaN ends below three."""
    scenarios = np.asarray(scenarios, dtype=object)
    units = list(dict.fromkeys(scenarios))
    whole = statistic(np.ones(len(scenarios), dtype=bool))
    if len(units) < 3 or np.isnan(whole):
        return whole, float("nan"), float("nan")
    deleted = np.array([statistic(scenarios != unit) for unit in units])
    low, high = jackknife_interval(np.array(whole), deleted)
    return whole, float(np.clip(low, -1, 1)), float(np.clip(high, -1, 1))


def decisions(states: dict[str, State]) -> dict[str, dict[str, str]]:
    """`{item: {annotator: independent decision}}`; silently repeated cards are left out."""
    found: dict[str, dict[str, str]] = {}
    for name, state in states.items():
        for key, card in state.cards.items():
            if card.decision and not key.endswith(REPEAT):
                found.setdefault(key, {})[name] = card.decision
    return found


def scenario_of(item: str) -> str:
    return item.rsplit("/", 1)[0]


def agreement(states: dict[str, State]) -> pd.DataFrame:
    """One row a measure: kappas, blind guesses right (chance is a third), and self-consistency on repeats."""
    by_item, rows = decisions(states), []
    for a, b in combinations(sorted(states), 2):
        items = [item for item, votes in by_item.items() if a in votes and b in votes]
        first, second = (np.array([by_item[item][name] for item in items], dtype=object) for name in (a, b))
        found = interval(lambda keep, first=first, second=second: cohen(first[keep], second[keep]), list(map(scenario_of, items)))
        rows.append(("cohen_kappa", f"{a} {b}", *found, len(items)))
    shared = [item for item, votes in by_item.items() if len(votes) >= 2]
    if shared and len(states) > 2:
        counts = np.array([[list(by_item[item].values()).count(d) for d in ("accept", "reject")] for item in shared])
        found = interval(lambda keep: fleiss(counts[keep]), list(map(scenario_of, shared)))
        rows.append(("fleiss_kappa", " ".join(sorted(states)), *found, len(shared)))
    for name, state in sorted(states.items()):
        rows += [("guess_accuracy", name, *share(state_guesses(state))), ("self_consistency", name, *share(repeats(state)))]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table[table["n"] > 0].reset_index(drop=True)


def share(found: list[tuple[str, bool]]) -> tuple[float, float, float, int]:
    """Share of true outcomes with its interval; `found`: (item, outcome)."""
    right = np.array([outcome for _, outcome in found], dtype=float)
    if not len(right):
        return float("nan"), float("nan"), float("nan"), 0
    return *interval(lambda keep: float(right[keep].mean()), [scenario_of(item) for item, _ in found]), len(right)


def state_guesses(state: State) -> list[tuple[str, bool]]:
    """(item, right) of every type guessed before it was shown."""
    return [(key, guess == label) for key, card in state.cards.items() for label, guess in card.guesses.items()]


def repeats(state: State) -> list[tuple[str, bool]]:
    """(item, same decision) of every card decided twice."""
    pairs = [(key.removesuffix(REPEAT), card.decision) for key, card in state.cards.items() if key.endswith(REPEAT) and card.decision]
    return [(item, state.card(item).decision == again) for item, again in pairs if state.card(item).decision]


def verdict(votes: dict[str, str], adjudicated: Sequence[str]) -> str:
    """What counts for an item: the last adjudication, else the majority; a tie is not a rejection. Empty without votes."""
    if adjudicated:
        return adjudicated[-1]
    tally = Counter(votes.values())
    return "" if not tally else "reject" if tally["reject"] > tally["accept"] else "accept"


def verdicts(states: dict[str, State]) -> pd.DataFrame:
    """One row an item anybody decided: `item, scenario_id, accepts, rejects, adjudicated, verdict, reasons, disputed`."""
    by_item, rows = decisions(states), []
    late = {(card.time, key): card.adjudicated for state in states.values() for key, card in state.cards.items() if card.adjudicated}
    items = sorted({*by_item, *(key for _, key in late)})
    for item in items:
        votes = by_item.get(item, {})
        final = [late[key] for key in sorted(late) if key[1] == item]
        reasons = sorted({state.cards[item].reason for state in states.values() if item in state.cards} - {""})
        split = len(set(votes.values())) > 1
        rows.append((item, scenario_of(item), *(list(votes.values()).count(d) for d in ("accept", "reject")),
                     final[-1] if final else "", verdict(votes, final), "; ".join(reasons), split and not final))
    return pd.DataFrame(rows, columns=["item", "scenario_id", "accepts", "rejects", "adjudicated", "verdict", "reasons", "disputed"])
