"""Probes: are the empathy types linearly in the activations, beyond what their words give away? (methods.md §2)

The endpoint T is the lesser of two AUROCs: trained on the plain register of the training scenarios and tested on the
counter register of the held-out ones, and the reverse. Delta is T minus the best T of the lexical family in the same
folds. The verdict is read at the preregistered layer, in double precision; the other layers are descriptive and
solved in the precision of the activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.params import Probes
from lib.stats import controls
from lib.stats.adjust import adjusted_areas, freedman_lane
from lib.stats.auroc import jackknife_interval
from lib.stats.contrasts import Areas, weakest
from lib.stats.crossfit import LAMBDAS, best_weights, dense_source, out_of_fold
from lib.stats.endpoint import (
    CLASSES,
    CONTRASTS,
    NAMES,
    TRANSFER,
    Material,
    evaluate,
    long_table,
    make_material,
    with_macro,
)
from lib.stats.nulls import holm, permuted_labels, transfer_null
from lib.stats.ruling import Evidence, Value, flags, power, rule
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result
from lib.text.features import form
from lib.text.leakage import lexical_scores

HEADLINES = ("C/A", "C/I", "A/I", "macro")
CURVE_REPEATS = {"logistic": 4, "ridge": 2}  # of the layers that only describe; the layer that decides has all repeats
TOL = 1e-4  # of descriptive fits
EMPTY = {"layers": "layer contrast evaluation solver auroc ci_low ci_high d_prime null_high",
         "baselines": "name family contrast direction T ci_low ci_high", "learning_curve": "n contrast T ci_low ci_high ci_width",
         "selectivity": "contrast T control_held_out control_memorised selectivity", "adjusted": "contrast T T_adjusted ci_low ci_high p"}


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What a probe study found: one result a headline contrast, long tables, and probe weights in activation units.

    layers: AUROC of every layer, contrast, evaluation ("within:...", "a->b", "transfer" = T) and solver, with the
    97.5% quantile of the max-T null. baselines: the same endpoint of every text baseline. learning_curve: T against
    the number of clusters. selectivity: T beside labels that are random per cluster. adjusted: T without length and
    style.
    """

    results: list[Result]
    directions: dict[str, np.ndarray]
    layers: pd.DataFrame
    baselines: pd.DataFrame
    learning_curve: pd.DataFrame
    selectivity: pd.DataFrame
    adjusted: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A text baseline's areas [1, 7 contrasts] in every evaluation."""

    family: str
    found: dict[str, Areas]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that the rule needs, and the tables, before any threshold: evidence by headline contrast (none: `about.reason` says why),
    the plain register's own AUROCs and the rates at which the literal form passes on nulls [contrast]."""

    about: Result
    evidence: dict[str, Evidence]
    literal: dict[str, Value]
    rates: dict[str, np.ndarray]
    directions: dict[str, np.ndarray]
    tables: dict[str, pd.DataFrame]


def probe(X: np.ndarray, texts: pd.DataFrame, *, thresholds: Probes, **how) -> ProbeReport:
    """All of methods.md §2: `measure` with its arguments `how`, then `ruled`."""
    return ruled(measure(X, texts, **how), thresholds)


