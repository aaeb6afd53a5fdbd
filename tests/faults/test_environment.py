"""The machine fails: a full disk, outputs that cannot be written, a folder gone, a clock that goes back, two runs at once, Ctrl-C.

What is promised: one line on stderr with the right code, nothing half written under a name that anything reads, and a run
afterwards that completes.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest

from lib.errors import BadInput
from lib.files import write_atomic
from lib.params import load_params
from lib.stages import intact, stage_record
from lib.store import Study, read_checked
from lib.text import journal as paid
from lib.text import labels
from lib.text.budget import Ledger, Price, sent
from lib.timing import Peak
from tests.conftest import ROOT
from tests.faults.table import LONG, record, size

SHORT = ["01_generate", "--study", "tiny"]  # the shortest stage, with a kernel of its own


def command(*words: str, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lib.run", *words], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def one_error(done: subprocess.CompletedProcess, code: int, said: str = "") -> bool:
    """Whether a command ended with this code and its last line is the only one that is an error; no traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return done.returncode == code and len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0] and said in errors[0] and "Traceback" not in done.stderr


def half_written(folder: Path) -> list[str]:
    """Files that a reader could take for whole and that are not: bad JSON, bad sidecars, scratch files without an owner."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".tmp"):
            found.append(path.name)
        elif path.name.endswith(".meta.json"):
            artifact = path.with_name(path.name.removesuffix(".meta.json"))
            try:
                read_checked(artifact)
            except BadInput as error:
                found.append(str(error))
        elif path.suffix in (".json", ".ipynb") and not path.name.startswith("."):
            try:
                json.loads(path.read_text())
            except ValueError:
                found.append(path.name)
    return found


@contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A file system of this size at `folder`, where this account may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here ({done.stderr.strip()[:80]}); the limit of a file's size is tried instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def writers(folder: Path, home: Study):
    """`(name, write)` of all that writes: each adds something and raises BadInput where it cannot."""
    rng = np.random.default_rng(0)
    notes = labels.Journal(folder / "labels", "ada")
    bought = paid.Journal(folder / "paid/tiny.journal.jsonl")
    ledger = Ledger(bought, 1e6)
    try:
        yield "labels", lambda n: notes.append("comment", dataset="d", item="s/plain", item_hash="h", text="x" * n)
        yield "paid replies", lambda n: ledger.write(sent(f"k{n}{len(bought.records)}", 0.1, Price(1.0, 5.0)), {"event": "reply", "key": "k", "raw": "y" * n})
        yield "tensors", lambda n: home.save_tensors("probe/t.safetensors", {"a": rng.normal(size=n).astype(np.float32)})
        yield "tables", lambda n: home.save_json("probe/metrics.json", {"results": [], "more": "z" * n})
    finally:
        notes.close()
        bought.close()


def fill(folder: Path, home: Study, tries: int) -> tuple[int, list[str]]:
    """Write until the disk is full, `tries` times over; `(refusals, losses)`. After a refusal all that was acknowledged is there."""
    refused, losses, rng = 0, [], random.Random(3)
    for kind, write in writers(folder, home):
        done = 0
        while done < tries:
            before = snapshot(folder)
            try:
                write(rng.randrange(1, 9000))
            except BadInput as error:
                done += 1
                refused += 1
                if "\n" in str(error) or "written" not in str(error):
                    losses.append(f"{kind}: said {error}")
                if (after := snapshot(folder)) != before and not whole(kind, before, after):
                    losses.append(f"{kind}: {sorted(name for name in after if after[name] != before.get(name))} changed")
    again = labels.read_journal(folder / "labels/ada.jsonl")
    if again[1]:
        losses.append("a torn label is left")
    paid.Journal(folder / "paid/tiny.journal.jsonl").close()
    return refused, losses + half_written_but_new(home)


def whole(kind: str, before: dict, after: dict) -> bool:
    """Whether a refused write of two files left the new artifact whole, only without its new sidecar: it is refused when read."""
    changed = {name for name in after if after[name] != before.get(name)} | (before.keys() - after.keys())
    return kind in ("tensors", "tables") and all(name.endswith((".safetensors", "metrics.json")) for name in changed)


def half_written_but_new(home: Study) -> list[str]:
    """Artifacts that read as good must be good; one whose sidecar did not fit any more must be refused by name."""
    losses = []
    for name, load in (("probe/t.safetensors", home.load_tensors), ("probe/metrics.json", home.load_json)):
        try:
            load(name)
        except BadInput as error:
            if name.split("/")[1] not in str(error):
                losses.append(f"{name} is not named")
    return losses + [path.name for path in home.root.rglob("*.tmp")]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")}


def test_a_full_disk(tmp_path, monkeypatch):
    tries, refused, losses = size(250, 8), 0, []
    with small_disk(tmp_path / "disk", 256) as disk:
        monkeypatch.setenv("EMPATHY_OUTPUTS", str(disk / "outputs"))
        home = Study("tiny", "05_probe", seed=0)
        home.save_tensors("probe/t.safetensors", {"a": np.zeros(3, np.float32)})
        home.save_json("probe/metrics.json", {"results": []})
        refused, losses = fill(disk, home, tries)
    record("a full disk", "what was acknowledged is there, the refused write leaves nothing half, one line says so", tries=refused, losses=len(losses), note="tmpfs of 256 kB; journals, artifacts")
    assert refused >= 4 * tries and not losses, losses[:5]


def test_a_limit_of_a_files_size(tmp_path):
    """The same without a mount: in a process of its own, whose files may not grow beyond some kilobytes."""
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.faults import test_environment as t
home = t.Study("tiny", "05_probe", seed=0)
home.save_tensors("probe/t.safetensors", {{"a": t.np.zeros(3, t.np.float32)}})
home.save_json("probe/metrics.json", {{"results": []}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
refused, losses = t.fill(Path({str(tmp_path)!r}), home, {size(100, 8)})
print(refused, len(losses), losses[:3])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "EMPATHY_OUTPUTS": str(tmp_path / "outputs")})
    assert done.returncode == 0, done.stderr[-2000:]
    refused, losses, *what = done.stdout.split(maxsplit=2)
    record("a file that may not grow", "what was acknowledged is there, the refused write leaves nothing half, one line says so", tries=int(refused), losses=int(losses), note="RLIMIT_FSIZE of 6 kB")
    assert int(refused) >= 4 * size(100, 8) and losses == "0", what


def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_with_room(tmp_path):
    """The runner itself, and its kernel: no room for the notebook, then room."""
    losses = []
    with small_disk(tmp_path / "disk", 24) as disk:
        done = command(*SHORT, EMPATHY_OUTPUTS=str(disk))
        losses += [] if one_error(done, 2) else [done.stderr[-600:]]
        losses += half_written(disk)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = command(*SHORT, EMPATHY_OUTPUTS=str(disk))
        losses += ([] if again.returncode == 0 and (disk / "tiny/01_generate.stage.json").exists() else [again.stderr[-600:]]) + half_written(disk)
    record("a run on a full disk", "one line, code 2; with room the next run completes", tries=2, losses=len(losses))
    assert not losses, losses


def test_outputs_that_cannot_be_written(tmp_path):
    """Permission bits do not stop root, so the folder's parent is a file, a pipe or a loop; and a read-only file system where one can be mounted."""
    (tmp_path / "file").write_text("a file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("/proc/nothing/here")
    places = [tmp_path / name / "outputs" for name in ("file", "pipe", "loop", "gone")] + [tmp_path / "file", Path("/proc/outputs")]
    losses = [f"{place.parent.name}: {done.stderr[-300:]}" for place in places[:size(6, 3)] if not one_error(done := command(*SHORT, EMPATHY_OUTPUTS=str(place)), 2)]
    for place in places:  # what a notebook meets
        with pytest.raises(BadInput, match="cannot be") as caught:
            write_atomic(place / "x.json", b"{}")
        losses += ["more than a line"] if "\n" in str(caught.value) else []
    record("outputs that cannot be written", "one line, code 2", tries=len(places) + size(6, 3), losses=len(losses))
    assert not losses and (tmp_path / "file").read_text() == "a file", losses


def test_a_read_only_file_system(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 512) as disk:
        monkeypatch.setenv("EMPATHY_OUTPUTS", str(disk / "outputs"))
        home = Study("tiny", "05_probe", seed=0)
        home.save_json("probe/metrics.json", {"results": []})
        before = snapshot(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(BadInput, match=r"metrics\.json: cannot be written"):
            home.save_json("probe/metrics.json", {"results": [1]})
        done = command(*SHORT, EMPATHY_OUTPUTS=str(disk / "outputs"))
        record("a read-only file system", "one line, code 2, nothing changed; what is there can be read", tries=2, losses=int(not one_error(done, 2)) + int(snapshot(disk) != before))
        assert one_error(done, 2) and snapshot(disk) == before and home.load_json("probe/metrics.json") == {"results": []}, done.stderr


def test_a_working_folder_that_is_gone(tmp_path):
    """A shell whose folder was removed: paths given are absolute, the project's own are found by the package."""
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(["sh", "-c", f'cd "{gone}" && rmdir "{gone}" && "$0" "$@"', sys.executable, "-m", "lib.run", "--list"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    bad = subprocess.run(["sh", "-c", f'mkdir -p "{gone}" && cd "{gone}" && rmdir "{gone}" && "$0" "$@"', sys.executable, "-m", "lib.run", *SHORT, "--dataset", "texts"],
                         capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "EMPATHY_OUTPUTS": str(tmp_path / "o")})
    losses = [] if done.returncode == 0 and "05_probe" in done.stdout else [done.stderr[-500:]]
    losses += [] if one_error(bad, 2) else [bad.stderr[-500:]]
    record("a working folder that is gone", "it works, or ends in one line, code 2", tries=2, losses=len(losses))
    assert not losses, losses


def test_a_clock_that_goes_back(tmp_path, monkeypatch):
    """Journals are read in the order of their lines, not of their times; durations come from a clock that cannot go back."""
    class Back(datetime):
        at = datetime(2030, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz=None):
            cls.at -= timedelta(days=rng.randrange(1, 40))
            return cls.at
    rng, losses, tries = random.Random(1), [], size(300, 40)
    monkeypatch.setattr(labels, "datetime", Back)
    monkeypatch.setattr(paid, "datetime", Back)
    monkeypatch.setattr(time, "time", lambda: 1e9 - rng.randrange(10**8))
    notes, bought = labels.Journal(tmp_path, "ada"), paid.Journal(tmp_path / "x.journal.jsonl")
    last = {}
    for number in range(tries):
        item = f"s{rng.randrange(9)}/plain"
        last[item] = rng.choice(["accept", "reject"])
        notes.append(last[item], dataset="d", item=item, item_hash="h")
        bought.append({"event": "frozen", "name": str(number), "content": number})
    state = labels.fold(labels.read_journal(notes.path)[0], dict.fromkeys(last, "h"))
    losses += [item for item, decision in last.items() if state.cards[item].decision != decision]
    losses += [r["name"] for r, number in zip(bought.records, range(tries), strict=True) if r["content"] != number]
    notes.close()
    bought.close()
    with Peak() as peak:
        assert peak.bytes >= 0
    record("a clock that goes back", "the last decision counts, nothing is lost", tries=2 * tries, losses=len(losses), note="each time earlier than the one before")
    assert not losses


def test_two_runs_of_one_study_at_once(tmp_path):
    """The first is stopped in the middle of its stage, so that the second surely meets it; then it goes on and completes."""
    words, environment = [sys.executable, "-m", "lib.run", *SHORT], {**os.environ, "EMPATHY_OUTPUTS": str(tmp_path)}
    first = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        in_the_middle(tmp_path / "tiny", first)
        first.send_signal(signal.SIGSTOP)
        second = command(*SHORT, EMPATHY_OUTPUTS=str(tmp_path))
        first.send_signal(signal.SIGCONT)
        code = first.wait(200)
    finally:
        first.kill()
    losses = [] if one_error(second, 2, "another run is at work") else [second.stderr]
    losses += ([] if code == 0 else [f"the first ended with {code}"]) + half_written(tmp_path)
    record("two runs of one study at once", "the second is told in one line, code 2; the first completes", tries=1, losses=len(losses))
    assert not losses, losses


def in_the_middle(root: Path, process: subprocess.Popen) -> None:
    """Wait until the stage's notebook is being run."""
    end = time.monotonic() + 120
    while not (root / ".01_generate.running.ipynb").exists():
        assert process.poll() is None and time.monotonic() < end, "it never came to the middle of a stage"
        time.sleep(0.02)


def test_a_full_temporary_folder(tmp_path):
    """TMPDIR on a disk with no room at all: the run needs none of it, or says so in one line."""
    with small_disk(tmp_path / "tmp", 16) as full:
        with (full / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
            while True:
                rest.write(b"x" * 512)
        done = command(*SHORT, EMPATHY_OUTPUTS=str(tmp_path / "outputs"), TMPDIR=str(full), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"))
        nowhere = command(*SHORT, "--force", EMPATHY_OUTPUTS=str(tmp_path / "outputs"), TMPDIR=str(tmp_path / "nothing"), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"))
    losses = [each.stderr[-500:] for each in (done, nowhere) if each.returncode != 0 and not one_error(each, 2)] + half_written(tmp_path / "outputs")
    record("a full or missing temporary folder", "the run completes, or ends in one line, code 2", tries=2, losses=len(losses), note=f"codes {done.returncode}, {nowhere.returncode}")
    assert not losses, losses


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs name spaces of mounts")
def test_a_container_whose_root_is_read_only(tmp_path):
    """`docker run --read-only`: one folder takes weights, outputs, HOME and temporary files; whatever else is written to ends the run."""
    for name in ("outputs", "cache", "home"):
        (tmp_path / name).mkdir()
    elsewhere = {name: "" for name in os.environ if name.startswith(("XDG_", "JUPYTER_", "IPYTHON", "HF_"))}
    environment = {**os.environ, **elsewhere, "EMPATHY_OUTPUTS": str(tmp_path / "outputs"), "EMPATHY_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    stage = ["03_extract", *SHORT[1:]] if LONG else SHORT
    if LONG:
        from lib.model import weights
        model = load_params("tiny").model
        shutil.copytree(weights.local_folder(model), tmp_path / "cache" / weights.key_of(model))
    read_only = 'mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,bind,ro / && { touch lib/x 2>&1 && exit 99; exec "$@"; }'
    done = subprocess.run(["unshare", "-m", "sh", "-c", read_only, str(tmp_path), sys.executable, "-m", "lib.run", *stage], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("no name space of mounts can be made here")
    record("a container whose root is read-only", "a run writes into its weights, its outputs, HOME and TMPDIR only", tries=1, losses=int(done.returncode != 0), note=f"{stage[0]} of the tiny study and what it reads")
    assert done.returncode == 0 and (tmp_path / f"outputs/tiny/{stage[0]}.stage.json").exists(), done.stderr[-2000:]


def test_ctrl_c(tmp_path):
    """SIGINT at moments spread over the run: while it starts, in the middle of a stage, at its end, and while the interpreter tidies up."""
    words, environment = [sys.executable, "-m", "lib.run", *SHORT], {**os.environ, "EMPATHY_OUTPUTS": str(tmp_path)}
    losses, tries, rng = [], 0, random.Random(2)
    for number in range(size(32, 3)):
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        moment = r"(\d+)/\d+ \[" if number % 4 != 2 else r"tiny: what"
        before = read_until(process, moment, rng.randrange(16)) if number % 4 else time.sleep(rng.uniform(0.5, 3.0)) or ""
        time.sleep(rng.uniform(0, 0.5) if number % 4 == 2 else rng.uniform(0, 0.1))
        kernels = [] if process.poll() is not None else children(process.pid)
        process.send_signal(signal.SIGINT)
        said = before + process.communicate(timeout=120)[1]
        rest, recorded = [line for line in said.splitlines() if line.strip()], (tmp_path / "tiny/01_generate.stage.json").exists()
        if process.returncode == 0:  # it was over already
            losses += [] if recorded and "interrupted" not in said else [f"0: {said[-800:]}"]
        else:
            tries += 1
            losses += [] if process.returncode == 130 and rest and rest[-1].startswith("interrupted") and "Traceback" not in said else [f"{process.returncode}: {said[-800:]}"]
        losses += [f"kernel {pid} is left" for pid in kernels if alive(pid)] + half_written(tmp_path)
        if recorded and not intact(tmp_path / "tiny", stage_record(tmp_path / "tiny", "01_generate")):
            losses.append("a record of what is not there")
    done = command(*SHORT, EMPATHY_OUTPUTS=str(tmp_path))
    losses += ([] if done.returncode == 0 else [done.stderr[-500:]]) + half_written(tmp_path)
    record("Ctrl-C", "one line, code 130, no kernel left, nothing half written, the next run completes", tries=tries, losses=len(losses), note="spread over a run, its start and its end")
    assert tries and not losses, losses


def read_until(process: subprocess.Popen, pattern: str, least: int) -> str:
    """What a run says up to the line that has the pattern, with a number of at least `least` where it names one."""
    said = ""
    for line in process.stderr:
        said += line
        match = re.search(pattern, line)
        if match and int(match.groups()[0] if match.groups() else least) >= least:
            break
    return said


def children(pid: int) -> list[int]:
    """What a process has started; nothing where it is over."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)] if psutil.pid_exists(pid) else []


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_kernel_that_dies_is_one_line(tmp_path):
    """SIGKILL to the kernel, as the system does where memory ends."""
    process = subprocess.Popen([sys.executable, "-m", "lib.run", *SHORT], cwd=ROOT, env={**os.environ, "EMPATHY_OUTPUTS": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    before = read_until(process, r"(\d+)/\d+ \[", 3)  # a kernel that dies before its first cell is simply replaced
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    said = before + process.communicate(timeout=200)[1]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    record("a kernel that dies", "one line, code 1, nothing half written", tries=1, losses=int(process.returncode != 1 or len(errors) != 1) + len(half_written(tmp_path)))
    assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in said and not half_written(tmp_path), said
