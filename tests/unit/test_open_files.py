"""A process that answers many connections takes the files that it may have."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

TAKE = """
import resource
from cowest_serving.open_files import allow_many_connections
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
allow_many_connections()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
CLIENTS = """
import resource
from cowest_serving.open_files import connections_within
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
print(connections_within(100))
"""
OURS = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize(("soft", "hard"), [(64, 512), (512, 512)])
def test_the_soft_limit_is_raised_to_the_hard_one(soft: int, hard: int) -> None:
    assert OURS == resource.RLIM_INFINITY or hard <= OURS
    said = subprocess.run(
        [sys.executable, "-P", "-c", TAKE.format(soft=soft, hard=hard)], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(hard), str(hard)]


@pytest.mark.parametrize(("files", "clients"), [(512, 100), (290, 30), (100, 1)])
def test_clients_have_a_third_of_the_files_that_are_not_its_own(files: int, clients: int) -> None:
    said = subprocess.run(
        [sys.executable, "-P", "-c", CLIENTS.format(files=files)], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(clients)]
