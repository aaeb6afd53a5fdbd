"""Training of sparse autoencoders with SAELens's own trainer, on activations that are cached once.

`SAETrainer` takes any iterator of activation batches. Ours reads the shards in an order drawn from the seed and mixes
them with SAELens's `mixing_buffer`, so a buffer of a few shards is all that is in memory. The order depends on the
seed alone: a resumed training skips what it has seen and ends with the same weights as an undisturbed one.

A pair has two seeds (initialisation and order) on disjoint halves of the corpus, which is what makes their agreement
mean something. Beside it two nulls: the untrained pair, and a pair trained in the same way on Gaussian tokens with the
corpus's mean and covariance, which have no sparse structure to find.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors import safe_open
from safetensors.torch import save as save_safetensors

from lib.errors import BadInput
from lib.model.sae_gates import measure
from lib.model.shards import Shards
from lib.stats.gates import mmcs
from lib.store import sha256, to_json, write_atomic

Blocks = Sequence[Callable[[], np.ndarray]]
CURVE = ["step", "tokens", "loss", "explained_variance", "l0", "dead"]
LOG_EVERY = 50  # steps
NORM_BATCHES = 50  # batches from which SAELens estimates the scale of the activations


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the weights depend on beside the data and the seed. `n_samples`: training tokens, repeats counted."""

    architecture: str = "topk"
    d_sae: int = 768
    k: int = 24
    lr: float = 3e-3
    batch: int = 512
    n_samples: int = 1_500_000
    warm_up: float = 0.02
    decay: float = 0.2
    dead_window: int = 200
    l0_coefficient: float = 1.0
    buffer: int = 65_536

    @property
    def n_steps(self) -> int:
        return self.n_samples // self.batch

    def check(self, *, d_model: int, n_tokens: int, tokens_per_latent: int) -> None:
        """Raise BadInput where no sensible autoencoder can come out."""
        if self.architecture not in ("topk", "batchtopk", "jumprelu"):
            raise BadInput(f"architecture {self.architecture!r}: is none of topk, batchtopk, jumprelu")
        if self.d_sae < d_model:
            raise BadInput(f"d_sae {self.d_sae}: smaller than the model's width {d_model}; choose at least that")
        if not 0 < self.k <= self.d_sae:
            raise BadInput(f"k {self.k}: must lie between 1 and d_sae {self.d_sae}")
        if n_tokens < tokens_per_latent * self.d_sae:
            raise BadInput(f"{n_tokens} training tokens a seed: too few for d_sae {self.d_sae} "
                           f"(needs {tokens_per_latent} a latent); raise n_tokens or lower d_sae")


