"""What a run cost: seconds and peak memory of each stage, as a table and as `outputs/<study>/timing.json`."""

from pathlib import Path
from threading import Event, Thread

import psutil
from rich.table import Table

from lib.files import to_json, write_atomic
from lib.seals import sealed_or_none

SAMPLE = 0.25  # seconds between two looks


class Peak:
    """Largest resident memory (bytes) of this process's children together while the context is open."""

    def __enter__(self):
        self.bytes, self._done = 0, Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._done.wait(SAMPLE):
            total = 0
            for child in own.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it has ended meanwhile
                    continue
            self.bytes = max(self.bytes, total)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()


def costs(root: Path, ran: set[str]) -> list[dict]:
    """`{stage, seconds, peak_mb, ran}` of every stage that a run's folder has a record of."""
    records = {path.name.removesuffix(".stage.json"): sealed_or_none(path) or {} for path in sorted(root.glob("*.stage.json"))}
    def cost(record: dict, name: str) -> float | None:
        return record.get(name) if type(record.get(name)) in (int, float) else None
    return [{"stage": stage, "seconds": cost(record, "seconds"), "peak_mb": cost(record, "peak_mb"), "ran": stage in ran}
            for stage, record in records.items()]


def write_costs(root: Path, ran: set[str]) -> Table:
    """Write `timing.json` and return the table that says the same."""
    rows = costs(root, ran)
    write_atomic(root / "timing.json", to_json({"stages": rows}))
    table = Table(title=f"{root.name}: what it cost", title_justify="left")
    for column in ("stage", "seconds", "peak memory", ""):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb'] / 1000:.1f} GB"
        table.add_row(row["stage"], "-" if row["seconds"] is None else f"{row['seconds']:.0f}", peak, "run" if row["ran"] else "up to date")
    return table
