"""Sparse autoencoders: training that resumes, SAELens's own format, gates that pass and fail where they must."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from lib.errors import BadInput
from lib.model import corpus, prompts, sae, sae_gates, text_tokens, train_sae, weights
from lib.model.activations import pool
from lib.model.sae_training import Pair, Recipe, build, gaussian_blocks, inference, stream, train, train_pair
from lib.params import ROOT, load_params
from lib.stats.gates import failing, gates_table, mmcs, random_mmcs
from lib.text.dataset import read_folder, texts_table

THRESHOLDS = load_params("smollm2-135m").thresholds.clusters
D, LATENTS = 32, 48
RECIPE = Recipe(d_sae=LATENTS, k=4, n_samples=60_000, batch=256, buffer=4096, dead_window=50)
ABOUT = {"model_name": "planted", "hook_name": sae.hook_name(1)}


def planted_tokens(seed, n=12_000, *, active=3):
    """Tokens that are sparse sums of fixed features: what an SAE should find, whatever the seed."""
    features = np.random.default_rng(99).standard_normal((LATENTS, D))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    z = np.zeros((n, LATENTS), np.float32)
    z[np.arange(n)[:, None], rng.integers(0, LATENTS, (n, active))] = rng.uniform(1, 3, (n, active))
    return (z @ features + 0.02 * rng.standard_normal((n, D))).astype(np.float32)


@pytest.fixture(scope="module")
def planted():
    """Two SAEs trained on disjoint halves of planted tokens, and held-out tokens."""
    saes = [train([lambda s=seed: planted_tokens(s)], RECIPE, seed=seed, about=ABOUT)[0] for seed in (0, 1)]
    return saes, planted_tokens(7)


def test_planted_features_pass_the_gates(planted):
    found = sae_gates.measure(*planted)
    assert min(found["explained_variance"]) > 0.85 and found["mmcs"] > 0.8 and max(found["dead"]) < 0.2
    assert max(found["l0"]) <= RECIPE.k + 1e-6


def test_gaussian_tokens_fail_the_cross_seed_gate(planted):
    """No sparse features: two seeds find different ones, however well they reconstruct."""
    blocks = [gaussian_blocks(np.random.default_rng(0).standard_normal((4000, D)).astype(np.float32), n_blocks=2, block=4000, seed=s) for s in (5, 6)]
    saes = [train(b, RECIPE, seed=s, about=ABOUT)[0] for s, b in enumerate(blocks)]
    found = sae_gates.measure(saes, blocks[0][0]())
    assert found["mmcs"] < THRESHOLDS.mmcs_min < sae_gates.measure(*planted)["mmcs"]


def test_pooled_texts_alone_fail_the_train_test_gate(planted):
    """An SAE trained on the pooled texts alone reconstructs those, and not the tokens they are made of."""
    pooled = planted_tokens(3, 80 * 20).reshape(80, 20, D).mean(1)
    model, _ = train([lambda: pooled], dataclasses.replace(RECIPE, buffer=256), seed=0, about=ABOUT)
    inside, outside = (sae_gates.measure([model], part)["explained_variance"][0] for part in (pooled, planted[1]))
    assert inside - outside > THRESHOLDS.train_test_gap_max
    inside, outside = (sae_gates.measure(planted[0][:1], part)["explained_variance"][0] for part in (planted_tokens(0), planted[1]))
    assert abs(inside - outside) <= THRESHOLDS.train_test_gap_max


@pytest.mark.full
def test_pooled_texts_alone_fail_the_train_test_gate_at_full_size():
    """The same with the default study's model, layer, recipe and texts."""
    params = load_params("smollm2-135m")
    model, tokenizer, about = weights.load(params.model)
    texts = texts_table(read_folder(ROOT / "lib/data/dataset"), cluster_cosine=params.thresholds.cluster_cosine)
    groups = [[prompts.encode(tokenizer, params.model.template, scenario, reply) for reply in part.response]
              for scenario, part in texts.groupby("scenario", sort=False)]
    shards = text_tokens.extract_texts(model, groups, about=about, template=params.model.template, layer=params.layer)
    folder = sae.find_shipped(sae.identity(params.model, params.layer))
    pair = sae.load_pair(folder, sae.identity(params.model, params.layer))
    pooled = sae.encode_texts(pair.saes[:1], shards).resid
    recipe = Recipe(**pair.about["recipe"] | {"n_samples": 400_000, "buffer": 2048})
    alone, _ = train([lambda: pooled], recipe, seed=0, about=ABOUT | {"hook_name": sae.hook_name(params.layer)})
    heldout = corpus.extract_corpus(model, tokenizer, about=about, template=params.model.template, layer=params.layer, n_tokens={"heldout": 16_000})
    inside = sae_gates.measure([alone], pooled)["explained_variance"][0]
    outside = sae_gates.measure([alone], heldout.split("heldout", 16_000))["explained_variance"][0]
    print("explained variance inside, outside:", inside, outside)
    assert inside - outside > THRESHOLDS.train_test_gap_max


