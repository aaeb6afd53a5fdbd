"""`python -m lib.run audit FILE.jsonl …`: can words alone tell the classes of other people's contrast data apart?

The file holds one JSON object a line: a pair (`--positive`, `--negative`), a triplet (`--third` beside them: all three
pairs are audited), or one text with its class (`--text`, `--label`). Nothing of the texts is trusted to be independent:
groups, or near-duplicates where no group is given, stay on one side of every fold. With `--study` the layers of a model
stand beside the words; only then is torch needed.
"""

import json
import os
import re
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from lib.errors import BadInput
from lib.files import read_regular
from lib.params import PARAMS, load_params, read_yaml
from lib.report import probe_figures
from lib.store import outputs_root, write_atomic
from lib.text.contrast_audit import audit_contrast, checked

MAX_BYTES = 500_000_000
TOGETHER = 8  # texts of one prompt in one forward: longer token trees cost memory, not time
COLUMNS = ["contrast", "evaluation", "family", "baseline", "auroc", "ci_low", "ci_high", "n"]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read_lines(path: Path) -> pd.DataFrame:
    """A JSON Lines file as a table; the first fault is named with its line."""
    try:
        lines = read_regular(path, MAX_BYTES, fix="audit a sample of it").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name}: cannot be read ({error}); give a JSON Lines file") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            raise BadInput(f"{path.name}: line {number}: not JSON; each line is one object") from None
        if not isinstance(record, dict):
            raise BadInput(f"{path.name}: line {number}: not an object with columns")
        records += [record] if record else []
    if not records:
        raise BadInput(f"{path.name}: holds no records")
    return pd.DataFrame(records, dtype=object)


def long_rows(path: Path, *, sides: list[str], text: str, label: str, group: str, prompt: str) -> pd.DataFrame:
    """Rows text, label (a name), pair, and group and prompt where asked for, of one file."""
    table = read_lines(path)
    for column in filter(None, [*sides, text, label, group, prompt]):
        if column not in table:
            raise BadInput(f"{path.name}: no column {column!r}; columns are {', '.join(map(str, table.columns))}")
    parts = [(side, table[side]) for side in sides] or [(None, table[text])]
    found = []
    for side, texts in parts:
        rows = pd.DataFrame({"text": texts, "label": table[label].map(str) if side is None else side, "pair": np.arange(len(table))})
        for name, column in (("group", group), ("prompt", prompt)):
            if column:
                rows[name] = table[column]
        found.append(rows)
    rows = pd.concat(found, ignore_index=True)
    bad = [not (isinstance(value, str) and value.strip()) for value in rows["text"]]
    if any(bad):
        row = rows[bad].iloc[0]
        raise BadInput(f"{path.name}: record {row['pair'] + 1}: {text or row['label']} is no text")
    if group and rows["group"].isna().any():
        raise BadInput(f"{path.name}: record {rows[rows['group'].isna()]['pair'].iloc[0] + 1}: {group} is missing")
    return rows.assign(group=rows["group"].map(str)) if group else rows


def contrast_rows(rows: pd.DataFrame, pair: tuple[str, str], *, cosine: float, seed: int) -> pd.DataFrame:
    """The rows of two labels, the first as 1, sampled and grouped as they will be audited."""
    own = rows[rows["label"].isin(pair)]
    return checked(own.assign(label=(own["label"] == pair[0]).astype(int)), cosine=cosine, seed=seed)[0]


def read_model(study: str, rows: pd.DataFrame) -> dict:
    """Activations X [layer, text, d], embedding [text, d] and response token ids of the texts, by the study's model."""
    params = load_params(study)
    from lib.model import activations, prompts, weights  # needs torch, which the rest of the audit does without

    model, tokenizer, _ = weights.load(params.model)
    asked = rows["prompt"].fillna("").map(str) if "prompt" in rows else pd.Series("", index=rows.index)
    encoded = [prompts.encode(tokenizer, params.model.template, p, t) for p, t in zip(asked, rows["text"], strict=True)]
    groups = [part for same in asked.groupby(asked).indices.values() for part in np.split(same, range(TOGETHER, len(same), TOGETHER))]
    pooled, _, _ = activations.extract(model, [[encoded[row] for row in group] for group in groups], [-1, *params.model.layers])
    resid = np.empty_like(pooled)
    resid[:, np.concatenate(groups)] = pooled
    return {"X": resid[1:], "embedding": resid[0], "token_ids": [list(e.ids[e.start:]) for e in encoded]}


