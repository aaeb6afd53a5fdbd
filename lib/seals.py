"""Seals: descriptions and journal lines that show when a byte of them was changed.

An artifact is guarded by the sha256 in its sidecar. What guards the sidecar itself, a stage's record, a pack's list, a
manifest of shards, is a hash of its own content, its `seal`; each line of a journal has a `check`. Both are compared byte
by byte with what the program would write, so that even a changed blank is seen. They guard against damage, not against
somebody who computes a new seal.
"""

import json
from pathlib import Path

from lib.errors import BadInput
from lib.files import read_json_bytes, sha256, to_json


def sealed(record: dict) -> bytes:
    """Stable JSON of a record with the sha256 of the rest of it as its `seal`."""
    plain = json.loads(to_json(record))
    return to_json({**plain, "seal": sha256(to_json(plain))})


def read_sealed(path: Path, *, shown: str = "", fix: str = "make it again", holds: dict[str, type] | None = None) -> dict:
    """A sealed record, without its seal; `holds` names fields it must have, with their types.

    Raises BadInput that names the file where it has no seal, differs from it, or lacks a field.
    """
    shown, (record, content) = shown or path.name, read_json_bytes(path)
    if not isinstance(record, dict) or "seal" not in record:
        raise BadInput(f"{shown}: has no seal, so a change of it could not be seen; {fix}")
    seal = record.pop("seal")
    if seal != sha256(to_json(record)) or content != sealed(record):
        raise BadInput(f"{shown}: differs from its seal (changed or damaged); {fix}")
    for name, kind in (holds or {}).items():
        if not isinstance(record.get(name), kind):
            raise BadInput(f"{shown}: has no {name}, so it is something else; {fix}")
    return record


def sealed_or_none(path: Path, *, holds: dict[str, type] | None = None) -> dict | None:
    """A sealed record; None where there is none that can be trusted, or it lacks one of the fields it `holds`."""
    try:
        return read_sealed(path, holds=holds)
    except BadInput:
        return None


def stamped(record: dict) -> bytes:
    """One journal line, without its end: stable JSON with a hash of the rest of it as `check`."""
    def line(content: dict) -> bytes:
        return json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
    return line({**record, "check": sha256(line(record))[:16]})


def unchanged(line: bytes) -> bool:
    """Whether a journal line is as it was written; one of before there were checks counts as such where it is an object."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return False
        return record.pop("check", None) is None or line == stamped(record)
    except (ValueError, RecursionError):
        return False
