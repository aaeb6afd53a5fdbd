"""The report: every number is an artifact's, a study that is missing or foreign says so, and the page opens anywhere."""

import csv
import html
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from lib.report.collect import cell_link, collect, collect_one
from lib.report.exports import csv as csv_of
from lib.report.exports import markdown
from lib.report.pictures import Pictures, notebook_page
from lib.seals import sealed
from lib.stats.verdicts import CRITERIA, Result
from lib.store import Study
from tests.conftest import ROOT, run
from tests.lab import axe_source, chromium, serious

HOSTILE = "<img src=x onerror=alert(1)> $\\LaTeX$ | =cmd"
STAGE_OF = {"separation": ("05_probe", "separation"), "probes": ("05_probe", "probe"), "clusters": ("04_sae", "sae"),
            "convergence": ("06_converge", "converge"), "specificity": ("07_specificity", "specificity"),
            "causality": ("08_causality", "causality"), "bandwidth": ("09_bandwidth", "bandwidth")}


def result(criterion: str, name: str, rng: random.Random) -> Result:
    low, value, high = sorted(rng.uniform(-1, 1) for _ in range(3))
    return Result(criterion=criterion, model_id=name, layer=15, metric=f"{criterion} {HOSTILE}", literal_value=rng.random(), literal_verdict="PASS",
                  verdict=rng.choice(["PASS", "FAIL", "INCONCLUSIVE"]), reason=HOSTILE, flags=("GENERIC",), estimate=value, ci_low=low, ci_high=high,
                  p=rng.random(), null="permuted", p_literal_N0=rng.random(), p_literal_N1=rng.random(), text_baseline=rng.random(), text_baseline_name=HOSTILE)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Outputs with made-up results of two studies, one criterion damaged and one simulated, and the report made of them."""
    folder = tmp_path_factory.mktemp("outputs")
    patch = pytest.MonkeyPatch()
    patch.setenv("EMPATHY_OUTPUTS", str(folder))
    for name, criteria in (("smollm2-135m", CRITERIA), ("gemma3-270m", CRITERIA[:3])):
        rng = random.Random(name)
        for criterion in criteria:
            stage, part = STAGE_OF[criterion]
            Study(name, stage).save_results(f"{part}/metrics.json", [result(criterion, name, rng)])
    damaged = folder / "gemma3-270m/probe/metrics.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"0.", b"1.", 1))
    about = folder / "gemma3-270m/sae/metrics.json.meta.json"
    content = json.loads(about.read_text()) | {"source": "simulated"}
    del content["seal"]
    about.write_bytes(sealed(content))
    done = run("10_report", "--study", "smollm2-135m", EMPATHY_OUTPUTS=str(folder))
    patch.undo()
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


class Table(HTMLParser):
    """Rows of cells of the first table of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(page[page.index('id="rows"'):page.index('id="known-answers"')])

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag == "td" or (self.inside and tag != "tr")
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def html_of(folder) -> str:
    return html.unescape((folder / "report.html").read_text())


def shown(value: float) -> str:
    return f"{value:.2f}"


def test_25_numbers_of_the_page_are_those_of_their_artifacts(published):
    rows = [row for row in Table((published / "report.html").read_text()).rows if len(row) > 5]
    numbers = []
    for row in rows:
        artifact = re.search(r"[\w.-]+/\w+/metrics\.json", row[10])[0]
        stored = next(r for r in json.loads((published / artifact).read_text())["results"] if r["criterion"] == row[1].split(" ")[0].removesuffix(r["metric"]) or row[1].startswith(r["criterion"]))
        numbers += [(row[2].split()[0], shown(stored["literal_value"])), (row[3], f"{shown(stored['p_literal_N0'])} / {shown(stored['p_literal_N1'])}"),
                    (row[5], f"{shown(stored['estimate'])} [{shown(stored['ci_low'])}, {shown(stored['ci_high'])}]"), (row[6], f"{stored['p']:.3f}"),
                    (row[8].split()[0], shown(stored["text_baseline"]))]
    chosen = random.Random(0).sample(numbers, 25)
    assert len(rows) == 8 and all(there == stored for there, stored in chosen), chosen


