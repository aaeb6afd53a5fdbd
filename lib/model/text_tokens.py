"""Token activations of the study's replies, as shards (`lib.model.shards`): the model is run once for each text.

Texts that share a prompt share one forward (`lib.model.activations`). Only reply tokens are kept, without attention
sinks, in float32: they are few, and what an autoencoder makes of them should not depend on rounding. Stage 03, which
runs the model over all layers, leaves the preregistered layer's shards behind; stage 04 makes what is missing.
"""

from pathlib import Path

import numpy as np

from lib.errors import BadInput
from lib.model.activations import Trie, extract
from lib.model.prompts import Encoded
from lib.model.shards import Shards, open_shards
from lib.store import sha256, to_json

SHARD_GROUPS = 16  # groups of texts (scenarios) a shard


def parts(groups: list) -> list[list]:
    """The groups (texts that share a prompt), shard by shard."""
    return [groups[first:first + SHARD_GROUPS] for first in range(0, len(groups), SHARD_GROUPS)]


def open_tokens(groups: list[list[Encoded]], *, about: dict, template: str, layer: int, d_model: int, folder: Path | None = None) -> Shards:
    """The shards (split `texts`) of one layer that are there so far. `about` is what `weights.load` says of the model."""
    identity = {"format": 1, "texts": sha256(to_json([[text.ids, text.start] for group in groups for text in group])),
                "layer": layer, "template": template, "d_model": d_model, **about}
    return open_shards(identity, kind="texts", folder=folder)


class Collector:
    """The reply tokens of some texts at one layer, for one shard; `add` is what `extract` calls."""

    def __init__(self, layer: int):
        self.layer, self.found = layer, {}

    def add(self, texts: list[Encoded], layer: int, trie: Trie, resid, kept) -> None:
        """`resid` [node, d_model] of the trie of some texts, and `kept` [node], which of them are no sinks; texts may come again."""
        if layer != self.layer:
            return
        usable, nodes = kept.cpu().numpy(), resid.cpu().numpy()
        for text, path in zip(texts, trie.paths, strict=True):
            reply = path[text.start:]
            own = reply[usable[reply]]
            self.found[text] = nodes[own], trie.tokens[own], len(reply) - len(own)

    def shard(self, texts: list[Encoded], first: int) -> tuple[dict[str, np.ndarray], dict]:
        """Arrays of the shard of these texts, numbered from `first` in `texts` [token], and what the manifest says of it.

        Raises BadInput for a reply without tokens and for activations that are not finite.
        """
        resid, tokens, sinks = zip(*(self.found[text] for text in texts), strict=True)
        if not all(map(len, resid)) or not all(np.isfinite(one).all() for one in resid):
            raise BadInput(f"layer {self.layer}: activations of the texts hold NaN, or a reply has no token; check the model's dtype and the texts")
        numbers = np.repeat(np.arange(first, first + len(resid)), [len(one) for one in resid])
        arrays = {"resid": np.concatenate(resid), "tokens": np.concatenate(tokens).astype(np.int32), "texts": numbers.astype(np.int32)}
        return arrays, {"n_tokens": len(numbers), "n_texts": len(resid), "n_sinks": sum(sinks)}


def extract_texts(model, groups: list[list[Encoded]], *, about: dict, template: str, layer: int, folder: Path | None = None) -> Shards:
    """Shards of all groups; those that are missing are made by forwards up to `layer`."""
    shards = open_tokens(groups, about=about, template=template, layer=layer, d_model=model.get_decoder().config.hidden_size, folder=folder)
    error, first = None, 0
    for number, part in enumerate(parts(groups)):
        texts = [text for group in part for text in group]
        if not shards.has("texts", number):
            collector = Collector(layer)
            _, _, how = extract(model, part, [layer], error=error, also=collector.add)
            error = how["trie_relative_error"]
            shards.add("texts", number, *collector.shard(texts, first))
        first += len(texts)
    return shards
