"""Figures, one a question, drawn from the tables that the stages save; each shows its null or reference.

Colours are Okabe and Ito's, safe for colour-blind readers; an empathy type has the same colour everywhere.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

pio.renderers.default = "plotly_mimetype"  # JupyterLab draws it; the report puts a picture beside it for all other viewers

COLOURS = {"cognitive": "#0072B2", "affective": "#D55E00", "instrumental": "#009E73", "neutral": "#777777",
           "C/A": "#CC79A7", "C/I": "#0072B2", "A/I": "#D55E00", "macro": "#000000",
           "empathy": "#D55E00", "formality": "#E69F00", "null": "#BBBBBB", "cognitive-affective": "#CC79A7"}
VERDICTS = {"PASS": "#009E73", "FAIL": "#D55E00", "INCONCLUSIVE": "#777777"}
SERIES = ("#D55E00", "#777777", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BAND = "rgba(150,150,150,0.25)"


def styled(figure: go.Figure, title: str, *, x: str = "", y: str = "", height: int = 380) -> go.Figure:
    """Common look: question as title, labelled axes, legend below, room for both."""
    figure.update_layout(title={"text": title, "x": 0.01, "font": {"size": 15}}, template="plotly_white", height=height,
                         margin={"l": 60, "r": 20, "t": 60, "b": 60}, font={"size": 12},
                         legend={"orientation": "h", "y": -0.22, "x": 0})
    if x:
        figure.update_xaxes(title=x)
    if y:
        figure.update_yaxes(title=y)
    return figure


def error_bars(table: pd.DataFrame, value: str) -> dict:
    return {"type": "data", "symmetric": False, "array": table.ci_high - table[value], "arrayminus": table[value] - table.ci_low}


def leakage_figure(best: pd.DataFrame, thresholds) -> go.Figure:
    """Best lexical baseline per pair of the empathy texts, within and across registers."""
    rows = best[(best.condition == "empathy") & ~best.evaluation.str.startswith("transfer")]
    figure = go.Figure()
    for pair, part in rows.groupby("pair", sort=False):
        figure.add_scatter(x=part.evaluation, y=part.auroc, mode="markers", name=pair, error_y=error_bars(part, "auroc"),
                           marker={"size": 10, "color": COLOURS.get(pair)}, text=part.baseline, hovertemplate="%{text}: %{y:.2f}")
    figure.add_hline(0.5, line_dash="dot", line_color="#777777")
    figure.add_hline(thresholds.leaky_transfer, line_dash="dash", line_color="#D55E00", annotation_text="LEAKY across registers")
    figure.update_layout(scattermode="group")
    figure.update_yaxes(range=[0.2, 1.05])
    return styled(figure, "Do words alone give the types away?", y="AUROC, best lexical baseline")


def layer_figure(layers: pd.DataFrame, baselines: pd.DataFrame, layer: int) -> go.Figure:
    """Transfer AUROC over layers with the null's upper edge and the best baselines as lines, one panel a contrast."""
    rows = layers[(layers.evaluation == "transfer") & (layers.solver == "logistic")]
    contrasts = [c for c in ("C/A", "C/I", "A/I") if c in set(rows.contrast)]
    figure = make_subplots(1, len(contrasts), subplot_titles=contrasts, shared_yaxes=True, horizontal_spacing=0.03)
    for column, contrast in enumerate(contrasts, start=1):
        part, shown = rows[rows.contrast == contrast].sort_values("layer"), column == 1
        figure.add_scatter(x=part.layer, y=part.null_high, mode="lines", fill="tozeroy", fillcolor=BAND, line={"width": 0}, row=1, col=column,
                           name="below: labels permuted (97.5%, max over layers)", legendgroup="null", showlegend=shown)
        figure.add_scatter(x=pd.concat([part.layer, part.layer[::-1]]), y=pd.concat([part.ci_high, part.ci_low[::-1]]), mode="lines", fill="toself",
                           fillcolor="rgba(204,121,167,0.25)", line={"width": 0}, hoverinfo="skip", showlegend=False, row=1, col=column)
        figure.add_scatter(x=part.layer, y=part.auroc, name="probe", line={"color": "#CC79A7", "width": 3}, legendgroup="probe",
                           showlegend=shown, row=1, col=column)
        own = baselines[(baselines.contrast == contrast) & (baselines.direction == "transfer")]
        for family, dash, colour in (("lexical", "dash", "#000000"), ("contextual", "dot", "#0072B2")):
            best = own[own.family == family]["T"].max()
            if np.isfinite(best):
                figure.add_scatter(x=[part.layer.min(), part.layer.max()], y=[best, best], mode="lines", line={"dash": dash, "color": colour},
                                   name=f"best {family} baseline", legendgroup=family, showlegend=shown, row=1, col=column)
        figure.add_vline(layer, line_color="#777777", line_width=1, row=1, col=column)
    figure.update_yaxes(range=[0.3, 1.02])
    figure.update_xaxes(title="layer (grey line: preregistered)")
    figure = styled(figure, "Does the model tell the types apart in words it was not trained on?", height=420)
    return figure.update_yaxes(title="transfer AUROC", col=1)


