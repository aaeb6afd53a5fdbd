"""The report's words and figures, computed from what was collected; no number is written by hand."""

import re

from lib.report import figures, probe_figures, sae_figures
from lib.report.collect import Collected, cell_link
from lib.report.html import estimate
from lib.report.limits import deciding
from lib.report.methods import METHODS, answers_for
from lib.seals import sealed_or_none
from lib.stats.majority import majority
from lib.stats.verdicts import CRITERIA, Result
from lib.store import SIDECAR, meta_path

QUESTIONS = {
    "separation": "Are the Cognitive and the Affective direction separate?",
    "probes": "Are the types linearly there, beyond their words?",
    "clusters": "Does geometry alone give Cognitive, Affective, Instrumental and neutral?",
    "convergence": "Do sparse-autoencoder clusters and probes agree?",
    "specificity": "Is it empathy, or any three styles?",
    "causality": "Does ablating the directions degrade empathy?",
    "bandwidth": "How many dimensions, how far can each be driven?",
}


def majorities(collected: list[Collected], *, alpha: float) -> list[dict]:
    """One row a criterion over all trained models; models without a result stay in the count."""
    models = [one for one in collected if one.trained]
    rows = []
    for criterion in CRITERIA:
        found = [one.headline(criterion) for one in models if one.headline(criterion)]
        if found:
            names = Result.__dataclass_fields__
            results = [Result(**{k: v for k, v in row.items() if k in names} | {"flags": tuple(filter(None, row["flags"].split("; ")))}) for row in found]
            rows.append(majority(results, n_models=len(models), alpha=alpha))
    return rows


def answer(collected: list[Collected], majority_rows: list[dict]) -> str:
    """The result in one paragraph."""
    sentences = []
    for one in collected:
        if not one.rows:
            continue
        verdicts: dict[str, list[str]] = {"PASS": [], "FAIL": [], "INCONCLUSIVE": []}
        for criterion in CRITERIA:
            if row := one.headline(criterion):
                verdicts[row["verdict"]].append(criterion + (" (empathy's is the smaller)" if "SMALLER" in row["flags"] else ""))
        literal = [c for c in CRITERIA if (row := one.headline(c)) and row["literal_verdict"] == "PASS"]
        told = "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items() if names)
        sentences.append(f"{one.run}{'' if one.trained else ' (random weights, the null)'}: {told}. "
                         f"Taken literally, {len(literal)} of {sum(map(len, verdicts.values()))} criteria would pass.")
    n_models = sum(one.trained for one in collected)
    n_run = sum(one.trained and bool(one.rows) for one in collected)
    held = [row["criterion"] for row in majority_rows if row["verdict"] == "PASS"]
    return " ".join(sentences) + (f" Results exist for {n_run} of {n_models} trained models, so for most models "
                                  f"{'these criteria hold: ' + ', '.join(held) if held else 'no criterion is shown to hold'}.")


def matrix(collected: list[Collected], majority_rows: list[dict]) -> dict:
    """The decision table, criterion × study: `columns`, and `rows` of a criterion, its question, a cell a study (its headline row, or the
    reason why there is none) and the majority's row. A study without any result takes one cell for all criteria."""
    held = {row["criterion"]: row for row in majority_rows}
    return {"columns": [{"run": one.run, "model_id": one.params.model.model_id, "trained": one.trained, "why_not": one.why_not} for one in collected],
            "rows": [{"criterion": criterion, "question": QUESTIONS[criterion], "majority": held.get(criterion),
                      "cells": [one.headline(criterion) or {"missing": one.missing.get(criterion, "not run")} for one in collected if one.rows]}
                     for criterion in CRITERIA]}


