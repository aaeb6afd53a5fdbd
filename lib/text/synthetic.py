"""Synthetic triplets with known truth: bags of invented words, and activations that hold only what is put in.

Each type draws a share of its words from a vocabulary of its own. In the counter register the types may keep their
vocabularies (words transfer) or pass them round (words mislead). Activations are mean word embeddings, which is what a
model without understanding has, plus noise, plus a direction for each type where meaning is planted.
"""

from itertools import product

import numpy as np
import pandas as pd

TYPES = ("cognitive", "affective", "instrumental")
WORDS = [a + b + c for a, b, c in product("bdfgklmnprstvz", "aeiou", ["l", "m", "n", "r", "s", "t", "lo", "na", "ri", "ta"])]
OWN = 40  # words in a type's vocabulary


def triplets(n_scenarios: int, *, seed: int, share: float = 0.15, swap: bool = True, longer: int = 0,
             registers: tuple[str, ...] = ("plain", "counter"), per_cluster: int = 1) -> pd.DataFrame:
    """A text table of empathy triplets.

    `share`: share of words from the type's vocabulary; `swap`: the second register passes the vocabularies round;
    `longer`: words by which affective texts exceed cognitive, and instrumental affective ones.
    """
    rng, rows = np.random.default_rng(seed), []
    words = rng.permutation(WORDS)
    own, rest = words[:3 * OWN].reshape(3, OWN), words[3 * OWN:]
    for r, register in enumerate(registers):
        for s in range(n_scenarios):
            topic = rng.choice(rest, 8)
            for k, label in enumerate(TYPES):
                source = rng.choice(3, rng.integers(40, 56) + longer * k, p=[share, 0.2, 0.8 - share])
                pools = (own[(k + r * swap) % 3], topic, rest)
                text = " ".join(rng.choice(pools[i]) for i in source).capitalize() + "."
                rows.append((f"s{s:03d}-{register}-{label}", f"s{s:03d}", s // per_cluster, "casual_conversation", "work",
                             "empathy", register, label, " ".join(topic), text))
    return pd.DataFrame(rows, columns=["text_id", "scenario_id", "cluster", "context", "domain", "condition", "register",
                                       "label", "scenario", "response"])


def embeddings(texts: pd.DataFrame, *, d_model: int, seed: int) -> np.ndarray:
    """Mean of random word embeddings [text, d_model], scaled to unit standard deviation."""
    rng = np.random.default_rng(seed)
    number = {w: i for i, w in enumerate(WORDS)}
    table = rng.standard_normal((len(WORDS), d_model))
    X = np.stack([table[[number[w.lower().strip(".")] for w in t.split()]].mean(axis=0) for t in texts["response"]])
    return (X / X.std()).astype(np.float32)


def activations(texts: pd.DataFrame, *, n_layers: int, d_model: int, seed: int, meaning: float = 0.0, words: float = 1.0,
                form: float = 0.0, noise: float = 1.0, scenario: float = 1.0) -> np.ndarray:
    """Activations [layer, text, d_model]: `words` x embeddings + `scenario` and `noise` + `meaning` x a direction for
    each type (shared by the registers) + `form` x a direction for text length."""
    rng, lengths = np.random.default_rng(seed), texts["response"].str.split().str.len().to_numpy(float)
    codes, types = texts["cluster"].to_numpy(), texts["label"].map(TYPES.index).to_numpy()
    lengths = (lengths - lengths.mean()) / lengths.std()
    layers = []
    for _ in range(n_layers):
        X = words * embeddings(texts, d_model=d_model, seed=rng.integers(2**31))
        X = X + noise * rng.standard_normal(X.shape) + scenario * rng.standard_normal((codes.max() + 1, d_model))[codes]
        X = X + meaning * rng.standard_normal((3, d_model))[types] + form * np.outer(lengths, rng.standard_normal(d_model))
        layers.append(X.astype(np.float32))
    return np.stack(layers)
