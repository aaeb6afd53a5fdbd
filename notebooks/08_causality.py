# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Causality
# Does ablating a direction make the model's empathic replies less likely?
#
# The direction is removed from the representation of the *prompt* only; the reply's own words keep theirs, so an effect
# has to travel through what the model understood of the person. Directions are fitted on one half of the scenario
# clusters in one register and tested on the other half; random directions that disturb with equal energy are the null.
#
# **Reads** `dataset/filtered`, `activations/`, the model. **Writes** `causality/`. **Cost**: two to three minutes.

# %%
import numpy as np
import torch
from IPython.display import display
from tqdm.auto import tqdm

from lib.model import interventions, prompts, weights
from lib.report import figures
from lib.stats.causality import causality, effect, split_halves, style_change
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_scenarios: int = 8  # test scenarios, spread over the contexts
n_random: int = 99  # random directions of equal energy
seed: int = 0  # seed of halves, scenarios and random directions

# %%
home = Study(study, "08_causality", n_scenarios=n_scenarios, n_random=n_random, seed=seed)
texts = home.load_texts()
layer = home.params.layer
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
print(resid.shape, "text, d_model at layer", layer)

# %% [markdown]
# ## Directions
# Mean differences to the instrumental replies, in the counter register where there is one; tests are in the plain one.

# %%
empathy = texts[texts.condition == "empathy"]
register = "counter" if (empathy.register == "counter").any() else "plain"
n_clusters = empathy.cluster.nunique()
together = empathy.cluster if n_clusters > 1 else empathy.scenario_id  # one cluster has no halves; then no verdict is given
half = dict(zip(empathy.scenario_id, split_halves(together.to_numpy(), seed), strict=True))
types = ("cognitive", "affective", "instrumental")

def class_means(test_half):
    rows = empathy[(empathy.register == register) & (empathy.scenario_id.map(half) != test_half)]
    return {kind: resid[rows.index[rows.label == kind]].mean(0) for kind in types}

# %%
def directions(test_half):
    means = class_means(test_half)
    c, a = means["cognitive"] - means["instrumental"], means["affective"] - means["instrumental"]
    return {"cognitive": interventions.unit(c), "affective": interventions.unit(a), "cognitive-affective": interventions.unit(c - a)}

fitted = {test: directions(test) for test in (0, 1)}
agreement = {name: float(fitted[0][name] @ fitted[1][name]) for name in fitted[0]}
print("cosine between the two halves' directions:", {name: round(value, 2) for name, value in agreement.items()})

# %% [markdown]
# ## Scores under ablation
# Row 0 of each batch is untouched, row 1 the direction, the others are random directions drawn from a normal law.

# %%
model, tokenizer, about = weights.load(home.params.model)
ids = list(dict.fromkeys(empathy.scenario_id))
chosen = [ids[i * len(ids) // n_scenarios] for i in range(min(n_scenarios, len(ids)))]
random = np.random.default_rng(seed).standard_normal((n_random, resid.shape[1]))
random /= np.linalg.norm(random, axis=1, keepdims=True)
mean = torch.as_tensor(resid[empathy.index].mean(0), dtype=model.dtype, device=model.device)

# %%
def scores_of(rows, ordered, name, test_half):
    encoded = [prompts.encode(tokenizer, home.params.model.template, rows.scenario.iloc[0], rows.response[rows.label == kind].iloc[0]) for kind in ordered]
    stack = torch.as_tensor(np.vstack([fitted[test_half][name], random]), dtype=model.dtype, device=model.device)
    return interventions.score_rows(model, encoded, layer, lambda nodes: interventions.ablation_rows(stack, mean, nodes))

plain = empathy[empathy.register == "plain"]
scores = {name: np.stack([scores_of(plain[plain.scenario_id == id_], types, name, half[id_]) for id_ in tqdm(chosen, desc=name)])
          for name in fitted[0]}

# %% [markdown]
# D is the change of the empathic reply's log-probability per token minus that of the instrumental one. Below zero: the
# ablation takes empathy away. The selectivity matrix scores all three types under each ablation.

# %%
style = {"cognitive": 0, "affective": 1, "cognitive-affective": 0}
against = {"cognitive": 2, "affective": 2, "cognitive-affective": 1}
effects = {name: effect(np.stack([style_change(s, style[name], against[name]) for s in values])) for name, values in scores.items()}
selectivity = np.stack([(values[:, 1] - values[:, 0]).mean(0) for values in scores.values()])
figures.matrix_figure(selectivity, list(scores), list(types), "Change of log-probability per token under ablation").show()

# %% [markdown]
# ## Coherence
# What the same ablation costs on neutral replies to the same situations, against how much their cross-entropy varies
# from text to text. An effect that comes with incoherence does not count.

# %%
neutral = texts[(texts.condition == "valence_stripped") & (texts.register == "plain")]
best = min(effects, key=lambda name: effects[name].p)
with_neutral = [id_ for id_ in chosen if (neutral.scenario_id == id_).any()]
costs = np.stack([scores_of(neutral[neutral.scenario_id == id_], ("factual", "informational", "procedural"), best, half[id_])[:2] for id_ in with_neutral]) \
    if with_neutral else np.zeros((0, 2, 3))
cost = float((costs[:, 0] - costs[:, 1]).mean()) if len(costs) else float("inf")
band = float(2 * costs[:, 0].mean(1).std(ddof=1)) if len(costs) > 1 else 0.0
print(f"cross-entropy on neutral replies rises by {cost:.4f} nats per token; unsteered variation ±{band:.3f}")

# %%
result, table = causality(effects, thresholds=home.params.thresholds.causality, model_id=home.params.model.model_id,
                          layer=layer, seed=seed, n_clusters=n_clusters, cost=cost, cost_band=band)
print(result)
figures.causality_figure(table).show()
display(table.round(4))

# %% [markdown]
# ## Checks and save
# Ablating along a direction in which nothing varies must change nothing.

# %%
assert all(np.isfinite(values).all() for values in scores.values())
flat = interventions.score_rows(model, [prompts.encode(tokenizer, home.params.model.template, plain.scenario.iloc[0], plain.response.iloc[0])], layer,
                                lambda nodes: lambda hidden: torch.cat([hidden, hidden - 0 * hidden]))
assert abs(flat[0] - flat[1]).max() < 1e-5

# %%
home.save_results("causality/metrics.json", [result], cost=cost if np.isfinite(cost) else None, cost_band=band, agreement=agreement)
home.save_table("causality/effects.csv", table)
home.save_tensors("causality/scores.safetensors", {name: values.astype("float32") for name, values in scores.items()})
home.save_json("causality/selectivity.json", {"rows": list(scores), "columns": list(types), "values": selectivity})
home.save_tensors("causality/directions.safetensors", {f"{name}/{test}": value.astype("float32") for test in (0, 1) for name, value in fitted[test].items()}, layer=layer)

# %% [markdown]
# ## Summary

# %%
print(f"literal {result.literal_verdict}, calibrated {result.verdict}: {result.reason}. {result.power}.")
