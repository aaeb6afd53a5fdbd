"""Judging free replies over the loopback server: blind, both orders, resumed for nothing, inside the budget."""

import re
from collections import Counter

import numpy as np
import pytest

from lib.errors import BadInput
from lib.stats.causality import Judged, monitoring
from lib.text import judge
from lib.text.api import Pace
from lib.text.journal import fold_lines, journal_path
from tests.loopback import serve

PRICES = {"judge-model": (1.0, 5.0)}
FAST = Pace(timeout_s=0.5, first_wait_s=0.01, max_wait_s=0.05, poll_s=0.02, tries=8)
PAIRS = [(f"My kettle number {i} broke.", "reasonwise words here " * (i % 3 + 1), "plain words here, useful") for i in range(6)]
SCALE = {name: i for i, name in enumerate(judge.SCALES)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPATHY_PAID", str(tmp_path / "paid"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-good-canary-1")
    return tmp_path / "outputs" / "smollm2-135m"


def rate(server, root, pairs=PAIRS, **changes):
    return judge.rate(root, pairs, base_url=server.url, **{"model": "judge-model", "prices": PRICES, "max_usd": 5.0, "batches": False, "pace": FAST} | changes)


@pytest.mark.parametrize("batches", [False, True])
def test_both_orders_cancel_the_place(root, batches):
    """The server's judge favours the first place by one; the mean over orders does not."""
    with serve(prices=PRICES) as server:
        found, stopped = rate(server, root, batches=batches)
    assert found.shape == (6, 2, len(judge.SCALES)) and not stopped
    marks = np.array([i % 3 + 1 for i in range(6)])
    assert np.allclose(found[:, 0, SCALE["cognitive"]] - found[:, 1, SCALE["cognitive"]], marks)
    assert np.allclose(found[:, 1, SCALE["helpfulness"]] - found[:, 0, SCALE["helpfulness"]], 1)
    assert np.allclose(found[:, 0, SCALE["affective"]], found[:, 1, SCALE["affective"]])


def test_the_judge_is_blind(root):
    with serve(prices=PRICES) as server:
        rate(server, root)
        asked = [body["messages"][0]["content"] for path, body in server.bodies if path == "/v1/messages"]
    assert len(asked) == 12
    for content in asked:
        assert not re.search(r"ablat|steer|direction|edited|baseline|model|unsteered", content)
    firsts = Counter("reasonwise" in content.split("Second reply:")[0] for content in asked)
    assert firsts == {True: 6, False: 6}


def test_a_rerun_pays_nothing_and_more_pairs_cost_only_themselves(root, monkeypatch):
    with serve(prices=PRICES) as server:
        first, _ = rate(server, root, PAIRS[:4])
        n = server.n_requests
        monkeypatch.delenv("ANTHROPIC_API_KEY")
        again, _ = rate(server, root, PAIRS[:4])
        assert np.array_equal(first, again) and server.n_requests == n
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-good-canary-1")
        rate(server, root)
        assert set(Counter(entry["key"] for entry in server.paid()).values()) == {1} and len(server.paid()) == 12


def test_faults_and_the_budget(root, capsys):
    with serve(prices=PRICES, faults=[("messages", fault) for fault in ("429", "malformed", "refusal", "max_tokens")]) as server:
        found, _ = rate(server, root, PAIRS[:2])
    assert np.isfinite(found).all()
    with serve(prices=PRICES) as server:
        found, stopped = rate(server, root, max_usd=0.0115)
    assert "max_usd" in stopped and np.isfinite(found[:2]).all() and np.isnan(found[-1]).all()
    assert "in both orders" in capsys.readouterr().out
    assert any(record["event"] == "reply" for record in fold_lines(journal_path(root.name).read_bytes())[0])


def test_no_key_is_one_line(root, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with serve(prices=PRICES) as server, pytest.raises(BadInput, match="ANTHROPIC_API_KEY"):
        rate(server, root)


def test_effect_and_monitoring():
    rng = np.random.default_rng(0)
    assert Judged.of(rng.standard_normal(40) - 1).d_z < -0.5 and Judged.of(np.zeros(5)) == Judged(0.0, 5)
    projection = rng.standard_normal(60)
    found = monitoring(projection, projection + 0.5 * rng.standard_normal(60))
    assert monitoring(projection, np.ones(60))["r"] is None
    assert found["ci_low"] > 0.6 and abs(monitoring(projection, rng.standard_normal(60))["r"]) < 0.35
