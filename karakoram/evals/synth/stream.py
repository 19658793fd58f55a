"""The residual stream of a synthetic model: which dimensions hold what, and how large they are at every layer.

Dimensions: [0, 32) constant, [32, 32 + slow) slow, the rest fast. At each layer the variance of slow and fast
dimensions is 1 + δ times what it was one layer earlier, so that one layer's hidden state correlates with the next
one's by 1 / √(1 + δ). Variances are those at the router (behind attention); before attention the slow ones are a layer
behind.
"""

from dataclasses import dataclass
from math import sqrt

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.formats.int4_group import GROUP

CONSTANT = GROUP  # dimensions: one group, so that int4 holds the constant exactly
CONSTANT_VALUE = 1.75  # 7 · 2^-2


@dataclass(frozen=True)
class Stream:
    """Sizes of a stream of `dim` dimensions."""

    dim: int
    slow: int
    growth: float  # δ

    @property
    def fast(self) -> int:
        """Fast dimensions."""
        return self.dim - CONSTANT - self.slow

    def variance(self, layer: int) -> float:
        """Of a fast dimension in `layer`, and of a slow one behind its attention."""
        return (1 + self.growth) ** layer

    def slow_before(self, layer: int) -> float:
        """Variance of a slow dimension in front of the layer's attention."""
        return 0.0 if layer == 0 else self.variance(layer - 1)

    def rms_before(self, layer: int) -> float:
        """Of the whole stream in front of the layer's attention."""
        return self._rms(self.slow_before(layer), self.variance(layer))

    def rms_behind(self, layer: int) -> float:
        """Of the whole stream behind the layer's attention."""
        return self._rms(self.variance(layer), self.variance(layer))

    def _rms(self, slow: float, fast: float) -> float:
        return sqrt((CONSTANT * CONSTANT_VALUE**2 + self.slow * slow + self.fast * fast) / self.dim)


def stream_of(config: ModelConfig, layer_correlation: float) -> Stream:
    """The stream in which neighbouring layers correlate so."""
    dim = config.hidden_size
    slow = dim // 4 // GROUP * GROUP
    if dim % GROUP or slow < GROUP:
        raise InputError(
            f"a hidden size of {dim} has no room for a synthetic model.", f"Take a multiple of {GROUP} from 128 on."
        )
    return Stream(dim, slow, 1 / layer_correlation**2 - 1)
