"""Applying journals to the raw texts: which triplets stay, in which wording, and on whose word."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.text import agreement, cards
from lib.text.labels import RATINGS, State, folder_of, read_all, read_journal


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """`texts`: the table without rejected triplets, edits applied; `about`: source and counts; two tables beside it."""

    texts: pd.DataFrame
    verdicts: pd.DataFrame
    agreement: pd.DataFrame
    about: dict


def apply(raw: pd.DataFrame, journals: str) -> Filtered:
    """The raw texts after all journals: what most annotators reject goes, with all registers of its scenario.

    An adjudication stands above votes. The last edit of an item counts. Where a selection was confirmed, its scenarios
    alone stay, minus those rejected since. Controls tied to a triplet go with it.
    """
    folder, items = folder_of(journals), cards.items_of(raw)
    states = read_all(folder, cards.hashes(items))
    found = agreement.verdicts(states)
    out = set(found.loc[found["verdict"] == "reject", "scenario_id"])
    kept = selected(states)
    scenarios = {item.scenario_id for item in items.values()}
    out |= scenarios - set(kept) if kept else set()
    texts, n_edits = edited(raw[~raw["scenario_id"].isin(out)].reset_index(drop=True), items, states)
    torn = [path.name for path in sorted(folder.glob("*.jsonl")) if read_journal(path)[1]]
    about = {"source": source(folder, states), "annotators": sorted(states), "decided": len(found), "left_out": sorted(out),
             "edited_responses": n_edits, "disputed": int(found["disputed"].sum()), "selection_confirmed": bool(kept),
             "stale_records": sum(len(state.stale) for state in states.values()), "torn_journals": torn}
    return Filtered(texts=texts, verdicts=found, agreement=agreement.agreement(states), about=about)


def source(folder: Path, states: dict[str, State]) -> str:
    """Whose word the selection rests on."""
    if not states:
        return "language models (no human labels: the language-model labels of the bundled set stand)"
    if folder == RATINGS:
        return "language models (no human labels: their bundled ratings are applied)"
    return f"labels of {', '.join(sorted(states))}"


def selected(states: dict[str, State]) -> tuple[str, ...]:
    """The selection confirmed last by anybody; empty where there is none."""
    return max((state for state in states.values()), key=lambda state: state.kept_time, default=State()).kept


def edited(texts: pd.DataFrame, items: dict[str, cards.Item], states: dict[str, State]) -> tuple[pd.DataFrame, int]:
    """The table with each item worded as its last editor left it, and the number of changed responses.

    Whoever edits sees the leakage meter, so no edited triplet counts as untouched by a score.
    """
    last: dict[str, tuple[str, str]] = {}
    for name, state in sorted(states.items()):
        for key, time in state.edit_times.items():
            last[key] = max(last.get(key, ("", "")), (time, name))
    wording = {(*key.rsplit("/", 1), label): text for key, (_, name) in last.items()
               for label, text in cards.wording(items[key], states[name]).items()}
    mine = texts["condition"] == "empathy"
    place = list(zip(texts["scenario_id"], texts["register"], texts["label"], strict=True))
    after = [wording.get(p, old) if m else old for p, old, m in zip(place, texts["response"], mine, strict=True)]
    changed = texts["response"] != pd.Series(after, index=texts.index)
    items_changed = changed.groupby([texts["condition"], texts["scenario_id"], texts["register"]]).transform("any")
    return texts.assign(response=after, untouched=texts["untouched"] & ~items_changed), int(changed.sum())
