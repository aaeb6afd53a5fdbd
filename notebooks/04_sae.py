# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Sparse autoencoder (Experiment A)
# Which clusters does geometry give, without labels?
#
# A sparse autoencoder (SAE) is put to every token of the replies; its latents, averaged over a reply, are what is
# clustered. Theory predicts four clusters: cognitive, affective, instrumental and neutral. Two SAEs, trained from other
# seeds on other conversations, must first pass their gates: an SAE that reconstructs badly, or that another seed would
# not give again, has no clusters worth a name.
#
# **Reads** `dataset/filtered`, the model, a corpus of human conversations, the shipped SAE where it fits the study.
# **Writes** `sae/`. **Cost**: one to two minutes on two CPU cores; training, where no SAE fits, comes on top.

# %%
import pandas as pd
from IPython.display import display
from sklearn.feature_extraction.text import TfidfVectorizer

from lib.model import corpus, extraction, prompts, sae, sae_gates, sae_training, text_tokens, weights
from lib.report import sae_figures
from lib.stats import clusters as groups
from lib.stats.describe import describe
from lib.stats.gates import failing, gates_table, random_mmcs
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
release: str = ""  # SAELens release of a published SAE of this model; empty: the shipped one; none: there is none, so training
sae_id: str = ""  # its id within the release
architecture: str = "topk"  # where an SAE is trained here: topk, batchtopk or jumprelu
d_sae: int = 768  # its latents
k: int = 24  # its latents active on a token
n_tokens: int = 491520  # its corpus tokens, each seed
n_samples: int = 1500000  # its training tokens, each seed, repeats counted
corpus_name: str = ""  # conversations of the hub to stream, NAME:SPLIT; empty: the embedded ones
n_heldout: int = 16000  # held-out corpus tokens that the gates are measured on
n_ce: int = 2000  # held-out tokens for the cross-entropy recovered
shard_tokens: int = 16384  # tokens of one file of cached activations
n_surrogates: int = 100  # structureless data sets behind the gap statistic
n_bootstraps: int = 100  # resamplings of scenario clusters behind the stability of k
n_permutations: int = 2000  # exchanges of types within scenarios
seed: int = 0  # seed of resampling and null data

# %%
home = Study(study, "04_sae", release=release, sae_id=sae_id, architecture=architecture, d_sae=d_sae, k=k, n_tokens=n_tokens,
             n_samples=n_samples, corpus_name=corpus_name, n_heldout=n_heldout, n_ce=n_ce, n_surrogates=n_surrogates, n_bootstraps=n_bootstraps,
             n_permutations=n_permutations, seed=seed)
texts = home.load_texts()
params, thresholds = home.params, home.params.thresholds.clusters
model, tokenizer, about = weights.load(params.model)
print(len(texts), "texts;", params.model.model_id, "on", model.device)

# %% [markdown]
# ## Which SAE
# A published one where the params name it, else the shipped one of exactly this model and layer, else one trained here.
# An SAE of another model is never used.

# %%
expected = sae.identity(params.model, params.layer)
published = release not in ("", "none")
shipped = None if release else sae.find_shipped(expected)
pair = sae.load_pretrained(release, sae_id, params.model, device=str(model.device)) if published else None
layer = sae.layer_of(pair.saes[0]) if pair else params.layer
chosen = f"published, {release} / {sae_id}" if published else f"shipped, {shipped.name}" if shipped else "none fits; one is trained here"
print("SAE:", chosen, "at", sae.hook_name(layer), "" if layer == params.layer else f"(the preregistered layer is {params.layer})")

# %% [markdown]
# Activations of the corpus are extracted once and kept in the cache as hashed shards.

# %%
train_here = not (pair or shipped)
shards = corpus.extract_corpus(
    model, tokenizer, about=about, template=params.model.template, layer=layer, shard_tokens=shard_tokens, corpus=corpus_name,
    n_tokens={"heldout": n_heldout} | ({"half0": n_tokens, "half1": n_tokens} if train_here else {}))
heldout = shards.split("heldout", n_heldout)
print({split: shards.n_tokens(split) for split in corpus.SPLITS}, "tokens;", sum(row["n_sinks"] for row in shards.rows), "sinks dropped")

# %%
if shipped:
    pair = sae.load_pair(shipped, expected, device=str(model.device))
elif train_here:
    recipe = sae_training.Recipe(architecture=architecture, d_sae=d_sae, k=k, n_samples=n_samples)
    pair = sae_training.train_pair(shards, recipe, about=expected, tokens_per_latent=thresholds.tokens_per_latent_min,
                                   n_check=n_heldout, device=str(model.device))
display({key: pair.about.get(key) for key in ("recipe", "release", "train_tokens", "seeds")})

# %%
if len(pair.curve):
    sae_figures.training_figure(pair.curve).show()

# %% [markdown]
# ## Gates
# Measured here, on conversations no SAE was trained on, beside an untrained SAE and one trained in the same way on
# Gaussian tokens. The train-test gap compares with the training tokens' value that is recorded with the SAE.

# %%
def measure_gates():
    held = corpus.pieces(tokenizer, params.model.template, context=corpus.CONTEXT, seed=0, splits=("heldout",), corpus=corpus_name)
    measured = sae_gates.measure(pair.saes, heldout)
    return {**measured, "mmcs": [measured["mmcs"]], **sae_gates.ce_recovered(model, held, layer, pair.saes, heldout.mean(0), n_tokens=n_ce)}

