"""Muon: momentum, then the nearest orthogonal matrix, for every two-dimensional weight.

    M ← μM + G;  O = orthogonalize(μM + G);  W ← W − η · (0.2 · √max(A, B) · O + λW)

The factor 0.2·√max(A, B) gives the update the RMS of an AdamW step, so both share one learning rate and one weight
decay ("Muon is Scalable for LLM Training", arXiv 2502.16982, §2.2). A matrix is a parameter as it stands, or what
`splits.py` cuts it into; a stack of experts is that many matrices. Those of one shape are orthogonalised together, in
batched products: a step costs a few large kernels whatever the number of experts.

`mean`, the default, keeps the momentum as torch.optim.Muon does, M ← M + (1 − μ)(G − M): the same direction, smaller
by 1 − μ, and rounded to bfloat16 alike, so that both take the same steps bit for bit. The sum is what Moonlight writes,
and differs by bfloat16's roundings only.

Three ways in: `muon_update` and `updated` are functions of tensors; `Muon.directions` and `Muon.apply` are halves of a
step over weights by name, for who must move directions between; `Muon.step` is both, shape by shape.

Legend: n matrices of A rows and B columns.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from karakoram.errors import TrainingError
from karakoram.kernels import muon as kernels
from karakoram.train.optim.newton_schulz import Spectrum, named, orthogonalize
from karakoram.train.optim.splits import Split, whole

MOMENTUM = 0.95
UPDATE_RMS = 0.2


def nesterov(gradient: Tensor, buffer: Tensor, momentum: float, scale: float = 1.0, mean: bool = True) -> Tensor:
    """Takes the gradient (any float dtype) times `scale` into the float32 buffer, in place; returns μM + G, new."""
    gradient = gradient.float() if scale == 1 else gradient.float() * scale
    if mean:
        return gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum)
    return torch.add(gradient, buffer.mul_(momentum).add_(gradient), alpha=momentum)


def muon_update(
    gradient: Tensor,
    buffer: Tensor,
    momentum: float = MOMENTUM,
    mean: bool = True,
    coefficients: str = "jordan",
    calibrate: Spectrum | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """One matrix [A, B] or stack [n, A, B] -> (0.2·√max(A, B)·O in float32, the new buffer); changes neither input."""
    buffer = buffer.clone()
    direction = orthogonalize(nesterov(gradient, buffer, momentum, 1.0, mean), coefficients, dtype, calibrate)
    return direction.float() * factor(gradient.shape), buffer


def updated(weight: Tensor, direction: Tensor, learning_rate: float, weight_decay: float) -> Tensor:
    """W − η · (direction + λW), new."""
    return weight * (1 - learning_rate * weight_decay) - learning_rate * direction


def factor(shape: Sequence[int]) -> float:
    """0.2·√max(A, B) of matrices [..., A, B]: from O to an update whose RMS is AdamW's."""
    return UPDATE_RMS * max(shape[-2:]) ** 0.5