def part(one: Collected, criterion: str, title: str, content, alt: str, *files: str, text: str = "") -> dict:
    """One figure (or table, `content`) with the sentence that says how its criterion came out, where there is a `criterion`, and the
    artifacts it was drawn from. `slug` names it in the exports."""
    row = one.headline(criterion) if criterion else None
    said = "" if row is None else (f"{row['verdict']}: {row['reason']}. Estimate {estimate(row)}; literal {row['literal_verdict']}"
                                   f"; null: {row['null'] or 'see figure'}. {row['power']}".strip())
    sources = [{"artifact": f"{one.run}/{file}", "cell": cell_link(one.study.root, about["stage"], file)}
               for file in files if (about := sealed_or_none(meta_path(one.study.path(file)), holds=SIDECAR))]
    return {"title": title, "text": text or said, "content": content, "alt": alt, "criterion": criterion, "sources": sources,
            "method": METHODS.get(criterion, ""), "slug": re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]}


def section(one: Collected, thresholds, known: list[dict]) -> dict:
    """All that the page says of one study: what it is, why a criterion has no result, its parts, and what would decide what is open."""
    return {"run": one.run, "question": one.params.question, "model_id": one.params.model.model_id, "layer": one.params.layer,
            "license": one.params.model.license, "missing": list(dict.fromkeys(reason for reason in one.missing.values() if reason != "not run")),
            "deciding": deciding(one), "parts": [found | {"known": answers_for(found["criterion"], known)} for found in parts_of(one, thresholds)]}


def parts_of(one: Collected, thresholds) -> list[dict]:
    """The figures of one study, in the order of the criteria; what has no data is left out."""
    layer, found = one.params.layer, []
    layers, baselines = one.table("probe/layers.csv"), one.table("probe/baselines.csv")
    if layers is not None and baselines is not None and len(layers):
        found.append(part(one, "probes", QUESTIONS["probes"], figures.layer_figure(layers, baselines, layer),
                          "Transfer AUROC of the probes over layers, with the permutation null and the best text baselines.",
                          "probe/metrics.json", "probe/layers.csv", "probe/baselines.csv"))
        found += probe_parts(one, baselines, thresholds)
    constructions, curve = one.table("separation/constructions.csv"), one.table("separation/layers.csv")
    if constructions is not None and len(constructions):
        found.append(part(one, "separation", QUESTIONS["separation"], figures.constructions_figure(constructions, thresholds.separation.cos_max),
                          "Cosine of the two directions under each construction, beside its value on two nulls.", "separation/metrics.json", "separation/constructions.csv"))
    matrix = one.table("separation/mtmm.csv")
    if matrix is not None and len(matrix):
        found.append(part(one, "", "Are the directions the same when the words are not?", probe_figures.mtmm_figure(matrix),
                          "Multitrait-multimethod matrix: cosines of the three types' directions within and across the two registers.", "separation/mtmm.csv"))
    if curve is not None and len(curve):
        found.append(part(one, "", "The same over layers", figures.separation_figure(curve, layer, thresholds.separation.cos_max),
                          "The unbiased cosine over layers with its interval, beside three biased constructions.", "separation/layers.csv"))
    found += unlabelled_parts(one, thresholds) + specificity_parts(one, thresholds)
    effects, doses = one.table("causality/effects.csv"), one.table("bandwidth/doses.csv")
    if effects is not None:
        found.append(part(one, "causality", QUESTIONS["causality"], figures.causality_figure(effects),
                          "Effect of each ablated direction beside the band of random directions of equal energy.", "causality/metrics.json", "causality/effects.csv"))
    found += intervention_parts(one, thresholds)
    metrics, contexts = one.json("bandwidth/metrics.json"), one.table("bandwidth/contexts.csv")
    if doses is not None and len(doses) and metrics:
        found.append(part(one, "bandwidth", QUESTIONS["bandwidth"], figures.dose_figure(doses, metrics["band"], thresholds.bandwidth.coherent_share),
                          "Share of coherent replies and log-perplexity over steering doses.", "bandwidth/metrics.json", "bandwidth/doses.csv"))
    if contexts is not None and "pr" in contexts and contexts["pr"].notna().any():
        found.append(part(one, "", "Effective dimension by context", figures.contexts_figure(contexts), "Participation ratio of the empathy effect in each context.",
                          "bandwidth/contexts.csv", text=" ".join(contexts.meaning.dropna()) if "meaning" in contexts else ""))
    found += texts_parts(one, thresholds)
    return found


