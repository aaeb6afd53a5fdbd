"""Pooled activations: one forward over a token trie for all texts that share a prompt.

Texts of one scenario share its prompt, so their tokens form a tree. Each node is computed once: position ids are
depths and the attention mask lets a node see its ancestors only, which equals separate forwards exactly. What all
prompts begin with (the chat template's opening) is computed once for all of them and kept as keys and values. Response
tokens are mean-pooled inside the forward in float32; attention sinks (residual norm above `SINK` times the median,
see "Massive Activations", Sun et al. 2024) are left out and counted. `resid_post` of block ℓ is the output of block ℓ.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.errors import Failed
from lib.model.prompts import Encoded
from lib.model.replicas import each

SINK = 10.0


@dataclass(frozen=True)
class Trie:
    """Token tree of several texts: `tokens`, `depths` and `parents` per node, and each text's path of node numbers."""

    tokens: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    paths: tuple[np.ndarray, ...]

    def visible(self) -> np.ndarray:
        """`[node, node]` bool: the row's node sees the column's (its ancestors and itself)."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen


def build_trie(sequences: list[tuple[int, ...]]) -> Trie:
    """The token tree of some sequences; equal prefixes become one path."""
    children, tokens, depths, parents, paths = {}, [], [], [], []
    for sequence in sequences:
        node, path = -1, []
        for depth, token in enumerate(sequence):
            key = (node, token)
            if key not in children:
                children[key] = len(tokens)
                tokens.append(token), depths.append(depth), parents.append(node)
            node = children[key]
            path.append(node)
        paths.append(np.array(path))
    return Trie(np.array(tokens), np.array(depths), np.array(parents), tuple(paths))


@contextmanager
def block_outputs(model, layers, receive):
    """Call `receive(layer, resid_post)` for every block in `layers` (-1: the embedding) while the context is open.

    Blocks after the last one needed are not run. Everything is restored on leaving, also after an exception.
    """
    decoder = model.get_decoder()
    blocks, depth = decoder.layers, decoder.config.num_hidden_layers
    hooks = []
    try:
        decoder.layers = blocks[: max(layers) + 1] if max(layers) >= 0 else blocks[:1]
        decoder.config.num_hidden_layers = len(decoder.layers)
        for layer in layers:
            if layer == -1:
                hooks.append(blocks[0].register_forward_pre_hook(
                    lambda _, args, kwargs: receive(-1, args[0] if args else kwargs["hidden_states"]), with_kwargs=True))
            else:
                hooks.append(blocks[layer].register_forward_hook(
                    lambda _, __, output, layer=layer: receive(layer, output[0] if isinstance(output, tuple) else output)))
        yield decoder
    finally:
        for hook in hooks:
            hook.remove()
        decoder.layers, decoder.config.num_hidden_layers = blocks, depth


def attention_mask(model, trie: Trie, *, first: int = 0):
    """The additive 4-D mask of a trie's nodes from `first` on, one per attention type where the model has sliding windows."""
    config = model.get_decoder().config
    seen = torch.from_numpy(trie.visible())[first:]
    depth = torch.from_numpy(trie.depths)

    def additive(allowed):
        mask = torch.zeros(allowed.shape, dtype=model.dtype)
        return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[None, None].to(model.device)

    window = getattr(config, "sliding_window", None)
    near = seen & (depth[first:, None] - depth[None, :] < window) if window else seen
    if config.model_type in ("gemma2", "gemma3_text", "qwen2"):
        return {kind: additive(near if kind == "sliding_attention" else seen) for kind in set(config.layer_types)}
    return additive(near if config.model_type == "mistral" else seen)


def memberships(model, trie: Trie, texts: list[Encoded]) -> torch.Tensor:
    """`[text, node]` 1.0 where a node is a response token of a text."""
    members = torch.zeros(len(texts), len(trie.tokens), device=model.device)
    for row, (text, path) in enumerate(zip(texts, trie.paths, strict=True)):
        members[row, path[text.start:]] = 1.0
    return members


