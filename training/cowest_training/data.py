"""The rows that everything starts from: a strict reader, and the checks between train and held-out.

One row is {"id", "query" or "messages", "reference", "explanation"?, "group"?} in JSONL or Parquet. Whatever is
wrong is refused before anything is spent, with file, line, reason and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from io import BytesIO
from itertools import groupby, pairwise
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from cowest_serving import store
from cowest_serving.contract import Messages, digest_of, query_text, reference_text
from cowest_serving.redaction import Redactor
from cowest_training.contract import ProblemsError, Row, StepError

_BOM = b"\xef\xbb\xbf"
MIN_ROWS = 2
SHOWN_KEYS = 6  # of those that nothing reads
MEANT = 0.8  # how alike a key and a column are where the one is taken for the other
ROLES = ("system", "developer", "user", "assistant")
TRACE_ID = "trace-"  # before the request's id in the id of a row that was a trace
COLUMNS = ("id", "query", "messages", "reference", "explanation", "group", "source")

SHINGLE = 3  # words
MIN_OWN_SHINGLES = 20  # a text with fewer has too little of its own to be called nearly equal to another
MIN_SHARED = 0.9
MIN_MOVED_WORDS = 6  # "7 - 4" and "4 - 7" are different queries
MAX_BROKEN_NEIGHBOURS = 2  # one phrase moved to the front or the end breaks at most two


# ---------------------------------------------------------------- reading
def read_rows(uri: str, unread: Counter[str] | None = None) -> list[Row]:
    """All rows of a JSONL or Parquet file. Raises one `StepError` that lists what is wrong, by line.

    `unread` is filled with the keys that are no part of a row, and in how many rows each stands.
    """
    data = _fetch(uri)
    if uri.casefold().endswith((".csv", ".tsv")) and data[:4] != b"PAR1" and data.lstrip()[:1] != b"{":
        raise StepError(
            f"{uri}: wanted rows, saw a CSV file. Write one JSON object a line (JSONL), or a Parquet table."
        )
    if kind := _other_kind(data):
        raise StepError(
            f"{uri}: wanted rows, saw {kind}. Write one JSON object a line (JSONL, in UTF-8), or a Parquet table."
        )
    records = _parquet(uri, data, unread) if data[:4] == b"PAR1" else _lines(uri, data)
    rows, problems = [], []
    for where, record in records:
        try:
            rows.append(parse_row(record, where))
            if unread is not None:
                unread.update(record.keys() - COLUMNS)
        except ValueError as problem:
            problems.append(f"{where}: {problem}")
    problems += repeated_ids(rows)
    refuse(f"rows of {uri}", problems, "Correct the file and run again.")
    if len(rows) < MIN_ROWS:
        raise StepError(f"{uri}: wanted at least {MIN_ROWS} rows, saw {len(rows)}. Add rows to the file.")
    return rows


_MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def _other_kind(data: bytes) -> str:
    """What the whole file is instead of lines of JSON, so that it is said once and not of each line; else ""."""
    if found := next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), ""):
        return found
    if data[:1] == b"\0" or data[1:2] == b"\0":
        return "text in UTF-16"
    return "a JSON array" if data.removeprefix(_BOM).lstrip()[:1] == b"[" else ""


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


def read_records(uri: str, field: str) -> Iterator[tuple[str, Any]]:
    """(file:line, object or what is wrong with the line) of a JSONL file that `field` of the manifest names."""
    data = _fetch(uri, field)
    if kind := _other_kind(data):
        raise StepError(f"{uri}: wanted one JSON object a line (JSONL, in UTF-8), saw {kind}. Write it so.")
    yield from _lines(uri, data)


def _fetch(uri: str, field: str = "spec.data") -> bytes:
    try:
        data = store.get(uri)
    except (FileNotFoundError, IsADirectoryError):
        _no_file(uri, field)
    except store.StoreError as error:
        if error.retryable or store.exists(uri):
            raise
        _no_file(uri, field)
    if not data.strip():
        raise StepError(f"{uri}: wanted rows, saw an empty file. Write one JSON object a line, or a Parquet table.")
    return data


class NoFileError(StepError):
    """There is no such file, or not yet."""


def _no_file(uri: str, field: str = "spec.data") -> NoReturn:
    raise NoFileError(f"{uri}: wanted a JSONL or Parquet file, saw none. Check the path in {field}.") from None


def _lines(uri: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """(file:line, object or what is wrong with the line)."""
    name = _short(uri)
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_no_constant, object_pairs_hook=_each_key_once)
    except _Twice as twice:
        return twice
    except UnicodeDecodeError as error:
        return ValueError(f"wanted UTF-8 text, saw byte {line[error.start]:#04x} at column {error.start + 1}")
    except RecursionError:
        return ValueError("wanted a JSON object on one line, saw one that is nested too deep")
    except ValueError as error:
        return ValueError(f"wanted a JSON object on one line, saw {line[:60].decode(errors='replace')!r} ({error})")


class _Twice(ValueError):
    """A key that an object has twice: JSON would take the last one, whoever meant the first."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _Twice(f"wanted each key once, saw {twice!r} more than once: leave one")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parquet(uri: str, data: bytes, unread: Counter[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.ParquetFile(BytesIO(data)).read()  # read_table would load the machinery for data sets first
    except (pa.ArrowException, OSError) as error:
        raise StepError(
            f"{uri}: wanted a Parquet table, saw: {str(error).rstrip('. ')}. Write the file again."
        ) from None
    _check_columns(uri, table.column_names)
    wanted = [name for name in table.column_names if name in COLUMNS]
    if unread is not None:
        unread.update({name: len(table) for name in table.column_names if name not in COLUMNS})
    for number, record in enumerate(_records(table.select(wanted)), start=1):
        yield f"{_short(uri)}:row {number}", record


