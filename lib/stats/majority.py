"""Over models: does a criterion hold for most of them?

The partial-conjunction p-value (Benjamini & Heller 2008) tests that fewer than r of M models show the effect:
`p_PC = (M − r + 1) · p_(r)` with r = ⌊M/2⌋ + 1 and p_(r) the r-th smallest p-value.
"""

from math import isfinite

from lib.errors import BadInput
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result


def majority(results: list[Result], *, n_models: int, alpha: float) -> dict:
    """The verdict over `n_models` models of one criterion, from at most one result a model.

    A model without a result or a p-value (a gate failed, a study not run) stays in M with p = 1. FAIL: a majority
    FAILs. Raises BadInput on an empty list, mixed criteria, two results of a model, or more results than models.
    """
    criteria = {result.criterion for result in results}
    if len(criteria) != 1:
        raise BadInput(f"majority: results of one criterion are needed, got {', '.join(sorted(criteria)) or 'none'}")
    if len({result.model_id for result in results}) < len(results) or len(results) > n_models:
        raise BadInput(f"majority: {len(results)} results for {n_models} models; one a model is needed")
    r = n_models // 2 + 1
    p = sorted([result.p if result.p is not None and isfinite(result.p) else 1.0 for result in results]
               + [1.0] * (n_models - len(results)))
    p_pc = min(1.0, (n_models - r + 1) * p[r - 1])
    n_pass, n_fail = (sum(result.verdict == verdict for result in results) for verdict in (PASS, FAIL))
    verdict = PASS if p_pc <= alpha and n_pass >= r else FAIL if n_fail >= r else INCONCLUSIVE
    return {"criterion": criteria.pop(), "r": r, "n_models": n_models, "n_pass": n_pass, "p_pc": p_pc,
            "verdict": verdict}
