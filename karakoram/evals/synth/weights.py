"""The tensors of a synthetic checkpoint, one after the other."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from karakoram.evals.synth.chance import Chance
from karakoram.evals.synth.patterns import LOGIT, Patterns
from karakoram.evals.synth.shape import Shape, Stored
from karakoram.evals.synth.stream import CONSTANT


class Weights:
    """All tensors of a shape at one seed; each depends on seed and name only, in whatever order they are asked for."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.patterns, self.chance = shape, Patterns(shape.config), Chance(seed)

    def tensors(self, weight: Stored) -> Iterator[tuple[str, Tensor]]:
        """(stored name, tensor) of one weight."""
        if weight.int4:
            packed, scale = self.chance.int4(weight.name, self.patterns.matrix(weight.name, _matrix(weight)))
            yield f"{weight.stored}_packed", packed
            yield f"{weight.stored}_scale", scale
            yield f"{weight.stored}_shape", torch.tensor(weight.shape, dtype=torch.int32)
        else:
            yield weight.stored, self._plain(weight)

    def _plain(self, weight: Stored) -> Tensor:
        name = weight.name
        if name.endswith(".e_score_correction_bias"):
            return self._biases(name)
        if name == "model.norm.weight" and self.shape.config.tie_word_embeddings:
            return self._signs(name)
        if len(weight.shape) == 1:
            return torch.ones(weight.shape, dtype=torch.bfloat16)
        matrix = self.chance.dense(name, self.patterns.matrix(name, _matrix(weight)))
        return self._even(name, matrix) if name.endswith(".mlp.gate.weight") else matrix

    def _biases(self, name: str) -> Tensor:
        """The biases that make popularity, in an order of the layer's own."""
        bias_E = self.patterns.routing.bias_E
        return bias_E[torch.randperm(len(bias_E), generator=self.chance.generator(name))].contiguous()

    def _signs(self, name: str) -> Tensor:
        """A final norm that turns round every other dimension: else a head that is the embedding would find the
        current token the likeliest next one, for ever."""
        size = LOGIT / math.sqrt(self.patterns.stream.fast)
        signs_D = torch.randint(0, 2, (self.shape.config.hidden_size,), generator=self.chance.generator(name)) * 2 - 1
        return (signs_D * size).bfloat16()

    def _even(self, name: str, matrix: Tensor) -> Tensor:
        """A router whose rows are equally long, on the slow and on the fast dimensions."""
        rows_ED, slow = matrix.float(), self.patterns.stream.slow
        wanted_D = self.patterns.matrix(name, (matrix.shape[0], matrix.shape[1])).columns
        for part in (slice(CONSTANT, CONSTANT + slow), slice(CONSTANT + slow, None)):
            length = rows_ED[:, part].norm(dim=-1, keepdim=True).clamp(min=1e-30)
            rows_ED[:, part] *= wanted_D[part].norm() / length
        return rows_ED.bfloat16()


def _matrix(weight: Stored) -> tuple[int, int]:
    outputs, inputs = weight.shape
    return outputs, inputs
