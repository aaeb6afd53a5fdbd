"""Human labels: an append-only journal per annotator, one fsynced JSON line a decision; state is a fold over it.

Journals live in `labels/`, outside `outputs/`, so that no clean-up removes them.
"""

import json
import os
from pathlib import Path

from lib.errors import BadInput
from lib.params import ROOT

LABELS = ROOT / "labels"
DECISIONS = ("accept", "reject")


def append(path: Path, record: dict) -> None:
    """Append one record; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_journal(path: Path) -> tuple[list[dict], bool]:
    """`(records, torn)`: all complete records; `torn` says that a half-written last line was left out."""
    lines = path.read_bytes().split(b"\n")
    records, torn = [], bool(lines[-1].strip())
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise BadInput(f"{path.name}: line {number}: not a JSON record; restore the line or remove it") from None
        if not isinstance(record, dict) or record.get("decision") not in DECISIONS or "id" not in record:
            raise BadInput(f"{path.name}: line {number}: needs id and decision ({' or '.join(DECISIONS)})")
        records.append(record)
    return records, torn


def decisions(folder: Path) -> dict[str, dict[str, str]]:
    """`{annotator: {triplet id: last decision}}` over all journals in a folder."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        records, _ = read_journal(path)
        found[path.stem] = {record["id"]: record["decision"] for record in records}
    return found
