"""The images, without building them: what they install is what the lock says, and nothing in them is out of place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
IMAGES = ("operator", "serving", "training")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def entries(path: Path) -> dict[str, str]:
    """Package -> its whole entry, hashes included."""
    found = re.split(r"\n(?=\S)", path.read_text().strip())
    return {canonicalize_name(re.split("[=<>;@ ]", each, maxsplit=1)[0]): each for each in found}


def lock(image: str) -> dict[str, str]:
    return entries(ROOT / image / "requirements.lock")


def closure(requirements: Iterable[str], found: set[str]) -> set[str]:
    """Names of all that `requirements` need on the images' platform, as the installed packages say."""
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            seen = f"{name}[{extra}]" if extra else name
            if seen in found:
                continue
            found.add(seen)
            inner = extras(extra) if name == "cowest" else metadata.requires(name) or []
            closure((each for each in inner if applies(Requirement(each), extra)), found)
    return found


def extras(extra: str) -> list[str]:
    return PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]


def applies(requirement: Requirement, extra: str) -> bool:
    image = {"extra": extra, "python_version": "3.11", "python_full_version": "3.11.9", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(image)


def dockerfile(image: str) -> str:
    return (ROOT / image / "Dockerfile").read_text()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_entries_of_the_one_lock(image: str) -> None:
    whole = entries(ROOT / "requirements.lock")
    assert [each for name, each in lock(image).items() if whole.get(name) != each] == [], "run `make lock-images`"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_all_that_its_extra_needs(image: str) -> None:
    needed = {name for name in closure([f"cowest[{image}]"], set()) if "[" not in name} - {"cowest"}
    assert needed - set(lock(image)) == set(), "run `make lock-images`"


def test_the_operators_image_has_no_model_libraries() -> None:
    assert not {"torch", "transformers", "trl", "ray", "kserve", "pyarrow", "numpy", "starlette"} & set(
        lock("operator")
    )


IMPORTED = """
import importlib.metadata, pkgutil, runpy, sys
import cowest_operator
for each in pkgutil.walk_packages(cowest_operator.__path__, "cowest_operator."):
    if each.name != "cowest_operator.docs":  # makes the documents of the repository
        __import__(each.name)
owners = importlib.metadata.packages_distributions()
print(*{owner for name in sys.modules if "." not in name for owner in owners.get(name, ())})
"""


def test_the_operators_image_has_all_that_its_modules_import() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    installed = {canonicalize_name(name) for name in done.stdout.split()} - {"cowest"}
    assert "kopf" in installed
    assert installed <= {*lock("operator"), "setuptools"}


def test_the_serving_image_has_no_torch() -> None:
    assert not {"torch", "transformers", "trl", "kubernetes", "kopf"} & set(lock("serving"))


@pytest.mark.parametrize("image", IMAGES)
def test_the_final_stage_runs_as_the_images_user_and_knows_no_index(image: str) -> None:
    final = dockerfile(image).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", final, re.MULTILINE) == ["65532:65532"]
    assert "ARG" not in final
    assert "pip" not in final


@pytest.mark.parametrize("image", IMAGES)
def test_packages_come_with_hashes_and_without_a_compiler(image: str) -> None:
    text = dockerfile(image)
    assert text.count("pip install") == text.count("--require-hashes --only-binary :all:") > 0
    assert "apt-get" not in text


@pytest.mark.parametrize("image", IMAGES)
def test_no_host_is_named_but_the_base_images(image: str) -> None:
    assert set(re.findall(r"[\w.-]+\.(?:io|com|org|net)\b(?!\.)", dockerfile(image))) <= {"docker.io"}


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there_and_in_the_build_context(image: str) -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", dockerfile(image), re.MULTILINE)
    taken = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied:
        assert list(ROOT.glob(source)), source
        assert source in taken, source


def test_torch_is_a_layer_of_its_own_and_nothing_is_lost() -> None:
    path = ROOT / "training" / "requirements.lock"
    torch, libraries = (
        subprocess.run(["awk", script, str(path)], capture_output=True, text=True, check=True).stdout
        for script in re.findall(r"awk '(.*?)'", dockerfile("training"))
    )
    assert sorted((torch + libraries).splitlines()) == sorted(path.read_text().splitlines())
    assert {"torch==", "triton="} <= {line[:7] for line in torch.splitlines()}
    assert not re.search("^(torch|nvidia-)", libraries, re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_make_images_calls_the_builder_for_each_image() -> None:
    lines = {image: f"{image}/Dockerfile . registry.example.com/cowest/{image}:t" for image in IMAGES}
    ray = "serving/Dockerfile . registry.example.com/cowest/serving:t-ray --build-arg EXTRAS=ray"
    assert made("images") == [lines["operator"], lines["serving"], ray, lines["training"]]
    assert made("images", "IMAGES=operator training") == [lines["operator"], lines["training"]]


def made(target: str, *settings: str) -> list[str]:
    """The lines of the builder's calls, which `echo` is instead of it."""
    named = ["IMAGE_REGISTRY=registry.example.com", "IMAGE_TAG=t", "IMAGE_BUILD=echo"]
    command = ["make", "--silent", target, *named, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_the_builder_is_given_file_context_tag_and_what_ray_needs(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text('#!/bin/sh\nfor each; do printf "[%s]" "$each"; done; echo\n')
    (tmp_path / "docker").chmod(0o755)
    command = ["make", "--silent", "image-serving-ray", "IMAGE_TAG=t", "IMAGE_OPTIONS=--quiet"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == (
        "[build][--quiet][--file][serving/Dockerfile][--tag][docker.io/cowest/serving:t-ray]"
        "[--build-arg][EXTRAS=ray][.]\n"
    ), done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_the_builder_is_told_of_an_index_and_of_no_path_of_the_host(tmp_path: Path) -> None:
    """A path would not be there in the build."""
    (tmp_path / "docker").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_CERT": "/etc/ssl/own.pem"}
    command = ["make", "--silent", "image-operator"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    told = set(re.findall("--build-arg (PIP_[A-Z_]+)", done.stdout))
    assert told == {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_FIND_LINKS"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_sizes_are_told_above_the_base() -> None:
    sizes = {"python": 200, "operator:t": 307, "serving:t": 511, "serving:t-ray": 900, "training:t": 2000}
    size = "; ".join(f"*{name}*) echo {mb};" for name, mb in sorted(sizes.items(), reverse=True))
    told = made("image-sizes", f"IMAGE_SIZE=sh -c 'case $$0 in {size} esac'")
    tags = ("operator:t", "serving:t", "serving:t-ray", "training:t")
    base = "docker.io/library/python:3.11-slim-bookworm"
    assert told == [f"registry.example.com/cowest/{tag}: {sizes[tag]} MB, {sizes[tag] - 200} MB on top of {base}"
                    for tag in tags]  # fmt: skip


BUILDERS = [
    pytest.param("docker", "echo 307100000", id="docker, in bytes"),
    pytest.param("podman", "echo 307100000", id="podman, in bytes"),
    pytest.param("buildah", 'echo "307 MB"', id="buildah, in words"),
    pytest.param("buildah", 'echo "0.307 GB"', id="buildah, in other words"),
]


@pytest.mark.parametrize(("builder", "says"), BUILDERS)
def test_the_builder_at_hand_says_how_large_an_image_is(builder: str, says: str, tmp_path: Path) -> None:
    for name in ("docker", "podman", "buildah"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says if name == builder else 'exit 1'}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "image-size", "a:b"], capture_output=True, text=True, env=environment)
    assert done.stdout == "307\n", done.stderr