def test_resumed_training_gives_the_same_weights(tmp_path):
    blocks = [lambda: planted_tokens(0, 5000), lambda: planted_tokens(1, 5000)]
    recipe = dataclasses.replace(RECIPE, n_samples=51_200)
    whole, curve = train(blocks, recipe, seed=3, about=ABOUT)
    path, calls = tmp_path / "run.safetensors", []

    def killed(number):
        def read():
            calls.append(number)
            if len(calls) > 12:
                raise KeyboardInterrupt
            return blocks[number]()
        return read
    with pytest.raises(KeyboardInterrupt):
        train([killed(0), killed(1)], recipe, seed=3, about=ABOUT, checkpoint=path, every=50)
    assert path.exists()
    resumed, again = train(blocks, recipe, seed=3, about=ABOUT, checkpoint=path, every=50)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert curve.equals(again)
    with pytest.raises(BadInput, match="another recipe, seed or corpus"):
        train(blocks, recipe, seed=4, about=ABOUT, checkpoint=path)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_other_architectures_train(architecture):
    recipe = dataclasses.replace(RECIPE, architecture=architecture, n_samples=25_600)
    model, curve = train([lambda: planted_tokens(0, 5000)], recipe, seed=0, about=ABOUT)
    assert model.cfg.architecture() == "jumprelu" and len(curve) == 2
    assert sae_gates.measure([model], planted_tokens(7, 2000))["explained_variance"][0] > 0.3


def test_stream_depends_on_its_seed_alone():
    blocks = [lambda: np.arange(12.0).reshape(6, 2), lambda: np.arange(12.0, 24).reshape(6, 2)]
    first, again, other = ([next(batches).tolist() for _ in range(9)] for batches in
                           (stream(blocks, batch=2, buffer=4, seed=s) for s in (0, 0, 1)))
    assert first == again != other


def test_nan_tokens_and_senseless_recipes_are_refused():
    with pytest.raises(BadInput, match="NaN"):
        train([lambda: np.full((5000, D), np.nan, np.float32)], RECIPE, seed=0, about=ABOUT)
    for change, words in (({"d_sae": D - 1}, "smaller than the model's width"), ({"k": 0}, "k 0"), ({"architecture": "dense"}, "none of"),
                          ({"d_sae": 5000}, "too few for d_sae 5000")):
        with pytest.raises(BadInput, match=words):
            dataclasses.replace(RECIPE, **change).check(d_model=D, n_tokens=20_000, tokens_per_latent=200)


# saved pairs

EXPECTED = {"model_id": "planted", "weights": "0", "template": "chat", "hook_name": sae.hook_name(1), "d_model": D}


@pytest.fixture
def saved(planted, tmp_path):
    import pandas as pd
    sae.save_pair(Pair(saes=tuple(planted[0]), curve=pd.DataFrame({"step": [1]}), about=EXPECTED | {"seeds": [0, 1], "nulls": {}}), tmp_path / "pair")
    return tmp_path / "pair"


def test_saelens_opens_what_we_save(planted, saved):
    theirs, x = SAE.load_from_disk(saved / "seed0"), torch.from_numpy(planted[1][:1000])
    ours = sae.load_pair(saved, EXPECTED).saes[0]
    a, b = ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x))
    assert ((a - b).norm() / b.norm()).item() < 1e-4
    assert sae_gates.measure([ours], planted[1])["explained_variance"] == sae_gates.measure([planted[0][0]], planted[1])["explained_variance"]


