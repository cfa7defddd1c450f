"""The rows that everything starts from: a strict reader, and the checks between train and held-out.

One row is {"id", "query" or "messages", "reference", "explanation"?, "group"?} in JSONL or Parquet. Whatever is
wrong is refused before anything is spent, with file, line, reason and remedy.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from itertools import pairwise
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.contract import Messages, digest_of, query_text, reference_text
from cowest_serving.redaction import Redactor
from cowest_training.contract import ProblemsError, Row, StepError

MIN_ROWS = 2
ROLES = ("system", "developer", "user", "assistant")
COLUMNS = ("id", "query", "messages", "reference", "explanation", "group", "source")

SHINGLE = 3  # words
MIN_OWN_SHINGLES = 20  # a text with fewer has too little of its own to be called nearly equal to another
MIN_SHARED = 0.9
MIN_MOVED_WORDS = 6  # "7 - 4" and "4 - 7" are different queries
MAX_BROKEN_NEIGHBOURS = 2  # one phrase moved to the front or the end breaks at most two


# ---------------------------------------------------------------- reading
def read_rows(uri: str) -> list[Row]:
    """All rows of a JSONL or Parquet file. Raises one `StepError` that lists what is wrong, by line."""
    data = _fetch(uri)
    if uri.casefold().endswith((".csv", ".tsv")) and data[:4] != b"PAR1" and data.lstrip()[:1] != b"{":
        raise StepError(
            f"{uri}: wanted rows, saw a CSV file. Write one JSON object a line (JSONL), or a Parquet table."
        )
    records = _parquet(uri, data) if data[:4] == b"PAR1" else _lines(uri, data)
    rows, problems = [], []
    for where, record in records:
        try:
            rows.append(parse_row(record, where))
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
    problems += repeated_ids(rows)
    refuse(f"rows of {uri}", problems, "Correct the file and run again.")
    if len(rows) < MIN_ROWS:
        raise StepError(f"{uri}: wanted at least {MIN_ROWS} rows, saw {len(rows)}. Add rows to the file.")
    return rows


def rows_digest(rows: Sequence[Row]) -> str:
    """Of the content, not of the file: format, place and line numbers do not count."""
    return digest_of([row_record(row) for row in rows])


def row_record(row: Row) -> dict[str, Any]:
    """The row as one JSONL object, which `read_rows` reads back as the same row."""
    bare = row.messages == ({"role": "user", "content": row.query},)
    content = {"query": row.query} if bare else {"messages": [dict(message) for message in row.messages]}
    optional = {"explanation": row.explanation, "group": row.group}
    return {
        "id": row.id,
        **content,
        "reference": row.reference,
        **{name: value for name, value in optional.items() if value is not None},
        **({"source": row.source} if row.source != "train" else {}),
    }


def write_jsonl(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row_record(row), ensure_ascii=False).encode() + b"\n" for row in rows)


def _fetch(uri: str) -> bytes:
    try:
        data = store.get(uri)
    except (FileNotFoundError, IsADirectoryError):
        _no_file(uri)
    except store.StoreError as error:
        if error.retryable or store.exists(uri):
            raise
        _no_file(uri)
    if not data.strip():
        raise StepError(f"{uri}: wanted rows, saw an empty file. Write one JSON object a line, or a Parquet table.")
    return data


def _no_file(uri: str) -> NoReturn:
    raise StepError(f"{uri}: wanted a JSONL or Parquet file, saw none. Check the path in spec.data.") from None


def _lines(uri: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """(file:line, object or what is wrong with the line)."""
    name = _short(uri)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return ValueError(f"wanted UTF-8 text, saw byte {line[error.start]:#04x} at column {error.start + 1}")
    except ValueError as error:
        return ValueError(f"wanted a JSON object on one line, saw {line[:60].decode(errors='replace')!r} ({error})")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parquet(uri: str, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.ParquetFile(BytesIO(data)).read()  # read_table would load the machinery for data sets first
    except (pa.ArrowException, OSError) as error:
        raise StepError(
            f"{uri}: wanted a Parquet table, saw: {str(error).rstrip('. ')}. Write the file again."
        ) from None
    _check_columns(uri, table.column_names)
    wanted = [name for name in table.column_names if name in COLUMNS]
    for number, record in enumerate(table.select(wanted).to_pylist(), start=1):
        # Nulls are how a table says "absent", also inside the structs of `messages`.
        yield f"{_short(uri)}:row {number}", _without_nulls(record)


def _check_columns(uri: str, seen: Sequence[str]) -> None:
    """Once for the table, not once a row."""
    if "id" not in seen or not {"query", "messages"} & set(seen):
        columns = ", ".join(seen) or "none"
        raise StepError(f"{uri}: wanted columns id, query (or messages) and reference, saw {columns}. Rename them.")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _short(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


# ---------------------------------------------------------------- one row
def parse_row(record: Any, where: str) -> Row:
    """One row from its JSON object. Raises `ValueError` that says what was wanted and seen."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"wanted a JSON object, saw {type(record).__name__}")
    messages = _messages(record)
    return Row(
        id=_id(record.get("id")),
        query=query_text(messages),
        messages=messages,
        reference=_reference(record.get("reference")),
        explanation=_text(record, "explanation"),
        group=_text(record, "group"),
        source=_source(record.get("source", "train")),
        where=where,
    )


