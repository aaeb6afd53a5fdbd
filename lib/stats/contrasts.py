"""Contrasts: which texts are compared, in which registers and folds, and the AUROC endpoint with its intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import BadInput
from lib.stats.auroc import auroc, deleted_auroc
from lib.stats.folds import grouped_folds

MIN_TEXTS, MIN_FOLDS = 10, 3


@dataclass(frozen=True)
class Design:
    """Y [contrast, row] is +1, -1, or 0 outside the contrast; register and cluster [row] are codes from 0;
    folds [repeat, row] never part a cluster."""

    contrasts: tuple[str, ...]
    Y: np.ndarray
    registers: tuple[str, ...]
    register: np.ndarray
    cluster: np.ndarray
    folds: np.ndarray

    @property
    def n_clusters(self) -> int:
        return int(self.cluster.max()) + 1

    @property
    def n_folds(self) -> int:
        return int(self.folds.max()) + 1

    @property
    def directions(self) -> list[tuple[int, int]]:
        """(training register, test register) of the endpoint: across registers, or within the only one."""
        n = len(self.registers)
        return [(a, b) for a in range(n) for b in range(n) if a != b] or [(0, 0)]

    @property
    def evaluations(self) -> list[tuple[int, int]]:
        """Every (training register, test register): within each, then across."""
        n = len(self.registers)
        return [(r, r) for r in range(n)] + [(a, b) for a in range(n) for b in range(n) if a != b]

    def name(self, direction: tuple[int, int]) -> str:
        a, b = (self.registers[r] for r in direction)
        return f"within:{a}" if a == b else f"{a}->{b}"

    def rows(self, register: int, contrast: int) -> np.ndarray:
        """Rows of one contrast in one register."""
        return np.flatnonzero((self.register == register) & (self.Y[contrast] != 0))


def make_design(labels: Sequence[str], register: Sequence[str], cluster: Sequence[int], *, contrasts: dict[str, tuple],
                seed: int, n_repeats: int, n_folds: int = 5) -> Design:
    """A design from row labels. `contrasts`: name -> (positive labels, negative labels).

    Raises BadInput where a class is missing in a register, or texts or clusters are too few.
    """
    labels, register = np.asarray(labels, dtype=object), np.asarray(register, dtype=object)
    if len(labels) < MIN_TEXTS:
        raise BadInput(f"{len(labels)} texts are too few: {MIN_TEXTS} or more are needed")
    registers = tuple(sorted(set(register), key=lambda r: (r != "plain", r)))
    Y = np.stack([np.isin(labels, pos).astype(int) - np.isin(labels, neg) for pos, neg in contrasts.values()])
    for r in registers:
        for c, (name, classes) in enumerate(contrasts.items()):
            for sign, members in zip((1, -1), classes, strict=True):
                if not (Y[c, register == r] == sign).any():
                    raise BadInput(f"contrast {name}: no text labelled {' or '.join(members)} in register {r!r}")
    codes = np.unique(np.asarray(cluster), return_inverse=True)[1]
    n_folds = min(n_folds, codes.max() + 1)
    if n_folds < MIN_FOLDS:
        raise BadInput(f"{codes.max() + 1} scenario cluster(s): grouped folds need {MIN_FOLDS} or more")
    folds = grouped_folds(codes, n_folds=n_folds, n_repeats=n_repeats, seed=seed)
    return Design(tuple(contrasts), Y, registers, np.array([registers.index(r) for r in register]), codes, folds)


@dataclass(frozen=True)
class Areas:
    """AUROCs of one evaluation: `value` [layer, contrast], and `deleted` [layer, contrast, cluster] without each."""

    value: np.ndarray
    deleted: np.ndarray


def areas(scores: np.ndarray, design: Design, direction: tuple[int, int]) -> Areas:
    """AUROCs of out-of-fold `scores` [layer, repeat, training register, contrast, text], averaged over repeats."""
    value, deleted = [], []
    for c in range(len(design.contrasts)):
        rows = design.rows(direction[1], c)
        s, positive = scores[:, :, direction[0], c, rows], design.Y[c, rows] > 0
        value.append(auroc(s, positive).mean(axis=1))
        each = deleted_auroc(s, positive, design.cluster[rows], n_clusters=design.n_clusters)
        deleted.append(each.mean(axis=1))
    return Areas(np.stack(value, axis=1), np.stack(deleted, axis=1))


def weakest(found: Sequence[Areas]) -> Areas:
    """The endpoint T: the least of several evaluations, taken anew with each cluster deleted."""
    return Areas(np.min([a.value for a in found], axis=0), np.min([a.deleted for a in found], axis=0))
