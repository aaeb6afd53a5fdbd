"""Interventions on the residual stream: add a direction, mean-ablate it, or project it out.

Add: `h + coeff · scale · ŵ`, with `scale` the layer's mean residual norm, so `coeff` is in residual norms. Mean
ablation: `h − coeff (ŵᵀ(h − μ)) ŵ`; the projection becomes that of the mean (Arditi et al. 2024, "Refusal is mediated
by a single direction"). Project: the same with μ = 0. All act on the output of a block, hook name
`blocks.{layer}.hook_out`. They are plain forward hooks, which are leaner than the bridge's; a test proves them equal to
hooks on `TransformerBridge`. Several rows (doses, directions) share one forward up to the layer and widen the batch there.
"""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from lib.errors import BadInput
from lib.model.activations import SINK, attention_mask, build_trie
from lib.model.prompts import Encoded

COEFF_MAX = 0.6  # the preregistered grid's end, in residual norms
KINDS, WHERE = ("add", "ablate", "project"), ("all", "prompt", "response")


def unit(direction: np.ndarray, name: str = "direction") -> np.ndarray:
    """The direction(s) at length 1 along the last axis; a zero or non-finite one is refused."""
    direction = np.asarray(direction, dtype=float)
    norm = np.linalg.norm(direction, axis=-1, keepdims=True)
    if not np.isfinite(norm).all() or (norm == 0).any():
        raise BadInput(f"{name}: has norm {norm.min() if np.isfinite(norm).all() else np.nan}; a direction needs a finite, non-zero length")
    return direction / norm


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit a row: `directions` [d] or [row, d], `coeffs` a number or [row].

    `where`: the positions edited; `start` is the prompt's number of tokens. `scale` (add): what coeff 1 adds, in norm.
    `mean` [d] (ablate): μ. `match` [row]: each row's change is scaled to the energy (summed square over edited
    positions) of the row named there, so that random directions disturb as much as the one they are compared with.
    Ablation and projection spare attention sinks, whose projections are hundreds of times any other token's.
    """

    kind: str
    directions: np.ndarray
    coeffs: float | np.ndarray = 1.0
    where: str = "all"
    start: int | None = None
    scale: float = 1.0
    mean: np.ndarray | None = None
    match: np.ndarray | None = None

    def __post_init__(self):
        if self.kind not in KINDS or self.where not in WHERE:
            raise BadInput(f"edit: {self.kind!r} at {self.where!r}: kinds are {', '.join(KINDS)}; positions are {', '.join(WHERE)}")
        if self.where != "all" and self.start is None:
            raise BadInput(f"edit: where {self.where!r} needs start, the prompt's number of tokens")
        if (self.kind == "ablate") != (self.mean is not None):
            raise BadInput("edit: mean ablation, and only it, needs the mean of the residual stream")
        directions = np.atleast_2d(unit(self.directions))
        coeffs, bound = np.atleast_1d(np.asarray(self.coeffs, dtype=float)), COEFF_MAX if self.kind == "add" else 1.0
        if not (np.isfinite(coeffs).all() and abs(coeffs).max() <= bound + 1e-9):
            raise BadInput(f"coeff {coeffs[np.argmax(abs(np.nan_to_num(coeffs, nan=np.inf)))]:g}: outside the grid of ±{bound:g}")
        rows = max(len(coeffs), len(directions))
        object.__setattr__(self, "directions", np.broadcast_to(directions, (rows, directions.shape[1])))
        object.__setattr__(self, "coeffs", np.broadcast_to(coeffs, (rows,)))

    def __len__(self) -> int:
        return len(self.coeffs)


def changed(output, change):
    """A block's output with `change(hidden)` in the place of its hidden states; blocks give a tensor or a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class Hook:
    """A forward hook of one block that applies an edit; remembers the sinks' bound of the pass that held position 0."""

    def __init__(self, edit: Edit, block):
        self.edit, self.limit = edit, None
        dtype, device = next(block.parameters()).dtype, next(block.parameters()).device
        self.w, self.coeffs = (torch.as_tensor(np.array(v), dtype=dtype, device=device) for v in (edit.directions, edit.coeffs))
        self.mean = 0.0 if edit.mean is None else torch.as_tensor(edit.mean, dtype=dtype, device=device)
        self.match = None if edit.match is None else torch.as_tensor(edit.match, device=device)

    def __call__(self, block, args, kwargs, output):
        return changed(output, lambda hidden: self.apply(hidden, kwargs["position_ids"]))

    def apply(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Edited `[row, position, d]`; a batch of one widens to the rows; rows with coeff 0 come out bit by bit as they were."""
        edit = self.edit
        where = torch.ones_like(positions, dtype=torch.bool)
        if edit.where != "all":
            where = positions < edit.start if edit.where == "prompt" else positions >= edit.start
        if edit.kind == "add":
            change = (self.coeffs * edit.scale)[:, None, None] * self.w[:, None] * where[..., None]
            return torch.where((self.coeffs == 0)[:, None, None], hidden, hidden + change)
        norms = hidden.float().norm(dim=-1)
        if self.limit is None or (positions == 0).any():
            self.limit = SINK * norms.median(dim=1, keepdim=True).values
        where = where & (norms <= self.limit)
        amount = torch.einsum("bnd,rd->rn" if len(hidden) == 1 else "rnd,rd->rn", hidden - self.mean, self.w.expand(max(len(hidden), len(self.w)), -1))
        amount = self.coeffs[:, None] * amount * where
        if self.match is not None:
            energy = amount.float().square().sum(1)
            amount = amount * (energy[self.match] / energy.clamp_min(1e-20)).sqrt()[:, None]
        return torch.where((self.coeffs == 0)[:, None, None], hidden, hidden - amount[..., None] * self.w[:, None])


def check_layer(model, layer: int) -> None:
    """BadInput where the model has no such block."""
    n_layers = len(model.get_decoder().layers)
    if not 0 <= layer < n_layers:
        raise BadInput(f"layer {layer}: out of range; the model has layers 0 to {n_layers - 1}")


def hooks_of(model, edits: Mapping[int, Edit]) -> dict[int, Hook]:
    """A hook a layer, each checked against the model."""
    blocks, d_model = model.get_decoder().layers, model.get_decoder().config.hidden_size
    for layer, edit in edits.items():
        check_layer(model, layer)
        if edit.directions.shape[1] != d_model:
            raise BadInput(f"direction: has {edit.directions.shape[1]} numbers; the model's d_model is {d_model}")
    return {layer: Hook(edit, blocks[layer]) for layer, edit in edits.items()}


@contextmanager
def attached(model, hooks: Mapping[int, Hook]):
    """The hooks are on while the context is open; gone on leaving, also after an exception or interrupt."""
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            handle = model.get_decoder().layers[layer].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def intervene(model, edits: Mapping[int, Edit]):
    """A context in which one edit a layer is applied to whatever runs through the model."""
    return attached(model, hooks_of(model, edits))


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits of final hidden states, soft-capped where the family does so."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.get_decoder().config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def trie_states(model, trie) -> torch.Tensor:
    """Final hidden states [row, node, d] of a trie in one forward, under whatever is hooked."""
    return model.get_decoder()(
        input_ids=torch.from_numpy(trie.tokens)[None].to(model.device), use_cache=False,
        position_ids=torch.from_numpy(trie.depths)[None].to(model.device), attention_mask=attention_mask(model, trie))[0]


def log_probability(model, states: torch.Tensor, path: np.ndarray, text: Encoded) -> torch.Tensor:
    """Mean log-probability per reply token of one text, from final states [node, d] of its trie."""
    where, target = torch.from_numpy(path[text.start - 1:-1]), torch.tensor(text.ids[text.start:])
    logits = logits_of(model, states[where.to(model.device)])
    return (logits.gather(1, target.to(model.device)[:, None])[:, 0] - logits.logsumexp(-1)).mean()


@torch.inference_mode()
def score_rows(model, texts: list[Encoded], edits: Mapping[int, Edit]) -> np.ndarray:
    """`[row, text]` log-probability per reply token of texts that share a prompt, for each row of the edits."""
    trie = build_trie([text.ids for text in texts])
    with intervene(model, edits):
        hidden = trie_states(model, trie)
    return np.array([[log_probability(model, states, path, text).item() for text, path in zip(texts, trie.paths, strict=True)]
                     for states in hidden])


def first_order(model, texts: list[Encoded], layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`(resid [node, d], gradient [text, node, d], prompt [node], replies [text, node])` of texts that share a prompt.

    The gradient of each text's log-probability per reply token with respect to the output of block `layer`: the effect of
    a small edit is its inner product with it ("attribution patching", Nanda 2023), for any number of directions at the
    price of one backward pass. The masks name the nodes an edit would change; sinks, which ablation spares, are in none.
    """
    trie, kept = build_trie([text.ids for text in texts]), []

    def widen(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden.detach().expand(len(texts), -1, -1).clone().requires_grad_())
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    handle = model.get_decoder().layers[layer].register_forward_hook(widen)
    try:
        with torch.enable_grad():
            states = trie_states(model, trie)
            total = sum(log_probability(model, row, path, text) for row, path, text in zip(states, trie.paths, texts, strict=True))
            gradient = torch.autograd.grad(total, kept[0])[0].float().cpu().numpy()
    finally:
        handle.remove()
    resid = kept[0].detach()[0].float().cpu().numpy()
    norms = np.linalg.norm(resid, axis=1)
    edited = norms <= SINK * np.median(norms)
    replies = np.zeros((len(texts), len(resid)), dtype=bool)
    for row, (text, path) in enumerate(zip(texts, trie.paths, strict=True)):
        replies[row, path[text.start:]] = True
    return resid, gradient, (trie.depths < texts[0].start) & edited, replies & edited
