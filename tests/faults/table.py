"""The table of what was tried: long runs write rows into results.json, `python -m tests.faults.table` writes README.md.

A run is long with `FAULTS=long`, or with `FAULT_TRIES=20000`, which also says how many inputs each group of made-up ones has.

A row is written by the test that made the tries, from its own counts, and only by a long run; the short run that is part of
`make test` asserts the same and writes nothing.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from lib.files import to_json, write_atomic

FOLDER = Path(__file__).parent
TRIES = int(os.environ.get("FAULT_TRIES") or 0)
LONG = os.environ.get("FAULTS") == "long" or TRIES > 0

HEAD = """# What was broken on purpose

Written by `make faults`; a short version of each row is part of `make test`. A *try* is one fault that really took place; a *loss*
is a try after which the promise did not hold.

"""
TAIL = """
## What is not promised

- **Hardware that lies.** A record is on disk when `fsync` returns. A disk that says so and has not written loses it.
- **A forger.** Seals and checks show damage. Somebody who changes a file and computes a new seal is not found out; where that
  matters, keep the commit and compare.
- **Journal lines of before there were checks**, and the bundled texts: no hash guards them but git's.
- **A paid reply that arrives when the disk has just filled up** cannot be kept. It counts as spent, and the run stops.
- **A reply in flight at a kill** may have been billed, though nobody has it. It counts as spent at its worst case; the next run
  asks again.
- **Between check and use.** A file is checked when it is read, not while its content lies in memory.
- **Memory that ends while libraries are loaded.** Below about half a gigabyte of address space they end the process in their own
  words. Later it is one line: as `MemoryError`, or as a kernel that died.
- **Ctrl-C in the first tenth of a second**, before Python has found this package, is Python's own traceback.
- **SIGKILL and power cuts** say nothing. What they leave is read, or refused by name, by the next run.
- **A half-full disk.** Where an artifact fitted and its sidecar did not, the artifact is refused until its stage has run again.
- **Models of the hub without a revision** in their params file, corpora of the hub, and SAELens releases are what their owners last
  made of them. No code of theirs is run.
- **Headers that come byte by byte.** The body of an API's answer has an end in time and size; its headers have the timeout between
  two bytes only.
- **Known advisories of the pinned packages** are not looked up by a test: that takes a service beside the package index. With
  one in reach: `pip-audit -r requirements.lock --no-deps --disable-pip`. Nor do bandit and detect-secrets run in the tests; ruff's `S`
  rules are bandit's, and tests/test_security.py looks for what both miss.
- **Other users of this account.** Whoever can write into the project's folder can change its code.
"""


def size(long: int, short: int) -> int:
    """How many tries: the table's in a long run, few in `make test`."""
    return long if LONG else short


def record(fault: str, promise: str, *, tries: int, losses: int, note: str = "") -> None:
    """Write one row, in a long run only."""
    if not LONG:
        return
    path = FOLDER / "results.json"
    with FileLock(FOLDER / ".results.lock"):  # two test processes share the file
        rows = json.loads(path.read_text()) if path.exists() else {}
        rows[fault] = {"promise": promise, "tries": tries, "losses": losses, "note": note, "day": datetime.now(UTC).date().isoformat()}
        write_atomic(path, to_json(rows))


def render(rows: dict) -> str:
    """README.md of these rows."""
    def cell(text) -> str:
        return str(text).replace("|", "\\|").replace("\n", " ")
    lines = ["| fault | promise | tries | losses | how |", "| --- | --- | ---: | ---: | --- |"]
    lines += [f"| {cell(fault)} | {cell(row['promise'])} | {row['tries']:,} | {row['losses']} | {cell(row['note'])} |" for fault, row in sorted(rows.items())]
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    write_atomic(FOLDER / "README.md", render(json.loads((FOLDER / "results.json").read_text())).encode())
