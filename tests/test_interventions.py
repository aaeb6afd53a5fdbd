"""Interventions by known answers: exactness, restoration, refusal of bad input, equality with the bridge and with exports."""

import copy

import numpy as np
import pytest
import torch

from lib.errors import BadInput
from lib.model import export, interventions, prompts, steering
from lib.model.interventions import Edit, intervene
from lib.stats.bandwidth import coherence, judged_coherent, repeated_4grams
from lib.stats.response import response

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def texts(tiny):
    _, tokenizer, _params = tiny
    return [prompts.encode(tokenizer, "chat", "My train is late again.", reply) for reply in ("You wanted to be there on time.", "Ask at the desk for a form.")]


def ablate(directions, mean=None, **more):
    directions = np.atleast_2d(directions)
    return Edit(kind="ablate", directions=directions, mean=np.zeros(directions.shape[1]) if mean is None else mean, **more)


def applied(edit, hidden, positions=None):
    """What an edit makes of hidden states, without a model."""
    block = torch.nn.Linear(1, 1)
    return interventions.Hook(edit, block).apply(hidden, torch.arange(hidden.shape[1])[None] if positions is None else positions)


def test_first_row_is_untouched_and_equals_a_plain_forward(tiny, texts):
    model = tiny[0]
    edit = ablate(np.eye(48)[:3], coeffs=np.array([0.0, 1.0, 1.0]), where="prompt", start=texts[0].start)
    scores = interventions.score_rows(model, texts, {1: edit})
    for column, text in enumerate(texts):
        with torch.inference_mode():
            logp = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        plain = np.mean([logp[i - 1, text.ids[i]].item() for i in range(text.start, len(text.ids))])
        assert scores[0, column] == pytest.approx(plain, abs=1e-5)
    assert abs(scores[1:] - scores[0]).max() > 1e-5


def test_ablation_sets_the_projection_to_the_means():
    hidden, mean = torch.randn(1, 9, 48), RNG.standard_normal(48)
    w = interventions.unit(RNG.standard_normal(48))
    out = applied(ablate(w, mean), hidden)
    assert ((out[0] - torch.tensor(mean, dtype=torch.float32)) @ torch.tensor(w, dtype=torch.float32)).abs().max() < 1e-4
    assert (out - hidden).abs().max() > 0.1


def test_projection_removes_the_direction():
    hidden = torch.randn(1, 9, 48)
    out = applied(Edit(kind="project", directions=np.eye(48)[3]), hidden)
    assert out[..., 3].abs().max() < 1e-6 and torch.equal(out[..., 4:], hidden[..., 4:])


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_only_the_named_positions_change(where):
    hidden = torch.randn(1, 10, 48)
    for edit in (ablate(np.eye(48)[0], where=where, start=4), Edit(kind="add", directions=np.eye(48)[0], coeffs=0.5, scale=9.0, where=where, start=4)):
        changed = (applied(edit, hidden) != hidden).any(-1)[0]
        assert changed.tolist() == [(p < 4) == (where == "prompt") for p in range(10)]


def test_random_directions_disturb_with_equal_energy():
    hidden = torch.randn(1, 30, 48) * torch.linspace(0.1, 3, 48)
    edit = ablate(RNG.standard_normal((6, 48)), match=np.zeros(6, dtype=int), where="prompt", start=20)
    out = applied(edit, hidden)
    energy = (out - hidden).square().sum((1, 2))
    assert torch.allclose(energy, energy[0].expand(6), rtol=1e-4) and torch.equal(out[:, 20:], hidden.expand(6, -1, -1)[:, 20:])


def test_sinks_are_spared_also_while_decoding():
    hidden = torch.randn(1, 12, 48)
    hidden[0, 0] *= 1000
    hook = interventions.Hook(ablate(np.eye(48)[0]), torch.nn.Linear(1, 1))
    out = hook.apply(hidden, torch.arange(12)[None])
    assert torch.equal(out[0, 0], hidden[0, 0]) and (out[0, 1:, 0].abs() < 1e-6).all()
    later = torch.randn(1, 1, 48) * 1000
    assert torch.equal(hook.apply(later, torch.tensor([[12]])), later)


def test_zero_coefficient_is_exactly_no_change(tiny, texts):
    hidden = torch.randn(1, 9, 48)
    for edit in (ablate(np.eye(48)[0], coeffs=0.0), Edit(kind="add", directions=np.eye(48)[0], coeffs=0.0, scale=1e30)):
        assert torch.equal(applied(edit, hidden), hidden)
    model, ids = tiny[0], torch.tensor([texts[0].ids])
    with torch.inference_mode():
        before = model(ids).logits
        with intervene(model, {1: Edit(kind="add", directions=np.eye(48)[0], coeffs=0.0), 3: ablate(np.eye(48)[1], coeffs=0.0)}):
            assert torch.equal(model(ids).logits, before)


