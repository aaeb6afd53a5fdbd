# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark · Extraction by a token trie against plain forwards
# What does it save to compute every shared token once, and does it give the same activations?
#
# All sides run in the same process on the same token ids, in alternating order; medians are shown, and every side's pooled
# activations of all layers are compared. The texts: scenarios with their triplets, their valence-stripped items, and
# controls of non-empathy emotion with three replies each.
#
# **Reads** the model and the bundled texts. **Writes** `docs/bench_extraction.json`. **Cost**: half an hour on two cores
# for all 720 texts; in proportion for fewer scenarios.

# %%
import copy
import os
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from lib.model import activations, prompts, weights
from lib.model.extraction import groups_of
from lib.params import ROOT, load_params
from lib.report.figures import styled
from lib.store import to_json, versions, write_atomic
from lib.text import dataset

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study whose model is used
n_scenarios: int = 90  # scenarios, each with a triplet and its valence-stripped items
n_controls: int = 60  # controls, each with three replies
n_alternations: int = 3  # times each side is timed, in alternating order
batch: int = 16  # texts of a plain batch
seed: int = 0  # seed of the texts drawn
write: bool = True  # write docs/bench_extraction.json

# %%
params = load_params(study)
model, tokenizer, about = weights.load(params.model)
bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
layers = list(params.model.layers)
print(os.cpu_count(), "cores;", torch.get_num_threads(), "threads; load before the start:", round(os.getloadavg()[0], 1))

# %%
def drawn(condition, count):
    """Tokens of the plain register's texts of some scenarios, those with the same prompt together."""
    rows = texts[(texts.condition == condition) & (texts.register == "plain")]
    ids = np.random.default_rng(seed).permutation(rows.scenario_id.unique())[:count]
    rows = rows[rows.scenario_id.isin(ids)]
    encoded = [prompts.encode(tokenizer, params.model.template, row.scenario, row.response) for row in rows.itertuples()]
    return [[encoded[row] for row in group] for group in groups_of(list(rows.scenario))]

texts = dataset.texts_table(dataset.read_folder(dataset.BUNDLED), cluster_cosine=0.4)
groups = drawn("empathy", n_scenarios) + drawn("valence_stripped", n_scenarios) + drawn("non_empathy", n_controls)
every = [text for group in groups for text in group]
alone = [group[:1] for group in groups]
n_tokens, n_nodes = sum(len(text.ids) for text in every), sum(len(activations.build_trie([text.ids for text in group]).tokens) for group in groups)
print(len(every), "texts of", len(groups), "prompts;", n_tokens, "tokens,", n_nodes, "of them different")

# %% [markdown]
# ## The sides
# As people do it: `run_with_cache` text by text; Hugging Face's `output_hidden_states` in padded batches; the same sorted by
# length and without logits. Ours, idea by idea: the trie, the shared opening, and a scenario a core.

# %%
def pooled_bridge(groups):
    wanted = [f"blocks.{layer}.hook_out" for layer in layers]
    found = []
    for text in (text for group in groups for text in group):
        _, cache = bridge.run_with_cache(torch.tensor([text.ids]), names_filter=wanted)
        found.append(np.stack([cache[name][0, text.start:].mean(0).numpy() for name in wanted]))
    return np.stack(found, axis=1)

