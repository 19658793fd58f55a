"""One dialect and one tokenizer: messages to prompt text, to token ids, and a model's output back to a message.

Encoding is exact and safe at once. Control markers of the prompt are written by id; everything between two markers is
joined and encoded as ordinary text, so no content, name, tool description, id or argument can become a control token.
Where no such text spells a special token, the ids equal those of the official encoder on the rendered text, also for
giant prompts, because text is cut at the same places (`tokenizer.cut_points`). A marker that a tokenizer does not
have (think tags in K2-0905) is ordinary text there, as it is for the official encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from karakoram.chat import dialects
from karakoram.chat.messages import read_messages, read_tools
from karakoram.chat.template import Prompt, Segment, Written, build_prompt
from karakoram.chat.tokenizer import Tokenizer, cut_points
from karakoram.chat.tool_ids import canonical_ids
from karakoram.errors import ChatError

if TYPE_CHECKING:
    from karakoram.chat.parser import OutputParser

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
ToolIdStyle = Literal["verbatim", "canonical"]


class ChatFormat:
    """How one checkpoint talks. Immutable; safe to share between threads."""

    def __init__(self, dialect: str, tok: Tokenizer) -> None:
        self.facts: dialects.Dialect = dialects.get_dialect(dialect)
        self.tokenizer: Tokenizer = tok
        self.stop_ids: frozenset[int] = frozenset(
            tok.special_ids[marker] for marker in dialects.STOP_MARKERS if marker in tok.special_ids
        )
        """Ids that end an assistant turn: `[EOS]` and `<|im_end|>`."""
        if dialects.IM_END not in tok.special_ids:
            raise ChatError(
                f"The tokenizer has no {dialects.IM_END} token, so it cannot speak {dialect}.",
                "Use the tokenizer of a Kimi model.",
            )

    @property
    def dialect(self) -> str:
        """Name of the dialect."""
        return self.facts.name

    @property
    def default_sampling(self) -> dict[str, float]:
        """`temperature` and `top_p` that the model's makers recommend."""
        return self.sampling(thinking=True)

    def sampling(self, thinking: bool = True) -> dict[str, float]:
        """Recommended `temperature` and `top_p`, which for some dialects depend on whether the model thinks."""
        instant = self.facts.instant_temperature
        temperature = self.facts.temperature if thinking or instant is None else instant
        return {"temperature": temperature, "top_p": self.facts.top_p}

    def prompt(
        self,
        messages: Messages,
        tools: Tools = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
        tool_ids: ToolIdStyle = "verbatim",
        written: Mapping[int, Written] | None = None,
    ) -> Prompt:
        """The prompt as segments of markers and text. ChatError names what is wrong in `messages` or `tools`.

        `written`: by index, the tokens of assistant messages that stand for their rendering (see `template.Written`).
        """
        records = read_messages(messages)
        if tool_ids == "canonical":
            records, _ = canonical_ids(records)
        elif tool_ids != "verbatim":
            raise ChatError(f"Unknown tool_ids {tool_ids!r}.", "Use 'verbatim' or 'canonical'.")
        return build_prompt(
            self.facts, records, read_tools(tools), thinking, preserve_thinking, add_generation_prompt, written
        )

    def render(
        self,
        messages: Messages,
        tools: Tools = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
        tool_ids: ToolIdStyle = "verbatim",
    ) -> str:
        """The prompt as the official chat template prints it. `thinking` is ignored by dialects without it."""
        prompt = self.prompt(messages, tools, thinking, preserve_thinking, add_generation_prompt, tool_ids)
        return "".join([segment.text for segment in prompt])

    def encode(
        self,
        messages: Messages,
        tools: Tools = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = True,
        tool_ids: ToolIdStyle = "verbatim",
        allow_special: bool = False,
    ) -> list[int]:
        """Token ids of the prompt. `allow_special` is the official behaviour: contents may spell control tokens."""
        prompt = self.prompt(messages, tools, thinking, preserve_thinking, add_generation_prompt, tool_ids)
        if allow_special:
            return self.tokenizer.encode("".join([segment.text for segment in prompt]), allow_special=True)
        return self.encode_segments(prompt)

    def encode_segments(self, prompt: Sequence[Segment]) -> list[int]:
        """Token ids of segments: markers by id, joined text between them as ordinary text."""
        special_ids = self.tokenizer.special_ids
        cuts = iter(cut_points("".join([segment.text for segment in prompt])))
        cut = next(cuts, None)
        ids: list[int] = []
        run: list[str] = []
        position = 0
        for text, is_marker, token_ids in prompt:
            end = position + len(text)
            if token_ids:
                ids.extend(self.tokenizer.encode_uncut("".join(run)))
                run.clear()
                ids.extend(token_ids)
            elif is_marker and text in special_ids:
                ids.extend(self.tokenizer.encode_uncut("".join(run)))
                run.clear()
                ids.append(special_ids[text])
                while cut is not None and cut < end:  # a marker is never cut in two
                    cut = next(cuts, None)
            else:
                start = position
                while cut is not None and cut < end:
                    run.append(text[start - position : cut - position])
                    ids.extend(self.tokenizer.encode_uncut("".join(run)))
                    run.clear()
                    start, cut = cut, next(cuts, None)
                run.append(text[start - position :])
            position = end
        ids.extend(self.tokenizer.encode_uncut("".join(run)))
        return ids

    def parser(self, tools: Tools = None, thinking: bool = True, first_index: int = 0) -> OutputParser:
        """A parser for one model output that follows a generation prompt made with the same `tools` and `thinking`.

        `first_index`: number of tool calls already in the conversation, for ids that the model did not write itself.
        """
        from karakoram.chat.parser import OutputParser

        return OutputParser(self.facts, self.tokenizer, read_tools(tools), thinking, first_index)

    def __repr__(self) -> str:
        return f"ChatFormat({self.dialect!r}, {self.tokenizer!r})"


def load_chat_format(path: str | Path, dialect: str | None = None) -> ChatFormat:
    """The chat format of the checkpoint or tokenizer in directory `path`.

    Without `dialect` it is the one that the directory declares, else the one its chat template reveals, else a
    ChatError that names `--dialect`. TokenizerError if the tokenizer cannot be read.
    """
    directory = Path(path)
    tokenizer = Tokenizer.from_dir(directory)
    facts = dialects.get_dialect(dialect) if dialect is not None else dialects.detect_dialect(directory)
    return ChatFormat(facts.name, tokenizer)
