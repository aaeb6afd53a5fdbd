# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · Specificity
# Is the structure found among C, A and I one of empathy, or would any three styles of reply show it?
#
# Three structures are compared: empathy (E), the same scenarios answered without feeling (valence-stripped, V), and
# emotional texts that are no empathy (N), each with three matched styles. The overlap O is 1 where two structures are the
# same and 0 where they are unrelated.
#
# **Reads** `dataset/filtered`, `activations/`. **Writes** `specificity/`. **Cost**: half a minute, local.

# %%
from IPython.display import display

from lib.report import probe_figures
from lib.stats.specificity import specificity
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_permutations: int = 1000  # label permutations of the transfer null
seed: int = 0  # seed of permutations and null data

# %%
home = Study(study, "07_specificity", n_permutations=n_permutations, seed=seed)
texts = home.load_texts()
layer = home.params.layer
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
print(resid.shape, "text, d_model at layer", layer)

# %% [markdown]
# ## Overlap of the structures
# O is built from inner products over different scenarios only, so shared noise cannot inflate it. O between the two
# controls is the yardstick: two contrasts that share nothing but three styles. Words alone make a structure of their
# own, so a PASS also needs empathy in the counter register to be nearer than the controls; the embedding layer, which knows
# nothing but words, stands beside it.

# %%
report = specificity(resid, texts, thresholds=home.params.thresholds.specificity, model_id=home.params.model.model_id,
                     layer=layer, seed=seed, n_permutations=n_permutations,
                     words=home.load_tensors("activations/embedding.safetensors")["embedding"])
print(report.result, report.result.power, sep="\n    ")
display(report.overlap.round(3))

# %% [markdown]
# Each overlap with its 95% interval, which decides a PASS, and its 90% interval, which decides a FAIL by equivalence;
# debiased CKA, which knows no classes; the ratio of the effects' sizes with its own equivalence region.

# %%
if len(report.overlap):
    probe_figures.overlap_figure(report.overlap, home.params.thresholds.specificity).show()

# %% [markdown]
# ## Transfer between conditions
# A classifier of the three styles is trained in one condition and tested in another, under the best of the six mappings
# of styles; the null makes the same choice.

# %%
display(report.transfer_null.round(3))
if len(report.transfer_null):
    probe_figures.heat_maps_figure(report.overlap, report.transfer_null).show()

# %% [markdown]
# ## Checks and save

# %%
assert report.result.layer == layer
home.save_results("specificity/metrics.json", [report.result])
home.save_table("specificity/overlap.csv", report.overlap)
home.save_table("specificity/transfer.csv", report.transfer_null)

# %% [markdown]
# ## Summary

# %%
print(f"literal {report.result.literal_verdict}, calibrated {report.result.verdict}: {report.result.reason}. {report.result.power}")
