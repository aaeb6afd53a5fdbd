# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Report
# What holds, for which models, and why believe it?
#
# Every study's results are collected, each file checked against its sidecar. A criterion is shown with its literal
# reading and its calibrated verdict; a study that was not run says so. Simulated values appear in the known-answer
# section only.
#
# **Reads** all studies' `metrics.json` and tables. **Writes** `outputs/report.html`, `report/`, an HTML of every notebook. **Cost**: seconds, local.

# %%
import pandas as pd
from IPython.display import display

from lib.report import exports, figures, html
from lib.report.collect import collect, collect_one
from lib.report.limits import limits
from lib.report.pictures import Pictures, notebook_page
from lib.report.sections import answer, majorities, matrix, section, texts_note
from lib.stats.known_answers import CASES, as_expected, known_answers
from lib.stats.verdicts import VERDICT_MARKS
from lib.store import Study, write_atomic

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
studies: list = []  # studies to report on; empty: all that have a params file
seed: int = 0  # seed of the simulated known answers

# %%
home = Study(study, "10_report", seed=seed, studies=studies)
outputs = home.root.parent
collected, unreadable = collect(home.variant, "10_report", tuple(studies))
for one in collected:
    print(f"{one.run:<28} {len(one.rows)} result rows" if one.rows else f"{one.run:<28} {one.why_not}")
for run, reason in unreadable.items():
    print(f"{run:<28} {reason}")

# %% [markdown]
# ## Pictures
# Every figure of the executed notebooks gets a static picture beside it, for code hosts and print; the notebooks also leave
# as HTML. Both are made once. Pictures need a Chromium on this machine.

# %%
pictures = Pictures().__enter__()
notebooks = [path for one in collected if one.rows for path in sorted(one.study.root.glob("[0-9]*_*.ipynb")) if not path.stem.endswith(".failed") and path.stem != "10_report"]
drawn = sum(pictures.illustrate(path) for path in notebooks)
print(f"{drawn} pictures drawn; {pictures.missing and pictures.missing + ', so figures stay interactive only; '}{sum(map(notebook_page, notebooks))} notebooks written as HTML")

# %% [markdown]
# ## Decision table

# %%
shown = ["study", "criterion", "literal_value", "literal_verdict", "verdict", "estimate", "ci_low", "ci_high", "p", "null", "text_baseline", "flags"]
rows = pd.DataFrame([row for one in collected for row in one.rows], columns=None if any(one.rows for one in collected) else shown)
display(rows[shown].round(3))

# %%
headlines = pd.DataFrame([row for one in collected for criterion in dict.fromkeys(r["criterion"] for r in one.rows) if (row := one.headline(criterion))])
if len(headlines):
    display(pictures.shown(figures.verdict_figure(headlines)), raw=True)

# %% [markdown]
# A majority counts trained models only; one that was not run stays in the count.

# %%
majority = majorities(collected, alpha=home.params.thresholds.majority.alpha)
display(pd.DataFrame(majority))

# %% [markdown]
# ## Across models
# Layers on a common axis: how deep in the network, as a share of its layers.

# %%
curves = {one.run: table for one in collected if one.rows and (table := one.table("probe/layers.csv")) is not None and len(table)}
depth = figures.depth_figure(curves) if curves else None
if depth:
    display(pictures.shown(depth), raw=True)

# %% [markdown]
# ## Known answers
# The same code on simulated data with planted truth, and on data with none.

# %%
thresholds = home.params.thresholds
known = [row for criterion in CASES for row in home.kept(f"known_{criterion}", lambda c=criterion: known_answers(c, thresholds, seed=seed),
                                                         thresholds=getattr(thresholds, criterion).model_dump())]
display(pd.DataFrame(known)[["data", "criterion", "expected", "verdict"]])
assert all(map(as_expected, known)), [row for row in known if not as_expected(row)]

# %% [markdown]
# ## Limits
# Computed from what was collected, and what would decide the verdicts that are open.

# %%
sections = [section(one, thresholds, known) for one in collected if one.rows]
for own in sections:
    for item in own["deciding"]:
        print(f"{own['run']} {item['criterion']}: {item['what']}")
threats = limits(collected)
for sentence in threats:
    print("-", sentence)

# %% [markdown]
# ## The page

# %%
page = html.render(answer=answer(collected, majority), matrix=matrix(collected, majority), unreadable=unreadable, marks=VERDICT_MARKS, depth=depth,
                   rows=rows.astype(object).where(rows.notna(), None).to_dict("records"), sections=sections, known_answers=known,
                   limits=threats, texts_note=texts_note(collected), preregistration=home.preregistration)
name = f"report--{home.variant}.html" if home.variant else "report.html"
write_atomic(outputs / name, page.encode())
print(f"{name}: {len(page) / 1e6:.1f} MB")

# %% [markdown]
# ## Save
# The decision table also leaves as CSV, Markdown and LaTeX; the own study's figures as SVG and PDF.

# %%
decision = exports.decision_table(collected)
for kind, content in (("csv", exports.csv(decision)), ("md", exports.markdown(decision).encode()), ("tex", exports.latex(decision).encode())):
    home.save(f"report/decision.{kind}", content)
own_parts = next((found["parts"] for found in sections if found["run"] == home.run), [])
for part in own_parts if not pictures.missing else []:
    if not isinstance(part["content"], pd.DataFrame):
        pictures.export(home, f"report/figures/{part['slug']}", part["content"])
pictures.__exit__()

# %%
own = collect_one(home.run, "10_report")
home.save_json("report/known_answers.json", known, source="simulated")
home.save_json("report/metrics.json", {"results": [{k: v for k, v in row.items() if k not in ("artifact", "cell")} for row in own.rows],
                                       "majority": majority, "report": name, "preregistration": home.preregistration["hash"]})

# %% [markdown]
# ## Summary

# %%
print(answer(collected, majority))
