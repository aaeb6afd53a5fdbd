"""SIGKILL at random moments over whatever writes; then what is left is looked at, and the work goes on to its end.

A moment is drawn, from a seed, between the start and the measured length of an undisturbed life. A try is a life that was
really killed. The runner and its stages are killed in tests/test_study.py, beside the undisturbed run that they are compared with.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import handoff
from lib.errors import BadInput
from lib.files import sha256
from lib.model import corpus, sae, sae_training, weights
from lib.model.shards import open_shards
from lib.params import load_params
from lib.seals import sealed
from lib.stages import intact, outputs_of, record_path, stage_record
from lib.store import Study
from lib.text import generation
from lib.text.dataset import LABELS
from lib.text.labels import read_journal
from lib.text.session import Session
from tests.faults.table import record, size
from tests.lab import texts_of
from tests.loopback import serve
from tests.test_corpus import talks
from tests.test_generation import CANARY, PRICES, SETTINGS, assert_clean, ledger_of

PROCESSES = multiprocessing.get_context("forkserver")  # a life begins with everything imported: moments fall into the work itself
PROCESSES.set_forkserver_preload(["tests.faults.test_kills"])
TINY = load_params("tiny")


def killed(after: float | None, work: Callable, *args) -> bool:
    """One life of this work in a process of its own, killed after so many seconds; whether it really was."""
    process = PROCESSES.Process(target=work, args=args)
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{work.__name__} ended with {process.exitcode}"
    return process.exitcode != 0


def kills(what: str, promise: str, tries: int, work: Callable, *args, seed: int, left: Callable, result: Callable) -> None:
    """Kill lives of this work `tries` times, one going on from what the other left, and record the row.

    `left()` says what is wrong with what a kill left. `result()` is what a finished life made; it takes it away, so that the
    next one starts from nothing.
    """
    rng, done, losses = random.Random(seed), 0, []
    killed(None, time.sleep, 0)  # whatever is imported first
    started = time.monotonic()
    assert not killed(None, work, *args)
    length, undisturbed = time.monotonic() - started, result()

    def same() -> list[str]:
        return [] if result() == undisturbed else ["a life that was gone on with ended otherwise than an undisturbed one"]
    while done < tries:
        if killed(rng.uniform(0, length), work, *args):
            done += 1
            losses += refused(left)
        else:
            losses += same()
    assert not killed(None, work, *args)
    losses += same()
    record(f"SIGKILL: {what}", promise, tries=done, losses=len(losses), note=f"moments spread over {length:.1f} s")
    assert not losses, losses[:5]


def refused(left: Callable) -> list[str]:
    """What `left` says, or what is refused though a kill must not leave it."""
    try:
        return left()
    except BadInput as error:
        return [str(error)]


# Labels

def label(folder: Path) -> None:
    """Decide every card as the widget does; a decision is acknowledged, in a file of its own, when its key has been handled."""
    one = Session(texts_of(60), folder, "ada", n_keep=20)
    with (folder / "acknowledged").open("ab", buffering=0) as told:
        while not one.decision(one.at):
            one.do(*(("reject", {"card": one.at, "reason": "unsafe"}) if one.at % 3 else ("accept", {"card": one.at})))
            told.write(one.journal.records[-1].id.encode() + b"\n")


def test_no_label_is_lost(tmp_path):
    path, told = tmp_path / "ada.jsonl", tmp_path / "acknowledged"

    def left() -> list[str]:
        there = {record.id for record in read_journal(path)[0]} if path.exists() else set()
        return [f"{name} is lost" for name in (told.read_text().split() if told.exists() else ()) if name not in there]

    def result() -> list:
        losses, decided = left(), sorted((record.item, record.event) for record in read_journal(path)[0])
        path.unlink(), told.unlink()
        return losses or decided
    kills("labels", "every decision that was shown as made is there; going on ends with the same decisions", size(60, 12), label, tmp_path, seed=1, left=left, result=result)


# Training and conversion

def train(folder: Path) -> None:
    """Extract a corpus, train a pair of autoencoders on its halves, and save it."""
    model, tokenizer, about = weights.load(TINY.model)
    shards = corpus.extract_corpus(model, tokenizer, about=about, template="chat", layer=1, context=64, shard_tokens=400, corpus=talks(160),
                                   folder=folder / "shards", n_tokens={"heldout": 200, "half0": 1600, "half1": 1600})
    recipe = sae_training.Recipe(d_sae=64, k=8, n_samples=19_200, batch=16, buffer=800)
    pair = sae_training.train_pair(shards, recipe, about=sae.identity(TINY.model, 1), tokens_per_latent=20, n_check=200, nulls=False, checkpoints=folder / "checkpoints")
    sae.save_pair(pair, folder / "pair")


def test_training_goes_on_to_the_same_weights(tmp_path):
    folder = tmp_path / "sae"

    def left() -> list[str]:
        if (manifest := folder / "shards/manifest.json").exists():
            shards = open_shards(json.loads(manifest.read_text())["identity"], kind="test", folder=folder / "shards")
            for row in shards.rows:
                shards.load(row)
        if (folder / "pair/meta.json").exists():
            sae.load_pair(folder / "pair", sae.identity(TINY.model, 1))
        return []

    def result() -> dict:
        found = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".csv") and not path.name.startswith(".")}
        shutil.rmtree(folder)
        return found
    kills("training autoencoders", "no shard, checkpoint or pair is half there; going on ends with the same weights", size(24, 2), train, folder, seed=2, left=left, result=result)


def convert(cache: Path) -> None:
    os.environ["EMPATHY_CACHE"] = str(cache)
    weights.local_folder(TINY.model)


def test_conversion_is_whole_or_made_again(tmp_path):
    weights.local_folder(TINY.model)
    shutil.copytree(weights.cache_dir() / "wheels", tmp_path / "wheels", copy_function=os.symlink)
    folder = tmp_path / weights.key_of(TINY.model)

    def left() -> list[str]:
        if folder.exists():
            weights.check_files(folder)
        return []

    def result() -> tuple:
        found = (folder / "hashes.json").read_text(), sorted(path.name for path in tmp_path.iterdir())
        shutil.rmtree(folder)
        return found
    kills("converting weights", "the converted model is whole or not there; the next conversion takes away what a kill left", size(24, 1), convert, tmp_path, seed=3, left=left, result=result)


# Packs

def pack(folder: Path) -> None:
    os.environ["EMPATHY_OUTPUTS"] = str(folder / "outputs")
    handoff.pack("tiny", folder / "results", folder / "tensors")


def unpack(folder: Path) -> None:
    os.environ["EMPATHY_OUTPUTS"] = str(folder / "back")
    handoff.unpack("tiny", folder / "results", folder / "tensors")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that has its final name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Outputs of a stage: tables, two tensors too large for git, and its record."""
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(tmp_path / "outputs"))
    home, rng = Study("tiny", "05_probe", seed=0), np.random.default_rng(0)
    for number in range(12):
        home.save_table(f"probe/table{number}.csv", pd.DataFrame({"x": rng.normal(size=200)}))
    for number in range(2):
        home.save_tensors(f"probe/tensor{number}.safetensors", {"a": rng.normal(size=(300, 1000))})
    record_path(home.root, "05_probe").write_bytes(sealed({"fingerprint": "f", "outputs": outputs_of(home.root, "05_probe"), "seconds": 1.0, "peak_mb": 3}))
    return home.root


