"""Whether a weak model can be asked the rows of a job: its chat template takes them, and its context has room.

Asked before anything is paid (`cowest validate`, `plan`, `run`, the `check` step): a template that refuses a row, or
leaves the question out, breaks no step. The strong model answers alone there, and the weak model looks as if it were
of no use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cowest_serving import store
from cowest_serving.collaborate import DEFAULT_PROMPTS, draft_messages, is_draftable
from cowest_serving.contract import Collaboration, Messages, Prompts, message_text
from cowest_serving.loadable import Reader
from cowest_training.contract import Row, StepError
from cowest_training.round_trip import SAMPLE, context_of, token_counter_of

TRAIN, HELD_OUT = "training", "held-out"  # how rows are called
SHOWN = 300  # characters of a reason


@dataclass(frozen=True)
class Asked:
    """How a job asks its weak model."""

    prompts: Prompts
    draft_max_tokens: int
    max_length: int  # of prompt and draft in tuning
    is_tuned: bool = True


def prompts_of(collaboration: Collaboration) -> Prompts:
    """The prompts of a job, or the built-in ones of its draft form."""
    return collaboration.prompts or DEFAULT_PROMPTS[collaboration.draft]


def check_prompts(model: str, rows: Mapping[str, Sequence[Row]], asked: Asked, reader: Reader | None) -> list[str]:
    """Notes for a person. `rows` by `TRAIN` and `HELD_OUT`. Raises `StepError` where no row can be asked.

    Without a reader the words of the chat template are not known: they are not counted then.
    """
    context = reader.context if reader else context_of(model)
    notes = []
    if context and asked.draft_max_tokens >= context:
        notes.append(
            f"collaboration.draftMaxTokens = {asked.draft_max_tokens} leaves a prompt no room: the weak model's context"
            f" is {context} tokens (its config.json) for prompt and draft together. Drafts end where the context does."
        )
    count = _counter(model, reader)
    for name, found in rows.items():
        sample = [row for row in found[:: max(1, len(found) // SAMPLE)] if is_draftable(row.messages)]
        prompts: list[tuple[Row, Messages]] = [(row, draft_messages(row.messages, asked.prompts)) for row in sample]
        if reader and prompts:
            prompts, note = _taken(model, name, prompts, reader.tokenizer)
            notes += note
        if count and prompts:
            lengths = [count(messages) for _, messages in prompts]
            notes += _too_long(name, lengths, asked, context, is_whole=reader is not None)
    return notes


def _taken(
    model: str, name: str, prompts: Sequence[tuple[Row, Messages]], tokenizer: Any
) -> tuple[list[tuple[Row, Messages]], list[str]]:
    """What the chat template takes, and a note of what it refuses. Raises `StepError`."""
    from cowest_serving.generate import PromptError, render_prompt

    taken: list[tuple[Row, Messages]] = []
    refused: Counter[str] = Counter()
    first: dict[str, Row] = {}  # by what is rendered
    for row, messages in prompts:
        try:
            text = render_prompt(tokenizer, messages)
        except PromptError as error:
            refused[str(error)[:SHOWN]] += 1
            continue
        other = first.setdefault(text, row)
        if _plain(other.query) != _plain(row.query):
            raise StepError(
                f"weak model {model}: wanted a chat template that writes the question into the prompt, saw one that"
                f" gives the same prompt for {_named(other)} and {_named(row)}: {text[:60]!r}. Correct its"
                " chat_template (in chat_template.jinja or tokenizer_config.json), or choose another model."
            )
        taken.append((row, messages))
    if not refused:
        return taken, []
    (reason, _), count = refused.most_common(1)[0], refused.total()
    if not taken:
        raise StepError(
            f"weak model {model}: wanted a chat template that takes the {name} rows, saw one that refuses all {count}"
            f" that were looked at: {reason}. Correct its chat_template (in chat_template.jinja or"
            " tokenizer_config.json), or the roles in `messages`, or choose another model."
        )
    return taken, [
        f"{count} of {len(prompts)} {name} rows that were looked at are refused by the weak model's chat template: the"
        f" strong model answers queries like them alone. It says: {reason}"
    ]


def _named(row: Row) -> str:
    return f"{row.query[:40]!r} ({row.where or 'row ' + row.id})"


def _plain(query: str) -> str:
    return " ".join(query.casefold().split())


def _too_long(name: str, lengths: Sequence[int], asked: Asked, context: int | None, *, is_whole: bool) -> Iterator[str]:
    """Raises `StepError` where no row has room."""
    longest = f"the longest has {max(lengths)}" + ("" if is_whole else ", without the chat template's own words")
    if context and (beyond := sum(length >= context for length in lengths)):
        room = f"the weak model's context of {context} tokens ({longest})"
        if beyond == len(lengths):
            raise StepError(
                f"wanted {name} rows that leave a draft room, saw prompts as long as {room} or longer in all {beyond}"
                " that were looked at: the weak model can draft nothing. Choose one with a longer context, or shorten"
                " the rows or collaboration.prompts.draft."
            )
        yield (
            f"{beyond} of {len(lengths)} {name} rows that were looked at have prompts as long as {room} or longer: it"
            " can draft nothing for queries like them."
        )
    if name != TRAIN or not asked.is_tuned:
        return
    if beyond := sum(length >= asked.max_length for length in lengths):
        room = f"training.maxLength = {asked.max_length} tokens ({longest})"
        if beyond == len(lengths):
            raise StepError(
                f"wanted training rows to learn from, saw prompts as long as {room} or longer in all {beyond} that were"
                " looked at: tuning leaves them out. Raise training.maxLength, or shorten the rows or"
                " collaboration.prompts.draft."
            )
        yield (
            f"{beyond} of {len(lengths)} training rows that were looked at have prompts as long as {room} or longer:"
            " tuning leaves them out."
        )


def _counter(model: str, reader: Reader | None) -> Callable[[Messages], int] | None:
    """Tokens of a prompt."""
    if reader:
        from cowest_serving.generate import prompt_ids, render_prompt

        tokenizer = reader.tokenizer
        return lambda messages: len(prompt_ids(tokenizer, render_prompt(tokenizer, messages)))
    file = store.join(model, "tokenizer.json")
    count = token_counter_of(store.get(file).decode(errors="replace")) if store.exists(file) else None
    return (lambda messages: sum(count(message_text(message)) for message in messages)) if count else None
