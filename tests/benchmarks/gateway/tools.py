"""What the benchmarks need beside Python, made at the first use: the load generator, and the peers at pinned versions.

Each peer has an environment of its own under ~/.cache/cowest-bench (COWEST_BENCH_CACHE), from the registries alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.gateway.processes import Unavailable

ROOT = Path(__file__).resolve().parents[3]
CACHE = Path(os.environ.get("COWEST_BENCH_CACHE") or Path.home() / ".cache" / "cowest-bench")
SOURCE = Path(__file__).parent / "loadgen"

LITELLM, PORTKEY, VLLM_ROUTER, SMG, RAY = "1.108.7", "1.15.2", "0.1.17", "1.13.0", "2.60.0"


def loadgen() -> Path:
    """The load generator, built when its source is newer. Ends the program where there is no Go."""
    binary = ROOT / "build" / "loadgen"
    newest = max(path.stat().st_mtime for path in SOURCE.iterdir())
    if binary.exists() and binary.stat().st_mtime >= newest:
        return binary
    if not shutil.which("go"):
        sys.exit("The load generator needs Go 1.19 or newer, saw no `go` on PATH: apt-get install golang-go")
    binary.parent.mkdir(exist_ok=True)
    subprocess.run(["go", "build", "-o", binary, "."], cwd=SOURCE, check=True)
    return binary


def venv(name: str, *requirements: str) -> Path:
    """The bin folder of an environment that holds these."""
    folder = CACHE / name
    uv = Path(sys.executable).with_name("uv")
    with _made_once(folder, "\n".join(requirements)) as make:
        if make:
            _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder])
            _run([uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *requirements])
    return folder / "bin"


def npm(name: str, package: str) -> Path:
    """The node_modules folder of a package."""
    folder = CACHE / name
    if not shutil.which("npm"):
        raise Unavailable("it needs npm, saw none on PATH: apt-get install npm")
    with _made_once(folder, package) as make:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            _run(["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "--loglevel", "error", package])
    return folder / "node_modules"


def nginx() -> Path:
    """The one on PATH, or Debian's package unpacked: nothing is started or installed."""
    for place in (shutil.which("nginx"), "/usr/sbin/nginx"):
        if place and Path(place).exists():
            return Path(place)
    folder = CACHE / "nginx"
    if not shutil.which("apt-get"):
        raise Unavailable("it needs nginx, saw none on PATH and no apt-get to fetch it with")
    with _made_once(folder, "nginx") as make:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            _run(["apt-get", "download", "nginx"], cwd=folder)
            for package in folder.glob("*.deb"):
                _run(["dpkg-deb", "-x", package, folder])
    return folder / "usr" / "sbin" / "nginx"


def ray_environment() -> Path:
    """Ray Serve and what our package needs; the package itself comes from this checkout, by PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ours = project["optional-dependencies"]["serving"]
    return venv(f"ray-{RAY}", f"ray[serve]=={RAY}", *project["dependencies"], *ours)


class _made_once:
    """Whether to make a folder; it counts as made when that has ended well and of the same content."""

    def __init__(self, folder: Path, content: str) -> None:
        self._stamp, self._content = folder / ".made-of", content

    def __enter__(self) -> bool:
        return not (self._stamp.exists() and self._stamp.read_text() == self._content)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._stamp.write_text(self._content)


def _run(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise Unavailable(f"`{' '.join(map(str, command))}` ended with {done.returncode}: {done.stderr.strip()[-400:]}")


def version_of_nginx(binary: Path) -> str:
    said = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr
    return said.strip().rpartition("/")[2]
