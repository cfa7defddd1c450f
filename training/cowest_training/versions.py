"""Whether the strong model became another one while it was asked. Pure.

An endpoint names its model in each answer, and many a version (`system_fingerprint`). Several versions in turn are one
service that rotates between machines; a name that is gone for good while another came is another model. An endpoint
that names neither cannot be seen through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 10  # answers on each side of a change: by chance a rotation of two shows none of the one once in 500,000


@dataclass(frozen=True)
class Named:
    """How one answer, paid now, names what gave it."""

    model: str
    version: str


@dataclass(frozen=True)
class Change:
    before: tuple[str, ...]
    after: tuple[str, ...]
    at: int  # answers before it

    def __str__(self) -> str:
        return f"{', '.join(self.before)} for {self.at} answers, then {', '.join(self.after)}"


def change(answers: Sequence[Named], in_flight: int) -> Change | None:
    """The point after which no name of before comes again. `answers` in the order in which they came in, of which
    `in_flight` may have overtaken each other."""
    return _change([each.version for each in answers], in_flight) or _change(
        [each.model for each in answers], in_flight
    )


def _change(names: Sequence[str], in_flight: int) -> Change | None:
    named = [name for name in names if name]
    last = {name: place for place, name in enumerate(named)}
    first = {name: named.index(name) for name in last}
    order = sorted(first, key=lambda name: first[name])
    for count in range(1, len(order)):
        before, after = order[:count], order[count:]
        begins, ends = first[after[0]], 1 + max(last[name] for name in before)
        if ends - begins <= in_flight and begins >= ENOUGH and len(named) - ends >= ENOUGH:
            return Change(tuple(sorted(before)), tuple(sorted(after)), begins)
    return None


def edges(answers: Sequence[Named]) -> dict[str, list[str]]:
    """The names of the first and the last answers, by which one step is compared with the next."""
    names = [each.version for each in answers if each.version] or [each.model for each in answers if each.model]
    return {"first": sorted(set(names[:ENOUGH])), "last": sorted(set(names[-ENOUGH:]))}
