"""Constraints on whole outputs: reasoning, then content or a JSON answer or tool calls, then a stop token.

    REASONING ─close─▶ CONTENT ─────────────────────────────stop─▶ DONE
              ─close─▶ ANSWER (schema, regular expression) ──stop─▶ DONE
              ─close─▶ OPENING (a call is owed) ─┐
    REASONING, CONTENT, ANSWER before its first token ─section begin─▶ SECTION ─call begin─▶ HEADER ─argument begin─▶
    ARGUMENTS ─call end─▶ CALLED ─call begin─▶ HEADER …       CALLED ─section end─▶ STOPPING ─stop─▶ DONE

Between two markers stands one text, and only texts are llguidance's business (`guided.py`); markers, the ids of calls
and the budget of the whole are counted here. What the next token may be follows from the phase alone:

1. Free text is free. Its mask only takes away what would break the rest: stop tokens while something is owed, the
   begin of a call outside a section, the begin of a section where no call may come or none fits any more. Where there
   is nothing to take away there is no mask.
2. Something is owed: a call (required, named) or an answer. Reasoning is closed by force when the tokens left just
   suffice for the close and the shortest of what is owed, or after `reasoning_tokens`.
3. `left` is passed on to the text less what must follow it: a call's arguments are followed by call end, section end
   and stop. So the whole is complete within the budget if it is at least `shortest`.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import numpy as np

from karakoram.chat.dialects import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, TOOL_MARKERS
from karakoram.chat.tokenizer import Tokenizer
from karakoram.engine.constrain.compiled import Compiled, GrammarCache, compile_shape
from karakoram.engine.constrain.guided import GuidedText
from karakoram.engine.constrain.header import HeaderText
from karakoram.engine.constrain.shape import OutputShape
from karakoram.engine.constrain.vocabulary import Vocabulary
from karakoram.errors import InputError, KarakoramError

# More calls than this in one output are a loop, not a plan.
MAX_CALLS = 128


class Compiler:
    """Makes constraints for one model. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int], think: tuple[str, str]) -> None:
        """`vocab_size`: of the model, may exceed the tokenizer's. `think`: the dialect's markers around reasoning.
        InputError if none of `stop_ids` is below `vocab_size`. Takes a second for K2's vocabulary."""
        self._vocabulary = Vocabulary(tokenizer, vocab_size)
        self._stop_ids = frozenset(token for token in stop_ids if token < vocab_size)
        if not self._stop_ids:
            raise InputError("No stop token is in the vocabulary.", "Give the ids that end an output.")
        self._grammars = GrammarCache(self._vocabulary)
        close = self._vocabulary.special_ids.get(think[1])
        self._close = (close,) if close is not None else tuple(tokenizer.encode(think[1]))
        self._close_text = b"" if close is not None else think[1].encode("utf-8")
        self._open = self._vocabulary.special_ids.get(think[0])

    def compile(self, shape: OutputShape) -> OutputConstraint:
        """A constraint for one output of this shape. SchemaError names the keyword that cannot be enforced or is never
        satisfied, InputError what else is wrong with the shape. Takes milliseconds, or microseconds for known schemas.
        """
        compiled = compile_shape(self._vocabulary, self._grammars, shape)
        return OutputConstraint(self._vocabulary, compiled, self._stop_ids, self._close, self._close_text, self._open)


class _Phase(Enum):
    REASONING = auto()
    CONTENT = auto()
    ANSWER = auto()
    OPENING = auto()
    SECTION = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    CALLED = auto()
    STOPPING = auto()
    DONE = auto()


