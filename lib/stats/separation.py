"""Are perspective-taking (C) and warmth (A) different directions? κ, its interval, and every construction beside it.

κ = U(c, a) / √(U(c, c) U(a, a)) with c_s = x_{s,C} − v̄_s, a_s = x_{s,A} − v̄_s and v̄_s the mean of the same
scenario's valence-stripped texts: the cosine of the population means, free of shared noise. The literal criterion, the cosine of
one-vs-rest mean differences, is decided by its construction (`lib.stats.constructions`) and reported beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from lib.errors import BadInput
from lib.params import Separation
from lib.stats import constructions, mtmm, simulate
from lib.stats.adjust import without_form
from lib.stats.constructions import NEUTRAL, kappa, kappa_split, mean_cosines, trait_products
from lib.stats.triplets import Scenarios, check, find_scenarios
from lib.stats.ustat import MIN_CLUSTERS, CrossFitted, cluster_sums, cosine, jackknife
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result
from lib.stats.whitening import cross_fitted, exchangeable, residuals

COLUMNS = ["register", "metric", "kappa", "se", "ci_low", "ci_high", "kappa_D", "kappa_D_low", "kappa_D_high",
           "reliability_C", "reliability_A", "swap_p", "n", "n_clusters"]
WITHOUT_FORM = "without form"  # the metric table's row without what length and style explain


@dataclass(frozen=True, kw_only=True)
class SeparationReport:
    """The result row; `metrics` (a row a register and metric), `constructions`, `mtmm` (empty with one register)."""

    result: Result
    metrics: pd.DataFrame
    constructions: pd.DataFrame
    mtmm: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that the rule needs, before any threshold. `about`: fields of the result row, with a `reason` where nothing was measured;
    `literal`: the one-vs-rest cosine, and `literal_nulls` its draws by null; `lexical`, `generic`: what the registers and N1 say."""

    about: dict
    literal: float
    literal_nulls: dict[str, np.ndarray]
    registers: int
    lexical: bool
    generic: bool
    metrics: pd.DataFrame
    constructions: pd.DataFrame
    mtmm: pd.DataFrame


def separation(X: np.ndarray, texts: pd.DataFrame, *, thresholds: Separation, leaky: bool = False, **how) -> SeparationReport:
    """Criterion 1: `measure` with its arguments `how`, then `ruled`."""
    return ruled(measure(X, texts, **how), thresholds, leaky=leaky)


def measure(X: np.ndarray, texts: pd.DataFrame, *, model_id: str, layer: int, seed: int, n_permutations: int,
            unembedding_cov: np.ndarray | None = None) -> Measured:
    """Everything but the verdict, on the activations `X` [text, d_model] of one layer; rows of other conditions are ignored.

    `unembedding_cov` [d_model, d_model] adds the causal metric as a sensitivity row. Where the texts have responses, a row
    of the metric table is without what length and style explain. Raises BadInput on activations that are not finite or do
    not fit the texts; with too few scenarios or clusters `about` says so, and the tables are empty.
    """
    X = np.asarray(X)
    check(X, texts)
    about = dict(criterion="separation", model_id=model_id, layer=layer, metric="euclidean", seed=seed)
    plain = find_scenarios(texts, ("empathy", "plain"), ("valence_stripped", "plain"))
    values = X[plain.rows].astype(float)
    reason = too_little(plain, values)
    if reason:
        empathy = find_scenarios(texts, ("empathy", "plain"))
        means = X[empathy.rows].astype(float).mean(0) if len(empathy.rows) else np.zeros((3, X.shape[1]))
        return Measured(about=about | {"reason": reason, "n": len(empathy.rows), "n_clusters": empathy.n_clusters}, literal=mean_cosines(means)["one_vs_rest"],
                        literal_nulls={}, registers=0, lexical=False, generic=False, metrics=pd.DataFrame(columns=COLUMNS),
                        constructions=pd.DataFrame(columns=constructions.COLUMNS), mtmm=pd.DataFrame(columns=mtmm.COLUMNS))
    both = find_scenarios(texts, ("empathy", "plain"), ("valence_stripped", "plain"), ("empathy", "counter"))
    paired = (X[both.rows].astype(float), both.codes) if both.enough else None
    metrics = metric_table((values, plain.codes), paired, seed=seed, n_permutations=n_permutations,
                           unembedding_cov=unembedding_cov)
    beside, draws = constructions.table(values, plain.codes, residuals(values), seed=seed)
    lexical, matrix = across_registers(paired, seed=seed)
    if "response" in texts:
        metrics.loc[len(metrics)] = {"register": "plain", "metric": WITHOUT_FORM} | form_free(X, texts, plain, seed=seed, n_permutations=n_permutations)
    kappa_row = metrics.query("register == 'plain'").set_index("metric").loc["euclidean"]
    return Measured(
        about=about | {"n": len(values), "n_clusters": plain.n_clusters, "null": f"C and A exchanged within triplets, {n_permutations} permutations"},
        literal=float(beside.set_index("construction").loc["one_vs_rest", "cos"]), registers=1 if paired is None else 2, lexical=lexical,
        literal_nulls={name: np.array([draw["one_vs_rest"] for draw in draws[name]]) for name in ("N0", "N1")},
        generic=generic(kappa_row["kappa"], draws["N1"]), metrics=metrics, constructions=beside, mtmm=matrix)


