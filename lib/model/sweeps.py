"""What causality measures on a scenario: replies scored under many edits at once, and their first-order response."""

from dataclasses import dataclass

import numpy as np

from lib.model import prompts
from lib.model.interventions import Edit, first_order, score_rows
from lib.stats.response import Response, response


@dataclass(frozen=True)
class Case:
    """One test scenario in one register: its replies as tokens, in the order of `labels`."""

    scenario_id: str
    register: str
    scenario: str
    texts: list[prompts.Encoded]
    replies: list[str]

    @property
    def start(self) -> int:
        return self.texts[0].start


def case_of(tokenizer, template: str, rows, labels: tuple[str, ...], *, instruction: str = "") -> Case:
    """The case of a text table's `rows`, all of one scenario and register."""
    first, by_label = rows.iloc[0], rows.set_index("label").response
    replies = [by_label[label] for label in labels]
    texts = [prompts.encode(tokenizer, template, first.scenario, reply, instruction=instruction) for reply in replies]
    return Case(first.scenario_id, first.register, first.scenario, texts, replies)


def told(tokenizer, template: str, case: Case, instruction: str) -> Case:
    """The same replies to the same scenario with an instruction in words behind it."""
    texts = [prompts.encode(tokenizer, template, case.scenario, reply, instruction=instruction) for reply in case.replies]
    return Case(case.scenario_id, case.register, case.scenario, texts, case.replies)


def score(model, case: Case) -> np.ndarray:
    """`[text]` log-probability per reply token without any edit."""
    return score_rows(model, case.texts, {})[0]


def responses(model, case: Case, layer: int, directions: dict[str, np.ndarray], *, mean: np.ndarray) -> dict[str, tuple[Response, Response]]:
    """`{name: (prompt only, everywhere)}` first-order responses to ablating each stack of directions [row, d_model]."""
    resid, gradient, prompt, replies = first_order(model, case.texts, layer)
    everywhere = prompt | replies.any(0)
    return {name: tuple(response(resid, gradient, where, replies, directions=stack, mean=mean) for where in (prompt, everywhere))
            for name, stack in directions.items()}


def ablated(model, case: Case, layer: int, groups: list[np.ndarray], *, mean: np.ndarray, where: str) -> list[np.ndarray]:
    """Change of log-probability `[row, text]` for each group of directions [row, d_model], at the energy of its first row."""
    first = 1 + np.cumsum([0, *(len(group) for group in groups[:-1])])
    match = np.concatenate([[0], *(np.full(len(group), at) for group, at in zip(groups, first, strict=True))])
    stack = np.vstack([groups[0][:1], *groups])
    edit = Edit(kind="ablate", directions=stack, coeffs=np.r_[0.0, np.ones(len(stack) - 1)], mean=mean, where=where, start=case.start, match=match)
    scores = score_rows(model, case.texts, {layer: edit})
    change = scores[1:] - scores[:1]
    return [change[at - 1:at - 1 + len(group)] for group, at in zip(groups, first, strict=True)]


def steered(model, case: Case, layer: int, directions: np.ndarray, coeffs: np.ndarray, *, scale: float, where: str = "all") -> np.ndarray:
    """Change of log-probability `[row, text]` under adding `coeffs [row]` of `directions [row, d_model]`."""
    edit = Edit(kind="add", directions=np.vstack([directions[:1], directions]), coeffs=np.r_[0.0, coeffs], scale=scale, where=where, start=case.start)
    scores = score_rows(model, case.texts, {layer: edit})
    return scores[1:] - scores[:1]
