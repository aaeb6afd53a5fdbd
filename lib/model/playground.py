"""The playground: a prompt answered twice, as the model is and under an intervention, side by side, token by token.

Each token is coloured by the projection of its residual on the direction (before this step's edit), in units of the
layer's mean residual norm. All text is escaped: neither what is typed nor what the model says becomes markup.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

import ipywidgets as widgets
import numpy as np
import torch

from lib.errors import BadInput
from lib.model import prompts, steering, weights
from lib.model.interventions import COEFF_MAX, Edit, logits_of, unit
from lib.store import Study

CALIBRATION = ("I lost my keys again this morning.", "My sister got the job she wanted!", "The printer at work keeps jamming.",
               "I have not slept well for weeks.", "We are moving to another town in May.", "My soup turned out far too salty.",
               "My friend does not answer my messages.", "I finally finished the book.")
MAX_NEW_TOKENS = 40


@dataclass
class Side:
    """A reply as it grows: its tokens and each one's projection."""

    tokens: list[int] = field(default_factory=list)
    projections: list[float] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is done to the model: `kind` steer or ablate, along `direction` [d_model], at `layer`, with `coeff`."""

    direction: np.ndarray
    layer: int
    coeff: float
    kind: str = "steer"


class Player:
    """Holds the model and, by layer, what interventions need: mean residual norm and mean residual of the calibration prompts."""

    def __init__(self, model, tokenizer, template: str):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.ends = steering.ends_of(model, tokenizer)
        self.texts = [prompts.prompt_text(tokenizer, template, text) for text in CALIBRATION]
        self._about: dict[int, tuple[float, np.ndarray]] = {}
        self._band: tuple[float, float] | None = None

    def about(self, layer: int) -> tuple[float, np.ndarray]:
        """`(scale, mean [d_model])` at a layer, measured once."""
        if layer not in self._about:
            resid = steering.prompt_resid(self.model, self.tokenizer, self.texts, layer)
            self._about[layer] = float(np.linalg.norm(resid, axis=1).mean()), resid.mean(0)
        return self._about[layer]

    def band(self, max_new_tokens: int = 16) -> tuple[float, float]:
        """95% band of the log-perplexity ratio between unsteered replies and their mean."""
        if self._band is None:
            made = steering.generate(self.model, self.tokenizer, self.texts, lambda start: {}, max_new_tokens=max_new_tokens)
            low, high = np.quantile(made.log_ppl[0] - made.log_ppl[0].mean(), [0.025, 0.975])
            self._band = float(low), float(high)
        return self._band

    def edits(self, choice: Choice) -> dict[int, Edit]:
        """Row 0 as it is, row 1 under the intervention."""
        scale, mean = self.about(choice.layer)
        if choice.kind == "ablate":
            return {choice.layer: Edit(kind="ablate", directions=choice.direction, coeffs=np.array([0.0, 1.0]), mean=mean)}
        return {choice.layer: Edit(kind="add", directions=choice.direction, coeffs=np.array([0.0, choice.coeff]), scale=scale)}

    def play(self, scenario: str, choice: Choice, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[tuple[Side, Side]]:
        """The two sides, after each token. BadInput where the scenario is empty or too long, or the choice impossible."""
        ids = steering.prompt_ids(self.model, self.tokenizer, prompts.prompt_text(self.tokenizer, self.template, scenario), max_new_tokens=max_new_tokens)
        scale = self.about(choice.layer)[0]
        w = torch.as_tensor(unit(choice.direction) / scale, dtype=self.model.dtype, device=self.model.device)
        sides, seen = (Side(), Side()), []
        for logits in steering.stream(self.model, ids, self.edits(choice), max_new_tokens=max_new_tokens,
                                      watch=(choice.layer, lambda resid: seen.append((resid[:, -1] @ w).tolist()))):
            for side, values in zip(sides, zip(*seen[1:], strict=True), strict=False):
                side.projections = list(values)
            for side, token in zip(sides, logits.argmax(-1).tolist(), strict=True):
                side.done = side.done or token in self.ends
                if not side.done:
                    side.tokens.append(token)
            yield sides
            if all(side.done for side in sides):
                return

    def log_ratio(self, scenario: str, sides: tuple[Side, Side]) -> float:
        """Log-perplexity of the steered reply over the unsteered one's, under the model as it is."""
        if not all(side.tokens for side in sides):
            return float("nan")
        ids = steering.prompt_ids(self.model, self.tokenizer, prompts.prompt_text(self.tokenizer, self.template, scenario), max_new_tokens=1)
        plain, steered = steering.log_ppl(self.model, ids, [side.tokens for side in sides])
        return steered - plain

    @torch.inference_mode()
    def vocabulary(self, direction: np.ndarray, n: int = 8) -> tuple[list[str], list[str]]:
        """Tokens whose unembedding has the largest and the smallest product with the direction."""
        w = torch.as_tensor(unit(direction), dtype=self.model.dtype, device=self.model.device)
        order = logits_of(self.model, w).argsort().tolist()
        top, bottom = order[-n:][::-1], order[:n]
        return [self.tokenizer.decode([i]) for i in top], [self.tokenizer.decode([i]) for i in bottom]

    def html(self, side: Side) -> str:
        """A reply as coloured, escaped HTML: orange along the direction, blue against it."""
        spans = []
        for i, text in enumerate(pieces(self.tokenizer, side.tokens)):
            value = side.projections[i] if i < len(side.projections) else 0.0
            colour = "213,94,0" if value > 0 else "0,114,178"
            spans.append(f'<span style="background:rgba({colour},{min(abs(value) * 2, 0.8):.2f})" title="{value:+.2f}">{escape(text)}</span>')
        return f'<div style="white-space:pre-wrap;line-height:1.7;min-height:8em">{"".join(spans)}</div>'


