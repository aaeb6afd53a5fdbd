"""Params files: every shipped one is valid; every fault is one line that names file, field and fix."""

import pytest
import yaml

from lib import params
from lib.errors import BadInput
from lib.params import load_params, studies
from lib.stages import check_stage_params
from tests.conftest import run


@pytest.mark.parametrize("study", studies())
@pytest.mark.parametrize("quick", [False, True])
def test_every_study_is_valid(study, quick):
    loaded = load_params(study, quick=quick)
    check_stage_params(loaded, study)
    assert loaded.layer == round(loaded.thresholds.layer_depth * loaded.model.n_layers)


@pytest.fixture
def params_folder(tmp_path, monkeypatch):
    """A copy of params/ that a test may spoil."""
    for path in params.PARAMS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(params, "PARAMS", tmp_path)
    return tmp_path


def spoiled(folder, change):
    content = yaml.safe_load((folder / "tiny.yaml").read_text())
    change(content)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(("change", "named"), [
    (lambda c: c.update(colour="red"), "colour"),
    (lambda c: c["model"].pop("d_model"), "model.d_model"),
    (lambda c: c["model"].update(n_layers="many"), "model.n_layers"),
    (lambda c: c["model"].update(n_layers=-1), "model.n_layers"),
    (lambda c: c.update(study="other"), "study"),
    (lambda c: c["model"].pop("random_seed"), "model.random_seed"),
    (lambda c: c.update(thresholds={"separation": {"cos_maximum": 1}}), "thresholds.separation.cos_maximum"),
    (lambda c: c["model"]["wheels"][0].update(sha256="abc"), "model.wheels.0.sha256"),
    (lambda c: c["model"].update(bos="perhaps"), "model.bos"),
    (lambda c: c.update(plan={"vram_gb": {}}), "plan.minutes"),
])
def test_bad_params_name_file_and_field(params_folder, change, named):
    spoiled(params_folder, change)
    with pytest.raises(BadInput, match=rf"tiny\.yaml: {named}") as caught:
        load_params("tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stage", "values", "named"), [
    ("05_probe", {"n_perm": 5}, "n_perm"), ("05_probe", {"n_permutations": "many"}, "n_permutations"), ("11_more", {}, "11_more"),
])
def test_parameters_a_notebook_does_not_know(params_folder, stage, values, named):
    spoiled(params_folder, lambda c: c["stages"].update({stage: values}))
    with pytest.raises(BadInput, match=named):
        check_stage_params(load_params("tiny"), "tiny.yaml")


@pytest.mark.parametrize(("plan", "named"), [
    ({"vram_gb": {"03_extract": 1}}, "04_sae"), ({"vram_gb": {"02_filter": 1}}, "02_filter"),
    ({"minutes": {"03_extract": 1, "04_sae": 1, "08_causality": 1, "09_bandwidth": 1, "11_more": 1}}, "11_more")])
def test_a_plan_names_the_stages_that_hold_a_model(params_folder, plan, named):
    whole = dict.fromkeys(("03_extract", "04_sae", "08_causality", "09_bandwidth"), 1)
    spoiled(params_folder, lambda c: c.update(plan={"vram_gb": whole, "minutes": whole} | plan))
    with pytest.raises(BadInput, match=rf"tiny\.yaml: plan\.\w+: {named}"):
        check_stage_params(load_params("tiny"), "tiny.yaml")


@pytest.mark.parametrize("study", [name for name in studies() if load_params(name).model.source == "hub"])
def test_hub_studies_are_pinned_and_planned(study):
    loaded = load_params(study)
    assert loaded.model.revision and loaded.model.bos is not None and "attention" in loaded.model.model_fields_set
    assert max(loaded.plan.vram_gb.values()) < 0.9 * 24


@pytest.mark.parametrize("name", ["../etc", "/abs", "a b", "", "A", "x..y", "nothing"])
def test_study_names_are_plain(name):
    with pytest.raises(BadInput):
        load_params(name)


@pytest.mark.parametrize("text", ["[1, 2", "just words", "a: &a [*a]\nb: *missing", "\x00", "{" * 5000])
def test_unreadable_yaml(params_folder, text):
    (params_folder / "tiny.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"tiny\.yaml"):
        load_params("tiny")


@pytest.mark.parametrize("words", [("--study", "nothing"), ("12_more",), ("--set", "05_probe.n_perm=3"), ("--set", "nonsense"),
                                   ("--set", "05_probe.n_permutations=many"), ("--dataset", "no-such-folder")])
def test_the_command_line_answers_in_one_line_with_code_2(outputs, words):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(outputs.iterdir())


def test_help_and_list():
    assert "--study" in run("--help").stdout
    assert "05_probe" in run("--list").stdout and "smollm2-135m" in run("--list").stdout
