"""How fast a whole model runs, without its weights: true shapes, random int4, prefill and decode.

Weights are chance, in the layout of the kernels, so a model of 9 GB stands in seconds; what is read and multiplied
per token is what the real one reads and multiplies, only the routing is flatter. `int4` is K2-Thinking's layout
(routed experts int4, the rest bf16), `int4-all` has every projection and the embedding in int4.

Bytes per token: every packed matrix that one token multiplies with, and the latent cache; the embedding's row is not
counted. For a model that does not fit, some of its layers are run, and the whole is estimated from the time of each
kind of layer.
"""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.evals.bench.report import Say, bracketed, silent
from karakoram.formats import int4_group
from karakoram.kernels.packed import BLOCK_BYTES, Kind, PackedMatrix, packed_bytes
from karakoram.model import cost
from karakoram.model.packed.assemble import assemble
from karakoram.model.packed.layers import PackedDecoder
from karakoram.model.packed.modules import PackedAttention, PackedBank, PackedFeedForward, PackedLinear
from karakoram.model.transformer import Transformer

FORMATS = ("int4", "int4-all")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_INT4_BYTES = BLOCK_BYTES["int4"]
_SCALES_AT = 16 * 64 // 2  # behind the codes of 16 outputs × 64 inputs
_PATTERN_BLOCKS = 1 << 16  # 64 × 16 weights each: 38 MB of chance, repeated


