"""Artifacts: written atomically, each with a sidecar that says where it comes from, and checked on load.

A write goes to a temporary file, is fsynced and renamed, so a kill leaves the old file or the new one. The sidecar
`<file>.meta.json` holds the sha256, shapes, the parameters, the inputs' sha256 and the versions, under a seal of its own. Tensors are
safetensors (layer-major, `[layer, text, d_model]`), tables CSV, results JSON. Nothing is pickled.
"""

import io
import json
import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from lib.errors import BadInput
from lib.files import make_folder, open_regular, read_json, sha256, to_json, write_atomic
from lib.kept import packed, unpacked
from lib.params import ROOT, Params, load_params
from lib.seals import read_sealed, sealed
from lib.sources import code_hashes
from lib.stats.verdicts import CONTRASTS, with_flags

KEPT = ".kept"  # folder of measured values, beside a study's artifacts
REUSE = "EMPATHY_REUSE"  # set in the kernels that the runner starts: there, and only there, kept values may be used again
PACKAGES = ("numpy", "scipy", "scikit-learn", "pandas", "torch", "transformers", "transformer-lens", "sae-lens")
SIDECAR = {"file": str, "sha256": str, "study": str, "stage": str}  # what every sidecar holds, among others


def outputs_root() -> Path:
    """Where all studies' outputs lie."""
    return Path(os.environ.get("EMPATHY_OUTPUTS") or ROOT / "outputs")


def cache_dir() -> Path:
    """Where weights and shards are kept, `EMPATHY_CACHE` or the platform's user cache directory; created on demand."""
    folder = os.environ.get("EMPATHY_CACHE")
    if not folder:
        import platformdirs  # comes with the extra model
        folder = platformdirs.user_cache_dir("empathy-bandwidth")
    return make_folder(Path(folder))


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages a number may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str:
    """The commit of the working tree, with `+` where files differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("--no-optional-locks", "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Study:
    """The folder of one study, `outputs/<run>`, as one stage sees it.

    `run` is the study's name, with `--quick` or `--<dataset>` behind it for those variants. Every file read through
    `load_*` is checked against its sidecar and recorded as an input of what this stage saves.
    """

    def __init__(self, run: str, stage: str, /, **parameters):
        name, _, variant = run.partition("--")
        self.run, self.stage, self.variant = run, stage, variant
        self.params: Params = load_params(name, quick=variant.startswith("quick"))
        self.root = outputs_root() / run
        self.parameters, self.inputs, self.reused = parameters, {}, []

    def path(self, name: str) -> Path:
        return self.root / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def twin(self) -> "Study":
        """The random-weight twin's folder, as this stage sees it; what is read there is recorded here."""
        _, dashes, variant = self.run.partition("--")
        twin = Study(f"{self.params.twin}{dashes}{variant}", self.stage)
        twin.inputs = self.inputs
        return twin

    @property
    def preregistration(self) -> dict:
        """Thresholds, layer and contrasts as they stand now, and their hash."""
        content = {"thresholds": self.params.thresholds.model_dump(), "layer": self.params.layer,
                   "model_id": self.params.model.model_id, "contrasts": CONTRASTS}
        return {"hash": sha256(to_json(content)), **content}

    def preregister(self) -> bool:
        """Write the preregistration before the first result; later only compare. True where it is unchanged."""
        path = self.path("preregistration.json")
        if not path.exists():
            write_atomic(path, to_json(self.preregistration))
        return read_preregistration(path)["hash"] == self.preregistration["hash"]

    def kept(self, name: str, measure: Callable, **also):
        """What `measure()` returns, measured once: a rerun in which only thresholds changed takes the kept value.

        It is kept under a hash of all that may have entered it: parameters, model, layer, what was read so far, versions, the stage's
        code, and `also`, which must hold every threshold that `measure` uses. A notebook run by hand, whose cells may have been
        edited, always measures and keeps nothing. Raises TypeError for a value that cannot be written exactly (`lib.kept`).
        """
        if not os.environ.get(REUSE):
            return measure()
        params = self.params.model_dump(exclude={"thresholds", "plan"})
        key = sha256(to_json({"name": name, "also": also, "params": params, "weights": self.params.model.local_files, "layer": self.params.layer,
                              "parameters": self.parameters, "inputs": self.inputs, "versions": versions(), "code": code_hashes(self.stage)})).encode()
        path = self.root / KEPT / self.stage / name
        content = path.read_bytes() if path.exists() else b""
        if content[:64] == key and content[64:128] == sha256(content[128:]).encode():
            self.reused.append(name)
            print(f"{name}: as measured before; nothing that enters it has changed")
        else:
            value = packed(measure())
            write_atomic(path, content := key + sha256(value).encode() + value)
        return unpacked(content[128:])

    def save(self, name: str, content: bytes, **about) -> Path:
        """Write `content` under the study and its sidecar; returns the path."""
        path = self.path(name)
        sidecar = {"file": name, "sha256": sha256(content), "source": self.params.source, "study": self.run,
                   "stage": self.stage, "model_id": self.params.model.model_id, "parameters": self.parameters,
                   "inputs": dict(sorted(self.inputs.items())), "versions": versions(), "git_commit": git_commit(),
                   "reused": self.reused, **about}
        write_atomic(path, content)
        write_atomic(meta_path(path), sealed(sidecar))
        return path

    def save_tensors(self, name: str, tensors: dict[str, np.ndarray], **about) -> Path:
        """Finite tensors as safetensors; the sidecar states shapes and dtypes."""
        for key, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise BadInput(f"{name}: {key}: holds NaN or infinite values; nothing was saved")
        arrays = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        shapes = {key: [str(array.dtype), *array.shape] for key, array in arrays.items()}
        return self.save(name, save_safetensors(arrays), shapes=shapes, **about)

    def save_table(self, name: str, table: pd.DataFrame, **about) -> Path:
        return self.save(name, table.to_csv(index=False, float_format="%.10g").encode(), rows=len(table), **about)

    def save_json(self, name: str, content, **about) -> Path:
        return self.save(name, to_json(content), **about)

    def save_results(self, name: str, results, **more) -> Path:
        """`metrics.json` of a stage: its result rows and whatever else the report reads.

        A result computed under other thresholds than the preregistered ones carries the flag `CHANGED-THRESHOLDS`.
        """
        if not self.preregister():
            results = [with_flags(result, "CHANGED-THRESHOLDS") for result in results]
        thresholds = self.params.thresholds.model_dump()
        return self.save_json(name, {"results": [result.row() for result in results], "thresholds": {r.criterion: thresholds[r.criterion] for r in results},
                                     "preregistration": self.preregistration["hash"], **more})

    def read(self, name: str) -> bytes:
        """The bytes of an artifact, checked against its sidecar and recorded as an input."""
        content, about = read_checked(self.path(name))
        if about["study"] != self.run:
            raise BadInput(f"{self.run}/{name}: belongs to study {about['study']!r}; remove it and run {about['stage']} again")
        self.inputs[f"{self.run}/{name}"] = about["sha256"]
        return content

    def load_tensors(self, name: str) -> dict[str, np.ndarray]:
        content = self.read(name)
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise BadInput(f"{self.run}/{name}: not a safetensors file ({error})") from None

    def load_table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(io.BytesIO(self.read(name)), keep_default_na=False, na_values=[""])

    def load_texts(self, name: str = "dataset/filtered/texts.csv") -> pd.DataFrame:
        """The text table; an unknown context or domain is an empty string."""
        return self.load_table(name).fillna("")

    def load_json(self, name: str):
        return json.loads(self.read(name))


