"""What the sampler promises, said as slowly as it can be said: Python numbers, one token at a time."""

import math
from collections.abc import Sequence as Ids

from karakoram.engine.request import Request, Sampling
from karakoram.engine.sequence import Sequence


def sequence(sampling: Sampling, prompt: Ids[int] = (1,), output: Ids[int] = (), seed: int = 0) -> Sequence:
    """A sequence that has emitted `output`."""
    made = Sequence(Request("x", prompt, 1 << 20, sampling), lambda news: None, seed)
    made.tokens, made.prompt_tokens, made.new_tokens = [*prompt, *output], len(prompt), len(output)
    for token in output:
        made.counts[token] = made.counts.get(token, 0) + 1
    return made


def adjusted(
    logits: Ids[float], sampling: Sampling, prompt: Ids[int], output: Ids[int], allowed: Ids[int] | None
) -> list[float]:
    """Bias, repetition over prompt and output, presence and frequency over output, mask."""
    values = list(logits)
    for token in range(len(values)):
        values[token] += sampling.logit_bias.get(token, 0)
        if token in prompt or token in output:
            r = sampling.repetition_penalty
            values[token] = values[token] / r if values[token] > 0 else values[token] * r
        times = list(output).count(token)
        values[token] -= sampling.frequency_penalty * times + (sampling.presence_penalty if times else 0)
        if allowed is not None and token not in allowed:
            values[token] = -math.inf
    return values


def probabilities(values: Ids[float], sampling: Sampling) -> dict[int, float]:
    """What may be drawn, and how likely: temperature, the k best, the smallest set with top_p of them, min_p."""
    best = max(values)
    weights = [math.exp((value - best) / sampling.temperature) for value in values]
    order = sorted(range(len(values)), key=lambda token: -values[token])
    kept = order[: sampling.top_k or len(order)]
    total, so_far, nucleus = math.fsum(weights[t] for t in kept), 0.0, list[int]()
    for token in kept:
        if nucleus and so_far >= sampling.top_p * total:
            break
        nucleus.append(token)
        so_far = math.fsum((so_far, weights[token]))
    final = [t for t in nucleus if weights[t] >= sampling.min_p * weights[order[0]] and weights[t] > 0]
    mass = math.fsum(weights[t] for t in final)
    return {token: weights[token] / mass for token in final}