def kept_nodes(resid: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """`[node]` bool: not a sink, judged by the norms of `resid` [node, d_model] against the response nodes' median."""
    norms = resid.norm(dim=-1)
    return norms <= SINK * norms[members.sum(0) > 0].median()


@dataclass(frozen=True)
class Header:
    """The first tokens of every text of a study, run once: their keys and values, and `resid` [token, d_model] by layer."""

    tokens: list[int]
    cache: DynamicCache
    resid: dict[int, torch.Tensor]


@torch.inference_mode()
def run_header(model, groups: list[list[Encoded]], layers) -> Header | None:
    """What all prompts of the groups begin with; None where that is nothing, or where the model's cache drops old tokens."""
    heads = [text.ids[:text.start] for group in groups for text in group]
    tokens = [token for token, _ in takewhile(lambda both: both[0] == both[1], zip(min(heads), max(heads), strict=False))]
    resid = {}
    with block_outputs(model, layers, lambda layer, output: resid.update({layer: output[0].float()})) as decoder:
        cache = DynamicCache(config=decoder.config)
        if not tokens or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        decoder(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
    return Header(tokens, cache, resid)


@torch.inference_mode()
def run_trie(model, trie: Trie, layers, receive, *, header: Header | None = None) -> None:
    """One forward over a trie; `receive(layer, resid [node, d_model] float32)` gets the residual stream of every node.

    The nodes of a `header` are its first ones and not computed again.
    """
    first, cache = (len(header.tokens), copy.deepcopy(header.cache)) if header else (0, None)

    def whole(layer, output):
        receive(layer, torch.cat([header.resid[layer], output[0].float()]) if header else output[0].float())

    with block_outputs(model, layers, whole) as decoder:
        decoder(input_ids=torch.from_numpy(trie.tokens[first:])[None].to(model.device),
                position_ids=torch.from_numpy(trie.depths[first:])[None].to(model.device),
                attention_mask=attention_mask(model, trie, first=first),
                past_key_values=cache, use_cache=header is not None)


@torch.inference_mode()
def run_plain(model, trie: Trie, layers, receive) -> None:
    """The same as `run_trie` for a trie of separate texts, by one ordinary forward a text, with the model's own mask."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    with block_outputs(model, layers, lambda layer, resid: found[layer].append(resid[0].float())) as decoder:
        for path in trie.paths:
            decoder(input_ids=torch.from_numpy(trie.tokens[path])[None].to(model.device), use_cache=False)
    for layer, parts in found.items():
        receive(layer, torch.cat(parts))


def separate(sequences: list[tuple[int, ...]]) -> Trie:
    """The sequences side by side, nothing shared."""
    ends = np.cumsum([len(sequence) for sequence in sequences])
    paths = tuple(np.arange(end - len(sequence), end) for sequence, end in zip(sequences, ends, strict=True))
    depths = np.concatenate([np.arange(len(path)) for path in paths])
    return Trie(np.concatenate([np.array(sequence) for sequence in sequences]), depths, np.where(depths > 0, np.arange(ends[-1]) - 1, -1), paths)


@torch.inference_mode()
def pool(model, texts: list[Encoded], layers, *, share: bool = True, header: Header | None = None, also=lambda *_: None) -> tuple[np.ndarray, np.ndarray]:
    """`(pooled [layer, text, d_model] float32, sinks [layer, text])` of texts, in one trie forward or, without `share`, one by one.

    `also(layer, trie, resid, kept)` is given what a layer's means are made of: all nodes, and which of them are no sinks.
    """
    trie = (build_trie if share else separate)([text.ids for text in texts])
    members = memberships(model, trie, texts)
    pooled, sinks = {}, {}

    def receive(layer, resid):
        usable = kept_nodes(resid, members)
        also(layer, trie, resid, usable)
        kept = members * usable
        pooled[layer] = (kept @ resid / kept.sum(1, keepdim=True)).cpu().numpy()
        sinks[layer] = (members.sum(1) - kept.sum(1)).cpu().numpy().astype(np.int64)

    (partial(run_trie, header=header) if share else run_plain)(model, trie, layers, receive)
    return np.stack([pooled[layer] for layer in layers]), np.stack([sinks[layer] for layer in layers])


def pool_halving(model, texts: list[Encoded], layers, *, also=lambda *_: None, **how) -> tuple[np.ndarray, np.ndarray]:
    """`pool`; where memory does not suffice, of one half of the texts and then of the other.

    That gives the same but for rounding; sinks are judged against the half's own median.
    `also(texts, layer, trie, resid, kept)` may be called again for a text whose forward was given up. Raises Failed where
    memory does not even suffice for one text.
    """
    try:
        return pool(model, texts, layers, also=partial(also, texts), **how)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; on the CPU there is no class of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        if len(texts) == 1:
            raise Failed(f"not enough memory for one text of {len(texts[0].ids)} tokens on {model.device}; take a larger card or close other programs") from None
    print(f"not enough memory for {len(texts)} texts in one forward on {model.device}; they are taken in two halves")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    halves = [pool_halving(model, half, layers, also=also, **how) for half in (texts[:len(texts) // 2], texts[len(texts) // 2:])]
    return tuple(np.concatenate(both, axis=1) for both in zip(*halves, strict=True))


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest `‖a − b‖ / ‖b‖` over the leading axes."""
    return float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max())


def trie_error(model, texts: list[Encoded], layers) -> float:
    """Largest relative error of header and trie against ordinary forwards on a few texts that share a prompt."""
    return relative_error(pool(model, texts, layers, header=run_header(model, [texts], layers))[0], pool(model, texts, layers, share=False)[0])


def extract(model, groups: list[list[Encoded]], layers, *, tolerance: float = 1e-4, error: float | None = None, also=lambda *_: None):
    """`(pooled [layer, text, d_model], sinks [layer, text], about)` of all texts, group after group.

    A group holds texts that share a prompt. The trie is first checked against ordinary forwards on three texts, unless its
    `error` is known already; where it misses `tolerance` these serve all texts, and `about` says so.
    `also(texts, layer, trie, resid, kept)` sees every token of some of a group's texts on its way to the mean; on the CPU
    from several threads, in any order.
    """
    bar = error is None  # whoever knows the error calls once a shard, and shows how many there are
    header = run_header(model, groups, layers)
    error = trie_error(model, groups[0][:3], layers) if error is None else error
    exact = error <= (tolerance if model.dtype == torch.float32 else 0.05)
    pooled, sinks = zip(*each(model, lambda own, group: pool_halving(own, group, layers, share=exact, header=header, also=also), groups,
                              desc="extracting", unit="scenario", disable=not bar), strict=True)
    about = {"method": "token trie" if exact else "plain forwards (the trie missed its tolerance)",
             "trie_relative_error": error, "attention": model.config._attn_implementation, "dtype": str(model.dtype)}
    return np.concatenate(pooled, axis=1), np.concatenate(sinks, axis=1), about
