"""What a GPU does with models of the real sizes, without a download: `make gpu-check`.

Each of the five GPU studies gets a model of its architecture and size with random weights, made on the device. 720 texts
of random tokens, shaped as the study's are, go through the extraction and through a plain Hugging Face loop in
alternating order; beside their times stand the peak memory and how far bfloat16 takes pooled activations from float32.
The table is `docs/gpu_check.json`; a machine without a GPU leaves it alone.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from lib.cli import exit_code, leave
from lib.errors import BadInput
from lib.model.activations import build_trie, extract, pool, relative_error
from lib.model.memory import forward_bytes, weight_bytes
from lib.model.prompts import Encoded
from lib.params import ROOT, load_params
from lib.store import to_json, versions, write_atomic

# Sizes as published with the weights.
SIZES = {
    "gemma2-9b": ("gemma2", {"hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14336, "num_attention_heads": 16,
                             "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256_000, "query_pre_attn_scalar": 256}),
    "llama-3.1-8b": ("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
                               "num_key_value_heads": 8, "vocab_size": 128_256}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
                             "num_key_value_heads": 4, "vocab_size": 152_064}),
    "mistral-7b": ("mistral", {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
                               "num_key_value_heads": 8, "vocab_size": 32_000, "sliding_window": None}),
    "deepseek-r1-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
                                 "num_key_value_heads": 4, "vocab_size": 152_064}),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "vocab_size": 500}
BATCH = 16  # texts of the plain loop
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def random_model(study: str, device: str, *, small: bool):
    """A model of the study's architecture with random bfloat16 weights, made on the device."""
    family, size = SIZES[study]
    config = AutoConfig.for_model(family, **(size | SMALL if small else size), pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=load_params(study).model.attention)
    return model.eval().requires_grad_(False)


def texts_like_ours(n_vocab: int, *, n_scenarios: int = 90, n_controls: int = 60, seed: int = 0) -> list[list[Encoded]]:
    """720 texts: scenarios with a triplet and with three matched items, controls with three; prompts of 60 tokens, replies of 50."""
    rng = np.random.default_rng(seed)

    def group() -> list[Encoded]:
        prompt = rng.integers(1, n_vocab, 60).tolist()
        return [Encoded(tuple(prompt + rng.integers(1, n_vocab, 50).tolist()), 60) for _ in range(3)]
    return [group() for _ in range(2 * n_scenarios + n_controls)]


@torch.inference_mode()
def plain_loop(model, groups: list[list[Encoded]], layers) -> np.ndarray:
    """Pooled activations [layer, text, d_model] as people make them: a causal LM with `output_hidden_states`, in batches."""
    texts, pooled = [text for group in groups for text in group], []
    for first in range(0, len(texts), BATCH):
        batch = texts[first:first + BATCH]
        hidden = model(torch.tensor([text.ids for text in batch], device=model.device), output_hidden_states=True, use_cache=False).hidden_states
        pooled.append(torch.stack([hidden[layer + 1][:, batch[0].start:].float().mean(1) for layer in layers]).cpu().numpy())
    return np.concatenate(pooled, axis=1)


def measure(study: str, *, device: str, n_alternations: int, small: bool) -> dict:
    """One row of the table; memory in GB (planned for the trie, its peak, and both sides' peak), times in seconds (median), the error relative."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = random_model(study, device, small=small)
    layers, groups = range(model.config.num_hidden_layers - 1), texts_like_ours(model.config.vocab_size)
    groups = groups[:6] if small else groups
    sides = {"trie": lambda: extract(model, groups, layers)[0], "loop": lambda: plain_loop(model, groups, layers)}
    seconds, found = {name: [] for name in sides}, {}
    sides["trie"]()  # kernels are chosen on first use
    trie_peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    nodes = max(len(build_trie([text.ids for text in group]).tokens) for group in groups)
    planned = (weight_bytes(model.config, model.dtype) + forward_bytes(model.config, nodes, dtype=model.dtype, attention=model.config._attn_implementation)) / 1e9
    for turn in range(n_alternations):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            found[name] = sides[name]()
            seconds[name].append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    half, _ = pool(model, groups[0], layers)
    try:
        model = model.float()
        full, _ = pool(model, groups[0], layers, share=False)
        error = relative_error(half, full)
    except torch.cuda.OutOfMemoryError:
        error = None  # float32 does not fit beside it
    ours, theirs = (float(np.median(seconds[name])) for name in ("trie", "loop"))
    return {"study": study, "texts": sum(map(len, groups)), "seconds": ours, "loop_seconds": theirs, "ratio": theirs / ours, "planned_gb": planned, "trie_gb": trie_peak, "peak_gb": peak,
            "bf16_error": error, "agreement": relative_error(found["trie"], found["loop"])}


@app.command()
def main(
    study: Annotated[list[str] | None, typer.Option(help="GPU study; repeat for several; all five by default.")] = None,
    device: Annotated[str, typer.Option(help="Device; the first GPU by default.")] = "cuda",
    n_alternations: Annotated[int, typer.Option(help="Times each side is timed.")] = 3,
    small: Annotated[bool, typer.Option("--small", help="Small models of the same architectures and few texts, to try the command itself.")] = False,
    out: Annotated[Path, typer.Option(help="File of the table.")] = ROOT / "docs" / "gpu_check.json",
) -> None:
    """Measure extraction at the real sizes and write the table."""
    names = study or list(SIZES)
    if unknown := [name for name in names if name not in SIZES]:
        raise BadInput(f"study {unknown[0]}: no GPU study; they are {', '.join(SIZES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"device {device}: no GPU here; the table keeps saying \"not measured\" (--device cpu --small tries the command)")
    rows = [measure(name, device=device, n_alternations=n_alternations, small=small) for name in tqdm(names, desc="gpu-check", unit="model")]
    table = Table(title="extraction at the real sizes", title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*("-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    finite = [{key: None if isinstance(value, float) and value != value else value for key, value in row.items()} for row in rows]
    write_atomic(out, to_json({"device": where, "small": small, "rows": finite, "versions": versions()}))


if __name__ == "__main__":
    leave(exit_code(app, "lib.model.gpu_check"))
