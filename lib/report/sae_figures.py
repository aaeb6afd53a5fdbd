"""Figures of experiment A and of convergence: training, the number of clusters, the map, and the cosines."""

import textwrap

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.spatial import ConvexHull, QhullError

from lib.report.figures import BAND, COLOURS, error_bars, styled

SHADES = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def training_figure(curve: pd.DataFrame) -> go.Figure:
    """Explained variance and dead share over training, the corpus beside the Gaussian null."""
    figure = make_subplots(1, 2, subplot_titles=["explained variance (training batches)", "dead latents"], horizontal_spacing=0.1)
    for (data, seed), part in curve.groupby(["data", "seed"], sort=False):
        line = {"color": COLOURS["null"] if data == "gaussian" else SHADES[1 + int(seed) % 2], "dash": "dot" if data == "gaussian" else "solid"}
        for column, name in enumerate(("explained_variance", "dead"), start=1):
            figure.add_scatter(x=part.tokens, y=part[name], name=f"{data}, seed {seed}", legendgroup=f"{data}{seed}", line=line,
                               showlegend=column == 1, row=1, col=column)
    return styled(figure, "Does training find structure that Gaussian tokens do not have?", x="training tokens")


def gap_figure(curve: pd.DataFrame, k: int) -> go.Figure:
    """Gap over k of each representation, with the band of structureless data of the same covariance."""
    names = list(dict.fromkeys(curve.representation))
    figure = make_subplots(1, len(names), subplot_titles=names, horizontal_spacing=0.05)
    for column, name in enumerate(names, start=1):
        part, shown = curve[curve.representation == name], column == 1
        figure.add_scatter(x=pd.concat([part.k, part.k[::-1]]), y=pd.concat([part.null_high, part.null_low[::-1]]), fill="toself", mode="lines",
                           fillcolor=BAND, line={"width": 0}, name="no clusters, same covariance (95%)", hoverinfo="skip",
                           legendgroup="null", showlegend=shown, row=1, col=column)
        figure.add_scatter(x=part.k, y=part.gap, mode="lines+markers", name="gap", line={"color": "#000000"}, legendgroup="gap",
                           showlegend=shown, row=1, col=column)
        figure.add_scatter(x=part.k, y=part.silhouette, mode="lines", name="silhouette (literal)", line={"color": "#E69F00", "dash": "dot"},
                           legendgroup="silhouette", showlegend=shown, row=1, col=column)
        figure.add_vline(k, line_color="#777777", line_width=1, row=1, col=column)
    figure = styled(figure, f"How many clusters are there? (grey line: the {k} of theory)", x="k", height=400)
    return figure.update_yaxes(title="gap, log units", col=1)


def hull(points: np.ndarray) -> np.ndarray:
    """Corners [n, 2] of the convex hull, closed; empty where the points span no area."""
    try:
        corners = ConvexHull(points).vertices if len(points) > 2 else []
    except QhullError:
        corners = []
    return points[[*corners, *corners[:1]]] if len(corners) else np.zeros((0, 2))


def map_figure(texts: pd.DataFrame, representations: list[str]) -> go.Figure:
    """First two components of each representation, coloured by type, with the hulls of its clusters."""
    figure = make_subplots(1, len(representations), subplot_titles=representations, horizontal_spacing=0.06)
    for column, name in enumerate(representations, start=1):
        xy = texts[[f"{name} PC1", f"{name} PC2"]].to_numpy()
        for kind, part in texts.groupby("type", sort=False):
            figure.add_scatter(x=xy[part.index, 0], y=xy[part.index, 1], mode="markers", name=kind, legendgroup=kind, showlegend=column == 1,
                               marker={"color": COLOURS[kind], "size": 5, "opacity": 0.7, "symbol": "x" if kind == "neutral" else "circle"},
                               text=part.context, row=1, col=column)
        for code, part in texts.groupby(name):
            corners = hull(xy[part.index])
            figure.add_scatter(x=corners[:, 0], y=corners[:, 1], mode="lines", line={"color": "#555555", "width": 1}, name="cluster hulls",
                               legendgroup="hull", showlegend=bool(column == 1 and code == texts[name].min()), hoverinfo="skip", row=1, col=column)
    figure = styled(figure, "Do the texts fall apart by type?", x="component 1", height=460)
    return figure.update_yaxes(title="component 2", col=1)


