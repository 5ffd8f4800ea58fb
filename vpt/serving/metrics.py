"""Counts and times of a server, for Prometheus."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vpt.serving.engine import Engine
from vpt.serving.service import PendingRequest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters and times that `/metrics` reports."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.answers = Counter("vpt_answers", "Answers by how they ended", ["reason"], **own)
        self.refusals = Counter("vpt_refused_requests", "Requests that were refused", ["status"], **own)
        self.tokens = Counter("vpt_tokens", "Tokens: text, visual, said, perceived", ["kind"], **own)
        self.perception = Counter("vpt_perception", "Requests for perception", ["kind", "status"], **own)
        self.first = Histogram("vpt_first_piece_seconds", "Until the first text or step", buckets=SECONDS, **own)
        self.whole = Histogram("vpt_answer_seconds", "Until an answer has ended", buckets=SECONDS, **own)
        Gauge("vpt_running_rows", "Answers being generated", **own).set_function(lambda: len(engine.batch.rows))
        Gauge("vpt_waiting_rows", "Answers that wait", **own).set_function(lambda: len(engine.waiting))
        Gauge("vpt_cached_positions", "Room in the key-value cache, of all rows", **own).set_function(
            lambda: len(engine.batch.rows) * next(iter(engine.batch.cache.layers.values()))[0].shape[2]
        )

    def accepted(self, pending: PendingRequest) -> None:
        """Count a request that was accepted."""
        usage = pending.writer.usage([])["prompt_tokens_details"]
        self.tokens.labels("text").inc(usage["text_tokens"])
        self.tokens.labels("visual").inc(usage["image_tokens"])

    def told(self, pending: PendingRequest, number: int, kind: str, what: Any) -> None:
        """Count an event of a row."""
        now = time.monotonic()
        if kind in ("text", "step", "done") and number not in pending.begun:
            pending.begun.add(number)
            self.first.observe(now - pending.since)
        if kind == "step":
            self.perception.labels(what["kind"], what["status"]).inc()
            self.tokens.labels("perceived").inc(what["visual_tokens"])
        elif kind == "done":
            self.answers.labels("stop" if what.complete else "length").inc()
            self.tokens.labels("said").inc(len(what.ids))
            self.whole.observe(now - pending.since)
        elif kind == "error":
            self.answers.labels("error").inc()

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self.refusals.labels(str(status)).inc()
