"""What Prometheus may ask: `GET /metrics`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SCORES = (-10, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 10)


class Metrics:
    """The figures of one service."""

    def __init__(self, waiting: Callable[[], int], refused: Callable[[], bool]) -> None:
        """`waiting`: messages in the queue. `refused`: whether the champion failed its self-test."""
        self._all = CollectorRegistry()
        self.requests = Counter(
            "guardloop_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=self._all
        )
        self.seconds = Histogram(
            "guardloop_request_seconds", "Time to answer.", ["endpoint"], buckets=SECONDS, registry=self._all
        )
        self.verdicts = Counter(
            "guardloop_verdicts",
            "Messages by verdict: safe, unsafe or failed.",
            ["version", "role", "verdict"],
            registry=self._all,
        )
        self.scores = Histogram(
            "guardloop_score", "Scores of judged messages.", ["version", "role"], buckets=SCORES, registry=self._all
        )
        self.batch = Histogram(
            "guardloop_batch_messages",
            "Messages judged in one pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._all,
        )
        self.batch_seconds = Histogram(
            "guardloop_batch_seconds", "Time of one pass.", buckets=SECONDS, registry=self._all
        )
        self.lost = Counter("guardloop_log_lost", "Requests that could not be logged.", registry=self._all)
        Gauge("guardloop_waiting_messages", "Messages that wait for the guard.", registry=self._all).set_function(
            waiting
        )
        Gauge(
            "guardloop_champion_refused", "1 where the champion failed its self-test.", registry=self._all
        ).set_function(lambda: float(refused()))

    def text(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return bytes(generate_latest(self._all))
