"""A loopback server that speaks Messages, Message Batches and count_tokens, answers with usable texts, and injects faults.

It is a real HTTP server on 127.0.0.1 for the real SDK. Its own log is the witness of what was paid for: one entry for
every reply made, whether it could be delivered, what it cost, and which request (by the hash of its parameters) it was.
"""

import hashlib
import json
import random
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTTP_FAULTS = ("429", "529", "500", "503", "timeout_unpaid", "timeout_paid", "cut_unpaid", "cut_paid", "half_body")
ERRORS = {"400": "invalid_request_error", "401": "authentication_error", "403": "permission_error", "404": "not_found_error", "413": "request_too_large",
          "429": "rate_limit_error", "500": "api_error", "503": "api_error", "504": "timeout_error", "529": "overloaded_error"}
ODD_FAULTS = ("slow", "slow_error", "half_closed", "oversized", "oversized_error", "midstream", "odd_reply", "odd_error")
PAID_FAULTS = ("timeout_paid", "cut_paid", "half_body", "slow", "oversized")  # the work is done, and the answer does not arrive
ODD_BODIES = (b"", b"null", b"[]", b"{}", b"7", b'"text"', b"\xff\xfe\x00", b"{", b'{"type": "error", "error": null}', b'{"type": "error", "error": "no"}', b'{"error": {"type": 5, "message": ["a\\nb"]}}',
              b'{"type": "error", "error": {"type": "' + b"x" * 9000 + b'", "message": "' + b"y" * 90_000 + b'"}}', b"[" * 5000, b'{"input_tokens": "many"}', b'{"input_tokens": -1000000}', b'{"input_tokens": 1e400}',
              b'{"id": null, "processing_status": null}', b'{"id": ["a"], "processing_status": "ended", "results_url": null}', b'{"data": [{}], "has_more": false}', b'{"content": 1, "usage": {"input_tokens": -5, "output_tokens": null}}')
REPLY_FAULTS = ("max_tokens", "refusal", "malformed", "duplicate", "language", "length")
ITEM_FAULTS = ("expired", "errored", "canceled")
MARKS = {"cognitive": "reasonwise", "affective": "heartsore", "instrumental": "stepwise"}
SAFETY = "Please call your local crisis line if tonight gets too heavy."
SPANISH = " ".join(["Ayer encontramos nuestra vieja carta debajo del asiento cuando llegamos tarde desde aquella playa tranquila"] * 3)
SMALL = "the and of to a in that it was for you with on as at by this but from they we his her she or an will my one all".split()
LARGE = [a + b for a in ("bar", "cor", "del", "fen", "gal", "hol", "jin", "kel", "lor", "mar", "nol", "pel", "ros", "sil", "tor", "ven")
         for b in ("ado", "bert", "cline", "dale", "erry", "fold", "gate", "hurst", "ing", "jack", "ket", "low", "mond", "ner")]


