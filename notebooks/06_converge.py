# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Converge
# Do the clusters of the sparse autoencoder (A) and the probes (B) find the same directions?
#
# Probe directions come from one half of the scenario clusters, the SAE's cluster directions from the other half, so
# agreement cannot come from shared texts. A is their mean cosine after the best one-to-one matching, corrected for the
# noise in both. Where activations have few effective dimensions, unrelated directions agree by chance: three nulls say
# how much.
#
# **Reads** `dataset/filtered`, `activations/`, `sae/`, `probe/`. **Writes** `converge/`. **Cost**: under a minute, local.

# %%
import numpy as np
from IPython.display import display

from lib.report import sae_figures
from lib.stats.convergence import convergence
from lib.stats.gates import unit_rows
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_splits: int = 50  # splits of the scenario clusters into a probe half and an SAE half
n_permutations: int = 200  # exchanges of types within scenarios, each through all splits
n_latents: int = 32  # decoder rows whose span is compared with the probe directions
seed: int = 0  # seed of splits and nulls

# %%
home = Study(study, "06_converge", n_splits=n_splits, n_permutations=n_permutations, n_latents=n_latents, seed=seed)
texts = home.load_texts()
thresholds = home.params.thresholds.convergence
layer, gates = home.load_json("sae/layer.json")["layer"], home.load_table("sae/gates.csv")
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
latents, decoders = home.load_tensors("sae/latents.safetensors"), home.load_tensors("sae/decoder.safetensors")
print(resid.shape, "text, d_model at layer", layer, "|", {name: z.shape for name, z in latents.items()}, "text, d_sae")

# %%
display(gates[["gate", "value", "rule", "bound", "passed"]].round(3))

# %% [markdown]
# ## Agreement
# A for each SAE, between halves and across registers (probes in plain, SAE in counter wording), with the upper quantile
# of each null: types exchanged within scenarios, directions drawn from the noise, random decoder rows.

# %%
names = sorted(latents)
report = convergence(resid, [latents[name] for name in names], [decoders[name] for name in names], texts, gates, thresholds=thresholds,
                     model_id=home.params.model.model_id, layer=layer, seed=seed, n_splits=n_splits, n_permutations=n_permutations,
                     n_latents=n_latents)
print(report.result)
display(report.table.set_index(["sae", "design"]).T.round(3))

# %%
if len(report.table):
    sae_figures.convergence_figure(report.table, thresholds.cos_min).show()

# %% [markdown]
# The matrix of cosines, clusters ordered as matched. The second number is the null's upper quantile with types exchanged:
# the matching alone lifts the diagonal.

# %%
if len(report.cosines):
    sae_figures.cosine_figure(report.cosines).show()

# %% [markdown]
# ## Which latents carry the directions
# The decoder rows nearest to each type's direction, with the tokens on which they are strongest.

# %%
tokens = home.load_table("sae/top_tokens.csv").groupby(["seed", "latent"]).token.agg(lambda t: " ".join(map(repr, dict.fromkeys(t))))
carriers = report.carriers.assign(tokens=[tokens.get((row.sae, row.latent), "(silent on these texts)") for row in report.carriers.itertuples()])
display(carriers[carriers["rank"] < 3].round(2))

# %% [markdown]
# The trained probes' directions against the same decoder rows, beside the mean differences above.

# %%
probes = home.load_tensors("probe/directions.safetensors")
usable = {name: vector for name, vector in probes.items() if vector.shape[-1] == resid.shape[1] and vector.ndim == 1}
best = {name: round(float((unit_rows(vector[None].astype(float)) @ unit_rows(decoders[names[0]].astype(float)).T).max()), 2) for name, vector in usable.items()}
print("largest cosine of a trained probe to a decoder row:", best)

# %% [markdown]
# ## Checks and save

# %%
assert report.result.layer == layer and np.isfinite(report.table[["A", "B", "P"]].astype(float)).all().all()
home.save_results("converge/metrics.json", [report.result])
home.save_table("converge/convergence.csv", report.table)
home.save_table("converge/cosines.csv", report.cosines)
home.save_table("converge/carriers.csv", carriers)

# %% [markdown]
# ## Summary

# %%
print(f"literal {report.result.literal_verdict}, calibrated {report.result.verdict}: {report.result.reason}")
