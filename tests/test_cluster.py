"""Extraction on a Ray cluster of two nodes on this machine: the same bits as one process, and nothing lost but the shard in hand.

What starts a cluster is marked `full` (`pytest -m full tests/test_cluster.py`): on a busy machine of two cores Ray's head often
gives up on its own agents, which it waits for for 15 seconds.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from lib.errors import BadInput, Failed
from lib.model import extraction, prompts, weights
from lib.model.corpus import extract_corpus
from lib.model.corpus_units import CorpusUnits
from lib.model.shards import open_shards
from lib.model.text_tokens import SHARD_GROUPS
from lib.params import load_params
from tests.conftest import ROOT, run

ray = pytest.importorskip("ray")
from lib.model import cluster as engine  # noqa: E402

EXTRACT = {"last_layer": -1, "tolerance": 1e-4}
SAE = {"release": "none", "sae_id": "", "n_heldout": 500, "n_tokens": 2000, "shard_tokens": 500, "corpus_name": ""}
N_SAE = 1 + 4 + 4  # shards of the corpus


NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A head and a second node, a CPU each; the second one's raylet may be killed."""
    from ray.cluster_utils import Cluster
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        slow = tmp_path_factory.mktemp("without") / "rfc3987_syntax.py"  # each of Ray's dozen processes would compile a grammar, for seconds
        slow.write_text("raise ImportError")
        patch.setenv("PYTHONPATH", f"{slow.parent}:{ROOT}")
        made = Cluster(initialize_head=True, head_node_args=NODE)
        second = made.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made, second
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that makes an empty cache, but for the tiny model and the downloads, and makes it everybody's."""
    known, key = weights.cache_dir(), weights.key_of(load_params("tiny").model)
    weights.local_folder(load_params("tiny").model)

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(known / key, folder / key)
        (folder / "wheels").symlink_to(known / "wheels")
        monkeypatch.setenv("EMPATHY_CACHE", str(folder))
        return folder
    return make


def job(n_shards: int, *, sae: dict | None = None, name: str = "tiny") -> engine.Job:
    """A study of the tiny model with so many shards of made-up texts, two a scenario."""
    rng, words = np.random.default_rng(0), "sea trip late train rain bread noise garden friend work song book".split()
    scenarios = [f"Scenario {i}: {' '.join(rng.choice(words, 4))}." for i in range(SHARD_GROUPS * n_shards)]
    texts = [(scenario, " ".join(rng.choice(words, 5))) for scenario in scenarios for _ in range(2)]
    return engine.Job(run=name, params=load_params("tiny"), texts=texts, stages={"03_extract": EXTRACT} | ({"04_sae": sae} if sae else {}))


def alone(job: engine.Job) -> tuple[dict, tuple]:
    """`({file: sha256}, what was gathered)` of a job by the code of the notebooks, in this process."""
    params = job.params
    model, tokenizer, about = weights.load(params.model)
    groups = [[prompts.encode(tokenizer, params.model.template, *job.texts[row]) for row in rows] for rows in extraction.groups_of([s for s, _ in job.texts])]
    work = extraction.Extraction(model, groups, params.model, about=about, layer=params.layer, layers=extraction.layers_of(params, -1), tolerance=1e-4)
    gathered = work.gather()
    found = {row["file"]: row["sha256"] for row in work.tokens.rows} | {f"pooled {row['file']}": row["sha256"] for row in work.pooled.rows}
    if given := job.stages.get("04_sae"):
        shards = extract_corpus(model, tokenizer, about=about, template=params.model.template, layer=params.layer, shard_tokens=given["shard_tokens"],
                                n_tokens={"heldout": given["n_heldout"], "half0": given["n_tokens"], "half1": given["n_tokens"]})
        found |= {row["file"]: row["sha256"] for row in shards.rows}
    return found, gathered


def files(folder: Path) -> dict[str, Path]:
    """Every shard in a cache, by kind and name."""
    return {f"{path.parent.name.split('-')[0]} {path.name}": path for path in folder.glob("*-*/*-[0-9]*.safetensors")}


