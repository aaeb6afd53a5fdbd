# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark · Training on cached shards against SAELens's runner
# What does caching the activations save, and does it cost any explained variance?
#
# SAELens's `LanguageModelSAETrainingRunner` generates activations as it goes, each epoch anew. Ours reads the shards that
# `lib.model.corpus` and its kin write once. Same process, same token rows, same initial weights, same optimiser settings.
# Rows that hold an attention sink are left out on both sides: the runner has no rule for them, and one would be its loss.
#
# **Reads** the model, the corpus, the study's texts. **Writes** `docs/bench_sae.json`. **Cost**: about ten minutes on
# two cores.

# %%
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from IPython.display import display
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.load_model import HookedProxyLM

from lib.model import corpus, prompts, sae, sae_gates, sae_training, text_tokens, weights
from lib.model.activations import SINK
from lib.model.shards import open_shards
from lib.params import ROOT
from lib.store import Study, to_json, versions, write_atomic

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study whose model and texts are used
n_rows: int = 256  # rows of tokens that both sides train on
n_heldout: int = 48  # rows that explained variance is measured on
context: int = 128  # tokens of a row
skip: int = 8  # first tokens of a row, on which nothing is trained
n_epochs: int = 3  # passes over the rows
batch: int = 256  # tokens of a training step
n_alternations: int = 3  # times each side trains, in alternating order
d_sae: int = 768  # latents
k: int = 24  # latents active on a token

# %%
home = Study(study, "bench_sae")
params, texts = home.params, home.load_texts()
model, tokenizer, about = weights.load(params.model)
layer = params.layer
print(os.cpu_count(), "cores;", torch.get_num_threads(), "threads; load before the start:", round(os.getloadavg()[0], 1))

# %% [markdown]
# ## Rows of tokens
# Extraction is timed by itself: it is paid once, and every further epoch, seed and recipe reads what it left.

