"""Figures of Experiment B: what a probe must be read against, the registers' matrix, and what more triplets would tell."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lib.report.figures import BAND, error_bars, styled

PAIRS = ("C/A", "C/I", "A/I")


def interval_band(part: pd.DataFrame, x: str, **more) -> dict:
    """Arguments of a closed outline from ci_low to ci_high over `x`."""
    return {"x": pd.concat([part[x], part[x][::-1]]), "y": pd.concat([part.ci_high, part.ci_low[::-1]]), "mode": "lines", "fill": "toself",
            "fillcolor": BAND, "line": {"width": 0}, "hoverinfo": "skip", **more}


def learning_figure(curve: pd.DataFrame, baselines: pd.DataFrame, fail: float) -> go.Figure:
    """T and its interval against the number of scenario clusters, with the best lexical baseline and the bound of FAIL."""
    contrasts = [c for c in PAIRS if c in set(curve.contrast)]
    figure = make_subplots(1, len(contrasts), subplot_titles=contrasts, shared_yaxes=True, horizontal_spacing=0.03)
    for column, contrast in enumerate(contrasts, start=1):
        part, shown = curve[curve.contrast == contrast].sort_values("n"), column == 1
        best = baselines[(baselines.contrast == contrast) & (baselines.direction == "transfer") & (baselines.family == "lexical")]["T"].max()
        figure.add_scatter(**interval_band(part, "n"), name="95% interval", legendgroup="ci", showlegend=shown, row=1, col=column)
        figure.add_scatter(x=part.n, y=part["T"], mode="lines+markers", name="T", line={"color": "#CC79A7", "width": 3}, legendgroup="T",
                           showlegend=shown, row=1, col=column)
        ends = [part.n.min(), part.n.max()]
        for name, value, dash, colour in (("best lexical baseline, all triplets", best, "dash", "#000000"), ("FAIL below", fail, "dot", "#D55E00")):
            figure.add_scatter(x=ends, y=[value] * 2, mode="lines", name=name, line={"dash": dash, "color": colour}, legendgroup=name,
                               showlegend=shown, row=1, col=column)
    figure.update_yaxes(range=[0.3, 1.02])
    figure = styled(figure, "Would more triplets decide it?", x="scenario clusters", height=400)
    return figure.update_yaxes(title="transfer AUROC T", col=1)


def controls_figure(adjusted: pd.DataFrame, selectivity: pd.DataFrame, baselines: pd.DataFrame) -> go.Figure:
    """T beside T without length and style, the best words, and labels that are random per cluster."""
    table = adjusted.merge(selectivity.drop(columns="T"), on="contrast")
    lexical = baselines[(baselines.direction == "transfer") & (baselines.family == "lexical")].groupby("contrast")["T"].max()
    marks = {"T": ("probe: T", "circle", "#CC79A7"), "T_adjusted": ("T without length and style (95%)", "diamond", "#000000"),
             "best words": ("best lexical baseline", "square", "#0072B2"), "control_held_out": ("random labels, unseen clusters", "x", "#777777"),
             "control_memorised": ("random labels, memorised", "cross", "#BBBBBB")}
    figure = go.Figure()
    for column, (name, symbol, colour) in marks.items():
        y = table.contrast.map(lexical) if column == "best words" else table[column]
        figure.add_scatter(x=table.contrast, y=y, mode="markers", name=name, marker={"symbol": symbol, "size": 10, "color": colour},
                           error_y=error_bars(table, column) if column == "T_adjusted" else None)
    figure.add_hline(0.5, line_dash="dot", line_color="#777777")
    figure.update_layout(scattermode="group")
    figure.update_yaxes(range=[0.2, 1.05])
    return styled(figure, "What is left without length and style, and what can such a probe memorise?", y="AUROC", height=420)


def mtmm_figure(table: pd.DataFrame) -> go.Figure:
    """The multitrait-multimethod matrix: cosines of directions within and across registers, convergent cells framed."""
    cells = table[table.second.fillna("") != ""]
    names = list(dict.fromkeys([*cells["first"], *cells.second]))
    square, words = pd.DataFrame(np.nan, names, names), pd.DataFrame("", names, names)
    figure = go.Figure()
    for row in cells.itertuples():
        square.loc[row.second, row.first] = row.cos
        words.loc[row.second, row.first] = f"{row.cos:.2f}<br>[{row.ci_low:.2f}, {row.ci_high:.2f}]"
        if row.kind == "convergent":
            i, j = names.index(row.first), names.index(row.second)
            figure.add_shape(type="rect", x0=i - 0.5, x1=i + 0.5, y0=j - 0.5, y1=j + 0.5, line={"color": "#000000", "width": 3})
    figure.add_trace(go.Heatmap(z=square, x=names, y=names, text=words, texttemplate="%{text}", textfont={"size": 10}, zmin=-1, zmax=1,
                                colorscale="RdBu", hoverongaps=False, colorbar={"title": "cosine"}))
    figure.update_yaxes(range=[len(names) - 0.5, 0.5], showgrid=False, tickvals=names[1:])
    figure.update_xaxes(showgrid=False, range=[-0.5, len(names) - 1.5])
    return styled(figure, "Are the directions the same when the words are not? (framed: one type, two registers)", height=460)


def audit_figure(table: pd.DataFrame, limit: float) -> go.Figure:
    """Every text baseline's AUROC with its interval, one panel a contrast, best first."""
    contrasts = list(dict.fromkeys(table.contrast))
    figure = make_subplots(1, len(contrasts), subplot_titles=contrasts, horizontal_spacing=0.03, shared_yaxes=True)
    for column, contrast in enumerate(contrasts, start=1):
        part = table[(table.contrast == contrast) & (table.family == "text")]
        figure.add_scatter(x=part.auroc, y=part.baseline, mode="markers", showlegend=False, marker={"size": 9, "color": "#0072B2"}, row=1, col=column,
                           error_x={"type": "data", "symmetric": False, "array": part.ci_high - part.auroc, "arrayminus": part.auroc - part.ci_low})
        for value, dash, colour in ((0.5, "dot", "#777777"), (limit, "dash", "#D55E00")):
            figure.add_vline(value, line_dash=dash, line_color=colour, row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(range=[min(0.35, table.ci_low.min() - 0.02), 1.03])
    return styled(figure, f"Can words alone tell the classes apart? (dotted: chance; dashed: LEAKY above {limit:.2f})", x="AUROC",
                  height=160 + 22 * table.baseline.nunique())


def audit_layers_figure(table: pd.DataFrame) -> go.Figure:
    """AUROC of each layer with its interval, and the best text baseline as a line, one panel a contrast."""
    contrasts = list(dict.fromkeys(table.contrast))
    figure = make_subplots(1, len(contrasts), subplot_titles=contrasts, horizontal_spacing=0.03, shared_yaxes=True)
    for column, contrast in enumerate(contrasts, start=1):
        own, shown = table[table.contrast == contrast], column == 1
        part = own[own.family == "activations"].assign(layer=lambda t: t.baseline.str.removeprefix("layer ").astype(int)).sort_values("layer")
        best = own[own.family == "text"].iloc[0]
        ends = [part.layer.min(), part.layer.max()]
        figure.add_scatter(**interval_band(part, "layer"), name="95% interval", legendgroup="ci", showlegend=shown, row=1, col=column)
        figure.add_scatter(x=part.layer, y=part.auroc, mode="lines+markers", name="probe", line={"color": "#CC79A7", "width": 3}, legendgroup="probe",
                           showlegend=shown, row=1, col=column)
        figure.add_scatter(x=ends, y=[best.auroc] * 2, mode="lines", name="best text baseline (band: 95%)", line={"dash": "dash", "color": "#0072B2"},
                           legendgroup="text", showlegend=shown, row=1, col=column)
        figure.add_hline(0.5, line_dash="dot", line_color="#777777", row=1, col=column)
        figure.add_hrect(best.ci_low, best.ci_high, fillcolor="rgba(0,114,178,0.15)", line_width=0, row=1, col=column)
    figure.update_yaxes(range=[0.35, 1.02])
    figure = styled(figure, "Does any layer know more than the words do?", x="layer", height=420)
    return figure.update_yaxes(title="AUROC", col=1)


def heat_maps_figure(overlap: pd.DataFrame, transfer: pd.DataFrame) -> go.Figure:
    """Overlap O of every two structures beside the accuracy of a style classifier carried from one to another."""
    names = ("E", "V", "N")
    full = {"E": "empathy", "V": "valence-stripped", "N": "non-empathy"}
    figure = make_subplots(1, 2, subplot_titles=["overlap O (1: the same structure)", "transfer accuracy (null: 97.5% of permuted)"], horizontal_spacing=0.2)
    square, words = pd.DataFrame(np.eye(3), names, names), pd.DataFrame("1 by definition", names, names)
    for row in overlap[overlap.metric == "euclidean"].itertuples():
        for a, b in (row.pair.split("/"), row.pair.split("/")[::-1]):
            square.loc[a, b], words.loc[a, b] = row.O, f"{row.O:.2f}<br>[{row.ci_low:.2f}, {row.ci_high:.2f}]<br>CKA {row.cka_debiased:.2f}"
    accuracy = transfer.pivot(index="train", columns="test", values="accuracy").loc[list(names), list(names)]
    null = transfer.pivot(index="train", columns="test", values="null_high").loc[list(names), list(names)]
    told = [[f"{a:.2f}<br>null {n:.2f}" for a, n in zip(*rows, strict=True)] for rows in zip(accuracy.to_numpy(), null.to_numpy(), strict=True)]
    labels = [full[n] for n in names]
    for column, (values, text, low) in enumerate(((square, words.to_numpy(), 0), (accuracy, told, 1 / 3)), start=1):
        figure.add_trace(go.Heatmap(z=values, x=labels, y=labels, text=text, texttemplate="%{text}", zmin=low, zmax=1, colorscale="Blues",
                                    showscale=False), row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_yaxes(title="trained on", col=2)
    figure.update_xaxes(title="tested on", col=2)
    return styled(figure, "Is the structure shared, and does it carry over?", height=400)


def overlap_figure(overlap: pd.DataFrame, thresholds) -> go.Figure:
    """O with its 95% and 90% interval in each metric, and the ratio of sizes, each beside its region of equivalence."""
    figure = make_subplots(1, 2, subplot_titles=["overlap O (thin 95%, thick 90%)", "ratio of effect sizes (90%)"], horizontal_spacing=0.1)
    colours = dict(zip(("euclidean", "whitened"), ("#D55E00", "#0072B2"), strict=True))
    for metric, part in overlap.groupby("metric", sort=False):
        colour, mark = colours.get(metric, "#000000"), {"size": 10, "color": colours.get(metric)}
        figure.add_scatter(x=part.pair, y=part.O, mode="markers", name=metric, legendgroup=metric, offsetgroup=metric, marker=mark,
                           error_y=error_bars(part, "O"), row=1, col=1)
        inner = part.assign(ci_low=part.ci90_low, ci_high=part.ci90_high)
        figure.add_scatter(x=part.pair, y=part.O, mode="markers", legendgroup=metric, offsetgroup=metric, showlegend=False, marker=mark, row=1, col=1,
                           error_y={**error_bars(inner, "O"), "thickness": 5, "width": 0, "color": colour})
        inner = part.assign(ci_low=part.magnitude_ci90_low, ci_high=part.magnitude_ci90_high)
        figure.add_scatter(x=part.pair, y=part.magnitude_ratio, mode="markers", legendgroup=metric, showlegend=False, marker=mark,
                           error_y=error_bars(inner, "magnitude_ratio"), row=1, col=2)
    own = overlap.drop_duplicates("pair")
    figure.add_scatter(x=own.pair, y=own.cka_debiased, mode="markers", name="debiased CKA", marker={"symbol": "diamond-open", "size": 10, "color": "#777777"},
                       row=1, col=1)
    figure.add_hline(thresholds.overlap_max, line_dash="dash", line_color="#009E73", annotation_text="different below", row=1, col=1)
    for column in (1, 2):
        figure.add_hrect(thresholds.equivalence_low, thresholds.equivalence_high, fillcolor=BAND, line_width=0, row=1, col=column,
                         annotation_text="the same" if column == 1 else "equal")
    figure.update_layout(scattermode="group")
    return styled(figure, "Is the structure one of empathy, or of any three styles?", height=420)
