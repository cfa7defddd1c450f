"""Prometheus' text format."""

from __future__ import annotations

from cowest_serving.metrics import Metrics, merged


def test_counters_gauges_and_histograms_read_as_prometheus_wants_them() -> None:
    metrics = Metrics({"n_total": "Things.", "s": "Time.", "g": "Now."})
    metrics.count("n_total", b="2", a="1")
    metrics.count("n_total", a="1", b="2")
    metrics.observe("s", 0.3)
    metrics.observe("s", 99)
    lines = metrics.text({"g": {(): 12345678.0}}).splitlines()
    assert lines[:3] == ["# HELP n_total Things.", "# TYPE n_total counter", 'n_total{a="1",b="2"} 2']
    assert lines[3:6] == ["# HELP g Now.", "# TYPE g gauge", "g 12345678"]
    assert 's_bucket{le="0.25"} 0' in lines
    assert 's_bucket{le="0.5"} 1' in lines
    assert 's_bucket{le="60"} 1' in lines
    assert lines[-3:] == ['s_bucket{le="+Inf"} 2', "s_sum 99.3", "s_count 2"]


def test_a_label_cannot_break_out_of_its_line() -> None:
    metrics = Metrics({"n_total": "Things."})
    metrics.count("n_total", model='a"} 1\nb\\')
    assert metrics.text().splitlines()[-1] == 'n_total{model="a\\"} 1\\nb\\\\"} 1'


def test_the_counters_of_workers_are_told_apart_by_a_label_and_said_once_what_they_are() -> None:
    texts = {}
    for worker, name in enumerate("ab"):
        metrics = Metrics({"n_total": "Things.", "s": "Time.", "g": "Now."})
        metrics.count("n_total", a="x y{", of=name)
        metrics.observe("s", worker)
        texts[str(worker)] = metrics.text({"g": {(): float(worker)}})
    lines = merged(texts).splitlines()
    assert lines[:4] == [
        "# HELP n_total Things.",
        "# TYPE n_total counter",
        'n_total{worker="0",a="x y{",of="a"} 1',
        'n_total{worker="1",a="x y{",of="b"} 1',
    ]
    assert lines[4:8] == ["# HELP g Now.", "# TYPE g gauge", 'g{worker="0"} 0', 'g{worker="1"} 1']
    assert 's_bucket{worker="1",le="0.5"} 0' in lines and 's_sum{worker="1"} 1' in lines
    assert merged({}) == ""
