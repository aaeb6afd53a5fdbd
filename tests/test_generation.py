"""Generation against a loopback server: complete sets, every fault, the budget, and the key."""

import json
import re
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lib.errors import BadInput
from lib.params import load_params
from lib.text import admission, briefs, generation, wording
from lib.text.api import Pace
from lib.text.budget import Ledger, Price
from lib.text.dataset import CONTEXTS, LABELS, check_ties, texts_table
from lib.text.journal import Journal, Reply, fold_lines, journal_path
from tests.loopback import HTTP_FAULTS, ITEM_FAULTS, MARKS, REPLY_FAULTS, SAFETY, serve

CANARY = "sk-good-canary-7f3a91c2"
PRICES = {"writer-model": (3.0, 15.0), "judge-model": (1.0, 5.0)}
FAST = Pace(timeout_s=0.5, first_wait_s=0.01, max_wait_s=0.05, poll_s=0.02, tries=8)
SETTINGS = {"n_triplets": 1, "controls": False, "model": "writer-model", "judge_model": "judge-model", "prices": PRICES,
            "max_usd": 20.0, "batches": False, "seed": 0, "pace": FAST}
COUNTED = {"max_tokens": "truncated", "refusal": "refused", "malformed": "malformed", "language": "language", "length": "length",
           "not_json": "malformed"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A study's folder; journals go beside it."""
    monkeypatch.setenv("EMPATHY_PAID", str(tmp_path / "paid"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
    return tmp_path / "outputs" / "smollm2-135m"


@pytest.fixture
def journal(root):
    return journal_path(root.name)


def make(server, root, **changes):
    return generation.generate(root, base_url=server.url, **SETTINGS | changes)


def ledger_of(path: Path, max_usd: float = 20.0) -> Ledger:
    journal = Journal(path)
    journal.close()
    return Ledger(journal, max_usd)


def records_of(path: Path) -> list[dict]:
    return fold_lines(path.read_bytes())[0]


def counts(items) -> Counter:
    return Counter((condition, item.register) for condition, item in items)


def paid_keys(server) -> Counter:
    return Counter(entry["key"] for entry in server.paid())


# Whole sets

@pytest.mark.parametrize("batches", [False, True])
def test_a_complete_set(root, journal, batches):
    with serve(prices=PRICES) as server:
        items = make(server, root, n_triplets=5, controls=True, batches=batches)
    assert counts(items) == {("empathy", "plain"): 5, ("empathy", "counter"): 5, ("valence_stripped", "plain"): 5,
                             ("valence_stripped", "counter"): 2, ("non_empathy", "plain"): 3, ("non_empathy", "counter"): 2,
                             ("formality", "plain"): 5}
    check_ties("generated", items)
    table = texts_table(items, cluster_cosine=0.4)
    assert table.text_id.is_unique and set(table.context) == {*CONTEXTS, ""}
    crisis = table[(table.context == "crisis_support") & (table.condition == "empathy")]
    assert len(crisis) == 6 and crisis.response.str.contains(SAFETY, regex=False).all()
    assert set(paid_keys(server).values()) == {1}
    assert ledger_of(journal).spent == pytest.approx(sum(e["paid"] for e in server.paid()))  # batches at half price too


@pytest.mark.parametrize("batches", [False, True])
def test_a_rerun_pays_nothing_and_needs_no_key(root, monkeypatch, batches):
    with serve(prices=PRICES) as server:
        first = make(server, root, n_triplets=2, controls=True, batches=batches)
        n, _ = server.n_requests, monkeypatch.delenv("ANTHROPIC_API_KEY")
        assert make(server, root, n_triplets=2, controls=True, batches=batches) == first
        assert server.n_requests == n
        monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
        more = make(server, root, n_triplets=3, batches=batches)
    assert more[:2] == first[:2] and set(paid_keys(server).values()) == {1}


def test_judges_are_blind(root):
    with serve(prices=PRICES) as server:
        items = make(server, root, n_triplets=2)
    responses = [getattr(item, label) for _, item in items for label in LABELS["empathy"]]
    seen = []
    for path, body in server.bodies:
        user = body["messages"][0]["content"] if path == "/v1/messages" else ""
        if body["model"] == "judge-model" and user:
            shown = [text for text in responses if text in user]
            assert len(shown) == 1 and user.count("Reply:") == 1
            assert not re.search(r"cognitive|affective|instrumental|counter|register|g00\d", user)
            seen += shown
    assert sorted(seen) == sorted(responses)


def test_prompts_ask_for_structured_answers_with_a_cached_prefix(root):
    with serve(prices=PRICES) as server:
        make(server, root, n_triplets=1, controls=True)
    for path, body in server.bodies:
        if path == "/v1/messages":
            assert set(body) == {"model", "max_tokens", "system", "messages", "output_config"}
            assert body["system"][0]["cache_control"] == {"type": "ephemeral"} and "$" not in body["system"][0]["text"]
            schema = body["output_config"]["format"]["schema"]
            assert schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])


# Faults

@pytest.mark.parametrize("fault", [*HTTP_FAULTS, *COUNTED])
def test_one_fault(root, journal, capsys, fault):
    with serve(prices=PRICES, faults=[("messages", fault)], hang_s=0.7) as server:
        items = make(server, root)
    assert counts(items) == {("empathy", "plain"): 1, ("empathy", "counter"): 1} and not server.queue
    hit = [entry for entry in server.log if entry["fault"] == fault and entry["path"] == "messages"]
    events = Counter(record["event"] for record in records_of(journal))
    delivered = Counter(e["key"] for e in server.paid() if e["delivered"])
    assert len(hit) == 1 and set(delivered.values()) == {1}
    spent, billed = ledger_of(journal).spent, sum(e["paid"] for e in server.paid())
    if fault in ("429", "529"):
        assert (events["unpaid"], events["unknown"]) == (1, 0) and spent == pytest.approx(billed)
    elif fault in HTTP_FAULTS:  # nobody knows: counts as spent
        assert (events["unpaid"], events["unknown"]) == (0, 1) and spent > billed + 0.02
    else:  # paid for, kept, counted, and bought again as another request
        assert f"turned down: {COUNTED[fault]} 1" in capsys.readouterr().out
        assert events["reply"] == len(delivered) == 9 + 1


def test_the_same_fault_again_is_another_request(root, journal):
    with serve(prices=PRICES, faults=[("messages", "")] * 2 + [("messages", "max_tokens")] * 6) as server:  # three judges, twice
        assert len(make(server, root)) == 2
    assert set(paid_keys(server).values()) == {1} and len(server.paid()) == 9 + 6


@pytest.mark.parametrize("fault", ITEM_FAULTS)
def test_missing_batch_items_alone_are_resubmitted(root, journal, fault):
    with serve(prices=PRICES, faults=[("item", fault)]) as server:
        items = make(server, root, n_triplets=3, batches=True)
    assert len(items) == 6 and [batch["n"] for batch in server.batches.values()][:2] == [3, 1]
    assert set(paid_keys(server).values()) == {1}
    assert ledger_of(journal).spent == pytest.approx(sum(e["paid"] for e in server.paid()))


@pytest.mark.parametrize("fault", REPLY_FAULTS)
def test_a_bad_batch_reply_never_enters(root, capsys, fault):
    good = [("item", "")] if fault == "duplicate" else []
    with serve(prices=PRICES, faults=[*good, ("item", fault)]) as server:
        items = make(server, root, n_triplets=2, batches=True)
    assert len(items) == 4 and "turned down: " + COUNTED.get(fault, fault) in capsys.readouterr().out
    assert len({item.scenario for _, item in items}) == 2


@pytest.mark.parametrize("fault", HTTP_FAULTS)
@pytest.mark.parametrize("where", ["batches", "GET", "count_tokens"])
def test_batch_calls_survive_faults_without_paying_twice(root, journal, where, fault):
    with serve(prices=PRICES, faults=[(where, fault)], hang_s=0.7) as server:
        items = make(server, root, batches=True)
    assert len(items) == 2 and not server.queue and set(paid_keys(server).values()) == {1}
    assert ledger_of(journal).spent == pytest.approx(sum(e["paid"] for e in server.paid()))


def test_an_api_that_does_not_answer(root, capsys):
    with serve(prices=PRICES, faults=[("messages", "")] * 5 + [("messages", "529")] * 8) as server:
        items = make(server, root, n_triplets=1)
    assert counts(items) == {("empathy", "plain"): 1}
    assert "missing: 1 counter (no answer from the API in 8 tries (HTTP 529 overloaded_error)" in capsys.readouterr().out
    with pytest.raises(BadInput, match="nothing was generated: APIConnectionError"):
        generation.generate(root.with_name("tiny"), base_url="http://127.0.0.1:9", **SETTINGS)
    assert not [r for r in records_of(journal_path("tiny")) if r["event"] == "sent"]


# Budget

def test_a_denial_before_anything_is_sent(root, journal):
    for batches in (False, True):
        with serve(prices=PRICES) as server, pytest.raises(BadInput, match=r"max_usd 0\.01 reached: 0\.0000 spent") as error:
            make(server, root, max_usd=0.01, batches=batches)
        assert "\n" not in str(error.value) and not server.paid() and not server.batches
    assert not journal.read_bytes()


@pytest.mark.parametrize("batches", [False, True])
def test_the_budget_holds_and_more_of_it_goes_on(root, journal, capsys, batches):
    limit = 0.045 if batches else 0.09
    with serve(prices=PRICES) as server:
        some = make(server, root, n_triplets=4, max_usd=limit, batches=batches)
        billed = sum(e["paid"] for e in server.paid())
        assert 0 < len(some) < 8 and f"max_usd {limit:.2f} reached" in capsys.readouterr().out
        assert billed <= ledger_of(journal).spent <= limit
        n = len(server.paid())
        assert make(server, root, n_triplets=4, max_usd=limit, batches=batches) == some and len(server.paid()) == n
        assert len(make(server, root, n_triplets=4, max_usd=5.0, batches=batches)) == 8
    assert set(paid_keys(server).values()) == {1}


def test_a_denial_ends_the_retries(root, journal):
    with serve(prices=PRICES, faults=[("messages", "cut_paid")] * 8) as server:
        with pytest.raises(BadInput, match="max_usd"):
            make(server, root, max_usd=0.09)
        arrived = [entry for entry in server.log if entry["path"] == "arrived"]
        assert len(arrived) == 2  # each lost answer counts with its worst case, about 3 cents; a third might not fit
        assert sum(e["paid"] for e in server.paid()) <= ledger_of(journal).spent <= 0.09


def test_the_estimate_comes_near_and_sends_nothing(root, journal, monkeypatch):
    about = {name: SETTINGS[name] for name in ("controls", "model", "judge_model", "prices", "batches", "pace")}
    with serve(prices=PRICES) as server:
        table = generation.estimate(**about, n_triplets=6, base_url=server.url)
        assert not server.paid() and {e["path"] for e in server.log} == {"count_tokens"}
        make(server, root, n_triplets=6)
        assert 1 < table.usd.sum() / sum(e["paid"] for e in server.paid()) < 2.2  # with its rewrites and retries, which this run has none of
        half = generation.estimate(**about | {"batches": True}, n_triplets=6, base_url=server.url)
    assert half.usd.sum() == pytest.approx(table.usd.sum() / 2)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(BadInput, match="ANTHROPIC_API_KEY: not set"):
        generation.estimate(**about, n_triplets=6)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prices": {"writer-model": (3, 15)}}, "prices: judge-model"), ({"prices": PRICES | {"writer-model": (0, 1)}}, "positive"),
    ({"max_usd": float("nan")}, "max_usd"), ({"max_usd": 0}, "max_usd"), ({"n_triplets": 0}, "n_triplets"), ({"seed": -1}, "seed")])
