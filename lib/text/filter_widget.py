"""The filter card: a thin bridge between the page (`filter_card.js`) and a session.

The page sends an operation and waits; the answer, with the next card, leaves only after the journal is on disk. Leakage
is measured by a process beside the kernel and arrives when it is done.
"""

from pathlib import Path

import anywidget
import pandas as pd
import traitlets

from lib.errors import BadInput
from lib.text.labels import LABELS, REASONS, TYPES
from lib.text.meter import Worker
from lib.text.session import FILTERS, Session

CHANGES_ACCEPTED = ("accept", "reject", "edit", "undo", "redo")


class FilterCard(anywidget.AnyWidget):
    """A card on which one annotator labels the triplets of a text table by keys; `display(FilterCard(...))`."""

    _esm = Path(__file__).with_name("filter_card.js")
    _css = Path(__file__).with_name("filter_card.css")
    choices = traitlets.Dict().tag(sync=True)

    def __init__(self, texts: pd.DataFrame, *, annotator: str, journals: str | Path = "", n_keep: int = 90, seed: int = 0):
        """`journals`: folder of journals, the project's `labels/` where empty. `n_keep`: scenarios in the set to be kept."""
        self.session = Session(texts, Path(journals) if journals else LABELS, annotator, n_keep=n_keep)
        self.seed, self.meter, self.proposal = seed, {}, {}
        super().__init__(choices={"reasons": list(REASONS), "types": list(TYPES), "filters": list(FILTERS),
                                  "strata": list(self.session.quota), "annotator": annotator})
        self.worker = Worker(self.measured)
        self.on_msg(self.received)
        self.measure()

    def received(self, _, message: dict, buffers) -> None:
        """One operation of the page; whatever happens, it gets an answer."""
        op, extra = str(message.get("op", "")), {}
        try:
            if op == "propose":
                self.propose()
            elif op == "agreement":
                extra = {"agreement": self.session.agreement()}
            else:
                self.session.do(op, message)
        except BadInput as error:
            self.session.notice = str(error)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            self.session.notice = f"{op[:40]}: not understood; nothing was changed."
        if op == "pin":
            self.propose()
        self.send({"re": message.get("id"), "view": self.session.shown(), **extra,
                   **({"meter": self.meter, "proposal": self.proposal} if op == "hello" else {})})
        if op in CHANGES_ACCEPTED:
            self.measure()

    def measure(self) -> None:
        self.worker.ask("meter", self.session.accepted_texts(whole=False))

    def propose(self) -> None:
        session = self.session
        self.worker.ask("proposal", session.accepted_texts(whole=True), quota=session.quota, pins=session.state.pins, seed=self.seed)

    def measured(self, kind: str, result: dict) -> None:
        """A result of the worker, in its thread."""
        setattr(self, kind, result)
        self.send({kind: result})

    def close(self) -> None:
        self.worker.close()
        self.session.journal.close()
        super().close()
