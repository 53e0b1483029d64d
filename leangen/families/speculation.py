"""Prompt lookup: guessing the next tokens from what the sequence already says.

What follows the last occurrence of the sequence's end is taken for what comes next (2304.04487;
"prompt lookup decoding"). The model then computes the logits after all guessed tokens in one run,
and tokens are chosen from them as ever: guesses that were not chosen are dropped, so a guess can
change when a token is computed, never which.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens of the end that are looked up, longest first; a single token matches by chance."""

ROW_COST = 0.3
"""Cost of one more row in a run, as a share of a run of one row."""

_FORGET = 0.95  # per run: after a failure, guessing starts again within some ten tokens


class PromptLookup:
    """The tokens of one sequence, and a guess at the next ones where guessing pays.

    It pays when the expected number of tokens per run grows faster than the run's cost. With
    acceptance probability p, d guesses give (1 - p^(d+1)) / (1 - p) tokens (2211.17192) and cost
    1 + d ROW_COST. p is the recent share of accepted guesses, drawn towards one half while there
    are few, so that a pause ends by itself. No clock is read: same sequence, same runs.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        """Guesses per run."""
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._match: int | None = None
        """Where the longest earlier occurrence of the end ends."""
        self._right, self._wrong = 0.0, 0.0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence."""
        for token in tokens:
            self._tokens.append(token)
            here = len(self._tokens) - 1
            self._match = None
            for n in range(min(LONGEST_MATCH, here + 1), SHORTEST_MATCH - 1, -1):
                end = tuple(self._tokens[-n:])
                if self._match is None:
                    self._match = self._ends.get(end)
                self._ends[end] = here

    def guess(self, room: int) -> list[int]:
        """Up to `room` tokens that may come next; none where it does not pay."""
        self._right *= _FORGET
        self._wrong *= _FORGET
        count = min(room, self._worthwhile())
        if self._match is None or count <= 0:
            return []
        # Near the end the match runs into the guess itself: a loop goes on.
        period = len(self._tokens) - 1 - self._match
        start = self._tokens[self._match + 1 :][:count]
        return [start[i % period] for i in range(count)]

    def learn(self, guessed: int, accepted: int) -> None:
        """Take notice of how many of the guessed tokens were chosen."""
        self._right += accepted
        self._wrong += accepted < guessed  # what follows a wrong guess was not tried

    def _worthwhile(self) -> int:
        p = (self._right + 1) / (self._right + self._wrong + 2)
        gains = [(1 - p ** (d + 1)) / (1 - p) / (1 + d * ROW_COST) for d in range(self._most + 1)]
        return gains.index(max(gains))
