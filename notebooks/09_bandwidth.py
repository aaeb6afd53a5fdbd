# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Bandwidth
# How many dimensions does empathy use, and how far can each be driven before the replies fall apart?
#
# Bandwidth is the effective dimension of the empathy effect times its coherent steering range. It is compared with
# formality, a style that every model knows, at the same number of texts.
#
# **Reads** `dataset/filtered`, `activations/`, the model. **Writes** `bandwidth/`. **Cost**: two to three minutes.

# %%
import numpy as np
import pandas as pd
from IPython.display import display

from lib.errors import BadInput
from lib.model import interventions, prompts, weights
from lib.report import figures
from lib.stats import bandwidth as bw
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_prompts: int = 6  # prompts steered at every dose
n_calibration: int = 20  # prompts answered unsteered, for the coherence band
coeffs: list = [-0.6, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6]  # steering doses, in residual norms
max_new_tokens: int = 24  # length of a steered reply, in tokens
seed: int = 0  # seed of the matched subset

# %%
home = Study(study, "09_bandwidth", n_prompts=n_prompts, n_calibration=n_calibration, coeffs=coeffs, max_new_tokens=max_new_tokens, seed=seed)
texts = home.load_texts()
layer, thresholds = home.params.layer, home.params.thresholds.bandwidth
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
print(resid.shape, "text, d_model at layer", layer)

# %% [markdown]
# ## Effective dimension
# For each scenario, the mean of the Cognitive and the Affective reply minus the mean of its valence-stripped replies; for
# formality, the formal minus the casual wording. The participation ratio is unbiased; `rank90` beside it grows with n.

# %%
plain = texts[texts.register == "plain"]
def mean_by_scenario(rows):
    return pd.DataFrame(resid[rows.index], index=rows.scenario_id).groupby(level=0).mean()

empathic = mean_by_scenario(plain[plain.label.isin(["cognitive", "affective"])])
neutral = mean_by_scenario(plain[plain.condition == "valence_stripped"])
shared = empathic.index.intersection(neutral.index)
effect = {"empathy": (empathic.loc[shared] - neutral.loc[shared]).to_numpy()}
effect["formality"] = (mean_by_scenario(plain[plain.label == "formal"]) - mean_by_scenario(plain[plain.label == "casual"])).to_numpy()
effect = {name: rows for name, rows in effect.items() if len(rows)}
print({name: len(rows) for name, rows in effect.items()})

# %%
def dimension_of(rows):
    try:
        return bw.effective_dimension(rows), ""
    except BadInput as error:
        return None, str(error)

n = min(map(len, effect.values()), default=0)
pick = np.random.default_rng(seed)
dimension = {name: dimension_of(rows[np.sort(pick.choice(len(rows), n, replace=False))]) for name, rows in effect.items()}
for name, (value, problem) in dimension.items():
    print(name, value or problem)

# %% [markdown]
# The five contexts, each with the scenarios it has.

# %%
context_of = plain.drop_duplicates("scenario_id").set_index("scenario_id").context
rows = []
for context, ids in pd.Series(shared, index=context_of.loc[shared].replace("", "unknown")).groupby(level=0):
    found, problem = dimension_of((empathic.loc[ids] - neutral.loc[ids]).to_numpy())
    low, high = found.interval if found else (None, None)
    rows.append({"context": context, "n": len(ids), "pr": found and found.pr, "ci_low": low, "ci_high": high, "rank90": found and found.rank90, "note": problem})
contexts = pd.DataFrame(rows, columns=["context", "n", "pr", "ci_low", "ci_high", "rank90", "note"])
display(contexts.round(2))

# %% [markdown]
# ## Coherent steering range
# Greedy replies at each dose, scored by the unsteered model. Coherent means inside the 95% band of unsteered replies and
# no more repetitive than they are.

# %%
model, tokenizer, about = weights.load(home.params.model)
ids = list(dict.fromkeys(plain[plain.condition == "empathy"].scenario_id))
def prompts_of(count):
    chosen = [ids[i * len(ids) // count] for i in range(min(count, len(ids)))]
    return [prompts.prompt_text(tokenizer, home.params.model.template, plain[plain.scenario_id == id_].scenario.iloc[0]) for id_ in chosen]

direction = {name: interventions.unit(rows.mean(0), name) for name, rows in effect.items()}

# %%
unused = np.ones(resid.shape[1])
replies, log_ppl = interventions.generate_steered(model, tokenizer, prompts_of(n_calibration), unused, [0.0], layer, max_new_tokens=max_new_tokens)
band = tuple(np.quantile(log_ppl[0], [0.025, 0.975]))
repeat_max = float(np.quantile([bw.repeated_4grams(reply) for reply in replies[0]], 0.975))
print(f"unsteered log-perplexity band [{band[0]:.2f}, {band[1]:.2f}], repeated 4-grams up to {repeat_max:.2f}")

# %%
sweep = {name: interventions.generate_steered(model, tokenizer, prompts_of(n_prompts), vector, coeffs, layer, max_new_tokens=max_new_tokens)
         for name, vector in direction.items()}
ranges, doses = {}, []
for name, (steered, ppl) in sweep.items():
    repeats = np.array([[bw.repeated_4grams(reply) for reply in at_dose] for at_dose in steered])
    good = bw.coherent(ppl, repeats, band, repeat_max)
    ranges[name] = bw.steering_range(np.array(coeffs), good, thresholds.coherent_share)
    doses += [{"direction": name, "coeff": c, "coherent": g.mean(), "log_ppl": p.mean(), "repeated_4grams": r.mean()} for c, g, p, r in zip(coeffs, good, ppl, repeats, strict=True)]
    print(name, ranges[name])

# %%
doses = pd.DataFrame(doses, columns=["direction", "coeff", "coherent", "log_ppl", "repeated_4grams"])
if len(doses):
    figures.dose_figure(doses, band, thresholds.coherent_share).show()

# %% [markdown]
# What a dose does, in words: the first prompt at the ends and the middle of the grid.

# %%
for name, (steered, _) in sweep.items():
    for at in (0, len(coeffs) // 2, len(coeffs) - 1):
        print(f"{name} {coeffs[at]:+.2f}: {steered[at][0]!r}")

# %% [markdown]
# ## Verdict

# %%
pair = [(dimension.get(name, (None,))[0], ranges.get(name)) for name in ("empathy", "formality")]
result = bw.bandwidth(*pair, thresholds=thresholds, model_id=home.params.model.model_id, layer=layer, seed=seed)
print(result)

# %% [markdown]
# ## Checks and save

# %%
assert 0.0 in coeffs and doses.coherent.between(0, 1).all()
home.save_results("bandwidth/metrics.json", [result], band=list(map(float, band)), repeat_max=repeat_max)
home.save_table("bandwidth/contexts.csv", contexts)
home.save_table("bandwidth/doses.csv", doses)
home.save_json("bandwidth/replies.json", {name: steered for name, (steered, _) in sweep.items()}, coeffs=coeffs)
home.save_tensors("bandwidth/directions.safetensors", {name: vector.astype("float32") for name, vector in direction.items()}, layer=layer)

# %% [markdown]
# ## Summary

# %%
print(f"literal {result.literal_verdict}, calibrated {result.verdict}: {result.reason}.")