def test_bad_settings(root, changes, message):
    with pytest.raises(BadInput, match=message):
        generation.generate(root, base_url="http://127.0.0.1:9", **SETTINGS | changes)


def test_the_ledger_by_hand(tmp_path):
    price, journal = Price(2.0, 10.0), Journal(tmp_path / "x.journal.jsonl")
    assert price.worst(1000, 500) == pytest.approx(0.0025 + 0.005)
    usage = {"input_tokens": 100, "output_tokens": 50, "cache_creation_input_tokens": 400, "cache_read_input_tokens": 1000}
    assert price.cost(usage) == pytest.approx((100 + 500 + 100) * 2e-6 + 50 * 1e-5)
    assert price.cost(usage | {"cache_creation": {"ephemeral_1h_input_tokens": 400}}) == pytest.approx((100 + 800 + 100) * 2e-6 + 5e-4)
    ledger, asked = Ledger(journal, 1.0), {"input": 2.0, "output": 10.0}
    for key, after in (("a", "unpaid"), ("b", "unknown"), ("c", None), ("c", None)):
        ledger.write({"event": "sent", "key": key, "usd": 0.1, "price": asked})
        if after:
            ledger.write({"event": after, "key": key, "why": ""})
    assert ledger.spent == pytest.approx(0.3)  # b unknown, c cut off and open again
    ledger.write({"event": "reply", "key": "c", "raw": json.dumps({"content": [], "stop_reason": "end_turn", "usage": usage})})
    assert ledger.spent == pytest.approx(0.2 + price.cost(usage))
    assert Ledger(journal, 1.0).spent == pytest.approx(ledger.spent)
    journal.close()


