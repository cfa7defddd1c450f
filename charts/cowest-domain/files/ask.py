"""Asks the gateway one question, as `helm test` does: `python ask.py URL QUESTION WAIT_SECONDS [KEYS_FOLDER]`"""

# ruff: noqa: T201

import json
import pathlib
import sys
import time
import urllib.error
import urllib.request


def main() -> None:
    url, question, wait, *keys = sys.argv[1:]
    headers = {"Content-Type": "application/json"}
    if keys:
        key = next(p for p in sorted(pathlib.Path(keys[0]).iterdir()) if p.is_file())
        headers["Authorization"] = "Bearer " + key.read_text().split()[0]
    until_ready(url, float(wait))
    body = {"model": "cowest", "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            content = json.load(answer)["choices"][0]["message"]["content"]
            print({name: value for name, value in answer.headers.items() if name.lower().startswith("x-cowest")})
    except urllib.error.HTTPError as error:
        raise SystemExit(f"wanted an answer, saw {error.code}: {error.read().decode(errors='replace')}") from error
    print(content)
    if not content.strip():
        raise SystemExit("wanted an answer, saw an empty one")


def until_ready(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"wanted {url}/readyz to say ready within {seconds:.0f} s, saw: {error}. "
                    "kubectl describe collaborationjob says what is missing."
                ) from error
            time.sleep(1)


if __name__ == "__main__":
    main()
