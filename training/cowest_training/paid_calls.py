"""The book of paid calls (`cowest_serving.book`) as steps see it: what goes wrong ends the step with its exit code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cowest_serving import book
from cowest_serving.book import Answer, Asked, BookError, BudgetSpent, Call
from cowest_serving.contract import SettingsError
from cowest_serving.leases import Spent
from cowest_serving.models import ChatModel

from .contract import EXIT_BUDGET, EXIT_RETRY, StepError

__all__ = ["Asked", "PaidCalls", "Spent", "read_live_spent", "read_scores", "read_spent"]


class PaidCalls(book.PaidCalls):
    """Raises `StepError` where the book raises errors of its own; those of models pass."""

    def __init__(self, path: str | Path, **settings: Any) -> None:
        with _ending_the_step():
            super().__init__(path, **settings)

    async def answer(self, model: ChatModel, call: Call) -> Answer:
        with _ending_the_step():
            return await super().answer(model, call)

    async def remember_score(self, key: str, score: Callable[[], Awaitable[float | None]]) -> float | None:
        with _ending_the_step():
            return await super().remember_score(key, score)


def read_spent(path: str | Path, *, round_number: int | None = None, day: str | None = None) -> Spent:
    """What a book says was paid, for a status line. Nothing when there is no book yet."""
    with _ending_the_step():
        return book.read_spent(path, round_number=round_number, day=day)


def read_scores(path: str | Path, keys: Iterable[str]) -> dict[str, float]:
    """Scores that are remembered, by key."""
    with _ending_the_step():
        return book.read_scores(path, keys)


def read_live_spent(path: str | Path) -> tuple[str, Spent]:
    """(today, what live answers are known to have cost on it), where the budget limits a day."""
    with _ending_the_step():
        return book.read_live_spent(path)


@contextmanager
def _ending_the_step() -> Iterator[None]:
    try:
        yield
    except BudgetSpent as error:
        raise StepError(str(error), EXIT_BUDGET) from None
    except BookError as error:
        raise StepError(str(error), EXIT_RETRY) from None
    except SettingsError as error:
        raise StepError(str(error)) from None
