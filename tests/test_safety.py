"""What must not be in the code: ways to run what a file says, models without a pinned origin, keys."""

import ast
import random
import re
import string
import subprocess

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*(ROOT / "lib").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")])
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib.load", "kernels"}
CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "np.load", "pd.read_pickle", "os.system", "os.popen"}
KEYS = re.compile(r"sk-ant-[\w-]{20,}|sk-[A-Za-z0-9]{32,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{20,}"
                  r"|(?i:bearer|x-api-key|authorization)[\"']?\s*[:=]?\s*[\"']?(?:bearer\s+)?[A-Za-z0-9_\-.=/+]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY-----")


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> list[str]:
    """What a source file does that it must not, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called, words = name_of(node.func), {k.arg: k.value for k in node.keywords}
        if called in CALLS:
            found.append(f"{node.lineno}: {called}()")
        if isinstance(words.get("shell"), ast.Constant) and words["shell"].value:
            found.append(f"{node.lineno}: a shell")
        if "trust_remote_code" in words and not (isinstance(words["trust_remote_code"], ast.Constant) and words["trust_remote_code"].value is False):
            found.append(f"{node.lineno}: trust_remote_code")
        # A model is read from a local file or folder, or with keywords that hold the pinned revision.
        if called.endswith(".from_pretrained") and called.startswith("Auto") and not {"gguf_file", "local_files_only", "revision", None} & set(words):
            found.append(f"{node.lineno}: {called} without a revision")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_runs_what_a_file_says(path):
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [
    "import pickle", "from dill import loads", "eval(x)", "yaml.load(f)", "torch.load(p)", "AutoModel.from_pretrained(a)", "import kernels",
    "AutoModel.from_pretrained(a, revision=r, trust_remote_code=True)", "subprocess.run(a, shell=True)", "__import__(a)", "np.load(p)"])
def test_the_lint_sees(source):
    assert faults(source)


def tracked() -> list:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_key_is_in_the_tree():
    found = []
    for path in tracked():
        if path.is_file() and path.suffix not in (".png", ".safetensors"):
            found += [f"{path.name}: {hit[:12]}…" for hit in KEYS.findall(path.read_text(encoding="utf-8", errors="replace"))]
    assert not found


def test_forty_planted_keys_are_found():
    rng = random.Random(0)

    def some(n, letters=string.ascii_letters + string.digits):
        return "".join(rng.choices(letters, k=n))
    makers = [lambda: "sk-" + "ant-api03-" + some(40), lambda: "hf" + "_" + some(34), lambda: "gh" + "p_" + some(36), lambda: "AK" + "IA" + some(16, string.ascii_uppercase + string.digits),
              lambda: "Authorization: " + "Bearer " + some(40), lambda: '"x-api-key": "' + some(40) + '"', lambda: "xo" + "xb-" + some(24), lambda: f"error 401: invalid {'bear' + 'er'} {some(32)} refused"]
    assert all(KEYS.search(f"some text {makers[i % len(makers)]()} and more") for i in range(40))
    assert not KEYS.search("the bearer of this letter, authorization by name, sk-good-1")
