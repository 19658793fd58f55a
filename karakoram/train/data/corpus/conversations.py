"""Documents become samples: token ids, and a weight for each.

Of a conversation, what the assistant writes is learned: thoughts, content, tool calls, and the `<|im_end|>` with which
it must end. What it only reads is not: tool declarations, system and user messages, tool results, the frames of
messages, and what the generation prompt opens for it (`<think>` in K2.5).

Each message is learned behind exactly the prompt that inference would give. The templates of thinking dialects forget
the thoughts of finished turns, so such a conversation gives one sample per turn: history without its thoughts, then the
turn with all of its thoughts between tool calls. Where the history of the next turn is the same, token for token
(dialects without think blocks, K2.6 with `preserve_thinking`, answers without thoughts), turns share one sample.

All of it is read off the template: a turn is rendered, each `<|im_assistant|>` marker opens what an assistant wrote,
and what the generation prompt adds is taken off its beginning. One trick is needed: a template takes the last answer
without calls for history, so it is rendered with a call, which is cut off again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from karakoram.chat import ChatFormat, dialects
from karakoram.chat.messages import read_messages
from karakoram.chat.template import Segment
from karakoram.errors import ChatError
from karakoram.train.data.corpus.records import BadRecord
from karakoram.train.data.documents import Document

WEIGHT_ONE = 100  # weights are hundredths in one byte
_CALL = {"id": "call", "type": "function", "function": {"name": "call", "arguments": "{}"}}
_CALL_SEGMENTS = 7  # section begin, call begin, id, argument begin, arguments, call end, section end


class Sample(NamedTuple):
    """`weights` in hundredths: how much it counts to have predicted this token."""

    ids: list[int]
    weights: list[int]


@dataclass(frozen=True)
class Rendering:
    """How conversations become text.

    preserve_thinking  K2.6: keep the thoughts of all turns
    tool_ids           canonical: calls are numbered as the models expect; verbatim: as the data has them
    read_weight        of what the assistant did not write, 0 to 1
    """

    preserve_thinking: bool = False
    tool_ids: Literal["canonical", "verbatim"] = "canonical"
    read_weight: float = 0.0


class Piece(NamedTuple):
    """Segments [start, stop) that an assistant wrote, and their weight in hundredths."""

    start: int
    stop: int
    weight: int


def samples(fmt: ChatFormat, document: Document, rendering: Rendering) -> list[Sample]:
    """The samples of one document; raises BadRecord for what cannot be rendered or has nothing to learn."""
    if document.text is not None:
        return [text_sample(fmt, document.text)]
    try:
        found = conversation_samples(fmt, document.messages, document.tools, document.thinking, rendering)
    except ChatError as error:
        raise BadRecord(f"it is no conversation ({error.what})") from error
    if not found:
        raise BadRecord("no message in it is an assistant's")
    return found


def text_sample(fmt: ChatFormat, text: str) -> Sample:
    """All of a text is learned, and the `[EOS]` behind it."""
    ids = [*fmt.tokenizer.encode(text), fmt.tokenizer.special_ids[dialects.EOS]]
    return Sample(ids, [WEIGHT_ONE] * len(ids))


def conversation_samples(
    fmt: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    rendering: Rendering | None = None,
) -> list[Sample]:
    """Samples in which every assistant message is learned once. An assistant's `weight` (0 to 1) counts; default 1.

    Raises ChatError for messages or tools that cannot be rendered, and for images and videos.
    """
    r = rendering or Rendering()
    for index, message in enumerate(read_messages(messages)):
        if any(part.kind != "text" for part in message.parts):
            raise ChatError(f"Message {index} has an image or a video.", "Training reads text only: leave it out.")
    if (
        fmt.facts.think_prefill and not thinking
    ):  # the prompt closes the thoughts: whatever the data have, none is written
        messages = [{k: v for k, v in m.items() if k not in ("reasoning_content", "reasoning")} for m in messages]
    opening = _opening(fmt, thinking)
    found: list[tuple[list[Segment], list[Piece]]] = []
    turns = list(_turns(messages))
    if turns and not _forgets(fmt, messages, r):
        turns = [(0, turns[-1][1])]  # one rendering serves all
    for first, last in turns:
        segments = _in_flight(fmt, messages[: last + 1], tools, thinking, r)
        pieces = list(_written(segments, opening, messages[: last + 1]))[first:]
        if found and segments[: len(found[-1][0])] == found[-1][0]:
            pieces = found.pop()[1] + pieces
        found.append((segments, pieces))
    read_weight = round(r.read_weight * WEIGHT_ONE)
    return [_encoded(fmt, segments, pieces, read_weight) for segments, pieces in found]


def _forgets(fmt: ChatFormat, messages: Sequence[Mapping[str, Any]], rendering: Rendering) -> bool:
    """Whether a turn looks otherwise when it is history."""
    if not fmt.facts.think_in_prompt or (rendering.preserve_thinking and fmt.facts.preserves_thinking):
        return False
    return any(message.get("reasoning_content") or message.get("reasoning") for message in messages)


def _turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    """Per turn, how many assistant messages come before it, and the index of its last one."""
    before = count = 0
    last = None
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        count += 1
        last = index
        if not message.get("tool_calls"):
            yield before, index
            before, last = count, None
    if last is not None:
        yield before, last


def _in_flight(
    fmt: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: bool,
    rendering: Rendering,
) -> list[Segment]:
    """The conversation as it stands when the last message has just been written: its thoughts are still there."""
    answer = messages[-1]
    plain = not answer.get("tool_calls")
    prompt = fmt.prompt(
        [*messages[:-1], {**answer, "tool_calls": [_CALL]}] if plain else messages,
        tools,
        thinking=thinking,
        preserve_thinking=rendering.preserve_thinking,
        add_generation_prompt=False,
        tool_ids=rendering.tool_ids,
    )
    segments = list(prompt)
    if plain:
        assert segments[-_CALL_SEGMENTS - 1] == Segment(dialects.SECTION_BEGIN, True)
        del segments[-_CALL_SEGMENTS - 1 : -1]
    return segments


def _opening(fmt: ChatFormat, thinking: bool) -> list[Segment]:
    """What the generation prompt writes into the answer's frame."""
    probe = [{"role": "user", "content": "Hi"}]
    before = fmt.prompt(probe, thinking=thinking, add_generation_prompt=False)
    frame = fmt.prompt(probe, thinking=thinking)[len(before) :]
    assert frame[0].text == dialects.IM_ASSISTANT and frame[2].text == dialects.IM_MIDDLE
    return frame[3:]