of_sae = {"sae": pair.about}  # whatever SAE it is, what is kept belongs to it alone
found = home.kept("gates", measure_gates, **of_sae)
if "train_tokens" in pair.about:
    found["train_test_gap"] = [a - b for a, b in zip(pair.about["train_explained_variance"], found["explained_variance"], strict=True)]
    found["tokens_per_latent"] = [n / pair.saes[0].cfg.d_sae for n in pair.about["train_tokens"]]
elif published:
    found["tokens_per_latent"] = [float("inf")]  # by its own card

# %%
nulls = {"random_decoder": {"mmcs": [random_mmcs(pair.saes[0].W_dec.shape, seed=seed)]}, **pair.about["nulls"]}
gates = gates_table(found, thresholds, d_model=params.model.d_model, nulls=nulls)
display(gates.round(3))
print("each decoder with its own start:", [round(v, 3) for v in pair.about.get("mmcs_with_own_start", [])],
      "| cross-entropy recovered against zeros instead of the mean:", [round(v, 3) for v in found["ce_recovered_zero"]])
print("All gates pass." if not failing(gates) else "Gates that fail: " + "; ".join(failing(gates)))

# %% [markdown]
# ## Latents of the texts
# The activations of the replies' tokens are extracted once and kept in the cache too. Tokens are encoded, then pooled over
# each reply. The SAE never saw texts like these, so how well it reconstructs them is shown as well.

# %%
by_scenario = extraction.groups_of(list(texts.scenario))  # as stage 03 groups them: its shards are found
order = [row for rows in by_scenario for row in rows]
def encode():
    encoded = [[prompts.encode(tokenizer, params.model.template, texts.scenario[row], texts.response[row]) for row in rows] for rows in by_scenario]
    tokens = text_tokens.extract_texts(model, encoded, about=about, template=params.model.template, layer=layer)
    return sae.encode_texts(pair.saes, tokens)

made = home.kept("latents", encode, **of_sae)
back = pd.Series(range(len(order)), index=order).sort_index().to_numpy()
latents, resid = [z[back] for z in made.pooled], made.resid[back]
print("explained variance on the study's own tokens:", [round(v, 3) for v in made.explained_variance])

# %%
tops = [top.assign(token=tokenizer.batch_decode(top.token.to_numpy()[:, None]), text_id=texts.text_id.to_numpy()[order][top.text],
                   seed=number) for number, top in enumerate(made.top)]
display(tops[0].head())

# %% [markdown]
# ## Clusters
# The same for the raw activations and for the words (TF-IDF): what they give too is no achievement of the SAE.

# %%
words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(texts.response).toarray()
beside = {"raw activations": resid, "words (TF-IDF)": words}
clustered = home.kept("clusters", lambda: groups.measure(latents, beside, texts, k=thresholds.k, seed=seed, n_surrogates=n_surrogates,
                                                         n_bootstraps=n_bootstraps, n_permutations=n_permutations), k=thresholds.k, **of_sae)
report = groups.ruled(clustered, texts, gates, thresholds=thresholds, model_id=params.model.model_id, layer=layer)
print(report.result)
print("agreement of the two SAEs' clusters (ARI):", report.result.reliability)
display(report.summary.round(3))

# %%
if len(report.curve):
    sae_figures.gap_figure(report.curve, thresholds.k).show()

# %% [markdown]
# The map shows the first two components only; clusters are found in twenty.

# %%
names = ["SAE seed 0", "raw activations", "words (TF-IDF)"]
if len(report.texts):
    sae_figures.map_figure(report.texts, names).show()

# %% [markdown]
# What the clusters are: types, contexts, words, the latents that are higher in them, each with its strongest tokens, and
# the reply in which the first of these is strongest. A cluster of one context would be a topic.

# %%
scales = [s.W_dec.norm(dim=1).cpu().numpy() for s in pair.saes]
what = pd.concat([pd.DataFrame(columns=["cluster"]), *(
    describe(report.texts, texts, f"SAE seed {number}", latents=z, scale=scale, top=top).assign(seed=number)
    for number, (z, scale, top) in enumerate(zip(latents, scales, tops, strict=True)) if len(report.texts))])
display(what.round(2))

# %% [markdown]
# ## Checks and save

# %%
assert all(len(z) == len(texts) and (z >= 0).all() for z in latents) and report.result.layer == layer
home.save_results("sae/metrics.json", [report.result])
home.save_json("sae/layer.json", {"layer": layer})
home.save_tensors("sae/latents.safetensors", {f"seed{i}": z.astype("float32") for i, z in enumerate(latents)}, layer=layer)
home.save_tensors("sae/decoder.safetensors", {f"seed{i}": s.W_dec.cpu().numpy() for i, s in enumerate(pair.saes)}, layer=layer)
tables = {"gates": gates, "clusters": report.summary, "curve": report.curve, "texts": report.texts, "what": what, "top_tokens": pd.concat(tops)}
for name, table in tables.items():
    home.save_table(f"sae/{name}.csv", table)
home.save_table("sae/training.csv", pair.curve if len(pair.curve) else pd.DataFrame(columns=["step"]))

# %% [markdown]
# ## Summary

# %%
print(f"literal {report.result.literal_verdict}, calibrated {report.result.verdict}: {report.result.reason}")
