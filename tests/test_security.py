"""What must not be in the code: ways to run what a file says, models without a stated origin, keys. And a key stays in the environment."""

import ast
import random
import re
import string
import subprocess

import pytest

from tests.conftest import ROOT, run
from tests.loopback import serve

FOLDERS = ("lib", "notebooks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "kernels"}  # the last: code of the hub, compiled
CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "np.load", "numpy.load", "pd.read_pickle", "joblib.load",
         "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
SAID = re.compile(r"\b(?:exec|eval)\(")  # in a string that something else may run
ALLOWED = {
    ("lib/kernels.py", "code in a string: exec("): "the import statements of a notebook of this project, for its own kernel",
    ("lib/model/sae.py", "SAE.from_pretrained without a revision"): "SAELens knows no revision; the release is checked against its own list, the weights against model and hook",
    ("lib/model/corpus.py", "load_dataset without a revision"): "a corpus that a params file names by its id alone",
    ("tests/test_security.py", "code in a string: exec("): "planted examples", ("tests/test_security.py", "code in a string: eval("): "planted examples"}
KEYS = re.compile(r"sk-ant-[\w-]{20,}|sk-[A-Za-z0-9]{32,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{20,}"
                  r"|(?i:bearer|x-api-key|authorization)[\"']?\s*[:=]?\s*[\"']?(?:bearer\s+)?[A-Za-z0-9_\-.=/+]{24,}|-----BEGIN [A-Z ]*PRIVATE KEY-----")


def name_of(node: ast.expr) -> str:
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not node.value


def faults_of_a_call(called: str, words: dict) -> list[str]:
    """`words`: the call's keywords; None stands for `**`, which may hold any."""
    found = [f"{called}()"] if called in CALLS else []
    found += ["a shell"] if "shell" in words and not is_false(words["shell"]) else []
    found += ["trust_remote_code"] if "trust_remote_code" in words and not is_false(words["trust_remote_code"]) else []
    found += ["allow_pickle"] if "allow_pickle" in words and not is_false(words["allow_pickle"]) else []
    found += ["weights_only"] if "weights_only" in words and is_false(words["weights_only"]) else []
    # A model is read from a folder (of a GGUF file, or with local_files_only) or at a revision, which the params give.
    local = "gguf_file" in words or (isinstance(words.get("local_files_only"), ast.Constant) and words["local_files_only"].value is True)
    revision = words.get("revision", ast.Constant("main"))
    if called.endswith((".from_pretrained", "load_dataset", "hf_hub_download", "snapshot_download")) and not local and (isinstance(revision, ast.Constant) and not re.fullmatch("[0-9a-f]{40}", str(revision.value))):
        found.append(f"{called} without a revision")
    return found


def faults(source: str) -> list[str]:
    """What a source file does that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom):
            found += [f"import {node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [f"code in a string: {said}" for said in dict.fromkeys(SAID.findall(node.value))]
        if isinstance(node, ast.Call):
            found += faults_of_a_call(name_of(node.func), {k.arg: k.value for k in node.keywords})
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path):
    shown = path.relative_to(ROOT).as_posix()
    assert not [fault for fault in faults(path.read_text(encoding="utf-8")) if (shown, fault) not in ALLOWED]


def test_every_exception_is_still_needed():
    assert not [(path, fault) for path, fault in ALLOWED if fault not in faults((ROOT / path).read_text(encoding="utf-8"))]


def test_params_pin_what_they_can():
    """`revision` is a commit, never a branch."""
    from pydantic import ValidationError

    from lib.params import load_params
    model = load_params("gemma2-9b").model
    with pytest.raises(ValidationError, match="revision"):
        type(model)(**{**model.model_dump(), "revision": "main"})


@pytest.mark.parametrize(("source", "said"), [
    ("import pickle", "import pickle"), ("from dill import loads", "import dill"), ("import marshal as m", "import marshal"), ("import shelve", "import shelve"), ("import cloudpickle", "import cloudpickle"),
    ("import jsonpickle", "import jsonpickle"), ("joblib.load(p)", "joblib.load()"), ("from joblib import load", "import joblib.load"), ("import kernels", "import kernels"), ("from kernels import get_kernel", "import kernels"), ("eval(x)", "eval()"), ("exec(text, names)", "exec()"),
    ("compile(a, b, 'exec')", "compile()"), ("__import__(a)", "__import__()"), ("yaml.load(f)", "yaml.load()"), ("yaml.load(f, yaml.SafeLoader)", "yaml.load()"), ("yaml.unsafe_load(f)", "yaml.unsafe_load()"),
    ("torch.load(p)", "torch.load()"), ("torch.load(p, weights_only=False)", "weights_only"), ("np.load(p)", "np.load()"), ("f(p, allow_pickle=True)", "allow_pickle"), ("f(p, allow_pickle=x)", "allow_pickle"),
    ("pd.read_pickle(p)", "pd.read_pickle()"), ("os.system(a)", "os.system()"), ("subprocess.run(a, shell=True)", "a shell"), ("subprocess.Popen(a, shell=x)", "a shell"),
    ("from os import system", "import os.system"), ("run(f'exec({x})')", "code in a string: exec("), ("km.execute('eval(input())')", "code in a string: eval("),
    ("AutoModel.from_pretrained(a, revision=r, trust_remote_code=True)", "trust_remote_code"), ("AutoModel.from_pretrained(a, revision=r, trust_remote_code=x)", "trust_remote_code"),
    ("AutoModel.from_pretrained(a)", "AutoModel.from_pretrained without a revision"), ("AutoModel.from_pretrained(a, revision='main')", "AutoModel.from_pretrained without a revision"),
    ("AutoModel.from_pretrained(a, **more)", "AutoModel.from_pretrained without a revision"), ("HookedTransformer.from_pretrained('gpt2')", "HookedTransformer.from_pretrained without a revision"),
    ("load_dataset(a)", "load_dataset without a revision"), ("hub.snapshot_download(a, revision='main')", "hub.snapshot_download without a revision"),
    ("AutoModel.from_pretrained(a, local_files_only=False)", "AutoModel.from_pretrained without a revision")])
def test_the_lint_sees(source, said):
    assert said in faults(source)


@pytest.mark.parametrize("source", ["yaml.safe_load(f)", "model.eval()", "from lib.kernels import Kernels", "subprocess.run(a)", "AutoModel.from_pretrained(a, revision=r, trust_remote_code=False)",
                                    "AutoModel.from_pretrained(a, local_files_only=True)", f"AutoModel.from_pretrained(a, revision='{'a' * 40}')", "re.compile(x)", "np.load_txt(p)"])
def test_the_lint_lets_pass(source):
    assert not faults(source)


def tracked() -> list:
    done = subprocess.run(["git", "--no-optional-locks", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_key_is_in_the_tree():
    found, looked = [], tracked() or SOURCES
    for path in looked:
        if path.is_file() and path.suffix not in (".png", ".safetensors"):
            found += [f"{path.name}: {hit[:12]}…" for hit in KEYS.findall(path.read_text(encoding="utf-8", errors="replace"))]
    assert len(looked) > 100 and not found


def planted() -> list[str]:
    """Ten kinds of keys, each in four places where keys turn up. Put together here, so that this file holds none."""
    rng = random.Random(0)

    def some(n, letters=string.ascii_letters + string.digits):
        return "".join(rng.choices(letters, k=n))
    kinds = [lambda: "sk-" + "ant-api03-" + some(40), lambda: "sk-" + "ant-admin01-" + some(30, string.ascii_letters + "-_"), lambda: "sk" + "-" + some(48), lambda: "hf" + "_" + some(34), lambda: "gh" + "p_" + some(36),
             lambda: "AK" + "IA" + some(16, string.ascii_uppercase + string.digits), lambda: "xo" + "xb-" + some(24), lambda: "Authorization: " + "Bearer " + some(40), lambda: "x-api-key" + ": " + some(40),
             lambda: "-----BEGIN " + "RSA PRIVATE KEY-----"]
    places = ["{}", "export KEY='{}'  # for now", '{{"error": {{"type": "authentication_error", "message": "invalid {} for /v1/messages"}}}}', "AuthenticationError: 401 for https://host/path?key={}&more=1"]
    return [place.format(kind()) for kind in kinds for place in places]


def test_forty_planted_keys_are_found():
    assert len(set(planted())) >= 37 and len(planted()) == 40  # a private key's first line has no letters of its own
    assert all(KEYS.search(f"some text\n{text}\nand more") for text in planted())
    assert not KEYS.search("the bearer of this letter, authorization by name, sk-good-1")


@pytest.mark.study
def test_a_key_in_the_environment_is_written_nowhere(outputs, tmp_path):
    """Two runs: one whose API refuses the key and echoes it, one that needs none. Every byte of what they leave and say is searched."""
    canary = "sk-bad-canary-4c1d9e"
    keys = {"ANTHROPIC_API_KEY": canary, "HF_TOKEN": canary, "AWS_SECRET_ACCESS_KEY": canary, "EMPATHY_PAID": str(tmp_path / "paid"), "EMPATHY_TRACEBACK": "1"}
    with serve(prices={"claude-sonnet-4-6": (3.0, 15.0), "claude-haiku-4-5": (1.0, 5.0)}) as server:
        refused = run("01_generate", "--study", "tiny", "--set", "01_generate.generate=true", "--set", "01_generate.batches=false", ANTHROPIC_BASE_URL=server.url, **keys)
        assert refused.returncode == 2 and server.n_requests > 0 and "HTTP 401" in refused.stderr.splitlines()[-1], refused.stderr[-500:]
    done = run("02_filter", "--study", "tiny", **keys)
    assert done.returncode == 0, done.stderr[-500:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".failed.ipynb") for path in files) or any(path.name == "02_filter.ipynb" for path in files)
    assert any(path.name.endswith(".journal.jsonl") for path in files)
    assert not [path.name for path in files if b"canary" in path.read_bytes()]
    assert "canary" not in "".join((refused.stdout, refused.stderr, done.stdout, done.stderr))
