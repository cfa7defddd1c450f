"""Parts of the cluster break under a job that answers all the time: what it says of it, and how it heals.

The desk is left standing between runs, and a fault that ended well is not tried again (faults.py): an interrupted run
goes on. `make e2e-faults ANEW=1` starts anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.e2e import faults
from tests.e2e.conftest import (
    ANEW,
    COWEST,
    JOB,
    LAST_WORDS,
    NAMESPACE,
    ROOT,
    SYSTEM,
    Desk,
    kubectl,
    operator_values,
    reached,
    run,
    wait_for,
)
from tests.e2e.faults import AWAY, Fault, asking_nobody, edit, edited, refusing, scaled_away, there
from tests.e2e.test_loop import answers, bad_model, gateway_address, mode_of_answer, propose, say, values

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.timeout(1800)]
WORSE = "s3://cowest/data/base"  # what the gate must refuse: the base that nobody tuned
OTHER = "s3://cowest/proposed/live-bad"  # what passes the gate and is for the canary to judge
HELD_OUT, FEW = 300, "s3://cowest/data/few.jsonl"
KSERVE, ARGO = ("kserve", "kserve-controller-manager"), ("argo", "workflow-controller")


def faults_values() -> dict[str, Any]:
    """The freight desk; fewer held-out rows and one canary step, so that a trial takes a minute. Rounds by request."""
    told = values()
    told["job"]["rounds"] = {"max": 0}
    told["job"]["data"]["heldOut"] = FEW
    told["job"]["gate"] = {"minHeldOut": HELD_OUT}
    told["job"]["canary"]["steps"] = [{"weightPercent": 50, "minAnswers": 120}]
    return told


@pytest.fixture(scope="module")
def standing(
    operator: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """The freight desk after its baseline; one that stands already is taken as it is."""
    os.environ["COWEST_E2E_KEEP"] = "1"
    faults.mend()
    if ANEW:
        faults.BOOK.unlink(missing_ok=True)
    elif kubectl("get", "collaborationjob", JOB, "-o", "name", check=False):
        with reached(tmp_path_factory.mktemp("desk")) as desk:
            yield _after_baseline(desk)
        return
    desk = request.getfixturevalue("desk")
    rows = (desk.folder / "data" / "held_out.jsonl").read_text("utf-8").splitlines(keepends=True)
    (few := desk.folder / "few.jsonl").write_text("".join(rows[:HELD_OUT]), "utf-8")
    run(*COWEST, "upload", str(few), FEW, **desk.store)
    text = yaml.safe_dump(faults_values())
    run("helm", "upgrade", "--install", JOB, str(ROOT / "charts" / "cowest-domain"), "--namespace", NAMESPACE,
        "-f", "-", stdin=text)  # fmt: skip
    yield _after_baseline(desk)


def _after_baseline(desk: Desk) -> Desk:
    """No candidate on trial, and the pair answers."""
    desk.begun = time.monotonic()
    wait_for(lambda: desk.condition("Ready").get("status") == "True", "Ready", 240)
    with faults.traffic(desk):
        wait_for(lambda: desk.status().get("stable", {}).get("serving") == "Pair", "a pair that answers", 900)
        wait_for(lambda: not on_trial(desk), "the end of what is on trial", 900)
    if not desk.has("proposed/live-bad"):
        bad_model(desk)
    return desk


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    LAST_WORDS.extend(faults.table())


@pytest.fixture(autouse=True)
def fault(request: pytest.FixtureRequest, report: None) -> Iterator[Fault]:
    """What is seen goes into the book when the test ends well."""
    name = request.node.name
    if name in faults.book():
        pytest.skip(f"ended well before, on {faults.book()[name]['commit']}")
    failed = request.session.testsfailed
    seen = Fault(name)
    print(f"\n{name}", flush=True)
    yield seen
    if request.session.testsfailed == failed and (seen.answered or seen.failed):
        faults.note(seen)


# ---------------------------------------------------------------- what the job is at
def on_trial(desk: Desk) -> dict[str, Any]:
    return dict(desk.status().get("candidate") or {})


def last(desk: Desk) -> int:
    """Number of the trial that was decided last; the status keeps the last ten."""
    rounds = desk.rounds()
    return int(rounds[-1]["number"]) if rounds else -1


def ends(desk: Desk, after: int, seconds: float = 600) -> dict[str, Any]:
    """The outcome of the trial that follows number `after`."""
    wait_for(lambda: last(desk) > after and not on_trial(desk), "the end of the trial", seconds)
    return desk.rounds()[-1]


def goes_on(desk: Desk, fault: Fault, after: int, seconds: float = 240) -> None:
    """The step that was broken is done: the next one runs. The rest of the trial is of no interest here."""
    fault.heals(lambda: bool(pods_on_trial(desk, "evaluate")), "the next step", seconds)
    say(desk, "rollback")
    assert ends(desk, after)["reason"] == "RolledBackByPerson"


def judged(desk: Desk, after: int, seconds: float = 400) -> dict[str, Any]:
    """What live answers came to; a candidate that they promoted is taken back, so that the next test finds the desk as
    it was."""
    outcome = ends(desk, after, seconds)
    better, worse = ("BetterOfflineAndLive", "BetterOfflineNotWorseLive"), ("WorseOnLiveTraffic", "NotBetterLive")
    assert outcome["reason"] in better + worse, outcome
    assert int(outcome["liveAnswers"]) >= 120, outcome
    if outcome["decision"] == "Promoted":
        say(desk, "rollback")
        wait_for(lambda: desk.rounds()[-1]["reason"] == "RolledBackByPerson", "the pair before", 120)
    return outcome


def is_ready(job: str = JOB) -> bool:
    return condition(job, "Ready").get("status") == "True"


def condition(job: str, kind: str) -> dict[str, Any]:
    text = kubectl("get", "collaborationjob", job, "-o", "json", check=False)
    status = (json.loads(text).get("status") or {}) if text else {}
    return next((dict(c) for c in status.get("conditions", ()) if c["type"] == kind), {})


def is_well(job: str = JOB) -> bool:
    return condition(job, "Degraded").get("status") == "False"


def step_pods(step: str, job: str = JOB) -> list[str]:
    """The pods of a step that run now."""
    labels = f"cowest.dev/job={job},app.kubernetes.io/component=step"
    found = kubectl("get", "pods", "-l", labels, "--field-selector=status.phase=Running", "-o", "name").split()
    return [name for name in found if step in name]


def pods_on_trial(desk: Desk, step: str) -> list[str]:
    """Those of the trial that is on: an earlier one's may still be ending."""
    number = on_trial(desk).get("round")
    return [name for name in step_pods(step) if f"{JOB}-r{number}-{step}" in name]


