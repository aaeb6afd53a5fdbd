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
# **Reads** all studies' `metrics.json` and tables. **Writes** `outputs/report.html`, `report/`. **Cost**: seconds, local.

# %%
import pandas as pd
from IPython.display import display

from lib.report import exports, figures, html
from lib.report.collect import collect, collect_one
from lib.report.sections import answer, majorities, parts_of, texts_note
from lib.stats.known_answers import known_answers
from lib.store import Study, write_atomic

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
seed: int = 0  # seed of the simulated known answers

# %%
home = Study(study, "10_report", seed=seed)
outputs = home.root.parent
collected = collect(home.variant, "10_report")
for one in collected:
    print(f"{one.run:<28} {len(one.rows)} result rows" if one.rows else f"{one.run:<28} not run")

# %% [markdown]
# ## Decision table

# %%
shown = ["study", "criterion", "literal_value", "literal_verdict", "verdict", "estimate", "ci_low", "ci_high", "p", "null", "text_baseline", "flags"]
rows = pd.DataFrame([row for one in collected for row in one.rows], columns=None if any(one.rows for one in collected) else shown)
display(rows[shown].round(3))

# %%
headlines = pd.DataFrame([row for one in collected for criterion in dict.fromkeys(r["criterion"] for r in one.rows) if (row := one.headline(criterion))])
if len(headlines):
    figures.verdict_figure(headlines).show()

# %% [markdown]
# A majority counts trained models only; one that was not run stays in the count.

# %%
majority = majorities(collected, alpha=home.params.thresholds.majority.alpha)
display(pd.DataFrame(majority))

# %% [markdown]
# ## Known answers
# The same code on simulated data with planted truth, and on data with none.

# %%
known = known_answers(home.params.thresholds, seed=seed)
display(pd.DataFrame(known)[["data", "criterion", "expected", "verdict"]])
assert all(row["verdict"] == row["expected"] or (row["expected"].startswith("not") and row["verdict"] != row["expected"][4:]) for row in known)

# %% [markdown]
# ## The page

# %%
sections = [{"run": one.run, "question": one.params.question, "model_id": one.params.model.model_id, "layer": one.params.layer,
             "license": one.params.model.license, "note": "", "parts": parts_of(one, home.params.thresholds)} for one in collected if one.rows]
page = html.render(answer=answer(collected, majority), rows=rows.astype(object).where(rows.notna(), None).to_dict("records"), majority=majority,
                   not_run=[(one.run, "not run") for one in collected if not one.rows], sections=sections, known_answers=known,
                   texts_note=texts_note(collected), preregistration=home.preregistration)
name = f"report--{home.variant}.html" if home.variant else "report.html"
write_atomic(outputs / name, page.encode())
print(f"{name}: {len(page) / 1e6:.1f} MB")

# %% [markdown]
# ## Save
# The decision table also leaves as CSV, Markdown and LaTeX.

# %%
decision = exports.decision_table(collected)
for kind, content in (("csv", exports.csv(decision)), ("md", exports.markdown(decision).encode()), ("tex", exports.latex(decision).encode())):
    home.save(f"report/decision.{kind}", content)

# %%
own = collect_one(home.run, "10_report")
home.save_json("report/known_answers.json", known, source="simulated")
home.save_json("report/metrics.json", {"results": [{k: v for k, v in row.items() if k != "artifact"} for row in own.rows],
                                       "majority": majority, "report": name, "preregistration": home.preregistration["hash"]})

# %% [markdown]
# ## Summary

# %%
print(answer(collected, majority))
