"""A manifest is read, checked and defaulted; a wrong one is refused with the field, the reason and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cowest_operator import api, manifest
from cowest_operator.manifest import ManifestError
from tests.manifests import BROKEN, VALID, Broken, edited, smallest

BUILT_IN = {"draft": "explain {query}", "refine": "{query} with {draft}", "solo": "answer {query}"}
PROMPTS = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "prompts"}, "data": {"solo": "Only {query}"}}


def load(*documents: Any) -> manifest.Loaded:
    return manifest.loads(yaml.safe_dump_all(documents), "job.yaml")


def refused(text: str) -> str:
    with pytest.raises(ManifestError) as error:
        manifest.loads(text, "job.yaml")
    return str(error.value)


# ---------------------------------------------------------------- checking
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_broken_manifest_names_the_field_and_the_remedy(case: Broken) -> None:
    with pytest.raises(ManifestError) as error:
        load(edited(case.edits))
    blamed = [problem for problem in error.value.problems if problem.field == case.field]
    assert blamed and case.says in str(blamed[0])
    assert len(error.value.problems) == 1, "one mistake, one message"


@pytest.mark.parametrize("edits", VALID.values(), ids=VALID.keys())
def test_a_valid_manifest_is_taken(edits: dict[str, Any]) -> None:
    load(edited(edits))


TYPOS = [{"name": "main", "env": [{"name": "A", "valeu": "1"}], "imagePullPolicy": "Sometimes"}]


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        pytest.param(
            {"training.podTemplate.spec": {"nodeSelectr": {"a": "b"}}},
            "spec.training.podTemplate.spec.nodeSelectr: is not a known field. Did you mean nodeSelector?",
            id="a field of a pod that is none",
        ),
        pytest.param(
            {"weak.podTemplate.spec": {"containers": TYPOS}},
            "spec.weak.podTemplate.spec.containers[0].env[0].valeu: is not a known field. Did you mean value?",
            id="a field deep in a pod",
        ),
        pytest.param(
            {"training.podTemplate.spec": {"containers": TYPOS}},
            "containers[0].imagePullPolicy: wanted one of Always, IfNotPresent, Never; saw 'Sometimes'",
            id="a way to pull that is none",
        ),
        pytest.param(
            {"training.podTemplate.spec": {"tolerations": {"key": "gpu"}}},
            "spec.training.podTemplate.spec.tolerations: wanted a list",
            id="one entry for a list",
        ),
        pytest.param(
            {"training.podTemplate.spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}},
            "containers[0].resources.limits.cpu: must be a Kubernetes quantity",
            id="a quantity in a pod",
        ),
        pytest.param(
            {
                "training.resources": {
                    "requests": {"cpu": 2, "memory": "1Gi"},
                    "limits": {"cpu": "1999m", "memory": "2G"},
                }
            },
            "limits.cpu: wanted no less than spec.training.resources.requests.cpu (2), saw 1999m. Raise the limit",
            id="a limit below the request",
        ),
        pytest.param(
            {"/metadata.namespace": "n" * 41},
            "metadata.namespace: wanted at most 40 characters, saw nnnnn",
            id="a namespace too long for KServe",
        ),
        pytest.param({"rounds.trigger.schedule": "61 3 * * *"}, "is no cron expression", id="no such minute"),
        pytest.param({"feedback.evaluator.extract": "("}, "is no regular expression", id="half a group"),
    ],
)
def test_what_no_rule_can_say_is_refused_with_its_field(edits: dict[str, Any], says: str) -> None:
    assert says in refused(yaml.safe_dump(edited(edits)))


def test_the_longest_namespace_is_taken() -> None:
    load(edited({"/metadata.namespace": "n" * 40}))


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = refused(
        "apiVersion: cowest.dev/v1alpha1\nkind: CollaborationJob\nmetadata: {name: desk}\nspec:\n"
        "  weak: {model: x}\n"
        "  strong:\n    endpoint: https://a.example.com/v1\n    modle: b\n"
        "  data: {train: file://a, heldOut: file://a}\n"
        "  feedback: {evaluator: {type: exactmatch}}\n"
    )
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["job.yaml:5", "spec.weak.model"],
        ["job.yaml:6", "spec.strong.model"],
        ["job.yaml:8", "spec.strong.modle"],
        ["job.yaml:9", "spec.data.heldOut"],
        ["job.yaml:10", "spec.feedback.evaluator.type"],
    ]


def test_words_that_yaml_reads_alike_are_not_called_the_same_entry() -> None:
    with pytest.raises(ManifestError) as error:
        load(edited({"feedback.evaluator": {"type": "Choice", "choices": [1, True, True]}}))
    assert {problem.reason for problem in error.value.problems} == {"wanted text, saw 1", "wanted text, saw true"}


def test_no_message_shows_a_regular_expression() -> None:
    for case in BROKEN:
        with pytest.raises(ManifestError) as error:
            load(edited(case.edits))
        said = "".join(problem.reason + problem.remedy for problem in error.value.problems)
        assert not {"^", "$", "\\"} & set(said), case.name


def test_a_rule_is_not_evaluated_on_a_value_of_the_wrong_type() -> None:
    with pytest.raises(ManifestError) as error:
        load(edited({"canary.steps": [{"weightPercent": "x", "minAnswers": 1}]}))
    assert [problem.field for problem in error.value.problems] == ["spec.canary.steps[0].weightPercent"]


def test_the_place_of_an_object_store_cannot_change() -> None:
    old = load(edited({"objectStore.bucket": "models"})).job
    new = load(edited({"objectStore": {"bucket": "other"}})).job
    assert manifest.validate(new) == []
    (problem,) = manifest.validate(new, old)
    assert problem.field == "spec.objectStore.bucket" and "cannot change" in problem.reason
    assert manifest.validate(old, old) == []
    (problem,) = manifest.validate(load(smallest()).job, old)
    assert problem.field == "spec.objectStore" and "cannot be taken out" in problem.reason


# ---------------------------------------------------------------- YAML and documents
@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("a: [1\nb: 2", "job.yaml:2: is not valid YAML", id="a bracket that is not closed"),
        pytest.param("a: 1\n\tb: 2", "job.yaml:2: is not valid YAML", id="a tab as indentation"),
        pytest.param("kind: CollaborationJob\nkind: x", "job.yaml:2: kind: stands twice", id="a field twice"),
        pytest.param(
            "kind: x\na: 064", "job.yaml:2: a: wanted a number as people read it, saw 064.", id="an octal number"
        ),
        pytest.param("a: [1, 1:04]", "a[1]: wanted a number as people read it, saw 1:04.", id="minutes and seconds"),
        pytest.param("a: -1:04.5", "saw -1:04.5.", id="minutes with a fraction"),
        pytest.param(
            'a: [0, 00:1x, "064", 0.5, 0x1F, 1_000]', "kind: is missing", id="numbers that mean what they say"
        ),
        pytest.param("a: \x00", "is not valid YAML", id="a control character"),
        pytest.param("a: &a [*a]", "too deep or too large", id="an alias of itself"),
        pytest.param("", "wanted one CollaborationJob document, saw none", id="an empty file"),
        pytest.param("kind: CollaborationJob\n---\nkind: CollaborationJob", "saw 2", id="two jobs"),
        pytest.param("- 1", "document 1 is not an object", id="a list"),
        pytest.param("metadata: {}", "kind: is missing in document 1", id="no kind"),
        pytest.param("kind: Collaborationjob", "Did you mean CollaborationJob?", id="a kind in other case"),
        pytest.param("kind: Secret", "COWEST_SECRET_<NAME>_<KEY>", id="a Secret"),
        pytest.param("kind: Pod", "wanted CollaborationJob or ConfigMap, saw 'Pod'", id="another kind"),
        pytest.param("kind: ConfigMap\ndata: {a: 1}", 'data.a: wanted text, saw 1. Put it in quotes: "1"', id="data"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_line(text: str, says: str) -> None:
    assert says in refused(text)


def test_aliases_that_grow_without_end_are_refused() -> None:
    bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
    assert "too deep or too large" in refused(bomb)


def test_another_version_of_the_api_is_refused() -> None:
    assert "apiVersion: wanted cowest.dev/v1alpha1" in refused(yaml.safe_dump(edited({"/apiVersion": "cowest.dev/v1"})))


def test_dates_stay_text_as_on_kubernetes() -> None:
    assert load(edited({"strong.model": "m"})).job["spec"]["strong"]["model"] == "m"
    text = yaml.safe_dump(edited({"strong.model": "MODEL"})).replace("MODEL", "2026-01-01")
    assert manifest.loads(text).job["spec"]["strong"]["model"] == "2026-01-01"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    binary = tmp_path / "job.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"# " * 1_000_000)
    for path, says in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "UTF-8"),
        (large, "wanted 1000000 at most"),
    ):
        with pytest.raises(ManifestError, match=says):
            manifest.load(path)


# ---------------------------------------------------------------- defaulting and resolving
def test_defaults_make_a_manifest_that_the_operator_can_parse() -> None:
    job = manifest.resolve_prompts(load(smallest()).job, {}, BUILT_IN)
    spec = api.parse_job(job).spec
    assert (spec.feedback.drafts_per_query, spec.feedback.min_margin, spec.gate.significance) == (4, 0.5, 0.05)
    assert [(step.weight_percent, step.min_answers) for step in spec.canary.steps] == [(10, 50), (50, 100)]
    assert spec.training.preference.learning_rate == 1e-5 and spec.training.supervised.beta is None


def test_a_given_value_is_never_overwritten_by_a_default() -> None:
    spec = load(edited({"rounds.max": 0, "canary.steps": [], "training.lora.rank": 8})).job["spec"]
    assert (spec["rounds"]["max"], spec["canary"]["steps"], spec["training"]["lora"]["rank"]) == (0, [], 8)
    assert spec["training"]["lora"]["alpha"] == 32


def test_defaults_are_copies() -> None:
    load(smallest()).job["spec"]["canary"]["steps"].clear()
    assert len(load(smallest()).job["spec"]["canary"]["steps"]) == 2


def test_status_in_a_manifest_is_left_out() -> None:
    assert "status" not in load({**smallest(), "status": {"stable": {"round": 3}}}).job


def test_relative_files_start_at_the_folder_of_the_manifest(tmp_path: Path) -> None:
    job = load(edited({"weak.model": "file://../weak", "data.train": "file://a/t.jsonl"})).job
    resolved = manifest.resolve_files(job, tmp_path)["spec"]
    assert resolved["weak"]["model"] == f"file://{tmp_path.parent}/weak"
    assert resolved["data"] == {"train": f"file://{tmp_path}/a/t.jsonl", "heldOut": "file:///data/held_out.jsonl"}
    assert job["spec"]["weak"]["model"] == "file://../weak", "the loaded job stays as it was"
    labelled = load(edited({"feedback.evaluator.calibration.labels": "file://labels.jsonl"})).job
    evaluator = manifest.resolve_files(labelled, tmp_path)["spec"]["feedback"]["evaluator"]
    assert evaluator["calibration"] == {"labels": f"file://{tmp_path}/labels.jsonl", "minKappa": "0.5"}


def test_other_addresses_are_left_alone() -> None:
    assert manifest.absolute_uri("hf://org/name@1", "/x") == "hf://org/name@1"


def test_templates_come_from_the_manifest_then_from_the_built_in_ones() -> None:
    loaded = load(edited({"collaboration.prompts.solo": "Mine: {query}"}))
    prompts = manifest.resolve_prompts(loaded.job, loaded.config_maps, BUILT_IN)["spec"]["collaboration"]["prompts"]
    assert prompts == {**BUILT_IN, "solo": "Mine: {query}"}


def test_templates_come_from_a_config_map_of_the_same_file() -> None:
    loaded = load(PROMPTS, edited({"collaboration.promptsConfigMapRef.name": "prompts"}))
    prompts = manifest.resolve_prompts(loaded.job, loaded.config_maps, BUILT_IN)["spec"]["collaboration"]["prompts"]
    assert prompts == {**BUILT_IN, "solo": "Only {query}"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param({"solo": "no question"}, "ConfigMap prompts: data.solo: must contain {query}", id="no question"),
        pytest.param(
            {"refin": "{query}{draft}"}, "data.refin: is not a known field. Did you mean refine?", id="a typo"
        ),
    ],
)
def test_templates_of_a_config_map_obey_the_same_rules(data: dict[str, str], says: str) -> None:
    loaded = load({**PROMPTS, "data": data}, edited({"collaboration.promptsConfigMapRef.name": "prompts"}))
    with pytest.raises(ManifestError) as error:
        manifest.resolve_prompts(loaded.job, loaded.config_maps, BUILT_IN)
    assert says in str(error.value)


def test_a_config_map_that_is_not_there_is_named() -> None:
    loaded = load(edited({"collaboration.promptsConfigMapRef.name": "prompts"}))
    with pytest.raises(ManifestError, match="there is no ConfigMap 'prompts'"):
        manifest.resolve_prompts(loaded.job, loaded.config_maps, BUILT_IN)


def test_an_address_of_files_that_is_wrong_is_quoted_and_one_of_an_endpoint_is_not() -> None:
    text = refused(yaml.safe_dump(edited({"data.train": "fle://a.jsonl", "strong.endpoint": "x:pw@y/v1"})))
    assert "saw 'fle://a.jsonl'" in text
    assert "spec.strong.endpoint" in text and "pw" not in text
