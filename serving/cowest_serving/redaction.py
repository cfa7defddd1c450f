"""What leaves for the strong model, and what is stored, without the identifiers that the manifest names.

`spec.collaboration.redaction` names kinds of structured identifiers and patterns of the user's own. Each value becomes
a placeholder, `[Email_1]`, the same wherever it occurs in a request, so that a model can still tell two people apart;
`inAnswers: Restore` puts the values back into what the client gets. The weak model is in-house and sees the original.

Late words are hidden apart from the record that they are about, with other numbers. Both keep digests of their values,
by a key that the gateway makes for each answer and keeps nowhere: it goes to the client as the end of the request id,
and comes back with the word. So any gateway can take it, and nobody can try values on what is stored.

Patterns are RE2's: their time grows with the text alone, whatever a client sends. What looks like a card, an IBAN or a
national number counts only where its check digits agree (python-stdnum). A redactor that fails raises: the caller must
then send and store nothing.

Texts may be JSON, or quote some: arguments of tools, their results, lists of references. In `\\n4111` no word begins at
the 4, so texts are searched as their escapes read, too; a value is what is meant, however it was written.
"""

from __future__ import annotations

import bisect
import hmac
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import re2
import stdnum.be.nn
import stdnum.br.cpf
import stdnum.ch.ssn
import stdnum.cn.ric
import stdnum.de.idnr
import stdnum.dk.cpr
import stdnum.es.dni
import stdnum.es.nie
import stdnum.fi.hetu
import stdnum.fr.nir
import stdnum.iban
import stdnum.in_.aadhaar
import stdnum.it.codicefiscale
import stdnum.luhn
import stdnum.no.fodselsnummer
import stdnum.pl.pesel
import stdnum.se.personnummer
import stdnum.us.ssn

from cowest_serving.contract import Messages, Redaction, SettingsError
from cowest_serving.foreign_json import read_json

NOTHING = Redaction()
NO_PARAMETERS: Mapping[str, Any] = {}
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 64 * 1024 * 1024
_HELD_BACK = 80  # characters at the end of a stream's text that may be the beginning of a placeholder


# ---------------------------------------------------------------- what is looked for
_MOST_GROUPS = 9  # an IBAN has no more
Span = tuple[int, int]
Found = tuple[int, int, str, str]


@dataclass(frozen=True)
class _Form:
    """How an identifier is written, and whether something so written is one.

    `in_groups`: what stands before or behind it, a word or a number, may look like another group of it.
    """

    pattern: str
    is_one: Callable[[str], bool] = lambda _: True
    in_groups: bool = False

    def within(self, text: str) -> Iterator[Span]:
        """Where in a match identifiers stand."""
        if not self.in_groups:
            if self.is_one(text):
                yield 0, len(text)
            return
        groups = [match.span() for match in re.finditer(r"[^ -]+", text)]
        at = 0
        while at < len(groups):
            last = min(at + _MOST_GROUPS, len(groups)) - 1
            while last >= at and not self.is_one(text[groups[at][0] : groups[last][1]]):
                last -= 1
            if last >= at:
                yield groups[at][0], groups[last][1]
            at = max(at, last) + 1


def _is_card(text: str) -> bool:
    digits = text.replace(" ", "").replace("-", "")
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and stdnum.luhn.is_valid(digits)


def _is_phone(text: str) -> bool:
    if re.fullmatch(r"\d{1,2}([./ -])\d{1,2}\1\d{2,4}", text):  # a date
        return False
    return 8 <= len(re.sub(r"\D", "", text)) <= 15


_AS_NUMBERS = {ord(letter): str(int(letter, 36)) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}  # of ISO 7064


def _is_iban(text: str) -> bool:
    letters = text.replace(" ", "").replace("-", "").upper()
    # Where case does not matter RE2 takes the sign of Kelvin for a k; int() would not.
    if not 15 <= len(letters) <= 34 or not letters.isascii() or not letters[:2].isalpha():
        return False
    digits = (letters[4:] + letters[:4]).translate(_AS_NUMBERS)
    return int(digits) % 97 == 1 and bool(stdnum.iban.is_valid(letters, check_country=False))