def in_step(desk: Desk, step: str, seconds: float = 240) -> list[str]:
    wait_for(lambda: bool(pods_on_trial(desk, step)), f"a pod of the step {step}", seconds)
    return pods_on_trial(desk, step)


def in_canary(desk: Desk) -> None:
    """A candidate has traffic: the round's that is on trial, else one that the gate lets pass."""
    if on_trial(desk).get("origin") == "Proposal":
        wait_for(lambda: not on_trial(desk), "the end of what was proposed before", 300)
    if not on_trial(desk):
        propose(desk, OTHER)

    def has_traffic() -> bool:
        status = desk.status()
        return bool(status.get("traffic", {}).get("candidatePercent")) and on_trial(desk).get("stage") == "Canary"

    wait_for(has_traffic, "a canary", 600)


def replicas(part: str) -> str:
    return kubectl("get", "deployment", f"{JOB}-{part}", "-o", "jsonpath={.status.availableReplicas}", check=False)


# ---------------------------------------------------------------- keys and children
def test_a_key_that_is_rotated_reaches_the_pods_without_a_restart(standing: Desk, fault: Fault) -> None:
    pod = kubectl("get", "pods", "-l", "app.kubernetes.io/component=gateway", "-o", "name").split()[0]
    restarts = ("get", pod, "-o", "jsonpath={.status.containerStatuses[*].restartCount}")
    before, key = kubectl(*restarts), f"key-{time.time_ns()}"
    shown = ("exec", pod, "-c", "gateway", "--", "sh", "-c", "grep -rh . /etc/cowest/strong-keys/")
    with fault.users(standing):
        kubectl("patch", "secret", "strong", "--type=merge", "-p", json.dumps({"stringData": {"api-key": key}}))
        fault.heals(lambda: key in kubectl(*shown, check=False), "the new key is there", 180)
    fault.nobody_noticed()
    assert kubectl(*restarts) == before


