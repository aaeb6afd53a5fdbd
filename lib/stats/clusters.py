"""Experiment A: do the pooled latents of an SAE fall into the four groups theory predicts?

The groups: cognitive, affective, instrumental, neutral (the valence-stripped texts). Features are centred within
scenario, so a topic cannot make a cluster, and reduced to 20 principal components. k̂ comes from the gap statistic
(`lib.stats.gap`), its stability from resampled scenario clusters, its meaning from ARI and NMI with the labels. The
silhouette's best k is reported as the literal value only: it is at least 2 by construction, and 2 on structureless data.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.stats import t as student
from sklearn.metrics import silhouette_score

from lib.errors import BadInput
from lib.params import Clusters
from lib.stats.agreement import ari, contingency, jaccard, nmi, permuted_within
from lib.stats.finite import check_finite
from lib.stats.gap import K_MAX, Gap, bootstrap_k, gap_statistic, surrogates, within
from lib.stats.gates import failing
from lib.stats.kmeans import kmeans
from lib.stats.ustat import MIN_CLUSTERS
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result

TYPES = ("cognitive", "affective", "instrumental", "neutral")
N_COMPONENTS = 20
STABLE = 0.75  # Hennig (2007): a cluster whose mean Jaccard lies below is not a stable one
NULL_TABLES = 20  # structureless tables behind the literal form's null rates
N1_OFFSET = 0.5  # N1's class offsets, in units of the rows' spread


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is clustered: `X` [row, PC] centred within scenario; `rows` index the texts; codes are 0…"""

    X: np.ndarray
    rows: np.ndarray
    types: np.ndarray
    scenario: np.ndarray
    cluster: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """One representation: its table, gap, k̂ over bootstraps, clusters at k and how they agree with the types."""

    table: Table
    gap: Gap
    k_bootstrap: np.ndarray
    codes: np.ndarray
    centres: np.ndarray
    ari: float
    ari_low: float
    ari_high: float
    ari_null: float
    nmi: float
    p: float
    jaccard: np.ndarray
    silhouette: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ClusterReport:
    """`result`; `summary` (a row a representation), `curve` (gap and silhouette over k), `texts` (a row a text)."""

    result: Result
    summary: pd.DataFrame
    curve: pd.DataFrame
    texts: pd.DataFrame


