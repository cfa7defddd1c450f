"""The gateway's description for machines, as `/openapi.json` gives it: docs/openapi.yaml as JSON."""

from __future__ import annotations

import functools
from pathlib import Path

import orjson
import yaml

FILE = "openapi.yaml"


def description_path() -> Path:
    """The description beside this module (installed), or in the repository."""
    installed = Path(__file__).with_name(FILE)
    return installed if installed.exists() else Path(__file__).parents[2] / "docs" / FILE


@functools.cache
def description() -> bytes:
    """Read once a process, and only where somebody asks for it."""
    return orjson.dumps(yaml.safe_load(description_path().read_text("utf-8")))