# Key and journal

def test_the_key_goes_nowhere(root, tmp_path, monkeypatch, capfd):
    bad = "sk-bad-canary-55aa"
    monkeypatch.setenv("ANTHROPIC_API_KEY", bad)
    with serve(prices=PRICES) as server:
        for batches in (False, True):
            with pytest.raises(BadInput, match=r"HTTP 401 authentication_error: invalid key \[key\] for") as error:
                make(server, root, batches=batches)
            assert bad not in "".join(traceback.format_exception(error.value))
        monkeypatch.setenv("ANTHROPIC_API_KEY", f"{CANARY} x")
        with pytest.raises(BadInput, match="characters that no key has"):
            make(server, root)
        monkeypatch.delenv("ANTHROPIC_API_KEY")
        with pytest.raises(BadInput, match="ANTHROPIC_API_KEY: not set"):
            make(server, root)
    monkeypatch.setenv("ANTHROPIC_API_KEY", CANARY)
    with serve(prices=PRICES, echo=CANARY) as server:
        for batches in (False, True):
            items = make(server, root, seed=int(batches), batches=batches)
            assert any("[key]" in item.cognitive for _, item in items) and not any(CANARY in repr(item) for _, item in items)
    assert_clean(tmp_path)
    out = "".join(capfd.readouterr())
    assert "sk-" not in out