def _written(segments: list[Segment], opening: list[Segment], messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    """Per assistant message, what it wrote: behind the frame and what the prompt opens, up to its end marker."""
    weights = (_weight(index, message) for index, message in enumerate(messages) if message["role"] == "assistant")
    for index, segment in enumerate(segments):
        if not segment.is_marker or segment.text != dialects.IM_ASSISTANT:
            continue
        start = index + 3 + len(opening)
        if segments[index + 3 : start] != opening:
            raise ChatError("The template renders an answer otherwise than its generation prompt begins it.", "")
        stop = next(i for i in range(start, len(segments)) if segments[i] == Segment(dialects.IM_END, True)) + 1
        yield Piece(start, stop, next(weights))


def _weight(index: int, message: Mapping[str, Any]) -> int:
    weight = message.get("weight")
    if weight is None:
        return WEIGHT_ONE
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ChatError(f"Message {index} has the weight {weight!r}.", "A weight is a number from 0 to 1.")
    if not 0 <= weight <= 1:
        raise ChatError(f"Message {index} has the weight {weight}.", "A weight is a number from 0 to 1.")
    return round(weight * WEIGHT_ONE)


def _encoded(fmt: ChatFormat, segments: list[Segment], pieces: list[Piece], read_weight: int) -> Sample:
    """Read and written are encoded apart, as at inference, where the one is a prompt and the other comes token by
    token. (The tokenizer's cuts, every 400,000 characters, may then fall elsewhere than in one giant prompt.)"""
    ids: list[int] = []
    weights: list[int] = []
    read_from = 0
    for start, stop, weight in pieces:
        for part, part_weight in ((segments[read_from:start], read_weight), (segments[start:stop], weight)):
            part_ids = fmt.encode_segments(part)
            ids += part_ids
            weights += [part_weight] * len(part_ids)
        read_from = stop
    return Sample(ids, weights)
