"""Audit of other people's contrast data: can words alone tell their two classes apart?

What a sceptic runs on a published probe. Texts of a group (a pair, a topic, a source) stay on one side of every fold;
without groups, near-duplicates and the two texts of a pair are kept together. A test set of their own is scored as it
was given.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.stats.auroc import auroc, deleted_auroc, jackknife_interval
from lib.stats.contrasts import Design, areas, make_design
from lib.stats.crossfit import dense_source, given_split, gram_source, out_of_fold
from lib.text.clusters import scenario_clusters, together
from lib.text.features import Logistic, NaiveBayes, family

MAX_TEXTS = 600  # of a split; more are sampled by whole groups: they would hardly move an AUROC


def audit_contrast(rows: pd.DataFrame, *, seed: int, cosine: float, n_repeats: int = 1, X: np.ndarray | None = None,
                   embedding: np.ndarray | None = None, token_ids: Sequence | None = None) -> pd.DataFrame:
    """Columns evaluation ("grouped" or "train->test"), family, baseline, auroc, ci_low, ci_high, n; best first.

    `rows`: text, label (0 or 1), and optionally group (else near-duplicates, TF-IDF cosine above `cosine`, and texts
    of one `pair`) and split ("train" or "test"). X [layer, text, d]: activations of the same rows, audited beside the
    words; `embedding` [text, d], which counts as words. Raises BadInput where a column, a class or enough groups are
    missing.
    """
    rows, kept = checked(rows, cosine=cosine, seed=seed)
    X = None if X is None else np.asarray(X)[:, kept]
    design = make_design(rows["label"].astype(str), ["all"] * len(rows), rows["group"], seed=seed, n_repeats=n_repeats,
                         contrasts={"1/0": (("1",), ("0",))})
    train, test = (np.flatnonzero(rows["split"] == part) for part in ("train", "test"))
    baselines = family(rows["text"], token_ids=None if token_ids is None else [token_ids[i] for i in kept])
    solved = [b for b in baselines if isinstance(b, Logistic)]
    counted = [b for b in baselines if isinstance(b, NaiveBayes)]
    sources = [("text", [b.name for b in solved], gram_source([b.gram for b in solved]))]
    if embedding is not None:
        sources.append(("text", ["embedding layer"], dense_source(np.asarray(embedding)[None, kept].astype(np.float32))))
    if X is not None:
        sources.append(("activations", [f"layer {i}" for i in range(len(X))], dense_source(X.astype(np.float32))))
    tables = []
    if not len(test):
        for kind, names, source in sources:
            scores = out_of_fold(source, design, n_layers=len(names), tol=1e-4)
            tables.append(grouped_table(scores, design, names).assign(family=kind))
        bayes = np.stack([bayes_out_of_fold(b, design) for b in counted])
        tables.append(grouped_table(bayes, design, [b.name for b in counted]).assign(family="text"))
    else:
        for kind, names, source in sources:
            scores = given_split(source, design, n_layers=len(names), train=train, test=test)[:, 0]
            tables.append(given_table(scores, design, test, names).assign(family=kind))
        bayes = np.stack([b.scores(train, test, design.Y[:, train])[0] for b in counted])
        tables.append(given_table(bayes, design, test, [b.name for b in counted]).assign(family="text"))
    table = pd.concat(tables, ignore_index=True).sort_values("auroc", ascending=False, ignore_index=True)
    return table[["evaluation", "family", "baseline", "auroc", "ci_low", "ci_high", "n"]]


def checked(rows: pd.DataFrame, *, cosine: float, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows with text, label, group and split, at most MAX_TEXTS of each split, and their numbers."""
    for column in ("text", "label"):
        if column not in rows:
            raise BadInput(f"contrast data: no column {column!r}")
    rows = rows.reset_index(drop=True)
    if not rows["label"].isin([0, 1]).all():
        raise BadInput(f"label: values must be 0 or 1, found {sorted(map(str, set(rows['label']) - {0, 1}))[0]!r}")
    split = rows["split"] if "split" in rows else pd.Series("train", index=rows.index)
    if not split.isin(["train", "test"]).all():
        raise BadInput("split: values must be 'train' or 'test'")
    rng, kept = np.random.default_rng(seed), []
    unit = next((column for column in ("group", "pair") if column in rows), None)
    group = rows[unit] if unit else pd.Series(range(len(rows)))
    if group.isna().any():
        raise BadInput(f"group: row {int(np.flatnonzero(group.isna())[0])} has none")
    for part in ("train", "test"):
        mine = np.flatnonzero(split == part)
        order = {g: i for i, g in enumerate(rng.permutation(group.iloc[mine].unique()))}
        place = group.iloc[mine].map(order).to_numpy()
        kept.append(np.sort(mine[np.argsort(place, kind="stable")][:MAX_TEXTS]))
    kept = np.concatenate(kept)
    rows = rows.iloc[kept].reset_index(drop=True).assign(split=split.to_numpy()[kept])
    for part in rows["split"].unique():
        if rows.loc[rows["split"] == part, "label"].nunique() < 2:
            raise BadInput(f"label: the {part} rows hold one class only")
    if "group" not in rows:
        alike = scenario_clusters(list(rows["text"]), cosine=cosine)
        rows["group"] = together(alike, rows["pair"]) if "pair" in rows else alike
    return rows.assign(label=rows["label"].astype(int)), kept


def bayes_out_of_fold(baseline: NaiveBayes, design: Design) -> np.ndarray:
    """Out-of-fold scores [repeat, 1, contrast, text] of naive Bayes in one register."""
    out = np.empty((len(design.folds), 1, *design.Y.shape))
    for repeat, fold in enumerate(design.folds):
        for k in range(design.n_folds):
            train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            out[repeat, 0][:, test] = baseline.scores(train, test, design.Y[:, train])
    return out


def grouped_table(scores: np.ndarray, design: Design, names: Sequence[str]) -> pd.DataFrame:
    """Grouped cross-validation over all rows."""
    found = areas(scores, design, (0, 0))
    return _table("grouped", names, found.value[:, 0], found.deleted[:, 0], len(design.cluster))


def given_table(scores: np.ndarray, design: Design, test: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Scores [baseline, test row] of a test set as it was given."""
    y, cluster = design.Y[0, test] > 0, np.unique(design.cluster[test], return_inverse=True)[1]
    deleted = deleted_auroc(scores, y, cluster, n_clusters=cluster.max() + 1)
    return _table("train->test", names, auroc(scores, y), deleted, len(test))


def _table(evaluation: str, names: Sequence[str], value: np.ndarray, deleted: np.ndarray, n: int) -> pd.DataFrame:
    low, high = jackknife_interval(value, deleted)
    return pd.DataFrame({"evaluation": evaluation, "baseline": names, "auroc": value, "ci_low": np.clip(low, 0, 1),
                         "ci_high": np.clip(high, 0, 1), "n": n})