def texts_parts(one: Collected, thresholds) -> list[dict]:
    """What the texts are: a sample in both registers, and what their words give away."""
    found, texts = [], one.table("dataset/filtered/texts.csv")
    empathy = None if texts is None else texts[(texts.condition == "empathy") & (texts.scenario_id == texts[texts.condition == "empathy"].scenario_id.min())]
    if empathy is not None and len(empathy):
        found.append(part(one, "", "What the texts are like", empathy[["register", "label", "response"]], f"All replies to the first scenario: {empathy.scenario.iloc[0]}",
                          "dataset/filtered/texts.csv"))
    leakage = one.table("dataset/raw/leakage_best.csv")
    if leakage is not None and len(leakage):
        found.append(part(one, "", "Do words alone give the types away?", figures.leakage_figure(leakage, thresholds.probes),
                          "AUROC of the best lexical baseline within and across registers.", "dataset/raw/leakage_best.csv"))
    return found


def unlabelled_parts(one: Collected, thresholds) -> list[dict]:
    """The figures of Experiment A and of its agreement with the probes."""
    found = []
    curve, texts, table = one.table("sae/curve.csv"), one.table("sae/texts.csv"), one.table("converge/convergence.csv")
    gates, what, cosines = one.table("sae/gates.csv"), one.table("sae/what.csv"), one.table("converge/cosines.csv")
    if gates is not None:
        found.append(part(one, "", "Is the sparse autoencoder good enough to be clustered?", sae_figures.gates_shown(gates),
                          "Every gate of the sparse autoencoder with its value, its bound and its value on nulls.", "sae/gates.csv"))
    if curve is not None and texts is not None and len(curve):
        found.append(part(one, "clusters", QUESTIONS["clusters"], sae_figures.gap_figure(curve, thresholds.clusters.k),
                          "Gap statistic over the number of clusters, with the band of structureless data.", "sae/metrics.json", "sae/curve.csv"))
        found.append(part(one, "", "The texts by their first two components", sae_figures.map_figure(texts, list(dict.fromkeys(curve.representation))),
                          "Texts on the first two components of each representation, coloured by type, with cluster hulls.", "sae/texts.csv"))
    if what is not None and len(what):
        found.append(part(one, "", "What the clusters are", sae_figures.clusters_shown(what),
                          "Types, contexts, words and strongest latents of each cluster of the first autoencoder.", "sae/what.csv"))
    if table is not None and len(table):
        found.append(part(one, "convergence", QUESTIONS["convergence"], sae_figures.convergence_figure(table, thresholds.convergence.cos_min),
                          "Matched cosine of probe directions and cluster directions, beside its nulls.", "converge/metrics.json", "converge/convergence.csv"))
    if cosines is not None and len(cosines):
        found.append(part(one, "", "Cosines of labelled directions and clusters", sae_figures.cosine_figure(cosines),
                          "Cosine of each type's direction with each matched cluster's direction, with the permutation null's upper quantile.", "converge/cosines.csv"))
    return found


def probe_parts(one: Collected, baselines, thresholds) -> list[dict]:
    """What the probes must be read against, and what more triplets would tell."""
    found = []
    adjusted, selectivity, learning = (one.table(f"probe/{name}.csv") for name in ("adjusted", "selectivity", "learning_curve"))
    if adjusted is not None and selectivity is not None:
        found.append(part(one, "", "What is left of the probes without length and style, and what can they memorise?",
                          probe_figures.controls_figure(adjusted, selectivity, baselines),
                          "Transfer AUROC beside its value without length and style, the best words, and labels that are random per cluster.",
                          "probe/adjusted.csv", "probe/selectivity.csv"))
    if learning is not None and len(learning):
        rows = [row for row in one.rows if row["criterion"] == "probes"]
        found.append(part(one, "", "Would more triplets decide it?", probe_figures.learning_figure(learning, baselines, thresholds.probes.fail_transfer),
                          "Transfer AUROC with its interval against the number of scenario clusters, beside the best lexical baseline.", "probe/learning_curve.csv",
                          text=" ".join(f"{row['metric'].split()[0]}, {row['verdict']}: {row['power']}." for row in rows)))
    return found


