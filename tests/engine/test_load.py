"""Five minutes of everything at once: no error, no hang, memory that stays where it is."""

import gc
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from karakoram.engine.engine import Engine
from karakoram.engine.request import QueueFull, Request, Sampling
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import all_blocks_back, run
from tests.engine.test_constraint import Allows

SECONDS = 300
STATM = Path("/proc/self/statm")
# The cache is written through in the first minute, and the heaps of the interpreter and of torch are as fragmented then
# as they get: after it, 11,000 more requests grew the process by 1.1 MB. One Sequence leaked by each (about 1 kB with
# its lists) would be 11 MB; a leaked block of the cache would not show in bytes and is counted instead.
MOST_GROWTH_BYTES = 6e6


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * 4096


class Client(threading.Thread):
    """Asks one thing after another, of all kinds, hangs up now and then; keeps what went wrong."""

    def __init__(self, engine: Engine, number: int, until: float) -> None:
        super().__init__(name=f"client {number}")
        self.engine, self.until, self.draw = engine, until, Random(number)
        self.wrong: list[str] = []
        self.asked = self.tokens = self.hung_up = 0

    def request(self) -> Request:
        draw, vocabulary = self.draw, 3900
        conversation = models.prompt(300, draw.randint(0, 5), vocabulary)
        own = models.prompt(draw.randint(1, 60), draw.randint(0, 10**6), vocabulary)
        sampling = Sampling(
            temperature=draw.choice([0.0, 0.7, 1.0]), top_p=draw.choice([1.0, 0.9]), top_k=draw.choice([0, 40]),
            min_p=draw.choice([0.0, 0.05]), repetition_penalty=draw.choice([1.0, 1.0, 1.1]),
            seed=draw.choice([None, 1, 2]), logit_bias=draw.choice([{}, dict.fromkeys(range(10, 14), 30.0)]),
        )  # fmt: skip
        constraint: Any = None
        if draw.random() < 0.2:
            constraint = Allows(range(100, 200), None, range(0, 4096, 3), model_rows=128)
        return Request(
            f"{self.name} {self.asked}", conversation[: draw.choice([0, 100, 300])] + own, draw.randint(1, 150),
            sampling,
            logprobs=draw.choice([None, None, 0, 5]), prompt_logprobs=draw.choice([None] * 9 + [1]),
            constraint=constraint, stop_ids=draw.choice([frozenset(), frozenset(range(500))]), client=self.name,
        )  # fmt: skip

    def run(self) -> None:
        while time.monotonic() < self.until and not self.wrong:
            request, self.asked = self.request(), self.asked + 1
            hang_up_after = self.draw.randint(1, 40) if self.draw.random() < 0.2 else 10**6
            try:
                tokens, finish = 0, None
                for news in self.engine.stream(request):
                    tokens, finish = tokens + len(news.tokens), news.finish
                    if tokens >= hang_up_after and finish is None:
                        self.hung_up += 1
                        break
                self.tokens += tokens
                if finish not in ("stop", "length", None) or tokens > request.max_new_tokens:
                    self.wrong.append(f"{request}: {news}")
            except QueueFull:
                continue
            except Exception as error:  # noqa: BLE001  whatever it is, the test is to show it
                self.wrong.append(repr(error))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")
def test_mixed_load_leaves_nothing_behind(nano: Transformer) -> None:
    """Eight clients at a cache that holds half of what they want; then one request alone gives what it gave before."""
    probe = Request("probe", models.prompt(50, 1, 3900), 40, Sampling(temperature=0))
    with Engine(nano, cache_tokens=1536, context=768, most_running=8, most_waiting=6) as engine:
        before, start = run(engine, probe), time.monotonic()
        clients = [Client(engine, number, start + SECONDS) for number in range(8)]
        for client in clients:
            client.start()
        clients[0].join(SECONDS / 5)
        settled = resident_bytes()
        for client in clients:
            client.join(SECONDS + 120)
            assert not client.is_alive(), f"{client.name} hangs"
        assert [wrong for client in clients for wrong in client.wrong] == []
        again = run(engine, probe)  # begins after the cancels of those who hung up
        growth, stats = resident_bytes() - settled, engine.stats()
        print(f"{sum(c.asked for c in clients)} requests, {sum(c.tokens for c in clients)} tokens, ", end="")
        print(f"{sum(c.hung_up for c in clients)} hung up, {growth / 1e6:+.1f} MB, {stats}")
        assert again.tokens == before.tokens
        assert growth < MOST_GROWTH_BYTES
        assert stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
        assert len(engine.pool._leaves) <= 64 + 4 * engine.pool.blocks
        all_blocks_back(engine)
