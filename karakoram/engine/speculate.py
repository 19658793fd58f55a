"""Guessing the next tokens from the sequence itself: where its last few tokens stood before, what followed then?

The engine runs the guesses through the model together with the newest token and draws each position's token as it
would have anyway; a guess counts only if it is the very token drawn. So greedy and sampled outputs are those without
guessing: a draw depends on its logits and on (seed, position) alone. (Saxena, prompt-lookup decoding, 2023; the
acceptance rule is speculative sampling's, arXiv 2211.17192 §2.3, for a guess of probability one.)

A pass over several tokens costs more than one over a single token: by how much is measured as the engine runs, and each
sequence keeps the share of its guesses that were right. It guesses while that gains, and asks again later where not.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

GUESSES = 4  # at most so many tokens: beyond, the chance that all are right is small on ordinary text
LONGEST, SHORTEST = 4, 2  # lengths of the tail that is looked up, longest first
FORGET = 0.15  # weight of the newest guess in a sequence's share
HOPEFUL = 0.6  # a sequence's share before anything is known
PAUSE = 32  # tokens without guessing after it stopped paying


class Guesser:
    """The n-grams of one sequence; learns each token as it comes."""

    def __init__(self) -> None:
        self.share = HOPEFUL  # of guesses that were right
        self._seen: dict[tuple[int, ...], int] = {}  # tail -> where what followed it begins
        self._read = 0
        self._wait_until = 0

    def guess(self, tokens: Ids[int], most: int, extra_cost: float) -> list[int]:
        """What may follow `tokens`: up to `most` tokens, none where a guess does not pay.

        extra_cost    what one more token in a pass costs, in passes over a single token
        """
        self._learn(tokens)
        if len(tokens) < self._wait_until:
            return []
        if self.share <= extra_cost:
            self._wait_until, self.share = len(tokens) + PAUSE, HOPEFUL
            return []
        for length in range(LONGEST, SHORTEST - 1, -1):
            at = self._seen.get(tuple(tokens[-length:]))
            if at is not None:
                return list(tokens[at : at + min(most, GUESSES)])
        return []

    def learn(self, guessed: int, right: int) -> None:
        """So many tokens were guessed, the first `right` of them rightly."""
        for number in range(min(guessed, right + 1)):
            self.share += FORGET * ((number < right) - self.share)

    def _learn(self, tokens: Ids[int]) -> None:
        # A tail is entered when the token after it is known, so that the newest tail finds an earlier place.
        for end in range(max(self._read, 1), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._read = len(tokens)


class PassCosts:
    """How long passes take by the number of their tokens: what one token more costs."""

    def __init__(self) -> None:
        self._ms: dict[int, float] = {}

    def saw(self, tokens: int, ms: float) -> None:
        """A pass over so many tokens took so long."""
        bucket = tokens.bit_length()
        known = self._ms.get(bucket)
        self._ms[bucket] = ms if known is None else known + 0.1 * (ms - known)

    def extra(self, tokens: int) -> float:
        """What one more token costs in a pass over about so many, as a share of that pass; 0 where unknown."""
        bucket = tokens.bit_length()
        here = self._ms.get(bucket)
        for doublings in (2, 1):  # four times the tokens, or where guesses are short, twice
            more = self._ms.get(bucket + doublings)
            if here and more is not None:
                return max(0.0, (more - here) / here) / ((2**doublings - 1) * tokens)
        return 0.0

    def ms(self, tokens: int) -> float | None:
        """How long a pass over about so many tokens takes; None where none was seen."""
        return self._ms.get(tokens.bit_length())

    def estimate(self, tokens: int) -> float:
        """How long it may take where it was not seen: in proportion to the nearest longer pass, else the longest."""
        bucket = tokens.bit_length()
        near = min((known for known in self._ms if known >= bucket), default=max(self._ms, default=None))
        return 0.0 if near is None else self._ms[near] * 2.0 ** (bucket - near)