def measure(X: np.ndarray, texts: pd.DataFrame, *, model_id: str, layer: int, seed: int,
            n_permutations: int = 2000, n_repeats: int = 10, lambdas: Sequence[float] = LAMBDAS,
            dense_baselines: dict[str, np.ndarray] | None = None, contextual: dict[str, np.ndarray] | None = None,
            token_ids: Sequence | None = None) -> Measured:
    """Everything but the verdicts, on the empathy texts of activations X [layer, text, d_model].

    `layer` is the preregistered one. `dense_baselines` (embedding layer, random-weight layers; [text, d] or
    [layer, text, d]) join the lexical family; `contextual` (the same shapes) only raises a flag. `lambdas` are in
    units of the mean squared norm of the standardised training rows. Raises BadInput for activations that do not fit
    the texts; texts too few or without a class give no evidence, and `about` says why.
    """
    X = check_activations(X, texts, layer)
    rows = np.flatnonzero((texts["condition"] == "empathy").to_numpy() & texts["label"].isin(CLASSES).to_numpy())
    about = Result(criterion="probes", model_id=model_id, layer=layer, metric="transfer AUROC", literal_value=None,
                   literal_verdict=INCONCLUSIVE, verdict=INCONCLUSIVE, reason="", n=len(rows), seed=seed,
                   flags=("ONE-REGISTER",) if texts["register"].iloc[rows].nunique() == 1 else ())
    try:
        material = make_material(texts.iloc[rows], seed=seed, n_repeats=n_repeats)
    except BadInput as error:
        empty = {name: pd.DataFrame(columns=columns.split()) for name, columns in EMPTY.items()}
        return Measured(about=replace(about, reason=str(error)), evidence={}, literal={}, rates={}, directions={}, tables=empty)
    X, design = X[:, rows], material.design
    main, scores, layers = curves(X, material, layer=layer, lambdas=lambdas)
    p, high = permutation_test(X, material, layer=layer, lambdas=lambdas, n_permutations=n_permutations, seed=seed)
    layers["null_high"] = layers["contrast"].map(high).where(layers["evaluation"] == TRANSFER)
    dense = {"lexical": dense_baselines or {}, "contextual": contextual or {}}
    others = baselines(material, {family: {k: only(v, rows, len(texts), k) for k, v in group.items()} for family, group in dense.items()},
                       lambdas=lambdas, token_ids=None if token_ids is None else [token_ids[i] for i in rows])
    adjusted, adjusted_table = adjust(scores, material, main, n_permutations=n_permutations, seed=seed)
    unrelated = controls.unrelated_offsets(X[layer], material, seed=seed) if len(design.registers) > 1 else None
    about = replace(about, n_clusters=design.n_clusters, null=f"labels permuted within triplets, {n_permutations} times: maximum over "
                    f"{len(X)} layers and {len(lambdas)} penalties (ridge), Holm over {len(NAMES)} contrasts")
    within = main[design.name((0, 0))]
    return Measured(
        about=about, rates=controls.literal_rates(X[layer], material, seed=seed),
        evidence={c: weigh(NAMES.index(c), main=main, adjusted=adjusted, others=others, p=p[c], unrelated=unrelated) for c in HEADLINES},
        literal={c: Value(float(within.value[0, NAMES.index(c)]), within.deleted[0, NAMES.index(c)]) for c in HEADLINES},
        directions=dict(zip(CONTRASTS, best_weights(X[layer], design, lambdas=lambdas), strict=True)),
        tables={"layers": layers, "baselines": baseline_table(others, material), "adjusted": adjusted_table,
                "learning_curve": controls.learning_curve(X[layer], design, seed=seed),
                "selectivity": controls.selectivity(X[layer], design, main[TRANSFER].value[0], seed=seed)})


def ruled(measured: Measured, thresholds: Probes) -> ProbeReport:
    """The verdicts on what was measured; without evidence every headline is INCONCLUSIVE, with the reason."""
    if measured.evidence:
        results = [result(c, measured, thresholds) for c in HEADLINES]
    else:
        results = [replace(measured.about, metric=f"{c} transfer AUROC") for c in HEADLINES]
    return ProbeReport(results=results, directions=measured.directions, **measured.tables)


def check_activations(X: np.ndarray, texts: pd.DataFrame, layer: int) -> np.ndarray:
    """X in single precision or better. Raises BadInput where it does not fit the texts or holds no usable numbers."""
    X = np.asarray(X)
    if X.ndim != 3 or X.shape[1] != len(texts):
        raise BadInput(f"activations {X.shape} do not fit {len(texts)} texts: [layer, text, d_model] is needed")
    if not 0 <= layer < len(X):
        raise BadInput(f"layer {layer}: the activations hold layers 0 to {len(X) - 1}")
    for i, each in enumerate(X):
        if not np.isfinite(each).all():
            raise BadInput(f"activations: NaN or infinite values at layer {i}; extract them again")
    if len(texts) and not np.ptp(X[layer], axis=0).any():
        raise BadInput(f"activations: every feature is constant at layer {layer}")
    return X.astype(np.result_type(X, np.float32), copy=False)


def only(values: np.ndarray, rows: np.ndarray, n_texts: int, name: str) -> np.ndarray:
    """Baseline features as [layer, text, d], the rows of the study alone."""
    values = np.asarray(values)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1] != n_texts or not np.isfinite(values).all():
        raise BadInput(f"baseline {name!r}: {values.shape} must be finite and hold a row for each of {n_texts} texts")
    return values[:, rows].astype(np.result_type(values, np.float32), copy=False)


def curves(X: np.ndarray, material: Material, *, layer: int, lambdas: Sequence[float]) -> tuple:
    """The preregistered layer's areas by evaluation and its scores, and the table over layers and solvers."""
    design = material.design
    exact = out_of_fold(dense_source(X[[layer]].astype(np.float64)), design, n_layers=1, lambdas=lambdas)
    main, tables = evaluate(exact, design), []
    for solver, n_repeats in CURVE_REPEATS.items():
        use = replace(design, folds=design.folds[:n_repeats])
        found = evaluate(out_of_fold(dense_source(X), use, n_layers=len(X), lambdas=lambdas, solver=solver, tol=TOL), use)
        if solver == "logistic":
            for name, each in found.items():
                each.value[layer], each.deleted[layer] = main[name].value[0], main[name].deleted[0]
        tables += [long_table(each, design, names=range(len(X)), index="layer").assign(evaluation=name, solver=solver) for name, each in found.items()]
    table = pd.concat(tables, ignore_index=True)
    return main, exact[0], table[["layer", "contrast", "evaluation", "solver", "auroc", "ci_low", "ci_high", "d_prime"]]


