"""Goes through every operation with odd shapes, on the library given: `every_operation.py LIBRARY`, under sanitizers.

Results are compared too, so that what is read beside its place shows even where no sanitizer looks.
"""

import sys
from itertools import product
from pathlib import Path

import torch

from karakoram.errors import KarakoramError
from karakoram.kernels import causal, muon, ops, packed, reference
from karakoram.kernels.cpu.library import Library, describe, describe_packed
from karakoram.kernels.layer import DecoderLayer, Stack
from karakoram.model.backward.causal import causal_attention
from tests.kernels import drawn
from tests.kernels.drawn_layer import SHAPES, Pass, clearly_routed, drawn_layer, drawn_pass, layers_near


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert drawn.near(found, expected)


def packing(lib: Library) -> None:
    for outputs, inputs in ((1, 32), (5, 96), (33, 64), (48, 1408)):
        codes, scale = drawn.int4_parts(outputs, inputs)
        matrix = ops.pack_int4(codes, scale)
        assert torch.equal(matrix.data, packed.pack_int4(codes, scale))
        back, back_scale = torch.empty_like(codes), torch.empty_like(scale)
        panels = describe_packed(matrix.data, "int4", outputs, inputs)
        lib.call("k2_unpack_int4", panels, describe(back), describe(back_scale))
        assert torch.equal(back, codes) and torch.equal(back_scale, scale)


def matrices() -> None:
    for kind in drawn.KINDS:
        for outputs, inputs in ((1, 32), (17, 96), (100, 544), (1, 1), (3, 7), (130, 131)):
            if kind == "int4" and inputs % 32:
                continue
            weight = drawn.matrix(kind, outputs, inputs)
            for tokens in (0, 1, 8, 9, 25, 40):
                x = drawn.rows(tokens, inputs, inputs + 3)
                near(ops.linear(x, weight), reference.linear(x, weight))
        for hidden, width in ((32, 32), (96, 160)):
            parts, x = drawn.feed_forward(kind, hidden, width), drawn.rows(19, hidden)
            near(ops.mlp(x, *parts), reference.mlp(x, *parts))
        weight, x = drawn.matrix(kind, 3 * 48, 96), drawn.rows(5 * 3, 96).view(5, 3, 96)
        near(ops.linear_by_head(x, weight, 32, 16), reference.linear_by_head(x, weight, 32, 16))


def mixtures() -> None:
    for count, hidden, intermediate, tokens, slots in (
        (1, 32, 32, 1, 1),
        (4, 96, 160, 7, 3),
        (5, 224, 32, 70, 2),
        (3, 64, 64, 0, 2),
        (2, 1056, 32, 9, 2),
    ):
        x, experts = drawn.rows(tokens, hidden, hidden + 5), drawn.experts(count, hidden, intermediate)
        ids, weights = drawn.routing(tokens, count, slots, torch.int32)
        shared = drawn.feed_forward("bf16", hidden, 40)
        expected = reference.moe_int4(x, ids, weights, experts, shared)
        near(ops.moe_int4(x, ids, weights, experts, shared), expected)
        step = ops.MoeSteps(x, ids, weights, count, intermediate)
        for e in range(count):
            step.experts([e], [experts.records[e]])
        near(step.finish(shared), expected)
        for kind in ("bf16", "fp8"):
            others = drawn.experts(count, hidden, intermediate + 3, kind)
            near(ops.moe(x, ids, weights, others), reference.moe(x, ids, weights, others))
        del ids
        ops.MoeSteps(x, torch.zeros_like(weights, dtype=torch.int64), weights, count, intermediate)  # dropped


def attention() -> None:
    for batch, heads, latent, rope, lengths in (
        (1, 1, 5, 2, [3]),
        (2, 17, 40, 0, [129, 127]),
        (3, 33, 64, 32, [1025, 1, 140]),
        (0, 2, 16, 16, []),
    ):
        slots, width = max(lengths, default=1), latent + rope
        q = drawn.rows(batch * heads, width, width + 1).unflatten(0, (batch, heads))
        cache, length = drawn.rows(batch * slots, width).view(batch, slots, width), torch.tensor(lengths).long()
        if not batch:
            assert ops.mla_decode(q, cache, length, latent, 0.2).shape == (0, heads, latent)
            continue
        expected = reference.mla_decode(q, cache, length, latent, 0.2)
        near(ops.mla_decode(q, cache, length, latent, 0.2), expected)
        pool, blocks = drawn.in_blocks(cache, 7)
        near(ops.mla_decode(q, pool, length, latent, 0.2, blocks), expected)


