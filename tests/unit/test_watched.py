"""What the watches show, kept slim. No cluster."""

from __future__ import annotations

from typing import Any

import pytest

from cowest_operator.watched import PREDICTOR, Watched, retry_after, see, shared


def body(kind: str = "Deployment", version: str = "5", generation: int | None = 1, **more: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": "claims-gateway",
        "namespace": "desks",
        "uid": "u",
        "resourceVersion": version,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"cowest.dev/job": "claims", **more.pop("labels", {})},
        "ownerReferences": more.pop("owners", [{"kind": "CollaborationJob", "name": "claims", "controller": True}]),
    }
    if generation is not None:
        metadata["generation"] = generation
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **more}


def test_a_child_wakes_its_job_when_it_is_new_changed_or_gone() -> None:
    watched, key = Watched(), ("desks", "claims")
    assert watched.child(None, "Deployment", body()) == key
    assert watched.child("MODIFIED", "Deployment", body(version="6")) is None
    available = body(version="7", status={"availableReplicas": 1})
    assert watched.child("MODIFIED", "Deployment", available) == key
    assert watched.child("DELETED", "Deployment", available) == key
    assert not watched.families[key].children


def test_an_event_that_our_own_write_overtook_is_no_news() -> None:
    watched = Watched()
    watched.child(None, "Deployment", body(version="9", generation=2))
    assert watched.child("MODIFIED", "Deployment", body(version="8", generation=1)) is None
    (seen,) = watched.families["desks", "claims"].of("Deployment")
    assert seen.stamp == "2"


def test_a_child_of_nobody_is_left_alone() -> None:
    stranger = body(labels={"cowest.dev/job": ""})
    assert Watched().child(None, "Deployment", stranger) is None


def test_what_another_controller_made_under_our_labels_is_left_alone() -> None:
    watched = Watched()
    copied = body(owners=[{"kind": "InferenceService", "name": "claims-96884fe", "controller": True}])
    assert watched.child(None, "Deployment", copied) is None
    assert not list(watched.families["desks", "claims"].of("Deployment"))


def predictor(version: str, words: str = "") -> dict[str, Any]:
    """KServe's Deployment of a weak model, whose pods may be refused."""
    condition = {"type": "ReplicaFailure", "status": "True", "message": words}
    owners = [{"kind": "InferenceService", "name": "claims-96884fe", "controller": True}]
    return body(version=version, owners=owners, status={"conditions": [condition] if words else []})


def test_of_kserves_deployment_only_that_its_pods_are_refused_is_kept_and_each_change_of_it_is_news() -> None:
    watched, key = Watched(), ("desks", "claims")
    assert watched.child(None, "Deployment", predictor("5")) is None
    assert watched.child("MODIFIED", "Deployment", predictor("6", "exceeded quota")) == key
    assert watched.child("MODIFIED", "Deployment", predictor("7", "exceeded quota")) is None
    (seen,) = watched.families[key].children.values()
    assert (seen.kind, seen.facts) == (PREDICTOR, {"message": "exceeded quota"})
    assert watched.child("MODIFIED", "Deployment", predictor("8")) == key
    assert not watched.families[key].children
    watched.child("MODIFIED", "Deployment", predictor("9", "exceeded quota"))
    assert watched.child("DELETED", "Deployment", predictor("10", "exceeded quota")) == key
    watched.child(None, "Deployment", predictor("11", "exceeded quota"))
    assert watched.gone("Deployment", "", 12, set()) == [key], "it went while nobody watched"
    assert not watched.families[key].children


@pytest.mark.parametrize(
    ("replicas", "updated", "available", "all_new"),
    [
        pytest.param(1, 1, 1, True, id="all are new and answer"),
        pytest.param(2, 1, 1, False, id="a new one is made, the old one answers"),
        pytest.param(2, 2, 1, False, id="a new one does not answer yet"),
        pytest.param(0, 0, 0, False, id="there is none"),
    ],
)
def test_a_deployment_is_updated_when_no_pod_of_before_is_left(
    replicas: int, updated: int, available: int, all_new: bool
) -> None:
    status = {"replicas": replicas, "updatedReplicas": updated, "availableReplicas": available}
    assert see("Deployment", body(status=status)).facts["updated"] is all_new


def test_a_child_whose_owner_was_taken_away_is_as_gone() -> None:
    watched, key = Watched(), ("desks", "claims")
    watched.child(None, "Deployment", body())
    assert watched.child("MODIFIED", "Deployment", body(version="6", owners=[])) == key
    assert not watched.families[key].children


@pytest.mark.parametrize("label", ["", "nobody"], ids=["taken away", "changed"])
def test_a_child_whose_label_was_taken_away_is_as_gone(label: str) -> None:
    watched, key = Watched(), ("desks", "claims")
    watched.child(None, "Deployment", body())
    assert watched.child("MODIFIED", "Deployment", body(version="6", labels={"cowest.dev/job": label})) == key
    assert not watched.families[key].children and set(watched.families) == {key}


