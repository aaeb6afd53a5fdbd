"""The label journal: what is acknowledged stays, state is a fold, stale and torn records are reported and never applied."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from lib.errors import BadInput
from lib.text import cards, labels
from lib.text.labels import Journal, fold, read_all, read_journal
from lib.text.session import Session
from tests.conftest import ROOT
from tests.lab import texts_of


@pytest.fixture
def texts():
    return texts_of(30)


def session(texts, folder, name="ada", **more):
    return Session(texts, folder, name, n_keep=more.pop("n_keep", 20), **more)


def do(one, op, **more):
    one.do(op, {"card": one.at, **more})


def test_a_record_is_on_disk_before_append_returns(tmp_path, monkeypatch):
    seen = []
    real = os.fsync
    journal = Journal(tmp_path, "ada")
    monkeypatch.setattr(labels.os, "fsync", lambda fd: (seen.append(journal.path.read_bytes()), real(fd)))
    journal.append("keep", dataset="d", scenarios=("s1",))
    assert len(seen) == 1 and seen[0].endswith(b"\n") and b'"s1"' in seen[0]
    journal.close()


def test_a_torn_last_line_is_left_out_and_reported(tmp_path, texts):
    one = session(texts, tmp_path)
    do(one, "accept"), do(one, "reject", reason="unsafe")
    whole = one.journal.path.read_bytes()
    one.journal.close()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole) - 1):
        (tmp_path / "ada.jsonl").write_bytes(whole[:cut])
        records, torn = read_journal(tmp_path / "ada.jsonl")
        assert len(records) == 1 and torn
    again = session(texts, tmp_path)
    assert again.journal.torn and again.shown()["torn"] and again.shown()["progress"]["done"] == 1
    do(again, "accept")
    again.journal.close()
    records, torn = read_journal(tmp_path / "ada.jsonl")
    assert [r.event for r in records] == ["accept", "accept"] and not torn


def test_a_last_line_without_its_end_is_no_loss(tmp_path, texts):
    one = session(texts, tmp_path)
    do(one, "accept"), do(one, "accept")
    one.journal.close()
    path = tmp_path / "ada.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = session(texts, tmp_path)
    assert len(again.journal.records) == 2 and not again.journal.torn
    do(again, "accept")
    again.journal.close()
    assert len(read_journal(path)[0]) == 3


@pytest.mark.parametrize("line", ["{", "[]", '{"event": "accept"}', '{"id": "x", "event": "steal", "annotator": "a", "time": "t", "dataset": "d"}'])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "ada.jsonl").write_text(line + "\n")
    with pytest.raises(BadInput, match=r"ada\.jsonl: line 1"):
        read_journal(tmp_path / "ada.jsonl")


@pytest.mark.parametrize("name", ["", "../ada", "Ada", "a b", "a" * 41])
def test_an_annotator_names_a_file(tmp_path, name):
    with pytest.raises(BadInput, match="annotator"):
        Journal(tmp_path, name)


def test_a_changed_text_makes_its_records_stale(tmp_path, texts):
    one = session(texts, tmp_path)
    for _ in range(4):
        do(one, "accept")
    key = one.places[1].item.key
    one.journal.close()
    scenario, register = key.split("/")
    mine = (texts.scenario_id == scenario) & (texts.register == register) & (texts.label == "affective")
    changed = texts.assign(response=texts.response.where(~mine, "Another wording."))
    again = session(changed, tmp_path)
    assert [r.item for r in again.state.stale] == [key] and again.shown()["progress"]["done"] == 3
    again.at = again.number[key]
    assert again.shown()["stale"] and not again.shown()["decision"]
    do(again, "view", filter="stale")
    assert again.view() == [again.number[key]]
    do(again, "undo")
    assert again.shown()["progress"]["done"] == 2, "undo takes a record that counts, not a stale one"


class Model:
    """The fold by another way: a list of snapshots, as an editor keeps them."""

    def __init__(self):
        self.now, self.past, self.future = {}, [], []

    def change(self, name, value):
        self.past.append(dict(self.now))
        self.future.clear()
        self.now[name] = value

    def undo(self):
        if self.past:
            self.future.append(dict(self.now))
            self.now = self.past.pop()

    def redo(self):
        if self.future:
            self.past.append(dict(self.now))
            self.now = self.future.pop()


def seen(state) -> dict:
    found = {}
    for key, card in state.cards.items():
        found |= {(key, "decision"): (card.decision, card.reason)} if card.decision else {}
        found |= {(key, "flag"): True} if card.flagged else {}
        found |= {(key, "comment"): card.comment} if card.comment else {}
    for key, edits in state.edits.items():
        found |= {(key, label): wordings[-1] for label, wordings in edits.items()}
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_fold_equals_an_editor_with_snapshots(tmp_path, texts, seed):
    rng, one, model = random.Random(seed), session(texts, tmp_path), Model()
    for step in range(200):
        one.at = rng.randrange(len(one.places))
        place, op = one.place, rng.choice(["accept", "reject", "flag", "comment", "edit", "undo", "undo", "redo"])
        if op == "accept":
            do(one, op)
            model.change((place.key, "decision"), ("accept", ""))
        elif op == "reject":
            do(one, op, reason="too similar")
            model.change((place.key, "decision"), ("reject", "too similar"))
        elif op == "flag":
            do(one, op)
            model.change((place.key, "flag"), not model.now.get((place.key, "flag"), False))
        elif op == "comment":
            do(one, op, text=f"c{step}")
            model.change((place.key, "comment"), f"c{step}")
        elif op == "edit":
            do(one, op, slot=1, text=f"wording {step}")
            model.change((place.item.key, place.types[1]), f"wording {step}")
        else:
            do(one, op)
            getattr(model, op)()
        assert seen(one.state) == {k: v for k, v in model.now.items() if v}
    records = read_journal(one.journal.path)[0]
    assert seen(fold(records, one.hashes)) == seen(one.state) and len(one.state.undone) == len(model.future)
    one.journal.close()


def test_an_edit_is_a_new_version_and_the_original_stays(tmp_path, texts):
    one = session(texts, tmp_path)
    before, at = one.shown()["responses"][0]["text"], one.at
    do(one, "edit", slot=0, text="  A first rewording. ")
    do(one, "edit", slot=0, text="A second rewording.")
    records = one.journal.records
    assert [(r.version, r.text) for r in records] == [(1, "A first rewording."), (2, "A second rewording.")]
    assert one.shown()["responses"][0] == {"text": "A second rewording.", "edits": 2} and one.at == at
    assert before == one.place.item.responses[one.place.types[0]]
    do(one, "undo"), do(one, "undo")
    assert one.shown()["responses"][0] == {"text": before, "edits": 0}
    for bad in ("", "   ", "a\x00b", "\ud800", "x" * 50_001):
        with pytest.raises(BadInput):
            do(one, "edit", slot=0, text=bad)
    assert len(records) == 4
    one.journal.close()


def test_a_second_kernel_reads_only_and_corrupts_nothing(tmp_path, texts):
    code = ("import sys; from lib.text.labels import Journal; j = Journal(__import__('pathlib').Path(sys.argv[1]), 'ada');"
            "j.append('keep', dataset='d', scenarios=('s1',)); print(j.writable, flush=True); sys.stdin.readline()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    mine = session(texts, tmp_path)
    assert not mine.journal.writable and not mine.shown()["writable"] and mine.state.kept == ("s1",)
    before = mine.journal.path.read_bytes()
    with pytest.raises(BadInput, match="reading only"):
        do(mine, "accept")
    assert mine.journal.path.read_bytes() == before
    other.kill()
    other.wait()
    again = session(texts, tmp_path)
    assert again.journal.writable, "a killed kernel leaves no lock behind"
    newer = session(texts, tmp_path)
    assert newer.journal.writable and not again.journal.writable, "a cell run again takes the journal over"
    newer.journal.close()


def test_a_full_disk_leaves_no_half_line(tmp_path, texts, monkeypatch):
    one = session(texts, tmp_path)
    do(one, "accept")
    whole = one.journal.path.read_bytes()
    monkeypatch.setattr(labels.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BadInput, match="No space left"):
        do(one, "accept")
    monkeypatch.undo()
    assert one.journal.path.read_bytes() == whole and one.shown()["progress"]["done"] == 1
    do(one, "accept")
    assert len(read_journal(one.journal.path)[0]) == 2
    one.journal.close()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_journals_merge_in_git(tmp_path, texts):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words], cwd=tmp_path, check=True, capture_output=True)
    git("init", "-b", "main")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    (tmp_path / "labels").mkdir()

    def label(name, n):
        one = session(texts, tmp_path / "labels", name)
        for _ in range(n):
            do(one, "accept")
        one.journal.close()
        git("add", "-A", ".")
        git("commit", "-m", f"{name} {n}")
    label("ada", 3)
    git("checkout", "-b", "other")
    label("ben", 4), label("ada", 2)
    git("checkout", "main")
    label("cem", 5), label("ada", 1)
    git("merge", "other")
    one = session(texts, tmp_path / "labels", "ada")
    one.journal.close()
    states = read_all(tmp_path / "labels", one.hashes)
    assert {name: len(state.done) for name, state in states.items()} == {"ada": 6, "ben": 4, "cem": 5}


def test_the_state_of_400_triplets_is_quick(tmp_path):
    """A decision at 400 triplets, with a long journal behind it, takes the kernel a few milliseconds."""
    one = session(texts_of(200), tmp_path, n_keep=90)
    for _ in range(400):
        do(one, "accept")
    start = time.process_time()
    for _ in range(20):
        do(one, "flag")
        json.dumps(one.shown())
    assert (time.process_time() - start) / 20 < 0.05
    one.journal.close()


def test_cards_are_the_same_on_every_machine(texts):
    items = cards.items_of(texts)
    places = cards.order(items, "ada")
    again = cards.order(cards.items_of(texts.sample(frac=1, random_state=1)), "ada")
    assert [(p.key, p.types) for p in places] == [(p.key, p.types) for p in again]
    assert [p.key for p in places] != [p.key for p in cards.order(items, "ben")]
    keys = [p.key for p in places]
    assert len(keys) == 63 and len(set(keys)) == 63 and sum(k.endswith("#2") for k in keys) == 3
    first = {k: i for i, k in enumerate(keys)}
    for key in keys:
        if key.endswith("#2"):
            assert first[key] - first[key[:-2]] >= 20
            assert places[first[key]].types != places[first[key[:-2]]].types
    assert all(abs(first[f"s{s:03d}/plain"] - first[f"s{s:03d}/counter"]) >= 10 for s in range(30))
    assert len({p.types for p in places}) == 6
