"""Stage 03's forwards, in shards of scenarios: a machine that goes away loses the shard in hand, and many may share the work.

A shard is two files (`lib.model.shards`): `pooled` holds the mean of every reply at all layers, `tokens` the single
tokens of the preregistered layer. One process and a cluster (`lib.model.cluster`) make them by the same code, each shard
by itself, so that who makes which changes no bit.
"""

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.files import sha256, to_json
from lib.model import activations
from lib.model.activations import extract, trie_error
from lib.model.prompts import Encoded
from lib.model.shards import Shards, open_shards
from lib.model.text_tokens import Collector, open_tokens, parts
from lib.params import Model, Params
from lib.sources import source_files
from lib.store import versions


def groups_of(scenarios: list[str]) -> list[list[int]]:
    """Row numbers of the texts of each scenario, scenarios in the order of their first text."""
    groups: dict[str, list[int]] = {}
    for row, scenario in enumerate(scenarios):
        groups.setdefault(scenario, []).append(row)
    return list(groups.values())


def layers_of(params: Params, last_layer: int) -> list[int]:
    """The layers to keep, -1 (the embedding) first: up to `last_layer`, where -1 is the model's last and -2 the preregistered one."""
    last = {-1: params.model.n_layers - 1, -2: params.layer}.get(last_layer, last_layer)
    if not params.layer <= last < params.model.n_layers:
        raise BadInput(f"last_layer {last_layer}: must reach the preregistered layer {params.layer}, and the model has {params.model.n_layers}")
    return list(range(-1, last + 1))


class Extraction:
    """The shards of all `groups` (texts that share a prompt) at `layers`, with the tokens of `layer`.

    `about` is what `weights.load` says of the model. Shards of other weights, texts, layers, code or versions are never used.
    """

    def __init__(self, model, groups: list[list[Encoded]], params: Model, *, about: dict, layer: int, layers: list[int], tolerance: float):
        self.model, self.groups, self.parts = model, groups, parts(groups)
        self.layer, self.layers, self.tolerance, self.error = layer, layers, tolerance, None
        self.tokens = open_tokens(groups, about=about, template=params.template, layer=layer, d_model=params.d_model)
        code = [sha256(path) for path in (Path(__file__), *source_files(Path(activations.__file__)))]
        identity = {**self.tokens.identity, "layers": layers, "tolerance": tolerance, "dtype": params.dtype, "attention": params.attention,
                    "groups": [len(group) for group in groups], "code": sha256(to_json(code)), "versions": {name: version.split("+")[0] for name, version in versions().items()}}  # "+cpu", "+cu130": one study may use both
        self.pooled = open_shards(identity, kind="pooled")

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [number for number in range(len(self.parts)) if not (self.pooled.has("texts", number) and self.tokens.has("texts", number))]

    def make(self, number: int) -> list[tuple[Shards, dict]]:
        """Write shard `number`; returns its two rows with the shards that they are to be entered into."""
        if self.error is None:  # of the first texts always, so that every process decides alike
            self.error = trie_error(self.model, self.groups[0][:3], self.layers)
        texts, collector = [text for group in self.parts[number] for text in group], Collector(self.layer)
        resid, sinks, how = extract(self.model, self.parts[number], self.layers, tolerance=self.tolerance, error=self.error, also=collector.add)
        if not np.isfinite(resid).all():
            raise BadInput(f"{self.pooled.folder.name}: activations hold NaN or infinite values; check the model's dtype and the texts")
        first = sum(len(group) for part in self.parts[:number] for group in part)
        tokens = self.tokens.write("texts", number, *collector.shard(texts, first))
        pooled = self.pooled.write("texts", number, {"resid": resid, "sinks": sinks}, {"shape": list(resid.shape), "how": how})
        return [(self.tokens, tokens), (self.pooled, pooled)]

    def gather(self) -> tuple[np.ndarray, np.ndarray, dict]:
        """`(pooled [layer, text, d_model], sinks [layer, text], about)` of all groups in order; what is missing is made first."""
        for number in tqdm(self.missing(), desc="extracting", unit="shard", mininterval=2):
            for shards, row in self.make(number):
                shards.enter(row)
        rows = self.pooled.of("texts")
        found = [self.pooled.load(row) for row in rows]
        how = max((row["how"] for row in rows), key=lambda how: how["trie_relative_error"])
        return np.concatenate([one["resid"] for one in found], axis=1), np.concatenate([one["sinks"] for one in found], axis=1), how
