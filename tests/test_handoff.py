"""The way there and back: packs that are whole, and packs that are refused; the remote builder's documented interface."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import handoff
from lib.errors import BadInput
from lib.seals import sealed
from lib.store import Study
from tests.conftest import ROOT

BUILDER = """#!{python}
import argparse, os, shutil, subprocess, sys
known = argparse.ArgumentParser()
for name in ("dockerfile", "context", "instance-type", "cmd"):
    known.add_argument("--" + name, required=True)
given = known.parse_args()
assert given.dockerfile == "Dockerfile.gpu" and given.instance_type == "g5.xlarge"
built = "{built}"  # what the image would hold: the working tree, and the volume of the outputs from before
shutil.copytree(given.context, built, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "labels"))
clean = {{"PATH": "{path}", "HOME": os.environ["HOME"], "EMPATHY_CACHE": "{cache}", "PYTHONPATH": built}}
sys.exit(subprocess.run(["bash", "-c", given.cmd], cwd=built, env=clean).returncode)
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Outputs of a study with a small table, a large tensor, a record, and what must stay behind."""
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(tmp_path / "outputs"))
    home = Study("tiny", "03_extract")
    home.save_json("activations/tokens.json", {"a": [1, 2]})
    home.save_tensors("activations/resid_post.safetensors", {"resid_post": np.zeros((4, 300, 480), np.float32)})
    (home.root / "03_extract.ipynb").write_text("{}")
    (home.root / "03_extract.stage.json").write_bytes(sealed({"fingerprint": "f", "outputs": {}}))
    (home.root / "04_sae.failed.ipynb").write_text("{}")
    (home.root / "paid.journal.jsonl").write_text("{}")
    (home.root / ".lock").touch()
    (home.root / ".kept/04_sae").mkdir(parents=True)
    (home.root / ".kept/04_sae/gates").write_bytes(b"measured before")
    return home.root


def there(tmp_path) -> tuple[Path, Path]:
    return tmp_path / "results", tmp_path / "bucket"


@pytest.fixture
def packed(outputs, tmp_path):
    handoff.pack("tiny", *there(tmp_path))
    shutil.rmtree(outputs)
    return tmp_path / "results/tiny/pack.json"


def test_there_and_back(outputs, tmp_path):
    before = {path.relative_to(outputs): path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    handoff.pack("tiny", *there(tmp_path))
    shutil.rmtree(outputs)
    handoff.unpack("tiny", *there(tmp_path))
    after = {path.relative_to(outputs): path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    assert after == {path: content for path, content in before.items() if path.name not in ("04_sae.failed.ipynb", "paid.journal.jsonl", ".lock", "gates")}
    assert Study("tiny", "05_probe").load_tensors("activations/resid_post.safetensors")["resid_post"].shape == (4, 300, 480)
    assert [path.name for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == ["resid_post.safetensors"]
    assert sum(path.stat().st_size for path in (tmp_path / "results").rglob("*") if path.is_file()) < 20_000


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text()) | values
    del content["seal"]
    path.write_bytes(sealed(content))


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda p: (p.parent / "activations/tokens.json").unlink(), "activations/tokens.json: missing"),
    (lambda p: (p.parent / "activations/tokens.json").write_text("{}"), "activations/tokens.json: differs"),
    (lambda p: next((p.parent.parent.parent / "bucket").rglob("*.safetensors")).write_bytes(b"0"), "resid_post.safetensors: differs"),
    (lambda p: change(p, study="other"), "is a pack of other"),
    (lambda p: change(p, model_id="another model"), "another model"),
    (lambda p: change(p, files={"../evil.json": {"sha256": "0", "large": False}}), "would leave the study's folder"),
    (lambda p: change(p, files={"/etc/passwd": {"sha256": "0", "large": False}}), "would leave the study's folder"),
    (lambda p: change(p, files=["a"]), "not the manifest"),
    (lambda p: p.write_text("[]"), "no seal"),
    (lambda p: p.write_text("{"), "not readable as JSON"),
    (lambda p: p.unlink(), "pack.json: no such file")])
def test_a_partial_changed_or_foreign_pack_is_refused_by_name(packed, outputs, tmp_path, spoil, said):
    spoil(packed)
    with pytest.raises(BadInput, match=said):
        handoff.unpack("tiny", *there(tmp_path))
    assert not outputs.exists()


def test_an_unpacking_that_ends_early_leaves_no_stage_that_counts_as_run(packed, outputs, tmp_path, monkeypatch):
    copied, copy = [], handoff.copy

    def stops(source, target):
        copied.append(target)
        if len(copied) == 5:
            raise KeyboardInterrupt
        copy(source, target)
    monkeypatch.setattr(handoff, "copy", stops)
    with pytest.raises(KeyboardInterrupt):
        handoff.unpack("tiny", *there(tmp_path))
    assert outputs.exists() and not list(outputs.glob("*.stage.json"))


def test_a_study_that_has_not_run_has_no_pack(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "lib.handoff", "pack", "tiny"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().startswith("error: tiny: nothing has been run") and len(done.stderr.splitlines()) == 1


@pytest.mark.study
def test_make_remote_calls_a_builder_and_goes_on(tmp_path):
    """A stand-in with the documented interface runs the command in a clean environment; the pack comes back."""
    from lib.model.weights import cache_dir
    builder, built = tmp_path / "build_and_run.py", tmp_path / "image"
    builder.write_text(BUILDER.format(python=sys.executable, built=built, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}", cache=cache_dir()))
    builder.chmod(0o755)
    words = ["make", "remote", "STUDY=tiny", "STAGE=02_filter", f"BUILDER={builder}"]
    first = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-1500:]
    assert "nothing was run" not in first.stdout
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing was run" in again.stdout
    manifest = json.loads((built / "results/tiny/pack.json").read_text())
    assert manifest["study"] == "tiny" and "02_filter.stage.json" in manifest["files"]