class RandomWeights:
    """`model.packed.assemble.Weights` by chance: standard deviation 1/√inputs, so that activations keep their size."""

    def __init__(self, weight_format: str, seed: int = 0) -> None:
        self.int4_all = weight_format == "int4-all"
        self.random = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(0, 256, (_PATTERN_BLOCKS, _INT4_BYTES), generator=self.random, dtype=torch.uint8)
        self.normal = torch.randn(1 << 22, generator=self.random).bfloat16()

    def kind(self, name: str) -> Kind:
        """int4 for experts, and for everything with `int4-all`; else bf16."""
        return "int4" if self.int4_all or ".experts." in name else "bf16"

    def plain(self, name: str, like: Tensor) -> Tensor:
        """Norms are 1, routers small, biases 0."""
        if "norm" in name:
            return torch.ones(like.shape, dtype=like.dtype)
        return (torch.randn(like.shape, generator=self.random) * like.shape[-1] ** -0.5 * (like.ndim > 1)).to(
            like.dtype
        )

    def table(self, name: str, like: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Rows of standard deviation 1."""
        if not self.int4_all:
            return _repeat(self.normal, like.numel()).view(like.shape)
        outputs, inputs = like.shape
        words = _repeat(self.codes.flatten(), outputs * inputs // 2).view(torch.int32)
        scale = torch.full((outputs, inputs // int4_group.GROUP), 0.22, dtype=torch.bfloat16)  # codes' deviation is 4.6
        return words.view(outputs, inputs // 8), scale

    def matrix(self, name: str, outputs: int, inputs: int, out: Tensor | None = None) -> PackedMatrix:
        """Panels of its kind."""
        size = inputs**-0.5
        if self.kind(name) == "bf16":
            data = torch.empty(packed_bytes("bf16", outputs, inputs), dtype=torch.uint8)
            _fill(data.view(torch.bfloat16), self.normal)
            data.view(torch.bfloat16).mul_(size)
            return PackedMatrix(data, "bf16", outputs, inputs)
        data = torch.empty(packed_bytes("int4", outputs, inputs), dtype=torch.uint8) if out is None else out
        blocks = data.view(-1, _INT4_BYTES)
        first = int(torch.randint(0, _PATTERN_BLOCKS // 2, (1,), generator=self.random))
        _fill(blocks, self.codes[first:])
        blocks[:, _SCALES_AT:] = torch.full(((_INT4_BYTES - _SCALES_AT) // 2,), size / 4.6, dtype=torch.bfloat16).view(
            torch.uint8
        )
        return PackedMatrix(data, "int4", outputs, inputs)

    def dense(self, name: str, like: Tensor) -> Tensor:
        """bf16, whatever the format."""
        return _repeat(self.normal, like.numel()).view(like.shape) * like.shape[-1] ** -0.5


def _fill(out: Tensor, pattern: Tensor) -> None:
    for start in range(0, len(out), len(pattern)):
        part = out[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])


def _repeat(pattern: Tensor, count: int) -> Tensor:
    out = torch.empty(count, dtype=pattern.dtype)
    _fill(out, pattern)
    return out


def build(config: ModelConfig, weight_format: str, layers: int | None = None, context: int = 4096) -> Transformer:
    """A model of the true shape (or its first `layers`) with random weights. InputError for an unknown format."""
    if weight_format not in FORMATS:
        raise InputError(f"There is no format {weight_format!r} to bench.", f"Choose one of {', '.join(FORMATS)}.")
    if layers is not None and not config.first_k_dense_replace < layers <= config.num_hidden_layers:
        raise InputError(
            f"{layers} layers are no part of a model of {config.num_hidden_layers} with a mixture in it.",
            f"Choose {config.first_k_dense_replace + 1} to {config.num_hidden_layers}.",
        )
    shape = replace(
        config,
        num_hidden_layers=layers or config.num_hidden_layers,
        max_position_embeddings=max(context, config.max_position_embeddings),
    )
    model = Transformer(shape, device="meta", dtype=torch.bfloat16)
    assemble(model, RandomWeights(weight_format))
    return model.eval().requires_grad_(False)


def bytes_per_token(model: Transformer, context: int) -> int:
    """Bytes that one decoded token reads at this context length."""
    c = model.config
    total = 2 * c.num_hidden_layers * context * (c.kv_lora_rank + c.qk_rope_head_dim)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += module.matrix.data.numel()
        elif isinstance(module, PackedFeedForward):
            total += sum(matrix.data.numel() for matrix in module.matrices)
        elif isinstance(module, PackedBank):
            total += module.packed.records.shape[1] * c.num_experts_per_tok
        elif isinstance(module, PackedAttention):
            total += module.keys.data.numel()
            # of kv_b_proj, which counts whole as a PackedLinear, decoding reads the value half
            values: Any = module.kv_b_proj
            keys_share = c.qk_nope_head_dim / (c.qk_nope_head_dim + c.v_head_dim)
            total -= int(values.matrix.data.numel() * keys_share)
    return total


@dataclass(frozen=True)
class LayerTimes:
    """Median seconds of one decoded token: per dense layer, per mixture layer, and everything else."""

    dense_s: float
    mixture_s: float
    rest_s: float


def prefill_tokens_per_s(model: Transformer, prompt: int, repeats: int = 3) -> float:
    """Median over `repeats` prompts of fresh random ids, logits of the last position included."""
    times = []
    for number in range(repeats):
        ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(number))
        cache = model.new_cache(1, prompt)
        began = time.perf_counter()
        with torch.inference_mode():
            model(ids, cache, logits_for="last")
        times.append(time.perf_counter() - began)
    return prompt / statistics.median(times)


def decode_tokens_per_s(model: Transformer, prompt: int, count: int) -> float:
    """Greedy, after a prompt; median over the tokens."""
    return 1 / _decode_s(model, prompt, count)


def _decode_s(model: Transformer, prompt: int, count: int, prompt_is_over: Callable[[], None] = lambda: None) -> float:
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(1, prompt + count + 1)
    times = []
    with torch.inference_mode():
        token = model(ids, cache, logits_for="last").argmax(-1)
        prompt_is_over()
        for _ in range(count):
            began = time.perf_counter()
            token = model(token, cache, logits_for="last").argmax(-1)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def layer_times(model: Transformer, prompt: int, count: int) -> LayerTimes:
    """Where the time of a decoded token goes, layers called one by one."""
    spent: dict[bool, list[float]] = defaultdict(list)  # by whether the layer is a mixture
    with _TimedLayers(model, spent):
        each = _decode_s(model, prompt, count, spent.clear)
    dense, mixture = (statistics.median(spent[kind]) if spent[kind] else 0.0 for kind in (False, True))
    c = model.config
    rest = each - c.first_k_dense_replace * dense - (c.num_hidden_layers - c.first_k_dense_replace) * mixture
    return LayerTimes(dense, mixture, max(rest, 0.0))


class _TimedLayers:
    """Adds the seconds of every layer's forward pass to `spent`, by whether it holds a mixture."""

    def __init__(self, model: Transformer, spent: dict[bool, list[float]]) -> None:
        self.model, self.spent, self.handles, self.began = model, spent, [], 0.0

    def __enter__(self) -> None:
        self._all_at_once(False)
        for number, layer in enumerate(self.model.model.layers):
            mixture = number >= self.model.config.first_k_dense_replace
            self.handles.append(layer.register_forward_pre_hook(lambda *_: setattr(self, "began", time.perf_counter())))
            self.handles.append(
                layer.register_forward_hook(
                    lambda *_, mixture=mixture: self.spent[mixture].append(time.perf_counter() - self.began)
                )
            )

    def __exit__(self, *_: object) -> None:
        self._all_at_once(True)
        for handle in self.handles:
            handle.remove()

    def _all_at_once(self, on: bool) -> None:
        if isinstance(self.model.model, PackedDecoder):
            self.model.model.one_by_one = not on


def estimate(times: LayerTimes, whole: ModelConfig) -> float:
    """Decoded tokens/s of the whole model, from the times of its kinds of layers."""
    mixtures = whole.num_hidden_layers - whole.first_k_dense_replace
    return 1 / (whole.first_k_dense_replace * times.dense_s + mixtures * times.mixture_s + times.rest_s)


@dataclass(frozen=True)
class Phase:
    """One row: prefill of a prompt, or decoding after one. `bytes_per_token` only where a token reads the weights."""

    phase: str
    prompt_tokens: int
    tokens_per_s: float
    flops_per_token: float
    bytes_per_token: int | None = None

    problem = None

    def to_dict(self, read_gb_per_s: float) -> dict[str, Any]:
        """JSON-ready."""
        row: dict[str, Any] = {
            "phase": self.phase,
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_s": self.tokens_per_s,
            "tflops": self.flops_per_token * self.tokens_per_s / 1e12,
        }
        if self.bytes_per_token is not None:
            rate = self.bytes_per_token * self.tokens_per_s / 1e9
            row |= {"bytes_per_token": self.bytes_per_token, "gb_per_s": rate, "read_share": rate / read_gb_per_s}
        return row


def model_bench(
    preset: str,
    weight_format: str,
    prompts: list[int],
    count: int,
    layers: int | None = None,
    threads: int = 1,
    isa: str | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """The report of a preset's shape with random weights: a row for each prompt length, and one for decoding `count`
    tokens after the first. Beside the rows: preset, format, layers, build_s, peak_memory_bytes, and, where some layers
    stand for all, `estimate`. Raises InputError for a format, layers, threads or prompts that cannot be."""
    config = ModelConfig.preset(preset)
    extra: dict[str, Any] = {"preset": preset, "format": weight_format}

    def rows(_: str, notes: list[str]) -> list[Phase]:
        say("building the weights")
        began = time.perf_counter()
        model = build(config, weight_format, layers, max(prompts) + count)
        extra.update(layers=model.config.num_hidden_layers, build_s=time.perf_counter() - began)
        found = []
        for prompt in prompts:
            say(f"prefill of {prompt:,} tokens")
            flops = cost.flops_per_token(model.config, prompt // 2, absorbed=False)
            found.append(Phase("prefill", prompt, prefill_tokens_per_s(model, prompt), flops))
        say(f"decoding {count} tokens after {prompts[0]:,}")
        rate = decode_tokens_per_s(model, prompts[0], count)
        context = prompts[0] + count // 2
        read = bytes_per_token(model, context)
        flops = cost.flops_per_token(model.config, context)
        found.append(Phase("decode", prompts[0], rate, flops, read))
        if model.config.num_hidden_layers < config.num_hidden_layers:
            extra["estimate"] = _estimate(layer_times(model, prompts[0], count), config)
            notes.append(f"Of {config.num_hidden_layers} layers {model.config.num_hidden_layers} ran; see `estimate`.")
        return found

    report = bracketed(isa, threads, rows, say)
    return report | extra | {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT}


def _estimate(times: LayerTimes, whole: ModelConfig) -> dict[str, Any]:
    return {
        "what": f"an estimate for all {whole.num_hidden_layers} layers, from the times of single layers",
        "decode_tokens_per_s": estimate(times, whole),
        "dense_layer_ms": 1e3 * times.dense_s,
        "mixture_layer_ms": 1e3 * times.mixture_s,
        "rest_ms": 1e3 * times.rest_s,
    }
