"""One byte changed, anywhere: whoever reads the file says so by its name, and no verdict changes silently."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import handoff
from lib.errors import BadInput
from lib.params import load_params
from lib.report.collect import collect_one
from lib.seals import sealed
from lib.stages import intact, outputs_of, record_path, stage_record
from lib.stats.verdicts import Result
from lib.store import Study, meta_path, read_preregistration
from lib.text.journal import Journal as Paid
from lib.text.labels import Journal as Labels
from lib.text.labels import read_journal
from tests.faults.table import record, size

ROW = {"criterion": "probes", "model_id": "m", "layer": 1, "metric": "auroc", "literal_value": 0.5, "literal_verdict": "PASS", "verdict": "FAIL", "reason": "r", "estimate": 0.4, "ci_low": 0.3, "ci_high": 0.5}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Outputs, a pack, both kinds of journal and shards, as a run leaves them."""
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(tmp_path / "outputs"))
    home = Study("tiny", "05_probe", seed=0)
    rng = np.random.default_rng(0)
    home.save_tensors("probe/directions.safetensors", {"a": rng.normal(size=(5, 20)).astype(np.float32)})
    home.save_table("probe/table.csv", pd.DataFrame({"x": [1, 2], "y": ["a text", "NA"]}))
    home.save_results("probe/metrics.json", [Result(**ROW)])
    record_path(home.root, "05_probe").write_bytes(sealed({"fingerprint": "f", "outputs": outputs_of(home.root, "05_probe"), "seconds": 1.0, "peak_mb": 3}))
    handoff.pack("tiny", tmp_path / "results", tmp_path / "tensors")
    labels = Labels(tmp_path / "labels", "ada")
    for number in range(6):
        labels.append("accept" if number % 2 else "comment", dataset="d", item=f"s{number}/plain", item_hash="h", text="" if number % 2 else "ein Wört")
    labels.close()
    paid = Paid(tmp_path / "paid/tiny.journal.jsonl")
    for number in range(6):
        paid.append({"event": "sent", "key": f"k{number}", "usd": 0.1, "price": {"input": 1.0, "output": 5.0}}, {"event": "reply", "key": f"k{number}", "raw": '{"content": "é"}'})
    paid.close()
    return tmp_path


def shards_of(folder: Path):
    from lib.model.shards import open_shards
    identity = {"model": "m", "layer": 2, "d_model": 4}
    return open_shards(identity, kind="test", folder=folder)


def read_shards(folder: Path) -> None:
    shards = shards_of(folder)
    for row in shards.rows:
        shards.load(row)


def paid_of(path: Path) -> None:
    Paid(path).close()


def readers(place: Path) -> list[tuple[str, Path, object]]:
    """`(kind, file, who reads it)` of everything that is to be damaged."""
    def home() -> Study:
        return Study("tiny", "10_report")
    root = place / "outputs/tiny"
    found = []
    for name, load in (("probe/directions.safetensors", lambda: home().load_tensors("probe/directions.safetensors")),
                       ("probe/table.csv", lambda: home().load_table("probe/table.csv")), ("probe/metrics.json", lambda: home().load_json("probe/metrics.json"))):
        found += [("artifact", root / name, load), ("sidecar", meta_path(root / name), load)]
    found.append(("stage record", root / "05_probe.stage.json", lambda: stage_record(root, "05_probe")))
    found.append(("preregistration", root / "preregistration.json", lambda: read_preregistration(root / "preregistration.json")))
    pack = place / "results/tiny"
    found += [("pack", path, lambda: handoff.checked("tiny", place / "results", place / "tensors")) for path in sorted(pack.rglob("*")) if path.is_file()]
    found.append(("labels", place / "labels/ada.jsonl", lambda: read_journal(place / "labels/ada.jsonl")))
    found.append(("paid replies", place / "paid/tiny.journal.jsonl", lambda: paid_of(place / "paid/tiny.journal.jsonl")))
    folder = place / "corpus-x"
    shards = shards_of(folder)
    for number in range(3):
        shards.add("half0", number, {"resid": np.ones((6, 4), np.float16), "tokens": np.arange(6, dtype=np.int32)}, {"n_tokens": 6, "n_sinks": 0, "median_norm": 2.0})
    found += [("shards", path, lambda: read_shards(folder)) for path in sorted(folder.iterdir())]
    return found


