"""Human labels: an append-only journal per annotator, one fsynced JSON line an event; state is a fold over it.

Journals live in `labels/`, outside `outputs/`, so that no clean-up removes them. Every record names its annotator, time,
dataset, and the item with the hash of its texts and the version (number of edits) that was seen:

    accept, reject    a decision on a card; `reason` where it is a rejection, `adjudicated` where others had disagreed
    flag, comment     `on`; `text`
    edit              a new wording `text` of the response `label`; the original stays in the dataset
    guess             `types`: {label: guessed type} of a card whose types had not been shown
    pin, keep         `choice` in, out or free for a scenario; `scenarios`, the confirmed selection
    undo, redo        `of`: the record that no longer, or again, counts

Nothing is ever rewritten. A line whose `check` is not the hash of the rest of it was changed and is refused by its number
(lines of before there were checks have none, and still count). A record for texts that have changed since is stale: shown, never applied.
"""

import os
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from lib.errors import BadInput
from lib.files import make_folder, read_regular, sha256, sync_folder
from lib.params import ROOT
from lib.seals import stamped, unchanged

LABELS = ROOT / "labels"
RATINGS = ROOT / "lib" / "data" / "ratings"  # journals of language models for the bundled texts, in the same format
REASONS = ("wrong type", "unnatural", "unsafe", "too similar", "leaks by words", "other")
TYPES = ("cognitive", "affective", "instrumental")
DECISIONS = ("accept", "reject")
MAX_BYTES = 200_000_000  # of a journal: a hundred thousand decisions with long comments
REPEAT = "#2"  # behind the item's name where a card is shown a second time


class Record(BaseModel):
    """One line of a journal. `item` is scenario/register, with #2 behind it on a silently repeated card."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    event: Literal["accept", "reject", "flag", "comment", "edit", "guess", "pin", "keep", "undo", "redo"]
    annotator: str
    time: str
    dataset: str
    item: str = ""
    item_hash: str = ""
    version: int = 0
    reason: Literal[(*REASONS, "")] = ""
    adjudicated: bool = False
    on: bool = True
    text: str = ""
    label: str = ""
    types: dict[str, Literal[(*TYPES, "unclear")]] = {}
    choice: Literal["in", "out", "free", ""] = ""
    scenarios: tuple[str, ...] = ()
    of: str = ""
    check: str = ""


@dataclass
class Card:
    """What the journal says of one card. `guesses` were made blind; `decided` also counts decisions undone since."""

    decision: str = ""
    reason: str = ""
    adjudicated: str = ""
    time: str = ""
    flagged: bool = False
    comment: str = ""
    guesses: dict[str, str] = field(default_factory=dict)
    decided: bool = False


@dataclass
class State:
    """The fold of one journal. `edits`: {item: {label: wordings, oldest first}}; `done` and `undone`: what undo and redo would take."""

    cards: dict[str, Card] = field(default_factory=dict)
    edits: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    edit_times: dict[str, str] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    kept_time: str = ""
    done: list[Record] = field(default_factory=list)
    undone: list[Record] = field(default_factory=list)
    stale: list[Record] = field(default_factory=list)

    def card(self, key: str) -> Card:
        return self.cards.setdefault(key, Card())

    def version(self, item: str) -> int:
        """Number of edits of an item that count."""
        return sum(map(len, self.edits.get(item, {}).values()))


def check_annotator(name: str) -> str:
    """A plain name, since it names a file."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name):
        raise BadInput(f"annotator {name!r}: use lower-case letters, digits, dash and underscore, 40 at most")
    return name


def read_journal(path: Path) -> tuple[list[Record], bool]:
    """`(records, torn)`: all complete records; `torn` says that a half-written last line was left out."""
    records, torn = parse(path.name, read_regular(path, MAX_BYTES))
    return records, bool(torn)


def parse(name: str, content: bytes) -> tuple[list[Record], int]:
    """`(records, torn)`: the complete records and the number of bytes after the last line's end."""
    whole, end, tail = content.rpartition(b"\n")
    if tail and complete(tail):  # an editor took the last line's end away
        whole, end, tail = content, b"\n", b""
    elif tail and complete(tail[:-1]):  # a kill leaves a part of a line, never more than one
        raise BadInput(f"{name}: last line: more follows its record; restore the line's end")
    records, seen = [], set()
    for number, line in enumerate(whole.replace(b"\r\n", b"\n").removesuffix(b"\r").split(b"\n") if end else [], start=1):
        try:
            record = Record.model_validate_json(line)
            if not unchanged(line):
                raise BadInput(f"{name}: line {number}: differs from its check (changed or damaged); restore the line or remove it")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "not a record"
            raise BadInput(f"{name}: line {number}: {where}: {first['msg']}; restore the line or remove it") from None
        if record.id not in seen:  # two branches of one journal, merged, hold their common lines once or twice
            records.append(record)
        seen.add(record.id)
    return records, len(tail)


def complete(line: bytes) -> bool:
    try:
        return bool(Record.model_validate_json(line)) and unchanged(line)
    except ValidationError:
        return False


