"""Token activations of the study's replies, as shards (`lib.model.shards`): the model is run once for each text.

Texts that share a prompt share one forward (`lib.model.activations`). Only reply tokens are kept, without attention
sinks, in float32: they are few, and what an autoencoder makes of them should not depend on rounding.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.model.activations import build_trie, kept_nodes, memberships, run_trie
from lib.model.prompts import Encoded
from lib.model.shards import Shards, open_shards
from lib.store import sha256, to_json

SHARD_GROUPS = 16  # groups of texts (scenarios) a shard


@torch.inference_mode()
def reply_tokens(model, group: list[Encoded], layer: int) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """`(resid [token, d_model] a text, token ids a text, sinks left out)` of texts that share a prompt."""
    trie, caught = build_trie([text.ids for text in group]), {}
    members = memberships(model, trie, group)
    run_trie(model, trie, [layer], lambda _, resid: caught.update(resid=resid))
    kept = kept_nodes(caught["resid"], members).cpu().numpy()
    paths = [path[text.start:] for text, path in zip(group, trie.paths, strict=True)]
    chosen = [path[kept[path]] for path in paths]
    resid = caught["resid"].cpu().numpy()
    return [resid[path] for path in chosen], [trie.tokens[path] for path in chosen], sum(map(len, paths)) - sum(map(len, chosen))


def extract_texts(model, groups: list[list[Encoded]], *, about: dict, template: str, layer: int, folder: Path | None = None) -> Shards:
    """Shards (split `texts`) of all groups in order; `texts` [token] numbers a token's text in that order.

    `about` is what `weights.load` says of the model. Raises BadInput on NaN or a text without any token left.
    """
    identity = {"format": 1, "texts": sha256(to_json([[text.ids, text.start] for group in groups for text in group])), "layer": layer,
                "template": template, "d_model": model.get_decoder().config.hidden_size, **about}
    shards = open_shards(identity, kind="texts", folder=folder)
    first = 0
    for number in tqdm(range(-(-len(groups) // SHARD_GROUPS)), desc="texts", unit="shard", mininterval=2):
        part = groups[number * SHARD_GROUPS:(number + 1) * SHARD_GROUPS]
        n_texts = sum(map(len, part))
        if number >= len(shards.rows):
            found = [reply_tokens(model, group, layer) for group in part]
            resid, tokens = ([one for each in found for one in each[at]] for at in (0, 1))
            if not all(map(len, resid)) or not all(np.isfinite(one).all() for one in resid):
                raise BadInput(f"layer {layer}: activations of the texts hold NaN, or a reply has no token; check the model's dtype and the texts")
            texts = np.repeat(np.arange(first, first + n_texts), [len(one) for one in resid])
            arrays = {"resid": np.concatenate(resid), "tokens": np.concatenate(tokens).astype(np.int32), "texts": texts.astype(np.int32)}
            shards.add("texts", number, arrays, {"n_tokens": len(texts), "n_texts": n_texts, "n_sinks": int(sum(each[2] for each in found))})
        first += n_texts
    return shards
