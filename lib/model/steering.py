"""Greedy generation under interventions, all doses of a prompt at once, and how likely the unsteered model finds the replies.

The prompt runs once up to the first edited layer, from where doses are rows of one batch; in decoding the rows of all prompts
are. Hooks are attached for the length of one forward only: whatever happens
to a half-read stream, the model is as it was. Replies are scored by the unsteered model in one token trie a prompt.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.errors import BadInput
from lib.model.activations import SINK, block_outputs, build_trie
from lib.model.interventions import Edit, Hook, attached, check_layer, hooks_of, log_probability, logits_of, trie_states
from lib.model.prompts import Encoded

Edits = Mapping[int, Edit]
BATCH = 200  # rows decoded together


def prompt_ids(model, tokenizer, prompt: str, *, max_new_tokens: int) -> list[int]:
    """Tokens of a prompt text; BadInput where it is empty or leaves no room for the reply."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt.strip() else []
    room = model.config.get_text_config().max_position_embeddings - max_new_tokens
    if not ids:
        raise BadInput("prompt: is empty; give the model something to answer")
    if len(ids) > room:
        raise BadInput(f"prompt: has {len(ids)} tokens; at most {room} leave room for a reply of {max_new_tokens}")
    return ids


@torch.inference_mode()
def _step(model, hooks, tokens: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, watch, mask=None) -> torch.Tensor:
    """Next-token logits [row, vocabulary] after `tokens` [row, n] at `positions`."""
    with watched(model, watch), attached(model, hooks):
        states = model.get_decoder()(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
                                     attention_mask=mask)[0]
    return logits_of(model, states[:, -1])


@contextmanager
def watched(model, watch):
    """Call `watch[1]` with block `watch[0]`'s output, before any edit of it, while the context is open."""
    handle = None if watch is None else model.get_decoder().layers[watch[0]].register_forward_hook(
        lambda _, __, output: watch[1](output[0] if isinstance(output, tuple) else output))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def stream(model, ids: list[int], edits: Edits, *, max_new_tokens: int,
           watch: tuple[int, Callable[[torch.Tensor], None]] | None = None) -> Iterator[torch.Tensor]:
    """Greedy next-token logits [row, vocabulary], step by step; the argmax is what the model goes on with."""
    hooks, rows = hooks_of(model, edits), rows_of(edits)
    logits, cache = started(model, ids, hooks, rows, watch)
    for position in range(len(ids), len(ids) + max_new_tokens):
        yield logits
        if position < len(ids) + max_new_tokens - 1:
            logits = _step(model, hooks, logits.argmax(-1, keepdim=True), torch.tensor([[position]], device=model.device), cache, watch)


def ends_of(model, tokenizer) -> set[int]:
    """Token ids that end a reply."""
    ends = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends] if ends is not None else []), tokenizer.eos_token_id}


