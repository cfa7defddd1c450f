"""Counters and latency histograms in Prometheus' text format: the little that a gateway needs of a client."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Values by name and labels. Not thread-safe: for one event loop."""

    def __init__(self, help_texts: Mapping[str, str]) -> None:
        self._help = help_texts
        self._counts: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._observed: dict[str, dict[Labels, _Histogram]] = defaultdict(lambda: defaultdict(_Histogram))

    def count(self, name: str, **labels: str) -> None:
        self._counts[name][_labels(labels)] += 1

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        self._observed[name][_labels(labels)].add(seconds)

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


class _Histogram:
    def __init__(self) -> None:
        self.buckets = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: Labels) -> Iterable[str]:
        seen = 0
        for limit, n in zip((*SECONDS, "+Inf"), self.buckets, strict=True):
            seen += n
            yield _sample(f"{name}_bucket", (*labels, ("le", str(limit))), seen)
        yield _sample(f"{name}_sum", labels, self.total)
        yield _sample(f"{name}_count", labels, seen)


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _samples(name: str, values: Mapping[Labels, float]) -> list[str]:
    return [_sample(name, labels, value) for labels, value in values.items()]


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:.15g}" if inside else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