def intervention_parts(one: Collected, thresholds) -> list[dict]:
    """What edits do besides the headline: selectivity with its cost, and the doses with the coherence band."""
    found, metrics = [], one.json("causality/metrics.json") or {}
    matrix, doses = one.table("causality/selectivity.csv"), one.table("causality/doses.csv")
    if matrix is not None:
        if metrics.get("dose") == 0:  # rows of zeros would look like a finding
            matrix = matrix[~matrix.edit.str.startswith("steer")]
        control = metrics.get("positive_control", {})
        said = ("Positive control: formality steering moves formality inside the coherent range. " if control.get("shown")
                else "The method's sensitivity was not shown on this model: formality steering did not move formality inside the coherent range. ")
        said += "" if metrics.get("dose") != 0 else "Steering is not in the table: no dose of both directions stayed coherent. "
        monitored = {name: found for name, found in ((metrics.get("judge") or {}).get("monitoring") or {}).items() if found["r"] is not None}
        said += ("Monitoring, projection of the prompt against the judged style: " + "; ".join(f"{name} r = {v['r']:.2f} [{v['ci_low']:.2f}, {v['ci_high']:.2f}]" for name, v in monitored.items())
                 if monitored else "Monitoring was not measured: it needs a judge") + "."
        values, columns = matrix[["cognitive", "affective", "instrumental", "cost"]], ["cognitive", "affective", "instrumental", "cost on neutral text"]
        found.append(part(one, "", "Does an edit move its own type, and at what cost?", figures.matrix_figure(values.to_numpy(), list(matrix.edit), columns, "Change of log-probability per token under each edit"),
                          "Change of each type's log-probability under ablating, adding and asking for each type, with the cost in cross-entropy.", "causality/selectivity.csv", text=said))
    if doses is not None and metrics.get("band"):
        found.append(part(one, "", "Doses of each direction", figures.dose_figure(doses, metrics["band"], thresholds.bandwidth.coherent_share),
                          "Share of coherent replies and log-perplexity ratio over doses of the Cognitive, Affective and formality directions.", "causality/doses.csv"))
    return found


def specificity_parts(one: Collected, thresholds) -> list[dict]:
    """The figures of specificity."""
    overlap, transfer = one.table("specificity/overlap.csv"), one.table("specificity/transfer.csv")
    if overlap is None or transfer is None or not len(overlap):
        return []
    return [part(one, "specificity", QUESTIONS["specificity"], probe_figures.overlap_figure(overlap, thresholds.specificity),
                 "Overlap of empathy with its controls, with intervals, in each metric, and the ratio of effect sizes.", "specificity/metrics.json", "specificity/overlap.csv"),
            part(one, "", "Is the structure shared, and does it carry over?", probe_figures.heat_maps_figure(overlap, transfer),
                 "Heat maps of the overlap between the three structures and of transfer accuracy from each condition to each.", "specificity/transfer.csv")]


def texts_note(collected: list[Collected]) -> str:
    """Where the texts come from and what their leakage is."""
    audit = next((found for one in collected if (found := one.json("dataset/raw/leakage.json"))), None)
    said = "" if audit is None else f"Leakage audit: {audit['reason']}{' (LEAKY)' if audit['leaky'] else ''}. "
    labels = next((found for one in collected if (found := one.json("dataset/filtered/labels.json"))), None)
    chosen = "" if labels is None else f"The triplets were selected by {labels['source']}. "
    return ("The bundled texts were written by language models and rated by language models; no human wrote or labelled them unless a label "
            f"journal says so. {chosen}Quantised weights were dequantised to float32, so values describe the quantised model. " + said)