# Of 11 digits without any sign between them some other numbers pass by chance: to hide one too many is the lesser harm.
_NATIONAL: tuple[_Form, ...] = (
    _Form(r"\b\d{3}-\d{2}-\d{4}\b", stdnum.us.ssn.is_valid),
    _Form(r"(?i)\b[a-z]{2} ?\d{2} ?\d{2} ?\d{2} ?[a-d]\b"),  # GB: has no check digit
    _Form(r"(?i)\b\d{8}-?[a-z]\b", stdnum.es.dni.is_valid),
    _Form(r"(?i)\b[xyz]-?\d{7}-?[a-z]\b", stdnum.es.nie.is_valid),
    _Form(r"(?i)\b[a-z]{6}\d{2}[a-z]\d{2}[a-z]\d{3}[a-z]\b", stdnum.it.codicefiscale.is_valid),
    _Form(r"\b[12] ?\d{2} ?\d{2} ?[0-9AB]{2} ?\d{3} ?\d{3} ?\d{2}\b", stdnum.fr.nir.is_valid),
    _Form(r"\b756\.\d{4}\.\d{4}\.\d{2}\b", stdnum.ch.ssn.is_valid),
    _Form(r"\b\d{3}\.\d{3}\.\d{3}-\d{2}\b", stdnum.br.cpf.is_valid),
    _Form(r"\b\d{17}[0-9Xx]\b", stdnum.cn.ric.is_valid),
    _Form(r"\b\d{4} \d{4} \d{4}\b", stdnum.in_.aadhaar.is_valid),
    _Form(r"\b(?:\d{2})?\d{6}[-+]\d{4}\b", stdnum.se.personnummer.is_valid),
    _Form(r"\b\d{6}-\d{4}\b", stdnum.dk.cpr.is_valid),
    _Form(r"\b\d{6}[-+A]\d{3}[0-9A-Z]\b", stdnum.fi.hetu.is_valid),
    _Form(r"\b\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}\b", stdnum.be.nn.is_valid),
    _Form(r"\b\d{2} ?\d{3} ?\d{3} ?\d{3}\b", stdnum.de.idnr.is_valid),
    _Form(r"\b\d{11}\b", stdnum.pl.pesel.is_valid),
    _Form(r"\b\d{6} ?\d{5}\b", stdnum.no.fodselsnummer.is_valid),
)
_FORMS: Mapping[str, tuple[_Form, ...]] = {
    "ApiKey": (
        _Form(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"),
        _Form(r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}"),
        _Form(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
        _Form(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
        _Form(r"\bgithub_pat_[A-Za-z0-9_]{22,}\b"),
        _Form(r"\bglpat-[A-Za-z0-9_-]{20,}"),
        _Form(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
        _Form(r"\bhf_[A-Za-z0-9]{30,}\b"),
        _Form(r"\bAIza[0-9A-Za-z_-]{35}"),
        _Form(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),  # a JSON Web Token
    ),
    "Email": (_Form(r"[\pL\pN._%+\-]+@[\pL\pN](?:[\pL\pN\-]*\.)+\pL{2,}"),),
    "Iban": (_Form(r"(?i)\b[a-z]{2}\d{2}(?:[ -]?[a-z0-9]{1,4})+\b", _is_iban, True),),
    "CreditCard": (_Form(r"\b\d(?:[ -]?\d){12,}\b", _is_card, True),),
    "NationalId": _NATIONAL,
    "Phone": (
        _Form(r"(?:\+|\b00)\d(?:[ ()./-]{0,2}\d){7,14}\b", _is_phone),
        _Form(r"(?:\(\d{3}\) ?|\b\d{3}[ .-])\d{3}[ .-]\d{4}\b"),  # North America
        _Form(r"(?:\(0\d{1,4}\)|\b0\d{1,4})[ /.-]{1,3}\d(?:[ .-]?\d){5,11}\b", _is_phone),
    ),
}
KINDS = tuple(_FORMS)


# ---------------------------------------------------------------- the redactor
class Redactor:
    """Of one manifest, for all requests. Raises `SettingsError` for a pattern that RE2 does not take."""

    def __init__(self, redaction: Redaction = NOTHING) -> None:
        self.restores = redaction.in_answers == "Restore"
        # The user's own first: whoever names a pattern knows better than a form what it stands for.
        looks: dict[str, tuple[_Form, ...]] = {pattern.name: (_Form(pattern.regex),) for pattern in redaction.patterns}
        looks |= {kind: _FORMS[kind] for kind in KINDS if kind in redaction.identifiers}
        self._looks = [
            (kind, _any_of(kind, forms), [(_compiled(kind, form.pattern), form) for form in forms])
            for kind, forms in looks.items()
        ]
        # One pass over a text, most of which has none. (Not re2.Set: out of memory it says that nothing matches.)
        self._any = _any_of("all", [form for forms in looks.values() for form in forms]) if looks else None

    def begin(self, parameters: Mapping[str, Any] = NO_PARAMETERS, key: str = "") -> Redacted:
        """For one request: its placeholders are its own. `parameters`: all of it but its messages. `key`: of the
        digests by which late words are `joined` to it.
        """
        return Redacted(self, parameters, key)

    def comparable(self, messages: Messages) -> list[dict[str, Any]]:
        """As a query is compared with what traces hold: hidden, or hidden once more, and without the numbers of
        placeholders, which go by other texts of a request too."""
        hidden = Redacted(self).messages(messages)
        return [_changed(message, lambda _, text: _PLACEHOLDER.sub(r"[\1]", text)) for message in hidden]

    def find(self, text: str) -> list[Found]:
        """(start, end, kind, value) of what is to be hidden, in order; none overlap."""
        found: list[Found] = []
        if self._any is None:
            return found
        readings = [reading for reading in _readings(text) if self._any.search(reading.text)]
        for kind, any_of, forms in self._looks if readings else ():
            for reading in readings:
                for pattern, form in forms if any_of.search(reading.text) else ():
                    new = [
                        (reading.place(start), reading.place(end), kind, reading.text[start:end])
                        for start, end in _spans(pattern, form, reading.text)
                    ]
                    found = sorted([*found, *(each for each in new if not _meets(found, each[0], each[1]))])
        return found


def _spans(pattern: Any, form: _Form, text: str) -> Iterator[Span]:
    for match in pattern.finditer(text):
        if match.group():
            yield from ((match.start() + start, match.start() + end) for start, end in form.within(match.group()))


def _any_of(name: str, forms: Sequence[_Form]) -> Any:
    for form in forms:
        _compiled(name, form.pattern)  # one that is wrong is said by itself
    return _compiled(name, "|".join(f"(?:{form.pattern})" for form in forms))


def _compiled(name: str, pattern: str) -> Any:
    try:
        return re2.compile(pattern, _OPTIONS)
    except re2.error as error:
        why = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise SettingsError(
            f"spec.collaboration.redaction: pattern {name}: wanted a regular expression of RE2 (no look-around, no"
            f" back-references), saw {pattern!r}: {why}"
        ) from None


def _meets(found: Sequence[Found], start: int, end: int) -> bool:
    """`found` is in order and without overlaps, so that only one can be the first to reach in."""
    after = bisect.bisect_right(found, start, key=lambda each: each[1])
    return after < len(found) and found[after][0] < end


# ---------------------------------------------------------------- JSON in texts
_MOST_NESTED = 3  # JSON in a text of JSON in a text of JSON
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # one character beyond 16 bits
_ESCAPE = re.compile(rf'\\(?:{_PAIR}|u[0-9a-fA-F]{{4}}|x[0-9a-fA-F]{{2}}|["\\/bfnrt])')  # \xa0: Python's
_SHORT = {rf"\{letter}": meant for letter, meant in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True)}
# A text in quotes, all of whose backslashes are JSON's; the last one may be cut off.
_LITERAL = re.compile(r'(?<!\\)"(?:[^"\\\x00-\x1f]|\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))*+(?:"|\Z)')


@dataclass(frozen=True)
class _Reading:
    """A text, some of whose escapes became what they stand for."""

    text: str
    above: _Reading | None = None  # as it was before
    at: Sequence[int] = ()  # where in `text` they stood
    longer: Sequence[int] = ()  # up to and with each: how many characters more there are above

    def place(self, offset: int) -> int:
        """In the text as it came. An escape is never cut."""
        if self.above is None:
            return offset
        before = bisect.bisect_left(self.at, offset)
        return self.above.place(offset + (self.longer[before - 1] if before else 0))


def _readings(text: str) -> list[_Reading]:
    """The likeliest first. Whatever else a text may mean is searched too, since to let something pass is worse.

    In JSON an escape is one. Elsewhere it may be a part of a path, `C:\\new`, but hardly so within JSON's quotes.
    """
    plain = _Reading(text)
    if "\\" not in text:
        return [plain]
    deeper = _deeper(plain)
    if _is_json(text):
        found = deeper[:1]
        for above, reading in zip([plain, *deeper], deeper[1:], strict=False):
            has_json_within = '\\"' in above.text
            found = [reading, *found] if has_json_within else [*found, reading]
        return found
    quoted = _unescaped(plain, [match.span() for match in _LITERAL.finditer(text)])
    return [*([quoted] if quoted.at else []), plain, *reversed(deeper)]


def _deeper(reading: _Reading) -> list[_Reading]:
    found: list[_Reading] = []
    while len(found) < _MOST_NESTED and (reading := _unescaped(reading, [(0, len(reading.text))])).at:
        found.append(reading)
    return found


def _unescaped(reading: _Reading, spans: Sequence[Span]) -> _Reading:
    text, behind, more = reading.text, 0, 0
    parts: list[str] = []
    at: list[int] = []
    longer: list[int] = []
    for span in spans:
        for match in _ESCAPE.finditer(text, *span):
            escape, (start, end) = match[0], match.span()
            parts += (text[behind:start], _SHORT.get(escape) or _meaning(escape))
            at.append(start - more)
            more += end - start - 1
            longer.append(more)
            behind = end
    return _Reading("".join([*parts, text[behind:]]), reading, at, longer)


def _meaning(escape: str) -> str:
    """Of one by number."""
    if len(escape) > len(r"\u0000"):
        return str(json.loads(f'"{escape}"'))
    code = int(escape[2:], 16)
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)  # half a character is none


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return False
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


# ---------------------------------------------------------------- one request
class Redacted:
    """One request: which placeholder stands for which value."""

    def __init__(self, redactor: Redactor, parameters: Mapping[str, Any] = NO_PARAMETERS, key: str = "") -> None:
        self._redactor, self.key = redactor, key
        self._placeholders: dict[tuple[str, str], str] = {}
        self._values: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._foreign: set[str] = set()  # what the client wrote itself in the form of a placeholder
        self._answers_json = _wants_json(parameters)
        self._heed([parameters.get(name) for name in _WITH_TEXT])

    @property
    def restores(self) -> bool:
        """Whether anything is there that belongs into the answer."""
        return self._redactor.restores and bool(self._values)

    def text(self, text: str) -> str:
        found = self._redactor.find(text)
        if not found:
            return text
        self._foreign.update(_placeholders_in(text))
        parts, at = [], 0
        for start, end, kind, value in found:
            parts += [text[at:start], self._placeholder(kind, value)]
            at = end
        return "".join([*parts, text[at:]])

    def texts(self, said: Mapping[str, str | None]) -> dict[str, str | None]:
        """Of one word on an answer. Placeholders in it are those of the answer's record: no others are called so."""
        self._foreign.update(found for text in said.values() for found in _placeholders_in(text or ""))
        return {name: self.text(text) if text else text for name, text in said.items()}

    @property
    def digests(self) -> dict[str, str]:
        """Placeholder -> a digest of its value that nobody can make, or try values with, who has no key; "" without."""
        key = self.key.encode()
        return {
            placeholder: hmac.digest(key, value.encode(), "sha256").hex()[:32] if key else ""
            for placeholder, value in self._values.items()
        }

    def messages(self, messages: Messages) -> list[dict[str, Any]]:
        """Texts, their parts, and the arguments of tool calls; images and the like pass as they are."""
        self._heed(messages)
        return [_changed(message, self._hidden) for message in messages]

    def parameters(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of a request that carry texts of an application's users."""
        hidden = {name: change(given[name], self._hidden) for name, change in _WITH_TEXT.items() if name in given}
        return {**given, **hidden}

    def _hidden(self, _: Place, text: str) -> str:
        return self.text(text)

    def _heed(self, said: Any) -> None:
        """Before the first placeholder: the client's own words are no value's, in whatever text they stand.

        Where answers keep placeholders, such words are most likely those of an earlier answer: its values' again.
        """
        if self._redactor.restores:
            self._foreign.update(found for text in _all_texts(said) if "[" in text for found in _placeholders_in(text))

    def _placeholder(self, kind: str, value: str) -> str:
        known = self._placeholders.get((kind, value))
        while known is None:
            number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
            placeholder = f"[{kind}_{number}]"
            if placeholder not in self._foreign:  # the client's own words are nobody's value
                known = self._placeholders[kind, value] = placeholder
                self._values[placeholder] = value
        return known

    # ------------------------------------------------------------ back again
    def restored(self, text: str, *, within_json: bool = False) -> str:
        """With the values in the place of their placeholders, where the manifest wants that."""
        if not self.restores or "[" not in text:
            return text

        def value_of(match: re.Match[str]) -> str:
            value = self._values.get(match[0], match[0])
            return json.dumps(value, ensure_ascii=False)[1:-1] if within_json else value

        return _PLACEHOLDER.sub(value_of, text)

    def restored_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion, its texts and the arguments of its tool calls restored."""
        choices = [
            {**choice, "message": _changed(choice["message"], self.put_back)} if "message" in choice else choice
            for choice in body.get("choices") or []
        ]
        return {**body, "choices": choices}

    def put_back(self, place: Place, text: str) -> str:
        """`place`: in its message. The arguments of a tool are JSON within a text, and so is an answer of that form."""
        is_json = place[-1] == "arguments" or (self._answers_json and place[0] == "content")
        return self.restored(text, within_json=is_json)


def _wants_json(parameters: Mapping[str, Any]) -> bool:
    form = parameters.get("response_format")
    return isinstance(form, Mapping) and form.get("type") in ("json_object", "json_schema")


# ---------------------------------------------------------------- late words
def joined(text: str, said: Mapping[str, str], known: Mapping[str, str]) -> str | None:
    """A text that was hidden later, such as a late reference, in the placeholders of the record that it is about.

    `said`, `known`: the digests of the text's and of the record's placeholders. A value that the record does not have
    gets the number 0. None: the text came without the record's key, and nobody can tell whose its values are.
    """
    there = {digest: placeholder for placeholder, digest in known.items() if digest}
    names: dict[str, str] = {}
    for match in _PLACEHOLDER.finditer(text):
        if match[0] in said:
            if not said[match[0]]:
                return None
            names[match[0]] = there.get(said[match[0]], f"[{match[1]}_0]")
    return _PLACEHOLDER.sub(lambda match: names.get(match[0], match[0]), text)


def joined_reference(word: Mapping[str, Any], known: Mapping[str, str]) -> str | None:
    """The late reference of a row of feedback, likewise."""
    return joined(word["reference"] or "", digests_of(word), known)


def digests_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Of a row of the traces or of feedback."""
    found: dict[str, str] = orjson.loads(row.get("placeholders") or "{}")
    return found


# ---------------------------------------------------------------- texts in messages
Place = tuple[str, ...]  # the names of the fields that lead to a text
_Change = Callable[[Place, str], str]
_NO_TEXT_OF_MESSAGES = frozenset({"role", "tool_call_id"})
_NO_TEXT_OF_PARTS = frozenset({"type", "id", "image_url", "input_audio", "file"})  # and of tool calls


def _without_text(value: Mapping[str, Any]) -> frozenset[str]:
    """The fields of an object that are passed on unread: what is no message and no part of one has none."""
    if "role" in value:
        return _NO_TEXT_OF_MESSAGES
    return _NO_TEXT_OF_PARTS if "type" in value else frozenset()


def _changed(value: Any, change: _Change, place: Place = ()) -> Any:
    """A message, or a part of one, with each text in it changed."""
    if isinstance(value, str):
        return change(place, value)
    if isinstance(value, list):
        return [_changed(item, change, place) for item in value]
    if isinstance(value, Mapping):
        passed = _without_text(value)
        return {
            name: item if name in passed else _changed(item, change, (*place, name)) for name, item in value.items()
        }
    return value


def _all_changed(value: Any, change: _Change, place: Place = ()) -> Any:
    """Whatever a client made up: each text, and each name of a field."""
    if isinstance(value, Mapping):
        return {change(place, name): _all_changed(item, change, place) for name, item in value.items()}
    if isinstance(value, list):
        return [_all_changed(item, change, place) for item in value]
    return change(place, value) if isinstance(value, str) else value


def _placeholders_in(text: str) -> Iterator[str]:
    return (match[0] for match in _PLACEHOLDER.finditer(text))


def _all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _all_texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all_texts(item)


_WITH_TEXT: Mapping[str, Callable[[Any, _Change], Any]] = {"metadata": _all_changed, "prediction": _changed}
_PLACEHOLDER = re.compile(r"\[([A-Za-z][A-Za-z0-9]{0,31})_\d{1,9}\]")
_BEGUN = re.compile(r"\[(?:[A-Za-z][A-Za-z0-9]{0,31}(?:_\d{0,9})?)?$")


# ---------------------------------------------------------------- streams
_Step = str | tuple[str, Any]  # a field by its name; an item of a list by its index, or else by its type


class RestoredStream:
    """Puts values back into a stream, chunk by chunk: what may be the first half of a placeholder waits for the other.

    Each text of a choice (of a tool call, of a kind of part) has its own rest.
    """

    def __init__(self, redacted: Redacted) -> None:
        self._redacted = redacted
        self._rests: dict[tuple[int, tuple[_Step, ...]], str] = {}
        self._last: dict[str, Any] = {}

    def chunk(self, payload: bytes) -> bytes:
        """The JSON of a chunk, restored. A choice that ends gets its rest with its end."""
        chunk = read_json(payload)
        for choice in chunk.get("choices") or []:
            index, delta = choice.get("index", 0), choice.get("delta") or {}
            is_last = bool(choice.get("finish_reason"))  # some servers say "" until then
            for steps, holder, name in list(_texts(delta)):
                holder[name] = self._next(index, steps, holder[name], is_last)
            if is_last and (left := self._left(index)):
                choice["delta"] = _merged(delta, left)
        self._last = {name: chunk.get(name) for name in ("id", "object", "created", "model")}
        return orjson.dumps(chunk)

    def rest(self) -> Iterator[bytes]:
        """What was held back of choices that never ended; to be sent before the end of the stream."""
        for index in dict.fromkeys(index for index, _ in self._rests):
            choice = {"index": index, "delta": self._left(index), "finish_reason": None}
            yield orjson.dumps({**self._last, "choices": [choice]})

    def _next(self, index: int, steps: tuple[_Step, ...], text: str, is_last: bool) -> str:
        whole = self._rests.pop((index, steps), "") + text
        begun = None if is_last else _BEGUN.search(whole, max(0, len(whole) - _HELD_BACK))
        if begun is not None:
            self._rests[index, steps] = begun[0]
            whole = whole[: begun.start()]
        return self._redacted.put_back(tuple(step for step in steps if isinstance(step, str)), whole)

    def _left(self, index: int) -> dict[str, Any]:
        """What was held back of a choice, as a delta: it never became a placeholder."""
        delta: dict[str, Any] = {}
        for of, steps in [place for place in self._rests if place[0] == index]:
            delta = _merged(delta, _nested(steps, self._rests.pop((of, steps))))
        return delta


def _texts(value: Any, steps: tuple[_Step, ...] = ()) -> Iterator[tuple[tuple[_Step, ...], Any, Any]]:
    """(the way to it, the object or list that holds it, its name or number there) of each text of a delta."""
    if isinstance(value, dict):
        passed = _without_text(value)
        items = [(name, (*steps, name), item) for name, item in value.items() if name not in passed]
    else:
        items = [(number, (*steps, *_step_to(item)), item) for number, item in enumerate(value)]
    for name, way, item in items:
        if isinstance(item, str):
            yield way, value, name
        elif isinstance(item, dict | list):
            yield from _texts(item, way)


def _step_to(item: Any) -> tuple[_Step, ...]:
    """The next chunk has the item's next piece, whatever else is in its list."""
    named = item if isinstance(item, dict) else {}
    name = next((name for name in ("index", "type") if isinstance(named.get(name), int | str)), "")
    return ((name, named.get(name)),)


def _nested(steps: Sequence[_Step], text: str) -> Any:
    """The delta that has this text at the end of that way."""
    if not steps:
        return text
    step, inner = steps[0], _nested(steps[1:], text)
    if isinstance(step, str):
        return {step: inner}
    return [{step[0]: step[1], **inner} if step[0] else inner]


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {**one, **{name: _merged(one.get(name), item) for name, item in other.items()}}
    return [*one, *other] if isinstance(one, list) and isinstance(other, list) else other
