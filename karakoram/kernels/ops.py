"""The menu: every operation, its implementations, and how one is chosen.

    linear      x · Wᵀ for a packed matrix              int4, bf16, fp8
    linear_by_head  the same, each head by its own rows  absorbed queries and values
    mlp         SwiGLU with packed matrices              shared experts, dense layers
    moe         the routed experts of a layer            int4, bf16, fp8
    shadow_make, shadow_expand   two bits of four         int4, for experts that would come late
    mla_decode  latent attention, one query a sequence   bf16 cache, contiguous or in blocks
    mla_prefill the same expanded, for pieces of prompts  kv_b as `linear`
    rms_norm, latent_append, route                       what lies between, one call each
    decode_layers, decode_attention                      all of the above for whole layers, in one call

Each has the same signature in `reference` (plain torch) and runs in C++ where that can be built (`cpu`). Chosen by the
argument `implementation`, else by KARAKORAM_ISA (an instruction set, or "reference"), else by what is there.
`docs/kernels.md` tells what is computed in which precision, and how fast.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from karakoram.errors import FormatError, InputError
from karakoram.kernels import packed, reference
from karakoram.kernels.cpu.library import PANELS, Library, describe, describe_packed, library
from karakoram.kernels.layer import Stack
from karakoram.kernels.packed import PackedExperts, PackedMatrix

IMPLEMENTATIONS = ("cpu", "reference")
VARIABLE = "KARAKORAM_ISA"


@cache
def _prepared() -> Library | None:
    """The library with the environment's wishes applied; None if the reference is to serve."""
    wish = os.environ.get(VARIABLE, "auto") or "auto"
    if wish == "reference":
        return None
    found = library()
    if found is None:
        return None
    if not found.c.k2_isa_available(wish.encode()):
        others = [name for name in found.isas() if name != "amx_emulated"]
        raise InputError(f"{VARIABLE}={wish} cannot be used here.", f"Choose one of {', '.join(others)}, reference.")
    found.choose_isa(wish)
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and 0 < int(given) < found.threads:
        found.choose_threads(int(given))
    return found