def meta_path(path: Path) -> Path:
    """The sidecar of an artifact."""
    return path.with_name(path.name + ".meta.json")


def read_preregistration(path: Path) -> dict:
    """What was preregistered: thresholds, layer and contrasts, with the hash of the rest of it as `hash`."""
    content = read_json(path)
    rest = {key: value for key, value in content.items() if key != "hash"} if isinstance(content, dict) else {}
    if not rest or content.get("hash") != sha256(to_json(rest)) or path.read_bytes() != to_json(content):
        raise BadInput(f"{path.parent.name}/{path.name}: differs from its own hash (changed or damaged); restore it, "
                       "or remove it and the study's outputs and run again")
    return content


def read_checked(path: Path) -> tuple[bytes, dict]:
    """An artifact's bytes and sidecar; a missing, changed or sidecar-less file is named."""
    shown = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    if not path.exists():
        raise BadInput(f"{shown}: missing; run the stage that makes it (`make run` makes all)")
    if not meta_path(path).exists():
        raise BadInput(f"{shown}: has no sidecar, so its origin is unknown; run the stage that makes it")
    about = read_sealed(meta_path(path), shown=f"{shown}.meta.json", fix="run the stage that makes it again", holds=SIDECAR)
    with open_regular(path) as file:
        content = file.read()
    if sha256(content) != about["sha256"]:
        raise BadInput(f"{shown}: differs from its sidecar (changed or damaged); run {about['stage']} again")
    return content, about
