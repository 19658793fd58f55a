"""What routing a checkpoint really has: the model runs over drawn tokens, and routers are watched.

The model is the real one. Its routed experts come from the checkpoint one at a time (`ExpertsFromFiles`), each for all
tokens at once, so that memory holds everything else and one expert, and every expert is read at most once.

Legend: B sequences, T tokens, D hidden, E experts, K experts per token, N = B · T, L layers with a mixture.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.checkpoint import Checkpoint, names, open_checkpoint
from karakoram.checkpoint.names import PROJECTIONS
from karakoram.errors import InputError
from karakoram.evals.synth.routing import Statistics
from karakoram.kernels import ops
from karakoram.kernels.packed import empty_experts
from karakoram.model.moe import MixtureOfExperts
from karakoram.model.packed.assemble import CheckpointWeights, assemble, can_run_packed
from karakoram.model.router import choose
from karakoram.model.transformer import Transformer

TOKENS = 224  # of a sequence
LEAST_SEQUENCES = 4
SELECTIONS = 40  # of an expert on average; with 14 chance alone makes 71 % to 74 % for the most popular quarter
SETTLED = 32  # tokens at the start of a sequence that are not counted: the mean over the past is not yet one there
# Read for a measurement: all of Moonlight, or two mixtures of K2 (the last one's experts are not needed).
MAX_EXPERT_BYTES = 12 << 30


@dataclass(frozen=True)
class Measured:
    """Over all layers, and layer by layer."""

    statistics: Statistics
    by_layer: dict[int, Statistics]  # recall of a layer: its experts, foretold in the layer before
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self.statistics), "tokens": self.tokens, "layers": len(self.by_layer), "seconds": self.seconds}


class Routes:
    """What each router saw and chose: hidden states [N, D] and ids [N, K] by layer, in the order of the passes.

    A router is watched by a hook, so the passes must call modules (`watch=` or `experts=` of the model see to that).
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.hidden: dict[int, list[Tensor]] = {}
        self.ids: dict[int, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Routes":
        for number, layer in enumerate(self.model.model.layers):
            mixture: Any = layer.mlp
            if isinstance(mixture, MixtureOfExperts):
                self.hidden[number], self.ids[number] = [], []
                hook = self._hook(number)
                self._handles.append(mixture.gate.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int) -> Callable[..., None]:
        def see(_: object, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            self.hidden[number].append(inputs[0].detach().clone())
            self.ids[number].append(output[0].detach().clone())

        return see

    def statistics(self, sequences: int = 1, settled: int = SETTLED) -> dict[int, Statistics]:
        """By layer; rows are `sequences` of equal length, one after another. Of each, `settled` tokens are left out."""
        c, found = self.model.config, {}
        for number in self.ids:
            ids_BTK = torch.cat(self.ids[number]).unflatten(0, (sequences, -1))[:, settled:]
            chosen_BTE = _mask(ids_BTK, c.n_routed_experts)
            recall = float("nan")
            if number - 1 in self.hidden:
                before_ND = torch.cat(self.hidden[number - 1])
                gate: Any = self.model.model.layers[number].mlp
                scores = torch.sigmoid(gate.gate.logits(before_ND)) + gate.gate.e_score_correction_bias
                foretold_BTK = choose(scores, c).unflatten(0, (sequences, -1))[:, settled:]
                recall = _share(chosen_BTE & _mask(foretold_BTK, c.n_routed_experts), chosen_BTE)
            found[number] = Statistics(
                _top_quarter(chosen_BTE.flatten(0, 1).sum(0)),
                _share(chosen_BTE[:, 1:] & chosen_BTE[:, :-1], chosen_BTE[:, 1:]),
                recall,
            )
        return found


def overall(by_layer: dict[int, Statistics]) -> Statistics:
    """The means over layers."""

    def mean(values: list[float]) -> float:
        counted = [value for value in values if value == value]
        return sum(counted) / len(counted) if counted else float("nan")

    return Statistics(
        mean([s.top_quarter_load for s in by_layer.values()]),
        mean([s.repeat for s in by_layer.values()]),
        mean([s.next_layer_recall for s in by_layer.values()]),
    )


def measure(
    directory: str | Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run drawn tokens through a checkpoint and tell its routing; of a large one, through its first layers.

    progress(done, total) counts layers with a mixture. Raises CheckpointError and ConfigError as `load_model`.
    """
    began = time.perf_counter()
    checkpoint = open_checkpoint(directory)
    layers = _layers(checkpoint)
    kernels = can_run_packed(checkpoint, torch.device("cpu"), torch.bfloat16)
    model = _without_experts(checkpoint, layers, kernels)
    c = model.config
    ordinary = c.bos_token_id or c.vocab_size
    random = torch.Generator().manual_seed(seed)
    wanted = SELECTIONS * c.n_routed_experts / c.num_experts_per_tok / (TOKENS - SETTLED)
    sequences = max(LEAST_SEQUENCES, math.ceil(wanted))
    ids_BT = torch.randint(0, ordinary, (sequences, TOKENS), generator=random)
    report = progress or (lambda done, total: None)
    bank = ExpertsFromFiles(checkpoint, kernels, c.first_k_dense_replace, layers - 1, report)
    with torch.inference_mode(), Routes(model) as routes:
        model.hidden(ids_BT, experts=bank)
        by_layer = routes.statistics(sequences)
    counted = sequences * (TOKENS - SETTLED)
    return Measured(overall(by_layer), by_layer, counted, time.perf_counter() - began)


class ExpertsFromFiles:
    """An `ExpertBank` that reads each expert when it is needed and forgets it. The last layer's are not needed: what
    comes behind its router is not watched.

    progress(done, total) counts layers with a mixture; `first` is the first of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, kernels: bool, first: int, last: int, progress: Callable[[int, int], None]
    ) -> None:
        self.checkpoint, self.first, self.last, self.progress = checkpoint, first, last, progress
        self._expert = self._packed if kernels else self._dense
        self._weights = CheckpointWeights(checkpoint)

    def __call__(self, layer: int, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `ExpertBank.__call__`."""
        out_ND = torch.zeros(x_ND.shape)
        if layer < self.last:
            for expert in ids_NK.unique().tolist():
                rows, slots = (ids_NK == expert).nonzero(as_tuple=True)
                out_ND[rows] += self._expert(layer, expert, x_ND[rows], weights_NK[rows, slots, None])
        self.progress(layer - self.first + 1, self.last - self.first + 1)
        return out_ND.to(x_ND.dtype)

    def _packed(self, layer: int, expert: int, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
        c = self.checkpoint.config
        names_ = [names.expert_weight(layer, expert, projection) for projection in PROJECTIONS]
        one = empty_experts(1, c.hidden_size, c.moe_intermediate_size, self._weights.kind(names_[0]))
        for name, part in zip(names_, one.parts(0), strict=True):
            self._weights.matrix(name, part.outputs, part.inputs, part.data)
        return ops.moe(x_ND, torch.zeros(len(x_ND), 1, dtype=torch.int64), weights_N1, one).float()

    def _dense(self, layer: int, expert: int, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
        gate, up, down = (self.checkpoint.expert(layer, expert, p, x_ND.dtype) for p in PROJECTIONS)
        return F.linear(F.silu(F.linear(x_ND, gate)) * F.linear(x_ND, up), down).float() * weights_N1


def _layers(checkpoint: Checkpoint) -> int:
    """As many of its layers as `MAX_EXPERT_BYTES` allow, two mixtures at least where there are two."""
    c = checkpoint.config
    each = c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size * 9 // 16
    if c.num_moe_layers < 1:
        raise InputError(f"{checkpoint.dir} has no mixture of experts.", "There is no routing to measure.")
    return min(c.num_hidden_layers, c.first_k_dense_replace + 1 + max(1, MAX_EXPERT_BYTES // each))


def _without_experts(checkpoint: Checkpoint, layers: int, kernels: bool) -> Transformer:
    """The first layers of the model in bf16, on the kernels or dense; of its routed experts there is nothing."""
    config = replace(checkpoint.config, num_hidden_layers=layers)
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    if kernels:
        assemble(model, CheckpointWeights(checkpoint), routed_experts=False)
        return model.eval().requires_grad_(False)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name or name == "lm_head.weight":
            continue
        state[name] = checkpoint.read_weight(name, tensor.dtype) if name.endswith(".weight") else checkpoint.read(name)
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval().requires_grad_(False)


def _mask(ids_BTK: Tensor, experts: int) -> Tensor:
    mask = torch.zeros(*ids_BTK.shape[:2], experts, dtype=torch.bool)
    return mask.scatter_(-1, ids_BTK.long(), True)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum())


def _top_quarter(load_E: Tensor) -> float:
    return float(load_E.sort(descending=True).values[: max(1, len(load_E) // 4)].sum() / load_E.sum())