def chosen(implementation: str | None = None) -> Library | None:
    """The library that an operation will run on, None for the reference. Raises InputError for what is not there."""
    if implementation == "reference":
        return None
    if implementation not in (None, "cpu"):
        raise InputError(
            f"There is no implementation {implementation!r}.", f"Choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    found = _prepared()
    if implementation == "cpu" and found is None:
        raise InputError("The CPU kernels are not there.", f"Unset {VARIABLE}, and see `k2 doctor`.")
    return found


@contextmanager
def using(isa: str | None = None, threads: int | None = None) -> Iterator[str]:
    """Within it, kernels run on this instruction set and number of threads: for benches and tests. Gives its name."""
    found = chosen("cpu")
    assert found is not None
    before = found.isa, found.threads
    try:
        if isa is not None:
            found.choose_isa(isa)
        if threads is not None:
            found.choose_threads(threads)
        yield found.isa
    finally:
        found.choose_isa(before[0])
        found.choose_threads(before[1])


def deterministic(on: bool) -> bool:
    """Whether, from now on and in the whole process, a row's bits may not depend on the other rows of a call.

    Returns what was chosen before. On the kernels they depend on them only with AMX, whose matrix unit sums in another
    order than the instructions for few rows: there, this leaves it alone. Everywhere else it changes nothing and costs
    nothing. Nothing is promised for the reference (torch chooses its order of sums by shape).
    """
    found = _prepared()
    if found is None:
        return False
    before = found.deterministic
    found.choose_deterministic(on)
    return before


def describe_choice() -> str:
    """For `k2 doctor`: the implementation in use, and what else there is."""
    found = _prepared()
    if found is None:
        return "reference (plain torch)"
    others = [name for name in found.isas() if name not in (found.isa, "amx_emulated")]
    return f"cpu, {found.isa}, {found.threads} threads; also {', '.join(others)}"


# ------------------------------------------------------------------------------------------------ packing


def _room(kind: packed.Kind, outputs: int, inputs: int, out: Tensor | None) -> PackedMatrix:
    """Checked before anything is written: the library takes the size of `out` on trust."""
    size = packed.packed_bytes(kind, outputs, inputs)
    return PackedMatrix(torch.empty(size, dtype=torch.uint8) if out is None else out, kind, outputs, inputs)


def _sizes(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise FormatError(f"{name} is {tensor.dtype} {list(tensor.shape)}.", f"It must be {dtype} and a matrix.")
    return tensor.shape[0], tensor.shape[1]


def _check_finite(scale: Tensor, kind: packed.Kind) -> None:
    if not bool(scale.isfinite().all()):
        raise FormatError(f"A scale of an {kind} weight is infinite or not a number.", "The checkpoint is damaged.")


def pack_int4(codes: Tensor, scale: Tensor, out: Tensor | None = None) -> PackedMatrix:
    """weight_packed int32 [N, K/8] and weight_scale bf16 [N, K/32] -> panels, into `out` (uint8) if given."""
    outputs, groups = _sizes("weight_scale", scale, torch.bfloat16)
    matrix = _room("int4", outputs, groups * 32, out)
    _check_finite(scale, "int4")
    if (lib := chosen()) is None:
        matrix.data.copy_(packed.pack_int4(codes, scale))
    else:
        lib.call("k2_pack_int4", describe(codes), describe(scale), _packed(matrix))
    return matrix


def pack_bf16(weight: Tensor, out: Tensor | None = None) -> PackedMatrix:
    """bf16 [N, K] -> panels."""
    matrix = _room("bf16", *_sizes("weight", weight, torch.bfloat16), out)
    if (lib := chosen()) is None:
        matrix.data.copy_(packed.pack_pairs(weight).view(torch.uint8))
    else:
        lib.call("k2_pack_bf16", describe(weight), _packed(matrix))
    return matrix


def pack_fp8(weight: Tensor, scale: Tensor, out: Tensor | None = None) -> PackedMatrix:
    """float8_e4m3fn [N, K] and weight_scale_inv float32 [N/128, K/128] -> panels."""
    matrix = _room("fp8", *_sizes("weight", weight, torch.float8_e4m3fn), out)
    _check_finite(scale, "fp8")
    codes = weight.view(torch.uint8)
    if (lib := chosen()) is None:
        matrix.data.copy_(torch.cat((packed.pack_pairs(codes), scale.contiguous().flatten().view(torch.uint8))))
    else:
        lib.call("k2_pack_fp8", describe(codes), describe(scale), _packed(matrix))
    return matrix


def shadow_make(panels: Tensor) -> Tensor:
    """uint8 bytes of int4 panels -> their two-bit shadow, 5/9 of the bytes; see `packed.shadow_make`."""
    if panels.dtype != torch.uint8 or panels.ndim != 1 or panels.numel() % packed.BLOCK_BYTES["int4"]:
        raise FormatError(f"{panels.dtype} {list(panels.shape)} are no int4 panels.", "Give whole blocks of 576 bytes.")
    if (lib := chosen()) is None:
        return packed.shadow_make(panels)
    size = panels.numel() // packed.BLOCK_BYTES["int4"] * packed.SHADOW_BLOCK_BYTES
    shadow = torch.empty(size, dtype=torch.uint8)
    lib.call("k2_shadow_make", describe(panels), describe(shadow))
    return shadow


def shadow_expand(shadow: Tensor, out: Tensor) -> None:
    """A shadow as panels that the kernels compute with, into `out`; see `packed.shadow_expand`."""
    if (lib := chosen()) is None:
        out.copy_(packed.shadow_expand(shadow))
    else:
        lib.call("k2_shadow_expand", describe(shadow), describe(out))


# ------------------------------------------------------------------------------------------------ operations


def _packed(matrix: PackedMatrix) -> bytes:
    found = matrix.described.get("cpu")
    if found is None:
        found = matrix.described["cpu"] = describe_packed(matrix.data, matrix.kind, matrix.outputs, matrix.inputs)
    return found


def linear(
    x_TK: Tensor, weight: PackedMatrix, out_dtype: torch.dtype = torch.bfloat16, implementation: str | None = None
) -> Tensor:
    """x · weightᵀ: bf16 [T, K] -> bf16 or float32 [T, N]."""
    if (lib := chosen(implementation)) is None:
        return reference.linear(x_TK, weight, out_dtype)
    y_TN = torch.empty(x_TK.shape[0], weight.outputs, dtype=out_dtype)
    lib.call("k2_linear", describe(x_TK), _packed(weight), describe(y_TN))
    return y_TN


def linear_by_head(
    x_THK: Tensor,
    weight: PackedMatrix,
    outputs: int,
    first: int = 0,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Each head by rows of its own: bf16 [T, H, K] -> bf16 [T, H, outputs], in `out` (strided) if given.

    See `reference.linear_by_head`.
    """
    if (lib := chosen(implementation)) is None:
        y_THN = reference.linear_by_head(x_THK, weight, outputs, first)
        return y_THN if out is None else out.copy_(y_THN)
    y_THN = torch.empty(*x_THK.shape[:2], outputs, dtype=x_THK.dtype) if out is None else out
    lib.call("k2_linear_by_head", describe(x_THK), _packed(weight), ctypes.c_int64(first), describe(y_THN))
    return y_THN


def mlp(
    x_TD: Tensor, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix, implementation: str | None = None
) -> Tensor:
    """down(silu(gate(x)) · up(x)): bf16 [T, D] -> bf16 [T, D]."""
    if (lib := chosen(implementation)) is None:
        return reference.mlp(x_TD, gate, up, down)
    y_TD = torch.empty(x_TD.shape[0], down.outputs, dtype=x_TD.dtype)
    lib.call("k2_mlp", describe(x_TD), _packed(gate), _packed(up), _packed(down), describe(y_TD))
    return y_TD


def _shared(shared: Iterable[PackedMatrix] | None) -> bytes | None:
    if shared is None:
        return None
    parts = [_packed(matrix) for matrix in shared]
    if len(parts) != 3:  # the library reads three
        raise InputError(f"There are {len(parts)} shared matrices.", "Give gate, up and down.")
    return b"".join(parts)


def moe(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: PackedExperts,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Σ_k weights[t, k] · expert[ids[t, k]](x[t]) (+ shared(x[t])): bf16 [T, D] -> bf16 [T, D].

    ids int64 or int32 [T, K], weights float32 [T, K]. The sum runs over k in order, whatever order experts ran in.
    """
    if (lib := chosen(implementation)) is None:
        return reference.moe(x_TD, ids_TK, weights_TK, experts, shared)
    if x_TD.ndim != 2 or x_TD.shape[1] != experts.hidden:
        raise InputError(
            f"x is {list(x_TD.shape)}, the experts have {experts.hidden} inputs.", "Take this layer's experts."
        )
    places = (ctypes.c_void_p * experts.experts)(*experts.addresses)
    return _at_once(lib, x_TD, ids_TK, weights_TK, places, experts.intermediate, experts.kind, shared)


def moe_scattered(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    records: Mapping[int, Tensor],
    experts: int,
    intermediate: int,
    kind: packed.Kind,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None,
) -> Tensor:
    """`moe` with each expert's record (a row of `PackedExperts.records`) where it lies. Only on the library.

    Raises InputError where tokens chose an expert that has no record.
    """
    lib = chosen("cpu")
    assert lib is not None
    size = packed.record_bytes(x_TD.shape[-1], intermediate, kind)
    places = (ctypes.c_void_p * experts)()
    for expert, record in records.items():
        if record.dtype != torch.uint8 or record.numel() != size or not record.is_contiguous():
            raise InputError(
                f"The record of expert {expert} is {record.dtype} {list(record.shape)}.", f"It must be {size} bytes."
            )
        places[expert] = record.data_ptr()
    return _at_once(lib, x_TD, ids_TK, weights_TK, places, intermediate, kind, shared)


def _at_once(
    lib: Library,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    places: "ctypes.Array[ctypes.c_void_p]",
    intermediate: int,
    kind: packed.Kind,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None,
) -> Tensor:
    y_TD = torch.empty_like(x_TD)
    lib.call(
        "k2_moe_at_once", describe(x_TD), describe(ids_TK), describe(weights_TK), places,
        ctypes.c_int64(len(places)), ctypes.c_int64(intermediate), ctypes.c_int32(PANELS[kind]), _shared(shared),
        describe(y_TD),
    )  # fmt: skip
    return y_TD


def moe_int4(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: PackedExperts,
    shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`moe` with int4 experts. Raises InputError for others."""
    if experts.kind != "int4":
        raise InputError(f"These experts are {experts.kind}.", "Call `moe`.")
    return moe(x_TD, ids_TK, weights_TK, experts, shared, implementation)


class MoeSteps:
    """`moe` in steps, for experts that arrive one after another: begin (here), `experts`, `finish`.

    The result is the same bits as `moe`'s whatever the order and grouping of the calls. Only on the library.
    """

    def __init__(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        experts: int,
        intermediate: int,
        kind: packed.Kind = "int4",
    ) -> None:
        lib = chosen("cpu")
        assert lib is not None
        self._lib, self._x = lib, x_TD  # x is read again by `shared` and `finish`
        self._handle = ctypes.c_void_p()
        lib.call(
            "k2_moe_begin", describe(x_TD), describe(ids_TK), describe(weights_TK), ctypes.c_int64(experts),
            ctypes.c_int64(intermediate), ctypes.c_int32(PANELS[kind]), ctypes.byref(self._handle),
        )  # fmt: skip
        self._record_bytes = packed.record_bytes(x_TD.shape[1], intermediate, kind)

    def experts(self, ids: Sequence[int], records: Sequence[Tensor]) -> None:
        """Compute these experts' partials; each record is a row of `PackedExperts.records`, empty if no token came.

        Experts that were given before are passed over.
        """
        self._open()
        if len(ids) != len(records):
            raise InputError(f"{len(ids)} experts have {len(records)} records.", "Give each its own.")
        for expert, record in zip(ids, records):
            if record.numel() and not (
                record.dtype == torch.uint8 and record.numel() == self._record_bytes and record.is_contiguous()
            ):
                raise InputError(
                    f"The record of expert {expert} is {record.dtype} {list(record.shape)}.",
                    f"It must be {self._record_bytes} contiguous bytes.",
                )
        numbers = (ctypes.c_int64 * len(ids))(*ids)
        places = (ctypes.c_void_p * len(ids))(*(record.data_ptr() for record in records))
        self._lib.call("k2_moe_experts", self._handle, numbers, places, ctypes.c_int64(len(ids)))

    def partial(self, expert: int, rows_MD: Tensor) -> None:
        """An expert's results from elsewhere, unweighted: float32, its tokens in order, within one token its slots."""
        self._open()
        self._lib.call("k2_moe_partial", self._handle, ctypes.c_int64(expert), describe(rows_MD))

    def shared(self, shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix]) -> None:
        """Compute the shared experts now, while others are awaited, instead of in `finish`."""
        self._open()
        self._lib.call("k2_moe_shared", self._handle, _shared(shared))

    def finish(self, shared: tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None = None) -> Tensor:
        """Sum the slots. Raises InputError if an expert that tokens chose never came; the handle is gone either way."""
        self._open()
        y_TD = torch.empty_like(self._x)
        handle, self._handle = self._handle, ctypes.c_void_p()
        self._lib.call("k2_moe_finish", handle, _shared(shared), describe(y_TD))
        return y_TD

    def _open(self) -> None:
        if not self._handle:
            raise InputError("These experts are summed already.", "Begin anew.")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.c.k2_moe_drop(self._handle)


def mla_decode(
    q_BHx: Tensor,
    cache: Tensor,
    lengths_B: Tensor,
    latent: int,
    scale: float,
    blocks: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Absorbed attention, one query a sequence: bf16 [B, H, L + R] -> bf16 [B, H, L]; see `reference.mla_decode`."""
    if (lib := chosen(implementation)) is None:
        return reference.mla_decode(q_BHx, cache, lengths_B, latent, scale, blocks)
    out_BHL = torch.empty(*q_BHx.shape[:2], latent, dtype=q_BHx.dtype)
    lib.call(
        "k2_mla_decode", describe(q_BHx), describe(cache), None if blocks is None else describe(blocks),
        describe(lengths_B), ctypes.c_int64(latent), ctypes.c_float(scale), describe(out_BHL),
    )  # fmt: skip
    return out_BHL


def mla_prefill(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    latent_SL: Tensor,
    k_rope_SR: Tensor,
    kv_b: PackedMatrix,
    lengths_T: Tensor,
    scale: float,
    implementation: str | None = None,
) -> Tensor:
    """Expanded attention of many queries over one sequence: bf16 -> [T, H, V]; see `reference.mla_prefill`."""
    if (lib := chosen(implementation)) is None:
        return reference.mla_prefill(q_nope_THN, q_rope_THR, latent_SL, k_rope_SR, kv_b, lengths_T, scale)
    tokens, heads, nope = q_nope_THN.shape
    out_THV = torch.empty(tokens, heads, kv_b.outputs // heads - nope, dtype=q_nope_THN.dtype)
    lib.call(
        "k2_mla_prefill", describe(q_nope_THN), describe(q_rope_THR), describe(latent_SL), describe(k_rope_SR),
        _packed(kv_b), describe(lengths_T), ctypes.c_float(scale), describe(out_THV),
    )  # fmt: skip
    return out_THV


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, implementation: str | None = None) -> Tensor:
    """x / rms(x) · weight: bf16 [T, D] -> bf16 [T, D]."""
    if (lib := chosen(implementation)) is None:
        return reference.rms_norm(x_TD, weight_D, eps)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    lib.call("k2_rms_norm", describe(x_TD), describe(weight_D), ctypes.c_float(eps), describe(y_TD))
    return y_TD


def latent_append(
    kv_nx: Tensor,
    norm_L: Tensor,
    eps: float,
    q_rope_nHR: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    positions_n: Tensor,
    cache_BSx: Tensor,
    queries_nHx: Tensor,
    implementation: str | None = None,
) -> None:
    """New tokens into the cache, their queries' rope part beside the absorbed one; see `reference.latent_append`."""
    if (lib := chosen(implementation)) is None:
        reference.latent_append(kv_nx, norm_L, eps, q_rope_nHR, cos_nP, sin_nP, positions_n, cache_BSx, queries_nHx)
        return
    lib.call(
        "k2_latent_append", describe(kv_nx), describe(norm_L), ctypes.c_float(eps), describe(q_rope_nHR),
        describe(cos_nP), describe(sin_nP), describe(positions_n), ctypes.c_int64(len(kv_nx) // len(cache_BSx)),
        describe(cache_BSx), describe(queries_nHx),
    )  # fmt: skip


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    count: int,
    groups: int,
    best_groups: int,
    normalise: bool,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Routing logits float32 [T, E] -> expert ids int64 [T, K] and weights float32 [T, K]; see `reference.route`."""
    if (lib := chosen(implementation)) is None:
        return reference.route(logits_TE, bias_E, count, groups, best_groups, normalise, scale)
    ids_TK = torch.empty(len(logits_TE), count, dtype=torch.int64)
    weights_TK = torch.empty(len(logits_TE), count)
    lib.call(
        "k2_route", describe(logits_TE), describe(bias_E), ctypes.c_int64(groups), ctypes.c_int64(best_groups),
        ctypes.c_int32(normalise), ctypes.c_float(scale), describe(ids_TK), describe(weights_TK),
    )  # fmt: skip
    return ids_TK, weights_TK


def decode_layers(
    stack: Stack,
    x_nD: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    lengths_n: Tensor,
    cache: Tensor,
    blocks_nM: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Tokens that attend absorbed through whole layers: bf16 [n, D] -> bf16 [n, D]; see `reference.decode_layers`."""
    if not stack.whole:
        raise InputError("The experts of a layer are not part of it.", "Use decode_attention, and feed it yourself.")
    if (lib := chosen(implementation)) is None:
        return reference.decode_layers(stack, x_nD, cos_nP, sin_nP, lengths_n, cache, blocks_nM)
    y_nD = x_nD.clone(memory_format=torch.contiguous_format)
    lib.call(
        "k2_decode_layers", stack.describe(), ctypes.c_int64(len(stack.layers)), describe(cos_nP), describe(sin_nP),
        None if blocks_nM is None else describe(blocks_nM), describe(lengths_n), describe(cache), describe(y_nD),
    )  # fmt: skip
    return y_nD


def decode_attention(
    stack: Stack,
    x_nD: Tensor,
    cos_nP: Tensor,
    sin_nP: Tensor,
    lengths_n: Tensor,
    cache: Tensor,
    blocks_nM: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of a stack's one layer: x + attention, and its norm; see `reference.decode_attention`."""
    if len(stack.layers) != 1:
        raise InputError(f"A stack of {len(stack.layers)} layers has many halves.", "Give one layer.")
    if (lib := chosen(implementation)) is None:
        return reference.decode_attention(stack, x_nD, cos_nP, sin_nP, lengths_n, cache, blocks_nM)
    y_nD, normed_nD = x_nD.clone(memory_format=torch.contiguous_format), torch.empty(x_nD.shape, dtype=x_nD.dtype)
    lib.call(
        "k2_decode_attention", stack.describe(), describe(cos_nP), describe(sin_nP),
        None if blocks_nM is None else describe(blocks_nM), describe(lengths_n), describe(cache), describe(y_nD),
        describe(normed_nD),
    )  # fmt: skip
    return y_nD, normed_nD
