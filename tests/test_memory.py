"""Memory: what is planned bounds what is measured, and what does not fit is halved."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from lib.errors import Failed
from lib.model import activations, gpu_check, memory, prompts
from lib.model.text_tokens import Collector
from lib.params import load_params
from tests.conftest import ROOT

MEASURE = """
import json
from pathlib import Path
import numpy as np, psutil, torch
from transformers import AutoConfig, AutoModelForCausalLM
from lib.model import activations, memory, prompts

def texts(n):
    ids = np.random.default_rng(0).integers(1, 90, n).tolist()
    return [prompts.Encoded(tuple(ids[:-5] + [90, 91, 92, 93, 94]), 10), prompts.Encoded(tuple(ids), 10)]

found = {}
for attention, n, sizes in (("eager", 1600, {"num_attention_heads": 24, "intermediate_size": 64}), ("sdpa", 1500, {"num_attention_heads": 8, "intermediate_size": 24576})):
    config = AutoConfig.for_model("llama", vocab_size=100, hidden_size=192, num_hidden_layers=2, num_key_value_heads=2,
                                  max_position_embeddings=4096, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    activations.pool(model, texts(40), [0, 1])
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's would be the parent's, where that was larger
    activations.pool(model, texts(n), [0, 1])
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    found[attention] = [peak - before, memory.forward_bytes(config, n + 5, dtype=torch.float32, attention=attention)]
    found[attention + " weights"] = [sum(p.numel() * 4 for p in model.parameters()), memory.weight_bytes(config, torch.float32)]
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_plan_bounds_a_measured_forward():
    """Peak resident memory of a process of its own; the MLP decides one case, eager attention's scores the other."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    for name, (measured, planned) in json.loads(done.stdout.splitlines()[-1]).items():
        assert measured <= 1.1 * planned and planned <= 1.5 * measured, (name, measured / 1e6, planned / 1e6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_plan_bounds_a_measured_forward_on_a_gpu():
    for study in gpu_check.SIZES:
        model = gpu_check.random_model(study, "cuda", small=False)
        group = gpu_check.texts_like_ours(model.config.vocab_size)[0]
        torch.cuda.reset_peak_memory_stats()
        activations.pool(model, group, range(model.config.num_hidden_layers))
        planned = memory.weight_bytes(model.config, model.dtype) + memory.forward_bytes(
            model.config, 60 + 3 * 50, dtype=model.dtype, attention=load_params(study).model.attention)
        assert 0.95 * planned <= torch.cuda.max_memory_allocated() <= 1.05 * planned
        del model


@pytest.mark.parametrize("study", gpu_check.SIZES)
def test_every_gpu_study_fits_its_card(study):
    """The longest group of the bundled texts has fewer than 2,000 nodes; and a card without room for the weights has room for none."""
    params, (family, size) = load_params(study), gpu_check.SIZES[study]
    config = AutoConfig.for_model(family, **size, pad_token_id=0)
    options = {"dtype": torch.bfloat16, "attention": params.model.attention}
    n = memory.largest_trie(config, 24e9, **options)
    assert n > 2000 and memory.largest_trie(config, 12e9, **options) == 0
    total = [memory.weight_bytes(config, torch.bfloat16) + memory.forward_bytes(config, nodes, **options) for nodes in (n, n + 1)]
    assert total[0] <= memory.RESERVE * 24e9 < total[1]
    extracting = memory.weight_bytes(config, torch.bfloat16) + memory.forward_bytes(config, 400, **options)
    assert params.plan.vram_gb["03_extract"] == pytest.approx(extracting / 1e9, abs=0.1)


@pytest.fixture
def group(tiny):
    _, tokenizer, _ = tiny
    replies = ("You hoped it would hold.", "Call the office at nine.", "You hoped for more.", "Oh no, how sad.", "I would be upset too.")
    return [prompts.encode(tokenizer, "chat", "The roof leaks.", reply) for reply in replies]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")])
def test_a_group_that_does_not_fit_is_halved(tiny, group, monkeypatch, capsys, error):
    """Memory for two texts at most, and it is missed only after the first layer was seen."""
    model, run_trie = tiny[0], activations.run_trie
    whole, sinks = activations.pool(model, group, [0, 2])
    reference, collected = Collector(2), Collector(2)
    activations.extract(model, [group], [0, 2], error=0.0, also=reference.add)

    def cramped(model, trie, layers, receive, **how):
        def some(layer, resid):
            receive(layer, resid)
            if len(trie.paths) > 2 and layer == 2:
                raise error
        run_trie(model, trie, layers, some, **how)
    monkeypatch.setattr(activations, "run_trie", cramped)
    found, dropped, _ = activations.extract(model, [group], [0, 2], error=0.0, also=collected.add)
    assert activations.relative_error(found, whole) < 1e-5 and (dropped == sinks).all()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"not enough memory for {n} texts in one forward on cpu; they are taken in two halves" for n in (5, 3)]
    for ours, theirs in zip(collected.shard(group, 0)[0].values(), reference.shard(group, 0)[0].values(), strict=True):
        assert np.allclose(ours, theirs, atol=1e-5)


def test_what_cannot_be_halved_ends_in_one_line(tiny, group, monkeypatch):
    def full(*_, **__):
        raise MemoryError
    monkeypatch.setattr(activations, "run_trie", full)
    with pytest.raises(Failed, match="not enough memory for one text"):
        activations.extract(tiny[0], [group], [0], error=0.0)


def test_other_errors_are_not_taken_for_lack_of_memory(tiny, group, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(activations, "run_trie", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        activations.extract(tiny[0], [group], [0], error=0.0)
