"""The state behind the card: where the annotator is, what a key does, and what the page may see.

A session never shows a type or a register of a card whose decision is open. Every change is a record in the journal
before the answer leaves; the page holds nothing that would have to be saved.
"""

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from statistics import median

import pandas as pd

from lib.errors import BadInput
from lib.files import check_plain
from lib.text import agreement, cards, selection
from lib.text.labels import DECISIONS, REASONS, REPEAT, Card, Journal, Record, fold, read_all

FILTERS = ("all", "unlabelled", "accepted", "rejected", "flagged", "stale", "disagreements")
PAUSE = 300  # seconds; a longer gap between decisions is a break and not part of the pace
MAX_TEXT = 50_000


class Session:
    """One annotator at one dataset. `texts`: the raw text table; `folder`: where the journals lie."""

    def __init__(self, texts: pd.DataFrame, folder, annotator: str, *, n_keep: int):
        self.items = cards.items_of(texts)
        if not self.items:
            raise BadInput("texts: hold no empathy triplets to label")
        self.hashes, self.dataset = cards.hashes(self.items), cards.dataset_hash(self.items)
        self.clusters = dict(zip(texts["scenario_id"], texts["cluster"].astype(int), strict=True))
        self.places = cards.order(self.items, annotator)
        self.number = {place.key: i for i, place in enumerate(self.places)}
        self.journal, self.annotator = Journal(folder, annotator), annotator
        self.others = {name: state for name, state in read_all(folder, self.hashes).items() if name != annotator}
        self.contexts = {item.scenario_id: item.context or "all" for item in self.items.values()}
        self.quota = selection.quotas(list(self.contexts.values()), min(n_keep, len(self.contexts)))
        self.registers = len({item.register for item in self.items.values()})
        self.filter, self.stratum, self.search, self.notice = "all", "", "", ""
        self.refold()
        self.at = self.start()

    def refold(self) -> None:
        """State anew from the journal, and what every paint needs of it."""
        self.state = fold(self.journal.records, self.hashes)
        self.decisions = [card.adjudicated or card.decision if (card := self.state.cards.get(place.key)) else "" for place in self.places]
        self.accepted_cards = [i for i, place in enumerate(self.places) if self.decisions[i] == "accept" and not place.key.endswith(REPEAT)]
        self.accepted = self.accepted_scenarios()

    def start(self) -> int:
        """The first open card after the last one that was worked on."""
        last = next((self.number[r.item] for r in reversed(self.state.done) if r.item in self.number), -1)
        rest = [*range(last + 1, len(self.places)), *range(last + 1)]
        return next((i for i in rest if not self.decision(i)), max(last, 0))

    # what holds of a card

    @property
    def place(self) -> cards.Place:
        return self.places[self.at]

    def card(self, i: int) -> Card:
        return self.state.cards.get(self.places[i].key, Card())

    def decision(self, i: int) -> str:
        return self.decisions[i]

    def votes(self, i: int) -> dict[str, str]:
        """Independent decisions on a card's item, others' and own."""
        key = self.places[i].key
        found = {name: state.cards[key].decision for name, state in self.others.items() if key in state.cards}
        return {name: vote for name, vote in (found | {self.annotator: self.card(i).decision}).items() if vote}

    def disputed(self, i: int) -> bool:
        adjudicated = any(state.cards[self.places[i].key].adjudicated for state in (*self.others.values(), self.state)
                          if self.places[i].key in state.cards)
        return len(set(self.votes(i).values())) > 1 and not adjudicated

    def view(self) -> list[int]:
        """The cards that filter, stratum and search leave, in order."""
        stale = {record.item for record in self.state.stale}
        tests = {"all": lambda i: True, "unlabelled": lambda i: not self.decision(i), "flagged": lambda i: self.card(i).flagged,
                 "accepted": lambda i: self.decision(i) == "accept", "rejected": lambda i: self.decision(i) == "reject",
                 "stale": lambda i: self.places[i].key in stale, "disagreements": self.disputed}
        words = self.search.lower()

        def found(i: int) -> bool:
            place = self.places[i]
            return (not self.stratum or self.contexts[place.item.scenario_id] == self.stratum) and tests[self.filter](i) and (
                not words or any(words in text.lower() for text in (place.item.scenario, *cards.wording(place.item, self.state).values())))
        if self.filter == "all" and not self.stratum and not words:
            return list(range(len(self.places)))
        return [i for i in range(len(self.places)) if found(i)]

    def accepted_scenarios(self) -> list[str]:
        """Scenarios of which every register is accepted."""
        wanted = Counter(item.scenario_id for item in self.items.values())
        got = Counter(self.places[i].item.scenario_id for i in self.accepted_cards)
        return [id_ for id_ in wanted if got[id_] == wanted[id_]]

    # what a key does

    def do(self, op: str, message: dict) -> None:
        """Carry out one operation of the page; `message["card"]` is the card that the person saw."""
        self.notice = ""
        if op in ("accept", "reject", "flag", "comment", "edit", "guess") and message.get("card") != self.at:
            self.notice = "Another window moved this card on; nothing was changed."
            return
        getattr(self, f"on_{op}")(message)

    def write(self, event: str, *, item: str = "", **fields) -> Record:
        key = item.removesuffix(REPEAT)
        about = {"item": item, "item_hash": self.hashes[key], "version": self.state.version(key)} if item else {}
        record = self.journal.append(event, dataset=self.dataset, **{**about, **fields})
        self.refold()
        return record

    def decide(self, event: str, reason: str = "") -> None:
        before, at = self.view(), self.at
        adjudicated = self.filter == "disagreements" and self.disputed(at)
        self.write(event, item=self.place.key, reason=reason, adjudicated=adjudicated)
        later = [i for i in before if i > at] + [i for i in before if i < at]
        self.at = next((i for i in later if not self.decision(i)), None) or next((i for i in before if i > at), at)
        if self.at == at:
            self.notice = "Every card of this view is decided."

    def on_accept(self, message: dict) -> None:
        self.decide("accept")

    def on_reject(self, message: dict) -> None:
        if message.get("reason") not in REASONS:
            raise BadInput("reject: needs a reason")
        self.decide("reject", message["reason"])

    def on_flag(self, message: dict) -> None:
        self.write("flag", item=self.place.key, on=not self.card(self.at).flagged)

    def on_comment(self, message: dict) -> None:
        self.write("comment", item=self.place.key, text=checked(message.get("text"), empty=True))

    def on_edit(self, message: dict) -> None:
        label, text = self.place.types[int(message["slot"])], checked(message.get("text"))
        if text == cards.wording(self.place.item, self.state)[label]:
            self.notice = "The wording is unchanged."
            return
        self.write("edit", item=self.place.item.key, label=label, text=text, version=self.state.version(self.place.item.key) + 1)

    def on_guess(self, message: dict) -> None:
        if self.card(self.at).decided:
            self.notice = "The types of this card have been shown; a guess would not be blind."
            return
        self.write("guess", item=self.place.key, types=dict(zip(self.place.types, message["types"], strict=True)))

    def on_undo(self, message: dict) -> None:
        self.take_back("undo", self.state.done)

    def on_redo(self, message: dict) -> None:
        self.take_back("redo", self.state.undone)

    def take_back(self, event: str, stack: list[Record]) -> None:
        if not stack:
            self.notice = f"Nothing to {event}."
            return
        target = stack[-1]
        self.write(event, of=target.id)
        self.at = self.number.get(target.item, self.at)
        if event == "redo" and target.event in DECISIONS:
            self.step(1)
        self.notice = f"{event.capitalize()}: {said(target)}"

    def on_next(self, message: dict) -> None:
        self.step(1)

    def on_previous(self, message: dict) -> None:
        self.step(-1)

    def step(self, by: int) -> None:
        beyond = [i for i in self.view() if (i > self.at if by > 0 else i < self.at)]
        if beyond:
            self.at = beyond[0 if by > 0 else -1]
        else:
            self.notice = f"This is the {'last' if by > 0 else 'first'} card of the view."

    def on_jump(self, message: dict) -> None:
        number = int(message["number"])
        if not 1 <= number <= len(self.places):
            self.notice = f"Cards go from 1 to {len(self.places)}."
            return
        self.at = number - 1

    def on_view(self, message: dict) -> None:
        """Change filter, stratum or search; stay on the card where it is in the view."""
        if message.get("filter", self.filter) not in FILTERS or message.get("stratum", "") not in ("", *self.quota):
            raise BadInput("view: no such filter or stratum")
        self.filter = message.get("filter", self.filter)
        self.stratum, self.search = message.get("stratum", self.stratum), str(message.get("search", self.search))[:200]
        view = self.view()
        if view and self.at not in view:
            self.at = next((i for i in view if i > self.at), view[0])
        if not view:
            self.notice = "No card fits; filter and search were cleared." if self.filter == "all" else f"No card is {self.filter} here."
            self.filter, self.stratum, self.search = "all", "", ""

    def on_pin(self, message: dict) -> None:
        if message["scenario"] not in self.contexts:
            raise BadInput("pin: no such scenario")
        self.write("pin", text=message["scenario"], choice=message["choice"])

    def on_keep(self, message: dict) -> None:
        ids = [str(id_) for id_ in message["scenarios"]]
        if unknown := set(ids) - set(self.accepted):
            raise BadInput(f"keep: {sorted(unknown)[0]!r} is not accepted in all its registers")
        self.write("keep", scenarios=tuple(ids))
        self.notice = f"Confirmed: {len(ids)} scenarios are kept."

    def on_hello(self, message: dict) -> None:
        """A page was opened, or opened again: it only wants to see where things stand."""

    # what the page may see

    def shown(self) -> dict:
        """Everything the page paints, as plain data; types and register only of a decided card."""
        card, place, view = self.card(self.at), self.place, self.view()
        decision, text = self.decision(self.at), cards.wording(place.item, self.state)
        edits = self.state.edits.get(place.item.key, {})
        adjudicating = self.filter == "disagreements" and self.disputed(self.at)
        stale = [said(record) for record in self.state.stale if record.item.removesuffix(REPEAT) == place.item.key]
        about = {"types": list(place.types), "register": place.item.register, "context": place.item.context,
                 "domain": place.item.domain, "id": place.item.scenario_id} if decision else None
        others = {name: f"{vote}{reason(self.others[name].cards[place.key])}" for name, vote in self.votes(self.at).items()
                  if name != self.annotator} if decision or adjudicating else {}
        return {"at": self.at, "total": len(self.places), "scenario": place.item.scenario,
                "responses": [{"text": text[label], "edits": len(edits.get(label, ()))} for label in place.types],
                "decision": decision, "reason": card.reason, "flagged": card.flagged, "comment": card.comment,
                "guesses": [card.guesses.get(label, "") for label in place.types], "guessable": not card.decided,
                "about": about, "others": others, "adjudicating": adjudicating, "stale": stale,
                "filter": self.filter, "stratum": self.stratum, "search": self.search, "in_view": len(view),
                "place_in_view": view.index(self.at) + 1 if self.at in view else 0, "notice": self.notice,
                "undo": len(self.state.done), "redo": len(self.state.undone), "progress": self.progress(),
                "writable": self.journal.writable, "torn": self.journal.torn, "n_stale": len(self.state.stale)}

    def progress(self) -> dict:
        """Cards done, accepted per stratum against its quota (in cards), pace, and the distance from the balance targets."""
        done = sum(map(bool, self.decisions))
        got = [self.places[i].item for i in self.accepted_cards]
        by_context = Counter(self.contexts[item.scenario_id] for item in got)
        strata = [{"name": name, "quota": n * self.registers, "accepted": by_context[name]} for name, n in self.quota.items()]
        shares = Counter(item.domain for item in got if item.domain)
        over = {name: round(n / len(got), 2) for name, n in shares.most_common() if len(got) >= 20 and n > selection.MAX_DOMAIN * len(got)}
        pace = self.pace()
        return {"done": done, "strata": strata, "accepted": len(got), "scenarios": len(self.accepted), "kept": len(self.state.kept),
                "target": sum(self.quota.values()), "over": over, "pace": pace,
                "left": None if pace is None else pace * (len(self.places) - done)}

    def pace(self) -> float | None:
        """Median seconds between decisions, breaks left out; None before there are three."""
        times = [datetime.fromisoformat(r.time).timestamp() for r in self.state.done if r.event in DECISIONS][-60:]
        gaps = [b - a for a, b in pairwise(times) if 0 < b - a < PAUSE]
        return median(gaps) if len(gaps) >= 2 else None

    def accepted_texts(self, *, whole: bool) -> Callable[[], pd.DataFrame]:
        """The accepted texts as they are worded now, one row a response, put together where it is called (not here: the card
        waits); `whole`: only of scenarios accepted in all registers."""
        state, complete = self.state, set(self.accepted)
        items = [self.places[i].item for i in self.accepted_cards if not whole or self.places[i].item.scenario_id in complete]

        def table() -> pd.DataFrame:
            rows = [(item.scenario_id, item.register, label, text, self.clusters[item.scenario_id], self.contexts[item.scenario_id], item.domain)
                    for item in items for label, text in cards.wording(item, state).items()]
            return pd.DataFrame(rows, columns=["scenario_id", "register", "label", "response", "cluster", "context", "domain"])
        return table

    def agreement(self) -> list[dict]:
        """Rows of the agreement table, NaN as None."""
        table = agreement.agreement({**self.others, self.annotator: self.state})
        return table.astype(object).where(table.notna(), None).to_dict("records")


def reason(card: Card) -> str:
    return (f" ({card.reason})" if card.reason else "") + (f": {card.comment}" if card.comment else "")


def said(record: Record) -> str:
    """A record in a few words, without what a blind annotator must not see."""
    what = {"reject": f"reject ({record.reason})", "edit": "edit of a response", "guess": "guesses", "pin": "choice of a scenario",
            "keep": "confirmed selection"}.get(record.event, record.event)
    return f"{what}, {record.time[:16].replace('T', ' ')}"


def checked(text, *, empty: bool = False) -> str:
    """A text of the person: whole Unicode, not too long, not blank where it must say something."""
    text = str(text or "").strip()
    try:
        check_plain(text)
    except ValueError:
        raise BadInput("text: holds a NUL or half a character; nothing was saved") from None
    if (not text and not empty) or len(text) > MAX_TEXT:
        raise BadInput(f"text: needs 1 to {MAX_TEXT:,} characters; nothing was saved")
    return text
