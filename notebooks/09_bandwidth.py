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
# formality, a style that every model knows, at the same number of texts, and between the contexts of the scenarios.
#
# **Reads** `dataset/filtered`, `activations/`, the model, and `sae/latents` where there are any. **Writes** `bandwidth/`.
# **Cost**: two minutes on two cores.

# %%
import numpy as np
import pandas as pd
from IPython.display import display

from lib.errors import BadInput
from lib.model import prompts, steering, weights
from lib.model.interventions import Edit, unit
from lib.report import figures
from lib.stats import bandwidth as bw
from lib.stats import contexts as cx
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_prompts: int = 3  # prompts a context steered at every dose
n_calibration: int = 15  # further prompts answered unsteered, for the coherence band
coeffs: list = [-0.6, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6]  # steering doses, in residual norms
max_new_tokens: int = 24  # length of a steered reply, in tokens
seed: int = 0  # seed of the matched subset

# %%
home = Study(study, "09_bandwidth", n_prompts=n_prompts, n_calibration=n_calibration, coeffs=coeffs, max_new_tokens=max_new_tokens, seed=seed)
texts = home.load_texts()
layer, thresholds, template = home.params.layer, home.params.thresholds.bandwidth, home.params.model.template
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
print(resid.shape, "text, d_model at layer", layer)

# %% [markdown]
# ## The method on planted data
# The same code where the truth is known.

# %%
validation = home.kept("validation", lambda: cx.validation(np.linspace(-0.6, 0.6, 25), thresholds.coherent_share, n=90, d_model=576, seed=seed),
                       coherent_share=thresholds.coherent_share)
display(validation.round(2))

# %% [markdown]
# ## Effective dimension
# For each scenario, the mean of the Cognitive and the Affective reply minus the mean of its valence-stripped replies; for
# formality, the formal minus the casual wording. The participation ratio is unbiased; `rank90` beside it grows with n,
# and parallel analysis counts the components that stand out from permuted data.

# %%
plain = texts[texts.register == "plain"]
def mean_by_scenario(rows, values=resid):
    return pd.DataFrame(values[rows.index], index=rows.scenario_id).groupby(level=0).mean()

def effects_of(values):
    warm, flat = mean_by_scenario(plain[plain.label.isin(["cognitive", "affective"])], values), mean_by_scenario(plain[plain.condition == "valence_stripped"], values)
    both = warm.index.intersection(flat.index)
    return warm.loc[both], flat.loc[both]

empathic, neutral = effects_of(resid)
effect = {"empathy": (empathic - neutral).to_numpy()}
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
matched = {name: rows[np.sort(pick.choice(len(rows), n, replace=False))] for name, rows in effect.items()}
dimension = {name: dimension_of(rows) for name, rows in matched.items()}
for name, (value, problem) in dimension.items():
    print(name, value or problem, "| parallel analysis:", cx.parallel_analysis(matched[name], seed=seed), "components")

# %% [markdown]
# ## Coherent steering range
# Greedy replies at each dose, to prompts of every context, scored by the unsteered model. Coherent means inside the 95%
# band of unsteered replies' log-perplexity ratios and no more repetitive than they are. The share that is coherent is made
# monotone in the dose, and the range ends where it falls below the preregistered share; at the grid's end it is censored.

