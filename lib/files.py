"""Files: read or refused in one line, written whole or not at all, hashed, and stable as JSON."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lib.errors import BadInput


def sha256(content: bytes | Path) -> str:
    """Hex digest of bytes or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a kill sees either nothing of it or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise BadInput(f"{path.name}: cannot be written ({error.strerror}); free space or fix permissions") from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: a new name in it then survives a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def to_json(content) -> bytes:
    """Stable JSON: sorted keys, no NaN, numpy numbers as plain ones."""
    def plain(value):
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} does not belong in JSON")
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False, default=plain, ensure_ascii=False) + "\n").encode()


def read_json(path: Path):
    """The content of a JSON file, or one clear line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.name}: no such file") from None
    except (UnicodeDecodeError, ValueError, RecursionError, OSError) as error:
        raise BadInput(f"{path.name}: not readable as JSON ({str(error).splitlines()[0]}); make it again") from None
