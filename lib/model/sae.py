"""Sparse autoencoders of a study: saved in SAELens's own format, loaded only where they fit, and put to its texts.

A pair is a folder: `seed0/` and `seed1/` (each `cfg.json` and `sae_weights.safetensors`, so that SAELens's
`SAE.load_from_disk` opens it), `curve.csv` and the sidecar `meta.json` with model, hook, recipe, corpus, gates and the
hash of every file. Weights are float16 on disk and float32 in arithmetic.

Tokens are encoded, then latents are pooled over each response: an SAE is trained on tokens, and a mean of tokens is
none (Cunningham et al. 2023, "Sparse autoencoders find highly interpretable features"; Gao et al. 2024 for TopK).
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save as save_safetensors
from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.files import sha256, to_json, write_atomic
from lib.model.sae_training import Pair
from lib.model.shards import Shards
from lib.model.weights import key_of
from lib.params import ROOT, Model, Params
from lib.seals import read_sealed, sealed
from lib.store import versions

SHIPPED = ROOT / "lib" / "data" / "sae"
FILES = ("cfg.json", "sae_weights.safetensors")


def hook_name(layer: int) -> str:
    """SAELens's name of `resid_post` of a block."""
    return f"blocks.{layer}.hook_resid_post"


def identity(model: Model, layer: int) -> dict:
    """What an SAE belongs to: the model (by the hash of its source, or its revision), the template, the hook and the width."""
    weights = key_of(model) if model.source != "hub" else model.revision or "unpinned"
    return {"model_id": model.model_id, "weights": weights, "template": model.template, "hook_name": hook_name(layer), "d_model": model.d_model}


def save_pair(pair: Pair, folder: Path) -> None:
    """Write a pair; the sidecar goes last, so an interrupted save is no pair."""
    hashes = {}

    def put(name: str, content: bytes) -> None:
        write_atomic(folder / name, content)
        hashes[name] = sha256(content)

    for number, sae in enumerate(pair.saes):
        state = {name: tensor.half().contiguous() for name, tensor in sae.state_dict().items()}
        put(f"seed{number}/sae_weights.safetensors", save_safetensors(state))
        put(f"seed{number}/cfg.json", to_json(sae.cfg.to_dict()))
    put("curve.csv", pair.curve.to_csv(index=False, float_format="%.6g").encode())
    write_atomic(folder / "meta.json", sealed(pair.about | {"files": hashes, "versions": versions()}))


def load_sae(folder: Path, *, device: str = "cpu") -> SAE:
    """One SAE in SAELens's format, in float32."""
    return SAE.load_from_disk(folder, device=device, dtype="float32").eval().requires_grad_(False)


def load_pair(folder: Path, expected: dict, *, device: str = "cpu") -> Pair:
    """A saved pair. Raises BadInput where a file was changed or the SAE is of another model, hook or width."""
    about = read_sealed(folder / "meta.json", shown=f"{folder.name}/meta.json", fix="train it again")
    if "files" not in about:
        raise BadInput(f"{folder.name}/meta.json: not the sidecar of a sparse autoencoder; train it again")
    for key, value in expected.items():
        if about.get(key) != value:
            raise BadInput(f"{folder.name}: {key} is {about.get(key)!r}, the study needs {value!r}; an SAE of another model is never used")
    for name, digest in about["files"].items():
        if not (folder / name).exists() or sha256(folder / name) != digest:
            raise BadInput(f"{folder.name}/{name}: missing or differs from its sidecar; train it again")
    saes = tuple(load_sae(folder / f"seed{number}", device=device) for number in range(len(about["seeds"])))
    for sae in saes:
        check(sae, expected)
    return Pair(saes=saes, curve=pd.read_csv(io.BytesIO((folder / "curve.csv").read_bytes())), about=about)


def find_shipped(expected: dict) -> Path | None:
    """The folder of the shipped pair that fits a study; None where there is none."""
    for path in sorted(SHIPPED.glob("*/meta.json")):
        about = read_sealed(path, shown=f"{path.parent.name}/{path.name}", fix="restore it, or train it again")
        if all(about.get(key) == value for key, value in expected.items()):
            return path.parent
    return None


def check(sae, expected: dict) -> None:
    """Hook and width of an SAE must be the study's. `resid_pre` of a block is `resid_post` of the one before."""
    hook = str(sae.cfg.metadata.hook_name)
    if hook.endswith("hook_resid_pre"):
        hook = hook_name(int(hook.split(".")[1]) - 1)
    if hook != expected["hook_name"]:
        raise BadInput(f"SAE: reads {sae.cfg.metadata.hook_name}, the study's layer is {expected['hook_name']}")
    if sae.cfg.d_in != expected["d_model"]:
        raise BadInput(f"SAE: width {sae.cfg.d_in}, the model's is {expected['d_model']}")


def layer_of(sae) -> int:
    """The block whose `resid_post` an SAE reads, from its SAELens hook name."""
    _, block, point = str(sae.cfg.metadata.hook_name).split(".")[:3]
    if point not in ("hook_resid_post", "hook_resid_pre"):
        raise BadInput(f"SAE: reads {sae.cfg.metadata.hook_name}; only the residual stream is supported")
    return int(block) - (point == "hook_resid_pre")


def check_model(own: str, model: Model, name: str) -> None:
    """An SAE's model, by its last name, must be the study's; organisations are written in different ways."""
    if own.split("/")[-1].lower() != model.model_id.split("/")[-1].lower():
        raise BadInput(f"SAE {name}: is of model {own}, the study's is {model.model_id}; an SAE of another model is never used")


