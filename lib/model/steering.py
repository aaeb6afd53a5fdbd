"""Greedy generation under interventions, all doses of a prompt at once, and how likely the unsteered model finds the replies.

The prompt runs once up to the first edited layer; from there on, and in decoding, doses are rows of one batch. Rows of a
prompt have equal length, so nothing is padded. Hooks are attached for the length of one forward only: whatever happens
to a half-read stream, the model is as it was. Replies are scored by the unsteered model in one token trie a prompt.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from lib.errors import BadInput
from lib.model.activations import SINK, block_outputs, build_trie
from lib.model.interventions import Edit, attached, check_layer, hooks_of, log_probability, logits_of, trie_states
from lib.model.prompts import Encoded

Edits = Mapping[int, Edit]


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
def _step(model, hooks, tokens: torch.Tensor, position: int, cache: DynamicCache, watch) -> torch.Tensor:
    """Next-token logits [row, vocabulary] after `tokens` [row, n], whose first is at `position`."""
    positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
    with watched(model, watch), attached(model, hooks):
        states = model.get_decoder()(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)[0]
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
    hooks, cache = hooks_of(model, edits), DynamicCache(config=model.get_decoder().config)
    rows = max([len(edit) for edit in edits.values()], default=1)
    logits = _step(model, hooks, torch.tensor([ids], device=model.device), 0, cache, watch)
    with torch.inference_mode():
        for layer in cache.layers:  # up to the first edit the rows are one
            layer.batch_repeat_interleave(rows // len(layer.keys))
        logits = logits.expand(rows, -1)
    for position in range(len(ids), len(ids) + max_new_tokens):
        yield logits
        if position < len(ids) + max_new_tokens - 1:
            logits = _step(model, hooks, logits.argmax(-1, keepdim=True), position, cache, watch)


def ends_of(model, tokenizer) -> set[int]:
    """Token ids that end a reply."""
    ends = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends] if ends is not None else []), tokenizer.eos_token_id}


def greedy(model, tokenizer, ids: list[int], edits: Edits, *, max_new_tokens: int) -> list[list[int]]:
    """Reply tokens of each row, the ending one included."""
    ends, steps = torch.tensor(sorted(ends_of(model, tokenizer)), device=model.device), []
    done = None
    for logits in stream(model, ids, edits, max_new_tokens=max_new_tokens):
        steps.append(logits.argmax(-1))
        over = torch.isin(steps[-1], ends)
        done = over if done is None else done | over
        if done.all():
            break
    rows = torch.stack(steps, 1).tolist()
    stops = [next((i + 1 for i, token in enumerate(row) if token in set(ends.tolist())), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


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
    texts, scores = [], []
    for prompt in tqdm(prompts, desc="generating", unit="prompt", mininterval=2):
        ids = prompt_ids(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
        replies = greedy(model, tokenizer, ids, edits(len(ids)), max_new_tokens=max_new_tokens)
        scores.append(log_ppl(model, ids, replies))
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