@pytest.mark.parametrize(("key", "value"), [("model_id", "other"), ("hook_name", sae.hook_name(2)), ("d_model", 64), ("weights", "1")])
def test_an_sae_of_another_model_is_refused(saved, key, value):
    with pytest.raises(BadInput, match=f"{key} is"):
        sae.load_pair(saved, EXPECTED | {key: value})


def test_damaged_pairs_are_named(saved):
    path = saved / "seed1" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="seed1/sae_weights"):
        sae.load_pair(saved, EXPECTED)
    (saved / "meta.json").write_text("[]")
    with pytest.raises(BadInput, match="no seal"):
        sae.load_pair(saved, EXPECTED)


def test_hooks_before_and_after_a_block():
    model = inference(build(RECIPE, D, seed=0, about={"model_name": "x", "hook_name": "blocks.2.hook_resid_pre"}))
    assert sae.layer_of(model) == 1
    sae.check(model, EXPECTED)
    with pytest.raises(BadInput, match="study's layer"):
        sae.check(model, EXPECTED | {"hook_name": sae.hook_name(2)})


def test_published_saes_are_refused_where_they_do_not_fit(monkeypatch):
    tiny, llama = load_params("tiny").model, load_params("llama-3.1-8b")
    release, name = llama.stages["04_sae"]["release"], llama.stages["04_sae"]["sae_id"]
    for r, i, model, words in (("no-such-release", "x", tiny, "no such release"), (release, "x", llama.model, "no such id"),
                               (release, name, tiny, "is of model meta-llama")):
        with pytest.raises(BadInput, match=words):
            sae.load_pretrained(r, i, model)

    def published(model_name, d_in, block=15):
        made = inference(build(Recipe(d_sae=d_in, k=4), d_in, seed=0, about={"model_name": model_name, "hook_name": sae.hook_name(block)}))
        monkeypatch.setattr(SAE, "from_pretrained", lambda *_, **__: made)
        return sae.load_pretrained(release, name, llama.model.model_copy(update={"d_model": 32}))
    assert len(published("Llama-3.1-8B-Instruct", 32).saes) == 1
    for (model_name, width), words in {("Llama-3.1-8B", 32): "is of model Llama-3.1-8B,", ("Llama-3.1-8B-Instruct", 16): "width 16"}.items():
        with pytest.raises(BadInput, match=words):
            published(model_name, width)


@pytest.mark.parametrize("study", ["gemma2-9b", "llama-3.1-8b", "qwen2.5-7b", "mistral-7b", "deepseek-r1-7b"])
def test_gpu_studies_name_their_sae(study):
    """SAELens lists what the params name, of the same model; where none exists the params say so and hold a recipe."""
    params = load_params(study)
    stage = params.stages["04_sae"]
    if stage["release"] == "none":
        Recipe(d_sae=stage["d_sae"], k=stage["k"], n_samples=stage["n_samples"]).check(
            d_model=params.model.d_model, n_tokens=stage["n_tokens"], tokens_per_latent=THRESHOLDS.tokens_per_latent_min)
        assert stage["k"] <= THRESHOLDS.l0_max_over_d_model * params.model.d_model
    else:
        listed = get_pretrained_saes_directory()[stage["release"]]
        assert stage["sae_id"] in listed.saes_map
        sae.check_model(listed.model, params.model, study)


# gates

def test_mmcs_of_known_decoders():
    rows = np.random.default_rng(0).standard_normal((20, 64))
    assert mmcs(rows, rows[::-1] * 3) == pytest.approx(1)
    assert mmcs(rows, -rows) < 0.5 and random_mmcs((1152, 576), seed=0) == pytest.approx(0.135, abs=0.01)
    other = rows.copy()
    other[10:] = np.random.default_rng(1).standard_normal((10, 64))
    heavy = np.r_[np.ones(10), np.zeros(10)]
    assert mmcs(rows, other, masses=(heavy, heavy)) == pytest.approx(1) and mmcs(rows, other) < 0.75
    with pytest.raises(BadInput, match="no activation"):
        mmcs(rows, other, masses=(heavy * 0, heavy))


