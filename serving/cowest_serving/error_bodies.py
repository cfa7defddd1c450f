"""A model whose refusals keep the endpoint's own error object: for those who pass it on (the proxy) or go by its code
(steps behind the proxy). Calls may carry headers of their own, and keys that are read anew for each attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cowest_serving.key_files import ReadKeys
from cowest_serving.key_pool import Key
from cowest_serving.models import HttpChatModel, ModelError, Unauthorized, error_object
from cowest_serving.wire import Response

CODE_KEY_REFUSED = "strong_key_refused"  # the proxy's word that its own key was refused, and not its client's


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

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        headers: Mapping[str, str] | None = None,
        read_keys: ReadKeys,
        **limits: Any,
    ) -> None:
        self._read_keys = read_keys
        super().__init__(endpoint, model, api_keys=self._read_keys(), **limits)
        self._more_headers = dict(headers or {})

    def renew_keys(self) -> None:
        self.keys.renew(self._read_keys())

    async def _key(self, give_up_at: float) -> Key:
        self.renew_keys()
        return await super()._key(give_up_at)

    def _headers(self, key: str) -> dict[str, str]:
        return super()._headers(key) | self._more_headers

    def _refusal(self, response: Response) -> ModelError:
        refusal = super()._refusal(response)
        if response.status >= 400:
            error = error_object(response.body)
            if error.get("code") == CODE_KEY_REFUSED:
                refusal = Unauthorized(str(error["message"]), status=response.status)
            refusal.__cause__ = ErrorBody(response.status, error)
        return refusal


def body_of(error: ModelError) -> ErrorBody | None:
    return error.__cause__ if isinstance(error.__cause__, ErrorBody) else None