def weights_of(place: Path) -> list[tuple[str, Path, object]]:
    """A converted model and a pair of sparse autoencoders, in copies."""
    from lib.model import sae, weights
    model = load_params("tiny").model
    converted = Path(shutil.copytree(weights.local_folder(model), place / "model"))
    shipped = Path(shutil.copytree(sae.SHIPPED / "smollm2-135m", place / "pair", ignore=shutil.ignore_patterns("*.md")))
    study = load_params("smollm2-135m")
    expected = sae.identity(study.model, study.layer)
    listed = {"meta.json", *json.loads((shipped / "meta.json").read_text())["files"]}
    found = [("weights", path, lambda: weights.check_files(converted)) for path in sorted(converted.iterdir())]
    return found + [("autoencoders", shipped / name, lambda: sae.load_pair(shipped, expected)) for name in sorted(listed)]


def flip(path: Path, rng: random.Random) -> bytes:
    """Change one byte of a file; returns what it held."""
    whole = path.read_bytes()
    where = rng.randrange(len(whole))
    path.write_bytes(whole[:where] + bytes([whole[where] ^ rng.randrange(1, 256)]) + whole[where + 1:])
    return whole


def test_every_flipped_byte_is_named(place):
    """Kinds in turn, so that small files are hit as often as large ones; the whole file is good again after each try."""
    targets = [*readers(place), *weights_of(place)]
    kinds = {kind: [(path, load) for k, path, load in targets if k == kind] for kind, _, _ in targets}
    for _, _, load in targets:
        load()
    rng, tries, missed = random.Random(11), Counter(), []
    for number in range(size(1000, 120)):
        kind = list(kinds)[number % len(kinds)]
        path, load = rng.choice(kinds[kind])
        whole = flip(path, rng)
        try:
            load()
            missed.append(f"{kind}: {path.name} was read")
        except BadInput as error:
            name = path.name.removesuffix(".meta.json")
            if name not in str(error) or "\n" in str(error):
                missed.append(f"{kind}: {path.name} is not named: {error}")
        path.write_bytes(whole)
        tries[kind] += 1
    record("a flipped byte", "detected on load, by name", tries=sum(tries.values()), losses=len(missed), note=", ".join(f"{kind} {n}" for kind, n in tries.items()))
    assert not missed, missed[:5]


def test_no_verdict_changes_silently(place):
    """The report's row is the undisturbed one, or it is missing with the file's name; a damaged stage counts as not run."""
    root, rng, changed = place / "outputs/tiny", random.Random(5), []
    before = collect_one("tiny", "10_report").rows
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name == "probe"]
    tries = size(400, 60)
    for _ in range(tries):
        path = rng.choice(files)
        whole = flip(path, rng)
        one = collect_one("tiny", "10_report")
        said = one.missing.get("probes", "")
        if one.rows != before and "metrics.json" not in said:
            changed.append(f"{path.name}: {one.rows}")
        if intact(root, stage_record(root, "05_probe")):
            changed.append(f"{path.name}: the stage counts as up to date")
        path.write_bytes(whole)
    record("a flipped byte behind a verdict", "the verdict stands as it was or is missing with the file's name, and its stage runs again", tries=tries, losses=len(changed))
    assert len(before) == 1 and not changed, changed[:5]


def test_lines_of_before_there_were_checks_still_count(place):
    for path, count in ((place / "labels/ada.jsonl", lambda p: len(read_journal(p)[0])), (place / "paid/tiny.journal.jsonl", lambda p: len(Paid(p).records))):
        old = [{key: value for key, value in json.loads(line).items() if key != "check"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in old))
        assert count(path) == len(old)


@pytest.mark.parametrize("kind", ["sidecar", "record"])
def test_what_has_no_seal_is_made_again(place, kind):
    root = place / "outputs/tiny"
    path = root / ("05_probe.stage.json" if kind == "record" else "probe/metrics.json.meta.json")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "seal"}))
    with pytest.raises(BadInput, match=r"no seal.*again"):
        stage_record(root, "05_probe") if kind == "record" else Study("tiny", "10_report").load_json("probe/metrics.json")


def test_a_damaged_artifact_is_not_packed(place):
    path = place / "outputs/tiny/probe/table.csv"
    path.write_bytes(path.read_bytes().replace(b"a text", b"a tixt"))
    with pytest.raises(BadInput, match=r"probe/table\.csv: differs.*nothing was packed"):
        handoff.pack("tiny", place / "again", place / "again")
    assert not (place / "again/tiny/pack.json").exists()
