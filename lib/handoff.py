"""The way back from a GPU machine: `python -m lib.handoff pack STUDY` there, `unpack STUDY` here.

A pack is a folder with `pack.json`, which lists every file of the study with its sha256. Small files (metrics, tables,
executed notebooks, directions) lie beside it and can go through git; large tensors lie in a second folder, which may be
any directory or mounted bucket. Nothing is unpacked before every file has been found as it was packed.
"""

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from tqdm.auto import tqdm

from lib.cli import exit_code, leave
from lib.errors import BadInput
from lib.files import sha256, sync_folder, write_atomic
from lib.params import load_params
from lib.seals import read_sealed, sealed
from lib.store import meta_path, outputs_root

SMALL = 2_000_000  # bytes; a larger file goes with the tensors
FORMAT = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Study = Annotated[str, typer.Argument(help="Name of the run, for example gemma2-9b.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of packs; small files lie here.")]
Tensors = Annotated[Path, typer.Option("--tensors", help="Folder of large files: any directory or mounted bucket.")]


def worth_packing(root: Path) -> list[Path]:
    """Artifacts with their sidecars, executed notebooks and records of a run; what is in progress, kept for reuse or failed stays."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    hidden = {path for path in files if any(part.startswith(".") for part in path.relative_to(root).parts)}
    return [path for path in files if path not in hidden and not path.name.endswith((".failed.ipynb", ".tmp", ".journal.jsonl"))]


def copy(source: Path, target: Path) -> None:
    """Copy a file of any size so that a kill leaves the old file or the new one."""
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise BadInput(f"{target.name}: cannot be written ({error.strerror}); free space or fix permissions") from None


@app.command()
def pack(study: Study, results: Results = Path("results"), tensors: Tensors = Path("tensors")) -> None:
    """Put a study's outputs into a pack."""
    root = outputs_root() / study
    params = load_params(study.partition("--")[0])
    files = worth_packing(root)
    if not any(path.name.endswith(".stage.json") for path in files):
        raise BadInput(f"{study}: nothing has been run; run `python -m lib.run --study {study}` first")
    listed = {}
    for path in tqdm(files, desc="packing", unit="file", leave=False):
        name, large = path.relative_to(root).as_posix(), path.stat().st_size > SMALL
        folder = tensors if large else results
        digest = sha256(path)
        if meta_path(path).exists() and read_sealed(meta_path(path), shown=f"{study}/{name}.meta.json", fix="run its stage again").get("sha256") != digest:
            raise BadInput(f"{study}/{name}: differs from its sidecar (changed or damaged); run its stage again; nothing was packed")
        target = folder / study / name
        if not target.exists() or sha256(target) != digest:
            copy(path, target)
        listed[name] = {"sha256": digest, "bytes": path.stat().st_size, "large": large}
    write_atomic(results / study / "pack.json", sealed({"format": FORMAT, "study": study, "model_id": params.model.model_id, "files": listed}))
    n_large = sum(file["large"] for file in listed.values())
    print(f"{study}: {len(listed)} files packed into {results / study}" + (f", {n_large} of them large, in {tensors / study}" if n_large else ""))


def checked(study: str, results: Path, tensors: Path) -> dict[str, Path]:
    """Where each file of a pack lies, all found as they were packed. Raises BadInput that names the first that is not."""
    shown = f"{study}/pack.json"
    manifest = read_sealed(results / study / "pack.json", shown=shown, fix="fetch it again or pack the study again")
    try:
        about = {key: manifest[key] for key in ("format", "study", "model_id")}
        files = {str(name): (str(file["sha256"]), bool(file["large"])) for name, file in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{shown}: not the manifest of a pack; pack the study again") from None
    if about != {"format": FORMAT, "study": study, "model_id": load_params(study.partition("--")[0]).model.model_id}:
        raise BadInput(f"{shown}: is a pack of {about['study']} with {about['model_id']}, not of this study; nothing was unpacked")
    found = {}
    for name, (digest, large) in tqdm(files.items(), desc="checking", unit="file", leave=False):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts or any(part.startswith(".") for part in parts):
            raise BadInput(f"{shown}: {name!r} would leave the study's folder; nothing was unpacked")
        path = (tensors if large else results) / study / name
        if not path.is_file():
            raise BadInput(f"{study}/{name}: missing from the pack; fetch it and run again; nothing was unpacked")
        if sha256(path) != digest:
            raise BadInput(f"{study}/{name}: differs from what was packed; fetch it again; nothing was unpacked")
        found[name] = path
    return found


@app.command()
def unpack(study: Study, results: Results = Path("results"), tensors: Tensors = Path("tensors")) -> None:
    """Put a pack's files into this project's outputs; local stages then run without torch."""
    found, root = checked(study, results, tensors), outputs_root() / study
    for name in tqdm(sorted(found, key=lambda name: (name.endswith(".stage.json"), name)), desc="unpacking", unit="file", leave=False):
        copy(found[name], root / name)  # records last: a stage counts as run only when all its files are there
    print(f"{study}: {len(found)} files unpacked")


if __name__ == "__main__":
    leave(exit_code(app, "lib.handoff"))