def test_a_pack_is_whole_or_refused(study, tmp_path):
    folders = tmp_path / "results", tmp_path / "tensors"

    def left() -> list[str]:
        try:
            found = handoff.checked("tiny", *folders)
        except BadInput:
            return []
        return [] if {name: path.read_bytes() for name, path in found.items()} == contents(study) else ["a pack that is not the study's counts as whole"]

    def result() -> list:
        found = [contents(folder) for folder in folders]
        for folder in folders:
            shutil.rmtree(folder)
        return found
    kills("packing", "a pack is whole or refused; packing again completes it", size(40, 6), pack, tmp_path, seed=4, left=left, result=result)


def test_an_unpacked_stage_is_whole_or_does_not_count(study, tmp_path):
    handoff.pack("tiny", tmp_path / "results", tmp_path / "tensors")
    root, whole = tmp_path / "back/tiny", contents(study)

    def left() -> list[str]:
        losses = [f"{name} is half there" for name, content in contents(root).items() if content != whole[name]]
        return losses + (["a record of what is not there"] if record_path(root, "05_probe").exists() and not intact(root, stage_record(root, "05_probe")) else [])

    def result() -> dict:
        found = contents(root)
        shutil.rmtree(root)
        return found
    kills("unpacking", "no file is half there, and a stage counts as run only when all of it is", size(40, 6), unpack, tmp_path, seed=5, left=left, result=result)


# Paid replies

def generate_once(url: str, paid: str, root: str, settings: dict, result: str) -> None:
    """One generating process: what it returns is counted into a file."""
    os.environ.update(EMPATHY_PAID=paid, ANTHROPIC_API_KEY=CANARY)
    items = generation.generate(Path(root), base_url=url, **settings)
    Path(result).write_text(json.dumps([[condition, item.model_dump()] for condition, item in items]))


