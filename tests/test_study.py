"""The whole study end to end, by the command a user types: resume after kills, repeatability, foreign texts, no torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lib.stages import STAGES
from tests.conftest import ROOT, project, run
from tests.loopback import serve
from tests.test_local import BLOCK

pytestmark = pytest.mark.study
LOCAL = ("01_generate", "02_filter", "05_probe", "06_converge", "07_specificity", "10_report")


def metrics(folder: Path) -> dict:
    """Every `metrics.json` of a run, by stage folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/metrics.json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Outputs of an undisturbed run of the tiny study."""
    folder = tmp_path_factory.mktemp("finished")
    done = run("--study", "tiny", EMPATHY_OUTPUTS=str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "criterion" in done.stdout and "report" in done.stdout
    return folder


@pytest.fixture
def outputs_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_everything_is_there(finished):
    root = finished / "tiny"
    for stage in STAGES:
        assert (root / f"{stage}.ipynb").exists() and (root / f"{stage}.stage.json").exists()
    assert (root / "preregistration.json").exists() and (finished / "report.html").exists()
    assert not list(root.glob("*.failed.ipynb")) and not list(root.glob(".*running*"))
    cost = json.loads((root / "timing.json").read_text())["stages"]
    assert [row["stage"] for row in cost] == list(STAGES) and all(row["ran"] and row["seconds"] > 0 and row["peak_mb"] > 50 for row in cost)
    found = {row["criterion"] for content in metrics(root).values() for row in content.get("results", [])}
    assert found == {"separation", "probes", "clusters", "convergence", "specificity", "causality", "bandwidth"}


def test_random_weights_never_pass(finished):
    """A tiny network that has learned nothing gets no calibrated PASS in what rests on activations."""
    rows = [row for content in metrics(finished / "tiny").values() for row in content.get("results", [])]
    assert not [row for row in rows if row["verdict"] == "PASS" and row["criterion"] in ("probes", "clusters", "convergence", "causality")]


def test_a_second_run_does_nothing_and_says_so(outputs_copy):
    before = {p: p.stat().st_mtime_ns for p in outputs_copy.rglob("*") if p.is_file() and p.name != ".lock"}
    done = run("--study", "tiny", EMPATHY_OUTPUTS=str(outputs_copy))
    assert done.returncode == 0 and "nothing was run" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in outputs_copy.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_damaged_artifact_is_made_again(outputs_copy, finished):
    path = outputs_copy / "tiny/specificity/metrics.json"
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    done = run("07_specificity", "--study", "tiny", EMPATHY_OUTPUTS=str(outputs_copy))
    assert done.returncode == 0 and metrics(outputs_copy / "tiny") == metrics(finished / "tiny")


def close(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


def test_killed_anywhere_it_ends_with_the_same_metrics(finished, tmp_path):
    """SIGKILL to the runner and its kernel at moments spread over the run; then one run to the end."""
    environment = {**os.environ, "EMPATHY_OUTPUTS": str(tmp_path)}
    for seconds in (4, 9, 15, 22, 30):
        runner = subprocess.Popen([sys.executable, "-m", "lib.run", "--study", "tiny"], cwd=ROOT, env=environment, start_new_session=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    done = run("--study", "tiny", EMPATHY_OUTPUTS=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert close(metrics(tmp_path / "tiny"), metrics(finished / "tiny"))


def test_changed_thresholds_are_ruled_on_anew_without_measuring(outputs_copy, tmp_path):
    """Every criterion's threshold changes: all stages behind them run on kept values; changed back, everything is as it was."""
    copy, outputs = project(tmp_path / "project"), outputs_copy

    def go(said: str = "") -> dict:
        done = run("--study", "tiny", EMPATHY_OUTPUTS=str(outputs), PYTHONPATH=str(copy), at=copy)
        assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]
        found = {path.parent.name: json.loads(path.read_text()) for path in (outputs / "tiny").glob("*/metrics.json")}
        return {row["metric"]: row for name, content in found.items() if name != "report" for row in content["results"]}

    def ran() -> dict:
        return {row["stage"]: row["ran"] for row in json.loads((outputs / "tiny/timing.json").read_text())["stages"]}

    before = go("nothing was run")
    path = copy / "params/preregistration.yaml"
    original = path.read_text()
    text = original
    for old, new in (("cos_max: 0.5", "cos_max: 0.45"), ("fail_transfer: 0.65", "fail_transfer: 0.60"), ("ari_min: 0.5", "ari_min: 0.45"), ("cos_min: 0.5", "cos_min: 0.45"),
                     ("overlap_max: 0.5", "overlap_max: 0.45"), ("p_max: 0.0125", "p_max: 0.012"), ("ratio: 1.3", "ratio: 1.25")):
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    changed = go()
    assert {stage for stage, did in ran().items() if not did} <= {"03_extract", "02_filter"} and not ran()["03_extract"]
    assert all("CHANGED-THRESHOLDS" in row["flags"] for row in changed.values())
    reused = {path.parent.name: json.loads(path.read_text())["reused"] for path in (outputs / "tiny").glob("*/metrics.json.meta.json")}
    assert set(reused["separation"]) == {"probes", "separation", "layer_curve"} and {"clusters", "latents", "gates"} <= set(reused["sae"])
    assert {"first_order", "exact", "replies"} <= set(reused["causality"]) and "replies" in reused["bandwidth"]
    assert all(abs(row["estimate"] - before[metric]["estimate"]) < 1e-12 for metric, row in changed.items() if row["estimate"] is not None)
    path.write_text(original)
    assert go() == before