class Muon:
    """State: one float32 momentum buffer per weight. Weights are [A, B] or stacks [n, A, B], edited in place.

    nesterov      False orthogonalises M itself
    mean          momentum as torch keeps it (see above)
    coefficients  a set of `newton_schulz.SETS`; calibrate: see `orthogonalize`
    dtype         of the iteration: bfloat16 or float32; `newton_schulz.faster_dtype` knows which is faster here
    splits        weight -> how it falls into matrices, where it is not one as it stands
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
        *,
        nesterov: bool = True,
        mean: bool = True,
        coefficients: str = "jordan",
        calibrate: Spectrum | None = None,
        dtype: torch.dtype = torch.bfloat16,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        named(coefficients)
        self.weights, self.weight_decay, self.momentum = dict(weights), weight_decay, momentum
        self.nesterov, self.mean, self.coefficients = nesterov, mean, coefficients
        self.dtype, self.splits = dtype, dict(splits or {})
        self.calibrate: Spectrum | None = calibrate
        self.buffers = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in self.weights.items()}
        self._squares: dict[str, Tensor] = {}
        # weights whose matrices have the same shape go together
        self._together: dict[tuple[torch.Size, ...], list[str]] = defaultdict(list)
        for name, weight in self.weights.items():
            self._together[tuple(view.shape[-2:] for view in self._views(name, weight))].append(name)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float = 1.0) -> None:
        """One update from gradients (any float dtype) multiplied by `scale`; weights without a gradient keep still."""
        done = self._step_at_once(gradients, learning_rate, scale)
        for names in self._together.values():
            names = [name for name in names if name in gradients and name not in done]
            for name, orthogonal in zip(names, self._orthogonal(names, gradients, scale), strict=True):
                keep, squares = 1 - learning_rate * self.weight_decay, list[Tensor]()
                for view, part in zip(self._views(name, self.weights[name]), orthogonal, strict=True):
                    size = factor(view.shape)
                    squares.append(kernels.update(view, part, keep, -learning_rate * size) * size**2)
                self._squares[name] = sum(squares[1:], start=squares[0])

    def _step_at_once(self, gradients: Mapping[str, Tensor], learning_rate: float, scale: float) -> set[str]:
        """The step of those weights that one call of `kernels.step` can have, all or nearly all; their names."""
        if not self.mean or self.dtype != torch.bfloat16 or self.calibrate is not None:
            return set()
        views: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for name in (name for name in self.weights if name in gradients):
            tensors = (gradients[name], self.buffers[name], self.weights[name])
            of_name = list(zip(*(self._views(name, tensor) for tensor in tensors), strict=True))
            if all(kernels.takes(*view) for view in of_name):
                views[name] = of_name
        if not views:
            return set()
        every = [(name, view) for name, of_name in views.items() for view in of_name]
        chosen, sizes = named(self.coefficients), [factor(view[2].shape) for _, view in every]
        squares = kernels.step(
            [view for _, view in every],
            [-learning_rate * size for size in sizes],
            1 - learning_rate * self.weight_decay,
            chosen.steps,
            (self.momentum, scale, self.nesterov),
            chosen.shrink,
        )
        self._squares |= dict.fromkeys(views, torch.zeros(()))
        for (name, _), size, one in zip(every, sizes, squares, strict=True):
            self._squares[name] = self._squares[name] + one * size**2
        return set(views)

    @torch.no_grad()
    def directions(
        self, names: Iterable[str], gradients: Mapping[str, Tensor], scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Takes the gradients of `names` into their momentum; returns 0.2·√max(A, B)·O of each, float32."""
        wanted, made = set(names), dict[str, Tensor]()
        for together in self._together.values():
            chosen = [name for name in together if name in wanted]
            for name, orthogonal in zip(chosen, self._orthogonal(chosen, gradients, scale), strict=True):
                made[name] = torch.empty_like(self.buffers[name])
                self._squares[name] = sum((_squares(part) for part in orthogonal[1:]), start=_squares(orthogonal[0]))
                for view, part in zip(self._views(name, made[name]), orthogonal, strict=True):
                    torch.mul(part.float(), factor(view.shape), out=view)
        return made

    @torch.no_grad()
    def apply(self, directions: Mapping[str, Tensor], learning_rate: float) -> None:
        """W ← W − η · (direction + λW) of the weights named."""
        for name, direction in directions.items():
            weight = self.weights[name].mul_(1 - learning_rate * self.weight_decay)
            weight.add_(direction, alpha=-learning_rate)

    def update_rms(self, name: str) -> float:
        """RMS of the last update of a weight over the learning rate, decay left out; 0 before the first.

        Nominally 0.2; less where the momentum is ill-conditioned, which is what to look for.
        """
        return float((self._squares[name] / self.weights[name].numel()).sqrt()) if name in self._squares else 0.0

    def state(self) -> dict[str, Tensor]:
        """Momentum buffers by weight name: the tensors that `step` edits."""
        return self.buffers

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved buffers. Raises TrainingError where one is missing or of another shape; nothing is taken."""
        for name, buffer in self.buffers.items():
            found = state[name].shape if name in state else None
            if found != buffer.shape:
                raise TrainingError(
                    f"The momentum of {name} should be {tuple(buffer.shape)} and is "
                    f"{'missing' if found is None else tuple(found)} in the saved state.",
                    "Resume with the model that the state was saved for.",
                )
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])

    def to(self, device: torch.device | str) -> "Muon":
        """Weights and buffers on a device, in place: who holds the weights takes them anew from `weights`."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        self.buffers = {name: buffer.to(device) for name, buffer in self.buffers.items()}
        self._squares = {}
        return self

    def _orthogonal(
        self, names: Sequence[str], gradients: Mapping[str, Tensor], scale: float
    ) -> list[tuple[Tensor, ...]]:
        """Of each weight its matrices' O, in `dtype`, shaped as its views, which are of the same shapes for all."""
        if not names:
            return []
        wanted = [self._views(name, self._momentum(name, gradients[name], scale)) for name in names]
        by_view: list[list[Tensor]] = []
        for views in zip(*wanted, strict=True):
            stacks = [view.reshape(-1, *view.shape[-2:]) for view in views]
            made = orthogonalize(
                stacks[0] if len(stacks) == 1 else torch.cat(stacks), self.coefficients, self.dtype, self.calibrate
            )
            parts = made.split([len(stack) for stack in stacks])
            by_view.append([part.reshape(view.shape) for part, view in zip(parts, views, strict=True)])
        return list(zip(*by_view, strict=True))

    def _momentum(self, name: str, gradient: Tensor, scale: float) -> Tensor:
        buffer = self.buffers[name]
        if self.mean and self.dtype == torch.bfloat16:
            return kernels.momentum(gradient, buffer, self.momentum, scale, self.nesterov)
        ahead = nesterov(gradient, buffer, self.momentum, scale, self.mean)
        return ahead if self.nesterov else buffer

    def _views(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        return self.splits.get(name, whole)(tensor)


def from_torch_muon(
    state_dict: Mapping[str, object],
    names: Sequence[str | tuple[str, int]],
    mean: bool = True,
) -> dict[str, Tensor]:
    """What `Muon.load` takes, from torch.optim.Muon's `state_dict()`.

    names  of its parameters in their order; (stack, index) for the matrices of a stack, which torch keeps apart

    torch keeps the mean, which is the sum times 1 − μ: with `mean` the numbers stay as they are. Raises TrainingError
    where names and state do not fit.
    """
    groups, state = state_dict["param_groups"], state_dict["state"]
    assert isinstance(groups, list) and isinstance(state, dict)
    momenta = {index: float(group["momentum"]) for group in groups for index in group["params"]}
    if sorted(state) != sorted(momenta) or len(momenta) != len(names):
        raise TrainingError(
            f"torch.optim.Muon's state has {len(state)} buffers of {len(momenta)} parameters for {len(names)} names.",
            "Name every parameter, in the order in which the optimizer got them, and save after a step of all.",
        )
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for index, name in zip(momenta, names, strict=True):
        buffer = state[index]["momentum_buffer"].float()
        buffer = buffer.clone() if mean else buffer / (1 - momenta[index])
        if isinstance(name, str):
            found[name] = buffer
        else:
            stacks[name[0]][name[1]] = buffer
    for name, stack in stacks.items():
        if sorted(stack) != list(range(len(stack))):
            raise TrainingError(
                f"The stack {name} has matrices {sorted(stack)} only.", "Number them from 0 without a gap."
            )
        found[name] = torch.stack([stack[index] for index in range(len(stack))])
    return found


def _squares(part: Tensor) -> Tensor:
    """Σ over a weight's matrices of (0.2·√max(A, B))²·‖O‖², float32."""
    norms = torch.linalg.vector_norm(part, dtype=torch.float32)
    return norms.square() * factor(part.shape) ** 2
