"""The dataset: the bundled one is whole, other people's files import, faults are named."""

import json

import numpy as np
import pandas as pd
import pytest

from lib.errors import BadInput
from lib.text import dataset as ds
from lib.text import ratings
from lib.text.clusters import scenario_cosines


def test_bundled_set_is_complete(bundled):
    empathy = bundled[bundled.condition == "empathy"]
    assert set(empathy.context) == set(ds.CONTEXTS) and (empathy.groupby("scenario_id").size() == 6).all()
    counts = bundled.groupby(["condition", "register"]).scenario_id.nunique()
    assert counts.to_dict() == {("empathy", "plain"): 90, ("empathy", "counter"): 90, ("valence_stripped", "plain"): 90,
                                ("valence_stripped", "counter"): 30, ("non_empathy", "plain"): 60, ("non_empathy", "counter"): 30,
                                ("formality", "plain"): 90}
    raw = json.loads((ds.BUNDLED / "triplets_raw.json").read_text())["triplets"]
    assert len(raw) >= 130 and sum(record["status"] == "kept" for record in raw) == 90
    assert all(record["reason"] for record in raw if record["status"] != "kept")


def test_no_two_scenarios_are_near_duplicates(bundled):
    each = bundled[bundled.condition != "valence_stripped"].drop_duplicates("scenario_id")
    cosines = scenario_cosines(list(each.scenario))
    assert cosines[~np.eye(len(each), dtype=bool)].max() <= 0.4


def test_a_fifth_of_the_counter_texts_was_never_edited_against_a_score(bundled):
    free = bundled[bundled.untouched]
    assert set(free.register) == {"counter"} and free.scenario_id.nunique() >= 18
    assert len(free) == 3 * free.scenario_id.nunique()


def test_blind_ratings_belong_to_these_texts(bundled):
    """Two raters or more on every empathy text as it stands now, one text of a scenario each; the targets of the data sheet hold."""
    judged = ratings.read_ratings()
    table = ratings.summary(judged, bundled).set_index("register")
    assert (table.texts == 270).all() and (table.stale == 0).all() and (table.kappa_key >= 0.95).all()
    assert table.naturalness["plain"] >= 4.2 and table.naturalness["counter"] >= 3.7 and (table.naturalness_lowest >= 3).all()
    assert judged.groupby("text_id").rater.nunique().min() >= 2
    assert not judged.assign(scenario=judged.text_id.str.split("/").str[1]).duplicated(["rater", "scenario"]).any()


def test_a_changed_text_makes_its_ratings_stale(bundled):
    row = bundled.index[(bundled.condition == "empathy") & (bundled.register == "plain")][0]
    changed = bundled.assign(response=bundled.response.where(bundled.index != row, "Something else."))
    before, after = (ratings.summary(ratings.read_ratings(), each).set_index("register").loc["plain"] for each in (bundled, changed))
    assert after.texts == before.texts - 1 and after.stale == (ratings.read_ratings().text_id == bundled.text_id[row]).sum() >= 2


@pytest.mark.parametrize(("old", "new", "said"), [("naturalness", "nature", "columns"), (",4\n", ",9\n", "naturalness"), (",cognitive,", ",warm,", "answer")])
def test_bad_ratings_are_named(tmp_path, old, new, said):
    (tmp_path / "ratings.csv").write_text(ratings.RATINGS.read_text().replace(old, new, 1))
    with pytest.raises(BadInput, match=said):
        ratings.read_ratings(tmp_path / "ratings.csv")


def test_bundled_lengths_and_strata(bundled):
    words = bundled.response.str.split().str.len()
    assert words.between(35, 65).all()
    groups = words.groupby([bundled.condition, bundled.scenario_id, bundled.register])
    assert (groups.max() / groups.min()).max() <= 1.15
    scenarios = bundled[bundled.condition == "empathy"].drop_duplicates("scenario_id")
    assert scenarios.domain.nunique() >= 12 and scenarios.domain.value_counts(normalize=True).max() <= 0.10
    assert scenarios.cluster.value_counts().max() <= 3


def test_every_crisis_reply_carries_the_same_safety_step(bundled):
    """Where one plain reply of a triplet names an emergency number or crisis line, all six name the same."""
    empathy = bundled[(bundled.condition == "empathy") & (bundled.context == "crisis_support")]
    named = empathy.response.str.findall(r"\b(?:999|911|988|112|116 123)\b|crisis line").map(lambda found: tuple(sorted(set(found))))
    by_scenario = named.groupby(empathy.scenario_id).agg(lambda sets: set.intersection(*map(set, sets)))
    any_named = named.groupby(empathy.scenario_id).agg(lambda sets: set.union(*map(set, sets)))
    assert (any_named.map(len) > 0).sum() >= 4
    assert all(by_scenario[id_] for id_ in any_named.index[any_named.map(len) > 0])


def test_their_files_import(seed_schema):
    table = ds.texts_table(ds.read_folder(seed_schema), cluster_cosine=0.4)
    assert table.groupby("condition").size().to_dict() == {"empathy": 36, "valence_stripped": 36, "non_empathy": 36}
    assert table.text_id.is_unique and set(table.register) == {"plain"}


def test_export_reads_back_equal(bundled, tmp_path):
    for name, content in ds.export_seed_schema(bundled).items():
        (tmp_path / name).write_text(json.dumps(content))
    back = ds.texts_table(ds.read_folder(tmp_path), cluster_cosine=0.4)
    columns = ["text_id", "scenario_id", "condition", "register", "label", "scenario", "response", "context"]
    pd.testing.assert_frame_equal(back[columns], bundled[columns])


def spoil(folder, change, name="triplets_filtered.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "said"), [
    (lambda c: c["triplets"][0].pop("affective"), "affective"),
    (lambda c: c["triplets"][0].update(affective="   "), "affective"),
    (lambda c: c["triplets"][0].update(scenario=3), "scenario"),
    (lambda c: c["triplets"][1].update(id="t0"), "duplicate id"),
    (lambda c: c["triplets"][0].update(id="../t"), "id"),
    (lambda c: c["triplets"].append({"id": "x", "scenario": "s"}), "no responses"),
    (lambda c: c["triplets"].append("text"), "must be an object"),
    (lambda c: c.pop("triplets"), "one list"),
    (lambda c: c["triplets"][0].update(cognitive="a\x00b"), "NUL"),
    (lambda c: c["triplets"].clear(), "no triplets"),
    (lambda c: c["triplets"].pop(0), "triplet_id"),
])
def test_faults_are_named_in_one_line(seed_schema, change, said):
    spoil(seed_schema, change)
    with pytest.raises(BadInput, match=said) as caught:
        ds.read_folder(seed_schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]", b"[" * 100_000, b'{"triplets": [{"id": "a", "scenario": "s", "cognitive": "\\ud800"}]}'])
def test_unreadable_files_are_named(seed_schema, content):
    (seed_schema / "triplets_filtered.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"triplets_filtered\.json"):
        ds.read_folder(seed_schema)


def test_subset_keeps_whole_scenarios(bundled):
    small = ds.subset(bundled, 10)
    assert small[small.condition == "empathy"].scenario_id.nunique() == 10
    assert set(small[small.condition == "valence_stripped"].scenario_id) == set(small[small.condition == "empathy"].scenario_id)
