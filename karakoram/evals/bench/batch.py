"""How many tokens a second the engine decodes when sequences advance together: true shapes, random int4 weights.

Each sequence has a prompt of its own, so nothing is shared; tokens are greedy and nothing is guessed. The rate is that
of the passes in which all sequences decode (median), prompts excluded, as llama.cpp's batched bench counts it.

What a pass reads grows with the batch until every expert is touched: with E experts of which a token takes K, N tokens
touch E·(1 − (1 − K/E)^N) of them if routing is even. `gb_per_s` and `read_share` are of that estimate.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from karakoram.config import ModelConfig
from karakoram.engine.engine import Engine
from karakoram.engine.request import News, Request, Sampling
from karakoram.errors import KarakoramError
from karakoram.evals.bench.model import build, bytes_per_token
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.model.packed.modules import PackedBank
from karakoram.model.transformer import Transformer


def bytes_per_pass(model: Transformer, sequences: int, context: int) -> int:
    """Bytes that a pass over one token each of so many sequences reads, with even routing."""
    c = model.config
    cache = 2 * c.num_hidden_layers * context * (c.kv_lora_rank + c.qk_rope_head_dim)
    once = bytes_per_token(model, 0)
    experts = sum(m.packed.records.shape[1] for m in model.modules() if isinstance(m, PackedBank))
    touched = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** sequences)
    return once + int(experts * (touched - c.num_experts_per_tok)) + sequences * cache


@dataclass(frozen=True)
class Batch:
    """One row: so many sequences, decoding together."""

    sequences: int
    prompt_tokens: int
    prefill_tokens_per_s: float
    ms_per_pass: float
    bytes_per_pass: int

    problem = None

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        rate = self.bytes_per_pass / self.ms_per_pass / 1e6
        return {
            "sequences": self.sequences,
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "tokens_per_s": 1e3 * self.sequences / self.ms_per_pass,
            "ms_per_pass": self.ms_per_pass,
            "gb_per_s": rate,
            "read_share": rate / read_gb_per_s,
        }


def measure(engine: Engine, sequences: int, prompt: int, count: int) -> tuple[float, float]:
    """Prefill tokens/s of so many prompts, and the median milliseconds of a pass in which all decode.

    The prompts are computed first; then all go on from there at once, so that no prompt stands between them.
    """
    prompts = [
        torch.randint(0, engine.vocab_size, (prompt,), generator=torch.Generator().manual_seed(number)).tolist()
        for number in range(sequences)
    ]
    began = time.perf_counter()
    _run(engine, prompts, 1)
    prefill = sequences * prompt / (time.perf_counter() - began)
    times = _run(engine, prompts, count)
    return prefill, statistics.median(1e3 * (b - a) for a, b in zip(times, times[1:]))


def _run(engine: Engine, prompts: list[list[int]], count: int) -> list[float]:
    """Continue all prompts by so many tokens; when each pass in which all took part was done."""
    arrived = queue.SimpleQueue[tuple[float, list[News]]]()

    def listen(news: Iterable[News]) -> None:
        arrived.put((time.perf_counter(), list(news)))

    for number, ids in enumerate(prompts):
        engine.submit(Request(f"bench-{number}", ids, count, Sampling(temperature=0)), listen)
    ended, whole = 0, list[float]()
    while ended < len(prompts):
        at, news = arrived.get()
        failed = next((one for one in news if one.finish == "error"), None)
        if failed is not None:
            raise KarakoramError(f"The engine failed: {failed.error}")
        ended += sum(one.finish is not None for one in news)
        if len(news) == len(prompts):
            whole.append(at)
    return whole


def batch_bench(
    preset: str,
    weight_format: str,
    counts: list[int],
    prompt: int,
    generate: int,
    layers: int | None = None,
    threads: int = 1,
    isa: str | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """The report: a row for each number of sequences. Raises InputError as `model_bench`."""
    config = ModelConfig.preset(preset)
    extra: dict[str, Any] = {"preset": preset, "format": weight_format}

    def rows(_: str, notes: list[str]) -> list[Batch]:
        say("building the weights")
        context = prompt + 2 * generate
        model = build(config, weight_format, layers, context)
        extra.update(layers=model.config.num_hidden_layers)
        found: list[Batch] = []
        with Engine(model, max(counts) * (context + 16), context, most_running=max(counts), speculate=False) as engine:
            for count in counts:
                say(f"{count} sequences")
                prefill, ms = measure(engine, count, prompt, generate)
                read = bytes_per_pass(model, count, prompt + generate // 2)
                found.append(Batch(count, prompt, prefill, ms, read))
                engine.pool.forget_all()
        notes.append("Bytes of a pass are estimated from even routing.")
        return found

    return bracketed(isa, threads, rows, say) | extra