def fault_run(folder: Path, *, n_triplets: int, n_kills: int, batches: bool, seed: int) -> dict:
    """Generate under random faults and SIGKILLs; then let the server's log witness. Returns the numbers."""
    rng, started = random.Random(seed), time.monotonic()
    paid, root, result = folder / "paid", folder / "outputs" / "smollm2-135m", folder / "result.json"
    settings = SETTINGS | {"n_triplets": n_triplets, "controls": True, "batches": batches}
    with serve(prices=PRICES, rate=0.2, seed=seed, hang_s=0.7, batch_s=0.05) as server:
        in_flight, done_kills = [], 0
        while not result.exists():
            process = PROCESSES.Process(target=generate_once, args=(server.url, str(paid), str(root), settings, str(result)))
            process.start()
            until = server.n_requests + rng.randint(*((8, 30) if not batches else (4, 14)))
            while process.is_alive() and (done_kills == n_kills or server.n_requests < until):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            was_killed = process.is_alive()
            process.kill()
            process.join()
            done_kills += was_killed
            if was_killed:
                time.sleep(0.1)  # what was on the wire arrives
                in_flight.append(next((e["key"] for e in reversed(server.log) if e["path"] == "arrived"), ""))
            else:
                assert result.exists(), f"the process ended with {process.exitcode}"
        items = json.loads(result.read_text())
    journal = paid / "smollm2-135m.journal.jsonl"
    written, allowed = journal.read_text(), Counter(in_flight)
    replies = [e for e in server.log if e["paid"] and e["delivered"]]
    twice = {key: n for key, n in Counter(e["key"] for e in replies).items() if n > 1}
    lost = [e for e in replies if e.get("id") and e["id"] not in written]
    requests = [e for e in server.log if e["path"] in ("arrived", "item")]
    faults = [e for e in server.log if e["fault"]]
    assert {condition for condition, _ in items} == set(LABELS) and counts_of(items) == expected(n_triplets)
    assert all(n - 1 <= allowed[key] for key, n in twice.items()), "a request was paid for twice beyond the one in flight at a kill"
    assert all(e["key"] in allowed for e in lost), "a delivered reply is not in the journal"
    if batches:
        assert not twice and not lost
    billed, ledger = sum(e["paid"] for e in server.log), ledger_of(journal)
    assert billed <= ledger.spent + 1e-6 <= SETTINGS["max_usd"]
    assert_clean(folder)
    return {"batches": batches, "requests": len(requests), "distinct": len({e["key"] for e in requests}), "faults": len(faults),
            "kinds": len({e["fault"] for e in faults}), "kills": done_kills, "replies paid and delivered": len(replies),
            "paid twice (in flight at a kill)": len(twice), "delivered but lost (in flight at a kill)": len(lost),
            "billed but cut off by an injected fault": len([e for e in server.log if e["paid"] and not e["delivered"]]),
            "billed USD": round(billed, 4), "ledger USD": round(ledger.spent, 4), "items": len(items),
            "seconds": round(time.monotonic() - started, 1)}


def counts_of(items: list) -> Counter:
    return Counter((condition, item["register"]) for condition, item in items)


def expected(n: int) -> dict:
    third, two = generation.wanted("stripped_counter", n), generation.wanted("non_empathy", n)
    return {("empathy", "plain"): n, ("empathy", "counter"): n, ("valence_stripped", "plain"): n, ("valence_stripped", "counter"): third,
            ("non_empathy", "plain"): two, ("non_empathy", "counter"): third, ("formality", "plain"): n}


def test_no_paid_reply_is_lost(tmp_path):
    """A fifth of the requests is hit by random faults, and the generating process is killed at random moments, with and without batches."""
    rounds = [(batches, seed) for batches in (False, True) for seed in range(1, 1 + size(2, 1))]
    found = [fault_run(tmp_path / f"{seed}{batches}", n_triplets=size(12, 3), n_kills=size(10, 3), batches=batches, seed=seed) for batches, seed in rounds]
    print(json.dumps(found))
    record("SIGKILL: paid replies", "no delivered reply is lost or paid for twice but the one in flight; the set is complete afterwards, within the budget",
           tries=sum(numbers["kills"] for numbers in found), losses=0, note=f"over {sum(numbers['requests'] for numbers in found):,} requests, {sum(numbers['faults'] for numbers in found)} with another fault")
    assert all(numbers["kills"] >= 2 and numbers["faults"] >= 5 for numbers in found)
