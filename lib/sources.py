"""Which files a notebook's result depends on: its script and every `lib` module it imports, directly or through another."""

import ast
from pathlib import Path

from lib.files import sha256
from lib.params import ROOT

NOTEBOOKS = ROOT / "notebooks"


def source_files(script: Path) -> list[Path]:
    """The script itself and all project modules behind it, sorted."""
    found, queue = set(), [script]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)] if isinstance(node, ast.ImportFrom) \
                else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.split(".")[0] == "lib":
                    base = ROOT / Path(*name.split("."))
                    queue += [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()]
    return sorted(found)


def code_hashes(stage: str) -> dict[str, str]:
    """`{file: sha256}` of all code behind a stage's notebook."""
    return {str(path.relative_to(ROOT)): sha256(path) for path in source_files(NOTEBOOKS / f"{stage}.py")}
