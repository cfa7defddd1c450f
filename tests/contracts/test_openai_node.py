"""The suite of openai-node, run by Node against the gateway's process with two models' processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contracts.openai_world import KEYS, openai_world

SUITE = Path(__file__).with_name("openai-node")


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
def test_the_suite_with_openais_sdk_for_node_passes(tmp_path: Path) -> None:
    if not (SUITE / "node_modules" / "openai" / "package.json").exists():
        install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(install, cwd=SUITE, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    with openai_world(tmp_path) as world:
        addresses = {"COWEST_URL": world.url, "STRONG_URL": world.strong.url, "WEAK_URL": world.weak.url}
        ended = subprocess.run(
            ["node", "--test", "--test-reporter=tap", "openai.test.mjs"],
            cwd=SUITE,
            env=os.environ | addresses | {"COWEST_KEY": KEYS[0], "OTHER_KEY": KEYS[1]},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    passed = re.search(r"^# pass (\d+)$", ended.stdout, re.MULTILINE)
    assert passed is not None and int(passed[1]) >= 95, "the suite ran only in part"