def workers_of(made) -> list[psutil.Process]:
    """The processes of this cluster's actors that are at work."""
    raylets = [info.process.pid for node in made.list_all_nodes() for info in node.all_processes.get("raylet", []) if info.process.poll() is None]
    return [child for pid in raylets for child in psutil.Process(pid).children(recursive=True) if child.cmdline()[:1] == ["ray::Worker.work"]]


# without a cluster

def test_an_interrupted_extraction_goes_on_after_its_last_shard(cache, monkeypatch):
    folder, given, made = cache("one"), job(3), []

    def stops(work, number):
        if number == 2 and len(made) < 3:
            made.append(number)
            raise KeyboardInterrupt
        made.append(number)
        return make(work, number)
    make = extraction.Extraction.make
    monkeypatch.setattr(extraction.Extraction, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        alone(given)
    before = {name: path.stat().st_mtime_ns for name, path in files(folder).items()}
    found, (pooled, sinks, how) = alone(given)
    assert made == [0, 1, 2, 2] and before.items() < {name: path.stat().st_mtime_ns for name, path in files(folder).items()}.items()
    cache("other")
    undisturbed, (whole, dropped, same) = alone(given)
    assert found == undisturbed and np.array_equal(pooled, whole) and np.array_equal(sinks, dropped) and how == same
    assert pooled.shape == (5, 6 * SHARD_GROUPS, 48) and made == [0, 1, 2, 2, 0, 1, 2]


def test_shards_of_other_layers_or_code_are_not_used(cache, tiny, monkeypatch):
    cache("one")
    model, tokenizer, params = tiny
    groups = [[prompts.encode(tokenizer, "chat", scenario, reply) for reply in ("Yes.", "Never mind.")] for scenario in ("One.", "Two.")]

    def work(layers=(-1, 0, 1, 2), **changes):
        options = {"about": {"model_id": "tiny"}, "layer": 2, "layers": list(layers), "tolerance": 1e-4} | changes
        return extraction.Extraction(model, groups, params.model, **options)
    work().gather()
    assert work().missing() == [] and work(layers=(-1, 0, 1, 2, 3)).missing() == work(tolerance=1e-5).missing() == work(about={"model_id": "other"}).missing() == [0]
    monkeypatch.setattr(extraction, "source_files", lambda _: [Path(__file__)])
    assert work().missing() == [0]


def test_shards_of_the_corpus_are_the_same_in_any_order(cache, tiny):
    model, tokenizer, params = tiny
    n_tokens, about = {"heldout": 400, "half0": 900}, {"model_id": "tiny"}
    cache("apart")
    whole = extract_corpus(model, tokenizer, about=about, template="chat", layer=1, n_tokens=n_tokens, shard_tokens=300)
    cache("units")
    units = CorpusUnits(model, tokenizer, params.model, about=about, layer=1, n_tokens=n_tokens, shard_tokens=300, corpus="")
    assert units.missing() == [("heldout", 0), ("half0", 0), ("heldout", 1), ("half0", 1), ("half0", 2)]
    for split, number in reversed(units.missing()):
        for shards, row in units.make(split, number):
            shards.enter(row)
    assert units.missing() == [] and all(units.shards.of(split) == whole.of(split) for split in ("heldout", "half0"))


def test_without_ray_the_command_says_so(outputs):
    code = "import sys; sys.modules['ray'] = None; from lib import run; sys.argv = ['run', '--engine', 'ray', '--study', 'tiny']; sys.exit(run.cli())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "[model,cluster]" in done.stderr and not list(outputs.iterdir())


def test_several_studies_may_follow_one_word(outputs):
    """`--study A B` is `--study A --study B`."""
    done = run("--study", "tiny", "nothing")
    assert done.returncode == 2 and "nothing: no such stage" in done.stderr
    done = run("--study", "tiny", "smollm2-135m", "--set", "05_probe.n_permutations=many", "05_probe")
    assert done.returncode == 2 and "n_permutations" in done.stderr


# on one

class Filler:
    """A worker whose shards hold a megabyte of nothing."""

    def placed(self) -> None:
        pass

    def work(self, given: engine.Job, kind: str, split: str, number: int) -> list:
        if not kind:
            return [("texts", "texts", number) for number in range(given.stages["n"])]
        identity = {"d_model": 250, "n": given.stages["n"]}
        if given.run == "breaks":
            raise BadInput("filler: breaks")
        if given.run == "dies":
            os.kill(os.getpid(), 9)
        if given.run == "elsewhere":
            os.environ["EMPATHY_CACHE"] += "-of-its-own"
        shards = open_shards(identity, kind="filler")
        return [("filler", identity, shards.write(split, number, {"resid": np.zeros((1000, 250), np.float32)}, {"n_tokens": 1000}))]


@pytest.fixture
def fill(nodes, cache, monkeypatch):
    """A function that spreads `n` shards of the filler over two workers; returns how many were made."""
    folder = str(cache("filler"))
    monkeypatch.setattr(engine, "Worker", type("Worker", (Filler,), {"__init__": lambda self, _: os.environ.update(EMPATHY_CACHE=folder)}))
    return lambda n, run="filler": engine.extract([engine.Job(run=run, params=load_params("tiny"), texts=[], stages={"n": n})])


@pytest.mark.full
@pytest.mark.parametrize(("few", "many"), [(10, 100), (10, 1000)])
def test_the_drivers_memory_does_not_grow_with_the_number_of_shards(fill, few, many, tmp_path):
    """A shard is 1 MB: were they to pass through the driver or its object store, it would grow by `many` of them."""
    assert fill(few) == few
    before = psutil.Process().memory_info().rss
    assert fill(many) == many and len(list((tmp_path / "filler").glob("filler-*/*.safetensors"))) == few + many
    assert psutil.Process().memory_info().rss - before < 0.2e6 * many


@pytest.mark.full
@pytest.mark.parametrize(("name", "error", "said"), [("breaks", BadInput, "filler: breaks"), ("dies", Failed, "3 workers were lost"),
                                                     ("elsewhere", BadInput, "EMPATHY_CACHE: .* all nodes share")])
def test_what_cannot_go_on_ends_in_one_line(fill, name, error, said):
    with pytest.raises(error, match=said) as caught:
        fill(2, name)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_lost_workers_and_nodes_cost_no_more_than_the_shard_in_hand(nodes, cache, monkeypatch):
    """A worker is killed after the third shard, a node after the eighth; all is as one process makes it, and made once."""
    made, second = nodes
    together, given, entered, killed, enter = cache("together"), job(12, sae=SAE), {}, [], engine.enter

    def entering(books, kind, identity, row):
        enter(books, kind, identity, row)
        name = f"{kind} {row['file']}"
        assert name not in entered
        entered[name] = files(together)[name].stat().st_mtime_ns
        if len(entered) >= 6 and not killed and (at_work := workers_of(made)):  # a shard of texts is two files
            killed.append(at_work[0].kill())
        if len(entered) == 16:
            made.remove_node(second, allow_graceful=False)
    monkeypatch.setattr(engine, "enter", entering)
    assert engine.extract([given]) == 12 + N_SAE and len(entered) == 2 * 12 + N_SAE and killed
    assert {name: path.stat().st_mtime_ns for name, path in files(together).items()} == entered, "what was entered was made again"
    assert engine.extract([given]) == 0, "the next run finds everything"
    apart = cache("apart")
    alone(given)
    assert {name: path.read_bytes() for name, path in files(together).items()} == {name: path.read_bytes() for name, path in files(apart).items()}


@pytest.mark.full
def test_the_command_leaves_the_notebooks_nothing_to_do(nodes, cache, tmp_path):
    """`--engine ray` up to stage 04, against the same without it, each with a cache of its own: the same artifacts."""
    found = {}
    for name, words in (("here", ()), ("cluster", ("--engine", "ray"))):
        cache(f"cache of {name}")
        done = run("04_sae", "--study", "tiny", *words, EMPATHY_OUTPUTS=str(tmp_path / name), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        root = tmp_path / name / "tiny"
        found[name] = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.suffix in (".safetensors", ".csv") or path.name == "metrics.json"}
    assert "shards of tiny made" in done.stderr and re.search(r"\b0 of \d+ shards are to be made", (root / "03_extract.ipynb").read_text())
    assert found["here"] == found["cluster"] and Path("activations/resid_post.safetensors") in found["here"]
