"""Gateway, strong-model proxy, observer and the watcher of a canary: Deployments with their Services. Pure.

Only the gateway may be something else than a Deployment: see ray.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cowest_operator import api
from cowest_operator.objects import common, ray
from cowest_operator.objects.common import Child, Context
from cowest_operator.objects.steps import ASKED, MAIN, step_map, step_name, without_executor
from cowest_serving.contract import Strong, digest_of, evaluator_key
from cowest_training.contract import StepSettings

BOOK = "/var/lib/cowest/book.sqlite"
SPOOL_ABOVE = (
    64 * 1024 * 1024
)  # bytes: a pod above the volume's limit is evicted, so the gateway's own limit comes first
STRONG_CERTIFICATES = "/etc/cowest/strong-ca"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
PUBLIC = (("/v1", "Prefix"), ("/openapi.json", "Exact"))  # paths of the gateway that an Ingress lets in
FOLLOWS_ANNOTATION = "cowest.dev/follows"  # digest of what a watcher reads once
DRAIN_SECONDS = 5  # endpoints take a moment to leave the Service


def gateway(context: Context) -> tuple[Child, ...]:
    spec = context.job.spec.gateway
    on_ray = ray.is_wanted(context)
    return (
        *_routing_reader(context),
        ray.gateway(context, _gateway_pod(context), DRAIN_SECONDS) if on_ray else _gateway_deployment(context),
        common.service(context, "gateway"),
        *_disruption_budget(context),
        *(() if on_ray else _autoscaler(context, spec)),
        *_ingress(context, spec),
    )


def _gateway_deployment(context: Context) -> Child:
    return _deployment(context, "gateway", _gateway_pod(context), replicas=_gateways(context))


def _gateways(context: Context) -> int | None:
    """With an autoscaler their number is said until it has said another: left out earlier, it would fall to one."""
    spec = context.job.spec.gateway
    if spec.max_replicas is None:
        return spec.replicas
    return None if context.gateways is None else max(spec.replicas, min(context.gateways, spec.max_replicas))


def grace_seconds(job: api.Job) -> int:
    """That a gateway's pod has to end: for the answer that has just begun, and to write the last records."""
    return DRAIN_SECONDS + job.spec.strong.timeout_seconds + 45


def _gateway_pod(context: Context) -> dict[str, Any]:
    spec = context.job.spec
    job_volume, job_mount = common.job_volume(context)
    tmp_volume, tmp_mount = common.tmp()
    store_volumes, store_mounts = common.store_volumes(context)
    strong_volumes, strong_mounts, strong_env = _strong(context)
    other_volumes, other_mounts, other_env = _fallbacks(context)
    clients = spec.gateway.client_keys_secret_ref
    client_volumes, client_mounts, client_env = _clients(clients.name if clients else None)
    lease_volumes, lease_mounts, lease_env = _proxy_keys(context) if common.book_of(context) else ([], [], [])
    run_mount = {"name": "run", "mountPath": "/run/cowest"}
    spool_volume, spool_mount = _spool(context)
    on_ray = spec.gateway.engine == "RayServe"
    answering = common.container(
        context, "gateway", context.images.with_ray if on_ray else context.images.serving,
        "cowest_serving.ray_app" if on_ray else "cowest_serving.app",
        ["--routing", common.ROUTING_FILE, "--job", f"{common.JOB_FOLDER}/job.json", "--store", context.store,
         "--spool", common.SPOOL, "--port", str(common.PORT), "--host", "0.0.0.0",
         "--drain-seconds", str(DRAIN_SECONDS), "--finish-seconds", str(spec.strong.timeout_seconds), *_book(context),
         *(["--workers", str(spec.gateway.workers)] if spec.gateway.workers > 1 and not on_ray else [])],
        ports=[{"name": "http", "containerPort": common.PORT}],
        env=[*common.store_env(context), *strong_env, *other_env, *client_env, *lease_env],
        resources=common.resources(spec.gateway.resources, *(("500m", "1Gi") if on_ray else ("100m", "256Mi"))),
        volumeMounts=[job_mount, run_mount, spool_mount, tmp_mount, *store_mounts, *strong_mounts, *other_mounts,
                      *client_mounts, *lease_mounts],
        startupProbe=common.probe("/healthz", periodSeconds=1, failureThreshold=120),
        readinessProbe=common.probe("/readyz", periodSeconds=2, timeoutSeconds=3),
        livenessProbe=common.probe("/healthz", periodSeconds=10, timeoutSeconds=5, failureThreshold=6),
    )  # fmt: skip
    routing = common.container(
        context, "routing", context.images.serving, "cowest_serving.routing_sync",
        ["--namespace", context.namespace, "--configmap", context.name("routing"), "--out", common.ROUTING_FILE],
        resources={"requests": {"cpu": "10m", "memory": "64Mi"}},
        volumeMounts=[run_mount, {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True}],
    )  # fmt: skip
    volumes = [job_volume, {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}, spool_volume,
               tmp_volume, *store_volumes, *strong_volumes, *other_volumes, *client_volumes, *lease_volumes,
               _token()]  # fmt: skip
    return common.pod(
        context,
        serviceAccountName=context.name("gateway"),
        terminationGracePeriodSeconds=grace_seconds(context.job),
        containers=[answering, routing],
        volumes=volumes,
        topologySpreadConstraints=[
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
             "labelSelector": {"matchLabels": common.selector(context, "gateway")}},
        ],
    )  # fmt: skip


