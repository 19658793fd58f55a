"""Documents become token ids with a weight per token, and many documents become one cache on disk.

What the model writes (thought, content, calls, the closing `<|im_end|>`) weighs 1.0; what it reads weighs 0.1 in
pretraining, enough to learn the language and not so much that random names dominate the loss, and nothing afterwards; a
call that goes wrong, and is corrected after it, weighs nothing; plain text weighs 1.0.

The kimi-k2.5 template drops the reasoning of finished turns. So a conversation of several user turns gives one sample
per turn: history as inference will see it (with an empty think block), then the last chain with its reasoning. A test
checks that every generated token stands behind exactly the prompt that inference would encode.

The cache: `ids.npy` (uint16, flat), `weights.npy` (uint8, tenths), `offsets.npy` (int64, samples + 1). It is written
chunk by chunk in the order of document numbers, whatever the number of processes, so that the same arguments give the
same bytes; an interrupted run continues after its last whole chunk.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from karakoram.chat import ChatFormat
from karakoram.errors import TrainingError
from karakoram.train.data import dialogs
from karakoram.train.data.documents import Document, Message
from karakoram.train.data.gsm8k import read_gsm8k
from karakoram.train.data.names import Split
from karakoram.train.data.plain_text import read_texts

READ_WEIGHT = 0.1
WRITTEN_WEIGHT = 1.0
MAX_SAMPLE_TOKENS = 1152  # five calls; the longest of 3,000 dialogs of the mix `sft` has 1,147
CHUNK_DOCUMENTS = 256

Sample = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True)
class Mix:
    """What a cache is made of.

    dialogs, gsm8k, text  shares of chunks by source
    data_dir              holds `gsm8k/train.jsonl` and `text/*.txt`, where these shares are above 0
    rich                  dialogs from all phrasings, not only the first ones
    families              which of `dialogs.MIXES` the dialogs are drawn from
    read_weight           weight of what is only read, in tenths between 0 and 1
    """

    dialogs: float = 1.0
    gsm8k: float = 0.0
    text: float = 0.0
    data_dir: str | None = None
    rich: bool = False
    families: str = "pretrain"
    read_weight: float = READ_WEIGHT

    def __post_init__(self) -> None:
        if not 0 <= self.read_weight <= 1 or abs(self.read_weight * 10 - round(self.read_weight * 10)) > 1e-9:
            raise TrainingError(
                f"A weight of {self.read_weight} for what is read cannot be stored.", "Choose one of 0, 0.1 … 1."
            )
        if self.families not in dialogs.MIXES:
            raise TrainingError(
                f"There is no mix {self.families!r} of dialogs.", f"Choose one of {', '.join(dialogs.MIXES)}."
            )


PRETRAIN = Mix()
SFT = Mix(rich=True, families="sft", read_weight=0.0)


def stage_mix(stage: str, data_dir: Path | None = None) -> Mix:
    """What nano's stage `pretrain` reads, or `sft` and all after it; given data, GSM8K too, and text in `pretrain`."""
    mix = PRETRAIN if stage == "pretrain" else SFT
    if data_dir is None:
        return mix
    text = 0.08 if stage == "pretrain" else 0.0
    return replace(mix, dialogs=0.88 - text, gsm8k=0.12, text=text, data_dir=str(data_dir))


def document_samples(fmt: ChatFormat, document: Document, read_weight: float = READ_WEIGHT) -> list[Sample]:
    """One sample per user turn, oldest first; one of weight 1.0 for plain text."""
    if document.text is not None:
        ids = [*fmt.tokenizer.encode(document.text), fmt.tokenizer.special_ids["[EOS]"]]
        return [(ids, [WRITTEN_WEIGHT] * len(ids))]
    messages = document.messages
    ends = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and not message.get("tool_calls")
    ]
    return [_turn_sample(fmt, document, messages[: end + 1], read_weight) for end in ends]


