"""The corpus: which tokens are kept, that batches equal single forwards, that shards resume and refuse what is foreign."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from lib.errors import BadInput
from lib.model import corpus
from lib.model.activations import SINK
from lib.model.sae_training import shard_blocks
from lib.model.shards import open_shards
from lib.seals import sealed

LAYER = 1
TALK = ["hey there", "hi! how was the trip?", "long, but we saw the sea", "user", "assistant", "ha, lucky you"]


def talks(n=160, seed=0):
    """Conversations of random words, of different lengths."""
    rng, words = np.random.default_rng(seed), "sea trip late train rain bread noise garden friend work song book".split()
    return [[" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(rng.integers(1, 9))] for _ in range(n)]


@pytest.fixture
def made(tiny, tmp_path):
    """A function that extracts shards of the tiny model into this test's folder."""
    model, tokenizer, _ = tiny

    def extract(n=400, **changes):
        options = {"about": {"model_id": "tiny", "weights_sha256": "0"}, "template": "chat", "layer": LAYER, "context": 64, "shard_tokens": 200,
                   "corpus": talks(), "folder": tmp_path / "shards", "n_tokens": {"heldout": 150, "half0": n, "half1": n}} | changes
        return corpus.extract_corpus(model, tokenizer, **options)
    return extract


def test_kept_tokens_are_the_messages(tiny):
    piece = corpus.tokenise(tiny[1], "chat", TALK, context=500)
    assert tiny[1].decode(piece.ids[piece.keep]) == "".join(TALK)
    assert "<|im_start|>" in tiny[1].decode(piece.ids[~piece.keep]) and len(piece.ids) == len(piece.keep)


def test_plain_template_alternates(tiny):
    piece = corpus.tokenise(tiny[1], "plain", TALK[:3], context=500)
    assert "Message:\nhey there\n\nReply:\nhi!" in tiny[1].decode(piece.ids)


def test_context_cuts(tiny):
    assert len(corpus.tokenise(tiny[1], "chat", ["word " * 500], context=64).ids) == 64
    assert [len(run) for run in corpus.cut(["a" * 100] * 5, 260)] == [2, 2, 1]


def test_splits_share_no_conversation(tiny):
    lines = [[f"conversation {i} begins", f"and {i} ends"] for i in range(100)]
    found = {split: set() for split in corpus.SPLITS}
    for piece in corpus.pieces(tiny[1], "chat", context=64, seed=0, corpus=lines):
        found[piece.split].add(tiny[1].decode(piece.ids[piece.keep]))
    assert len(set.union(*found.values())) == 100 == sum(map(len, found.values()))
    assert {split: len(texts) for split, texts in found.items()} == {"heldout": 5, "half0": 45, "half1": 50}
    only = list(corpus.pieces(tiny[1], "chat", context=64, seed=0, splits=("heldout",), corpus=lines))
    assert {tiny[1].decode(p.ids[p.keep]) for p in only} == found["heldout"]


def test_batched_equals_single_forwards(tiny):
    model, tokenizer, _ = tiny
    batch = [corpus.tokenise(tokenizer, "chat", turns, context=64) for turns in talks(6)]
    together = corpus.forward(model, batch, LAYER)
    single = []
    for piece in batch:
        with torch.inference_mode():
            hidden = model(torch.from_numpy(piece.ids)[None], output_hidden_states=True).hidden_states[LAYER + 1][0]
        single.append(hidden[torch.from_numpy(piece.keep)].numpy())
    assert np.abs(together - np.concatenate(single)).max() < 1e-4


def test_shards_hold_enough_and_resume(made):
    first = made(250)
    names = {row["file"]: row["sha256"] for row in first.rows}
    assert first.n_tokens("half0") >= 250 and first.n_tokens("heldout") >= 150
    first.folder.joinpath(first.rows[-1]["file"]).unlink()  # as if killed before the last shard and its row were written
    (first.folder / "manifest.json").write_bytes(sealed({"identity": first.identity, "shards": first.rows[:-1]}))
    again = made(250)
    assert {row["file"]: row["sha256"] for row in again.rows} == names
    more = made(600)
    assert names.items() <= {row["file"]: row["sha256"] for row in more.rows}.items() and more.n_tokens("half1") >= 600
    x = more.split("half0", 300)
    assert x.shape == (300, 48) and x.dtype == np.float32 and np.isfinite(x).all()


