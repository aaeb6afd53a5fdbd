"""The leakage meter: how far words alone tell the types of the texts accepted so far apart, in a process beside the card.

A quick family (length, style, function words, first words; words by naive Bayes; words and TF-IDF by ridge with one fixed
penalty), grouped by scenario cluster, trained in one register and tested in the other where there are two. It ranks
texts and shows trends within three seconds; the audit of `01_generate` runs the whole family with nested penalties.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

import numpy as np
import pandas as pd
from scipy import sparse

from lib.errors import BadInput
from lib.stats.auroc import auroc
from lib.stats.contrasts import Design, make_design
from lib.text.features import FUNCTION_WORDS, NaiveBayes, document_frequency, length, opener, scaled_rows, style, words
from lib.text.leakage import EMPATHY, MIN_SCENARIOS

COLUMNS = ("pair", "evaluation", "baseline", "auroc", "n")
PENALTY = 1.0  # ridge, in units of the mean squared norm of the training rows
QUIET = 0.3  # seconds in which newer questions replace the one just asked
MAX_SCENARIOS = 400  # the meter looks at an even sample of more


def usable(texts: pd.DataFrame) -> pd.DataFrame:
    """The rows of registers that hold enough scenarios, at most MAX_SCENARIOS of them."""
    ids = texts["scenario_id"].unique()
    if len(ids) > MAX_SCENARIOS:
        texts = texts[texts["scenario_id"].isin(ids[np.linspace(0, len(ids) - 1, MAX_SCENARIOS).astype(int)])]
    return texts[texts.groupby("register")["scenario_id"].transform("nunique") >= MIN_SCENARIOS].reset_index(drop=True)


@cache
def tokens(text: str) -> tuple[str, ...]:
    return tuple(words(text))


@cache
def form(text: str) -> tuple[float, ...]:
    return tuple(style(text))


def bag_of(lists: Sequence[Sequence[str]]) -> sparse.csr_matrix:
    """Counts [text, feature] of tokens already found."""
    number: dict[str, int] = {}
    columns = [number.setdefault(token, len(number)) for each in lists for token in each]
    ends = np.cumsum([0, *map(len, lists)])
    found = sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(lists), max(len(number), 1)))
    found.sum_duplicates()
    return found


def features(texts: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, NaiveBayes]]:
    """`(few columns for primal ridge, inner products [text, text] for dual ridge, naive Bayes classifiers)`."""
    found = [tokens(t) for t in texts]
    low = [[w.lower() for w in each] for each in found]
    bag, function = bag_of(found), bag_of([[w for w in each if w in FUNCTION_WORDS] for each in low])
    idf = sparse.diags(np.log((1 + bag.shape[0]) / (1 + document_frequency(bag))) + 1)
    columns = {"length": np.array([length(t) for t in texts]), "style": np.array([form(t) for t in texts]),
               "function words": scaled_rows(function, order=1).toarray()}
    sparse_rows = {"first three words": bag_of([opener(" ".join(each[:6])) for each in found]), "words, ridge": bag,
                   "TF-IDF, ridge": (bag @ idf).tocsr()}
    inner = {name: (X @ X.T).toarray() for name, X in ((n, scaled_rows(X, order=2)) for n, X in sparse_rows.items())}
    l1 = scaled_rows(bag, order=1)
    bayes = {"words, naive Bayes": NaiveBayes("", l1 * (bag.sum() / max(l1.sum(), 1e-12)), False),
             "words, binary, naive Bayes": NaiveBayes("", (bag > 0).astype(float), True)}
    return columns, inner, bayes


def primal(X: np.ndarray, train: np.ndarray, test: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Ridge scores [contrast, test row] of columns standardised on the training rows; Y [contrast, train] in +1, -1, 0."""
    mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
    Z = (X[np.concatenate([train, test])] - mean) / np.where(scale > 1e-9, scale, np.inf) / np.sqrt(X.shape[1])
    Z = np.column_stack([Z, np.full(len(Z), 10.0)])  # an intercept that the penalty hardly touches
    out = np.empty((len(Y), len(test)))
    for c, y in enumerate(Y):
        mine = Z[:len(train)][y != 0]
        out[c] = Z[len(train):] @ np.linalg.solve(mine.T @ mine + PENALTY * np.eye(Z.shape[1]), mine.T @ y[y != 0])
    return out


