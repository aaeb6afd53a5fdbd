"""What is asked of the models: prompt files, the JSON schema of each answer, and the plan of scenarios.

Prompts are Markdown in `prompts/`, a system part and a user part; `$rubric` is `rubric.md`. There is no temperature to
turn, so variety comes from the text: each slot of the plan has its own setting, topic, voice and particular, drawn from
the seed and the slot's number alone. A longer plan begins with the shorter one.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

import numpy as np

from lib.text.api import Request
from lib.text.dataset import CONTEXTS, LABELS

FOLDER = Path(__file__).parent
MAX_TOKENS = 2000  # several times the longest answer, so that a thinking model's thoughts fit too
TYPES = LABELS["empathy"]
DOMAINS = ("bereavement", "physical_health", "mental_health", "family", "partnership", "friendship", "work", "study", "money",
           "housing", "technology", "caregiving", "identity", "animals", "leisure", "neighbourhood")
SETTINGS = {
    "crisis_support": "crisis support: the writer, or somebody close, is in danger or at the end of their strength",
    "emotional_disclosure": "emotional disclosure: the writer confides something that matters",
    "frustration": "frustration: something keeps going wrong and the writer lets off steam",
    "casual_conversation": "casual conversation: small news, good or bad, told in passing",
    "technical_assistance": "technical assistance: something technical does not work, and it matters to the writer",
}
EMOTIONS = ("joy", "anger", "gratitude", "pride", "awe", "fear", "relief", "longing", "envy", "shame")
VOICES = (
    "a retired bus driver who writes full sentences", "a student who types fast and skips capitals", "a night-shift nurse",
    "a father of twins, dictating", "a shy apprentice", "a widow of eighty", "a teenager, honest and blunt", "a farmer",
    "somebody who moved country a year ago", "a dry-humoured accountant", "a choir singer in her fifties", "a young teacher",
    "a delivery rider between two jobs", "a grandfather raising a child", "an office cleaner who reads a lot", "a carpenter")
PARTICULARS = (
    "a spare key", "a Tuesday evening", "a school coat", "an unread letter", "a borrowed ladder", "a train at dawn", "a cracked mug",
    "a waiting list", "a neighbour's dog", "an allotment", "a voicemail", "a wedding invitation", "a kitchen timer", "wet shoes",
    "a photo album", "a bicycle lock", "a lunch box", "a village fair", "a hospital corridor", "a recipe card", "an old laptop",
    "a garden wall", "a birthday candle", "a bank statement", "a football boot", "a sewing machine", "a ferry", "a piano stool")
MANNERS = (
    "open the affective reply with an object from the message", "open the cognitive reply with a short sentence",
    "let the instrumental reply begin with when, not what", "let one reply begin with \"I\"", "let one reply ask a real question",
    "let one reply begin in the middle of a thought", "end one reply on its shortest sentence", "use no comma in first sentences",
    "let the replies name different particulars of the message", "let the cognitive reply be the plainest in tone")


@dataclass(frozen=True, kw_only=True)
class Brief:
    """One sort of request. `expected`: output tokens of a usual answer, for the estimate."""

    prompt: str
    fields: tuple[str, ...]
    expected: int


BRIEFS = {
    "scenario": Brief(prompt="scenario", fields=("scenario", "reason", "feeling", "action"), expected=120),
    "plain": Brief(prompt="plain", fields=("safety_step", *TYPES), expected=320),
    "counter": Brief(prompt="counter", fields=TYPES, expected=300),
    "rewrite": Brief(prompt="rewrite", fields=TYPES, expected=300),
    "judge": Brief(prompt="judge", fields=("type", "naturalness"), expected=25),
    "stripped": Brief(prompt="stripped", fields=("scenario", *LABELS["valence_stripped"]), expected=340),
    "stripped_counter": Brief(prompt="controls_counter", fields=LABELS["valence_stripped"], expected=300),
    "non_empathy": Brief(prompt="non_empathy", fields=("scenario", *LABELS["non_empathy"]), expected=340),
    "non_empathy_counter": Brief(prompt="controls_counter", fields=LABELS["non_empathy"], expected=300),
    "formality": Brief(prompt="formality", fields=("scenario", *LABELS["formality"]), expected=240),
}
FIELD_TYPES = {"type": {"type": "string", "enum": [*TYPES, "unclear"]}, "naturalness": {"type": "integer", "enum": [1, 2, 3, 4, 5]}}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place in the plan: what its scenario is to be about."""

    id: str
    number: int
    context: str
    domain: str
    person: str
    valence: str


def plan(n: int, *, seed: int, prefix: str = "g") -> list[Slot]:
    """`n` slots stratified over context, domain, who is affected and weight; `plan(m)` begins with `plan(n)`."""
    slots = []
    for i in range(n):
        domains = np.random.default_rng([seed, i // len(DOMAINS)]).permutation(DOMAINS)
        slots.append(Slot(id=f"{prefix}{i + 1:03d}", number=i, context=CONTEXTS[i % len(CONTEXTS)],
                          domain=str(domains[i % len(DOMAINS)]), person=("self", "other")[i // 5 % 2],
                          valence=("strong", "mild")[i // 10 % 2]))
    return slots


def variety(slot: Slot, *, seed: int, attempt: int) -> dict[str, str]:
    """Voice, particular and manner for one request, the same at every run."""
    rng = np.random.default_rng([seed, slot.number, attempt])
    return {"voice": str(rng.choice(VOICES)), "particular": str(rng.choice(PARTICULARS)), "manner": str(rng.choice(MANNERS))}


@cache
def prompt(name: str) -> tuple[Template, Template]:
    """System and user template of a prompt file."""
    text = (FOLDER / "prompts" / f"{name}.md").read_text(encoding="utf-8").removeprefix("# System\n")
    system, user = text.split("\n# User\n")
    return Template(system), Template(user)


@cache
def rubric() -> str:
    return (FOLDER / "rubric.md").read_text(encoding="utf-8")


def request(name: str, *, model: str, attempt: int = 0, fault: str = "", **values: str) -> Request:
    """The request of one brief. A later attempt says what was wrong with the one before, so it is another request."""
    brief, (system, user) = BRIEFS[name], prompt(BRIEFS[name].prompt)
    again = f"Attempt {attempt + 1}: the last answer was not used ({fault}). Write a new one." if attempt else ""
    properties = {field: FIELD_TYPES.get(field, {"type": "string"}) for field in brief.fields}
    schema = {"type": "object", "properties": properties, "required": list(brief.fields), "additionalProperties": False}
    block = {"type": "text", "text": system.safe_substitute(rubric=rubric()).strip(), "cache_control": {"type": "ephemeral"}}
    content = user.substitute(values, again=again).strip()
    return Request({"model": model, "max_tokens": MAX_TOKENS, "system": [block],
                    "messages": [{"role": "user", "content": content}],
                    "output_config": {"format": {"type": "json_schema", "schema": schema}}})


def safety(context: str, step: str = "") -> str:
    """The line about safety in a prompt: crisis items carry one short step, in the same words in every reply."""
    if context != "crisis_support":
        return ""
    if step:
        return f"This is a crisis message: each reply contains exactly this sentence: {step}"
    return ("This is a crisis message: each reply contains the same short safety sentence in the same words (give it as safety_step), "
            "no method details, and nothing a clinician would wince at.")
