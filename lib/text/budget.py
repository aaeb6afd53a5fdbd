"""The ledger: what has been spent, folded from the journal, and whether the next request may be sent.

    spent = actual cost of replies + worst case of everything whose outcome is unknown or still open

A request is reserved at its worst case (all input tokens as a cache write, all of `max_tokens` as output) before it is
sent, and settled at its usage when its reply is in. A lost answer may have been billed, so its reserve is never given
back. `spent` counts over the life of a study's journal, not over one run.
"""

from dataclasses import asdict, dataclass
from math import isfinite

from lib.errors import BadInput
from lib.text.journal import WORKED, Journal, Reply, read_reply

# Multiples of the input price, from the API's price list; a few models read their cache cheaper still.
CACHE_WRITE, CACHE_WRITE_1H, CACHE_READ = 1.25, 2.0, 0.1
BATCH_DISCOUNT = 0.5


class BudgetDenied(Exception):
    """The next request might exceed the limit. Terminal: no retry helps."""


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float

    def times(self, factor: float) -> "Price":
        return Price(self.input * factor, self.output * factor)

    def worst(self, input_tokens: int, max_tokens: int) -> float:
        """The most one request can cost, in USD."""
        return (input_tokens * self.input * CACHE_WRITE + max_tokens * self.output) / 1e6

    def cost(self, usage: dict) -> float:
        """What one reply cost by its usage block, in USD."""
        written = usage.get("cache_creation_input_tokens") or 0
        hour = min(written, (usage.get("cache_creation") or {}).get("ephemeral_1h_input_tokens") or 0)
        tokens = usage["input_tokens"] + (written - hour) * CACHE_WRITE + hour * CACHE_WRITE_1H \
            + (usage.get("cache_read_input_tokens") or 0) * CACHE_READ
        return (tokens * self.input + usage["output_tokens"] * self.output) / 1e6


def price_of(model: str, prices: dict, *, batches: bool) -> Price:
    """The price of a model from `{model: (input, output)}` in USD per million tokens; batches cost half."""
    try:
        price = Price(*(float(value) for value in prices[model]))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"prices: {model}: give its USD per million input and output tokens") from None
    if not all(isfinite(value) and value > 0 for value in (price.input, price.output)):
        raise BadInput(f"prices: {model}: both prices must be positive numbers of USD per million tokens")
    return price.times(BATCH_DISCOUNT) if batches else price


class Ledger:
    """Spending of one journal against `max_usd`."""

    def __init__(self, journal: Journal, max_usd: float):
        if not (isfinite(max_usd) and max_usd > 0):
            raise BadInput("max_usd: must be a positive number of USD")
        self.journal, self.max_usd = journal, max_usd
        self.settled = 0.0
        self.open: dict[str, tuple[float, Price]] = {}
        self.batches: dict[str, dict[str, tuple[float, Price]]] = {}
        self.batch_ids: dict[str, str] = {}
        for record in journal.records:
            self.apply(record)

    @property
    def spent(self) -> float:
        """USD spent, everything unknown or open at its worst case."""
        return self.settled + sum(usd for held in (self.open, *self.batches.values()) for usd, _ in held.values())

    @property
    def left(self) -> float:
        return self.max_usd - self.spent

    def check(self, usd: float) -> None:
        """Raise BudgetDenied where `usd` more might exceed the limit."""
        if usd > self.left:
            raise BudgetDenied(f"max_usd {self.max_usd:.2f} reached: {self.spent:.4f} spent, the next request may cost {usd:.4f}")

    def write(self, *records: dict) -> None:
        """Append to the journal, then count."""
        self.journal.append(*records)
        for record in self.journal.records[-len(records):]:
            self.apply(record)

    def apply(self, record: dict) -> None:
        """Count one record."""
        event, key = record["event"], record.get("key")
        if event == "sent":
            self._settle(self.open, key)  # sent before and cut off by a kill: spent
            self.open[key] = (record["usd"], Price(**record["price"]))
        elif event == "unknown":
            self._settle(self.open, key)
        elif event == "unpaid":
            self.open.pop(key, None)
        elif event == "batch_sent":
            price = Price(**record["price"])
            self.batches[record["intent"]] = {k: (usd, price) for k, usd in record["keys"].items()}
        elif event == "batch":
            self.batch_ids[record["batch"]] = record["intent"]
        elif event == "batch_unpaid":
            self.batches.pop(record["intent"], None)
        elif event == "reply":
            reply = read_reply(record)
            held = self.batches.get(self.batch_ids.get(record["batch"], ""), {}) if "batch" in record else self.open
            self._settle(held, reply.key, reply)

    def _settle(self, held: dict[str, tuple[float, Price]], key: str, reply: Reply | None = None) -> None:
        """Move what is held for a key to what is settled: its cost by usage, nothing where no work was done, else all."""
        if key not in held:
            return
        usd, price = held.pop(key)
        if reply is not None and reply.kind == WORKED:
            usd = cost_or(price, reply.usage, usd)
        elif reply is not None and reply.kind != "unreadable":
            usd = 0.0
        self.settled += usd


def cost_or(price: Price, usage: dict | None, worst: float) -> float:
    """The cost by a reply's usage; the worst case where that is not to be made out."""
    try:
        cost = price.cost(usage)
    except (KeyError, TypeError, AttributeError, OverflowError):
        return worst
    return cost if isfinite(cost) and cost >= 0 else worst


def sent(key: str, usd: float, price: Price) -> dict:
    return {"event": "sent", "key": key, "usd": usd, "price": asdict(price)}


def batch_sent(intent: str, keys: dict[str, float], price: Price) -> dict:
    return {"event": "batch_sent", "intent": intent, "keys": keys, "price": asdict(price)}
