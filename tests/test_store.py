"""Artifacts: atomic, with a sidecar, and never read when anything about them is off."""

import json

import numpy as np
import pandas as pd
import pytest

from lib import store
from lib.errors import BadInput
from lib.seals import sealed
from lib.store import Study, meta_path


@pytest.fixture
def study(outputs):
    return Study("tiny", "05_probe", seed=0)


def test_round_trips(study):
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    study.save_tensors("probe/a.safetensors", {"a": tensor})
    study.save_table("probe/t.csv", pd.DataFrame({"x": [1, 2], "y": ["p", "NA"]}))
    study.save_json("probe/m.json", {"v": np.float64(0.5)})
    assert (study.load_tensors("probe/a.safetensors")["a"] == tensor).all()
    assert study.load_table("probe/t.csv").y.tolist() == ["p", "NA"]
    assert study.load_json("probe/m.json") == {"v": 0.5}
    about = json.loads(meta_path(study.path("probe/a.safetensors")).read_text())
    assert about["shapes"] == {"a": ["float32", 3, 4]} and about["source"] == "simulated" and about["parameters"] == {"seed": 0}


def test_inputs_are_recorded(study):
    study.save_json("probe/m.json", [1])
    later = Study("tiny", "10_report")
    later.load_json("probe/m.json")
    later.save_json("report/x.json", [2])
    about = json.loads(meta_path(later.path("report/x.json")).read_text())
    assert list(about["inputs"]) == ["tiny/probe/m.json"]


def test_a_changed_file_is_named(study):
    path = study.save_json("probe/m.json", [1])
    for position in range(0, path.stat().st_size):
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"probe/m\.json.*differs"):
            study.load_json("probe/m.json")
        content[position] ^= 4
        path.write_bytes(content)
    assert study.load_json("probe/m.json") == [1]


def test_missing_foreign_and_orphaned_files_are_named(study):
    with pytest.raises(BadInput, match="missing"):
        study.load_json("probe/none.json")
    path = study.save_json("probe/m.json", [1])
    meta = json.loads(meta_path(path).read_text())
    del meta["seal"]
    meta_path(path).write_bytes(sealed(meta | {"study": "other"}))
    with pytest.raises(BadInput, match="belongs to study 'other'"):
        study.load_json("probe/m.json")
    meta_path(path).unlink()
    with pytest.raises(BadInput, match="no sidecar"):
        study.load_json("probe/m.json")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tensors_that_are_not_finite_are_not_saved(study, bad):
    with pytest.raises(BadInput, match=r"a\.safetensors"):
        study.save_tensors("probe/a.safetensors", {"a": np.array([1.0, bad])})
    assert not study.path("probe/a.safetensors").exists()


def test_no_space_leaves_the_old_file(study, monkeypatch):
    path = study.save_json("probe/m.json", [1])

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(BadInput, match=r"No space left on device\); free space"):
        store.write_atomic(path, b"half")
    monkeypatch.undo()
    assert json.loads(path.read_text()) == [1] and not list(path.parent.glob(".*.tmp"))


def test_changed_thresholds_are_said(study, monkeypatch):
    from lib.stats.verdicts import Result
    row = Result(criterion="probes", model_id="m", layer=1, metric="", literal_value=0.0, literal_verdict="FAIL", verdict="INCONCLUSIVE", reason="")
    study.save_results("probe/metrics.json", [row])
    assert study.load_json("probe/metrics.json")["results"][0]["flags"] == ""
    path = study.path("preregistration.json")
    other = {key: value for key, value in json.loads(path.read_text()).items() if key != "hash"} | {"layer": 99}
    path.write_bytes(store.to_json({"hash": store.sha256(store.to_json(other)), **other}))
    study.save_results("probe/metrics.json", [row])
    assert study.load_json("probe/metrics.json")["results"][0]["flags"] == "CHANGED-THRESHOLDS"
