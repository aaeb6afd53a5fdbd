"""Measured values as one file, so that a stage can rule on them again without measuring anew.

A value is a tree of plain values, lists, tuples, dicts, numpy arrays, data frames and this project's dataclasses. Arrays
go into safetensors, the tree into its metadata as JSON. Nothing is pickled: of a dataclass the name is written, and
only dataclasses of `lib` are made again.
"""

import json
from dataclasses import fields, is_dataclass
from importlib import import_module
from math import isfinite

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lib.errors import BadInput


def packed(value) -> bytes:
    """The bytes of a value. Raises TypeError for what cannot be written exactly."""
    arrays: dict[str, np.ndarray] = {}
    tree = _tree(value, arrays)
    return save(arrays or {"": np.zeros(1)}, metadata={"tree": json.dumps(tree)})


def unpacked(content: bytes):
    """The value behind `packed` bytes. Raises BadInput where they are none."""
    try:
        arrays, size = load(content), int.from_bytes(content[:8], "little")
        return _value(json.loads(json.loads(content[8:8 + size])["__metadata__"]["tree"]), arrays)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise BadInput(f"kept values: cannot be read ({error}); remove them and run the stage again") from None


def _tree(value, arrays: dict):
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return {"objects": [_tree(v, arrays) for v in value.ravel()], "shape": list(value.shape)}
        if value.dtype.kind == "U":
            return {"words": value.ravel().tolist(), "shape": list(value.shape)}
        arrays[name := str(len(arrays))] = np.ascontiguousarray(value)
        return {"array": name, "shape": list(value.shape)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_tree(v, arrays) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_tree(k, arrays), _tree(v, arrays)] for k, v in value.items()]}
    if isinstance(value, pd.DataFrame):
        return {"frame": [[_tree(name, arrays), _tree(column.to_numpy(), arrays)] for name, column in value.items()], "index": _tree(value.index.to_numpy(), arrays)}
    if is_dataclass(value) and type(value).__module__.startswith("lib."):
        return {"of": [type(value).__module__, type(value).__qualname__], "fields": [[f.name, _tree(getattr(value, f.name), arrays)] for f in fields(value)]}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _value(tree, arrays: dict):
    if not isinstance(tree, dict):
        return tree
    match next(iter(tree)):
        case "float":
            return float(tree["float"])
        case "objects":
            made = np.empty(len(tree["objects"]), dtype=object)
            made[:] = [_value(v, arrays) for v in tree["objects"]]
            return made.reshape(tree["shape"])
        case "words":
            return np.array(tree["words"], dtype=str).reshape(tree["shape"])
        case "array":
            return arrays[tree["array"]].reshape(tree["shape"])
        case "list":
            return [_value(v, arrays) for v in tree["list"]]
        case "tuple":
            return tuple(_value(v, arrays) for v in tree["tuple"])
        case "dict":
            return {_value(k, arrays): _value(v, arrays) for k, v in tree["dict"]}
        case "frame":
            index = _value(tree["index"], arrays)
            return pd.DataFrame({_value(k, arrays): _value(v, arrays) for k, v in tree["frame"]}, index=pd.RangeIndex(len(index)) if _counts(index) else index)
        case "of":
            module, name = tree["of"]
            made = getattr(import_module(module), name) if module.startswith("lib.") else None
            if not is_dataclass(made):
                raise BadInput(f"kept values: {module}.{name} is no dataclass of this project; remove them and run the stage again")
            return made(**{k: _value(v, arrays) for k, v in tree["fields"]})
    raise ValueError(f"unknown entry {next(iter(tree))!r}")


def _counts(index: np.ndarray) -> bool:
    return index.dtype.kind == "i" and bool((index == np.arange(len(index))).all())
