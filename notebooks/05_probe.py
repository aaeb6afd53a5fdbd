# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Probe (Experiment B)
# Are Cognitive, Affective and Instrumental replies linearly told apart, beyond their words? Are the Cognitive and the
# Affective direction separate?
#
# Within one register almost anything separates the types, words included. So the endpoint is transfer: a probe trained
# on one register is tested on the other register of scenarios it has not seen, and must beat the best of a family of
# lexical baselines put through the same transfer, the model's embedding layer and a random-weight twin among them.
#
# **Reads** `dataset/filtered`, `activations/`. **Writes** `probe/`, `separation/`. **Cost**: about two minutes, local.

# %%
from IPython.display import display

from lib.report import figures, probe_figures
from lib.stats import probes as experiment
from lib.stats import separation as apartness
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_permutations: int = 2000  # within-triplet label permutations of each null
n_repeats: int = 10  # repeats of the grouped 5-fold cross-validation
lambdas: list = [0.01, 0.1, 1.0, 10.0, 100.0]  # L2 strengths tried in the inner folds
seed: int = 0  # seed of folds, permutations and null data

# %%
home = Study(study, "05_probe", n_permutations=n_permutations, n_repeats=n_repeats, lambdas=lambdas, seed=seed)
texts = home.load_texts()
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"]
layer, model_id, thresholds = home.params.layer, home.params.model.model_id, home.params.thresholds
print(resid.shape, "layer, text, d_model; preregistered layer", layer)

# %% [markdown]
# ## Baselines that know only the words
# The embedding layer and every layer of the random-weight twin count as lexical; the sentence encoder is contextual.

# %%
lexical = {"embedding layer": home.load_tensors("activations/embedding.safetensors")["embedding"]}
if home.params.twin:
    lexical["random-weight model"] = home.twin().load_tensors("activations/resid_post.safetensors")["resid_post"]
contextual = {"sentence encoder": home.load_tensors("activations/encoder.safetensors")["encoder"]} if home.has("activations/encoder.safetensors") else {}
tokens = home.load_json("activations/tokens.json")
token_ids = [tokens[text_id] for text_id in texts.text_id]
print("lexical:", *lexical, "+ the family of lib.text.features; contextual:", *contextual)

# %% [markdown]
# ## Probes
# T is the smaller of the two directions' AUROCs, Δ its lead over the best lexical baseline. What is measured is kept: where
# only a threshold changes, the verdict is ruled anew on the same values.

# %%
measured = home.kept("probes", lambda: experiment.measure(
    resid, texts, model_id=model_id, layer=layer, seed=seed, n_permutations=n_permutations, n_repeats=n_repeats, lambdas=lambdas,
    dense_baselines=lexical, contextual=contextual, token_ids=token_ids))
probes = experiment.ruled(measured, thresholds.probes)
for result in probes.results:
    print(result, result.power, sep="\n    ")

# %%
if len(probes.layers):
    figures.layer_figure(probes.layers, probes.baselines, layer).show()

# %% [markdown]
# Each baseline through the same transfer, best first. A probe that a bag of words or an untrained network equals has
# shown nothing.

# %%
across = probes.baselines[probes.baselines.direction == "transfer"].pivot(index=["family", "name"], columns="contrast", values="T")
display(across.sort_values("C/A", ascending=False).round(3) if len(across) else across)

# %% [markdown]
# Length and style are taken out of the finished scores, not of the activations, where that would leak the labels. Labels
# that are random per cluster show what a probe of this capacity can memorise.

# %%
display(probes.adjusted.round(3), probes.selectivity.round(3))
if len(probes.adjusted):
    probe_figures.controls_figure(probes.adjusted, probes.selectivity, probes.baselines).show()

# %% [markdown]
# Would more triplets decide it? The interval narrows with the root of their number; the sentence says at how many it
# would leave the bounds, if the values seen held.

# %%
if len(probes.learning_curve):
    probe_figures.learning_figure(probes.learning_curve, probes.baselines, thresholds.probes.fail_transfer).show()
for result in probes.results:
    print(f"{result.metric}, {result.verdict}: {result.power}")

# %% [markdown]
# ## Separation
# The literal criterion reads a cosine that its construction decides. κ is unbiased and measured from neutral texts of
# the same scenario. Where words alone tell C from A, or length and style are all that parts them, there is no PASS. The
# causal metric, the covariance of the unembedding, is a sensitivity row and decides nothing.

# %%
covariance = home.load_tensors("activations/unembedding.safetensors")["covariance"]
angle = home.kept("separation", lambda: apartness.measure(resid[layer], texts, model_id=model_id, layer=layer, seed=seed,
                                                           n_permutations=n_permutations, unembedding_cov=covariance))
apart = apartness.ruled(angle, thresholds.separation, leaky="LEAKY" in probes.results[0].flags)
print(apart.result, apart.result.power, sep="\n    ")
display(apart.metrics.round(3))

# %%
if len(apart.constructions):
    figures.constructions_figure(apart.constructions, thresholds.separation.cos_max).show()

# %% [markdown]
# Are the directions the same when the words are not? One type in two registers must agree more than two types do.

# %%
display(apart.mtmm[apart.mtmm.second == ""].round(3))
if len(apart.mtmm):
    probe_figures.mtmm_figure(apart.mtmm).show()

# %% [markdown]
# The same over layers. Only the preregistered layer decides; the others describe.

# %%
curve = home.kept("layer_curve", lambda: apartness.layer_curve(resid, texts))
if len(curve):
    figures.separation_figure(curve, layer, thresholds.separation.cos_max).show()

# %% [markdown]
# ## Checks and save

# %%
assert all(result.layer == layer for result in [*probes.results, apart.result])
home.save_results("probe/metrics.json", probes.results)
home.save_tensors("probe/directions.safetensors", {name: value.astype("float32") for name, value in probes.directions.items()}, layer=layer)
for name in ("layers", "baselines", "learning_curve", "selectivity", "adjusted"):
    home.save_table(f"probe/{name}.csv", getattr(probes, name))

# %%
home.save_results("separation/metrics.json", [apart.result])
for name, table in (("metrics", apart.metrics), ("constructions", apart.constructions), ("mtmm", apart.mtmm), ("layers", curve)):
    home.save_table(f"separation/{name}.csv", table)

# %% [markdown]
# ## Summary

# %%
for result in [*probes.results, apart.result]:
    print(f"{result.criterion:<12} literal {result.literal_verdict:<13} calibrated {result.verdict:<13} {result.reason} | {result.power}")