def test_the_stable_server_is_deleted_by_hand(standing: Desk, fault: Fault) -> None:
    name = kubectl("get", "inferenceservices", "-o", "name").split()[0]
    uid = kubectl("get", name, "-o", "jsonpath={.metadata.uid}")
    ready = "jsonpath={.metadata.uid} {.status.conditions[?(@.type=='Ready')].status}"

    def another() -> bool:
        now = kubectl("get", name, "-o", ready, check=False).split()
        return len(now) == 2 and now[0] != uid and now[1] == "True"

    with fault.users(standing):
        fault.begins()
        kubectl("delete", name, "--wait=false")
        fault.said(JOB, "the strong model answers alone while the server of round")
        fault.heals(another, "another server", 180)
        wait_for(lambda: "answers." in condition(JOB, "Ready")["message"], "the pair", 60)
    fault.nobody_noticed()


def test_children_edited_and_deleted_by_hand_come_back(standing: Desk, fault: Fault) -> None:
    """All that stands between users and their answers, save the gateway's only pod."""
    service, routing = f"service/{JOB}-gateway", f"configmap/{JOB}-routing"
    shown = ("get", routing, "-o", r"jsonpath={.data.routing\.json}")
    version = int(json.loads(kubectl(*shown))["version"])
    gone = [f"deployment/{JOB}-proxy", f"deployment/{JOB}-observer", f"rolebinding/{JOB}-gateway", routing]
    with fault.users(standing):
        kubectl("delete", *gone, "--wait=false")
        kubectl("scale", f"deployment/{JOB}-gateway", "--replicas=3")
        kubectl("patch", service, "--type=merge", "-p", '{"metadata":{"labels":{"cowest.dev/job":"nobody"}}}')

        def back() -> bool:
            there_again = all(kubectl("get", name, "-o", "name", check=False) for name in gone)
            parts = all(replicas(part) == "1" for part in ("gateway", "proxy", "observer"))
            label = kubectl("get", service, "-o", r"jsonpath={.metadata.labels.cowest\.dev/job}")
            return there_again and parts and label == JOB

        fault.heals(back, "all of them as they were", 120)
    assert int(json.loads(kubectl(*shown))["version"]) > version, "newer than what the gateway's pod still follows"
    fault.nobody_noticed()


