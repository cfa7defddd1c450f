"""The strict reader and the checks between train and held-out data."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cowest_training.contract import ProblemsError, Row, StepError
from cowest_training.data import (
    Known,
    case_note,
    check_split,
    read_rows,
    rows_digest,
    tokens,
    unread_note,
    write_jsonl,
)

LONG = (
    "The tenant of the second floor writes that the lift is out of order since the storm of last week, that two "
    "engineers came and left without a word, and that an elderly neighbour cannot reach her flat. She asks whether the "
    "rent may be cut for that time and who has to be told about it before the end of the month. Her lease is of 2019."
)


def record(number: int, query: str = "", **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "query": query or f"question {number}", "reference": str(number), **more}


def row(number: int, query: str, **more: Any) -> Row:
    return Row(f"r{number}", query, ({"role": "user", "content": query},), "1", **more)


def jsonl(folder: Path, *records: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def refusal(uri: str) -> str:
    with pytest.raises(StepError) as raised:
        read_rows(uri)
    return str(raised.value)


# ---------------------------------------------------------------- reading
def test_a_bare_query_becomes_one_user_message(tmp_path: Path) -> None:
    first, second = read_rows(jsonl(tmp_path, record(1, "how much?", group="g", explanation="so"), "", record(2)))
    assert first == Row("r1", "how much?", ({"role": "user", "content": "how much?"},), "1", "so", "g")
    assert (first.where, second.where) == ("rows.jsonl:1", "rows.jsonl:3")


def test_a_conversation_keeps_its_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": [{"type": "text", "text": "how much?"}]},
    ]
    rows = read_rows(jsonl(tmp_path, {"id": 7, "messages": messages, "reference": 12}, record(2)))
    assert rows[0].messages == tuple(messages)
    assert (rows[0].id, rows[0].query, rows[0].reference) == ("7", "how much?", "12")


def test_several_right_answers_are_kept_as_a_list(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, record(1) | {"reference": ["a", "b"]}, record(2)))
    assert rows[0].reference == '["a", "b"]'


@pytest.mark.parametrize(("given", "read"), [(12.0, "12"), (-3.0, "-3"), (0.5, "0.5"), (1e300, "1e+300")])
def test_a_whole_number_that_a_table_made_a_float_is_the_whole_number(tmp_path: Path, given: float, read: str) -> None:
    rows = read_rows(jsonl(tmp_path, record(1) | {"reference": given}, record(2)))
    assert rows[0].reference == read


def test_rows_written_are_read_back_the_same(tmp_path: Path) -> None:
    chat = {
        "id": "c",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "reference": "1",
    }
    rows = read_rows(jsonl(tmp_path, record(1, "ä {b}", explanation="e"), chat, record(3, source="trace")))
    (tmp_path / "again.jsonl").write_bytes(write_jsonl(rows))
    again = read_rows(str(tmp_path / "again.jsonl"))
    assert again == rows
    assert rows_digest(again) == rows_digest(rows) != rows_digest(rows[:2])


def test_parquet_gives_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    records = [record(1, group="g"), record(2)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    rows = read_rows((tmp_path / "rows.parquet").as_uri())
    assert rows == read_rows(jsonl(tmp_path, *records))
    assert rows[1].where == "rows.parquet:row 2"
    assert rows[1].group is None


def test_a_table_of_other_columns_is_refused_once_with_the_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a", "b"], "answer": ["1", "2"]}), tmp_path / "rows.parquet")
    uri = (tmp_path / "rows.parquet").as_uri()
    assert refusal(uri) == (
        f"{uri}: wanted columns id, query (or messages) and reference, saw question, answer. Rename them."
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{oops", "wanted a JSON object on one line", id="no JSON"),
        pytest.param("[1]", "wanted a JSON object, saw list", id="a list"),
        pytest.param('{"id": "x", "query": "q", "reference": NaN}', "NaN is not JSON", id="NaN"),
        pytest.param({"query": "q", "reference": "1"}, "id: wanted text, saw nothing", id="no id"),
        pytest.param({"id": "x", "reference": "1"}, "query: wanted text", id="no query"),
        pytest.param({"id": "x", "query": " ", "reference": "1"}, "query: wanted text", id="blank query"),
        pytest.param(record(9) | {"reference": {"a": 1}}, "reference: wanted text, a number or a list", id="object"),
        pytest.param(record(9) | {"reference": True}, "saw True", id="a truth value"),
        pytest.param(record(9, group=3), "group: wanted text or nothing, saw 3", id="group of numbers"),
        pytest.param(record(9, explanation=["a"]), "explanation: wanted text", id="explanation as list"),
        pytest.param(record(9, messages=[]), "saw both", id="query and messages"),
        pytest.param(
            {"id": "x", "messages": "hi", "reference": "1"}, "wanted a list of messages", id="messages as text"
        ),
        pytest.param(
            {"id": "x", "messages": [{"role": "robot", "content": "hi"}], "reference": "1"},
            "messages[0].role: wanted one of system, developer, user, assistant, saw 'robot'",
            id="bad role",
        ),
        pytest.param(
            {"id": "x", "messages": [{"role": "assistant", "content": "hi"}], "reference": "1"},
            "wanted the last one from the user, saw role 'assistant'",
            id="the assistant has the last word",
        ),
        pytest.param(
            {"id": "x", "messages": [{"role": "user", "content": None}], "reference": "1"},
            "messages[0].content: wanted text",
            id="no content",
        ),
        pytest.param(record(1), "id 'r1' is that of rows.jsonl:1 too", id="id used twice"),
        pytest.param(
            record(9, "hello \ud83d"), "query: wanted Unicode text, saw half of a surrogate pair", id="half a pair"
        ),
        pytest.param(
            {"id": "x", "messages": [{"role": "user", "content": "\udc00"}], "reference": "1"},
            "messages[0].content: wanted Unicode text",
            id="half a pair in a message",
        ),
        pytest.param(record(9) | {"reference": ["a", "\ud83d"]}, "reference[1]: wanted Unicode", id="in a reference"),
        pytest.param(
            '{"id": "x", "query": "q", "reference": "1", "reference": "2"}',
            "wanted each key once, saw 'reference' more than once: leave one",
            id="a key twice",
        ),
        pytest.param(
            '{"id": "x", "messages": [{"role": "user", "role": "user", "content": "q"}], "reference": "1"}',
            "wanted each key once, saw 'role' more than once",
            id="a key twice in a message",
        ),
        pytest.param("[" * 100_000, "saw one that is nested too deep", id="a JSON bomb"),
        pytest.param(f'{{"group": {"[" * 990}{"]" * 990}}}', "nested too deep", id="a smaller one"),
    ],
)
def test_a_bad_row_names_file_line_and_reason(tmp_path: Path, line: Any, reason: str) -> None:
    message = refusal(jsonl(tmp_path, record(1), line))
    assert "rows.jsonl:2: " in message
    assert reason in message


def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(record(1)).encode() + b'\n{"id": "\xff"}\n')
    assert "rows.jsonl:2: wanted UTF-8 text, saw byte 0xff" in refusal(str(tmp_path / "rows.jsonl"))


def test_five_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    message = refusal(jsonl(tmp_path, *["{"] * 7))
    assert "7 problems" in message
    assert "rows.jsonl:5" in message and "rows.jsonl:6" not in message
    assert "and 2 more" in message


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "saw none"), ("", "saw an empty file"), (json.dumps(record(1)), "saw 1")]
)
def test_too_little_data_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    assert reason in refusal(str(path))


def test_a_column_that_a_table_has_twice_is_named(tmp_path: Path) -> None:
    columns = [pa.array(values) for values in (["1", "2"], ["a", "b"], ["a", "b"], ["1", "2"])]
    pq.write_table(pa.Table.from_arrays(columns, ["id", "query", "query", "reference"]), tmp_path / "rows.parquet")
    assert "wanted each column once, saw query more than once" in refusal(str(tmp_path / "rows.parquet"))


def test_bytes_in_a_table_that_are_no_text_are_named_by_row(tmp_path: Path) -> None:
    query = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"id": ["1", "2"], "query": query, "reference": ["1", "2"]}), tmp_path / "rows.parquet")
    assert "rows.parquet:row 2: wanted UTF-8 text, saw byte 0xff" in refusal(str(tmp_path / "rows.parquet"))


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    assert "wanted a Parquet table" in refusal(str(tmp_path / "rows.parquet"))


# ---------------------------------------------------------------- train against held-out
def split_refusal(train: list[Row], held_out: list[Row]) -> str:
    with pytest.raises(StepError) as raised:
        check_split(train, held_out)
    return str(raised.value)


def test_data_that_share_nothing_pass() -> None:
    check_split([row(1, "ship 3 drum"), row(2, "ship 4 drum")], [row(1, "ship 5 drum"), row(2, "ship 6 drum")])


def test_train_as_held_out_is_refused_in_one_sentence() -> None:
    rows = [row(1, "what is a?"), row(2, "what is b?")]
    assert "train and held-out data are the same" in split_refusal(rows, rows)


@pytest.mark.parametrize(
    ("train", "held_out", "nearly"),
    [
        pytest.param("Ship 3 drum of QF17 to orlo!", "ship 3  drum of QF17, to Orlo", False, id="case and punctuation"),
        pytest.param("Ship 3 drum of QF17 to orlo!", "ship 3 drum of qf17 to orlo", True, id="case of a code"),
        pytest.param("is caf\u00e9 a word?", "is cafe\u0301 a word?", False, id="composed and decomposed letters"),
        pytest.param("\u0130stanbul nerede?", "istanbul nerede?", True, id="a Turkish I"),
        pytest.param("ship drums of QF17! Now 3!", "ship drums of QF17. Now 3", False, id="shouted numbers"),
        pytest.param("I don\u2019t know 5 \u2212 3", "I don't know 5 - 3", False, id="signs in another shape"),
        pytest.param("to orlo ship 3 drum of QF17", "ship 3 drum of QF17 to orlo", True, id="a phrase moved"),
        pytest.param("ship to orlo 3 drum of QF17", "ship 3 drum of QF17 to orlo", True, id="a phrase moved inside"),
        pytest.param(LONG.replace("elderly", "old"), LONG, True, id="one word of a long text"),
        pytest.param(LONG, "Dear all. " + LONG, True, id="a greeting before a long text"),
    ],
)
def test_leaks_are_found(train: str, held_out: str, nearly: bool) -> None:
    message = split_refusal([row(1, train), row(2, "something else")], [row(3, held_out), row(4, "another one")])
    assert ("the query is nearly that of held-out row row r3" if nearly else "the query is that of") in message


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        pytest.param("ship 3 drum of QF17 to orlo", "ship 4 drum of QF17 to orlo", id="another number"),
        pytest.param("ship 3 drum of QF17 to orlo", "ship 3 drum of QF18 to orlo", id="another code"),
        pytest.param("ship 3 drum of QF17 to orlo", "ship 3 drum of QF17 to vesk", id="another place"),
        pytest.param("ship 3.5 drum of QF17", "ship 35 drum of QF17", id="a decimal point"),
        pytest.param("is it far from paris to rome ?", "is it far from rome to paris ?", id="the other way round"),
        pytest.param("what is 5 - 3", "what is 5 + 3", id="another sign"),
        pytest.param("7 - 4", "4 - 7", id="a few words in another order"),
        pytest.param("what is C", "what is C++", id="a sign in a name"),
        pytest.param("\u092f\u0939 \u0926\u093f\u0928", "\u092f\u0939 \u0926\u093e\u0928", id="Hindi day and gift"),
        pytest.param("\u0e1b\u0e35", "\u0e1b\u0e39", id="Thai year and crab"),
        pytest.param("x \u2264 3", "x \u2265 3", id="a comparison"),
        pytest.param("3 \u00d7 4", "3 \u00f7 4", id="times and divided by"),
        pytest.param("A \u222a B", "A \u2229 B", id="union and intersection"),
        pytest.param("what means \U0001f600", "what means \U0001f621", id="two emoji"),
        pytest.param("a[0]", "a(0)", id="other brackets"),
        pytest.param("2*(3+4)", "2*3+4", id="no brackets"),
        pytest.param("what is 2 * (3 + 4) in all", "what is (2 * 3) + 4 in all", id="brackets elsewhere"),
        pytest.param("what is f(g(x)) for all of them", "what is g(f(x)) for all of them", id="one in the other"),
        pytest.param("what is f'(x)", "what is f(x)", id="a prime"),
        pytest.param("if x != 3", "if x = 3", id="unequal"),
        pytest.param("what is 5!?", "what is 5?", id="a factorial"),
        pytest.param("what is (n + 1)! / 2", "what is (n + 1) / 2", id="a factorial of a sum"),
        pytest.param(LONG, LONG.replace("2019", "2020"), id="another year in a long text"),
    ],
)
def test_other_queries_are_no_leaks(train: str, held_out: str) -> None:
    check_split([row(1, train), row(2, "something else")], [row(3, held_out), row(4, "another one")])


def test_a_long_template_is_no_leak() -> None:
    texts = [f"{LONG.replace('2019', 'then')} Name: {name}." for name in ("Ada", "Ben", "Cid", "Dot", "Eva", "Fay")]
    check_split([row(i, text) for i, text in enumerate(texts[:3])], [row(i, text) for i, text in enumerate(texts[3:])])


def test_leaks_among_thousands_are_found_quickly() -> None:
    train = [row(i, f"ship {i} drum of QF{i % 97} to orlo") for i in range(5000)]
    held_out = [row(i, f"to orlo ship {i} drum of QF{i % 97}") for i in range(4990, 6000)]
    assert "10 problems" in split_refusal(train, held_out)


def test_a_query_asked_twice_is_refused_with_both_places() -> None:
    twice = [row(1, "what is a?", where="t:1"), row(2, "What is 'A'", where="t:2")]
    others = [row(3, "x"), row(4, "y")]
    for name, train, held_out in (("train", twice, others), ("held-out", others, twice)):
        said = split_refusal(train, held_out)
        assert said.startswith(f"{name} data: 1 problem:\n  t:2: the query is that of t:1 too")
        assert said.endswith("\nLeave one row of each question. Then run again.")


def test_the_remedy_of_a_leak_is_another_than_that_of_a_query_asked_twice() -> None:
    leak = split_refusal([row(1, "what is a?"), row(2, "b")], [row(3, "what is a?"), row(4, "y")])
    assert leak.startswith("train and held-out data: 1 problem:")
    assert leak.endswith("\nRemove what is in both from the training data (or from the held-out data). Then run again.")
    both = split_refusal([row(1, "what is a?"), row(2, "what is a?")], [row(3, "what is a?"), row(4, "y")])
    assert "Leave one row of each question. Remove what is in both" in both


def test_the_same_last_words_in_other_conversations_are_other_queries() -> None:
    def chat(number: int, first: str) -> Row:
        turns = (("user", first), ("assistant", "sure?"), ("user", "yes"))
        return Row(f"r{number}", "yes", tuple({"role": r, "content": c} for r, c in turns), "1")

    check_split([chat(1, "sell"), chat(2, "buy")], [chat(3, "hold"), row(4, "yes")])
    assert "the query is that of" in split_refusal([chat(1, "sell"), chat(2, "buy")], [chat(3, "sell"), row(4, "no")])


def test_an_application_s_instruction_does_not_hide_a_held_out_query() -> None:
    known = Known((row(1, "how much is it?"),))
    hit = known.find([{"role": "system", "content": "be brief"}, {"role": "user", "content": "How much is it"}])
    assert hit is not None and hit.equal


def test_explanations_may_be_on_some_rows_only() -> None:
    check_split([row(1, "a", explanation="so"), row(2, "b")], [row(3, "c"), row(4, "d")])


def test_words_numbers_and_signs_are_told_apart() -> None:
    assert tokens('An e-mail: "3,500.5 % of QF-17"?') == ("An", "e", "mail", "3,500.5", "%", "of", "QF", "-", "17")


def test_keys_that_nothing_reads_are_counted_and_a_slip_of_the_pen_is_told(tmp_path: Path) -> None:
    slips = [record(1, explantion="so", url="u"), record(2, explantion="so"), record(3)]
    for uri in (jsonl(tmp_path, *slips), str(tmp_path / "rows.parquet")):
        if uri.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([{"url": None, **slip} for slip in slips]), uri)
        unread: Counter[str] = Counter()
        read_rows(uri, unread)
        note = unread_note(uri, unread)
        assert "`explantion` (" in note and "rows; is `explanation` meant?)" in note, uri
        assert note.startswith(f"{Path(uri).name}: nothing reads the keys `") and "`url` (" in note
    assert "`explantion` (2 rows; is" in unread_note(*_read(jsonl(tmp_path, *slips)))
    assert unread_note(*_read(jsonl(tmp_path, record(1), record(2, group="g")))) == ""


def _read(uri: str) -> tuple[str, Counter[str]]:
    unread: Counter[str] = Counter()
    read_rows(uri, unread)
    return uri, unread


def test_queries_that_differ_in_a_code_s_case_are_two_of_one_file_and_noted_but_not_two_sides_of_the_split() -> None:
    benzene, hexane = row(1, "name c1ccccc1", where="t:1"), row(2, "name C1CCCCC1", where="t:2")
    check_split([benzene, hexane], [row(3, "x"), row(4, "y")])
    assert case_note([benzene, hexane]).endswith("count as queries of their own: 1, the first t:2 (from t:1).")
    assert not case_note([benzene, row(3, "x")])
    assert "is nearly that of held-out row t:2" in split_refusal([benzene, row(3, "x")], [hexane, row(4, "y")])


def test_a_chat_is_quoted_by_its_first_turn_too_and_a_nearly_equal_query_beside_the_other() -> None:
    turns = ("Which desk takes a late parcel?", "Desk 4.", "And how long?")
    chat = tuple({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns))
    first, again = (Row(f"r{number}", turns[-1], chat, "1") for number in (1, 2))
    with pytest.raises(ProblemsError) as repeated:
        check_split([first, again], [row(3, "an altogether different question here")])
    assert "'Which desk takes a late parcel?' ... 'And how long?'" in repeated.value.problems[0]
    one, other = "may a guest bring a dog on the train today", "on the train today may a guest bring a dog"
    with pytest.raises(ProblemsError) as near:
        check_split([row(1, one), row(2, "nothing like it")], [row(3, other)])
    assert f"{one!r} and there {other!r}" in near.value.problems[0]


@pytest.mark.parametrize(
    ("encode", "kind"),
    [
        pytest.param(lambda text: text.encode("utf-16"), "text in UTF-16", id="UTF-16"),
        pytest.param(lambda text: text.encode("utf-16-le"), "text in UTF-16", id="UTF-16 without a mark"),
        pytest.param(lambda text: text.encode("utf-16-be"), "text in UTF-16", id="the other UTF-16"),
        pytest.param(lambda text: gzip.compress(text.encode()), "a gzip file", id="gzip"),
        pytest.param(
            lambda text: f"[{text.strip().replace(chr(10), ',' + chr(10))}]".encode(), "a JSON array", id="array"
        ),
        pytest.param(lambda text: b"\xef\xbb\xbf [\n" + text.encode(), "a JSON array", id="an array behind a mark"),
    ],
)
def test_a_file_of_another_kind_is_told_once(tmp_path: Path, encode: Any, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode("".join(json.dumps(record(number)) + "\n" for number in range(9))))
    assert refusal(str(path)) == (
        f"{path}: wanted rows, saw {kind}. Write one JSON object a line (JSONL, in UTF-8), or a Parquet table."
    )


def test_a_mark_of_utf8_and_empty_lines_before_the_rows_are_no_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + "".join(json.dumps(record(n)) + "\n" for n in range(3)).encode())
    assert len(read_rows(str(path))) == 3


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_a_narrow_float_is_the_decimal_that_was_written(tmp_path: Path, kind: pa.DataType) -> None:
    given = [0.1, -2.5, 12.0]
    narrow = pa.array([kind.to_pandas_dtype()(value) for value in given], kind)
    pq.write_table(
        pa.table({"id": ["1", "2", "3"], "query": ["a", "b", "c"], "reference": narrow}), tmp_path / "r.parquet"
    )
    assert [row.reference for row in read_rows(str(tmp_path / "r.parquet"))] == ["0.1", "-2.5", "12"]


def test_a_csv_is_told_what_is_wanted_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,query,reference\n1,what?,yes\n2,who?,no\n")
    assert "saw a CSV file. Write one JSON object a line (JSONL), or a Parquet table" in refusal(
        str(tmp_path / "rows.csv")
    )