# %%
def without_sinks(rows: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows without a sink after `skip`, and their activations [row, context − skip, d_model]."""
    keep = np.arange(context) >= skip
    resid = np.concatenate([corpus.forward(model, [corpus.Piece(split="", ids=row, keep=keep)], layer)[None] for row in rows])
    norms = np.linalg.norm(resid, axis=-1)
    clean = (norms <= SINK * np.median(norms)).all(1)
    return [row for row, good in zip(rows, clean, strict=True) if good], resid[clean]


source = corpus.pieces(tokenizer, params.model.template, context=context, seed=0, splits=("half0",))
rows = [piece.ids for piece, _ in zip((p for p in source if len(p.ids) == context), range(int(1.3 * (n_rows + n_heldout))), strict=False)]
start = time.perf_counter()
rows, resid = without_sinks(rows)
seconds_extraction = time.perf_counter() - start
assert len(rows) >= n_rows + n_heldout, f"{len(rows)} rows without sinks; raise the margin"
heldout = resid[n_rows:n_rows + n_heldout].reshape(-1, resid.shape[-1])
print(len(rows), "rows without sinks;", round(resid.shape[0] * context / seconds_extraction), "tokens a second of extraction")

# %%
recipe = sae_training.Recipe(d_sae=d_sae, k=k, batch=batch, n_samples=n_epochs * n_rows * (context - skip), buffer=8_192)
names = {"model_name": params.model.model_id, "hook_name": sae.hook_name(layer)}
results = []


def timed(side: str, train) -> None:
    """Run one side; tokens a second of wall time and of processor time, and explained variance on the held-out rows."""
    wall, cpu = time.perf_counter(), time.process_time()
    trained = train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    value = sae_gates.measure([trained], heldout)["explained_variance"][0]
    results.append({"side": side, "tokens_per_second": recipe.n_samples / wall, "tokens_per_cpu_second": recipe.n_samples / cpu,
                    "seconds": wall, "explained_variance": value})


# %% [markdown]
# ## Cached shards

# %%
folder = Path(tempfile.mkdtemp())
shards = open_shards({"d_model": params.model.d_model}, kind="bench", folder=folder)
for number, part in enumerate(np.array_split(resid[:n_rows], 4)):
    flat = part.reshape(-1, resid.shape[-1]).astype(np.float16)
    shards.add("half0", number, {"resid": flat}, {"n_tokens": len(flat)})


def from_shards():
    return sae_training.train(sae_training.shard_blocks(shards, "half0"), recipe, seed=0, about=names)[0]


# %% [markdown]
# ## SAELens's runner
# In its favour: its model ends after the layer that is read, without a language-model head, and its estimate of the norm
# takes as few batches as ours instead of a thousand.

# %%
cut, _, _ = weights.load(params.model)
cut.get_decoder().layers = cut.get_decoder().layers[: layer + 1]
cut.lm_head = torch.nn.Identity()
hook = f"model.layers.{layer}"
dataset = Dataset.from_dict({"input_ids": [row.tolist() for row in rows[:n_rows]]})


def as_it_goes():
    training = sae_training.build(recipe, params.model.d_model, seed=0, about=names)
    config = LanguageModelSAERunnerConfig(
        sae=training.cfg, model_name=params.model.model_id, model_class_name="AutoModelForCausalLM", hook_name=hook, is_dataset_tokenized=True,
        context_size=context, seqpos_slice=(skip, None), prepend_bos=False, training_tokens=recipe.n_samples, train_batch_size_tokens=batch,
        store_batch_size_prompts=16, n_batches_in_buffer=recipe.buffer // (context - skip), lr=recipe.lr, lr_end=recipe.lr,
        lr_warm_up_steps=int(recipe.n_steps * recipe.warm_up), lr_decay_steps=int(recipe.n_steps * recipe.decay),
        dead_feature_window=recipe.dead_window, n_batches_for_norm_estimate=sae_training.NORM_BATCHES, device="cpu", output_path=None,
        checkpoint_path=None, verbose=False, logger=LoggingConfig(log_to_wandb=False))
    runner = LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_sae=training,
                                            override_model=HookedProxyLM(cut, tokenizer, hook_names=[hook]))
    return sae_training.inference(runner.run())


# %% [markdown]
# Each side trains in turn, the order reversed every time.

# %%
sides = {"cached shards": from_shards, "SAELens's runner": as_it_goes}
for turn in range(n_alternations):
    for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
        timed(side, sides[side])

# %% [markdown]
# ## The study's texts
# Encoding and pooling all replies with both shipped SAEs, from their cached tokens.

# %%
pair = sae.load_pair(sae.find_shipped(sae.identity(params.model, layer)), sae.identity(params.model, layer))
groups = [[prompts.encode(tokenizer, params.model.template, scenario, reply) for reply in part.response]
          for scenario, part in texts.groupby("scenario", sort=False)]
tokens = text_tokens.extract_texts(model, groups, about=about, template=params.model.template, layer=layer)
start = time.perf_counter()
made = sae.encode_texts(pair.saes, tokens)
seconds_texts = time.perf_counter() - start

# %% [markdown]
# ## Summary
# The first ratio is the claim; the second counts the extraction as well, which the runner pays in every epoch.

# %%
table = pd.DataFrame(results).groupby("side", sort=False).median()
ours, theirs = table.loc["cached shards"], table.loc["SAELens's runner"]
with_extraction = ours.seconds + seconds_extraction * n_rows / len(rows)
found = {"ratio": ours.tokens_per_second / theirs.tokens_per_second, "ratio_cpu": ours.tokens_per_cpu_second / theirs.tokens_per_cpu_second,
         "ratio_with_extraction": theirs.seconds / with_extraction, "explained_variance_difference": ours.explained_variance - theirs.explained_variance,
         "texts": len(texts), "text_tokens": tokens.n_tokens("texts"), "seconds_encode_and_pool": seconds_texts}
display(table.round(3), found)
write_atomic(ROOT / "docs" / "bench_sae.json", to_json({
    **found, "sides": {side: dict(row) for side, row in table.iterrows()}, "recipe": vars(recipe), "rows": n_rows, "epochs": n_epochs,
    "alternations": n_alternations, "threads": torch.get_num_threads(), "versions": versions()}))