class OutputConstraint:
    """Follows one output (`Constraint`). `fill` may run in another thread than `accept`, never at the same time."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        compiled: Compiled,
        stop_ids: frozenset[int],
        close: tuple[int, ...],
        close_text: bytes,
        opening: int | None,
    ) -> None:
        self._vocabulary = vocabulary
        self._compiled = compiled
        self._stop_ids = stop_ids
        self._close, self._close_text, self._open = close, close_text, opening
        self._forced = False
        """The last mask allowed only the next token of the close."""
        self._closing = 0
        """How many tokens of the forced close have been written."""
        self._tail = b""
        self._reasoned = 0
        self._calls = 0
        self._answer = None if compiled.answer is None else GuidedText(compiled.answer)
        self._header: HeaderText | None = None
        self._arguments: GuidedText | None = None
        self._ids = vocabulary.special_ids
        self._names = {self._ids[name]: name for name in TOOL_MARKERS if name in self._ids}
        self._broken = ""
        """What went wrong, once a token has come that could not."""
        self.shortest: int = compiled.owed + (len(close) if compiled.shape.in_reasoning and compiled.owes else 0)
        """Tokens of the shortest whole output, stop token included. With fewer to go it cannot be completed."""
        self._phase = _Phase.REASONING
        if not compiled.shape.in_reasoning:
            self._phase = self._after_reasoning()

    @property
    def complete(self) -> bool:
        """Whether the output is whole as it stands: a stop token has come, or may come now."""
        if self._phase is _Phase.ANSWER and self._answer is not None:
            return self._answer.complete()
        if self._phase is _Phase.REASONING:
            return not self._compiled.owes
        return self._phase in (_Phase.CONTENT, _Phase.STOPPING, _Phase.DONE)

    # -------------------------------------------------------------------------------------------- masks

    def fill(self, row: Any, left: int) -> bool:
        """See `Constraint`. Ids beyond the tokenizer's are never among the allowed. KarakoramError if a token was
        accepted that could not come, or llguidance's limits are exceeded."""
        if self._broken:
            raise KarakoramError(self._broken)
        phase = self._phase
        if phase is _Phase.REASONING:
            return self._fill_reasoning(row, left)
        if phase is _Phase.CONTENT:
            return self._fill_free(row, left)
        if phase is _Phase.ANSWER and self._answer is not None:
            ends = self._answer.fill(row, left - 1)
            if ends:
                self._allow(row, *self._stop_ids)
            if self._answer.empty and self._compiled.calls and left >= self._compiled.section:
                self._allow(row, self._ids[SECTION_BEGIN])
        elif phase is _Phase.HEADER and self._header is not None:
            # Argument begin, call end, section end, stop: four markers beside the arguments.
            row[:] = 0
            self._allow(row, *self._header.tokens(left - 4))
            if self._header.tool is not None:
                self._allow(row, self._ids[ARGUMENT_BEGIN])
        elif phase is _Phase.ARGUMENTS and self._arguments is not None:
            if self._arguments.fill(row, left - 3):
                self._allow(row, self._ids[CALL_END])
        else:
            row[:] = 0
            self._allow(row, *self._between_texts(left))
        return True

    def _allow(self, row: np.ndarray, *tokens: int) -> None:
        for token in tokens:
            row[token >> 5] |= np.uint32(1 << (token & 31))

    def _between_texts(self, left: int) -> list[int]:
        """What may come where only markers may."""
        if self._phase is _Phase.OPENING:
            return [self._ids[SECTION_BEGIN]]
        if self._phase is _Phase.SECTION:
            return [self._ids[CALL_BEGIN]]
        if self._phase is _Phase.CALLED:
            index = self._compiled.shape.first_index + self._calls
            more = self._compiled.shape.parallel and self._calls < MAX_CALLS
            # The call itself, section end, stop.
            fits = more and left >= self._compiled.next_call(index) + 2
            return [self._ids[SECTION_END], *([self._ids[CALL_BEGIN]] if fits else [])]
        return list(self._stop_ids)

    def _fill_reasoning(self, row: np.ndarray, left: int) -> bool:
        compiled, limit = self._compiled, self._compiled.shape.reasoning_tokens
        must_close = compiled.owes and left <= len(self._close) - self._closing + compiled.owed
        self._forced = bool(self._closing) or must_close or (limit is not None and self._reasoned >= limit)
        if self._forced:
            row[:] = 0
            self._allow(row, self._close[self._closing])
            return True
        return self._fill_free(row, left)

    def _fill_free(self, row: np.ndarray, left: int) -> bool:
        """Reasoning and content: everything but what would break the rest."""
        compiled = self._compiled
        taken: set[int] = set()
        if compiled.owes:
            taken |= self._stop_ids
        if compiled.calls:
            taken.add(self._ids[CALL_BEGIN])
        elif compiled.shape.tool_choice == "none" or compiled.owes:
            taken |= {self._ids[name] for name in (CALL_BEGIN, SECTION_BEGIN) if name in self._ids}
        if compiled.calls and left < compiled.section:
            taken.add(self._ids[SECTION_BEGIN])
        if not taken and not (self._close_text and compiled.owes):
            return False
        row[:] = self._vocabulary.row_of_all
        for token in taken:
            row[token >> 5] &= ~np.uint32(1 << (token & 31))
        if self._close_text and compiled.owes:
            row &= ~self._vocabulary.row_of_ends(self._close_text)
        return True

    # -------------------------------------------------------------------------------------------- tokens

    def accept(self, token: int) -> None:
        """See `Constraint`. Never raises: after a token that no mask allowed, the next `fill` does."""
        if not self._broken and not self._take(token):
            self._broken = f"Token {token} was emitted where the output's shape forbids it."

    def _take(self, token: int) -> bool:
        """Go on by one token; False if it cannot come here."""
        phase = self._phase
        if phase is _Phase.REASONING:
            self._take_reasoning(token)
        elif phase is _Phase.DONE:
            return token in self._stop_ids
        elif token in self._stop_ids:
            self._phase = _Phase.DONE
            return phase in (_Phase.CONTENT, _Phase.ANSWER, _Phase.STOPPING)
        elif self._begins_section(token):
            fresh = phase is _Phase.ANSWER and self._answer is not None and self._answer.empty
            self._phase = _Phase.SECTION
            return fresh or phase in (_Phase.CONTENT, _Phase.OPENING)
        elif phase is _Phase.ANSWER and self._answer is not None:
            self._answer.accept(token)
        elif phase is not _Phase.CONTENT:
            return self._take_in_section(token)
        return True

    def _take_in_section(self, token: int) -> bool:
        name = self._names.get(token)
        if self._phase is _Phase.HEADER and self._header is not None:
            if name != ARGUMENT_BEGIN:
                return self._header.accept(token)
            if self._header.tool is None:
                return False
            self._arguments = GuidedText(self._compiled.arguments[self._header.tool])
            self._phase = _Phase.ARGUMENTS
        elif self._phase is _Phase.ARGUMENTS and self._arguments is not None:
            if name != CALL_END:
                self._arguments.accept(token)
                return True
            self._calls += 1
            self._phase = _Phase.CALLED
        elif name == CALL_BEGIN and self._phase in (_Phase.SECTION, _Phase.CALLED):
            index = self._compiled.shape.first_index + self._calls
            self._header = HeaderText(self._vocabulary, self._compiled.headers(index))
            self._phase = _Phase.HEADER
        elif name == SECTION_END and self._phase is _Phase.CALLED:
            self._phase = _Phase.STOPPING
        else:
            return False
        return True

    def _begins_section(self, token: int) -> bool:
        return self._compiled.calls and self._names.get(token) == SECTION_BEGIN

    def _take_reasoning(self, token: int) -> None:
        if token in self._stop_ids:
            self._phase = _Phase.DONE
        elif self._begins_section(token):
            self._phase = _Phase.SECTION
        elif self._closes(token):
            self._phase = self._after_reasoning()
        elif self._reasoned or token != self._open:
            self._reasoned += 1

    def _closes(self, token: int) -> bool:
        """Whether this token ends reasoning: the marker's id, or the last of the tokens that spell it."""
        if not self._close_text:
            return token == self._close[0]
        if self._forced and token == self._close[self._closing]:
            self._closing += 1
        spellings = self._vocabulary.spellings
        self._tail += spellings[token] if token < len(spellings) else b"\xff"
        found = self._close_text in self._tail
        self._tail = self._tail[1 - len(self._close_text) :]
        return found

    def _after_reasoning(self) -> _Phase:
        if self._compiled.must_call:
            return _Phase.OPENING
        return _Phase.CONTENT if self._answer is None else _Phase.ANSWER
