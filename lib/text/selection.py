"""Keep the best: a subset of the accepted scenarios that words tell apart least, under a quota for every stratum.

Backward elimination: in each round the scenarios that the quick lexical family sorts best are dropped, each stratum down
to its quota, domains above their limit first. The result is compared with draws that ignore leakage. It is chosen by the
score it is judged by, so the figure after is fitted to these classifiers; the audit of later texts is not.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.stats.contrasts import Design
from lib.text.meter import best, design_of, measure, scores, usable

ROUNDS = 4
DRAWS = 2
MAX_DOMAIN = 0.10  # share of the kept scenarios that one domain may have


def quotas(contexts: Sequence[str], n_keep: int) -> dict[str, int]:
    """Equal shares of `n_keep` for the contexts, the first ones taking what does not divide."""
    names = sorted(set(contexts))
    return {name: n_keep // len(names) + (i < n_keep % len(names)) for i, name in enumerate(names)}


def leak_by_scenario(texts: pd.DataFrame, design: Design) -> pd.Series:
    """Mean share of the other type's texts that a text of the scenario is sorted right against, by the strongest baselines."""
    _, found = scores(texts, design)
    total = np.zeros(len(texts))
    for a, b in design.directions:
        for c in range(len(design.contrasts)):
            rows = design.rows(b, c)
            y, s = design.Y[c, rows], found[:, a, c, rows]
            right = np.stack([_right(each, y) for each in s])
            strongest = np.argsort(-right.mean(axis=1), kind="stable")[:3]
            total[rows] += right[strongest].mean(axis=0)
    return pd.Series(total, index=texts.index).groupby(texts["scenario_id"], sort=False).mean()


def _right(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Per text, the share of the other class on its right side; ties count half."""
    out = np.empty(len(y))
    for sign in (1, -1):
        mine, others = y == sign, np.sort(s[y == -sign])
        below = (np.searchsorted(others, s[mine], "left") + np.searchsorted(others, s[mine], "right")) / 2 / len(others)
        out[mine] = below if sign > 0 else 1 - below
    return out


def draw(table: pd.DataFrame, quota: dict[str, int], rng: np.random.Generator) -> list[str]:
    """Scenarios at random, each stratum up to its quota, pinned ones first."""
    shuffled = table.iloc[rng.permutation(len(table))].sort_values("pinned", ascending=False, kind="stable")
    rank = shuffled.groupby("context").cumcount()
    kept = shuffled[(rank < shuffled["context"].map(quota)) | shuffled["pinned"]]
    return sorted(kept.index)


def eliminate(texts: pd.DataFrame, table: pd.DataFrame, quota: dict[str, int], rng: np.random.Generator) -> list[str]:
    """Scenarios left after dropping the leakiest round by round; ties fall by `rng`."""
    left = table.iloc[rng.permutation(len(table))]
    for step in range(ROUNDS, 0, -1):
        rows = usable(texts[texts["scenario_id"].isin(left.index)])
        try:
            leak = leak_by_scenario(rows, design_of(rows)) if len(rows) else pd.Series(dtype=float)
        except BadInput:  # too few clusters left to measure: what remains goes by chance
            leak = pd.Series(dtype=float)
        share = left["domain"].map(left["domain"].value_counts(normalize=True)).where(left["domain"] != "", 0)
        cost = leak.reindex(left.index).fillna(0.5) + 5 * np.maximum(share - MAX_DOMAIN, 0) - 1e6 * left["pinned"]
        for context, group in left.groupby("context"):
            surplus = len(group) - max(quota[context], int(group["pinned"].sum()))
            drop = cost[group.index].sort_values(ascending=False, kind="stable").index[:max(-(-surplus // step), 0)]
            left = left.drop(index=drop)
    return sorted(left.index)


def areas_of(texts: pd.DataFrame) -> dict[str, float]:
    """`{pair: AUROC of the best lexical baseline}`; empty where there are too few texts."""
    table = measure(texts)
    return dict(zip(best(table)["pair"], best(table)["auroc"].round(4), strict=True)) if len(table) else {}


def propose(texts: pd.DataFrame, *, quota: dict[str, int], pins: dict[str, str], seed: int) -> dict:
    """A proposal `{scenarios, left_out, pins, before, after, drawn, short, domains}` from the accepted texts; deterministic.

    `pins`: {scenario: "in" or "out"}, the person's overrides. `before`, `after` and `drawn` (by chance under the same
    quotas) are AUROCs per pair; `short` says how many scenarios a stratum lacks.
    """
    rng = np.random.default_rng(seed)
    accepted = sorted(set(texts["scenario_id"]))
    texts = texts[texts["scenario_id"].map(pins) != "out"].sort_values(["scenario_id", "register", "label"])
    table = texts.drop_duplicates("scenario_id").set_index("scenario_id")[["context", "domain"]]
    table["pinned"] = [pins.get(id_) == "in" for id_ in table.index]
    if not len(table):
        return {"scenarios": [], "left_out": accepted, "pins": pins, "before": {}, "after": {}, "drawn": {}, "short": dict(quota), "domains": {}}
    draws = [draw(table, quota, rng) for _ in range(DRAWS)]
    options = [eliminate(texts, table, quota, rng), *draws]
    measured = [areas_of(texts[texts["scenario_id"].isin(option)]) for option in options]
    # Far below chance is no better than above it: such words mislead a classifier, and flatter whatever is compared with it.
    first = min(range(len(options)), key=lambda i: max((abs(area - 0.5) for area in measured[i].values()), default=0))
    kept = table.loc[options[first]]
    got = kept["context"].value_counts()
    shares = kept.loc[kept["domain"] != "", "domain"].value_counts() / len(kept)
    return {"scenarios": options[first], "left_out": sorted(set(accepted) - set(options[first])), "pins": pins, "before": areas_of(texts), "after": measured[first], "drawn": measured[1],
            "short": {name: n - int(got.get(name, 0)) for name, n in quota.items() if n > got.get(name, 0)},
            "domains": shares[shares > MAX_DOMAIN].round(3).to_dict()}
