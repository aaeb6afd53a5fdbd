"""The multitrait-multimethod matrix: are directions the same when the words are not? (Campbell & Fiske 1959)

Traits are C, A and I, methods are the two registers. Convergent: one type across the registers. Discriminant: two
types, across the registers or within one. A direction that is its words agrees with no other wording of its type, or,
where the registers swap vocabularies, with the wrong type.

Three offsets in one register and three unrelated ones in the other (N1) agree by chance, the more so the fewer effective
dimensions there are; no interval over scenarios shows that. So the agreement must also exceed that of such draws.

The counter register has no neutral texts of its own, so its directions are taken about the same point: neutral plus
the shift that all three types share between the registers. A shift common to all types is no evidence about any.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from lib.stats.constructions import NEUTRAL
from lib.stats.simulate import Spread, null_offsets
from lib.stats.ustat import Interval, Products, jackknife

TYPES = ("C", "A", "I")
N_DRAWS = 1000
COLUMNS = ["kind", "first", "second", "cos", "ci_low", "ci_high"]
_MEAN = np.full((3, 3), 1 / 3)
# nine traits: C, A, I plain, three neutral labels, C, A, I counter
DIRECTIONS = np.vstack([np.hstack([NEUTRAL, np.zeros((3, 3))]),
                        np.hstack([NEUTRAL - np.eye(3, 6) + np.hstack([_MEAN, np.zeros((3, 3))]), np.eye(3) - _MEAN])])


def matrix(products: np.ndarray) -> np.ndarray:
    """Cosines [..., 6, 6] of the plain C, A, I and the counter C, A, I by U, from products [..., 9, 9]."""
    p = DIRECTIONS @ products @ DIRECTIONS.T
    norms = np.diagonal(p, axis1=-2, axis2=-1)
    norms = np.sqrt(np.where(norms > 0, norms, np.nan))
    return p / (norms[..., :, None] * norms[..., None, :])


def advantage(cosines: np.ndarray, pair: tuple[int, int], *, across: bool) -> np.ndarray:
    """Convergent minus discriminant cosine of two types; discriminant across registers, or within each."""
    i, j = pair
    convergent = (cosines[..., i, i + 3] + cosines[..., j, j + 3]) / 2
    if across:
        return convergent - (cosines[..., i, j + 3] + cosines[..., j, i + 3]) / 2
    return convergent - (cosines[..., i, j] + cosines[..., i + 3, j + 3]) / 2


def advantages(products: Products) -> dict[tuple[str, str], Interval]:
    """Intervals of the advantage for each pair of types and of their mean, (pair, "across" | "within") → Interval."""
    pairs = list(combinations(range(3), 2))
    groups = {f"{TYPES[i]}/{TYPES[j]}": [(i, j)] for i, j in pairs} | {"mean": pairs}
    return {(name, kind): jackknife(lambda p, g=group, k=kind: np.mean(
                [advantage(matrix(p), pair, across=k == "across") for pair in g], axis=0), products)
            for name, group in groups.items() for kind in ("across", "within")}


def chance(spread: Spread, *, seed: int) -> float:
    """97.5% quantile of the mean advantage across registers where each register has offsets of its own (N1)."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(N_DRAWS):
        offsets = np.vstack([null_offsets("N1", 3, spread=spread, rng=rng), np.zeros((3, len(spread.noise))), null_offsets("N1", 3, spread=spread, rng=rng)])
        cosines = matrix(offsets @ offsets.T)
        drawn.append(np.mean([advantage(cosines, pair, across=True) for pair in combinations(range(3), 2)]))
    return float(np.nanquantile(drawn, 0.975))


def lexical(found: dict[tuple[str, str], Interval], by_chance: float) -> bool:
    """True unless C against A, and the mean of all pairs, converge across registers more than they confuse, the mean
    also more than unrelated offsets do `by_chance`."""
    return not (all(found[name, kind].low > 0 for name in ("C/A", "mean") for kind in ("across", "within"))
                and found["mean", "across"].estimate > by_chance)


def table(products: Products, found: dict[tuple[str, str], Interval]) -> pd.DataFrame:
    """One row a cosine (`kind` convergent | discriminant) and one an advantage, each with its jackknife interval."""
    names = [f"{t} {register}" for register in ("plain", "counter") for t in TYPES]
    rows = []
    for i, j in combinations(range(6), 2):
        interval = jackknife(lambda p, i=i, j=j: matrix(p)[..., i, j], products)
        kind = "convergent" if j == i + 3 else "discriminant"
        rows.append((kind, names[i], names[j], interval.estimate, interval.low, interval.high))
    rows += [(f"convergent - discriminant ({kind} registers)", name, "", d.estimate, d.low, d.high)
             for (name, kind), d in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS)