def _book(context: Context) -> list[str]:
    """Where slices of the day's budget come from; without a limit of a day the gateway needs no proxy."""
    address = common.book_of(context)
    return ["--book", address] if address else []


def _spool(context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outlives the container, not the pod."""
    size = context.document["spec"]["traces"]["spoolBytes"]
    volume = {"name": "spool", "emptyDir": {"sizeLimit": str(size + SPOOL_ABOVE)}}
    return volume, {"name": "spool", "mountPath": common.SPOOL}


def _routing_reader(context: Context) -> tuple[Child, ...]:
    """The sidecar may read one ConfigMap, and no more."""
    name = context.name("gateway")
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"],
              "resourceNames": [context.name("routing")]}]  # fmt: skip
    return account(context, name, "gateway", rules)


def account(
    context: Context, name: str, part: str, rules: list[dict[str, Any]], mounted: bool = False
) -> tuple[Child, ...]:
    group = "rbac.authorization.k8s.io"
    return (
        common.child(context, "v1", "ServiceAccount", name, part, automountServiceAccountToken=mounted),
        common.child(context, f"{group}/v1", "Role", name, part, rules=rules),
        common.child(
            context, f"{group}/v1", "RoleBinding", name, part,
            roleRef={"apiGroup": group, "kind": "Role", "name": name},
            subjects=[{"kind": "ServiceAccount", "name": name, "namespace": context.namespace}],
        ),
    )  # fmt: skip


def _token() -> dict[str, Any]:
    """What an automatic mount would hold, for the one container that needs it."""
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    ]
    return {"name": "token", "projected": {"sources": sources}}


def _strong(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts, environment) of the strong model's keys and certificates: for gateway and proxy only."""
    strong = context.job.spec.strong
    volumes, mounts = strong_certificates(context)
    environment = [common.env("SSL_CERT_FILE", file)] if (file := strong_certificates_file(context)) else []
    if strong.api_key_secret_refs:
        sources = [
            {"secret": {"name": ref.name, "items": [{"key": ref.key, "path": f"{number:02d}"}]}}
            for number, ref in enumerate(strong.api_key_secret_refs)
        ]
        volumes.append({"name": "strong-keys", "projected": {"sources": sources, "defaultMode": 0o440}})
        mounts.append({"name": "strong-keys", "mountPath": common.STRONG_KEYS, "readOnly": True})
        environment.append(common.env("COWEST_STRONG_API_KEYS_FOLDER", common.STRONG_KEYS))
    return volumes, mounts, environment


def _fallbacks(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts, environment) of the keys of the strong model's fallbacks, a folder each: gateway only."""
    sources = [
        {"secret": {"name": ref.name, "items": [{"key": ref.key, "path": f"{number:02d}/key"}]}}
        for number, fallback in enumerate(context.job.spec.strong.fallbacks)
        if (ref := fallback.api_key_secret_ref) is not None
    ]
    if not sources:
        return [], [], []
    return (
        [{"name": "fallback-keys", "projected": {"sources": sources, "defaultMode": 0o440}}],
        [{"name": "fallback-keys", "mountPath": common.FALLBACK_KEYS, "readOnly": True}],
        [common.env("COWEST_STRONG_FALLBACK_API_KEYS_FOLDER", common.FALLBACK_KEYS)],
    )


def strong_certificates(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(volumes, mounts) of `strong.caBundleRef`."""
    bundle = context.document["spec"]["strong"].get("caBundleRef")
    if not bundle:
        return [], []
    return (
        [common.certificates("strong-ca", bundle["name"], bundle["key"])],
        [{"name": "strong-ca", "mountPath": STRONG_CERTIFICATES, "readOnly": True}],
    )


def strong_certificates_file(context: Context) -> str | None:
    bundle = context.document["spec"]["strong"].get("caBundleRef")
    return f"{STRONG_CERTIFICATES}/{bundle['key']}" if bundle else None


def _clients(secret_name: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Who may ask a server: all keys of a Secret."""
    if secret_name is None:
        return [], [], []
    secret = {"secretName": secret_name, "defaultMode": 0o440}
    return (
        [{"name": "client-keys", "secret": secret}],
        [{"name": "client-keys", "mountPath": common.CLIENT_KEYS, "readOnly": True}],
        [common.env("COWEST_CLIENT_API_KEYS_FOLDER", common.CLIENT_KEYS)],
    )


def _proxy_keys(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """What the job's own pods show to the proxy: their own key, and of its other clients none."""
    reference = context.document["spec"]["strong"].get("proxyKeysSecretRef")
    if not reference:
        return [], [], []
    own = {"key": reference["ownKey"], "path": reference["ownKey"]}
    secret = {"secretName": reference["name"], "items": [own], "defaultMode": 0o440}
    return (
        [{"name": "proxy-keys", "secret": secret}],
        [{"name": "proxy-keys", "mountPath": common.PROXY_KEYS, "readOnly": True}],
        [common.env("COWEST_PROXY_KEYS_FOLDER", common.PROXY_KEYS)],
    )


def _disruption_budget(context: Context) -> tuple[Child, ...]:
    """With one replica a budget would only keep nodes from being drained."""
    if context.job.spec.gateway.replicas < 2:
        return ()
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": common.selector(context, "gateway")}}
    name = context.name("gateway")
    return (common.child(context, "policy/v1", "PodDisruptionBudget", name, "gateway", spec=spec),)


def _autoscaler(context: Context, spec: api.Gateway) -> tuple[Child, ...]:
    if spec.max_replicas is None:
        return ()
    name = context.name("gateway")
    scaled = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": spec.replicas,
        "maxReplicas": max(spec.max_replicas, spec.replicas),
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization",
                                                                                "averageUtilization": 70}}}],
    }  # fmt: skip
    return (common.child(context, "autoscaling/v2", "HorizontalPodAutoscaler", name, "gateway", spec=scaled),)


