"""Made-up and damaged inputs: every one is taken or refused in one line, and a refusal changes nothing on disk.

In `make test` each kind of input has a few dozen examples, the same each time; with `FAULT_TRIES=20000` there are that many
in all, new ones each time.
"""

import copy
import io
import json
import os
import shutil
import string
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lib import params, run
from lib.cli import exit_code
from lib.errors import BadInput
from lib.files import to_json
from lib.params import load_params
from lib.seals import sealed, stamped
from lib.stages import check_stage_params, intact, outputs_of, record_path, stage_record
from lib.store import Study
from lib.text import dataset as ds
from lib.text import labels
from lib.text.api import api_key
from lib.text.budget import Ledger
from lib.text.journal import Journal, journal_path
from lib.text.purchases import Purchases
from lib.timing import write_costs
from tests.faults.table import TRIES, record

KINDS = 8  # of inputs, which share the tries
EXAMPLES = TRIES // KINDS or 40
fuzzed = settings(max_examples=EXAMPLES, derandomize=not TRIES, deadline=None, database=None, phases=(Phase.explicit, Phase.generate, Phase.shrink),
                  suppress_health_check=list(HealthCheck))

texts = st.one_of(st.text(max_size=20), st.text(alphabet=st.characters(exclude_categories=()), max_size=6), st.sampled_from([
    "", "\x00", "\ud800", "\ufeff", "..", "/", "../../etc/passwd", "{{x}}", "=1+1", "<script>", "x" * 70_000, "\n", "\u2028", "NaN", "1e999", "!!python/object", "&a", "*a", "%s%n"]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([10**400, -1, 2**63, 0]), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)), max_leaves=8)


@st.composite
def damaged(draw, valid):
    """A copy of `valid` with one to three of its values replaced, removed, doubled or moved in among strangers."""
    whole = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        place, key = whole, 0
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 4)):
            place = place[key]
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        what = draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
        if what == "replace" or place is whole:
            place[key] = draw(values)
        elif what == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(texts)] = draw(values)
        else:
            place.insert(key, draw(values) if what == "add" else copy.deepcopy(place[key]))
    return whole[0]


@st.composite
def cut(draw, content: bytes):
    """`content` with a few of its pieces removed, doubled or overwritten."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        content = content[:start] + draw(st.one_of(st.binary(max_size=6), st.just(content[start:end] * 2), st.just(b""))) + content[end:]
    return content


def as_json(content) -> bytes:
    return json.dumps(content).encode()


def as_yaml(content) -> bytes:
    return yaml.dump(content, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock")}


def taken_or_refused(folder: Path, attempt) -> bool:
    """Whether `attempt()` was taken. A refusal is one line and leaves the folder as it was; anything else fails the test."""
    before = files_in(folder)
    try:
        attempt()
    except BadInput as error:
        assert str(error) and files_in(folder) == before, "a refusal changed something"
        return False
    assert not [name for name in files_in(folder) if name.endswith(".tmp")], "something is half written"
    return True


class Tally:
    """Counts what was tried, and writes the row once all were good."""

    def __init__(self, fault: str):
        self.fault, self.taken, self.refused = fault, 0, 0

    def __call__(self, taken: bool) -> None:
        self.taken += taken
        self.refused += not taken

    def close(self) -> None:
        assert self.refused > 0
        record(f"made-up {self.fault}", "taken, or refused in one line with nothing changed on disk", tries=self.taken + self.refused, losses=0, note=f"{self.refused:,} refused")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Params that may be spoiled, and outputs of one stage."""
    folder = tmp_path / "params"
    folder.mkdir()
    for path in params.PARAMS.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(params, "PARAMS", folder)
    monkeypatch.setenv("EMPATHY_OUTPUTS", str(tmp_path / "outputs"))
    home = Study("tiny", "05_probe", seed=0)
    home.save_json("probe/metrics.json", {"results": []})
    record_path(home.root, "05_probe").write_bytes(sealed({"fingerprint": "f", "outputs": outputs_of(home.root, "05_probe"), "seconds": 1.0, "peak_mb": 3}))
    return tmp_path


def test_params(place):
    valid = yaml.safe_load((params.PARAMS / "tiny.yaml").read_text())
    file, count = params.PARAMS / "tiny.yaml", Tally("params files")
    whole = file.read_bytes()

    @fuzzed
    @given(st.one_of(damaged(valid).map(as_yaml), damaged(valid).map(as_json), cut(whole), st.binary(max_size=60), values.map(as_yaml)), st.booleans())
    def tried(content, quick):
        file.write_bytes(content)

        def attempt():
            loaded = load_params("tiny", quick=quick)
            check_stage_params(loaded, "tiny.yaml")
            to_json(loaded.model_dump())
        count(taken_or_refused(place, attempt))
    tried()
    count.close()


