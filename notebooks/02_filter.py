# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · Filter
# Which triplets are good enough to stand on?
#
# Human decisions are kept as append-only journals in `labels/`, one file an annotator. This notebook applies them:
# a triplet is left out when more annotators reject it than accept it. Without labels all bundled triplets stay, which
# language models wrote and language models rated; the report says so.
#
# **Reads** `dataset/raw`, `labels/`. **Writes** `dataset/filtered`. **Cost**: seconds, local.

# %%
from IPython.display import display

from lib.store import Study
from lib.text import labels
from lib.text.dataset import export_seed_schema

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
journals: str = ""  # folder of label journals; empty: the project's labels/

# %%
home = Study(study, "02_filter")
raw = home.load_texts("dataset/raw/texts.csv")
display(raw.head(3))

# %% [markdown]
# ## Labels
# The last decision of each annotator on each triplet counts.

# %%
folder = labels.LABELS if not journals else labels.Path(journals)
by_annotator = labels.decisions(folder)
print({name: len(found) for name, found in by_annotator.items()} or "no human labels: the bundled selection, rated by language models, is used")

# %%
votes = [(id_, decision) for found in by_annotator.values() for id_, decision in found.items()]
balance = {id_: sum(1 if d == "accept" else -1 for i, d in votes if i == id_) for id_, _ in votes}
rejected = {id_ for id_, total in balance.items() if total < 0}
texts = raw[~raw.scenario_id.isin(rejected)].reset_index(drop=True)
print(f"{len(rejected)} triplets left out, {texts[texts.condition == 'empathy'].scenario_id.nunique()} kept")

# %% [markdown]
# ## Checks and save
# The texts are saved as the table every later stage reads, and as the seed-schema files that other tools import.

# %%
kept = texts[texts.condition == "empathy"]
assert len(kept) and (kept.groupby(["scenario_id", "register"]).label.nunique() == 3).all()
home.save_table("dataset/filtered/texts.csv", texts)
for name, content in export_seed_schema(texts).items():
    home.save_json(f"dataset/filtered/{name}", content)

# %% [markdown]
# ## Summary

# %%
display(texts.groupby(["condition", "context"]).scenario_id.nunique().unstack(fill_value=0))
