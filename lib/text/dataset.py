"""The dataset: its schema, import of a folder of JSON files, and the table of texts every stage reads.

A folder holds JSON files, recognised by content: `triplets` with an empathy type each, `items` of three responses
(non-empathy emotional), `items` tied to a triplet (valence-stripped), `pairs` (formality). Files of other people in
the shape `{metadata, triplets: [{id, scenario, cognitive, affective, instrumental}]}` import as they are.
"""

import json
import warnings
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from lib.errors import BadInput
from lib.files import check_plain, read_regular
from lib.params import ROOT, one_line
from lib.text.clusters import scenario_clusters

BUNDLED = ROOT / "lib" / "data" / "dataset"
EMPATHY_TYPES = ("cognitive", "affective", "instrumental")
LABELS = {
    "empathy": EMPATHY_TYPES,
    "valence_stripped": ("factual", "informational", "procedural"),
    "non_empathy": ("response_1", "response_2", "response_3"),
    "formality": ("formal", "casual"),
}
CONTEXTS = ("crisis_support", "emotional_disclosure", "frustration", "casual_conversation", "technical_assistance")
MAX_BYTES = 50_000_000


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=50_000)]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Context = Literal["crisis_support", "emotional_disclosure", "frustration", "casual_conversation", "technical_assistance", ""]


with warnings.catch_warnings():
    # `register` is the field's name in the files; the method of that name belongs to abstract classes, not to items
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class Item(BaseModel):
        """Fields every item has; unknown fields of other people's files are kept out of the study."""

        model_config = ConfigDict(extra="ignore", frozen=True)
        id: Id
        scenario: Text
        context: Context = ""
        domain: Annotated[str, StringConstraints(max_length=200)] = ""
        register: Literal["plain", "counter"] = "plain"
        edited_against_score: bool = True


class Triplet(Item):
    cognitive: Text
    affective: Text
    instrumental: Text


class ValenceStripped(Item):
    triplet_id: Id
    factual: Text
    informational: Text
    procedural: Text


class NonEmpathy(Item):
    response_1: Text
    response_2: Text
    response_3: Text


class Formality(Item):
    formal: Text
    casual: Text


SCHEMAS = {"empathy": Triplet, "valence_stripped": ValenceStripped, "non_empathy": NonEmpathy, "formality": Formality}


def condition_of(record: dict) -> str | None:
    """Which condition a raw record belongs to, by the responses it has; None where it has none of any."""
    found = {condition: sum(label in record for label in labels) for condition, labels in LABELS.items()}
    best = max(found, key=found.get)
    return best if found[best] else None