def test_zero_variance_direction_changes_nothing(tiny, texts):
    """Along a direction in which the hidden states equal the mean, D is below 1e-5."""
    model = copy.deepcopy(tiny[0])
    with torch.no_grad():  # nothing ever writes to dimension 7
        model.get_input_embeddings().weight[:, 7] = 0.3
        for block in model.get_decoder().layers:
            block.self_attn.o_proj.weight[7], block.mlp.down_proj.weight[7] = 0.0, 0.0
    w, mean = np.eye(48)[7], np.full(48, 0.3)
    for where in ("prompt", "all"):
        scores = interventions.score_rows(model, texts, {2: ablate(np.stack([w, w]), mean, coeffs=np.array([0.0, 1.0]), where=where, start=texts[0].start)})
        assert abs(scores[1] - scores[0]).max() < 1e-5


def test_several_layers_at_once(tiny, texts):
    model, one = tiny[0], ablate(np.eye(48)[0])
    both = interventions.score_rows(model, texts, {1: one, 2: one})
    assert all(abs(both - interventions.score_rows(model, texts, {layer: one})).max() > 1e-6 for layer in (1, 2))


def test_hooks_equal_the_bridges(smol):
    """The same edit by a hook on `TransformerBridge` gives the same logits."""
    from transformer_lens.model_bridge import TransformerBridge
    model, tokenizer, _ = smol
    bridge = TransformerBridge.boot_transformers(model.config._name_or_path, hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
    ids = torch.tensor([prompts.encode(tokenizer, "chat", "My train is late.", "That is a nuisance.").ids])
    w = torch.tensor(interventions.unit(np.random.default_rng(1).standard_normal(576)), dtype=torch.float32)
    with torch.inference_mode():
        theirs = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.15.hook_out", lambda value, hook: value + 40 * w)])
        plain = model(ids).logits
        with intervene(model, {15: Edit(kind="add", directions=w.numpy(), coeffs=0.4, scale=100.0)}):
            ours = model(ids).logits
    assert (ours - theirs).abs().max() < 1e-3 < (ours - plain).abs().max()


def test_an_exported_control_vector_gives_our_logits(tiny, texts, tmp_path):
    """What llama.cpp and repeng do with the file: `strength · direction.N` onto the output of block N."""
    model, w, scale = tiny[0], np.random.default_rng(2).standard_normal(48), 7.0
    path = tmp_path / "w.gguf"
    path.write_bytes(export.control_vector({2: w}, scale=scale, model_type="llama", n_layers=4))
    (layer, vector), = export.read_control_vector(path).items()
    assert layer == 2 and vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(scale, rel=1e-5)
    ids = torch.tensor([texts[0].ids])
    handle = model.get_decoder().layers[layer].register_forward_hook(lambda _, __, out: out + 0.3 * torch.tensor(vector))
    try:
        theirs = model(ids).logits
    finally:
        handle.remove()
    with intervene(model, {2: Edit(kind="add", directions=w, coeffs=0.3, scale=scale)}):
        ours = model(ids).logits
    assert (ours - theirs).abs().max() < 1e-3 < (ours - model(ids).logits).abs().max()
    with pytest.raises(BadInput, match="layers 1 to 3"):
        export.control_vector({0: w}, scale=1.0, model_type="llama", n_layers=4)


def test_first_order_agrees_with_small_edits(tiny, texts):
    model, w, mean = tiny[0], interventions.unit(RNG.standard_normal((5, 48))), RNG.standard_normal(48) * 0.01
    resid, gradient, prompt, replies = interventions.first_order(model, texts, 2)
    expected = response(resid, gradient, prompt, replies, directions=w, mean=mean)
    small = 1e-2
    stack = np.vstack([w[:1], w])
    edit = ablate(stack, mean, coeffs=np.r_[0.0, np.full(5, small)], where="prompt", start=texts[0].start, match=np.r_[0, np.ones(5)].astype(int))
    scores = interventions.score_rows(model, texts, {2: edit})
    found = (scores[1:] - scores[:1]) / small
    assert np.corrcoef(found.ravel(), expected.change.ravel())[0, 1] > 0.99


def test_batched_replies_equal_one_by_one(smol):
    model, tokenizer, _ = smol
    asked = [prompts.prompt_text(tokenizer, "chat", words) for words in ("Hello.", "A much longer question than the first one?")]
    direction, coeffs = np.random.default_rng(0).standard_normal(576), np.array([0.0, 0.3, 0.0])
    made = steering.generate(model, tokenizer, asked, lambda start: {15: Edit(kind="add", directions=direction, coeffs=coeffs, scale=170.0)}, max_new_tokens=6)
    assert made.texts[0] == made.texts[2] and np.allclose(made.log_ppl[0], made.log_ppl[2]) and (made.log_ppl[0] != made.log_ppl[1]).any()
    for row, prompt in ((0, 0), (1, 0), (1, 1)):  # the shorter prompt is padded where both are decoded together
        ids = tokenizer(asked[prompt], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with intervene(model, {15: Edit(kind="add", directions=direction, coeffs=coeffs[row], scale=170.0)}):
            alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2)
        assert tokenizer.decode(alone[0, ids.shape[1]:], skip_special_tokens=True) == made.texts[row][prompt]


def test_degenerate_steering_is_incoherent(tiny):
    """A readout that answers every residual with one token makes the model repeat itself; that is seen."""
    model, tokenizer, _ = tiny
    model = copy.deepcopy(model)
    w = np.eye(48)[0]
    with torch.no_grad():
        head = torch.nn.Linear(48, model.config.vocab_size, bias=False)
        head.weight.copy_(model.get_output_embeddings().weight)
        head.weight[tokenizer(" again", add_special_tokens=False)["input_ids"][0], 0] = 5.0
        model.set_output_embeddings(head)
    asked = [prompts.prompt_text(tokenizer, "chat", f"My plan number {i} fell through.") for i in range(8)]
    coeffs = np.array([0.0, 0.6])
    made = steering.generate(model, tokenizer, asked, lambda start: {3: Edit(kind="add", directions=w, coeffs=coeffs, scale=500.0)}, max_new_tokens=12)
    assert all(repeated_4grams(text) > 0.5 for text in made.texts[1])
    unsteered = steering.Replies(made.texts[:1], made.log_ppl[:1])
    band, repeat_max, centre = coherence(unsteered)
    assert not judged_coherent(made, band, repeat_max, centre)[1].any()


def test_hooks_are_gone_after_an_interrupt_in_the_middle_of_a_generation(tiny, texts):
    model, ids = tiny[0], list(texts[0].ids)
    edits = {1: Edit(kind="add", directions=np.eye(48)[0], coeffs=0.5, scale=50.0), 2: ablate(np.eye(48)[1])}

    def hooks():  # transformers leaves its own where hidden states were once asked for
        return [list(block._forward_hooks) for block in model.get_decoder().layers]

    hooked = hooks()
    with torch.inference_mode():
        before = model(torch.tensor([ids])).logits
    calls, handle = [], None

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.get_decoder().layers[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        for _ in steering.stream(model, ids, edits, max_new_tokens=9, watch=(2, lambda _: None)):
            pass
    handle.remove()
    held = steering.stream(model, ids, edits, max_new_tokens=9)
    next(held)  # a half-read stream that somebody keeps
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([ids])).logits, before)
    assert hooks() == hooked


