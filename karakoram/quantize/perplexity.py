"""Perplexity of a text under a model: what a change of the weights costs, in the unit that language models are sold by.

exp of the mean negative log-likelihood of every token but the first, each given the tokens before it in its window. The
windows follow one another: a window's first prediction sees one token, its last 512, and this handicap is the same
before and after. No [BOS] is added: the text stands as it is. The text is bounded (its first 2,048 tokens), since the
number is there to notice damage, not to rank models.
"""

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from karakoram.chat import Tokenizer
from karakoram.errors import InputError
from karakoram.model.transformer import Transformer

MAX_TOKENS = 2048
WINDOW_TOKENS = 512  # logits of one window: 512 x 163,840 float32 of K2 are 336 MB
MAX_TEXT_BYTES = MAX_TOKENS * 128  # K2's longest tokens have 128 bytes; the rest of a longer file is not read


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of one text, before and after; `tokens` were predicted."""

    text: str
    tokens: int
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is too large for a float is null."""
        before, after = (value if math.isfinite(value) else None for value in (self.before, self.after))
        return {"text": self.text, "tokens": self.tokens, "before": before, "after": after}


def read_token_ids(directory: Path, text_file: Path) -> list[int]:
    """The first 2,048 tokens of a UTF-8 file under a checkpoint's tokenizer. InputError: unreadable, or too short."""
    try:
        with open(text_file, "rb") as file:
            raw = file.read(MAX_TEXT_BYTES)
        text = getincrementaldecoder("utf-8")().decode(raw)  # a character cut by the bound is left out
    except OSError as error:
        raise InputError(f"Cannot read {text_file}: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{text_file} is not UTF-8 (byte {error.start}).", "Give plain text in UTF-8.") from error
    ids = Tokenizer.from_dir(directory).encode(text)[:MAX_TOKENS]
    if len(ids) < 2:
        raise InputError(f"{text_file} has {len(ids)} tokens.", "Perplexity needs a text of at least two.")
    return ids


@torch.no_grad()
def perplexity(model: Transformer, ids: Sequence[int]) -> float:
    """exp(mean -log p(token | window before it)) over all tokens but the first; inf where that is no number."""
    window = min(WINDOW_TOKENS, model.config.max_position_embeddings)
    tokens = torch.tensor(ids, dtype=torch.long, device=model.device)
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        seen, wanted = tokens[start : start + window], tokens[start + 1 : start + 1 + window]
        logits = model(seen[None, : len(wanted)])[0]
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
    mean = total / (len(ids) - 1)
    return math.exp(mean) if mean < 700 else math.inf  # float64 ends at exp(709); NaN is not below 700 either
