"""A job in a cluster, for the verbs: read by its status, spoken to by annotations. As the caller, by their kubeconfig.

What people say is an annotation `cowest.dev/action.<id>`; the operator takes each in once and notes the id of the last
in its status. So a new one sorts after all that are there, and those that were taken in go with the same patch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from cowest_cli import jobs
from cowest_cli.options import Where
from cowest_operator import api, manifest, people, story
from cowest_operator.objects.common import store_of
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_RETRY, StepError

ACTION = "cowest.dev/action."  # as cowest_operator.observe has it, which would load much more
MANAGER = "kubectl-cowest"  # field manager of what this module writes
ANSWER_WITHIN = 20.0  # seconds of one request
TRIES = 20  # to write between two writes of the operator
LOOK_EVERY = 0.5  # seconds, where a watch is not allowed
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


# ---------------------------------------------------------------- the job as the API server has it
@dataclass(frozen=True)
class Seen:
    """One version of the job."""

    body: Mapping[str, Any]

    @property
    def status(self) -> api.Status:
        return story.read(self.body.get("status"))

    @property
    def version(self) -> str:
        return str(self.body["metadata"]["resourceVersion"])

    @property
    def last_transition(self) -> str:
        return str((self.body.get("status") or {}).get("lastTransition") or "")

    def actions(self) -> list[str]:
        """Ids of all that was said and is still there, oldest first."""
        return sorted(name.removeprefix(ACTION) for name in self._annotations() if name.startswith(ACTION))

    def pending(self) -> Iterator[api.Action]:
        """What was said and not yet taken in; what cannot be read the operator leaves out too."""
        last = self.status.last_action
        for action_id in self.actions():
            try:
                if action_id > last:
                    yield api.Action(
                        **{"id": action_id, "why": "", **json.loads(self._annotations()[ACTION + action_id])}
                    )
            except (ValueError, TypeError):
                continue

    def _annotations(self) -> Mapping[str, str]:
        return self.body["metadata"].get("annotations") or {}

    def notes(self) -> Iterator[str]:
        """Why what is shown may not be all."""
        metadata, shown = self.body["metadata"], self.body.get("status") or {}
        if "deletionTimestamp" in metadata:
            yield "The job is being deleted."
        if int(shown.get("observedGeneration") or 0) < int(metadata["generation"]):
            yield "No operator has looked at the last edit of the manifest yet."
        for action in self.pending():
            yield f"{action.verb} by {action.by} is recorded and not taken in yet."


def refusal(status: api.Status, action: api.Action) -> str | None:
    """Why the operator would not follow, in the words it has for it; None when it would."""
    no = people.refusal(status, action.verb)
    return f"{action.verb} by {action.by}: {no}" if no else None


def with_action(seen: Seen, action: api.Action) -> dict[str, str | None]:
    """The patch: one more said, and those taken in gone."""
    said = {name: value for name, value in jobs.said(action).items() if name != "id"}
    last = seen.status.last_action
    gone = dict.fromkeys(ACTION + action_id for action_id in seen.actions() if action_id <= last)
    return {**gone, ACTION + action.id: json.dumps(said, ensure_ascii=False)}


# ---------------------------------------------------------------- the API server
class Job:
    """One CollaborationJob of a cluster. Raises `StepError` in words for whoever sits at the terminal."""

    def __init__(self, where: Where) -> None:
        assert where.job is not None
        self.name = where.job
        self._configuration = _configuration(where)
        self.namespace = where.namespace or _namespace(where)
        self._client = client.ApiClient(self._configuration)
        self._jobs: Any = client.CustomObjectsApi(self._client)  # its answers are bare objects
        self._address = (api.GROUP, api.VERSION, self.namespace, api.PLURAL)

    def see(self) -> Seen:
        with self._in_words():
            return Seen(self._jobs.get_namespaced_custom_object(*self._address, self.name, **_patience()))

    def known(self) -> Seen:
        """Once an operator has written down how far the job is."""
        seen = self.see()
        if "state" not in (seen.body.get("status") or {}):
            conditions = (seen.body.get("status") or {}).get("conditions") or ()
            why = " ".join(c["message"] for c in conditions if c["type"] == api.DEGRADED)
            raise StepError(
                f"{self}: wanted the state of a job, saw none."
                f" {why or f'Is an operator running, and does it watch the namespace {self.namespace}?'}"
            )
        return seen

    def events(self, seen: Seen) -> list[dict[str, Any]]:
        """What the operator said of it, oldest first; the cluster forgets events after a while.

        By its uid: those of a job outlive it, and another may have its name.
        """
        about = f"involvedObject.uid={seen.body['metadata']['uid']}"
        with self._in_words():
            try:
                found = client.CoreV1Api(self._client).list_namespaced_event(
                    self.namespace, field_selector=about, **_patience()
                )
            except ApiException as error:
                if error.status == 403:  # they are not needed for an answer
                    return []
                raise
        events = [
            {
                "time": _time(e.event_time or e.last_timestamp),
                "type": e.type,
                "reason": e.reason,
                "message": e.message or "",
            }
            for e in found.items
        ]
        return sorted(events, key=lambda event: float(event["time"]))

    # ------------------------------------------------------------ asking
    def shown(self, seen: Seen) -> dict[str, Any]:
        """What `status -o json` has beside the status."""
        status = seen.body.get("status") or {}
        return {
            "job": self.name,
            "namespace": self.namespace,
            "gateway": f"http://{self.name}-gateway.{self.namespace}.svc/v1",
            "traffic": status.get("traffic"),
            "traces": status.get("traces"),
            "notTakenIn": [asdict(action) for action in seen.pending()],
        }

    def caller(self, by: str | None) -> str:
        """Whom the API server takes the caller for; `--by` says who that is, and hides nobody."""
        try:
            review: Any = client.AuthenticationV1Api(self._client)
            answer = review.create_self_subject_review({}, **_patience())
            user = str(answer.status.user_info.username)
        except (ApiException, urllib3.exceptions.HTTPError, AttributeError):  # older than Kubernetes 1.28
            return jobs.who(by)
        return f"{by} (as {user})" if by and by != user else user

    def open_store(self, seen: Seen) -> str:
        """URI of the job's part of its bucket."""
        spec = dict(seen.body["spec"])
        collaboration = {k: v for k, v in spec["collaboration"].items() if k != "promptsConfigMapRef"}
        document = {"metadata": seen.body["metadata"], "spec": {**spec, "collaboration": collaboration}}
        document = manifest.resolve_prompts(document, {}, asdict(DEFAULT_PROMPTS[collaboration["draft"]]))
        job = api.parse_job(document)
        place = job.spec.object_store
        if place is None:
            raise StepError(f"{self}: wanted spec.objectStore, saw none: nothing of the job is kept.")
        jobs.reach(place)
        return store_of(job, self.namespace)

    # ------------------------------------------------------------ saying
    def say(self, verb: api.Verb, why: str, by: str, model: str | None, now: bool = False) -> tuple[Seen, api.Action]:
        """Recorded on the version that it was judged by. Raises `StepError` for what the operator would not follow."""
        for attempt in range(TRIES):
            seen = self.see()
            if "deletionTimestamp" in seen.body["metadata"]:
                raise StepError(f"{self}: wanted a job that stays, saw one that is being deleted.")
            last = next(reversed(list(seen.pending())), None)
            if last and (last.verb, last.why, last.by, last.model, last.now) == (verb, why, by, model, now):
                return seen, last  # said a moment ago and not taken in yet: once is enough
            known = (seen.status.last_action, *seen.actions())
            action = api.Action(people.next_id(known, verb, time.time_ns()), verb, by, why, time.time(), model, now)
            if not any(seen.pending()) and (no := refusal(seen.status, action)):
                raise StepError(no)
            metadata = {"resourceVersion": seen.version, "annotations": with_action(seen, action)}
            try:
                with self._in_words():
                    body = self._jobs.patch_namespaced_custom_object(
                        *self._address, self.name, {"metadata": metadata}, field_manager=MANAGER, **_patience()
                    )
                return Seen(body), action
            except _ConflictError:
                time.sleep(0.01 * attempt)  # the operator wrote in between: look again
        raise StepError(f"{self}: wanted to write between two writes of others, saw none.", EXIT_RETRY)

    def outcome(self, seen: Seen, action: api.Action, timeout: float) -> str:
        """What came of it, once the operator has taken it in. Raises `StepError` when it did not follow, or in time."""
        end = time.monotonic() + timeout
        for now in self._versions(seen, end):
            if now.status.last_action >= action.id:
                if no := refusal(seen.status, action):
                    raise StepError(no)
                mine = now.status.last_action == action.id and now.last_transition
                return now.last_transition if mine else f"{action.verb} by {action.by} is taken in"
            seen = now
        degraded = next((c for c in seen.status.conditions if c.type == api.DEGRADED and c.status == "True"), None)
        raise StepError(
            f"{self}: {action.verb} by {action.by} is recorded, and after {timeout:.0f} s no operator has taken it in."
            f" {degraded.message if degraded else 'Is one running?'} The same command waits on and says it only once.",
            EXIT_RETRY,
        )

    def _versions(self, seen: Seen, end: float) -> Iterator[Seen]:
        """Each version after `seen`, as a watch shows them; where it may not watch or is cut off, looks."""
        left = max(1, round(end - time.monotonic()))
        with suppress(StepError), self._in_words():  # looking says what there is to say
            stream = watch.Watch().stream(  # type: ignore[no-untyped-call]
                self._jobs.list_namespaced_custom_object, *self._address,
                field_selector=f"metadata.name={self.name}", resource_version=seen.version,
                timeout_seconds=left, _request_timeout=left + ANSWER_WITHIN,
            )  # fmt: skip
            for event in stream:
                if event["type"] == "DELETED":
                    break
                yield Seen(event["object"])
        while time.monotonic() < end:
            yield self.see()
            time.sleep(LOOK_EVERY)

    # ------------------------------------------------------------ errors
    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            raise self._in_short(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise StepError(
                f"{self._configuration.host}: wanted an answer of the API server, saw: {reason}", EXIT_RETRY
            ) from error

    def _in_short(self, error: ApiException) -> StepError:
        said = _status_of(error)
        words = str(said.get("message") or error.reason)
        if error.status == 409:
            return _ConflictError(f"{self}: {words}", EXIT_RETRY)
        if error.status == 401:
            return StepError(
                f"{self._configuration.host}: wanted a login that the API server knows, saw: {words}."
                " Log in again, or name another --context."
            )
        if error.status == 403:
            return StepError(f"{self}: wanted the right to do so, saw none: {words}.")
        if error.status == 404:
            return self._not_there(said)
        code = EXIT_RETRY if error.status in (0, 429) or (error.status or 0) >= 500 else EXIT_BAD_INPUT
        return StepError(f"{self}: the API server said {error.status}: {words}", code)

    def _not_there(self, said: Mapping[str, Any]) -> StepError:
        """No such job, or a cluster that does not know of such jobs."""
        if (said.get("details") or {}).get("name") != self.name:
            return StepError(
                f"{self._configuration.host}: wanted a cluster that knows {api.PLURAL}.{api.GROUP}, saw none installed."
                " Install the chart cowest-operator, or `cowest crd | kubectl apply -f -`; or name another --context."
            )
        try:
            found = self._jobs.list_namespaced_custom_object(*self._address, **_patience())["items"]
        except (ApiException, urllib3.exceptions.HTTPError):
            return StepError(f"{self}: there is no such job. See `kubectl get cwj -A`.")
        names = ", ".join(sorted(item["metadata"]["name"] for item in found)) or "none"
        return StepError(
            f"{self}: there is no such job; in namespace {self.namespace}: {names}. Another one is named with -n."
        )


class _ConflictError(StepError):
    """Somebody wrote in between."""


def _patience() -> dict[str, Any]:
    return {"_request_timeout": ANSWER_WITHIN}


def _status_of(error: ApiException) -> dict[str, Any]:
    """The API server's own words; what is not there at all it answers as plain text."""
    try:
        said = json.loads(error.body or "")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _time(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0


# ---------------------------------------------------------------- which cluster
def _file(where: Where) -> str:
    if where.kubeconfig and not where.kubeconfig.is_file():
        raise StepError(f"--kubeconfig {where.kubeconfig}: wanted a kubeconfig, saw no such file.")
    return str(where.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")


def _configuration(where: Where) -> client.Configuration:
    """By the kubeconfig; without one the account of the pod this runs in."""
    configuration, file = client.Configuration(), _file(where)
    configuration.retries = False
    try:
        config.load_kube_config(file, where.context, configuration)  # type: ignore[no-untyped-call]
        return configuration
    except (config.ConfigException, yaml.YAMLError, TypeError) as error:
        words = " ".join(str(error).split())
        if where.kubeconfig is None and where.context is None:
            try:
                config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
                return configuration
            except config.ConfigException:
                pass
        raise StepError(
            f"{where.job}: wanted a kubeconfig that leads to its cluster, saw in {file}: {words} Name another by"
            " --kubeconfig, KUBECONFIG or --context; a job on this machine is named by -f MANIFEST."
        ) from error


def _namespace(where: Where) -> str:
    try:
        contexts, current = config.list_kube_config_contexts(_file(where))  # type: ignore[no-untyped-call]
    except config.ConfigException:
        return POD_NAMESPACE.read_text("utf-8").strip() if POD_NAMESPACE.exists() else "default"
    chosen = next((each for each in contexts if each["name"] == where.context), current)
    return str(chosen["context"].get("namespace") or "default")
