"""The naive oracle: a sequence or a plain batch, one token at a time, every step a forward pass over the latent cache.

It is what faster engines are compared with, and fast enough for small models.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model.cache import LatentCache
from karakoram.model.transformer import Transformer

MOST_LIKELY = 1024  # ids in which the share top_p is sought first
PASS_TOKENS = 1024  # of a prompt at once: K2's experts take 0.5 GB of inputs and partial results for so many


def generate(
    model: Transformer,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0,
    top_p: float = 1,
    seed: int | None = None,
    stop_ids: Collection[int] | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `token_ids`; a stop id is yielded and is the last.

    temperature 0 is greedy. stop_ids None means the config's `eos_token_id`. Generation ends at
    `max_position_embeddings`. Raises InputError at once for an empty or too long prompt, ids outside the vocabulary, or
    impossible sampling settings.
    """
    _check(model.config, token_ids, max_new_tokens, temperature, top_p)
    if seed is not None and not 0 <= seed < 2**64:
        raise InputError(f"The seed {seed} is not a number of 64 bits.", "0 ≤ seed < 2**64.")
    stops = end_ids(model.config) if stop_ids is None else frozenset(stop_ids)
    return _generate(model, list(token_ids), max_new_tokens, temperature, top_p, seed, stops)


def _generate(
    model: Transformer,
    prompt: list[int],
    most: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stops: frozenset[int],
) -> Iterator[int]:
    generator = torch.Generator(device=model.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    most = min(most, model.config.max_position_embeddings - len(prompt))
    cache = model.new_cache(1, len(prompt) + most)
    ids_1T = _prefill(model, prompt, cache)
    for _ in range(most):
        with torch.inference_mode():
            logits_V = model(ids_1T, cache, logits_for="last")[0, -1]
            token = sample(logits_V, temperature, top_p, generator)
        yield token
        if token in stops:
            return
        ids_1T = torch.tensor([[token]], device=model.device)


@torch.inference_mode()
def _prefill(model: Transformer, prompt: list[int], cache: LatentCache) -> Tensor:
    """A long prompt's beginning, in passes of bounded memory; returns the ids of its last pass [1, T]."""
    last = (len(prompt) - 1) // PASS_TOKENS * PASS_TOKENS
    for start in range(0, last, PASS_TOKENS):
        model.hidden(torch.tensor([prompt[start : start + PASS_TOKENS]], device=model.device), cache)
    return torch.tensor([prompt[last:]], device=model.device)


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id: the best at temperature 0, else drawn from the smallest set of ids whose probability reaches top_p."""
    if temperature == 0:
        return int(logits_V.argmax())
    # float64, and 0 for the best: a temperature near 0 would otherwise make infinities, and of them nothing
    scaled_V = (logits_V - logits_V.max()).double() / temperature
    p_V = scaled_V.softmax(-1)
    if top_p == 1:
        return int(torch.multinomial(p_V, 1, generator=generator))
    best_k, ids_k = p_V.topk(min(MOST_LIKELY, len(p_V)))
    if float(best_k.sum()) < top_p:  # all are sorted only where that is needed: 12 ms for K2's 163,840
        best_k, ids_k = p_V.sort(descending=True)
    best_k[best_k.cumsum(-1) - best_k >= top_p] = 0  # an id stays if those before it have not reached top_p yet
    return int(ids_k[torch.multinomial(best_k, 1, generator=generator)])


@torch.inference_mode()
def generate_batch(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[int]]:
    """Greedy continuations of several prompts of any lengths, run together; a stop id is the last of its list.

    Rows are right-padded: a slot is a position, so padding is overwritten before any query could see it.
    """
    if not len(prompts):
        return []
    for prompt in prompts:
        _check(model.config, prompt, max_new_tokens, 0, 1)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(lengths_B.max())
    room = min(longest + max_new_tokens, model.config.max_position_embeddings)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long, device=model.device)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    cache = model.new_cache(len(prompts), room)
    hidden_BTD = model.hidden(ids_BT, cache)
    rows_B = torch.arange(len(prompts), device=model.device)
    next_B = model.logits(hidden_BTD[rows_B, lengths_B - 1]).argmax(-1)
    written: list[list[int]] = [[] for _ in prompts]
    while True:
        for row, token in zip(rows_B.tolist(), next_B.tolist(), strict=True):
            written[row].append(token)
        open_B = torch.tensor([token not in stop_ids for token in next_B.tolist()], device=model.device)
        open_B &= (lengths_B + 1 < room) & (len(written[rows_B[0]]) < max_new_tokens)  # open rows are equally long
        if not bool(open_B.any()):
            return written
        if not bool(open_B.all()):
            keep = open_B.nonzero().flatten()
            rows_B, lengths_B, next_B = rows_B[keep], lengths_B[keep], next_B[keep]
            cache.keep_rows(keep)
        next_B = model.logits(model.hidden(next_B[:, None], cache, lengths_B[:, None])[:, -1]).argmax(-1)
        lengths_B = lengths_B + 1


def end_ids(config: ModelConfig) -> frozenset[int]:
    """The config's end-of-sequence ids; none if it names none."""
    ends = config.eos_token_id
    return frozenset() if ends is None else frozenset((ends,) if isinstance(ends, int) else ends)


def _check(
    config: ModelConfig, token_ids: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    if not len(token_ids):
        raise InputError("The prompt is empty.", "Give at least one token; the vocabulary's [BOS] will do.")
    if len(token_ids) >= config.max_position_embeddings:
        raise InputError(
            f"The prompt has {len(token_ids):,} tokens, the context {config.max_position_embeddings:,}.", "Shorten it."
        )
    if not all(0 <= token < config.vocab_size for token in token_ids):
        bad = next(token for token in token_ids if not 0 <= token < config.vocab_size)
        raise InputError(
            f"Token id {bad} is outside the vocabulary of {config.vocab_size:,}.", "Use this model's tokenizer."
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least one token.")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise InputError(
            f"temperature {temperature} with top_p {top_p} cannot be sampled.", "temperature ≥ 0, 0 < top_p ≤ 1."
        )
