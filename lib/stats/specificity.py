"""Is the structure one of empathy, or of any three contrasted styles?

Three conditions with three classes each: empathy E (C, A, I), valence-stripped V and non-empathy emotional N. Their
class structures are compared by the overlap O (`lib.stats.overlap`) and by condition transfer (`lib.stats.carryover`).
The literal reading, "controls show a different structure", takes plain means, and passes on noise.

Words alone make a structure too, and it differs from that of other texts: a network with random weights would pass. So
a PASS also needs empathy in other words to be nearer to empathy than the controls are: O of the two registers above theirs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from lib.params import Specificity
from lib.stats import simulate
from lib.stats.carryover import COLUMNS as TRANSFER
from lib.stats.carryover import transfer_table
from lib.stats.finite import check_finite
from lib.stats.overlap import COLUMNS, PAIRS, cka, overlap, overlap_rows
from lib.stats.triplets import check, find_triplets
from lib.stats.ustat import MIN_CLUSTERS, Interval, Products, cluster_sums, cross_products, jackknife
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result
from lib.stats.whitening import cross_fitted, residuals

CONDITIONS = {"E": "empathy", "V": "valence_stripped", "N": "non_empathy"}
CONTROLS = ("V", "N")
N_DRAWS = 200
Block = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class SpecificityReport:
    """The result row; `overlap` (a row a pair and metric); `transfer` 3 × 3 accuracies (rows: trained on, columns:
    tested on; best of six mappings off the diagonal); `transfer_null` (a row a cell: null mean, 97.5% quantile, p)."""

    result: Result
    overlap: pd.DataFrame
    transfer: pd.DataFrame
    transfer_null: pd.DataFrame


def specificity(X: np.ndarray, texts: pd.DataFrame, *, thresholds: Specificity, model_id: str, layer: int, seed: int,
                n_permutations: int, words: np.ndarray | None = None) -> SpecificityReport:
    """Criterion 5 on the activations `X` [text, d_model] of one layer: conditions compared in the plain register.

    Flags: LEXICAL where empathy's structure in the counter register is not nearer than the controls', ONE-REGISTER where
    there is none. `words` [text, d] is a representation that knows nothing but words; its overlap is the text baseline.
    Raises BadInput on activations that are not finite or do not fit the texts; a condition with too few clusters gives
    INCONCLUSIVE with the reason.
    """
    X = np.asarray(X)
    check(X, texts)
    about = dict(criterion="specificity", model_id=model_id, layer=layer, metric="euclidean", seed=seed)
    raw, n_clusters = gather(X, texts)
    reason = too_little(raw)
    if reason:
        result = Result(**about, literal_value=None, literal_verdict=INCONCLUSIVE, verdict=INCONCLUSIVE, reason=reason)
        return SpecificityReport(result=result, overlap=pd.DataFrame(columns=COLUMNS),
                                 transfer=pd.DataFrame(np.nan, index=list(CONDITIONS), columns=list(CONDITIONS)),
                                 transfer_null=pd.DataFrame(columns=TRANSFER))
    blocks = {part: (centre(values), codes) for part, (values, codes) in raw.items()}
    products = {"euclidean": effects(blocks, n_clusters),
                "whitened": effects(blocks, n_clusters, cross_fitted(list(raw.values()), n_clusters=n_clusters))}
    equivalence = (thresholds.equivalence_low, thresholds.equivalence_high)
    rows, found = {}, {}
    for metric, p in products.items():
        rows[metric], found[metric] = overlap_rows(p, metric, equivalence=equivalence)
    table = pd.DataFrame([row for metric in rows for row in rows[metric]])
    table["cka_debiased"] = [cka(blocks[a], blocks[b]) for a, b in PAIRS] * len(products)
    cells = transfer_table(blocks, n_clusters=n_clusters, n_permutations=n_permutations, seed=seed)
    transfer = cells.pivot(index="train", columns="test", values="accuracy").loc[list(CONDITIONS), list(CONDITIONS)]

    carried = across_registers(X, texts)
    verdict, reason = decide(table, found, transfer, thresholds, carried)
    flags = (*(("SPECIFIC",) if specific(products["euclidean"]) else ()),
             *(("ONE-REGISTER",) if carried is None else () if beyond_words(carried, found) else ("LEXICAL",)))
    worst = headline(found["euclidean"], thresholds)
    literal = literal_value(blocks)
    rates = literal_rates(raw, thresholds, seed=seed)
    result = Result(
        **about, literal_value=literal, literal_verdict=literally(literal, thresholds), verdict=verdict, reason=reason,
        flags=flags, **baseline_of(words, texts),
        estimate=worst.estimate, ci_low=float(worst.low), ci_high=float(worst.high), p=overlap_p(found, thresholds),
        null=f"overlap with a control of {thresholds.overlap_max:g} or more, in either metric (jackknife t)",
        reliability=float(np.min(reliabilities(table))), p_literal_N0=rates["N0"], p_literal_N1=rates["N1"],
        power=power(worst, thresholds), n=sum(len(codes) for _, codes in raw.values()), n_clusters=n_clusters)
    return SpecificityReport(result=result, overlap=table, transfer=transfer, transfer_null=cells)


def across_registers(X: np.ndarray, texts: pd.DataFrame) -> Interval | None:
    """O of empathy's structure in the plain and in the counter register; None where there are too few counter triplets."""
    both = [find_triplets(texts, condition="empathy", register=register) for register in ("plain", "counter")]
    clusters, codes = np.unique(np.concatenate([f.cluster for f in both]), return_inverse=True)
    own = np.split(codes, [len(both[0])])
    if min(len(np.unique(each)) for each in own) < MIN_CLUSTERS:
        return None
    # the second structure takes the place of the first control
    blocks = {part: (centre(X[f.rows].astype(float)), each) for part, f, each in zip("EV", both, own, strict=True)}
    return jackknife(lambda p: overlap(p, ("E", "V")), effects(blocks, len(clusters)))


