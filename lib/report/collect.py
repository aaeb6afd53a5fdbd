"""What the report shows: every study's results and tables, each checked against its sidecar, or the reason it is not there."""

import io
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd

from lib.errors import BadInput
from lib.params import Params, studies
from lib.seals import sealed_or_none
from lib.stats.verdicts import CRITERIA, FAIL, INCONCLUSIVE, PASS
from lib.store import Study, meta_path, read_checked

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

    @property
    def trained(self) -> bool:
        return self.params.model.source != "random"

    @property
    def why_not(self) -> str:
        """Why there is no result at all."""
        return "; ".join(dict.fromkeys(self.missing.values())) if not self.rows else ""


def collect(variant: str, stage: str, only: tuple[str, ...] = ()) -> tuple[list[Collected], dict[str, str]]:
    """All studies with a params file (or `only` those), the ones with results first, and why any of them cannot be read.

    A study that was not run says so. Simulated results are refused: they belong to the known-answer section only.
    """
    found, unreadable = [], {}
    for name in only or studies():
        run = f"{name}--{variant}" if variant else name
        try:
            found.append(collect_one(run, stage))
        except BadInput as error:  # one study's params must not cost the others their page
            unreadable[run] = str(error)
    return sorted((one for one in found if one.params.source == "real"), key=lambda one: not one.rows), unreadable


def collect_one(run: str, stage: str) -> Collected:
    """One study's rows and tables, whatever their source. Raises BadInput where its params cannot be read."""
    study = Study(run, stage)
    one = Collected(run, study.params, study, missing=dict.fromkeys(CRITERIA, "not run"))
    for criterion, name in RESULTS.items():
        if study.path(name).exists():
            read_results(one, criterion, name)
    return one


def read_results(one: Collected, criterion: str, name: str) -> None:
    """Add a criterion's rows, or the reason they cannot be used: damaged, foreign, simulated, or older than what they rest on."""
    try:
        _, about = read_checked(one.study.path(name))
        if about.get("source") != one.params.source:
            raise BadInput(f"its source is {about.get('source')}, the study's {one.params.source}; refused")
        content = json.loads(one.study.read(name))
        rows = [row for row in content["results"] if row["criterion"] == criterion and row["verdict"] in (PASS, FAIL, INCONCLUSIVE)]
        if not rows:
            raise BadInput("holds no result of this criterion")
        if reason := stale(one, criterion, about, content):
            raise BadInput(f"stale: {reason}; run {about['stage']} again")
    except (BadInput, KeyError, TypeError, ValueError) as error:
        said = str(error) if isinstance(error, BadInput) else f"not result rows ({type(error).__name__}: {error})"
        one.missing[criterion] = said if said.startswith(f"{one.run}/") else f"{one.run}/{name}: {said}"
        return
    link = cell_link(one.study.root, about["stage"], name)
    one.rows += [{"study": one.run, "artifact": f"{one.run}/{name}", "stage": about["stage"], "cell": link, **row} for row in rows]
    del one.missing[criterion]


def stale(one: Collected, criterion: str, about: dict, content: dict) -> str:
    """What a result rests on that is no longer so: an input that was made anew, or this criterion's thresholds; or nothing.

    An input that is not here, as after `unpack`, cannot have changed here.
    """
    for name, digest in about.get("inputs", {}).items():
        now = sealed_or_none(meta_path(one.study.root.parent / name))
        if now and now.get("sha256") != digest:
            return f"{name} has changed since"
    then, now = content.get("thresholds", {}).get(criterion), one.params.thresholds.model_dump()[criterion]
    return f"thresholds.{criterion} have changed since" if then is not None and then != now else ""


@cache
def cells(notebook: Path) -> list[dict]:
    """The cells of an executed notebook; none where there is no readable one."""
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []


def cell_link(root: Path, stage: str, name: str) -> str:
    """Where the cell that saved an artifact stands in the executed notebook's HTML, relative to the page; empty: it is not known."""
    found = next((cell for cell in cells(root / f"{stage}.ipynb") if cell["cell_type"] == "code" and "home.save" in (code := "".join(cell["source"]))
                  and (f'"{name}"' in code or f'"{name.rsplit(".", 1)[0].rsplit("/", 1)[0]}/{{name}}.' in code)), None)
    return f"{root.name}/{stage}.html#cell-id={found['id']}" if found and "id" in found else ""
