"""What neither the strong model nor a trace may see, and how it comes back."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest

from cowest_operator import manifest
from cowest_operator.objects.desired import followed
from cowest_serving.contract import Redaction, RedactionPattern, SettingsError
from cowest_serving.redaction import KINDS, Redactor, RestoredStream

ALL = Redactor(Redaction(KINDS))
SOME = Redactor(Redaction(("Email", "Phone"), (RedactionPattern("Policy", r"\bPL-\d{6}\b"),)))
ANN = "ann@example.org"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("Email", "ann.smith+claims@mail.example.co.uk"),
        ("Email", "jürgen@müller.example"),
        ("CreditCard", "4111 1111 1111 1111"),
        ("CreditCard", "5500-0000-0000-0004"),
        ("CreditCard", "378282246310005"),
        ("Iban", "DE89 3704 0044 0532 0130 00"),
        ("Iban", "gb29nwbk60161331926819"),
        ("Phone", "+49 30 901820"),
        ("Phone", "0044 20 7946 0958"),
        ("Phone", "(212) 555-0123"),
        ("Phone", "030 / 90 18 20"),
        ("NationalId", "536-90-4399"),
        ("NationalId", "QQ 12 34 56 C"),
        ("NationalId", "54362315-K"),
        ("NationalId", "RCCMNL83S18D969H"),
        ("NationalId", "756.9217.0769.85"),
        ("NationalId", "390.533.447-05"),
        ("ApiKey", "sk-proj-abcdefghijklmnop0123"),
        ("ApiKey", "AKIAIOSFODNN7EXAMPLE"),
        ("ApiKey", "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "Look at {}, please.", "({})", "ü {}\nnext", "{} and so on"])
def test_an_identifier_becomes_a_placeholder_wherever_it_stands(kind: str, value: str, around: str) -> None:
    assert ALL.begin().text(around.format(value)) == around.format(f"[{kind}_1]")


@pytest.mark.parametrize(
    "text",
    [
        "Order 4711 of 2024-05-06, 06.10.2024 and 06/10/2024 at 10:30.",
        "4111 1111 1111 1112 has a wrong check digit, and 0000 0000 0000 0000 is no card.",
        "Version 1.2.3.4, 12.50 EUR, 1,000,000 rows, room 030.",
        "the @ sign, a@b, [Email_1] as the client wrote it",
        "sk-short and a hash 9f86d081884c7d659a2feaa0c55ad015",
    ],
)
def test_what_only_looks_like_an_identifier_stays(text: str) -> None:
    assert ALL.begin().text(text) == text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("order 12 4111 1111 1111 1111 123", "order 12 [CreditCard_1] 123"),
        ("BE68 5390 0754 7034 and then", "[Iban_1] and then"),
        ("DE88 3704 0044 0532 0130 00 has wrong check digits.", "DE88 3704 0044 0532 0130 00 has wrong check digits."),
        ("from BE68 5390 0754 7034 DE89 3704 0044 0532 0130 00", "from [Iban_1] [Iban_2]"),
    ],
)
def test_other_numbers_and_words_beside_one_do_not_hide_it(text: str, seen: str) -> None:
    kind = "CreditCard" if "4111" in text else "Iban"
    assert Redactor(Redaction((kind,))).begin().text(text) == seen


def test_a_value_has_one_placeholder_in_all_of_a_request_and_another_request_has_its_own() -> None:
    redacted = SOME.begin()
    messages = [
        {"role": "system", "content": f"You help {ANN}."},
        {"role": "user", "content": [{"type": "text", "text": f"PL-123456 of {ANN} or bob@example.org"}]},
    ]
    first, second = redacted.messages(messages)
    assert first == {"role": "system", "content": "You help [Email_1]."}
    assert second["content"] == [{"type": "text", "text": "[Policy_1] of [Email_1] or [Email_2]"}]
    assert messages[0]["content"] == f"You help {ANN}.", "what came in stays as it was"
    assert SOME.begin().text("bob@example.org") == "[Email_1]"


def test_a_clients_own_words_in_the_form_of_a_placeholder_are_nobodys_value() -> None:
    redacted = SOME.begin()
    assert redacted.text(f"[Email_1] is what {ANN} said") == "[Email_1] is what [Email_2] said"
    assert redacted.restored("[Email_1], [Email_2]") == f"[Email_1], {ANN}"


def test_a_clients_own_placeholder_in_another_message_is_nobodys_value_either() -> None:
    redacted = SOME.begin({"prediction": {"type": "content", "content": "[Email_2]"}})
    asked = [
        {"role": "system", "content": "Write [Email_1] for the sender."},
        {"role": "user", "content": f"from {ANN}"},
    ]
    assert redacted.messages(asked)[1]["content"] == "from [Email_3]"
    assert redacted.restored("[Email_1], [Email_2], [Email_3]") == f"[Email_1], [Email_2], {ANN}"


def test_where_answers_keep_placeholders_those_of_an_earlier_answer_stay_its_values() -> None:
    kept = Redactor(Redaction(("Email",), in_answers="Keep")).begin()
    asked = [{"role": "user", "content": ANN}, {"role": "assistant", "content": "[Email_1] it is"}]
    assert [message["content"] for message in kept.messages(asked)] == ["[Email_1]", "[Email_1] it is"]


def test_tool_calls_and_their_results_are_hidden_and_images_pass() -> None:
    redacted = SOME.begin()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,0301234567890"}}
    call = {"id": "c", "type": "function", "function": {"name": "mail", "arguments": json.dumps({"to": ANN})}}
    messages = redacted.messages(
        [
            {"role": "user", "content": [image]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": f"sent to {ANN}"},
        ]
    )
    assert messages[0]["content"] == [image]
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) == {"to": "[Email_1]"}
    assert messages[2]["content"] == "sent to [Email_1]"


# ---------------------------------------------------------------- JSON in texts
EACH = {
    "CreditCard": "4111 1111 1111 1111",
    "Iban": "DE89 3704 0044 0532 0130 00",
    "NationalId": "536-90-4399",
    "Phone": "0044 20 7946 0958",
    "Email": "bob@example.org",
    "ApiKey": "sk-proj-abcdefghijklmnop0123",
    "Policy": "PL-123456",
}
EVERY = Redactor(Redaction(KINDS, (RedactionPattern("Policy", r"\bPL-\d{6}\b"),)))


@pytest.mark.parametrize(("kind", "value"), EACH.items())
@pytest.mark.parametrize("before", ["\n", "\t", "\r\n", "\f", "\u00a0", "\u2028", "🙂\u00a0", "\\", "ü\n"])
@pytest.mark.parametrize("nested", range(1, 4))
def test_an_identifier_behind_an_escape_of_json_is_found_and_the_json_stays_whole(
    kind: str, value: str, before: str, nested: int
) -> None:
    said: Any = {"note": f"Mine:{before}{value}\nBye", "n": 1}
    hidden: Any = {"note": f"Mine:{before}[{kind}_1]\nBye", "n": 1}
    for _ in range(nested):
        said = json.dumps(said)
    redacted = EVERY.begin(key="k")
    got: Any = redacted.text(said)
    plain = EVERY.begin(key="k")
    plain.text(value)
    for _ in range(nested):
        got = json.loads(got)
    assert got == hidden
    assert redacted.digests == plain.digests, "a late word joins by the value, however it was written"


@pytest.mark.parametrize(("kind", "value"), EACH.items())
@pytest.mark.parametrize(
    "around", ["What is this?\n```json\n{}\n```", "got {}", '{}\n{{"a": 1}}', "[10:03] {}", '5" {}']
)
def test_json_within_prose_is_searched_as_json_too(kind: str, value: str, around: str) -> None:
    quoted = json.dumps({"note": f"Mine:\n{value}\tBye"})
    seen = EVERY.begin().text(around.format(quoted))
    assert value not in seen and f"[{kind}_1]" in seen
    if around.count('"') % 2 == 0:
        assert seen == around.format(quoted.replace(value, f"[{kind}_1]"))


@pytest.mark.parametrize(("kind", "value"), EACH.items())
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Mine:\\n{}\\n", id="escapes without quotes"),
        pytest.param('{{"note": "Mine:\\n{}\\nBy', id="JSON that is cut off"),
        pytest.param("{{'note': 'Mine:\\xa0{}'}}", id="Python's form"),
    ],
)
def test_behind_an_escape_nothing_passes_in_whatever_text_it_stands(kind: str, value: str, text: str) -> None:
    seen = EVERY.begin().text(text.format(value))
    assert value not in seen and f"[{kind}_1]" in seen


@pytest.mark.parametrize(
    "path", ["C:\\Users\\bob@example.org", "in C:\\new\\bob@example.org", '"C:\\Users\\bob@example.org"']
)
def test_a_path_in_prose_has_no_escapes(path: str) -> None:
    redacted = EVERY.begin()
    assert redacted.text(path) == path.replace("bob@example.org", "[Email_1]")
    assert redacted.restored("[Email_1]") == "bob@example.org"


def test_an_identifier_that_is_itself_written_in_escapes_is_found() -> None:
    redacted = SOME.begin()
    assert redacted.text(json.dumps(["jürgen@müller.example", "🙂"])) == r'["[Email_1]", "\ud83d\ude42"]'
    assert redacted.restored("[Email_1]") == "jürgen@müller.example"
    assert redacted.text(r'"bob\u0040example.org \ud83d"') == r'"[Email_2] \ud83d"'


def test_a_pattern_of_a_path_finds_it_in_prose_and_in_json() -> None:
    account = Redactor(Redaction(("Email",), (RedactionPattern("Account", r"CORP\\\w+"),)))
    assert account.begin().text(r"CORP\bob and {") == "[Account_1] and {"
    redacted = account.begin()
    assert redacted.text(json.dumps("CORP\\bob")) == '"[Account_1]"'
    assert redacted.restored("[Account_1]") == r"CORP\bob"


@pytest.mark.parametrize("sign", ["\u212a", "\u017f"])
def test_letters_that_are_others_in_another_case_break_nothing(sign: str) -> None:
    for text in (f"AB12 was cooled to 300 {sign} in the test bench", f"GB82 W{sign}ST 1234 5698 7654 32"):
        assert ALL.begin().text(text)


def test_nothing_of_the_metadata_passes_by_the_name_of_its_field() -> None:
    metadata = {"id": "a@b.com", "file": {"role": "c@d.com", "type": ["e@f.com"]}, "g@h.com": 1}
    hidden = SOME.begin().parameters({"metadata": metadata, "temperature": 0})
    assert hidden == {
        "metadata": {"id": "[Email_1]", "file": {"role": "[Email_2]", "type": ["[Email_3]"]}, "[Email_4]": 1},
        "temperature": 0,
    }


def test_in_messages_only_parts_and_tool_calls_have_fields_that_pass() -> None:
    (message,) = SOME.begin().messages(
        [
            {
                "role": "user",
                "file": "c@d.com",
                "content": [{"type": "text", "text": ANN}, {"type": "file", "file": {"file_data": "030 901820"}}],
                "extra": {"id": "a@b.com"},
            }
        ]
    )
    assert message["content"][1] == {"type": "file", "file": {"file_data": "030 901820"}}
    assert "@" not in str(message)


def test_the_users_own_pattern_goes_before_a_kind() -> None:
    own = Redactor(Redaction(("CreditCard",), (RedactionPattern("Customer", r"\b4\d{3}(?: \d{4}){3}\b"),)))
    assert own.begin().text("4111 1111 1111 1111, 5500 0000 0000 0004") == "[Customer_1], [CreditCard_1]"


def test_a_pattern_that_re2_does_not_take_is_said() -> None:
    with pytest.raises(SettingsError, match=r"pattern Policy: wanted a regular expression of RE2"):
        Redactor(Redaction((), (RedactionPattern("Policy", "PL(?=-)"),)))


def test_time_grows_with_the_text_alone() -> None:
    """Each of these takes a backtracking engine, or a quadratic search, minutes."""
    hidden = Redactor(Redaction(KINDS, (RedactionPattern("Evil", r"(a+)+$"),)))
    started = time.monotonic()
    for text in (
        "a" * 200_000 + "b",
        "a@b.co, " * 30_000,
        "4111 1111 1111 1111 " * 10_000,
        "+1" * 200_000,
        "\\n" * 200_000,
        '"\\"' * 99_999,
    ):
        hidden.begin().text(text)
    assert time.monotonic() - started < 30


# ---------------------------------------------------------------- back again
def test_an_answer_gets_its_values_back() -> None:
    redacted = SOME.begin()
    redacted.text(f'"{ANN}" PL-123456')
    call = {"id": "c", "type": "function", "function": {"name": "mail", "arguments": '{"to": "[Email_1]"}'}}
    body = {"choices": [{"message": {"content": "[Policy_1]: [Email_1], [Email_7]", "tool_calls": [call]}}]}
    message = redacted.restored_body(body)["choices"][0]["message"]
    assert message["content"] == f"PL-123456: {ANN}, [Email_7]"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"to": ANN}


def test_a_value_with_quotes_stays_json_in_the_arguments_of_a_tool() -> None:
    own = Redactor(Redaction((), (RedactionPattern("Said", '"[^"]+"'),))).begin()
    own.text('She said "yes".')
    call = {"function": {"name": "note", "arguments": '{"what": "[Said_1]"}'}}
    message = own.restored_body({"choices": [{"message": {"tool_calls": [call]}}]})["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"what": '"yes"'}


JSON_FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "note"}}}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_value_with_quotes_and_newlines_stays_json_in_an_answer_of_that_form(streamed: bool) -> None:
    said = 'a "quoted"\nline'
    own = Redactor(Redaction((), (RedactionPattern("Said", '(?s)a "q.*line'),))).begin(JSON_FORM)
    own.text(said)
    answer = {"content": '{"what": "[Said_1]"}', "reasoning": "[Said_1]"}
    if streamed:
        payload = orjson.dumps({"choices": [{"index": 0, "delta": answer, "finish_reason": "stop"}]})
        message = orjson.loads(RestoredStream(own).chunk(payload))["choices"][0]["delta"]
    else:
        message = own.restored_body({"choices": [{"message": answer}]})["choices"][0]["message"]
    assert json.loads(message["content"]) == {"what": said}
    assert message["reasoning"] == said, "which is no JSON"


def test_values_stay_out_of_the_answer_where_the_manifest_says_keep() -> None:
    kept = Redactor(Redaction(("Email",), in_answers="Keep")).begin()
    assert kept.text(ANN) == "[Email_1]" and kept.restored("[Email_1]") == "[Email_1]"


def chunk(text: str, index: int = 0, finish: str | None = None) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return orjson.dumps({"id": "a", "object": "chat.completion.chunk", "choices": [choice]})


def texts(payloads: list[bytes]) -> dict[int, str]:
    found: dict[int, str] = {}
    for payload in payloads:
        for choice in orjson.loads(payload)["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return found


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("finish", ["stop", None])
@pytest.mark.parametrize("until_then", [None, ""])
def test_a_stream_gets_its_values_back_however_it_is_cut(size: int, finish: str | None, until_then: str | None) -> None:
    redacted = SOME.begin()
    redacted.text(f"{ANN} PL-123456")
    whole = "[Policy_1] of [Email_1] is [not one, [Email_99], [Email_1"
    stream, sent = RestoredStream(redacted), []
    for start in range(0, len(whole), size):
        for index in (0, 1):
            sent.append(stream.chunk(chunk(whole[start : start + size], index, until_then)))
    if finish:
        sent += [stream.chunk(chunk("", index, finish)) for index in (0, 1)]
    sent += stream.rest()
    expected = f"PL-123456 of {ANN} is [not one, [Email_99], [Email_1"
    assert texts(sent) == {0: expected, 1: expected}


def test_text_without_a_placeholder_is_not_held_back() -> None:
    redacted = SOME.begin()
    redacted.text(ANN)
    stream = RestoredStream(redacted)
    assert texts([stream.chunk(chunk("Hello "))]) == {0: "Hello "}
    assert texts([stream.chunk(chunk("a list [1, 2"))]) == {0: "a list [1, 2"}


def test_a_chunk_with_half_a_character_gets_its_values_back() -> None:
    redacted = SOME.begin()
    redacted.text(ANN)
    said = rb'{"choices": [{"index": 0, "delta": {"content": "[Email_1] \ud83d"}}], "logprobs": NaN}'
    assert texts([RestoredStream(redacted).chunk(said)]) == {0: f"{ANN} \ufffd"}


def test_arguments_of_a_tool_that_come_in_parts_get_their_values_back() -> None:
    redacted = SOME.begin()
    redacted.text(ANN)
    stream, arguments = RestoredStream(redacted), ""
    for part in ('{"to": "[Em', 'ail_1]"', "}"):
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}
        sent: Any = orjson.loads(stream.chunk(orjson.dumps({"choices": [{"index": 0, "delta": delta}]})))
        arguments += sent["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"to": ANN}


PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "[Email_1]?"}]},
    {"type": "text", "text": "[Email_1]!"},
]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    "message",
    [
        pytest.param({"function_call": {"name": "mail", "arguments": '{"to": "[Email_1]"}'}}, id="a function call"),
        pytest.param({"reasoning": "[Email_1]?", "content": "[Email_1]!"}, id="reasoning"),
        pytest.param({"content": PARTS}, id="parts"),
        pytest.param({"audio": {"transcript": "[Email_1] said"}}, id="what is said"),
        pytest.param({"content": "[Email_9], [Emai"}, id="no placeholders"),
    ],
)
def test_a_stream_restores_what_a_whole_answer_restores(message: dict[str, Any], ends: bool) -> None:
    redacted = SOME.begin()
    redacted.text(ANN)
    stream, sent = RestoredStream(redacted), []
    for delta in cut(message):
        sent.append(stream.chunk(orjson.dumps({"choices": [{"index": 0, "delta": delta}]})))
    if ends:
        sent.append(stream.chunk(orjson.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})))
    sent += stream.rest()
    whole = redacted.restored_body({"choices": [{"message": message}]})["choices"][0]["message"]
    got: dict[tuple[str, ...], str] = {}
    for payload in sent:
        gather(orjson.loads(payload)["choices"][0]["delta"], got)
    wanted: dict[tuple[str, ...], str] = {}
    gather(whole, wanted)
    assert got == wanted


def cut(value: Any) -> list[Any]:
    """As deltas, each of one text's half at most."""
    if isinstance(value, str):
        return [value[:4], value[4:]] if "[" in value else [value]
    if isinstance(value, list):
        return [[piece] for item in value for piece in cut(item)]
    fixed = {"type": value["type"]} if "type" in value else {}
    return [{**fixed, name: piece} for name, item in value.items() if name != "type" for piece in cut(item)]