def _ingress(context: Context, spec: api.Gateway) -> tuple[Child, ...]:
    """What clients ask, and nothing of what only the cluster may read (/metrics, /readyz). Limits are set where an
    ingress controller takes them as annotations: nginx is the common one."""
    if spec.ingress is None:
        return ()
    name = context.name("gateway")
    backend = {"service": {"name": name, "port": {"name": "http"}}}
    paths = [{"path": path, "pathType": kind, "backend": backend} for path, kind in PUBLIC]
    rule = {"host": spec.ingress.host, "http": {"paths": paths}}
    content: dict[str, Any] = {"rules": [rule]}
    if spec.ingress.class_name:
        content["ingressClassName"] = spec.ingress.class_name
    if spec.ingress.tls_secret_name:
        content["tls"] = [{"hosts": [spec.ingress.host], "secretName": spec.ingress.tls_secret_name}]
    built = common.child(context, "networking.k8s.io/v1", "Ingress", name, "gateway", spec=content)
    built["metadata"]["annotations"] = {
        "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
        "nginx.ingress.kubernetes.io/proxy-buffering": "off",
        "nginx.ingress.kubernetes.io/proxy-body-size": str(spec.max_body_bytes),  # nginx's own limit is 1m
        **spec.ingress.annotations,
    }
    return (built,)


