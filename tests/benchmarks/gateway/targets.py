"""What is measured: our gateway, and the peers, each a process of its own with its best setting for a plain proxy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Arm, Pair, Routing, dump
from tests.benchmarks.gateway import tools
from tests.benchmarks.gateway.load import Ask, Stubs, chat
from tests.benchmarks.gateway.processes import Tree
from tests.ports import free_port

T = TypeVar("T")
Records = Literal["spool", "memory", "none"]
S3 = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_REGION": "us-east-1"}


@dataclass
class Target:
    """A gateway that runs, and how it is asked."""

    name: str
    version: str
    tree: Tree
    plain: Ask  # one call without delay; the pair's: two
    paced: Ask | None = None  # the same with the stub's delay of an ordinary load
    slow: Ask | None = None  # weak 50 ms, then strong 200 ms
    beside: Tree | None = None  # answers `plain` where one process has one upstream only

    def trees(self) -> list[Tree]:
        return [self.tree, *([self.beside] if self.beside else [])]


@dataclass(frozen=True)
class Place:
    """Where a target is started."""

    work: Path
    stubs: Stubs
    core: int

    def folder(self, name: str) -> Path:
        folder = self.work / f"{name}-{len(list(self.work.iterdir()))}"
        folder.mkdir()
        return folder


# ---------------------------------------------------------------- ours
def pair_of(strong: str, digest: str = "a") -> Pair:
    return Pair(f"sha256:{digest * 64}", "file:///models/weak", DEFAULT_PROMPTS["Answer"], "Answer", strong, "strong")


def pair_routing(stubs: Stubs, weak: str, strong: str) -> Routing:
    return Routing(1, "bench", (Arm("stable", 100, "Pair", pair_of(stubs.v1(strong)), stubs.v1(weak)),))


def job_of(strong: str, concurrency: int = 64) -> dict[str, Any]:
    return {
        "strong": {
            "endpoint": strong,
            "model": "strong",
            "apiKeySecretRefs": [{"name": "strong", "key": "api-key"}],
            "timeoutSeconds": 60,
            "maxConcurrency": concurrency,
            "maxRetries": 2,
        },
        "collaboration": {
            "draft": "Answer",
            "whenWeakFails": "StrongAlone",
            "whenStrongFails": "WeakAlone",
            "whenDraftsHurt": "StrongAlone",
            "draftMaxTokens": 512,
        },
        "traces": {"contentSamplePercent": 100, "whenSpoolFull": "Answer"},
    }


def write_routing(path: Path, routing: Routing) -> None:
    """Replaced atomically, as the engine does it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(dump(routing)))
    part.replace(path)


def cowest_files(folder: Path, routing: Routing) -> list[str]:
    write_routing(folder / "routing.json", routing)
    (folder / "job.yaml").write_text(yaml.safe_dump(job_of(routing.arms[0].pair.strong_endpoint)))
    return ["--routing", str(folder / "routing.json"), "--job", str(folder / "job.yaml"), "--store", "s3://bench/desk"]


def cowest_environment(stubs: Stubs) -> dict[str, str]:
    return {"COWEST_STRONG_API_KEYS": "sk-bench", "COWEST_S3_ENDPOINT": f"http://127.0.0.1:{stubs.s3}", **S3}


def cowest(place: Place, routing: Routing, records: Records = "spool", *more: str) -> Target:
    """The process that `cowest run` starts; "none" is the same application without any record."""
    folder, port = place.folder(f"cowest-{records}"), free_port()
    module = "tests.benchmarks.gateway.untraced" if records == "none" else "cowest_serving.app"
    flags = cowest_files(folder, routing) + (["--spool", str(folder / "spool")] if records == "spool" else [])
    command = [sys.executable, "-m", module, *flags, "--port", str(port), "--log-level", "warning", *more]
    tree = Tree(command, folder / "log", place.core, cowest_environment(place.stubs) | {"PYTHONPATH": str(tools.ROOT)})
    ask = Ask((chat(f"http://127.0.0.1:{port}/v1", "pair"),))
    target = Target("cowest", "this checkout", tree, plain=ask, paced=ask, slow=ask)
    return _started(lambda: tree, lambda _: target, f"http://127.0.0.1:{port}/readyz")


def ray(place: Place, routing: Routing) -> Target:
    """The same application in Ray Serve, one replica; on all cores, as Ray's own processes are many."""
    folder, port = place.folder("ray"), free_port()
    python = tools.ray_environment() / "python"
    command = [python, "-m", "cowest_serving.ray_app", *cowest_files(folder, routing)]
    command += ["--spool", folder / "spool", "--port", str(port), "--log-level", "warning"]
    env = cowest_environment(place.stubs) | {"PYTHONPATH": str(tools.ROOT / "serving"), "RAY_USAGE_STATS_ENABLED": "0"}
    return _started(
        lambda: Tree(command, folder / "log", None, env),
        lambda tree: Target("ray", tools.RAY, tree, plain=(ask := _ask(port, "pair")), slow=ask),
        f"http://127.0.0.1:{port}/readyz",
        within=240,
    )