def test_sinks_are_dropped_and_counted(tiny, monkeypatch):
    batch = [corpus.tokenise(tiny[1], "chat", turns, context=64) for turns in talks(5)]
    n = sum(piece.keep.sum() for piece in batch)
    resid = np.random.default_rng(0).standard_normal((n, 8)).astype(np.float32)
    resid[[3, 7]] *= 100 * SINK
    monkeypatch.setattr(corpus, "forward", lambda *_: resid)
    arrays, about = corpus.shard_arrays(None, batch, LAYER, batch_tokens=10**6)
    assert about["n_sinks"] == 2 and about["n_tokens"] == n - 2 == len(arrays["tokens"])
    resid[5] = np.nan
    with pytest.raises(BadInput, match="NaN"):
        corpus.shard_arrays(None, batch, LAYER, batch_tokens=10**6)


def test_truncated_missing_and_foreign_shards_are_named(made, tmp_path):
    shards = made()
    row = shards.rows[0]
    path = shards.folder / row["file"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match=rf"{row['file']}.*truncated or foreign"):
        open_shards(shards.identity, kind="corpus", folder=shards.folder).load(row)
    path.unlink()
    with pytest.raises(BadInput, match=rf"{row['file']}: missing"):
        shards.load(row)
    with pytest.raises(BadInput, match="another model, layer or corpus"):
        made(layer=2)


def test_manifest_says_what_is_there(made):
    shards = made()
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    assert manifest["identity"]["layer"] == LAYER and manifest["identity"]["d_model"] == 48
    assert all(row["n_tokens"] == len(shards.load(row)["tokens"]) for row in manifest["shards"])


def test_memory_does_not_grow_with_the_number_of_shards(made, tmp_path):
    """Only one shard is held while writing and while reading."""
    def peak(work):
        tracemalloc.start()
        work()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size
    options = {"corpus": talks(500), "shard_tokens": 400}
    made(400, **options, folder=tmp_path / "warm")
    written = [peak(lambda n=n: made(n, **options, folder=tmp_path / str(n))) for n in (800, 3200)]
    shards = made(3200, **options, folder=tmp_path / "3200")
    read = [peak(lambda n=n: [block().sum() for block in shard_blocks(shards, "half0")[:n]]) for n in (2, 8)]
    assert len(shards.of("half0")) == 8 and written[1] < 1.5 * written[0] and read[1] < 1.5 * read[0]


def test_the_real_corpus():
    found = corpus.conversations()
    assert len(found) == 7168 and sum(map(len, found)) > 130_000 and all(turn.strip() for talk in found[:50] for turn in talk)


def test_a_streamed_corpus(tiny, tmp_path):
    """A folder in the shape of a hub dataset stands for the hub."""
    rows = [{"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": " hi "}]} for i in range(40)]
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(corpus.streamed(f"{tmp_path / 'chat'}:train", seed=0))
    assert len(found) == 40 and ["hello 7", "hi"] in found and found != list(corpus.streamed(str(tmp_path / "chat"), seed=1))
    split = [piece.split for piece in corpus.pieces(tiny[1], "chat", context=64, seed=0, corpus=str(tmp_path / "chat"))]
    assert split.count("heldout") == 2 and len(split) == 40
    (tmp_path / "chat" / "train.jsonl").write_text(json.dumps({"text": "no turns"}))
    with pytest.raises(BadInput, match="no conversations"):
        list(corpus.streamed(str(tmp_path / "chat"), seed=0))
    with pytest.raises(BadInput, match="cannot be streamed"):
        list(corpus.streamed(str(tmp_path / "missing"), seed=0))
