"""Write the result into README.md and docs/: `python -m lib.report.readme`, after the default studies have run.

The table between the markers and `docs/result.json` come from the same metrics; a test compares the two.
"""

from typing import Annotated

import pandas as pd
import typer

from lib.cli import exit_code, leave
from lib.errors import BadInput
from lib.params import ROOT
from lib.report import figures
from lib.report.collect import collect
from lib.report.exports import cells, markdown
from lib.stats.verdicts import CRITERIA
from lib.store import to_json, write_atomic

KEPT = ("study", "criterion", "literal_value", "literal_verdict", "verdict", "reason", "estimate", "ci_low", "ci_high", "null",
        "text_baseline", "text_baseline_name", "flags", "artifact")
SHOWN = ("study", "criterion", "literal", "calibrated", "estimate [95%]", "text baseline", "flags")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
START, STOP = "<!-- verdicts -->", "<!-- /verdicts -->"


def table(rows: list[dict]) -> str:
    """The verdict table as Markdown."""
    return markdown(pd.DataFrame([cells(row) for row in rows])[list(SHOWN)])


def filled(readme: str, rows: list[dict]) -> str:
    """README text with the table between its markers."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{table(rows)}\n{STOP}{rest.split(STOP)[1]}"


def recorded() -> list[dict]:
    """The headline rows of all studies that have results."""
    collected, _ = collect("", "readme")
    return [{key: row[key] for key in KEPT} for one in collected for criterion in CRITERIA if (row := one.headline(criterion))]


def disagreements(readme: str) -> list[str]:
    """`study criterion` of every row in which README and the artifacts here differ."""
    def lines(text: str) -> set[str]:
        return set(text.split(START)[1].split(STOP)[0].strip().splitlines()[2:])
    return [" ".join(cell.strip() for cell in line.split("|")[1:3]) for line in sorted(lines(filled(readme, recorded())) - lines(readme))]


@app.command()
def main(check: Annotated[bool, typer.Option("--check", help="Only say where README differs from the artifacts.")] = False) -> None:
    """Copy the verdict table of the default studies into README.md, docs/result.json and docs/verdicts.png."""
    rows, readme = recorded(), (ROOT / "README.md").read_text(encoding="utf-8")
    if not rows:
        raise BadInput("outputs: hold no results; run `make run` first")
    if check:
        if found := disagreements(readme):
            raise BadInput(f"README.md: differs from the artifacts in {', '.join(found)}; run `python -m lib.report.readme`")
        print("README.md says what the artifacts say.")
        return
    write_atomic(ROOT / "docs" / "result.json", to_json(rows))
    figures.verdict_figure(pd.DataFrame(rows)).write_image(ROOT / "docs" / "verdicts.png", width=900, scale=1.5)
    write_atomic(ROOT / "README.md", filled(readme, rows).encode())


if __name__ == "__main__":
    leave(exit_code(app, "lib.report.readme"))