def cosine_figure(cosines: pd.DataFrame) -> go.Figure:
    """Cosine of each type's direction with each matched cluster's, and the null's upper quantile below it."""
    seeds = sorted(set(cosines.sae))
    figure = make_subplots(1, len(seeds), subplot_titles=[f"SAE seed {seed}" for seed in seeds], horizontal_spacing=0.16)
    for column, seed in enumerate(seeds, start=1):
        part = cosines[cosines.sae == seed]
        order = list(dict.fromkeys(part.type))
        square, null = (part.pivot(index="type", columns="cluster", values=name).loc[order, order] for name in ("cosine", "null"))
        words = [[f"{a:.2f}<br>null {b:.2f}" for a, b in zip(*rows, strict=True)] for rows in zip(square.to_numpy(), null.to_numpy(), strict=True)]
        figure.add_trace(go.Heatmap(z=square, x=[f"~ {name}" for name in order], y=order, text=words, texttemplate="%{text}", zmin=-1, zmax=1,
                                    colorscale="RdBu", showscale=column == len(seeds)), row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    return styled(figure, "Do clusters found without labels point where the labels point?", x="cluster matched to", height=440)


def gates_shown(gates: pd.DataFrame) -> pd.DataFrame:
    """Every gate with its value, bound and nulls, to be read."""
    nulls = [name for name in gates if name not in ("gate", "value", "rule", "bound", "passed")]
    return pd.DataFrame({"gate": gates.gate.str.replace("_", " "), "value": gates.value.astype(float), "needed": [f"{'≥' if r == '>=' else '≤'} {b:g}" for r, b in zip(gates.rule, gates.bound, strict=True)],
                         "passed": np.where(gates.passed, "yes", "NO"), **{f"null: {name.replace('_', ' ')}": gates[name].astype(float) for name in nulls}})


def clusters_shown(what: pd.DataFrame) -> pd.DataFrame:
    """What each cluster of the first SAE holds: its share of every type, its main context, words and strongest latents."""
    rows = what[what.seed == 0]
    types = [name for name in rows if name.startswith("share_") and name != "share_context"]
    largest = rows[types].idxmax(axis=1).str.removeprefix("share_")
    return pd.DataFrame({"cluster": rows.cluster, "n": rows.n, "mostly": [f"{kind} {share:.0%}" for kind, share in zip(largest, rows[types].max(axis=1), strict=True)],
                         "context": [f"{name} {share:.0%}" for name, share in zip(rows.context, rows.share_context, strict=True)],
                         "words": rows.words, "latents and their tokens": rows.latents, "example": [textwrap.shorten(str(text), 200, placeholder=" …") for text in rows.example]})


def convergence_figure(table: pd.DataFrame, cos_min: float) -> go.Figure:
    """A of each SAE and split design with its interval, beside the upper quantile of each null."""
    rows = table.assign(where=[f"seed {sae}<br>{design}" for sae, design in zip(table.sae, table.design, strict=True)])
    figure = go.Figure()
    names = {"null_permuted": ("types exchanged", "line-ew-open"), "null_noise": ("N(0, Σ_w) directions", "diamond-open"),
             "null_rows": ("random decoder rows", "square-open")}
    for column, (name, symbol) in names.items():
        figure.add_scatter(x=rows["where"], y=rows[column], mode="markers", name=f"null: {name}", marker={"symbol": symbol, "size": 12, "color": "#777777"})
    figure.add_scatter(x=rows["where"], y=rows.A, mode="markers", name="A", error_y=error_bars(rows, "A"), marker={"size": 11, "color": "#D55E00"})
    figure.add_hline(cos_min, line_dash="dash", line_color="#777777", annotation_text="literal bound")
    figure.update_yaxes(range=[-0.05, 1.1])
    return styled(figure, "Do probe directions and SAE clusters agree more than any null?", y="matched cosine A (97.5% quantiles of nulls)", height=420)
