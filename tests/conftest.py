"""Shared by the tests: a folder of outputs per test, the runner as a user calls it, texts small enough to read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """An empty outputs folder for this process and the ones it starts."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(folder))
    return folder


def run(*words: str, timeout: float = 600, at: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """`python -m lib.run …` in a process of its own, as the Makefile calls it."""
    return subprocess.run([sys.executable, "-m", "lib.run", *words], cwd=at, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **environment})


def project(folder: Path) -> Path:
    """A copy of the project's code in a folder, so that a test may change its params."""
    for name in ("lib", "notebooks", "params"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def seed_schema(tmp_path) -> Path:
    """Three files in the shape other people's sets have: one register, no context, no domain."""
    folder = tmp_path / "Their Texts"
    folder.mkdir()
    topics = ("bakery", "violin", "harbour", "orchard", "telescope", "bicycle", "library", "snowstorm", "passport", "chimney", "lantern", "ferry")
    triplets = [{"id": f"t{i}", "scenario": f"My {topic} plan number {i} fell through and the {topic} people never called back.",
                 "cognitive": f"You counted on the {topic} because it was meant to settle something, so the silence reads as an answer to you.",
                 "affective": f"Oh, that is a sad thing about the {topic}; I feel the sting of it with you and I am right here beside you.",
                 "instrumental": f"Ring the {topic} office tomorrow before ten, ask who is in charge, and get the new date in writing today."}
                for i, topic in enumerate(topics)]
    stripped = [{"id": f"v{i}", "triplet_id": f"t{i}", "scenario": f"A {topic} has an opening plan with a date.",
                 "factual": f"A {topic} of this kind has four rooms and was built in the last century by a company from the town.",
                 "informational": f"In general a {topic} works with a calendar in which every date is kept by one of the clerks there.",
                 "procedural": f"A {topic} date is entered on a form, the form is stamped, and then the stamped form is kept on file."}
                for i, topic in enumerate(topics)]
    emotional = [{"id": f"n{i}", "scenario": f"A diary page on the day the {topic} opened again.",
                  "response_1": f"I suppose the {topic} matters to me since my summers were spent there and it taught me to wait.",
                  "response_2": f"My whole chest is singing, the {topic} is open, I could dance down the street with joy today!",
                  "response_3": f"I have put the {topic} ticket on the shelf and will frame it on Sunday with the old photograph."}
                 for i, topic in enumerate(topics)]
    for name, key, records in (("triplets_filtered.json", "triplets", triplets), ("controls_valence_stripped.json", "items", stripped),
                               ("controls_non_empathy.json", "items", emotional)):
        (folder / name).write_text(json.dumps({"metadata": {"author": "somebody else"}, key: records}))
    return folder


@pytest.fixture(scope="session")
def smol():
    """`(model, tokenizer, params)` of the embedded default, converted into the user's cache on first use."""
    from lib.model import weights
    from lib.params import load_params
    params = load_params("smollm2-135m")
    model, tokenizer, _ = weights.load(params.model)
    return model, tokenizer, params


@pytest.fixture(scope="session")
def tiny():
    """`(model, tokenizer, params)` of the tiny random-weight model."""
    from lib.model import weights
    from lib.params import load_params
    params = load_params("tiny")
    model, tokenizer, _ = weights.load(params.model)
    return model, tokenizer, params


@pytest.fixture(scope="session")
def bundled():
    """The bundled text table."""
    from lib.text import dataset
    return dataset.texts_table(dataset.read_folder(dataset.BUNDLED), cluster_cosine=0.4)