def dual(K: np.ndarray, train: np.ndarray, test: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Ridge scores [contrast, test row] from inner products of rows of norm one."""
    out = np.empty((len(Y), len(test)))
    for c, y in enumerate(Y):
        mine, target = train[y != 0], y[y != 0]
        inner = K[np.ix_(mine, mine)] + PENALTY * np.eye(len(mine))
        out[c] = K[np.ix_(test, mine)] @ np.linalg.solve(inner, target - target.mean())
    return out


def scores(texts: pd.DataFrame, design: Design) -> tuple[list[str], np.ndarray]:
    """Names and out-of-fold scores [baseline, training register, contrast, text] of the quick family."""
    columns, inner, bayes = features(list(texts["response"]))
    fits = [partial(primal, X) for X in columns.values()] + [partial(dual, K) for K in inner.values()] + \
           [lambda train, test, Y, each=each: each.scores(train, test, Y) for each in bayes.values()]
    out = np.zeros((len(fits), len(design.registers), *design.Y.shape))
    for r, k in product(range(len(design.registers)), range(design.n_folds)):
        test = np.flatnonzero(design.folds[0] == k)
        train = np.flatnonzero((design.register == r) & (design.folds[0] != k))
        for i, fit in enumerate(fits):
            out[i, r][:, test] = fit(train, test, design.Y[:, train])
    return [*columns, *inner, *bayes], out


def design_of(texts: pd.DataFrame, *, seed: int = 0) -> Design:
    """Grouped folds over the three pairs of types."""
    return make_design(texts["label"], texts["register"], texts["cluster"], seed=seed, n_repeats=1,
                       contrasts={name: ([a], [b]) for name, (a, b) in EMPATHY.items()})


def table_of(names: Sequence[str], found: np.ndarray, design: Design) -> pd.DataFrame:
    """AUROC of every baseline, pair and evaluation; "transfer" is the lesser of the two directions."""
    rows = []
    for c, pair in enumerate(design.contrasts):
        value = {}
        for a, b in design.evaluations:
            mine = design.rows(b, c)
            value[design.name((a, b))] = auroc(found[:, a, c, mine], design.Y[c, mine] > 0)
        if len(design.registers) > 1:
            value["transfer"] = np.min([value[design.name(d)] for d in design.directions], axis=0)
        rows += [(pair, name, baseline, float(area), len(design.rows(0, c)))
                 for name, areas in value.items() for baseline, area in zip(names, areas, strict=True)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure(texts: pd.DataFrame) -> pd.DataFrame:
    """The meter's table for the empathy texts given; empty where a register has fewer than MIN_SCENARIOS scenarios."""
    texts = usable(texts)
    if not len(texts):
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        design = design_of(texts)
    except BadInput:  # too few clusters to fold
        return pd.DataFrame(columns=list(COLUMNS))
    return table_of(*scores(texts, design), design)


def best(table: pd.DataFrame) -> pd.DataFrame:
    """The strongest baseline per pair: across registers where there are two, else within the only one."""
    across = table[table["evaluation"] == "transfer"]
    rows = across if len(across) else table
    return rows.loc[rows.groupby("pair", sort=False)["auroc"].idxmax()].reset_index(drop=True)


def leaking_words(texts: pd.DataFrame, *, top: int = 6) -> dict[str, list[str]]:
    """Words that tell a pair's types apart most, by smoothed log-odds times the share of texts that hold them.

    Where there are two registers a word counts by the weaker of the two, and only if it points the same way in both.
    """
    lists = [sorted({w.lower() for w in tokens(t) if w[0].isalnum()}) for t in texts["response"]]
    held, names = bag_of(lists), list(dict.fromkeys(w for each in lists for w in each))
    found = {}
    for pair, (a, b) in EMPATHY.items():
        weights = []
        for _, rows in texts.reset_index(drop=True).groupby("register"):
            n, m = (np.asarray(held[rows.index[rows["label"] == label]].sum(axis=0)).ravel() for label in (a, b))
            total = max(len(rows) / 3, 1)
            weights.append(np.log((n + 1) / (m + 1)) * (n + m) / total)
        same = np.all(np.sign(weights) == np.sign(weights[0]), axis=0)
        weight = np.where(same, np.min(np.abs(weights), axis=0), 0)
        order = np.argsort(-weight, kind="stable")[:top]
        found[pair] = [names[i] for i in order if weight[i] > 0]
    return found


def reading(texts: pd.DataFrame) -> dict:
    """What the card shows: `{"pairs": [{pair, auroc, evaluation, baseline}], "words": {pair: [...]}, "n": scenarios}`."""
    table = measure(texts)
    if not len(table):
        return {"pairs": [], "words": {}, "n": int(texts["scenario_id"].nunique()) if len(texts) else 0}
    return {"pairs": best(table).drop(columns="n").to_dict("records"), "words": leaking_words(usable(texts)),
            "n": int(texts["scenario_id"].nunique())}


class Worker:
    """A process beside the kernel that answers with `reading` or `propose`; the newest request of a kind replaces older ones.

    `answered(kind, result)` is called from a thread. A worker that dies is started again with the next request.
    """

    def __init__(self, answered: Callable[[str, dict], None]):
        self._answered, self._waiting, self._process = answered, {}, None
        self._wake, self._closed = threading.Condition(), False
        threading.Thread(target=self._run, daemon=True, name="leakage-meter").start()

    def ask(self, kind: str, texts: Callable[[], pd.DataFrame], **more) -> None:
        """Queue a request; returns at once. `texts` is called from the thread."""
        with self._wake:
            self._waiting[kind] = (texts, more)
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._closed)
                self._wake.wait_for(lambda: self._closed, timeout=QUIET)
                if self._closed:
                    break
                kind = next(iter(self._waiting))
                texts, more = self._waiting.pop(kind)
            try:
                result = self._exchange(kind, texts, more)
            except (OSError, ValueError) as error:
                self._process, result = None, {"error": str(error) or "the worker ended"}
            if not self._closed:
                self._answered(kind, result)
        if self._process:
            self._process.stdin.close()

    def _exchange(self, kind: str, texts: Callable[[], pd.DataFrame], more: dict) -> dict:
        if self._process is None or self._process.poll() is not None:
            one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            self._process = subprocess.Popen([sys.executable, "-m", "lib.text.meter"], env={**os.environ, **one}, text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process.stdin.write(json.dumps({"kind": kind, "texts": texts().to_dict("list"), **more}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Answer requests, one JSON line each, until the kernel goes away."""
    from lib.text.selection import propose
    os.nice(10)  # the card comes first
    for line in sys.stdin:
        request = json.loads(line)
        kind, texts = request.pop("kind"), pd.DataFrame(request.pop("texts"))
        result = reading(texts) if kind == "meter" else propose(texts, **request)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve()