def ruled(measured: Measured, thresholds: Separation, *, leaky: bool = False) -> SeparationReport:
    """The verdict on what was measured. `leaky`: words alone tell C from A, so directions of words would pass. Where C and A
    are not apart without what length and style explain: FORM. INCONCLUSIVE with its reason where nothing was measured."""
    literal = dict(literal_value=measured.literal, literal_verdict=literally(measured.literal, thresholds))
    tables = dict(metrics=measured.metrics, constructions=measured.constructions, mtmm=measured.mtmm)
    if measured.metrics.empty:
        return SeparationReport(result=Result(**measured.about, **literal, verdict=INCONCLUSIVE), **tables)
    main = measured.metrics.query("register == 'plain'").set_index("metric")
    kappa_row = main.loc["euclidean"]
    on = {"ONE-REGISTER": measured.registers == 1, "LEXICAL": measured.lexical, "LEAKY": leaky,
          "FORM": WITHOUT_FORM in main.index and not apart(main.loc[WITHOUT_FORM], thresholds), "GENERIC": measured.generic}
    flags = [name for name, holds in on.items() if holds]
    verdict, reason = decide(main, flags, thresholds)
    result = Result(
        **measured.about, **literal, verdict=verdict, reason=reason, flags=tuple(flags), estimate=float(kappa_row["kappa"]),
        ci_low=float(kappa_row["ci_low"]), ci_high=float(kappa_row["ci_high"]), p=float(kappa_row["swap_p"]),
        reliability=float(min(kappa_row["reliability_C"], kappa_row["reliability_A"])), power=power(kappa_row, thresholds),
        **{f"p_literal_{name}": float(np.mean(draws < thresholds.cos_max)) for name, draws in measured.literal_nulls.items()})
    return SeparationReport(result=result, **tables)


def too_little(plain: Scenarios, values: np.ndarray) -> str:
    """Why κ cannot be estimated from `values` [S, 6, d_model], or an empty string."""
    if not plain.enough:
        return (f"{plain.n_clusters} clusters of scenarios have all empathy and valence-stripped texts; "
                f"{MIN_CLUSTERS} are needed")
    return "" if residuals(values).any() else "the activations do not vary within a scenario"


def metric_table(plain: tuple[np.ndarray, np.ndarray], paired: tuple[np.ndarray, np.ndarray] | None = None, *,
                 seed: int, n_permutations: int, unembedding_cov: np.ndarray | None = None) -> pd.DataFrame:
    """One row a register and metric. `plain` is (values [S, 6, d], codes [S]), `paired` the same with 9 traits."""
    values, codes = plain
    metrics = {"euclidean": (None, None),
               "whitened": (cross_fitted([plain], n_clusters=codes.max() + 1), exchangeable(values))}
    if unembedding_cov is not None:
        metrics["causal"] = (causal_metric(unembedding_cov, values.shape[2]),) * 2
    rows = []
    for register, block in (("plain", plain), ("counter", paired)):
        for name, pair in metrics.items() if block else ():
            row = metric_row(*block, register=register, metrics=pair, seed=seed, n_permutations=n_permutations)
            rows.append({"register": register, "metric": name} | row)
    return pd.DataFrame(rows, columns=COLUMNS)


