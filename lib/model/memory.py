"""How much memory an extraction takes, known before it is tried: weights, and one forward over a trie of n nodes.

A forward keeps nothing from block to block but the residual stream, so its peak is that of one block: either the
attention's (with `eager` every head's scores, n × n, once in float32 and once before) or the MLP's (gate, up and their
product). Logits are never made, and no keys and values are cached, but for those of a header that all texts share.
"""

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

RESERVE = 0.9  # of a card, that is planned with: the driver's context and fragmentation take the rest
FLOAT32 = 4  # bytes


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the model's weights, counted on a model without memory; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def forward_bytes(config: PreTrainedConfig, n_nodes: int, *, dtype: torch.dtype, attention: str, n_header: int = 0) -> int:
    """Peak bytes of one forward over a trie of `n_nodes` nodes, weights apart; `n_header` tokens before it are cached."""
    size, d, n_heads = dtype.itemsize, config.hidden_size, config.num_attention_heads
    head, seen = getattr(config, "head_dim", None) or d // n_heads, n_nodes + n_header
    masks = 2 * len(set(getattr(config, "layer_types", None) or [""])) * n_nodes * seen * size  # each is a filled copy of zeros
    stream = n_nodes * d * (2 * size + FLOAT32)  # residual, its normed copy, and the float32 copy that is pooled
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * n_header * size
    scores = n_heads * n_nodes * seen * (2 * FLOAT32 + (size if size < FLOAT32 else 0)) if attention == "eager" else 0
    attending = scores + 2 * n_heads * head * (n_nodes + seen) * size  # queries, the result, and keys and values repeated for every head
    mlp = 3 * n_nodes * config.intermediate_size * size
    return stream + masks + cached + max(attending, mlp)


def largest_trie(config: PreTrainedConfig, card_bytes: float, *, dtype: torch.dtype, attention: str, n_header: int = 0) -> int:
    """The largest number of nodes whose forward fits beside the weights into `RESERVE` of a card; 0 where not even these do."""
    room = RESERVE * card_bytes - weight_bytes(config, dtype)

    def fits(n_nodes: int) -> bool:
        return forward_bytes(config, n_nodes, dtype=dtype, attention=attention, n_header=n_header) <= room
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
