"""The Anthropic API as this project uses it: one message, a Message Batch, a token count.

All use of the SDK is here. Its own retries are off: they carry no idempotency key, so they can bill twice without
anybody knowing. Errors are sorted into what no retry mends (`BadInput`) and what is worth another try (`Unavailable`,
which says whether the request is known not to have been billed). Bodies are handed on raw, so that they can be put on
disk before they are parsed.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile

import anthropic
import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tenacity import sleep as pause

from lib.errors import BadInput

TURNED_AWAY = (429, 529)  # refused at the door: not billed
WORTH_A_RETRY = (408, 409, *TURNED_AWAY)
MAX_BODY = 300_000_000  # bytes of an answer; the largest, the results of a batch, has a few million
LONGEST = 500  # characters of the API's own words
NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds: for an answer to go on, for all of its body, before the first and the longest retry, between looks at a batch. And tries a request."""

    timeout_s: float = 120
    body_s: float = 600
    first_wait_s: float = 1
    max_wait_s: float = 60
    poll_s: float = 20
    tries: int = 8


@dataclass(frozen=True)
class Request:
    """Parameters of one message. Its key is their hash: equal parameters are one request."""

    params: dict

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.params, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:40]


class Unavailable(Exception):
    """No usable answer this time. `unpaid`: known not to have been billed; else nobody knows."""

    def __init__(self, why: str, *, unpaid: bool = False, retry_after: float | None = None):
        super().__init__(why)
        self.unpaid, self.retry_after = unpaid, retry_after


class Bounded(httpx2.SyncByteStream):
    """The body of an answer with an end: byte by byte, each within the timeout, it could otherwise come for days."""

    def __init__(self, body: httpx2.SyncByteStream, seconds: float):
        self.body, self.end = body, time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.body:
            size += len(part)
            if size > MAX_BODY or time.monotonic() > self.end:
                raise httpx2.ReadTimeout("an answer without end")
            yield part

    def close(self) -> None:
        self.body.close()


def api_key(*, needed: bool = True) -> str:
    """The key, from the environment and nowhere else; empty where there is none and none is needed."""
    key = os.environ.get("ANTHROPIC_API_KEY", "").strip()
    if needed and not key:
        raise BadInput("ANTHROPIC_API_KEY: not set; export it, or set generate to False to use the bundled texts")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise BadInput("ANTHROPIC_API_KEY: holds characters that no key has; export it again")
    return key


def sorted_out(error: Exception) -> BadInput | Unavailable:
    """What an SDK or transport error means."""
    if isinstance(error, anthropic.APIStatusError):
        status, why = error.status_code, f"HTTP {error.status_code} {error.type or ''}".strip()[:LONGEST]
        if 400 <= status < 500 and status not in WORTH_A_RETRY:
            return BadInput(f"Anthropic API: {why}: {str(error.api_message or 'no message')[:LONGEST]}")
        return Unavailable(why, unpaid=status in TURNED_AWAY, retry_after=seconds(error.response.headers.get("retry-after")))
    never_sent = isinstance(error, NEVER_SENT) or isinstance(error.__cause__, NEVER_SENT)
    return Unavailable(type(error).__name__, unpaid=never_sent)


def usable(value, kind: type):
    """A name or a positive number of an answer, which the SDK does not check; `Unavailable` where it is none: money hangs on it."""
    if type(value) is not kind or not value or (kind is int and value < 0):
        raise Unavailable(f"an answer without {'a number' if kind is int else 'a name'}")
    return value


def seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text))
    except (TypeError, ValueError):
        return None


class Api:
    """The endpoints. `redact` strikes the key from every message, should an answer echo it."""

    def __init__(self, *, pace: Pace, base_url: str | None, redact: Callable[[str], str]):
        self.pace, self.base_url, self.redact = pace, base_url, redact

    @cached_property
    def client(self) -> anthropic.Anthropic:
        def bound(response: httpx2.Response) -> None:
            response.stream = Bounded(response.stream, self.pace.body_s)
        return anthropic.Anthropic(api_key=api_key(), base_url=self.base_url, max_retries=0, timeout=self.pace.timeout_s,
                                   http_client=anthropic.DefaultHttpxClient(event_hooks={"response": [bound]}))

    def message(self, request: Request) -> str:
        """The raw body of one paid reply; one try."""
        with self._errors():
            return self.client.messages.with_raw_response.create(**request.params).text()

    def create_batch(self, requests: list[Request]) -> str:
        """The id of a new batch, each request's key its custom id; one try."""
        with self._errors():
            items = [{"custom_id": request.key, "params": request.params} for request in requests]
            return usable(self.client.messages.batches.create(requests=items).id, str)

    def count(self, request: Request) -> int:
        """Input tokens of a request, by the API's own (free) count."""
        params = {name: value for name, value in request.params.items() if name != "max_tokens"}
        return self._free(lambda: usable(self.client.messages.count_tokens(**params).input_tokens, int))

    def results(self, batch: str) -> list[str]:
        """The raw result lines of a batch, in no particular order; waits until it has ended."""
        batches = self.client.messages.batches
        while self._free(lambda: batches.retrieve(batch).processing_status) != "ended":
            pause(self.pace.poll_s)
        return self._free(lambda: batches.with_raw_response.results(batch).text().splitlines())

    def batches_between(self, since: datetime, until: datetime) -> list[tuple[str, int]]:
        """`(id, number of requests)` of the batches created in that time, newest first."""
        def found() -> list[tuple[str, int]]:
            recent = takewhile(lambda batch: batch.created_at >= since, self.client.messages.batches.list(limit=100))
            return [(batch.id, sum(batch.request_counts.to_dict().values())) for batch in recent if batch.created_at <= until]
        return self._free(found)

    def retry(self, call: Callable):
        """`call()`, tried again while it raises `Unavailable`; anything else, the budget's refusal too, is terminal."""
        backoff = wait_exponential_jitter(multiplier=self.pace.first_wait_s, max=self.pace.max_wait_s, jitter=self.pace.first_wait_s)

        def wait(state) -> float:
            asked = state.outcome.exception().retry_after
            return backoff(state) if asked is None else min(asked, self.pace.max_wait_s)
        return Retrying(retry=retry_if_exception_type(Unavailable), stop=stop_after_attempt(self.pace.tries), wait=wait,
                        reraise=True)(call)

    def _free(self, call: Callable):
        """A call that costs nothing, hence may simply be made again."""
        def once():
            with self._errors():
                return call()
        return self.retry(once)

    @contextmanager
    def _errors(self):
        """SDK errors, transport errors and bodies that are not the API's as ours, without the key and without a chain."""
        try:
            yield
        except BadInput:  # a ValueError too
            raise
        except (anthropic.AnthropicError, httpx2.HTTPError, ValueError, TypeError, AttributeError) as error:
            meaning = sorted_out(error)
            meaning.args = tuple(self.redact(str(arg)) for arg in meaning.args)
            raise meaning from None
