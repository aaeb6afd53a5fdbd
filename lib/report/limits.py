"""Limits and threats to validity, computed from what was collected, and what would decide what is open."""

import pandas as pd

from lib.report.collect import Collected
from lib.report.methods import remedies
from lib.stats.verdicts import CRITERIA, INCONCLUSIVE


def limits(collected: list[Collected]) -> list[str]:
    """Sentences on what these results cannot show; each holds a number that was read from an artifact."""
    run, said = [one for one in collected if one.rows], []
    models = [one for one in collected if one.trained]
    with_results = [one for one in models if one.rows]
    said.append(f"{len(with_results)} of {len(models)} trained models have results" + (
        f": {', '.join(one.params.model.model_id for one in with_results)}. Nothing here speaks for models of other sizes, families or training." if with_results else "."))
    for one in run:
        if (texts := one.table("dataset/filtered/texts.csv")) is not None and one.trained:
            empathy = texts[texts.condition == "empathy"]
            said.append(f"{one.run} rests on {empathy.scenario_id.nunique()} scenarios in {empathy.cluster.nunique()} clusters and {empathy.register.nunique()} registers, "
                        f"in one language, {texts.condition.nunique()} conditions, {len(texts)} texts. A scenario is the unit of every interval; more texts a scenario would not narrow it.")
            break
    for one in run:
        layers, layer = one.table("probe/layers.csv"), one.params.layer
        if layers is not None and len(layers) and (best := best_layer(layers)) and one.trained:
            said.append(f"Verdicts of {one.run} are read at layer {layer} alone, fixed beforehand; transfer of C against A is highest at layer {best[0]} ({best[1]:.2f}), which describes and decides nothing.")
        flags = sorted({flag for row in one.rows for flag in row["flags"].split("; ") if flag})
        if flags:
            said.append(f"{one.run} carries the flags {', '.join(flags)}: each is a rival explanation that was tested for and not ruled out.")
    open_rows = [row for one in run for criterion in CRITERIA if (row := one.headline(criterion)) and row["verdict"] == INCONCLUSIVE]
    said.append(f"{len(open_rows)} of {sum(len({row['criterion'] for row in one.rows}) for one in run)} calibrated verdicts are INCONCLUSIVE: absence of evidence, in either direction.")
    said.append("The types are the authors' reading of a literature, not categories the model was asked about; a direction that separates them is a correlate of how these "
                "texts were written until an intervention shows that the model uses it.")
    return said


def best_layer(layers: pd.DataFrame) -> tuple[int, float] | None:
    """(layer, transfer AUROC) at which Cognitive and Affective replies are told apart best."""
    rows = layers[(layers.evaluation == "transfer") & (layers.solver == "logistic") & (layers.contrast == "C/A")]
    top = rows.loc[rows.auroc.idxmax()] if len(rows) else None
    return None if top is None else (int(top.layer), float(top.auroc))


def deciding(one: Collected) -> list[dict]:
    """For every INCONCLUSIVE criterion of a study: `criterion`, and `what` would decide it."""
    found = []
    for row in one.rows:
        if row["verdict"] == INCONCLUSIVE:
            what = [row["power"].strip(), *remedies(row)]
            found.append({"criterion": row["criterion"], "metric": row["metric"], "what": ". ".join(filter(None, what)) or "nothing that this design can give"})
    return found