def beyond_words(carried: Interval, found: dict[str, dict[tuple[str, str], Interval]]) -> bool:
    """Whether the interval of O between the registers lies above those between empathy and each control."""
    return all(carried.low > found["euclidean"]["E", control].high for control in CONTROLS)


def baseline_of(words: np.ndarray | None, texts: pd.DataFrame) -> dict:
    """The larger unbiased overlap with a control in `words` [text, d], as the row's text baseline."""
    if words is None:
        return {}
    check_finite(words=words)
    raw, n_clusters = gather(words, texts)
    if too_little(raw):
        return {}
    products = effects({part: (centre(values), codes) for part, (values, codes) in raw.items()}, n_clusters)
    found = [float(overlap(products.full, ("E", control))) for control in CONTROLS]
    return {"text_baseline": float(np.nanmax(found)) if np.isfinite(found).any() else None, "text_baseline_name": "overlap at the embedding layer"}


def gather(X: np.ndarray, texts: pd.DataFrame) -> tuple[dict[str, Block], int]:
    """Complete plain triplets of each condition, (values [S, 3, d], codes [S]) with clusters numbered in common."""
    found = {part: find_triplets(texts, condition=condition) for part, condition in CONDITIONS.items()}
    clusters, codes = np.unique(np.concatenate([f.cluster for f in found.values()]), return_inverse=True)
    codes = np.split(codes, np.cumsum([len(f) for f in found.values()])[:-1])
    blocks = {part: (X[f.rows].astype(float), own) for (part, f), own in zip(found.items(), codes, strict=True)}
    return blocks, len(clusters)


def too_little(blocks: dict[str, Block]) -> str:
    """Why the conditions cannot be compared, or an empty string."""
    for part, (values, codes) in blocks.items():
        n = len(np.unique(codes))
        if n < MIN_CLUSTERS:
            return f"{CONDITIONS[part]}: {n} clusters with complete plain triplets; {MIN_CLUSTERS} are needed"
        if not residuals(values).any():
            return f"{CONDITIONS[part]}: the activations do not vary within a scenario"
    return ""


def centre(values: np.ndarray) -> np.ndarray:
    """Class effects: scenario means taken out of [S, 3, d]."""
    return values - values.mean(1, keepdims=True)


def effects(blocks: dict[str, Block], n_clusters: int, metric=None) -> Products:
    """U of the nine class effects (E, V, N in turn) over all clusters."""
    sums = np.concatenate([cluster_sums(v, codes, n_clusters=n_clusters) for v, codes in blocks.values()], axis=1)
    counts = np.repeat([np.bincount(codes, minlength=n_clusters) for _, codes in blocks.values()], 3, axis=0).T
    return cross_products(sums, counts, metric=metric)


def biased_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """O of plain class means [3, d], noise and all: the cosine of the two structures' d × d Gram matrices."""
    norms = np.linalg.norm(first @ first.T) * np.linalg.norm(second @ second.T)
    return float(((first @ second.T) ** 2).sum() / norms) if norms > 0 else float("nan")


def literal_value(blocks: dict[str, Block]) -> float:
    """The larger plain overlap of empathy with a control; blocks have scenario means taken out."""
    means = {part: values.mean(0) for part, (values, _) in blocks.items()}
    return max(biased_overlap(means["E"], means[control]) for control in CONTROLS)


def literally(value: float, thresholds: Specificity) -> str:
    """"Controls show a different structure": PASS where the plain overlap is below its bound."""
    return (PASS if value < thresholds.overlap_max else FAIL) if np.isfinite(value) else INCONCLUSIVE