def audit_all(rows: pd.DataFrame, labels: list[str], *, study: str | None, cosine: float, seed: int) -> pd.DataFrame:
    """The audit of every pair of `labels`, the first of a pair as the positive one, with a column contrast."""
    if not 2 <= len(labels) <= 3:
        raise BadInput(f"label: {len(labels)} different values ({', '.join(labels[:5])}); two or three are needed")
    tables = []
    for pair in combinations(labels, 2):
        own = contrast_rows(rows, pair, cosine=cosine, seed=seed)
        table = audit_contrast(own, cosine=cosine, seed=seed, **(read_model(study, own) if study else {}))
        tables.append(table.assign(contrast=f"{pair[0]} / {pair[1]}"))
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def said(table: pd.DataFrame, limit: float) -> list[str]:
    """One sentence a contrast: what words alone reach, and whether a layer exceeds it."""
    out = []
    for contrast, own in table.groupby("contrast", sort=False):
        best = own[own["family"] == "text"].iloc[0]
        leaky = best["auroc"] > limit
        words = f"{contrast}: words alone ({best['baseline']}) reach {shown(best)}"
        out.append(f"LEAKY: {words}, above {limit:.2f}: a probe on these texts shows nothing" if leaky
                   else f"not leaky: {words}, not above {limit:.2f}: a probe must beat that")
        layers = own[own["family"] == "activations"]
        if len(layers):
            out.append(f"{contrast}: the best layer ({layers['baseline'].iloc[0]}, chosen after the fact) reaches {shown(layers.iloc[0])}")
    return out


def shown(row: pd.Series) -> str:
    return f"{row['auroc']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def print_table(table: pd.DataFrame) -> None:
    """The leakage table on the terminal, best first."""
    view = Table()
    for column in ("contrast", "evaluation", "baseline", "AUROC [95%]", "texts"):
        view.add_column(column)
    for _, row in table.iterrows():
        view.add_row(row["contrast"], row["evaluation"], row["baseline"], shown(row), str(row["n"]))
    Console(width=None if os.isatty(1) else 140).print(view)


def write_page(table: pd.DataFrame, sentences: list[str], name: str, limit: float) -> Path:
    """Table and figures as one HTML file that opens offline, and the table as CSV beside it; returns the page's path."""
    drawn = [probe_figures.audit_figure(table, limit)]
    if (table["family"] == "activations").any():
        drawn.insert(0, probe_figures.audit_layers_figure(table))
    body = "".join(figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(drawn))
    head = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    page = ("<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>Audit of {escape(name)}</title><style>body {{ font-family: sans-serif; max-width: 1100px; margin: auto; padding: 1rem }}</style></head>"
            f"<body><h1>Audit of {escape(name)}</h1>{head}{body}{table.to_html(index=False, float_format='{:.3f}'.format)}</body></html>")
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-") or "contrast"
    path = outputs_root() / "audit" / f"{slug}.html"
    write_atomic(path, page.encode())
    write_atomic(path.with_suffix(".csv"), table.to_csv(index=False, float_format="%.6g").encode())
    return path


@app.command(name="audit")
def main(
    file: Annotated[Path, typer.Argument(help="JSON Lines: one pair, triplet or text a line.")],
    positive: Annotated[str, typer.Option(help="Column of the positive text of a pair.")] = "",
    negative: Annotated[str, typer.Option(help="Column of the negative text of a pair.")] = "",
    third: Annotated[str, typer.Option(help="Column of a third text: all three pairs are audited.")] = "",
    text: Annotated[str, typer.Option(help="Instead: column of the text, one text a line.")] = "",
    label: Annotated[str, typer.Option(help="Column of the text's class, two or three different values.")] = "",
    group: Annotated[str, typer.Option(help="Column of what belongs together (topic, source); else near-duplicates do.")] = "",
    test: Annotated[Path | None, typer.Option(help="Test file of the same columns, scored as it is given.")] = None,
    study: Annotated[str | None, typer.Option(help="A study whose model's layers are put beside the words; needs torch.")] = None,
    prompt: Annotated[str, typer.Option(help="With --study: column of the message that the text replies to.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of folds and of samples of large files.")] = 0,
) -> None:
    """Audit other people's contrast data: can words alone tell the classes apart? Prints a table, writes a figure."""
    sides = [positive, negative, *([third] if third else [])]
    if not (all(sides) and not (text or label)) and not (text and label and not (positive or negative or third)):
        raise BadInput("audit: give --positive and --negative (two columns of texts), or --text and --label (a text and its class)")
    thresholds = read_yaml(PARAMS / "preregistration.yaml")
    columns = dict(sides=sides if all(sides) else [], text=text, label=label, group=group, prompt=prompt)
    parts = {"train": file} | ({"test": test} if test else {})
    rows = pd.concat([long_rows(path, **columns).assign(split=split) for split, path in parts.items()], ignore_index=True)
    rows["pair"] = rows["split"] + rows["pair"].astype(str)
    labels = sides if all(sides) else sorted(rows["label"].unique(), reverse=True)
    limit = thresholds["probes"]["leaky_within"]
    table = audit_all(rows, labels, study=study, cosine=thresholds["cluster_cosine"], seed=seed)
    print_table(table)
    sentences = said(table, limit)
    print(*sentences, sep="\n")
    print("figure:", os.path.relpath(write_page(table, sentences, file.name, limit)))
