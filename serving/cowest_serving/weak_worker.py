"""The thread that owns a weak model: loads it, proves that it answers, and answers requests in batches.

What arrives while a batch runs joins the next one. Rows of a batch may differ in every setting.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cowest_serving.answering import Refusal

if TYPE_CHECKING:
    from cowest_serving.generate import Ask, Generation, Generator, Piece

log = logging.getLogger(__name__)
Event = tuple[int, "Piece | Generation | Exception"]


class Job:
    """The rows of one request. Made and read in the event loop, answered by the worker's thread."""

    def __init__(self, asks: Sequence[Ask], *, streamed: bool) -> None:
        self.asks = asks
        self.streamed = streamed
        self.cancelled = False  # written by the event loop, read by the thread
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, row: int, event: Piece | Generation | Exception) -> None:
        """From the worker's thread."""
        if not self.cancelled and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (row, event))

    async def next(self) -> tuple[int, Piece | Generation]:
        """The next piece (streamed jobs) or finished row. Raises what went wrong in the thread."""
        row, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return row, event

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Counts:
    """Since the start; written by the worker's thread alone."""

    batches: int = 0
    rows: int = 0
    cancelled_rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_seconds: float = 0.0


@dataclass
class Worker:
    """`load` runs in the thread. `on_failure` is called there once when the model cannot be served."""

    load: Callable[[], Generator]
    on_failure: Callable[[Exception], None]
    max_batch: int
    max_waiting: int  # rows
    counts: Counts = field(default_factory=Counts)
    generator: Generator | None = None
    ready: bool = False

    def __post_init__(self) -> None:
        self._rows: deque[tuple[Job, int]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a model that is still loading must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="weak-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Stop after the batch that runs. False when the thread is still at work after `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._rows)

    def submit(self, job: Job) -> None:
        """Raises `Refusal` 429 when too much waits already."""
        with self._changed:
            if self._rows and len(self._rows) + len(job.asks) > self.max_waiting:
                message = f"{len(self._rows)} answers wait already; ask again in a second, or start more replicas."
                raise Refusal(429, message, "rate_limit_error", code="too_many_waiting", retry_after=1)
            self._rows.extend((job, row) for row in range(len(job.asks)))
            self._changed.notify()

    # ------------------------------------------------------------ in the thread
    def _run(self) -> None:
        try:
            self.generator = self.load()
            self._prove()
            while batch := self._next_batch():
                self._answer(batch)
        except Exception as error:
            self.on_failure(error)
        finally:
            self.ready = False

    def _prove(self) -> None:
        """Ready means: one token was really written."""
        assert self.generator is not None
        self.generator.generate(["Ready?"], max_tokens=1, temperature=0, seeds=[0])
        self.ready = True

    def _next_batch(self) -> list[tuple[Job, int]]:
        """Up to `max_batch` rows that somebody still waits for; an empty list when it is time to end."""
        with self._changed:
            while True:
                batch: list[tuple[Job, int]] = []
                while self._rows and len(batch) < self.max_batch:
                    job, row = self._rows.popleft()
                    if job.cancelled:
                        self.counts.cancelled_rows += 1
                    else:
                        batch.append((job, row))
                if batch or self._closing:
                    return batch
                self._changed.wait()

    def _answer(self, batch: Sequence[tuple[Job, int]]) -> None:
        assert self.generator is not None

        def on_token(index: int, piece: Piece) -> bool:
            job, row = batch[index]
            if job.streamed:
                job.tell(row, piece)
            return not job.cancelled

        started = time.monotonic()
        streamed = [job.streamed for job, _ in batch]
        try:
            generations = self.generator.run([job.asks[row] for job, row in batch], on_token, watched=streamed)
        except Exception as error:  # out of memory, NaN weights: these rows fail, the server goes on
            log.exception("a batch of %d rows failed", len(batch))
            for job, row in batch:
                job.tell(row, error)
            return
        self._count(generations, time.monotonic() - started)
        for (job, row), generation in zip(batch, generations, strict=True):
            job.tell(row, generation)

    def _count(self, generations: Sequence[Any], seconds: float) -> None:
        self.counts.batches += 1
        self.counts.rows += len(generations)
        self.counts.cancelled_rows += sum(g.finish_reason == "cancelled" for g in generations)
        self.counts.prompt_tokens += sum(g.prompt_tokens for g in generations)
        self.counts.output_tokens += sum(len(g.token_ids) for g in generations)
        self.counts.busy_seconds += seconds