@torch.inference_mode()
def pooled_batches(groups, *, by_length):
    """Padded on the right, where no token sees the padding."""
    own = [text for group in groups for text in group]
    order = sorted(range(len(own)), key=lambda i: len(own[i].ids)) if by_length else list(range(len(own)))
    out = np.empty((len(layers), len(own), params.model.d_model), np.float32)
    runner = model.get_decoder() if by_length else model
    for first in range(0, len(order), batch):
        part = order[first:first + batch]
        ids = torch.zeros(len(part), max(len(own[i].ids) for i in part), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, :len(own[i].ids)], mask[row, :len(own[i].ids)] = torch.tensor(own[i].ids), 1
        hidden = runner(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        for row, i in enumerate(part):
            out[:, i] = torch.stack([hidden[layer + 1][row, own[i].start:len(own[i].ids)].mean(0) for layer in layers]).numpy()
    return out

def pooled_trie(groups, *, header):
    first = activations.run_header(model, groups, layers) if header else None
    return np.concatenate([activations.pool(model, group, layers, header=first)[0] for group in groups], axis=1)

sides = {"run_with_cache": pooled_bridge, f"hidden states, batches of {batch}": lambda g: pooled_batches(g, by_length=False),
         "sorted, no logits": lambda g: pooled_batches(g, by_length=True), "trie": lambda g: pooled_trie(g, header=False),
         "trie, shared opening": lambda g: pooled_trie(g, header=True), "a scenario a core": lambda g: activations.extract(model, g, layers)[0]}
OURS, LOOP, PLAIN, SORTED = "a scenario a core", "run_with_cache", f"hidden states, batches of {batch}", "sorted, no logits"

# %%
def timed(groups, names):
    """Seconds {side: [alternation]} and each side's last result."""
    seconds, found = {name: [] for name in names}, {}
    for turn in range(n_alternations):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            found[name] = sides[name](groups)
            seconds[name].append(time.perf_counter() - start)
    return seconds, found

for make in sides.values():
    make(groups[:2])  # whatever is chosen on first use
seconds, found = timed(groups, list(sides))
median = {name: float(np.median(values)) for name, values in seconds.items()}
spread = {name: [float(min(values)), float(max(values))] for name, values in seconds.items()}

# %% [markdown]
# ## The same numbers
# The last block's output passes the final norm in Hugging Face's hidden states, so it is left out of that comparison. Sinks
# are left out of our means alone; where there is one in a reply, the two differ by design.

# %%
_, sinks = activations.extract(model, groups, layers)[:2]
clean = (sinks == 0)[:-1]
def largest_error(a, b):
    return float((np.linalg.norm(a[:-1] - b[:-1], axis=-1) / np.linalg.norm(b[:-1], axis=-1))[clean].max())

errors = {name: largest_error(found[OURS], other) for name, other in found.items() if name != OURS}
print(errors, "| texts with a sink:", int((sinks > 0).any(0).sum()))

# %% [markdown]
# ## How near the bare forward
# The same number of tokens through the blocks with nothing read out: one plain sequence as long as each trie.

# %%
@torch.inference_mode()
def bare(groups):
    for group in groups:
        n = len(activations.build_trie([text.ids for text in group]).tokens)
        model.get_decoder()(input_ids=torch.randint(1000, (1, n)), use_cache=False)

sides["bare forward"] = bare
rate, _ = timed(groups, ["bare forward", "trie", OURS])
nearness = {name: float(np.median(rate["bare forward"]) / np.median(rate[name])) for name in ("trie", OURS)}
print({name: f"{value:.0%} of the bare forward's rate" for name, value in nearness.items()})

# %% [markdown]
# ## Where nothing but the opening is shared
# One reply a scenario.

# %%
apart, _ = timed(alone, [PLAIN, SORTED, OURS])
distinct = {name: float(np.median(apart[name]) / np.median(apart[OURS])) for name in (PLAIN, SORTED)}
print(distinct)

# %% [markdown]
# ## What each idea brings, and what more texts and layers cost

# %%
growth = []
for share in (0.25, 0.5, 1.0):
    part = groups[::round(1 / share)]
    for name in (PLAIN, OURS):
        start = time.perf_counter()
        sides[name](part)
        growth.append({"side": name, "texts": sum(map(len, part)), "seconds": time.perf_counter() - start})
depth = []
for last in (len(layers) // 3, 2 * len(layers) // 3, len(layers)):
    start = time.perf_counter()
    activations.extract(model, groups[::4], layers[:last])
    depth.append({"layers": last, "seconds": time.perf_counter() - start})
growth, depth = pd.DataFrame(growth), pd.DataFrame(depth)

# %%
figure = make_subplots(1, 3, subplot_titles=("texts per second, of the first side's", "seconds by texts", "seconds by layers kept"), horizontal_spacing=0.09)
figure.add_bar(x=[median[LOOP] / median[name] for name in list(median)[::-1]], y=list(median)[::-1], orientation="h", marker_color="#0072B2", showlegend=False)
for name, rows in growth.groupby("side", sort=False):
    figure.add_scatter(x=rows.texts, y=rows.seconds, name=name, row=1, col=2)
figure.add_scatter(x=depth.layers, y=depth.seconds, showlegend=False, line_color="#0072B2", row=1, col=3)
styled(figure, "What does each idea bring?").show()

# %% [markdown]
# ## Summary

# %%
ratios = {name: median[name] / median[OURS] for name in (LOOP, PLAIN, SORTED)}
display(pd.DataFrame({"seconds (median)": median, "ours is faster by": ratios}).round(2))
assert max(errors.values()) < 1e-4
if write:
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "versions": versions()}
    write_atomic(ROOT / "docs" / "bench_extraction.json", to_json({
        "texts": len(every), "tokens": n_tokens, "nodes": n_nodes, "alternations": n_alternations, "seconds": median, "range": spread, "ratios": ratios,
        "distinct": distinct, "of_bare_forward": nearness, "errors": errors, "growth": growth.to_dict("records"), "depth": depth.to_dict("records"), "machine": machine}))