def _id(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"id: wanted text, saw {_seen(value)}")
    return value


def _reference(value: Any) -> str:
    text = reference_text(value)
    if text is None:
        raise ValueError(f"reference: wanted text, a number or a list of texts, saw {_seen(value)}")
    return text


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: wanted text or nothing, saw {_seen(value)}")
    return value if value and value.strip() else None


def _source(value: Any) -> str:
    if value not in ("train", "trace"):
        raise ValueError(f'source: wanted "train" or "trace", saw {_seen(value)}')
    return str(value)


def _messages(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    query, messages = record.get("query"), record.get("messages")
    if messages is None:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"query: wanted text (or `messages` in its place), saw {_seen(query)}")
        return ({"role": "user", "content": query},)
    if query is not None:
        raise ValueError("wanted `query` or `messages`, saw both: leave one")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: wanted a list of messages, saw {_seen(messages)}")
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    if messages[-1]["role"] != "user":
        raise ValueError(f"messages: wanted the last one from the user, saw role {messages[-1]['role']!r}")
    if not query_text(messages).strip():
        raise ValueError("messages: wanted text in the last one, saw none")
    return tuple(messages)


def _check_message(message: Any, path: str) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{path}: wanted {{role, content}}, saw {_seen(message)}")
    if message.get("role") not in ROLES:
        raise ValueError(f"{path}.role: wanted one of {', '.join(ROLES)}, saw {_seen(message.get('role'))}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not (parts and all(_is_text_part(part) for part in parts)):
        raise ValueError(f"{path}.content: wanted text or a list of text parts, saw {_seen(content)}")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _seen(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


# ---------------------------------------------------------------- checks
def check_split(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Refuse duplicates, and held-out queries that train gives away.

    Raises one `StepError` that lists the first few problems.
    """
    problems = [
        *repeated_queries(train),
        *repeated_queries(held_out),
        *_leaks(train, held_out),
    ]
    remedy = "Remove them from the training data (or from the held-out data) and run again."
    refuse("train and held-out data", problems, remedy)


def refuse(what: str, problems: Sequence[str], remedy: str) -> None:
    """Raise one `ProblemsError`; nothing happens when there are no problems."""
    if problems:
        raise ProblemsError(what, problems, remedy)


def repeated_ids(rows: Sequence[Row]) -> list[str]:
    return [
        f"{_place(row)}: id {row.id!r} is that of {_place(first)} too: give each row its own"
        for row, first in _repeats((row.id, row) for row in rows)
    ]


def repeated_queries(rows: Sequence[Row]) -> list[str]:
    return [
        f"{_place(row)}: the query is that of {_place(first)} too: {_quoted(row)}"
        for row, first in _repeats((conversation_key(row.messages), row) for row in rows)
    ]


def _repeats(keyed: Iterable[tuple[Any, Row]]) -> list[tuple[Row, Row]]:
    """(row, the first row with its key) for each row whose key came before."""
    first: dict[Any, Row] = {}
    return [(row, first[key]) for key, row in keyed if first.setdefault(key, row) is not row]


def _leaks(train: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    known = Known(tuple(held_out))
    hits = [(row, hit) for row in train if (hit := known.find(row.messages))]
    if hits and len(hits) == len(train):
        return ["train and held-out data are the same: wanted different queries in the two files"]
    return [
        f"{_place(row)}: the query is {'' if hit.equal else 'nearly '}that of held-out row {_place(hit.row)}"
        f": {_quoted(row)}{'' if hit.equal else f' and there {_quoted(hit.row)}'}"
        for row, hit in hits
    ]


def _place(row: Row) -> str:
    return row.where or f"row {row.id}"


def _quoted(row: Row) -> str:
    """The query; of a chat its first turn too, since many end with the same words."""
    turns = [text for m in row.messages if m.get("role") != "system" and (text := query_text([{**m, "role": "user"}]))]
    return " ... ".join(_cut(text) for text in (turns[0], turns[-1])) if len(turns) > 1 else _cut(row.query)


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 80 else flat[:77] + "...")


# ---------------------------------------------------------------- equal and nearly equal queries
# A word with its decimals ("3.5", "1,000"), or a sign that changes the meaning ("C++", "5 - 3", "10 %").
_TOKEN = re.compile(r"\w+(?:[.,]\d+)*|[-+*/<>=^%#$€£&|~@\\]")
_HYPHEN = re.compile(r"(?<=[^\W\d])-(?=[^\W\d])")


def tokens(text: str) -> tuple[str, ...]:
    """Words, numbers and signs of a text. Case, white space and sentence punctuation do not count."""
    return tuple(_TOKEN.findall(_HYPHEN.sub(" ", text.casefold())))


def conversation_key(messages: Messages) -> tuple[str, ...]:
    """What makes two conversations the same: the words of all turns. A system message is no turn."""
    turns = [query_text([{**m, "role": "user"}]) for m in messages if m.get("role") in ("user", "assistant")]
    return tuple(token for turn in turns for token in (*tokens(turn), "\n"))


@dataclass(frozen=True)
class Hit:
    row: Row
    equal: bool  # else nearly equal


@dataclass(frozen=True, eq=False)  # by identity: hashing thousands of rows would cost more than asking them
class Known:
    """The held-out queries, to be asked whether a query is one of them. Made once, asked in constant time.

    `redactor`: of a manifest by which traces hold placeholders; rows and queries are then compared with those.
    """

    rows: tuple[Row, ...]
    redactor: Redactor | None = None

    def find(self, messages: Messages) -> Hit | None:
        """The row that these messages ask again, equally or nearly; `None`: this query may be learnt from.

        Nearly equal: the same words with one phrase moved; or, for long texts, nine tenths of the phrases that
        are the text's own (a template's are not) and the same numbers and codes.
        """
        messages = self._compared(messages)
        if (row := self._equal.get(conversation_key(messages))) is not None:
            return Hit(row, equal=True)
        words = tokens(query_text(messages))
        if _turns(messages) == 1 and (row := self._equal_query.get(words)) is not None:
            return Hit(row, equal=True)
        near = self._moved_phrase(words) or self._long_overlap(words)
        return Hit(near, equal=False) if near else None

    def _compared(self, messages: Messages) -> Messages:
        return self.redactor.comparable(messages) if self.redactor else messages

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        """As they are compared."""
        if self.redactor is None:
            return self.rows
        compared = [(row, self._compared(row.messages)) for row in self.rows]
        return tuple(replace(row, messages=tuple(said), query=query_text(said)) for row, said in compared)

    @cached_property
    def _equal(self) -> dict[tuple[str, ...], Row]:
        return {conversation_key(row.messages): row for row in self._rows}

    @cached_property
    def _equal_query(self) -> dict[tuple[str, ...], Row]:
        return {tokens(row.query): row for row in self._rows if _turns(row.messages) == 1}

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], list[Row]]:
        found: dict[tuple[str, ...], list[Row]] = {}
        for words, row in self._equal_query.items():
            found.setdefault(tuple(sorted(words)), []).append(row)
        return found

    def _moved_phrase(self, words: tuple[str, ...]) -> Row | None:
        if len(words) < MIN_MOVED_WORDS:
            return None
        candidates = self._by_words.get(tuple(sorted(words)), [])
        return next((row for row in candidates if _broken(words, tokens(row.query)) <= MAX_BROKEN_NEIGHBOURS), None)

    @cached_property
    def _own(self) -> list[frozenset[tuple[str, ...]]]:
        """Per row the shingles that at most one other row has: the query without its template."""
        shingles = [_shingles(tokens(row.query)) for row in self._rows]
        counts = Counter(shingle for of_row in shingles for shingle in of_row)
        return [frozenset(s for s in of_row if counts[s] <= 2) for of_row in shingles]

    @cached_property
    def _rows_of_shingle(self) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for number, own in enumerate(self._own):
            if len(own) >= MIN_OWN_SHINGLES:
                for shingle in own:
                    found.setdefault(shingle, []).append(number)
        return found

    def _long_overlap(self, words: tuple[str, ...]) -> Row | None:
        shared = Counter(number for shingle in _shingles(words) for number in self._rows_of_shingle.get(shingle, ()))
        for number, count in shared.most_common(3):
            row = self._rows[number]
            if count >= MIN_SHARED * len(self._own[number]) and _codes(words) == _codes(tokens(row.query)):
                return row
        return None


def _turns(messages: Messages) -> int:
    return sum(message.get("role") in ("user", "assistant") for message in messages)


def _shingles(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def _broken(one: Sequence[str], other: Sequence[str]) -> int:
    """How many neighbours of the one text are no neighbours in the other."""
    return (Counter(pairwise(one)) - Counter(pairwise(other))).total()


def _codes(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if any(c.isdigit() for c in word))
