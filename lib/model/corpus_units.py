"""Shards of a corpus one by one, for a worker among others; `lib.model.corpus.extract_corpus` makes all that are missing."""

from lib.model.corpus import BATCH_TOKENS, n_shards, open_corpus, shard_arrays, shard_pieces
from lib.model.shards import Shards
from lib.params import Model


class CorpusUnits:
    """The shards of a corpus at one layer; `about` is what `weights.load` says of the model, `corpus` as for `extract_corpus`."""

    def __init__(self, model, tokenizer, params: Model, *, about: dict, layer: int, n_tokens: dict[str, int], shard_tokens: int, corpus: str):
        self.model, self.tokenizer, self.template, self.layer, self.corpus, self.shard_tokens = model, tokenizer, params.template, layer, corpus, shard_tokens
        self.wanted, self.streams = n_shards(n_tokens, shard_tokens), {}
        self.shards = open_corpus(about=about, template=params.template, layer=layer, d_model=params.d_model, shard_tokens=shard_tokens, corpus=corpus)

    def missing(self) -> list[tuple[str, int]]:
        """`(split, number)` of the shards that are not there, by number."""
        keys = [(split, number) for split, n in self.wanted.items() for number in range(n) if not self.shards.has(split, number)]
        return sorted(keys, key=lambda key: key[1])

    def make(self, split: str, number: int) -> list[tuple[Shards, dict]]:
        """Write a shard; returns its row with the shards that it is to be entered into, nothing where the corpus ended before."""
        at, stream = self.streams.get(split, (number, None))
        if stream is None or at > number:  # texts are read onwards only: for an earlier shard, from the beginning
            stream = shard_pieces(self.tokenizer, self.template, wanted={split: self.wanted[split]}, shard_tokens=self.shard_tokens, corpus=self.corpus)
        self.streams[split] = number + 1, stream
        for _, found, group in stream:
            if found == number:
                return [(self.shards, self.shards.write(split, number, *shard_arrays(self.model, group, self.layer, batch_tokens=BATCH_TOKENS)))]
        return []
