"""How commands end: whatever happens, one line on stderr and the code that belongs to it; inputs that are no plain files are refused."""

import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from lib import params
from lib.cli import exit_code
from lib.errors import BadInput, Failed
from lib.files import MAX_JSON, read_json, sha256
from lib.params import check_dataset, load_params, parse_yaml, read_yaml
from tests.conftest import ROOT


def ended(error: BaseException, capsys) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    def main() -> None:
        raise error
    code = exit_code(app, "x", [])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("error", "code", "said"), [
    (BadInput("file: field: fix"), 2, "error: file: field: fix"), (Failed("stage: died"), 1, "error: stage: died"),
    (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "error: a.csv: No such file"), (OSError(28, "No space left on device"), 2, "error: No space left"),
    (OSError(), 2, "error: OSError"), (MemoryError(), 1, "error: not enough memory"), (KeyboardInterrupt(), 130, "interrupted"), (typer.Abort(), 130, "interrupted"),
    (ZeroDivisionError("by zero"), 1, "error: unforeseen ZeroDivisionError: by zero (EMPATHY_TRACEBACK=1"), (RecursionError(), 1, "error: unforeseen RecursionError"),
    (BadInput("two\nlines\x1b[31m"), 2, "error: two lines\N{REPLACEMENT CHARACTER}[31m"), (BadInput("x" * 10**6), 2, "error: xxx"),
])
def test_every_end_is_one_line(error, code, said, capsys, monkeypatch):
    monkeypatch.delenv("EMPATHY_TRACEBACK", raising=False)
    got, line = ended(error, capsys)
    assert got == code and line.startswith(said) and line.count("\n") == 1 and len(line) < 1100
    monkeypatch.setenv("EMPATHY_TRACEBACK", "1")
    got, lines = ended(error, capsys)
    assert got == code and lines.startswith("Traceback") and lines.splitlines()[-1] == line.rstrip("\n")


def command(*words: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lib.run", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, **more)


def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = command("--list", stdout=full)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1


def test_a_closed_stdout_is_one_line():
    process = subprocess.Popen([sys.executable, "-m", "lib.run", "--list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "error: stdout was closed before everything was printed\n" and process.wait() == 2


def interrupted_early() -> tuple[int, list[str]]:
    """Code and stderr of a command that is interrupted while its imports run; on a busy machine it may be over before that."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", "lib.run", "--list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split("|")[-1].strip() == "lib":  # the package is there, the command's own imports are not
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    return process.wait(), rest


def test_ctrl_c_while_the_imports_run_is_one_line():
    ends = [next((end for _ in range(5) if (end := interrupted_early())[0] != 0), None) for _ in range(2)]
    assert ends == [(130, ["interrupted; run the same command to go on\n"])] * 2


@pytest.fixture
def odd(tmp_path):
    """Paths that are no plain files, by name."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("name", ["pipe", "folder", "null", "loop", "nothing"])
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_only_plain_files_are_read(odd, name, read):
    start = time.monotonic()
    with pytest.raises(BadInput, match=name) as caught:
        read(odd / name)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 5
    if name in ("pipe", "folder", "null"):
        with pytest.raises(BadInput, match=name):
            sha256(odd / name)


def test_what_is_too_large_is_not_read(tmp_path):
    for name, size, read in (("a.json", MAX_JSON + 1, read_json), ("a.yaml", 100_001, read_yaml)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        with pytest.raises(BadInput, match=f"{name}: larger than"):
            read(tmp_path / name)


@pytest.mark.parametrize("content", [b'{"a": NaN}', b'{"a": 1e999}', b'{"a": -Infinity}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "b\\u0000"}', b'{"a": 1\x00}',
                                     b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b'{"a": ' + b"9" * 30 + b"}", b"9" * 5000, b"[" * 100 + b"]" * 100, b"[" * 100_000, b"", b"{"])
def test_json_that_could_not_be_written_again(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"^a\.json: not readable as JSON \(.*\); make it again$"):
        read_json(tmp_path / "a.json")


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize("text", [LAUGHS, "a: &b 1", "a: !!python/object/apply:os.system [x]", "a: !!int ''", "a: !!binary aGk=", "a: .nan", "a: -.inf", "a: 1.0e+999", "a: 2020-01-01",
                                  "a: 1" + ":1" * 300 + ".5", "a: 0x" + "f" * 5000, "a: " + "9" * 5000, "a: 1\na: 2", "a: \"\\0\"", "a: \"\\ud800\"", "a\0: 1", "? [a]\n: 1", "[" * 50_000, "- a\n b: c"])
def test_yaml_that_is_more_than_plain_values(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"^a\.yaml: cannot be read as YAML: [^\n]+$"):
        read_yaml(tmp_path / "a.yaml")


def test_a_byte_order_mark_before_yaml_is_nothing(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1} and parse_yaml("[1, 2.5, x, true, null]") == [1, 2.5, "x", True, None]


@pytest.mark.parametrize("dataset", ["/etc", "../else", "lib/../../else", "link", "link/deeper", "a\0b", "~/../../.."])
def test_a_params_file_cannot_name_texts_outside_the_project(tmp_path, monkeypatch, dataset):
    project, copy = tmp_path / "project", tmp_path / "project/params"
    copy.mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (project / "link").symlink_to(tmp_path / "else")
    (project / "own").mkdir()
    for path in params.PARAMS.glob("*.yaml"):
        (copy / path.name).write_text(path.read_text())
    monkeypatch.setattr(params, "ROOT", project)
    monkeypatch.setattr(params, "PARAMS", copy)
    check_dataset("x", "own")
    with pytest.raises(BadInput, match="dataset"):
        check_dataset("tiny.yaml", dataset)
    if "\0" not in dataset:
        whole = (copy / "tiny.yaml").read_text()
        for changed in (whole + f"dataset: {dataset!r}\n", whole.replace("audit: false", f"audit: false, dataset: {dataset!r}")):
            (copy / "tiny.yaml").write_text(changed)
            with pytest.raises(BadInput, match=r"tiny\.yaml: dataset"):
                load_params("tiny")


@pytest.mark.parametrize(("name", "value", "code", "said"), [
    ("BadInput", "a\nfile: fix", 2, "error: file: fix"), ("OSError", "[Errno 28] No space left on device", 2, "error: OSError: [Errno 28]"), ("PermissionError", "x", 2, "error: PermissionError: x"),
    ("MemoryError", "", 1, "error: MemoryError: no message"), ("KeyboardInterrupt", "", 130, "interrupted"), ("ValueError", "first\nlast", 1, "error: ValueError: last"), ("print", "x", 1, "error: print: x"), ("Odd", "x", 1, "error: Odd: x")])
def test_a_cells_exception_has_the_code_of_its_kind(name, value, code, said):
    from papermill.exceptions import PapermillExecutionError

    from lib.cli import ending
    from lib.run import told
    got, message = ending(told(PapermillExecutionError(0, 1, "x", name, value, [])))
    assert got == code and message.startswith(said) and "\n" not in message
