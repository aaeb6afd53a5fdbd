"""Retrain a study's shipped sparse autoencoders from nothing: `python -m lib.model.train_sae --study NAME`.

The corpus's activations are extracted once into the cache (resumable), then both seeds and the Gaussian null are
trained, resumable too. The defaults are the recipe of what ships. With `--sweep` a recipe is trained without its null
and becomes a row of `sweep.csv`; nothing else is saved.
"""

import ast
import io
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from filelock import FileLock

from lib.cli import exit_code, leave
from lib.files import sha256, to_json, write_atomic
from lib.model import sae, weights
from lib.model.corpus import CONTEXT, extract_corpus, pieces
from lib.model.sae_gates import ce_recovered
from lib.model.sae_training import Pair, Recipe, train_pair
from lib.params import Params, load_params
from lib.seals import read_sealed
from lib.stages import defaults

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RECIPE = ("architecture", "d_sae", "k", "lr", "batch", "n_samples")
HELDOUT = 16_000  # tokens the gates are measured on
TOLERANCE = 0.03  # of each held-out value, between a retraining on another machine and what ships


def stage_options(params: Params) -> dict:
    """Recipe and corpus of a study: its own params over the defaults of the notebook that trains where no SAE fits."""
    known = {name: ast.literal_eval(info["default"]) for name, info in defaults("04_sae").items()}
    known |= params.stages.get("04_sae", {})
    return {name: known[name] for name in ("architecture", "d_sae", "k", "n_samples", "n_tokens", "corpus_name")}


def sweep_row(pair: Pair, minutes: float) -> dict:
    """One configuration: recipe, tokens, the worse seed's gates on held-out tokens, cross-seed agreement."""
    held, about = pair.about["heldout"], pair.about
    gap = max(a - b for a, b in zip(about["train_explained_variance"], held["explained_variance"], strict=True))
    return {**{name: about["recipe"][name] for name in RECIPE}, "n_tokens": min(about["train_tokens"]),
            "device": about["device"], "mmcs": held["mmcs"][0], "explained_variance": min(held["explained_variance"]),
            "train_test_gap": gap, "dead": max(held["dead"]), "minutes": minutes}


def add_row(path: Path, row: dict) -> pd.DataFrame:
    """The table in `path` with one more configuration; one that was there is replaced. Sweeps may run side by side."""
    key, text = (*RECIPE, "n_tokens", "device"), io.StringIO()
    with FileLock(weights.cache_dir() / "sweep.lock"):
        rows = pd.read_csv(path).to_dict("records") if path.exists() else []
        table = pd.DataFrame([*(old for old in rows if any(old[name] != row[name] for name in key)), row])
        table.to_csv(text, index=False, float_format="%.6g")
        write_atomic(path, text.getvalue().encode())
    return table


def differences(found: dict, shipped: dict) -> list[str]:
    """Held-out values of the worse seed that two trainings of one recipe do not share within `TOLERANCE`, in words."""
    worst = {"explained_variance": min, "ce_recovered": min, "mmcs": min, "dead": max}
    pairs = {name: (pick(found["heldout"][name]), pick(shipped["heldout"][name])) for name, pick in worst.items()}
    return [f"{name} {new:.3f}, shipped {old:.3f}" for name, (new, old) in pairs.items() if abs(new - old) > TOLERANCE]


@app.command()
def main(
    study: Annotated[str, typer.Option(help="Study (a file in params/).")] = "smollm2-135m",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; lib/data/sae/<study> by default.")] = None,
    n_tokens: Annotated[int | None, typer.Option(help="Corpus tokens a seed; like all below, the study's own by default.")] = None,
    n_samples: Annotated[int | None, typer.Option(help="Training tokens a seed, repeats counted.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Latents.")] = None,
    k: Annotated[int | None, typer.Option(help="Latents active on a token.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of a step.")] = None,
    architecture: Annotated[str | None, typer.Option(help="topk, batchtopk or jumprelu.")] = None,
    n_ce: Annotated[int, typer.Option(help="Held-out tokens for the cross-entropy recovered.")] = 4_000,
    sweep: Annotated[bool, typer.Option("--sweep", help="Only add this recipe to the table of configurations.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Extract the corpus, train the pair and its nulls, and save it where the study looks for it."""
    if threads:
        torch.set_num_threads(threads)
    params = load_params(study)
    given = {"n_tokens": n_tokens, "n_samples": n_samples, "d_sae": d_sae, "k": k, "lr": lr, "batch": batch, "architecture": architecture}
    options = stage_options(params) | {name: value for name, value in given.items() if value is not None}
    source, n_tokens = options.pop("corpus_name"), options.pop("n_tokens")
    recipe = Recipe(**options)
    start = time.monotonic()
    model, tokenizer, about = weights.load(params.model)
    shards = extract_corpus(model, tokenizer, about=about, template=params.model.template, layer=params.layer, corpus=source,
                            n_tokens={"heldout": HELDOUT, "half0": n_tokens, "half1": n_tokens})
    print(f"corpus: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    held = list(pieces(tokenizer, params.model.template, context=CONTEXT, seed=0, splits=("heldout",), corpus=source))
    mean = shards.split("heldout", HELDOUT).mean(0)

    def ce(saes):
        return ce_recovered(model, held, params.layer, saes, mean, n_tokens=n_ce)
    checkpoints = weights.cache_dir() / f"sae-{sha256(to_json([shards.identity, vars(recipe), n_tokens]))[:12]}"
    start = time.monotonic()
    pair = train_pair(shards, recipe, about=sae.identity(params.model, params.layer), checkpoints=checkpoints, nulls=not sweep,
                      tokens_per_latent=params.thresholds.clusters.tokens_per_latent_min, ce=None if sweep else ce, device=str(model.device))
    row = sweep_row(pair, (time.monotonic() - start) / 60)
    if sweep:
        print(add_row(sae.SHIPPED / "sweep.csv", row).to_string())
        return
    folder, before = out or sae.SHIPPED / study, sae.SHIPPED / study / "meta.json"
    shipped = read_sealed(before) if before.exists() else {}
    sae.save_pair(pair, folder)
    print({name: [round(value, 3) for value in values] for name, values in pair.about["heldout"].items()},
          f"saved to {folder.name}; training: {row['minutes']:.1f} minutes")
    if shipped.get("recipe") == pair.about["recipe"]:
        print("against what shipped:", "; ".join(differences(pair.about, shipped)) or f"every gate within {TOLERANCE}")


if __name__ == "__main__":
    leave(exit_code(app, "lib.model.train_sae"))
