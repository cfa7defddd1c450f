"""What `feedback`, `evaluate` and `score_live` have in common: the pair's drafts, the strong model's answers, scores.

drafts    in this process, in fixed batches, kept on disk so that an interrupted step does not draw them again
answers   through the book of paid calls; with COWEST_STRONG_URL from the job's proxy, which holds keys and budget
scores    of a judge or a user's scorer through the same book: they cost money too
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowest_serving.book import CODE_BUDGET_SPENT, HEADER_PURPOSE, HEADER_ROUND
from cowest_serving.collaborate import draft_messages, is_draftable, refine_messages, solo_messages
from cowest_serving.contract import JUDGE_PATH, Messages, Pair, Redaction, Strong, digest_of, evaluator_key, parse
from cowest_serving.error_bodies import ErrorBody, OutspokenModel, body_of
from cowest_serving.key_files import PROXY_KEYS, keys_of
from cowest_serving.models import BadRequest, ChatModel, ChatResult, HttpChatModel, is_clients_fault, is_same_origin
from cowest_serving.redaction import Redacted, Redactor

from .contract import EXIT_BAD_INPUT, EXIT_BUDGET, EXIT_RETRY, Evaluator, Row, StepError
from .evaluator import (
    DEFAULT_TIMEOUT_SECONDS,
    TIE,
    Judge,
    Jury,
    Score,
    build_evaluator,
    check_settings,
    judge_model,
    score_of,
)
from .paid_calls import PaidCalls, Spent
from .versions import Named, change, edges

if TYPE_CHECKING:
    from cowest_serving.generate import Generator

BATCH_DRAFTS = 64  # drafts drawn at once; part of what makes a ledger reproducible
_NUMBER = re.compile(r"\d+")
JUDGE = "judge"  # in the purpose of a judge's calls
NO_SUCH_JUDGE = ("model_not_found", "unknown_url")  # says a proxy whose manifest names another judge, or none
DEADLINE_OVER_TIMEOUT = 3  # a step can wait out a rate limit for longer than a user would wait for an answer


# ---------------------------------------------------------------- the pair
def read_pair(path: str) -> Pair:
    """The pair in a pair.json (the pair itself, or a file with it under `pair`). Raises `StepError`."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return parse(Pair, data.get("pair", data), path)
    except (OSError, ValueError, AttributeError) as error:  # SettingsError is a ValueError
        raise StepError(f"{path}: wanted a pair (JSON, as `cowest` writes it), saw: {error}.") from None


# ---------------------------------------------------------------- drafts
@dataclass(frozen=True)
class Draft:
    """y ~ pi_w(x). `index` 0 is the greedy one."""

    query_id: str
    index: int
    seed: int
    text: str
    tokens: int
    finish_reason: str = ""  # stop | length; "": drawn by a version that did not keep it


