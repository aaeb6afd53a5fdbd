"""Cards: what an annotator judges, one scenario in one register, in a blind random order of their own.

The two registers of a scenario lie a whole round apart, so the second is judged without the first in view. One card in
twenty comes a second time, unannounced and with its responses in another order, to measure self-consistency.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.text.labels import REPEAT, State

REPEATED = 0.05


@dataclass(frozen=True, kw_only=True)
class Item:
    """A triplet: a scenario in one register. `responses` {type: text} are the originals; `hash` is of all its texts."""

    key: str
    scenario_id: str
    register: str
    context: str
    domain: str
    scenario: str
    responses: dict[str, str]
    hash: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A card's place in an annotator's order: its key (the item's, with #2 on a repeat) and the order of its types."""

    key: str
    item: Item
    types: tuple[str, ...]


def digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def items_of(texts: pd.DataFrame) -> dict[str, Item]:
    """`{scenario/register: Item}` of the empathy triplets in a text table."""
    found = {}
    for (id_, register), rows in texts[texts["condition"] == "empathy"].groupby(["scenario_id", "register"], sort=False):
        first, responses = rows.iloc[0], dict(zip(rows["label"], rows["response"], strict=True))
        key = f"{id_}/{register}"
        found[key] = Item(key=key, scenario_id=id_, register=register, context=first["context"], domain=first["domain"],
                          scenario=first["scenario"], responses=responses,
                          hash=digest(first["scenario"], *(text for pair in sorted(responses.items()) for text in pair)))
    return found


def hashes(items: dict[str, Item]) -> dict[str, str]:
    """`{item: hash}`, which a journal's records are compared with."""
    return {key: item.hash for key, item in items.items()}


def dataset_hash(items: dict[str, Item]) -> str:
    return digest(*(f"{key} {item.hash}" for key, item in sorted(items.items())))


def order(items: dict[str, Item], annotator: str) -> list[Place]:
    """All cards in this annotator's order; the same on every machine, whatever the order of the table."""
    rng = np.random.default_rng(int(digest("order", annotator), 16))
    by_scenario: dict[str, list[str]] = {}
    for key in sorted(items):
        by_scenario.setdefault(items[key].scenario_id, []).append(key)
    rounds: list[list[str]] = []
    for id_ in rng.permutation(sorted(by_scenario)):
        for number, key in enumerate(rng.permutation(by_scenario[id_])):
            rounds += [[]] * (number == len(rounds))
            rounds[number] = [*rounds[number], str(key)]
    keys = [key for each in rounds for key in each]
    keys = with_repeats(keys, rng)
    return [Place(key=key, item=items[key.removesuffix(REPEAT)], types=shuffled(key, items, annotator)) for key in keys]


def with_repeats(keys: list[str], rng: np.random.Generator) -> list[str]:
    """One card in twenty of the first half again, a third of the whole later."""
    n = round(REPEATED * len(keys))
    chosen = sorted(rng.choice(max(len(keys) // 2, 1), n, replace=False), reverse=True)
    out = list(keys)
    for place in chosen:
        out.insert(place + len(keys) // 3, keys[place] + REPEAT)
    return out


def shuffled(key: str, items: dict[str, Item], annotator: str) -> tuple[str, ...]:
    """The order in which a card shows its types; a repeat never shows the order of the first time."""
    def draw(name: str) -> tuple[str, ...]:
        types = sorted(items[key.removesuffix(REPEAT)].responses)
        return tuple(np.random.default_rng(int(digest("types", annotator, name), 16)).permutation(types).tolist())
    found = draw(key)
    if key.endswith(REPEAT) and found == draw(key.removesuffix(REPEAT)):
        return found[1:] + found[:1]
    return found


def wording(item: Item, state: State) -> dict[str, str]:
    """`{type: text}` as this annotator last left it."""
    edits = state.edits.get(item.key, {})
    return {label: edits.get(label, [text])[-1] for label, text in item.responses.items()}
