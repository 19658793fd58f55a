"""One constrained text inside an output (a call's arguments, a JSON answer): masks, and a valid end within the budget.

llguidance's matcher gives the tokens that the grammar allows. While the budget is ample that is the mask, and all that
is added is one comparison. The promise is stronger: with `left` tokens to go the text can always be completed. It is
kept by an invariant that holds before every token,

    a known plan of at most `left` tokens completes the text, or the front's cost (`front.py`) is at most `left`,

and by never allowing a token that breaks it. A token of known bytes can be tried on the front, a few microseconds each,
which is too much for a whole vocabulary. So the cost is first bounded for all tokens at once: whatever the next token
is, it leaves one of the leaves being read (their `ceiling` is in the front), begins at most `most_choices` others, each
of which raises the cost by at most the grammar's largest jump, and stops somewhere in the last, by at most its swing:

    left - 1 ≥ ceiling + most_choices · jump + swing     ample: the matcher's mask as it is
    else                                                 scarce: the plan's next token, or the next of the cheapest end;
                                                         within a string, plain text, where the ceiling allows it; and
                                                         every allowed token, if they are few, else the handy ones,
                                                         that was tried on the front and fits

So a text that runs out of budget can still go on in its own way, but towards its end, and at the end only one way is
left. The plan is there for budgets close to the shortest text: it is spelled as a whole, in fewer tokens than the sum
of its leaves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llguidance import LLMatcher

from karakoram.engine.constrain.front import Front
from karakoram.engine.constrain.grammar import Node, lark
from karakoram.engine.constrain.vocabulary import Vocabulary
from karakoram.errors import InputError, KarakoramError

# When the budget is scarce so many allowed tokens are all tried, some 5 µs each; of more only the handy ones.
MAX_TRIED = 128


class GuidedGrammar:
    """A compiled grammar, shared by all texts that follow it. Immutable; safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary, root: Node) -> None:
        """InputError if llguidance cannot take the grammar."""
        self.vocabulary = vocabulary
        self.root = root
        self.plan: tuple[int, ...] = tuple(vocabulary.spell(root.text))
        """The fewest tokens of a whole text."""
        self.surprise: int = vocabulary.most_choices * root.most_jump + root.most_swing
        """By how much one token can raise the cost above the front's ceiling."""
        self.matcher: Any = LLMatcher(vocabulary.tokenizer, lark(root), log_level=0)
        self._check(self.matcher.deep_copy())

    def _check(self, matcher: Any) -> None:
        """The two readers of the grammar must agree at least on the shortest text."""
        if not matcher.is_error():
            read = matcher.try_consume_tokens(list(self.plan))
            if read == len(self.plan) and (matcher.is_accepting() or matcher.is_stopped()):
                return
            if not matcher.is_error():
                raise InputError(f"llguidance reads only {read} of {len(self.plan)} tokens of the shortest text.")
        message = matcher.get_error().strip().splitlines()
        raise InputError(
            f"The grammar of this schema cannot be compiled: {message[0] if message else 'unknown error'}.",
            "Make the schema smaller or simpler.",
        )


class GuidedText:
    """One text that follows a grammar. `fill` may run in another thread than `accept`, never at the same time."""

    def __init__(self, grammar: GuidedGrammar) -> None:
        self._grammar = grammar
        self._vocabulary = grammar.vocabulary
        self._matcher: Any = grammar.matcher.deep_copy()
        self._front = Front.of(grammar.root)
        self._planned: int | None = 0
        """How many tokens of the plan have been written; None once the text has left it."""
        self._waiting: list[int] = []
        self.empty = True
        """Nothing has been written."""

    def accept(self, token: int) -> None:
        """This token, which the last mask allowed, comes next."""
        self._waiting.append(token)
        self.empty = False

    def complete(self) -> bool:
        """Whether the text is whole as it stands."""
        self._read()
        return self._front.complete

    def fill(self, row: np.ndarray, left: int) -> bool:
        """Write the mask of the text's next token, if at most `left` more complete it. True: the text may end here."""
        self._read()
        front = self._front
        if not front.readings or (left <= 0 and front.complete):
            row[:] = 0
        elif left > front.ceiling + self._grammar.surprise:
            self._mask(row)
        else:
            self._fill_scarce(row, left - 1)
        return front.complete

    def _read(self) -> None:
        """Catch up with the tokens accepted since."""
        spellings, plan = self._vocabulary.spellings, self._grammar.plan
        for token in self._waiting:
            if self._planned is not None:
                on_plan = self._planned < len(plan) and token == plan[self._planned]
                self._planned = self._planned + 1 if on_plan else None
            front: Front | None = None
            if token < len(spellings):
                steady = self._vocabulary.is_plain[token] and self._front.steady
                front = self._front if steady else self._front.after(spellings[token])
            if front is None or not self._matcher.consume_token(token):
                raise KarakoramError(f"Token {token} was emitted where the grammar forbids it.")
            self._front = front
        self._waiting.clear()

    def _mask(self, row: np.ndarray) -> None:
        self._vocabulary.mask(self._matcher, row)
        if self._matcher.is_error():
            raise KarakoramError(f"llguidance gave up on this text: {self._matcher.get_error()[:200]}")

    def _fill_scarce(self, row: np.ndarray, room: int) -> None:
        """Only tokens after which `room` more suffice."""
        vocabulary, front, plan = self._vocabulary, self._front, self._grammar.plan
        certain: int | None = None
        if self._planned is not None and self._planned < len(plan):
            certain = plan[self._planned]
        elif not front.complete:
            certain = vocabulary.first(front.cheapest())
        self._mask(row)
        allowed = row.copy()
        row[:] = 0
        if front.quoted and room >= front.ceiling:
            np.bitwise_and(allowed, vocabulary.plain, out=row)
            allowed &= ~vocabulary.plain
        if np.bitwise_count(allowed).sum() > MAX_TRIED:
            allowed &= vocabulary.handy
        for token in vocabulary.tokens(allowed):
            reached = front.after(vocabulary.spellings[token])
            if reached is not None and reached.cost <= room:
                row[token >> 5] |= np.uint32(1 << (token & 31))
        if certain is not None:
            row[certain >> 5] |= np.uint32(1 << (certain & 31))
