"""Buying replies, each at most once.

A request that has a reply in the journal is never sent again. Every other one is reserved in the ledger, announced in
the journal, sent, and its raw reply appended before anything looks at it. A batch is announced before it is created,
so that one whose creation was cut off is found again among the API's batches by its custom ids instead of being paid
for twice.
"""

import hashlib
import json
from datetime import datetime, timedelta

from tqdm.auto import tqdm

from lib.errors import BadInput
from lib.text.api import Api, Request, Unavailable, pause
from lib.text.budget import BudgetDenied, Ledger, Price, batch_sent, sent
from lib.text.journal import WORKED, Journal, Reply, read_reply

MADE = (WORKED, "unreadable")  # a reply was made, so it was paid for; an item that expired or erred was not
COUNT_MARGIN = 1.1  # requests of one sort differ little in length; only the longest is counted
CLOCK_SKEW = timedelta(minutes=10)  # and the time a creation may take


class Purchases:
    """Replies of one journal. `stopped` says why no more are bought: the budget, or an API that does not answer.

    `expected` is the number of replies of the whole set, for the progress bar.
    """

    def __init__(self, journal: Journal, ledger: Ledger, api: Api, *, batches: bool):
        self.journal, self.ledger, self.api, self.batches = journal, ledger, api, batches
        self.replies: dict[str, Reply] = {}
        self.stopped, self.failure, self.bar, self.expected = "", "", None, 0
        for record in journal.records:
            self._shelve(record)

    def missing(self, requests: list[Request]) -> list[Request]:
        """Distinct requests that have no reply yet."""
        return list({r.key: r for r in requests if r.key not in self.replies}.values())

    def buy(self, requests: list[Request], price: Price, *, label: str) -> dict[str, Reply]:
        """`{key: reply}` of all requests that have one; what is missing is bought, as far as the budget goes."""
        if self.missing(requests) and not self.stopped:
            try:
                self._finish_batches()
                self._buy(self.missing(requests), price, label)
            except BudgetDenied as denied:
                self.stopped = str(denied)
            except Unavailable as error:
                self.stopped = f"no answer from the API in {self.api.pace.tries} tries ({error}); run again to go on"
        return {r.key: self.replies[r.key] for r in requests if r.key in self.replies}

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def _buy(self, todo: list[Request], price: Price, label: str) -> None:
        if not todo:
            return
        longest = max(todo, key=lambda r: len(json.dumps(r.params)))
        tokens = round(self.api.count(longest) * COUNT_MARGIN)
        worst = {r.key: price.worst(tokens, r.params["max_tokens"]) for r in todo}
        self._progress(label)
        if not self.batches:
            for request in todo:
                self.api.retry(lambda request=request: self._send(request, worst[request.key], price))
            return
        fruitless = 0
        while todo and fruitless < self.api.pace.tries:
            before = len(todo)
            self._buy_batch(todo, worst, price)
            todo = self.missing(todo)
            fruitless += len(todo) == before
        if todo:
            raise Unavailable(f"batch items fail each time: {self.failure}")

    def _send(self, request: Request, usd: float, price: Price) -> None:
        """One request, once."""
        self.ledger.check(usd)
        self.ledger.write(sent(request.key, usd, price))
        try:
            raw = self.api.message(request)
        except (BadInput, Unavailable) as error:
            event = "unpaid" if isinstance(error, BadInput) or error.unpaid else "unknown"
            self.ledger.write({"event": event, "key": request.key, "why": str(error)})
            raise
        self._keep([{"event": "reply", "key": request.key, "raw": raw}])

    def _buy_batch(self, todo: list[Request], worst: dict[str, float], price: Price) -> None:
        """One batch of as many requests as the budget has room for, to its end."""
        self.ledger.check(worst[todo[0].key])
        room, chosen = self.ledger.left, []
        for request in todo:
            room -= worst[request.key]
            if room >= 0:
                chosen.append(request)
        self.api.retry(lambda: self._create(chosen, {r.key: worst[r.key] for r in chosen}, price))
        self._finish_batches()

    def _create(self, chosen: list[Request], worst: dict[str, float], price: Price) -> None:
        """Announce a batch and create it; one whose creation got no answer is looked up with the open batches."""
        intent = hashlib.sha256(f"{len(self.journal.records)} {sorted(worst)}".encode()).hexdigest()[:16]
        self.ledger.write(batch_sent(intent, worst, price))
        try:
            batch = self.api.create_batch(chosen)
        except (BadInput, Unavailable) as error:
            if isinstance(error, Unavailable) and not error.unpaid:
                return
            self.ledger.write({"event": "batch_unpaid", "intent": intent, "why": str(error)})
            raise
        self.ledger.write({"event": "batch", "intent": intent, "batch": batch})

    def _finish_batches(self) -> None:
        """Collect every batch that was announced and is not done, in this run or before a kill."""
        named = {intent: batch for batch, intent in self.ledger.batch_ids.items()}
        for intent in [intent for intent, held in self.ledger.batches.items() if held]:
            batch = named.get(intent) or self._find(intent)
            if batch:
                self.api.retry(lambda batch=batch, intent=intent: self._collect(batch, intent))

    def _find(self, intent: str) -> str | None:
        """The batch that a cut-off creation made; recorded as unpaid where the API has none with these custom ids."""
        pause(self.api.pace.poll_s)  # one created a moment ago may not be listed yet
        record = next(r for r in self.journal.records if r["event"] == "batch_sent" and r["intent"] == intent)
        announced, keys = datetime.fromisoformat(record["time"]), set(record["keys"])
        for batch, size in self.api.batches_between(announced - CLOCK_SKEW, announced + CLOCK_SKEW):
            if batch in self.ledger.batch_ids or size != len(keys):
                continue
            if keys & {read_reply({"batch": batch, "raw": line}).key for line in self.api.results(batch)}:
                self.ledger.write({"event": "batch", "intent": intent, "batch": batch})
                return batch
        self.ledger.write({"event": "batch_unpaid", "intent": intent, "why": "no such batch at the API"})
        return None

    def _collect(self, batch: str, intent: str) -> None:
        """All results of a batch into the journal; a line that is there already is not written again."""
        seen = {r["raw"] for r in self.journal.records if r.get("batch") == batch and r["event"] == "reply"}
        lines = [line for line in map(self.journal.redact, self.api.results(batch)) if line not in seen]
        self._keep([{"event": "reply", "batch": batch, "raw": line} for line in lines])
        if lost := self.ledger.batches[intent]:
            raise Unavailable(f"{len(lost)} results of a batch are not readable")

    def _keep(self, records: list[dict]) -> None:
        """Replies onto the disk first, then into `replies`."""
        if not records:
            return
        self.ledger.write(*records)
        for record in self.journal.records[-len(records):]:  # as written: without the key
            self._shelve(record)

    def _shelve(self, record: dict) -> None:
        """Take in one record: replies that were made are kept; a batch item that failed is still to be bought."""
        if record["event"] != "reply":
            return
        reply = read_reply(record)
        if reply.kind not in MADE:
            self.failure = f"{reply.kind} {reply.why}".strip()
        elif reply.key and reply.key not in self.replies:
            self.replies[reply.key] = reply
            self._progress()

    def _progress(self, label: str = "") -> None:
        """The bar: replies in the journal out of those expected, and the running total of USD."""
        if label:
            self.bar = self.bar if self.bar is not None else tqdm(total=self.expected, initial=len(self.replies), unit="reply")
            self.bar.set_description(label, refresh=False)
        if self.bar is not None:
            self.bar.set_postfix_str(f"${self.ledger.spent:.2f} of ${self.ledger.max_usd:.2f}", refresh=False)
            self.bar.update(len(self.replies) - self.bar.n)