# %%
model, tokenizer, about = weights.load(home.params.model)
context_of = plain[plain.condition == "empathy"].drop_duplicates("scenario_id").set_index("scenario_id").context.replace("", "unknown")
def spread(ids, count):
    return [ids[i * len(ids) // count] for i in range(min(count, len(ids)))]

def prompts_of(ids):
    said = plain.drop_duplicates("scenario_id").set_index("scenario_id").scenario
    return [prompts.prompt_text(tokenizer, template, said[id_]) for id_ in ids]

asked = [id_ for _, ids in context_of.groupby(context_of) for id_ in spread(list(ids.index), n_prompts)]
direction = {name: unit(rows.mean(0), name) for name, rows in effect.items()}

# %%
others, grid = [id_ for id_ in context_of.index if id_ not in asked], np.array(coeffs)
calibration = prompts_of(spread(others or asked, n_calibration))
def answer():
    scale = steering.mean_norm(model, tokenizer, calibration, layer)
    edits = {name: {layer: Edit(kind="add", directions=vector, coeffs=grid, scale=scale)} for name, vector in direction.items()}
    sweep = {name: steering.generate(model, tokenizer, prompts_of(asked), lambda start, own=own: own, max_new_tokens=max_new_tokens) for name, own in edits.items()}
    return scale, sweep, steering.generate(model, tokenizer, calibration, lambda start: {}, max_new_tokens=max_new_tokens)

scale, sweep, more = home.kept("replies", answer)
own = [made.rows([coeffs.index(0.0)]) for made in list(sweep.values())[:1]]  # dose 0: unsteered replies too
band, repeat_max, centre = bw.coherence(steering.joined([more, *own]))
print(f"unsteered log-perplexity ratios [{band[0]:+.2f}, {band[1]:+.2f}], repeated 4-grams up to {repeat_max:.2f}")

# %%
good = {name: bw.judged_coherent(made, band, repeat_max, centre) for name, made in sweep.items()}
ranges = {name: bw.steering_range(grid, found, thresholds.coherent_share) for name, found in good.items()}
doses = pd.concat([bw.dose_table(name, grid, made, band, repeat_max, centre) for name, made in sweep.items()], ignore_index=True)
if len(doses):
    figures.dose_figure(doses, band, thresholds.coherent_share).show()
print(ranges)

# %% [markdown]
# What a dose does, in words: the first prompt at the ends and the middle of the grid.

# %%
for name, made in sweep.items():
    for at in (0, len(coeffs) // 2, len(coeffs) - 1):
        print(f"{name} {coeffs[at]:+.2f}: {made.texts[at][0]!r}")

# %% [markdown]
# ## The contexts
# The same direction steered in each context's own prompts, and the context's own effective dimension.

# %%
def context_row(context, ids, prompts_at):
    shared = [id_ for id_ in ids if id_ in empathic.index]
    y = (empathic.loc[shared] - neutral.loc[shared]).to_numpy()
    found, problem = dimension_of(y)
    reach = bw.steering_range(grid, good["empathy"][:, prompts_at], thresholds.coherent_share) if "empathy" in good and len(prompts_at) else None
    low, high = found.interval if found else (None, None)
    return {"context": context, "n": len(shared), "pr": found and found.pr, "ci_low": low, "ci_high": high, "rank90": found and found.rank90,
            "parallel": cx.parallel_analysis(y, seed=seed) if len(y) > 2 else None, "range": reach and reach.total, "range_negative": reach and reach.negative,
            "range_positive": reach and reach.positive, **cx.log_bandwidth(found, reach), "note": problem}

everything = context_row("all contexts", list(context_of.index), np.arange(len(asked)))
rows = [context_row(context, list(ids.index), np.array([i for i, id_ in enumerate(asked) if context_of[id_] == context])) for context, ids in context_of.groupby(context_of)]
for row in rows:
    row["meaning"] = cx.meaning(row, everything)
    print(row["meaning"])
contexts = pd.DataFrame(rows, columns=[*everything, "meaning"])
display(contexts.drop(columns="meaning").round(2))

# %% [markdown]
# ## Transfer from crisis to technical
# The direction found in crisis support, put to technical scenarios: does it tell empathic from neutral replies there?
# Beside it, the technical scenarios' own direction, each scenario left out in turn.

# %%
def in_context(frame, context):
    return frame.loc[[id_ for id_ in frame.index if context_of[id_] == context]].to_numpy()

crisis, warm, flat = in_context(empathic - neutral, "crisis_support"), in_context(empathic, "technical_assistance"), in_context(neutral, "technical_assistance")
carried = cx.transfer(crisis, warm, flat) if min(len(crisis), len(warm)) > 2 else None
if carried:
    carried["cosine"] = float(unit(crisis.mean(0)) @ unit((warm - flat).mean(0)))
    carried["within"] = float(np.mean([(warm[i] - flat[i]) @ np.delete(warm - flat, i, 0).mean(0) > 0 for i in range(len(warm))]))
print("crisis → technical:", carried or "not measured: too few scenarios of these contexts")

# %% [markdown]
# ## Cross-check with the sparse autoencoder
# How many latents carry the effect (participation ratio of their mean squares), and how many differ in at least half of
# the scenarios: a second count of dimensions, in another basis.

# %%
latent_rows = []
if home.has("sae/latents.safetensors"):
    for seed_name, latents in home.load_tensors("sae/latents.safetensors").items():
        warm_z, flat_z = effects_of(latents)
        for context, ids in [("all contexts", context_of), *context_of.groupby(context_of)]:
            own = [id_ for id_ in ids.index if id_ in warm_z.index]
            effective, active = cx.active_latents((warm_z.loc[own] - flat_z.loc[own]).to_numpy())
            latent_rows.append({"sae": seed_name, "context": context, "n": len(own), "effective_latents": effective, "active_latents": active})
latents = pd.DataFrame(latent_rows, columns=["sae", "context", "n", "effective_latents", "active_latents"]).merge(
    pd.concat([pd.DataFrame([everything]), contexts])[["context", "pr"]], on="context", how="left")
display(latents.round(1) if len(latents) else "no SAE latents in this study: not measured")

# %% [markdown]
# ## Verdict

# %%
pair = [(dimension.get(name, (None,))[0], ranges.get(name)) for name in ("empathy", "formality")]
result = bw.bandwidth(*pair, thresholds=thresholds, model_id=home.params.model.model_id, layer=layer, seed=seed)
own_b = {name: cx.log_bandwidth(dimension[name][0], ranges[name]) for name in ranges}
print(result)
print({name: {k: v and round(v, 2) for k, v in found.items()} for name, found in own_b.items()})

# %% [markdown]
# ## Checks and save

# %%
assert 0.0 in coeffs and doses.coherent.between(0, 1).all()
home.save_results("bandwidth/metrics.json", [result], band=list(band), repeat_max=repeat_max, log_ppl_centre=centre, scale=scale, bandwidths=own_b,
                  transfer=carried, parallel={name: cx.parallel_analysis(y, seed=seed) for name, y in matched.items()})
home.save_table("bandwidth/contexts.csv", contexts)
home.save_table("bandwidth/doses.csv", doses)
home.save_table("bandwidth/latents.csv", latents)
home.save_table("bandwidth/validation.csv", validation)
home.save_json("bandwidth/replies.json", {name: made.texts for name, made in sweep.items()}, coeffs=coeffs)
home.save_tensors("bandwidth/directions.safetensors", {name: vector.astype("float32") for name, vector in direction.items()}, layer=layer, scale=scale)

# %% [markdown]
# ## Summary

# %%
print(f"literal {result.literal_verdict}, calibrated {result.verdict}: {result.reason}.")
