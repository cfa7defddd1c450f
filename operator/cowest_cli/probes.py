"""Who is asked once before the first minutes of tuning: the strong model, and a judge or a scorer over HTTP.

A wrong address, key or name is said then, in the words that the steps would have for it minutes later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cowest_serving.contract import Strong, evaluator_key
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, Evaluator, Row, StepError

PATIENCE_SECONDS = 30.0
RETRIES = 2
SCORER_RETRIES = 1  # its own time-out may be a minute


def strong_answers(strong: Strong, keys: str) -> None:
    """Costs one token. `keys`: one a line. Raises `StepError`."""
    _answers(
        "spec.strong",
        "strong.apiKeySecretRefs",
        strong.endpoint,
        strong.model,
        keys.split("\n"),
        timeout_seconds=strong.timeout_seconds,
        retries=min(RETRIES, strong.max_retries),
    )


def evaluator_answers(settings: Evaluator, keys: Mapping[str, str], row: Row | None) -> str:
    """Each judge costs one token; a scorer scores the reference of `row` as if it were an answer.

    Says so where that scores 0, else "". Raises `StepError`.
    """
    for number, judge in enumerate(settings.judges):
        field = f"feedback.evaluator.jury[{number - 1}]" if number else "feedback.evaluator"
        _answers(
            f"spec.{field}",
            f"{field}.apiKeySecretRef",
            judge.endpoint or "",
            judge.model or "",
            [keys.get(evaluator_key(number), "")],
            timeout_seconds=judge.timeout_seconds,
            retries=RETRIES,
        )
    if settings.type == "HTTP" and row is not None:
        try:
            score = asyncio.run(_score_once(settings, keys.get(evaluator_key()), row))
        except StepError as error:
            raise StepError(
                f"spec.feedback.evaluator was asked for one score before anything is started. {error}", error.code
            ) from None
        if score == 0 and row.reference:
            return (
                f"the scorer {settings.endpoint} gives 0 to the reference of {row.where or 'row ' + row.id} as an"
                " answer. Is that right? The loop prefers what it scores high."
            )
    return ""


async def _score_once(settings: Evaluator, key: str | None, row: Row) -> float:
    from cowest_training.evaluator import HttpScorer

    scorer = HttpScorer(settings, key, retries=SCORER_RETRIES)
    try:
        return await scorer(row, row.reference)
    finally:
        await scorer.aclose()


def _answers(
    field: str,
    reference: str,
    endpoint: str,
    name: str,
    keys: Sequence[str],
    *,
    timeout_seconds: float | None,
    retries: int,
) -> None:
    from cowest_serving.models import BadAnswer, HttpChatModel, ModelError

    async def ask() -> None:
        patience = min(float(timeout_seconds or PATIENCE_SECONDS), PATIENCE_SECONDS)
        async with HttpChatModel(endpoint, name, api_keys=keys, timeout_seconds=patience, max_retries=retries) as model:
            await model([{"role": "user", "content": "Say yes."}], max_tokens=1)

    try:
        asyncio.run(ask())
    except ModelError as error:
        if error.status == 400:  # it is there and takes the key; a question of one token is not to its taste
            return
        missing = f" Declare {reference}." if error.status in (401, 403) and not any(keys) else ""
        # What was never seen to be a chat endpoint is none the next time either.
        again = error.retryable and not (isinstance(error, BadAnswer) and error.is_foreign)
        raise StepError(
            f"{field} was asked for one token before anything is started. {error}{missing}",
            EXIT_RETRY if again else EXIT_BAD_INPUT,
        ) from None
