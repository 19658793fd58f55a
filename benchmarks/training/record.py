"""What of a run of several stages is worth keeping: settings, curves, events, and a picture of the loss.

    python benchmarks/training/record.py runs/nano benchmarks/results/nano [--every 10]

OUT/STAGE.jsonl has the stage's settings in its first line, then every tenth step's numbers (four digits), then what
happened; OUT/curves.svg the loss and the largest expert load of all stages over their tokens. `k2 report` makes a page
of everything, from the run itself.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from karakoram.train.report.series import smooth

LEFT_OUT = {"loads", "max_logit_by_layer"}  # by expert and layer: most of the bytes
Line = dict[str, Any]


def lines_of(path: Path) -> list[Line]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def steps_of(stage: Path) -> list[Line]:
    """A line per step, ascending; of a step that was gone over again, the last."""
    return [line for _, line in sorted({line["step"]: line for line in lines_of(stage / "metrics.jsonl")}.items())]


def short(value: Any) -> Any:
    """Numbers of four digits."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(stage: Path, out: Path, every: int) -> None:
    """The stage's record."""
    settings = json.loads((stage / "run.json").read_text())
    steps = steps_of(stage)
    kept = [line for line in steps if line["step"] % every == 0 or line is steps[-1] or line["step"] == 1]
    written: list[Line] = [{"settings": settings}]
    written += [{name: short(value) for name, value in line.items() if name not in LEFT_OUT} for line in kept]
    written += [{"event": line} for line in lines_of(stage / "events.jsonl")]
    out.write_text("".join(json.dumps(line) + "\n" for line in written))


def draw(stages: Iterable[tuple[str, list[Line]]], out: Path) -> None:
    """Loss, smoothed over 50 steps, and the largest global load, over all tokens so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    begun = 0.0
    for name, steps in stages:
        tokens = begun + np.array([line["tokens"] for line in steps]) / 1e6
        above.plot(tokens, smooth(np.array([line["loss"] for line in steps]), 50), label=name)
        below.plot(tokens, [line.get("max_vio_global", np.nan) for line in steps])
        begun = tokens[-1]
    above.set_yscale("log")
    above.set_ylabel("loss, nats")
    above.legend(frameon=False)
    below.set_ylabel("MaxVio, global")
    below.set_xlabel("million tokens")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Read the run, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = sorted(
        options.run.glob("*/metrics.jsonl"), key=lambda path: path.parent.joinpath("run.json").stat().st_mtime
    )
    for path in stages:
        write(path.parent, options.out / f"{path.parent.name}.jsonl", options.every)
    draw(((path.parent.name, steps_of(path.parent)) for path in stages), options.out / "curves.svg")


if __name__ == "__main__":
    main()
