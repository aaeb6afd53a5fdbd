"""The report as one HTML file that opens with no network: plotly.js once, every text escaped."""

import html
from pathlib import Path

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

TEMPLATE = Path(__file__).parent / "report.html"


def shown(content: go.Figure | pd.DataFrame, alt: str) -> str:
    """A figure, to be drawn by the page's script when it comes into view, or a table; `alt` describes it for readers who cannot see it."""
    if isinstance(content, pd.DataFrame):
        kind, body = "wide", content.to_html(index=False, escape=True, border=0, float_format=number, na_rep="–")
    else:
        data = content.to_json().replace("<", "\\u003c")  # so that no text in it can end the script element
        kind, body = "", f'<div class="plot" style="height:{content.layout.height or 400}px"></div><script type="application/json">{data}</script>'
    return f'<figure role="group" tabindex="0" class="{kind}" aria-label="{html.escape(alt)}">{body}<figcaption>{html.escape(alt)}</figcaption></figure>'


def number(value, digits: int = 2) -> str:
    """A number for a table cell; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def p_value(value) -> str:
    """A p-value for a table cell."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def estimate(row: dict) -> str:
    """`0.42 [0.31, 0.53]`, or a dash."""
    if row.get("estimate") is None:
        return "–"
    interval = f" [{number(row['ci_low'])}, {number(row['ci_high'])}]" if row.get("ci_low") is not None else ""
    return number(row["estimate"]) + interval


def render(**content) -> str:
    """The page from its template; all values are escaped unless they are figures made here."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "estimate": estimate, "p_value": p_value, "shown": shown}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(plotlyjs=get_plotlyjs(), **content)
