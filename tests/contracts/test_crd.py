"""The CRD, the values the components parse, the validator and the generated pages agree."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from cowest_cli.docs import cli_markdown
from cowest_cli.main import VERBS, load
from cowest_operator import api, manifest
from cowest_operator.docs import api_markdown
from cowest_operator.manifest import crd_path
from cowest_operator.schema import KEYWORDS, Schema, _holds, default
from cowest_serving.contract import camel, parse
from cowest_training.contract import StepSettings
from tests.manifests import BROKEN, VALID, edited, smallest

ROOT = crd_path().parents[1]
SPEC = manifest.field_schema("spec")


def fields(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """Every schema under `schema`, items and map values included."""
    inner = {f".{name}": each for name, each in schema.get("properties", {}).items()}
    for part, keyword in (("[]", "items"), ("{}", "additionalProperties")):
        if keyword in schema:
            inner[part] = schema[keyword]
    for name, each in inner.items():
        yield path + name, each
        yield from fields(each, path + name)


ALL = [*fields(manifest.job_schema(), "")]


def test_every_field_is_described() -> None:
    assert [path for path, field in ALL if not field.get("description") and path != ".metadata"] == []


def test_the_validator_understands_every_keyword_that_the_crd_uses() -> None:
    assert {key for _, field in ALL for key in field} - KEYWORDS == set()


def test_texts_lists_and_maps_are_bounded() -> None:
    """Without bounds the API server counts rules over them as too expensive."""
    for path, field in ALL:
        if not path.startswith((".spec", ".status")) or field.get("x-kubernetes-preserve-unknown-fields"):
            continue
        kind = field.get("type")
        if kind == "string" and not {"enum", "format"} & set(field):
            assert "maxLength" in field, path
        if kind == "array":
            assert "maxItems" in field, path
        if "additionalProperties" in field:
            assert "maxProperties" in field, path


def test_no_field_of_the_spec_is_a_float() -> None:
    assert [path for path, field in ALL if field.get("type") == "number"] == []


def test_a_section_with_defaults_inside_has_a_default_itself() -> None:
    """Or its defaults would only hold where somebody writes the section."""
    required = {f".spec.{name}" for name in SPEC["required"]} | {".spec.feedback.evaluator"}
    shortcuts = ("draftCache", "hedge", "strongAlone", "weakAlone")
    for path, field in fields(SPEC, ".spec"):
        filled = [name for name, each in field.get("properties", {}).items() if "default" in each]
        optional_object = path.rsplit(".", 1)[-1] in (
            *("calibration", "caBundleRef", "prices", "proxyKeysSecretRef", "redaction"),
            *shortcuts,
        )
        if filled and path not in required and not optional_object:
            assert field.get("default") == {}, path


def test_a_rule_takes_the_default_of_its_section_as_it_stands() -> None:
    """The API server holds it against the rules before any default inside is filled in, and refuses the whole CRD."""
    for path, field in ALL:
        for rule in field.get("x-kubernetes-validations", ()):
            if "default" in field and "oldSelf" not in rule["rule"]:
                assert _holds(rule["rule"], field["default"], None), (path, rule["rule"])


def test_every_rule_has_a_message_that_says_what_to_do() -> None:
    for path, field in [("", manifest.job_schema()), *ALL]:
        for rule in field.get("x-kubernetes-validations", ()):
            assert len(rule["message"]) >= 20 and not rule["message"].endswith("."), path


def test_the_crd_has_the_names_that_people_type() -> None:
    spec = manifest.crd()["spec"]
    assert spec["names"]["shortNames"] == ["cwj"], "`cj` is the built-in CronJob's"
    assert spec["names"]["categories"] == ["cowest"]
    assert (spec["group"], spec["names"]["kind"], spec["names"]["plural"]) == (api.GROUP, api.KIND, api.PLURAL)
    (version,) = spec["versions"]
    assert version["name"] == api.VERSION and version["subresources"] == {"status": {}}
    columns = [column["name"] for column in version["additionalPrinterColumns"]]
    assert columns == ["Ready", "Stable", "Candidate %", "Round", "Reason", "Age"]


@pytest.mark.parametrize("kind", [api.Spec, StepSettings])
def test_the_defaulted_spec_holds_all_that_components_parse(kind: type[Any]) -> None:
    spec = default(SPEC, smallest()["spec"])
    parse(kind, spec)  # raises SettingsError on a missing default or on an enum the code does not know


def test_the_status_of_the_crd_has_a_place_for_all_that_is_known_of_a_round_and_of_the_budget() -> None:
    status = manifest.field_schema("status")["properties"]
    for kind, schema in ((api.Outcome, status["rounds"]["items"]), (api.Budget, status["budget"])):
        assert {camel(field.name) for field in dataclasses.fields(kind)} == set(schema["properties"]), kind
    assert {field.name for field in dataclasses.fields(api.Spent)} == set(
        status["budget"]["properties"]["round"]["properties"]
    )


def test_enums_of_the_crd_are_those_of_the_code() -> None:
    """Each allowed value parses."""
    base = default(SPEC, smallest()["spec"])
    for path, field in fields(SPEC, ""):
        names = path[1:].split(".")
        if "enum" not in field or any("[]" in name for name in names):
            continue
        for value in field["enum"]:
            spec = default(SPEC, base)
            place = spec
            for name in names[:-1]:
                place = place.setdefault(name, {})
            place[names[-1]] = value
            parse(api.Spec, spec)
            parse(StepSettings, spec)


def decided_defaults() -> Iterator[tuple[list[str], str]]:
    """(path, default as text) of the table in decision 0001; `a.b / c | 1 / 2` is a.b = 1 and a.c = 2."""
    text = (ROOT / "docs" / "decisions" / "0001-one-loop-two-engines.md").read_text("utf-8")
    table = text.partition("| field | default |")[2].partition("\n\n")[0]
    for names, values in re.findall(r"^\| ([a-zA-Z./ ]+) \| (.+?) \|$", table, re.MULTILINE):
        first, *others = names.split(" / ")
        prefix = first.rpartition(".")[0]
        paths = [first, *(f"{prefix}.{other.lstrip('.')}" for other in others)]
        told = re.sub(r" ?\([^)]*\)", "", values).split(" / ")
        if len(told) == len(paths):
            yield from ((path.split("."), value.strip(' "')) for path, value in zip(paths, told, strict=True))


def test_the_decision_table_and_the_crd_have_the_same_defaults() -> None:
    spec = default(SPEC, smallest()["spec"])
    compared = 0
    for path, told in decided_defaults():
        if told[0] in "-![":  # absent, required, or a list
            continue
        found: Any = spec
        for name in path:
            found = found[name]
        assert str(found).lower() == told.lower(), path
        compared += 1
    assert compared >= 50


def test_each_rule_of_the_crd_refuses_a_manifest_of_the_table() -> None:
    """At each of its places. A rule on a change has no bad manifest, but a bad edit: tests/unit/test_manifest.py."""
    refused: set[tuple[str, str]] = set()
    for case in BROKEN:
        problems = manifest.validate(default(manifest.job_schema(), edited(case.edits)))
        for problem in problems:
            path = re.sub(r"\[\d+\]", "[]", problem.field)
            refused |= {(path, problem.reason), (f"{path.rpartition('.')[0]}{{}}", problem.reason)}
    rules = [
        ((path + rule.get("fieldPath", "")).removeprefix("."), rule["message"])
        for path, field in [("", manifest.job_schema()), *ALL]
        for rule in field.get("x-kubernetes-validations", ())
        if "oldSelf" not in rule["rule"]
    ]
    assert len(rules) > 70
    assert [rule for rule in rules if rule not in refused] == []


def test_the_tables_of_good_and_bad_manifests_are_long_enough_and_hold_none_twice() -> None:
    """Our validator and a real API server judge both tables."""
    for least, edits in ((60, [case.edits for case in BROKEN]), (20, list(VALID.values()))):
        manifests = [repr(edited(each)) for each in edits]
        assert len(set(manifests)) == len(manifests) >= least
    assert len({case.name for case in BROKEN}) == len(BROKEN)


# ---------------------------------------------------------------- generated pages and the command line
def test_the_api_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "api.md").read_text("utf-8") == api_markdown(), "run `make docs`"


def test_the_command_line_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == cli_markdown(), "run `make docs`"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_list_of_verbs_says_what_the_verb_says_of_itself(verb: Any) -> None:
    first = (load(verb).help or "").splitlines()[0]
    assert first.startswith(verb.help.rstrip(".")), first
