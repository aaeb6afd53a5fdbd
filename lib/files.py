"""Files: read or refused in one line, written whole or not at all, hashed, and stable as JSON."""

import hashlib
import json
import os
import stat
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lib.errors import BadInput

MAX_JSON = 100_000_000  # bytes; the largest that a study writes is a thousandth of it
MAX_DEPTH = 64  # of lists and mappings in one another
MAX_INT = 2**64


def open_regular(path: Path) -> BinaryIO:
    """A file, open for reading. Raises BadInput for a folder, pipe or device, whose reading might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path.name}: is a folder, pipe or device; give a plain file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int, *, fix: str = "split it") -> bytes:
    """The bytes of a plain file of at most `limit` bytes. Raises BadInput where it is none, larger or not readable."""
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise BadInput(f"{path.name}: no such file") from None
    except (OSError, ValueError) as error:  # a ValueError where the name itself cannot be one
        raise error if isinstance(error, BadInput) else BadInput(f"{path.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > limit:
        raise BadInput(f"{path.name}: larger than {limit:,} bytes; {fix}")
    return content


def check_plain(value, depth: int = 0) -> None:
    """Raises ValueError where parsed content holds what could not be written again: NaN, NUL, half a character, depth without end."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("holds a NUL character")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("holds a lone surrogate character")
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(inner, depth + 1)
    elif isinstance(value, float):
        if not isfinite(value):
            raise ValueError("holds NaN or an infinite number")
    elif isinstance(value, int):
        if abs(value) >= MAX_INT:
            raise ValueError("holds an integer of more than 64 bits")
    elif value is not None:
        raise ValueError(f"holds a {type(value).__name__}; write it in quotes")


def sha256(content: bytes | Path) -> str:
    """Hex digest of bytes or of a file."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open_regular(content) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a kill sees either nothing of it or all of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException as error:  # Ctrl-C too: nobody would take the scratch file away
        with suppress(OSError):
            scratch.unlink()
        if not isinstance(error, OSError):
            raise
        raise BadInput(f"{path.name}: cannot be written ({error.strerror}); free space or fix permissions") from None
    sync_folder(path.parent)


def make_folder(folder: Path) -> Path:
    """The folder, made where it is missing. Raises BadInput where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder.name}: cannot be made a folder ({error.strerror}); see whether the path and its permissions are right") from None
    return folder


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
    return read_json_bytes(path)[0]


def read_json_bytes(path: Path) -> tuple:
    """`(content, bytes)` of a JSON file, read at once: another process may be replacing it."""
    content = read_regular(path, MAX_JSON, fix="make it again")
    try:
        found = json.loads(content.decode("utf-8"))
        check_plain(found)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise BadInput(f"{path.name}: not readable as JSON ({str(error).splitlines()[0]}); make it again") from None
    return found, content
