"""Which drafts of a query are still to be asked for its pair to be known (decision 17). Pure.

Scores lie in [0, 1]: once one is 1 and another 0, no further draft makes a better pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

NOISE = 1e-9  # 0.1 + 0.2 style noise must not decide
AT_ONCE = 2  # drafts that are asked first: a pair takes two


def reaches(margin: float, wanted: float) -> bool:
    """Whether two scores are so far apart; a wanted margin of 0 still asks for a difference."""
    return margin > 0 and margin >= wanted - NOISE


def is_decided(scores: Sequence[float], left: int, min_margin: float) -> bool:
    """Whether best against worst of all drafts is that of those asked: `left` are not."""
    if not left:
        return True
    best, worst = max(scores), min(scores)
    is_out_of_reach = left == 1 and not reaches(max(1 - worst, best), min_margin)
    return (best >= 1 and worst <= 0) or is_out_of_reach


class Sayings:
    """The drafts of one query by what they say is the answer: of those that say the same the first stands for all.

    Those that leave it open ("") count together, for no result of theirs misleads; each is a draft of its own.
    """

    def __init__(self, drafts: Iterable[str], says: Callable[[str], str]) -> None:
        said = [(says(text), text) for text in drafts]
        self._times = Counter(saying for saying, _ in said)
        first: dict[str, tuple[str, str]] = {}
        for saying, text in said:
            first.setdefault(saying or f"open: {text}", (saying, text))
        self._left = list(first.values())

    @property
    def left(self) -> int:
        return len(self._left)

    def take(self, *, common: bool) -> str:
        """What most drafts say is likely right, what few say likely wrong; of equals the earlier."""
        chosen = (max if common else min)(self._left, key=lambda each: self._times[each[0]])
        self._left.remove(chosen)
        return chosen[1]