def gather(value: Any, found: dict[tuple[str, ...], str], way: tuple[str, ...] = ()) -> None:
    """Each text of all deltas together, by the names that lead to it."""
    if isinstance(value, str):
        found[way] = found.get(way, "") + value
    elif isinstance(value, list):
        for item in value:
            gather(item, found, way)
    else:
        for name, item in value.items():
            if name != "type":
                gather(item, found, (*way, name))


@pytest.mark.parametrize("ends", [True, False])
def test_what_only_began_like_a_placeholder_is_lost_of_no_text(ends: bool) -> None:
    """A refusal, and the arguments of a tool call that break off."""
    redacted = SOME.begin()
    redacted.text(ANN)
    stream = RestoredStream(redacted)
    delta = {"refusal": "no [Em", "tool_calls": [{"index": 1, "function": {"arguments": '{"to": "[Email'}}]}
    sent = [stream.chunk(orjson.dumps({"choices": [{"index": 0, "delta": delta}]}))]
    if ends:
        sent.append(stream.chunk(orjson.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})))
    sent += stream.rest()
    deltas = [orjson.loads(each)["choices"][0]["delta"] for each in sent]
    assert "".join(each.get("refusal") or "" for each in deltas) == "no [Em"
    calls = [call for each in deltas for call in each.get("tool_calls") or []]
    assert {call["index"] for call in calls} == {1}
    assert "".join(call["function"]["arguments"] for call in calls) == '{"to": "[Email'


# ---------------------------------------------------------------- the manifest
def test_the_kinds_of_the_manifest_are_those_that_are_looked_for() -> None:
    section = manifest.field_schema("spec")["properties"]["collaboration"]["properties"]["redaction"]
    assert sorted(KINDS) == section["properties"]["identifiers"]["items"]["enum"]


def test_a_running_trial_hides_what_is_declared_now() -> None:
    hidden = {"redaction": {"identifiers": ["Email"]}}
    frozen = {"spec": {"collaboration": {"draft": "Answer"}}}
    declared = {"spec": {"collaboration": {"draft": "Knowledge", **hidden}}}
    assert followed(frozen, declared)["spec"]["collaboration"] == {"draft": "Answer", **hidden}
    frozen = {"spec": {"collaboration": {"draft": "Answer", **hidden}}}
    declared = {"spec": {"collaboration": {"draft": "Knowledge"}}}
    assert followed(frozen, declared)["spec"]["collaboration"] == {"draft": "Answer"}