def clustered_rows(texts: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are clustered and their type codes: empathy texts, and valence-stripped ones as neutral."""
    kinds = np.where(texts.condition == "valence_stripped", "neutral", np.where(texts.condition == "empathy", texts.label, ""))
    codes = pd.Index(TYPES).get_indexer(kinds)
    rows = np.flatnonzero(codes >= 0)
    missing = set(TYPES) - set(kinds[rows])
    if missing:
        raise BadInput(f"texts: none of type {sorted(missing)[0]}; clusters are compared with {', '.join(TYPES)}")
    return rows, codes[rows]


def too_little(texts: pd.DataFrame, needed: int) -> str:
    """Why these texts cannot be clustered (a type is missing, or scenario clusters are fewer than `needed`), or nothing."""
    try:
        rows, _ = clustered_rows(texts)
    except BadInput as error:
        return str(error)
    found = texts.cluster.iloc[rows].nunique()
    return "" if found >= needed else f"texts: {found} scenario clusters; at least {needed} are needed"


def prepare(features: np.ndarray, texts: pd.DataFrame, *, n_components: int = N_COMPONENTS) -> Table:
    """`features` [text, feature] of all texts as a table to cluster. Raises BadInput on NaN, few clusters or no variance."""
    if len(features) != len(texts):
        raise BadInput(f"features: {len(features)} rows for {len(texts)} texts")
    rows, types = clustered_rows(texts)
    chosen = features[rows].astype(np.float64)
    check_finite(features=chosen)
    scenario = np.unique(texts.scenario_id.to_numpy()[rows].astype(str), return_inverse=True)[1]
    cluster = np.unique(texts.cluster.to_numpy()[rows], return_inverse=True)[1]
    if cluster.max() + 1 < MIN_CLUSTERS:
        raise BadInput(f"texts: {cluster.max() + 1} scenario clusters; at least {MIN_CLUSTERS} are needed")
    centred = within(chosen, scenario)
    alive = centred.std(0) > 1e-9 * max(np.abs(chosen).max(), 1e-30)
    if alive.sum() < 2:
        raise BadInput("features: hardly any varies within scenarios, so there is nothing to cluster")
    X = components(centred[:, alive], n_components)
    return Table(X=X / np.sqrt((X**2).sum(1).mean()), rows=rows, types=types, scenario=scenario, cluster=cluster)


def components(rows: np.ndarray, n: int) -> np.ndarray:
    """`[row, PC]` scores on at most `n` principal components, largest first, of centred `rows` (exact, by the smaller Gram)."""
    if rows.shape[0] <= rows.shape[1]:
        gram = rows @ rows.T
        values, vectors = eigh(gram, subset_by_index=[max(len(gram) - n, 0), len(gram) - 1])
        scores = vectors * np.sqrt(np.maximum(values, 0))
    else:
        gram = rows.T @ rows
        values, vectors = eigh(gram, subset_by_index=[max(len(gram) - n, 0), len(gram) - 1])
        scores = rows @ vectors
    return scores[:, values > values[-1] * 1e-12][:, ::-1]


def resampled(cluster: np.ndarray, *, n: int, rng: np.random.Generator) -> np.ndarray:
    """`[n, row]` how often each row is drawn when scenario clusters are drawn with replacement."""
    size = cluster.max() + 1
    counts = rng.multinomial(size, np.full(size, 1 / size), size=n)
    return counts[:, cluster].astype(np.float32)


def jackknife_ari(table: Table, centres: np.ndarray, *, estimate: float, rng: np.random.Generator) -> tuple[float, float]:
    """95% interval of the ARI, leaving out one scenario cluster at a time and clustering again from where it stood."""
    n = table.cluster.max() + 1
    weights = (table.cluster != np.arange(n)[:, None]).astype(np.float32)
    codes, _, _ = kmeans(table.X[None], len(centres), rng=rng, weights=weights, start=centres[None])
    values = ari(contingency(codes, table.types[None], weights=weights))
    half = student.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
    return estimate - half, estimate + half


def silhouettes(X: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
    """Mean silhouette [K − 1] of k-means with k = 2…K."""
    codes = [kmeans(X[None], k, rng=rng)[0][0] for k in range(2, K_MAX + 1)]
    return np.array([silhouette_score(X, c) if len(np.unique(c)) > 1 else 0.0 for c in codes])


def cluster_table(table: Table, *, k: int, seed: int, n_surrogates: int, n_bootstraps: int, n_permutations: int) -> Clustering:
    """All statistics of one representation. `n_bootstraps` 0 leaves out k̂'s stability (it needs most of the time)."""
    rng = np.random.default_rng(seed)
    gap = gap_statistic(table.X, table.scenario, n_surrogates=n_surrogates, rng=rng)
    codes, _, centres = kmeans(table.X[None], k, rng=rng, restarts=20)
    codes, centres = codes[0], centres[0]
    observed = contingency(codes[None], table.types[None])
    permuted = contingency(codes[None], permuted_within(table.types, table.scenario, n=n_permutations, rng=rng))
    null, value = ari(permuted), float(ari(observed)[0])
    weights = resampled(table.cluster, n=max(n_bootstraps, 50), rng=rng)
    again, _, _ = kmeans(table.X[None], k, rng=rng, weights=weights)
    low, high = jackknife_ari(table, centres, estimate=value, rng=rng)
    return Clustering(
        table=table, gap=gap, codes=codes, centres=centres, ari=value, ari_low=low, ari_high=high, ari_null=float(null.mean()),
        nmi=float(nmi(observed)[0]), p=float((1 + (null >= value).sum()) / (1 + n_permutations)),
        k_bootstrap=bootstrap_k(table.X, table.scenario, weights[:n_bootstraps], rng=rng) if n_bootstraps else np.zeros(0, int),
        jaccard=np.nanmean(jaccard(codes, again, weights), axis=0), silhouette=silhouettes(table.X, rng=rng))


def literal_rates(table: Table, *, k: int, seed: int) -> tuple[float, float]:
    """How often the silhouette counts `k` on N0 (surrogates) and on N1 (the same with unrelated class offsets)."""
    rng = np.random.default_rng(seed)
    draws = surrogates(table.X, table.scenario, n=NULL_TABLES, rng=rng)
    spread = np.sqrt((table.X**2).sum(1).mean() / table.X.shape[1])
    offsets = rng.standard_normal((NULL_TABLES, len(TYPES), table.X.shape[1])) * N1_OFFSET * spread
    shifted = within(draws + offsets[:, table.types], table.scenario)
    n0, n1 = (np.mean([silhouettes(x, rng=rng).argmax() + 2 == k for x in data]) for data in (draws, shifted))
    return float(n0), float(n1)


def verdict(main: list[Clustering], gates: pd.DataFrame, thresholds: Clusters) -> tuple[str, str]:
    """PASS, FAIL or INCONCLUSIVE of the SAE's clusterings (one a seed), and the rule that decided."""
    failed = failing(gates)
    if failed:
        return INCONCLUSIVE, "the SAE fails its gates: " + "; ".join(failed)
    right = float(np.mean(np.concatenate([each.k_bootstrap == thresholds.k for each in main])))
    seeds = float(np.mean([each.gap.k == thresholds.k for each in main]))
    value, p = min(each.ari for each in main), max(each.p for each in main)
    words = f"k̂ = {', '.join(str(each.gap.k) for each in main)}; {thresholds.k} in {right:.0%} of bootstraps; ARI {value:.2f}, p {p:.3f}"
    if right >= thresholds.k_bootstrap_share and seeds >= thresholds.k_seed_share and value >= thresholds.ari_min and p < thresholds.p_max:
        return PASS, words
    if 1 - right >= thresholds.k_bootstrap_share:
        return FAIL, words
    return INCONCLUSIVE, words


def summary_row(name: str, each: Clustering, texts: pd.DataFrame, k: int) -> dict:
    """One representation in one row. `ari_register` and `ari_context` tell clusters of wording or topic from those of type."""
    boot = each.k_bootstrap
    others = {f"ari_{column}": float(ari(contingency(each.codes[None], pd.factorize(texts[column].iloc[each.table.rows])[0][None]))[0])
              for column in ("register", "context")}
    return {"representation": name, "k_hat": each.gap.k, "k_bootstrap_share": float((boot == k).mean()) if len(boot) else np.nan,
            "ari": each.ari, "ci_low": each.ari_low, "ci_high": each.ari_high, "ari_null_mean": each.ari_null, "p": each.p,
            "nmi": each.nmi, **others, "jaccard_min": float(each.jaccard.min()), "silhouette_k": int(each.silhouette.argmax() + 2),
            "n_components": each.table.X.shape[1]}


def curve_rows(name: str, each: Clustering) -> pd.DataFrame:
    """Gap over k with the band of structureless data, and the silhouette."""
    low, high = each.gap.band
    return pd.DataFrame({"representation": name, "k": np.arange(1, K_MAX + 1), "gap": each.gap.values, "null_low": low,
                         "null_high": high, "silhouette": [np.nan, *each.silhouette]})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that the rule needs: the clusterings into `k` by name, the first `n_saes` of them the SAEs'; how often the literal form
    passes on nulls; `reason` where nothing could be measured. `texts` are those of the study."""

    reason: str
    k: int
    seed: int
    n_saes: int
    named: dict[str, Clustering]
    rates: tuple[float, float]


def clusters(latents: list[np.ndarray], baselines: dict[str, np.ndarray], texts: pd.DataFrame, gates: pd.DataFrame, *,
             thresholds: Clusters, model_id: str, layer: int, **how) -> ClusterReport:
    """Criterion "clusters": `measure` with its arguments `how`, then `ruled`."""
    return ruled(measure(latents, baselines, texts, k=thresholds.k, **how), texts, gates, thresholds=thresholds, model_id=model_id, layer=layer)


def measure(latents: list[np.ndarray], baselines: dict[str, np.ndarray], texts: pd.DataFrame, *, k: int, seed: int, n_surrogates: int = 100,
            n_bootstraps: int = 100, n_permutations: int = 2000) -> Measured:
    """Everything but the verdict. `latents` [SAE][text, d_sae] decide; `baselines` {name: [text, feature]} stand beside them."""
    if reason := too_little(texts, MIN_CLUSTERS):
        return Measured(reason=reason, k=k, seed=seed, n_saes=len(latents), named={}, rates=(0.0, 0.0))
    sizes = {"k": k, "seed": seed, "n_surrogates": n_surrogates, "n_permutations": n_permutations}
    tables = [*((z, n_bootstraps) for z in latents), *((x, 0) for x in baselines.values())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda each: cluster_table(prepare(each[0], texts), n_bootstraps=each[1], **sizes), tables))
    names = [*(f"SAE seed {number}" for number in range(len(latents))), *baselines]
    return Measured(reason="", k=k, seed=seed, n_saes=len(latents), named=dict(zip(names, made, strict=True)),
                    rates=literal_rates(made[0].table, k=k, seed=seed))


def ruled(measured: Measured, texts: pd.DataFrame, gates: pd.DataFrame, *, thresholds: Clusters, model_id: str, layer: int) -> ClusterReport:
    """The verdict on what was measured, and its tables. `gates`: the table of `lib.stats.gates`.

    The estimate is the smaller ARI of the SAEs, its interval from a jackknife over scenario clusters; `reliability` is the
    ARI of the two SAEs' clusterings with each other. INCONCLUSIVE with its reason where nothing was measured.
    """
    about = dict(criterion="clusters", model_id=model_id, layer=layer, metric="SAE latents", seed=measured.seed)
    if measured.reason:
        empty = {"summary": ["representation"], "curve": ["representation", "k", "gap"], "texts": ["text_id", "type"]}
        return ClusterReport(result=Result(**about, literal_value=None, literal_verdict=INCONCLUSIVE, verdict=INCONCLUSIVE, reason=measured.reason, n=len(texts),
                                           n_clusters=texts.cluster.nunique()),
                             **{name: pd.DataFrame(columns=columns) for name, columns in empty.items()})
    named, n = measured.named, measured.n_saes
    main, others = list(named.values())[:n], dict(list(named.items())[n:])
    worst, first = min(main, key=lambda each: each.ari), main[0]
    decision, reason = verdict(main, gates, thresholds)
    literal = int(first.silhouette.argmax() + 2)
    lexical = max(others.items(), key=lambda item: item[1].ari, default=None)
    agreement = float(ari(contingency(main[0].codes[None], main[1].codes[None]))[0]) if len(main) == 2 else None
    flags = ["UNSTABLE"] if min(each.jaccard.min() for each in main) < STABLE else []
    flags += ["ONE-REGISTER"] if texts[texts.condition == "empathy"].register.nunique() == 1 else []
    result = Result(
        **about, literal_value=float(literal), literal_verdict=PASS if literal == thresholds.k else FAIL, verdict=decision, reason=reason, flags=tuple(flags),
        estimate=worst.ari, ci_low=worst.ari_low, ci_high=worst.ari_high, p=max(each.p for each in main),
        null=f"types exchanged within scenarios: mean ARI {worst.ari_null:.3f}", reliability=agreement,
        p_literal_N0=measured.rates[0], p_literal_N1=measured.rates[1], text_baseline=lexical and lexical[1].ari,
        text_baseline_name=lexical[0] if lexical else "", n=len(first.codes), n_clusters=int(first.table.cluster.max() + 1))
    return ClusterReport(result=result, summary=pd.DataFrame([summary_row(n, e, texts, measured.k) for n, e in named.items()]),
                         curve=pd.concat([curve_rows(n, e) for n, e in named.items()], ignore_index=True),
                         texts=texts_table(named, texts))


def texts_table(named: dict[str, Clustering], texts: pd.DataFrame) -> pd.DataFrame:
    """A row a clustered text: `text_id, type, context, register`, each representation's cluster, first two PCs of each."""
    first = next(iter(named.values()))
    table = texts.iloc[first.table.rows][["text_id", "context", "register"]].reset_index(drop=True)
    table.insert(1, "type", np.array(TYPES)[first.table.types])
    for name, each in named.items():
        table[name] = each.codes
        table[f"{name} PC1"], table[f"{name} PC2"] = each.table.X[:, 0], each.table.X[:, 1]
    return table