def _turn_sample(fmt: ChatFormat, document: Document, messages: list[Message], read_weight: float) -> Sample:
    """The conversation that ends with a final answer. All but that answer is what inference encodes before it."""
    special = fmt.tokenizer.special_ids
    thinking = document.thinking
    ids = fmt.encode(messages[:-1], document.tools, thinking=thinking)
    answer = messages[-1]
    if thinking:
        ids += fmt.tokenizer.encode(answer.get("reasoning_content") or "")
        ids.append(special["</think>"])
    ids += fmt.tokenizer.encode(answer["content"])
    ids.append(special["<|im_end|>"])
    weights = [read_weight] * len(ids)
    weights_of = _written_weights(document, messages)
    last_user = len(ids) - 1 - ids[::-1].index(special["<|im_user|>"])
    opening = special["<think>"] if thinking else special["</think>"]  # the last token of the generation prompt
    written = inside = False
    weight = WRITTEN_WEIGHT
    for index in range(last_user, len(ids)):
        token = ids[index]
        if written:
            weights[index] = weight
            written = token != special["<|im_end|>"]
            inside = written
        elif token == special["<|im_assistant|>"]:
            inside = True
        elif inside and token == opening:
            written, weight = True, next(weights_of)
    return ids, weights


def _written_weights(document: Document, messages: list[Message]) -> Iterator[float]:
    """The weight of each assistant message after the last one of the user, in order."""
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    for index in range(last_user, len(messages)):
        if messages[index]["role"] == "assistant":
            yield 0.0 if index in document.mistakes else WRITTEN_WEIGHT


def samples(
    fmt: ChatFormat, seed: int, start_index: int = 0, split: Split = "train", mix: Mix = PRETRAIN
) -> Iterator[Sample]:
    """Samples of generated dialogs from document `start_index` on, without end."""
    index = start_index
    while True:
        yield from document_samples(fmt, dialogs.generate(seed, index, split, mix.rich, mix.families), mix.read_weight)
        index += 1


def _source(mix: Mix, chunk: int) -> str:
    """Which source a chunk is taken from: low-discrepancy, so that any prefix of the cache has the right shares."""
    place = (chunk * 0.6180339887498949) % 1.0 * (mix.dialogs + mix.gsm8k + mix.text)
    return "dialogs" if place < mix.dialogs else "gsm8k" if place < mix.dialogs + mix.gsm8k else "text"


def _documents(mix: Mix, seed: int, chunk: int) -> Iterator[Document]:
    source = _source(mix, chunk)
    first = chunk * CHUNK_DOCUMENTS
    if source == "dialogs":
        for index in range(first, first + CHUNK_DOCUMENTS):
            yield dialogs.generate(seed, index, rich=mix.rich, mix=mix.families)
        return
    read = read_gsm8k if source == "gsm8k" else read_texts
    known = read(Path(mix.data_dir or "."))
    for index in range(CHUNK_DOCUMENTS):  # a fixed permutation; the sources are small and are passed several times
        yield known[(first + index * 7919 + seed) % len(known)]


_FORMAT: ChatFormat | None = None


def _start(fmt_dir: str) -> None:
    global _FORMAT
    from karakoram.chat import load_chat_format

    _FORMAT = load_chat_format(fmt_dir)