def assert_clean(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".journal.jsonl") and path.stat().st_size for path in files)
    assert not [path for path in files if b"canary" in path.read_bytes()]


def test_a_torn_line_costs_one_reply(root, journal, capsys):
    with serve(prices=PRICES) as server:
        first = make(server, root)
        content = journal.read_bytes()
        journal.write_bytes(content[:content.rindex(b'"event": "reply"') + 40])
        assert len(make(server, root)) == 2 and "cut off by a kill" in capsys.readouterr().out
        assert len(server.paid()) == 9 + 1
        assert len(make(server, root)) == len(first)
        assert len(server.paid()) == 9 + 1 and paid_keys(server).most_common(1)[0][1] == 2


def test_one_run_at_a_time(journal):
    held = Journal(journal)
    with pytest.raises(BadInput, match="another run is generating"):
        Journal(journal)
    held.close()
    Journal(journal).close()


def test_variants_share_a_journal_and_names_stay_inside(root):
    assert journal_path("smollm2-135m--quick") == journal_path("smollm2-135m")
    with pytest.raises(BadInput):
        journal_path("../../etc/x")


# Plan, admission, wording

def test_the_plan_is_stratified_and_grows_at_its_end():
    slots = briefs.plan(90, seed=3)
    assert briefs.plan(40, seed=3) == slots[:40] and briefs.plan(40, seed=4) != slots[:40]
    assert Counter(s.context for s in slots) == dict.fromkeys(CONTEXTS, 18)
    assert len({s.domain for s in slots}) == 16 and max(Counter(s.domain for s in slots).values()) <= 9
    assert max(Counter((s.person, s.valence) for s in slots).values()) <= 30
    spared = [s for s in slots if wording.untouched(s.number)]
    assert len(spared) == 18 and set(Counter(s.context for s in spared).values()) == {3, 4}


ENGLISH = " ".join(["I found the old letter under the seat and it was hers."] * 4)
OTHER = " ".join(["You gave him the key because he was the one who had asked."] * 4)


@pytest.mark.parametrize(("text", "good"), [
    (ENGLISH, True), ("Der Brief lag unter dem Sitz und ich habe ihn gefunden, als wir spät nach Hause kamen.", False),
    ("La lettre était sous le siège et je ne savais pas quoi en faire ce soir.", False), ("我在座位下面找到了她的信", False), ("...", False)])
def test_language(text, good):
    assert admission.is_english(text) is good


