"""Where COWEST_NO_SKIPS is set (continuous integration), a test that was not run fails the run."""

from __future__ import annotations

import os

import pytest


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and os.environ.get("COWEST_NO_SKIPS"):
        reporter.write_line(f"{len(skipped)} tests were not run, and COWEST_NO_SKIPS is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