@pytest.mark.parametrize("bad", [np.zeros(48), np.full(48, np.nan), np.full(48, np.inf)])
def test_useless_directions_are_refused(bad):
    with pytest.raises(BadInput, match="norm"):
        Edit(kind="add", directions=bad)


@pytest.mark.parametrize("coeff", [0.7, -3, np.nan])
def test_coefficients_outside_the_grid_are_refused(coeff):
    with pytest.raises(BadInput, match="outside the grid"):
        Edit(kind="add", directions=np.ones(48), coeffs=coeff)


@pytest.mark.parametrize(("layer", "d"), [(-1, 48), (4, 48), (1, 47)])
def test_layers_out_of_range_and_wrong_widths_are_refused(tiny, layer, d):
    with pytest.raises(BadInput, match=r"out of range|d_model"), intervene(tiny[0], {layer: Edit(kind="add", directions=np.ones(d), coeffs=0.1)}):
        pass


@pytest.mark.parametrize(("prompt", "what"), [("", "empty"), (" \n", "empty"), ("word " * 9000, "tokens; at most")])
def test_prompts_that_cannot_be_answered_are_one_line(tiny, prompt, what):
    model, tokenizer, _ = tiny
    with pytest.raises(BadInput, match=what) as error:
        steering.generate(model, tokenizer, [prompt], lambda start: {}, max_new_tokens=4)
    assert "\n" not in str(error.value)


def test_an_empty_scenario_is_refused(tiny):
    with pytest.raises(BadInput, match="scenario: is empty"):
        prompts.prompt_text(tiny[1], "chat", "  ")
