"""What does each set of Newton-Schulz coefficients make of a matrix? RMS and singular values, on known spectra.

Spectra: Gaussian 512 × 512 and 512 × 2048, and power law 512 × 512 with σ_i ∝ i^-1.5 between random rotations, which
momentum resembles more. RMS is times √max(A, B): 1 for an exact U·Vᵀ. The distance is that to the polar factor U·Vᵀ of
a float64 SVD, Frobenius, relative. Means over seeds.

    python benchmarks/newton_schulz_spectra.py [--seeds 3] [--out benchmarks/results/newton_schulz_spectra.jsonl]

One line of JSON per set, dtype and spectrum. `rms` in `karakoram/train/optim/newton_schulz.py` is the float32 lines of
the two square spectra, rounded to 4 digits.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karakoram.env import processor
from karakoram.train.optim.newton_schulz import SETS, orthogonalize


def gaussian(rows: int, columns: int) -> Callable[[int], Tensor]:
    """Of independent normal entries."""
    return lambda seed: torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def power_law(size: int, exponent: float = 1.5) -> Callable[[int], Tensor]:
    """σ_i = i^-exponent between two random rotations."""

    def made(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0] for _ in range(2))
        return (left * torch.arange(1, size + 1).double() ** -exponent @ right.mT).float()

    return made


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "gaussian": gaussian(512, 512),
    "gaussian_wide": gaussian(512, 2048),
    "power_law": power_law(512),
}


def measured(matrix: Tensor, name: str, dtype: torch.dtype) -> dict[str, float]:
    """RMS·√max, extreme singular values and the distance to the polar factor."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = orthogonalize(matrix[None], name, dtype)[0].double()
    values = torch.linalg.svdvals(result)
    polar = u @ vh
    return {
        "rms": float(result.square().mean().sqrt()) * max(matrix.shape) ** 0.5,
        "least": float(values.min()),
        "largest": float(values.max()),
        "distance": float((result - polar).norm() / polar.norm()),
    }


def lines(seeds: int) -> list[dict[str, Any]]:
    """One per set, dtype and spectrum: means over seeds."""
    made: list[dict[str, Any]] = []
    for spectrum, draw in SPECTRA.items():
        matrices = [draw(seed) for seed in range(seeds)]
        for name in SETS:
            for dtype in (torch.float32, torch.bfloat16):
                each = [measured(matrix, name, dtype) for matrix in matrices]
                means = {key: round(statistics.mean(one[key] for one in each), 4) for key in each[0]}
                made.append({"set": name, "dtype": str(dtype).removeprefix("torch."), "spectrum": spectrum} | means)
    return made


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/newton_schulz_spectra.jsonl"))
    options = parser.parse_args()
    about = {"machine": processor().model, "torch": torch.__version__, "seeds": options.seeds}
    written = [json.dumps(line | about) for line in lines(options.seeds)]
    print("\n".join(written))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(written) + "\n")


if __name__ == "__main__":
    main()
