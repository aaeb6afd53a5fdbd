"""README: its commands work, and its numbers are those of the artifacts."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.report import readme
from lib.report.licences import COMPATIBLE, TOOLS, packages, page
from lib.stats.verdicts import CRITERIA
from lib.store import Study
from tests.conftest import ROOT, project
from tests.test_report import STAGE_OF, result

TEXT = (ROOT / "README.md").read_text()
PYTHON_FIRST = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def tutorial() -> str:
    """All commands of the tutorial, in order, as one script."""
    section = TEXT[TEXT.index("## Tutorial"):]
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", section[:section.index("\n## ", 5)], re.DOTALL | re.MULTILINE))


@pytest.mark.study
def test_every_command_of_the_tutorial_runs(tmp_path):
    """As a reader would: in a clone, one block after the other."""
    clone = project(tmp_path / "clone")
    (clone / "Makefile").write_text(f"VENV := {tmp_path}/venv\n" + (ROOT / "Makefile").read_text().replace("VENV := .venv\n", ""))
    (tmp_path / "venv/bin").mkdir(parents=True)  # the clone's environment is there already: this one
    (tmp_path / "venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "venv/.installed").touch()
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, clone / name)
    os.utime(tmp_path / "venv/.installed")
    commands = tutorial()
    assert commands.count("python -m lib.run") == 3 and "make report" in commands
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=clone, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PATH": PYTHON_FIRST, "PYTHONPATH": str(clone), "EMPATHY_OUTPUTS": str(clone / "outputs")})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (clone / "outputs/smollm2-135m--quick-my-texts/probe/metrics.json").exists() and (clone / "outputs/my-model--quick/probe/metrics.json").exists()
    assert "my-model" in (clone / "outputs/report.html").read_text() and list((clone / "outputs").glob("audit/**/*.html"))


def numbers_of(readme_text: str, rows: list[dict]) -> list[tuple[str, str]]:
    """(as README shows it, as its artifact has it) of every number in the verdict table."""
    table = readme_text.split(readme.START)[1].split(readme.STOP)[0].strip().splitlines()[2:]
    assert len(table) == len(rows)
    found = []
    for line, row in zip(table, rows, strict=True):
        study, criterion, literal, _, estimate, baseline, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        assert (study, criterion) == (row["study"], row["criterion"])
        shown = re.findall(r"-?\d+\.\d\d", f"{literal} {estimate}") + re.findall(r"^-?\d+\.\d\d", baseline)
        stored = [row[name] for name in ("literal_value", "estimate", "ci_low", "ci_high", "text_baseline") if row[name] is not None]
        found += zip(shown, (f"{value:.2f}" for value in stored), strict=True)
    return found


def test_numbers_of_the_readme_are_those_that_were_recorded():
    """25 at random, each equal to what docs/result.json has, which names the artifact; where that is here, to the artifact too."""
    rows = json.loads((ROOT / "docs/result.json").read_text())
    numbers = numbers_of(TEXT, rows)
    assert len(numbers) >= 25 and all(shown == stored for shown, stored in random.Random(0).sample(numbers, 25))
    for row in rows:
        assert re.fullmatch(rf"{row['study']}/\w+/metrics\.json", row["artifact"])


@pytest.mark.parametrize("spoil", [False, True])
def test_a_readme_that_disagrees_with_the_artifacts_is_caught(outputs, monkeypatch, spoil):
    """The check against the artifacts themselves, which `make run` leaves: equal passes, any changed number does not."""
    for criterion in CRITERIA:
        stage, part = STAGE_OF[criterion]
        Study("smollm2-135m", stage).save_results(f"{part}/metrics.json", [result(criterion, "smollm2-135m", random.Random(criterion))])
    rows = readme.recorded()
    text = readme.filled(TEXT, rows)
    if spoil:
        at = re.search(r"\d\.\d(\d) \[", text[text.index(readme.START):]).start(1) + text.index(readme.START)
        text = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1:]
    assert readme.disagreements(text) == ([] if not spoil else ["smollm2-135m separation"])


def test_third_party_licences_are_listed_and_compatible():
    assert (ROOT / "THIRD_PARTY.md").read_text() == page(), "run `python -m lib.report.licences`"
    assert {name for name, text in packages().items() if not COMPATIBLE.search(text)} == set(TOOLS)