def test_datasets(tmp_path):
    valid = {"metadata": {"register": "plain"}, "triplets": [{"id": f"t{i}", "scenario": f"A day {i} with rain.", "context": "frustration", "domain": "x", "cognitive": f"I see {i}.",
                                                             "affective": f"I feel {i}.", "instrumental": f"Do {i}."} for i in range(3)]}
    tied = {"items": [{"id": "v", "triplet_id": "t0", "scenario": "Rain.", "factual": "a", "informational": "b", "procedural": "c"}]}
    count = Tally("dataset files")

    @fuzzed
    @given(st.one_of(damaged(valid).map(as_json), cut(as_json(valid)), st.binary(max_size=60), values.map(as_json)), st.one_of(st.just(as_json(tied)), damaged(tied).map(as_json)))
    def tried(first, second):
        (tmp_path / "triplets_filtered.json").write_bytes(first)
        (tmp_path / "controls.json").write_bytes(second)
        count(taken_or_refused(tmp_path, lambda: ds.texts_table(ds.read_folder(tmp_path), cluster_cosine=0.4).to_csv().encode()))
    tried()
    count.close()


def lines(records) -> bytes:
    """Journal lines, every second one without its check, as before there were any."""
    return b"".join((stamped(r) if i % 2 and isinstance(r, dict) else json.dumps(r).encode()) + b"\n" for i, r in enumerate(records)) if isinstance(records, list) else json.dumps(records).encode()


def test_label_journals(tmp_path):
    common = {"annotator": "ada", "time": "2026-01-01T00:00:00+00:00", "dataset": "d"}
    valid = [{"id": "1", "event": "accept", "item": "s/plain", "item_hash": "h", **common}, {"id": "2", "event": "guess", "item": "s/plain", "item_hash": "h", "types": {"a": "cognitive"}, **common},
             {"id": "3", "event": "undo", "of": "2", **common}, {"id": "4", "event": "keep", "scenarios": ["s"], **common}, {"id": "5", "event": "edit", "item": "s/plain", "item_hash": "h", "label": "affective", "text": "x", **common}]
    path, count = tmp_path / "ada.jsonl", Tally("label journals")

    @fuzzed
    @given(st.one_of(damaged(valid).map(lines), cut(lines(valid)), cut(lines(valid)[:-9]), st.binary(max_size=60), values.map(lines)))
    def tried(content):
        path.write_bytes(content)

        def attempt():
            records, _ = labels.read_journal(path)
            labels.fold(records, {"s/plain": "h"})
            journal = labels.Journal(tmp_path, "ada")
            try:
                assert journal.writable and journal.records == records
                journal.append("comment", dataset="d", item="s/plain", item_hash="h", text="more")
            finally:
                journal.close()
            again = labels.read_journal(path)[0]
            assert again[:-1] == records and again[-1].text == "more", "a record was lost"
        count(taken_or_refused(tmp_path, attempt))
    tried()
    count.close()


def test_paid_journals(tmp_path):
    price = {"input": 1.0, "output": 5.0}
    message = {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 4}}
    item = {"custom_id": "b", "result": {"type": "succeeded", "message": message}}
    valid = [{"event": "sent", "key": "k", "usd": 0.1, "price": price}, {"event": "reply", "key": "k", "raw": json.dumps(message)}, {"event": "batch_sent", "intent": "i", "keys": {"b": 0.1}, "price": price},
             {"event": "batch", "intent": "i", "batch": "n"}, {"event": "reply", "batch": "n", "raw": json.dumps(item)}, {"event": "frozen", "name": "f", "content": [1]}]
    raws = st.one_of(damaged(message), values, damaged(item)).map(lambda raw: [*valid[:4], {"event": "reply", "key": "k", "raw": json.dumps(raw)}, {"event": "reply", "batch": "n", "raw": json.dumps(raw)}])
    path, count = tmp_path / "x.journal.jsonl", Tally("journals of paid replies")

    @fuzzed
    @given(st.one_of(damaged(valid).map(lines), raws.map(lines), cut(lines(valid)), cut(lines(valid)[:-9]), st.binary(max_size=60), values.map(lines)))
    def tried(content):
        path.write_bytes(content)

        def attempt():
            journal = Journal(path)
            try:
                ledger = Ledger(journal, 10.0)
                Purchases(journal, ledger, None, batches=False)
                assert 0 <= ledger.spent < 1e10, "money was lost count of"
            finally:
                journal.close()
        count(taken_or_refused(tmp_path, attempt))
    tried()
    count.close()