def test_the_exports_say_what_the_page_says(published):
    table = list(csv.DictReader((published / "smollm2-135m/report/decision.csv").read_text().splitlines()))
    metrics = {row["criterion"]: row for row in json.loads((published / "smollm2-135m/report/metrics.json").read_text())["results"]}
    own = {row["criterion"]: row for row in table if row["study"] == "smollm2-135m"}
    assert set(own) == set(metrics) == set(CRITERIA)
    assert all(own[c]["calibrated"] == row["verdict"] and own[c]["estimate [95%]"].startswith(shown(row["estimate"])) for c, row in metrics.items())
    lines = (published / "smollm2-135m/report/decision.md").read_text().splitlines()
    assert len(lines) == len(table) + 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    latex = (published / "smollm2-135m/report/decision.tex").read_text()
    assert r"\$\textbackslash LaTeX\$" in latex and "<img" not in "\n".join(lines)


def test_what_is_missing_damaged_or_simulated_says_so(published):
    table = list(csv.DictReader((published / "smollm2-135m/report/decision.csv").read_text().splitlines()))
    said = {(row["study"], row["criterion"]): row["calibrated"] for row in table}
    assert said["llama-3.1-8b", "probes"] == "not run"
    assert "differs" in said["gemma3-270m", "probes"] and "gemma3-270m/probe/metrics.json" in said["gemma3-270m", "probes"]
    assert "simulated" in said["gemma3-270m", "clusters"] and said["gemma3-270m", "separation"] in ("PASS", "FAIL", "INCONCLUSIVE")
    page = html_of(published)
    matrix = page[page.index('id="matrix"'):page.index('id="rows"')]
    assert "differs from its sidecar" in matrix and "source is simulated" in matrix
    without = re.findall(r'<th scope="col" class="none">([\w.-]+)<', matrix)
    assert set(without) == {"llama-3.1-8b", "gemma2-9b", "qwen2.5-7b", "mistral-7b", "deepseek-r1-7b", "smollm2-135m-random"}
    assert re.findall(r'rowspan="7">([^<]*)<', matrix) == ["not run"] * len(without)


@pytest.mark.parametrize("change, said", [
    (lambda content: content["thresholds"]["separation"].update(cos_max=0.4), "thresholds.separation have changed since"),
    (lambda content: content["results"][0].pop("criterion"), "not result rows (KeyError"),
    (lambda content: content["results"].clear(), "holds no result of this criterion"),
    (lambda content: content["results"][0].update(verdict="MAYBE"), "holds no result of this criterion"),
    (lambda content: content.update(results=3), "not result rows (TypeError")])
def test_results_that_cannot_be_shown_say_why(outputs, change, said):
    study = Study("smollm2-135m", "05_probe")
    study.save_results("separation/metrics.json", [result("separation", "m", random.Random(0))])
    content = study.load_json("separation/metrics.json")
    assert collect_one("smollm2-135m", "10_report").headline("separation")
    change(content)
    Study("smollm2-135m", "05_probe").save_json("separation/metrics.json", content)
    one = collect_one("smollm2-135m", "10_report")
    assert not one.rows and said in one.missing["separation"] and one.missing["separation"].startswith("smollm2-135m/separation/metrics.json: "), one.missing


def test_a_result_older_than_its_input_is_stale(outputs):
    study = Study("smollm2-135m", "05_probe")
    study.save_json("activations/tokens.json", {"a": [1]})
    study.load_json("activations/tokens.json")
    study.save_results("probe/metrics.json", [result("probes", "m", random.Random(0))])
    assert collect_one("smollm2-135m", "10_report").headline("probes")
    Study("smollm2-135m", "03_extract").save_json("activations/tokens.json", {"a": [2]})
    assert "stale: smollm2-135m/activations/tokens.json has changed since; run 05_probe again" in collect_one("smollm2-135m", "10_report").missing["probes"]
    study.path("activations/tokens.json").unlink()
    study.path("activations/tokens.json.meta.json").unlink()
    assert collect_one("smollm2-135m", "10_report").headline("probes"), "an input that is not here cannot have changed here"


def test_one_broken_params_file_costs_one_study(outputs, monkeypatch):
    monkeypatch.setattr("lib.report.collect.studies", lambda: ["smollm2-135m", "no-such-study"])
    found, unreadable = collect("", "10_report")
    assert [one.run for one in found] == ["smollm2-135m"] and "no-such-study.yaml" in unreadable["no-such-study"]


