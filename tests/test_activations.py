"""Pooled activations: the trie equals plain forwards and the bridge, and only reply tokens enter."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.errors import BadInput
from lib.model import activations, prompts, replicas, weights

LAYERS = range(-1, 30)


def encode(smol, row):
    _model, tokenizer, params = smol
    return prompts.encode(tokenizer, params.model.template, row.scenario, row.response)


def test_bridge_and_trie_agree_on_20_texts(smol, bundled):
    """`bridge.run_with_cache` at every layer, pooled here, against the trie's pooled activations."""
    from transformer_lens.model_bridge import TransformerBridge
    model, tokenizer, _params = smol
    rows = bundled.sample(20, random_state=0)
    pooled = [activations.pool(model, [encode(smol, row)], range(30))[0][:, 0] for row in rows.itertuples()]
    bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
    for row, ours in zip(rows.itertuples(), pooled, strict=True):
        text = encode(smol, row)
        _, cache = bridge.run_with_cache(torch.tensor([text.ids]))
        theirs = np.stack([cache[f"blocks.{layer}.hook_out"][0, text.start:].mean(0).numpy() for layer in range(30)])
        assert activations.relative_error(ours, theirs) < 1e-4


def test_trie_equals_plain_forwards(smol, bundled):
    model = smol[0]
    texts = [encode(smol, row) for row in bundled[bundled.scenario == bundled.scenario[0]].itertuples()]
    assert len(texts) == 6
    assert activations.trie_error(model, texts, LAYERS) < 1e-5


def test_what_all_prompts_begin_with_is_run_once(smol, bundled):
    """The template's opening goes through the model once for all scenarios, and changes nothing."""
    model = smol[0]
    groups = [[encode(smol, row) for row in rows.itertuples()] for _, rows in list(bundled.groupby("scenario"))[:3]]
    header = activations.run_header(model, groups, LAYERS)
    assert all(text.ids[:len(header.tokens)] == tuple(header.tokens) for group in groups for text in group) and len(header.tokens) > 10
    seen = []
    hook = model.get_decoder().embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    try:
        shared = [activations.pool(model, group, LAYERS, header=header) for group in groups]
        alone = [activations.pool(model, group, LAYERS) for group in groups]
    finally:
        hook.remove()
    assert [whole - rest for whole, rest in zip(seen[3:], seen[:3], strict=True)] == [len(header.tokens)] * 3
    for (pooled, sinks), (theirs, others) in zip(shared, alone, strict=True):
        assert activations.relative_error(pooled, theirs) < 1e-5 and (sinks == others).all()