def _chunk(mix: Mix, seed: int, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert _FORMAT is not None
    ids: list[int] = []
    weights: list[float] = []
    lengths: list[int] = []
    for document in _documents(mix, seed, chunk):
        for sample_ids, sample_weights in document_samples(_FORMAT, document, mix.read_weight):
            if len(sample_ids) <= MAX_SAMPLE_TOKENS:
                ids += sample_ids
                weights += sample_weights
                lengths.append(len(sample_ids))
    tenths = np.rint(np.asarray(weights, dtype=np.float64) * 10).astype(np.uint8)
    return np.asarray(ids, dtype=np.uint16), tenths, np.asarray(lengths, dtype=np.int64)


def build_token_cache(
    path: Path,
    tokenizer_dir: Path,
    n_tokens: int,
    seed: int = 0,
    processes: int = 1,
    mix: Mix | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fills the directory `path` with at least `n_tokens` tokens and returns it; at once if it is there already.

    `progress(tokens_done, n_tokens)` is called after every chunk. A cache made with other arguments is an error.
    """
    mix = mix or Mix()
    if (mix.gsm8k or mix.text) and mix.data_dir is None:
        raise TrainingError("The mix wants GSM8K or text, but no data directory is given.", "Pass --data DIR.")
    path.mkdir(parents=True, exist_ok=True)
    recipe = {
        "n_tokens": n_tokens,
        "seed": seed,
        "mix": asdict(mix),
        "ranks": (tokenizer_dir / "tiktoken.model").stat().st_size,
    }
    state = _resume(path, recipe)
    if not state["done"]:
        _fill(path, tokenizer_dir, recipe, state, processes, mix, progress)
        _finish(path, recipe, state)
    return path


def _resume(path: Path, recipe: dict) -> dict:
    file = path / "state.json"
    state = {"recipe": recipe, "chunk": 0, "tokens": 0, "samples": 0, "done": False}
    if file.exists():
        state = json.loads(file.read_text())
        if state["recipe"] != recipe:
            raise TrainingError(
                f"{path} holds a token cache made with other settings.", "Remove it, or choose another directory."
            )
    if not state["done"]:
        for name, size in (
            ("ids", 2 * state["tokens"]),
            ("weights", state["tokens"]),
            ("lengths", 8 * state["samples"]),
        ):
            with open(path / f"{name}.part", "ab") as part:
                part.truncate(size)
    return state


def _save(path: Path, state: dict) -> None:
    temporary = path / "state.json.part"
    temporary.write_text(json.dumps(state))
    os.replace(temporary, path / "state.json")


def _fill(
    path: Path,
    tokenizer_dir: Path,
    recipe: dict,
    state: dict,
    processes: int,
    mix: Mix,
    progress: Callable[[int, int], None] | None,
) -> None:
    make = partial(_chunk, mix, recipe["seed"])
    wanted = recipe["n_tokens"]
    with (
        open(path / "ids.part", "ab") as ids_file,
        open(path / "weights.part", "ab") as weights_file,
        open(path / "lengths.part", "ab") as lengths_file,
    ):
        for ids, weights, lengths in _chunks(make, state["chunk"], processes, tokenizer_dir):
            ids_file.write(ids.tobytes())
            weights_file.write(weights.tobytes())
            lengths_file.write(lengths.tobytes())
            state["chunk"] += 1
            state["tokens"] += len(ids)
            state["samples"] += len(lengths)
            for file in (ids_file, weights_file, lengths_file):
                file.flush()
            _save(path, state)
            if progress is not None:
                progress(state["tokens"], wanted)
            if state["tokens"] >= wanted:
                return


def _chunks(
    make: Callable, first: int, processes: int, tokenizer_dir: Path
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    if processes <= 1:
        _start(str(tokenizer_dir))
        chunk = first
        while True:
            yield make(chunk)
            chunk += 1
    context = multiprocessing.get_context("spawn")  # a forked copy of a process that runs torch threads can hang
    pool = ProcessPoolExecutor(processes, context, _start, (str(tokenizer_dir),))
    try:
        while True:
            yield from pool.map(make, range(first, first + 4 * processes))
            first += 4 * processes
    except BrokenProcessPool as error:  # the worker printed why
        raise TrainingError(
            "A process that writes tokens ended before its work was done.",
            "See the lines above; the same command goes on from there, with --threads 1 in a single process.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(path: Path, recipe: dict, state: dict) -> None:
    for name, dtype in (("ids", np.uint16), ("weights", np.uint8)):
        raw = np.memmap(path / f"{name}.part", dtype=dtype, mode="r", shape=(state["tokens"],))
        np.save(path / f"{name}.npy", raw)
    lengths = np.fromfile(path / "lengths.part", dtype=np.int64)
    np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    state["done"] = True
    _save(path, state)
    for name in ("ids", "weights", "lengths"):
        (path / f"{name}.part").unlink()


def open_token_cache(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, weights (tenths), offsets; the first two memory-mapped. Sample n is ids[offsets[n]:offsets[n + 1]]."""
    if not (path / "offsets.npy").exists():
        raise TrainingError(f"{path} holds no finished token cache.", "Build it first; an interrupted one continues.")
    return (
        np.load(path / "ids.npy", mmap_mode="r"),
        np.load(path / "weights.npy", mmap_mode="r"),
        np.load(path / "offsets.npy"),
    )
