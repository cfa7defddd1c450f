"""An API server in small, in memory, with the methods of `cowest_operator.kube.Kube`: for tests of what is written."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cowest_operator import api
from cowest_operator.kube import KubeError

Key = tuple[str, str, str]  # (kind, namespace, name)


class KubeInMemory:
    """Keeps objects whole; an apply replaces what it names. `refuses` answers a verb on a kind with an error."""

    def __init__(self, *objects: Mapping[str, Any]) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.refuses: dict[tuple[str, str, str], KubeError] = {}  # (verb, kind, namespace) -> what it says
        self.immutable: set[str] = set()  # kinds of which nothing that is there can be applied to
        self.writes: list[tuple[str, str, str]] = []  # (verb, kind, name)
        self._numbers = itertools.count(100)
        for each in objects:  # as they are, version and all
            self.objects[each["kind"], each["metadata"]["namespace"], each["metadata"]["name"]] = dict(each)

    def keep(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """As another client would put it there."""
        key = (body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])
        number, before = str(next(self._numbers)), self.objects.get(key, {}).get("metadata", {})
        metadata = {"uid": before.get("uid", f"uid-{number}"), **body["metadata"], "resourceVersion": number}
        self.objects[key] = {**body, "metadata": metadata}
        return self.objects[key]

    def of(self, kind: str) -> list[str]:
        return [name for found, _, name in self.objects if found == kind]

    def _asked(self, verb: str, kind: str, namespace: str) -> None:
        for key in ((verb, kind, namespace), (verb, kind, "")):
            if key in self.refuses:
                raise self.refuses[key]

    # ------------------------------------------------------------ as Kube
    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self._asked("get", kind, namespace)
        return self.objects.get((kind, namespace, name))

    async def list(self, kind: str, namespace: str, chunk: int = 0, **query: str) -> AsyncIterator[dict[str, Any]]:
        self._asked("list", kind, namespace)
        wanted = query.get("fieldSelector", "").removeprefix("metadata.name=")
        for (found, where, name), body in list(self.objects.items()):
            if found == kind and namespace in ("", where) and wanted in ("", name):
                yield {field: value for field, value in body.items() if field not in ("kind", "apiVersion")}

    async def names(self, kind: str, namespace: str, **query: str) -> tuple[int, set[tuple[str, str]]]:
        self._asked("list", kind, namespace)
        found = {(where, name) for each, where, name in self.objects if each == kind and namespace in ("", where)}
        return next(self._numbers), found

    async def apply(self, child: Mapping[str, Any], manager: str = "") -> dict[str, Any]:
        kind, metadata = child["kind"], child["metadata"]
        self.writes.append(("apply", kind, metadata["name"]))
        self._asked("apply", kind, metadata["namespace"])
        if kind in self.immutable and (kind, metadata["namespace"], metadata["name"]) in self.objects:
            raise KubeError(422, f"{kind} {metadata['name']}: spec.selector: field is immutable")
        return self.keep(child)

    async def create(self, child: Mapping[str, Any]) -> bool:
        key = (child["kind"], child["metadata"]["namespace"], child["metadata"]["name"])
        self.writes.append(("create", key[0], key[2]))
        self._asked("create", key[0], key[1])
        if key in self.objects:
            return False
        self.keep(child)
        return True

    async def patch(self, kind: str, namespace: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Of annotations alone."""
        self.writes.append(("patch", kind, name))
        self._asked("patch", kind, namespace)
        if (found := self.objects.get((kind, namespace, name))) is None:
            raise KubeError(404, f"{name} not found")
        notes = {**found["metadata"].get("annotations", {}), **body["metadata"]["annotations"]}
        return self.keep({**found, "metadata": {**found["metadata"], "annotations": notes}})

    async def delete(self, kind: str, namespace: str, name: str, uid: str | None = None) -> None:
        self.writes.append(("delete", kind, name))
        self._asked("delete", kind, namespace)
        found = self.objects.get((kind, namespace, name))
        if found is not None and uid not in (None, found["metadata"]["uid"]):
            raise KubeError(409, "the UID in the precondition does not match")
        self.objects.pop((kind, namespace, name), None)

    async def apply_status(self, namespace: str, name: str, status: Mapping[str, Any], version: int) -> dict[str, Any]:
        self._asked("status", api.KIND, namespace)
        found = self.objects.get((api.KIND, namespace, name))
        if found is None or int(found["metadata"]["resourceVersion"]) != version:
            raise KubeError(404 if found is None else 409, f"{name} is not of version {version}")
        self.writes.append(("status", api.KIND, name))
        return self.keep({**found, "status": dict(status)})
