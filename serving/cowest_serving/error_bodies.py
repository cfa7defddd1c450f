"""A model whose refusals keep the endpoint's own error object: for those who pass it on (the proxy) or go by its code
(steps behind the proxy). Calls may carry headers of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp

from cowest_serving.models import HttpChatModel, ModelError, error_object, fault, retry_after

MAX_ERROR_BODY = 8192


class ErrorBody(Exception):
    """The cause of a `ModelError` where an endpoint answered with a status other than 2xx."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(error.get("message"))
        self.status = status
        self.error = error  # OpenAI's error object; of any other body the head, as its message

    @property
    def code(self) -> str:
        return str(self.error.get("code") or "")

    @property
    def message(self) -> str:
        return str(self.error.get("message") or "")


class OutspokenModel(HttpChatModel):
    """`HttpChatModel` that adds `headers` to each call and raises its errors with an `ErrorBody` as their cause."""

    def __init__(self, endpoint: str, model: str, *, headers: Mapping[str, str] | None = None, **limits: Any) -> None:
        super().__init__(endpoint, model, **limits)
        self._more_headers = dict(headers or {})

    def _headers(self, key: str) -> dict[str, str]:
        return super()._headers(key) | self._more_headers

    def _connected(self) -> aiohttp.ClientSession:
        is_new = self._session is None
        session = super()._connected()
        if is_new:
            trace = aiohttp.TraceConfig()
            trace.on_request_end.append(self._refuse)
            trace.freeze()
            session.trace_configs.append(trace)
        return session

    async def _refuse(
        self, _: aiohttp.ClientSession, __: SimpleNamespace, ended: aiohttp.TraceRequestEndParams
    ) -> None:
        """Before anything else reads the body of a refusal: it can be read once only."""
        response = ended.response
        if response.status < 400:
            return
        data = b""
        while len(data) < MAX_ERROR_BODY and (more := await response.content.read(MAX_ERROR_BODY)):
            data += more
        error = error_object(data)
        wait = retry_after({name.lower(): value for name, value in response.headers.items()}, time.time())
        raise fault(self.endpoint, response.status, error, wait) from ErrorBody(response.status, error)


def body_of(error: ModelError) -> ErrorBody | None:
    return error.__cause__ if isinstance(error.__cause__, ErrorBody) else None
