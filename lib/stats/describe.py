"""What the clusters are: their types, topics, words and latents, so that a topic cluster is recognised as one."""

import re

import numpy as np
import pandas as pd

N_WORDS = 8
N_LATENTS = 5


def telling_words(responses: list[str], member: np.ndarray, *, n: int = N_WORDS) -> list[str]:
    """Words whose share of texts differs most between members and the rest, in standard errors, most typical first."""
    bags = [set(re.findall(r"[a-z']+", text.lower())) for text in responses]
    found = {}
    for word in set().union(*bags):
        held = np.array([word in bag for bag in bags])
        share = held.mean()
        if held.sum() >= 3 and share < 1 and 0 < member.sum() < len(member):
            spread = np.sqrt(share * (1 - share) * (1 / member.sum() + 1 / (~member).sum()))
            found[word] = (held[member].mean() - held[~member].mean()) / spread
    return sorted(found, key=lambda word: (-found[word], word))[:n]


def telling_latents(latents: np.ndarray, member: np.ndarray, scale: np.ndarray, *, n: int = N_LATENTS) -> list[int]:
    """Latents [d_sae] that are higher in members than elsewhere, by how far they move the residual stream."""
    if not 0 < member.sum() < len(member):
        return []
    return np.argsort(-(latents[member].mean(0) - latents[~member].mean(0)) * scale, kind="stable")[:n].tolist()


def describe(clustered: pd.DataFrame, texts: pd.DataFrame, representation: str, *, latents: np.ndarray, scale: np.ndarray,
             top: pd.DataFrame) -> pd.DataFrame:
    """One row a cluster: `cluster, n`, a share per type, `context` and its share, `words`, `latents` with their tokens, `example`.

    `clustered` is the table of `lib.stats.clusters`, `latents` [text, d_sae] belong to `texts`, `scale` [d_sae] are
    decoder norms, `top` has `latent, rank, token` (tokens in words).
    """
    rows = pd.Index(texts.text_id).get_indexer(clustered.text_id)
    responses, codes = list(texts.response.iloc[rows]), clustered[representation].to_numpy()
    words = top.groupby("latent").token.agg(lambda tokens: " ".join(dict.fromkeys(map(repr, tokens)))).to_dict()
    found = []
    for cluster in np.unique(codes):
        member = codes == cluster
        contexts = clustered.context[member].value_counts(normalize=True)
        telling = telling_latents(latents[rows], member, scale)
        named = [f"{latent}: {words.get(latent, '')}" for latent in telling]
        strongest = np.where(member, latents[rows, telling[0]], -1).argmax() if telling else member.argmax()
        types = (clustered.type[member].value_counts(normalize=True)).to_dict()
        found.append({"cluster": int(cluster), "n": int(member.sum()), **{f"share_{kind}": types.get(kind, 0.0) for kind in sorted(set(clustered.type))},
                      "context": contexts.index[0], "share_context": contexts.iloc[0], "words": ", ".join(telling_words(responses, member)),
                      "latents": "; ".join(named), "example": responses[strongest]})
    return pd.DataFrame(found)
