"""How many gateways there are, while it passes from the manifest to an autoscaler and back."""

from __future__ import annotations

from tests.apiserver.conftest import JOBS
from tests.apiserver.playground import DEPLOYMENTS, Playground, apply, manifest_of

GATEWAY = f"{DEPLOYMENTS}/claims-gateway"


def replicas(playground: Playground) -> int | None:
    found = playground.get(GATEWAY)
    return int(found["spec"]["replicas"]) if found else None


def autoscale(playground: Playground, number: int) -> None:
    """As a HorizontalPodAutoscaler does it."""
    scale = playground.get(f"{GATEWAY}/scale")
    status, answer = playground.server.request("PUT", f"{GATEWAY}/scale", {**scale, "spec": {"replicas": number}})
    assert status == 200, answer


def applies(playground: Playground) -> int:
    """How often the operator has had a Deployment observed: an apply that changes nothing is not counted."""
    return int(playground.get(GATEWAY)["metadata"]["generation"])


def test_gateways_stay_as_many_while_their_number_goes_to_an_autoscaler_and_back(playground: Playground) -> None:
    with playground.operator():
        apply(playground, manifest_of("claims", gateway={"replicas": 3}))
        playground.wait(lambda: replicas(playground) == 3, "three gateways")
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"gateway": {"maxReplicas": 6}}})
        scaler = "/apis/autoscaling/v2/namespaces/default/horizontalpodautoscalers/claims-gateway"
        playground.wait(lambda: playground.get(scaler) is not None, "the autoscaler")
        assert replicas(playground) == 3, "not one, until the autoscaler looks at it"
        autoscale(playground, 5)
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"strong": {"maxTokens": 77}}})
        before = applies(playground)
        playground.wait(lambda: applies(playground) > before, "an edit that rolls")
        assert replicas(playground) == 5
        playground.server.request("PATCH", f"{JOBS}/claims", {"spec": {"gateway": {"maxReplicas": None}}})
        playground.wait(lambda: replicas(playground) == 3, "three gateways again")