def metric_row(values: np.ndarray, codes: np.ndarray, *, register: str, metrics: tuple, seed: int,
            n_permutations: int) -> dict:
    """κ with its interval, κ_D (plain only), reliabilities and swap p of one register.

    `metrics` are the metric of the estimates and the one of the permutations (None: Euclidean).
    """
    products = trait_products(values, codes, metric=metrics[0])
    own = products.contrasts(NEUTRAL if register == "plain" else mtmm.DIRECTIONS[3:])
    interval = jackknife(lambda p: cosine(p, 0, 1), own)
    with np.errstate(divide="ignore", invalid="ignore"):
        reliability = np.diag(own.full) / np.diag(own.plain)
    first, second = (0, 1) if register == "plain" else (6, 7)
    row = {"kappa": interval.estimate, "se": interval.se, "ci_low": interval.low, "ci_high": interval.high,
           "reliability_C": reliability[0], "reliability_A": reliability[1], "n": len(values),
           "n_clusters": codes.max() + 1, "swap_p": swap_p(values[:, first] - values[:, second], codes,
                                                           metric=metrics[1], seed=seed, n_permutations=n_permutations)}
    if register == "plain":
        split = jackknife(kappa_split, products)
        row |= {"kappa_D": split.estimate, "kappa_D_low": split.low, "kappa_D_high": split.high}
    return row


def causal_metric(covariance: np.ndarray, d_model: int) -> Callable:
    """The causal inner product of residual directions, M = Cov(unembedding) (Park et al. 2024)."""
    covariance = np.asarray(covariance, float)
    if covariance.shape != (d_model, d_model) or not np.isfinite(covariance).all():
        raise BadInput(f"unembedding covariance: needs shape ({d_model}, {d_model}) and finite values")
    return lambda rows: rows @ covariance


def swap_p(difference: np.ndarray, codes: np.ndarray, *, metric: Callable | None, seed: int,
           n_permutations: int) -> float:
    """p of U(C − A, C − A) when labels are exchanged; `difference` [S, d] = x_C − x_A.

    A cluster's triplets are exchanged together: near-duplicate scenarios are not independent evidence.
    """
    sums = cluster_sums(difference, codes, n_clusters=codes.max() + 1)
    gram = sums @ (sums if metric is None else metric(sums)).T
    np.fill_diagonal(gram, 0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_permutations, len(gram)))
    # summed over pairs in one order for data and permutations alike, so that equal values compare equal
    null = ((signs @ gram) * signs).sum(1)
    return float((1 + (null >= gram.sum() * (1 - 1e-9)).sum()) / (n_permutations + 1))


def generic(estimate: float, draws: list[dict]) -> bool:
    """Whether κ lies in the central 95% of N1: C and A differ no more than any two offsets would."""
    low, _, high = constructions.quantiles([draw["kappa"] for draw in draws])
    return bool(low <= estimate <= high)


def across_registers(paired: tuple[np.ndarray, np.ndarray] | None, *, seed: int) -> tuple[bool, pd.DataFrame]:
    """Whether the directions are those of the words, and the multitrait-multimethod table of (values [S, 9, d], codes); None: one register."""
    if paired is None:
        return False, pd.DataFrame(columns=mtmm.COLUMNS)
    products = trait_products(*paired)
    found = mtmm.advantages(products)
    values = paired[0]
    spread = simulate.spread_of(residuals(values), values.mean(1))
    return mtmm.lexical(found, mtmm.chance(spread, seed=seed)), mtmm.table(products, found)


def literally(value: float, thresholds: Separation) -> str:
    """The criterion as first worded: PASS where the one-vs-rest cosine is below its bound."""
    return (PASS if value < thresholds.cos_max else FAIL) if np.isfinite(value) else INCONCLUSIVE


