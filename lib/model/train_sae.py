"""Retrain a study's shipped sparse autoencoders from nothing: `python -m lib.model.train_sae --study NAME`.

The corpus's activations are extracted once into the cache (resumable), then both seeds and the Gaussian null are
trained, resumable too. The defaults are the recipe of what ships.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from lib.errors import BadInput
from lib.model import sae, weights
from lib.model.corpus import CONTEXT, extract_corpus, pieces
from lib.model.sae_gates import ce_recovered
from lib.model.sae_training import Recipe, train_pair
from lib.params import load_params
from lib.store import sha256, to_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Recipe()


@app.command()
def main(
    study: Annotated[str, typer.Option(help="Study (a file in params/).")] = "smollm2-135m",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; lib/data/sae/<study> by default.")] = None,
    n_tokens: Annotated[int, typer.Option(help="Corpus tokens a seed.")] = 245_760,
    n_samples: Annotated[int, typer.Option(help="Training tokens a seed, repeats counted.")] = DEFAULT.n_samples,
    d_sae: Annotated[int, typer.Option(help="Latents.")] = DEFAULT.d_sae,
    k: Annotated[int, typer.Option(help="Latents active on a token.")] = DEFAULT.k,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = DEFAULT.lr,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk or jumprelu.")] = DEFAULT.architecture,
    n_ce: Annotated[int, typer.Option(help="Held-out tokens for the cross-entropy recovered.")] = 4_000,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Extract the corpus, train the pair and its nulls, and save it where the study looks for it."""
    if threads:
        torch.set_num_threads(threads)
    params = load_params(study)
    model, tokenizer, about = weights.load(params.model)
    shards = extract_corpus(model, tokenizer, about=about, template=params.model.template, layer=params.layer,
                            n_tokens={"heldout": 16_384, "half0": n_tokens, "half1": n_tokens})
    held = list(pieces(tokenizer, params.model.template, context=CONTEXT, seed=0, splits=("heldout",)))
    mean = shards.split("heldout", 16_000).mean(0)

    def ce(saes):
        return ce_recovered(model, held, params.layer, saes, mean, n_tokens=n_ce)
    recipe = Recipe(d_sae=d_sae, k=k, lr=lr, n_samples=n_samples, architecture=architecture)
    checkpoints = weights.cache_dir() / f"sae-{sha256(to_json([shards.identity, vars(recipe), n_tokens]))[:12]}"
    pair = train_pair(shards, recipe, about=sae.identity(params.model, params.layer), checkpoints=checkpoints, ce=ce,
                      tokens_per_latent=params.thresholds.clusters.tokens_per_latent_min, device=str(model.device))
    folder = out or sae.SHIPPED / study
    sae.save_pair(pair, folder)
    print({name: [round(value, 3) for value in values] for name, values in pair.about["heldout"].items()}, "saved to", folder.name)


def cli() -> int:
    """Exit codes as the runner's: 2 for bad input, 130 when interrupted (run the same command to go on)."""
    try:
        app(standalone_mode=False)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