def test_the_number_of_cores_changes_no_bit(smol, bundled):
    """Copies share the weights, work one scenario each, and answer in order; an exception comes through."""
    model = smol[0]
    groups = [[encode(smol, row) for row in rows.itertuples()] for _, rows in list(bundled.groupby("scenario"))[:4]]
    other = replicas.replica(model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.get_decoder().layers is not model.get_decoder().layers and other.config is not model.config
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            found.append(activations.extract(model, groups, [3, 9])[:2])
            assert torch.get_num_threads() == n
        with pytest.raises(ZeroDivisionError):
            replicas.each(model, lambda own, item: 1 / item, [2, 1, 0, 3])
    finally:
        torch.set_num_threads(threads)
    assert all((a == b).all() for one in found[1:] for a, b in zip(one, found[0], strict=True))


def test_the_check_notices_a_wrong_mask(smol, bundled, monkeypatch):
    """With replies that see one another the self-check fails and plain forwards serve instead."""
    model = smol[0]
    texts = [encode(smol, row) for row in bundled[bundled.scenario == bundled.scenario[0]].itertuples()]
    seen = {True: [], False: []}
    right, sinks, _ = activations.extract(model, [texts], [5], also=lambda group, layer, trie, resid, kept: seen[True].append((trie, resid)))
    monkeypatch.setattr(activations.Trie, "visible", lambda trie: np.tril(np.ones((len(trie.tokens),) * 2, dtype=bool)))
    served, dropped, about = activations.extract(model, [texts], [5], also=lambda group, layer, trie, resid, kept: seen[False].append((trie, resid)))
    assert about["trie_relative_error"] > 1e-3 and "plain" in about["method"]
    assert activations.relative_error(served, right) < 1e-5 and (dropped == sinks).all()
    for (trie, resid), (other, plain) in zip(seen[True], seen[False], strict=True):  # every token reaches the collector in both ways
        for path, own in zip(trie.paths, other.paths, strict=True):
            assert activations.relative_error(resid[path].numpy(), plain[own].numpy()) < 1e-4


def test_only_reply_tokens_enter(smol, bundled):
    """The pooled vector is the mean of exactly the reply's tokens; the boundary is where the reply begins."""
    _model, tokenizer, params = smol
    for row in bundled.sample(40, random_state=1).itertuples():
        text = encode(smol, row)
        assert tokenizer.decode(text.ids[text.start:]) == row.response
        assert tokenizer.decode(text.ids[:text.start]) == prompts.prompt_text(tokenizer, params.model.template, row.scenario)


def test_prompt_padding_changes_nothing(smol, bundled):
    """Padding before the prompt, masked out, gives the same pooled vector, whatever tokens it holds."""
    model = smol[0]
    text = encode(smol, next(bundled.itertuples()))
    plain = activations.pool(model, [text], [10], share=False)[0][:, 0]
    for token in (2, 500):
        ids = torch.tensor([[token] * 7 + list(text.ids)])
        mask = (torch.arange(ids.shape[1]) >= 7).long()[None]
        found = []
        with activations.block_outputs(model, [10], lambda _, h, found=found: found.append(h[0, 7 + text.start:].mean(0).numpy())) as decoder, torch.inference_mode():
            decoder(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False)
        assert activations.relative_error(found[0][None], plain) < 1e-5


def test_sinks_are_left_out(smol, bundled):
    """A sink inside the reply would be the whole mean; scaling one token up leaves the pooled vector near the others'."""
    model = smol[0]
    text = encode(smol, next(bundled.itertuples()))
    spoiled = prompts.Encoded(text.ids, 0)  # the first token of SmolLM2 is a sink
    pooled, sinks = activations.pool(model, [spoiled], [15])
    assert sinks.sum() == 1 and np.linalg.norm(pooled) < 10 * np.linalg.norm(activations.pool(model, [text], [15])[0])


def test_bos_is_what_the_params_say(smol):
    _model, tokenizer, params = smol
    tokenizer = copy.deepcopy(tokenizer)
    assert tokenizer.bos_token == "<|im_start|>"  # with which its template begins
    for bos in (None, True):
        weights.check_bos(tokenizer, params.model.model_copy(update={"bos": bos}))
    with pytest.raises(BadInput, match="begins with 1 BOS"):
        weights.check_bos(tokenizer, params.model.model_copy(update={"bos": False}))
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(BadInput, match="begins with 2 BOS"):
        weights.check_bos(tokenizer, params.model.model_copy(update={"bos": True}))


def test_boundary_merge_is_refused(smol):
    _model, tokenizer, _ = smol
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} Res"
    with pytest.raises(BadInput, match="change model"):
        prompts.encode(tokenizer, "chat", "Hello", "ponse is here")


def test_everything_is_restored_after_an_exception(smol):
    model = smol[0]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        before = model(ids).logits
        with pytest.raises(RuntimeError), activations.block_outputs(model, [3], lambda *_: (_ for _ in ()).throw(RuntimeError())) as decoder:
            decoder(input_ids=ids)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "mistral", "llama"])
def test_trie_is_exact_for_other_families(family):
    """Grouped queries, soft-capping, sandwich norms, sliding windows shorter than the texts."""
    config = AutoConfig.for_model(family, vocab_size=199, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=8, sliding_window=9, pad_token_id=0, max_position_embeddings=256)
    if family == "qwen2":
        config.use_sliding_window, config.max_window_layers = True, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 199, 14).tolist()
    texts = [prompts.Encoded(tuple(prompt + rng.integers(1, 199, 15 + i).tolist()), 14) for i in range(3)]
    assert activations.trie_error(model, texts, range(-1, 4)) < 1e-5


def test_the_unembedding_covariance_is_that_of_its_rows(tiny):
    model, _, _ = tiny
    rows = model.get_output_embeddings().weight.double().numpy()
    found = weights.unembedding_covariance(model)
    assert found.dtype == np.float32 and np.allclose(found, np.cov(rows.T, bias=True), atol=1e-6)


def test_gpu_check_measures_each_architecture(tmp_path, capsys):
    """On the CPU with small models; the trie agrees with a plain loop in bfloat16's own precision."""
    from lib.model import gpu_check
    gpu_check.main(device="cpu", n_alternations=1, small=True, out=tmp_path / "table.json")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["study"] for row in rows] == list(gpu_check.SIZES) and all(row["agreement"] < 0.05 and row["bf16_error"] < 0.05 for row in rows)
    assert all(0 < row["planned_gb"] < 0.1 and row["trie_gb"] is None for row in rows)
    with pytest.raises(BadInput, match="no GPU study"):
        gpu_check.main(study=["smollm2-135m"])