def proxy(context: Context, status: api.Status) -> tuple[Child, ...]:
    """One replica: its book of paid calls is a file. While it is replaced, steps wait and gateways do not notice."""
    job_volume, job_mount = common.job_volume(context)
    tmp_volume, tmp_mount = common.tmp()
    volumes, mounts, environment = _with_judge(context, *_strong(context))
    clients = context.document["spec"]["strong"].get("proxyKeysSecretRef")
    client_volumes, client_mounts, client_env = _clients(clients["name"] if clients else None)
    container = common.container(
        context, "proxy", context.images.serving, "cowest_serving.proxy",
        ["--job", f"{common.JOB_FOLDER}/job.json", "--book", BOOK, "--port", str(common.PORT), "--host", "0.0.0.0",
         *(f"--other-model={name}" for name in _other_models(context.job.spec.strong, status))],
        ports=[{"name": "http", "containerPort": common.PORT}],
        env=[*environment, *client_env],
        resources={"requests": {"cpu": "50m", "memory": "128Mi"}},
        volumeMounts=[job_mount, tmp_mount, {"name": "book", "mountPath": "/var/lib/cowest"}, *mounts, *client_mounts],
        startupProbe=common.probe("/healthz", periodSeconds=1, failureThreshold=120),
        readinessProbe=common.probe("/readyz", periodSeconds=3, timeoutSeconds=3),
        livenessProbe=common.probe("/healthz", periodSeconds=10, timeoutSeconds=5, failureThreshold=6),
    )  # fmt: skip
    name = context.name("proxy")
    book = {"name": "book", "persistentVolumeClaim": {"claimName": name}}
    pod = common.pod(
        context,
        terminationGracePeriodSeconds=3 * context.job.spec.strong.timeout_seconds + 10,  # what is paid comes home
        containers=[container],
        volumes=[job_volume, tmp_volume, book, *volumes, *client_volumes],
    )
    claim: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": context.book.size}},
    }
    if context.book.storage_class:
        claim["storageClassName"] = context.book.storage_class
    return (
        common.child(context, "v1", "PersistentVolumeClaim", name, "proxy", spec=claim),
        _deployment(context, "proxy", pod, strategy={"type": "Recreate"}),
        common.service(context, "proxy"),
    )


def _other_models(strong: Strong, status: api.Status) -> list[str]:
    """Beside the declared one those of pairs that steps ask by: an edited model is measured against what is served.

    That of `previous` too, so that neither a promotion nor a rollback replaces the proxy in the middle of a round.
    """
    trial = status.candidate
    pairs = (status.stable, status.previous, trial.pair if trial else None)
    here = strong.endpoint.rstrip("/")
    names = {pair.strong_model for pair in pairs if pair and pair.strong_endpoint.rstrip("/") == here}
    return sorted(names - {strong.model})


Access = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]  # volumes, mounts, environment


def _with_judge(
    context: Context, volumes: list[dict[str, Any]], mounts: list[dict[str, Any]], environment: list[dict[str, Any]]
) -> Access:
    """The proxy asks judges too: with their keys, and by certificates of whoever signs the one or the other."""
    evaluator = context.job.spec.feedback.evaluator
    if evaluator.type != "Judge":
        return volumes, mounts, environment
    if file := strong_certificates_file(context):
        kept = [each for each in environment if each["name"] != "SSL_CERT_FILE"]
        environment = [*kept, common.env("COWEST_MORE_CA", file)]
    for number, judge in enumerate(evaluator.judges):
        if reference := judge.api_key_secret_ref:
            name, folder = common.judge_key(number)
            item = {"key": reference.key, "path": "key"}
            secret = {"secretName": reference.name, "items": [item], "defaultMode": 0o440}
            volumes = [*volumes, {"name": name, "secret": secret}]
            mounts = [*mounts, {"name": name, "mountPath": folder, "readOnly": True}]
            environment = [*environment, common.env(f"{evaluator_key(number)}_FOLDER", folder)]
    return volumes, mounts, environment


