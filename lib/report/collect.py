"""What the report shows: every study's results and tables, each checked against its sidecar, or the reason it is not there."""

import io
from dataclasses import dataclass, field

import pandas as pd

from lib.errors import BadInput
from lib.params import Params, studies
from lib.stats.verdicts import CRITERIA
from lib.store import Study, read_checked

RESULTS = {"separation": "separation/metrics.json", "probes": "probe/metrics.json", "clusters": "sae/metrics.json",
           "convergence": "converge/metrics.json", "specificity": "specificity/metrics.json",
           "causality": "causality/metrics.json", "bandwidth": "bandwidth/metrics.json"}


@dataclass
class Collected:
    """One study in the report: its params, result rows, and a reason for every criterion it has no result for."""

    run: str
    params: Params
    study: Study
    rows: list[dict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame | None:
        """A saved table, or None where it is absent or not trustworthy."""
        try:
            return pd.read_csv(io.BytesIO(self.study.read(name)))
        except (BadInput, pd.errors.EmptyDataError):
            return None

    def json(self, name: str):
        try:
            return self.study.load_json(name)
        except (BadInput, ValueError):
            return None

    def headline(self, criterion: str) -> dict | None:
        """The row that stands for a criterion: its first."""
        return next((row for row in self.rows if row["criterion"] == criterion), None)


def collect(variant: str, stage: str) -> list[Collected]:
    """All studies with a params file, those with results first; a study that was not run says so.

    Simulated results are refused: they belong to the known-answer section only.
    """
    runs = [f"{name}--{variant}" if variant else name for name in studies()]
    found = [collect_one(run, stage) for run in runs]
    return sorted((one for one in found if one.params.source == "real"), key=lambda one: not one.rows)


def collect_one(run: str, stage: str) -> Collected:
    """One study's rows and tables, whatever their source."""
    study = Study(run, stage)
    one = Collected(run, study.params, study, missing=dict.fromkeys(CRITERIA, "not run"))
    for name in dict.fromkeys(RESULTS.values()):
        read_results(one, name)
    return one


def read_results(one: Collected, name: str) -> None:
    """Add the rows of one `metrics.json`, or the reason it cannot be used."""
    criteria = [criterion for criterion, file in RESULTS.items() if file == name]
    path = one.study.path(name)
    if not path.exists():
        return
    try:
        _, about = read_checked(path)
        if about.get("source") != one.params.source:
            raise BadInput(f"{one.run}/{name}: its source is {about.get('source')}, the study's {one.params.source}; refused")
        rows = one.study.load_json(name)["results"]
    except (BadInput, KeyError, ValueError) as error:
        one.missing.update({criterion: str(error) for criterion in criteria})
        return
    for row in rows:
        one.rows.append({"study": one.run, "artifact": f"{one.run}/{name}", "stage": about["stage"], **row})
        one.missing.pop(row["criterion"], None)