def read_file(path: Path) -> list[tuple[str, Item]]:
    """`(condition, item)` of every record in one file; the first fault is one line naming file, record and field."""
    try:
        content = json.loads(read_regular(path, MAX_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path.name}: not readable as JSON ({str(error).splitlines()[0]})") from None
    lists = [content[key] for key in ("triplets", "items", "pairs") if key in content] if isinstance(content, dict) else []
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise BadInput(f"{path.name}: must be an object with one list named triplets, items or pairs")
    metadata = content.get("metadata")
    register = metadata.get("register", "plain") if isinstance(metadata, dict) else "plain"
    return [parse(path.name, number, record, register) for number, record in enumerate(lists[0])]


def parse(name: str, number: int, record, register: str) -> tuple[str, Item]:
    """One raw record as `(condition, item)`."""
    if not isinstance(record, dict):
        raise BadInput(f"{name}: record {number}: must be an object with id, scenario and responses")
    id_ = record.get("id")
    where = f"{name}: record {id_ if isinstance(id_, str) else number!r}"
    try:
        check_plain(record)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None
    condition = condition_of(record)
    if condition is None:
        raise BadInput(f"{where}: holds no responses; give cognitive, affective and instrumental")
    try:
        return condition, SCHEMAS[condition].model_validate({"register": register} | record)
    except ValidationError as error:
        raise one_line(where, error) from None


def read_folder(folder: Path) -> list[tuple[str, Item]]:
    """All items of a folder; `triplets_raw.json` counts only where no filtered file stands beside it."""
    if not folder.is_dir():
        raise BadInput(f"{folder.name}: no such folder; give one with triplets_filtered.json in it")
    files = sorted(folder.glob("*.json"))
    if any(file.name == "triplets_filtered.json" for file in files):
        files = [file for file in files if file.name != "triplets_raw.json"]
    items, seen = [], {}
    for file in files:
        for condition, item in read_file(file):
            key = (condition, item.id, item.register)
            if key in seen:
                raise BadInput(f"{file.name}: record {item.id!r}: duplicate id (first in {seen[key]}); ids are unique")
            seen[key] = file.name
            items.append((condition, item))
    check_ties(folder.name, items)
    return items


def check_ties(name: str, items: list[tuple[str, Item]]) -> None:
    """Triplets exist, counter registers belong to plain ones, and valence-stripped items to a triplet."""
    ids = {register: {i.id: i for c, i in items if c == "empathy" and i.register == register} for register in ("plain", "counter")}
    if not ids["plain"]:
        raise BadInput(f"{name}: no triplets in the plain register; the study needs some")
    for id_, item in ids["counter"].items():
        if id_ not in ids["plain"] or ids["plain"][id_].scenario != item.scenario:
            raise BadInput(f"{name}: triplet {id_!r}: register counter has no plain triplet of the same id and scenario")
    for condition, item in items:
        if condition == "valence_stripped" and item.triplet_id not in ids["plain"]:
            raise BadInput(f"{name}: valence-stripped item {item.id!r}: triplet_id {item.triplet_id!r} is no triplet here")


def texts_table(items: list[tuple[str, Item]], *, cluster_cosine: float) -> pd.DataFrame:
    """One row a response: `text_id, scenario_id, cluster, context, domain, condition, register, label, untouched, scenario,
    response`. `untouched` says that the file vouches for a text never edited against a score.

    Valence-stripped items carry their triplet's `scenario_id` and `cluster`. Rows are ordered by condition, scenario,
    register and label, so the same dataset gives the same table whatever the order of its files.
    """
    triplets = {item.id: item for condition, item in items if condition == "empathy"}
    rows = []
    for condition, item in items:
        tied = triplets[item.triplet_id] if condition == "valence_stripped" else item
        scenario_id = tied.id if condition in ("empathy", "valence_stripped") else f"{condition}-{item.id}"
        for label in LABELS[condition]:
            rows.append({"text_id": f"{condition}/{item.id}/{item.register}/{label}", "scenario_id": scenario_id,
                         "context": tied.context, "domain": tied.domain, "condition": condition,
                         "register": item.register, "label": label, "untouched": not item.edited_against_score, "scenario": item.scenario,
                         "response": getattr(item, label)})
    table = pd.DataFrame(rows)
    order = {name: number for number, name in enumerate(LABELS)}
    table = table.sort_values(["condition", "scenario_id", "register", "text_id"], kind="stable",
                              key=lambda column: column.map(order) if column.name == "condition" else column)
    own = table[table.condition != "valence_stripped"].drop_duplicates("scenario_id")
    clusters = dict(zip(own.scenario_id, scenario_clusters(list(own.scenario), cosine=cluster_cosine), strict=True))
    table.insert(2, "cluster", table.scenario_id.map(clusters))
    return table.reset_index(drop=True)


def subset(texts: pd.DataFrame, n_scenarios: int) -> pd.DataFrame:
    """The first `n_scenarios` scenarios of every condition, spread evenly over the table (0 keeps all)."""
    if not n_scenarios:
        return texts
    keep: list[str] = []
    for _, rows in texts.groupby("condition", sort=False):
        ids = list(dict.fromkeys(rows[rows.condition != "valence_stripped"].scenario_id))
        keep += [ids[i * len(ids) // n_scenarios] for i in range(n_scenarios)] if len(ids) > n_scenarios else ids
    return texts[texts.scenario_id.isin(keep)].reset_index(drop=True)


def export_seed_schema(texts: pd.DataFrame) -> dict[str, dict]:
    """`{file name: content}` of the table in the shape other tools read; reading it back gives the same texts."""
    names = {("empathy", "plain"): ("triplets_filtered.json", "triplets"),
             ("empathy", "counter"): ("triplets_counter.json", "triplets"),
             ("valence_stripped", "plain"): ("controls_valence_stripped.json", "items"),
             ("valence_stripped", "counter"): ("controls_valence_stripped_counter.json", "items"),
             ("non_empathy", "plain"): ("controls_non_empathy.json", "items"),
             ("non_empathy", "counter"): ("controls_non_empathy_counter.json", "items"),
             ("formality", "plain"): ("formality_pairs.json", "pairs")}
    files: dict[str, dict] = {}
    for (condition, register, text_id), rows in texts.assign(item=texts.text_id.str.rsplit("/", n=2).str[0]).groupby(
            ["condition", "register", "item"], sort=False):
        name, key = names[condition, register]
        first = rows.iloc[0]
        item = {"id": text_id.split("/", 1)[1], "scenario": first.scenario, "context": first.context, "domain": first.domain}
        if condition == "valence_stripped":
            item["triplet_id"] = first.scenario_id
        item |= dict(zip(rows.label, rows.response, strict=True))
        if first.get("untouched", False):
            item["edited_against_score"] = False
        files.setdefault(name, {"metadata": {"register": register}, key: []})[key].append(item)
    return files
