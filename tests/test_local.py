"""`lib.text`, `lib.stats` and `lib.report` import, and local stages run, where torch cannot be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "sae_lens", "transformer_lens"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def test_local_packages_import_without_torch():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for group in ("text", "stats", "report") for p in (ROOT / "lib" / group).glob("*.py")]
    code = BLOCK + "\n".join(f"import {m}" for m in [*modules, "lib.run", "lib.stages", "lib.store"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_block_works():
    done = subprocess.run([sys.executable, "-c", BLOCK + "import lib.model.activations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "blocked" in done.stderr