def test_admission():
    def kind(call, *args, **more):
        try:
            call(*args, **more)
        except admission.Rejected as reason:
            return reason.kind

    def reply(text, stop="end_turn"):
        return Reply(key="k", kind="message", text=text, stop_reason=stop, usage={})

    assert kind(admission.check_texts, {"a": ENGLISH, "b": OTHER}) is None
    assert kind(admission.check_texts, {"a": ENGLISH, "b": ENGLISH + " " + OTHER[:60]}) == "length"  # more than 15% longer
    assert kind(admission.check_texts, {"a": ENGLISH[:80]}) == kind(admission.check_texts, {"a": ENGLISH + OTHER}) == "length"
    assert kind(admission.check_new, [ENGLISH], [OTHER]) is None and kind(admission.check_new, [ENGLISH + " Yes."], [ENGLISH]) == "duplicate"
    assert kind(admission.check_safety, "Call.", {"a": "x Call.", "b": "y"}, crisis=True) == "safety"
    assert kind(admission.check_safety, "", {"a": "x"}, crisis=True) == "safety" and kind(admission.check_safety, "", {"a": "x"}, crisis=False) is None
    for text in ("", "[]", "{\"a\": 1}", "{\"a\": \"\"}", "{\"a\": \"\\u0000\"}", "{\"a\": \"\\ud800\"}", "{}", "nonsense", "[" * 9999):
        assert kind(admission.fields_of, reply(text), ["a"]) == "malformed", text
    assert admission.fields_of(reply("{\"a\": \" x \"}", "stop_sequence"), ["a"]) == {"a": "x"}
    for stop, word in (("max_tokens", "truncated"), ("refusal", "refused"), ("tool_use", "unfinished"), ("pause_turn", "unfinished"), ("", "unfinished")):
        assert kind(admission.fields_of, reply("{\"a\": \"x\"}", stop), ["a"]) == word
    assert kind(admission.check_verdict, {"type": "unclear", "naturalness": 5}, "affective") == "type"
    assert kind(admission.check_verdict, {"type": "affective", "naturalness": 2}, "affective") == "natural"
    assert admission.near_duplicates({"a": ENGLISH, "b": OTHER, "c": ENGLISH, "d": OTHER + " Today."}, cosine=0.4) == {"c", "d"}


def test_a_triplet_the_judge_does_not_recognise_is_written_again(root, capsys, monkeypatch):
    monkeypatch.setitem(MARKS, "affective", "reasonwise")  # the judge takes every affective reply for a cognitive one
    with serve(prices=PRICES) as server, pytest.raises(BadInput, match="every answer was turned down"):
        make(server, root)
    writes = [body["messages"][0]["content"] for path, body in server.bodies if path == "/v1/messages" and "safety_step" in json.dumps(body)]
    assert len(writes) == 6 and "a blind reader took the affective reply for cognitive" in writes[1]


def test_rewrites_spare_every_fifth_and_are_planned_once(root, journal):
    with serve(prices=PRICES) as server:
        first = make(server, root, n_triplets=12, batches=True)
        n = server.n_requests
        assert make(server, root, n_triplets=12, batches=True) == first and server.n_requests == n
    frozen = {r["name"].partition("/")[0]: r["content"] for r in records_of(journal) if r["event"] == "frozen"}
    assert set(frozen) == {"counter", "rewrite-1", "rewrite-2"}
    assert all(MARKS[label] in line for label, line in zip(LABELS["empathy"], frozen["counter"].splitlines(), strict=True))
    spared = {slot.id for slot in briefs.plan(12, seed=0) if wording.untouched(slot.number)}
    assert frozen["rewrite-1"]["ids"] and not spared & {*frozen["rewrite-1"]["ids"], *frozen["rewrite-2"]["ids"]}
    assert all(mark in frozen["rewrite-1"]["feedback"] for mark in MARKS.values())  # what the server plants in both registers


def test_feedback_names_what_crosses_and_nothing_else():
    thresholds = load_params("smollm2-135m").thresholds
    best = pd.DataFrame([("transfer", "C/A", 0.8), ("transfer", "C/I", 0.5), ("transfer", "A/I", 0.3), ("plain", "C/I", 0.99)],
                        columns=["evaluation", "pair", "auroc"])
    ngrams = pd.DataFrame(
        [(pair, register, side, word, 1.0 if side == "first" else -1.0) for pair, register, side, found in [
            ("C/A", "plain", "first", "because means"), ("C/A", "counter", "first", "because heart"), ("C/A", "plain", "second", "oh"),
            ("C/A", "counter", "second", "understand"), ("C/I", "plain", "first", "why"), ("C/I", "counter", "first", "why"),
            ("A/I", "plain", "first", "warm"), ("A/I", "counter", "second", "warm"), ("A/I", "plain", "second", "ring")]
         for word in found.split()], columns=["pair", "register", "side", "ngram", "weight"])
    report = SimpleNamespace(best=best, ngrams=ngrams)
    assert wording.rewrite_feedback(report, thresholds) == {
        "These still mark cognitive against affective": ["because"],
        "These changed sides too thoroughly; some may come back to affective against instrumental": ["warm"]}
    assert wording.plain_feedback(report).splitlines() == ["cognitive: because, means, why", "affective: oh, warm", "instrumental: ring"]
    assert wording.rewrite_feedback(None, thresholds) == {} and wording.look([], thresholds) is None
    assert wording.contains("It's because, well.", ["because"]) and not wording.contains("Becauses", ["because"])
