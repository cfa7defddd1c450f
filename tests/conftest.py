"""Where COWEST_NO_SKIPS is set (continuous integration), a test that was not run fails the run.

GPUs are hidden from all tests but those marked `gpu`: results are the same on every machine.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes that tests start, too


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and os.environ.get("COWEST_NO_SKIPS"):
        reporter.write_line(f"{len(skipped)} tests were not run, and COWEST_NO_SKIPS is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