def key_of(params: dict) -> str:
    """The request's key, computed from what came over the wire."""
    params = {k: v for k, v in params.items() if k != "stream"}
    return hashlib.sha256(json.dumps(params, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:40]


class Loopback(ThreadingHTTPServer):
    """`faults`: `(where, fault)` of the next requests there, in order; after them `rate` of all requests meet a random one, also one of `more`.

    `log`: one dict a request or batch item, `{n, path, key, fault, paid (USD), delivered, id}`. `bodies`: `(path, body)`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, prices: dict, faults=(), rate: float = 0.0, seed: int = 0, hang_s: float = 1.0, batch_s: float = 0.0,
                 echo: str = "", more=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prices, self.queue, self.rate, self.hang_s, self.batch_s, self.echo = prices, list(faults), rate, hang_s, batch_s, echo
        self.more = tuple(more)
        self.random, self.lock, self.n_requests = random.Random(seed), threading.RLock(), 0
        self.log, self.bodies, self.batches, self.last_answer = [], [], {}, {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed in the middle is no news."""

    def draw(self, where: str, kinds) -> str:
        """The fault of this request, or nothing."""
        with self.lock:
            if self.queue and self.queue[0][0] == where:
                return self.queue.pop(0)[1]
            return self.random.choice((*kinds, *(self.more if where != "item" else ()))) if not self.queue and self.random.random() < self.rate else ""

    def note(self, path: str, *, key: str = "", fault: str = "", paid: float = 0.0, delivered: bool = True, **more) -> dict:
        with self.lock:
            entry = {"n": len(self.log), "path": path, "key": key, "fault": fault, "paid": paid, "delivered": delivered, **more}
            self.log.append(entry)
            return entry

    def paid(self) -> list[dict]:
        with self.lock:
            return [entry for entry in self.log if entry["paid"]]

    def message(self, params: dict, fault: str, *, batch: bool) -> tuple[dict, float]:
        """A Messages API reply to these parameters, with a fault of content or none, and what it costs."""
        text, stop = self.answer(params, fault)
        usage = {"input_tokens": tokens(params), "output_tokens": len(text) // 4 + 1, "cache_creation_input_tokens": 0,
                 "cache_read_input_tokens": 0, "service_tier": "batch" if batch else "standard"}
        in_price, out_price = self.prices[params["model"]]
        usd = (usage["input_tokens"] * in_price + usage["output_tokens"] * out_price) / 1e6 * (0.5 if batch else 1)
        with self.lock:
            number = len(self.log) + self.random.getrandbits(60)
        return {"id": f"msg_{number:x}", "type": "message", "role": "assistant", "model": params["model"], "stop_reason": stop,
                "stop_sequence": None, "content": [{"type": "text", "text": text}] if stop != "refusal" else [], "usage": usage}, usd

    def answer(self, params: dict, fault: str) -> tuple[str, str]:
        """`(text, stop_reason)` of an answer that fits the schema asked for."""
        fields = list(params["output_config"]["format"]["schema"]["properties"])
        if fault == "refusal":
            return "", "refusal"
        if fault == "malformed":
            return "{\"cognitive\": \"half an obj", "end_turn"
        user = params["messages"][0]["content"]
        with self.lock:
            rng = random.Random(self.random.getrandbits(60))
        if "first_cognitive" in fields:  # each mark in a reply raises its scale; the first place gets one more on all
            first, second = user.split("First reply:")[1].split("Second reply:")
            content = {name: min(7, (2 if name.startswith("first") else 1)
                                 + (first if name.startswith("first") else second).count(MARKS.get(name.partition("_")[2], "useful")))
                       for name in fields}
        elif "type" in fields:
            content = {"type": next((t for t, mark in MARKS.items() if mark in user), "unclear"), "naturalness": rng.choice([3, 4, 5])}
        else:
            content = {name: self.text(rng, name, fault, crisis="crisis message" in user) for name in fields}
            with self.lock:
                previous = self.last_answer.setdefault(tuple(fields), content)
                self.last_answer[tuple(fields)] = content
            content = previous if fault == "duplicate" else content
            if self.echo:
                content = {name: value.replace("the", self.echo, 1) if name in MARKS else value for name, value in content.items()}
        text = json.dumps(content)
        return (text[:len(text) // 2], "max_tokens") if fault == "max_tokens" else (text, "end_turn")

    @staticmethod
    def text(rng: random.Random, name: str, fault: str, *, crisis: bool) -> str:
        if name == "safety_step":
            return SAFETY if crisis else ""
        if name in ("reason", "feeling", "action"):
            return rng.choice(LARGE)
        if fault == "language":
            return SPANISH
        n = 8 if fault == "length" else 30 if name == "scenario" else 45
        found = [rng.choice(SMALL if i % 2 else LARGE) for i in range(n)]
        found[0] = found[0].title()
        if name in MARKS:
            found[5] = MARKS[name]
        return " ".join(found) + "." + (f" {SAFETY}" if crisis and name in MARKS else "")


def tokens(params: dict) -> int:
    return len(json.dumps({k: v for k, v in params.items() if k in ("system", "messages", "output_config")})) // 4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Loopback

    def log_message(self, *words):
        """Silence."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append((self.path, body))
        if not self.allowed():
            return
        {"/v1/messages": self.messages, "/v1/messages/count_tokens": self.count_tokens,
         "/v1/messages/batches": self.create_batch}[self.path](body)

    def do_GET(self):
        if not self.allowed():
            return
        if not self.http_fault("GET", {}):
            path = self.path.partition("?")[0]
            if path == "/v1/messages/batches":
                found = [self.batch(id_) for id_ in reversed(self.server.batches)]
                self.send({"data": found, "has_more": False, "first_id": None, "last_id": None})
            elif path.endswith("/results"):
                self.send(self.server.batches[path.split("/")[-2]]["lines"], kind="application/x-jsonl")
            else:
                self.send(self.batch(path.split("/")[-1]))

    def allowed(self) -> bool:
        """Only with a key; a wrong one is echoed, as careless servers do."""
        with self.server.lock:
            self.server.n_requests += 1
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        if key.startswith("sk-good"):
            return True
        self.error(401, "authentication_error", f"invalid key {key} for {self.path}")
        return False

    def messages(self, params: dict):
        key, server = key_of(params), self.server
        server.note("arrived", key=key)
        fault = server.draw("messages", (*HTTP_FAULTS, *REPLY_FAULTS, "not_json"))
        if fault in (*HTTP_FAULTS, *ERRORS, *ODD_FAULTS) and self.http_fault("messages", params, fault):
            return
        if fault == "not_json":
            server.note("messages", key=key, fault=fault, paid=1e-9, id="")
            self.send("<html>gateway</html>", kind="text/html")
            return
        message, usd = server.message(params, fault, batch=False)
        entry = server.note("messages", key=key, fault=fault, paid=usd, delivered=False, id=message["id"])
        self.send(message)
        entry["delivered"] = True

    def count_tokens(self, params: dict):
        if not self.http_fault("count_tokens", params):
            self.server.note("count_tokens")
            self.send({"input_tokens": tokens(params)})

    def create_batch(self, body: dict):
        fault = self.server.draw("batches", HTTP_FAULTS)
        if fault and fault not in PAID_FAULTS:
            self.http_fault("batches", {}, fault)
            return
        id_ = f"msgbatch_{len(self.server.batches) + 1:04d}"
        lines = []
        for item in body["requests"]:
            assert key_of(item["params"]) == item["custom_id"]
            lines.append(json.dumps({"custom_id": item["custom_id"], "result": self.item(id_, item)}))
        self.server.random.shuffle(lines)
        now = datetime.now(UTC)
        with self.server.lock:
            self.server.batches[id_] = {"lines": "\n".join(lines) + "\n", "made": now, "n": len(lines)}
        if fault:
            self.server.note("batches", fault=fault)
            self.misbehave(fault)
            return
        self.send(self.batch(id_))

    def item(self, batch: str, item: dict) -> dict:
        """The result of one batch item."""
        fault = self.server.draw("item", (*ITEM_FAULTS, *REPLY_FAULTS))
        if fault in ITEM_FAULTS:
            self.server.note("item", key=item["custom_id"], fault=fault, batch=batch)
            error = {"type": "error", "request_id": None, "error": {"type": "api_error", "message": "Internal server error"}}
            return {"type": fault, **({"error": error} if fault == "errored" else {})}
        message, usd = self.server.message(item["params"], fault, batch=True)
        self.server.note("item", key=item["custom_id"], fault=fault, paid=usd, id=message["id"], batch=batch)
        return {"type": "succeeded", "message": message}

    def batch(self, id_: str) -> dict:
        made, n = self.server.batches[id_]["made"], self.server.batches[id_]["n"]
        ended = datetime.now(UTC) - made >= timedelta(seconds=self.server.batch_s)
        counts = {"processing": 0 if ended else n, "succeeded": n if ended else 0, "errored": 0, "canceled": 0, "expired": 0}
        return {"id": id_, "type": "message_batch", "processing_status": "ended" if ended else "in_progress", "request_counts": counts,
                "created_at": made.isoformat(), "expires_at": (made + timedelta(days=1)).isoformat(), "archived_at": None,
                "cancel_initiated_at": None, "ended_at": made.isoformat() if ended else None,
                "results_url": f"{self.server.url}/v1/messages/batches/{id_}/results" if ended else None}

    def http_fault(self, path: str, params: dict, fault: str | None = None) -> bool:
        """Inject a fault of the connection; True where the request is done with."""
        fault = self.server.draw(path, HTTP_FAULTS) if fault is None else fault
        if not fault:
            return False
        paid, key, id_ = 0.0, key_of(params) if params else "", ""
        if fault in (*PAID_FAULTS, "midstream") and path == "messages":
            message, paid = self.server.message(params, "", batch=False)
            id_ = message["id"]
        self.server.note(path, key=key, fault=fault, paid=paid, delivered=fault == "midstream" and bool(paid), id=id_)
        self.misbehave(fault, id_)
        return True

    def misbehave(self, fault: str, id_: str = ""):
        """Answer as the fault says. The odd ones: byte by byte, only half closed, without end, cut off by an error, or no JSON of the API's."""
        status = "200 OK" if not fault.endswith("_error") else f"{self.server.random.choice(list(ERRORS))} Error"
        if fault.isdigit():
            self.error(int(fault), ERRORS[fault], "try later", {"retry-after": "0.01"} if fault in ("429", "529") else {})
        elif fault.startswith("timeout"):
            self.hang()
        elif fault == "midstream":
            self.send(f'event: message_start\ndata: {{"message": {{"id": "{id_}"}}}}\n\nevent: error\ndata: {{"type": "error", "error": {{"type": "overloaded_error"}}}}\n\n', kind="text/event-stream")
        elif fault.startswith("odd"):
            self.send(self.server.random.choice(ODD_BODIES), status=int(status[:3]))
        elif fault == "half_closed":
            self.connection.shutdown(socket.SHUT_WR)
            self.hang()
        elif fault.startswith(("slow", "oversized")):
            self.endless(status, (b" ", 0.02) if fault.startswith("slow") else (b" " * 65536, 0.0))
        elif fault == "half_body":
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{\"id\": \"msg")
            self.cut()
        else:
            self.cut()

    def endless(self, status: str, part: tuple[bytes, float]):
        """A body of which another part comes every so many seconds, until the client leaves."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.write(f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: 1000000000\r\n\r\n".encode())
            for _ in range(10_000):
                self.wfile.write(part[0])
                time.sleep(part[1])

    def hang(self):
        time.sleep(self.server.hang_s)
        self.cut()

    def cut(self):
        """Reset the connection."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def error(self, status: int, kind: str, message: str, headers: dict | None = None):
        self.send({"type": "error", "error": {"type": kind, "message": message}}, status=status, headers=headers)

    def send(self, content, *, status: int = 200, kind: str = "application/json", headers: dict | None = None):
        body = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), "request-id": "req_1", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(**settings):
    """A running server."""
    server = Loopback(**settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
