# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark · Interventions, many at once against one by one
# What does it save to run doses and directions as rows of one batch, with the prompt computed once up to the layer?
#
# Both sides run in the same process on the same prompts and doses, in alternating order, and their outputs are compared:
# token by token for generation, log-probability by log-probability for scoring. One by one means
# `TransformerBridge.generate` and `run_with_hooks`, as people do it. Times are of the process's own CPU, beside the wall clock,
# so that a busy machine does not decide.
#
# **Reads** the model. **Writes** `docs/bench_interventions.json`. **Cost**: ten minutes on two cores.

# %%
import copy
import os
import time

import numpy as np
import pandas as pd
import torch
from IPython.display import display
from transformer_lens.model_bridge import TransformerBridge

from lib.model import interventions, prompts, steering, weights
from lib.model.interventions import Edit, unit
from lib.params import ROOT, load_params
from lib.store import to_json, versions, write_atomic

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study whose model is used
n_doses: int = 25  # steering doses
n_prompts: int = 8  # prompts steered at every dose
max_new_tokens: int = 24  # length of a reply, in tokens
n_alone: int = 200  # of all doses × prompts, how many are also run one by one, evenly spread
n_rows: int = 25  # doses and random directions of the teacher-forced sweep, each
n_rows_alone: int = 50  # of these rows, how many are also run one by one
seed: int = 0  # seed of the direction
write: bool = True  # write docs/bench_interventions.json

# %%
params = load_params(study)
model, tokenizer, about = weights.load(params.model)
bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
layer, d_model = params.layer, params.model.d_model
scenarios = ("I lost my keys again this morning.", "My sister got the job she wanted!", "The printer at work keeps jamming.", "I have not slept well for weeks.",
             "We are moving to another town in May.", "My soup turned out far too salty.", "My friend does not answer my messages.", "I finally finished the book.")[:n_prompts]
asked = [prompts.prompt_text(tokenizer, params.model.template, text) for text in scenarios]
direction, doses = unit(np.random.default_rng(seed).standard_normal(d_model)), np.linspace(-0.6, 0.6, n_doses)
scale = steering.mean_norm(model, tokenizer, asked, layer)
w = torch.tensor(direction * scale, dtype=model.dtype)
print(os.cpu_count(), "cores;", torch.get_num_threads(), "threads; load before the start:", round(os.getloadavg()[0], 1))

# %%
def clocked(run):
    """`(output, CPU seconds, wall seconds)`."""
    cpu, wall = time.process_time(), time.perf_counter()
    output = run()
    return output, time.process_time() - cpu, time.perf_counter() - wall

# %% [markdown]
# ## Greedy replies
# All doses of a prompt at once, against one `bridge.generate` a dose with a hook at the same place.

# %%
def batched():
    edits = {layer: Edit(kind="add", directions=direction, coeffs=doses, scale=scale)}
    ids = [steering.prompt_ids(model, tokenizer, prompt, max_new_tokens=max_new_tokens) for prompt in asked]
    return steering.greedy(model, tokenizer, ids, lambda start: edits, max_new_tokens=max_new_tokens)

@torch.inference_mode()
def alone(prompt, dose):
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_out", lambda value, hook: value + dose * w)]):
        out = bridge.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, verbose=False, return_type="tokens")
    return out[0, ids.shape[1]:].tolist()

