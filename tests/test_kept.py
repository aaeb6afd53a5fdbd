"""What was measured is kept exactly, found again only where nothing that enters it has changed, and ruled on anew."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.kept import packed, unpacked
from lib.stats.contrasts import Areas
from lib.stats.ruling import Value
from lib.store import KEPT, REUSE, Study

VALUE = {"a": [1, 2.5, float("inf"), None, True, "é\n"], ("C", 0): (Value(0.5, np.arange(3.0)), Areas(np.eye(2, dtype=np.float32), np.zeros((0, 2)))),
         "words": np.array(["a", "bc"]), "mixed": np.array([1, None, "x", float("nan")], dtype=object), "flags": np.array([True, False]), "one": np.array(3)}


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and all(map(same, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and (a == b or a != a)


def test_values_come_back_exactly():
    assert same(VALUE, unpacked(packed(VALUE)))
    table = pd.DataFrame({"x": [0.1, np.nan], "name": ["a", None], "n": [1, 2]}, index=["p", "q"])
    pd.testing.assert_frame_equal(unpacked(packed(table)), table)
    pd.testing.assert_frame_equal(unpacked(packed(table.reset_index(drop=True))), table.reset_index(drop=True))


@dataclass
class Foreign:
    x: int


@pytest.mark.parametrize("value", [{1, 2}, Foreign(1), lambda: 0, b"x"])
def test_what_cannot_be_written_exactly_is_refused(value):
    with pytest.raises(TypeError, match="cannot be kept"):
        packed({"a": [value]})


@pytest.mark.parametrize("content", [b"", b"x" * 200, packed(1)[:-3], packed(Value(0.0, np.zeros(2))).replace(b"lib.stats.ruling", b"os.path.ruling__")])
def test_what_is_no_kept_value_is_refused(content):
    with pytest.raises(BadInput, match="kept values"):
        unpacked(content)


def test_it_is_measured_again_when_anything_that_enters_it_changes(outputs, monkeypatch):
    calls = []
    def asked(study=None, **also):
        study = study or Study("tiny", "07_specificity", seed=0)
        return study.kept("x", lambda: calls.append(1) or {"n": len(calls)}, **also), study.reused

    assert asked() == ({"n": 1}, []) and asked() == ({"n": 2}, []) and not list(outputs.rglob("*")), "by hand it is always measured, and nothing kept"
    monkeypatch.setenv(REUSE, "1")
    assert asked() == ({"n": 3}, []) and asked() == ({"n": 3}, ["x"])
    assert asked(k=4)[1] == [] and asked(k=4)[1] == ["x"] and asked(k=5)[1] == []
    assert asked(Study("tiny", "07_specificity", seed=1))[1] == []
    read = Study("tiny", "07_specificity", seed=1)
    read.inputs["tiny/activations/x"] = "0" * 64
    assert asked(read)[1] == []
    asked()
    path = outputs / "tiny" / KEPT / "07_specificity" / "x"
    for at in (0, 70, 140, -1):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(bytes(content))
        assert asked()[1] == [], "a flipped byte is measured again"
    monkeypatch.setattr("lib.store.code_hashes", lambda stage: {"changed": "yes"})
    assert asked()[1] == []