def test_gates_table_takes_the_worst_seed_and_nan_fails():
    good = {"explained_variance": [0.8, 0.75], "train_test_gap": [0.01], "ce_recovered": [0.9], "dead": [0.1, 0.15], "l0": [32.0],
            "tokens_per_latent": [250.0], "mmcs": [0.75]}
    table = gates_table(good, THRESHOLDS, d_model=576, nulls={"gaussian": {"mmcs": [0.3]}})
    assert table.passed.all() and not failing(table) and table.set_index("gate").gaussian["mmcs"] == 0.3
    assert table.set_index("gate").value["explained_variance"] == 0.75
    for gate, bad in (("dead", [0.1, 0.3]), ("mmcs", [0.6]), ("ce_recovered", [np.nan]), ("l0", [60.0])):
        assert [line.split()[0] for line in failing(gates_table(good | {gate: bad}, THRESHOLDS, d_model=576))] == [gate]


# on a model

@pytest.fixture(scope="module")
def tiny_pair(tiny, tmp_path_factory):
    from tests.test_corpus import talks
    model, tokenizer, params = tiny
    shards = corpus.extract_corpus(model, tokenizer, about={"model_id": params.model.model_id}, template="chat", layer=1, context=64, shard_tokens=400,
                                   corpus=talks(160), folder=tmp_path_factory.mktemp("shards"), n_tokens={"heldout": 200, "half0": 1600, "half1": 1600})
    pair = train_pair(shards, Recipe(d_sae=64, k=8, n_samples=20_000, batch=128, buffer=800), about=sae.identity(params.model, 1), tokens_per_latent=20,
                      n_check=200)
    return pair, shards


def test_pair_on_a_model_states_what_it_rests_on(tiny_pair):
    about = tiny_pair[0].about
    assert set(about["nulls"]) == {"untrained", "gaussian"} and min(about["train_tokens"]) >= 1600
    assert min(about["heldout"]["explained_variance"]) > max(about["nulls"]["untrained"]["explained_variance"])
    json.dumps(about)


