"""Probes: are the empathy types linearly in the activations, beyond what their words give away? (methods.md §2)

The endpoint is T, the lesser of two AUROCs: trained on the plain register of the training scenarios and tested on the
counter register of the held-out ones, and the reverse. Delta is T minus the best T of the lexical family in the same
folds. A probe PASSes where its labels could not have been permuted, T holds after adjustment for length and style,
and the interval of Delta lies above zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib.errors import BadInput
from lib.params import Probes
from lib.stats import nulls, transfer
from lib.stats.auroc import auroc, d_prime, deleted_auroc, jackknife_interval
from lib.stats.solver import logistic
from lib.stats.transfer import LAMBDAS, Areas, Design
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result
from lib.text.features import length, style
from lib.text.leakage import lexical_scores

C, A, I = CLASSES = ("cognitive", "affective", "instrumental")
CONTRASTS = {"C/A": ((C,), (A,)), "C/I": ((C,), (I,)), "A/I": ((A,), (I,)),
             "C/rest": ((C,), (A, I)), "A/rest": ((A,), (C, I)), "I/rest": ((I,), (C, A))}
REST = [3, 4, 5]
NAMES = (*CONTRASTS, "macro")
HEADLINES = ("C/A", "C/I", "A/I", "macro")


@dataclass(frozen=True)
class ProbeReport:
    """What a probe study found; every table is long, one row a value with its interval."""

    results: list[Result]
    layers: pd.DataFrame
    baselines: pd.DataFrame
    directions: dict[str, np.ndarray]
    learning_curve: pd.DataFrame
    selectivity: pd.DataFrame
    adjusted: pd.DataFrame


def with_macro(found: Areas) -> Areas:
    """The same areas with a seventh column: the mean of the three one-against-rest ones."""
    return Areas(*(np.concatenate([v, v[:, REST].mean(axis=1, keepdims=True)], axis=1)
                   for v in (found.value, found.deleted)))


def evaluations(scores: np.ndarray, design: Design) -> dict[str, Areas]:
    """Areas [layer, 7 contrasts] of every evaluation, and of the endpoint under "transfer"."""
    registers = range(len(design.registers))
    found = {design.name(d): with_macro(transfer.areas(scores, design, d))
             for d in dict.fromkeys([*((r, r) for r in registers), *design.directions])}
    return found | {"transfer": transfer.weakest([found[design.name(d)] for d in design.directions])}


def check_activations(X: np.ndarray, texts: pd.DataFrame, layer: int) -> None:
    """Raises BadInput where activations and texts do not belong together or hold no usable number."""
    if X.ndim != 3 or X.shape[1] != len(texts):
        raise BadInput(f"activations {X.shape} do not fit {len(texts)} texts: need [layer, text, d_model]")
    if not np.isfinite(X).all():
        raise BadInput(f"activations: NaN or infinite values at layer {np.flatnonzero(~np.isfinite(X).all((1, 2)))[0]}")
    if not 0 <= layer < len(X):
        raise BadInput(f"layer {layer}: activations hold layers 0 to {len(X) - 1}")
    if np.ptp(X[layer], axis=0).max() == 0:
        raise BadInput(f"activations: every feature is constant at layer {layer}")


def probe(X: np.ndarray, texts: pd.DataFrame, *, thresholds: Probes, model_id: str, layer: int, seed: int,
          n_permutations: int = 2000, n_repeats: int = 10, lambdas: Sequence[float] = LAMBDAS,
          dense_baselines: dict[str, np.ndarray] | None = None, contextual: dict[str, np.ndarray] | None = None,
          token_ids: Sequence | None = None) -> ProbeReport:
    """The whole of methods.md §2 on the empathy texts of activations X [layer, text, d_model].

    `layer` is the preregistered one; `dense_baselines` (embedding layer, random-weight layers) join the lexical
    family, `contextual` (sentence encoders) only raises a flag. Raises BadInput for activations that do not fit the
    texts; data too small or lacking a class give INCONCLUSIVE rows with the reason.
    """
    check_activations(X, texts, layer)
    texts = texts.reset_index(drop=True)
    rows = transfer.rows_of(texts, "empathy")
    rows = rows[texts["label"].to_numpy()[rows].astype(object) != None]  # noqa: E711
    part = texts.iloc[rows].reset_index(drop=True)
    try:
        design = transfer.make_design(part["label"], part["register"], part["cluster"], contrasts=CONTRASTS,
                                      seed=seed, n_repeats=n_repeats)
    except BadInput as error:
        return _nothing(str(error), model_id=model_id, layer=layer, seed=seed, n=len(part))
    gram = transfer.dense_gram(X[:, rows].astype(np.float64))
    found = {solver: evaluations(transfer.out_of_fold(gram, design, lambdas=lambdas, solver=solver), design)
             for solver in ("logistic", "ridge")}
    raise NotImplementedError
