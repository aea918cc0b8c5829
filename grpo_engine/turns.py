"""Ranks that share one policy use it together: who does what with it next.

To put a layer of it together takes all ranks at once (``sharding.py``). So every pass through the policy is made by all
of them, in turns: a rank that wants one says so, and who has none to make at that moment makes an empty pass with it.
Ranks may then differ in how many passes they make: rewrites of different lengths, groups without spread, shares of an
evaluation that differ by one prompt. Nothing that ranks exchange begins before all of them have come to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum


class Turn(IntEnum):
    """What a rank wants to do next. The largest that any rank wants is done next, by those that want it."""

    MEET = 0  # exchange something: once all ranks want that
    SETTLE = 1  # go on to work without the policy: once no rank wants a pass
    REFERENCE = 2  # a forward pass of the untrained policy, where that is a model of its own
    FORWARD = 3
    LEARN = 4  # a forward pass, then its backward pass
    COLLECT = 5  # put trained weights together on the first rank


class Turns:
    """Who uses the policy when. This one is of a policy that is whole here: it is always this rank's turn."""

    def take(self, wanted: Turn) -> None:
        """Return when it is time for ``wanted``, which must follow at once."""


class SharedTurns(Turns):
    """Keeps what several ranks do with one sharded policy in step.

    Args:
        agree: the largest number that any rank gives, on every rank.
        go_along: for each turn with the policy, this rank's part where only others want it.
        settled: called after :attr:`Turn.SETTLE`.
    """

    def __init__(
        self,
        agree: Callable[[int], int],
        go_along: Mapping[Turn, Callable[[], object]],
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self.go_along = dict(go_along)
        self._agree, self._settled = agree, settled

    def take(self, wanted: Turn) -> None:
        """See :class:`Turns`. Until then it goes along with the others."""
        while (turn := Turn(self._agree(wanted))) != wanted:
            if turn > Turn.SETTLE:
                self.go_along[turn]()
        if wanted == Turn.SETTLE:
            self._settled()
