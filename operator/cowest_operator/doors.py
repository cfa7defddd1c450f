"""The HTTP doors of a job's own pods: observer, proxy, gateway and weak-model servers. Small facts, short waits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(total=8, connect=3)


Part = Literal["observer", "proxy", "gateway", "weak-model"]
WHO: Mapping[Part, str] = {
    "observer": "the observer",
    "proxy": "the strong-model proxy",
    "gateway": "the gateway",
    "weak-model": "the weak-model server",
}


class DoorError(Exception):
    """A pod of ours does not answer, or says that what is behind it is away. One sentence; `part` is whose pod.

    `answered`: it says so itself, perhaps with a `reason`, where that is something else than what is behind it.
    """

    def __init__(self, part: Part, message: str, *, answered: bool = False, reason: str = "") -> None:
        super().__init__(f"{WHO[part]} {message}")
        self.part, self.answered, self.reason = part, answered, reason


class Doors:
    """Asks by URL; every answer is JSON. Raises `DoorError`; what is not there is `None`."""

    def __init__(self, session: aiohttp.ClientSession | None = None) -> None:
        self._session = session

    async def artifact(self, observer: str, uri: str) -> Any:
        return await self._get(f"{observer}/v1/artifact?uri={quote(uri, safe='')}", "observer")

    async def traces(self, observer: str, since: float = 0.0) -> Any:
        """`since`: of the usable ones, those given after that are counted apart."""
        return await self._get(f"{observer}/v1/traces" + (f"?since={since!r}" if since else ""), "observer")

    async def spent(self, proxy: str, round_number: int) -> Any:
        return await self._get(f"{proxy}/v1/spent?round={round_number}", "proxy")

    async def readiness(self, gateway: str) -> Any:
        return await self._get(f"{gateway}/readyz", "gateway")

    async def served(self, endpoint: str) -> list[str]:
        """Digests (and names) that a weak-model server says it serves, because it was asked."""
        answer = await self._get(f"{endpoint}/models", "weak-model")
        models = (answer or {}).get("data") or []
        return [str(model[field]) for model in models for field in ("digest", "id") if model.get(field)]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _get(self, url: str, part: Part) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        try:
            async with self._session.get(url) as answer:
                body = await answer.read()
                if answer.status == 404:
                    return None
                if answer.status >= 400:
                    words, reason = _words(body)
                    raise DoorError(part, f"answers {answer.status}: {words}", answered=True, reason=reason)
                return json.loads(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise DoorError(part, f"does not answer ({error or type(error).__name__}).") from error
        except ValueError as error:
            raise DoorError(part, f"answered no JSON at {url}.") from error


def _words(body: bytes) -> tuple[str, str]:
    """What it says, and its reason where it gives one."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), str(error.get("reason") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.decode(errors="replace")[:300], ""