def observer(context: Context) -> tuple[Child, ...]:
    job_volume, job_mount = common.job_volume(context)
    tmp_volume, tmp_mount = common.tmp()
    volumes, mounts = common.store_volumes(context)
    container = common.container(
        context, "observer", context.images.training, "cowest_training.observer",
        ["--store", context.store, "--job", f"{common.JOB_FOLDER}/job.json", "--port", str(common.PORT),
         "--host", "0.0.0.0"],
        ports=[{"name": "http", "containerPort": common.PORT}],
        env=common.store_env(context),
        resources={"requests": {"cpu": "20m", "memory": "192Mi"}},
        volumeMounts=[job_mount, tmp_mount, *mounts],
        startupProbe=common.probe("/healthz", periodSeconds=1, failureThreshold=120),
        readinessProbe=common.probe("/readyz", periodSeconds=5, timeoutSeconds=6),
        livenessProbe=common.probe("/healthz", periodSeconds=10, timeoutSeconds=5, failureThreshold=6),
    )  # fmt: skip
    pod = common.pod(context, containers=[container], volumes=[job_volume, tmp_volume, *volumes])
    # It is not ready while the store is away, and then the one that knows why.
    return _deployment(context, "observer", pod), common.service(context, "observer", publishNotReadyAddresses=True)


def live_score(context: Context, step: api.StepSpec, frozen: Mapping[str, Any] | None = None) -> tuple[Child, ...]:
    """The watcher of one canary step; the next step's takes its place. With ShadowReplay it loads both weak models:
    its pod is then what `training` says of a step's, and its container has a step's name."""
    name = step_name(context, step)
    tmp_volume, tmp_mount = common.tmp()
    volumes, mounts = common.store_volumes(context)
    asking_volumes, asking_mounts, asking_env = asking_access(context)
    document = (frozen or context.document)["spec"]
    pods = api.parse_pods(document.get("training", {}))
    loads = document.get("canary", {}).get("signal") == "ShadowReplay"
    resources = common.resources(pods.resources if loads else None, *(ASKED if loads else ("50m", "256Mi")))
    container = common.container(
        context, MAIN if loads else "score-live", context.images.training, "cowest_training.pod",
        ["--step", common.STEP_FOLDER],
        env=[*common.store_env(context), common.env("COWEST_STRONG_URL", f"http://{context.host('proxy')}/v1"),
             common.env("COWEST_STEP", name), *asking_env],
        resources=resources,
        volumeMounts=[{"name": "step", "mountPath": common.STEP_FOLDER, "readOnly": True}, tmp_mount, *mounts,
                      *asking_mounts],
    )  # fmt: skip
    pod = common.pod(
        context,
        containers=[container],
        volumes=[{"name": "step", "configMap": {"name": name}}, tmp_volume, *volumes, *asking_volumes],
    )
    orders = step_map(context, step, dict(frozen) if frozen else None)
    live = _deployment(
        context, "live", pod, strategy={"type": "Recreate"}, part="score-live",
        over=without_executor(pods.pod_template) if loads else None,
    )  # fmt: skip
    template = live["spec"]["template"]["metadata"]
    read = {each.name: document[each.name] for each in fields(StepSettings) if each.name in document}
    # It reads its files once: of an edit that acts at once it hears by beginning anew.
    template["annotations"] = {
        **template.get("annotations", {}),
        FOLLOWS_ANNOTATION: digest_of([orders["data"]["step.json"], read]),
    }
    return orders, live


def asking_access(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The judges' or a scorer's own keys, the certificates that they may be checked against, beside the system's, and
    what the proxy wants to see. The strong model's keys never come here.
    """
    proxy_volumes, proxy_mounts, environment = _proxy_keys(context)
    volumes, mounts = strong_certificates(context)
    volumes, mounts = [*volumes, *proxy_volumes], [*mounts, *proxy_mounts]
    if file := strong_certificates_file(context):
        environment = [*environment, common.env("COWEST_MORE_CA", file)]
    for number, each in enumerate(context.job.spec.feedback.evaluator.asked):
        if reference := each.api_key_secret_ref:
            source = {"secretKeyRef": {"name": reference.name, "key": reference.key}}
            environment.append({"name": evaluator_key(number), "valueFrom": source})
    return volumes, mounts, environment


def _deployment(
    context: Context,
    name: str,
    pod: dict[str, Any],
    replicas: int | None = 1,
    strategy: dict[str, Any] | None = None,
    part: str | None = None,
    over: api.PodTemplate | None = None,
) -> Child:
    part = part or name
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    spec: dict[str, Any] = {
        "selector": {"matchLabels": common.selector(context, part)},
        "strategy": strategy or rolling,
        "revisionHistoryLimit": 2,
        "template": common.template(context, part, pod, over),
    }
    if replicas is not None:
        spec["replicas"] = replicas
    return common.child(context, "apps/v1", "Deployment", context.name(name), part, spec=spec)
