"""The shape of an output, compiled: its grammars, and what is owed at which price. Grammars are kept for the next one.

Servers see the same tools again and again. A grammar is kept by the text of its schema; the least recently used is
dropped beyond `MAX_GRAMMARS`. Two threads that ask for the same new schema at once may both compile it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from karakoram.chat.dialects import TOOL_MARKERS
from karakoram.engine.constrain.automaton import automaton
from karakoram.engine.constrain.grammar import Auto, Node, Run
from karakoram.engine.constrain.guided import GuidedGrammar
from karakoram.engine.constrain.header import Header
from karakoram.engine.constrain.regex import Chars, PatternError, Times, read_full, rust
from karakoram.engine.constrain.schema.build import build
from karakoram.engine.constrain.shape import OutputShape, Schema, ToolShape
from karakoram.engine.constrain.validate import schema_text
from karakoram.engine.constrain.vocabulary import Vocabulary
from karakoram.errors import InputError, SchemaError

MAX_TOOLS = 128
MAX_GRAMMARS = 256
MAX_REGEX_CHARS = 16_384
_Key = tuple[str, bool, bool] | str


class GrammarCache:
    """Compiled grammars of one vocabulary. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: OrderedDict[_Key, GuidedGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def schema(self, schema: Schema, strict: bool, objects_only: bool) -> GuidedGrammar:
        """The grammar of a schema's values. SchemaError, InputError."""
        text = schema_text(schema)
        return self._get((text, strict, objects_only), lambda: build(self._vocabulary, text, strict, objects_only))

    def regex(self, pattern: str) -> GuidedGrammar:
        """The grammar of what a regular expression matches as a whole. InputError."""
        return self._get(pattern, lambda: _regex_node(self._vocabulary, pattern))

    def _get(self, key: _Key, make: Callable[[], Node]) -> GuidedGrammar:
        with self._lock:
            grammar = self._kept.get(key)
            if grammar is not None:
                self._kept.move_to_end(key)
                return grammar
        grammar = GuidedGrammar(self._vocabulary, make())
        with self._lock:
            self._kept[key] = grammar
            if len(self._kept) > MAX_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar


def _regex_node(vocabulary: Vocabulary, pattern: str) -> Node:
    try:
        if len(pattern) > MAX_REGEX_CHARS:
            raise PatternError(f"it has more than {MAX_REGEX_CHARS:,} characters")
        regex = read_full(pattern)
        if isinstance(regex, Times) and isinstance(regex.item, Chars):
            node = Run(vocabulary, automaton(regex.item), regex.low, regex.high, False)
            node.terminal = f"/{rust(regex)}/"
            return node
        return Auto(vocabulary, automaton(regex), f"/{rust(regex)}/", quoted=True)
    except PatternError as error:
        raise InputError(
            f"The regular expression {pattern[:80]!r} cannot be enforced: {error}.", "Simplify it."
        ) from error


@dataclass(frozen=True)
class Compiled:
    """A shape with its grammars."""

    shape: OutputShape
    arguments: dict[str, GuidedGrammar]
    """By the name of each tool that may be called."""
    answer: GuidedGrammar | None
    section: int
    """Tokens of the shortest section with one call, with the stop token after it."""
    call: int
    """Tokens of the shortest call, without the digits of its index."""

    @property
    def calls(self) -> bool:
        """Calls may come."""
        return bool(self.arguments)

    @property
    def must_call(self) -> bool:
        """A call must come."""
        return self.shape.tool_choice in ("required", "named")

    @property
    def owes(self) -> bool:
        """Something must come before the output may end."""
        return self.must_call or self.answer is not None

    @property
    def owed(self) -> int:
        """Tokens of the shortest output after reasoning, stop token included."""
        if self.must_call:
            return self.section
        if self.answer is None:
            return 1
        answer = len(self.answer.plan) + 1
        return min(answer, self.section) if self.calls else answer

    def headers(self, index: int) -> list[Header]:
        """The headers of all tools for the call with this index."""
        return [
            Header(f"functions.{name}:{index}".encode(), name, len(grammar.plan))
            for name, grammar in self.arguments.items()
        ]

    def next_call(self, index: int) -> int:
        """Tokens that suffice for one more call."""
        return self.call + len(str(index))


def compile_shape(vocabulary: Vocabulary, grammars: GrammarCache, shape: OutputShape) -> Compiled:
    """Check a shape and compile its grammars. SchemaError, InputError."""
    _check(vocabulary, shape)
    tools = [] if shape.tool_choice == "none" else list(shape.tools)
    if shape.tool_choice == "named":
        tools = [tool for tool in tools if tool.name == shape.named_tool]
    arguments = {tool.name: _tool_grammar(grammars, tool) for tool in tools}
    answer: GuidedGrammar | None = None
    if shape.tool_choice not in ("required", "named"):
        if shape.response is not None:
            answer = grammars.schema(shape.response, strict=True, objects_only=False)
        elif shape.response_regex is not None:
            answer = grammars.regex(shape.response_regex)
    compiled = Compiled(shape, arguments, answer, 0, 0)
    if not arguments:
        return compiled
    # Call begin, argument begin, call end around header and arguments; section begin and end, stop around the call.
    exact = min(vocabulary.cost(header.text) + header.arguments for header in compiled.headers(shape.first_index))
    call = min(
        vocabulary.cost(header.text.rstrip(b"0123456789")) + header.arguments
        for header in compiled.headers(shape.first_index)
    )
    return Compiled(shape, arguments, answer, exact + 6, call + 3)


def _tool_grammar(grammars: GrammarCache, tool: ToolShape) -> GuidedGrammar:
    try:
        return grammars.schema(tool.parameters, tool.strict, objects_only=True)
    except SchemaError as error:
        what = f"Tool {tool.name!r}: {error.what}"
        raise SchemaError(what, error.fix, error.keyword, error.where) from error


def _check(vocabulary: Vocabulary, shape: OutputShape) -> None:
    names = [tool.name for tool in shape.tools]
    if len(names) > MAX_TOOLS:
        raise InputError(f"There are {len(names)} tools.", f"At most {MAX_TOOLS} can be offered at once.")
    if len(set(names)) < len(names):
        raise InputError("Two tools have the same name.", "Give each tool its own.")
    if shape.tool_choice == "named" and shape.named_tool not in names:
        raise InputError(f"tool_choice names {shape.named_tool!r}, which is no tool.", "Name one of the tools.")
    if shape.tool_choice == "required" and not names:
        raise InputError("A call is required, but there are no tools.", "Give tools, or use tool_choice auto.")
    if shape.response is not None and shape.response_regex is not None:
        raise InputError("Both a schema and a regular expression are asked of the answer.", "Give one of them.")
    missing = [name for name in TOOL_MARKERS if name not in vocabulary.special_ids]
    if names and shape.tool_choice != "none" and missing:
        raise InputError(f"The tokenizer has no {missing[0]} token, so no calls can be made.", "Leave out the tools.")
