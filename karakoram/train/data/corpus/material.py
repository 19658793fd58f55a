"""From what a user names to rows to train on: files by their endings, a data set of the hub, several with weights.

    data=notes.jsonl            data=texts/            data=rows.parquet        data=hf:HuggingFaceTB/cosmopedia
    data=code/:3,chat.jsonl:1   three tokens of the first for one of the second

A folder is read by what it holds most of: Parquet, JSON lines or plain text.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from karakoram.errors import InputError
from karakoram.train.config import BatchConfig
from karakoram.train.data.corpus.build import build_shards
from karakoram.train.data.corpus.conversations import Rendering
from karakoram.train.data.corpus.lines import JsonLines, TextFiles
from karakoram.train.data.corpus.mixture import Mixture, Part, RowBatches
from karakoram.train.data.corpus.records import Source
from karakoram.train.data.corpus.tables import HuggingFace, Parquet
from karakoram.train.optim.schedule import batch_tokens

HUB = "hf:"
KINDS: dict[str, Callable[[Path], Source]] = {
    ".parquet": Parquet,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".txt": TextFiles,
    ".md": TextFiles,
}
LOOKED_AT = 1000  # files of a folder, to see of what kind it is


def rows_of(
    data: str,
    tokenizer: Path,
    cache: Path,
    batch: BatchConfig,
    sequence_tokens: int,
    vocab_size: int,
    seed: int,
    pad_id: int,
    rendering: Rendering | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RowBatches:
    """Tokenise what `data` names (or find it tokenised) and pack it.

    Raises InputError for what cannot be named so, TrainingError as building and mixing do.
    """
    parts: list[Part] = []
    for name, weight in named(data):
        shards = build_shards(
            source_of(name), tokenizer, cache, Path(name.removeprefix(HUB)).name or "corpus", rendering=rendering,
            processes=processes, progress=progress,
        )  # fmt: skip
        parts.append(Part(name, type(shards)(shards.folder, tokenizer, vocab_size), weight))
    mixture = Mixture(parts, sequence_tokens, seed, pad_id)

    def rows(tokens: int) -> int:
        return max(1, batch_tokens(batch, tokens) // sequence_tokens)

    settled = 0 if batch.ramp_from_tokens is None else batch.ramp_tokens
    return RowBatches(mixture, rows, settled)


def named(data: str) -> list[tuple[str, float | None]]:
    """ "a:3,b" -> a with weight 3, b with as much as it has. Raises InputError for an empty name or a weight of 0."""
    found: list[tuple[str, float | None]] = []
    for each in data.split(","):
        name, colon, weight = each.strip().rpartition(":")
        try:
            found.append((name, float(weight)) if colon and name else (each.strip(), None))
        except ValueError:
            found.append((each.strip(), None))  # a colon in the name: hf:…
        if not found[-1][0] or (found[-1][1] is not None and not 0 < found[-1][1] < float("inf")):
            raise InputError(f"{each!r} names no data.", "Give files or folders, as data=chat.jsonl:3,texts/:1.")
    return found


def source_of(name: str) -> Source:
    """The source that a name means. Raises InputError where there is none, or its ending is unknown."""
    if name.startswith(HUB):
        return HuggingFace(name.removeprefix(HUB))
    path = Path(name)
    if not path.exists():
        raise InputError(f"There is no data {name}.", f"Give a file, a folder, or {HUB}NAME of a data set on the hub.")
    kind = _kind(path)
    if kind is None:
        raise InputError(
            f"{name} is nothing that can be read.",
            f"Give {', '.join(KINDS)} (the texts also as .gz), or a folder of them.",
        )
    return KINDS[kind](path)


def _kind(path: Path) -> str | None:
    if path.is_file():
        return next((s for s in reversed(path.suffixes) if s in KINDS), None)
    kinds = [kind for file in islice(path.rglob("*"), LOOKED_AT) if file.is_file() and (kind := _kind(file))]
    return max(sorted(set(kinds)), key=kinds.count, default=None)