def form_free(X: np.ndarray, texts: pd.DataFrame, plain: Scenarios, *, seed: int, n_permutations: int) -> dict:
    """A row of the metric table without what length and style explain.

    What they explain is estimated in each half of the clusters by itself, and only products across halves count: the
    error of one estimate would be common to all scenarios, and pass for a reliable direction.
    """
    values, half = X[plain.rows].astype(float), plain.codes % 2
    for h in (0, 1):
        rows = plain.rows[half == h].ravel()
        values[half == h] = without_form(X[rows], texts.iloc[rows]).reshape(-1, *values.shape[1:])
    across = CrossFitted(folds=np.arange(plain.n_clusters) % 2, maps=(lambda rows: rows,) * 2)
    return metric_row(values, plain.codes, register="plain", metrics=(across, None), seed=seed, n_permutations=n_permutations)


def apart(row: dict, thresholds: Separation) -> bool:
    """Whether both directions are reliable, C and A differ, and κ lies below its bound, in one row of the metric table."""
    return bool(min(row["reliability_C"], row["reliability_A"]) >= thresholds.reliability_min and row["swap_p"] < thresholds.swap_p_max
                and row["ci_high"] < thresholds.cos_max)


def decide(main: pd.DataFrame, flags: list[str], thresholds: Separation) -> tuple[str, str]:
    """The calibrated verdict and the rule that decided it, from the plain rows of the metric table."""
    euclidean, whitened, bound = main.loc["euclidean"], main.loc["whitened"], thresholds.cos_max
    if euclidean["ci_low"] > bound:
        return FAIL, f"the interval of κ lies above {bound:g}"
    reliability = min(euclidean["reliability_C"], euclidean["reliability_A"])
    needed = {
        f"reliability {reliability:.2f} is below {thresholds.reliability_min:g}":
            reliability >= thresholds.reliability_min,
        f"swap p {euclidean['swap_p']:.3f} is not below {thresholds.swap_p_max:g}":
            euclidean["swap_p"] < thresholds.swap_p_max,
        f"the interval of κ does not end below {bound:g}": euclidean["ci_high"] < bound,
        f"the interval of the whitened κ does not end below {bound:g}": whitened["ci_high"] < bound,
        "LEXICAL: the directions do not carry over to the other register": "LEXICAL" not in flags,
        "LEAKY: words alone tell C from A": "LEAKY" not in flags,
        "FORM: without what length and style explain, C and A are not shown to be apart": "FORM" not in flags,
    }
    missed = [reason for reason, met in needed.items() if not met]
    if missed:
        # an unreliable direction has no angle, so the rules behind the first one say nothing then
        return INCONCLUSIVE, missed[0] if not reliability >= thresholds.reliability_min else "; ".join(missed)
    return PASS, f"κ's intervals end below {bound:g} in both metrics, C and A are reliable and their exchange shows"


def power(row: pd.Series, thresholds: Separation) -> str:
    """What this n could have decided in 80% of studies, from the jackknife's standard error."""
    if not np.isfinite(row["se"]):
        return "the interval of κ is undefined at this n, so no κ could have been told from the bound"
    reach = (student.ppf(0.975, row["n_clusters"] - 1) + norm.ppf(0.8)) * row["se"]
    return (f"standard error {row['se']:.2f}: with 80% power this n passes a κ below {thresholds.cos_max - reach:.2f} "
            f"and fails one above {thresholds.cos_max + reach:.2f}")


def layer_curve(X_layers: np.ndarray, texts: pd.DataFrame) -> pd.DataFrame:
    """κ with its interval and the biased cosines at every layer of `X_layers` [layer, text, d_model] (Euclidean).

    Descriptive: the verdict is read at the preregistered layer only. Empty where clusters are too few for an interval.
    """
    check(X_layers, texts)
    plain = find_scenarios(texts, ("empathy", "plain"), ("valence_stripped", "plain"))
    rows = []
    for layer, X in enumerate(X_layers if plain.enough else ()):
        values = X[plain.rows].astype(float)
        interval = jackknife(kappa, trait_products(values, plain.codes))
        rows.append({"layer": layer, "kappa": interval.estimate, "ci_low": interval.low, "ci_high": interval.high,
                     **mean_cosines(values.mean(0))})
    return pd.DataFrame(rows, columns=["layer", "kappa", "ci_low", "ci_high", "one_vs_rest", "minus_instrumental", "minus_neutral"])