@dataclass(frozen=True)
class Recipe:
    """All that decides a draft besides the query: same recipe, rows, machine and threads -> same drafts."""

    pair: Pair
    drafts_per_query: int
    temperature: float
    max_tokens: int
    seed: str  # of the job and round; one more seed is made of it per query and draft index

    @property
    def batch_rows(self) -> int:
        return max(1, BATCH_DRAFTS // self.drafts_per_query)

    def digest(self, rows: Sequence[Row]) -> str:
        how = [self.drafts_per_query, self.temperature, self.max_tokens, self.seed, BATCH_DRAFTS]
        what = [[row.id, list(row.messages)] for row in rows]
        return digest_of([self.pair.weak_digest, self.pair.prompts.draft, how, what])


def draft_seed(seed: str, query_id: str, index: int) -> int:
    """63 bits, so that it fits a signed column."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{query_id}/{index}".encode()).digest()[:8], "big") >> 1


class Drafts:
    """The drafts of some rows by one recipe, batch by batch, from disk where a run before drew them."""

    def __init__(self, recipe: Recipe, rows: Sequence[Row], folder: Path) -> None:
        self.recipe = recipe
        size = recipe.batch_rows
        self.batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        self._path = folder / f"{recipe.digest(rows).removeprefix('sha256:')}.jsonl"
        self._known = _read_batches(self._path)
        self.refused: dict[str, str] = _read_refused(self._path)  # why no draft can be drawn, by query id
        self._generator: Generator | None = None

    @property
    def on_disk(self) -> int:
        """Batches that were drawn before."""
        return len(self._known)

    @property
    def are_on_disk(self) -> bool:
        """All of them."""
        return len(self._known) >= len(self.batches)

    @property
    def rows(self) -> int:
        return sum(map(len, self.batches))

    @property
    def rows_on_disk(self) -> int:
        """Rows whose drafts were drawn before."""
        return sum(len(batch) for number, batch in enumerate(self.batches) if number in self._known)

    def load(self) -> None:
        """The weak model, where a draft is still to be drawn: before anything is paid. Blocks. Raises as it does."""
        if not self.are_on_disk:
            self._generator = self._generator or load_generator(self.recipe.pair)

    def unload(self) -> None:
        self._generator = None

    def draw(self, number: int) -> dict[str, list[Draft]]:
        """The drafts of one batch of rows, by query id, in order of index; none where none can be drawn. Blocks."""
        if number not in self._known:
            batch = self.batches[number]
            self._known[number] = self._draw(batch)
            refused = {row.id: self.refused[row.id] for row in batch if row.id in self.refused}
            drafts = [list(vars(draft).values()) for draft in self._known[number]]
            _append(self._path, {"batch": number, "drafts": drafts, "refused": refused})
        found: dict[str, list[Draft]] = {row.id: [] for row in self.batches[number]}
        for draft in self._known[number]:
            found[draft.query_id].append(draft)
        return found

    def forget(self) -> None:
        """The drafts stand in the step's output now."""
        self._path.unlink(missing_ok=True)

    def _draw(self, rows: Sequence[Row]) -> list[Draft]:
        from cowest_serving.generate import Ask

        recipe = self.recipe
        generator = self._generator = self._generator or load_generator(recipe.pair)
        wanted = []
        for row in rows:
            ids = prompt_ids(generator, row, recipe.pair)
            if isinstance(ids, Refused):
                self.refused[row.id] = ids.why
                continue
            indices = range(recipe.drafts_per_query)
            wanted += [(row.id, index, draft_seed(recipe.seed, row.id, index), ids) for index in indices]
        drawn = generator.run(
            [Ask(ids, recipe.max_tokens, recipe.temperature if index else 0.0, seed) for _, index, seed, ids in wanted]
        )
        return [
            Draft(query_id, index, seed, result.text, len(result.token_ids), result.finish_reason)
            for (query_id, index, seed, _), result in zip(wanted, drawn, strict=True)
        ]


@dataclass(frozen=True)
class Refused:
    """The weak model cannot be asked. In service the strong one answers alone."""

    why: str


NOT_TEXT = "the conversation is not text alone"


def prompt_ids(generator: Generator, row: Row, pair: Pair) -> list[int] | Refused:
    """Refused where it is too long, not text, or not what the model's chat template takes."""
    from cowest_serving.generate import PromptError

    if not is_draftable(row.messages):
        return Refused(NOT_TEXT)
    try:
        ids = generator.encode(draft_messages(row.messages, pair.prompts))
        generator.room(ids)
    except PromptError as error:
        return Refused(str(error))
    return ids


def refused_words(refused: Mapping[str, str], rows: int, whose: str) -> list[str]:
    """A sentence for each reason for which no draft was drawn, the most frequent first; three at most."""
    kinds: dict[str, list[str]] = {}
    for why in refused.values():
        kinds.setdefault(_NUMBER.sub("#", why), []).append(why)
    found = sorted(kinds.values(), key=len, reverse=True)[:3]
    return [f"Note: {whose} drafts nothing for {len(whys)} of {rows} queries: {whys[0]}." for whys in found]


def load_generator(pair: Pair) -> Generator:
    """The pair's weak model, in this process. Raises when its files are not what the pair names."""
    # Here, for they bring torch: seconds to load, and not needed when all drafts are on disk.
    from cowest_serving.generate import Generator
    from cowest_serving.model_files import resolve_model

    generator = Generator.load(resolve_model(pair.weak_uri))
    _refuse_other(pair, generator.digest)
    return generator


def _refuse_other(pair: Pair, seen: str) -> None:
    if pair.weak_digest and seen != pair.weak_digest:
        raise StepError(
            f"{pair.weak_uri}: wanted the weak model {pair.weak_digest}, saw {seen}. "
            "Its files were changed: publish them as a model of its own and propose that one."
        )


def check_pair(pair: Pair) -> None:
    """Whether the pair's weak model is there, its own, and can be loaded; without loading it. Raises."""
    from cowest_serving.loadable import check_loadable
    from cowest_serving.model_files import check_model_folder, model_digest, resolve_model

    folder = resolve_model(pair.weak_uri)
    check_model_folder(folder)
    _refuse_other(pair, model_digest(folder))
    check_loadable(folder, named=pair.weak_uri)


def generate_greedy(generator: Generator, row: Row, pair: Pair, max_tokens: int) -> str | None:
    """One draft for one query; None where none can be drawn. Blocks."""
    from cowest_serving.generate import Ask

    ids = prompt_ids(generator, row, pair)
    if isinstance(ids, Refused):
        return None
    return generator.run([Ask(ids, max_tokens, 0.0, 0)])[0].text


class GreedyDrafts:
    """A pair's greedy drafts of one query at a time, from disk where a run before drew them.

    One by one: which queries come together must not change a draft, as it would in a batch.
    """

    def __init__(self, pair: Pair, max_tokens: int, folder: Path, load: Callable[[], Generator]) -> None:
        self._pair, self._max_tokens, self._load = pair, max_tokens, load
        what = digest_of([pair.weak_digest, pair.prompts.draft, max_tokens])
        self._path = folder / f"greedy-{what.removeprefix('sha256:')}.jsonl"
        self._known: dict[str, str | None] = {line["query"]: line["draft"] for line in _read_lines(self._path)}

    def draw(self, row: Row) -> str | None:
        """None where none can be drawn. Blocks; not to be called twice at once."""
        query = digest_of(list(row.messages))
        if query not in self._known:
            # Known before it is kept: where that fails, a watcher that asks again goes on without drawing anew.
            self._known[query] = generate_greedy(self._load(), row, self._pair, self._max_tokens)
            _append(self._path, {"query": query, "draft": self._known[query]})
        return self._known[query]


def drafts_folder(calls: str | Path) -> Path:
    """Beside the book of paid calls: local, and kept as long as it."""
    return Path(f"{calls}.drafts")


def _read_batches(path: Path) -> dict[int, list[Draft]]:
    return {line["batch"]: [Draft(*values) for values in line["drafts"]] for line in _read_lines(path)}


def _read_refused(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in _read_lines(path):
        found |= line.get("refused", {})
    return found


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with suppress(ValueError):  # torn by a kill: it is drawn again
                yield json.loads(line)


def _append(path: Path, value: Mapping[str, Any]) -> None:
    """Raises `StepError`, as the book beside it does where the disk takes nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            # A line begins with a newline, so that one torn by a kill spoils no other.
            file.write(b"\n" + json.dumps(value).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StepError(
            f"{path}: no draft can be kept there: {error}. Wanted a writable folder on a disk with room; "
            "run again once it is.",
            EXIT_RETRY,
        ) from None


# ---------------------------------------------------------------- scores that are remembered
ORDERS_DIFFER = "ordersDiffer"  # a judge says one thing of an answer before its reference, another of one behind it


JURORS_SPLIT = "jurorsSplit"  # the judges of a jury score it differently


def judges_of(evaluator: Score) -> tuple[Judge, ...]:
    """None where no model judges."""
    return (evaluator,) if isinstance(evaluator, Judge) else evaluator.judges if isinstance(evaluator, Jury) else ()


def score_key(evaluator: str, row: Row, answer: str) -> str:
    """Under which the score by that evaluator (its digest) lies in the book."""
    return digest_of([evaluator, list(row.messages), row.reference, answer])


def doubt_key(score: str) -> str:
    """Under which lies that the two orders of that score disagreed."""
    return digest_of([score, ORDERS_DIFFER])


async def _yes() -> float | None:
    return 1.0


# ---------------------------------------------------------------- answers
@dataclass(frozen=True)
class Paid:
    """What the call of an answer took and cost, whoever paid it first."""

    input_tokens: int
    output_tokens: int
    money: float


@dataclass(frozen=True)
class Reply:
    """An answer of the strong model. `error` says why there is none: it found the request itself wrong."""

    text: str
    call: str  # key in the book
    version: str  # of the strong model, "" where it does not say
    model: str = ""
    error: str = ""
    paid: Paid | None = None  # None: not known (an answer of no call, a ledger of older days)


class Asking:
    """The strong model and the evaluator behind one book; made by `open_asking`."""

    def __init__(
        self,
        strong: Strong,
        calls: PaidCalls,
        evaluator: Score,
        purpose: str,
        stack: AsyncExitStack,
        *,
        proxy_url: str = "",
        round_number: int | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self.calls = calls
        self.evaluator = evaluator
        self.purpose = purpose
        self._strong = strong
        self._stack = stack
        self._proxy_url = proxy_url
        self._round = round_number
        self._redactor = redactor or Redactor()
        self._models: dict[tuple[str, str, str], HttpChatModel] = {}
        self.generation = 0  # of the strong model, see `open_asking`
        self.replies = 0  # answers that came back, paid now or before
        # By the model that was asked: what each answer that was paid now says it is of, in order.
        self.named: dict[str, list[Named]] = {}
        self._first_error = ""
        self._unusual: Counter[str] = Counter()

    @property
    def judged(self) -> Spent:
        """What the judge's calls cost; nothing for other evaluators."""
        return self.calls.spent(purpose=f"{self.purpose}:{JUDGE}")

    @property
    def strong_seen(self) -> dict[str, Any]:
        """Who answered: the first and the last names of the model that was asked most, and the change between the names
        of any where there was one. Two models that are asked by turns (an edit of strong.model) are no change."""
        most = max(self.named.values(), key=len, default=[])
        changes = (change(names, self._strong.max_concurrency) for names in self.named.values())
        return {**edges(most), "change": next((str(changed) for changed in changes if changed), "")}

    @property
    def unusual(self) -> dict[str, int]:
        """Answers that are worth little for a reason of their own, by metric."""
        return {name: self._unusual[name] for name in UNUSUAL}

    async def answer(self, row: Row, draft: str, pair: Pair, purpose: str = "answer") -> Reply:
        """y* ~ pi_s(x, y)"""
        redacted = self._redactor.begin()
        asked = refine_messages(redacted.messages(row.messages), redacted.text(draft), pair.prompts)
        return await self._ask(asked, pair, purpose, redacted)

    async def solo(self, row: Row, pair: Pair, purpose: str = "solo") -> Reply:
        """z ~ pi_s(x). The same in every round and for every weak model, so paid once."""
        redacted = self._redactor.begin()
        return await self._ask(solo_messages(redacted.messages(row.messages), pair.prompts), pair, purpose, redacted)

    async def score(self, row: Row, reply: Reply) -> float:
        """E(answer, query) in [0, 1]; no answer is worth 0."""
        return 0.0 if reply.error else await self.score_text(row, reply.text)

    async def score_text(self, row: Row, answer: str) -> float:
        if self.evaluator.needs_reference:
            return await self.evaluator(row, answer)
        if isinstance(self.evaluator, Judge):
            return await self._judged(self.evaluator, row, answer)
        if isinstance(self.evaluator, Jury):  # each remembered by itself: another juror costs its own calls alone
            said = await asyncio.gather(*(self._judged(each, row, answer) for each in self.evaluator.judges))
            return self.evaluator.verdict(said)
        key = score_key(self.evaluator.digest, row, answer)
        score = await self.calls.remember_score(key, lambda: self.evaluator(row, answer))
        return TIE if score is None else score

    async def grades(self, row: Row, answers: Sequence[str]) -> list[float]:
        """As `score_text`, of several answers by one reply of each judge; one by one where a judge does not tell."""
        told = [await judge.grades(row, answers) for judge in judges_of(self.evaluator)]
        by_judge = [each for each in told if each is not None]
        if not by_judge or len(by_judge) < len(told):
            return await asyncio.gather(*(self.score_text(row, answer) for answer in answers))
        if isinstance(self.evaluator, Jury):
            return [self.evaluator.verdict(scores) for scores in zip(*by_judge, strict=True)]
        return list(by_judge[0])

    async def _judged(self, judge: Judge, row: Row, answer: str) -> float:
        key, asked = score_key(judge.digest, row, answer), False

        async def ask() -> float | None:
            nonlocal asked
            asked = True
            verdicts = await judge.verdicts(row, answer)
            score = score_of(verdicts)
            if score is not None and len(set(verdicts)) > 1:
                await self.calls.remember_score(doubt_key(key), _yes)
            return score

        score = await self.calls.remember_score(key, ask)
        if score is None:  # not kept: a rerun sees again how often the judge decides, and asks one that was mended
            return TIE
        if not asked:
            judge.remember()
        return score

    def doubt(self, row: Row, answer: str) -> str:
        """Why what a judge said of an answer is worth a person's look; "" where it is not, or where nobody judged."""
        keys = [score_key(judge.digest, row, answer) for judge in judges_of(self.evaluator)]
        if len({self.calls.known_score(key) for key in keys} - {None}) > 1:
            return JURORS_SPLIT
        return ORDERS_DIFFER if any(self.calls.known_score(doubt_key(key)) for key in keys) else ""

    def refuse_nothing_but_errors(self, errors: int, asked: int, refused: Mapping[str, str] | None = None) -> None:
        """Models that find every query wrong are set up wrongly; that is no measurement.

        `refused`: why the weak model could not be asked, by query id.
        """
        if asked and errors == asked:
            why = f"the strong model refused them. It said first: {self._first_error}"
            first = next(iter((refused or {}).values()), "they do not fit into its context")
            undrafted = (
                f"the weak model cannot be asked: {first}. Change prompts or data, or choose another weak model."
            )
            raise StepError(f"None of the {asked} queries could be answered: {why if self._first_error else undrafted}")

    async def _ask(self, messages: Messages, pair: Pair, purpose: str, redacted: Redacted) -> Reply:
        """The answer as a user gets it: with the values again that the strong model does not see."""
        purpose = f"{self.purpose}:{purpose}"
        try:
            result, key, is_free = await self.calls.ask(
                self._model(pair, purpose),
                messages,
                endpoint=pair.strong_endpoint,
                name=pair.strong_model,
                purpose=purpose,
                params={"max_tokens": self._strong.max_tokens, "temperature": 0.0},
                sample=self.generation,
            )
        except BadRequest as error:
            if said := body_of(error):
                _refuse_for_proxy(said)
            if not is_clients_fault(error):
                raise StepError(str(error), EXIT_BUDGET if error.status == 402 else EXIT_BAD_INPUT) from None
            self._first_error = self._first_error or str(error)
            return Reply("", "", "", error=str(error))
        self.replies += 1
        if not is_free:
            self.named.setdefault(pair.strong_model, []).append(Named(result.model, result.version))
        if kind := unusual_kind(result.text, result.finish_reason):
            self._unusual[kind] += 1
        return Reply(redacted.restored(result.text), key, result.version, result.model, paid=self._paid(result))

    def _paid(self, result: ChatResult) -> Paid:
        taken, given, prices = result.input_tokens, result.output_tokens, self._strong.prices
        return Paid(taken, given, prices.of(taken, given) if prices else 0.0)

    def _model(self, pair: Pair, purpose: str) -> HttpChatModel:
        is_proxied = bool(self._proxy_url) and pair.strong_endpoint.rstrip("/") == self._strong.endpoint.rstrip("/")
        where = (pair.strong_endpoint, pair.strong_model, purpose if is_proxied else "")
        if where not in self._models:
            self._models[where] = self._proxied(pair, purpose) if is_proxied else self._direct(pair)
            self._stack.push_async_callback(self._models[where].aclose)
        return self._models[where]

    def _direct(self, pair: Pair) -> HttpChatModel:
        # Keys go to the endpoint that they were given for, not to one that a pair of older days names.
        ours = is_same_origin(pair.strong_endpoint, self._strong.endpoint)
        return HttpChatModel(
            pair.strong_endpoint,
            pair.strong_model,
            api_keys=os.environ.get("COWEST_STRONG_API_KEYS", "").split() if ours else (),
            timeout_seconds=self._strong.timeout_seconds,
            deadline_seconds=DEADLINE_OVER_TIMEOUT * self._strong.timeout_seconds,
            max_concurrency=self._strong.max_concurrency,
            max_retries=self._strong.max_retries,
        )

    def _proxied(self, pair: Pair, purpose: str) -> HttpChatModel:
        """One a purpose, since its headers say who pays. The proxy retries on its own, within the deadline above."""
        proxy = _Proxy(self._proxy_url, self._strong, self._round)
        return proxy.model(self._proxy_url, pair.strong_model, purpose, self._strong.timeout_seconds)


@dataclass(frozen=True)
class _Proxy:
    """The job's proxy as a step sees it."""

    url: str  # of the strong model behind it; "" on one machine
    strong: Strong
    round: int | None

    def judge(self, name: str, purpose: str, seconds: float) -> OutspokenModel:
        return self.model(self.url.rstrip("/").removesuffix("/v1") + JUDGE_PATH, name, purpose, seconds)

    def model(self, url: str, name: str, purpose: str, seconds: float) -> OutspokenModel:
        number = {} if self.round is None else {HEADER_ROUND: str(self.round)}
        longest = DEADLINE_OVER_TIMEOUT * seconds
        return OutspokenModel(
            url,
            name,
            headers={HEADER_PURPOSE: purpose, **number},
            read_keys=keys_of(os.environ, PROXY_KEYS).read,
            timeout_seconds=longest,
            deadline_seconds=DEADLINE_OVER_TIMEOUT * longest,
            max_concurrency=self.strong.max_concurrency,
            max_retries=self.strong.max_retries,
        )


UNUSUAL = {
    "cut_answers": "were cut off at their limit (finish_reason length): raise spec.strong.maxTokens",
    "filtered_answers": "were withheld by its content filter: look at the queries, or choose another model",
    "empty_answers": "have no text: try the endpoint by hand, and look at spec.strong.model and the prompts",
}


ALL_ZERO = (
    "Note: every answer scored 0, those of the strong model alone too. Compare a few answers with their references: "
    "where an answer holds more than the reference, spec.feedback.evaluator.extract says which part of it counts."
)


def unusual_kind(text: str, finish_reason: str) -> str:
    """Which of `UNUSUAL` an answer is, "" for a usual one."""
    kinds = {"length": "cut_answers", "content_filter": "filtered_answers"}
    return kinds.get(finish_reason, "" if text.strip() else "empty_answers")


def unusual_words(unusual: Mapping[str, int]) -> list[str]:
    """A sentence for each kind that was seen: they score low, and nobody would know why."""
    return [
        f"Note: {unusual[name]} answers of the strong model {words}."
        for name, words in UNUSUAL.items()
        if unusual.get(name)
    ]


def _refuse_for_proxy(said: ErrorBody) -> None:
    """What ends a step rather than counting as an answer that is worth nothing. Raises `StepError`."""
    if said.code == CODE_BUDGET_SPENT:
        raise StepError(said.message, EXIT_BUDGET)
    if said.code == "model_not_found":
        raise StepError(f"The strong model's proxy refused: {said.message}")


@asynccontextmanager
async def open_asking(
    strong: Strong,
    evaluator: Evaluator,
    calls: str,
    *,
    purpose: str,
    round_number: int | None = None,
    redaction: Redaction | None = None,
    generation: int = 0,
) -> AsyncIterator[Asking]:
    """`purpose` marks in the book what this step pays for. `generation`: how often the strong model became another one;
    what an earlier one answered is not taken for its answer. Keys and the proxy's address come by environment only."""
    redactor = Redactor(redaction) if redaction else None
    proxy_url = os.environ.get("COWEST_STRONG_URL", "").strip()
    async with AsyncExitStack() as stack:
        models = await stack.enter_async_context(AsyncExitStack())  # closed after the book has let calls come home
        book = await stack.enter_async_context(
            PaidCalls.for_strong(calls, strong, round_number, behind_proxy=bool(proxy_url))
        )
        scorer = _scorer(evaluator, book, models, purpose, _Proxy(proxy_url, strong, round_number), redactor)
        asking = Asking(
            strong, book, scorer, purpose, models, proxy_url=proxy_url, round_number=round_number, redactor=redactor
        )
        asking.generation = generation
        yield asking


def _scorer(
    settings: Evaluator,
    calls: PaidCalls,
    models: AsyncExitStack,
    purpose: str,
    proxy: _Proxy,
    redactor: Redactor | None,
) -> Score:
    check_settings(settings)
    judges: list[ChatModel] = []
    for number, each in enumerate(settings.judges):
        model = judge_model(each, os.environ.get(evaluator_key(number)) or None)
        models.push_async_callback(model.aclose)
        by_proxy = None
        if proxy.url:
            seconds = each.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
            by_proxy = proxy.judge(model.model, f"{purpose}:{JUDGE}", seconds)
            models.push_async_callback(by_proxy.aclose)
        judges.append(PaidJudge(model, calls, f"{purpose}:{JUDGE}", by_proxy, redactor))
    scorer = build_evaluator(settings, api_key=os.environ.get(evaluator_key()) or None, judges=judges or None)
    models.push_async_callback(scorer.aclose)
    return scorer


class PaidJudge:
    """The judge's model behind the book: its calls count in budget and bill too, at the strong model's prices.

    In a cluster book and budget are the proxy's, so the proxy asks. Only a judge that it does not serve, since the
    manifest names another one by now than the trial began with, is asked from here. What the strong model may not see
    no judge sees.
    """

    def __init__(
        self,
        model: HttpChatModel,
        calls: PaidCalls,
        purpose: str,
        by_proxy: HttpChatModel | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self._model, self._calls, self._purpose, self._by_proxy = model, calls, purpose, by_proxy
        self._redactor = redactor

    async def __call__(self, messages: Messages, *, idempotency_key: str | None = None, **params: Any) -> ChatResult:
        if self._redactor:
            messages = self._redactor.begin().messages(messages)
        if self._by_proxy is not None:
            try:
                return await self._ask(self._by_proxy, messages, params)
            except BadRequest as error:
                said = body_of(error)
                if said is None:
                    raise
                if said.code not in NO_SUCH_JUDGE:
                    _refuse_for_proxy(said)
                    raise
                self._by_proxy = None
        return await self._ask(self._model, messages, params)

    async def _ask(self, model: HttpChatModel, messages: Messages, params: Mapping[str, Any]) -> ChatResult:
        result, _, _ = await self._calls.ask(
            model,
            messages,
            endpoint=self._model.endpoint,
            name=self._model.model,
            purpose=self._purpose,
            params=params,
        )
        return result


# ---------------------------------------------------------------- drafting and asking at once
async def each_batch(drafts: Drafts, then: Callable[[Row, list[Draft]], None]) -> None:
    """Draw batch by batch in a thread and hand over each row with its drafts, while answers to earlier ones come in."""
    for number, rows in enumerate(drafts.batches):
        found = await asyncio.to_thread(drafts.draw, number)
        for row in rows:
            then(row, found[row.id])


def change_note(strong: Mapping[str, Any]) -> list[str]:
    """Said where `strong_seen` tells of a change."""
    changed = strong.get("change")
    return [f"Note: the strong model became another one while it was asked ({changed})."] if changed else []


def version_counts(replies: Sequence[Reply]) -> Counter[str]:
    """Answers by version of the strong model; "" where it named none."""
    return Counter(reply.version for reply in replies if not reply.error)


def versions(replies: Sequence[Reply]) -> str:
    """The strong model's version, or "mixed: a, b" where it changed in between."""
    seen = sorted(version_counts(replies))
    return f"mixed: {', '.join(version or 'unnamed' for version in seen)}" if len(seen) > 1 else "".join(seen)
