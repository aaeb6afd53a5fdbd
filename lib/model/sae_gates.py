"""What the gates are measured from: reconstruction of held-out tokens, firing of latents, and the model's own loss.

Explained variance: 1 − E‖x − x̂‖² / E‖x − x̄‖². Cross-entropy recovered: (CE_mean − CE_sae) / (CE_mean − CE_model), where
the layer's output at message tokens is replaced by its reconstruction or by the mean token. The mean is the stricter
reference; with zeros instead (the convention of SAELens's evaluations) the same autoencoder scores higher, and that
value stands beside it.
"""

from collections.abc import Iterable

import numpy as np
import torch

from lib.errors import BadInput
from lib.model.activations import SINK
from lib.model.corpus import Piece
from lib.model.interventions import attached, changed, logits_of
from lib.stats.gates import mmcs

CHUNK = 4_096  # tokens encoded at once


@torch.inference_mode()
def measure(saes, tokens: np.ndarray) -> dict:
    """`explained_variance`, `l0`, `dead` (a list each, one value an SAE), `mass` [SAE][d_sae] and their `mmcs`.

    `tokens` [token, d_model] are held-out activations. `dead` is the share of latents that fire on none of them; `mass`
    the mean activation times the decoder row's norm. `mmcs` is NaN for a single SAE.
    """
    if not np.isfinite(tokens).all():
        raise BadInput("held-out activations hold NaN or infinite values; extract them again")
    variance = float(((tokens - tokens.mean(0)) ** 2).sum(1).mean())
    found = {"explained_variance": [], "l0": [], "dead": [], "mass": []}
    for sae in saes:
        error, fired = 0.0, 0.0
        mass, alive = torch.zeros(sae.cfg.d_sae, device=sae.device), torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
        for first in range(0, len(tokens), CHUNK):
            x = torch.from_numpy(tokens[first:first + CHUNK]).to(sae.device)
            latents = sae.encode(x)
            error += (sae.decode(latents) - x).square().sum().item()
            fired += (latents > 0).sum().item()
            mass, alive = mass + latents.sum(0), alive | (latents > 0).any(0)
        found["explained_variance"].append(1 - error / len(tokens) / variance)
        found["l0"].append(fired / len(tokens))
        found["dead"].append(1 - alive.float().mean().item())
        found["mass"].append((mass / len(tokens) * sae.W_dec.norm(dim=1)).cpu().numpy())
    decoders = [sae.W_dec.detach().cpu().numpy() for sae in saes]
    found["mmcs"] = mmcs(*decoders, masses=tuple(found["mass"])) if len(saes) == 2 else float("nan")
    return found


def replacing(saes, mean: torch.Tensor, keep: torch.Tensor):
    """An edit that turns `[1, token, d]` into rows: untouched, one reconstruction an SAE, the mean, zero."""
    def edit(hidden):
        norms = hidden[0].float().norm(dim=-1)
        where = (keep & (norms <= SINK * norms[keep].median()))[:, None]
        x = hidden[0].float()
        rows = [sae.decode(sae.encode(x.to(sae.device))).to(x.device) for sae in saes] + [mean.expand_as(x), torch.zeros_like(x)]
        return torch.cat([hidden, *(torch.where(where, row, x).to(hidden.dtype)[None] for row in rows)])
    return edit


@torch.inference_mode()
def ce_recovered(model, pieces: Iterable[Piece], layer: int, saes, mean: np.ndarray, *, n_tokens: int) -> dict[str, list[float]]:
    """`ce_recovered` and `ce_recovered_zero` (a value an SAE) on the first pieces that hold `n_tokens` message tokens.

    `mean` [d_model] is the mean token. All rows of the comparison share one forward up to `layer`.
    """
    centre, total, count = torch.as_tensor(mean, dtype=torch.float32, device=model.device), 0.0, 0
    for piece in pieces:
        keep = torch.from_numpy(piece.keep).to(model.device)
        ids = torch.from_numpy(piece.ids).to(model.device)
        if keep[1:].sum() == 0:
            continue
        edit = replacing(saes, centre, keep)
        with attached(model, {layer: lambda _, __, ___, output, edit=edit: changed(output, edit)}):
            hidden = model.get_decoder()(input_ids=ids[None], use_cache=False)[0]
        where = keep.nonzero()[:, 0]
        where = where[where > 0]
        loss = [-logits_of(model, states[where - 1]).log_softmax(-1).gather(1, ids[where, None]).sum().item() for states in hidden]
        total, count = total + np.array(loss), count + len(where)
        if count >= n_tokens:
            break
    if not count:
        raise BadInput("no held-out tokens to measure the loss on; raise n_ce")
    own, *recon, mean_loss, zero_loss = total / count
    return {"ce_recovered": [(mean_loss - loss) / (mean_loss - own) for loss in recon],
            "ce_recovered_zero": [(zero_loss - loss) / (zero_loss - own) for loss in recon]}
