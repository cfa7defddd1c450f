"""The benchmark that kills the gateway, made small: what it counts must be counted, and be 0 where it should."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.torture_gateway import Options, torture


async def test_a_gateway_killed_under_load_keeps_what_it_promised_and_breaks_no_answer(tmp_path: Path) -> None:
    seen = await torture(tmp_path, Options(kills=6, rate=40, outage=2))
    assert seen["acknowledged"] > 20
    assert seen["cut_by_kills"] > 0 and seen["disk"] > 0
    assert (seen["lost"], seen["duplicated"], seen["broken_answers"]) == (0, 0, 0)
