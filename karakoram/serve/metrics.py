"""What an operator watches, under the names that vLLM's dashboards use (vllm-project/vllm, docs/usage/metrics.md).

Everything is observed in the event loop, once for each piece of news, so a histogram is a list of counts and needs no
lock: 0.4 µs an observation, where prometheus_client's own takes 2 to 3. The library still writes the page: `Metrics` is
a collector in a registry of its own, so that two servers in one process (tests) do not share counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. vLLM's buckets, with finer ones below: nano answers in milliseconds.
_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Timing:
    """A histogram that one thread fills. Bucket i counts values up to bounds[i]; the last one, the rest."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, in seconds."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def family(self, model: str) -> HistogramMetricFamily:
        """As Prometheus has it: cumulated."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*[str(float(b)) for b in self.bounds], "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self.name, self.text, labels=["model_name"])
        family.add_metric([model], buckets, self.sum)
        return family


class Metrics:
    """The counts of one server. Filled in the event loop, and read there."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.first_token = Timing("vllm:time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self.between = Timing("vllm:inter_token_latency_seconds", "From one token to the next", _BETWEEN)
        self.per_token = Timing(
            "vllm:time_per_output_token_seconds", "Mean time of a request's tokens after the first", _BETWEEN
        )
        self.whole = Timing("vllm:e2e_request_latency_seconds", "Arrival to last token", _WHOLE)
        self.queued = Timing("vllm:request_queue_time_seconds", "Arrival to first step", _WHOLE)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._source: Any = None
        self._session: Any = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type]  # a collector is whatever can `collect`

    def watch(self, source: Any, session: Any) -> None:
        """Take the gauges from this engine (`stats()`, where it has that) and session."""
        self._source, self._session = source, session

    def finish(self, reason: str, prompt_tokens: int) -> None:
        """A request has ended."""
        self.finished[_REASONS.get(reason, "error")] += 1
        self.prompt_tokens += prompt_tokens

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Any]:
        """All families, for the registry."""
        for timing in (self.first_token, self.between, self.per_token, self.whole, self.queued):
            yield timing.family(self.model)
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts", self.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens written", self.generation_tokens)
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that have ended", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.finished.items():
            success.add_metric([self.model, reason], count)
        yield success
        invalid = int(getattr(self._session, "invalid_calls", 0))
        yield self._counter("karakoram:invalid_tool_calls", "Tool calls that break their schema: stays 0", invalid)
        yield from self._of_engine()

    def _of_engine(self) -> Iterable[Any]:
        stats = getattr(self._source, "stats", None)
        seen: Any = stats() if callable(stats) else {}
        blocks = seen.get("cache_blocks", 0)
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch", seen.get("running")),
            ("vllm:num_requests_waiting", "Requests in the queue", seen.get("waiting")),
            ("vllm:kv_cache_usage_perc", "Cache blocks in use, 1 is all", self._share(seen, blocks)),
            ("karakoram:experts_capacity", "Experts that memory holds", seen.get("experts_capacity")),
        ):
            if value is not None:
                family = GaugeMetricFamily(name, text, labels=["model_name"])
                family.add_metric([self.model], value)
                yield family
        for name, text, key in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", "prefix_query_tokens"),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache", "prefix_hit_tokens"),
            ("vllm:num_preemptions", "Requests put back into the queue", "preemptions"),
            ("karakoram:experts_demanded", "Experts of layers that batches chose", "experts_demanded"),
            ("karakoram:experts_hits", "Of these, in memory or on their way", "experts_hits"),
            ("karakoram:experts_guessed", "Experts read before they were wanted", "experts_guessed"),
            ("karakoram:experts_guessed_right", "Of these, wanted at once", "experts_guessed_right"),
            ("karakoram:experts_read_bytes", "Bytes of experts read from disk", "experts_bytes_read"),
            ("karakoram:experts_wait_seconds", "Time with nothing to do but wait for the disk", "experts_waited_s"),
        ):
            if key in seen:
                yield self._counter(name, text, seen[key])

    @staticmethod
    def _share(seen: Any, blocks: float) -> float | None:
        return seen["cache_used_blocks"] / blocks if blocks and "cache_used_blocks" in seen else None

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family
