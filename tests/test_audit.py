"""`python -m lib.run audit`: other people's contrast data, from a file to a table, a sentence and a figure."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from lib.audit import main
from lib.errors import BadInput
from lib.run import cli
from lib.text.clusters import together
from lib.text.synthetic import triplets
from tests.conftest import ROOT
from tests.test_local import BLOCK


def write(path, share, *, n=40, seed=0, long=False, **more):
    """A file of triplets (columns cognitive, affective, instrumental, topic), or of texts with a class."""
    texts = triplets(n, seed=seed, share=share, registers=("plain",))
    if long:
        records = [{"reply": r.response, "kind": r.label, "topic": r.scenario_id} for r in texts.itertuples() if r.label != "instrumental"]
    else:
        wide = texts.pivot(index="scenario_id", columns="label", values="response")
        records = [{**row, "topic": topic} for topic, row in wide.to_dict("index").items()]
    path.write_text("\n".join(json.dumps(record | more) for record in records))
    return path


def table(outputs, name):
    return pd.read_csv(outputs / "audit" / f"{name}.csv")


PAIR = {"positive": "cognitive", "negative": "affective"}


def test_leaky_pairs_are_called_leaky_and_others_are_not(outputs, tmp_path, capsys):
    for name, share, words in (("leaky", 0.5, "LEAKY:"), ("clean", 0.0, "not leaky:")):
        main(write(tmp_path / f"{name}.jsonl", share), **PAIR, group="topic")
        said = capsys.readouterr().out
        assert any(line.startswith(words) for line in said.splitlines()) and ("LEAKY:" in said) == (name == "leaky")
        found = table(outputs, name)
        assert (found["evaluation"] == "grouped").all() and (found["n"] == 80).all() and found["auroc"].is_monotonic_decreasing
        page = (outputs / "audit" / f"{name}.html").read_text()
        assert "plotly" in page and "TF-IDF characters" in page and "src=\"http" not in page


def test_the_command_runs_without_torch(outputs, tmp_path):
    file = write(tmp_path / "pairs.jsonl", 0.5)
    code = BLOCK + f"sys.argv = ['x', 'audit', {str(file)!r}, '--positive', 'cognitive', '--negative', 'affective']\nfrom lib.run import cli\nsys.exit(cli())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "LEAKY" in done.stdout and "audit/pairs.html" in done.stdout, done.stderr[-500:]


def test_three_columns_and_labelled_texts(outputs, tmp_path):
    main(write(tmp_path / "three.jsonl", 0.2), **PAIR, third="instrumental")
    assert table(outputs, "three")["contrast"].unique().tolist() == ["cognitive / affective", "cognitive / instrumental", "affective / instrumental"]
    main(write(tmp_path / "long.jsonl", 0.2, long=True), text="reply", label="kind", group="topic")
    assert table(outputs, "long")["contrast"].unique().tolist() == ["cognitive / affective"]


def test_an_own_test_file_is_scored_as_given(outputs, tmp_path):
    train, test = write(tmp_path / "train.jsonl", 0.5), write(tmp_path / "test.jsonl", 0.5, n=20)
    main(train, **PAIR, test=test)
    found = table(outputs, "train")
    assert (found["evaluation"] == "train->test").all() and (found["n"] == 40).all() and found["auroc"].iloc[0] > 0.95


def test_a_pair_stays_in_one_fold_whatever_its_words():
    assert together([0, 1, 1, 2], ["a", "a", "b", "c"]).tolist() == [0, 0, 0, 1]


def test_layers_stand_beside_the_words(outputs, tmp_path, capsys):
    main(write(tmp_path / "layers.jsonl", 0.1, n=16, message="I am sad."), **PAIR, group="topic", study="tiny", prompt="message")
    found = table(outputs, "layers")
    assert (found["family"] == "activations").sum() == 4
    assert {"embedding layer", "model tokens, binary, naive Bayes"} <= set(found[found["family"] == "text"]["baseline"])
    assert "best layer" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "options", "said"), [
    (None, PAIR, "no such file"), ("", PAIR, "no records"), ("[1]", PAIR, "line 1: not an object"), ("{", PAIR, "line 1: not JSON"),
    ('{"cognitive": "a"}', PAIR, "no column 'affective'"), ('{"cognitive": "a", "affective": " "}', PAIR, "record 1: affective is no text"),
    ('{"cognitive": "a", "affective": "b", "g": null}', {**PAIR, "group": "g"}, "record 1: g is missing"),
    ('{"cognitive": "a", "affective": "b"}', PAIR, "too few"), ('{"t": "a", "y": 1}', {"text": "t", "label": "y"}, "1 different values"),
    ('{"t": "a"}', {"positive": "t"}, "--negative"), ('{"t": "a"}', {**PAIR, "text": "t", "label": "t"}, "--positive")])
def test_bad_input_is_one_line(outputs, tmp_path, content, options, said):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=said) as raised:
        main(path, **options)
    assert "\n" not in str(raised.value)


def test_the_command_line_answers_in_one_line(outputs, tmp_path, monkeypatch, capsys):
    pair = ["--positive", "a", "--negative", "b"]
    for words, code, said in ((["audit", str(tmp_path / "none.jsonl"), *pair], 2, "none.jsonl"), (["audit", "--nope"], 2, "nope"), (["--nope"], 2, "nope"),
                              (["audit", "--help"], 0, "--positive"), (["--help"], 0, "--dataset")):
        monkeypatch.setattr(sys, "argv", ["run", *words])
        assert cli() == code
        told = capsys.readouterr()
        assert said in (told.err if code else told.out) and (not code or len(told.err.strip().splitlines()) == 1)