def layers() -> None:
    for shape in SHAPES.values():
        layer = clearly_routed(drawn_layer(shape))
        for tokens in (1, 9, 26):
            ours = drawn_pass(shape, tokens, 1, size=7)
            theirs = ours.copy()
            found = ops.decode_layers(Stack((layer,)), *ours)
            assert layers_near(found, ops.decode_layers(Stack((layer,)), *theirs, implementation="reference"))
        one = drawn_pass(shape, 3, 1)
        assert layers_near(ops.decode_attention(Stack((layer._replace(feed=None),)), *one)[0], attended(layer, one))


def attended(layer: DecoderLayer, p: Pass) -> torch.Tensor:
    return ops.decode_attention(Stack((layer,)), *p.copy(), implementation="reference")[0]


def norms() -> None:
    for tokens, width in ((1, 1), (3, 7), (9, 300), (0, 16)):
        x, weight = drawn.rows(tokens, width, width + 1), drawn.rows(1, width)[0]
        near(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def optimizer() -> None:
    if muon.library() is None:
        return
    for n, rows, columns in ((1, 1, 1), (3, 17, 31), (2, 130, 200), (1, 140, 7), (1, 20, 530)):
        stack, norms = drawn.rows(n * rows, columns).view(n, rows, columns), torch.full((n,), (rows * columns) ** 0.5)
        steps = ((3.4445, -4.7750, 2.0315),) * 2
        near(muon.newton_schulz(stack, norms, steps), reference.newton_schulz(stack, norms, steps))
        weight, gradient = torch.randn(n, rows, columns), torch.randn(n, rows, columns)
        expected = reference.momentum(gradient, weight.clone(), 0.9, 1.0, True)
        near(muon.momentum(gradient, weight, 0.9), expected)
        muon.update(weight, stack, 0.9, 0.1)
    parts = [
        tuple(torch.randn(shape) for _ in range(3))
        for shape in ((2, 2, 33, 17), (1, 1), (130, 200), (40, 7), (3, 64, 64))
    ]
    whole = [(g, m.clone(), w.clone()) for g, m, w in parts]
    muon.step(whole, [-0.1] * len(parts), 0.9, ((3.4445, -4.7750, 2.0315),), (0.9, 1.0, True))
    for (gradient, buffer, _), (_, after, _) in zip(parts, whole, strict=True):
        near(after, buffer.lerp(gradient, 0.1))


def training_attention() -> None:
    if causal.library() is None:
        return
    for B, H, T, X, V in ((1, 1, 1, 16, 16), (2, 3, 15, 48, 32), (1, 2, 65, 32, 80), (1, 1, 130, 16, 16)):
        q, k, v, gradient = (torch.randn(B, T, H, width).bfloat16().transpose(1, 2) for width in (X, X, V, V))
        spans = [(row, *ends) for row in range(B) for ends in ((0, T // 3), (T // 3, T)) if ends[0] < ends[1]]
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        found = causal_attention(q, k, v, 0.2, spans)
        ours = torch.autograd.grad(found, (q, k, v), gradient)
        with ops.using("scalar"):
            expected = causal_attention(q, k, v, 0.2, spans)
        near(found.detach(), expected.detach())
        for mine, theirs in zip(ours, torch.autograd.grad(expected, (q, k, v), gradient), strict=True):
            assert (mine.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm() + 1e-6


def refusals() -> None:
    for call in (
        lambda: ops.linear(drawn.rows(1, 63), drawn.matrix("bf16", 16, 64)),
        lambda: ops.MoeSteps(drawn.rows(2, 64), torch.tensor([[0], [9]]), torch.rand(2, 1), 3, 32),
        lambda: ops.MoeSteps(drawn.rows(2, 64), torch.tensor([[0], [1]]), torch.rand(2, 1), 3, 32).finish(),
        lambda: ops.mla_decode(drawn.rows(1, 64)[None], drawn.rows(3, 64)[None], torch.tensor([4]), 32, 1.0),
    ):
        try:
            call()
        except KarakoramError:
            continue
        raise AssertionError("something impossible was computed")


def main() -> None:
    lib = Library(Path(sys.argv[1]))
    ops._prepared = lambda: lib  # type: ignore[assignment]
    torch.manual_seed(0)
    for isa, threads in product(lib.isas(), {1, lib.threads}):
        with ops.using(isa, threads):
            packing(lib)
            matrices()
            mixtures()
            attention()
            layers()
            norms()
            optimizer()
            training_attention()
            refusals()
    print("all done on", *lib.isas())


if __name__ == "__main__":
    main()
