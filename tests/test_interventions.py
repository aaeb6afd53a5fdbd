"""Interventions: exact where nothing should change, restored always, refused where they make no sense."""

import numpy as np
import pytest
import torch

from lib.errors import BadInput
from lib.model import interventions, prompts


@pytest.fixture(scope="module")
def texts(tiny):
    _, tokenizer, _params = tiny
    return [prompts.encode(tokenizer, "chat", "My train is late again.", reply) for reply in ("You wanted to be there on time.", "Ask at the desk for a form.")]


def rows(directions, mean):
    stack = torch.as_tensor(np.asarray(directions), dtype=torch.float32)
    return lambda nodes: interventions.ablation_rows(stack, torch.as_tensor(mean, dtype=torch.float32), nodes)


def test_first_row_is_untouched_and_equals_a_plain_forward(tiny, texts):
    model = tiny[0]
    scores = interventions.score_rows(model, texts, 1, rows(np.eye(48)[:3], np.zeros(48)))
    for column, text in enumerate(texts):
        with torch.inference_mode():
            logp = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        plain = np.mean([logp[i - 1, text.ids[i]].item() for i in range(text.start, len(text.ids))])
        assert scores[0, column] == pytest.approx(plain, abs=1e-5)
    assert abs(scores[1:] - scores[0]).max() > 1e-5


def test_ablation_sets_the_projection_to_the_means(tiny):
    rng = np.random.default_rng(0)
    hidden, mean = torch.randn(1, 9, 48), torch.randn(48)
    w = torch.as_tensor(interventions.unit(rng.standard_normal(48)), dtype=torch.float32)
    out = interventions.ablation_rows(w[None], mean, torch.ones(9, dtype=torch.bool))(hidden)
    assert ((out[1] - mean) @ w).abs().max() < 1e-4 and torch.equal(out[0], hidden[0])


def test_random_directions_disturb_with_equal_energy(tiny):
    rng = np.random.default_rng(0)
    hidden = torch.randn(1, 30, 48) * torch.linspace(0.1, 3, 48)
    stack = torch.as_tensor(np.stack([interventions.unit(v) for v in rng.standard_normal((6, 48))]), dtype=torch.float32)
    nodes = torch.arange(30) < 20
    out = interventions.ablation_rows(stack, torch.zeros(48), nodes)(hidden)
    energy = (out[1:] - hidden).square().sum((1, 2))
    assert torch.allclose(energy, energy[0].expand(6), rtol=1e-4) and torch.equal(out[1:, 20:], hidden.expand(6, -1, -1)[:, 20:])


def test_zero_variance_direction_changes_nothing(tiny, texts):
    """Along a direction in which the hidden states equal the mean, ablation is the identity."""
    hidden = torch.randn(1, 5, 48)
    hidden[..., 0] = 0.7
    mean = torch.full((48,), 0.7)
    out = interventions.ablation_rows(torch.eye(48)[:1], mean, torch.ones(5, dtype=torch.bool))(hidden)
    assert (out[1] - hidden[0]).abs().max() < 1e-5


def test_zero_dose_is_exactly_no_change(smol):
    model, tokenizer, _ = smol
    asked = [prompts.prompt_text(tokenizer, "chat", words) for words in ("Hello.", "A much longer question than the first one?")]
    direction = np.random.default_rng(0).standard_normal(576)
    replies, log_ppl = interventions.generate_steered(model, tokenizer, asked, direction, [0.0, 0.5, 0.0], 15, max_new_tokens=6)
    assert replies[0] == replies[2] and (log_ppl[0] == log_ppl[2]).all() and (log_ppl[0] != log_ppl[1]).any()
    ids = tokenizer(asked[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(alone[0, ids.shape[1]:], skip_special_tokens=True) == replies[0][0]


def test_hooks_are_gone_after_an_interrupt(tiny, texts):
    model = tiny[0]
    ids = torch.tensor([texts[0].ids])
    with torch.inference_mode():
        before = model(ids).logits

        def interrupt(_):
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt), interventions.edited(model, 2, interrupt):
            model(ids)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("bad", [np.zeros(48), np.full(48, np.nan)])
def test_useless_directions_are_refused(bad):
    with pytest.raises(BadInput, match="norm"):
        interventions.unit(bad)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_out_of_range_are_refused(tiny, layer):
    with pytest.raises(BadInput, match="out of range"), interventions.edited(tiny[0], layer, lambda h: h):
        pass
