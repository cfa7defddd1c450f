"""Training on Argo Workflows: one WorkflowTemplate of how steps run, one Workflow a step. Pure.

step      one pod, for what tunes or drafts
light     the same without accelerators, for what loads no model
sharded   feedback.shards pods side by side, then one that merges what they found: for the step `feedback`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cowest_operator import api
from cowest_operator.objects import common
from cowest_operator.objects.common import Child, Context

ARGO = "argoproj.io/v1alpha1"
ATTEMPT_LABEL, STEP_LABEL, GENERATION_LABEL = "cowest.dev/attempt", "cowest.dev/step", "cowest.dev/generation"
ENDED_ANNOTATION = "cowest.dev/pods-ended"  # on a Workflow: a word to Argo that there is something to see
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # on pods, by training.podTemplate: Kueue holds them until there is room
CALLS = "/tmp/cowest/calls.sqlite"  # of one pod; what counts is the proxy's book
RETRY_CODES = ("75", "130", "137", "143", "-1", "64")  # of EXIT_RETRY, of an ended or evicted pod, of Argo's executor
# The kubelet's words, which Argo passes on, of a pod that it ended at its activeDeadlineSeconds. Its exit code says as
# little as that of any pod that was ended: another attempt by Argo would cost as long again, so the operator decides.
OVERRAN = "active on the node longer than the specified deadline"
KEPT_SECONDS = 86400
SHARDED = "cowest_training.feedback"
WITH_MODEL = tuple(
    f"cowest_training.{name}" for name in ("sft", "dpo", "feedback", "evaluate")
)  # `publish` merges on CPU
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
MAIN, INIT, WAIT = "main", "init", "wait"  # Argo's names: of the container that runs the step, and of its executor's
ASKED = ("250m", "1Gi")  # CPU and memory of a step where the manifest says none: torch alone takes 900 MB
# A quota on requests or limits refuses a pod of which one container says none.
EXECUTOR = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "256Mi"}}


def step_name(context: Context, step: api.StepSpec) -> str:
    return context.name(step.name)


def workflow_name(context: Context, step: api.StepSpec, attempt: int) -> str:
    """The same step and attempt are the same name: a second submission is answered `AlreadyExists`."""
    name = step_name(context, step)
    return name if attempt == 1 else f"{name}-{attempt}"


def step_map(context: Context, step: api.StepSpec, frozen: dict[str, Any] | None = None) -> Child:
    """What the pod is to do, and the manifest that it goes by. Never changed: it is frozen with the trial."""
    orders = {"module": step.module, "out": step.out or None, "args": [list(pair) for pair in step.args],
              "files": dict(step.files)}  # fmt: skip
    data = {"step.json": common.canonical(orders), "job.json": common.canonical(frozen or context.document)}
    return common.config_map(context, step_name(context, step), "step", data, immutable=False)


def accounts(context: Context) -> tuple[Child, ...]:
    """Argo's executor reports by WorkflowTaskResults; a step itself asks nothing of the API server."""
    from cowest_operator.objects.servers import account

    rules = [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
    return account(context, context.name("steps"), "step", rules, mounted=True)


def workflow_template(context: Context) -> Child:
    content = _template_spec(context)
    name = common.content_name(context, "steps", content)
    return common.child(context, ARGO, "WorkflowTemplate", name, "step", spec=content)


def workflow(context: Context, step: api.StepSpec, attempt: int = 1) -> Child:
    """One step of a trial. Its template is named by content, so that an edit never changes what runs."""
    built = common.child(
        context, ARGO, "Workflow", workflow_name(context, step, attempt), "step",
        spec={
            "workflowTemplateRef": {"name": workflow_template(context)["metadata"]["name"]},
            "arguments": {"parameters": [{"name": "step", "value": step_name(context, step)}]},
        },
    )  # fmt: skip
    if step.module == SHARDED and shards(context) > 1:
        built["spec"]["entrypoint"] = "sharded"
    elif step.module not in WITH_MODEL:
        built["spec"]["entrypoint"] = "light"
    built["metadata"]["labels"] |= {
        STEP_LABEL: step.name,
        ATTEMPT_LABEL: str(attempt),
        GENERATION_LABEL: str(context.job.generation),
    }
    return built


def unshared(context: Context, step: api.StepSpec, attempt: int = 1) -> Child:
    """A step that loads and asks no model, without mutex, template and queue: it waits for no other, and needs nothing
    that may be gone."""
    built, content, light = (
        workflow(context, step, attempt),
        _template_spec(context),
        _light(_step(context, asks=False)),
    )
    del content["synchronization"]
    light["metadata"]["labels"].pop(QUEUE_LABEL, None)
    own = {"entrypoint": light["name"], "templates": [light], "arguments": built["spec"]["arguments"]}
    return {**built, "spec": {**content, **own}}


def shards(context: Context) -> int:
    """Of no digest: as many as there are, the output is the same."""
    return int(context.document["spec"].get("feedback", {}).get("shards", 1))


def _sharded(step: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A pod that failed is retried alone; the others go on, and what they found is found there by the next attempt."""
    if number == 1:
        return []
    one = {"parameters": [{"name": "shard", "value": "{{item}}"}]}
    return [
        {
            "name": "sharded",
            "steps": [
                [{"name": "shard", "template": "shard", "arguments": one, "withSequence": {"count": str(number)}}],
                [{"name": "merge", "template": "merge"}],
            ],
        },
        {
            **_with(step, "shard", "--shard", f"{{{{inputs.parameters.shard}}}}/{number}"),
            "inputs": {"parameters": [{"name": "shard"}]},
        },
        _with(_light(step), "merge", "--merge", str(number)),
    ]


def _light(step: dict[str, Any]) -> dict[str, Any]:
    """Extended resources, such as nvidia.com/gpu, have a domain in their name."""
    wanted = {
        kind: {name: value for name, value in quantities.items() if "/" not in name}
        for kind, quantities in step["container"]["resources"].items()
    }
    kept = {kind: quantities for kind, quantities in wanted.items() if quantities} or common.resources(None, *ASKED)
    return {**step, "name": "light", "container": {**step["container"], "resources": kept}}


def _with(step: dict[str, Any], name: str, *arguments: str) -> dict[str, Any]:
    container = step["container"]
    return {**step, "name": name, "container": {**container, "args": [*container["args"], *arguments]}}


def _step(context: Context, asks: bool = True) -> dict[str, Any]:
    """The pod of a step; one that `asks` models has the keys and certificates for that."""
    from cowest_operator.objects.servers import asking_access

    document = context.document["spec"].get("training", {})
    pods = api.parse_pods(document)
    tmp_volume, tmp_mount = common.tmp()
    volumes, mounts = common.store_volumes(context)
    asking_volumes, asking_mounts, asking_env = asking_access(context) if asks else ([], [], [])
    container = common.container(
        context, MAIN, context.images.training, "cowest_training.pod", ["--step", common.STEP_FOLDER],
        env=[*common.store_env(context), common.env("COWEST_STRONG_URL", f"http://{context.host('proxy')}/v1"),
             common.env("COWEST_STEP", "{{workflow.parameters.step}}"),
             common.env("TOKENIZERS_PARALLELISM", "false"), *asking_env],
        resources=common.resources(pods.resources, *ASKED),
        volumeMounts=[{"name": "step", "mountPath": common.STEP_FOLDER, "readOnly": True}, tmp_mount, *mounts,
                      *asking_mounts, {"name": "no-token", "mountPath": TOKEN_FOLDER, "readOnly": True}],
    )  # fmt: skip
    container.pop("name")
    over = pods.pod_template or api.PodTemplate()
    retried = " || ".join(f"lastRetry.exitCode == '{code}'" for code in RETRY_CODES)
    step: dict[str, Any] = {
        "name": "step",
        "metadata": {
            "labels": {**over.metadata.labels, **common.labels(context, "step")},
            **({"annotations": dict(over.metadata.annotations)} if over.metadata.annotations else {}),
        },
        "automountServiceAccountToken": True,  # for Argo's executor; over it lies `no-token` where the step runs
        "container": container,
        "volumes": [{"name": "step", "configMap": {"name": "{{workflow.parameters.step}}"}}, tmp_volume, *volumes,
                    *asking_volumes, {"name": "no-token", "emptyDir": {"sizeLimit": "1Mi"}}],
        # No backoff.maxDuration: Argo ends each later pod so long after the start of the first one (its #13044).
        "retryStrategy": {
            "limit": "5",
            "retryPolicy": "Always",
            "expression": f"({retried}) && !(lastRetry.message contains '{OVERRAN}')",
            "backoff": {"duration": "5s", "factor": "2"},
        },
    }  # fmt: skip
    if pods.step_deadline_seconds:  # of each pod, from when it is on a node; a Workflow's own would count its queue too
        step["activeDeadlineSeconds"] = pods.step_deadline_seconds
    # Argo's own containers know nothing of the restricted profile, nor of quotas; podTemplate is laid over them too.
    executor: dict[str, Any] = {
        "initContainers": [{"name": INIT, "securityContext": common.restricted(), "resources": EXECUTOR}],
        "containers": [{"name": WAIT, "securityContext": common.restricted(), "resources": EXECUTOR}],
    }
    step["podSpecPatch"] = common.canonical(common.laid_over(executor, over.spec))
    return step


def without_executor(over: api.PodTemplate | None) -> api.PodTemplate | None:
    """What is laid over a pod that does a step's work and is none of Argo's."""
    if over is None:
        return None
    spec = {
        key: [each for each in value if each.get("name") not in (INIT, WAIT)] if common.are_named(value) else value
        for key, value in over.spec.items()
    }
    return replace(over, spec=spec)


def _template_spec(context: Context) -> dict[str, Any]:
    step, base = _step(context), common.pod(context)
    return {
        "entrypoint": "step",
        "serviceAccountName": context.name("steps"),
        "automountServiceAccountToken": True,
        "securityContext": base["securityContext"],
        **({"imagePullSecrets": base["imagePullSecrets"]} if "imagePullSecrets" in base else {}),
        "arguments": {"parameters": [{"name": "step"}]},
        "synchronization": {"mutexes": [{"name": context.name("steps")}]},
        "ttlStrategy": {"secondsAfterSuccess": KEPT_SECONDS},  # what failed is not to be forgotten
        "podGC": {"strategy": "OnWorkflowSuccess", "deleteDelayDuration": "60s"},
        "templates": [step, _light(step), *_sharded(step, shards(context))],
    }