jobs = [(p, d) for p in range(len(asked)) for d in range(n_doses)]
some = [jobs[i * len(jobs) // n_alone] for i in range(min(n_alone, len(jobs)))]
alone(asked[0], 0.0), steering.greedy(model, tokenizer, [[1, 2, 3]], lambda start: {}, max_new_tokens=2)  # warm

# %%
ours, ours_cpu, ours_wall = clocked(batched)
theirs, theirs_cpu, theirs_wall = clocked(lambda: [alone(asked[p], float(doses[d])) for p, d in some])

# %% [markdown]
# Where the replies part, the two best logits must be within 1e-4 of each other: a tie that rounding decides.

# %%
def gap_at(prompt, dose, reply, at):
    ids = steering.prompt_ids(model, tokenizer, prompt, max_new_tokens=1) + reply[:at]
    logits = next(steering.stream(model, ids, {layer: Edit(kind="add", directions=direction, coeffs=dose, scale=scale)}, max_new_tokens=1))[0]
    best = logits.topk(2).values
    return float(best[0] - best[1])

differences = []
for (p, d), other in zip(some, theirs, strict=True):
    own = ours[p][d]
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
    if at is not None:
        differences.append(gap_at(asked[p], doses[d], own, at))
ties, wrong = sum(gap <= 1e-4 for gap in differences), sum(gap > 1e-4 for gap in differences)
factor = len(jobs) / len(some)
generation = {"task": f"{n_doses} doses × {n_prompts} prompts, greedy, {max_new_tokens} tokens", "ours_cpu_s": ours_cpu, "ours_wall_s": ours_wall,
              "one_by_one_cpu_s": theirs_cpu * factor, "one_by_one_wall_s": theirs_wall * factor, "run_one_by_one": len(some), "of": len(jobs),
              "ratio_cpu": theirs_cpu * factor / ours_cpu, "ratio_wall": theirs_wall * factor / ours_wall, "ties": ties, "different": wrong}
print(generation)

# %% [markdown]
# ## Teacher-forced sweep
# Doses and random directions as rows, replies of a prompt as one token trie, against a forward a row and reply.

# %%
replies = ("You wanted to be on time, and now the whole morning feels lost.", "Oh, that is a miserable start; I feel it with you.", "Ring the desk at nine and ask for a form.")
encoded = [prompts.encode(tokenizer, params.model.template, scenarios[0], reply) for reply in replies]
stack = np.vstack([np.tile(direction, (n_rows, 1)), unit(np.random.default_rng(seed + 1).standard_normal((n_rows, d_model)))])
strength = np.r_[np.linspace(-0.6, 0.6, n_rows), np.full(n_rows, 0.2)]
sweep = {layer: Edit(kind="add", directions=stack, coeffs=strength, scale=scale)}

@torch.inference_mode()
def forward_of(row, text):
    change = torch.tensor(stack[row] * strength[row] * scale, dtype=model.dtype)
    logits = bridge.run_with_hooks(torch.tensor([text.ids]), fwd_hooks=[(f"blocks.{layer}.hook_out", lambda value, hook: value + change)])[0]
    logp = logits[text.start - 1:-1].log_softmax(-1)
    return logp.gather(1, torch.tensor(text.ids[text.start:])[:, None]).mean().item()

rows = [i * len(stack) // n_rows_alone for i in range(min(n_rows_alone, len(stack)))]
scores, sweep_cpu, sweep_wall = clocked(lambda: interventions.score_rows(model, encoded, sweep))
separate, separate_cpu, separate_wall = clocked(lambda: np.array([[forward_of(row, text) for text in encoded] for row in rows]))

# %%
factor = len(stack) / len(rows)
teacher = {"task": f"{len(stack)} rows × {len(encoded)} replies, teacher-forced", "ours_cpu_s": sweep_cpu, "ours_wall_s": sweep_wall,
           "one_by_one_cpu_s": separate_cpu * factor, "one_by_one_wall_s": separate_wall * factor, "run_one_by_one": len(rows), "of": len(stack),
           "ratio_cpu": separate_cpu * factor / sweep_cpu, "ratio_wall": separate_wall * factor / sweep_wall,
           "largest_difference": float(abs(scores[rows] - separate).max())}
print(teacher)

# %% [markdown]
# ## Summary

# %%
display(pd.DataFrame([generation, teacher]).round(3))
assert wrong == 0 and teacher["largest_difference"] < 1e-4
if write:
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "versions": versions()}
    write_atomic(ROOT / "docs" / "bench_interventions.json", to_json({"generation": generation, "teacher_forced": teacher, "machine": machine}))