def build(recipe: Recipe, d_in: int, *, seed: int, about: dict, device: str = "cpu"):
    """A training SAE, initialised from `seed`; `about` goes into its SAELens metadata."""
    common = {"d_in": d_in, "d_sae": recipe.d_sae, "device": device, "metadata": SAEMetadata(**about),
              "normalize_activations": "expected_average_only_in"}
    torch.manual_seed(seed)
    if recipe.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(k=recipe.k, **common))
    if recipe.architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=recipe.k, **common))
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(
        l0_coefficient=recipe.l0_coefficient, l0_warm_up_steps=recipe.n_steps // 4, **common))


def inference(training) -> SAE:
    """The inference form, its weights rounded to float16 as they are shipped (and kept in float32 for arithmetic)."""
    state = {name: tensor.detach().clone() for name, tensor in training.state_dict().items()}
    training.process_state_dict_for_saving_inference(state)
    config = training.cfg.get_inference_sae_cfg_dict() | {"normalize_activations": "none", "device": "cpu"}
    sae = SAE.from_dict(config)
    sae.load_state_dict({name: tensor.half().float().cpu() for name, tensor in state.items()})
    return sae.eval().requires_grad_(False)


def stream(blocks: Blocks, *, batch: int, buffer: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches `[batch, d_model]`, the blocks read in a fresh order each epoch; it depends on `seed` alone."""
    def endless():
        rng = np.random.default_rng(seed)
        while True:
            for number in rng.permutation(len(blocks)):
                tokens = torch.from_numpy(np.asarray(blocks[number](), np.float32))
                if not torch.isfinite(tokens).all():
                    raise BadInput("activations of the corpus hold NaN or infinite values; extract them again")
                yield tokens
    torch.manual_seed(seed)  # mixing_buffer draws from torch's global generator, and nothing else does in training
    return mixing_buffer(max(buffer, batch), batch, endless())


class Trainer(SAETrainer):
    """SAELens's trainer with a bar that shows what matters, a curve, and checkpoints without pickle."""

    def __init__(self, cfg, sae, data_provider, *, mark: dict, checkpoint: Path | None, every: int):
        super().__init__(cfg, sae, data_provider)
        self.mark, self.checkpoint, self.every, self.curve = mark, checkpoint, every, []

    def _update_pbar(self, step_output, pbar, update_interval: int = LOG_EVERY):
        if self.n_training_steps % update_interval:
            return
        log = self.build_train_step_log_dict(step_output, self.n_training_samples)
        row = {"step": self.n_training_steps, "tokens": self.n_training_samples, "loss": log["losses/overall_loss"],
               "explained_variance": log["metrics/explained_variance"], "l0": log["metrics/l0"],
               "dead": log["sparsity/dead_features"] / self.sae.cfg.d_sae}
        self.curve.append(row)
        pbar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "explained_variance", "l0", "dead")})
        pbar.update(update_interval * self.cfg.train_batch_size_samples)
        if self.checkpoint and self.n_training_steps % self.every == 0:
            write_atomic(self.checkpoint, self.state())

    def state(self) -> bytes:
        """Weights, moments and counters as one safetensors file."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": tensor for name, tensor in moments.items()}
        tensors |= {"fired": self.n_forward_passes_since_fired, "frequency": self.act_freq_scores}
        about = {"mark": self.mark, "steps": self.n_training_steps, "samples": self.n_training_samples,
                 "scale": self.activation_scaler.scaling_factor, "window": self.n_frac_active_samples, "curve": self.curve}
        return save_safetensors({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
                                {"about": to_json(about).decode()})

    def resume(self) -> None:
        """Go on from the checkpoint: load the state, and let schedule and data catch up."""
        with safe_open(self.checkpoint, "pt", device=self.cfg.device) as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if about["mark"] != self.mark:
            raise BadInput(f"{self.checkpoint.name}: checkpoint of another recipe, seed or corpus; remove it to start afresh")
        self.sae.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("sae.")})
        moments: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.n_forward_passes_since_fired, self.act_freq_scores = tensors["fired"], tensors["frequency"]
        self.n_training_steps, self.n_training_samples, self.n_frac_active_samples = about["steps"], about["samples"], about["window"]
        self.activation_scaler.scaling_factor, self.curve = about["scale"], about["curve"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule runs ahead of the optimiser on purpose
            for _ in range(self.n_training_steps):
                self.lr_scheduler.step()
                for scheduler in self.coefficient_schedulers.values():
                    scheduler.step()
        for _ in range(NORM_BATCHES + self.n_training_steps):
            next(self.data_provider)


def train(blocks: Blocks, recipe: Recipe, *, seed: int, about: dict, source: str = "", checkpoint: Path | None = None,
          every: int = 500, device: str = "cpu") -> tuple[SAE, pd.DataFrame]:
    """One SAE and its training curve `step, tokens, loss, explained_variance, l0, dead`.

    `source` names the data for the checkpoint, which is written every `every` steps and gone on from where it exists.
    """
    d_in = blocks[0]().shape[1]
    sae = build(recipe, d_in, seed=seed, about=about, device=device)
    warm, decay = int(recipe.n_steps * recipe.warm_up), int(recipe.n_steps * recipe.decay)
    config = SAETrainerConfig(
        total_training_samples=recipe.n_steps * recipe.batch, train_batch_size_samples=recipe.batch, lr=recipe.lr, lr_end=recipe.lr,
        lr_warm_up_steps=warm, lr_decay_steps=decay, dead_feature_window=recipe.dead_window, device=device,
        n_batches_for_norm_estimate=NORM_BATCHES, logger=LoggingConfig(log_to_wandb=False))
    data = stream(blocks, batch=recipe.batch, buffer=recipe.buffer, seed=seed)
    mark = {"recipe": asdict(recipe), "seed": seed, "source": source}
    trainer = Trainer(config, sae, data, mark=mark, checkpoint=checkpoint, every=every)
    if checkpoint and checkpoint.exists():
        trainer.resume()
    return inference(trainer.fit()), pd.DataFrame(trainer.curve, columns=CURVE)


def shard_blocks(shards: Shards, split: str) -> Blocks:
    """The shards of a split, each read when its turn comes."""
    return [partial(lambda row: shards.load(row)["resid"], row) for row in shards.of(split)]


def gaussian_blocks(tokens: np.ndarray, *, n_blocks: int, block: int, seed: int) -> Blocks:
    """Blocks of Gaussian tokens with the mean and covariance of `tokens` [token, d_model]; block i is always the same."""
    mean, covariance = tokens.mean(0), np.cov(tokens, rowvar=False).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)

    def draw(number: int) -> np.ndarray:
        return mean + np.random.default_rng([seed, number]).standard_normal((block, len(mean)), np.float32) @ root
    return [partial(draw, number) for number in range(n_blocks)]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two SAEs of disjoint halves (`saes`), their curves and what is known of them (`about`: the sidecar)."""

    saes: tuple[SAE, ...]
    curve: pd.DataFrame
    about: dict


