"""Counters and histograms in Prometheus' text format: the little that a gateway needs of a client.

Calls of models are named as OpenTelemetry's semantic conventions for generative AI have them, in the form that
OpenTelemetry gives to Prometheus: gen_ai.client.operation.duration (s) and gen_ai.client.token.usage ({token}).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
DURATION, TOKEN_USAGE = "gen_ai_client_operation_duration_seconds", "gen_ai_client_token_usage"
GEN_AI = {
    DURATION: "Time of a call of a model with its retries, by error type where it failed.",
    TOKEN_USAGE: "Tokens of a call of a model, by direction.",
}
BUCKETS: Mapping[str, tuple[float, ...]] = {  # those that the conventions name
    DURATION: (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    TOKEN_USAGE: tuple(4**n for n in range(14)),
}
Labels = tuple[tuple[str, str], ...]


class ModelCall(NamedTuple):
    """One call of a model, for `Metrics.observe_call`. `provider`: whose protocol it speaks."""

    provider: str
    endpoint: str
    model: str  # as it was asked for
    answered_by: str  # as the endpoint named it, "" without an answer
    seconds: float
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


class Metrics:
    """Values by name and labels. Not thread-safe: for one event loop."""

    def __init__(self, help_texts: Mapping[str, str]) -> None:
        self._help = help_texts
        self._counts: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._observed: dict[str, dict[Labels, _Histogram]] = defaultdict(dict)

    def count(self, name: str, **labels: str) -> None:
        self._counts[name][_labels(*labels.items())] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._histogram(name, _labels(*labels.items())).add(value)

    def observe_call(self, call: ModelCall) -> None:
        duration, taken_in, given_out = _labels_of_call(
            call.provider, call.endpoint, call.model, call.answered_by, call.error
        )
        self._histogram(DURATION, duration).add(call.seconds)
        if call.input_tokens:
            self._histogram(TOKEN_USAGE, taken_in).add(call.input_tokens)
        if call.output_tokens:
            self._histogram(TOKEN_USAGE, given_out).add(call.output_tokens)

    def _histogram(self, name: str, labels: Labels) -> _Histogram:
        histograms = self._observed[name]
        if (histogram := histograms.get(labels)) is None:
            histogram = histograms[labels] = _Histogram(BUCKETS.get(name, SECONDS))
        return histogram

    def text(self, gauges: Mapping[str, Mapping[Labels, float]] | None = None) -> str:
        """Everything, with `gauges` that are read now rather than counted."""
        lines: list[str] = []
        for name, values in self._counts.items():
            lines += [*self._head(name, "counter"), *_samples(name, values)]
        for name, read in (gauges or {}).items():
            lines += [*self._head(name, "gauge"), *_samples(name, read)]
        for name, histograms in self._observed.items():
            lines += self._head(name, "histogram")
            for labels, histogram in histograms.items():
                lines += histogram.lines(name, labels)
        return "\n".join([*lines, ""])

    def _head(self, name: str, kind: str) -> list[str]:
        return [f"# HELP {name} {self._help[name]}", f"# TYPE {name} {kind}"]


def merged(texts: Mapping[str, str]) -> str:
    """The text of several workers as one, by the name of each in a label `worker`."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith("#"):
                name = line.split(" ", 3)[2]
                if line not in heads.setdefault(name, []):
                    heads[name].append(line)
            else:
                samples.setdefault(name, []).append(_of_worker(line, worker))
    return "\n".join([line for name in heads for line in (*heads[name], *samples.get(name, ()))] + [""])


def _of_worker(sample: str, worker: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{worker="{worker}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{worker="{worker}"}} {value}'


class _Histogram:
    def __init__(self, limits: tuple[float, ...]) -> None:
        self._limits = limits
        self.buckets = [0] * (len(limits) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.buckets[bisect_left(self._limits, value)] += 1
        self.total += value

    def lines(self, name: str, labels: Labels) -> Iterable[str]:
        seen = 0
        for limit, n in zip((*self._limits, "+Inf"), self.buckets, strict=True):
            seen += n
            yield _sample(f"{name}_bucket", (*labels, ("le", str(limit))), seen)
        yield _sample(f"{name}_sum", labels, self.total)
        yield _sample(f"{name}_count", labels, seen)


@lru_cache(4096)
def _labels(*labels: tuple[str, str]) -> Labels:
    return tuple(sorted(labels))


@lru_cache(4096)
def _labels_of_call(
    provider: str, endpoint: str, model: str, answered_by: str, error: str
) -> tuple[Labels, Labels, Labels]:
    """Of its duration, of the tokens that it took in, and of those that it gave out."""
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": provider,
        "gen_ai_request_model": model,
        "server_address": urlsplit(endpoint).hostname or "",
    }
    if answered_by:
        labels["gen_ai_response_model"] = answered_by
    of_errors = {"error_type": error} if error else {}
    taken_in, given_out = ({**labels, "gen_ai_token_type": kind} for kind in ("input", "output"))
    return _labels(*{**labels, **of_errors}.items()), _labels(*taken_in.items()), _labels(*given_out.items())


def _samples(name: str, values: Mapping[Labels, float]) -> list[str]:
    return [_sample(name, labels, value) for labels, value in values.items()]


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:.15g}" if inside else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