def load_pretrained(release: str, sae_id: str, model: Model, *, device: str = "cpu") -> Pair:
    """A published SAE by its SAELens release and id; a single one, so nothing can be said across seeds."""
    listed = get_pretrained_saes_directory().get(release)
    if listed is None or sae_id not in listed.saes_map:
        raise BadInput(f"SAE {release} / {sae_id}: SAELens lists no such {'id in this release' if listed else 'release'}; correct release and sae_id")
    check_model(listed.model, model, f"{release} / {sae_id}")
    try:
        sae = SAE.from_pretrained(release, sae_id, device=device)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"SAE {release} / {sae_id}: cannot be loaded ({str(error).splitlines()[0]})") from None
    check_model(str(sae.cfg.metadata.model_name), model, f"{release} / {sae_id}")
    layer = layer_of(sae)
    check(sae, identity(model, layer))
    about = identity(model, layer) | {"release": release, "sae_id": sae_id, "seeds": [0], "nulls": {}}
    return Pair(saes=(sae.eval().requires_grad_(False),), curve=pd.DataFrame(), about=about)


def corpus_of(params: Params, *, release: str, sae_id: str, n_heldout: int, n_tokens: int) -> tuple[int, dict[str, int]]:
    """`(layer, {split: tokens})` of the corpus that stage 04 needs: held-out tokens, and two halves where an SAE is trained there."""
    if release not in ("", "none"):
        return layer_of(load_pretrained(release, sae_id, params.model).saes[0]), {"heldout": n_heldout}
    shipped = not release and find_shipped(identity(params.model, params.layer))
    return params.layer, {"heldout": n_heldout} | ({} if shipped else {"half0": n_tokens, "half1": n_tokens})


@dataclass(frozen=True, kw_only=True)
class TextLatents:
    """What the SAEs make of the study's texts, in the order they were given.

    `pooled` [SAE][text, d_sae] mean latents over each response; `resid` [text, d_model]; `explained_variance` [SAE] on
    the responses' tokens; `top` per SAE the strongest tokens of each latent: `latent, rank, value, token, text`.
    """

    pooled: tuple[np.ndarray, ...]
    resid: np.ndarray
    explained_variance: list[float]
    top: tuple[pd.DataFrame, ...]


class Top:
    """The `n` strongest (value, token, text) of every latent, kept while chunks pass by."""

    def __init__(self, d_sae: int, n: int):
        self.values = torch.full((n, d_sae), -1.0)
        self.tokens, self.texts = torch.zeros((n, d_sae), dtype=torch.long), torch.zeros((n, d_sae), dtype=torch.long)

    def add(self, latents: torch.Tensor, tokens: torch.Tensor, texts: torch.Tensor) -> None:
        """`latents` [token, d_sae] with each token's id and the text it belongs to."""
        best, where = latents.topk(min(len(self.values), len(latents)), dim=0)
        values = torch.cat([self.values, best.cpu()])
        self.values, order = values.topk(len(self.values), dim=0)
        self.tokens = torch.cat([self.tokens, tokens[where.cpu()]]).gather(0, order)
        self.texts = torch.cat([self.texts, texts[where.cpu()]]).gather(0, order)

    def table(self) -> pd.DataFrame:
        n, d_sae = self.values.shape
        rank, latent = np.mgrid[:n, :d_sae]
        table = pd.DataFrame({"latent": latent.ravel(), "rank": rank.ravel(), "value": self.values.numpy().ravel(),
                              "token": self.tokens.numpy().ravel(), "text": self.texts.numpy().ravel()})
        return table[table.value > 0].sort_values(["latent", "rank"]).reset_index(drop=True)


@torch.inference_mode()
def encode_texts(saes, shards: Shards, *, n_top: int = 5) -> TextLatents:
    """Encode the reply tokens of all texts (`lib.model.text_tokens`), a shard at a time, and pool the latents."""
    rows = shards.of("texts")
    n_texts, d_model = sum(row["n_texts"] for row in rows), shards.identity["d_model"]
    pooled, counts = [torch.zeros(n_texts, sae.cfg.d_sae) for sae in saes], torch.zeros(n_texts, 1)
    resid, tops = torch.zeros(n_texts, d_model), [Top(sae.cfg.d_sae, n_top) for sae in saes]
    error, total, square = np.zeros(len(saes)), torch.zeros(d_model, dtype=torch.float64), 0.0
    for row in tqdm(rows, desc="encoding", unit="shard", mininterval=2):
        arrays = {name: torch.from_numpy(array) for name, array in shards.load(row).items()}
        x, tokens, texts = arrays["resid"], arrays["tokens"].long(), arrays["texts"].long()
        for number, sae in enumerate(saes):
            latents = sae.encode(x.to(sae.device))
            error[number] += (sae.decode(latents).cpu() - x).square().sum().item()
            pooled[number].index_add_(0, texts, latents.cpu())
            tops[number].add(latents, tokens, texts)
        resid.index_add_(0, texts, x)
        counts.index_add_(0, texts, torch.ones(len(texts), 1))
        total, square = total + x.double().sum(0), square + x.double().square().sum().item()
    variance = square - (total.square().sum() / counts.sum()).item()
    return TextLatents(pooled=tuple((each / counts).numpy() for each in pooled), resid=(resid / counts).numpy(),
                       explained_variance=list(1 - error / variance), top=tuple(top.table() for top in tops))
