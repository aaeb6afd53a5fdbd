# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Generate
# Which texts does the study stand on, and do words alone give the empathy types away?
#
# A probe that separates Cognitive from Affective replies proves nothing if a bag of words does the same. So before any
# model is loaded, the texts are put to a family of purely lexical classifiers: within a register, and across the two
# registers `plain` and `counter`, where the same types are worded with one another's vocabulary.
#
# **Reads** the bundled dataset (or a folder of JSON files, or texts written for you through the Anthropic API).
# **Writes** `dataset/raw`. **Cost**: half a minute, local; generating costs what `max_usd` allows, and minutes to hours.

# %%
from IPython.display import display

from lib.report.figures import leakage_figure
from lib.store import Study
from lib.text import dataset as texts_of
from lib.text.leakage import audit_or_say

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
dataset: str = "bundled"  # folder of JSON files, or the bundled texts
n_scenarios: int = 0  # keep this many scenarios of each condition; 0 keeps all
audit: bool = True  # run the leakage audit
n_repeats: int = 2  # repeats of the grouped 5-fold cross-validation
seed: int = 0  # seed of the folds, and of the plan of generated scenarios
generate: bool = False  # have new texts written; needs ANTHROPIC_API_KEY in the environment
n_triplets: int = 90  # triplets to generate, with their controls
model: str = "claude-sonnet-4-6"  # writes the texts
judge_model: str = "claude-haiku-4-5"  # judges each response blind
prices: list = [3.0, 15.0, 1.0, 5.0]  # USD per million input and output tokens: of the model, then of the judge
max_usd: float = 5.0  # limit of spending, over all runs of this study together
batches: bool = True  # half price, within a day; False asks one by one

# %%
home = Study(study, "01_generate", dataset=dataset if dataset == "bundled" else "folder", n_scenarios=n_scenarios, n_repeats=n_repeats, seed=seed,
             written_by=model if generate else "")
folder = texts_of.BUNDLED if dataset == "bundled" else texts_of.Path(dataset)
print("texts written by:" if generate else "generate is off, so no key is needed; texts from:", model if generate else folder.name)

# %% [markdown]
# ## The texts
# One row a response. Valence-stripped items are tied to their triplet; both registers share the scenario.

# %%
if generate:
    from lib.text import generation  # the API's library takes seconds to import, and few runs need it
    price = {model: tuple(prices[:2]), judge_model: tuple(prices[2:])}
    items = generation.generate(home.root, n_triplets=n_triplets, controls=True, model=model, judge_model=judge_model, prices=price,
                                max_usd=max_usd, batches=batches, seed=seed)
else:
    items = texts_of.read_folder(folder)
texts = texts_of.texts_table(items, cluster_cosine=home.params.thresholds.cluster_cosine)
texts = texts_of.subset(texts, n_scenarios)
display(texts.groupby(["condition", "register"]).agg(scenarios=("scenario_id", "nunique"), responses=("text_id", "size")))

# %%
words = texts.response.str.split().str.len()
display(texts.assign(words=words).groupby(["condition", "register", "label"]).words.describe()[["mean", "min", "max"]].round(1))

# %% [markdown]
# One triplet in both registers, to see what is being compared.

# %%
first = texts[(texts.condition == "empathy") & (texts.scenario_id == texts.scenario_id.iloc[0])]
print(first.scenario.iloc[0])
for row in first.itertuples():
    print(f"\n[{row.register} · {row.label}] {row.response}")

# %% [markdown]
# ## Do words alone give the types away?
# AUROC of the best lexical baseline, grouped by scenario cluster, with its jackknife interval. The line that matters is
# the transfer: trained on one register, tested on the other register of scenarios it has not seen. Near .5, words fail.

# %%
thresholds = home.params.thresholds.probes
report = audit_or_say(texts, thresholds=thresholds, seed=seed, n_repeats=n_repeats) if audit else None
if report and len(report.best):
    display(report.best.round(3))
    leakage_figure(report.best, thresholds).show()

# %% [markdown]
# What a within-register classifier lives on, and which scenarios are near-duplicates of one another.

# %%
if report:
    display(report.ngrams.head(15), report.strata.head(20))
    print({True: "LEAKY:", False: "not leaky:" if len(report.best) else ""}[report.leaky], report.reason)

# %% [markdown]
# ## Checks and save

# %%
assert texts.text_id.is_unique and texts.response.str.len().min() > 0
home.save_table("dataset/raw/texts.csv", texts)
if report:
    home.save_table("dataset/raw/leakage.csv", report.table)
    home.save_table("dataset/raw/leakage_best.csv", report.best)
    home.save_json("dataset/raw/leakage.json", {"leaky": bool(report.leaky), "reason": report.reason})

# %% [markdown]
# ## Summary

# %%
print(f"{texts.scenario_id.nunique()} scenarios, {len(texts)} responses, {texts.cluster.nunique()} clusters")
