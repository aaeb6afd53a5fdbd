"""The runner: `python -m lib.run [STAGE…] --study NAME`. It checks everything, then runs what is not up to date.

A stage is a notebook, run by Papermill into a temporary name and renamed when it ends well. It runs again only when
its fingerprint (parameters, thresholds, inputs, code) differs from that of its last good run.
"""

import ast
import builtins
import json
import logging
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import papermill
import typer
from filelock import FileLock, Timeout
from jupyter_core.utils import run_sync
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from lib.cli import exit_code, leave
from lib.errors import BadInput, Failed
from lib.files import make_folder
from lib.kernels import Kernels
from lib.params import ROOT, Params, load_params, parse_yaml, studies
from lib.seals import sealed, sealed_or_none
from lib.sources import NOTEBOOKS
from lib.stages import (
    RECORD,
    STAGES,
    check_stage_params,
    defaults,
    fingerprint,
    intact,
    material,
    needed,
    outputs_of,
    record_path,
)
from lib.store import KEPT, Study, outputs_root, sha256, write_atomic
from lib.text.labels import journal_hashes
from lib.timing import Peak, write_costs

AHEAD = 3  # stages whose kernels are made ready while one runs: a short stage is over before the next one's imports are
console = Console(stderr=True, soft_wrap=True, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Engine(StrEnum):
    """Where the model reads texts and corpus."""

    here = "here"
    ray = "ray"


def dataset_hash(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob("*.json"))}


def stage_parameters(stage: str, run: str, params: Params, changes: dict, dataset: Path | None) -> dict:
    """What Papermill puts into the notebook: the notebook's defaults, the study's changes, the command line's."""
    known = {name: ast.literal_eval(info["default"]) for name, info in defaults(stage).items()}
    own = {"study": run, **params.stages.get(stage, {}), **changes.get(stage, {})}
    if stage == "01_generate" and (dataset or params.dataset != "bundled"):
        own["dataset"] = str(dataset or ROOT / params.dataset)
    return {**known, **own}


def external_inputs(stage: str, run: str, parameters: dict, params: Params) -> dict:
    """Hashes of inputs that no stage of this run makes."""
    if stage == "01_generate":
        folder = Path(parameters["dataset"]) if parameters["dataset"] != "bundled" else ROOT / "lib" / "data" / "dataset"
        return dataset_hash(folder)
    if stage == "02_filter":
        return journal_hashes(parameters["journals"])
    if stage == "05_probe" and params.twin:
        return material(outputs_root() / twin_run(run, params), "03_extract")
    if stage == "09_bandwidth" and record_path(outputs_root() / run, "04_sae").exists():  # its cross-check, where there is one
        return material(outputs_root() / run, "04_sae")
    if stage == "10_report":
        same = [path for path in outputs_root().glob("*/*.stage.json") if path.name != "10_report.stage.json"]
        return {f"{path.parent.name}/{path.name}": (sealed_or_none(path, holds=RECORD) or {"outputs": sha256(path)})["outputs"] for path in sorted(same)}
    return {}


def twin_run(run: str, params: Params) -> str:
    """The run of the random-weight twin that belongs to a run (same variant)."""
    _, dashes, variant = run.partition("--")
    return f"{params.twin}{dashes}{variant}"


def plan(names: list[str], stages: list[str], *, quick: bool) -> list[tuple[str, str, Params]]:
    """`(study, stage, params)` in running order; a study's twin is extracted first; the report comes last, once."""
    jobs: list[tuple[str, str, Params]] = []
    for name in names:
        params = load_params(name, quick=quick)
        check_stage_params(params, f"{name}.yaml")
        if params.twin and "05_probe" in stages and params.twin not in names[: names.index(name)]:
            twin = load_params(params.twin, quick=quick)
            check_stage_params(twin, f"{params.twin}.yaml")
            jobs += [(params.twin, stage, twin) for stage in needed(["03_extract"])]
        jobs += [(name, stage, params) for stage in stages if stage not in params.skip]
    last = [job for job in jobs if job[1] == "10_report"][-1:]
    return [job for job in jobs if job[1] != "10_report"] + last


def execute(stage: str, root: Path, parameters: dict, kernel) -> None:
    """Run one notebook into a scratch name; keep a failed one aside under a name that nothing reads."""
    scratch, failed = root / f".{stage}.running.ipynb", root / f"{stage}.failed.ipynb"
    try:
        papermill.execute_notebook(NOTEBOOKS / f"{stage}.ipynb", scratch, parameters, kernel_name="python3", km=kernel, cwd=ROOT, start_timeout=600,
                                   progress_bar={"desc": stage, "unit": "cell", "leave": False}, request_save_on_cell_execute=False)
    except BaseException as error:
        keep_aside(scratch, failed)
        if isinstance(error, KeyboardInterrupt):
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # that the kernel's client was left in the middle is no news
        if isinstance(error, PapermillExecutionError):
            raise told(error) from error
        if isinstance(error, DeadKernelError):
            raise Failed(f"{stage}: its kernel died, most often for lack of memory; run the same command to go on") from error
        raise
    finally:
        run_sync(kernel.shutdown_kernel)(now=True)
    write_atomic(root / f"{stage}.ipynb", scratch.read_bytes())
    scratch.unlink()
    failed.unlink(missing_ok=True)