def fold(records: list[Record], hashes: dict[str, str]) -> State:
    """State after `records`, in order. `hashes` {item: hash of its original texts}: records of other texts are stale."""
    state, active, shown = State(), {}, set()
    for record in records:
        if record.event == "undo" and record.of in active:
            active[record.of] = False
        elif record.event == "redo" and record.of in active:
            active[record.of] = True
        elif record.event not in ("undo", "redo"):
            if record.item and hashes.get(record.item.removesuffix(REPEAT)) != record.item_hash:
                state.stale.append(record)
            else:
                active[record.id] = True
    of = {record.id: record for record in records}
    undone: dict[str, Record] = {}
    for record in records:  # what redo may bring back: undone, and nothing new done since
        if record.event == "undo":
            undone |= {record.of: of[record.of]} if record.of in active else {}
        elif record.event == "redo":
            undone.pop(record.of, None)
        elif record.id in active:
            undone.clear()
    state.undone = [record for record in undone.values() if not active[record.id]]
    for record in records:
        if record.id not in active:
            continue
        if active[record.id]:
            state.done.append(record)
            apply(state, record, blind=record.item not in shown)
        if record.event in DECISIONS:
            shown.add(record.item)
            state.card(record.item).decided = True
    return state


def apply(state: State, record: Record, *, blind: bool) -> None:
    """Add one record that counts; a guess made after the types were shown does not."""
    card = state.card(record.item) if record.item else Card()
    if record.event in DECISIONS and record.adjudicated:
        card.adjudicated, card.reason, card.time = record.event, record.reason, record.time
    elif record.event in DECISIONS:
        card.decision, card.reason, card.time = record.event, record.reason, record.time
    elif record.event == "flag":
        card.flagged = record.on
    elif record.event == "comment":
        card.comment = record.text
    elif record.event == "edit":
        state.edits.setdefault(record.item, {}).setdefault(record.label, []).append(record.text)
        state.edit_times[record.item] = record.time
    elif record.event == "guess" and blind:
        card.guesses = dict(record.types)
    elif record.event == "pin":
        state.pins[record.text] = record.choice
    elif record.event == "keep":
        state.kept, state.kept_time = record.scenarios, record.time


class Journal:
    """The journal of one annotator, open for writing, or only for reading where another process or card holds it.

    `torn`: bytes of a half-written last line, set aside when the journal was opened.
    """

    _held: ClassVar[dict[Path, "Journal"]] = {}  # one writer a path in this process: a cell run again takes over

    def __init__(self, folder: Path, annotator: str):
        self.annotator = check_annotator(annotator)
        self.path = (folder / f"{annotator}.jsonl").resolve()
        make_folder(self.path.parent)
        if self.path in Journal._held:
            Journal._held[self.path].close()
        self._file = None
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self.records, self.torn = parse(self.path.name, read_regular(self.path, MAX_BYTES) if self.path.exists() else b"")
            return
        try:
            self._open()
        except BadInput:
            self._lock.release()
            raise
        Journal._held[self.path] = self

    def _open(self) -> None:
        content = read_regular(self.path, MAX_BYTES) if self.path.exists() else b""
        self.records, self.torn = parse(self.path.name, content)
        self._file = self.path.open("ab")
        if self.torn:  # never acknowledged, so nothing is lost; a later record must not be glued to it
            self._file.truncate(len(content) - self.torn)
        elif content and not content.endswith(b"\n"):
            self._file.write(b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        sync_folder(self.path.parent)

    @property
    def writable(self) -> bool:
        return self._file is not None

    def append(self, event: str, **fields) -> Record:
        """Append one record; it is on disk when this returns."""
        if not self.writable:
            raise BadInput(f"{self.path.name}: open for reading only; close the other kernel, then run the cell again")
        try:
            record = Record(id=secrets.token_hex(6), event=event, annotator=self.annotator,
                            time=datetime.now(UTC).isoformat(timespec="milliseconds"), **fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"{event}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        line = stamped(record.model_dump(exclude_defaults=True)) + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._retreat(end)
            raise BadInput(f"{self.path.name}: cannot be written ({error.strerror}); free space, then press the key again") from None
        self.records.append(record)
        return record

    def _retreat(self, end: int) -> None:
        """After a failed write: no half line may stay in front of the next record, neither on disk nor in the buffer."""
        try:
            self._file.close()
        except OSError:
            pass  # the buffer could not be written either; it is dropped with the file object
        os.truncate(self.path, end)
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Give the journal back; this object can still be read."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._lock.release()
            Journal._held.pop(self.path, None)


def folder_of(journals: str) -> Path:
    """The folder of journals: the one named, else `labels/`, else the ratings bundled with the texts."""
    if journals:
        if not Path(journals).is_dir():
            raise BadInput(f"journals {journals!r}: no such folder")
        return Path(journals)
    return LABELS if any(LABELS.glob("*.jsonl")) or not RATINGS.is_dir() else RATINGS


def journal_hashes(journals: str) -> dict[str, str]:
    """`{file: sha256}` of the journals that would be applied."""
    return {path.name: sha256(path) for path in sorted(folder_of(journals).glob("*.jsonl"))}


def read_all(folder: Path, hashes: dict[str, str]) -> dict[str, State]:
    """`{annotator: state}` over all journals in a folder; a torn last line is left out."""
    return {path.stem: fold(read_journal(path)[0], hashes) for path in sorted(folder.glob("*.jsonl"))}
