"""How much of one condition's class structure lies in another's: the overlap O of two sets of class effects.

`G_EF[i, j] = U(e_i, f_j)` for class effects e, f (scenario means taken out) and `O = ‖G_EF‖² / (‖G_EE‖ ‖G_FF‖)`: 1 for
the same structure whatever the class names, about 1 / effective rank for unrelated ones. U is unbiased, its square not
quite: O comes out too large by .01 to .02 at reliability .8, which counts against a PASS.
"""

import numpy as np

from lib.stats.ustat import Interval, Products, jackknife

PARTS = {"E": slice(0, 3), "V": slice(3, 6), "N": slice(6, 9)}
COLUMNS = ["pair", "metric", "O", "se", "ci_low", "ci_high", "ci90_low", "ci90_high", "reliability_first",
           "reliability_second", "magnitude_ratio", "magnitude_ci90_low", "magnitude_ci90_high",
           "magnitude_equivalent", "cka_debiased"]
PAIRS = (("E", "V"), ("E", "N"), ("V", "N"))


def overlap(products: np.ndarray, pair: tuple[str, str]) -> np.ndarray:
    """O of two conditions from products [..., 9, 9]; NaN where one has no structure by U."""
    def squared(a, b):
        return (products[..., PARTS[a], PARTS[b]] ** 2).sum((-2, -1))
    first, second = pair
    norms = squared(first, first) * squared(second, second)
    usable = (strength(products, first) > 0) & (strength(products, second) > 0)
    return np.where(usable, squared(first, second) / np.sqrt(np.where(usable, norms, 1)), np.nan)


def strength(products: np.ndarray, part: str) -> np.ndarray:
    """Size of a structure: the summed squared norms of its class effects by U, from products [..., 9, 9]."""
    return np.trace(products[..., PARTS[part], PARTS[part]], axis1=-2, axis2=-1)


def reliability(products: Products, part: str) -> float:
    """Share of a structure's measured size that is not noise."""
    size = strength(products.plain, part)
    return float(strength(products.full, part) / size) if size > 0 else float("nan")


def magnitude_ratio(products: np.ndarray, pair: tuple[str, str]) -> np.ndarray:
    """Ratio of two structures' sizes (root of the summed squared effects); NaN where one has none."""
    first, second = (strength(products, part) for part in pair)
    usable = (first > 0) & (second > 0)
    return np.where(usable, np.sqrt(np.where(usable, first, 1) / np.where(usable, second, 1)), np.nan)


def cka(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Debiased linear CKA of two conditions' whole variation within scenarios, classes unseen.

    Each is (values [S, 3, d] with scenario means out, cluster codes [S]). The mean squared inner product over pairs of
    different clusters, normalised as O is: Kornblith et al. 2019 on the feature side (conditions need no common
    scenarios), without a text's product with itself as in Song et al. 2012.
    """
    def mean_square(a, b):
        rows = [values.reshape(-1, values.shape[2]) for values, _ in (a, b)]
        apart = np.repeat(a[1], 3)[:, None] != np.repeat(b[1], 3)
        return float(((rows[0] @ rows[1].T) ** 2)[apart].mean())
    own = mean_square(first, first) * mean_square(second, second)
    return mean_square(first, second) / np.sqrt(own) if own > 0 else float("nan")


def overlap_rows(products: Products, metric: str, *,
                 equivalence: tuple[float, float]) -> tuple[list[dict], dict[tuple[str, str], Interval]]:
    """A row a pair of conditions, and the pair's Interval of O."""
    rows, found = [], {}
    for pair in PAIRS:
        o = found[pair] = jackknife(lambda p, pair=pair: overlap(p, pair), products)
        low90, high90 = o.at(0.90)
        ratio = jackknife(lambda p, pair=pair: magnitude_ratio(p, pair), products, level=0.90)
        rows.append({"pair": f"{pair[0]}/{pair[1]}", "metric": metric, "O": o.estimate, "se": o.se, "ci_low": o.low,
                     "ci_high": o.high, "ci90_low": low90, "ci90_high": high90,
                     "reliability_first": reliability(products, pair[0]),
                     "reliability_second": reliability(products, pair[1]),
                     "magnitude_ratio": ratio.estimate, "magnitude_ci90_low": ratio.low,
                     "magnitude_ci90_high": ratio.high,
                     "magnitude_equivalent": bool(equivalence[0] <= ratio.low and ratio.high <= equivalence[1])})
    return rows, found
