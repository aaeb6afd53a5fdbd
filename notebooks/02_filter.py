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
# Put your name into `annotator` and run the notebook in JupyterLab: a card shows one scenario in one register, its responses
# in a blind order, and every key you press is on disk before the next card is painted. Without a name nothing is asked:
# the journals in `labels/` are applied as they stand. A triplet that more annotators reject than accept is left out, with
# both registers of its scenario. Without any labels the bundled selection stays, which language models wrote and rated.
#
# **Reads** `dataset/raw`, `labels/`. **Writes** `dataset/filtered`. **Cost**: seconds, local; labelling is up to you.

# %%
from IPython.display import display

from lib.store import Study
from lib.text import filtering, meter, ratings
from lib.text.dataset import export_seed_schema
from lib.text.filter_widget import FilterCard

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
journals: str = ""  # folder of label journals; empty: the project's labels/
annotator: str = ""  # your name, to label; empty applies the journals without asking
n_keep: int = 90  # scenarios in the set to be kept: what quotas and "keep the best" aim at

# %%
home = Study(study, "02_filter")
raw = home.load_texts("dataset/raw/texts.csv")
display(raw.head(3))

# %% [markdown]
# ## Label
# Click the card and press `?` for its keys. After labelling, run the cells below.

# %%
if annotator:
    card = FilterCard(raw, annotator=annotator, journals=journals, n_keep=n_keep)
    display(card)

# %% [markdown]
# ## Apply the labels
# The last decision of each annotator on each card counts; records about texts that have changed since do not.

# %%
filtered = filtering.apply(raw, journals)
texts, about = filtered.texts, filtered.about
print("selection by", about["source"])
print(f"{len(about['left_out'])} triplets left out, {texts[texts.condition == 'empathy'].scenario_id.nunique()} kept; "
      f"{about['edited_responses']} responses edited, {about['disputed']} disputes open, {about['stale_records']} stale records")
if about["torn_journals"]:
    print("a crash tore the last line, which was never confirmed, of", *about["torn_journals"])

# %% [markdown]
# Do the annotators agree? A κ near 0 is chance; a third of blind guesses is right by chance.

# %%
display(filtered.agreement.round(2))

# %% [markdown]
# ## Blind ratings
# What raters who saw one message and one reply, and nothing else, said that the reply does, and how natural it sounds (1 to
# 5). The data sheet says who they were. Judgements of texts that have changed since are counted as stale and left out.

# %%
rated = ratings.summary(ratings.read_ratings(), texts)
display(rated.round(2) if len(rated) else "none of these texts was rated blind")

# %% [markdown]
# ## Do words alone give the kept types away?
# The quick lexical family, grouped by scenario cluster: the strongest baseline of each pair, across registers where there
# are two. Stage 01 holds the audit by the whole family.

# %%
kept = texts[texts.condition == "empathy"]
leakage = meter.measure(kept)
display(meter.best(leakage).round(3) if len(leakage) else "too few scenarios to measure")

# %% [markdown]
# ## Checks and save
# The texts are saved as the table every later stage reads, and as the seed-schema files that other tools import.

# %%
assert len(kept) and (kept.groupby(["scenario_id", "register"]).label.nunique() == 3).all()
home.save_table("dataset/filtered/texts.csv", texts)
home.save_table("dataset/filtered/verdicts.csv", filtered.verdicts)
home.save_table("dataset/filtered/agreement.csv", filtered.agreement)
home.save_table("dataset/filtered/leakage.csv", leakage)
home.save_table("dataset/filtered/ratings.csv", rated)
home.save_json("dataset/filtered/labels.json", about)
for name, content in export_seed_schema(texts).items():
    home.save_json(f"dataset/filtered/{name}", content)

# %% [markdown]
# ## Summary

# %%
display(texts.groupby(["condition", "context"]).scenario_id.nunique().unstack(fill_value=0))
