"""Convergence: do the SAE's clusters and the probes point the same way?

Probe directions are class mean differences on half of the scenario clusters; SAE directions, `W_dec (z̄_c − z̄)` of
k-means clusters found without labels, come from the other half. A: mean cosine after the best one-to-one matching,
each cosine divided by √(R_probe R_SAE), since noise in either direction shrinks it (Spearman 1904). B: largest cosine
of a probe direction to any decoder row. P: share of a probe direction's energy in the span of the |F| decoder rows
that tell the clusters apart best.

Everything is linear in the texts, so sums per scenario cluster give all splits, the jackknife and the permutations.
Texts are centred within scenario, hence sums need no further centring and a deleted scenario cluster is a subtraction.

Nulls: (i) types exchanged within scenarios; (ii) probe directions drawn from N(0, Σ_w); (iii) random alive decoder rows
instead of the SAE's directions. Where activations have low effective rank, (ii) is far from an isotropic null.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.stats import t as student

from lib.errors import BadInput
from lib.params import Convergence
from lib.stats.agreement import permuted_within
from lib.stats.clusters import N_COMPONENTS, TYPES, clustered_rows, too_little
from lib.stats.finite import check_finite
from lib.stats.gap import within
from lib.stats.gates import failing, unit_rows
from lib.stats.kmeans import kmeans
from lib.stats.ustat import MIN_CLUSTERS
from lib.stats.verdicts import FAIL, INCONCLUSIVE, PASS, Result

FLOOR = 0.1  # a reliability below this says "hardly measured"; dividing by its root would blow noise up to any size
DRAWS = 1000  # directions or row sets of nulls (ii) and (iii)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of class vectors per scenario cluster, `vectors` [..., G, K, d], and how many texts they hold, `counts` [..., G, K]."""

    vectors: np.ndarray
    counts: np.ndarray

    def total(self, mask: np.ndarray) -> "Direction":
        """Directions of the clusters in `mask` [split, G]: leading axis split."""
        flat = self.vectors.reshape(*self.vectors.shape[:-2], -1)
        sums = (mask.astype(flat.dtype) @ flat).reshape(*flat.shape[:-2], len(mask), *self.vectors.shape[-2:])
        own, held = (self.vectors**2).sum(-1), self.counts
        return Direction(sums=sums, own=mask @ own, n=mask @ held, n_own=mask @ held**2)

    def without(self, direction: "Direction", mask: np.ndarray) -> "Direction":
        """The same directions without each cluster in turn: [split, G, K, d]; a cluster outside the mask changes nothing."""
        gone = mask[:, :, None]
        return Direction(sums=direction.sums[:, None] - self.vectors * gone[..., None],
                         own=direction.own[:, None] - (self.vectors**2).sum(-1) * gone,
                         n=direction.n[:, None] - self.counts * gone, n_own=direction.n_own[:, None] - self.counts**2 * gone)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Summed vectors [..., K, d] with what their reliability needs: own-cluster energy and counts [..., K]."""

    sums: np.ndarray
    own: np.ndarray
    n: np.ndarray
    n_own: np.ndarray

    @property
    def reliability(self) -> np.ndarray:
        """`[..., K]` U(p, p) / ‖p̄‖²: the share of the squared length that repeats across scenario clusters."""
        energy, pairs = (self.sums**2).sum(-1), self.n**2 - self.n_own
        usable = (energy > 0) & (pairs > 0)
        share = (energy - self.own) / np.where(usable, energy, 1) * self.n**2 / np.where(usable, pairs, 1)
        return np.where(usable, np.clip(share, 0, 1), 0.0)

    @property
    def unit(self) -> np.ndarray:
        norms = np.linalg.norm(self.sums, axis=-1, keepdims=True)
        return self.sums / np.where(norms > 0, norms, 1)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One split design: `mask` [split, G] is True where a scenario cluster serves the probe; the SAE's side is the rest."""

    mask: np.ndarray
    probe: Sums
    sae: list[Sums]
    sae_direction: Direction
    chosen: np.ndarray
    types: np.ndarray
    rows: np.ndarray
    cluster: np.ndarray
    scenario: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ConvergenceReport:
    """`result`; `table` (a row a SAE and split design), `cosines` (matched matrix with null), `carriers` (latents of each direction)."""

    result: Result
    table: pd.DataFrame
    cosines: pd.DataFrame
    carriers: pd.DataFrame


