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

Every line holds a `check`, a hash of the rest of it: a line that was changed is refused by its number (lines of before there
were checks have none, and still count). What a kill cut off at the end is moved into `<journal>.torn`.

The journal lies outside `outputs/`, so that no clean-up removes it.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import BadInput
from lib.files import make_folder, read_regular, sync_folder, write_atomic
from lib.params import ROOT, check_name
from lib.seals import stamped, unchanged

MAX_BYTES = 2_000_000_000  # of a journal: a hundred thousand replies
WORKED = "message"  # the kind of a reply that was made, hence paid
FIELDS = {"event", "key", "usd", "price", "raw", "batch", "why", "intent", "keys", "name", "content", "time", "check"}
EVENTS = {"sent": ("key", "usd", "price"), "reply": ("raw",), "unpaid": ("key",), "unknown": ("key",), "batch_sent": ("intent", "keys", "price"),
          "batch": ("intent", "batch"), "batch_unpaid": ("intent",), "frozen": ("name", "content")}


def journal_path(study: str) -> Path:
    """`paid/<study>.journal.jsonl`; a variant of a study (`--quick`) shares the study's journal."""
    name = check_name(study.partition("--")[0])
    return Path(os.environ.get("EMPATHY_PAID") or ROOT / "paid") / f"{name}.journal.jsonl"


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Reply(key=key, kind="unreadable")


def read_message(key: str, message: dict) -> Reply:
    """A Messages API message; thinking blocks are left out of the text."""
    text = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    return Reply(key=key, kind=WORKED, text=text, stop_reason=message["stop_reason"] or "", usage=dict(message["usage"]))


class Journal:
    """Append-only records of one study; only one process may hold a study's journal at a time.

    `secret` is struck from everything that is written, should an answer ever echo it. `torn`: what a kill had cut off at the
    end when the journal was opened, set aside.
    """

    def __init__(self, path: Path, *, secret: str = ""):
        self.path, self.secret = path, secret
        make_folder(path.parent)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(f"{path.name}: another run is generating for this study; wait until it ends") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        content = read_regular(self.path, MAX_BYTES) if self.path.exists() else b""
        self.records, self.torn = fold_lines(content, self.path.name)
        if self.torn:
            aside = self.path.with_name(f"{self.path.name}.torn")
            write_atomic(aside, (aside.read_bytes() if aside.exists() else b"") + self.torn + b"\n")
            os.truncate(self.path, len(content) - len(self.torn))
        self._file = self.path.open("ab")
        if content and not self.torn and not content.endswith(b"\n"):
            self._put(b"\n")
        sync_folder(self.path.parent)

    def append(self, *records: dict) -> None:
        """Append records in one go; they are on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        plain = [json.loads(self.redact(json.dumps({**record, "time": now}, ensure_ascii=False))) for record in records]
        self._put(b"".join(stamped(record) + b"\n" for record in plain))
        self.records += plain

    def _put(self, content: bytes) -> None:
        """Bytes at the end of the file and on disk, or none of them."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._retreat(end)
            raise BadInput(f"{self.path.name}: cannot be written ({error.strerror}); free space, then run again") from None

    def _retreat(self, end: int) -> None:
        """After a failed write: no half line may stay, neither on disk nor in the buffer."""
        with suppress(OSError):  # the buffer could not be written either; it is dropped with the file object
            self._file.close()
        os.truncate(self.path, end)
        self._file = self.path.open("ab")

    def redact(self, text: str) -> str:
        return text.replace(self.secret, "[key]") if self.secret else text

    def frozen(self, name: str):
        """What was frozen under this name; None where nothing was."""
        return next((r["content"] for r in self.records if r["event"] == "frozen" and r["name"] == name), None)

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def fold_lines(content: bytes, name: str = "journal") -> tuple[list[dict], bytes]:
    """`(records, torn)`: complete records in order, and what a kill cut off at the end. Raises BadInput for a changed line."""
    lines = content.split(b"\n")
    whole, torn = [line.removesuffix(b"\r") for line in lines[:-1]], lines[-1]
    if unchanged(torn):  # an editor took the last line's end away
        whole, torn = [*whole, torn], b""
    if torn and unchanged(torn[:-1]):  # a kill leaves a part of a line, never more than one
        raise BadInput(f"{name}: last line: more follows its record; restore the line's end")
    records = []
    for number, line in enumerate(whole, start=1):
        record = json.loads(line) if unchanged(line) else {}
        if not line.strip():
            continue
        if "event" not in record or not record.keys() <= FIELDS:
            raise BadInput(f"{name}: line {number}: differs from its check (changed or damaged); restore it: paid replies are in this file")
        if not is_event(record):
            raise BadInput(f"{name}: line {number}: is no event of this journal; restore it: paid replies are in this file")
        records.append(record)
    return records, torn


def is_event(record: dict) -> bool:
    """Whether a record has the fields of its event, each of its kind; money must be a number that can be added up."""
    def usd(value) -> bool:
        return type(value) in (int, float) and 0 <= value < 1e9
    kinds = {"usd": usd, "price": lambda value: isinstance(value, dict) and value.keys() == {"input", "output"} and all(map(usd, value.values())),
             "keys": lambda value: isinstance(value, dict) and all(map(usd, value.values())), "content": lambda value: True}
    here = [name for name in ("event", "key", "batch", "time") if name in record]
    return all(name in record and kinds.get(name, lambda value: isinstance(value, str))(record[name]) for name in (*here, *EVENTS.get(str(record["event"]), ())))