def test_a_workflow_deleted_by_hand_is_submitted_again(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        propose(standing, WORSE)
        in_step(standing, "publish")
        kubectl("delete", "workflows", "-l", f"cowest.dev/job={JOB}", "--wait=false")
        goes_on(standing, fault, before)
    fault.nobody_noticed()


# ---------------------------------------------------------------- steps
def test_a_step_whose_pod_is_taken_away_runs_again(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        propose(standing, WORSE)
        kubectl("delete", *in_step(standing, "publish"), "--grace-period=0", "--force")
        goes_on(standing, fault, before)
    fault.nobody_noticed()


def heals_by_edit(desk: Desk, fault: Fault, bad: Mapping[str, Any], *words: str) -> None:
    """A step that cannot run as the manifest says: it is named, and an edit lets it."""
    before = last(desk)
    back = {name: None for name in bad}
    with fault.users(desk):
        with edited({"training": bad}, {"training": back}):
            propose(desk, WORSE)
            fault.begins()
            fault.said(JOB, *words, seconds=300)
            assert is_ready()
        goes_on(desk, fault, before)
        wait_for(is_well, "no trouble", 60)
    fault.nobody_noticed()


def test_a_step_that_needs_more_memory_than_it_may_have_is_named_and_heals_by_an_edit(
    standing: Desk, fault: Fault
) -> None:
    little = {"limits": {"memory": "96Mi"}, "requests": {"memory": "64Mi"}}
    heals_by_edit(standing, fault, {"resources": little}, "OOMKilled")


def test_a_step_that_the_kubelet_evicts_is_named_and_heals_by_an_edit(standing: Desk, fault: Fault) -> None:
    little = {"limits": {"ephemeral-storage": "100Ki"}, "requests": {"cpu": "250m"}}
    heals_by_edit(standing, fault, {"resources": little}, "Evicted", "ephemeral")


def test_a_step_whose_image_is_missing_is_named_and_heals_by_an_edit(standing: Desk, fault: Fault) -> None:
    other = {"spec": {"containers": [{"name": "main", "image": "docker.io/cowest/training:never-built"}]}}
    heals_by_edit(standing, fault, {"podTemplate": other}, "ErrImagePull", "ImagePullBackOff")


# ---------------------------------------------------------------- what is around the job
def test_the_workflow_controller_is_away_for_longer_than_a_step(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        with scaled_away(*ARGO):
            propose(standing, WORSE)
            fault.begins()
            wait_for(lambda: bool(on_trial(standing)), "the trial", 60)
            fault.said(JOB, "waits for the controller of Argo Workflows")
            time.sleep(AWAY / 4)
            assert is_ready()
        goes_on(standing, fault, before)
    fault.nobody_noticed()


def test_while_new_workflows_are_refused_the_policys_words_are_said(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        with there(*refusing("argoproj.io", "workflows", "no steps on a Thursday")):
            time.sleep(5)  # until the API server has compiled the policy
            propose(standing, WORSE)
            fault.begins()
            fault.said(JOB, "no steps on a Thursday")
            assert is_ready()
        goes_on(standing, fault, before)
    fault.nobody_noticed()


def test_while_a_webhook_for_configmaps_is_away_nothing_is_decided_and_all_is_said(
    standing: Desk, fault: Fault
) -> None:
    before = last(standing)
    with fault.users(standing):
        with there(asking_nobody("", "configmaps")):
            propose(standing, WORSE)
            fault.begins()
            fault.said(JOB, "away.e2e.cowest.dev")
            assert is_ready() and not on_trial(standing), "no trial without its frozen manifest"
        goes_on(standing, fault, before)
        wait_for(is_well, "no trouble", 60)
    fault.nobody_noticed()


def test_kserve_is_away_when_a_candidate_is_due(standing: Desk, fault: Fault) -> None:
    """Its webhook is the same process: a new server is refused by the API server."""
    before = last(standing)
    with fault.users(standing):
        with scaled_away(*KSERVE):
            propose(standing, OTHER)
            wait_for(lambda: on_trial(standing).get("stage") == "Canary", "the canary", 300)
            fault.begins()
            fault.said(JOB, "waits for the controller of KServe", "kserve-webhook-server")
            time.sleep(AWAY / 4)
            assert is_ready()
        fault.heals(lambda: bool(standing.status()["traffic"]["candidatePercent"]), "the candidate has traffic", 180)
        judged(standing, before)
    fault.nobody_noticed()


def test_the_object_store_is_away_while_a_round_trains(standing: Desk, fault: Fault) -> None:
    """The round is left to the next test, which takes the store away again in its canary."""
    tuned = int(standing.status()["state"]["tunedRounds"])
    with fault.users(standing):
        edit({"rounds": {"max": tuned + 1, "stopAfterRoundsWithoutGain": 0}})
        in_step(standing, "feedback")
        with scaled_away(NAMESPACE, "minio"):
            fault.begins()
            fault.said(JOB, "object store", "minio")
            time.sleep(max(0.0, AWAY - (time.monotonic() - fault.begun)))
            assert is_ready()
        fault.heals(is_well, "no trouble", 180)
        wait_for(lambda: any(pods_on_trial(standing, step) for step in ("dpo", "evaluate")), "the next step", 300)
    fault.nobody_noticed()


def test_the_object_store_is_away_in_a_canary(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        in_canary(standing)
        with scaled_away(NAMESPACE, "minio"):
            fault.begins()
            fault.said(JOB, "object store", "minio")
            time.sleep(max(0.0, AWAY - (time.monotonic() - fault.begun)))
            assert is_ready() and on_trial(standing).get("stage") == "Canary"
        fault.heals(is_well, "no trouble", 180)
        judged(standing, before)
    fault.nobody_noticed()


def test_the_strong_endpoint_is_away(standing: Desk, fault: Fault) -> None:
    with faults.traffic(standing) as asked, scaled_away(NAMESPACE, "strong"):
        fault.begins()
        fault.said(JOB, "the strong endpoint")
        wait_for(
            lambda: not is_ready(), "Ready is False: every answer is an error, as `whenStrongFails: Fail` says", 60
        )
    fault.answered, fault.failed = asked.answered, asked.failed
    assert fault.failed, "`whenStrongFails: Fail` says that the caller hears of it"
    url = f"http://{gateway_address()}/v1"
    fault.heals(lambda: answers(url), "an answer: each gateway tries the endpoint once in its circuit's rest", 60)
    with faults.traffic(standing) as after:
        wait_for(lambda: is_ready() and is_well(), "no trouble", 120)
        time.sleep(5)
    assert after.answered and not after.failed


def test_the_strong_endpoint_is_away_and_the_draft_stands_in(standing: Desk, fault: Fault) -> None:
    """The edit rolls the gateway, which is waited for: before it is done, one that says `Fail` may be asked."""
    mounted = ("get", f"deployment/{JOB}-gateway", "-o",
               "jsonpath={.spec.template.spec.volumes[?(@.name=='job')].configMap.name}")  # fmt: skip
    url, before = f"http://{gateway_address()}/v1", kubectl(*mounted)
    (row, *_) = (standing.folder / "data" / "live.jsonl").read_text("utf-8").splitlines()
    mode = lambda: mode_of_answer(url, json.loads(row)["query"])  # noqa: E731
    declared = standing.job()["spec"]["collaboration"]["whenStrongFails"]
    with edited({"collaboration": {"whenStrongFails": "WeakAlone"}}, {"collaboration": {"whenStrongFails": declared}}):
        wait_for(lambda: kubectl(*mounted) != before, "the edit to reach the gateway", 60)
        kubectl("rollout", "status", f"deployment/{JOB}-gateway", "--timeout=180s")
        with fault.users(standing):
            with scaled_away(NAMESPACE, "strong"):
                fault.begins()
                fault.said(JOB, "whenStrongFails: WeakAlone")
                assert mode() == "WeakAlone" and not is_well()
                time.sleep(AWAY / 4)
                assert mode() == "WeakAlone" and is_ready()
            fault.heals(lambda: mode() == "Pair", "the pair answers", 60)
            wait_for(is_well, "no trouble", 120)
    fault.nobody_noticed()


# ---------------------------------------------------------------- edits and other jobs
def test_an_edit_of_the_pair_in_the_middle_of_a_trial_is_tried_next_and_can_be_taken_back(
    standing: Desk, fault: Fault
) -> None:
    before, refine = last(standing), standing.job()["spec"]["collaboration"]["prompts"]["refine"]
    polite = {"collaboration": {"prompts": {"refine": refine + " Please."}}}
    with fault.users(standing):
        propose(standing, WORSE)
        in_step(standing, "evaluate")
        with edited(polite, {"collaboration": {"prompts": {"refine": refine}}}):
            wait_for(lambda: on_trial(standing).get("origin") == "Edit", "the edit on trial", 60)
            assert standing.rounds()[-1]["reason"] == "SpecChanged"
        fault.heals(lambda: last(standing) > before + 1 and not on_trial(standing), "the end of the edit", 120)
    # What was on trial before is tried again behind it, and may be over by now.
    assert "EditWithdrawn" in [each["reason"] for each in standing.rounds() if each["number"] > before + 1]
    fault.nobody_noticed()


def test_an_edit_in_the_middle_of_a_canary_shortens_nothing(standing: Desk, fault: Fault) -> None:
    before, steps = last(standing), standing.job()["spec"]["canary"]["steps"]
    back = {"canary": {"steps": steps}, "strong": {"timeoutSeconds": 60}}
    with fault.users(standing):
        in_canary(standing)
        with edited({"canary": {"steps": []}, "strong": {"timeoutSeconds": 50}}, back):
            judged(standing, before)
    fault.nobody_noticed()


SECOND = f"{JOB}-r9"  # as objects of the first job are called


def second(desk: Desk) -> None:
    """Another job in the namespace, by a Secret of its own."""
    job = desk.job()
    strong = {**job["spec"]["strong"], "apiKeySecretRefs": [{"name": "later", "key": "api-key"}]}
    metadata = {"name": SECOND, "namespace": NAMESPACE}
    body = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": metadata,
            "spec": {**job["spec"], "strong": strong}}  # fmt: skip
    kubectl("apply", "-f", "-", stdin=json.dumps(body))


def give_key() -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later", "namespace": NAMESPACE},
              "stringData": {"api-key": "e2e-key"}}  # fmt: skip
    kubectl("apply", "-f", "-", stdin=json.dumps(secret))


def test_a_second_job_whose_secret_is_missing_says_so_and_is_ready_once_it_is_there(
    standing: Desk, fault: Fault
) -> None:
    kubectl("delete", "secret", "later", "--ignore-not-found")
    with fault.users(standing):
        fault.begins()
        second(standing)
        fault.said(SECOND, "Secret later with api-key")
        give_key()
        fault.heals(lambda: is_ready(SECOND), "Ready", 240)
        wait_for(lambda: is_ready() and is_well(), "no trouble of the first job", 60)
    fault.nobody_noticed()


def test_a_job_is_deleted_in_the_middle_of_a_round_and_the_one_beside_it_goes_on(standing: Desk, fault: Fault) -> None:
    before, routing = last(standing), kubectl("get", "configmap", f"{JOB}-routing", "-o", "jsonpath={.metadata.uid}")
    give_key()
    kubectl("delete", "collaborationjob", SECOND, "--ignore-not-found", "--timeout=60s")
    second(standing)
    with fault.users(standing):
        wait_for(lambda: bool(step_pods("sft", SECOND)), "the second job's first step", 240)
        propose(standing, WORSE)  # both are at work
        in_step(standing, "publish")
        kubectl("delete", "collaborationjob", SECOND, "--timeout=20s")
        kinds = "pods,workflows,workflowtemplates,configmaps,deployments,services,inferenceservices"
        left = ("get", kinds, "-l", f"cowest.dev/job={SECOND}", "-o", "name")
        fault.heals(lambda: not kubectl(*left).strip(), "nothing of it is left", 120)
        assert ends(standing, before)["decision"] == "Refused"
    assert kubectl("get", "configmap", f"{JOB}-routing", "-o", "jsonpath={.metadata.uid}") == routing
    fault.nobody_noticed()


# ---------------------------------------------------------------- the operator
def test_the_operator_that_writes_is_killed_and_the_other_takes_over(standing: Desk, fault: Fault) -> None:
    held = ("-n", SYSTEM, "get", "lease", "-o", "jsonpath={.items[0].spec.holderIdentity}")

    def writer() -> str:
        """After a restart the lease is for a while that of a pod that is gone."""
        return kubectl("-n", SYSTEM, "get", "pod", kubectl(*held).split("_")[0], "-o", "name", check=False).strip()

    wait_for(lambda: bool(writer()), "an operator that writes", 60)
    with fault.users(standing):
        run("kubectl", "-n", SYSTEM, "delete", writer(), "--grace-period=0", "--force")
        edit({"gateway": {"replicas": 2}})
        fault.heals(lambda: replicas("gateway") == "2", "the second gateway", 120)
        edit({"gateway": {"replicas": 1}})
        wait_for(lambda: replicas("gateway") == "1", "one gateway again", 120)
    fault.nobody_noticed()


def test_a_job_can_be_deleted_while_the_operator_is_away(standing: Desk, fault: Fault) -> None:
    job = standing.job()
    other = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": {"name": "passing"},
             "spec": {**job["spec"], "suspend": True}}  # fmt: skip
    kubectl("apply", "-f", "-", stdin=json.dumps(other))
    made = ("get", "deployment", "passing-gateway", "-o", "name")
    wait_for(lambda: bool(kubectl(*made, check=False)), "its gateway", 60)
    with fault.users(standing), scaled_away(SYSTEM, "cowest-operator", 2):
        kubectl("delete", "collaborationjob", "passing", "--timeout=20s")
        fault.heals(lambda: not kubectl(*made, check=False), "the garbage collector", 60)
    assert is_ready(), "the job beside it is not touched"
    fault.nobody_noticed()


def test_a_job_that_is_to_be_erased_waits_for_the_operator_that_is_away(standing: Desk, fault: Fault) -> None:
    job, kept = standing.job(), f"desks/{NAMESPACE}/leaving/"
    spec = {**job["spec"], "suspend": True, "deletionPolicy": {"models": "Delete", "traces": "Delete"}}
    other = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": {"name": "leaving"}, "spec": spec}
    kubectl("delete", "collaborationjob", "leaving", "--ignore-not-found", "--timeout=420s")
    kubectl("apply", "-f", "-", stdin=json.dumps(other))
    made = ("get", "deployment", "leaving-gateway", "-o", "jsonpath={.status.availableReplicas}")
    wait_for(lambda: kubectl(*made, check=False) == "1", "its gateway", 120)
    url = f"http://{gateway_address('leaving')}/v1"
    wait_for(lambda: answers(url), "an answer", 60)
    wait_for(lambda: standing.has(kept, ".parquet"), "its trace", 60)
    shown = ("get", "collaborationjob", "leaving", "-o",
             "jsonpath={.metadata.deletionTimestamp} {.metadata.finalizers}")  # fmt: skip
    with fault.users(standing):
        with scaled_away(SYSTEM, "cowest-operator", 2):
            kubectl("delete", "collaborationjob", "leaving", "--wait=false")
            time.sleep(AWAY / 4)
            assert kubectl(*shown).split()[1:] == ['["cowest.dev/artifacts"]'] and answers(url)
            assert standing.has(kept, ".parquet")
        fault.heals(lambda: not kubectl(*shown, check=False), "the job is gone", 420)
    assert not standing.has(kept)
    fault.nobody_noticed()


def test_a_second_operator_by_mistake_decides_nothing_twice(standing: Desk, fault: Fault) -> None:
    before, twin = last(standing), "cowest-twin"
    with fault.users(standing):
        run("helm", "install", twin, str(ROOT / "charts" / "cowest-operator"), "--namespace", twin,
            "--create-namespace", "--wait", "--timeout", "3m", *operator_values(), "--set", "crds.install=false",
            "--set", "replicas=1")  # fmt: skip
        try:
            propose(standing, WORSE)
            assert ends(standing, before)["decision"] == "Refused"
        finally:
            run("helm", "uninstall", twin, "--namespace", twin, "--wait")
        fault.heals(lambda: is_ready() and is_well(), "Ready", 60)
    numbers = [row["number"] for row in standing.rounds()]
    assert numbers == sorted(set(numbers)) and numbers[-1] == before + 1
    fault.nobody_noticed()


# ---------------------------------------------------------------- moves
def release(folder: str) -> None:
    """Both charts, the operator's first; values of today that the first charts do not know are left out."""
    operator, domain = ((ROOT / folder / f"cowest-{part}{'-0.1.0.tgz' if 'first' in folder else ''}") for part in
                        ("operator", "domain"))  # fmt: skip
    known = [x for x in operator_values() if x != "--set" and ("first" not in folder or "servingRay" not in x)]
    sets = [x for value in known for x in ("--set", value)]
    run("helm", "upgrade", "cowest-operator", str(operator), "--namespace", SYSTEM, "--wait", "--timeout", "3m", *sets)
    run("helm", "upgrade", JOB, str(domain), "--namespace", NAMESPACE, "-f", "-", stdin=yaml.safe_dump(faults_values()))


def test_the_charts_are_upgraded_from_the_first_ones_in_the_middle_of_a_canary(standing: Desk, fault: Fault) -> None:
    before = last(standing)
    with fault.users(standing):
        release("tests/charts-first")
        wait_for(is_ready, "Ready by the first charts", 120)
        in_canary(standing)
        frozen = f"configmap/{JOB}-r{on_trial(standing)['round']}"
        uid = ("get", frozen, "-o", "jsonpath={.metadata.uid}")
        manifest = kubectl(*uid)
        release("charts")
        fault.begins()
        assert on_trial(standing).get("stage") == "Canary" and kubectl(*uid) == manifest
        judged(standing, before)
    fault.nobody_noticed()


def test_the_gateway_moves_to_a_rayservice_and_back(standing: Desk, fault: Fault) -> None:
    """Both are in one Service while they change places. Needs KubeRay and the image `serving:TAG-ray`."""
    if "rayservices" not in run("kubectl", "api-resources", "--api-group=ray.io", "-o", "name", check=False):
        pytest.skip("no KubeRay in this cluster")
    ray, deployment = ("rayservice", f"{JOB}-ray"), ("deployment", f"{JOB}-gateway")

    def only(kind: str, name: str, other: tuple[str, str]) -> bool:
        there_is = kubectl("get", kind, name, "-o", "name", check=False)
        return bool(there_is) and not kubectl("get", *other, "-o", "name", check=False)

    with fault.users(standing):
        edit({"gateway": {"engine": "RayServe"}})
        took = wait_for(lambda: only(*ray, deployment), "the gateway on Ray alone", 600)
        print(f"   {took:6.1f} s  the gateway answers through a RayService", flush=True)
        with faults.traffic(standing) as by_ray:
            time.sleep(20)
        assert by_ray.answered and not by_ray.failed
        edit({"gateway": {"engine": "ASGI"}})
        fault.heals(lambda: only(*deployment, ray), "the gateway in a Deployment alone", 300)
        wait_for(is_well, "no trouble", 60)
    fault.nobody_noticed()
