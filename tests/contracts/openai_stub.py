"""A model behind the OpenAI protocol that does all that the protocol says, as a process of its own.

    python tests/contracts/openai_stub.py              # prints its port

It answers `echo: <the last user text>` and does as `metadata` says, which the gateway passes on:

    {"fail": "429", "times": "1", "id": "x", "headers": "{...}", "error": "{...}"}   that status, so often for that id
    {"say": "..."}                  this text              {"refuse": "..."}          a refusal in place of content
    {"finish": "length"}            why it ended           {"seconds": "2"}           waits so long before it answers
    {"pause": "0.5"}                (stream) waits between chunks; with "pause_at" before that chunk alone, from 0
    {"cut": "2"}                    (stream) breaks off after so many chunks

GET /calls gives each call as it arrived, DELETE /calls forgets them.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import web

FINGERPRINT = "fp_stub"


class Stub:
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.failed: Counter[str] = Counter()
        self.broken_off = 0  # calls whose client left before the end

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.calls.append({"body": asked, "headers": headers})
        script: Mapping[str, str] = asked.get("metadata") or {}
        try:
            completion(asked)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            return web.json_response({"error": {"message": f"{type(error).__name__}: {error}"}}, status=400)
        try:
            if (failure := self._failure(script)) is not None:
                return failure
            await asyncio.sleep(float(script.get("seconds", 0)))
            if asked.get("stream"):
                return await self._stream(request, asked, script)
            return web.json_response(completion(asked))
        except (asyncio.CancelledError, ConnectionResetError):
            self.broken_off += 1
            raise

    def _failure(self, script: Mapping[str, str]) -> web.Response | None:
        if "fail" not in script or self.failed[script["id"]] >= int(script.get("times", 1)):
            return None
        self.failed[script["id"]] += 1
        error = json.loads(script.get("error", '{"message": "scripted"}'))
        headers = json.loads(script.get("headers", "{}"))
        return web.json_response({"error": error}, status=int(script["fail"]), headers=headers)

    async def _stream(
        self, request: web.Request, asked: Mapping[str, Any], script: Mapping[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number, chunk in enumerate(chunks(asked)):
            if number == int(script.get("cut", -1)):
                assert request.transport is not None
                request.transport.abort()
                return response
            if number and number == int(script.get("pause_at", number)):
                await asyncio.sleep(float(script.get("pause", 0)))
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def told(self, _: web.Request) -> web.Response:
        return web.json_response({"calls": self.calls, "broken_off": self.broken_off})

    async def forget(self, _: web.Request) -> web.Response:
        self.calls.clear()
        self.broken_off = 0
        return web.json_response({})


# ---------------------------------------------------------------- answers
def completion(asked: Mapping[str, Any]) -> dict[str, Any]:
    choices = []
    for index in range(asked.get("n") or 1):
        message = message_of(asked, index)
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": finish_of(asked, message)}
        choices.append(choice | {"logprobs": logprobs_of(asked, message)})
    return head(asked, "chat.completion") | {"choices": choices, "usage": usage_of(asked, choices)}


def head(asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    base = {"id": f"chatcmpl-{abs(hash(json.dumps(asked, sort_keys=True)))}", "object": kind, "created": 1700000000}
    return base | {"model": "big-2026-10-01", "system_fingerprint": FINGERPRINT, "service_tier": "default"}


def message_of(asked: Mapping[str, Any], index: int) -> dict[str, Any]:
    script = asked.get("metadata") or {}
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    if "refuse" in script:
        return message | {"refusal": script["refuse"]}
    if calls := tool_calls(asked):
        return message | {"tool_calls": calls}
    if "audio" in (asked.get("modalities") or []):
        return message | {"audio": {"id": "audio_1", "data": "UklGRg==", "expires_at": 1700003600, "transcript": "hi"}}
    return message | {"content": script.get("say") or text_of(asked, index)}


def text_of(asked: Mapping[str, Any], index: int) -> str:
    shape = asked.get("response_format") or {}
    if shape.get("type") == "json_schema":
        return json.dumps(example(shape["json_schema"]["schema"], shape["json_schema"]["schema"]))
    if shape.get("type") == "json_object":
        return '{"ok": true}'
    said = "echo: " + last_text(asked) + (f" #{index}" if index else "")
    stops = asked.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        said = said.partition(stop)[0]
    longest = asked.get("max_completion_tokens") or asked.get("max_tokens")
    return " ".join(said.split(" ")[:longest]) if longest else said


def last_text(asked: Mapping[str, Any]) -> str:
    content = next((m.get("content") for m in reversed(asked["messages"]) if m["role"] in ("user", "tool")), "") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or f"<{part['type']}>" for part in content)


def tool_calls(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each tool while none has answered; of one where `parallel_tool_calls` is false."""
    choice = asked.get("tool_choice")
    if choice == "none" or not asked.get("tools") or asked["messages"][-1]["role"] == "tool":
        return []
    tools = asked["tools"][:1] if asked.get("parallel_tool_calls") is False else asked["tools"]
    named = choice["function"]["name"] if isinstance(choice, dict) else ""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(example(schema, schema))},
        }
        for n, (name, schema) in enumerate(schemas.items())
        if named in ("", name)
    ]


