# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Extract activations
# What does the model represent while it reads each reply?
#
# The residual stream after every block, averaged over the tokens of the reply only: no token of the prompt, the template
# or padding enters. Texts that share a prompt share its computation (a token trie with a tree attention mask).
#
# **Reads** `dataset/filtered`, the model. **Writes** `activations/`. **Cost**: about two minutes on two CPU cores for
# the embedded model.

# %%
import numpy as np
from IPython.display import display

from lib.model import activations, encoder, extraction, prompts, weights
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
last_layer: int = -1  # deepest layer that is kept; -1: the model's last; -2: the preregistered one
sentence_encoder: bool = True  # also embed the replies with a sentence encoder (text baseline)
tolerance: float = 1e-4  # largest relative error of the shared-prefix forward against plain forwards
seed: int = 0  # seed of the texts drawn for the check

# %%
home = Study(study, "03_extract", last_layer=last_layer, sentence_encoder=sentence_encoder, tolerance=tolerance, seed=seed)
texts, layers = home.load_texts(), extraction.layers_of(home.params, last_layer)
print(len(texts), "texts of", home.params.model.model_id)

# %% [markdown]
# ## Tokens
# The reply's tokens are found by character offsets in the tokenised whole. The last tokens of the prompt and the first
# of the reply are shown, so that the boundary can be checked by eye.

# %%
model, tokenizer, about = weights.load(home.params.model)
encoded = [prompts.encode(tokenizer, home.params.model.template, row.scenario, row.response) for row in texts.itertuples()]
sample = encoded[0]
print(tokenizer.convert_ids_to_tokens(sample.ids[sample.start - 3:sample.start]), "|", tokenizer.convert_ids_to_tokens(sample.ids[sample.start:sample.start + 5]))

# %%
groups = extraction.groups_of(list(texts.scenario))
order = np.array([row for rows in groups for row in rows])

# %% [markdown]
# ## Forward
# Layer −1 is the embedding, before any attention: a lexical baseline of the model's own. The single tokens of the
# preregistered layer are kept in the cache for the sparse autoencoder of the next stage. Everything is made and kept in
# shards of scenarios: an interrupted extraction goes on after its last one, and a cluster may have made them before.

# %%
texts_of = [[encoded[row] for row in rows] for rows in groups]
work = extraction.Extraction(model, texts_of, home.params.model, about=about, layer=home.params.layer, layers=layers, tolerance=tolerance)
print(f"{len(work.missing())} of {len(work.parts)} shards are to be made")
pooled, sinks, how = work.gather()
resid = np.empty_like(pooled)
resid[:, order] = pooled
print(how)

# %% [markdown]
# Attention sinks are left out of the means and counted; no reply may be dominated by a single token.

# %%
norms = np.linalg.norm(resid, axis=-1)
spread = norms.max(1) / np.median(norms, axis=1)
print("sink tokens left out per layer:", sinks.sum(1).tolist())
print(f"largest norm over median norm of the pooled replies: {spread.max():.1f}")

# %% [markdown]
# ## Checks and save

# %%
assert resid.shape == (len(layers), len(texts), home.params.model.d_model) and spread.max() < activations.SINK
rows = np.random.default_rng(seed).choice(len(texts), size=3, replace=False)
plain, _ = activations.pool(model, [encoded[row] for row in rows], layers, share=False)
error = activations.relative_error(resid[:, rows], plain)
print(f"three texts again by plain forwards: relative error {error:.1e}")
assert error < (tolerance if home.params.model.dtype == "float32" else 0.05)

# %%
how = {**about, **how, "layer_convention": "layer l is the output of block l (resid_post); -1 is the embedding", "sink_tokens": int(sinks.sum())}
home.save_tensors("activations/resid_post.safetensors", {"resid_post": resid[1:]}, **how)
home.save_tensors("activations/embedding.safetensors", {"embedding": resid[0]}, **how)
home.save_tensors("activations/unembedding.safetensors", {"covariance": weights.unembedding_covariance(model)}, **about)
home.save_json("activations/tokens.json", {id_: list(e.ids[e.start:]) for id_, e in zip(texts.text_id, encoded, strict=True)})

# %%
if sentence_encoder:
    home.save_tensors("activations/encoder.safetensors", {"encoder": encoder.encode_sentences(list(texts.response))},
                      model=encoder.WHEEL.requirement)

# %% [markdown]
# ## Summary

# %%
display({"shape": resid[1:].shape, "layers": f"0..{layers[-1]}", "relative error": error})