def pieces(tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens appears with its last one."""
    texts = [tokenizer.decode(tokens[:i], skip_special_tokens=True).rstrip("\ufffd") for i in range(len(tokens) + 1)]
    return [after[len(before):] for before, after in pairwise(texts)]


Loaded = tuple[Player, dict[str, tuple[np.ndarray, int]]]


def load(study: str, *, seed: int = 0) -> Loaded:
    """The player of a study's model, and `{name: (direction, layer it was fitted at)}`; a random one where there is no other."""
    home = Study(study, "00_playground")
    path, params = "causality/directions.safetensors", home.params
    vectors = home.load_tensors(path) if home.has(path) else {}
    names = dict.fromkeys(key.split("/")[0] for key in vectors)
    found = {name: (np.mean([v for key, v in vectors.items() if key.split("/")[0] == name], axis=0), params.layer) for name in names}
    found["random"] = np.random.default_rng(seed).standard_normal(params.model.d_model), params.layer
    model, tokenizer, _ = weights.load(params.model)
    player = Player(model, tokenizer, params.model.template)
    player.about(params.layer), player.band()
    return player, found


class Panel:
    """The page: choices above, the two replies below. `studies`: names to pick from; the first one is loaded."""

    def __init__(self, studies: list[str], *, seed: int = 0):
        self.seed = seed
        self.study = widgets.Dropdown(options=studies, description="Model")
        self.direction = widgets.Dropdown(description="Direction")
        self.layer = widgets.IntSlider(description="Layer", min=0, continuous_update=False)
        self.kind = widgets.ToggleButtons(options=["steer", "ablate"], description="What")
        self.coeff = widgets.FloatSlider(value=0.2, min=-COEFF_MAX, max=COEFF_MAX, step=0.05, description="Coeff", continuous_update=False)
        self.scenario = widgets.Textarea(placeholder="Type what a person says", layout={"width": "98%", "height": "4em"})
        self.button = widgets.Button(description="Answer", button_style="primary")
        self.status, self.words, self.plain, self.edited = (widgets.HTML() for _ in range(4))
        for widget, name in ((self.scenario, "scenario"), (self.button, "go"), (self.status, "status"), (self.plain, "plain"),
                             (self.edited, "edited"), (self.words, "words")):
            widget.add_class(f"playground-{name}")
        self.study.observe(self._load, "value")
        self.direction.observe(self._describe, "value")
        self.button.on_click(self._answer)
        self._load()

    @property
    def widget(self) -> widgets.Widget:
        column = {"width": "50%", "padding": "0 1em 0 0"}
        sides = [widgets.VBox([widgets.HTML(f"<b>{title}</b>"), out], layout=column)
                 for title, out in (("as it is", self.plain), ("under the intervention", self.edited))]
        return widgets.VBox([widgets.HBox([self.study, self.direction]), widgets.HBox([self.layer, self.coeff]), self.kind, self.scenario,
                             self.button, self.status, widgets.HBox(sides), self.words])

    def _load(self, _=None) -> None:
        self.status.value = f"loading {escape(self.study.value)} …"
        try:
            self.player, self.directions = load(self.study.value, seed=self.seed)
        except BadInput as error:
            self.status.value = escape(str(error))
            return
        self.layer.max = len(self.player.model.get_decoder().layers) - 1
        self.direction.options = list(self.directions)
        self.direction.value = next(iter(self.directions))
        self._describe()
        self.status.value = f"{escape(self.study.value)} is ready"

    def _describe(self, _=None) -> None:
        if self.direction.value is None:  # while the options change
            return
        direction, self.layer.value = self.directions[self.direction.value]
        top, bottom = self.player.vocabulary(direction)
        self.words.value = f"<b>{escape(self.direction.value)}</b> raises {escape(', '.join(map(repr, top)))} and lowers {escape(', '.join(map(repr, bottom)))}"

    def _answer(self, _) -> None:
        self.button.disabled, self.status.value = True, "…"
        try:
            choice = Choice(direction=self.directions[self.direction.value][0], layer=self.layer.value, coeff=self.coeff.value, kind=self.kind.value)
            for sides in self.player.play(self.scenario.value, choice):
                self.plain.value, self.edited.value = (self.player.html(side) for side in sides)
            (low, high), ratio = self.player.band(), self.player.log_ratio(self.scenario.value, sides)
            verdict = "coherent" if low <= ratio <= high else "outside the band: its effect would not count"
            self.status.value = f"log-perplexity ratio {ratio:+.2f}; band of unsteered replies [{low:+.2f}, {high:+.2f}]: {verdict}"
        except BadInput as error:
            self.status.value = escape(str(error))
        finally:
            self.button.disabled = False
