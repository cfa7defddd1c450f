"""What the domain's chart brings by itself, in a namespace of its own: object store, bucket, policies, quota, test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import (
    COWEST,
    EXAMPLE,
    KEYS,
    REGISTRY,
    ROOT,
    SYSTEM,
    TAG,
    bring_strong,
    forwarded,
    freight_spec,
    kubectl,
    new_namespace,
    run,
    wait_for,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NAMESPACE, NAME = "cowest-e2e-chart", "pocket"


def values() -> dict[str, Any]:
    """All that the chart can bring on one node; policies are on, as by default."""
    spec = freight_spec("pocket", NAMESPACE)
    spec["objectStore"] = {"bucket": "pocket", "credentialsSecretRef": {"name": "store"}}
    within = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}}
    return {
        "name": NAME,
        "job": spec,
        "image": {"registry": REGISTRY, "tag": TAG},
        "minio": {"enabled": True, "storage": "1Gi", "image": {"tag": "latest"}},
        "networkPolicy": {"strong": {"to": [within], "ports": [9190]}},
        "resourceQuota": {"enabled": True},
        "limitRange": {"enabled": True},
    }


def job() -> dict[str, Any]:
    return dict(json.loads(kubectl("get", "collaborationjob", NAME, "-o", "json", namespace=NAMESPACE)))


def condition(kind: str) -> dict[str, Any]:
    conditions = job().get("status", {}).get("conditions", ())
    return next((dict(c) for c in conditions if c["type"] == kind), {})


def test_a_domain_with_a_store_of_its_own_serves_trains_and_passes_helm_test(operator: None, tmp_path: Path) -> None:
    new_namespace(NAMESPACE)
    try:
        bring_strong(NAMESPACE)
        keys = [f"--from-literal={name}={value}" for name, value in KEYS.items()]
        kubectl("create", "secret", "generic", "store", *keys, namespace=NAMESPACE)
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values()))
        chart = str(ROOT / "charts" / "cowest-domain")
        begun = time.monotonic()
        run("helm", "install", NAME, chart, "--namespace", NAMESPACE, "-f", str(tmp_path / "values.yaml"),
            "--timeout", "5m")  # fmt: skip
        print(f"{time.monotonic() - begun:7.1f} s  installed, the bucket is there", flush=True)
        wait_for(lambda: condition("Ready").get("status") == "True", "Ready", 240)
        print(f"{time.monotonic() - begun:7.1f} s  Ready", flush=True)
        said = run("helm", "test", NAME, "--namespace", NAMESPACE, "--timeout", "5m")
        assert "Succeeded" in said, said
        wait_for(lambda: condition("RoundProgressing").get("reason") == "DataMissing", "what is not there", 120)
        assert "cowest upload FOLDER s3://pocket/data/base" in condition("RoundProgressing")["message"]
        with forwarded(f"{NAME}-minio", 9000, NAMESPACE) as port:
            bring_data(tmp_path, f"http://127.0.0.1:{port}")
        wait_for(lambda: "weakDigest" in job()["status"].get("candidate", {}), "the first weak model", 300)
        print(f"{time.monotonic() - begun:7.1f} s  the first weak model is tuned", flush=True)
        policies = json.loads(kubectl("get", "networkpolicies", "-o", "json", namespace=NAMESPACE))["items"]
        assert {p["metadata"]["name"] for p in policies} >= {f"{NAME}-gateway", f"{NAME}-proxy"}
        quota = json.loads(kubectl("get", "resourcequota", "-o", "json", namespace=NAMESPACE))["items"]
        assert quota[0]["status"]["used"]["persistentvolumeclaims"] == "2", "the store's and the proxy's book"
    except BaseException:
        show()
        raise
    finally:
        subprocess.run(["helm", "uninstall", NAME, "--namespace", NAMESPACE], check=False)
        run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false", check=False)


def test_the_operators_chart_passes_helm_test(operator: None) -> None:
    assert "Succeeded" in run("helm", "test", "cowest-operator", "--namespace", SYSTEM, "--timeout", "3m")


def bring_data(folder: Path, endpoint: str) -> None:
    """Rows and base model, which the job begins with when they are there."""
    store = {**KEYS, "COWEST_S3_ENDPOINT": endpoint, "AWS_REGION": "us-east-1"}
    run(
        sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(folder / "data"), "--seed", "0", OMP_NUM_THREADS="1"
    )
    for name in ("train.jsonl", "held_out.jsonl", "base"):
        run(*COWEST, "upload", str(folder / "data" / name), f"s3://pocket/data/{name}", **store)


def show() -> None:
    """What there is, for who reads a failed run."""
    for what in (("describe", "collaborationjob"), ("get", "all,jobs,workflows,networkpolicies,events")):
        print(kubectl(*what, check=False, namespace=NAMESPACE)[-6000:], flush=True)