def train_pair(shards: Shards, recipe: Recipe, *, about: dict, tokens_per_latent: int, seeds: tuple[int, int] = (0, 1),
               nulls: bool = True, n_check: int = 16_000, ce: Callable | None = None, checkpoints: Path | None = None,
               device: str = "cpu") -> Pair:
    """Train both seeds, and the nulls' pairs where asked for; measure all on the same held-out tokens.

    `ce(saes)` measures the cross-entropy recovered (`lib.model.sae_gates.ce_recovered`) of the nulls too, where given.
    """
    halves = ("half0", "half1")
    n_tokens = [shards.n_tokens(half) for half in halves]
    recipe.check(d_model=shards.identity["d_model"], n_tokens=min(n_tokens), tokens_per_latent=tokens_per_latent)
    heldout = shards.split("heldout", n_check)
    hook = {"model_name": about["model_id"], "hook_name": about["hook_name"], "dataset_path": str(shards.identity["corpus"])}

    def fit(name: str, sources: list[Blocks]) -> tuple[list[SAE], pd.DataFrame]:
        saes, curves = [], []
        for seed, blocks, half in zip(seeds, sources, halves, strict=True):
            path = checkpoints / f"{name}-seed{seed}.safetensors" if checkpoints else None
            source = f"{name}:{half}:{sha256(to_json(shards.of(half)))}"
            sae, curve = train(blocks, recipe, seed=seed, about=hook, source=source, checkpoint=path, device=device)
            saes.append(sae), curves.append(curve.assign(seed=seed, data=name))
        return saes, pd.concat(curves)

    saes, curve = fit("corpus", [shard_blocks(shards, half) for half in halves])
    trained = measured(saes, heldout, ce)
    in_sample = [measure([sae], shards.split(half, n_check))["explained_variance"][0] for sae, half in zip(saes, halves, strict=True)]
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    found = {"recipe": asdict(recipe), "seeds": list(seeds), "corpus": shards.identity, "train_tokens": n_tokens, "device": where,
             "train_explained_variance": in_sample, "heldout": trained, "nulls": {}}
    untrained = [inference(build(recipe, heldout.shape[1], seed=seed, about=hook)) for seed in seeds]
    found["mmcs_with_own_start"] = [mmcs(a.W_dec.numpy(force=True), b.W_dec.numpy(force=True)) for a, b in zip(saes, untrained, strict=True)]
    found["nulls"]["untrained"] = measured(untrained, heldout, ce)
    if nulls:
        rows = shards.of("half0")
        sources = [gaussian_blocks(heldout, n_blocks=len(rows), block=rows[0]["n_tokens"], seed=seed + 100) for seed in seeds]
        gaussian, more = fit("gaussian", sources)
        curve = pd.concat([curve, more])
        found["nulls"]["gaussian"] = measured(gaussian, heldout, ce)
    return Pair(saes=tuple(saes), curve=curve, about=about | found)


def measured(saes: list[SAE], heldout: np.ndarray, ce: Callable | None) -> dict[str, list[float]]:
    """What the gates rest on, a list of values each, without the latents' masses."""
    found = measure(saes, heldout)
    return {name: found[name] for name in ("explained_variance", "l0", "dead")} | {"mmcs": [found["mmcs"]]} | (ce(saes) if ce else {})
