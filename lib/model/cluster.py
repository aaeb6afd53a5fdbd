"""Extraction on a Ray cluster: studies × shards, one worker a GPU (or a CPU where the cluster has none).

A worker holds one model at a time and writes shards into `EMPATHY_CACHE`, a folder that all nodes share; back to the
driver goes one manifest row a shard, which it enters. The notebooks then find the shards, as if they had made them.

A worker that is lost, with its node or alone, costs the shard it had in hand: that goes to another, and a new worker is
asked for, which starts to count when it is placed. Shards that were written stay; the next run makes what is missing.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from tqdm.auto import tqdm

from lib.errors import BadInput, Failed
from lib.files import sha256, to_json
from lib.model.shards import Shards, open_shards
from lib.params import Params

LOST = 3  # workers in a row that may be lost over the same shard

Unit = tuple[str, str, str, int]  # study, "texts" or "corpus" or (to find out what is missing) "", split, number


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know of a study: its run's name, texts (scenario and reply), and the parameters of the stages to prepare."""

    run: str
    params: Params
    texts: list[tuple[str, str]]
    stages: dict[str, dict]


class Worker:
    """Makes shards of whichever study it is asked for; loads that study's model when it holds another one."""

    def __init__(self, cache: str):
        if cache:
            os.environ["EMPATHY_CACHE"] = cache
        self.run = ""

    def placed(self) -> None:
        """Returns when the worker is there."""

    def hold(self, job: Job) -> None:
        """Load the study's model and open its shards."""
        if self.run == job.run:
            return
        from lib.model import prompts, weights  # these take seconds to import, which the driver does without
        from lib.model.corpus_units import CorpusUnits
        from lib.model.extraction import Extraction, groups_of, layers_of

        self.run, self.model, self.texts, self.corpus = "", None, None, None  # the old model goes before the new one comes
        self.model, self.tokenizer, about = weights.load(job.params.model)
        if given := job.stages.get("03_extract"):
            encoded = [prompts.encode(self.tokenizer, job.params.model.template, *text) for text in job.texts]
            groups = [[encoded[row] for row in rows] for rows in groups_of([scenario for scenario, _ in job.texts])]
            self.texts = Extraction(self.model, groups, job.params.model, about=about, layer=job.params.layer,
                                    layers=layers_of(job.params, given["last_layer"]), tolerance=given["tolerance"])
        if given := job.stages.get("04_sae"):
            from lib.model import sae
            layer, n_tokens = sae.corpus_of(job.params, **{name: given[name] for name in ("release", "sae_id", "n_heldout", "n_tokens")})
            self.corpus = CorpusUnits(self.model, self.tokenizer, job.params.model, about=about, layer=layer, n_tokens=n_tokens,
                                        shard_tokens=given["shard_tokens"], corpus=given["corpus_name"])
        self.run = job.run

    def work(self, job: Job, kind: str, split: str, number: int) -> list:
        """`[(kind, identity, row)]` of a shard that was made; for kind "" the units that are missing."""
        self.hold(job)
        if not kind:
            texts = [("texts", "texts", number) for number in self.texts.missing()] if self.texts else []
            return texts + ([("corpus", *key) for key in self.corpus.missing()] if self.corpus else [])
        made = self.texts.make(number) if kind == "texts" else self.corpus.make(split, number)
        return [(shards.folder.name.rpartition("-")[0], shards.identity, row) for shards, row in made]


def enter(books: dict[str, Shards], kind: str, identity: dict, row: dict) -> None:
    """Put a row into its manifest. Raises BadInput where this machine does not see the shard."""
    key = kind + sha256(to_json(identity))
    shards = books[key] = books.get(key) or open_shards(identity, kind=kind)
    if not (shards.folder / row["file"]).exists():
        raise BadInput(f"EMPATHY_CACHE: {shards.folder.name}/{row['file']} was made by a worker and is not here; name a folder that all nodes share")
    shards.enter(row)


def name_of(unit: Unit | None) -> str:
    return f"{unit[0]}, {unit[2]} {unit[3]}" if unit else "cluster"


def spread(jobs: list[Job], make_worker, n_workers: int) -> int:
    """Make every missing shard of the jobs with `n_workers` workers from `make_worker()`; returns how many were made."""
    given, todo = {job.run: ray.put(job) for job in jobs}, [(job.run, "", "", 0) for job in jobs]
    busy: dict[ray.ObjectRef, tuple] = {}  # what was asked for: (worker, unit), or (worker, None) until it is placed
    idle, lost, books = [], Counter(), {}

    def ask() -> None:
        worker = make_worker()
        busy[worker.placed.remote()] = worker, None
    for _ in range(n_workers):
        ask()
    with tqdm(desc="extracting on the cluster", unit="shard", total=0, mininterval=2) as bar:
        while todo or any(unit for _, unit in busy.values()):
            while idle and todo:
                worker, run = idle.pop()
                unit = next((unit for unit in todo if unit[0] == run), todo[0])  # better one of the model it holds
                todo.remove(unit)
                busy[worker.work.remote(given[unit[0]], *unit[1:])] = worker, unit
            (done,), _ = ray.wait(list(busy), num_returns=1)
            worker, unit = busy.pop(done)
            try:
                found = ray.get(done)
            except (RayActorError, ObjectLostError) as error:
                lost[unit] += 1
                if lost[unit] >= LOST:
                    raise Failed(f"{name_of(unit)}: {LOST} workers were lost, the last one: {str(error).splitlines()[0]}") from None
                todo[:0] = [unit] if unit else []
                ask()
                continue
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, BadInput | Failed) else Failed(f"{name_of(unit)}: {error.cause!r}") from None
            lost[unit] = 0
            idle.append((worker, unit and unit[0]))
            if unit and not unit[1]:
                todo += [(unit[0], *key) for key in found]
                bar.total += len(found)
            elif unit:
                for row in found:
                    enter(books, *row)
                bar.update()
        return bar.n


def extract(jobs: list[Job], *, gpus: int = 0) -> int:
    """`spread` on the cluster that `RAY_ADDRESS` names or that runs on this machine, else on one started here.

    `gpus` workers with a GPU each are asked for, whether the nodes are there or an autoscaler starts them; 0 stands for
    one for each GPU that the cluster has, or for each CPU where it has none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        there = ray.cluster_resources()
        n_gpus = gpus or int(there.get("GPU", 0))
        options = {"num_cpus": 1, "num_gpus": 1 if n_gpus else 0, "max_restarts": 0}
        actor = ray.remote(Worker).options(**options)
        return spread(jobs, lambda: actor.remote(os.environ.get("EMPATHY_CACHE", "")), n_gpus or int(there.get("CPU", 1)))
    finally:
        ray.shutdown()
