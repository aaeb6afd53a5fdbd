"""Token activations on disk: hashed shards with a manifest, one in memory at a time.

A shard is written whole or not at all and then entered in the manifest, so a killed extraction goes on where it
stopped. `identity` says of what the shards are; a manifest of anything else, or one that was changed, is refused.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from lib.errors import BadInput
from lib.files import make_folder, read_json, sha256, to_json, write_atomic
from lib.seals import read_sealed, sealed
from lib.store import cache_dir


@dataclass(kw_only=True)
class Shards:
    """One folder of activations; `identity` says of what, `rows` lists its shards.

    `rows`: `{file, split, sha256, n_tokens, …}`. A shard holds `resid` [token, d_model], `tokens` [token] (ids) and what
    else its maker adds; where `resid` has another shape, its row has a field `shape`. Every file is checked by hash when
    first read. Many processes may `write` files; one at a time may `enter` rows, in any order.
    """

    folder: Path
    identity: dict
    rows: list[dict]
    checked: set = field(default_factory=set)

    def of(self, split: str) -> list[dict]:
        """The rows of a split, by number."""
        return sorted((row for row in self.rows if row["split"] == split), key=lambda row: row["file"])

    def has(self, split: str, number: int) -> bool:
        return any(row["file"] == name_of(split, number) for row in self.rows)

    def n_tokens(self, split: str) -> int:
        return sum(row["n_tokens"] for row in self.of(split))

    def first(self, n_shards: dict[str, int]) -> "Shards":
        """These shards without what lies beyond the first `n_shards` of each split, so that a result depends on what was asked for alone."""
        return replace(self, rows=[row for split, n in n_shards.items() for row in self.of(split)[:n]])

    def write(self, split: str, number: int, arrays: dict[str, np.ndarray], about: dict) -> dict:
        """Write shard `number` of a split; returns its row, which nobody knows of yet."""
        content, name = save_safetensors(arrays), name_of(split, number)
        write_atomic(self.folder / name, content)
        return {"file": name, "split": split, "sha256": sha256(content), **about}

    def enter(self, row: dict) -> None:
        """Put a row into the manifest, in the place of an older one of that file."""
        self.rows[:] = [*(other for other in self.rows if other["file"] != row["file"]), row]
        write_atomic(self.folder / "manifest.json", sealed({"identity": self.identity, "shards": self.rows}))

    def add(self, split: str, number: int, arrays: dict[str, np.ndarray], about: dict) -> None:
        """Write shard `number` of a split, then its row."""
        self.enter(self.write(split, number, arrays, about))

    def load(self, row: dict) -> dict[str, np.ndarray]:
        """One shard. Raises BadInput where the file is missing, changed or of another study."""
        path = self.folder / row["file"]
        shown = f"{self.folder.name}/{row['file']}"
        if not path.exists():
            raise BadInput(f"{shown}: missing; remove {self.folder.name} from the cache and run again")
        content = path.read_bytes()
        if row["file"] not in self.checked and sha256(content) != row["sha256"]:
            raise BadInput(f"{shown}: differs from the manifest (truncated or foreign); remove that file's folder from the cache and run again")
        self.checked.add(row["file"])
        try:
            arrays = load_safetensors(content)
        except SafetensorError as error:
            raise BadInput(f"{shown}: not a safetensors file ({error})") from None
        shape = tuple(row.get("shape") or (row["n_tokens"], self.identity["d_model"]))
        if arrays["resid"].shape != shape:
            raise BadInput(f"{shown}: holds {arrays['resid'].shape}, the manifest says {shape}")
        return arrays

    def split(self, split: str, n_tokens: int | None = None) -> np.ndarray:
        """`[token, d_model]` float32 of the first `n_tokens` of a split, in memory."""
        rows, found = self.of(split), []
        while rows and (n_tokens is None or sum(map(len, found)) < n_tokens):
            found.append(self.load(rows.pop(0))["resid"])
        if not found:
            raise BadInput(f"{self.folder.name}: holds no tokens of split {split}")
        return np.concatenate(found)[:n_tokens].astype(np.float32)


def name_of(split: str, number: int) -> str:
    """The file of shard `number` (below 10,000) of a split; names sort as numbers do."""
    return f"{split}-{number:04d}.safetensors"


def open_shards(identity: dict, *, kind: str, folder: Path | None = None) -> Shards:
    """The shards of an identity so far (none yet is fine); a manifest of another identity is refused."""
    folder = folder or cache_dir() / f"{kind}-{sha256(to_json(identity))[:12]}"
    make_folder(folder)
    path = folder / "manifest.json"
    if not path.exists():
        return Shards(folder=folder, identity=identity, rows=[])
    found = read_json(path)
    if isinstance(found, dict) and "seal" not in found and {"identity", "shards"} <= found.keys():
        print(f"{folder.name}/manifest.json: has no seal; its shards are made again")  # of before there were seals
        return Shards(folder=folder, identity=identity, rows=[])
    manifest = read_sealed(path, shown=f"{folder.name}/manifest.json", fix="remove that folder and run again")
    if manifest.get("identity") != json.loads(to_json(identity)) or not isinstance(manifest.get("shards"), list):
        raise BadInput(f"{folder.name}/manifest.json: belongs to another model, layer or corpus; remove that folder and run again")
    return Shards(folder=folder, identity=identity, rows=manifest["shards"])
