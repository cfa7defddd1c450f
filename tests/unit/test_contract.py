"""Reports, as steps write and gates read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from cowest_training.contract import Comparison, LiveReport, RouteReport, SliceReport, load_live_report, load_report
from tests import world as w

OFFLINE = w.report(
    slices=(SliceReport("flu", 10, 0.1, 0.0, 0.2),), routes=(RouteReport("control", "weakAlone", 9, 3, 0.1, 0.0, 0.2),)
)
LIVE = w.live(arms=OFFLINE.arms, differences=((0.5, 3),), pending=("t1",))


def newer(value: Any) -> Any:
    """With a field more in each part, as a later version may write it. Counts by name or by value have none."""
    if isinstance(value, list):
        return [newer(each) for each in value]
    if isinstance(value, dict):
        return {name: newer(part) for name, part in value.items()} | {"later": 1}
    return value


@pytest.mark.parametrize(
    ("report", "load"),
    [pytest.param(OFFLINE, load_report, id="offline"), pytest.param(LIVE, load_live_report, id="live")],
)
def test_a_report_of_a_later_version_is_read_for_what_is_known(report: Any, load: Callable[[Any], Any]) -> None:
    written = json.loads(json.dumps(asdict(report)))
    assert load(written) == report
    counts = {name: part for name, part in written.items() if isinstance(part, dict) and name not in COMPARISONS}
    assert load({**newer(written), **counts}) == report


COMPARISONS = ("comparison", "against_control", "against_solo")


def test_a_live_report_without_a_comparison_is_one() -> None:
    empty = LiveReport("a", "b", 0, {}, {}, {})
    assert load_live_report(asdict(empty)) == empty
    assert isinstance(load_live_report(asdict(LIVE)).comparison, Comparison)