def test_what_has_no_generation_is_told_apart_by_its_version() -> None:
    assert see("ConfigMap", body("ConfigMap", version="12", generation=None)).stamp == "12"
    assert see("Deployment", body(version="12", generation=3)).stamp == "3"


def test_what_somebody_else_took_of_our_labels_and_annotations_is_told_by_who_holds_them() -> None:
    def stamp(**held: Any) -> str:
        child = body(version="12", generation=3)
        others = {
            "manager": "kubectl-label",
            "operation": "Update",
            "fieldsV1": {"f:metadata": {"f:labels": {"f:x": {}}}},
        }
        ours = {"manager": "cowest-operator", "operation": "Apply", "fieldsV1": {"f:metadata": held}}
        child["metadata"]["managedFields"] = [others, ours]
        return see("Deployment", child).stamp

    both = {"f:app": {}, "f:job": {}}
    assert stamp(**{"f:labels": both}) == stamp(**{"f:labels": dict(reversed(both.items()))})
    assert (
        len({stamp(**{"f:labels": both}), stamp(**{"f:labels": {"f:job": {}}}), stamp(**{"f:annotations": both})}) == 3
    )


def test_what_has_a_status_and_no_generation_is_told_apart_by_its_content() -> None:
    """An autoscaler writes its status every few seconds."""

    def stamp(version: str, most: int, **more: Any) -> str:
        scaler = body("HorizontalPodAutoscaler", version, None, spec={"maxReplicas": most}, **more)
        return see("HorizontalPodAutoscaler", scaler).stamp

    assert stamp("5", 3) == stamp("6", 3, status={"currentReplicas": 2})
    assert len({stamp("5", 3), stamp("5", 4), stamp("5", 3, labels={"a": "b"}), stamp("5", 3, owners=[])}) == 4


def test_the_exit_code_is_that_of_the_pod_that_ended_last() -> None:
    nodes = {
        "retry": {"type": "Retry", "message": "No more retries left"},
        "one": {"type": "Pod", "finishedAt": "2026-01-01T00:00:01Z", "outputs": {"exitCode": "75"}, "message": "away"},
        "two": {"type": "Pod", "finishedAt": "2026-01-01T00:00:09Z", "outputs": {"exitCode": "2"}, "message": "a typo"},
    }
    facts = see("Workflow", body("Workflow", status={"phase": "Failed", "nodes": nodes})).facts
    assert (facts["phase"], facts["code"], facts["words"]) == ("Failed", 2, "a typo")


def test_an_exit_code_that_is_no_number_is_none() -> None:
    nodes = {"one": {"type": "Pod", "outputs": {"exitCode": "--²"}, "message": "odd"}}
    assert see("Workflow", body("Workflow", status={"phase": "Failed", "nodes": nodes})).facts["code"] is None


def test_a_pod_that_was_never_made_has_no_exit_code_but_words() -> None:
    nodes = {"one": {"type": "Pod", "finishedAt": "2026-01-01T00:00:01Z", "message": "pods is forbidden"}}
    facts = see("Workflow", body("Workflow", status={"phase": "Error", "nodes": nodes})).facts
    assert (facts["code"], facts["words"]) == (None, "pods is forbidden")


@pytest.mark.parametrize(
    ("label", "attempt"), [("two", 1), ("-3", 1), ("²", 1), ("", 1), ("7", 7)], ids=["a word", "less", "²", "none", "7"]
)
def test_a_label_that_a_hand_made_no_number_is_as_if_it_were_not_there(label: str, attempt: int) -> None:
    labels = {"cowest.dev/attempt": label, "cowest.dev/generation": label}
    facts = see("Workflow", body("Workflow", labels=labels, status={"phase": "Failed", "finishedAt": "soon"})).facts
    assert (facts["attempt"], facts["finished"]) == (attempt, 0.0)


def test_the_wait_between_two_attempts_has_an_end_whatever_their_number() -> None:
    assert [retry_after(attempt, 600.0) for attempt in (1, 2, 10, 1024, 10**30)] == [10.0, 20.0, 600.0, 600.0, 600.0]


@pytest.mark.parametrize(
    ("status", "trouble"),
    [
        pytest.param({"phase": "Running"}, "", id="one that runs"),
        pytest.param(
            {"containerStatuses": [{"name": "a", "state": {"waiting": {"reason": "ContainerCreating"}}}]}, "",
            id="one that is being made",
        ),
        pytest.param(
            {"containerStatuses": [{"name": "a", "state": {"waiting": {"reason": "ErrImagePull", "message": "no x"}}}]},
            "container a: ErrImagePull: no x", id="a missing image",
        ),
        pytest.param(
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]},
            "cannot be scheduled: 0/1 nodes", id="no room",
        ),
    ],
)  # fmt: skip
def test_why_a_pod_does_not_run_is_said_in_the_kubelets_words(status: dict[str, Any], trouble: str) -> None:
    assert see("Pod", body("Pod", status=status)).facts["trouble"] == trouble


