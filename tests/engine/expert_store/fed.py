"""The bundled model, fed by a store, and what is compared with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts import open_expert_source
from karakoram.checkpoint.experts.direct import Preadv
from karakoram.engine.expert_store.card import Card
from karakoram.engine.expert_store.policy import policy_named
from karakoram.engine.expert_store.store import ExpertStore
from karakoram.env import bundled_model_dir
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer

PROMPT = [3968, *range(40, 75)]
NEW = 24
EVERYTHING = 80  # nano's experts: 5 layers of 16

Run = tuple[list[int], list[Tensor]]


@dataclass
class FedModel:
    model: Transformer
    store: ExpertStore


@contextmanager
def fed(
    capacity: int,
    policy: str = "hybrid",
    guessing: bool = True,
    floor: int = 0,
    path: Path | None = None,
    preadv: Preadv | None = None,
    threads: int = 2,
    limit_bytes: int | None = None,
    card: Card | None = None,
    shadow_after_s: float | None = None,
) -> Iterator[FedModel]:
    """nano, or the checkpoint at `path`, with so many experts in memory."""
    source = open_expert_source(open_checkpoint(path or bundled_model_dir()), preadv)
    model = load_model(path or bundled_model_dir(), routed_experts=False)
    chosen = policy_named(policy, len(source.layers), source.experts)
    store = ExpertStore(
        source,
        capacity,
        chosen,
        floor,
        guessing,
        threads,
        limit_bytes=limit_bytes,
        card=card,
        shadow_after_s=shadow_after_s,
    )
    if store.shadow is not None:
        store.shadow.fill(store.readers)
    store.attach(model)
    try:
        yield FedModel(model, store)
    finally:
        store.close()


@torch.inference_mode()
def run(model: Transformer, new: int = NEW, prompt: list[int] | None = None) -> Run:
    """Prefill and greedy tokens, with every step's logits."""
    prompt = prompt or PROMPT
    cache = model.new_cache(1, len(prompt) + new)
    ids, tokens, logits = torch.tensor([prompt]), list[int](), list[Tensor]()
    for _ in range(new):
        logits.append(model(ids, cache, logits_for="last")[0, -1])
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens, logits


def same(found: Run, expected: Run) -> bool:
    """To the bit."""
    return found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