def test_a_failing_stage_is_kept_aside(outputs_copy):
    done = run("08_causality", "--study", "tiny", "--set", "08_causality.n_scenarios=0", EMPATHY_OUTPUTS=str(outputs_copy))
    assert done.returncode in (1, 2) and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (outputs_copy / "tiny/08_causality.failed.ipynb").exists()


def test_two_runs_of_one_study_at_once(outputs_copy):
    from filelock import FileLock
    with FileLock(outputs_copy / "tiny/.lock"):
        done = run("--study", "tiny", "--force", EMPATHY_OUTPUTS=str(outputs_copy))
    assert done.returncode == 2 and "another run" in done.stderr


def test_local_stages_run_without_torch(outputs_copy, finished, tmp_path):
    """From outputs made elsewhere, with torch blocked in the runner and in every kernel."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    for stage in LOCAL:
        (outputs_copy / "tiny" / f"{stage}.stage.json").unlink()
    for stage in LOCAL:
        done = run(stage, "--study", "tiny", EMPATHY_OUTPUTS=str(outputs_copy), PYTHONPATH=str(tmp_path / "site"))
        assert done.returncode == 0, f"{stage}: {done.stderr[-800:]}"
    assert close(metrics(outputs_copy / "tiny"), metrics(finished / "tiny"))


def test_other_peoples_texts(seed_schema, tmp_path):
    """The whole study on three files in the seed schema; one register, so nothing passes on words it was trained on."""
    done = run("--dataset", str(seed_schema), "--study", "tiny", "--set", "01_generate.audit=true", EMPATHY_OUTPUTS=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row for content in metrics(tmp_path / "tiny--their-texts").values() for row in content.get("results", [])]
    probes = [row for row in rows if row["criterion"] == "probes"]
    assert probes and all(row["verdict"] != "PASS" and "ONE-REGISTER" in row["flags"] for row in probes)


def test_two_studies_end_with_the_verdicts_of_the_one_that_is_reported(monkeypatch):
    """What `make run` asks for: the random-weight twin's stages, then the study's own, whose report is the last."""
    from lib import run as runner
    shown, planned = [], []
    monkeypatch.setattr(runner, "run_all", lambda jobs, *_, **__: planned.extend(jobs) or 1)
    monkeypatch.setattr(runner, "show_verdicts", shown.append)
    runner.main(study=["smollm2-135m-random", "smollm2-135m"])
    assert shown == ["smollm2-135m"] and [job[0] for job in planned if job[1] == "10_report"] == shown
    runner.main(stages=["05_probe"], study=["smollm2-135m"])
    assert shown == ["smollm2-135m"]


def test_a_missing_key_is_one_line(outputs):
    done = run("01_generate", "--study", "tiny", "--set", "01_generate.generate=true", ANTHROPIC_API_KEY="")
    assert done.returncode == 2 and "ANTHROPIC_API_KEY" in done.stderr.strip().splitlines()[-1]


def test_free_replies_are_judged_through_the_api(outputs_copy, tmp_path):
    """With a key, causality has a judged effect, controls and a monitoring correlation; a rerun pays nothing."""
    with serve(prices={"claude-haiku-4-5": (1.0, 5.0)}) as server:
        settings = [f"--set=08_causality.{change}" for change in ("judge=true", "n_judged=6", "batches=false")]
        environment = {"EMPATHY_OUTPUTS": str(outputs_copy), "EMPATHY_PAID": str(tmp_path / "paid"), "ANTHROPIC_API_KEY": "sk-good-1", "ANTHROPIC_BASE_URL": server.url}
        done = run("08_causality", "--study", "tiny", *settings, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        judged, paid = metrics(outputs_copy / "tiny")["causality"], len(server.paid())
        assert run("08_causality", "--study", "tiny", *settings, "--force", **environment).returncode == 0 and len(server.paid()) == paid > 0
    written = [path for folder in (outputs_copy, tmp_path / "paid") for path in folder.rglob("*") if path.is_file()]
    assert written and not [path.name for path in written if b"sk-good-1" in path.read_bytes()], "the key was written down"
    assert judged["judge"]["n"] == 6 and set(judged["judge"]["monitoring"]) == {"cognitive", "affective"}
    assert "LL-only" not in judged["results"][0]["flags"]


@pytest.mark.browser
def test_the_report_opens_offline(finished, tmp_path, monkeypatch):
    """Every figure is drawn in Chromium with no network and no console error, at desktop and phone width."""
    from playwright.sync_api import sync_playwright

    from lib.report import html
    from lib.report.collect import collect_one
    from lib.report.limits import limits
    from lib.report.sections import matrix, section
    from lib.stats.verdicts import VERDICT_MARKS
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(finished))
    one = collect_one("tiny", "test")
    own = section(one, one.params.thresholds, [{"criterion": "probes", "data": "<script>alert(2)</script>", "verdict": "PASS", "expected": "PASS"}])
    page_html = html.render(answer="It <b>depends</b>.", rows=one.rows, matrix=matrix([one], []), unreadable={"other": "<b>broken</b>"}, marks=VERDICT_MARKS, depth=None,
                            sections=[own | {"question": "<script>alert(1)</script>"}], known_answers=[], limits=limits([one]), texts_note="",
                            preregistration=one.study.preregistration)
    path = tmp_path / "report.html"
    path.write_text(page_html)
    assert len(own["parts"]) >= 9 and path.stat().st_size < 15e6
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
            errors = []
            page.on("console", lambda message, errors=errors: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("dialog", lambda dialog, errors=errors: errors.append("a script ran"))
            page.goto(path.as_uri())
            page.evaluate("dispatchEvent(new Event('beforeprint'))")
            page.wait_for_selector(".js-plotly-plot .main-svg")
            drawn = [part for part in own["parts"] if not isinstance(part["content"], pd.DataFrame)]
            assert page.locator(".js-plotly-plot").count() == len(drawn) >= 9 and not errors
            assert page.locator("main figure table").count() == len(own["parts"]) - len(drawn) == 3
        browser.close()