def keep_aside(scratch: Path, failed: Path) -> None:
    """Keep the notebook of a failed stage under its name, or remove it where a full disk cut it off."""
    with suppress(OSError):
        try:
            json.loads(scratch.read_bytes())
            scratch.replace(failed)
        except ValueError:
            scratch.unlink()


def told(error: PapermillExecutionError) -> Exception:
    """A cell's exception as one that the command line ends with: what it said last, and the code its kind has there."""
    kind, last = getattr(builtins, error.ename, Exception), (error.evalue.strip().splitlines() or ["no message"])[-1]
    if error.ename == "BadInput":
        return BadInput(last)
    if error.ename == "KeyboardInterrupt":
        return KeyboardInterrupt()
    return (BadInput if isinstance(kind, type) and issubclass(kind, OSError) else Failed)(f"{error.ename}: {last}")


def up_to_date(root: Path, stage: str, mark: str) -> bool:
    """Whether a stage has run with this fingerprint and all it wrote is still there."""
    record = sealed_or_none(record_path(root, stage), holds=RECORD)  # a changed one is as good as none
    return record is not None and record["fingerprint"] == mark and (root / f"{stage}.ipynb").exists() and intact(root, record)


def run_stage(run: str, stage: str, params: Params, parameters: dict, *, kernels: Kernels, following: list[str], force: bool) -> bool:
    """Run a stage if anything it depends on has changed, with the `following` ones' kernels made ready; returns whether it ran."""
    root = outputs_root() / run
    mark = fingerprint(root, stage, params, parameters, external_inputs(stage, run, parameters, params))
    if not force and up_to_date(root, stage, mark):
        return False
    if force:
        shutil.rmtree(root / KEPT / stage, ignore_errors=True)
    start = time.monotonic()
    with Peak() as peak:
        kernel = kernels.take(stage)
        for other in following:
            kernels.prepare(other)
        execute(stage, root, parameters, kernel)
    record = {"fingerprint": mark, "outputs": outputs_of(root, stage), "seconds": round(time.monotonic() - start, 1), "peak_mb": round(peak.bytes / 1e6)}
    write_atomic(record_path(root, stage), sealed(record))
    return True


def run_all(jobs, kernels: Kernels, *, variant: str, changes: dict, dataset: Path | None, force: bool) -> int:
    """Run the planned stages one after the other; prints a line each, and what they cost. Returns how many ran."""
    ran: dict[Path, set[str]] = {}
    for number, (name, stage, params) in enumerate(jobs, start=1):
        run = f"{name}--{variant}" if variant else name
        root = outputs_root() / run
        make_folder(root)
        Study(run, stage).preregister()
        parameters = stage_parameters(stage, run, params, changes, dataset)
        start = time.monotonic()
        try:
            with FileLock(root / ".lock", timeout=0):
                did = run_stage(run, stage, params, parameters, kernels=kernels, following=[job[1] for job in jobs[number:number + AHEAD]], force=force)
        except Timeout:
            raise BadInput(f"{run}: another run is at work on this study; wait for it or stop it") from None
        if did:
            ran.setdefault(root, set()).add(stage)
        state = f"{time.monotonic() - start:.0f} s" if did else "up to date"
        console.print(f"[{number:>2}/{len(jobs)}] {run:<24} {stage:<16} {state}")
    for root, stages in ran.items():
        console.print(write_costs(root, stages))
    return sum(map(len, ran.values()))


def extract_on_cluster(jobs, *, variant: str, changes: dict, dataset: Path | None, force: bool, gpus: int) -> None:
    """Make the shards that stages 03 and 04 will read, on a Ray cluster, for every study of the jobs where they must run."""
    from lib.model import cluster  # needs ray, which nothing else here does

    found: dict[str, cluster.Job] = {}
    for name, stage, params in jobs:
        if stage in ("03_extract", "04_sae"):
            run = f"{name}--{variant}" if variant else name
            parameters = stage_parameters(stage, run, params, changes, dataset)
            mark = fingerprint(outputs_root() / run, stage, params, parameters, {})
            if force or not up_to_date(outputs_root() / run, stage, mark):
                texts = Study(run, stage).load_texts()
                job = found.setdefault(run, cluster.Job(run=run, params=params, texts=list(zip(texts.scenario, texts.response, strict=True)), stages={}))
                job.stages[stage] = parameters
    if found:
        start = time.monotonic()
        made = cluster.extract(list(found.values()), gpus=gpus)
        console.print(f"cluster: {made} shards of {', '.join(found)} made in {time.monotonic() - start:.0f} s")


