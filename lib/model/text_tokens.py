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


class Collector:
    """Shards (split `texts`) of one layer, filled group after group; `texts` [token] numbers a token's text in that order.

    `groups` are all groups in order: texts that share a prompt. `about` is what `weights.load` says of the model.
    """

    def __init__(self, groups: list[list[Encoded]], *, about: dict, template: str, layer: int, d_model: int, folder: Path | None = None):
        identity = {"format": 1, "texts": sha256(to_json([[text.ids, text.start] for group in groups for text in group])),
                    "layer": layer, "template": template, "d_model": d_model, **about}
        self.shards, self.layer = open_shards(identity, kind="texts", folder=folder), layer
        self.sizes = [sum(map(len, groups[first:first + SHARD_GROUPS])) for first in range(0, len(groups), SHARD_GROUPS)]
        self.done, self.seen, self.n_groups, self.pending = len(self.shards.rows), 0, len(groups), []

    @property
    def missing(self) -> int:
        """Number of the first group whose tokens are not there yet."""
        return min(self.done * SHARD_GROUPS, self.n_groups)

    def add(self, group: list[Encoded], layer: int, trie: Trie, resid, kept) -> None:
        """The next group: `resid` [node, d_model] of its trie and `kept` [node], which of them are no sinks."""
        if layer != self.layer:
            return
        number = self.seen // SHARD_GROUPS
        if number >= self.done:
            usable, nodes = kept.cpu().numpy(), resid.cpu().numpy()
            paths = [path[text.start:] for text, path in zip(group, trie.paths, strict=True)]
            self.pending += [(nodes[path[usable[path]]], trie.tokens[path[usable[path]]], int((~usable[path]).sum())) for path in paths]
        self.seen += 1
        if self.pending and (self.seen % SHARD_GROUPS == 0 or self.seen == self.n_groups):
            self.write(number)

    def write(self, number: int) -> None:
        resid, tokens, sinks = zip(*self.pending, strict=True)
        if not all(map(len, resid)) or not all(np.isfinite(one).all() for one in resid):
            raise BadInput(f"layer {self.layer}: activations of the texts hold NaN, or a reply has no token; check the model's dtype and the texts")
        first = sum(self.sizes[:number])
        texts = np.repeat(np.arange(first, first + len(resid)), [len(one) for one in resid])
        arrays = {"resid": np.concatenate(resid), "tokens": np.concatenate(tokens).astype(np.int32), "texts": texts.astype(np.int32)}
        self.shards.add("texts", number, arrays, {"n_tokens": len(texts), "n_texts": len(resid), "n_sinks": sum(sinks)})
        self.pending = []


def extract_texts(model, groups: list[list[Encoded]], *, about: dict, template: str, layer: int, folder: Path | None = None) -> Shards:
    """Shards of all groups; those that are missing are made by forwards up to `layer`."""
    collector = Collector(groups, about=about, template=template, layer=layer, d_model=model.get_decoder().config.hidden_size, folder=folder)
    collector.seen = collector.missing
    if missing := groups[collector.missing:]:
        extract(model, missing, [layer], also=collector.add)
    return collector.shards