def test_texts_are_encoded_token_by_token(tiny, tiny_pair, tmp_path, monkeypatch):
    model, tokenizer, _ = tiny
    groups = [[prompts.encode(tokenizer, "chat", scenario, reply) for reply in ("You hoped it would hold.", "Call the office at nine.", "You hoped for more.")]
              for scenario in ("The roof leaks.", "My tooth aches.")]
    options = {"about": {"model_id": "tiny"}, "template": "chat", "layer": 1, "folder": tmp_path / "texts"}
    monkeypatch.setattr(text_tokens, "SHARD_GROUPS", 1)
    shards = text_tokens.extract_texts(model, groups, **options)
    assert [row["n_texts"] for row in shards.rows] == [3, 3]
    made = sae.encode_texts(tiny_pair[0].saes, shards)
    texts = [text for group in groups for text in group]
    assert made.pooled[0].shape == (6, 64) and made.resid.shape == (6, 48)
    for row, text in enumerate(texts):
        assert np.abs(made.resid[row] - pool(model, [text], [1], share=False)[0][0, 0]).max() < 1e-4
        with torch.inference_mode():
            hidden = model(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[2][0, text.start:]
            latents = tiny_pair[0].saes[0].encode(hidden).mean(0)
        assert np.abs(made.pooled[0][row] - latents.numpy()).max() < 1e-3
    first = made.top[0].iloc[0]
    assert first.token in texts[int(first.text)].ids
    monkeypatch.setattr(text_tokens, "extract", lambda *_: pytest.fail("the model was run again"))
    assert text_tokens.extract_texts(model, groups, **options).rows == shards.rows
    with pytest.raises(BadInput, match="another model, layer or corpus"):
        text_tokens.extract_texts(model, groups[::-1], **options)


def test_cross_entropy_recovered(tiny, tiny_pair):
    """A perfect reconstruction recovers all, the mean token nothing."""
    model, tokenizer, _ = tiny
    from tests.test_corpus import talks
    pieces = [corpus.tokenise(tokenizer, "chat", turns, context=64) for turns in talks(12)]

    class Fixed:
        device = "cpu"

        def __init__(self, answer):
            self.encode, self.decode = (lambda x: x), answer
    mean = tiny_pair[1].split("heldout").mean(0)
    saes = [Fixed(lambda x: x), Fixed(lambda x: torch.from_numpy(mean).expand_as(x))]
    found = sae_gates.ce_recovered(model, pieces, 1, saes, mean, n_tokens=100)
    assert found["ce_recovered"][0] == pytest.approx(1, abs=1e-3) and found["ce_recovered"][1] == pytest.approx(0, abs=1e-3)
    with pytest.raises(BadInput, match="no held-out tokens"):
        sae_gates.ce_recovered(model, [], 1, saes, mean, n_tokens=100)


def test_only_message_tokens_are_replaced_and_no_sinks():
    hidden, keep = torch.randn(1, 10, 8), torch.arange(10) >= 4
    hidden[0, 6] *= 1000
    found = sae_gates.replacing([], torch.zeros(8), keep)(hidden)
    changed = (found[1] != hidden[0]).any(1)
    assert torch.equal(found[0], hidden[0]) and changed.tolist() == [i >= 4 and i != 6 for i in range(10)]


# retraining

def test_a_retraining_is_compared_with_what_ships(tmp_path):
    shipped = {"heldout": {"explained_variance": [0.8, 0.79], "ce_recovered": [0.95, 0.96], "mmcs": [0.72], "dead": [0.01, 0.02]}}
    assert train_sae.differences(shipped, shipped) == []
    other = {"heldout": shipped["heldout"] | {"mmcs": [0.68]}}
    assert train_sae.differences(other, shipped) == ["mmcs 0.680, shipped 0.720"]
    pair = Pair(saes=(), curve=None, about=shipped | {"recipe": dataclasses.asdict(RECIPE), "train_tokens": [5, 6], "device": "cpu",
                                                         "train_explained_variance": [0.81, 0.8]})
    row = train_sae.sweep_row(pair, 1.0)
    assert row["train_test_gap"] == pytest.approx(0.01) and row["n_tokens"] == 5
    train_sae.add_row(tmp_path / "sweep.csv", row | {"mmcs": 0.1})
    assert len(train_sae.add_row(tmp_path / "sweep.csv", row)) == 1 and len(train_sae.add_row(tmp_path / "sweep.csv", row | {"k": 5})) == 2


def test_the_recipe_of_a_study_is_its_stage_params():
    default, mistral = (train_sae.stage_options(load_params(study)) for study in ("smollm2-135m", "mistral-7b"))
    own = Recipe()
    assert default == {"architecture": own.architecture, "d_sae": own.d_sae, "k": own.k, "n_samples": own.n_samples, "n_tokens": default["n_tokens"], "corpus_name": ""}
    assert mistral["d_sae"] == 8192 and mistral["corpus_name"].startswith("HuggingFaceH4/")


# what ships

def test_shipped_sae_fits_the_default_study():
    params = load_params("smollm2-135m")
    expected = sae.identity(params.model, params.layer)
    folder = sae.find_shipped(expected)
    assert folder is not None and weights.key_of(params.model) == expected["weights"]
    pair = sae.load_pair(folder, expected)
    assert len(pair.saes) == 2 and sum(p.stat().st_size for p in folder.rglob("*")) < 30e6
    assert min(pair.about["train_tokens"]) >= THRESHOLDS.tokens_per_latent_min * pair.saes[0].cfg.d_sae
    assert mmcs(*(s.W_dec.numpy() for s in pair.saes)) > 2 * random_mmcs(pair.saes[0].W_dec.shape, seed=0)
    assert set(pair.about["nulls"]) == {"untrained", "gaussian"} and len(pair.curve) > 10
    x = torch.randn(1000, params.model.d_model) * 5 + pair.saes[0].b_dec
    theirs = SAE.load_from_disk(folder / "seed0")
    ours = pair.saes[0]
    assert ((ours(x) - theirs(x)).norm() / theirs(x).norm()).item() < 1e-4
