"""Record the traces of benchmarks/traces: which experts nano visits on varied text.

    python benchmarks/expert_traces.py [DIRECTORY]

questions   twelve arithmetic questions with tools declared, answered by nano; with the scores of the chosen experts
dialogs     held-out dialogs of the nano evaluation, read token by token
prose       two of the repository's pages, read token by token

Text is read one token a pass, after a prompt of `PROMPT` tokens in one: decoding visits the same experts. Greedy
throughout, so that a second run on the same machine and pages writes the same passes. Format: docs/expert-traces.md.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import karakoram
from karakoram.chat import load_chat_format
from karakoram.engine.expert_store.trace import TraceWriter
from karakoram.env import bundled_model_dir
from karakoram.evals import arithmetic, nano_tools
from karakoram.model.transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 16
QUESTIONS, ANSWER_TOKENS = 12, 96
DIALOGS, DIALOG_TOKENS = 6, 320
PAGES, PAGE_TOKENS = ("docs/serving.md", "docs/numerics.md"), 800


class Recorder:
    """Hooks every router of a model; what they choose goes to a writer."""

    def __init__(self, model: Transformer, path: Path, scores: bool) -> None:
        layers: list[Any] = list(model.model.layers)
        gates = {n: layer.mlp.gate for n, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}
        config = model.config
        self.writer = TraceWriter(path, tuple(gates), config.n_routed_experts, config.num_experts_per_tok, scores)
        self.scores, self.sequence = scores, -1
        self.hooks = [gate.register_forward_hook(self._hook(layer)) for layer, gate in gates.items()]

    def _hook(self, layer: int) -> Any:
        def see(gate: Any, inputs: Any, chosen: Any) -> None:
            ids_TK, weights_TK = chosen
            sequences_T = np.full(len(ids_TK), self.sequence)
            scores_TK = weights_TK.float().numpy() if self.scores else None
            self.writer.record(layer, ids_TK.numpy(), scores_TK, sequences_T)

        return see

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.writer.close()


def questions(model: Transformer, recorder: Recorder) -> None:
    """Answer."""
    fmt = load_chat_format(bundled_model_dir())
    for scenario in arithmetic.scenarios()[:QUESTIONS]:
        recorder.sequence += 1
        prompt = fmt.encode(scenario.document.messages, scenario.document.tools)
        for _ in karakoram.generate(model, prompt, ANSWER_TOKENS):
            pass


@torch.inference_mode()
def read(model: Transformer, recorder: Recorder, texts: Iterator[list[int]]) -> None:
    """Read token by token."""
    for ids in texts:
        recorder.sequence += 1
        cache = model.new_cache(1, len(ids))
        for begin in (0, *range(PROMPT, len(ids))):
            model.hidden(torch.tensor([ids[begin : begin + PROMPT if begin == 0 else begin + 1]]), cache)


def dialogs() -> Iterator[list[int]]:
    """Token ids of held-out dialogs."""
    fmt = load_chat_format(bundled_model_dir())
    for scenario in nano_tools.scenarios(DIALOGS, edition=1):
        yield fmt.encode(scenario.document.messages, scenario.document.tools)[:DIALOG_TOKENS]


def prose() -> Iterator[list[int]]:
    """Token ids of pages."""
    tokenizer = karakoram.Tokenizer.from_dir(bundled_model_dir())
    for page in PAGES:
        yield tokenizer.encode((ROOT / page).read_text())[:PAGE_TOKENS]


def main() -> None:
    """Write the three."""
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/traces"
    model = karakoram.load_model(dense=True)  # the kernels run a decoding layer in one call, past the router's module
    with Recorder(model, into / "nano-questions.trace", scores=True) as recorder:
        questions(model, recorder)
    for name, texts in (("dialogs", dialogs()), ("prose", prose())):
        with Recorder(model, into / f"nano-{name}.trace", scores=False) as recorder:
            read(model, recorder, texts)
    for path in sorted(into.glob("nano-*.trace")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
