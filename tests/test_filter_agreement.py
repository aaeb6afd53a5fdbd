"""Agreement, the leakage meter, the selection, and the filter stage applied to journals: known answers."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from lib.errors import BadInput
from lib.text import agreement, filtering, labels, meter, selection
from lib.text.labels import REPEAT
from lib.text.session import Session
from lib.text.synthetic import triplets
from tests.conftest import run
from tests.lab import texts_of


@pytest.fixture
def texts():
    return texts_of(24)


def label(texts, folder, name, decide, **more):
    """One annotator's whole round: `decide(place)` says "accept" or a reason to reject."""
    one = Session(texts, folder, name, n_keep=20)
    for i, place in enumerate(one.places):
        one.at = i
        if more.get("guess"):
            one.do("guess", {"card": i, "types": [more["guess"](label) for label in place.types]})
        reason = decide(place)
        one.do("accept" if reason == "accept" else "reject", {"card": i, "reason": reason})
    one.journal.close()
    return one


def test_kappas_against_known_values():
    rng = np.random.default_rng(0)
    a = rng.choice(["accept", "reject"], 300, p=[0.7, 0.3])
    b = np.where(rng.random(300) < 0.8, a, rng.choice(["accept", "reject"], 300))
    assert agreement.cohen(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert agreement.cohen(a, a) == 1 and abs(agreement.cohen(a, rng.permutation(a))) < 0.15
    # Fleiss's own example: 10 subjects, 14 raters, 5 categories, kappa .210
    table = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
                      [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    assert agreement.fleiss(table) == pytest.approx(0.210, abs=0.001)
    assert np.isnan(agreement.fleiss(np.array([[1, 0]]))) and np.isnan(agreement.cohen([], []))


def test_the_interval_of_kappa_covers():
    """95% intervals hold the true kappa in most draws; the truth is .6 (agreement .8 at even margins)."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        a = rng.integers(0, 2, 80)
        b = np.where(rng.random(80) < 0.8, a, 1 - a)
        _, low, high = agreement.interval(lambda keep, a=a, b=b: agreement.cohen(a[keep].astype(str), b[keep].astype(str)), list(map(str, range(80))))
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 100 <= 1


def test_agreement_of_three_annotators(texts, tmp_path):
    rng = np.random.default_rng(0)
    ada = label(texts, tmp_path, "ada", lambda p: "unsafe" if p.item.scenario_id < "s008" else "accept", guess=lambda t: t)
    label(texts, tmp_path, "ben", lambda p: "unsafe" if p.item.scenario_id < "s008" else "accept", guess=lambda t: "unclear")
    label(texts, tmp_path, "cem", lambda p: "other" if rng.random() < 0.5 else "accept")
    states = filtering.read_all(tmp_path, ada.hashes)
    table = agreement.agreement(states).set_index(["measure", "annotators"])
    assert table.loc[("cohen_kappa", "ada ben"), "estimate"] == 1
    assert table.loc[("cohen_kappa", "ada cem"), "ci_low"] < 0.3 and table.loc[("cohen_kappa", "ada cem"), "n"] == 48
    assert 0 < table.loc[("fleiss_kappa", "ada ben cem"), "estimate"] < 1
    assert table.loc[("guess_accuracy", "ada"), "estimate"] == 1 and table.loc[("guess_accuracy", "ben"), "estimate"] == 0
    assert table.loc[("self_consistency", "ada"), ["estimate", "n"]].tolist() == [1, 2]


def test_inconsistent_repeats_show(texts, tmp_path):
    ada = label(texts, tmp_path, "ada", lambda p: "other" if p.key.endswith(REPEAT) else "accept")
    table = agreement.agreement({"ada": ada.state})
    assert table.loc[table.measure == "self_consistency", "estimate"].tolist() == [0]
    assert agreement.verdicts({"ada": ada.state}).verdict.eq("accept").all(), "a repeat measures the annotator and decides nothing"


def test_a_guess_counts_only_before_the_types_were_shown(texts, tmp_path):
    one = Session(texts, tmp_path, "ada", n_keep=20)
    place = one.place
    assert one.shown()["about"] is None and not {"plain", "counter", *place.types} & set(json.dumps(one.shown()["responses"]).split('"'))
    one.do("accept", {"card": 0})
    one.do("undo", {})
    assert one.at == 0 and not one.shown()["decision"]
    one.do("guess", {"card": 0, "types": list(place.types)})
    assert "not be blind" in one.notice and len(one.journal.records) == 2
    one.journal.append("guess", dataset=one.dataset, item=place.key, item_hash=place.item.hash, types=dict(zip(place.types, place.types, strict=True)))
    one.refold()
    assert agreement.agreement({"ada": one.state}).empty, "the fold itself refuses it too"
    one.journal.close()


def test_disagreements_are_adjudicated(texts, tmp_path):
    label(texts, tmp_path, "ada", lambda p: "unnatural" if p.item.scenario_id == "s003" else "accept")
    label(texts, tmp_path, "ben", lambda p: "accept")
    one = Session(texts, tmp_path, "ben", n_keep=20)
    one.do("view", {"filter": "disagreements"})
    assert {one.places[i].item.scenario_id for i in one.view()} == {"s003"} and len(one.view()) == 2
    assert one.shown()["others"] == {"ada": "reject (unnatural)"}
    before = agreement.agreement({**one.others, "ben": one.state})
    one.do("reject", {"card": one.at, "reason": "unnatural"})
    assert len(one.view()) == 1, "a settled one leaves the queue"
    pd.testing.assert_frame_equal(agreement.agreement({**one.others, "ben": one.state}), before, obj="an adjudication changes no kappa")
    one.journal.close()
    found = filtering.apply(texts, str(tmp_path))
    assert found.about["left_out"] == ["s003"] and found.about["disputed"] == 1


def test_votes_of_others_stay_hidden_before_the_own_decision(texts, tmp_path):
    label(texts, tmp_path, "ada", lambda p: "unsafe")
    one = Session(texts, tmp_path, "ben", n_keep=20)
    assert one.shown()["others"] == {} and "unsafe" not in json.dumps(one.shown())
    one.do("accept", {"card": 0})
    one.do("previous", {})
    assert one.shown()["others"] == {"ada": "reject (unsafe)"}
    one.journal.close()


def test_the_meter_sees_planted_leaks_and_no_others():
    shared = meter.best(meter.measure(triplets(60, seed=0, share=0.2, swap=False))).set_index("pair").auroc
    none = meter.best(meter.measure(triplets(120, seed=0, share=0.0))).set_index("pair").auroc
    swapped = meter.best(meter.measure(triplets(60, seed=0, share=0.2, swap=True))).set_index("pair").auroc
    assert (shared > 0.9).all() and (none < 0.62).all() and (swapped < 0.65).all()
    alone = meter.measure(triplets(40, seed=0, share=0.3, registers=("plain",)))
    assert set(alone.evaluation) == {"within:plain"} and meter.best(alone).auroc.min() > 0.95
    assert meter.measure(triplets(8, seed=0)).empty and meter.reading(triplets(8, seed=0)[:0])["pairs"] == []


def test_the_meter_agrees_with_the_audit_on_naive_bayes():
    from lib.params import PARAMS, Probes, read_yaml
    from lib.text.leakage import audit
    texts = triplets(30, seed=2, share=0.1, swap=False)
    quick = meter.measure(texts).set_index(["pair", "evaluation", "baseline"]).auroc
    full = audit(texts, thresholds=Probes(**read_yaml(PARAMS / "preregistration.yaml")["probes"]), seed=0, n_repeats=1).table
    full = full.set_index(["pair", "evaluation", "baseline"]).auroc
    for pair in meter.EMPATHY:
        assert quick[pair, "plain->counter", "words, binary, naive Bayes"] == pytest.approx(full[pair, "plain->counter", "words, binary, naive Bayes"])


def test_leaking_words_are_those_planted():
    texts = triplets(40, seed=0, share=0.0)
    texts["response"] = texts["response"] + np.where(texts["label"] == "affective", " zqx zqx", " vvk")
    assert {"zqx", "vvk"} <= set(meter.leaking_words(texts)["C/A"][:3]) and "zqx" not in meter.leaking_words(texts)["C/I"]


def test_the_worker_answers_and_keeps_only_the_newest_question():
    import threading
    found, done = [], threading.Event()

    def answered(kind, result):
        found.append((kind, result))
        if result.get("n") == 30:
            done.set()
    worker = meter.Worker(answered)
    for n in range(11, 31):
        worker.ask("meter", lambda n=n: triplets(n, seed=0, share=0.2, swap=False))
    assert done.wait(120) and len(found) < 10 and len(found[-1][1]["pairs"]) == 3
    worker.close()


def leaky_half(n=40):
    """Scenarios of two contexts; every second one carries a word per type."""
    texts = triplets(n, seed=0, share=0.0)
    number = texts["scenario_id"].str[1:].astype(int)
    tell = texts["label"].map({"cognitive": " kog", "affective": " aff", "instrumental": " ins"})
    texts["response"] = texts["response"] + np.where(number % 2 == 0, tell * 3, "")
    return texts.assign(context=np.where(number < n // 2, "frustration", "casual_conversation"), domain="")


def test_the_selection_drops_what_leaks_under_the_quotas():
    texts, quota = leaky_half(), {"frustration": 10, "casual_conversation": 10}
    found = selection.propose(texts, quota=quota, pins={}, seed=0)
    odd = sum(int(id_[1:]) % 2 for id_ in found["scenarios"])
    assert len(found["scenarios"]) == 20 and odd >= 17
    assert texts[texts.scenario_id.isin(found["scenarios"])].drop_duplicates("scenario_id").context.value_counts().to_dict() == quota
    assert max(found["after"].values()) < max(found["drawn"].values()) and not found["short"]
    again = selection.propose(texts.sample(frac=1, random_state=0), quota=quota, pins={}, seed=0)
    assert again == found, "the same set, whatever the order of the rows"


def test_the_person_overrides_the_selection():
    texts, quota = leaky_half(), {"frustration": 10, "casual_conversation": 30}
    pins = {"s000": "in", "s001": "out", "s002": "in"}
    found = selection.propose(texts, quota=quota, pins=pins, seed=0)
    assert {"s000", "s002"} <= set(found["scenarios"]) and "s001" in found["left_out"]
    assert found["short"] == {"casual_conversation": 10}
    nothing = selection.propose(texts[:0], quota=quota, pins={}, seed=0)
    assert nothing["scenarios"] == [] and nothing["short"] == quota


def test_quotas_add_up():
    assert selection.quotas(["b", "a", "c", "a"], 10) == {"a": 4, "b": 3, "c": 3}


def edited_rows(texts, scenario, register):
    return texts[(texts.condition == "empathy") & (texts.scenario_id == scenario) & (texts.register == register)]


def headless(texts, journals, outputs, *more):
    from lib.store import Study
    from lib.text.dataset import export_seed_schema
    folder = outputs / "theirs"
    folder.mkdir()
    for name, content in export_seed_schema(texts).items():
        (folder / name).write_text(json.dumps(content))
    done = run("02_filter", "--study", "tiny", "--dataset", str(folder), "--set", f"02_filter.journals={journals}", "--set", "01_generate.n_scenarios=0", *more)
    assert done.returncode == 0, done.stderr[-800:]
    return Study("tiny--theirs", "test")


def test_the_stage_applies_journals_headless(texts, tmp_path, outputs):
    """Rejections, an edit, a stale record and a torn line, through Papermill; a new label makes the stage run again."""
    folder = tmp_path / "journals"
    ada = label(texts, folder, "ada", lambda p: "unsafe" if p.item.key == "s004/counter" else "accept")
    one = Session(texts, folder, "ada", n_keep=20)
    one.at = one.number["s002/plain"]
    one.do("edit", {"card": one.at, "slot": 0, "text": "A wording of my own."})
    one.journal.append("reject", dataset="old", item="s005/plain", item_hash="another text", reason="unsafe")
    one.journal.close()
    with (folder / "ada.jsonl").open("ab") as file:
        file.write(b'{"half')
    home = headless(texts, folder, outputs)
    kept = home.load_texts()
    assert "s004" not in set(kept.scenario_id) and kept.scenario_id.nunique() == 23
    edited = kept[(kept.scenario_id == "s002") & (kept.register == "plain")].set_index("label").response
    assert edited[ada.places[one.number["s002/plain"]].types[0]] == "A wording of my own."
    assert not edited_rows(kept, "s002", "plain").untouched.any() and edited_rows(kept, "s002", "counter").untouched.all()
    about = home.load_json("dataset/filtered/labels.json")
    assert about["source"] == "labels of ada" and about["stale_records"] == 1 and about["torn_journals"] == ["ada.jsonl"]
    assert about["edited_responses"] == 1 and about["left_out"] == ["s004"]
    assert set(home.load_table("dataset/filtered/agreement.csv").measure) == {"self_consistency"}
    assert set(home.load_table("dataset/filtered/leakage.csv").pair) == {"C/A", "C/I", "A/I"}
    assert len(home.load_json("dataset/filtered/triplets_filtered.json")["triplets"]) == 23
    again = Session(texts, folder, "ada", n_keep=20)
    again.at = again.number["s006/plain"]
    again.do("reject", {"card": again.at, "reason": "other"})
    again.journal.close()
    done = run("02_filter", "--study", "tiny", "--dataset", str(outputs / "theirs"), "--set", f"02_filter.journals={folder}", "--set", "01_generate.n_scenarios=0")
    assert done.returncode == 0 and home.load_json("dataset/filtered/labels.json")["left_out"] == ["s004", "s006"]


def test_without_labels_the_selection_of_language_models_stands(bundled, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "LABELS", tmp_path / "none")
    for module in (labels, filtering):
        monkeypatch.setattr(module, "RATINGS", tmp_path / "nor")
    found = filtering.apply(bundled, "")
    assert "language models" in found.about["source"] and found.agreement.empty and found.verdicts.empty
    pd.testing.assert_frame_equal(found.texts, bundled)
    (tmp_path / "nor").mkdir()
    first = str(bundled[bundled.condition == "empathy"].scenario_id.iloc[0])
    label(bundled, tmp_path / "nor", "lm", lambda p: "unnatural" if p.item.scenario_id == first else "accept")
    found = filtering.apply(bundled, "")
    assert "bundled ratings" in found.about["source"] and found.about["left_out"] == [first]
    assert first not in set(found.texts.scenario_id), "its controls go with it"
    with pytest.raises(BadInput, match="no such folder"):
        filtering.apply(bundled, str(tmp_path / "nowhere"))


def test_a_confirmed_selection_is_applied(texts, tmp_path):
    label(texts, tmp_path, "ada", lambda p: "accept")
    one = Session(texts, tmp_path, "ada", n_keep=20)
    ids = sorted(one.accepted)[:15]
    with pytest.raises(BadInput, match="not accepted"):
        one.do("keep", {"scenarios": ["nobody"]})
    one.do("keep", {"scenarios": ids})
    assert filtering.apply(texts, str(tmp_path)).texts.scenario_id.unique().tolist() == ids
    one.do("undo", {})
    assert filtering.apply(texts, str(tmp_path)).texts.scenario_id.nunique() == 24
    one.journal.close()


def test_the_meter_reads_400_triplets_in_three_seconds():
    """Of processor time: the worker is alone with it, whatever else the machine does."""
    import time
    texts = triplets(200, seed=0, share=0.15)
    start = time.process_time()
    assert len(meter.reading(texts)["pairs"]) == 3
    assert time.process_time() - start < 3
