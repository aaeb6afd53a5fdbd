"""Interventions on the residual stream: ablate a direction, add it, score replies and generate under it.

Mean ablation replaces `h` by `h − (ŵᵀ(h − μ)) ŵ`: the projection on the direction becomes that of the mean (Arditi et
al. 2024, "Refusal is mediated by a single direction"). Steering adds `coeff · mean‖h‖ · ŵ`, so `coeff` is in units of
the layer's residual norm. Directions or doses are rows of one batch: the forward is shared up to the layer and
widens there. Attention sinks are never edited.
"""

from contextlib import contextmanager

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.model.activations import SINK, attention_mask, build_trie
from lib.model.prompts import Encoded


def unit(direction: np.ndarray, name: str = "direction") -> np.ndarray:
    """The direction at length 1; a zero or non-finite one is refused."""
    norm = np.linalg.norm(direction)
    if not np.isfinite(norm) or norm == 0:
        raise BadInput(f"{name}: has norm {norm}; a direction needs a finite, non-zero length")
    return direction / norm


@contextmanager
def edited(model, layer: int, edit):
    """Replace the output of block `layer` by `edit(output)` while the context is open; always restored."""
    blocks = model.get_decoder().layers
    if not 0 <= layer < len(blocks):
        raise BadInput(f"layer {layer}: out of range; the model has layers 0 to {len(blocks) - 1}")

    def hook(_, __, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ablation_rows(directions: torch.Tensor, mean: torch.Tensor, nodes: torch.Tensor):
    """An edit that turns `[1, node, d]` into `[1 + row, node, d]`: untouched first, then one row a direction.

    Row r is mean-ablated along `directions[r]` on `nodes`. The change of every row is scaled to the energy (mean squared
    norm over the nodes) of the first row's, so that random directions disturb as much as the one they are compared with.
    """
    def edit(hidden):
        norms = hidden[0].norm(dim=-1)
        where = nodes & (norms <= SINK * norms.median())
        projections = (hidden[0] - mean) @ directions.T * where[:, None]
        energy = projections.square().sum(0)
        scaled = projections * (energy[0] / energy.clamp_min(1e-20)).sqrt()
        change = scaled.T[:, :, None] * directions[:, None, :]
        return torch.cat([hidden, hidden - change])
    return edit


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits of final hidden states, soft-capped where the family does so."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.get_decoder().config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.inference_mode()
def score_rows(model, texts: list[Encoded], layer: int, make_edit) -> np.ndarray:
    """`[row, text]` log-probability per reply token of texts that share a prompt, for each row of an edit.

    `make_edit(prompt_nodes)` gets a bool mask over the trie's nodes and returns the edit of block `layer`'s output.
    """
    trie = build_trie([text.ids for text in texts])
    prompt = torch.zeros(len(trie.tokens), dtype=torch.bool)
    prompt[trie.paths[0][: texts[0].start]] = True
    with edited(model, layer, make_edit(prompt.to(model.device))):
        hidden = model.get_decoder()(
            input_ids=torch.from_numpy(trie.tokens)[None].to(model.device), use_cache=False,
            position_ids=torch.from_numpy(trie.depths)[None].to(model.device), attention_mask=attention_mask(model, trie))[0]
    scores = np.zeros((len(hidden), len(texts)))
    nodes = [torch.from_numpy(path[text.start - 1:-1]) for text, path in zip(texts, trie.paths, strict=True)]
    targets = [torch.tensor(text.ids[text.start:]) for text in texts]
    for row, states in enumerate(hidden):
        for column, (where, target) in enumerate(zip(nodes, targets, strict=True)):
            logp = logits_of(model, states[where.to(model.device)]).log_softmax(-1)
            scores[row, column] = logp.gather(1, target.to(model.device)[:, None]).mean().item()
    return scores


@torch.inference_mode()
def generate_steered(model, tokenizer, prompts: list[str], direction: np.ndarray, coeffs: list[float], layer: int,
                     *, max_new_tokens: int, batch: int = 64):
    """`(replies [coeff][prompt], log_ppl [coeff, prompt])`: greedy replies under steering at all positions.

    `log_ppl` is each reply's mean negative log-probability under the unsteered model.
    """
    device, pad = model.device, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    scale = mean_norm(model, ids, layer)
    vector = torch.as_tensor(unit(direction) * scale, dtype=model.dtype, device=device)
    jobs = [(coeff, prompt) for coeff in coeffs for prompt in range(len(prompts))]
    replies, log_ppl = [], []
    for first in tqdm(range(0, len(jobs), batch), desc="generating", unit="batch", mininterval=2):
        part = jobs[first:first + batch]
        width = max(len(ids[p]) for _, p in part)
        tokens = torch.tensor([[pad] * (width - len(ids[p])) + ids[p] for _, p in part], device=device)
        mask = torch.tensor([[0] * (width - len(ids[p])) + [1] * len(ids[p]) for _, p in part], device=device)
        dose = torch.tensor([coeff for coeff, _ in part], dtype=model.dtype, device=device)[:, None, None]
        with edited(model, layer, lambda hidden, dose=dose: hidden + dose * vector):
            out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        reply = out[:, width:]
        full = torch.cat([mask, (reply != pad).long().cummin(1).values | (torch.arange(reply.shape[1], device=device) == 0)], 1)
        log_ppl += mean_nll(model, out, full, width)
        replies += tokenizer.batch_decode(reply, skip_special_tokens=True)
    rows = [replies[i:i + len(prompts)] for i in range(0, len(replies), len(prompts))]
    return rows, np.array(log_ppl).reshape(len(coeffs), len(prompts))


def mean_norm(model, ids: list[list[int]], layer: int) -> float:
    """Mean residual norm of block `layer`'s output over the prompts' tokens, sinks left out."""
    norms = []

    def note(hidden):
        norms.append(hidden[0].float().norm(dim=-1))
        return hidden

    with edited(model, layer, note):
        for sequence in ids:
            model.get_decoder()(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
    values = torch.cat(norms)
    return values[values <= SINK * values.median()].mean().item()


def mean_nll(model, tokens: torch.Tensor, mask: torch.Tensor, start: int) -> list[float]:
    """Mean negative log-probability of the unmasked tokens from `start` on, per row, without any edit."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    found = []
    for states, row, kept in zip(hidden[:, start - 1:-1], tokens[:, start:], mask[:, start:].bool(), strict=True):
        logp = logits_of(model, states).log_softmax(-1).gather(1, row[:, None])[:, 0]
        found.append(-logp[kept].mean().item())
    return found
