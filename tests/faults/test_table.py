"""The table is made of the results as they lie here, and says what is not promised."""

import json

from tests.faults.table import FOLDER, render


def test_the_table_is_of_these_results():
    rows = json.loads((FOLDER / "results.json").read_text())
    text = (FOLDER / "README.md").read_text()
    assert text == render(rows), "run `python -m tests.faults.table`"
    assert all(row["tries"] > 0 for row in rows.values()) and "What is not promised" in text


def test_cells_cannot_break_the_table():
    row = {"promise": "a|b\nc", "tries": 20000, "losses": 1, "note": ""}
    assert "| x | a\\|b c | 20,000 | 1 |  |" in render({"x": row})