class Stacked:
    """One hook for the rows of several prompts: each prompt's own hook sees its own rows."""

    def __init__(self, hooks: list[Hook], rows: int):
        self.hooks, self.rows = hooks, rows

    def __call__(self, block, args, kwargs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        parts = zip(self.hooks, hidden.split(self.rows), kwargs["position_ids"].split(self.rows), strict=True)
        changed = torch.cat([hook.apply(part, positions) for hook, part, positions in parts])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


@torch.inference_mode()
def merged(caches: list[DynamicCache], config) -> tuple[DynamicCache, torch.Tensor]:
    """`(cache, mask [row, position])` of several prompts' caches in one batch, padded on the left."""
    width = max(cache.get_seq_length() for cache in caches)
    pads = [width - cache.get_seq_length() for cache in caches]
    one = DynamicCache(config=config)
    for layer in range(len(caches[0].layers)):
        keys, values = (torch.cat([torch.nn.functional.pad(getattr(cache.layers[layer], name), (0, 0, pad, 0)) for cache, pad in zip(caches, pads, strict=True)])
                        for name in ("keys", "values"))
        one.update(keys, values, layer)
    rows = [len(cache.layers[0].keys) for cache in caches]
    mask = torch.cat([(torch.arange(width) >= pad).long().expand(n, -1) for pad, n in zip(pads, rows, strict=True)])
    return one, mask.to(one.layers[0].keys.device)


def started(model, ids: list[int], hooks, rows: int, watch=None) -> tuple[torch.Tensor, DynamicCache]:
    """`(logits [row, vocabulary], cache)` after a prompt; up to the first edit its rows are computed once."""
    cache = DynamicCache(config=model.get_decoder().config)
    logits = _step(model, hooks, torch.tensor([ids], device=model.device), torch.arange(len(ids), device=model.device)[None], cache, watch)
    with torch.inference_mode():
        for layer in cache.layers:
            layer.batch_repeat_interleave(rows // len(layer.keys))
        return logits.expand(rows, -1), cache


def rows_of(edits: Edits) -> int:
    return max([len(edit) for edit in edits.values()], default=1)


def greedy(model, tokenizer, prompts: list[list[int]], edits: Callable[[int], Edits], *, max_new_tokens: int) -> list[list[list[int]]]:
    """Reply tokens of each prompt and row, the ending one included; all rows of all prompts are decoded in one batch."""
    hooks = [hooks_of(model, edits(len(ids))) for ids in prompts]
    rows = rows_of(edits(len(prompts[0])))
    logits, caches = zip(*(started(model, ids, own, rows) for ids, own in zip(prompts, hooks, strict=True)), strict=True)
    if not all(type(layer) is DynamicLayer for layer in caches[0].layers) and len(prompts) > 1:  # a sliding window cannot be padded
        return [greedy(model, tokenizer, [ids], edits, max_new_tokens=max_new_tokens)[0] for ids in prompts]
    cache, mask = merged(caches, model.get_decoder().config)
    together = {layer: Stacked([own[layer] for own in hooks], rows) for layer in hooks[0]}
    positions = torch.tensor([[len(ids)] for ids in prompts], device=model.device).repeat_interleave(rows, 0)
    ends, steps = torch.tensor(sorted(ends_of(model, tokenizer)), device=model.device), [torch.cat(logits).argmax(-1)]
    done = torch.isin(steps[0], ends)
    while len(steps) < max_new_tokens and not done.all():
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        steps.append(_step(model, together, steps[-1][:, None], positions + len(steps) - 1, cache, None, mask).argmax(-1))
        done = done | torch.isin(steps[-1], ends)
    replies, last = torch.stack(steps, 1).tolist(), set(ends.tolist())
    cut = [reply[:next((i + 1 for i, token in enumerate(reply) if token in last), len(reply))] for reply in replies]
    return [cut[at:at + rows] for at in range(0, len(cut), rows)]


@dataclass(frozen=True)
class Replies:
    """Replies `texts [row][prompt]` and their mean negative log-probability a token, `log_ppl [row, prompt]`, unsteered."""

    texts: list[list[str]]
    log_ppl: np.ndarray

    def rows(self, which: list[int]) -> "Replies":
        """Some of the rows."""
        return Replies([self.texts[row] for row in which], self.log_ppl[which])


def joined(parts: list[Replies]) -> Replies:
    """The same rows for the prompts of all parts."""
    return Replies([[text for row in rows for text in row] for rows in zip(*(part.texts for part in parts), strict=True)],
                   np.concatenate([part.log_ppl for part in parts], axis=1))


@torch.inference_mode()
def log_ppl(model, ids: list[int], replies: list[list[int]]) -> list[float]:
    """Mean negative log-probability a token of replies to one prompt, under the model without any edit."""
    texts = [Encoded((*ids, *reply), len(ids)) for reply in replies]
    trie = build_trie([text.ids for text in texts])
    states = trie_states(model, trie)[0]
    return [-log_probability(model, states, path, text).item() for path, text in zip(trie.paths, texts, strict=True)]


def generate(model, tokenizer, prompts: list[str], edits: Callable[[int], Edits], *, max_new_tokens: int) -> Replies:
    """Greedy replies to every prompt under `edits(start)`, made for a prompt of `start` tokens; rows as in the edits."""
    ids = [prompt_ids(model, tokenizer, prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    texts, scores, together = [], [], max(1, BATCH // rows_of(edits(1)))
    for first in tqdm(range(0, len(ids), together), desc="generating", unit="batch", mininterval=2):
        part = ids[first:first + together]
        for own, replies in zip(part, greedy(model, tokenizer, part, edits, max_new_tokens=max_new_tokens), strict=True):
            scores.append(log_ppl(model, own, replies))
            texts.append(tokenizer.batch_decode(replies, skip_special_tokens=True))
    return Replies([list(row) for row in zip(*texts, strict=True)], np.array(scores).T)


@torch.inference_mode()
def prompt_resid(model, tokenizer, prompts: list[str], layer: int) -> np.ndarray:
    """Outputs of block `layer` at the prompts' tokens, `[token, d_model]`, sinks left out."""
    check_layer(model, layer)
    found = []
    with block_outputs(model, [layer], lambda _, resid: found.append(resid[0].float())) as decoder:
        for prompt in prompts:
            decoder(input_ids=torch.tensor([prompt_ids(model, tokenizer, prompt, max_new_tokens=1)], device=model.device), use_cache=False)
    resid = torch.cat(found)
    norms = resid.norm(dim=1)
    return resid[norms <= SINK * norms.median()].cpu().numpy()


def mean_norm(model, tokenizer, prompts: list[str], layer: int) -> float:
    """Mean residual norm of block `layer`'s output over the prompts' tokens: what coeff 1 adds."""
    return float(np.linalg.norm(prompt_resid(model, tokenizer, prompts, layer), axis=1).mean())
