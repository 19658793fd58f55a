"""Compile the small pieces between the matrix products, where a compiler and Python's headers are at hand.

On a CPU the products of a small model run on AMX in about the time that the norms, rotations and sums around them take
in eager mode, each of which walks through memory five to ten times. torch.compile turns every one into a single pass
(RMSNorm of [8192, 256] forward and backward: 17 ms -> 3 ms on two cores). Only these pieces are compiled, with dynamic
shapes: seconds, not the minutes that a whole model takes, and every shape of batch shares the code.

In float32 the projections between them go to the library that multiplies faster (`model/backward/products.py`).
"""

from collections.abc import Callable
from functools import partial
from subprocess import SubprocessError
from typing import Any

import torch
import torch.fx.experimental._config as shape_settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karakoram.model.attention import LatentAttention
from karakoram.model.backward.grouped import PLAIN, RowPieces
from karakoram.model.backward.products import linear, runs_onednn_float32
from karakoram.model.layers import RMSNorm, SwiGLU
from karakoram.model.moe import LocalExperts
from karakoram.model.router import Router
from karakoram.model.transformer import Transformer
from karakoram.train.loss import SliceLoss, loss_and_gradient


def fuse(model: Transformer) -> SliceLoss:
    """Replace the small pieces by compiled ones, in place, and return the loss to train with: compiled too.

    Where compiling cannot work, nothing is replaced and the plain loss is returned.
    """
    if not _compiler_works():
        return loss_and_gradient
    # Else sizes that happen to be equal in the first batch (16 rows and 16 rotations, 256 tokens and 256 channels) are
    # taken for one and the same, and the next batch compiles everything anew: 20 s, seen with [16, 256].
    shape_settings.use_duck_shape = False
    for module in model.modules():
        if isinstance(module, RMSNorm | Router):
            module.compile(dynamic=True)
        elif isinstance(module, LatentAttention):
            module.project = _compiled(module.project)
            _multiply_faster(module.kv_b_proj, module.o_proj)
        elif isinstance(module, SwiGLU):
            _multiply_faster(module.gate_proj, module.up_proj, module.down_proj)
        elif isinstance(module, LocalExperts):
            module.activate = _compiled(module.activate)
            module.pieces = RowPieces(*map(_compiled, PLAIN))
    return _compiled(loss_and_gradient)


def recompute(model: Transformer) -> None:
    """Keep only each layer's input for the backward pass, in place: a layer runs twice, and its inside takes no memory.

    A third more arithmetic (four forwards' worth instead of three) for the activations of one layer instead of all.
    """
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def _multiply_faster(*projections: nn.Module) -> None:
    """Projections outside of the compiled pieces, where they are plain ones (LoRA's are not)."""
    for projection in projections:
        if type(projection) is nn.Linear and runs_onednn_float32(projection.weight):
            projection.forward = partial(_project, projection)  # pyright: ignore[reportAttributeAccessIssue]


def _project(projection: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, projection.weight)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _compiler_works() -> bool:
    try:
        return bool(
            torch.compile(lambda x: x.float() * 2 + 1, dynamic=True)(torch.ones(4, dtype=torch.bfloat16)).sum() == 12
        )
    except (RuntimeError, OSError, ImportError, SubprocessError):  # no compiler, no headers, a cache that is read-only
        return False
