"""The playground: sides, colours and escapes by calls; the page itself in JupyterLab, driven in Chromium."""

import time

import numpy as np
import pytest

from lib.errors import BadInput
from lib.model import playground
from lib.model.playground import Choice, Panel, Player, Side
from tests.lab import chromium, jupyterlab, notebook, run_all


@pytest.fixture(scope="module")
def player(tiny):
    model, tokenizer, _ = tiny
    return Player(model, tokenizer, "chat")


def choice(**changes):
    return Choice(**{"direction": np.random.default_rng(0).standard_normal(48), "layer": 2, "coeff": 0.6} | changes)


def last(player, scenario, what, **more):
    sides = None
    for sides in player.play(scenario, what, max_new_tokens=8, **more):
        assert all(len(side.tokens) <= 8 for side in sides)
    return sides


def test_both_sides_stream_token_by_token(player):
    counts = [tuple(len(side.tokens) for side in sides) for sides in player.play("My train is late.", choice(), max_new_tokens=4)]
    assert counts == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_no_dose_is_no_difference_and_a_dose_is_one(player):
    plain, same = last(player, "My train is late.", choice(coeff=0.0))
    assert plain.tokens == same.tokens and plain.projections == pytest.approx(same.projections)
    assert player.log_ratio("My train is late.", (plain, same)) == pytest.approx(0, abs=1e-6)
    said, other = player.model.get_output_embeddings().weight[[plain.tokens[0], 1234]].numpy()
    loud = choice(direction=other - said, layer=3)
    _, steered = last(player, "My train is late.", loud)
    _, without = last(player, "My train is late.", choice(kind="ablate"))
    assert steered.tokens != plain.tokens and len(plain.projections) == 7 and len(without.tokens)


def test_projections_are_those_of_the_residual(player):
    """The colour of a token is its residual's product with the direction, in residual norms."""
    import torch

    from lib.model import prompts
    from lib.model.activations import block_outputs
    what = choice()
    plain, _ = last(player, "My train is late.", what)
    ids = player.tokenizer(prompts.prompt_text(player.tokenizer, "chat", "My train is late."), add_special_tokens=False)["input_ids"]
    seen = []
    with torch.inference_mode(), block_outputs(player.model, [2], lambda _, resid: seen.append(resid[0])) as decoder:
        decoder(input_ids=torch.tensor([ids + plain.tokens]), use_cache=False)
    expected = seen[0][len(ids):].numpy() @ (what.direction / np.linalg.norm(what.direction)) / player.about(2)[0]
    assert np.allclose(plain.projections, expected[:len(plain.projections)], atol=1e-4)


def test_text_is_escaped_and_coloured(player):
    tokens = player.tokenizer("<script>alert(1)</script> <b>&", add_special_tokens=False)["input_ids"]
    page = player.html(Side(tokens, [0.3, -0.3] + [0.0] * len(tokens)))
    assert "<script" not in page and "<b>" not in page and "&lt;" in page and "&amp;" in page
    assert "rgba(213,94,0,0.60)" in page and "rgba(0,114,178,0.60)" in page


def test_vocabulary_is_that_of_the_unembedding(player):
    direction = player.model.get_output_embeddings().weight[1234].numpy()
    top, bottom = player.vocabulary(direction)
    assert player.tokenizer.decode([1234]) in top and len(top) == len(bottom) == 8


@pytest.mark.parametrize(("scenario", "what", "says"), [
    ("  ", {}, "empty"), ("word " * 9000, {}, "tokens; at most"), ("Hello.", {"layer": 9}, "out of range"), ("Hello.", {"coeff": 0.9}, "outside the grid"),
    ("Hello.", {"direction": np.zeros(48)}, "norm"), ("Hello.", {"direction": np.full(48, np.nan)}, "norm")])
def test_bad_input_is_one_line(player, scenario, what, says):
    with pytest.raises(BadInput, match=says):
        last(player, scenario, choice(**what))


def test_a_panel_says_what_is_wrong_and_goes_on(outputs):
    panel = Panel(["tiny"])
    panel._answer(None)
    assert "empty" in panel.status.value and not panel.button.disabled and list(panel.directions) == ["random"]
    panel.scenario.value = "My train is late."
    panel._answer(None)
    assert "log-perplexity ratio" in panel.status.value and "<span" in panel.plain.value and "<span" in panel.edited.value


def test_the_first_token_comes_within_a_second_and_a_half_on_two_cores(smol):
    """Three seconds of the process's own time are 1.5 s on two cores; a busy machine does not count."""
    model, tokenizer, _ = smol
    ready = Player(model, tokenizer, "chat")
    ready.about(15)
    what = Choice(direction=np.random.default_rng(0).standard_normal(576), layer=15, coeff=0.2)
    spent = []
    for _ in range(3):
        start = time.process_time()
        next(ready.play("My dog died last night and I don't know how to tell the kids.", what))
        spent.append(time.process_time() - start)
    assert min(spent) < 3.0


def test_pieces_add_up_to_the_text(player):
    tokens = player.tokenizer("Café 😀 über", add_special_tokens=False)["input_ids"]
    parts = playground.pieces(player.tokenizer, tokens)
    assert "".join(parts) == player.tokenizer.decode(tokens) and len(parts) == len(tokens)


@pytest.mark.browser
def test_the_page_in_jupyterlab(outputs, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook(folder, "playground", of="00_playground", studies=["tiny"])
    with jupyterlab(folder) as lab, chromium() as new_page:
        page = new_page()
        page.goto(lab.url("playground.ipynb"))
        page.locator(".jp-Notebook").first.wait_for(timeout=120_000)
        page.get_by_text("| Idle").first.wait_for(timeout=120_000)
        run_all(page)
        page.fill(".playground-scenario textarea", "My train is late <img src=x onerror=alert(1)>")
        page.press(".playground-scenario textarea", "Tab")
        page.click(".playground-go")
        page.wait_for_selector('.playground-status:has-text("log-perplexity ratio")', timeout=120_000)
        tokens = [page.locator(f".playground-{side} span").count() for side in ("plain", "edited")]  # random weights say little but blanks
        status, words = (page.inner_text(f".playground-{name}") for name in ("status", "words"))
        assert not page.errors and min(tokens) > 3
        assert "band of unsteered replies" in status and "raises" in words