def example(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A value that the schema takes."""
    if "$ref" in schema:
        return example(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return example(schema["anyOf"][0], root)
    if "enum" in schema:
        return schema["enum"][0]
    simple = {"string": "text", "integer": 7, "number": 1.5, "boolean": True, "null": None}
    if schema.get("type") == "array":
        return [example(schema["items"], root)]
    if schema.get("type") in simple:
        return simple[schema["type"]]
    return {name: example(inner, root) for name, inner in schema.get("properties", {}).items()}


def finish_of(asked: Mapping[str, Any], message: Mapping[str, Any]) -> str:
    if said := (asked.get("metadata") or {}).get("finish"):
        return str(said)
    if message.get("tool_calls"):
        return "tool_calls"
    longest = asked.get("max_completion_tokens") or asked.get("max_tokens")
    return "length" if longest and len(str(message["content"]).split(" ")) >= longest else "stop"


def logprobs_of(asked: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any] | None:
    if not asked.get("logprobs"):
        return None
    top = [{"token": f"t{n}", "logprob": -1.0 - n, "bytes": None} for n in range(asked.get("top_logprobs") or 0)]
    words = str(message["content"]).split(" ")
    content = [{"token": w, "logprob": -0.5, "bytes": list(w.encode()), "top_logprobs": top} for w in words]
    return {"content": content, "refusal": None}


def usage_of(asked: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    taken_in = sum(len(str(message.get("content")).split()) for message in asked["messages"])
    given_out = sum(len(str(choice["message"]["content"]).split()) for choice in choices)
    return {
        "prompt_tokens": taken_in,
        "completion_tokens": given_out,
        "total_tokens": taken_in + given_out,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


# ---------------------------------------------------------------- streams
def chunks(asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    whole = completion(asked)
    base = head(asked, "chat.completion.chunk") | {"id": whole["id"]}
    wants_usage = (asked.get("stream_options") or {}).get("include_usage")
    if wants_usage:
        base["usage"] = None
    for choice in whole["choices"]:
        for delta, logprobs in deltas(choice):
            said = {"index": choice["index"], "delta": delta, "logprobs": logprobs, "finish_reason": None}
            yield base | {"choices": [said]}
        end = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        yield base | {"choices": [end]}
    if wants_usage:
        yield base | {"choices": [], "usage": whole["usage"]}


def deltas(choice: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    message, logprobs = choice["message"], choice["logprobs"]
    yield {"role": "assistant", "content": None if message["content"] is None else "", "refusal": None}, None
    if message["refusal"]:
        for word in spaced(message["refusal"]):
            yield {"refusal": word}, None
    for number, call in enumerate(message.get("tool_calls") or []):
        yield {"tool_calls": [call | {"index": number, "function": call["function"] | {"arguments": ""}}]}, None
        for part in halves(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": number, "function": {"arguments": part}}]}, None
    for number, word in enumerate(spaced(message["content"] or "")):
        token = {"content": [logprobs["content"][number]], "refusal": None} if logprobs else None
        yield {"content": word}, token


def spaced(text: str) -> list[str]:
    """Words that make the text again when put together."""
    words = text.split(" ")
    return [word if number == 0 else " " + word for number, word in enumerate(words)] if text else []


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


async def serve() -> None:
    stub = Stub()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/chat/completions", stub.chat)
    app.router.add_get("/calls", stub.told)
    app.router.add_delete("/calls", stub.forget)
    runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