# ---------------------------------------------------------------- peers: one upstream call
def litellm(place: Place, rust: bool) -> Target:
    folder, port = place.folder("litellm"), free_port()
    python = tools.venv(f"litellm-{tools.LITELLM}", f"litellm[proxy]=={tools.LITELLM}")
    ends = {"plain": "plain", "paced": "paced", "weak": "slow_weak", "strong": "slow_strong"}
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"openai/{name}",
                "api_base": place.stubs.v1(end),
                "api_key": "sk-bench",
                **({"rust": True} if rust else {}),
            },
        }
        for name, end in ends.items()
    ]
    config = {"model_list": models, "litellm_settings": {"telemetry": False, "num_retries": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [python / "litellm", "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", "1", "--telemetry", "False"]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "DISABLE_ADMIN_UI": "True"}
    env["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # ours is without client keys too

    def target(tree: Tree) -> Target:
        name = "litellm_rust" if rust else "litellm_python"
        slow = (*_ask(port, "weak").targets, *_ask(port, "strong").targets)
        return Target(name, tools.LITELLM, tree, _ask(port, "plain"), _ask(port, "paced"), Ask(slow))

    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return _started(lambda: Tree(command, folder / "log", place.core, env), target, url, body=_question("plain"))


def portkey(place: Place) -> Target:
    folder, port = place.folder("portkey"), free_port()
    modules = tools.npm(f"portkey-{tools.PORTKEY}", f"@portkey-ai/gateway@{tools.PORTKEY}")
    command = [
        "node",
        modules / "@portkey-ai" / "gateway" / "build" / "start-server.js",
        f"--port={port}",
        "--headless",
    ]
    env = {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}

    def headers(end: str) -> dict[str, str]:
        return {"x-portkey-provider": "openai", "x-portkey-custom-host": place.stubs.v1(end)}

    def target(tree: Tree) -> Target:
        asks = [Ask(_ask(port).targets, headers(end)) for end in ("plain", "paced")]
        return Target("portkey", tools.PORTKEY, tree, *asks)

    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    start = lambda: Tree(command, folder / "log", place.core, env)  # noqa: E731
    return _started(
        start, target, url, body=_question("stub"), headers={**headers("plain"), "authorization": "Bearer sk-bench"}
    )


def vllm_router(place: Place) -> Target:
    bin = tools.venv(f"vllm-router-{tools.VLLM_ROUTER}", f"vllm-router=={tools.VLLM_ROUTER}")
    return _router("vllm-router", tools.VLLM_ROUTER, place, [bin / "python", "-m", "vllm_router.launch_router"])


def smg(place: Place) -> Target:
    bin = tools.venv(f"smg-{tools.SMG}", f"smg=={tools.SMG}")
    return _router("smg", tools.SMG, place, [bin / "smg", "launch"])


def _router(name: str, version: str, place: Place, command: list[Any]) -> Target:
    """Two processes, as one asks one worker."""

    def one(end: str) -> tuple[Tree, Ask]:
        folder, port = place.folder(name), free_port()
        flags = ["--worker-urls", place.stubs.base(end), "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]
        url, body = f"http://127.0.0.1:{port}/v1/chat/completions", _question("stub")
        tree = Tree([*command, *flags], folder / "log", place.core)
        return _started(lambda: tree, lambda _: (tree, _ask(port, "stub")), url, body=body)

    tree, paced = one("paced")
    try:
        beside, plain = one("plain")
    except BaseException:
        tree.stop()
        raise
    return Target(name, version, tree, plain, paced, beside=beside)


_NGINX = """worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/errors;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
{upstreams}
  server {{
    listen 127.0.0.1:{port};
{locations}
  }}
}}
"""
_UPSTREAM = "  upstream {end} {{ server 127.0.0.1:{stub}; keepalive 64; keepalive_requests 1000000; }}"
_LOCATION = """    location /{end}/ {{
      proxy_pass http://{end}/; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; client_body_buffer_size 64k;
    }}"""


def nginx(place: Place) -> Target:
    folder, port = place.folder("nginx"), free_port()
    binary, ends = tools.nginx(), ("plain", "paced")
    upstreams = "\n".join(_UPSTREAM.format(end=end, stub=place.stubs.ports[end]) for end in ends)
    locations = "\n".join(_LOCATION.format(end=end) for end in ends)
    (folder / "conf").write_text(_NGINX.format(folder=folder, port=port, upstreams=upstreams, locations=locations))
    asks = [Ask((chat(f"http://127.0.0.1:{port}/{end}/v1"),)) for end in ends]
    return _started(
        lambda: Tree([binary, "-e", folder / "errors", "-c", folder / "conf"], folder / "log", place.core),
        lambda tree: Target("nginx", tools.version_of_nginx(binary), tree, *asks),
        f"http://127.0.0.1:{port}/plain/v1/models",
    )


def _question(model: str) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "?"}]}).encode()


def _ask(port: int, model: str = "") -> Ask:
    return Ask((chat(f"http://127.0.0.1:{port}/v1", model),))


def _started(
    start: Callable[[], Tree],
    target: Callable[[Tree], T],
    url: str,
    *,
    within: float = 240,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> T:
    tree = start()
    try:
        tree.ready(url, within, headers, body)
    except BaseException:  # also when it is interrupted: nothing is left running
        tree.stop()
        raise
    tree.pin()
    return target(tree)
