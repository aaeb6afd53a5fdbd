"""Throughput of two workers against one, one CPU thread each: `python -m lib.model.bench_ray` writes `docs/bench_ray.json`.

Both sides make the same shards of the study's texts, up to the preregistered layer, on a cluster started for it, in turns and
into a new cache each time. Throughput is taken from the second half of the shards, when every worker has its model;
the time of the whole run, with start and loading, stands beside it. Both sides' shards are compared byte by byte.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lib.cli import exit_code, leave
from lib.errors import BadInput, Failed
from lib.files import sha256
from lib.model import cluster, weights
from lib.params import ROOT, load_params
from lib.store import to_json, versions, write_atomic
from lib.text.dataset import BUNDLED, read_folder, texts_table

WORKERS = (1, 2)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(job: cluster.Job, n_workers: int, known: Path) -> dict:
    """`{seconds, shards_per_second, files}` of one extraction into an empty cache with the model of the `known` one."""
    from ray.cluster_utils import Cluster
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in (weights.key_of(job.params.model), "wheels"):
            (Path(folder) / name).symlink_to(known / name)
        os.environ["EMPATHY_CACHE"], times, enter = folder, [], cluster.enter

        def entering(books, kind, identity, row):
            enter(books, kind, identity, row)
            if kind == "pooled":
                times.append(time.perf_counter())
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": n_workers, "object_store_memory": 100_000_000, "include_dashboard": False})
        os.environ["RAY_ADDRESS"], cluster.enter, start = nodes.address, entering, time.perf_counter()
        try:
            cluster.extract([job])
        finally:
            cluster.enter = enter
            nodes.shutdown()
        half = len(times) // 2
        return {"seconds": times[-1] - start, "shards_per_second": (len(times) - 1 - half) / (times[-1] - times[half]),
                "files": {path.name: sha256(path) for path in Path(folder).glob("pooled-*/*.safetensors")}}


@app.command()
def main(
    study: Annotated[str, typer.Option(help="Study (a file in params/).")] = "smollm2-135m",
    n_texts: Annotated[int, typer.Option(help="Texts, the first of the bundled ones.")] = 720,
    n_alternations: Annotated[int, typer.Option(help="Times each side is timed.")] = 2,
    out: Annotated[Path, typer.Option(help="File of the result.")] = ROOT / "docs" / "bench_ray.json",
) -> None:
    """Measure and write the result."""
    if (os.cpu_count() or 1) < max(WORKERS):
        raise BadInput(f"{os.cpu_count()} core: two workers need two")
    params, known = load_params(study), weights.cache_dir()
    weights.local_folder(params.model)
    texts = texts_table(read_folder(BUNDLED), cluster_cosine=params.thresholds.cluster_cosine).head(n_texts)
    job = cluster.Job(run=study, params=params, texts=list(zip(texts.scenario, texts.response, strict=True)),
                      stages={"03_extract": {"last_layer": -2, "tolerance": 1e-4}})
    load, found = os.getloadavg()[0], {n: [] for n in WORKERS}
    for turn in range(n_alternations):
        for n in WORKERS[:: 1 if turn % 2 == 0 else -1]:
            found[n].append(run(job, n, known))
            print(f"{n} workers: {found[n][-1]['seconds']:.0f} s, {found[n][-1]['shards_per_second']:.3f} shards a second", flush=True)
    if any(one["files"] != found[1][0]["files"] for runs in found.values() for one in runs):
        raise Failed("the shards of one worker and of two differ; see whether both ran with one thread")
    rows = [{"workers": n, **{name: float(np.median([one[name] for one in runs])) for name in ("seconds", "shards_per_second")}} for n, runs in found.items()]
    write_atomic(out, to_json({"study": study, "texts": len(texts), "rows": rows, "throughput_ratio": rows[1]["shards_per_second"] / rows[0]["shards_per_second"],
                               "threads_a_worker": 1, "cores": os.cpu_count(), "load_before": load, "n_alternations": n_alternations, "versions": versions()}))
    print(out.read_text())


if __name__ == "__main__":
    leave(exit_code(app, "lib.model.bench_ray"))
