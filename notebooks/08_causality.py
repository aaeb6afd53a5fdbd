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
# First the direction is removed from the representation of the *prompt* only; the reply's own words keep theirs, so an
# effect has to travel through what the model understood of the person. Then it is removed everywhere, and what it takes
# away is set against how much of the reply lies along it. Directions are fitted on one half of the scenario clusters in
# one register and tested on the other half in the other register, both ways; random directions of equal energy are the null.
#
# **Reads** `dataset/filtered`, `activations/`, the model. **Writes** `causality/`. **Cost**: three minutes on two cores;
# judging free replies (off by default) costs what `max_usd` allows.

# %%
import numpy as np
import pandas as pd
from IPython.display import display

from lib.model import export, prompts, steering, sweeps, weights
from lib.model.interventions import Edit, unit
from lib.model.replicas import each
from lib.report import figures
from lib.stats import bandwidth as bw
from lib.stats import directions as dirs
from lib.stats.causality import Judged, causality, effect, monitoring, selectivity
from lib.stats.response import slope_test
from lib.store import Study

# %% tags=["parameters"]
study: str = "smollm2-135m"  # name of the study: a file in params/
n_scenarios: int = 8  # test scenarios, spread over contexts and registers; the power this leaves is in the result
n_random: int = 199  # random directions of equal energy, by first-order response
n_verified: int = 2  # of these, the most extreme ones a direction that are also run exactly
n_prompts: int = 5  # prompts answered at every dose; five are the fewest at which one incoherent reply leaves the needed share
coeffs: list = [-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2]  # steering doses, in residual norms
max_new_tokens: int = 24  # length of a free reply, in tokens
judge: bool = False  # have free replies judged; needs ANTHROPIC_API_KEY in the environment
n_judged: int = 30  # scenarios whose free replies are judged
judge_model: str = "claude-haiku-4-5"  # rates pairs of replies blind, in both orders
prices: list = [1.0, 5.0]  # USD per million input and output tokens of the judge
max_usd: float = 5.0  # limit of spending, over all runs of this study together, generation included
batches: bool = True  # half price, within a day; False asks one by one
seed: int = 0  # seed of halves and random directions

# %%
home = Study(study, "08_causality", n_scenarios=n_scenarios, n_random=n_random, n_verified=n_verified, coeffs=coeffs, n_prompts=n_prompts,
             max_new_tokens=max_new_tokens, judged_by=judge_model if judge else "", seed=seed)
params, thresholds = home.params, home.params.thresholds
texts, layer, template = home.load_texts(), params.layer, params.model.template
resid = home.load_tensors("activations/resid_post.safetensors")["resid_post"][layer]
print(resid.shape, "text, d_model at layer", layer)

# %% [markdown]
# ## Directions
# Cross-fitted. The cosine between halves says how well a direction is known from this many texts.

# %%
own = texts[texts.condition.isin(["empathy", "formality"])]
fitted = dirs.fit(resid[own.index], own, seed=seed)
empathy = texts[texts.condition == "empathy"]
mean, agreement = resid[empathy.index].mean(0), fitted.agreement()
print("cosine between the two halves' directions:", {name: round(value, 2) for name, value in agreement.items()})

# %% [markdown]
# ## Test scenarios
# Spread over the contexts; the registers take turns, so that each is tested with directions from the other.