def _records(table: pa.Table) -> Iterator[Any]:
    """Row by row, or what is wrong with the row. Nulls are how a table says "absent", also inside of `messages`."""
    table = _as_written(table)
    try:
        yield from map(_without_nulls, table.to_pylist())
    except UnicodeDecodeError:  # before the first row is given
        yield from (_record(table.slice(number, 1)) for number in range(len(table)))


def _as_written(table: pa.Table) -> pa.Table:
    """Floats of 16 and 32 bits by their shortest decimal: 0.1 as 64 bits would be 0.10000000149011612."""
    for number, column in enumerate(table.schema):
        if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
            narrow = column.type.to_pandas_dtype()
            values = [None if value is None else float(str(narrow(value))) for value in table[number].to_pylist()]
            table = table.set_column(number, column.name, pa.array(values, pa.float64()))
    return table


def _record(row: pa.Table) -> Any:
    try:
        return _without_nulls(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return ValueError(f"wanted UTF-8 text, saw byte {error.object[error.start]:#04x}")


def _check_columns(uri: str, seen: Sequence[str]) -> None:
    """Once for the table, not once a row."""
    if twice := [name for name, count in Counter(seen).items() if count > 1 and name in COLUMNS]:
        raise StepError(f"{uri}: wanted each column once, saw {', '.join(twice)} more than once. Leave one.")
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
    try:
        for name in COLUMNS:
            _check_unicode(record.get(name), name)
    except RecursionError:
        raise ValueError(f"{name}: wanted text or messages, saw what is nested too deep") from None
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


def _check_unicode(value: Any, path: str) -> None:
    """JSON can write half of a pair (`"\\ud83d"`), which no file, digest or request can hold."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}: wanted Unicode text, saw half of a surrogate pair") from None
        case list():
            for number, item in enumerate(value):
                _check_unicode(item, f"{path}[{number}]")
        case dict():
            for name, item in value.items():
                _check_unicode(name, path)
                _check_unicode(item, f"{path}.{name}")


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
    in_train, in_held_out, leaks = repeated_queries(train), repeated_queries(held_out), _leaks(train, held_out)
    seen = {"train": in_train or leaks, "held-out": in_held_out or leaks}
    remedies = (
        "Leave one row of each question. " if in_train or in_held_out else "",
        "Remove what is in both from the training data (or from the held-out data). " if leaks else "",
    )
    what = f"{' and '.join(name for name, has_some in seen.items() if has_some)} data"
    refuse(what, [*in_train, *in_held_out, *leaks], f"{''.join(remedies)}Then run again.")


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


def case_note(rows: Sequence[Row]) -> str:
    """Said of queries that differ from another in the case of their codes alone; "" where none does."""
    near = _repeats((folded_key(row.messages), row) for row in rows)
    if not near:
        return ""
    row, first = near[0]
    return (
        f"queries that differ from another in case alone count as queries of their own: {len(near)}, the first"
        f" {_place(row)} (from {_place(first)})."
    )


def unread_note(uri: str, unread: Mapping[str, int]) -> str:
    """Said of keys that stand in the rows and that nothing reads, so that a slip of the pen is seen; "" for none."""
    if not unread:
        return ""
    shown = [
        f"`{name}` ({count} rows{f'; is `{meant[0]}` meant?' if meant else ''})"
        for name, count in sorted(unread.items(), key=lambda each: -each[1])[:SHOWN_KEYS]
        for meant in [difflib.get_close_matches(name.casefold(), COLUMNS, n=1, cutoff=MEANT)]
    ]
    more = f" and {len(unread) - SHOWN_KEYS} more" if len(unread) > SHOWN_KEYS else ""
    return f"{_short(uri)}: nothing reads the keys {', '.join(shown)}{more}."


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
# Apostrophes, primes and minus signs that are one sign in other shapes.
_SHAPES = str.maketrans({**dict.fromkeys("\u2019\u2018\u02bc\u2032`\u00b4", "'"), "\u2212": "-"})
_QUOTED = re.compile(r"(?<!\w)'([^'\n]*)'(?!\w)")
_HYPHEN = re.compile(r"(?<=[^\W\d])-(?=[^\W\d])")
_BRACKETS = "()[]{}⟨⟩⟦⟧⌈⌉⌊⌋"
_OTHERS = re.escape(f"-*/%#&@\\‰‱″‴{_BRACKETS}")


@cache
def _token() -> re.Pattern[str]:
    """A word with its decimals ("3.5", "1,000"), or a sign that changes the meaning ("C++", "-", "≤", "f'(x)", "5!?").

    `\\w` alone lacks the vowels that many scripts write as marks: the day would be the gift in Hindi.
    """
    marks, signs = _characters("M"), _characters("S")
    return re.compile(
        rf"[\w{marks}]+(?:[.,]\d+)*|[{signs}{_OTHERS}]|(?<=[\w)'])'(?!\w)|!(?=[\w(=])|(?<=[\d)])!(?=\s*[^\sA-Z])"
    )


def _characters(kind: str) -> str:
    """All of one kind of Unicode, as a character class's ranges. Selectors of a variant change the looks alone."""
    codes = [
        code
        for code in range(0x20000)
        if unicodedata.category(chr(code)).startswith(kind)
        and not 0xFE00 <= code <= 0xFE0F
        and code not in (0x60, 0xB4)
    ]
    runs = [list(run) for _, run in groupby(enumerate(codes), key=lambda each: each[1] - each[0])]
    return "".join(f"\\U{run[0][1]:08x}-\\U{run[-1][1]:08x}" for run in runs)


def tokens(text: str) -> tuple[str, ...]:
    """Words, numbers and signs of a text. White space, quotes and sentence punctuation do not count; case does."""
    bare = _QUOTED.sub(r" \1 ", unicodedata.normalize("NFC", text).translate(_SHAPES))
    return tuple(_token().findall(_HYPHEN.sub(" ", bare)))


def folded(text: str) -> str:
    """For comparing texts without their case: `casefold` of composed and decomposed letters alike.

    The Turkish i's are one letter here, for what is İstanbul to the one is istanbul to the other.
    """
    bare = unicodedata.normalize("NFD", text).casefold().replace("i\u0307", "i").replace("\u0131", "i")
    return unicodedata.normalize("NFC", bare)


def conversation_key(messages: Messages) -> tuple[str, ...]:
    """What makes two conversations the same: the words of all turns. A system message is no turn.

    Case counts in codes, for `c1ccccc1` is another substance than `C1CCCCC1`; for `Known` not even there.
    """
    return tuple(token if any(c.isdigit() for c in token) else token.casefold() for token in _said(messages))


def folded_key(messages: Messages) -> tuple[str, ...]:
    """`conversation_key` without any case."""
    return tuple(map(folded, _said(messages)))


def _said(messages: Messages) -> Iterator[str]:
    for message in messages:
        if message.get("role") in ("user", "assistant"):
            yield from tokens(query_text([{**message, "role": "user"}]))
            yield "\n"


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

        Nearly equal: the same but for case; the same words with one phrase moved; or, for long texts, nine tenths of
        the phrases that are the text's own (a template's are not) and the same numbers and codes.
        """
        messages = self._compared(messages)
        if (row := self._equal.get(folded_key(messages))) is not None:
            return Hit(row, equal=conversation_key(row.messages) == conversation_key(messages))
        words = folded_words(query_text(messages))
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
        return {folded_key(row.messages): row for row in self._rows}

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], list[Row]]:
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self._rows:
            if _turns(row.messages) == 1:
                found.setdefault(tuple(sorted(folded_words(row.query))), []).append(row)
        return found

    def _moved_phrase(self, words: tuple[str, ...]) -> Row | None:
        if sum(not _is_sign(word) for word in words) < MIN_MOVED_WORDS:
            return None
        candidates = self._by_words.get(tuple(sorted(words)), [])
        return next((row for row in candidates if _is_one_phrase_moved(words, folded_words(row.query))), None)

    @cached_property
    def _own(self) -> list[frozenset[tuple[str, ...]]]:
        """Per row the shingles that at most one other row has: the query without its template."""
        of_rows = [shingles(folded_words(row.query)) for row in self._rows]
        counts = Counter(shingle for of_row in of_rows for shingle in of_row)
        return [frozenset(s for s in of_row if counts[s] <= 2) for of_row in of_rows]

    @cached_property
    def _rows_of_shingle(self) -> dict[tuple[str, ...], list[int]]:
        found: dict[tuple[str, ...], list[int]] = {}
        for number, own in enumerate(self._own):
            if len(own) >= MIN_OWN_SHINGLES:
                for shingle in own:
                    found.setdefault(shingle, []).append(number)
        return found

    def _long_overlap(self, words: tuple[str, ...]) -> Row | None:
        shared = Counter(number for shingle in shingles(words) for number in self._rows_of_shingle.get(shingle, ()))
        for number, count in shared.most_common(3):
            row = self._rows[number]
            if count >= MIN_SHARED * len(self._own[number]) and codes_of(words) == codes_of(folded_words(row.query)):
                return row
        return None


def _turns(messages: Messages) -> int:
    return sum(message.get("role") in ("user", "assistant") for message in messages)


def shingles(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    return phrases_of(words, SHINGLE)


def phrases_of(words: Sequence[str], length: int) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def folded_words(text: str) -> tuple[str, ...]:
    """The tokens without their case."""
    return tuple(map(folded, tokens(text)))


def _is_sign(token: str) -> bool:
    return not any(character.isalnum() for character in token)


def _is_one_phrase_moved(one: Sequence[str], other: Sequence[str]) -> bool:
    """Of two texts of the same words. What a sign joins stays joined: 2 * (3 + 4) is not (2 * 3) + 4."""
    here, there = Counter(pairwise(one)), Counter(pairwise(other))
    if (here - there).total() > MAX_BROKEN_NEIGHBOURS:
        return False
    return not any(_is_sign(word) for pair in (here - there) + (there - here) for word in pair)


def codes_of(words: Sequence[str]) -> Counter[str]:
    """The words with a digit: numbers, codes, names of substances."""
    return Counter(word for word in words if any(c.isdigit() for c in word))
