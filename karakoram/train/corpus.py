"""What the recipes over one's own data share: rows out of files, the tokenizer's files, the model to begin with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.data.corpus.conversations import Rendering
from karakoram.train.data.corpus.material import rows_of
from karakoram.train.recipe import Material, Workplace
from karakoram.train.trainer import Objective

HELD_OUT_BATCHES = 8
BESIDE = ("tiktoken.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Corpus:
    """A recipe's `material`. read_weight: of what an assistant did not write; plain text weighs 1 anyway."""

    name: str
    data: str
    held_out: str
    tokenizer: Path
    sequence_tokens: int
    read_weight: float
    model: Callable[[torch.dtype], Any] | None = None
    objective: Callable[[TrainConfig], Objective] | None = None

    def __call__(self, stage: str, config: TrainConfig, place: Workplace) -> Material:
        def rows(data: str, what: str) -> Any:
            with place.bar(what) as progress:
                return rows_of(
                    data, self.tokenizer, place.root / "tokens", config.batch, self.sequence_tokens,
                    config.model.vocab_size, config.seed, config.model.pad_token_id or 0,
                    Rendering(read_weight=self.read_weight), place.threads, progress,
                )  # fmt: skip

        held: Sequence[Batch] = ()
        if self.held_out:
            source = rows(self.held_out, "Tokens held out")
            held = [source.batch(number) for number in range(HELD_OUT_BATCHES)]
        files = {n: (self.tokenizer / n).read_bytes() for n in BESIDE if (self.tokenizer / n).is_file()}
        return Material(
            rows(self.data, "Tokens"),
            files,
            held,
            {"recipe": self.name, "data": self.data, "sequence_tokens": self.sequence_tokens},
            self.objective(config) if self.objective else None,
            self.model,
        )
