"""Two runs of one study side by side: `python -m lib.report.compare BEFORE AFTER`, each a folder such as outputs/smollm2-135m.

What changed is read from the results, and why from their sidecars: parameters, inputs, versions, commit, thresholds.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lib.cli import exit_code, leave
from lib.errors import BadInput
from lib.report.collect import RESULTS
from lib.report.html import estimate
from lib.store import read_checked, read_preregistration

REASONS = ("parameters", "inputs", "versions", "git_commit", "source", "model_id")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def results(folder: Path) -> tuple[dict, dict]:
    """Result rows by (criterion, metric), and the sidecar behind each criterion; files that fail their check are refused."""
    rows, about = {}, {}
    for criterion, name in RESULTS.items():
        path = folder / name
        if path.exists():
            content, sidecar = read_checked(path)
            for row in json.loads(content)["results"]:
                if row["criterion"] == criterion:
                    rows[criterion, row["metric"]], about[criterion] = row, sidecar
    if not rows:
        raise BadInput(f"{folder}: holds no results; give the folder of a study that was run")
    return rows, about


def flat(value, name: str = "") -> dict[str, str]:
    """`{path: value}` of nested mappings."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {key: text for k, v in value.items() for key, text in flat(v, f"{name}.{k}" if name else str(k)).items()}


def reasons(before: dict, after: dict) -> list[str]:
    """What differs between two sidecars, in words; hashes are shortened."""
    def short(text: str) -> str:
        return text[:10] + "…" if len(text) >= 40 else text
    old, new = ({name: text for key in REASONS for name, text in flat(one.get(key), key).items()} for one in (before, after))
    return [f"{name}: {short(old.get(name, 'none'))} → {short(new.get(name, 'none'))}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def thresholds(folder: Path) -> dict[str, str]:
    path = folder / "preregistration.json"
    return flat(read_preregistration(path)["thresholds"]) if path.exists() else {}


@app.command()
def main(before: Annotated[Path, typer.Argument(help="Folder of the earlier run.")],
         after: Annotated[Path, typer.Argument(help="Folder of the later run.")]) -> None:
    """Print every result that changed, and what differs behind it."""
    (old, why_old), (new, why_new) = results(before), results(after)
    table = Table("criterion", "metric", "before", "after", title=f"{before.name} → {after.name}", title_justify="left")
    for key in dict.fromkeys([*old, *new]):
        said = [f"{one[key]['verdict']} {estimate(one[key])}" if key in one else "not run" for one in (old, new)]
        if said[0] != said[1]:
            table.add_row(*key, *said)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if table.row_count:
        console.print(table)
    else:
        print("No verdict and no estimate differs.")
    found: dict[str, list[str]] = {}
    for criterion in why_old.keys() & why_new.keys():
        for reason in reasons(why_old[criterion], why_new[criterion]):
            found.setdefault(reason, []).append(criterion)
    moved = {name: (a, b) for name, a in thresholds(before).items() if (b := thresholds(after).get(name)) != a}
    for name, (a, b) in moved.items():
        found[f"thresholds.{name}: {a} → {b}"] = ["all"]
    for reason in sorted(found):
        print(f"{reason}  ({', '.join(sorted(found[reason]))})")
    if not found:
        print("Parameters, inputs, versions, code and thresholds are the same.")


if __name__ == "__main__":
    leave(exit_code(app, "lib.report.compare"))