def reseal(content) -> bytes:
    """What somebody's own script might write: a good seal around anything."""
    try:
        return sealed(content)
    except (ValueError, TypeError):
        return as_json(content)


def seals_of(content: bytes):
    valid = {key: value for key, value in json.loads(content).items() if key != "seal"}
    return st.one_of(damaged(valid).map(reseal), damaged(json.loads(content)).map(as_json), cut(content), st.binary(max_size=60), values.map(as_json))


def test_sidecars(place):
    home = Study("tiny", "10_report")
    path, count = home.root / "probe/metrics.json.meta.json", Tally("sidecars")

    @fuzzed
    @given(seals_of(path.read_bytes()))
    def tried(content):
        path.write_bytes(content)
        outputs_of(home.root, "05_probe")
        intact(home.root, {"outputs": {"probe/metrics.json": "x"}})
        count(taken_or_refused(place, lambda: home.load_json("probe/metrics.json")))
    tried()
    count.close()


def test_stage_records(place):
    home = Study("tiny", "10_report")
    path, count = record_path(home.root, "05_probe"), Tally("stage records")
    loaded = load_params("tiny")

    @fuzzed
    @given(seals_of(path.read_bytes()))
    def tried(content):
        path.write_bytes(content)
        run.external_inputs("10_report", "tiny", {}, loaded)
        count(taken_or_refused(place, lambda: intact(home.root, stage_record(home.root, "05_probe"))))
        write_costs(home.root, {"05_probe"})
    tried()
    count.close()


def test_words_of_the_command_line(place, monkeypatch):
    ran, count = [], Tally("words of the command line")
    monkeypatch.setattr(run, "run_all", lambda jobs, *_, **__: ran.append(jobs) or 0)
    monkeypatch.setattr(run, "show_verdicts", lambda name: None)
    names = st.one_of(texts, st.sampled_from(["05_probe", "08_causality", "tiny", "tiny.yaml", "../params/tiny", "01_generate"]))
    setting = st.builds("{}.{}={}".format, st.sampled_from(["05_probe", "08_causality", "01_generate", "05"]), st.sampled_from(["n_permutations", "coeffs", "dataset", "study", "audit", ""]),
                        st.one_of(texts, values.map(lambda value: yaml.dump(value, default_flow_style=True)), st.integers(1, 9).map(str)))
    word = st.one_of(names.map(lambda name: ["--study", name]), setting.map(lambda text: ["--set", text]), names.map(lambda name: [name]), names.map(lambda name: ["--dataset", name]),
                     st.sampled_from(["--quick", "--force", "--nope", "--set", "audit", "-x", "--"]).map(lambda word: [word]))
    monkeypatch.chdir(place)
    monkeypatch.delenv("EMPATHY_TRACEBACK", raising=False)

    @fuzzed
    @given(st.lists(word, max_size=3))
    def tried(words):
        before, said = files_in(place), io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            code = exit_code(run.app, "lib.run", [word for group in words for word in group])
        assert code in (0, 2) and files_in(place) == before
        assert said.getvalue().count("\n") == (code == 2) and (code == 0 or said.getvalue().startswith("error: ")), said.getvalue()
        count(code == 0)
    tried()
    count.close()
    assert ran


def test_environment_variables(place, monkeypatch):
    """Names of folders as an environment can hold them: any bytes but NUL. What is written lies below the folder given, or nowhere."""
    count, home = Tally("environment variables"), place / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    segment = st.one_of(st.binary(max_size=20), st.text(max_size=90).map(lambda text: text.encode("utf-8", "surrogatepass")), st.sampled_from([b"x" * 300, b"a/b/c", b".", b" ", b"file", b"file/x", "ü".encode()]))
    name = segment.map(lambda raw: os.fsdecode(raw.replace(b"\0", b"0").replace(b"..", b"__")).strip("/"))
    key = st.one_of(st.text(alphabet=string.printable, max_size=20), name)

    @fuzzed
    @given(name, name, key)
    def tried(outputs, paid, secret):
        for path in home.iterdir():  # what an earlier example has written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (home / "file").write_bytes(b"is a file")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMPATHY_OUTPUTS", f"{home}/{outputs}")
            patch.setenv("EMPATHY_PAID", f"{home}/{paid}")
            patch.setenv("ANTHROPIC_API_KEY", secret)

            for attempt in (api_key, lambda: Study("tiny", "05_probe").save_json("probe/x.json", {"a": 1}), lambda: Journal(journal_path("tiny")).close()):
                count(taken_or_refused(place, attempt))
    tried()
    count.close()
