"""`k2 plan --train` for people: names and texts, made from the report alone."""

from collections.abc import Iterator
from typing import Any

_ITEMS = {
    "parameters": "weights (bf16)",
    "gradients": "gradients (fp32)",
    "masters": "masters (fp32)",
    "momentum": "momentum",
    "activations": "activations",
    "working": "working",
}
_STEP = {
    "compute_s": "computing",
    "waited_s": "waiting for links",
    "bubble_s": "pipeline's ends",
    "exposed_s": "gradients, new weights, states",
    "optimizer_s": "optimizer",
}


def lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a name and a text; a name may repeat."""
    gpu, batch, memory = report["gpu"], report["batch"], report["memory"]
    active = _count(report["active_parameters"])
    yield "model", f"{report['model']}, {_count(report['parameters'])} parameters, {active} active with the head"
    yield "machine", f"{report['gpus']:,} {gpu['name']}, {gpu['flops_per_s'] / 1e12:,.0f} TFLOPS, {_links(gpu)}"
    layout = report["layout"]
    yield "layout", _layout(layout) + (" (K2's own)" if layout["published"] else "")
    yield "layers", " ".join(map(str, layout["layers"])) + " to a stage" if layout["pipeline"] > 1 else "all in one"
    yield (
        "batch",
        f"{batch['tokens']:,} tokens, {batch['micro_batches']:,} sequences of {batch['sequence_tokens']:,} to a rank",
    )
    yield "memory", f"{_size(memory['total_bytes'])} of {_size(memory['usable_bytes'])} on the fullest GPU"
    for name, size in memory["items_bytes"].items():
        yield "memory", f"{_size(size):>9} {_ITEMS[name]}"
    states = f"{_size(memory['states_bytes'])} there, {_size(memory['mean_states_bytes'])} on the mean GPU"
    yield "states", f"weights, gradients, masters, momentum: {states}"
    if memory["host_bytes"]:
        yield "host", f"{_size(memory['host_bytes'])} of {_size(memory['usable_host_bytes'])} for each GPU"
    yield from _not_fitting(report)
    for name, sent in report["communication"].items():
        yield "sent", f"{name + ':':<18}{_sent(sent)}"
    yield (
        "step",
        f"{report['step']['total_s']:.2f} s: "
        + ", ".join(
            f"{words} {report['step'][name]:.2f}" for name, words in _STEP.items() if report["step"][name] >= 0.005
        ),
    )
    extra = report["computed_flops_per_token"] / report["flops_per_token"] - 1
    yield "FLOPs", f"{report['flops_per_token'] / 1e9:,.3g} GFLOP to a token, and {extra:.1%} computed again"
    yield "speed", f"{report['tokens_per_s']:,.0f} tokens/s, MFU {report['mfu']:.1%}"
    yield "time", f"{report['days']:,.1f} days for {report['total_tokens'] / 1e12:g} T tokens"
    if report["fastest"] is not None:
        yield "fastest", _other(report["fastest"])
    for text in report["assumptions"]:
        yield "assumed", text


def _links(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['memory_bytes'] / 1e9:.0f} GB, NVLink {gpu['nvlink_bytes_per_s'] / 1e9:.0f} GB/s, network "
        f"{gpu['network_bytes_per_s'] / 1e9:.0f} GB/s (one direction)"
    )


def _layout(layout: dict[str, Any]) -> str:
    parts = [f"{layout['pipeline']} stages × {layout['experts']} ranks of experts × {layout['replicas']} replicas"]
    if layout["chunks"] > 1:
        parts.append(f"{layout['chunks']} parts to a stage")
    parts += [layout["sharding"], f"recomputation {layout['recompute']}"]
    away = [name for name in ("activations", "optimizer") if layout[f"offload_{name}"]]
    return ", ".join(parts + [f"{' and '.join(away)} in the host's memory"] * bool(away))


def _sent(sent: dict[str, float]) -> str:
    names = ("nvlink", "NVLink"), ("network", "network"), ("host", "host")
    sizes = [f"{_size(sent[key])} {name}" for key, name in names if sent[key]]
    return f"{' + '.join(sizes)}, {sent['seconds']:.3g} s"


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.1 * scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _count(number: float) -> str:
    return f"{number / 1e9:,.1f} billion" if number >= 1e8 else f"{number / 1e6:,.1f} million"


def _not_fitting(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    memory = report["memory"]
    if memory["fits"]:
        return
    where = [(memory["over_bytes"], "the card"), (memory["host_over_bytes"], "the host's memory")]
    yield "too large", ", ".join(f"by {_size(size)} for {name}" for size, name in where if size)
    for one in report["would_fit"]:
        yield "would fit", f"{one['what']}: {_other(one)}"
    if not report["would_fit"]:
        yield "would fit", "nothing that was tried: twice the GPUs again and again, larger cards, other layouts"


def _other(one: dict[str, Any]) -> str:
    return f"{_layout(one['layout'])}: {_size(one['memory_bytes'])}, MFU {one['mfu']:.1%}, {one['days']:,.1f} days"
