"""A model of the worst kind: it draws uniformly from whatever the constraint allows, as an engine would drive it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema
import numpy as np

from karakoram.chat.dialects import SECTION_BEGIN
from karakoram.chat.format import ChatFormat
from karakoram.engine.constrain.guided import GuidedGrammar, GuidedText
from karakoram.engine.constrain.output import Compiler, OutputConstraint
from karakoram.engine.constrain.shape import OutputShape, ToolShape
from karakoram.engine.constrain.validate import validate_call

PADDING = 70
"""Ids of the model beyond the tokenizer's."""


@dataclass
class Setting:
    """A way to talk and a compiler for it."""

    fmt: ChatFormat
    compiler: Compiler
    vocab_size: int

    @classmethod
    def of(cls, fmt: ChatFormat) -> "Setting":
        vocab_size = fmt.tokenizer.n_vocab + PADDING
        return cls(fmt, Compiler(fmt.tokenizer, vocab_size, fmt.stop_ids, fmt.facts.think), vocab_size)

    def special(self, name: str) -> int:
        return self.fmt.tokenizer.special_ids[name]

    def text(self, tokens: Sequence[int]) -> str:
        return self.fmt.tokenizer.decode(tokens)


@dataclass
class Written:
    """An output, and whether a stop token came before the budget was used up."""

    tokens: list[int]
    ended: bool
    masked: int
    """Steps that had a mask."""


def allowed(row: np.ndarray) -> np.ndarray:
    """The tokens whose bits are set."""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def write(
    setting: Setting, constraint: OutputConstraint, budget: int, seed: int, opening: Sequence[int | str] = ()
) -> Written:
    """Draw until a stop token or the budget's end. `opening`: the first tokens, which must be allowed."""
    random = np.random.default_rng(seed)
    row = np.empty(-(-setting.vocab_size // 32), np.uint32)
    out = Written([], False, 0)
    forced = [setting.special(one) if isinstance(one, str) else one for one in opening]
    for left in range(budget, 0, -1):
        row[:] = 0xDEADBEEF
        if constraint.fill(row, left):
            tokens = allowed(row)
            out.masked += 1
            assert len(tokens), "nothing is allowed"
            assert tokens[-1] < setting.fmt.tokenizer.n_vocab, "padding is allowed"
        else:
            assert (row == 0xDEADBEEF).all(), "a row was written without a mask"
            tokens = np.arange(setting.fmt.tokenizer.n_vocab)
        token = forced[len(out.tokens)] if len(out.tokens) < len(forced) else int(tokens[random.integers(len(tokens))])
        if len(out.tokens) < len(forced):
            assert token in tokens, f"{setting.text([token])!r} is not allowed"
        constraint.accept(token)
        out.tokens.append(token)
        if token in setting.fmt.stop_ids:
            out.ended = True
            break
    return out


def calls_of(setting: Setting, tokens: Sequence[int], tools: Sequence[ToolShape], **how: Any) -> list[dict[str, Any]]:
    """The calls that the parser finds in an output."""
    declared = [{"type": "function", "function": {"name": t.name, "parameters": _plain(t.parameters)}} for t in tools]
    parser = setting.fmt.parser(declared, thinking=how.get("thinking", False), first_index=how.get("first_index", 0))
    parser.feed(tokens)
    return parser.finish()["tool_calls"]


def check_calls(setting: Setting, written: Written, shape: OutputShape, least: int = 1) -> int:
    """The output is whole, its calls are in order, and their arguments are JSON that satisfies the schema. How many."""
    assert written.ended, f"cut off: {setting.text(written.tokens)[-200:]!r}"
    calls = calls_of(setting, written.tokens, shape.tools, first_index=shape.first_index, thinking=shape.in_reasoning)
    assert len(calls) >= least, "no call"
    schemas = {tool.name: tool.parameters for tool in shape.tools}
    for number, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        assert call["id"] == f"functions.{name}:{shape.first_index + number}"
        assert "incomplete" not in call
        if shape.tool_choice == "named":
            assert name == shape.named_tool
        assert validate_call(schemas[name], arguments) is None
        value = json.loads(arguments)
        assert isinstance(value, dict)
        errors = [error.message for error in jsonschema.Draft202012Validator(schemas[name]).iter_errors(value)]
        assert not errors, errors[:2]
    return len(calls)


def begun(choice: str) -> tuple[str, ...]:
    """The opening that makes a free choice a call."""
    return (SECTION_BEGIN,) if choice == "auto" else ()


def shape_for(schema: Any, choice: Any, **more: Any) -> OutputShape:
    """One tool with this schema."""
    named = "tool_1" if choice == "named" else None
    return OutputShape(tools=(ToolShape("tool_1", schema),), tool_choice=choice, named_tool=named, **more)


def write_text(grammar: GuidedGrammar, budget: int, seed: int) -> bytes:
    """One text of a grammar, drawn within a budget."""
    vocabulary, text = grammar.vocabulary, GuidedText(grammar)
    random = np.random.default_rng(seed)
    row = np.empty(vocabulary.words, np.uint32)
    out = b""
    for left in range(budget, 0, -1):
        text.fill(row, left)
        tokens = allowed(row)
        if not len(tokens):
            break
        token = int(tokens[random.integers(len(tokens))])
        text.accept(token)
        out += vocabulary.spellings[token]
    assert text.complete(), out
    return out


def _plain(schema: Any) -> dict[str, Any]:
    return dict(schema) if isinstance(schema, dict) else {}
