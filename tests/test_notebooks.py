"""Notebook pairs agree, carry no outputs, are short, and the environment files hold the same pins."""

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jupytext
import nbformat
import pytest

from lib.stages import STAGES, defaults

ROOT = Path(__file__).resolve().parent.parent
PAIRS = sorted(ROOT.glob("notebooks/*.py"))


def test_every_stage_has_its_notebook():
    assert {p.stem for p in PAIRS} >= set(STAGES)
    assert {p.stem for p in ROOT.glob("notebooks/*.ipynb")} == {p.stem for p in PAIRS}


@pytest.mark.parametrize("script", PAIRS, ids=lambda p: p.stem)
def test_halves_agree_and_carry_no_outputs(script):
    text, notebook = jupytext.read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)

    def cells(nb):
        return [(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in nb.cells]
    assert cells(text) == cells(notebook)
    assert not any(c.get("outputs") or c.get("execution_count") for c in notebook.cells)
    assert set(notebook.metadata) <= {"kernelspec", "jupytext"}


@pytest.mark.parametrize("script", PAIRS, ids=lambda p: p.stem)
def test_style(script):
    notebook = jupytext.read(script)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= (25 if script.stem in STAGES else 35)
    for source in code:
        assert not re.search(r"sys\.path|os\.chdir|^[!%]|import \*", source, re.MULTILINE)
        ast.parse(source)
    assert notebook.cells[0].source.startswith("# ")
    if script.stem in STAGES:
        assert sum("parameters" in c.metadata.get("tags", []) for c in notebook.cells) == 1
        assert all(info["help"] for info in defaults(script.stem).values())


def test_pins_are_the_same_everywhere():
    lock = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line]
    conda = re.findall(r"^      - (\S+)$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    assert conda == lock and all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in lock)
    cluster = (ROOT / "requirements-cluster.lock").read_text().split()
    pins = dict(pin.lower().split("==") for pin in [*lock, *cluster])
    for name, version in re.findall(r'"([a-z0-9-]+)==([0-9.]+)"', (ROOT / "pyproject.toml").read_text()):
        assert pins[name] == version


def test_readme_commands_exist():
    """Every `make` target, stage, study and file that the README names is there."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    named = re.findall(r"^make (\S+)", readme, re.MULTILINE)
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE)) | set(STAGES)
    assert named and set(named) <= targets
    for study in re.findall(r"STUDY=(\S+)", readme):
        assert (ROOT / "params" / f"{study}.yaml").exists()
    for path in re.findall(r"\]\((\w[^):]*)\)", readme):
        assert (ROOT / path).exists()
    assert "make test" in (ROOT / ".ci/run").read_text() and "make test" in readme
    for module in sorted(set(re.findall(r"python -m (lib[\w.]*)", readme))):
        done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Usage" in done.stdout, f"{module} --help: {done.stderr[-300:]}"


def test_no_traces_of_a_machine():
    """No absolute home paths or secrets in what is committed."""
    odd = re.compile(r"/root/|/home/(?!researcher)|sk-ant-[A-Za-z0-9]{8}|hf_[A-Za-z0-9]{20}")
    for path in [*ROOT.glob("*.*"), *ROOT.glob("lib/**/*.py"), *ROOT.glob("notebooks/*"), *ROOT.glob("params/*")]:
        if path.is_file():
            assert not odd.search(path.read_text(errors="ignore")), path.name


def test_notebook_json_is_stable():
    for script in PAIRS:
        cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
        assert len({c["id"] for c in cells}) == len(cells)


def test_readme_shows_the_results_that_were_measured():
    """The verdict table of README.md is the one that docs/result.json gives."""
    from lib.report.readme import filled
    readme = (ROOT / "README.md").read_text()
    if not (ROOT / "docs/result.json").exists():  # nothing recorded, so nothing may be shown
        assert re.search(r"<!-- verdicts -->\n<!-- /verdicts -->", readme) and "verdicts.png" not in readme
        return
    rows = json.loads((ROOT / "docs/result.json").read_text())
    assert filled(readme, rows) == readme
    rows[0]["verdict"] = "PASS" if rows[0]["verdict"] != "PASS" else "FAIL"
    assert filled(readme, rows) != readme


def test_the_dockerfile_is_clean():
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile.gpu")], capture_output=True, text=True,
                          env={"PATH": str(Path(sys.executable).parent)})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["lib.text.api", "tests.conftest"])
def test_what_is_deprecated_here_is_an_error(module, category):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "a.py", 1, module=module)
    with warnings.catch_warnings(record=True) as found:  # and what others do inside themselves is none
        warnings.warn_explicit("old", category, "a.py", 1, module="library.core")
    assert len(found) == 1
