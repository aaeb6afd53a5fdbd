"""Scenario clusters: near-duplicate scenarios are one unit of resampling (folds, jackknife, permutations)."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer

from lib.errors import BadInput


def scenario_clusters(scenarios: Sequence[str], *, cosine: float) -> np.ndarray:
    """Cluster number of each scenario: connected components of the graph "TF-IDF cosine above `cosine`".

    Identical strings are one node, so that rows repeated for several responses do not change the weights. Numbers
    count from 0 in order of first appearance.
    """
    scenarios = [str(s) for s in scenarios]
    if not scenarios:
        raise BadInput("scenarios: none given")
    distinct = list(dict.fromkeys(scenarios))
    _, component = connected_components(scenario_cosines(distinct) > cosine, directed=False)
    number = {c: i for i, c in enumerate(dict.fromkeys(component))}
    of = {s: number[c] for s, c in zip(distinct, component, strict=True)}
    return np.array([of[s] for s in scenarios], dtype=int)


def together(first: Sequence, second: Sequence) -> np.ndarray:
    """Group number of each row: rows of one group in `first` or in `second` are in one group, and so are theirs."""
    a, b = (np.unique(np.asarray(codes), return_inverse=True)[1] for codes in (first, second))
    links = coo_array((np.ones(len(a)), (a, b + a.max() + 1)), shape=(a.max() + b.max() + 2,) * 2)
    return connected_components(links, directed=False)[1][a]


def scenario_cosines(distinct: Sequence[str]) -> np.ndarray:
    """TF-IDF cosine [scenario, scenario] of distinct strings."""
    try:
        X = TfidfVectorizer().fit_transform(distinct)
    except ValueError:  # not a single word of two letters
        return np.eye(len(distinct))
    return (X @ X.T).toarray()