HELD = {"phase": "Pending", "conditions": [{"type": "PodReadyToStartContainers", "status": "False"}]}
SPEC = {"volumes": [
    {"name": "tmp", "emptyDir": {}},
    {"name": "clients", "secret": {"secretName": "clients"}},
    {"name": "models", "nfs": {"server": "10.0.0.1", "path": "/models"}},
    {"name": "own", "secret": {"secretName": "maybe", "optional": True}},
    {"name": "ca", "configMap": {"name": "ca", "items": [{"key": "root.pem", "path": "root.pem"}]}},
    {"name": "book", "persistentVolumeClaim": {"claimName": "book"}},
    {"name": "token", "projected": {"sources": [
        {"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "kube-root-ca.crt"}}]}},
    {"name": "store", "projected": {"sources": [
        {"secret": {"name": "s3", "items": [{"key": "ID", "path": "ID"}]}},
        {"secret": {"name": "s3", "items": [{"key": "KEY", "path": "KEY"}]}},
        {"secret": {"name": "s3", "items": [{"key": "SESSION", "path": "SESSION"}], "optional": True}}]}},
]}  # fmt: skip


def test_what_a_pod_that_waits_for_its_volumes_cannot_do_without_is_known_with_its_keys() -> None:
    assert see("Pod", body("Pod", spec=SPEC, status=HELD)).facts["mounts"] == (
        ("Secret", "clients", ()),
        ("volume", "models", ()),
        ("ConfigMap", "ca", ("root.pem",)),
        ("PersistentVolumeClaim", "book", ()),
        ("Secret", "s3", ("ID", "KEY")),
    )
    assert not see("Pod", body("Pod", spec=SPEC, status={"phase": "Running"})).facts["mounts"], "nobody asks"


@pytest.mark.parametrize(
    ("status", "died"),
    [
        pytest.param({"phase": "Failed", "containerStatuses": [
            {"name": "main", "state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]},
            "was killed for want of memory: container main: OOMKilled", id="too little memory"),
        pytest.param({"phase": "Failed", "reason": "Evicted", "message": "Pod usage exceeds x."},
            "was evicted: Pod usage exceeds x.", id="too little room"),
        pytest.param({"phase": "Failed", "containerStatuses": [
            {"name": "main", "state": {"terminated": {"reason": "Error", "exitCode": 2}}}]},
            "", id="it failed by itself"),
        pytest.param({"phase": "Running"}, "", id="it runs"),
    ],
)  # fmt: skip
def test_what_ended_a_pod_that_did_not_end_by_itself_is_known(status: dict[str, Any], died: str) -> None:
    assert see("Pod", body("Pod", status=status)).facts["died"] == died


def test_texts_that_are_equal_are_held_once() -> None:
    """Built at run time, or the compiler would make them one already."""
    one, other = ({"".join(("re", "ason")): ["".join(("As", "Expected")), 3, True, None]} for _ in range(2))
    assert one is not other and next(iter(one)) is not next(iter(other))
    first, second = shared(one), shared(other)
    assert first == second == one
    assert next(iter(first)) is next(iter(second))
    assert first["reason"][0] is second["reason"][0]


def job(name: str = "claims", version: str = "4") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "desks", "uid": f"of {name}", "resourceVersion": version}}


def test_what_a_whole_list_does_not_have_is_gone_unless_it_is_newer_than_the_list() -> None:
    watched, key = Watched(), ("desks", "claims")
    watched.child(None, "Deployment", body(version="5"))
    assert watched.gone("Deployment", "", 9, {("desks", "claims-gateway")}) == []
    assert watched.gone("Service", "", 9, set()) == [], "a list of another kind"
    assert watched.gone("Deployment", "elsewhere", 9, set()) == [], "a list of another namespace"
    assert watched.gone("Deployment", "", 4, set()) == [], "it was made after the list"
    assert watched.gone("Deployment", "desks", 5, {("other", "claims-gateway")}) == [key]
    assert not watched.families[key].children


def test_a_job_that_a_whole_list_does_not_have_is_gone_unless_it_is_newer_than_the_list() -> None:
    watched = Watched()
    watched.job(None, job("claims", "4"))
    watched.job("ADDED", job("later", "11"))
    watched.job(None, job("stays", "4"))
    assert watched.jobs_gone("elsewhere", 10, set()) == []
    assert watched.jobs_gone("", 10, {("desks", "stays")}) == [("desks", "claims")]
    assert set(watched.families) == {("desks", "later"), ("desks", "stays")}