def show_verdicts(run: str) -> None:
    """Print the verdict table of a run and where its report is."""
    metrics = Study(run, "10_report").load_json("report/metrics.json")
    table = Table(title=run, title_justify="left")
    for column in ("criterion", "literal", "calibrated", "estimate [95%]", "null", "text baseline", "flags"):
        table.add_column(column)
    for row in metrics["results"]:
        interval = "-" if row["estimate"] is None else f"{row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" \
            if row["ci_low"] is not None else f"{row['estimate']:.2f}"
        literal = "-" if row["literal_value"] is None else f"{row['literal_value']:.2f} {row['literal_verdict']}"
        baseline = "-" if row["text_baseline"] is None else f"{row['text_baseline']:.2f} {row['text_baseline_name']}"
        table.add_row(row["criterion"], literal, row["verdict"], interval, row["null"], baseline, row["flags"])
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print(f"report: {os.path.relpath(outputs_root() / metrics['report'])}")
    print(f"executed notebooks: {os.path.relpath(outputs_root() / run)}/*.ipynb")


def parse_changes(settings: list[str]) -> dict:
    """`STAGE.NAME=VALUE` settings as `{stage: {name: value}}`."""
    changes: dict[str, dict] = {}
    for setting in settings:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", setting, re.DOTALL)
        if not match or match[1] not in STAGES:
            raise BadInput(f"--set {setting}: write STAGE.NAME=VALUE, for example 05_probe.n_permutations=500")
        try:
            changes.setdefault(match[1], {})[match[2]] = parse_yaml(match[3])
        except ValueError as error:
            raise BadInput(f"--set {setting}: the value cannot be read: {error}") from None
    return changes


@app.command()
def main(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages such as 05_probe; all by default. What they read is run too.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="Study (a file in params/); repeat for several.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="Folder of JSON files to use instead of the bundled texts.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small honest subset (params/quick.yaml), kept apart.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Change one parameter: STAGE.NAME=VALUE.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run the named stages even where they are up to date.")] = False,
    engine: Annotated[Engine, typer.Option(help="Where the model reads the texts and the corpus: here, or on a Ray cluster (docs/cluster.md).")] = Engine.here,
    gpus: Annotated[int, typer.Option(min=0, help="With --engine ray: GPU workers to ask for; 0: one a GPU that the cluster has, or a CPU.")] = 0,
    show: Annotated[bool, typer.Option("--list", help="List stages and studies.")] = False,
) -> None:
    """Run a study's stages, each a notebook, skipping what is up to date; then print its verdicts.

    `python -m lib.run audit FILE.jsonl …` audits other people's contrast data instead (`audit --help`).
    """
    if show:
        print("stages:", *STAGES, "\nstudies:", *studies())
        return
    if engine == Engine.ray and not find_spec("ray"):
        raise BadInput('--engine ray: needs the extra cluster; pip install ".[model,cluster]"')
    more = [word for word in stages or [] if study and word in studies()]  # --study A B C, too
    wanted, names = [word for word in stages or [] if word not in more] or list(STAGES), [*(study or ["smollm2-135m"]), *more]
    for stage in wanted:
        if stage not in STAGES:
            raise BadInput(f"{stage}: no such stage; stages are {', '.join(STAGES)}")
    changes = parse_changes(settings or [])
    variant = "-".join(filter(None, ["quick" if quick else "", dataset_slug(dataset)]))
    jobs = plan(names, needed(wanted), quick=quick)
    for name in names:
        params = load_params(name, quick=quick)
        check_stage_params(params.model_copy(update={"stages": changes}), "--set")
    options = {"variant": variant, "changes": changes, "dataset": dataset and dataset.resolve(), "force": force}
    before = [job for job in jobs if engine == Engine.ray and job[1] in needed(["02_filter"])]  # all studies' texts, then all forwards
    with Kernels() as kernels:
        ran = run_all(before, kernels, **options)
        if engine == Engine.ray:
            extract_on_cluster(jobs, **options, gpus=gpus)
        ran += run_all([job for job in jobs if job not in before], kernels, **options)
    if not ran:
        print("Everything is up to date; nothing was run.")
    for name, stage, _ in jobs:
        if stage == "10_report" and stage in wanted:
            show_verdicts(f"{name}--{variant}" if variant else name)


def dataset_slug(dataset: Path | None) -> str:
    """A plain name for a dataset folder, used in the run's name."""
    if dataset is None:
        return ""
    if not dataset.is_dir():
        raise BadInput(f"--dataset {dataset}: no such folder")
    return re.sub(r"[^a-z0-9]+", "-", dataset.resolve().name.lower()).strip("-") or "dataset"


def cli() -> int:
    """Exit codes: 0 done, 1 a stage failed, 2 bad input, 130 interrupted. One line on stderr says what."""
    if sys.argv[1:2] == ["audit"]:
        from lib import audit  # a command of its own, which a run does not need
        return exit_code(audit.app, "lib.run audit", sys.argv[2:])
    return exit_code(app, "lib.run")


if __name__ == "__main__":
    leave(cli())