def permutation_test(X: np.ndarray, material: Material, *, layer: int, lambdas: Sequence[float], n_permutations: int,
                     seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Holm-adjusted max-T p-value of each contrast at the preregistered layer; 97.5% quantile of each null."""
    labels = permuted_labels(material.design, material.classes, material.triplet, n_permutations=n_permutations + 1, seed=seed)
    T = transfer_null(dense_source(X), material.design, labels, n_layers=len(X), lambdas=lambdas)
    T = with_macro(T, axis=2)
    largest, observed = T.max(axis=(0, 1))[:, 1:], T[layer, :, :, 0].max(axis=0)
    p = holm((1 + (largest >= observed[:, None]).sum(axis=1)) / (1 + n_permutations))
    return dict(zip(NAMES, p, strict=True)), dict(zip(NAMES, np.quantile(largest, 0.975, axis=1), strict=True))


def baselines(material: Material, dense: dict[str, dict[str, np.ndarray]], *, lambdas: Sequence[float],
              token_ids: Sequence | None) -> dict[str, Baseline]:
    """Every text baseline in the probe's own folds; `dense` [layer, text, d] by family and name."""
    design = material.design
    groups = [("lexical", *lexical_scores(material.texts, design, lambdas=lambdas, token_ids=token_ids))]
    for family, sources in dense.items():
        for name, X in sources.items():
            names = [name] if len(X) == 1 else [f"{name}, layer {i}" for i in range(len(X))]
            groups.append((family, names, out_of_fold(dense_source(X), design, n_layers=len(X), lambdas=lambdas, tol=TOL)))
    found = {}
    for family, names, scores in groups:
        every = evaluate(scores, design)
        for i, name in enumerate(names):
            found[name] = Baseline(family=family, found={k: Areas(v.value[[i]], v.deleted[[i]]) for k, v in every.items()})
    return found


def baseline_table(others: dict[str, Baseline], material: Material) -> pd.DataFrame:
    """name, family, contrast, direction, T, ci_low, ci_high; direction "transfer" is the endpoint."""
    tables = [long_table(each, material.design, names=[name], index="name").assign(family=b.family, direction=direction)
              for name, b in others.items() for direction, each in b.found.items()]
    return pd.concat(tables, ignore_index=True).rename(columns={"auroc": "T"})[EMPTY["baselines"].split()]


def adjust(scores: np.ndarray, material: Material, main: dict[str, Areas], *, n_permutations: int, seed: int) -> tuple:
    """T adjusted for length and style, and its table with Freedman-Lane p-values (none for the macro mean)."""
    design, F = material.design, form(material.texts["response"])
    each = weakest([adjusted_areas(scores, design, d, F) for d in design.directions])
    found = Areas(with_macro(each.value, axis=1), with_macro(each.deleted, axis=1))
    p = [freedman_lane(scores, material, F, c, n_permutations=n_permutations, seed=seed) for c in range(len(CONTRASTS))]
    low, high = jackknife_interval(found.value[0], found.deleted[0])
    return found, pd.DataFrame({"contrast": NAMES, "T": main[TRANSFER].value[0], "T_adjusted": found.value[0],
                                "ci_low": low, "ci_high": high, "p": [*p, np.nan]})


def weigh(c: int, *, main: dict, adjusted: Areas, others: dict[str, Baseline], p: float, unrelated: np.ndarray | None) -> Evidence:
    """The evidence on contrast number c."""
    def value(found: Areas) -> Value:
        return Value(float(found.value[0, c]), found.deleted[0, c])

    T, T_own = {name: value(b.found[TRANSFER]) for name, b in others.items()}, main[TRANSFER].value[0, c]
    best = max((name for name in T if others[name].family == "lexical"), key=lambda name: T[name].value)
    encoders = [T[name] for name in T if others[name].family == "contextual"]
    return Evidence(T=value(main[TRANSFER]), adjusted=value(adjusted), lexical=T[best], lexical_name=best, p=float(p),
                    encoder=max(encoders, key=lambda v: v.value, default=None), one_register=unrelated is None,
                    p_offsets=None if unrelated is None else float((1 + (unrelated[:, c] >= T_own).sum()) / (1 + len(unrelated))))


def result(contrast: str, measured: Measured, thresholds: Probes) -> Result:
    """The result row of one contrast. Literal: the interval of the plain register's own AUROC lies above chance."""
    e, within, c = measured.evidence[contrast], measured.literal[contrast], NAMES.index(contrast)
    verdict, reason = rule(e, thresholds)
    return replace(measured.about, metric=f"{contrast} transfer AUROC", literal_value=within.value, literal_verdict=PASS if within.low > 0.5 else FAIL,
                   verdict=verdict, reason=reason, flags=flags(e, thresholds), estimate=e.T.value, ci_low=e.T.low, ci_high=e.T.high, p=e.p,
                   p_literal_N0=float(measured.rates["N0"][c]), p_literal_N1=float(measured.rates["N1"][c]), text_baseline=e.lexical.value,
                   text_baseline_name=e.lexical_name, power=power(e, thresholds, n_clusters=measured.about.n_clusters))