def depth_figure(curves: dict[str, pd.DataFrame]) -> go.Figure:
    """Transfer AUROC of each study's probes over relative depth, one panel a contrast, so that models of any number of layers compare."""
    contrasts = [c for c in ("C/A", "C/I", "A/I") if any(c in set(t.contrast) for t in curves.values())]
    figure = make_subplots(1, max(len(contrasts), 1), subplot_titles=contrasts, shared_yaxes=True, horizontal_spacing=0.03)
    for number, (name, table) in enumerate(curves.items()):
        rows = table[(table.evaluation == "transfer") & (table.solver == "logistic")]
        colour, dash = SERIES[number % len(SERIES)], ("solid", "dash", "dot")[number // len(SERIES) % 3]
        for column, contrast in enumerate(contrasts, start=1):
            part = rows[rows.contrast == contrast].sort_values("layer")
            depth = (part.layer + 1) / (rows.layer.max() + 1)
            figure.add_scatter(x=pd.concat([depth, depth[::-1]]), y=pd.concat([part.ci_high, part.ci_low[::-1]]), mode="lines", fill="toself", opacity=0.2,
                               fillcolor=colour, line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name, row=1, col=column)
            figure.add_scatter(x=depth, y=part.auroc, mode="lines", name=name, legendgroup=name, showlegend=column == 1, line={"color": colour, "dash": dash, "width": 2},
                               text=part.layer, hovertemplate="layer %{text}: %{y:.2f}", row=1, col=column)
    figure.add_hline(0.5, line_dash="dot", line_color="#777777")
    figure.update_yaxes(range=[0.3, 1.02])
    figure.update_xaxes(title="relative depth", range=[0, 1.02])
    figure = styled(figure, "Where in a network are the types told apart? (dotted: chance)", height=420)
    return figure.update_yaxes(title="transfer AUROC", col=1)


def constructions_figure(table: pd.DataFrame, cos_max: float) -> go.Figure:
    """Every construction's cosine beside what it gives where there is no structure at all."""
    figure = go.Figure()
    for null, colour, label in (("N0", "#BBBBBB", "N0: no class effect"), ("N1", "#56B4E9", "N1: three unrelated offsets")):
        figure.add_scatter(x=table.construction, y=table[f"{null}_median"], mode="markers", name=label,
                           marker={"color": colour, "size": 8, "symbol": "line-ew-open"},
                           error_y={"type": "data", "symmetric": False, "array": table[f"{null}_high"] - table[f"{null}_median"],
                                    "arrayminus": table[f"{null}_median"] - table[f"{null}_low"], "thickness": 8, "width": 0, "color": colour})
    figure.add_scatter(x=table.construction, y=table.cos, mode="markers", name="this model", marker={"color": "#D55E00", "size": 11})
    figure.add_hline(cos_max, line_dash="dash", line_color="#777777", annotation_text="literal bound")
    figure.update_layout(scattermode="group")
    figure.update_yaxes(range=[-1.05, 1.1])
    return styled(figure, "How much of cos(C, A) is decided by the way it is built?", y="cosine", height=440)


def separation_figure(curve: pd.DataFrame, layer: int, cos_max: float) -> go.Figure:
    """κ over layers with its interval, beside three biased constructions of the same cosine."""
    figure = go.Figure()
    figure.add_scatter(x=pd.concat([curve.layer, curve.layer[::-1]]), y=pd.concat([curve.ci_high, curve.ci_low[::-1]]), mode="lines", fill="toself",
                       fillcolor=BAND, line={"width": 0}, name="κ: 95% interval", hoverinfo="skip")
    names = {"kappa": ("κ (unbiased)", "#000000", "solid"), "one_vs_rest": ("one-vs-rest", "#0072B2", "dash"),
             "minus_instrumental": ("minus instrumental", "#009E73", "dash"), "minus_neutral": ("minus neutral", "#D55E00", "dash")}
    for column, (name, colour, dash) in names.items():
        if column in curve:
            figure.add_scatter(x=curve.layer, y=curve[column], name=name, line={"color": colour, "dash": dash})
    figure.add_hline(cos_max, line_dash="dot", line_color="#777777")
    figure.add_vline(layer, line_color="#777777", line_width=1)
    figure.update_yaxes(range=[-1.05, 1.05])
    return styled(figure, "Are the Cognitive and the Affective direction separate?", x="layer (grey line: preregistered)", y="cosine")


def matrix_figure(values: np.ndarray, rows: list[str], columns: list[str], title: str, *, symmetric: bool = True) -> go.Figure:
    """A small matrix as a heat map with its numbers."""
    bound = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(go.Heatmap(z=values, x=columns, y=rows, colorscale="RdBu" if symmetric else "Viridis", texttemplate="%{z:.3f}",
                                  zmin=-bound if symmetric else 0, zmax=bound))
    figure.update_yaxes(autorange="reversed")
    return styled(figure, title, height=max(340, 130 + 36 * len(rows)))


def causality_figure(table: pd.DataFrame) -> go.Figure:
    """Each direction's effect with its interval beside the band of random directions of equal energy."""
    figure = go.Figure()
    middle = (table.random_high + table.random_low) / 2
    figure.add_scatter(x=table.direction, y=middle, mode="markers", name="random directions, 95%", marker={"color": "#BBBBBB", "size": 1},
                       error_y={"type": "data", "array": table.random_high - middle, "thickness": 14, "width": 0, "color": "#BBBBBB"})
    figure.add_scatter(x=table.direction, y=table.D, mode="markers", name="ablated direction", error_y=error_bars(table, "D"),
                       marker={"size": 11, "color": [COLOURS.get(name, "#000000") for name in table.direction]})
    figure.add_hline(0, line_color="#777777", line_width=1)
    return styled(figure, "Does ablation in the prompt make empathic replies less likely?", y="D, nats per token")


def dose_figure(doses: pd.DataFrame, band: tuple[float, float], needed: float) -> go.Figure:
    """Share of coherent replies and their log-perplexity over steering doses, with the unsteered band."""
    figure = make_subplots(1, 2, subplot_titles=["coherent replies", "log-perplexity ratio (band: unsteered)"], horizontal_spacing=0.1)
    for name, part in doses.groupby("direction", sort=False):
        line = {"color": COLOURS.get(name)}
        figure.add_scatter(x=part.coeff, y=part.coherent, name=name, line=line, legendgroup=name, row=1, col=1)
        figure.add_scatter(x=part.coeff, y=part.log_ppl, name=name, line=line, legendgroup=name, showlegend=False, row=1, col=2)
    figure.add_hline(needed, line_dash="dash", line_color="#777777", row=1, col=1)
    figure.add_hrect(*band, fillcolor=BAND, line_width=0, row=1, col=2)
    figure.update_yaxes(range=[-0.03, 1.05], col=1)
    return styled(figure, "How far can the model be steered before it falls apart?", x="coeff (residual norms)")


def contexts_figure(contexts: pd.DataFrame) -> go.Figure:
    """Effective dimension of the empathy effect in each context, with interval."""
    rows = contexts.dropna(subset=["pr"]) if "pr" in contexts else contexts.iloc[:0]
    figure = go.Figure()
    figure.add_scatter(x=rows.context, y=rows.pr, mode="markers", error_y=error_bars(rows, "pr"), name="participation ratio", marker={"size": 10, "color": "#D55E00"})
    figure.add_scatter(x=rows.context, y=rows.rank90, mode="markers", name="components for 90% (grows with n)", marker={"size": 8, "color": "#777777", "symbol": "x"})
    return styled(figure, "How many dimensions does empathy use in each context?", y="dimensions")


def verdict_figure(rows: pd.DataFrame) -> go.Figure:
    """Criterion × model, coloured by calibrated verdict, the literal one in words."""
    models, criteria = list(dict.fromkeys(rows.study)), list(dict.fromkeys(rows.criterion))
    codes = {"PASS": 1.0, "FAIL": 0.0, "INCONCLUSIVE": 0.5}
    grid, words = np.full((len(criteria), len(models)), np.nan), np.full((len(criteria), len(models)), "", dtype=object)
    for row in rows.itertuples():
        at = criteria.index(row.criterion), models.index(row.study)
        grid[at], words[at] = codes[row.verdict], f"{row.verdict}<br>literal {row.literal_verdict}"
    scale = [[0, VERDICTS["FAIL"]], [0.5, "#DDDDDD"], [1, VERDICTS["PASS"]]]
    figure = go.Figure(go.Heatmap(z=grid, x=models, y=criteria, text=words, texttemplate="%{text}", colorscale=scale, zmin=0, zmax=1, showscale=False))
    figure.update_yaxes(autorange="reversed")
    return styled(figure, "What holds, for which model?", height=90 + 62 * len(criteria))
