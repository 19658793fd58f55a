"""From what a user names to rows to train on: files by their endings, a data set of the hub, several with weights.

    data=notes.jsonl            data=texts/            data=rows.parquet        data=hf:HuggingFaceTB/cosmopedia
    data=code/:3,chat.jsonl:1   three tokens of the first for one of the second

A folder is read by what it holds most of: Parquet, JSON lines or plain text; what is left out is said.
"""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from karakoram.errors import InputError, TrainingError
from karakoram.train.config import BatchConfig
from karakoram.train.data.corpus.build import build_shards
from karakoram.train.data.corpus.conversations import Rendering
from karakoram.train.data.corpus.lines import JsonLines, TextFiles
from karakoram.train.data.corpus.mixture import Mixture, Part, RowBatches
from karakoram.train.data.corpus.records import Source
from karakoram.train.data.corpus.shards import ShardSet
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
_WORDS = {Parquet: "Parquet", JsonLines: "JSON lines", TextFiles: "text"}


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
    say: Callable[[str], None] = lambda note: None,
) -> RowBatches:
    """Tokenise what `data` names (or find it tokenised) and pack it; `say` is told what was left out.

    Raises InputError for what cannot be named so and for batches without room for a row, TrainingError as building and
    mixing do, and for data of which nothing is to be learned.
    """
    _check_room(batch, sequence_tokens)
    parts: list[Part] = []
    for name, weight in named(data):
        source = source_of(name)
        if others := _left_out(Path(name), type(source)):
            say(f"{name}: only the {_WORDS[type(source)]} files in it are read; left out: {others}.")
        shards = build_shards(
            source, tokenizer, cache, Path(name.removeprefix(HUB)).name or "corpus", rendering=rendering,
            processes=processes, progress=progress,
        )  # fmt: skip
        if skipped := shards.index["skipped"]:
            first = next(iter(shards.index["skipped_examples"]), "")
            say(f"{name}: {skipped:,} of {shards.index['records']:,} records were skipped; the first: {first}.")
        if not _teaches(shards):
            raise TrainingError(
                f"Nothing of {name} is to be learned: every token in it has weight 0.",
                "Give texts, or conversations in which an assistant's message has a weight above 0.",
            )
        parts.append(Part(name, type(shards)(shards.folder, tokenizer, vocab_size), weight))
    mixture = Mixture(parts, sequence_tokens, seed, pad_id)

    def rows(tokens: int) -> int:
        return max(1, batch_tokens(batch, tokens) // sequence_tokens)

    settled = 0 if batch.ramp_from_tokens is None else batch.ramp_tokens
    return RowBatches(mixture, rows, settled)


def _check_room(batch: BatchConfig, sequence_tokens: int) -> None:
    """A row is never cut: each batch, and each piece of one, has room for a row."""
    for name, tokens in (
        ("batch.tokens_per_step", batch.tokens_per_step),
        ("batch.ramp_from_tokens", batch.ramp_from_tokens),
        ("batch.micro_tokens", batch.micro_tokens),
    ):
        if tokens is not None and tokens < sequence_tokens:
            raise InputError(
                f"{name} is {tokens}, and a row has {sequence_tokens} tokens.",
                f"Give {name} of at least {sequence_tokens}, or a smaller sequence_tokens.",
            )


def _teaches(shards: ShardSet) -> bool:
    """Whether any token that is predicted has a weight; the first sample says so, as a rule."""
    lengths = shards.lengths.tolist()
    return any(shards.read(sample, 0, length)[1][1:].any() for sample, length in enumerate(lengths))


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
    kinds = _kinds(path)
    most = max(KINDS.values(), key=lambda source: sum(n for kind, n in kinds.items() if KINDS[kind] is source))
    return next((kind for kind in sorted(kinds) if KINDS[kind] is most), None)


def _kinds(folder: Path) -> Counter[str]:
    """How many files of each kind lie in a folder."""
    return Counter(
        kind for file in islice(folder.rglob("*"), LOOKED_AT) if file.is_file() and (kind := _kind(file)) is not None
    )


def _left_out(path: Path, source: type[Source]) -> str:
    """Files of a folder that could be read, but by another source than this one: "3 .txt, 1 .md", or nothing."""
    kinds = _kinds(path) if path.is_dir() else Counter[str]()
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()) if KINDS[kind] is not source)
