"""Condition transfer: does a classifier of one condition's three classes sort another condition's?

Nearest class mean on scenario-centred activations, in closed form. A cluster's own texts never help to classify it, so
the diagonal is cross-validated and conditions that share scenarios share no noise. Classes of two conditions have no
given correspondence: the best of the six mappings counts, and is chosen anew in every permutation.
"""

from itertools import permutations

import numpy as np
import pandas as pd

from lib.stats.ustat import cluster_sums

COLUMNS = ["train", "test", "accuracy", "null_mean", "null_high", "p"]
MAPPINGS = np.array(list(permutations(range(3))))


def predictions(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *,
                n_clusters: int) -> np.ndarray:
    """Predicted class [S, 3] of each test text, from training means without the text's own cluster.

    `train` and `test` are (values [S, 3, d], cluster codes [S]), scenario means taken out.
    """
    (values, codes), (rows, test_codes) = train, test
    sums, counts = cluster_sums(values, codes, n_clusters=n_clusters), np.bincount(codes, minlength=n_clusters)
    n_left = (len(values) - counts)[test_codes, None, None]
    total = sums.sum(0)
    own = np.einsum("skd,sjd->skj", rows, sums[test_codes])
    scores = (rows @ total.T - own) / n_left
    gram_total, cross = total @ total.T, np.einsum("gjd,jd->gj", sums, total)
    norms = np.diag(gram_total) - 2 * cross + np.einsum("gjd,gjd->gj", sums, sums)
    return (scores - norms[test_codes][:, None] / n_left**2 / 2).argmax(-1)


def confusion_by_order(predicted: np.ndarray) -> np.ndarray:
    """Confusion counts [S, 6, 3, 3] (true, predicted) of every scenario under each order of its three labels."""
    return np.eye(3, dtype=np.int16)[predicted][:, MAPPINGS]


def accuracy(confusion: np.ndarray, *, best: bool) -> np.ndarray:
    """Accuracy of confusion counts [..., 3, 3]: of the identity mapping, or of the best of six."""
    mappings = MAPPINGS if best else MAPPINGS[:1]
    hits = confusion[..., np.arange(3), mappings].sum(-1)
    return hits.max(-1) / confusion.sum((-2, -1))


def null_accuracy(predicted: np.ndarray, codes: np.ndarray, *, best: bool, n_permutations: int,
                  rng: np.random.Generator) -> np.ndarray:
    """Accuracies [n_permutations] when labels are permuted within triplets, alike in all triplets of a cluster."""
    by_order = confusion_by_order(predicted).astype(float)
    per_cluster = cluster_sums(by_order, codes, n_clusters=codes.max() + 1)
    order = rng.integers(0, 6, size=(n_permutations, len(per_cluster)))
    drawn = np.zeros((n_permutations, 3, 3))
    for which in range(6):
        drawn += np.einsum("pg,gij->pij", order == which, per_cluster[:, which])
    return accuracy(drawn, best=best)


def transfer_table(blocks: dict[str, tuple[np.ndarray, np.ndarray]], *, n_clusters: int, n_permutations: int,
                   seed: int) -> pd.DataFrame:
    """One row a (train, test) pair of conditions: accuracy, the null's mean and 97.5% quantile, and p."""
    rng, rows = np.random.default_rng(seed), []
    for train, train_block in blocks.items():
        for test, test_block in blocks.items():
            best = train != test
            predicted = predictions(train_block, test_block, n_clusters=n_clusters)
            observed = float(accuracy(confusion_by_order(predicted)[:, 0].sum(0), best=best))
            null = null_accuracy(predicted, test_block[1], best=best, n_permutations=n_permutations, rng=rng)
            p = (1 + (null >= observed - 1e-12).sum()) / (n_permutations + 1)
            rows.append({"train": train, "test": test, "accuracy": observed, "null_mean": null.mean(),
                         "null_high": np.quantile(null, 0.975), "p": p})
    return pd.DataFrame(rows, columns=COLUMNS)
