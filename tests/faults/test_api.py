"""An API that fails in every way its documentation names and in some that it does not, in a random mix."""

import dataclasses
import random
import time
from collections import Counter
from pathlib import Path

from lib.cli import ending
from lib.errors import BadInput
from lib.text import api, generation
from tests.faults.table import record, size
from tests.loopback import ERRORS, ODD_FAULTS, serve
from tests.test_generation import CANARY, FAST, PRICES, SETTINGS, ledger_of

LIVES = 4  # of one set: each goes on from what the other bought


def generate(root: Path, url: str, **settings) -> list[str]:
    """One run. As losses: what it raised that is no plain refusal, and that it did not come to its end."""
    started, losses = time.monotonic(), []
    try:
        generation.generate(root, base_url=url, **SETTINGS | settings)
    except Exception as error:
        losses += [] if isinstance(error, BadInput) and ending(error)[0] == 2 and len(str(error)) < 2000 else [f"{type(error).__name__}: {str(error)[:300]}"]
    took = time.monotonic() - started
    return losses + ([f"a run took {took:.0f} s"] if took > 120 else [])


def one_set(folder: Path, seed: int) -> tuple[Counter, list[str]]:
    """`(faults met, losses)` of one set, bought in several runs with a limit that is reached, or not."""
    rng, journal = random.Random(seed), folder / "smollm2-135m.journal.jsonl"
    settings = {"n_triplets": 2, "controls": True, "batches": rng.random() < 0.5, "max_usd": rng.choice([0.1, 0.4, 20.0]), "pace": dataclasses.replace(FAST, body_s=0.4)}
    with serve(prices=PRICES, rate=0.3, seed=seed, hang_s=0.7, more=(*ERRORS, *ODD_FAULTS)) as server:
        losses = [loss for _ in range(LIVES) for loss in generate(folder / "outputs/smollm2-135m", server.url, **settings)]
        written, log = journal.read_text(), list(server.log)
    spent, billed = ledger_of(journal).spent, sum(entry["paid"] for entry in log)
    losses += [] if billed <= spent + 1e-6 <= settings["max_usd"] + 2e-6 else [f"billed {billed:.4f}, counted {spent:.4f}, limit {settings['max_usd']}"]
    losses += [f"{entry['fault'] or 'a reply'}: {entry['id']} is lost" for entry in log if entry["paid"] and entry["delivered"] and entry.get("id") and "batch" not in entry and entry["id"] not in written]
    return Counter(entry["fault"] for entry in log if entry["fault"]), losses


def test_every_error_in_a_random_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "MAX_BODY", 300_000)
    monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
    met, losses, sets, end = Counter(), [], 0, time.monotonic() + size(600, 10)
    while time.monotonic() < end:
        monkeypatch.setenv("EMPATHY_PAID", str(tmp_path / str(sets)))
        faults, lost = one_set(tmp_path / str(sets), sets)
        met, losses, sets = met + faults, losses + [f"set {sets}: {loss}" for loss in lost], sets + 1
    record("an API that fails in every way", "one line, the budget holds, every reply that was paid for and came is kept", tries=sum(met.values()), losses=len(losses),
           note=f"{len(met)} kinds in {sets} sets")
    assert met and not losses, losses[:5]
