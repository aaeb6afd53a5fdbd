"""The paid-reply journal: JSON Lines in `paid/`, one fsynced record an event, written before anything is parsed.

Whatever was paid for is on disk before the program looks at it, so a kill at any moment loses at most the reply in
flight. Everything else (what was bought, what it cost, which batches are open) is a fold over the records:

    sent          a request is about to leave, with its worst-case cost    {key, usd, price}
    reply         what came back, raw: a message, or one line of a batch   {key, raw} or {batch, raw}
    unpaid        the API said that it did not do the work                 {key, why}
    unknown       nobody knows (timeout, disconnect): counts as spent      {key, why}
    batch_sent    a batch is about to leave                                {intent, keys: {key: usd}, price}
    batch         the API's name for it                                    {intent, batch}
    batch_unpaid  it is known not to exist                                 {intent, why}
    frozen        what later requests were derived from                    {name, content}

The journal lies outside `outputs/`, so that no clean-up removes it.
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import BadInput
from lib.params import ROOT, check_name
from lib.store import sync_folder

WORKED = "message"  # the kind of a reply that was made, hence paid


def journal_path(study: str) -> Path:
    """`paid/<study>.journal.jsonl`; a variant of a study (`--quick`) shares the study's journal."""
    name = check_name(study.partition("--")[0])
    return Path(os.environ.get("EMPATHY_PAID", ROOT / "paid")) / f"{name}.journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One reply as read from its record. `kind`: message, unreadable, or how a batch item ended without one."""

    key: str
    kind: str
    text: str = ""
    stop_reason: str = ""
    usage: dict | None = None
    why: str = ""


def read_reply(record: dict) -> Reply:
    """The reply in a `reply` record; the key is empty where a batch line does not even say whose it is."""
    key = record.get("key", "")
    try:
        raw = json.loads(record["raw"])
        if "batch" not in record:
            return read_message(key, raw)
        key, result = str(raw["custom_id"]), raw["result"]
        if result["type"] == "succeeded":
            return read_message(key, result["message"])
        error = (result.get("error") or {}).get("error") or {}
        return Reply(key=key, kind=result["type"], why=f"{error.get('type', '')} {error.get('message', '')}".strip())
    except (ValueError, KeyError, TypeError, AttributeError):
        return Reply(key=key, kind="unreadable")


def read_message(key: str, message: dict) -> Reply:
    """A Messages API message; thinking blocks are left out of the text."""
    text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    return Reply(key=key, kind=WORKED, text=text, stop_reason=message["stop_reason"] or "", usage=dict(message["usage"]))


class Journal:
    """Append-only records of one study; only one process may hold a study's journal at a time.

    `secret` is struck from everything that is written, should an answer ever echo it.
    """

    def __init__(self, path: Path, *, secret: str = ""):
        self.path, self.secret = path, secret
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(f"{path.name}: another run is generating for this study; wait until it ends") from None
        content = path.read_bytes() if path.exists() else b""
        self.records, self.torn = fold_lines(content)
        self._file = path.open("ab")
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")  # what a kill cut off stays a line of its own
        sync_folder(path.parent)

    def append(self, *records: dict) -> None:
        """Append records in one go; they are on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [self.redact(json.dumps({**record, "time": now}, ensure_ascii=False, sort_keys=True)) for record in records]
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BadInput(f"{self.path.name}: cannot be written ({error.strerror}); free space, then run again") from None
        self.records += [json.loads(line) for line in lines]

    def redact(self, text: str) -> str:
        return text.replace(self.secret, "[key]") if self.secret else text

    def frozen(self, name: str):
        """What was frozen under this name; None where nothing was."""
        return next((r["content"] for r in self.records if r["event"] == "frozen" and r["name"] == name), None)

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def fold_lines(content: bytes) -> tuple[list[dict], int]:
    """`(records, torn)`: complete records in order, and the number of lines a kill cut off."""
    records, torn = [], 0
    for line in content.split(b"\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record, torn = None, torn + 1
        if isinstance(record, dict) and "event" in record:
            records.append(record)
    return records, torn