@pytest.mark.parametrize("path", ["/bin/false", "/no/such/browser"])
def test_a_browser_that_does_not_start_costs_no_report(monkeypatch, path):
    monkeypatch.setenv("BROWSER_PATH", path)
    with Pictures() as pictures:
        assert "does not start" in pictures.missing
        assert list(pictures.shown(go.Figure())) == ["application/vnd.plotly.v1+json"]
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setenv("PATH", "")
    with Pictures() as pictures:
        assert pictures.missing == "no Chromium on this machine"


def test_a_figure_is_exported_once(outputs):
    home, figure = Study("smollm2-135m", "10_report"), go.Figure(go.Scatter(y=[1, 2]))
    with Pictures() as pictures:
        pictures.export(home, "report/figures/x", figure)
        files = [home.path(f"report/figures/x.{kind}") for kind in ("svg", "pdf")]
        assert files[0].read_bytes().startswith(b"<svg") and files[1].read_bytes().startswith(b"%PDF")
        before = [path.stat().st_mtime_ns for path in files]
        pictures.export(home, "report/figures/x", figure)
        assert [path.stat().st_mtime_ns for path in files] == before
        pictures.export(home, "report/figures/x", go.Figure(go.Scatter(y=[2, 1])))
        assert all(a != path.stat().st_mtime_ns for a, path in zip(before, files, strict=True))


def test_every_number_leads_to_its_notebook_cell(published):
    """The rows' links name a cell of an executed notebook; the report's own figures carry a picture."""
    own = json.loads((published / "smollm2-135m/10_report.ipynb").read_text())
    figures = [output["data"] for cell in own["cells"] for output in cell.get("outputs", []) if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures and all("".join(data["image/svg+xml"]).startswith("<svg") for data in figures)
    link = cell_link(published / "smollm2-135m", "10_report", "report/metrics.json")
    cell = next(cell for cell in own["cells"] if link == f"smollm2-135m/10_report.html#cell-id={cell['id']}")
    assert 'home.save_json("report/metrics.json"' in "".join(cell["source"])
    assert notebook_page(published / "smollm2-135m/10_report.ipynb") and not notebook_page(published / "smollm2-135m/10_report.ipynb")
    exported = (published / "smollm2-135m/10_report.html").read_text()
    assert f'id="{link.split("#")[1]}"' in exported and not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', exported)


def test_cells_cannot_start_a_formula_or_a_column():
    import pandas as pd
    table = pd.DataFrame({"calibrated": ["=1+1", "-0.94", "-x"], "b": ["a|b", "@x", "<b>"]})
    assert list(csv.reader(csv_of(table).decode().splitlines()))[1:] == [["'=1+1", "a|b"], ["-0.94", "'@x"], ["'-x", "<b>"]]
    assert markdown(table).splitlines()[2] == r"| **=1+1** | a\|b |"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_offline(published, tmp_path, width):
    with chromium() as new_page:
        page = new_page(width, 900)
        page.context.set_offline(True)
        said = []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((published / "report.html").as_uri())
        page.wait_for_load_state("load")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".plot .main-svg").count() >= page.locator(".plot").count()
        assert not said and not page.errors
        assert page.evaluate("document.documentElement.scrollWidth") <= width + 1, "the page is wider than the window"
        page.add_script_tag(content=axe_source(tmp_path))
        assert not serious(page, "main")
    assert (published / "report.html").stat().st_size < 15e6


def compared(*folders) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lib.report.compare", *map(str, folders)], cwd=ROOT, capture_output=True, text=True)


def test_two_runs_are_compared(published, tmp_path):
    before = published / "smollm2-135m"
    same = compared(before, before)
    assert same.returncode == 0 and "No verdict" in same.stdout and "are the same" in same.stdout
    patch = pytest.MonkeyPatch()
    patch.setenv("EMPATHY_OUTPUTS", str(tmp_path))
    rows = [result("causality", "other", random.Random(5))]
    Study("smollm2-135m", "08_causality", n_random=99).save_results("causality/metrics.json", rows)
    patch.undo()
    changed = compared(before, tmp_path / "smollm2-135m")
    assert changed.returncode == 0 and "not run" in changed.stdout and "parameters.n_random: none → 99  (causality)" in changed.stdout
    bad = compared(published / "gemma3-270m", before)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1
    assert compared(tmp_path, before).returncode == 2 and compared(before).returncode == 2
