"""The decision table for other documents: CSV, Markdown and LaTeX, from the very rows that the page shows."""

import io

import pandas as pd

from lib.report.collect import Collected
from lib.report.html import estimate, number
from lib.stats.verdicts import CRITERIA

COLUMNS = ("study", "criterion", "literal", "calibrated", "estimate [95%]", "null", "text baseline", "flags", "artifact")


def cells(row: dict) -> dict[str, str]:
    """A result row as the cells of the decision table."""
    literal = "–" if row["literal_value"] is None else f"{number(row['literal_value'])} {row['literal_verdict']}"
    baseline = "–" if row["text_baseline"] is None else f"{number(row['text_baseline'])} ({row['text_baseline_name']})"
    return {"study": row["study"], "criterion": row["criterion"], "literal": literal, "calibrated": row["verdict"], "estimate [95%]": estimate(row),
            "null": row["null"] or "–", "text baseline": baseline, "flags": row["flags"] or "–", "artifact": row["artifact"]}


def decision_table(collected: list[Collected]) -> pd.DataFrame:
    """One row a study and criterion; where there is no result, the reason stands in its place."""
    rows = []
    for one in collected:
        for criterion in CRITERIA:
            row = one.headline(criterion)
            rows.append(cells(row) if row else dict.fromkeys(COLUMNS, "–") | {"study": one.run, "criterion": criterion, "calibrated": one.missing.get(criterion, "not run")})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def markdown(table: pd.DataFrame, *, bold: str = "calibrated") -> str:
    """A Markdown table; nothing in a cell can end the cell or start markup."""
    def cell(name: str, value: str) -> str:
        value = value.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
        return f"**{value}**" if name == bold else value
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(cell(name, str(value)) for name, value in zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """A LaTeX tabular, every cell escaped."""
    return table.to_latex(index=False, escape=True)


def csv(table: pd.DataFrame) -> bytes:
    """CSV that no spreadsheet takes for a formula."""
    def plain(value: str) -> str:
        return f"'{value}" if value[:1] in tuple("=+@\t\r") or (value[:1] == "-" and value[1:2].isalpha()) else value
    text = io.StringIO()
    table.map(plain).to_csv(text, index=False)
    return text.getvalue().encode()
