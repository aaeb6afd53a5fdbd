"""The writer: asks for each slot of a stage, admits what is good, has it judged blind, and asks again for the rest.

The code reads as if every run began from nothing. Replies that are in the journal are not bought again, so a run that
was killed, or that came to the end of its budget, replays what it has and goes on where it stopped.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lib.params import Thresholds
from lib.text import admission
from lib.text.admission import Rejected
from lib.text.api import Request
from lib.text.briefs import BRIEFS, TYPES, Slot, request
from lib.text.dataset import LABELS
from lib.text.journal import Reply
from lib.text.purchases import Purchases

ATTEMPTS = 6
RESPONSES = frozenset(label for labels in LABELS.values() for label in labels)
Texts = dict[str, dict[str, str]]


class Stopped(Exception):
    """Nothing more can be bought in this run; what is admitted so far stands."""


@dataclass
class Writer:
    """Fills `draft[stage][slot id]` with admitted fields, stage by stage."""

    purchases: Purchases
    model: str
    judge_model: str
    prices: dict  # model -> Price
    seed: int
    thresholds: Thresholds
    announce: Callable[[], None]  # called once, before anything is bought
    draft: dict[str, Texts] = field(default_factory=lambda: {stage: {} for stage in BRIEFS})
    rejected: Counter = field(default_factory=Counter)
    announced: bool = False

    def buy(self, name: str, requests: list[Request]) -> dict:
        if not self.announced and self.purchases.missing(requests):
            self.announced = True
            self.announce()
        return self.purchases.buy(requests, self.prices[requests[0].params["model"]], label=name)

    def settle(self, stage: str, slots: list[Slot], values: Callable[[Slot, int], dict], *, attempts: int = ATTEMPTS,
               judged: bool = False) -> None:
        """Ask for every slot, admit what is good, ask again for the rest with the reason; then go on without it."""
        faults, by_id = {slot.id: "" for slot in slots}, {slot.id: slot for slot in slots}
        for attempt in range(attempts):
            asked = {id_: request(stage, model=self.model, attempt=attempt, fault=fault, **values(by_id[id_], attempt))
                     for id_, fault in faults.items()}
            if not asked:
                return
            replies = self.buy(stage, list(asked.values()))
            found, bad = {}, {}
            for id_, one in asked.items():
                if one.key in replies:
                    try:
                        found[id_] = self.admit(stage, by_id[id_], replies[one.key], found)
                    except Rejected as reason:
                        bad[id_] = reason
            self._turn_down(stage, found, bad)
            verdicts = self.judge(found) if judged else dict.fromkeys(found)
            bad |= {id_: verdict for id_, verdict in verdicts.items() if verdict}
            self.draft[stage] |= {id_: found[id_] for id_, verdict in verdicts.items() if not verdict}
            self.rejected.update(reason.kind for reason in bad.values())
            faults = {id_: str(bad[id_]) for id_ in faults if id_ in bad}
            if self.purchases.stopped:
                raise Stopped(self.purchases.stopped)

    def admit(self, stage: str, slot: Slot, reply: Reply, found: Texts) -> dict[str, str]:
        """The fields of a reply, checked by themselves and against everything admitted so far."""
        fields = admission.fields_of(reply, BRIEFS[stage].fields)
        responses = {name: text for name, text in fields.items() if name in RESPONSES}
        if "scenario" in fields:
            admission.check_texts({"scenario": fields["scenario"]}, limits=admission.SCENARIO_WORDS)
        if responses:
            admission.check_texts(responses)
            step = fields.get("safety_step", self.draft["plain"].get(slot.id, {}).get("safety_step", ""))
            if set(responses) == set(TYPES):
                admission.check_safety(step, responses, crisis=slot.context == "crisis_support")
            admission.check_new(responses.values(), self._known(stage, slot.id, found))
        return fields

    def _known(self, stage: str, own: str, found: Texts) -> Iterator[str]:
        """Responses that are in the set, but for the slot's own ones that a rewrite replaces."""
        drafts = [*self.draft.items(), (stage, found)]
        for other, texts in drafts:
            for id_, fields in texts.items():
                if not (stage == "rewrite" and id_ == own and other in ("counter", "rewrite")):
                    yield from (text for name, text in fields.items() if name in RESPONSES)

    def _turn_down(self, stage: str, found: Texts, bad: dict[str, Rejected]) -> None:
        """Scenarios too like one that is in the set, or that stands before them."""
        if stage == "scenario":
            all_ = {id_: fields["scenario"] for id_, fields in (self.draft[stage] | found).items()}
            for id_ in admission.near_duplicates(all_, cosine=self.thresholds.cluster_cosine) & found.keys():
                bad[id_] = Rejected("duplicate", "it was too like another message of the set")
                del found[id_]

    def judge(self, triplets: Texts) -> dict[str, Rejected | None]:
        """Blind verdicts on triplets: None where all three types are named and natural.

        Each request shows one response with its scenario and nothing else. A triplet whose verdicts could not all be
        bought is left out of the answer.
        """
        verdicts, open_ = {}, [(id_, label) for id_ in triplets for label in TYPES]
        for attempt in range(ATTEMPTS):
            asked = {(id_, label): request("judge", model=self.judge_model, attempt=attempt, fault="not usable",
                                           scenario=self.draft["scenario"][id_]["scenario"],
                                           response=triplets[id_][label]) for id_, label in open_}
            replies = self.buy("judge", list(asked.values())) if asked else {}
            open_ = []
            for place, one in asked.items():
                try:
                    if one.key in replies:
                        verdicts[place] = admission.fields_of(replies[one.key], BRIEFS["judge"].fields)
                except Rejected as reason:
                    self.rejected[reason.kind] += 1
                    open_.append(place)
        verdicts |= {place: {"type": "nothing usable", "naturalness": 0} for place in open_ if not self.purchases.stopped}
        return {id_: verdict_on(id_, verdicts) for id_ in triplets if all((id_, label) in verdicts for label in TYPES)}

    def frozen(self, name: str, make: Callable):
        """Something derived from many texts, made once and kept in the journal: later requests hang on it."""
        name, journal = f"{name}/{self.model}/{self.seed}", self.purchases.journal
        if (content := journal.frozen(name)) is None:
            content = make()
            journal.append({"event": "frozen", "name": name, "content": content})
        return content


def verdict_on(id_: str, verdicts: dict) -> Rejected | None:
    """The first of the three verdicts that turns a triplet down."""
    for label in TYPES:
        try:
            admission.check_verdict(verdicts[id_, label], label)
        except Rejected as reason:
            return reason
    return None