def literal_rates(raw: dict[str, Block], thresholds: Specificity, *, seed: int) -> dict[str, float]:
    """How often the literal criterion passes on each null, at this study's sizes and noise."""
    noise = np.concatenate([residuals(values) for values, _ in raw.values()])
    spread = simulate.spread_of(noise, np.concatenate([values.mean(1) for values, _ in raw.values()]))

    def make(null, rng):
        return {part: (centre(simulate.draw(len(codes), simulate.null_offsets(null, 3, spread=spread, rng=rng),
                                            spread=spread, rng=rng)), codes) for part, (_, codes) in raw.items()}
    drawn = simulate.null_values(literal_value, make, n_draws=N_DRAWS, seed=seed)
    return {null: float(np.mean(np.array(values) < thresholds.overlap_max)) for null, values in drawn.items()}


def specific(products: Products) -> bool:
    """Whether each control shares less with empathy than the controls share with each other."""
    def gap(p, control):
        return overlap(p, ("E", control)) - overlap(p, ("V", "N"))
    return all(jackknife(lambda p, c=c: gap(p, c), products).high < 0 for c in CONTROLS)


def reliabilities(table: pd.DataFrame) -> np.ndarray:
    """Reliability of E, V and N in the primary metric."""
    euclidean = table.query("metric == 'euclidean'").set_index("pair")
    return np.array([*euclidean.loc["E/V", ["reliability_first", "reliability_second"]],
                     euclidean.loc["E/N", "reliability_second"]], float)


def overlap_p(found: dict[str, dict], thresholds: Specificity) -> float:
    """The largest one-sided p of O against its bound, over controls and metrics (an intersection-union test)."""
    return float(np.max([o["E", c].p_below(thresholds.overlap_max) for o in found.values() for c in CONTROLS]))


def same_structure(interval: Interval, thresholds: Specificity) -> bool:
    """Whether the 90% interval of an overlap lies inside the equivalence bounds (two one-sided tests at 5%)."""
    low, high = interval.at(0.90)
    return thresholds.equivalence_low <= low and high <= thresholds.equivalence_high


def headline(found: dict[tuple[str, str], Interval], thresholds: Specificity) -> Interval:
    """The overlap the row shows: the control that decides a FAIL, else the larger defined one."""
    intervals = [found["E", control] for control in CONTROLS]
    return max(intervals, key=lambda o: (same_structure(o, thresholds), np.nan_to_num(o.estimate, nan=-np.inf)))


def decide(table: pd.DataFrame, found: dict[str, dict[tuple[str, str], Interval]], transfer: pd.DataFrame,
           thresholds: Specificity, carried: Interval | None = None) -> tuple[str, str]:
    """The calibrated verdict and the rule that decided it; `carried` is O of the two registers, where there are two."""
    low, high, bound = thresholds.equivalence_low, thresholds.equivalence_high, thresholds.overlap_max
    for control in CONTROLS:
        if same_structure(found["euclidean"]["E", control], thresholds):
            return FAIL, f"{CONDITIONS[control]}: the 90% interval of the overlap lies inside [{low:g}, {high:g}]"
    missed = [f"{CONDITIONS[part]}: reliability {value:.2f} is below {thresholds.reliability_min:g}"
              for part, value in zip(CONDITIONS, reliabilities(table), strict=True)
              if not value >= thresholds.reliability_min]
    if missed:
        return INCONCLUSIVE, "; ".join(missed)
    missed += [f"{CONDITIONS[c]}: the interval of the {metric} overlap does not end below {bound:g}"
               for metric in found for c in CONTROLS if not found[metric]["E", c].high < bound]
    pairs = [pair for c in CONTROLS for pair in (("E", c), (c, "E"))]
    missed += [f"transfer {a} to {b} ({transfer.loc[a, b]:.2f}) is not {thresholds.transfer_drop_min:g} below "
               f"{b} itself ({transfer.loc[b, b]:.2f})"
               for a, b in pairs if not transfer.loc[a, b] <= transfer.loc[b, b] - thresholds.transfer_drop_min]
    if carried is not None and not beyond_words(carried, found):
        missed.append(f"LEXICAL: empathy in other words (overlap {carried.estimate:.2f} [{carried.low:.2f}, {carried.high:.2f}]) "
                      "is not nearer to empathy than the controls are")
    if missed:
        return INCONCLUSIVE, "; ".join(missed)
    return PASS, f"both controls' overlaps end below {bound:g} in both metrics and empathy does not transfer"


def power(worst: Interval, thresholds: Specificity) -> str:
    """What this n could have decided in 80% of studies, from the jackknife's standard error."""
    if not np.isfinite(worst.se):
        return "the interval of O is undefined at this n, so no overlap could have been told from the bound"
    reach = (student.ppf(0.975, worst.df) + norm.ppf(0.8)) * worst.se
    return (f"standard error {worst.se:.2f}: with 80% power this n finds an overlap below "
            f"{thresholds.overlap_max - reach:.2f} to be below {thresholds.overlap_max:g}")