def cluster_sums(values: np.ndarray, onehot: np.ndarray, cluster: np.ndarray, *, n_clusters: int) -> Sums:
    """Sums of `values` [row, d] per scenario cluster and column of `onehot` [row, K]."""
    vectors, counts = np.zeros((n_clusters, onehot.shape[1], values.shape[1])), np.zeros((n_clusters, onehot.shape[1]))
    for g in np.unique(cluster):
        rows = cluster == g
        vectors[g], counts[g] = onehot[rows].T @ values[rows], onehot[rows].sum(0)
    return Sums(vectors=vectors, counts=counts)


def halves(n_clusters: int, *, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """`[split, G]` bool with half of the clusters True; each second split is the complement of the one before."""
    masks = []
    for _ in range(-(-n_splits // 2)):
        mask = np.zeros(n_clusters, bool)
        mask[rng.permutation(n_clusters)[: n_clusters // 2]] = True
        masks += [mask, ~mask]
    return np.array(masks[:n_splits])


def matched(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(mean [...], order [..., K])` of the best one-to-one matching of cosines [..., K, K]."""
    k = cosines.shape[-1]
    orders = np.array(list(permutations(range(k))))
    means = cosines[..., np.arange(k), orders].mean(-1)
    best = means.argmax(-1)
    return means.max(-1), orders[best]


def disattenuated(probe: np.ndarray, sae: np.ndarray, r_probe: np.ndarray, r_sae: np.ndarray) -> np.ndarray:
    """Cosines [..., K, K] of unit rows, each divided by the root of both reliabilities, kept within ±1."""
    scale = np.sqrt(np.maximum(r_probe, FLOOR)[..., :, None] * np.maximum(r_sae, FLOOR)[..., None, :])
    return np.clip(probe @ np.swapaxes(sae, -1, -2) / scale, -1, 1)


def sae_side(latents: np.ndarray, decoder: np.ndarray, rows: np.ndarray, cluster: np.ndarray, scenario: np.ndarray,
             mask: np.ndarray, *, k: int, n_latents: int, rng: np.random.Generator) -> tuple[list[Sums], np.ndarray]:
    """Per split: sums of `W_dec z` per k-means cluster on the SAE's half, and the `n_latents` that part the clusters best."""
    Z = within(latents[rows], scenario)
    recon, gram, norms = Z @ decoder, Z @ Z.T, (decoder**2).sum(1)
    sums, chosen = [], []
    for each in mask:
        held = np.flatnonzero(~each[cluster])
        n_components = min(N_COMPONENTS, len(held) - 1)
        values, vectors = eigh(gram[np.ix_(held, held)], subset_by_index=[len(held) - n_components, len(held) - 1])
        codes = kmeans((vectors * np.sqrt(np.maximum(values, 0)))[None], k, rng=rng, restarts=10)[0][0]
        onehot = np.eye(k)[codes]
        means = onehot.T @ Z[held] / np.maximum(onehot.sum(0), 1)[:, None]
        chosen.append(np.argsort(-(onehot.sum(0) @ means**2) * norms, kind="stable")[:n_latents])
        sums.append(cluster_sums(recon[held], onehot, cluster[held], n_clusters=mask.shape[1]))
    return sums, np.array(chosen)


def build(resid: np.ndarray, latents: np.ndarray, decoder: np.ndarray, texts: pd.DataFrame, *, registers: tuple[str, str] | None,
          n_splits: int, n_latents: int, seed: int) -> Side:
    """Both sides of one design. `registers`: (the probe's, the SAE's), for splits across registers."""
    rng = np.random.default_rng(seed)
    rows, types = clustered_rows(texts)
    register = texts.register.to_numpy()[rows]
    present = [t for t in range(len(TYPES)) if registers is None or all((types[register == r] == t).any() for r in registers)]
    use = np.isin(types, present)
    rows, types, register = rows[use], np.searchsorted(present, types[use]), register[use]
    cluster = np.unique(texts.cluster.to_numpy()[rows], return_inverse=True)[1]
    n_clusters = cluster.max() + 1
    if n_clusters < 2 * MIN_CLUSTERS:
        raise BadInput(f"texts: {n_clusters} scenario clusters; halves need at least {2 * MIN_CLUSTERS}")
    check_finite(activations=resid, latents=latents, decoder=decoder)
    names = texts.scenario_id.to_numpy()[rows].astype(str)
    if registers:
        names = np.char.add(names, register.astype(str))  # each register is centred by itself
    scenario = np.unique(names, return_inverse=True)[1]
    mask = halves(n_clusters, n_splits=n_splits, rng=rng)
    mine, theirs = (np.ones(len(rows), bool),) * 2 if registers is None else (register == r for r in registers)
    X = within(resid[rows].astype(float), scenario)
    probe = cluster_sums(X[mine], np.eye(len(present))[types[mine]], cluster[mine], n_clusters=n_clusters)
    local = np.unique(scenario[theirs], return_inverse=True)[1]
    sums, chosen = sae_side(latents.astype(float), decoder.astype(float), rows[theirs], cluster[theirs], local, mask,
                            k=len(present), n_latents=min(n_latents, len(decoder)), rng=rng)
    parts = [each.total(~mask[[i]]) for i, each in enumerate(sums)]
    direction = Direction(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("sums", "own", "n", "n_own")})
    return Side(mask=mask, probe=probe, sae=sums, sae_direction=direction, chosen=chosen,
                types=types[mine], rows=rows[mine], cluster=cluster[mine],
                scenario=np.unique(scenario[mine], return_inverse=True)[1])


def jackknife(side: Side, order: np.ndarray, estimate: float) -> tuple[float, float]:
    """95% interval of A, one scenario cluster left out at a time, clusters and matching as they were."""
    probe, values = side.probe.total(side.mask), []
    at = np.arange(order.shape[1])
    for i, (mask, sums) in enumerate(zip(side.mask, side.sae, strict=True)):
        ours = side.probe.without(pick(probe, [i]), mask[None])
        theirs = sums.without(pick(side.sae_direction, [i]), ~mask[None])
        cosines = disattenuated(ours.unit, theirs.unit, ours.reliability, theirs.reliability)[0]
        values.append(cosines[:, at, order[i]].mean(-1))
    loo = np.mean(values, axis=0)
    n = len(loo)
    half = student.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((loo - loo.mean()) ** 2).sum())
    return estimate - half, estimate + half


def pick(direction: Direction, index) -> Direction:
    return Direction(sums=direction.sums[index], own=direction.own[index], n=direction.n[index], n_own=direction.n_own[index])


def permuted_null(side: Side, X: np.ndarray, *, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Null (i): A [n] and the matched matrix [n, K, K] with types exchanged within scenarios."""
    k, n_clusters = side.probe.counts.shape[1], side.mask.shape[1]
    sae, r_sae = side.sae_direction.unit, side.sae_direction.reliability
    found, matrices = [], []
    for types in permuted_within(side.types, side.scenario, n=n, rng=rng):
        probe = cluster_sums(X, np.eye(k)[types], side.cluster, n_clusters=n_clusters).total(side.mask)
        cosines = disattenuated(probe.unit, sae, probe.reliability, r_sae)
        best, order = matched(cosines)
        found.append(best.mean())
        matrices.append(np.take_along_axis(cosines, order[:, None, :], 2).mean(0))
    return np.array(found), np.array(matrices)


def noise_directions(X: np.ndarray, types: np.ndarray, *, n: int, rng: np.random.Generator) -> np.ndarray:
    """Unit directions [n, K, d] from N(0, Σ_w), Σ_w the covariance within type and scenario of `X` [row, d]; they sum to zero."""
    k = types.max() + 1
    means = np.stack([X[types == t].mean(0) for t in range(k)])
    residuals = X - means[types]
    draws = (rng.standard_normal((n * k, len(X))) @ residuals / np.sqrt(len(X))).reshape(n, k, -1)
    draws = draws - draws.mean(1, keepdims=True)
    return draws / np.linalg.norm(draws, axis=-1, keepdims=True)


def energy(directions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`[...]` share of the energy of unit `directions` [..., d] in the span of `rows` [F, d]."""
    q, _ = np.linalg.qr(rows.T)
    return ((directions @ q) ** 2).sum(-1)


def evaluate(side: Side, resid: np.ndarray, decoder: np.ndarray, alive: np.ndarray, *, quantile: float,
             n_permutations: int, seed: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """All of §4 for one SAE: `(row of numbers, matched cosines [K, K], their permutation quantile [K, K])`."""
    rng = np.random.default_rng(seed)
    X = within(resid[side.rows].astype(float), side.scenario)
    probe, sae = side.probe.total(side.mask), side.sae_direction
    k = probe.sums.shape[-2]
    cosines = disattenuated(probe.unit, sae.unit, probe.reliability, sae.reliability)
    best, order = matched(cosines)
    A = float(best.mean())
    low, high = jackknife(side, order, A)

    null_i, matrices = permuted_null(side, X, n=n_permutations, rng=rng)
    drawn = noise_directions(X, side.types, n=DRAWS, rng=rng)
    rows = unit_rows(decoder.astype(float))[alive]
    null_ii = np.mean([matched(disattenuated(drawn, s, np.ones(k), r))[0] for s, r in zip(sae.unit, sae.reliability, strict=True)], axis=0)
    picked = np.stack([rows[rng.choice(len(rows), k, replace=False)] for _ in range(DRAWS)])
    null_iii = np.mean([matched(disattenuated(p, picked, r, np.ones(k)))[0] for p, r in zip(probe.unit, probe.reliability, strict=True)], axis=0)

    to_rows = (probe.unit @ rows.T).max(-1).mean(0)
    B, null_B = float(to_rows.max()), (drawn.reshape(-1, drawn.shape[-1]) @ rows.T).max(-1).reshape(DRAWS, k).max(1)
    P = float(np.mean([energy(p, decoder[f]).mean() for p, f in zip(probe.unit, side.chosen, strict=True)]))
    sets = [rows[rng.choice(len(rows), min(side.chosen.shape[1], len(rows)), replace=False)] for _ in range(DRAWS // 5)]
    null_P = np.array([energy(probe.unit, f).mean() for f in sets])
    row = {"A": A, "ci_low": low, "ci_high": high, "p": float((1 + (null_i >= A).sum()) / (1 + len(null_i))),
           "null_permuted": float(np.quantile(null_i, quantile)), "null_noise": float(np.quantile(null_ii, quantile)),
           "null_rows": float(np.quantile(null_iii, quantile)), "reliability_probe": float(probe.reliability.mean()),
           "reliability_sae": float(sae.reliability.mean()), "B": B, "B_null": float(np.quantile(null_B, quantile)),
           "P": P, "P_null": float(np.quantile(null_P, quantile)), "n_latents": int(side.chosen.shape[1]), "k": k, "n": len(side.rows)}
    reordered = np.take_along_axis(cosines, order[:, None, :], 2).mean(0)
    return row, reordered, np.quantile(matrices, quantile, axis=0)


def literal(resid: np.ndarray, latents: np.ndarray, decoder: np.ndarray, texts: pd.DataFrame, *, cos_min: float, n_permutations: int,
            seed: int) -> tuple[float, float, float]:
    """The literal criterion on all texts at once: mean matched cosine, and its pass rates on N0 and N1.

    N0: types exchanged within scenarios. N1: class directions drawn from N(0, Σ_w).
    """
    rng = np.random.default_rng(seed)
    rows, types = clustered_rows(texts)
    scenario = np.unique(texts.scenario_id.to_numpy()[rows].astype(str), return_inverse=True)[1]
    X, k = within(resid[rows].astype(float), scenario), types.max() + 1
    nothing = np.zeros((1, 1), bool)
    sums, _ = sae_side(latents.astype(float), decoder.astype(float), rows, np.zeros(len(rows), int), scenario, nothing, k=k, n_latents=1, rng=rng)
    sae = unit_rows(sums[0].vectors[0])

    def value(directions):
        return matched(directions @ sae.T)[0]
    observed = value(unit_rows(np.eye(k)[types].T @ X))
    shuffled = permuted_within(types, scenario, n=n_permutations, rng=rng)
    n0 = np.mean([value(unit_rows(np.eye(k)[each].T @ X)) > cos_min for each in shuffled])
    n1 = np.mean(value(noise_directions(X, types, n=DRAWS, rng=rng)) > cos_min)
    return float(observed), float(n0), float(n1)


def carriers(resid: np.ndarray, decoder: np.ndarray, texts: pd.DataFrame, *, n: int = 5) -> pd.DataFrame:
    """The decoder rows nearest to each class direction of all texts: `type, rank, latent, cosine`."""
    rows, types = clustered_rows(texts)
    scenario = np.unique(texts.scenario_id.to_numpy()[rows].astype(str), return_inverse=True)[1]
    directions = unit_rows(np.eye(len(TYPES))[types].T @ within(resid[rows].astype(float), scenario))
    cosines = directions @ unit_rows(decoder.astype(float)).T
    order = np.argsort(-cosines, axis=1)[:, :n]
    return pd.DataFrame([{"type": TYPES[t], "rank": r, "latent": int(j), "cosine": float(cosines[t, j])}
                         for t in range(len(TYPES)) for r, j in enumerate(order[t])])


def verdict(rows: list[dict], gates: pd.DataFrame, thresholds: Convergence) -> tuple[str, str]:
    """PASS, FAIL or INCONCLUSIVE, the SAE that agrees least deciding, and the rule in words."""
    failed = failing(gates)
    if failed:
        return INCONCLUSIVE, "the SAE fails its gates: " + "; ".join(failed)
    row = min(rows, key=lambda each: each["A"])
    null = max(row["null_permuted"], row["null_noise"], row["null_rows"])
    words = f"A {row['A']:.2f}, largest null {null:.2f}; P {row['P']:.2f} against {row['P_null']:.2f}"
    if row["A"] > thresholds.cos_min and row["ci_low"] > null and row["P"] > row["P_null"]:
        return PASS, words
    reliable = min(row["reliability_probe"], row["reliability_sae"]) >= thresholds.reliability_fail
    if row["ci_high"] < thresholds.cos_min or (row["A"] <= null and reliable):
        return FAIL, words
    return INCONCLUSIVE, words


def convergence(resid: np.ndarray, latents: list[np.ndarray], decoders: list[np.ndarray], texts: pd.DataFrame, gates: pd.DataFrame, *,
                thresholds: Convergence, model_id: str, layer: int, seed: int, n_splits: int = 50, n_permutations: int = 200,
                n_latents: int = 32) -> ConvergenceReport:
    """Criterion "convergence". `resid` [text, d_model] at the SAE's layer; one `latents` [text, d_sae] and `decoders` [d_sae, d_model] a seed."""
    quantile = thresholds.null_quantile
    registers = [r for r in ("plain", "counter") if (texts[texts.condition == "empathy"].register == r).any()]
    designs = {"halves": None} | ({"across registers": tuple(registers)} if len(registers) == 2 else {})
    rows, matrices = [], []
    if reason := too_little(texts, 2 * MIN_CLUSTERS):
        return undecided(reason, texts, model_id=model_id, layer=layer, seed=seed)
    for number, (z, W) in enumerate(zip(latents, decoders, strict=True)):
        alive = np.flatnonzero(z.max(0) > 0)
        for name, pair in designs.items():
            side = build(resid, z, W, texts, registers=pair, n_splits=n_splits, n_latents=n_latents, seed=seed)
            row, found, null = evaluate(side, resid, W, alive, quantile=quantile, n_permutations=n_permutations, seed=seed)
            rows.append({"sae": number, "design": name, **row})
            if pair is None:
                matrices += [{"sae": number, "type": TYPES[i], "cluster": TYPES[j], "cosine": found[i, j], "null": null[i, j]}
                             for i in range(len(found)) for j in range(len(found))]
    main = [row for row in rows if row["design"] == "halves"]
    worst = min(main, key=lambda row: row["A"])
    value, n0, n1 = literal(resid, latents[0], decoders[0], texts, cos_min=thresholds.cos_min, n_permutations=n_permutations, seed=seed)
    decision, reason = verdict(main, gates, thresholds)
    null = max(("null_permuted", "null_noise", "null_rows"), key=lambda name: worst[name])
    result = Result(
        criterion="convergence", model_id=model_id, layer=layer, metric="matched cosine A", literal_value=value,
        literal_verdict=PASS if value > thresholds.cos_min else FAIL, verdict=decision, reason=reason,
        flags=() if len(registers) == 2 else ("ONE-REGISTER",), estimate=worst["A"], ci_low=worst["ci_low"], ci_high=worst["ci_high"],
        p=worst["p"], null=f"{quantile:.1%} quantile {worst[null]:.2f} ({null.removeprefix('null_')})",
        reliability=min(worst["reliability_probe"], worst["reliability_sae"]), p_literal_N0=n0, p_literal_N1=n1, n=worst["n"],
        n_clusters=int(texts.cluster.iloc[clustered_rows(texts)[0]].nunique()), seed=seed)
    return ConvergenceReport(result=result, table=pd.DataFrame(rows), cosines=pd.DataFrame(matrices),
                             carriers=pd.concat([carriers(resid, W, texts).assign(sae=i) for i, W in enumerate(decoders)], ignore_index=True))


def undecided(reason: str, texts: pd.DataFrame, **about) -> ConvergenceReport:
    """INCONCLUSIVE with its reason and empty tables, where the texts are too few for two halves."""
    result = Result(criterion="convergence", metric="matched cosine A", literal_value=None, literal_verdict=INCONCLUSIVE, verdict=INCONCLUSIVE,
                    reason=reason, n=len(texts), n_clusters=texts.cluster.nunique(), **about)
    empty = {"table": ["sae", "design", "A", "B", "P"], "cosines": ["sae"], "carriers": ["type", "rank", "latent", "cosine", "sae"]}
    return ConvergenceReport(result=result, **{name: pd.DataFrame(columns=columns) for name, columns in empty.items()})
