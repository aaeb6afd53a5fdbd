"""The ten stages: what each reads, and the fingerprint that decides whether it must run again."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import papermill
from papermill.exceptions import PapermillException
from pydantic import ConfigDict, ValidationError, create_model

from lib.errors import BadInput
from lib.files import sha256, to_json
from lib.params import Params, Thresholds, Value, one_line
from lib.seals import read_sealed, sealed_or_none
from lib.sources import NOTEBOOKS, code_hashes
from lib.store import SIDECAR, meta_path

RECORD = {"fingerprint": str, "outputs": dict}  # what every stage's record holds, beside what it cost
VERDICTS = "/metrics.json"  # a stage's verdicts: read by the report alone, so another verdict makes no other stage stale
TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list[Value]}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`reads`: stages whose files it reads. `thresholds`: preregistered sections it applies. `model`: reads weights."""

    reads: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()
    model: bool = False


TEXTS = ("02_filter",)
STAGES = {
    "01_generate": Stage(thresholds=("cluster_cosine", "probes")),
    "02_filter": Stage(reads=("01_generate",), thresholds=("probes",)),
    "03_extract": Stage(reads=TEXTS, model=True),
    "04_sae": Stage(reads=TEXTS, thresholds=("clusters",), model=True),
    "05_probe": Stage(reads=(*TEXTS, "03_extract"), thresholds=("separation", "probes")),
    "06_converge": Stage(reads=(*TEXTS, "03_extract", "04_sae", "05_probe"), thresholds=("clusters", "convergence")),
    "07_specificity": Stage(reads=(*TEXTS, "03_extract"), thresholds=("specificity",)),
    "08_causality": Stage(reads=(*TEXTS, "03_extract"), thresholds=("causality", "bandwidth"), model=True),
    "09_bandwidth": Stage(reads=(*TEXTS, "03_extract"), thresholds=("bandwidth",), model=True),
    "10_report": Stage(thresholds=tuple(Thresholds.model_fields)),
}


def needed(stages: list[str]) -> list[str]:
    """The stages given and all they read from, in running order."""
    wanted = set(stages)
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(STAGES[name].reads)
    return [name for name in STAGES if name in wanted]


@cache
def defaults(stage: str) -> dict:
    """`{parameter: {name, inferred_type_name, default, help}}` of a notebook's parameters cell."""
    try:
        return papermill.inspect_notebook(NOTEBOOKS / f"{stage}.ipynb")
    except (PapermillException, OSError, ValueError) as error:
        raise BadInput(f"notebooks/{stage}.ipynb: cannot be read ({str(error).splitlines()[0]}); run `make pairs`") from None


def check_stage_params(params: Params, where: str) -> None:
    """Every stage and parameter a study sets exists in that notebook, with its type, and its plan names the right stages; before anything runs."""
    for stage, values in params.stages.items():
        if stage not in STAGES:
            raise BadInput(f"{where}: stages.{stage}: no such stage; stages are {', '.join(STAGES)}")
        known = {name: (TYPES.get(info["inferred_type_name"], str), ...) for name, info in defaults(stage).items()
                 if name in values}
        schema = create_model(stage, __config__=ConfigDict(extra="forbid", strict=True), **known)
        try:
            schema(**values)
        except ValidationError as error:
            raise one_line(f"{where}: stages.{stage}", error) from None
    for field, values in (params.plan.model_dump() if params.plan else {}).items():
        if odd := sorted(values.keys() ^ {stage for stage, spec in STAGES.items() if spec.model and stage not in params.skip}):
            raise BadInput(f"{where}: plan.{field}: {odd[0]} must be there just where that stage holds a model")


def fingerprint(root: Path, stage: str, params: Params, parameters: dict, inputs: dict[str, str]) -> str:
    """Hash of everything the stage's result may depend on: parameters, thresholds, model, inputs, code.

    `inputs` are hashes of files that no stage of this run makes (a dataset folder, another study's activations).
    """
    spec = STAGES[stage]
    thresholds = params.thresholds.model_dump()
    parts = {
        "parameters": parameters, "inputs": inputs, "layer": params.layer, "source": params.source, "weights": params.model.local_files if spec.model else {},
        "model": params.model.model_dump() if spec.model else params.model.model_id,
        "thresholds": {section: thresholds[section] for section in spec.thresholds},
        "upstream": {name: material(root, name) for name in spec.reads},
        "code": code_hashes(stage),
    }
    return sha256(to_json(parts))


def record_path(root: Path, stage: str) -> Path:
    return root / f"{stage}.stage.json"


def stage_record(root: Path, stage: str) -> dict:
    """What the runner wrote when the stage ended: fingerprint, outputs with hashes, seconds."""
    path = record_path(root, stage)
    if not path.exists():
        raise BadInput(f"{root.name}: {stage} has not run; run it first (`python -m lib.run {stage} --study {root.name}`)")
    return read_sealed(path, shown=f"{root.name}/{path.name}", fix=f"run {stage} again", holds=RECORD)


def material(root: Path, stage: str) -> dict[str, str]:
    """`{file: sha256}` of what other stages may read of a stage that has run: all but its verdicts."""
    return {file: digest for file, digest in stage_record(root, stage)["outputs"].items() if not file.endswith(VERDICTS)}


def outputs_of(root: Path, stage: str) -> dict[str, str]:
    """`{file: sha256}` of all artifacts of a stage, read from their sidecars; one that was changed vouches for nothing."""
    found = {}
    for meta in sorted(root.glob("*/**/*.meta.json")):
        about = sealed_or_none(meta, holds=SIDECAR) or {}
        if about.get("stage") == stage:
            found[about["file"]] = about["sha256"]
    return found


def intact(root: Path, record: dict) -> bool:
    """Whether every output of a stage, and its sidecar, is on disk as it was recorded."""
    def good(path: Path, digest: str) -> bool:
        try:
            return path.exists() and sha256(path) == digest and (sealed_or_none(meta_path(path), holds=SIDECAR) or {}).get("sha256") == digest
        except (OSError, ValueError):  # what is no file or cannot be read is not as it was
            return False
    return all(good(root / name, digest) for name, digest in record["outputs"].items())