# %%
model, tokenizer, about = weights.load(params.model)
types = ("cognitive", "affective", "instrumental")
ids, registers = list(dict.fromkeys(empathy.scenario_id)), list(dict.fromkeys(empathy.register))
chosen = [ids[i * len(ids) // n_scenarios] for i in range(min(n_scenarios, len(ids)))]
def rows_of(id_, register):
    return empathy[(empathy.scenario_id == id_) & (empathy.register == register)]

places = [(id_, registers[i % len(registers)]) for i, id_ in enumerate(chosen)]
cases = [sweeps.case_of(tokenizer, template, rows if len(rows := rows_of(*place)) else rows_of(place[0], "plain"), types) for place in places]
random = unit(np.random.default_rng(seed).standard_normal((n_random, resid.shape[1])))

# %% [markdown]
# ## First-order responses
# One backward pass a reply gives the effect of any small edit, so all random directions are scored on every test
# scenario. D is the change of the empathic reply's log-probability per token minus that of the reply it is set against.

# %%
style = {"cognitive": (0, 2), "affective": (1, 2), "cognitive-affective": (0, 1)}
def direction(name, case):
    return fitted.of(name, case.scenario_id, case.register)

def first_order(model, case):
    stacks = {name: np.vstack([direction(name, case), random]) for name in style}
    return sweeps.responses(model, case, layer, stacks, mean=mean)

def contrast(values, name):
    return values[..., style[name][0]] - values[..., style[name][1]]

linear = home.kept("first_order", lambda: each(model, first_order, cases, desc="first order"))
d_prompt = {name: np.stack([contrast(found[name][0].change, name) for found in linear]) for name in style}
d_all = {name: np.stack([contrast(found[name][1].change, name) for found in linear]) for name in style}
gap = {name: np.stack([contrast(found[name][1].gap, name) for found in linear]) for name in style}

# %% [markdown]
# ## Exact interventions
# The directions themselves, and those random ones that come nearest to beating them, are run through the model; exact
# values replace first-order ones. The last lines say how far the two differ.

# %%
extreme = {name: np.argsort(values[:, 1:].mean(0))[:n_verified] for name, values in d_prompt.items()}
def exact(model, case):
    groups = [np.vstack([direction(name, case), random[extreme[name]]]) for name in style] + [direction("instrumental", case)[None]]
    everywhere = [direction(name, case)[None] for name in style]
    return (sweeps.ablated(model, case, layer, groups, mean=mean, where="prompt"),
            sweeps.ablated(model, case, layer, everywhere, mean=mean, where="all"))

runs = home.kept("exact", lambda: each(model, exact, cases, desc="exact"))

# %%
effects, slopes, errors = {}, {}, {}
for i, name in enumerate(style):
    found = np.stack([contrast(prompt[i], name) for prompt, _ in runs])
    null = d_prompt[name][:, 1:].mean(0)
    guess = np.r_[d_prompt[name][:, 0].mean(), null[extreme[name]]]
    errors[name] = float(abs(found.mean(0) - guess).max() / (null.std() or 1))
    null[extreme[name]] = found[:, 1:].mean(0)
    effects[name] = effect(found[:, 0], null)
    everywhere = np.stack([contrast(every[i], name)[0] for _, every in runs])
    slopes[name] = slope_test(np.column_stack([everywhere, d_all[name][:, 1:]]), gap[name])
print("largest error of the first order, in standard deviations of the random directions:", {k: round(v, 2) for k, v in errors.items()})
display(pd.DataFrame({name: {"slope": s.value, "ci_low": s.ci_low, "ci_high": s.ci_high, "p": s.p, "controls' mean": s.controls.mean()} for name, s in slopes.items()}).T.round(4))

# %% [markdown]
# ## What a dose does
# Free replies under steering at all positions, scored by the unsteered model. Coherent means inside the 95% band of
# unsteered replies' log-perplexity ratios and no more repetitive than they are; outside, an effect does not count.

# %%
def prompts_of(count):
    some = [ids[i * len(ids) // count] for i in range(min(count, len(ids)))]
    return [prompts.prompt_text(tokenizer, template, empathy[empathy.scenario_id == id_].scenario.iloc[0]) for id_ in some]

def generate(asked, edits=lambda start: {}):
    return steering.generate(model, tokenizer, asked, edits, max_new_tokens=max_new_tokens)

def removed(name):
    return lambda start: {layer: Edit(kind="ablate", directions=fitted.mean(name), mean=mean)}

def answer():
    scale = steering.mean_norm(model, tokenizer, prompts_of(8), layer)
    return {"scale": scale, "unsteered": generate(prompts_of(10)),
            "ablated": {name: generate(prompts_of(n_prompts), removed(name)).texts[0] for name in ("cognitive", "affective")},
            "steered": {name: generate(prompts_of(n_prompts), lambda start, name=name: {layer: Edit(kind="add", directions=fitted.mean(name), coeffs=grid, scale=scale)})
                        for name in ("cognitive", "affective", "formality") if name in fitted.names}}

grid = np.array(coeffs)
replies = home.kept("replies", answer)
scale, sweep, ablations = replies["scale"], replies["steered"], replies["ablated"]
unsteered = [replies["unsteered"], *(made.rows([coeffs.index(0.0)]) for made in list(sweep.values())[:1] if 0.0 in coeffs)]
band, repeat_max, centre = bw.coherence(steering.joined(unsteered))
doses = pd.concat([bw.dose_table(name, grid, made, band, repeat_max, centre) for name, made in sweep.items()], ignore_index=True)
figures.dose_figure(doses, band, params.thresholds.bandwidth.coherent_share).show()

# %% [markdown]
# In words: the same prompt at each dose, and with the direction ablated.

# %%
pd.set_option("display.max_colwidth", 400)
display(pd.DataFrame({name: [f"{'' if ok else '(incoherent) '}{replies[0]}" for replies, ok in zip(made.texts, doses[doses.direction == name].coherent > 0.5, strict=True)] + ([ablations[name][0]] if name in ablations else ["–"])
                      for name, made in sweep.items()}, index=[f"{c:+.2f}" for c in grid] + ["ablated"]))

# %% [markdown]
# ## Selectivity
# Rows: ablating each direction in the prompt, adding it everywhere at the largest dose that stays coherent, and asking
# for the style in words. Columns: the change of log-probability per token of each type's reply. A selective edit moves
# its own type; the last column is what the edit costs on neutral replies, in cross-entropy.

# %%
dose = bw.largest_coherent(doses, ["cognitive", "affective"], params.thresholds.bandwidth.coherent_share)
words = {"cognitive": "Show that you understand how they see it and why.", "affective": "Answer with warmth; share the feeling.",
         "instrumental": "Give practical help: say what to do."}
def steered_rows(model, case):
    return sweeps.steered(model, case, layer, np.stack([direction(name, case) for name in types]), np.full(3, dose), scale=scale)

def told(model, case):
    """What asking in words changes, and the scores without."""
    base = sweeps.score(model, case)
    return np.stack([sweeps.score(model, sweeps.told(tokenizer, template, case, words[name])) - base for name in types]), base

ablation = np.stack([np.stack([prompt[0][0], prompt[1][0], prompt[3][0]]) for prompt, _ in runs])
moved = {"ablate": ablation, "steer": home.kept("steer", lambda: np.stack(each(model, steered_rows, cases, desc="steering")), dose=dose),
         "ask": home.kept("ask", lambda: np.stack([asked for asked, _ in each(model, told, cases, desc="asking in words")]))}

# %%
neutral = texts[(texts.condition == "valence_stripped") & (texts.register == "plain")]
flat = [sweeps.case_of(tokenizer, template, rows, ("factual",)) for case in cases if len(rows := neutral[neutral.scenario_id == case.scenario_id])]
def neutral_costs(model, case):
    stack, (asked, base) = np.stack([direction(name, case) for name in types]), told(model, case)
    return np.concatenate([-np.concatenate(sweeps.ablated(model, case, layer, [row[None] for row in stack], mean=mean, where="prompt")),
                           -sweeps.steered(model, case, layer, stack, np.full(3, dose), scale=scale),
                           -asked, -base[None]])[:, 0]

price = home.kept("costs", lambda: np.stack(each(model, neutral_costs, flat, desc="neutral replies")), dose=dose) if flat else np.full((1, 10), np.inf)
cost, cost_band = float(price[:, :2].mean(0).max()), float(2 * price[:, 9].std(ddof=1)) if len(flat) > 1 else 0.0
matrix = pd.concat([pd.DataFrame(moved[kind].mean(0), columns=list(types)).assign(edit=[f"{kind} {name}" for name in types])
                    .join(selectivity(moved[kind])).assign(cost=price[:, 3 * k:3 * k + 3].mean(0)) for k, kind in enumerate(moved)], ignore_index=True).set_index("edit")
display(matrix.round(4))
figures.matrix_figure(matrix[list(types)].to_numpy(), list(matrix.index), list(types), "Change of log-probability per token: does an edit move its own type?").show()

# %% [markdown]
# ## Positive control
# Formality, a style that every model knows, added in the prompt only, plus and minus the same dose. If that does not move
# formal against casual wordings, the method's sensitivity is not shown on this model.

# %%
pairs, positive = texts[texts.condition == "formality"], {"shown": False, "reason": "there are no formality pairs"}
if "formality" in fitted.names:
    names = list(dict.fromkeys(pairs.scenario_id))
    some = [sweeps.case_of(tokenizer, template, pairs[pairs.scenario_id == names[i * len(names) // n_scenarios]], ("formal", "casual")) for i in range(min(n_scenarios, len(names)))]
    reach = bw.largest_coherent(doses, ["formality"], params.thresholds.bandwidth.coherent_share)
    signs = reach * np.array([1, -1])
    def pushed(model, case):
        return sweeps.steered(model, case, layer, np.stack([direction("formality", case)] * 2 + [random[0]] * 2), np.tile(signs, 2), scale=scale, where="prompt")
    d = home.kept("positive_control", lambda: np.stack(each(model, pushed, some, desc="positive control")), reach=reach)
    moves = (d[..., 0] - d[..., 1]) @ np.kron(np.eye(2), [[1], [-1]]) / 2  # [pair, (formality, random)]
    up = effect(-moves[:, 0], -moves[:, 1:].mean(0))
    positive = {"shown": bool(-up.ci_high > 0 and reach > 0), "D": -up.mean, "ci_low": -up.ci_high, "ci_high": -up.ci_low, "random": float(moves[:, 1].mean()), "coeff": float(reach), "n": len(some)}
print("positive control:", positive, "" if positive["shown"] else "| the method's sensitivity was not shown on this model")

# %% [markdown]
# ## Free replies, judged
# Unsteered against ablated, each pair in both orders, by a model that knows neither. Also how well the prompt's projection
# foretells the judged style. Off unless `judge` is set.

# %%
def prompt_projection(name, asked):
    return np.array([float((steering.prompt_resid(model, tokenizer, [one], layer) - mean).mean(0) @ fitted.mean(name)) for one in asked])

judged, controls = None, {}
if judge:
    from lib.text import judge as judging  # the API's library takes seconds to import, and few runs need it
    some = [ids[i * len(ids) // n_judged] for i in range(min(n_judged, len(ids)))]
    said, asked = [empathy[empathy.scenario_id == id_].scenario.iloc[0] for id_ in some], prompts_of(n_judged)
    plain, without = generate(asked).texts[0], {name: generate(asked, removed(name)).texts[0] for name in ("cognitive", "affective")}
    ratings, stopped = judging.rate(home.root, [(s, a, b) for name in without for s, a, b in zip(said, plain, without[name], strict=True)],
                                    model=judge_model, prices={judge_model: tuple(prices)}, max_usd=max_usd, batches=batches)
    change = (ratings[:, 1] - ratings[:, 0]).reshape(2, len(said), -1)
    kept = np.isfinite(change).all((0, 2))
    own = (change[0, kept, 0] + change[1, kept, 1]) / 2
    judged = Judged.of(own)
    controls = {"d_z": judged.d_z, "n": judged.n, "stopped": stopped, **{scale_name: float(change[:, kept, k].mean()) for k, scale_name in enumerate(judging.SCALES)},
                "monitoring": {name: monitoring(prompt_projection(name, asked)[kept], ratings[:len(said), 0, k][kept]) for k, name in enumerate(("cognitive", "affective"))}}
print("judge:", controls or "not measured; free replies and the monitoring correlation need a judge")

# %%
result, table = causality(effects, thresholds=thresholds.causality, model_id=params.model.model_id, layer=layer, seed=seed,
                          cost=cost, cost_band=cost_band, n_clusters=empathy.cluster.nunique(), slopes=slopes, judged=judged)
print(result)
figures.causality_figure(table).show()
display(table.round(4))

# %% [markdown]
# ## Checks and save
# Directions leave the house as safetensors with a card, and as control vectors that llama.cpp and repeng load.

# %%
assert all(np.isfinite(values).all() for values in [*d_prompt.values(), *d_all.values(), *moved.values()])
home.save_results("causality/metrics.json", [result], cost=cost if np.isfinite(cost) else None, cost_band=cost_band, agreement=agreement, first_order_error=errors,
                  slopes={name: {"slope": s.value, "ci_low": s.ci_low, "ci_high": s.ci_high, "p": s.p} for name, s in slopes.items()},
                  positive_control=positive, judge=controls, dose=float(dose), band=list(band))
home.save_table("causality/effects.csv", table)
home.save_table("causality/doses.csv", doses)
home.save_table("causality/selectivity.csv", matrix.reset_index())
home.save_json("causality/selectivity.json", {"rows": list(matrix.index), "columns": list(types), "values": matrix[list(types)].to_numpy()})
home.save_json("causality/replies.json", {"coeffs": coeffs, "steered": {name: made.texts for name, made in sweep.items()}, "ablated": ablations})
home.save_tensors("causality/scores.safetensors", {f"{kind}/{name}": v.astype("float32") for kind, group in (("prompt", d_prompt), ("all", d_all), ("gap", gap)) for name, v in group.items()})

# %%
vectors = {f"{name}/{register}/{half}": vector.astype("float32") for (name, register, half), vector in fitted.vectors.items()}
home.save_tensors("causality/directions.safetensors", vectors, layer=layer, hook_name=f"blocks.{layer}.hook_out", norm=1.0, scale=scale)
for name in fitted.names:
    home.save(f"causality/{name}.gguf", export.control_vector({layer: fitted.mean(name)}, scale=scale, model_type=model.config.model_type, n_layers=params.model.n_layers), layer=layer, norm=scale)
home.save("causality/README.md", export.card(model_id=params.model.model_id, weights_sha256=about["weights_sha256"], layer=layer, d_model=params.model.d_model, scale=scale,
                                             n_scenarios=len(ids), names={name: dirs.MEANING[name] for name in fitted.names}, agreement=agreement, license=params.model.license).encode())

# %% [markdown]
# ## Summary

# %%
print(f"literal {result.literal_verdict}, calibrated {result.verdict}: {result.reason}. {result.power}.")
